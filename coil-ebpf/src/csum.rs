//! Internet checksum arithmetic.
//!
//! Sums are kept as the kernel keeps them: 32 bits of one's complement over words in the order of
//! memory. One's complement addition does not care for byte order as long as it is the same
//! everywhere, so nothing is swapped. A *delta* is the sum of the new words minus that of the old
//! ones; a checksum field moves by the negative delta of the bytes that it covers.

/// Adds two sums.
#[inline(always)]
#[must_use]
pub const fn add(a: u32, b: u32) -> u32 {
    // In double words, which is what registers of BPF are: no branch, no comparison.
    let sum = a as u64 + b as u64;
    ((sum & 0xffff_ffff) + (sum >> 32)) as u32
}

/// Reduces a sum to 16 bits.
#[inline(always)]
#[must_use]
pub const fn fold(sum: u32) -> u16 {
    let sum = (sum & 0xffff) + (sum >> 16);
    let sum = (sum & 0xffff) + (sum >> 16);
    (sum & 0xffff) as u16
}

/// Delta of a 16-bit word at an even offset.
#[inline(always)]
#[must_use]
pub const fn delta2(old: [u8; 2], new: [u8; 2]) -> u32 {
    add(!(u16::from_ne_bytes(old) as u32), u16::from_ne_bytes(new) as u32)
}

/// Delta of a 32-bit word at an even offset.
#[inline(always)]
#[must_use]
pub const fn delta4(old: [u8; 4], new: [u8; 4]) -> u32 {
    add(!u32::from_ne_bytes(old), u32::from_ne_bytes(new))
}

/// The delta of the same bytes one byte further on.
#[inline(always)]
#[must_use]
pub const fn odd(delta: u32) -> u32 {
    delta.rotate_left(8)
}

/// A checksum field after the bytes that it covers changed by `delta`.
#[inline(always)]
#[must_use]
pub const fn update(check: [u8; 2], delta: u32) -> [u8; 2] {
    (!fold(add(delta, !(u16::from_ne_bytes(check) as u32)))).to_ne_bytes()
}

/// The checksum field for bytes that sum to `sum`, the field itself counted as zero.
#[inline(always)]
#[must_use]
pub const fn finish(sum: u32) -> [u8; 2] {
    (!fold(sum)).to_ne_bytes()
}
