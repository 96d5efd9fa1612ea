//! Map values.

use bytemuck::{Pod, Zeroable};

use crate::pod::shared;

/// What `from_pod` and `to_pod` know of a pod; key: index of its host-side interface.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct PodValue {
    /// IPv4 address, all zero if it has none.
    pub ipv4: [u8; 4],
    /// IPv6 address, all zero if it has none.
    pub ipv6: [u8; 16],
    /// Policy set, or [`NO_POLICY`]. Sets never change once a pod refers to them: other contents
    /// get another number, so a flow that carries the number knows whether its decision is fresh.
    pub set: u32,
    /// `POD_*` bits.
    pub flags: u32,
    /// Largest IP packet in bytes, outer headers included, that may leave towards a gateway.
    pub mtu: u32,
}

/// A pod once more, where an array finds it without a search: index
/// [`pod_slot`](crate::names::pod_slot).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct PodSlot {
    /// Index of the interface, 0 if the slot is free. Whoever has another one asks `pods`.
    pub ifindex: u32,
    /// The same as in `pods`.
    pub pod: PodValue,
}

/// [`PodValue::set`] of a pod without egress policy.
pub const NO_POLICY: u32 = 0;
/// [`PodValue::flags`]: the pod is an egress gateway: tunnelled packets are its business.
pub const POD_GATEWAY: u32 = 1 << 0;
/// [`PodValue::flags`]: some egress of its set has [`EGRESS_ORIGINATING_ONLY`].
pub const POD_ORIGINATING_ONLY: u32 = 1 << 2;
/// [`PodValue::flags`]: source addresses are not checked (routers, virtual machines).
pub const POD_ANY_SOURCE: u32 = 1 << 1;

/// Result of a policy look-up.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct PolicyValue {
    /// Index into the `egresses` map, or [`EGRESS_DIRECT`] or [`EGRESS_BLOCK`].
    pub egress: u32,
}

/// [`PolicyValue::egress`]: leaves as it is, like a destination without any entry.
pub const EGRESS_DIRECT: u32 = u32::MAX;
/// [`PolicyValue::egress`]: dropped, since the Egress that the pod names cannot be resolved.
pub const EGRESS_BLOCK: u32 = u32::MAX - 1;

/// Slots of the consistent-hash table of an egress.
pub const MAGLEV_SLOTS: usize = 509;

/// An Egress for one address family; index: `2 * id + family` (0 is IPv4, 1 is IPv6).
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct EgressValue {
    /// `EGRESS_*` bits.
    pub flags: u32,
    /// Gateways in the table; 0 means that no gateway is ready.
    pub gateways: u16,
    /// Maglev table of indices into the `gateways` map.
    pub table: [u16; MAGLEV_SLOTS],
}

/// [`EgressValue::flags`]: all flows of a client go to one gateway (`sessionAffinity: ClientIP`).
pub const EGRESS_CLIENT_AFFINITY: u32 = 1 << 0;
/// [`EgressValue::flags`]: the outer source port is derived from the flow (`fouSourcePortAuto`).
pub const EGRESS_SOURCE_PORT_AUTO: u32 = 1 << 1;
/// [`EgressValue::flags`]: the Egress is deleted and some pod still names it. What its policies say is
/// dropped; they stay in the maps, since nobody else knows them once the agent is restarted.
pub const EGRESS_DELETED: u32 = 1 << 2;

/// [`EgressValue::flags`]: what answers flows that have come to the pod directly leaves directly.
pub const EGRESS_ORIGINATING_ONLY: u32 = 1 << 3;
/// [`EgressValue::flags`]: from this bit on, seconds for which a client keeps its gateway for new flows.
pub const EGRESS_AFFINITY_SHIFT: u32 = 8;

impl EgressValue {
    /// Seconds without a new flow after which a client may get another gateway; 0 means at once.
    #[inline(always)]
    #[must_use]
    pub const fn affinity_seconds(&self) -> u32 {
        self.flags >> EGRESS_AFFINITY_SHIFT
    }
}

