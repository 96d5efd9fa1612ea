//! What the logic may ask of a packet.

use coil_common::stats::DropReason;

use crate::parse::{ip, mss};

/// Length of an Ethernet header. VLAN tags are in the metadata of a packet when TC sees it.
pub const ETHERNET: usize = 14;

/// The first bytes of a packet, known to be there. What lies behind them reads as zero.
pub trait View {
    /// The half word at an offset, in the order of memory.
    fn half(&self, at: usize) -> u16;
    /// The word at an offset, in the order of memory.
    fn word(&self, at: usize) -> u32;
}

/// A packet from its Ethernet header on.
pub trait Packet {
    /// See [`Packet::view`].
    type View: View;

    /// The first `len` bytes, if they are readable as they are.
    fn view(&self, len: usize) -> Option<Self::View>;

    /// Makes the first `len` bytes readable.
    ///
    /// # Errors
    ///
    /// [`DropReason::Truncated`] if the packet is shorter.
    fn ensure(&mut self, len: usize) -> Result<(), DropReason>;

    /// Reads `N` bytes, more than one, that [`Packet::ensure`] has made readable.
    ///
    /// # Errors
    ///
    /// [`DropReason::Truncated`] if they are not readable.
    fn load<const N: usize>(&self, offset: usize) -> Result<[u8; N], DropReason>;

    /// Reads `N` words, in the order of memory, that [`Packet::ensure`] has made readable.
    ///
    /// # Errors
    ///
    /// [`DropReason::Truncated`] if they are not readable.
    fn words<const N: usize>(&self, offset: usize) -> Result<[u32; N], DropReason>;

    /// Length of the packet, Ethernet header included.
    fn length(&self) -> u32;

    /// Index of the interface.
    fn interface(&self) -> u32;

    /// Transport payload of each segment of a GSO packet, 0 for other packets.
    fn gso_size(&self) -> u32;

    /// Number of segments of a GSO packet, 0 if unknown.
    fn gso_segments(&self) -> u32;

    /// Walks over IPv6 extension headers; see [`ip::walk`]. A method so that a kernel program can keep
    /// the loop in a function that the verifier looks at once.
    #[inline(always)]
    fn walk_extensions(&mut self, at: usize, next: u8, room: usize) -> ip::Extensions {
        ip::walk(self, at, next, room)
    }

    /// Looks for the MSS option of a TCP header; see [`mss::find`] and [`Packet::walk_extensions`].
    #[inline(always)]
    fn find_mss(&mut self, at: usize, header: usize) -> Option<mss::MssOption> {
        mss::find(self, at, header)
    }
}
