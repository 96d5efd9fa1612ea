//! The MSS option of TCP: found by a bounded walk, lowered, never raised.

use coil_common::stats::DropReason;

use super::{
    L4,
    l4::SYN,
};
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

/// Says how to lower the MSS of a SYN or SYN-ACK to `limit`, if it must be.
///
/// # Errors
///
/// [`DropReason::Truncated`] if the packet ends inside the TCP header.
#[inline(always)]
pub fn clamp<P: Packet>(
    packet: &mut P,
    l4: &L4,
    limit: u32,
) -> Result<Option<MssEdit>, DropReason> {
    if l4.flags() & SYN == 0 || l4.header <= 20 {
        return Ok(None);
    }
    packet.ensure(l4.at + l4.header)?;
    let mut at = 20;
    for _ in 0..MAX_OPTIONS {
        if at + 4 > l4.header {
            break;
        }
        let [kind, length, h, l] = packet.load::<4>(l4.at + at)?;
        match kind {
            END => break,
            NOP => at += 1,
            MSS => {
                if length != 4 || u32::from(u16::from_be_bytes([h, l])) <= limit {
                    break;
                }
                // No MSS exceeds 16 bits, so neither does a limit below one.
                let value = ((limit & 0xffff) as u16).to_be_bytes();
                let delta = csum::delta2([h, l], value);
                return Ok(Some(MssEdit {
                    at: l4.at + at + 2,
                    value,
                    delta: if at & 1 == 0 { delta } else { csum::odd(delta) },
                }));
            }
            _ => {
                if length < 2 {
                    break;
                }
                at += usize::from(length);
            }
        }
    }
    Ok(None)
}
