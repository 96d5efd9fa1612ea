//! The short way: packets of established flows with the usual headers.
//!
//! What a hook does here it would also have done the long way, bit for bit; the tests hold both
//! against each other. Whatever is out of the ordinary (options, extension headers, fragments,
//! flags that change a connection, marks of congestion, packets that are too big, flows that are new
//! or whose decision is stale) is `None`, before anything has changed: the long way decides.
//!
//! It is short since all headers are behind one comparison with the end of the packet, since the
//! tables asked are arrays but for the one that has the flow, and since the clock is read once a
//! tick, not once a packet. A gateway does not ask again within a tick whether a client that it has
//! just served is still one, nor whether both halves of a translation are still there.

use coil_common::{
    config::{CONFIG_SOURCE_PORT_AUTO, Config},
    stats::{Direction, GatewayStat},
    values::{
        EGRESS_SOURCE_PORT_AUTO, FlowValue, GATEWAY_GONE, GatewayValue, POD_ORIGINATING_ONLY, PodValue,
        STATE_CONFIRMED, STATE_REPLY, STATE_REPLY_RST, STATE_RST,
    },
};

use super::{edit::End, wire};
use crate::{
    encap::Encap,
    family::{Family, V4, V6},
    flow::Flow,
    head::{Build, TCP, Tunnel, UDP},
    packet::{ETHERNET, Packet, View},
    parse::{
        Ip, L4,
        l4::{FIN, Kind, RST, SYN},
    },
    tables::{NatTables, NodeTables},
    verdict::{Rewrite, Way, source_port},
};

/// Where headers of the usual shape are.
pub trait Usual: Build {
    /// Bytes that are looked at of a packet that is not tunnelled: up to the end of a TCP header.
    const PLAIN: usize = ETHERNET + Self::HEADER + 20;
    /// Bytes that are looked at of a packet that is tunnelled by FOU.
    const TUNNELLED: usize = Self::PLAIN + Self::OVERHEAD as usize;

    /// The IP header at `at` if there is nothing between it and the transport header, and its length
    /// is true for a packet of `length` bytes.
    fn usual<V: View>(view: &V, at: usize, length: u32) -> Option<Ip<Self>>;
}

impl Usual for V4 {
    #[inline(always)]
    fn usual<V: View>(view: &V, at: usize, length: u32) -> Option<Ip<Self>> {
        let [version, tos, l0, l1] = view.word(at).to_ne_bytes();
        let [ttl, protocol] = view.half(at + 8).to_ne_bytes();
        // An offset, or more fragments; "don't fragment" does not matter.
        let fragment = u16::from_be(view.half(at + 6)) & 0x3fff;
        let total = u32::from(u16::from_be_bytes([l0, l1]));
        if version != 0x45 || fragment != 0 || total < 20 || at as u32 + total > length {
            return None;
        }
        Some(Ip {
            at,
            l4: at + 20,
            length: total,
            src: view.word(at + 12),
            dst: view.word(at + 16),
            protocol,
            first: [version, tos],
            tos,
            ttl,
            ttl_word: [ttl, protocol],
            check: view.half(at + 10).to_ne_bytes(),
            fragment: 0,
            obstacle: None,
        })
    }
}

impl Usual for V6 {
    #[inline(always)]
    fn usual<V: View>(view: &V, at: usize, length: u32) -> Option<Ip<Self>> {
        let [v0, v1] = view.half(at).to_ne_bytes();
        let [next, ttl] = view.half(at + 6).to_ne_bytes();
        let payload = u32::from(u16::from_be(view.half(at + 4)));
        let total = payload + 40;
        if v0 >> 4 != 6 || payload == 0 || at as u32 + total > length {
            return None;
        }
        let address = |at: usize| [view.word(at), view.word(at + 4), view.word(at + 8), view.word(at + 12)];
        Some(Ip {
            at,
            l4: at + 40,
            length: total,
            src: address(at + 8),
            dst: address(at + 24),
            protocol: next,
            first: [v0, v1],
            tos: (v0 << 4) | (v1 >> 4),
            ttl,
            ttl_word: [next, ttl],
            check: [0; 2],
            fragment: 0,
            obstacle: None,
        })
    }
}

