//! Sizes on the wire: what a GSO packet will be once it is cut into segments.

use coil_common::{
    config::{CONFIG_CUT, Config},
    stats::DropReason,
    values::Counter,
};

use crate::{
    encap::Encap,
    family::Family,
    head::Build,
    packet::{ETHERNET, Packet},
    parse::{
        Ip, L4,
        l4::{ACK, FIN, Kind, RST, SYN},
    },
    tables::Tally,
    verdict::Refusal,
};

/// `a - b`, at least 0. What the standard library has takes three times the instructions here.
#[inline(always)]
#[expect(clippy::implicit_saturating_sub, reason = "the saturating form compiles to far more")]
const fn less(a: u32, b: u32) -> u32 {
    if a > b { a - b } else { 0 }
}

/// How a dropped packet counts.
#[inline(always)]
pub fn dropped<P: Packet>(packet: &P) -> Counter {
    Counter {
        packets: u64::from(packet.gso_segments().max(1)),
        bytes: u64::from(less(packet.length(), ETHERNET as u32)),
    }
}

/// Bytes of headers, from the IP header on, that each segment repeats.
#[inline(always)]
const fn repeated<F: Family>(ip: &Ip<F>, l4: &L4) -> u32 {
    (l4.at - ip.at + l4.header) as u32
}

/// How a packet counts.
#[inline(always)]
pub(super) fn tally<F: Family, P: Packet>(packet: &P, ip: &Ip<F>, l4: &L4, now: u32, state: u32) -> Tally {
    let size = packet.gso_size();
    if size == 0 {
        return Tally { packets: 1, bytes: ip.length, now, state };
    }
    let headers = repeated(ip, l4);
    let mut segments = packet.gso_segments();
    if segments == 0 {
        // Unknown after a change of the packet's length.
        segments = ip.length.wrapping_sub(headers).div_ceil(size).max(1);
    }
    Tally {
        packets: segments,
        bytes: ip.length.wrapping_add((segments - 1).wrapping_mul(headers)),
        now,
        state,
    }
}

/// Largest inner packet where `mtu` bytes may leave.
#[inline(always)]
pub(super) const fn inner_mtu<F: Family>(mtu: u32) -> u32 {
    less(mtu, F::OVERHEAD)
}

/// Largest TCP payload where `mtu` bytes may leave.
#[inline(always)]
pub(super) const fn inner_mss<F: Family>(mtu: u32) -> u32 {
    less(mtu, F::OVERHEAD + F::HEADER as u32 + 20)
}

/// Some packet on the wire would be larger than `mtu` once tunnelled.
#[inline(always)]
pub(super) fn exceeds<F: Family, P: Packet>(packet: &P, ip: &Ip<F>, l4: &L4, mtu: u32) -> bool {
    let size = packet.gso_size();
    let largest = if size == 0 { ip.length } else { size + repeated(ip, l4) };
    // The outer length field has 16 bits and must hold a GSO packet before it is cut.
    largest > inner_mtu::<F>(mtu) || ip.length > 0xffff - F::OVERHEAD
}

/// The packet consists of datagrams that are not cut yet.
#[inline(always)]
pub(super) fn is_uncut<P: Packet>(packet: &P, l4: &L4) -> bool {
    matches!(l4.kind, Kind::Udp) && packet.gso_size() != 0
}

/// The packet has to be cut before it is next sent, by a kernel that can. For one that cannot it stays whole, and
/// the first device that takes no such packets cuts it inside its tunnel: the interfaces of egress pods, which the
/// agent and the gateway tell so, and network cards.
#[inline(always)]
pub(super) fn must_be_cut<P: Packet>(packet: &P, l4: &L4, config: &Config) -> bool {
    config.flags & CONFIG_CUT != 0 && is_uncut(packet, l4)
}

/// Checks that what comes out of a tunnel by FOU has been cut before: the mark of that tunnel stays at a packet whose
/// headers of it are gone, and the kernel would cut datagrams as if they were still there. It does not with streams,
/// nor with the mark of IP in IP.
#[inline(always)]
pub(super) fn must_have_been_cut<P: Packet>(packet: &P, l4: &L4, encap: Encap) -> Result<(), DropReason> {
    if is_uncut(packet, l4) && !encap.is_ipip() { Err(DropReason::UncutDatagrams) } else { Ok(()) }
}

