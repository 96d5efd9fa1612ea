//! The object for kernels before 5.12, which know neither all of its instructions nor all of its helpers.
//!
//! Each is replaced by one instruction that every kernel has:
//! * the atomic OR (5.12) by a store: the datapath computes all bits beforehand, so what is lost is only
//!   that two processors may overwrite each other's bit, which the next packet sets again;
//! * the coarse clock (5.11) by the exact one, which is slower.

use std::borrow::Cow;
use std::io;
use std::sync::OnceLock;

use coil_common::config::CONFIG_CUT;
use nix::sys::utsname::uname;

use super::sys::{self, Instruction};

/// `lock *(u64 *)(dst + off) |= src`
const ATOMIC: u8 = 0xdb;
const OR: i32 = 0x40;
/// `*(u32 *)(dst + off) = src`
const STORE_WORD: u8 = 0x63;
const CALL: u8 = 0x85;
const KTIME_GET_NS: i32 = 5;
const KTIME_GET_COARSE_NS: i32 = 160;

/// The first kernel that is known to sum datagrams right which it cuts itself, where no card was to sum them.
const CUTS: (u32, u32) = (6, 12);

/// [`CONFIG_CUT`] if this kernel is known to have it.
pub(crate) fn cut() -> u32 {
    let known = uname().is_ok_and(|name| release(&name.release().to_string_lossy()) >= CUTS);
    if known { CONFIG_CUT } else { 0 }
}

/// Major and minor version of a release such as `6.1.0-18-amd64`; 0 for what is none.
fn release(text: &str) -> (u32, u32) {
    let mut parts = text.split(|c: char| !c.is_ascii_digit()).map(|part| part.parse().unwrap_or(0));
    (parts.next().unwrap_or(0), parts.next().unwrap_or(0))
}

/// What this kernel lacks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Lacks {
    atomic_or: bool,
    coarse_clock: bool,
}

impl Lacks {
    /// Asks the kernel, once.
    pub(crate) fn probe() -> io::Result<Self> {
        static KNOWN: OnceLock<Lacks> = OnceLock::new();
        if let Some(known) = KNOWN.get() {
            return Ok(*known);
        }
        let zero = |register| Instruction::new(0xb7, register, 0, 0, 0);
        let end = [zero(0), Instruction::new(0x95, 0, 0, 0, 0)];
        let takes = |body: &[Instruction]| sys::program_loads(&[body, &end].concat());
        if !takes(&[])? {
            return Err(io::Error::other("the kernel takes no program of this type"));
        }
        let clock = [Instruction::new(CALL, 0, 0, 0, KTIME_GET_COARSE_NS)];
        let or = [zero(1), Instruction::new(0x7b, 10, 1, -8, 0), Instruction::new(ATOMIC, 10, 1, -8, OR)];
        let lacks = Self { atomic_or: !takes(&or)?, coarse_clock: !takes(&clock)? };
        if lacks != Self::default() {
            tracing::info!(?lacks, "the object is adapted to this older kernel");
        }
        Ok(*KNOWN.get_or_init(|| lacks))
    }

    /// The object as this kernel takes it.
    pub(crate) fn adapt<'a>(&self, object: &'a [u8]) -> Cow<'a, [u8]> {
        if *self == Self::default() {
            return Cow::Borrowed(object);
        }
        let mut object = object.to_vec();
        for section in code(&object) {
            for bytes in object[section].chunks_exact_mut(8) {
                let immediate = i32::from_le_bytes([bytes[4], bytes[5], bytes[6], bytes[7]]);
                // The upper half of the second register's byte names the kind of a call: 0 is a helper.
                match bytes[0] {
                    ATOMIC if self.atomic_or && immediate == OR => {
                        bytes[0] = STORE_WORD;
                        bytes[4..].fill(0);
                    }
                    CALL if self.coarse_clock && bytes[1] == 0 && immediate == KTIME_GET_COARSE_NS => {
                        bytes[4..].copy_from_slice(&KTIME_GET_NS.to_le_bytes());
                    }
                    _ => {}
                }
            }
        }
        Cow::Owned(object)
    }
}

