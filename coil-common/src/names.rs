//! Names and capacities of programs, maps and pins.

/// Program at the ingress of a pod's host-side interface.
pub const PROGRAM_FROM_POD: &str = "from_pod";
/// Program at the egress of a pod's host-side interface.
pub const PROGRAM_TO_POD: &str = "to_pod";
/// Program at the ingress of `eth0` in an egress pod.
pub const PROGRAM_GATEWAY: &str = "gateway";

/// Pods of this node by index of the host-side interface: `u32` to `PodValue`.
pub const MAP_PODS: &str = "pods";
/// Array of `PodSlot`; index: [`pod_slot`].
pub const MAP_POD_SLOTS: &str = "pod_slots";
/// Policy by set and IPv4 destination: LPM `PolicyKey4` to `PolicyValue`.
pub const MAP_POLICY_V4: &str = "policy_v4";
/// Policy by set and IPv6 destination: LPM `PolicyKey6` to `PolicyValue`.
pub const MAP_POLICY_V6: &str = "policy_v6";
/// Array of `EgressValue`.
pub const MAP_EGRESSES: &str = "egresses";
/// Array of `EgressNameValue`, index: id of the Egress.
pub const MAP_EGRESS_NAMES: &str = "egress_names";
/// Per-CPU array of `Counter`; index: [`egress_stat`](crate::stats::egress_stat).
pub const MAP_EGRESS_STATS: &str = "egress_stats";
/// Array of `GatewayValue`.
pub const MAP_GATEWAYS: &str = "gateways";
/// Gateways that may send to the pods of a set: `PeerKey4` to `u32`, the gateway's index.
pub const MAP_PEERS_V4: &str = "peers_v4";
/// Gateways that may send to the pods of a set: `PeerKey6` to `u32`, the gateway's index.
pub const MAP_PEERS_V6: &str = "peers_v6";
/// Egress flows of the pods of this node: `FlowKey4` to `FlowValue`.
pub const MAP_FLOWS_V4: &str = "flows_v4";
/// Egress flows of the pods of this node: `FlowKey6` to `FlowValue`.
pub const MAP_FLOWS_V6: &str = "flows_v6";
/// Gateways that clients keep: `AffinityKey` to `AffinityValue`.
pub const MAP_AFFINITY: &str = "affinity";
/// Flows that have come to pods directly: `FlowKey4` to `InboundValue`.
pub const MAP_INBOUND_V4: &str = "inbound_v4";
/// Flows that have come to pods directly: `FlowKey6` to `InboundValue`.
pub const MAP_INBOUND_V6: &str = "inbound_v6";
/// Clients of this gateway: `ClientKey4` to `ClientValue`.
pub const MAP_CLIENTS_V4: &str = "clients_v4";
/// Clients of this gateway: `ClientKey6` to `ClientValue`.
pub const MAP_CLIENTS_V6: &str = "clients_v6";
/// Translations from clients: `FlowKey4` to `NatValue4`.
pub const MAP_NAT_FORWARD_V4: &str = "nat_forward_v4";
/// Translations from clients: `FlowKey6` to `NatValue6`.
pub const MAP_NAT_FORWARD_V6: &str = "nat_forward_v6";
/// Translations of replies, owners of ports: `FlowKey4` to `NatValue4`.
pub const MAP_NAT_REVERSE_V4: &str = "nat_reverse_v4";
/// Translations of replies, owners of ports: `FlowKey6` to `NatValue6`.
pub const MAP_NAT_REVERSE_V6: &str = "nat_reverse_v6";
/// Array of `u64`, a bit for each port that translation must not use; index: [`excluded_port`].
///
/// [`excluded_port`]: crate::usage::excluded_port
pub const MAP_EXCLUDED_PORTS: &str = "excluded_ports";
/// Array of `u64`, flows by user of a gateway; indices in [`usage`](crate::usage). Not for `bpftool`:
/// user space has it mapped.
pub const MAP_GATEWAY_USAGE: &str = "gateway_usage";
/// Array of `u64`, remotes towards which no port was free; index: [`full_remote`].
///
/// [`full_remote`]: crate::usage::full_remote
pub const MAP_FULL_REMOTES: &str = "full_remotes";
/// Per-CPU array of `u64`: new flows by the number of ports that were tried.
pub const MAP_PORT_PROBES: &str = "port_probes";
/// Array of `u64`, egress flows by pod of a node; indices in [`usage`](crate::usage).
pub const MAP_POD_USAGE: &str = "pod_usage";
/// Per-CPU array of `Counter`, index: `GatewayStat`.
pub const MAP_GATEWAY_STATS: &str = "gateway_stats";
/// Per-CPU array of `Counter`, index: `DropReason`.
pub const MAP_DROPS: &str = "drops";

