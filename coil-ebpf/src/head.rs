//! Headers that the datapath writes: those of the tunnel, and those of ICMP errors.
//!
//! Tunnelled packets are direct FOU: an IP header, a UDP header with checksum 0, then the inner
//! packet; or IP in IP, without the UDP header. The outer IPv4 header always has DF set, since the
//! kernel's does.

use bytemuck::Zeroable;

use crate::{
    csum,
    encap::Encap,
    family::{Family, V4, V6},
};

/// IP protocol number of TCP.
pub const TCP: u8 = 6;
/// IP protocol number of UDP.
pub const UDP: u8 = 17;

/// TTL or hop limit of tunnelled packets.
pub const TUNNEL_TTL: u8 = 225;
/// TTL or hop limit of ICMP errors.
const ERROR_TTL: u8 = 64;
/// Traffic class of ICMP errors: internetwork control.
const ERROR_TOS: u8 = 0xc0;

/// What the outer headers of a tunnelled packet say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tunnel<F: Family> {
    /// Whether there are ports at all.
    pub encap: Encap,
    /// Outer source.
    pub src: F::Addr,
    /// Outer destination.
    pub dst: F::Addr,
    /// UDP source port.
    pub src_port: [u8; 2],
    /// UDP destination port.
    pub dst_port: [u8; 2],
    /// ECN bits of the inner packet.
    pub ecn: u8,
    /// Length of the inner packet, small enough for the outer length to have 16 bits.
    pub inner: u16,
    /// Identification or flow label.
    pub label: u16,
}

impl<F: Family> Tunnel<F> {
    /// Of no packet.
    #[inline(always)]
    pub(crate) fn none() -> Self {
        Self {
            encap: Encap::FOU,
            src: F::Addr::zeroed(),
            dst: F::Addr::zeroed(),
            src_port: [0; 2],
            dst_port: [0; 2],
            ecn: 0,
            inner: 0,
            label: 0,
        }
    }
}

/// What an ICMP error says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IcmpError<F: Family> {
    /// Who says it.
    pub src: F::Addr,
    /// The sender of the packet that it is about.
    pub dst: F::Addr,
    /// Type and code.
    pub kind: [u8; 2],
    /// Largest packet that would fit, 0 if that is not the point.
    pub mtu: u16,
    /// Bytes of the packet that are quoted.
    pub quoted: u16,
}

/// Builds headers.
pub trait Build: Family {
    /// Words of an IP header without options.
    type Ip: Copy;

    /// Type and code: the packet is too big.
    const TOO_BIG: [u8; 2];
    /// Type and code: TTL or hop limit exceeded in transit.
    const TIME_EXCEEDED: [u8; 2];
    /// Type and code: communication administratively prohibited.
    const PROHIBITED: [u8; 2];

    /// Outer headers of a tunnelled packet. Where there is no UDP header, zeros are in its place.
    fn tunnel(tunnel: &Tunnel<Self>) -> Self::Head;
    /// The first of these headers.
    fn without_udp(head: &Self::Head) -> Self::Ip;
    /// What such headers add to a sum over the whole packet. The header checksum of IPv4 makes its
    /// header add nothing.
    fn weight(head: &Self::Head) -> u32;
    /// IP and ICMP header of an error; `quote` is the sum of the bytes that it quotes.
    fn error(error: &IcmpError<Self>, quote: u32) -> Self::Head;
}

/// A word of a header, in the order of memory.
#[inline(always)]
const fn word(bytes: [u8; 4]) -> u32 {
    u32::from_ne_bytes(bytes)
}

/// A word of two half words.
#[inline(always)]
const fn halves(first: [u8; 2], second: [u8; 2]) -> u32 {
    let [a, b] = first;
    let [c, d] = second;
    word([a, b, c, d])
}

/// An IPv4 header without options, `rest` being its second and third word with no checksum yet.
#[inline(always)]
const fn ipv4(tos: u8, length: u16, rest: [u32; 2], src: u32, dst: u32) -> [u32; 5] {
    let first = halves([0x45, tos], length.to_be_bytes());
    let [second, third] = rest;
    // Five words do not overflow a double word.
    let sum = first as u64 + second as u64 + third as u64 + src as u64 + dst as u64;
    let sum = csum::add((sum >> 32) as u32, (sum & 0xffff_ffff) as u32);
    let check = halves([0; 2], csum::finish(sum));
    [first, second, third | check, src, dst]
}

/// The first two words of an IPv6 header.
#[inline(always)]
const fn ipv6(traffic_class: u8, label: u16, length: u16, next: u8, ttl: u8) -> [u32; 2] {
    let first = [0x60 | (traffic_class >> 4), traffic_class << 4];
    [halves(first, label.to_be_bytes()), halves(length.to_be_bytes(), [next, ttl])]
}

