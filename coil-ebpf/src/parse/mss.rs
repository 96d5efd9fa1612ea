//! The MSS option of TCP: found by a bounded walk, lowered, never raised.

use coil_common::stats::DropReason;

use super::{L4, l4::SYN};
use crate::{csum, packet::Packet};

/// Options that are looked at; MSS is the first one in what common stacks send.
const MAX_OPTIONS: usize = 8;
const END: u8 = 0;
const NOP: u8 = 1;
const MSS: u8 = 2;

/// A new value of an MSS option.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MssEdit {
    /// Offset of the value.
    pub at: usize,
    /// The value.
    pub value: [u8; 2],
    /// Change of the bytes that the TCP checksum covers.
    pub delta: u32,
}

/// An MSS option that was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MssOption {
    /// Offset of the value from the start of the TCP header.
    pub at: u16,
    /// The value.
    pub value: u16,
}

impl MssOption {
    /// As a number, for a function that can return nothing else; 0 is for `None`.
    #[inline(always)]
    #[must_use]
    pub const fn pack(found: Option<Self>) -> u64 {
        match found {
            Some(Self { at, value }) => ((at as u64) << 16) | value as u64,
            None => 0,
        }
    }

    /// The inverse of [`MssOption::pack`].
    #[inline(always)]
    #[must_use]
    pub const fn unpack(packed: u64) -> Option<Self> {
        match packed {
            0 => None,
            _ => Some(Self { at: (packed >> 16 & 0x3f) as u16, value: (packed & 0xffff) as u16 }),
        }
    }
}

/// Looks for the MSS option of the TCP header at `l4` with `header` bytes, all of them readable.
#[inline(always)]
pub fn find<P: Packet + ?Sized>(packet: &P, l4: usize, header: usize) -> Option<MssOption> {
    let mut at = 20;
    for _ in 0..MAX_OPTIONS {
        if at + 4 > header {
            return None;
        }
        let Ok([kind, length, h, l]) = packet.load::<4>(l4 + at) else {
            return None;
        };
        match kind {
            END => return None,
            NOP => at += 1,
            MSS if length == 4 => {
                return Some(MssOption { at: (at + 2) as u16, value: u16::from_be_bytes([h, l]) });
            }
            _ => {
                if length < 2 {
                    return None;
                }
                at += usize::from(length);
            }
        }
    }
    None
}

/// Says how to lower the MSS of a SYN or SYN-ACK to `limit`, if it must be.
///
/// # Errors
///
/// [`DropReason::Truncated`] if the packet ends inside the TCP header.
#[inline(always)]
pub fn clamp<P: Packet>(packet: &mut P, l4: &L4, limit: u32) -> Result<Option<MssEdit>, DropReason> {
    if l4.flags & SYN == 0 || l4.header <= 20 {
        return Ok(None);
    }
    packet.ensure(l4.at + l4.header)?;
    let Some(found) = packet.find_mss(l4.at, l4.header) else {
        return Ok(None);
    };
    if u32::from(found.value) <= limit {
        return Ok(None);
    }
    // No MSS exceeds 16 bits, so neither does a limit below one.
    let value = ((limit & 0xffff) as u16).to_be_bytes();
    let delta = csum::delta2(found.value.to_be_bytes(), value);
    Ok(Some(MssEdit {
        at: l4.at + usize::from(found.at),
        value,
        delta: if found.at & 1 == 0 { delta } else { csum::odd(delta) },
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn found_options_survive_packing() {
        for found in [None, Some(MssOption { at: 22, value: 0 }), Some(MssOption { at: 58, value: u16::MAX })]
        {
            assert_eq!(MssOption::unpack(MssOption::pack(found)), found);
        }
    }
}
