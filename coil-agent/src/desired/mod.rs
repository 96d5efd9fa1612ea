//! What this node's datapath should look like: the contract between the picture of the cluster
//! (`index`) and the maps (`datapath`). Plain immutable data; built purely, compared by value.

pub mod build;
pub mod policy;
pub mod prefer;

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use ipnet::{Ipv4Net, Ipv6Net};

/// Namespace and name of an Egress.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct EgressName {
    /// Namespace.
    pub namespace: String,
    /// Name.
    pub name: String,
}

/// UID of a pod.
pub type PodUid = String;

/// Name of the folder of a gateway that does not know its UID. The underscore, which no name in Kubernetes
/// has, tells it from a UID. A BPF file system takes no name with a dot (kernel: `bpf_lookup` in
/// `kernel/bpf/inode.c`).
#[must_use]
pub fn named_folder(namespace: &str, name: &str) -> String {
    format!("{namespace}_{name}").replace(['/', '.'], "_")
}

/// Everything that the datapath of this node should hold.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DesiredState {
    /// Pods of this node whose host-side interface is known.
    pub pods: BTreeMap<PodUid, DesiredPod>,
    /// Egresses that policies of these pods refer to, deleted ones included.
    pub egresses: BTreeMap<EgressName, DesiredEgress>,
    /// True once every watch has finished its first list and local pods are recovered. Until then
    /// nothing that the kernel holds may be deleted.
    pub complete: bool,
}

/// A pod of this node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DesiredPod {
    /// Namespace, for messages.
    pub namespace: String,
    /// Name, for messages.
    pub name: String,
    /// Index of the host-side interface.
    pub ifindex: u32,
    /// IPv4 address.
    pub ipv4: Option<Ipv4Addr>,
    /// IPv6 address.
    pub ipv6: Option<Ipv6Addr>,
    /// It is an egress gateway.
    pub gateway: bool,
    /// Largest IP packet, outer headers included, that may leave towards a gateway, in bytes.
    pub mtu: u32,
    /// Egress policy; `None` for a pod that is nobody's client.
    pub policy: Option<Arc<Policy>>,
}

/// Egress policy of a pod, compiled so that the longest prefix decides. Pods with equal policies
/// share one set in the maps.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Policy {
    /// IPv4 destinations.
    pub v4: BTreeMap<Ipv4Net, PolicyAction>,
    /// IPv6 destinations.
    pub v6: BTreeMap<Ipv6Net, PolicyAction>,
}

/// What happens to packets towards a prefix.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum PolicyAction {
    /// They leave as they are.
    Direct,
    /// They leave through an Egress.
    Egress(EgressName),
    /// They are dropped: they left through an Egress that is deleted and that the pod still names.
    Deleted(EgressName),
    /// They are dropped: the pod names an Egress that cannot be resolved.
    Block,
}

/// An Egress as this node needs it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DesiredEgress {
    /// All flows of a client go to one gateway.
    pub client_affinity: bool,
    /// Seconds after its last new flow for which such a client keeps its gateway.
    pub affinity_seconds: u32,
    /// What answers flows that have come to a client directly leaves directly.
    pub originating_only: bool,
    /// The outer source port follows the flow.
    pub source_port_auto: bool,
    /// It is deleted: it has no gateways, and what is on its way to it is dropped.
    pub deleted: bool,
    /// IPv4 addresses of gateways.
    pub v4: BTreeMap<Ipv4Addr, GatewayState>,
    /// IPv6 addresses of gateways.
    pub v6: BTreeMap<Ipv6Addr, GatewayState>,
}

/// Whether a gateway takes new flows. A gateway that is neither is not listed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GatewayState {
    /// Takes new flows.
    Ready,
    /// Takes new flows of other nodes: others are preferred here.
    Reserve,
    /// Not ready or terminating, still serving: keeps the flows it has.
    Draining,
}
