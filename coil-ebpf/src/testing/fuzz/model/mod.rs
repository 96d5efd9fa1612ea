//! The reference model: what should come of a packet, as the documents say it, in code that is simple and
//! slow and shares nothing with the programs. It allocates at will, searches lists, and computes every
//! checksum from all the bytes that it covers.
//!
//! Where a program is free to choose (port of translation, gateway of an Egress that has several, outer
//! source port, identification) the model looks at what was chosen, says whether that was allowed, and
//! holds the program to it from then on.

mod gateway;
mod node;

use std::{collections::BTreeMap, net::IpAddr};

use coil_common::{
    names::{MAP_DROPS, MAP_EGRESS_STATS, MAP_GATEWAY_STATS, MAP_ICMP_STATS},
    stats::{DropReason, GatewayStat, IcmpStat},
    values::Counter,
};

use super::{
    wire::{self, Changed, Flow, Ip, Kind, Transport, byte, number, octets},
    world::MTU,
};
use crate::testing::{
    build::{self, FOU},
    scenario::Action,
};

/// The reason with this name, if the datapath knows one: what is younger than the model.
fn reason(name: &str) -> Option<DropReason> {
    DropReason::ALL.iter().copied().find(|reason| reason.name() == name)
}

/// What comes to a port of translation, and answers nobody, is dropped for this reason; without it the local
/// stack gets it.
fn unknown_reply() -> Option<DropReason> {
    reason("unknown_reply")
}

/// Counters by map and index.
pub type Counters = BTreeMap<(&'static str, u32), Counter>;

/// A packet that meets a program.
#[derive(Clone, Copy, Debug)]
pub struct Input<'a> {
    /// The Ethernet frame.
    pub frame: &'a [u8],
    /// Payload of each segment, 0 if there is one.
    pub gso_size: usize,
    /// How many there are, 0 if nobody has counted.
    pub segments: u32,
}

impl<'a> Input<'a> {
    /// The IP packet, and whatever Ethernet has put behind it.
    pub(super) fn packet(&self) -> &'a [u8] {
        self.frame.get(14..).unwrap_or_default()
    }

    /// What the Ethernet header says: IPv6, IPv4 or neither.
    pub(super) fn family(&self) -> Option<bool> {
        match number(self.frame, 12) {
            0x0800 if self.frame.len() >= 14 => Some(false),
            0x86dd => Some(true),
            _ => None,
        }
    }

    const fn is_segmented(&self) -> bool {
        self.gso_size != 0
    }
}

/// What has been seen of a program.
#[derive(Clone, Copy, Debug)]
pub struct Seen<'a> {
    /// What happened to the packet.
    pub action: Action,
    /// The frame afterwards.
    pub frame: &'a [u8],
    /// The reason that was counted.
    pub reason: Option<DropReason>,
}

/// What should come of a packet.
#[derive(Clone, Debug)]
pub struct Should {
    /// What happens to it.
    pub action: Action,
    /// For one of these reasons if it is dropped, or answered with an error.
    pub reasons: Vec<DropReason>,
    /// The frame afterwards; `None` if nobody looks at it any more.
    pub frame: Option<Vec<u8>>,
    /// Offsets in it of checksums whose zero may be either.
    pub loose: Vec<usize>,
    /// What is counted, drops left out.
    pub counters: Counters,
}

impl Should {
    fn pass(input: &Input) -> Self {
        Self::becomes(Action::Pass, input.frame.to_vec())
    }

    fn becomes(action: Action, frame: Vec<u8>) -> Self {
        Self { action, reasons: Vec::new(), frame: Some(frame), loose: Vec::new(), counters: Counters::new() }
    }

    fn drop(reason: DropReason) -> Self {
        Self::drop_for(vec![reason])
    }

    fn drop_for(reasons: Vec<DropReason>) -> Self {
        let counters = Counters::new();
        Self { action: Action::Drop, reasons, frame: None, loose: Vec::new(), counters }
    }

    fn count(&mut self, map: &'static str, index: u32, (packets, bytes): Size) {
        let counter = self.counters.entry((map, index)).or_default();
        counter.packets += packets;
        counter.bytes += bytes;
    }

