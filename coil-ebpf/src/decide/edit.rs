//! Builds rewrites with all checksums that follow from them.

use coil_common::stats::DropReason;

use crate::{
    csum,
    family::Family,
    packet::Packet,
    parse::{Ip, L4, l4::Kind, mss::MssEdit},
    tables::Translation,
    verdict::{CheckEdit, PortEdit, Rewrite},
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
        // Without branches, for the verifier's sake: both bits set outside, one of two inside.
        let outside = outer_tos & (outer_tos >> 1) & 1;
        let inside = (ip.tos ^ (ip.tos >> 1)) & 1;
        let mark = (outside & inside) * CE;
        let [a, b] = ip.first;
        let first = if F::INDEX == 0 { [a, b | mark] } else { [a, b | (mark << 4)] };
        self.ip.first = Some(first);
        self.cover(ip, csum::delta2(ip.first, first));
    }

    /// Translates one end. What is there now is read from the packet again, since there is no room to
    /// remember it.
    #[inline(always)]
    pub(super) fn translate<P: Packet>(
        &mut self,
        packet: &P,
        ip: &Ip<F>,
        l4: &L4,
        end: End,
        to: &Translation<F>,
    ) -> Result<(), DropReason> {
        let (addr_at, port_at) = match end {
            End::Source => (self.ip.at + F::SRC_AT, l4.src_port_at()),
            End::Destination => (self.ip.at + F::DST_AT, l4.dst_port_at()),
        };
        let delta = F::delta(&F::load(packet, addr_at)?, &to.addr);
        self.ip.addr = Some((addr_at, to.addr));
        self.cover(ip, delta);
        self.touch(l4);
        let covers = !matches!(l4.kind, Kind::Bare) && F::ICMP_PSEUDO;
        if covers || matches!(l4.kind, Kind::Tcp | Kind::Udp) {
            self.check.pseudo = Some(delta);
        }
        let old = packet.load::<2>(port_at)?;
        let new = if matches!(l4.kind, Kind::Bare) { old } else { to.port };
        let edit = PortEdit { at: port_at, old, new };
        if edit.changes() {
            self.plain = csum::add(self.plain, csum::delta2(edit.old, edit.new));
        }
        self.port = Some(edit);
        Ok(())
    }

    /// Lowers the MSS.
    #[inline(always)]
    pub(super) fn clamp(&mut self, l4: &L4, mss: Option<MssEdit>) {
        self.touch(l4);
        if let Some(mss) = &mss {
            self.plain = csum::add(self.plain, mss.delta);
        }
        self.mss = mss;
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
    pub(super) fn cover(&mut self, ip: &Ip<F>, delta: u32) {
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
