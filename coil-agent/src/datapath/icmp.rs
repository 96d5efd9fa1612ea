//! How many ICMP errors the datapath may make.

use clap::Args;
use coil_common::config::{Config, DEFAULT_ICMP_BURST, DEFAULT_ICMP_RATE};

/// Bounds of the ICMP errors that the datapath makes in place of packets.
#[derive(Args, Clone, Copy, Debug, PartialEq, Eq)]
pub struct IcmpLimit {
    /// ICMP errors that each processor may send a second; 0 for no limit.
    #[arg(long = "icmp-error-rate", env = "COIL_ICMP_ERROR_RATE", default_value_t = DEFAULT_ICMP_RATE)]
    pub rate: u32,
    /// ICMP errors that each processor may send at once after a quiet time.
    #[arg(long = "icmp-error-burst", env = "COIL_ICMP_ERROR_BURST", default_value_t = DEFAULT_ICMP_BURST)]
    pub burst: u32,
}

impl Default for IcmpLimit {
    fn default() -> Self {
        Self { rate: DEFAULT_ICMP_RATE, burst: DEFAULT_ICMP_BURST }
    }
}

impl IcmpLimit {
    /// Writes them into the configuration of the programs.
    pub(crate) fn apply(self, config: &mut Config) {
        let Self { rate, burst } = self;
        config.icmp_rate = rate;
        config.icmp_burst = burst;
    }
}