    fn egress(mut self, id: u32, is_v6: bool, rx: bool, size: Size) -> Self {
        let index = id * 2 + u32::from(is_v6);
        self.count(MAP_EGRESS_STATS, index * 2 + u32::from(rx), size);
        self
    }

    fn gateway(mut self, [v4, v6]: [GatewayStat; 2], is_v6: bool, size: Size) -> Self {
        self.count(MAP_GATEWAY_STATS, if is_v6 { v6 } else { v4 }.index(), size);
        self
    }

    fn icmp(mut self, stat: IcmpStat) -> Self {
        self.count(MAP_ICMP_STATS, stat.index(), (1, 0));
        self
    }

    fn loose(mut self, at: usize, changed: &Changed) -> Self {
        self.loose = changed.loose.iter().map(|offset| at + offset).collect();
        self
    }
}

/// Packets and bytes.
type Size = (u64, u64);

/// What is known of a flow of the pod.
#[derive(Clone, Debug)]
pub struct PodFlow {
    egress: u32,
    /// None as long as no packet has shown which of several was chosen.
    gateway: Option<IpAddr>,
    src_port: Option<u16>,
    /// From the pod.
    pub tx: Size,
    /// To it.
    pub rx: Size,
}

/// One direction of a translation: the address and port to write, and what has passed.
#[derive(Clone, Copy, Debug)]
pub struct Half {
    /// Address.
    pub to: IpAddr,
    /// Port.
    pub port: u16,
    /// What has passed.
    pub size: Size,
    /// How the client speaks.
    pub tunnel: Tunnel,
}

/// A datagram of which the first fragment was seen.
#[derive(Clone, Copy, Debug)]
pub(super) struct Note {
    flow: Flow,
    open: bool,
    seen: u32,
}

/// Source, destination, identification and, in IPv4, protocol.
pub(super) type Datagram = (IpAddr, IpAddr, u32, u8);

fn datagram(ip: &Ip) -> Option<(Datagram, wire::Fragment)> {
    let fragment = ip.fragment?;
    let protocol = if ip.v6 { 0 } else { ip.protocol };
    Some(((ip.src, ip.dst, fragment.id, protocol), fragment))
}

/// Datagrams by what their fragments have in common.
pub(super) type Notes = BTreeMap<Datagram, Note>;

/// The flow of a later fragment, if its first one was seen in the last five seconds.
fn follow(notes: &mut Notes, ip: &Ip, now: u32) -> Option<Flow> {
    let (key, fragment) = datagram(ip)?;
    let note = notes.get_mut(&key).filter(|note| now - note.seen <= 5)?;
    if !fragment.more {
        note.open = false;
    }
    Some(note.flow)
}

/// What should be.
#[derive(Clone, Debug, Default)]
pub struct Model {
    /// Seconds.
    pub now: u32,
    /// Translation has few ports, and the node speaks IP in IP.
    pub narrow: bool,
    /// Flows of the pod.
    pub flows: BTreeMap<Flow, PodFlow>,
    /// Translations of what clients send.
    pub forward: BTreeMap<Flow, Half>,
    /// Translations of what comes back: they own the port.
    pub reverse: BTreeMap<Flow, Half>,
    pub(super) node_notes: Notes,
    pub(super) gateway_notes: Notes,
}

/// Packets and bytes on the wire: each segment has the headers.
fn size(input: &Input, ip: &Ip, transport: Option<&Transport>) -> Size {
    let total = ip.total as u64;
    match transport {
        Some(transport) if input.is_segmented() => {
            let headers = (ip.header + transport.header) as u64;
            let counted = (total - headers.min(total)).div_ceil(input.gso_size as u64).max(1);
            let segments = if input.segments == 0 { counted } else { u64::from(input.segments) };
            (segments, total + (segments - 1) * headers)
        }
        _ => (1, total),
    }
}

/// How a packet is tunnelled.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Tunnel {
    /// In UDP.
    #[default]
    Fou,
    /// In IP alone.
    Ipip,
}

impl Tunnel {
    /// Bytes that it adds.
    const fn overhead(self, v6: bool) -> usize {
        wire::least(v6) + self.header()
    }