/// Name of an Egress, so that indices survive the agent and a dump can be read; zero-padded.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct EgressNameValue {
    /// Namespace, empty if the index is free.
    pub namespace: [u8; 64],
    /// Name.
    pub name: [u8; 64],
}

/// A gateway pod; it has an IPv4 or an IPv6 address, never both: one entry a family.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct GatewayValue {
    /// IPv6 address, or an IPv4 address in the first four bytes.
    pub addr: [u8; 16],
    /// Grows with each re-use of the index: a flow of an earlier holder does not match.
    pub generation: u32,
    /// `GATEWAY_*` state.
    pub state: u32,
}

/// [`GatewayValue::state`]: the index is free; a flow that refers to it chooses again.
pub const GATEWAY_GONE: u32 = 0;
/// [`GatewayValue::state`]: takes new flows.
pub const GATEWAY_READY: u32 = 1;
/// [`GatewayValue::state`]: keeps the flows it has, takes no new ones.
pub const GATEWAY_DRAINING: u32 = 2;

/// A flow of a client pod through an egress; key: as the pod sends.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct FlowValue {
    /// Policy set by which the flow was last decided.
    pub set: u32,
    /// Index into the `egresses` map.
    pub egress: u32,
    /// Index into the `gateways` map.
    pub gateway: u32,
    /// [`GatewayValue::generation`] at the time of the choice.
    pub gateway_generation: u32,
    /// Seconds since boot (`CLOCK_MONOTONIC`) of the last packet of either direction.
    pub last_seen: u32,
    /// Seconds since boot of the first packet.
    pub created: u32,
    /// `STATE_*` bits.
    pub state: u32,
    /// Low half of the tick of the datapath's clock when `last_seen` was last looked at.
    pub tick: u16,
    /// Low half of the index of the interface of the pod that made it.
    pub pod: u16,
    /// IP packets from the pod.
    pub tx_packets: u64,
    /// IP bytes from the pod, as on the wire: headers counted for each segment of a GSO packet.
    pub tx_bytes: u64,
    /// IP packets to the pod.
    pub rx_packets: u64,
    /// IP bytes to the pod.
    pub rx_bytes: u64,
}

/// One direction of a translated IPv4 flow.
///
/// In `nat_forward_v4` the key is as the client sends and `addr`, `port` are the source that the
/// world sees. In `nat_reverse_v4` the key is as the remote sends and `addr`, `port` are the client:
/// this entry owns the port and is inserted first, with `BPF_NOEXIST`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct NatValue4 {
    /// Address to write.
    pub addr: [u8; 4],
    /// Port or ICMP identifier to write.
    pub port: [u8; 2],
    /// Low half of the tick of the datapath's clock when a packet last took the long way.
    pub tick: u16,
    /// `STATE_*` bits that this direction has shown.
    pub state: u32,
    /// Seconds since boot of the last packet of this direction.
    pub last_seen: u32,
    /// Seconds since boot of the first packet of the flow.
    pub created: u32,
    /// Zero.
    pub reserved: u32,
    /// IP packets of this direction.
    pub packets: u64,
    /// IP bytes of this direction, as on the wire.
    pub bytes: u64,
}

/// One direction of a translated IPv6 flow; see [`NatValue4`].
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct NatValue6 {
    /// Address to write.
    pub addr: [u8; 16],
    /// Port or ICMPv6 identifier to write.
    pub port: [u8; 2],
    /// Low half of the tick of the datapath's clock when a packet last took the long way.
    pub tick: u16,
    /// Seconds since boot of the last packet of this direction.
    pub last_seen: u32,
    /// `STATE_*` bits that this direction has shown; first half of a double word in every value, for
    /// the sake of atomic updates.
    pub state: u32,
    /// Seconds since boot of the first packet of the flow.
    pub created: u32,
    /// IP packets of this direction.
    pub packets: u64,
    /// IP bytes of this direction, as on the wire.
    pub bytes: u64,
}

