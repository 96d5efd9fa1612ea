//! What is to happen to a packet, as data.
//!
//! All offsets are those of the packet as it came. Whoever carries a [`Rewrite`] out writes bytes
//! first, then corrects checksums, then removes outer headers, then adds new ones: so no offset
//! ever moves under its user.

use coil_common::{config::Config, stats::DropReason};

use crate::{
    csum,
    family::Family,
    head::{TooBig, Tunnel},
    packet::{ETHERNET, Packet},
    parse::{Ip, mss::MssEdit},
};

/// What is to happen to a packet, and how it counts if that succeeds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict<A> {
    /// It goes on as it is.
    Pass,
    /// It goes on changed as the [`Rewrite`] says that was handed in to be filled (a copy of it here
    /// would not fit on the small stack of a kernel program), and is counted.
    Rewrite(A),
    /// It is dropped, and its sender gets an ICMP error.
    TooBig(Refusal),
}

/// The verdict, or why the packet is dropped.
pub type Decision<A> = Result<Verdict<A>, DropReason>;

/// Where a rewritten packet goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// On, where it was going.
    On,
    /// Back out of the interface that it came in by, to the neighbour that it came from.
    Back,
}

/// A change of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rewrite<F: Family> {
    /// Changes of the (inner) IP header at this offset.
    pub ip: IpEdit<F>,
    /// A port or identifier.
    pub port: Option<PortEdit>,
    /// The MSS option.
    pub mss: Option<MssEdit>,
    /// Corrections of the transport checksum.
    pub check: CheckEdit,
    /// Bytes after the Ethernet header to remove.
    pub pop: usize,
    /// Tunnel headers to put after the Ethernet header.
    pub push: Option<Tunnel<F>>,
    /// It is a GSO packet of datagrams, which must be cut into them when it is next sent: after a
    /// tunnel has been taken off the kernel would cut it as if it still had one.
    pub cut: bool,
    /// Where it goes.
    pub way: Way,
}

/// A change of an IP header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IpEdit<F: Family> {
    /// Offset of the header.
    pub at: usize,
    /// The half word of the traffic class.
    pub first: Option<[u8; 2]>,
    /// The half word of TTL or hop limit.
    pub ttl: Option<[u8; 2]>,
    /// Offset of an address and its new value.
    pub addr: Option<(usize, F::Addr)>,
    /// Header checksum; only IPv4 has one.
    pub check: Option<[u8; 2]>,
    /// Change of bytes that no checksum inside the IP header makes up for; only in IPv6. It matters
    /// where a network card has summed the whole packet.
    pub uncovered: Option<u32>,
}

/// A change of a port or identifier; it may be none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PortEdit {
    /// Its offset.
    pub at: usize,
    /// What is there.
    pub old: [u8; 2],
    /// What shall be there.
    pub new: [u8; 2],
}

impl PortEdit {
    /// It changes something.
    #[inline(always)]
    #[must_use]
    pub const fn changes(&self) -> bool {
        u16::from_ne_bytes(self.old) != u16::from_ne_bytes(self.new)
    }
}

/// A correction of a transport checksum. What follows from a port or the MSS is not in here: see
/// [`Rewrite::plain_delta`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CheckEdit {
    /// Offset of the checksum.
    pub at: usize,
    /// Change of the pseudo header.
    pub pseudo: Option<u32>,
    /// A checksum of zero means that there is none (UDP).
    pub optional: bool,
}

impl CheckEdit {
    /// Nothing to correct.
    pub const NONE: Self = Self { at: 0, pseudo: None, optional: false };
}

impl<F: Family> Rewrite<F> {
    /// Changes nothing.
    #[inline(always)]
    #[must_use]
    pub const fn new() -> Self {
        Self {
            ip: IpEdit { at: 0, first: None, ttl: None, addr: None, check: None, uncovered: None },
            port: None,
            mss: None,
            check: CheckEdit::NONE,
            pop: 0,
            push: None,
            cut: false,
            way: Way::On,
        }
    }

    /// Change of what the transport checksum covers itself, `None` if there is none. It is asked for
    /// as late as possible: a decision that is kept in a variable doubles the states that the
    /// verifier has to walk through.
    #[inline(always)]
    #[must_use]
    pub const fn plain_delta(&self) -> Option<u32> {
        let port = match &self.port {
            Some(port) if port.changes() => Some(csum::delta2(port.old, port.new)),
            _ => None,
        };
        match (port, &self.mss) {
            (None, None) => None,
            (Some(port), None) => Some(port),
            (None, Some(mss)) => Some(mss.delta),
            (Some(port), Some(mss)) => Some(csum::add(port, mss.delta)),
        }
    }

    /// Chooses the header to change and the way to go.
    #[inline(always)]
    pub(crate) const fn begin(&mut self, ip: &Ip<F>, way: Way) {
        self.ip.at = ip.at;
        self.way = way;
    }
}

impl<F: Family> Default for Rewrite<F> {
    fn default() -> Self {
        Self::new()
    }
}

/// An ICMP error in place of a packet: the packet is cut after [`Family::QUOTE`] bytes of IP, headers
/// go in front, and it leaves as [`Way::Back`]. It comes from the address of the configuration, or,
/// if there is none, from where the packet was going.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// Length of the IP header that is quoted, extension headers included. It follows the Ethernet
    /// header.
    pub header: usize,
    /// Largest packet that would fit.
    pub mtu: u16,
}

impl Refusal {
    /// What the error about `packet` says.
    ///
    /// # Errors
    ///
    /// [`DropReason::Truncated`] if the packet has no IP header.
    #[inline(always)]
    pub fn error<F: Family, P: Packet>(&self, packet: &P, config: &Config) -> Result<TooBig<F>, DropReason> {
        let own = F::of_config(config);
        let from = if F::is_zero(&own) { F::load(packet, ETHERNET + F::DST_AT)? } else { own };
        Ok(TooBig { src: from, dst: F::load(packet, ETHERNET + F::SRC_AT)?, mtu: self.mtu })
    }
}
