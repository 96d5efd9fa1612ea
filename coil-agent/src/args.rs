//! Command lines of `coild` and `coild uninstall`.

use std::path::PathBuf;

use clap::{ArgAction, Args, Parser};
use coil_common::names;
use coil_runtime::admin::ListenAddr;
use coil_runtime::duration::GoDuration;
use coil_runtime::telemetry::LogArgs;

use crate::datapath::timeouts::Timeouts;
use crate::datapath::{AttachChoice, IcmpLimit, TunnelKind};

/// The node agent of Coil: keeps the datapath of this node as Pods and Egresses ask for.
///
/// The datapath goes on when the agent ends. `coild uninstall` takes it away.
#[derive(Parser, Clone, Debug)]
pub struct CoildArgs {
    /// Address of the metrics server.
    #[arg(long, env = "COIL_METRICS_ADDR", default_value = ":9384")]
    pub metrics_addr: ListenAddr,
    /// Address of the health server.
    #[arg(long, env = "COIL_HEALTH_ADDR", default_value = ":9385")]
    pub health_addr: ListenAddr,
    /// UNIX socket for the CNI plugin.
    #[arg(long, env = "COIL_SOCKET", default_value = "/run/coild.sock")]
    pub socket: PathBuf,
    /// Name of the node that this agent runs on.
    #[arg(long, env = "COIL_NODE_NAME", default_value = "", hide_default_value = true)]
    pub node_name: String,
    /// What the agent does on this node.
    #[command(flatten)]
    pub features: FeatureArgs,
    /// Networking of pods.
    #[command(flatten)]
    pub network: NetworkArgs,
    /// The datapath.
    #[command(flatten)]
    pub datapath: DatapathArgs,
    /// Logging.
    #[command(flatten)]
    pub log: LogArgs,
    /// Flags of the original that have no effect.
    #[command(flatten)]
    pub legacy: LegacyArgs,
}

/// What the agent does on this node.
#[derive(Args, Clone, Debug)]
pub struct FeatureArgs {
    /// Hand out addresses to pods.
    #[arg(long, env = "COIL_ENABLE_IPAM", default_value_t = true, action = ArgAction::Set,
          num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub enable_ipam: bool,
    /// Let pods leave the cluster through Egresses.
    #[arg(long, env = "COIL_ENABLE_EGRESS", default_value_t = true, action = ArgAction::Set,
          num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub enable_egress: bool,
    /// Send only connections that a pod opens through Egresses, not its answers to others; as if every
    /// Egress had `originatingOnly`.
    #[arg(long, env = "COIL_ENABLE_ORIGINATING_ONLY", default_value_t = false, action = ArgAction::Set,
          num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub enable_originating_only: bool,
}

/// Networking of pods, when addresses are handed out here.
#[derive(Args, Clone, Debug)]
pub struct NetworkArgs {
    /// Routing table of the node for routes to its pods.
    #[arg(long, env = "COIL_POD_TABLE_ID", default_value_t = 116)]
    pub pod_table_id: u32,
    /// Priority of the rule that looks up the table of pods.
    #[arg(long, env = "COIL_POD_RULE_PRIO", default_value_t = 2000)]
    pub pod_rule_prio: u32,
    /// Routing table of the node for its address blocks, from which a routing daemon takes them.
    #[arg(long, env = "COIL_EXPORT_TABLE_ID", default_value_t = 119)]
    pub export_table_id: u32,
    /// Protocol number that our routes are marked with; routes of others are never touched.
    #[arg(long, env = "COIL_PROTOCOL_ID", default_value_t = 30)]
    pub protocol_id: u8,
    /// Name interfaces as Calico expects them, for its network policies.
    #[arg(long, env = "COIL_COMPAT_CALICO", default_value_t = false, action = ArgAction::Set,
          num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub compat_calico: bool,
    /// Adopt also pods whose routes Coil 2.0.1 and older have left in the main table.
    #[arg(long, env = "COIL_REGISTER_FROM_MAIN", default_value_t = false, action = ArgAction::Set,
          num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub register_from_main: bool,
    /// Empty address blocks of this node are looked for, and given back, at this interval.
    #[arg(long, env = "COIL_ADDRESSBLOCK_GC_INTERVAL", default_value = "5m")]
    pub addressblock_gc_interval: GoDuration,
    /// When the agent ends and its Node is deleted, remove the routes to its address blocks.
    #[arg(long, env = "COIL_CLEAR_ROUTES_ON_SHUTDOWN", default_value_t = false, action = ArgAction::Set,
          num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub clear_routes_on_shutdown: bool,
}

