//! Which kind of tunnel pods of the node use towards gateways.

use clap::ValueEnum;
use coil_common::config::{CONFIG_IPIP, Config};

/// A kind of tunnel between client pods and egress pods.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum TunnelKind {
    /// IP in UDP, as Coil v2 speaks it.
    #[default]
    Fou,
    /// IP in IP: eight bytes less, and what network cards can segment; routers and clouds must let
    /// IP protocols 4 and 41 pass.
    Ipip,
}

impl TunnelKind {
    /// Writes it into the configuration of the programs.
    pub(crate) const fn apply(self, config: &mut Config) {
        match self {
            Self::Fou => {}
            Self::Ipip => config.flags |= CONFIG_IPIP,
        }
    }
}
