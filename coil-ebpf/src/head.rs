//! Headers that the datapath writes: those of the tunnel, and those of ICMP errors.
//!
//! Tunnelled packets are direct FOU: an IP header, a UDP header with checksum 0, then the inner
//! packet. The outer IPv4 header always has DF set, since the kernel's does.

use crate::{
    csum,
    family::{Family, V4, V6, bytes6},
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
    /// Length of the inner packet.
    pub inner: u16,
    /// Identification or flow label.
    pub label: u16,
}

/// What an ICMP error about a packet that is too big says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TooBig<F: Family> {
    /// Who says it.
    pub src: F::Addr,
    /// The sender of the packet.
    pub dst: F::Addr,
    /// Largest packet that would fit.
    pub mtu: u16,
}

/// Builds headers.
pub trait Build: Family {
    /// Outer headers of a tunnelled packet.
    fn tunnel(tunnel: &Tunnel<Self>) -> Self::Head;
    /// IP and ICMP header of an error; its checksum covers what is known: not the quoted packet.
    fn too_big(error: &TooBig<Self>) -> Self::Head;
    /// Offset of the ICMP checksum in what [`Build::too_big`] returns.
    const ICMP_CHECK_AT: usize;
}

/// Checksum of an IPv4 header without options whose other words are given.
#[inline(always)]
const fn ipv4_check(words: [[u8; 4]; 4]) -> [u8; 2] {
    let [a, b, c, d] = words;
    let sum = csum::add(u32::from_ne_bytes(a), u32::from_ne_bytes(b));
    let sum = csum::add(sum, u32::from_ne_bytes(c));
    csum::finish(csum::add(sum, u32::from_ne_bytes(d)))
}

/// Bytes 4 to 7 of an IPv4 header are summed apart since only one word of them varies.
#[inline(always)]
fn ipv4(
    tos: u8,
    length: [u8; 2],
    id: [u8; 2],
    df: bool,
    ttl_protocol: [u8; 2],
    src: [u8; 4],
    dst: [u8; 4],
) -> [u8; 20] {
    let [l0, l1] = length;
    let [i0, i1] = id;
    let flags = if df { 0x40 } else { 0 };
    let [ttl, protocol] = ttl_protocol;
    let first = [0x45, tos, l0, l1];
    let second = [i0, i1, flags, 0];
    let third = [ttl, protocol, 0, 0];
    let partial = csum::add(u32::from_ne_bytes(first), u32::from_ne_bytes(third));
    let [c0, c1] = ipv4_check([partial.to_ne_bytes(), second, src, dst]);
    let [s0, s1, s2, s3] = src;
    let [d0, d1, d2, d3] = dst;
    [
        0x45, tos, l0, l1, i0, i1, flags, 0, ttl, protocol, c0, c1, s0, s1, s2, s3, d0, d1, d2, d3,
    ]
}

/// An IPv6 header.
#[inline(always)]
fn ipv6(
    traffic_class: u8,
    label: u16,
    length: [u8; 2],
    next_ttl: [u8; 2],
    src: [u8; 16],
    dst: [u8; 16],
) -> [u8; 40] {
    let [f0, f1] = label.to_be_bytes();
    let mut out = [0; 40];
    out[0] = 0x60 | (traffic_class >> 4);
    out[1] = traffic_class << 4;
    out[2] = f0;
    out[3] = f1;
    [out[4], out[5]] = length;
    [out[6], out[7]] = next_ttl;
    out[8..24].copy_from_slice(&src);
    out[24..40].copy_from_slice(&dst);
    out
}

/// `ip` followed by eight bytes.
#[inline(always)]
fn join<const A: usize, const B: usize>(ip: [u8; A], rest: [u8; 8]) -> [u8; B] {
    let mut out = [0; B];
    out[..A].copy_from_slice(&ip);
    out[A..A + 8].copy_from_slice(&rest);
    out
}

/// A UDP header with checksum 0.
#[inline(always)]
fn udp<F: Family>(tunnel: &Tunnel<F>) -> [u8; 8] {
    let [s0, s1] = tunnel.src_port;
    let [d0, d1] = tunnel.dst_port;
    let [l0, l1] = tunnel.inner.saturating_add(8).to_be_bytes();
    [s0, s1, d0, d1, l0, l1, 0, 0]
}

impl Build for V4 {
    const ICMP_CHECK_AT: usize = 22;

    #[inline(always)]
    fn tunnel(tunnel: &Tunnel<Self>) -> [u8; 28] {
        let ip = ipv4(
            tunnel.ecn,
            tunnel.inner.saturating_add(28).to_be_bytes(),
            tunnel.label.to_be_bytes(),
            true,
            [TUNNEL_TTL, UDP],
            tunnel.src.to_ne_bytes(),
            tunnel.dst.to_ne_bytes(),
        );
        join(ip, udp(tunnel))
    }

    #[inline(always)]
    fn too_big(error: &TooBig<Self>) -> [u8; 28] {
        const LENGTH: u16 = (28 + V4::QUOTE) as u16;
        let ip = ipv4(
            ERROR_TOS,
            LENGTH.to_be_bytes(),
            [0; 2],
            false,
            [ERROR_TTL, V4::ICMP],
            error.src.to_ne_bytes(),
            error.dst.to_ne_bytes(),
        );
        // Destination unreachable, fragmentation needed.
        let [m0, m1] = error.mtu.to_be_bytes();
        let sum = csum::add(u32::from_ne_bytes([3, 4, 0, 0]), u32::from_ne_bytes([0, 0, m0, m1]));
        let [c0, c1] = csum::finish(sum);
        join(ip, [3, 4, c0, c1, 0, 0, m0, m1])
    }
}

impl Build for V6 {
    const ICMP_CHECK_AT: usize = 42;

    #[inline(always)]
    fn tunnel(tunnel: &Tunnel<Self>) -> [u8; 48] {
        let length = tunnel.inner.saturating_add(8).to_be_bytes();
        let ip = ipv6(
            tunnel.ecn,
            tunnel.label,
            length,
            [UDP, TUNNEL_TTL],
            bytes6(tunnel.src),
            bytes6(tunnel.dst),
        );
        join(ip, udp(tunnel))
    }

    #[inline(always)]
    fn too_big(error: &TooBig<Self>) -> [u8; 48] {
        const LENGTH: u16 = (8 + V6::QUOTE) as u16;
        let length = LENGTH.to_be_bytes();
        let ip = ipv6(ERROR_TOS, 0, length, [V6::ICMP, ERROR_TTL], bytes6(error.src), bytes6(error.dst));
        let [l0, l1] = length;
        let [m0, m1] = error.mtu.to_be_bytes();
        let sum = csum::add(V6::sum(&error.src), V6::sum(&error.dst));
        let sum = csum::add(sum, u32::from_ne_bytes([l0, l1, 0, V6::ICMP]));
        let sum = csum::add(sum, u32::from_ne_bytes([2, 0, 0, 0]));
        let [c0, c1] = csum::finish(csum::add(sum, u32::from_ne_bytes([0, 0, m0, m1])));
        join(ip, [2, 0, c0, c1, 0, 0, m0, m1])
    }
}