    /// Those of them that are between the IP headers.
    const fn header(self) -> usize {
        match self {
            Self::Fou => 8,
            Self::Ipip => 0,
        }
    }
}

/// How a quoted packet was tunnelled, if it was.
fn quoted_tunnel(quote: &wire::Quote, v6: bool) -> Option<Tunnel> {
    match (quote.flow.protocol, quote.flow.dst_port) {
        (17, FOU) => Some(Tunnel::Fou),
        (protocol, _) if protocol == wire::ipip_of(v6) => Some(Tunnel::Ipip),
        _ => None,
    }
}

/// The packet, or the largest of its segments, does not fit the tunnel.
fn is_too_big(input: &Input, ip: &Ip, transport: Option<&Transport>, tunnel: Tunnel) -> bool {
    let largest = match transport {
        Some(transport) if input.is_segmented() => ip.header + transport.header + input.gso_size,
        _ => ip.total,
    };
    largest + tunnel.overhead(ip.v6) > MTU || ip.total + Tunnel::Fou.overhead(ip.v6) > 0xffff
}

/// A destination that is never beyond a router.
fn is_local(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => {
            let first = address.octets()[0];
            first == 0 || address.is_loopback() || address.is_link_local() || first >= 224
        }
        IpAddr::V6(address) => {
            address.is_unspecified()
                || address.is_loopback()
                || address.is_multicast()
                || address.is_unicast_link_local()
        }
    }
}

/// What follows the outer IP header of a tunnelled packet, and of what kind it is, if the packet is one by its
/// shape.
fn tunnelled(packet: &[u8], v6: bool) -> Option<(usize, Tunnel)> {
    let (at, protocol) = if v6 {
        match (byte(packet, 0) >> 4, byte(packet, 6)) {
            (6, 60) if byte(packet, 41) == 0 && packet.len() >= 56 => (48, byte(packet, 40)),
            (6, protocol) if protocol != 60 => (40, protocol),
            _ => return None,
        }
    } else if byte(packet, 0) == 0x45 && number(packet, 6) & 0x3fff == 0 {
        (20, byte(packet, 9))
    } else {
        return None;
    };
    // Either kind is as long as this at least.
    if packet.len() < wire::least(v6) + 8 {
        return None;
    }
    match protocol {
        17 if number(packet, at + 2) == FOU => Some((at, Tunnel::Fou)),
        protocol if protocol == wire::ipip_of(v6) => Some((at, Tunnel::Ipip)),
        _ => None,
    }
}

/// A tunnelled packet.
struct Tunnelled<'a> {
    kind: Tunnel,
    src: IpAddr,
    tos: u8,
    /// The inner packet and what is behind it.
    inner: &'a [u8],
    /// Length of it by the outer headers.
    room: usize,
}

/// Takes the outer headers off.
fn unpack(packet: &[u8], (at, kind): (usize, Tunnel), v6: bool) -> Result<Tunnelled<'_>, Vec<DropReason>> {
    let total = if v6 { 40 + usize::from(number(packet, 4)) } else { usize::from(number(packet, 2)) };
    let length = match kind {
        Tunnel::Fou => usize::from(number(packet, at + 4)),
        Tunnel::Ipip => total.saturating_sub(at),
    };
    let mut wrong = Vec::new();
    if length < kind.header() || at + length > total {
        wrong.push(DropReason::Malformed);
    }
    if at + length > packet.len() {
        wrong.push(DropReason::Truncated);
    }
    if !wrong.is_empty() {
        return Err(wrong);
    }
    let tos = if v6 { (packet[0] << 4) | (packet[1] >> 4) } else { packet[1] };
    let (src_at, _) = wire::addresses(v6);
    let end = src_at + if v6 { 16 } else { 4 };
    let src = address(&packet[src_at..end]);
    let header = kind.header();
    Ok(Tunnelled { kind, src, tos, inner: &packet[at + header..], room: length - header })
}

/// An address from its bytes.
fn address(bytes: &[u8]) -> IpAddr {
    if let Ok(bytes) = <[u8; 4]>::try_from(bytes) {
        return bytes.into();
    }
    <[u8; 16]>::try_from(bytes).unwrap_or_default().into()
}