/// `state`: a TCP SYN from the initiator was seen.
pub const STATE_SYN: u32 = 1 << 0;
/// `state`: a TCP FIN from the initiator was seen.
pub const STATE_FIN: u32 = 1 << 1;
/// `state`: a TCP RST from the initiator was seen.
pub const STATE_RST: u32 = 1 << 2;
/// `state`: a packet from the responder was seen.
pub const STATE_REPLY: u32 = 1 << 4;
/// `state`: a TCP FIN from the responder was seen.
pub const STATE_REPLY_FIN: u32 = 1 << 5;
/// `state`: a TCP RST from the responder was seen.
pub const STATE_REPLY_RST: u32 = 1 << 6;
/// `state`: the initiator has sent more than the opening packet.
pub const STATE_CONFIRMED: u32 = 1 << 7;

/// `state` of a translation: the client's packets come by IP in IP, and so do the answers.
pub const STATE_IPIP: u32 = 1 << 16;
/// `state` of a translation: the client's packets come from the same node without a tunnel. By which one they came
/// before stays noted beside it.
pub const STATE_DIRECT: u32 = 1 << 17;
/// Bits of `state` that are about the tunnel, not about the connection; none of them is FOU.
pub const STATE_ENCAP: u32 = STATE_IPIP | STATE_DIRECT;

/// What is known of a datagram whose first fragment was seen. The key is that of a flow with the
/// identification in place of the ports (right-aligned), and in IPv6 with the number of the fragment
/// header in place of the protocol.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct FragmentValue {
    /// Source port of the flow.
    pub src_port: [u8; 2],
    /// Destination port of the flow.
    pub dst_port: [u8; 2],
    /// Protocol of the flow.
    pub protocol: u8,
    /// `FRAGMENT_*` bits.
    pub flags: u8,
    /// Zero.
    pub pad: [u8; 2],
    /// Seconds since boot of the first fragment.
    pub seen: u32,
}

/// [`FragmentValue::flags`]: the last fragment has not been seen.
pub const FRAGMENT_OPEN: u8 = 1 << 0;
/// Seconds for which later fragments may follow the first, unless configured otherwise.
pub const FRAGMENT_SECONDS: u32 = 5;

/// A client pod that a gateway serves.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct ClientValue {
    /// `CLIENT_*` bits; none yet.
    pub flags: u32,
}

/// Who a pod is, for tools; all fields are padded with zeros.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct PodNameValue {
    /// UID.
    pub uid: [u8; 64],
    /// Namespace.
    pub namespace: [u8; 64],
    /// Name.
    pub name: [u8; 256],
}

/// A [`Config`](crate::config::Config) that a tool of another build can tell from its own.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct ConfigValue {
    /// Size of the configuration.
    pub size: u32,
    /// The configuration in the first `size` bytes.
    pub bytes: [u8; 252],
}

/// The gateway that a client's last new flow through an egress has got.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct AffinityValue {
    /// Index into the `gateways` map.
    pub gateway: u32,
    /// [`GatewayValue::generation`] at that time.
    pub generation: u32,
    /// Seconds since boot of the last new flow.
    pub last_used: u32,
    /// Zero.
    pub pad: u32,
}

/// A flow that has come to a pod directly, from a destination of one of its Egresses; key: as the pod
/// answers.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct InboundValue {
    /// `STATE_*` bits; the initiator is outside. First half of a double word, for the sake of atomic
    /// updates.
    pub state: u32,
    /// Seconds since boot of the last packet of either direction.
    pub last_seen: u32,
}

/// Packets and IP bytes.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct Counter {
    /// IP packets as on the wire: a GSO packet counts as its segments.
    pub packets: u64,
    /// IP bytes as on the wire: headers counted for each segment.
    pub bytes: u64,
}

shared! {
    PodValue = 32,
    PodSlot = 36,
    PolicyValue = 4,
    EgressValue = 1024,
    EgressNameValue = 128,
    GatewayValue = 24,
    FlowValue = 64,
    FragmentValue = 12,
    NatValue4 = 40,
    NatValue6 = 48,
    ClientValue = 4,
    PodNameValue = 384,
    ConfigValue = 256,
    Counter = 16,
    AffinityValue = 16,
    InboundValue = 8,
}