/// The transport header of a packet in the middle of a flow.
#[inline(always)]
pub(super) fn transport<F: Family, V: View>(view: &V, ip: &Ip<F>) -> Option<L4> {
    let at = ip.l4;
    let room = ip.length - F::HEADER as u32;
    let [s0, s1, d0, d1] = view.word(at).to_ne_bytes();
    let (src_port, dst_port) = ([s0, s1], [d0, d1]);
    if ip.protocol == UDP {
        let length = u32::from(u16::from_be(view.half(at + 4)));
        return (length >= 8 && length <= room).then_some(L4 {
            kind: Kind::Udp,
            at,
            header: 8,
            src_port,
            dst_port,
            flags: 0,
        });
    }
    if ip.protocol != TCP {
        return None;
    }
    let [offset, flags] = view.half(at + 12).to_ne_bytes();
    let header = u32::from(offset >> 4) * 4;
    if header < 20 || header > room || flags & (SYN | FIN | RST) != 0 {
        return None;
    }
    Some(L4 { kind: Kind::Tcp, at, header: header as usize, src_port, dst_port, flags })
}

/// Bytes that a tunnel adds.
const fn overhead<F: Family, const IPIP: bool>() -> usize {
    if IPIP { F::HEADER } else { F::OVERHEAD as usize }
}

/// Outer source and inner headers of a tunnelled packet; tunnels of the other kind are the long way's.
#[inline(always)]
fn tunnelled<F: Usual, P: Packet, const IPIP: bool>(
    packet: &P,
    view: &P::View,
    config: &Config,
) -> Option<(Ip<F>, Ip<F>, L4)> {
    /// Congestion experienced.
    const CE: u8 = 3;
    let length = packet.length();
    let outer = F::usual(view, ETHERNET, length)?;
    let udp = outer.l4;
    let known = if IPIP {
        outer.protocol == F::IPIP
    } else {
        outer.protocol == UDP && view.half(udp + 2) == u16::from_ne_bytes(config.fou_port)
    };
    if !known || outer.tos & CE == CE {
        return None;
    }
    let inner = F::usual(view, ETHERNET + overhead::<F, IPIP>(), length)?;
    let outer_end = ETHERNET as u32 + outer.length;
    let [l0, l1, check @ ..] = if IPIP { [0; 4] } else { view.word(udp + 4).to_ne_bytes() };
    let end = if IPIP { outer_end } else { udp as u32 + u32::from(u16::from_be_bytes([l0, l1])) };
    let inner_end = inner.at as u32 + inner.length;
    // An outer checksum may be still to be filled in, of which a gateway frees the packet first.
    if end > outer_end || inner_end > end || u16::from_ne_bytes(check) != 0 {
        return None;
    }
    // Merged by somebody, or datagrams that nobody has cut.
    if packet.gso_size() != 0 && (inner_end != length || (!IPIP && inner.protocol == UDP)) {
        return None;
    }
    let l4 = transport(view, &inner)?;
    Some((outer, inner, l4))
}

/// The flow of a packet; ports as a word, since taking them apart and putting them together again
/// costs more than all else here.
#[inline(always)]
pub(super) fn flow<F: Family, V: View>(view: &V, ip: &Ip<F>, l4: &L4) -> Flow<F> {
    Flow::of_words(&ip.src, &ip.dst, view.word(l4.at), ip.protocol)
}

/// The flow of which a packet is the answer.
#[inline(always)]
pub(super) fn answered<F: Family, V: View>(view: &V, ip: &Ip<F>, l4: &L4) -> Flow<F> {
    Flow::of_words(&ip.dst, &ip.src, view.word(l4.at).rotate_left(16), ip.protocol)
}

/// A packet, or a datagram of one, does not fit the tunnel, or the packet must be cut first; see
/// [`wire::exceeds`] and [`wire::is_uncut`].
#[inline(always)]
fn is_odd<F: Family, P: Packet>(packet: &P, ip: &Ip<F>, l4: &L4, mtu: u32) -> bool {
    let size = packet.gso_size();
    if size == 0 {
        return ip.length + F::OVERHEAD > mtu.min(0xffff);
    }
    wire::exceeds(packet, ip, l4, mtu) || wire::is_uncut(packet, l4)
}

/// The gateway of a flow, if it still serves.
#[inline(always)]
fn gateway<'t, F: Family, T: NodeTables<F>>(value: &FlowValue, tables: &'t T) -> Option<&'t GatewayValue> {
    let gateway = tables.gateway(value.gateway)?;
    (gateway.generation == value.gateway_generation && gateway.state != GATEWAY_GONE).then_some(gateway)
}

/// How a packet of a known flow counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FlowHit<H> {
    flow: H,
    egress: u32,
    direction: Direction,
    packets: u32,
    bytes: u32,
    /// The flow was answered.
    pub answered: bool,
}

impl<H: Copy> FlowHit<H> {
    /// A packet of a flow that was answered.
    #[inline(always)]
    pub(super) const fn new(flow: H, egress: u32, direction: Direction, packets: u32, bytes: u32) -> Self {
        Self { flow, egress, direction, packets, bytes, answered: true }
    }

