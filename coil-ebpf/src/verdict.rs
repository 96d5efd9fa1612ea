//! What is to happen to a packet, as data.
//!
//! All offsets are those of the packet as it came. Whoever carries a [`Rewrite`] out writes bytes
//! first, then corrects checksums, then removes outer headers, then adds new ones: so no offset
//! ever moves under its user.

use coil_common::stats::DropReason;

use crate::{
    family::Family,
    head::{TooBig, Tunnel},
    parse::{Ip, mss::MssEdit},
};

/// What is to happen to a packet, and how it counts if that succeeds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict<F: Family, A> {
    /// It goes on as it is.
    Pass,
    /// It goes on changed as the [`Rewrite`] says that was handed in to be filled (a copy of it here
    /// would not fit on the small stack of a kernel program), and is counted.
    Rewrite(A),
    /// It is dropped, and its sender gets an ICMP error.
    TooBig(Refusal<F>),
}

/// The verdict, or why the packet is dropped.
pub type Decision<F, A> = Result<Verdict<F, A>, DropReason>;

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
    /// A port or identifier to write.
    pub port: Option<(usize, [u8; 2])>,
    /// The MSS option.
    pub mss: Option<MssEdit>,
    /// Corrections of the transport checksum.
    pub check: CheckEdit,
    /// Bytes after the Ethernet header to remove.
    pub pop: usize,
    /// Tunnel headers to put after the Ethernet header.
    pub push: Option<Tunnel<F>>,
    /// Where it goes.
    pub way: Way,
}

/// A change of an IP header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IpEdit<F: Family> {
    /// Offset of the header.
    pub at: usize,
    /// First two bytes: version and traffic class.
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

/// A correction of a transport checksum.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CheckEdit {
    /// Offset of the checksum.
    pub at: usize,
    /// Change of the pseudo header.
    pub pseudo: Option<u32>,
    /// Change of what the checksum covers itself.
    pub plain: Option<u32>,
    /// A checksum of zero means that there is none (UDP).
    pub optional: bool,
}

impl CheckEdit {
    /// Nothing to correct.
    pub const NONE: Self = Self { at: 0, pseudo: None, plain: None, optional: false };
}

impl<F: Family> Rewrite<F> {
    /// Changes nothing.
    #[inline(always)]
    #[must_use]
    pub const fn new() -> Self {
        Self {
            ip: IpEdit {
                at: 0,
                first: None,
                ttl: None,
                addr: None,
                check: None,
                uncovered: None,
            },
            port: None,
            mss: None,
            check: CheckEdit::NONE,
            pop: 0,
            push: None,
            way: Way::On,
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
/// go in front, and it leaves as [`Way::Back`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refusal<F: Family> {
    /// Offset of the IP header that is quoted.
    pub at: usize,
    /// Length of the IP header that is quoted, extension headers included.
    pub header: usize,
    /// What the error says.
    pub error: TooBig<F>,
}
