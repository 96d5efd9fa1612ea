//! The outer headers of a tunnelled packet.
//!
//! Senders make three shapes: IPv4 without options, IPv6 without extension headers, and IPv6 with
//! one destination options header of eight bytes (the tunnel encapsulation limit of the kernel's
//! `ip6tnl`). Nothing else is taken for a tunnelled packet, so that offsets are known constants. The
//! UDP checksum is not looked at: it is zero or still to be filled in between veth devices, and the
//! inner packet has its own.

use coil_common::stats::DropReason;

use super::{Ip, Parse};
use crate::{
    family::{Family, V4, V6},
    head::UDP,
    packet::{ETHERNET, Packet},
};

/// Where the outer headers of a family can be.
pub trait Outer: Parse {
    /// Offset of the UDP header if the packet has the shape of a tunnelled one.
    fn udp<P: Packet>(packet: &mut P) -> Option<usize>;
    /// The packet, which is not a tunnelled one, is ICMP or a fragment.
    fn is_odd<P: Packet>(packet: &P) -> bool;
}

impl Outer for V4 {
    #[inline(always)]
    fn udp<P: Packet>(packet: &mut P) -> Option<usize> {
        packet.ensure(ETHERNET + 28).ok()?;
        let [version, _] = packet.load::<2>(ETHERNET).ok()?;
        let [_, _, fragment, offset] = packet.load::<4>(ETHERNET + 4).ok()?;
        let [_, protocol] = packet.load::<2>(ETHERNET + 8).ok()?;
        (version == 0x45 && protocol == UDP && fragment & 0x3f == 0 && offset == 0).then_some(ETHERNET + 20)
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
    fn udp<P: Packet>(packet: &mut P) -> Option<usize> {
        packet.ensure(ETHERNET + 48).ok()?;
        let [version, _] = packet.load::<2>(ETHERNET).ok()?;
        let [next, _] = packet.load::<2>(ETHERNET + 6).ok()?;
        if version >> 4 != 6 {
            return None;
        }
        if next == UDP {
            return Some(ETHERNET + 40);
        }
        if next != DESTINATION {
            return None;
        }
        let [next, units] = packet.load::<2>(ETHERNET + 40).ok()?;
        packet.ensure(ETHERNET + 56).ok()?;
        (next == UDP && units == 0).then_some(ETHERNET + 48)
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
    /// Offset of the inner packet.
    pub inner: usize,
    /// Offset of the first byte after the inner packet, as the outer headers say.
    pub end: usize,
}

/// Offset of the UDP header of a tunnelled packet: the shape is right, and so is the port.
#[inline(always)]
pub fn locate<F: Outer, P: Packet>(packet: &mut P, port: [u8; 2]) -> Option<usize> {
    let udp = F::udp(packet)?;
    let found = packet.load::<2>(udp + 2).ok()?;
    (u16::from_ne_bytes(found) == u16::from_ne_bytes(port)).then_some(udp)
}

/// Reads the outer headers in front of `udp`, where [`locate`] has found the UDP header.
///
/// # Errors
///
/// [`DropReason::Malformed`] if lengths are impossible, [`DropReason::Truncated`] if the packet is
/// shorter than they say.
#[inline(always)]
pub fn outer<F: Outer, P: Packet>(packet: &mut P, udp: usize) -> Result<Tunnelled<F>, DropReason> {
    let src = F::load(packet, ETHERNET + F::SRC_AT)?;
    let [v0, v1, t0, t1] = packet.load::<4>(ETHERNET)?;
    let [_, _, length @ ..] = packet.load::<4>(udp + 2)?;
    let [p0, p1] = packet.load::<2>(ETHERNET + 4)?;
    let (tos, total) = if F::INDEX == 0 {
        (v1, usize::from(u16::from_be_bytes([t0, t1])))
    } else {
        ((v0 << 4) | (v1 >> 4), usize::from(u16::from_be_bytes([p0, p1])) + F::HEADER)
    };
    let end = udp + usize::from(u16::from_be_bytes(length));
    if end < udp + 8 || end > ETHERNET + total {
        return Err(DropReason::Malformed);
    }
    if end as u32 > packet.length() {
        return Err(DropReason::Truncated);
    }
    Ok(Tunnelled { src, tos, inner: udp + 8, end })
}

/// Reads the inner IP header.
///
/// # Errors
///
/// [`DropReason::Malformed`] or [`DropReason::Truncated`] if it is, or is longer than the tunnel
/// made it.
#[inline(always)]
pub fn inner<F: Outer, P: Packet>(packet: &mut P, outer: &Tunnelled<F>) -> Result<Ip<F>, DropReason> {
    let inner = F::parse(packet, outer.inner)?;
    let fits = if packet.gso_size() == 0 {
        inner.end() <= outer.end
    } else {
        // A GSO packet of which the inner header does not know the whole length is not one that a
        // tunnel made: somebody merged datagrams. The outer length may be cut to 16 bits.
        inner.end() as u32 == packet.length()
    };
    if fits { Ok(inner) } else { Err(DropReason::Malformed) }
}
