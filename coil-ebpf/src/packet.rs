//! What the logic may ask of a packet.

use coil_common::stats::DropReason;

/// Length of an Ethernet header. VLAN tags are in the metadata of a packet when TC sees it.
pub const ETHERNET: usize = 14;

/// A packet from its Ethernet header on.
pub trait Packet {
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

    /// Transport payload of each segment of a GSO packet, 0 for other packets.
    fn gso_size(&self) -> u32;

    /// Number of segments of a GSO packet, 0 if unknown.
    fn gso_segments(&self) -> u32;
}
