//! The outer headers of a tunnelled packet.
//!
//! Senders make three shapes: IPv4 without options, IPv6 without extension headers, and IPv6 with
//! one destination options header of eight bytes (the tunnel encapsulation limit of the kernel's
//! `ip6tnl`). After them comes UDP (FOU) or the inner packet at once (IP in IP). Nothing else is taken for
//! a tunnelled packet, so that there are few places where an inner packet can be. The UDP checksum is not
//! looked at: it is zero, or still to be filled in between veth devices (what the kernel remembers of that
//! is forgotten when the headers go), and the inner packet has its own.

use coil_common::stats::DropReason;

use super::{Ip, Parse};
use crate::{
    encap::Encap,
    family::{Family, V4, V6},
    head::UDP,
    packet::{ETHERNET, Packet},
};

/// Where the outer headers of a family can be.
pub trait Outer: Parse {
    /// Offset of what follows the IP header if the packet has the shape of a tunnelled one, and its
    /// protocol. Up to 28 or 48 bytes from the start of the IP header can be read then, at least four
    /// of them after it.
    fn shape<P: Packet>(packet: &mut P) -> Option<(usize, u8)>;
    /// The packet, which is not a tunnelled one, is ICMP or a fragment.
    fn is_odd<P: Packet>(packet: &P) -> bool;
}

impl Outer for V4 {
    #[inline(always)]
    fn shape<P: Packet>(packet: &mut P) -> Option<(usize, u8)> {
        packet.ensure(ETHERNET + 28).ok()?;
        let [version, _] = packet.load::<2>(ETHERNET).ok()?;
        let [_, _, fragment, offset] = packet.load::<4>(ETHERNET + 4).ok()?;
        let [_, protocol] = packet.load::<2>(ETHERNET + 8).ok()?;
        (version == 0x45 && fragment & 0x3f == 0 && offset == 0).then_some((ETHERNET + 20, protocol))
    }

    #[inline(always)]
    fn is_odd<P: Packet>(packet: &P) -> bool {
        packet
            .load::<4>(ETHERNET + 6)
            .is_ok_and(|[flags, _, _, protocol]| protocol == Self::ICMP || flags & 0x20 != 0)
    }
}

/// Next header of fragments.
const FRAGMENT: u8 = 44;
/// Next header of destination options.
const DESTINATION: u8 = 60;

impl Outer for V6 {
    #[inline(always)]
    fn shape<P: Packet>(packet: &mut P) -> Option<(usize, u8)> {
        packet.ensure(ETHERNET + 48).ok()?;
        let [version, _] = packet.load::<2>(ETHERNET).ok()?;
        let [next, _] = packet.load::<2>(ETHERNET + 6).ok()?;
        if version >> 4 != 6 {
            return None;
        }
        if next != DESTINATION {
            return Some((ETHERNET + 40, next));
        }
        let [next, units] = packet.load::<2>(ETHERNET + 40).ok()?;
        packet.ensure(ETHERNET + 56).ok()?;
        (units == 0).then_some((ETHERNET + 48, next))
    }

    #[inline(always)]
    fn is_odd<P: Packet>(packet: &P) -> bool {
        packet.load::<2>(ETHERNET + 6).is_ok_and(|[next, _]| next == Self::ICMP || next == FRAGMENT)
    }
}

/// A tunnelled packet: facts of its outer headers, and its inner one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tunnelled<F: Family> {
    /// Outer source.
    pub src: F::Addr,
    /// Outer type of service or traffic class.
    pub tos: u8,
    /// What kind of tunnel it is.
    pub encap: Encap,
    /// Offset of the inner packet.
    pub inner: usize,
    /// Offset of the first byte after the inner packet, as the outer headers say.
    pub end: usize,
}

/// What is after the outer IP header of a tunnelled packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Located {
    /// Offset of what follows the outer IP header.
    at: usize,
    /// What that is: a UDP header or the inner packet.
    encap: Encap,
}

/// 1 if two numbers are the same, else 0, in a way that neither compiler nor verifier makes a branch of.
#[inline(always)]
pub(crate) fn same(a: u8, b: u8) -> u32 {
    core::hint::black_box(u32::from(a ^ b)).wrapping_sub(1) >> 31
}