impl NetworkArgs {
    /// Both tables must be ours alone: not none, nor those that the kernel itself uses.
    fn check(&self) -> Result<(), ArgsError> {
        let reserved = [0, 253, 254, 255];
        let tables = [self.pod_table_id, self.export_table_id];
        match tables.iter().find(|table| reserved.contains(*table)) {
            Some(table) => Err(ArgsError::Table(*table)),
            None if self.pod_table_id == self.export_table_id => Err(ArgsError::Table(self.pod_table_id)),
            None => Ok(()),
        }
    }
}

/// The datapath.
#[derive(Args, Clone, Debug)]
pub struct DatapathArgs {
    /// UDP port of the tunnels between client pods and egress pods.
    #[arg(long, env = "COIL_EGRESS_PORT_NUMBER", default_value_t = 5555, value_parser = clap::value_parser!(u16).range(1..))]
    pub egress_port: u16,
    /// Tunnel by which pods of this node send to egress pods. Both kinds are received, and egress pods
    /// answer by the kind that they are spoken to by.
    #[arg(long, env = "COIL_TUNNEL", value_enum, default_value_t)]
    pub tunnel: TunnelKind,
    /// Let packets of established flows go from a client pod to an egress pod of the same node, and back, without a
    /// tunnel.
    #[arg(long, env = "COIL_SAME_NODE_BYPASS", default_value_t = false, action = ArgAction::Set,
          num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub same_node_bypass: bool,
    /// How programs are attached to the interfaces of new pods; others keep what they have.
    #[arg(long, env = "COIL_ATTACH", value_enum, default_value_t)]
    pub attach: AttachChoice,
    /// Folder for pinned maps and links, on a BPF file system of the node.
    #[arg(long, env = "COIL_BPFFS_ROOT", default_value = names::PIN_ROOT)]
    pub bpffs_root: PathBuf,
    /// Egress flows of this node, for each address family, when the maps are made.
    #[arg(long, env = "COIL_MAX_FLOWS", default_value_t = default_flows(), value_parser = clap::value_parser!(u32).range(1024..))]
    pub max_flows: u32,
    /// ICMP errors to pods.
    #[command(flatten)]
    pub icmp: IcmpLimit,
    /// Send tunnelled packets of flows that were answered past the node's IP stack: what filters, IPsec
    /// and counters of the stack see is the first packet of each flow and tick (16 to 160 ms).
    #[arg(long, env = "COIL_SHORTCUT", default_value_t = false, action = ArgAction::Set,
          num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub shortcut: bool,
    /// Egress flows of one address family that a pod may have at a time; 0 for no limit, a quarter of
    /// --max-flows by default.
    #[arg(long, env = "COIL_MAX_FLOWS_PER_POD", value_name = "FLOWS")]
    pub max_flows_per_pod: Option<u32>,
    /// What happens to IP protocols other than TCP, UDP and ICMP on their way to an Egress.
    #[arg(long, env = "COIL_OTHER_PROTOCOLS", value_enum, default_value_t = OtherProtocols::Drop)]
    pub other_protocols: OtherProtocols,
    /// How long idle flows are kept.
    #[command(flatten)]
    pub timeouts: Timeouts,
}

/// What happens to IP protocols without ports that are known here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum OtherProtocols {
    /// They are dropped and counted.
    Drop,
    /// Those whose checksums allow it (SCTP, GRE, ESP, L2TP, IPv6 in IPv4 and the reverse) are translated by their address
    /// alone: one client at a time for each protocol and destination.
    AddressOnly,
}

fn default_flows() -> u32 {
    u32::try_from(names::MAX_FLOWS).unwrap_or(u32::MAX)
}

macro_rules! legacy {
    ($($field:ident),+ $(,)?) => {
        /// Flags of the original that have no effect here, so that its manifests still work.
        #[derive(Args, Clone, Debug, Default)]
        #[expect(missing_docs, reason = "named after the flags")]
        pub struct LegacyArgs {
            $(
                #[arg(long, hide = true, num_args = 0..=1, default_missing_value = "true")]
                pub $field: Option<String>,
            )+
        }

        impl LegacyArgs {
            /// Flags that were given.
            #[must_use]
            pub fn given(&self) -> Vec<&'static str> {
                let Self { $($field),+ } = self;
                [$($field.as_ref().map(|_| stringify!($field))),+]
                    .into_iter()
                    .flatten()
                    .collect()
            }
        }
    };
}

legacy! {
    backend,
}