/// The error about such a packet.
#[inline(always)]
pub(super) const fn too_big<F: Build>(ip: &Ip<F>, mtu: u32) -> Refusal {
    Refusal::too_big(ip, inner_mtu::<F>(mtu))
}

/// What a packet of the initiator, or of the responder, shows of a connection.
#[inline(always)]
pub(super) const fn shows(l4: &L4, known: bool, bits: &Bits) -> u32 {
    if !matches!(l4.kind, Kind::Tcp) {
        return bits.any | if known { bits.more } else { 0 };
    }
    let flags = l4.flags;
    let mut state = bits.any;
    if flags & SYN == 0 {
        state |= bits.more;
    } else if flags & ACK == 0 {
        state |= bits.syn;
    }
    if flags & FIN != 0 {
        state |= bits.fin;
    }
    if flags & RST != 0 {
        state |= bits.rst;
    }
    state
}

/// The `STATE_*` bits of one direction.
pub(super) struct Bits {
    any: u32,
    more: u32,
    syn: u32,
    fin: u32,
    rst: u32,
}

/// Bits of the initiator.
pub(super) const INITIATOR: Bits = Bits {
    any: 0,
    more: coil_common::values::STATE_CONFIRMED,
    syn: coil_common::values::STATE_SYN,
    fin: coil_common::values::STATE_FIN,
    rst: coil_common::values::STATE_RST,
};

/// Bits of the responder.
pub(super) const RESPONDER: Bits = Bits {
    any: coil_common::values::STATE_REPLY,
    more: 0,
    syn: 0,
    fin: coil_common::values::STATE_REPLY_FIN,
    rst: coil_common::values::STATE_REPLY_RST,
};

/// A TCP SYN that opens a connection.
#[inline(always)]
pub(super) const fn opens(l4: &L4) -> bool {
    l4.flags & (SYN | ACK | RST | FIN) == SYN
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        family::V4,
        parse::{Parse, l4},
        testing::{build, memory::Memory},
    };

    /// A GSO packet of UDP with three and a bit segments, and one of TCP.
    fn packets() -> [Memory; 2] {
        let ip = build::Ip::new([10, 1, 0, 2], [192, 0, 2, 2]);
        let udp = ip.udp((1, 2), &[7; 1000]);
        let tcp = ip.tcp((1, 2), ACK, &[], &[7; 1000]);
        [udp, tcp].map(|packet| Memory { gso_size: 300, ..Memory::new(build::ethernet(&packet)) })
    }

    #[test]
    fn segments_are_counted_with_their_headers() -> Result<(), coil_common::stats::DropReason> {
        for (mut packet, header) in packets().into_iter().zip([28, 40]) {
            let ip = V4::parse(&mut packet, ETHERNET)?;
            let l4 = l4::parse(&mut packet, &ip)?;
            for segments in [0, 4] {
                packet.gso_segments = segments;
                let tally = tally(&packet, &ip, &l4, 0, 0);
                assert_eq!((tally.packets, tally.bytes), (4, 1000 + 4 * header));
            }
            // What is larger than the tunnel's packets is the segment, not the whole.
            assert!(!exceeds(&packet, &ip, &l4, 300 + header + V4::OVERHEAD));
            assert!(exceeds(&packet, &ip, &l4, 300 + header + V4::OVERHEAD - 1));
        }
        Ok(())
    }

    #[test]
    fn datagrams_are_cut_and_streams_are_not() -> Result<(), coil_common::stats::DropReason> {
        for (mut packet, uncut) in packets().into_iter().zip([true, false]) {
            let ip = V4::parse(&mut packet, ETHERNET)?;
            let l4 = l4::parse(&mut packet, &ip)?;
            assert_eq!(is_uncut(&packet, &l4), uncut);
            packet.gso_size = 0;
            assert!(!is_uncut(&packet, &l4));
        }
        Ok(())
    }
}