/// Reads the inner packet.
fn inner(input: &Input, outer: &Tunnelled, v6: bool) -> Result<Ip, Vec<DropReason>> {
    let ip = wire::ip(outer.inner, v6, input.is_segmented())?;
    if input.is_segmented() {
        return if ip.total == outer.inner.len() { Ok(ip) } else { Err(vec![DropReason::MergedTunnel]) };
    }
    if ip.total <= outer.room { Ok(ip) } else { Err(vec![DropReason::Malformed]) }
}

/// Nobody has cut these datagrams while they were in a tunnel that must be gone by then.
fn is_uncut(input: &Input, transport: &Transport, tunnel: Tunnel) -> bool {
    input.is_segmented() && matches!(transport.kind, Kind::Udp) && matches!(tunnel, Tunnel::Fou)
}

/// Writes the traffic class.
fn set_tos(bytes: &mut [u8], v6: bool, tos: u8) {
    if v6 {
        bytes[0] = (bytes[0] & 0xf0) | (tos >> 4);
        bytes[1] = (bytes[1] & 0x0f) | (tos << 4);
    } else {
        bytes[1] = tos;
    }
}

/// The traffic class with the mark of congestion of the tunnel, RFC 6040: only what understands it.
fn marked(outer: u8, inner: u8) -> u8 {
    if outer & 3 == 3 && matches!(inner & 3, 1 | 2) { inner | 3 } else { inner }
}

/// One hop further.
fn hop(bytes: &mut [u8], v6: bool) {
    bytes[if v6 { 7 } else { 8 }] -= 1;
}

/// Which end of a packet is written.
#[derive(Clone, Copy, PartialEq, Eq)]
enum End {
    Source,
    Destination,
}

/// Writes an address into the IP header at `at`.
fn set_address(bytes: &mut [u8], at: usize, end: End, to: IpAddr) {
    let (src, dst) = wire::addresses(to.is_ipv6());
    let octets = octets(to);
    let at = at + if end == End::Source { src } else { dst };
    bytes[at..at + octets.len()].copy_from_slice(&octets);
}

/// Writes the port, or the identifier of an echo.
fn set_port(bytes: &mut [u8], l4: usize, protocol: u8, end: End, port: u16) {
    let at = match (protocol, end) {
        (6 | 17, End::Source) => l4,
        (6 | 17, End::Destination) => l4 + 2,
        _ => l4 + 4,
    };
    bytes[at..at + 2].copy_from_slice(&port.to_be_bytes());
}

/// Lowers the MSS of a SYN to what the tunnel has room for.
fn clamp(bytes: &mut [u8], ip: &Ip, transport: &Transport, tunnel: Tunnel) {
    const SYN: u8 = 2;
    let Kind::Tcp(flags) = transport.kind else { return };
    if flags & SYN == 0 {
        return;
    }
    let most = MTU - tunnel.overhead(ip.v6) - wire::least(ip.v6) - 20;
    let end = ip.header + transport.header;
    let mut at = ip.header + 20;
    // Nobody sends more than eight before it.
    for _ in 0..8 {
        // An MSS option has four bytes; what is shorter than that at the end is none.
        if at + 4 > end {
            return;
        }
        match (bytes[at], bytes[at + 1]) {
            (0, _) => return,
            (1, _) => at += 1,
            (2, 4) => {
                if usize::from(number(bytes, at + 2)) > most {
                    let most = u16::try_from(most).unwrap_or(0);
                    bytes[at + 2..at + 4].copy_from_slice(&most.to_be_bytes());
                }
                return;
            }
            (_, 0 | 1) => return,
            (_, length) => at += usize::from(length),
        }
    }
}

/// The frame around a packet; `back`: to where it came from.
fn framed(frame: &[u8], back: bool, packet: &[u8]) -> Vec<u8> {
    let (to, from) = if back { (&frame[6..12], &frame[..6]) } else { (&frame[..6], &frame[6..12]) };
    [to, from, &frame[12..14], packet].concat()
}

