//! Builds rewrites with all checksums that follow from them.

use crate::{
    csum,
    family::Family,
    parse::{Ip, L4, l4::Kind, mss::MssEdit},
    verdict::{CheckEdit, Rewrite},
};

/// Congestion experienced: both ECN bits.
const CE: u8 = 3;

/// Which end of the flow a translation rewrites.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    /// Source: on the way out.
    Source,
    /// Destination: on the way back.
    Destination,
}

impl<F: Family> Rewrite<F> {
    /// Counts the TTL or hop limit down; the caller has checked that it is above 1.
    #[inline(always)]
    pub(super) fn decrement_ttl(&mut self, ip: &Ip<F>) {
        let [a, b] = ip.ttl_word;
        let ttl = ip.ttl.wrapping_sub(1);
        let word = if F::INDEX == 0 { [ttl, b] } else { [a, ttl] };
        self.ip.ttl = Some(word);
        self.cover(ip, csum::delta2(ip.ttl_word, word));
    }

    /// Takes the mark of congestion over from the outer header, as RFC 6040 says.
    #[inline(always)]
    pub(super) fn take_congestion(&mut self, ip: &Ip<F>, outer_tos: u8) {
        if outer_tos & CE != CE || matches!(ip.tos & CE, 0 | CE) {
            return;
        }
        let [a, b] = ip.first;
        let first = if F::INDEX == 0 { [a, b | CE] } else { [a, b | (CE << 4)] };
        self.ip.first = Some(first);
        self.cover(ip, csum::delta2(ip.first, first));
    }

    /// Translates one end.
    #[inline(always)]
    pub(super) fn translate(
        &mut self,
        ip: &Ip<F>,
        l4: &L4,
        end: End,
        addr: &F::Addr,
        port: [u8; 2],
    ) {
        let (old_addr, addr_at, old_port, port_at) = match end {
            End::Source => (&ip.src, F::SRC_AT, sender_port(l4), l4.src_port_at()),
            End::Destination => (&ip.dst, F::DST_AT, receiver_port(l4), l4.dst_port_at()),
        };
        let delta = F::delta(old_addr, addr);
        self.ip.addr = Some((ip.at + addr_at, *addr));
        self.cover(ip, delta);
        self.touch(l4);
        if F::ICMP_PSEUDO || matches!(l4.kind, Kind::Tcp(_) | Kind::Udp) {
            self.check.pseudo = Some(delta);
        }
        if u16::from_ne_bytes(old_port) != u16::from_ne_bytes(port) {
            self.port = Some((port_at, port));
            self.check.plain = Some(csum::delta2(old_port, port));
        }
    }

    /// Lowers the MSS.
    #[inline(always)]
    pub(super) fn clamp(&mut self, l4: &L4, mss: Option<MssEdit>) {
        let Some(edit) = mss else { return };
        self.touch(l4);
        self.mss = Some(edit);
        self.check.plain = Some(match self.check.plain {
            Some(plain) => csum::add(plain, edit.delta),
            None => edit.delta,
        });
    }

    /// Says where the transport checksum is.
    #[inline(always)]
    fn touch(&mut self, l4: &L4) {
        self.check = CheckEdit {
            at: l4.check_at(),
            // Zero means "none" only in IPv4; in IPv6 it is not allowed, and stays what it is.
            optional: matches!(l4.kind, Kind::Udp),
            ..self.check
        };
    }

    /// Makes the header checksum follow a change, or notes the change if there is none.
    #[inline(always)]
    fn cover(&mut self, ip: &Ip<F>, delta: u32) {
        if F::CHECK_AT.is_some() {
            let check = match self.ip.check {
                Some(check) => check,
                None => ip.check,
            };
            self.ip.check = Some(csum::update(check, delta));
        } else {
            self.ip.uncovered = Some(match self.ip.uncovered {
                Some(before) => csum::add(before, delta),
                None => delta,
            });
        }
    }
}

/// The port or identifier where [`L4::src_port_at`] points.
#[inline(always)]
const fn sender_port(l4: &L4) -> [u8; 2] {
    match l4.kind {
        Kind::EchoReply => l4.dst_port,
        _ => l4.src_port,
    }
}

/// The port or identifier where [`L4::dst_port_at`] points.
#[inline(always)]
const fn receiver_port(l4: &L4) -> [u8; 2] {
    match l4.kind {
        Kind::EchoRequest => l4.src_port,
        _ => l4.dst_port,
    }
}
