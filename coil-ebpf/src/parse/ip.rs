//! IP headers: IPv4 with options, IPv6 with a bounded walk over extension headers.
//!
//! A header that cannot be (version, lengths) is an error. A packet that is fine but of no use for
//! translation (a fragment, unknown extension headers) is not: [`Ip::obstacle`] says so, and only a
//! caller that needs the transport header complains.

use coil_common::stats::DropReason;

use crate::{
    family::{Family, V4, V6},
    packet::Packet,
};

/// The facts of an IP header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ip<F: Family> {
    /// Offset of the IP header.
    pub at: usize,
    /// Offset of the transport header.
    pub l4: usize,
    /// Length of the packet from the IP header on.
    pub length: u32,
    /// Source.
    pub src: F::Addr,
    /// Destination.
    pub dst: F::Addr,
    /// Protocol of the transport header.
    pub protocol: u8,
    /// First two bytes: version and traffic class.
    pub first: [u8; 2],
    /// Type of service or traffic class.
    pub tos: u8,
    /// TTL or hop limit.
    pub ttl: u8,
    /// The half word that holds it.
    pub ttl_word: [u8; 2],
    /// Header checksum, zero in IPv6.
    pub check: [u8; 2],
    /// If this is a fragment, offset of what says so from the start of the header: identification
    /// (IPv4) or fragment header; else 0. The
    /// first fragment of a datagram has a transport header; a later one has an obstacle instead.
    pub fragment: u16,
    /// Why the transport header cannot be used, if it cannot.
    pub obstacle: Option<DropReason>,
}

impl<F: Family> Ip<F> {
    /// Offset of the first byte after the packet.
    #[inline(always)]
    #[must_use]
    pub const fn end(&self) -> usize {
        self.at + self.length as usize
    }

    /// Bytes from the transport header on.
    #[inline(always)]
    #[must_use]
    pub const fn payload(&self) -> usize {
        // Whoever made this has compared the two.
        self.end().wrapping_sub(self.l4)
    }
}

/// Reads an IP header.
pub trait Parse: Family {
    /// Reads the IP header at `at`.
    ///
    /// # Errors
    ///
    /// [`DropReason::Truncated`] if the packet ends before the header or before the length that it
    /// claims, [`DropReason::Malformed`] if version or lengths are impossible.
    fn parse<P: Packet>(packet: &mut P, at: usize) -> Result<Ip<Self>, DropReason>;
}

/// Length of a GSO packet that is too long to say so itself (BIG TCP), 0 for other packets.
#[inline(always)]
fn jumbo<P: Packet>(packet: &P, at: usize) -> u32 {
    if packet.gso_size() == 0 { 0 } else { packet.length().wrapping_sub(at as u32) }
}

/// Offset of the identification of an IPv4 header.
const V4_ID: u16 = 4;

impl Parse for V4 {
    #[inline(always)]
    fn parse<P: Packet>(packet: &mut P, at: usize) -> Result<Ip<Self>, DropReason> {
        packet.ensure(at + Self::HEADER)?;
        let [version, tos, l0, l1] = packet.load::<4>(at)?;
        let [_, _, f0, f1] = packet.load::<4>(at + 4)?;
        let [ttl, protocol, c0, c1] = packet.load::<4>(at + 8)?;
        let src = Self::load(packet, at + Self::SRC_AT)?;
        let dst = Self::load(packet, at + Self::DST_AT)?;

        let header = usize::from(version & 0xf) * 4;
        let mut length = u32::from(u16::from_be_bytes([l0, l1]));
        if length == 0 {
            length = jumbo(packet, at);
        }
        if version >> 4 != 4 || header < Self::HEADER || (length as usize) < header {
            return Err(DropReason::Malformed);
        }
        if at as u32 + length > packet.length() {
            return Err(DropReason::Truncated);
        }
        // An offset, and whether more fragments follow.
        let later = f0 & 0x1f != 0 || f1 != 0;
        let fragment = later || f0 & 0x20 != 0;
        Ok(Ip {
            at,
            l4: at + header,
            length,
            src,
            dst,
            protocol,
            first: [version, tos],
            tos,
            ttl,
            ttl_word: [ttl, protocol],
            check: [c0, c1],
            fragment: if fragment { V4_ID } else { 0 },
            obstacle: if later { Some(DropReason::Fragment) } else { None },
        })
    }
}

/// Extension headers that are walked over before a packet counts as too odd to translate.
const MAX_EXTENSIONS: usize = 4;
const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const FRAGMENT: u8 = 44;
const DESTINATION: u8 = 60;

