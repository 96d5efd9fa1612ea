//! Atomic updates of map values, which several processors may count in at once.

use core::intrinsics::{AtomicOrdering::Relaxed, atomic_or, atomic_xadd};

use coil_common::values::{FlowValue, InboundValue, NatValue4, NatValue6};

/// Adds to a counter.
///
/// # Safety
///
/// `target` points to a map value.
#[inline(always)]
pub(super) unsafe fn add(target: *mut u64, value: u64) {
    // SAFETY: the caller's; values of maps are aligned.
    unsafe { atomic_xadd::<u64, u64, { Relaxed }>(target, value) };
}

/// Sets bits of a word.
///
/// Without the third revision of the instruction set only double words can be changed atomically;
/// the word after it is left as it is.
///
/// The operand holds the bits that are there already too: before 5.12 there is no such instruction, and
/// the loader makes it a plain store of one word.
///
/// # Safety
///
/// `target` points to a double word of a map value of which it is the first half.
#[inline(always)]
pub(super) unsafe fn or(target: *mut u32, bits: u32) {
    // SAFETY: the caller's; values of maps are aligned.
    unsafe { atomic_or::<u64, u64, { Relaxed }>(target.cast(), u64::from(*target | bits)) };
}

/// A field that [`or`] is used on stands at the start of a double word.
macro_rules! assert_or {
    ($($value:ty),+) => {
        $(const _: () = assert!(core::mem::offset_of!($value, state) % 8 == 0);)+
    };
}

assert_or!(FlowValue, InboundValue, NatValue4, NatValue6);
