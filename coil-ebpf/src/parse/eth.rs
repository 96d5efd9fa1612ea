//! Ethernet.

use coil_common::stats::DropReason;

use crate::packet::{ETHERNET, Packet};

/// What follows an Ethernet header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EtherType {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
    /// Anything else.
    Other,
}

/// Reads the type of the payload.
///
/// # Errors
///
/// [`DropReason::Truncated`] if there is no whole Ethernet header.
#[inline(always)]
pub fn ethertype<P: Packet>(packet: &mut P) -> Result<EtherType, DropReason> {
    packet.ensure(ETHERNET)?;
    Ok(match packet.load::<2>(12)? {
        [0x08, 0x00] => EtherType::V4,
        [0x86, 0xdd] => EtherType::V6,
        _ => EtherType::Other,
    })
}