/// A packet in a tunnel between two hosts, in UDP from this port.
fn wrap(tunnel: Tunnel, (src, dst): (IpAddr, IpAddr), src_port: u16, ip: &Ip, packet: &[u8]) -> Vec<u8> {
    let whole = &packet[..ip.total];
    let wrapped = match tunnel {
        Tunnel::Fou => build::tunnel_from(src, dst, src_port, whole),
        Tunnel::Ipip => {
            let mut outer = build::Ip::new(src, dst).ttl(225).tos(ip.tos & 3);
            outer.id = 0;
            outer.packet(wire::ipip_of(ip.v6), whole)
        }
    };
    [&wrapped[..], &packet[ip.total..]].concat()
}

/// Where the outer source port of a tunnelled frame is.
const fn outer_port_at(v6: bool) -> usize {
    14 + wire::least(v6)
}

/// The outer source port that was chosen, which must be one of those that may be.
fn chosen_port(seen: &Seen, v6: bool, auto: bool) -> u16 {
    let port = number(seen.frame, outer_port_at(v6));
    if auto && (32768..61000).contains(&port) { port } else { FOU }
}

/// What an error says.
struct Says {
    kind: (u8, u8),
    mtu: u16,
}

impl Says {
    fn too_big(v6: bool, mtu: usize) -> Self {
        Self { kind: if v6 { (2, 0) } else { (3, 4) }, mtu: u16::try_from(mtu).unwrap_or(u16::MAX) }
    }

    const fn prohibited(v6: bool) -> Self {
        Self { kind: if v6 { (1, 1) } else { (3, 13) }, mtu: 0 }
    }

    const fn time_exceeded(v6: bool) -> Self {
        Self { kind: if v6 { (3, 0) } else { (11, 0) }, mtu: 0 }
    }
}

/// An ICMP error about a packet, if enough of it is there to quote.
fn error(about: &[u8], v6: bool, own: Option<IpAddr>, says: &Says) -> Option<Vec<u8>> {
    let said = if v6 { 40 + usize::from(number(about, 4)) } else { usize::from(number(about, 2)) };
    let most = if v6 { 256 } else { 128 };
    let said = if said < wire::least(v6) { most } else { said };
    let quoted = &about[..said.min(most).min(about.len())];
    if quoted.len() < 28.max(wire::least(v6)) {
        return None;
    }
    let (src_at, dst_at) = wire::addresses(v6);
    let length = if v6 { 16 } else { 4 };
    let to = address(&quoted[src_at..src_at + length]);
    let from = own.unwrap_or_else(|| address(&quoted[dst_at..dst_at + length]));
    let mut ip = build::Ip::new(from, to).tos(0xc0);
    ip.id = 0;
    ip.df = false;
    let [a, b] = says.mtu.to_be_bytes();
    Some(ip.icmp(says.kind.0, says.kind.1, [0, 0, a, b], quoted))
}

/// A packet that is dropped and whose sender is told.
fn refuse(input: &Input, reason: DropReason, error: Option<Vec<u8>>, back: bool) -> Should {
    match error {
        Some(error) => {
            let action = if back { Action::Back } else { Action::Pass };
            let mut should = Should::becomes(action, framed(input.frame, back, &error));
            should.reasons = vec![reason];
            should.icmp(IcmpStat::Answered)
        }
        None => Should::drop(reason).icmp(IcmpStat::Unanswerable),
    }
}

/// The counter of a drop.
fn dropped(input: &Input) -> Counter {
    let bytes = input.frame.len().saturating_sub(14) as u64;
    Counter { packets: u64::from(input.segments.max(1)), bytes }
}

/// The counters that a drop adds to.
#[must_use]
pub fn drop_counters(input: &Input, reason: DropReason) -> Counters {
    let counter = dropped(input);
    let mut counters = Counters::from([((MAP_DROPS, reason.index()), counter)]);
    if reason == DropReason::NoState {
        let v6 = input.family() == Some(true);
        let stat = if v6 { GatewayStat::InvalidV6 } else { GatewayStat::InvalidV4 };
        counters.insert((MAP_GATEWAY_STATS, stat.index()), counter);
    }
    counters
}