/// Why a command line cannot be carried out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ArgsError {
    /// There is no name of the node.
    #[error("COIL_NODE_NAME environment variable should be set")]
    NodeName,
    /// Nothing to do.
    #[error("configuration error: both IPAM and egress are disabled")]
    Nothing,
    /// Routes to pods must not be mixed up with others.
    #[error("--pod-table-id and --export-table-id must be two tables of their own, not {0}")]
    Table(u32),
}

impl CoildArgs {
    /// Checks what the parser cannot.
    pub fn check(&self) -> Result<(), ArgsError> {
        let FeatureArgs { enable_ipam, enable_egress, enable_originating_only: _ } = self.features;
        if !enable_ipam && !enable_egress {
            return Err(ArgsError::Nothing);
        }
        if enable_ipam {
            self.network.check()?;
        }
        if self.node_name.is_empty() {
            return Err(ArgsError::NodeName);
        }
        Ok(())
    }
}

/// Detaches Coil's programs from all interfaces of this node and removes everything that is pinned.
#[derive(Parser, Clone, Debug)]
pub struct UninstallArgs {
    /// Folder of pinned maps and links.
    #[arg(long, env = "COIL_BPFFS_ROOT", default_value = names::PIN_ROOT)]
    pub bpffs_root: PathBuf,
    /// Logging.
    #[command(flatten)]
    pub log: LogArgs,
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;
    use crate::datapath::AttachMode;

    fn parse(args: &[&str]) -> CoildArgs {
        let args = ["coild", "--node-name=n"].iter().chain(args);
        CoildArgs::try_parse_from(args).unwrap()
    }

    #[test]
    fn modes() {
        assert_eq!(parse(&[]).check(), Ok(()));
        assert_eq!(parse(&["--enable-egress=false"]).check(), Ok(()));
        assert_eq!(parse(&["--enable-ipam=false", "--enable-egress=false"]).check(), Err(ArgsError::Nothing));
        let egress_only = ["--enable-ipam=false", "--enable-egress"];
        assert_eq!(parse(&egress_only).check(), Ok(()));
        let mut nameless = parse(&egress_only);
        nameless.node_name.clear();
        assert_eq!(nameless.check(), Err(ArgsError::NodeName));
        let originating = parse(&["--enable-ipam=false", "--enable-originating-only"]);
        assert_eq!((originating.check(), originating.features.enable_originating_only), (Ok(()), true));
    }

    #[test]
    fn the_table_of_pods_is_nobody_elses() {
        let defaults = parse(&[]).network;
        assert_eq!((defaults.pod_table_id, defaults.pod_rule_prio, defaults.protocol_id), (116, 2000, 30));
        assert_eq!(defaults.export_table_id, 119);
        for bad in ["--pod-table-id=0", "--pod-table-id=254", "--export-table-id=255", "--pod-table-id=119"] {
            assert!(matches!(parse(&[bad]).check(), Err(ArgsError::Table(_))), "{bad}");
            assert_eq!(parse(&[bad, "--enable-ipam=false"]).check(), Ok(()), "{bad}");
        }
        assert_eq!(parse(&["--pod-table-id=1116"]).check(), Ok(()));
    }

    #[test]
    fn manifests_of_the_original_still_work() {
        let args = parse(&[
            "--zap-stacktrace-level=panic",
            "--enable-ipam=false",
            "--enable-egress=true",
            "--pod-table-id=0",
            "--protocol-id=2",
            "--backend=nftables",
            "--compat-calico",
        ]);
        assert_eq!(args.check(), Ok(()));
        assert_eq!(args.legacy.given(), ["backend"]);
        assert!(args.network.compat_calico);
        let args = parse(&[
            "--addressblock-gc-interval=1h30m",
            "--clear-routes-on-shutdown",
            "--register-from-main=true",
        ]);
        assert_eq!(args.network.addressblock_gc_interval.0.as_secs(), 5400);
        assert!(args.network.clear_routes_on_shutdown && args.network.register_from_main);
        assert_eq!(args.datapath.egress_port, 5555);
        assert_eq!(args.datapath.tunnel, TunnelKind::Fou);
        assert_eq!(parse(&["--tunnel=ipip"]).datapath.tunnel, TunnelKind::Ipip);
    }

    #[test]
    fn programs_are_attached_as_suits_whoever_wires_the_pods() {
        let mode = |args: &[&str], own| parse(args).datapath.attach.mode(own);
        assert_eq!((mode(&[], true), mode(&[], false)), (Some(AttachMode::Clsact), None));
        for own in [false, true] {
            assert_eq!(mode(&["--attach=tcx"], own), Some(AttachMode::Tcx));
            assert_eq!(mode(&["--attach=clsact"], own), Some(AttachMode::Clsact));
        }
    }
}