/// Where an ELF file of 64 bits, little endian, has instructions.
fn code(object: &[u8]) -> Vec<std::ops::Range<usize>> {
    const EXECUTABLE: u64 = 4;
    let number = |at: usize, size: usize| {
        let mut bytes = [0; 8];
        bytes[..size].copy_from_slice(object.get(at..at + size)?);
        usize::try_from(u64::from_le_bytes(bytes)).ok()
    };
    let section = |index: usize, table: usize, size: usize| {
        let header = table + index * size;
        let executable = number(header + 8, 8)? as u64 & EXECUTABLE != 0;
        let (start, length) = (number(header + 24, 8)?, number(header + 32, 8)?);
        let range = start..start.checked_add(length)?;
        (executable && range.end <= object.len()).then_some(range)
    };
    let (Some(table), Some(size), Some(count)) = (number(40, 8), number(58, 2), number(60, 2)) else {
        return Vec::new();
    };
    (0..count).filter_map(|index| section(index, table, size)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_from_releases() {
        for (text, version) in [
            ("6.1.0-56-amd64", (6, 1)),
            ("6.12.117+deb13-amd64", (6, 12)),
            ("7.2-rc1", (7, 2)),
            ("5", (5, 0)),
            ("", (0, 0)),
        ] {
            assert_eq!(release(text), version, "{text}");
        }
        assert!((6, 12) >= CUTS && (6, 1) < CUTS && (7, 0) >= CUTS);
    }

    /// A file with two sections of which the second is code.
    fn file(code: &[u8]) -> Vec<u8> {
        let mut file = vec![0; 64];
        file.extend(code);
        let table = file.len();
        file[40..48].copy_from_slice(&(table as u64).to_le_bytes());
        file[58..60].copy_from_slice(&64u16.to_le_bytes());
        file[60..62].copy_from_slice(&2u16.to_le_bytes());
        for flags in [0u64, EXECUTABLE_AND_ALLOCATED] {
            let mut header = vec![0; 64];
            header[8..16].copy_from_slice(&flags.to_le_bytes());
            header[24..32].copy_from_slice(&64u64.to_le_bytes());
            header[32..40].copy_from_slice(&(code.len() as u64).to_le_bytes());
            file.extend(header);
        }
        file
    }

    const EXECUTABLE_AND_ALLOCATED: u64 = 6;
    const OBJECT: [u8; 40] = [
        0xdb, 0x41, 0x18, 0, 0x40, 0, 0, 0, // lock |=
        0xdb, 0x12, 0x20, 0, 0, 0, 0, 0, // lock +=
        0x85, 0, 0, 0, 160, 0, 0, 0, // the coarse clock
        0x85, 0x10, 0, 0, 160, 0, 0, 0, // a function of the program itself
        0x95, 0, 0, 0, 0, 0, 0, 0,
    ];

    #[test]
    fn a_new_kernel_gets_the_object_as_it_is() {
        let object = file(&OBJECT);
        assert!(matches!(Lacks::default().adapt(&object), Cow::Borrowed(_)));
    }

    #[test]
    fn what_an_old_kernel_lacks_is_replaced_and_nothing_else() {
        let object = file(&OBJECT);
        let mut wanted = object.clone();
        wanted[64..72].copy_from_slice(&[0x63, 0x41, 0x18, 0, 0, 0, 0, 0]);
        let lacks = Lacks { atomic_or: true, coarse_clock: false };
        assert_eq!(lacks.adapt(&object), wanted);
        wanted[64 + 16 + 4] = 5;
        let lacks = Lacks { atomic_or: true, coarse_clock: true };
        assert_eq!(lacks.adapt(&object), wanted);
    }

    #[test]
    fn what_is_no_object_is_left_alone() {
        let lacks = Lacks { atomic_or: true, coarse_clock: true };
        for bytes in [&[][..], &[0xdb; 70]] {
            assert_eq!(lacks.adapt(bytes), bytes);
        }
    }
}