/// Datagrams of which fragments go by, LRU: `FlowKey4` to `FragmentValue`.
pub const MAP_FRAGMENTS_V4: &str = "fragments_v4";
/// Datagrams of which fragments go by, LRU: `FlowKey6` to `FragmentValue`.
pub const MAP_FRAGMENTS_V6: &str = "fragments_v6";
/// Per-CPU array of `Counter`, index: `IcmpStat`.
pub const MAP_ICMP_STATS: &str = "icmp_stats";
/// Pods of this node by IPv4 address: `ClientKey4` to the index of the host-side interface.
pub const MAP_NEAR_V4: &str = "near_v4";
/// Pods of this node by IPv6 address: `ClientKey6` to the index of the host-side interface.
pub const MAP_NEAR_V6: &str = "near_v6";
/// `STATE_ENCAP` bits of all kinds of tunnels that clients of a gateway have ever used: array of one `u32`.
pub const MAP_ENCAPS: &str = "encaps";
/// Copy of the configuration that the programs were last loaded with, for tools: array of one
/// `ConfigValue`.
pub const MAP_CONFIG: &str = "config";
/// Names of the pods of this node by index of the host-side interface, for tools: `u32` to `PodNameValue`.
pub const MAP_POD_NAMES: &str = "pod_names";
/// Ring of `Event`s.
pub const MAP_EVENTS: &str = "events";
/// Who listens to events: array of one `Listener`.
pub const MAP_LISTENERS: &str = "listeners";
/// Bounds of events: per-CPU array of `EventBudget`, index: `event_budget`.
pub const MAP_EVENT_BUDGETS: &str = "event_budgets";

/// Maps of a node's programs, `drops` included.
pub const NODE_MAPS: &[&str] = &[
    MAP_PODS,
    MAP_POD_SLOTS,
    MAP_NEAR_V4,
    MAP_NEAR_V6,
    MAP_POLICY_V4,
    MAP_POLICY_V6,
    MAP_EGRESSES,
    MAP_EGRESS_NAMES,
    MAP_EGRESS_STATS,
    MAP_GATEWAYS,
    MAP_PEERS_V4,
    MAP_PEERS_V6,
    MAP_FLOWS_V4,
    MAP_FLOWS_V6,
    MAP_FRAGMENTS_V4,
    MAP_FRAGMENTS_V6,
    MAP_ICMP_STATS,
    MAP_AFFINITY,
    MAP_INBOUND_V4,
    MAP_INBOUND_V6,
    MAP_POD_USAGE,
    MAP_DROPS,
    MAP_CONFIG,
    MAP_POD_NAMES,
    MAP_EVENTS,
    MAP_LISTENERS,
    MAP_EVENT_BUDGETS,
];

/// Maps of a gateway's program, `drops` included.
pub const GATEWAY_MAPS: &[&str] = &[
    MAP_CLIENTS_V4,
    MAP_CLIENTS_V6,
    MAP_NAT_FORWARD_V4,
    MAP_NAT_FORWARD_V6,
    MAP_NAT_REVERSE_V4,
    MAP_NAT_REVERSE_V6,
    MAP_EXCLUDED_PORTS,
    MAP_GATEWAY_USAGE,
    MAP_FULL_REMOTES,
    MAP_PORT_PROBES,
    MAP_GATEWAY_STATS,
    MAP_ENCAPS,
    MAP_FRAGMENTS_V4,
    MAP_FRAGMENTS_V6,
    MAP_ICMP_STATS,
    MAP_DROPS,
    MAP_CONFIG,
    MAP_EVENTS,
    MAP_LISTENERS,
    MAP_EVENT_BUDGETS,
];

/// Clients and Egresses of one node for which a gateway is remembered; the oldest make room.
pub const MAX_AFFINITIES: usize = 32_768;
/// Flows of one family that have come to pods of one node directly and are remembered.
pub const MAX_INBOUND: usize = 131_072;
/// Pods of one node.
pub const MAX_PODS: usize = 4096;
/// Slots of pods that are found without a search; a power of two.
pub const POD_SLOTS: usize = 8192;

/// Index into `pod_slots` of an interface.
#[inline(always)]
#[must_use]
pub const fn pod_slot(ifindex: u32) -> u32 {
    ifindex % POD_SLOTS as u32
}

/// Policy entries of one node and family.
pub const MAX_POLICIES: usize = 65_536;
/// Egress objects that pods of one node use.
pub const MAX_EGRESSES: usize = 1024;
/// Gateway addresses that pods of one node use.
pub const MAX_GATEWAYS: usize = 16_384;
/// Pairs of policy set and gateway of one node and family.
pub const MAX_PEERS: usize = 65_536;
/// Egress flows of one node and family, by default.
pub const MAX_FLOWS: usize = 524_288;
/// Clients of one gateway and family.
pub const MAX_CLIENTS: usize = 131_072;
/// Translated flows of one gateway and family, by default.
pub const MAX_NAT: usize = 524_288;

/// Datagrams of one family of which fragments go by at a time.
pub const MAX_FRAGMENTS: usize = 16_384;

/// Folder of everything pinned, by default.
pub const PIN_ROOT: &str = "/sys/fs/bpf/coil";
/// Folder of pinned links, below the folder of the ABI.
pub const PIN_LINKS: &str = "links";
/// Folder with one folder of maps and links for each egress pod, named by its UID, below the folder
/// of the ABI.
pub const PIN_EGRESS: &str = "egress";
/// Folder that the one listener to events locks, below the folder of the ABI.
pub const PIN_LISTENER: &str = "listener";