    /// Counts it.
    #[inline(always)]
    pub fn commit<F: Family, T: NodeTables<F, Flow = H>>(&self, tables: &T) {
        tables.hit_flow(self.flow, self.direction, self.packets, self.bytes);
        tables.hit_egress(self.egress, self.direction, self.packets, self.bytes);
    }
}

/// The header of a packet from a pod without policy, if it is one that passes: it has the pod's address.
#[inline(always)]
pub fn unserved<F: Usual, P: Packet>(packet: &P, pod: &PodValue) -> Option<Ip<F>> {
    let view = packet.view(ETHERNET + F::HEADER)?;
    let ip = F::usual(&view, ETHERNET, packet.length())?;
    F::same(&ip.src, &F::of_pod(pod)).then_some(ip)
}

/// Decides about a packet from `pod`, on a node that uses one kind of tunnel.
#[inline(always)]
pub fn from_pod<F: Usual, P: Packet, T: NodeTables<F>, const IPIP: bool>(
    packet: &P,
    pod: &PodValue,
    config: &Config,
    tables: &T,
    rewrite: &mut Rewrite<F>,
) -> Option<FlowHit<T::Flow>> {
    // Neither a gateway nor somebody with sources of its own; flows that an egress has it keeps.
    if pod.flags & !POD_ORIGINATING_ONLY != 0 {
        return None;
    }
    let view = packet.view(F::PLAIN)?;
    let ip = F::usual(&view, ETHERNET, packet.length())?;
    if !F::same(&ip.src, &F::of_pod(pod)) {
        return None;
    }
    let l4 = transport(&view, &ip)?;
    let flow = flow(&view, &ip, &l4);
    let entry = tables.flow(flow.key())?;
    let value = tables.flow_value(entry);
    if value.set != pod.set || value.state & (STATE_CONFIRMED | STATE_RST) != STATE_CONFIRMED {
        return None;
    }
    let gateway = gateway(&value, tables)?;
    let egress = tables.egress(value.egress)?;
    let encap = if IPIP { Encap::IPIP } else { Encap::FOU };
    if is_odd(packet, &ip, &l4, encap.like_fou(pod.mtu)) {
        return None;
    }
    let tally = wire::tally(packet, &ip, &l4, 0, 0);
    rewrite.begin_at(ip.at, Way::On);
    let auto = egress.flags & EGRESS_SOURCE_PORT_AUTO != 0;
    rewrite.enter_tunnel(push(&flow, &ip, F::of_pod(pod), F::of_gateway(gateway), encap, auto, config));
    Some(FlowHit {
        flow: entry,
        egress: value.egress,
        direction: Direction::Tx,
        packets: tally.packets,
        bytes: tally.bytes,
        answered: value.state & STATE_REPLY != 0,
    })
}

/// The headers to put in front of a packet.
#[inline(always)]
fn push<F: Family>(
    flow: &Flow<F>,
    ip: &Ip<F>,
    src: F::Addr,
    dst: F::Addr,
    encap: Encap,
    auto: bool,
    config: &Config,
) -> Tunnel<F> {
    let hash = flow.hash(config.seed);
    Tunnel {
        encap,
        src,
        dst,
        src_port: source_port(auto, hash, config),
        dst_port: config.fou_port,
        ecn: ip.tos & 3,
        inner: (ip.length & 0xffff) as u16,
        label: hash.bits16(),
    }
}

/// Decides about a packet to `pod` in a tunnel of one kind.
#[inline(always)]
pub fn to_pod<F: Usual, P: Packet, T: NodeTables<F>, const IPIP: bool>(
    packet: &P,
    pod: &PodValue,
    config: &Config,
    tables: &T,
    rewrite: &mut Rewrite<F>,
) -> Option<FlowHit<T::Flow>> {
    if pod.flags & !POD_ORIGINATING_ONLY != 0 {
        return None;
    }
    let view = packet.view(F::PLAIN + overhead::<F, IPIP>())?;
    let (outer, inner, l4) = tunnelled::<F, P, IPIP>(packet, &view, config)?;
    if !F::same(&inner.dst, &F::of_pod(pod)) {
        return None;
    }
    let entry = tables.flow(answered(&view, &inner, &l4).key())?;
    let value = tables.flow_value(entry);
    if value.set != pod.set || value.state & (STATE_REPLY | STATE_REPLY_RST) != STATE_REPLY {
        return None;
    }
    // The gateway that the flow goes through is one that may answer.
    let gateway = gateway(&value, tables)?;
    if !F::same(&outer.src, &F::of_gateway(gateway)) {
        return None;
    }
    let tally = wire::tally(packet, &inner, &l4, 0, 0);
    rewrite.begin_at(inner.at, Way::On);
    rewrite.pop = overhead::<F, IPIP>();
    Some(FlowHit {
        flow: entry,
        egress: value.egress,
        direction: Direction::Rx,
        packets: tally.packets,
        bytes: tally.bytes,
        answered: true,
    })
}