/// A UDP header with checksum 0, or nothing.
#[inline(always)]
const fn udp<F: Family>(tunnel: &Tunnel<F>) -> [u32; 2] {
    if tunnel.encap.is_ipip() {
        return [0; 2];
    }
    let length = tunnel.inner.wrapping_add(8).to_be_bytes();
    [halves(tunnel.src_port, tunnel.dst_port), halves(length, [0; 2])]
}

impl Build for V4 {
    type Ip = [u32; 5];

    const TOO_BIG: [u8; 2] = [3, 4];
    const TIME_EXCEEDED: [u8; 2] = [11, 0];
    const PROHIBITED: [u8; 2] = [3, 13];

    #[inline(always)]
    fn tunnel(tunnel: &Tunnel<Self>) -> [u32; 7] {
        const DF: [u8; 2] = [0x40, 0];
        let (protocol, more) = if tunnel.encap.is_ipip() { (V4::IPIP, 20) } else { (UDP, 28) };
        let id = halves(tunnel.label.to_be_bytes(), DF);
        let rest = [id, word([TUNNEL_TTL, protocol, 0, 0])];
        let length = tunnel.inner.wrapping_add(more);
        let [a, b, c, d, e] = ipv4(tunnel.ecn, length, rest, tunnel.src, tunnel.dst);
        let [f, g] = udp(tunnel);
        [a, b, c, d, e, f, g]
    }

    #[inline(always)]
    fn without_udp(&[a, b, c, d, e, _, _]: &[u32; 7]) -> [u32; 5] {
        [a, b, c, d, e]
    }

    #[inline(always)]
    fn weight(&[_, _, _, _, _, ports, length]: &[u32; 7]) -> u32 {
        csum::add(ports, length)
    }

    #[inline(always)]
    fn error(error: &IcmpError<Self>, quote: u32) -> [u32; 7] {
        let rest = [0, word([ERROR_TTL, V4::ICMP, 0, 0])];
        let length = error.quoted.wrapping_add(28);
        let [a, b, c, d, e] = ipv4(ERROR_TOS, length, rest, error.src, error.dst);
        let mtu = halves([0; 2], error.mtu.to_be_bytes());
        let sum = csum::add(csum::add(halves(error.kind, [0; 2]), mtu), quote);
        [a, b, c, d, e, halves(error.kind, csum::finish(sum)), mtu]
    }
}

impl Build for V6 {
    type Ip = [u32; 10];

    const TOO_BIG: [u8; 2] = [2, 0];
    const TIME_EXCEEDED: [u8; 2] = [3, 0];
    const PROHIBITED: [u8; 2] = [1, 1];

    #[inline(always)]
    fn tunnel(tunnel: &Tunnel<Self>) -> [u32; 12] {
        let (protocol, more) = if tunnel.encap.is_ipip() { (V6::IPIP, 0) } else { (UDP, 8) };
        let length = tunnel.inner.wrapping_add(more);
        let [a, b] = ipv6(tunnel.ecn, tunnel.label, length, protocol, TUNNEL_TTL);
        let [s0, s1, s2, s3] = tunnel.src;
        let [d0, d1, d2, d3] = tunnel.dst;
        let [f, g] = udp(tunnel);
        [a, b, s0, s1, s2, s3, d0, d1, d2, d3, f, g]
    }

    #[inline(always)]
    fn without_udp(&[a, b, s0, s1, s2, s3, d0, d1, d2, d3, _, _]: &[u32; 12]) -> [u32; 10] {
        [a, b, s0, s1, s2, s3, d0, d1, d2, d3]
    }

    #[inline(always)]
    fn weight(head: &[u32; 12]) -> u32 {
        let sum = head.iter().fold(0, |sum, word| sum + u64::from(*word));
        csum::add((sum >> 32) as u32, (sum & 0xffff_ffff) as u32)
    }

    #[inline(always)]
    fn error(error: &IcmpError<Self>, quote: u32) -> [u32; 12] {
        let length = error.quoted.wrapping_add(8);
        let [a, b] = ipv6(ERROR_TOS, 0, length, V6::ICMP, ERROR_TTL);
        let [s0, s1, s2, s3] = error.src;
        let [d0, d1, d2, d3] = error.dst;
        let mtu = halves([0; 2], error.mtu.to_be_bytes());
        let pseudo = csum::add(
            csum::add(V6::sum(&error.src), V6::sum(&error.dst)),
            halves(length.to_be_bytes(), [0, V6::ICMP]),
        );
        let sum = csum::add(csum::add(halves(error.kind, [0; 2]), mtu), csum::add(pseudo, quote));
        let kind = halves(error.kind, csum::finish(sum));
        [a, b, s0, s1, s2, s3, d0, d1, d2, d3, kind, mtu]
    }
}
