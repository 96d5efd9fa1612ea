//! Flags of `coil-controller`.

use clap::{Parser, ValueEnum};
use coil_runtime::admin::ListenAddr;
use coil_runtime::duration::GoDuration;
use coil_runtime::telemetry::LogArgs;

/// Turns Egress objects into egress pods, and keeps their status; gives blocks of address pools to nodes.
///
/// KUBECONFIG names the API server; without it the program must run in a pod.
#[derive(Parser, Debug)]
pub(crate) struct Args {
    /// Address of the metrics server.
    #[arg(long, env = "COIL_METRICS_ADDR", default_value = ":9386")]
    pub(crate) metrics_addr: ListenAddr,
    /// Address of the health server.
    #[arg(long, env = "COIL_HEALTH_ADDR", default_value = ":9387")]
    pub(crate) health_addr: ListenAddr,
    #[command(flatten)]
    pub(crate) egress: EgressArgs,
    #[command(flatten)]
    pub(crate) ipam: IpamArgs,
    #[command(flatten)]
    pub(crate) leader: LeaderArgs,
    /// Namespace of this pod.
    #[arg(long, env = "COIL_POD_NAMESPACE")]
    pub(crate) pod_namespace: Option<String>,
    /// Name of this pod.
    #[arg(long, env = "COIL_POD_NAME")]
    pub(crate) pod_name: Option<String>,
    #[command(flatten)]
    pub(crate) log: LogArgs,
}

/// Flags about egress pods.
#[derive(clap::Args, Debug)]
pub(crate) struct EgressArgs {
    /// UDP port of FOU: of the Services, of the egress pods, and of `coild`.
    // Not COIL_EGRESS_PORT, which Kubernetes sets in pods beside a Service named `coil-egress`.
    #[arg(long, env = "COIL_EGRESS_PORT_NUMBER", default_value_t = 5555, value_parser = clap::value_parser!(u16).range(1..))]
    pub(crate) egress_port: u16,
    /// Image of egress pods. Default: the image of the first container of this pod.
    #[arg(long, env = "COIL_EGRESS_IMAGE")]
    pub(crate) egress_image: Option<String>,
    /// Seconds in which the flows of an egress pod that ends may come to their own end. The pod's
    /// terminationGracePeriodSeconds is ten seconds more; one that the template sets goes first.
    #[arg(long, env = "COIL_EGRESS_DRAIN_TIMEOUT", default_value_t = 300, value_parser = clap::value_parser!(u32).range(..=86_400))]
    pub(crate) egress_drain_timeout: u32,
    /// Of the original; has no effect, since NAT is done by eBPF.
    #[arg(long, env = "COIL_BACKEND", value_enum, hide = true)]
    pub(crate) backend: Option<Backend>,
}

/// Values of `--backend`.
#[derive(ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Backend {
    /// iptables
    Iptables,
    /// nftables
    Nftables,
}

/// Flags about address pools.
#[derive(clap::Args, Debug)]
pub(crate) struct IpamArgs {
    /// Whether blocks of address pools are given to nodes. Off where another CNI plugin has the addresses.
    #[arg(long, env = "COIL_ENABLE_IPAM", default_value_t = true, action = clap::ArgAction::Set,
          num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub(crate) enable_ipam: bool,
    /// Time that a node must be gone before its blocks are taken back, as 5m or 90s. A node that reboots may
    /// be removed and registered again; within this time it finds its blocks as they were.
    #[arg(long, env = "COIL_NODE_GRACE_PERIOD", default_value = "5m")]
    pub(crate) node_grace_period: GoDuration,
    /// Time between looks at all pools and nodes, in case a change was missed.
    #[arg(long, env = "COIL_GC_INTERVAL", default_value = "1h")]
    pub(crate) gc_interval: GoDuration,
}

/// Flags about leader election.
#[derive(clap::Args, Debug)]
pub(crate) struct LeaderArgs {
    /// Whether only one of several replicas works at a time.
    #[arg(long, env = "COIL_LEADER_ELECT", default_value_t = true, action = clap::ArgAction::Set,
          num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub(crate) leader_elect: bool,
    /// Namespace of the Lease.
    #[arg(long, env = "COIL_LEADER_ELECT_NAMESPACE", default_value = "kube-system")]
    pub(crate) leader_elect_namespace: String,
    /// Name of the Lease for Egresses; that of the original keeps old and new from working side by side.
    #[arg(long, env = "COIL_LEADER_ELECT_NAME", default_value = "coil-egress-leader")]
    pub(crate) leader_elect_name: String,
    /// Name of the Lease for address pools; that of the original, too.
    #[arg(long, env = "COIL_LEADER_ELECT_IPAM_NAME", default_value = "coil-ipam-leader")]
    pub(crate) leader_elect_ipam_name: String,
}