/// How a packet of a known translation counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EntryHit<E> {
    entry: E,
    stat: GatewayStat,
    packets: u32,
    bytes: u32,
}

impl<E: Copy> EntryHit<E> {
    /// A packet of a translation.
    #[inline(always)]
    pub(super) const fn new(entry: E, stat: GatewayStat, packets: u32, bytes: u32) -> Self {
        Self { entry, stat, packets, bytes }
    }

    /// Counts it.
    #[inline(always)]
    pub fn commit<F: Family, T: NatTables<F, Entry = E>>(&self, tables: &T) {
        tables.hit_entry(self.entry, self.packets, self.bytes);
        tables.count_gateway(self.stat, self.packets, self.bytes);
    }
}

/// Decides about a packet in a tunnel of one kind that reached the gateway.
#[inline(always)]
pub fn out<F: Usual, P: Packet, T: NatTables<F>, const IPIP: bool>(
    packet: &P,
    config: &Config,
    tables: &T,
    rewrite: &mut Rewrite<F>,
) -> Option<EntryHit<T::Entry>> {
    let view = packet.view(F::PLAIN + overhead::<F, IPIP>())?;
    let (outer, inner, l4) = tunnelled::<F, P, IPIP>(packet, &view, config)?;
    if !F::same(&outer.dst, &F::of_config(config)) || !F::same(&inner.src, &outer.src) || inner.ttl <= 1 {
        return None;
    }
    let entry = tables.forward(flow(&view, &inner, &l4).key())?;
    let kind = if IPIP { Encap::IPIP } else { Encap::FOU };
    let to = tables.translation(entry);
    if to.tick != tables.tick() as u16 || to.state & STATE_CONFIRMED == 0 || to.encap.bits() != kind.bits() {
        return None;
    }
    let tally = wire::tally(packet, &inner, &l4, 0, 0);
    rewrite.begin_at(inner.at, Way::Back);
    rewrite.decrement_ttl(&inner);
    rewrite.translate(packet, &inner, &l4, End::Source, &to).ok()?;
    rewrite.pop = overhead::<F, IPIP>();
    Some(EntryHit {
        entry,
        stat: if F::INDEX == 0 { GatewayStat::MasqueradedV4 } else { GatewayStat::MasqueradedV6 },
        packets: tally.packets,
        bytes: tally.bytes,
    })
}

/// Decides about a packet from the world; nothing for the gateway, says the inner `None`.
#[inline(always)]
pub fn back<F: Usual, P: Packet, T: NatTables<F>>(
    packet: &P,
    config: &Config,
    tables: &T,
    rewrite: &mut Rewrite<F>,
) -> Option<Option<EntryHit<T::Entry>>> {
    let view = packet.view(F::PLAIN)?;
    let ip = F::usual(&view, ETHERNET, packet.length())?;
    if !F::same(&ip.dst, &F::of_config(config)) || ip.ttl <= 1 {
        return None;
    }
    let l4 = transport(&view, &ip)?;
    // The long way takes it for a tunnelled packet.
    if ip.protocol == UDP && view.half(l4.at + 2) == u16::from_ne_bytes(config.fou_port) {
        return None;
    }
    let flow = flow(&view, &ip, &l4);
    let Some(entry) = tables.reverse(flow.key()) else {
        // On a port of translation it may be a reply whose translation is about to be rebuilt.
        let port = u16::from_be(view.half(l4.at + 2));
        let own = port < config.nat_port_first || port > config.nat_port_last;
        return if own { Some(None) } else { None };
    };
    let to = tables.translation(entry);
    if to.tick != tables.tick() as u16 || to.state & STATE_REPLY == 0 {
        return None;
    }
    if is_odd(packet, &ip, &l4, to.encap.like_fou(config.mtu)) {
        return None;
    }
    let tally = wire::tally(packet, &ip, &l4, 0, 0);
    rewrite.begin_at(ip.at, Way::Back);
    rewrite.decrement_ttl(&ip);
    rewrite.translate(packet, &ip, &l4, End::Destination, &to).ok()?;
    let auto = config.flags & CONFIG_SOURCE_PORT_AUTO != 0;
    if !to.encap.is_direct() {
        rewrite.enter_tunnel(push(&flow, &ip, F::of_config(config), to.addr, to.encap, auto, config));
    }
    Some(Some(EntryHit {
        entry,
        stat: if F::INDEX == 0 { GatewayStat::ReplyV4 } else { GatewayStat::ReplyV6 },
        packets: tally.packets,
        bytes: tally.bytes,
    }))
}