impl Parse for V6 {
    #[inline(always)]
    fn parse<P: Packet>(packet: &mut P, at: usize) -> Result<Ip<Self>, DropReason> {
        packet.ensure(at + Self::HEADER)?;
        let [v0, v1, _, _] = packet.load::<4>(at)?;
        let [l0, l1, next, ttl] = packet.load::<4>(at + 4)?;
        let src = Self::load(packet, at + Self::SRC_AT)?;
        let dst = Self::load(packet, at + Self::DST_AT)?;

        if v0 >> 4 != 6 {
            return Err(DropReason::Malformed);
        }
        let mut length = u32::from(u16::from_be_bytes([l0, l1])) + 40;
        if length == 40 {
            length = length.max(jumbo(packet, at));
        }
        if at as u32 + length > packet.length() {
            return Err(DropReason::Truncated);
        }
        let mut ip = Ip {
            at,
            l4: at + Self::HEADER,
            length,
            src,
            dst,
            protocol: next,
            first: [v0, v1],
            tos: (v0 << 4) | (v1 >> 4),
            ttl,
            ttl_word: [next, ttl],
            check: [0; 2],
            fragment: 0,
            obstacle: None,
        };
        if is_extension(next) {
            let found = packet.walk_extensions(ip.l4, next, ip.payload());
            ip.protocol = found.protocol;
            ip.l4 += usize::from(found.length);
            ip.obstacle = found.obstacle;
            if found.fragment != 0 {
                ip.fragment = found.fragment + Self::HEADER as u16 - 1;
            }
        }
        Ok(ip)
    }
}

/// An extension header that is known.
#[inline(always)]
const fn is_extension(next: u8) -> bool {
    matches!(next, HOP_BY_HOP | ROUTING | FRAGMENT | DESTINATION)
}

/// What a walk over extension headers found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extensions {
    /// What follows them.
    pub protocol: u8,
    /// Their length together.
    pub length: u16,
    /// Offset of the fragment header plus 1, or 0 if the packet is none. A fragment header of a whole
    /// packet does not count.
    pub fragment: u16,
    /// Why what follows them cannot be used.
    pub obstacle: Option<DropReason>,
}

impl Extensions {
    /// As a number, for a function that can return nothing else.
    #[inline(always)]
    #[must_use]
    pub const fn pack(self) -> u64 {
        let obstacle = match self.obstacle {
            None => 0,
            Some(DropReason::Fragment) => 1,
            Some(DropReason::Truncated) => 2,
            Some(DropReason::Malformed) => 3,
            Some(_) => 4,
        };
        let fragment = (self.fragment as u64) << 40;
        fragment | (obstacle << 32) | ((self.length as u64) << 8) | self.protocol as u64
    }

    /// The inverse of [`Extensions::pack`].
    #[inline(always)]
    #[must_use]
    pub const fn unpack(packed: u64) -> Self {
        Self {
            protocol: (packed & 0xff) as u8,
            length: (packed >> 8 & 0x3fff) as u16,
            fragment: (packed >> 40 & 0x3fff) as u16,
            obstacle: match packed >> 32 & 0xff {
                0 => None,
                1 => Some(DropReason::Fragment),
                2 => Some(DropReason::Truncated),
                3 => Some(DropReason::Malformed),
                _ => Some(DropReason::ExtensionHeaders),
            },
        }
    }
}

/// Walks over extension headers that start at `at` with one of kind `next`, inside `room` bytes.
#[inline(always)]
pub fn walk<P: Packet + ?Sized>(packet: &mut P, at: usize, next: u8, room: usize) -> Extensions {
    let mut found = Extensions { protocol: next, length: 0, fragment: 0, obstacle: None };
    for _ in 0..MAX_EXTENSIONS {
        match found.protocol {
            HOP_BY_HOP | ROUTING | FRAGMENT | DESTINATION => {}
            _ => return found,
        }
        let header = at + usize::from(found.length);
        let Ok([next, units, third, segments_left]) =
            packet.ensure(header + 8).and_then(|()| packet.load::<4>(header))
        else {
            found.obstacle = Some(DropReason::Truncated);
            return found;
        };
        let units = if found.protocol == FRAGMENT { 0 } else { units };
        let length = found.length + (u16::from(units) + 1) * 8;
        // What is behind the packet's end is not its header, whatever it looks like.
        if usize::from(length) > room {
            found.obstacle = Some(DropReason::Malformed);
            return found;
        }
        if found.protocol == FRAGMENT {
            // Offset and flags are where a routing header has its type and segments.
            if third | (segments_left & 0xf9) != 0 {
                found.fragment = found.length + 1;
            }
            if third | (segments_left & 0xf8) != 0 {
                found.obstacle = Some(DropReason::Fragment);
                return found;
            }
        }
        // Of a routing header that still has segments left the final destination, which the
        // transport checksum covers, is not in the IP header.
        if found.protocol == ROUTING && segments_left != 0 {
            found.obstacle = Some(DropReason::ExtensionHeaders);
            return found;
        }
        found.protocol = next;
        found.length = length;
    }
    if is_extension(found.protocol) {
        found.obstacle = Some(DropReason::ExtensionHeaders);
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn extensions_survive_packing() {
        for obstacle in [
            None,
            Some(DropReason::Fragment),
            Some(DropReason::Truncated),
            Some(DropReason::Malformed),
            Some(DropReason::ExtensionHeaders),
        ] {
            // The longest walk that there can be.
            for length in [0, 8, (MAX_EXTENSIONS as u16) * 2048] {
                for fragment in [0, 1, 0x2001] {
                    let found = Extensions { protocol: 255, length, fragment, obstacle };
                    assert_eq!(Extensions::unpack(found.pack()), found);
                }
            }
        }
    }
}