/// Finds the end of the outer IP header if a packet is a tunnelled one: the shape is right, and so is the
/// protocol, or port.
#[inline(always)]
pub fn locate<F: Outer, P: Packet>(packet: &mut P, port: [u8; 2]) -> Option<Located> {
    let (at, protocol) = F::shape(packet)?;
    let [_, _, a, b] = packet.load::<4>(at).ok()?;
    let [p, q] = port;
    let ipip = same(protocol, F::IPIP);
    let fou = same(protocol, UDP) & same(a, p) & same(b, q);
    (ipip | fou != 0).then_some(Located { at, encap: Encap::ipip_if(ipip) })
}

/// Which way a packet is tunnelled, if it is; [`locate`] for those who want to know no more, and as quick
/// as can be.
#[inline(always)]
pub fn encap<F: Outer, P: Packet>(packet: &mut P, port: [u8; 2]) -> Option<Encap> {
    let (at, protocol) = F::shape(packet)?;
    if protocol == UDP {
        let found = packet.load::<2>(at + 2).ok()?;
        return (u16::from_ne_bytes(found) == u16::from_ne_bytes(port)).then_some(Encap::FOU);
    }
    (protocol == F::IPIP).then_some(Encap::IPIP)
}

/// How a packet is tunnelled that is known to be.
#[inline(always)]
pub fn outermost<F: Outer, P: Packet>(packet: &mut P) -> Encap {
    match F::shape(packet) {
        Some((_, protocol)) => Encap::ipip_if(same(protocol, F::IPIP)),
        None => Encap::FOU,
    }
}

/// Reads the outer headers of a packet for which [`locate`] has found the end of the IP header.
///
/// # Errors
///
/// [`DropReason::Malformed`] if lengths are impossible, [`DropReason::Truncated`] if the packet is
/// shorter than they say.
#[inline(always)]
pub fn outer<F: Outer, P: Packet>(packet: &mut P, located: Located) -> Result<Tunnelled<F>, DropReason> {
    let Located { at, encap } = located;
    let src = F::load(packet, ETHERNET + F::SRC_AT)?;
    let [v0, v1, t0, t1] = packet.load::<4>(ETHERNET)?;
    let [_, _, length @ ..] = packet.load::<4>(at + 2)?;
    let [p0, p1] = packet.load::<2>(ETHERNET + 4)?;
    let (tos, total) = if F::INDEX == 0 {
        (v1, usize::from(u16::from_be_bytes([t0, t1])))
    } else {
        ((v0 << 4) | (v1 >> 4), usize::from(u16::from_be_bytes([p0, p1])) + F::HEADER)
    };
    let whole = ETHERNET + total;
    let header = encap.overhead::<F>() as usize - F::HEADER;
    // Without a branch, like all that depends on the kind: verifiers would look at both with all that follows.
    let mask = core::hint::black_box(((encap.bits() / Encap::IPIP.bits()) & 1) as usize).wrapping_neg();
    let datagram = at + usize::from(u16::from_be_bytes(length));
    let end = datagram ^ ((datagram ^ whole) & mask);
    if end < at + header || end > whole {
        return Err(DropReason::Malformed);
    }
    if end as u32 > packet.length() {
        return Err(DropReason::Truncated);
    }
    Ok(Tunnelled { src, tos, encap, inner: at + header, end })
}

/// Reads the inner IP header.
///
/// # Errors
///
/// [`DropReason::Malformed`] or [`DropReason::Truncated`] if it is, or is longer than the tunnel
/// made it; [`DropReason::MergedTunnel`] if there is more in the packet than this one.
#[inline(always)]
pub fn inner<F: Outer, P: Packet>(packet: &mut P, outer: &Tunnelled<F>) -> Result<Ip<F>, DropReason> {
    let inner = F::parse(packet, outer.inner)?;
    if packet.gso_size() == 0 {
        return if inner.end() <= outer.end { Ok(inner) } else { Err(DropReason::Malformed) };
    }
    // A GSO packet of which the inner header does not know the whole length is not one that a
    // tunnel made: somebody merged datagrams. The outer length may be cut to 16 bits.
    if inner.end() as u32 == packet.length() { Ok(inner) } else { Err(DropReason::MergedTunnel) }
}
