//! What the building blocks of a program cost: each in a program of its own, by hand-written
//! instructions, over that of a program that does nothing.
//!
//! The machine has no hardware counters, and a sampling profiler sees a program of a few hundred
//! nanoseconds as one point. These figures say instead where the time of a program can go.

use std::os::fd::{AsRawFd, OwnedFd};

use anyhow::{Context, Result};

use crate::kernel::{create_map, load, test_run, update};

type Insn = [u8; 8];

const fn insn(op: u8, dst: u8, src: u8, off: i16, imm: i32) -> Insn {
    let o = off.to_le_bytes();
    let i = imm.to_le_bytes();
    [op, (src << 4) | dst, o[0], o[1], i[0], i[1], i[2], i[3]]
}

const fn mov(dst: u8, src: u8) -> Insn {
    insn(0xbf, dst, src, 0, 0)
}

const fn set(dst: u8, imm: i32) -> Insn {
    insn(0xb7, dst, 0, 0, imm)
}

const fn add(dst: u8, imm: i32) -> Insn {
    insn(0x07, dst, 0, 0, imm)
}

const fn call(helper: i32) -> Insn {
    insn(0x85, 0, 0, 0, helper)
}

const EXIT: Insn = insn(0x95, 0, 0, 0, 0);
/// Largest key that is looked up.
const KEY: i16 = 40;

const HASH: u32 = 1;
const ARRAY: u32 = 2;
const PER_CPU_ARRAY: u32 = 6;
const NO_PREALLOC: u32 = 1;

const MAP_LOOKUP: i32 = 1;
const L4_CSUM_REPLACE: i32 = 11;
const STORE_BYTES: i32 = 9;
const REDIRECT: i32 = 23;
const PULL_DATA: i32 = 39;
const CSUM_UPDATE: i32 = 40;
const ADJUST_ROOM: i32 = 50;
const JIFFIES: i32 = 118;
const COARSE_TIME: i32 = 160;

/// `FIXED_GSO | ENCAP_L3_IPV4 | ENCAP_L4_UDP`
const ENCAP: i32 = 1 | 2 | 16;

/// Some block, named, whether it may stand in a program more than once, and the map that it asks.
struct Piece {
    name: &'static str,
    repeats: bool,
    code: Vec<Insn>,
}

fn adjust_room(by: i32, flags: i32) -> Vec<Insn> {
    vec![mov(1, 6), set(2, by), set(3, 1), set(4, flags), call(ADJUST_ROOM)]
}

fn pieces(maps: &mut Vec<OwnedFd>) -> Result<Vec<Piece>> {
    let mut pieces = Vec::new();
    let mut piece = |name, repeats, code| pieces.push(Piece { name, repeats, code });
    for (name, kind, key, value) in [
        ("hash look-up, key of 4 bytes", HASH, 4, 32),
        ("hash look-up, key of 8 bytes", HASH, 8, 4),
        ("hash look-up, key of 16 bytes", HASH, 16, 64),
        ("hash look-up, key of 20 bytes", HASH, 20, 4),
        ("hash look-up, key of 40 bytes", HASH, 40, 64),
        ("array look-up", ARRAY, 4, 24),
        ("per-CPU array look-up", PER_CPU_ARRAY, 4, 16),
    ] {
        let map = create_map(kind, key, value, if kind == HASH { NO_PREALLOC } else { 0 })?;
        if kind == HASH {
            update(map.as_raw_fd(), &vec![0; key as usize], &vec![0; value as usize])?;
        }
        // The pseudo register 1 says that the number is a map's descriptor.
        let code = vec![
            insn(0x18, 1, 1, 0, map.as_raw_fd()),
            [0; 8],
            mov(2, 10),
            add(2, -i32::from(KEY)),
            call(MAP_LOOKUP),
        ];
        maps.push(map);
        piece(name, true, code);
    }
    let value = maps[2].as_raw_fd();
    let mut atomic = vec![
        insn(0x18, 1, 1, 0, value),
        [0; 8],
        mov(2, 10),
        add(2, -i32::from(KEY)),
        call(MAP_LOOKUP),
        // if r0 == 0 skip
        insn(0x15, 0, 0, 3, 0),
        set(1, 1),
    ];
    atomic.extend([insn(0xdb, 0, 1, 32, 0), insn(0xdb, 0, 1, 40, 0)]);
    piece("hash look-up, key of 16 bytes, and two atomic additions", true, atomic);
    piece("coarse clock", true, vec![call(COARSE_TIME)]);
    piece("jiffies", true, vec![call(JIFFIES)]);
    piece("pull_data of what is there", true, vec![mov(1, 6), set(2, 42), call(PULL_DATA)]);
    let store = |flags| {
        vec![
            mov(1, 6),
            set(2, 14),
            mov(3, 10),
            add(3, -i32::from(KEY)),
            set(4, 28),
            set(5, flags),
            call(STORE_BYTES),
        ]
    };
    piece("store_bytes, 28 bytes", true, store(0));
    piece("store_bytes, 28 bytes, RECOMPUTE_CSUM", true, store(1));
    piece(
        "l4_csum_replace",
        true,
        vec![mov(1, 6), set(2, 40), set(3, 0), set(4, 0x1234), set(5, 0x30), call(L4_CSUM_REPLACE)],
    );
    piece("csum_update", true, vec![mov(1, 6), set(2, 1), call(CSUM_UPDATE)]);
    piece("redirect", true, vec![set(1, 1), set(2, 0), call(REDIRECT)]);
    piece("adjust_room, 28 bytes of tunnel more", false, adjust_room(28, ENCAP));
    piece("adjust_room, 28 bytes less", false, adjust_room(-28, 1));
    piece("100 additions", true, vec![add(7, 1); 100]);
    Ok(pieces)
}

fn program(code: &[Insn]) -> Result<OwnedFd> {
    let mut all = vec![mov(6, 1), set(7, 0)];
    for at in (8..=KEY).step_by(8) {
        all.push(insn(0x7a, 10, 0, -at, 0));
    }
    all.extend_from_slice(code);
    all.extend([set(0, -1), EXIT]);
    load(&all)
}

/// Names of blocks with the nanoseconds of the first and of each further one in a program.
pub fn measure(frame: &[u8]) -> Result<Vec<(&'static str, f64, Option<f64>)>> {
    /// Copies of a block in the long program.
    const COPIES: usize = 9;
    let mut maps = Vec::new();
    let nothing = program(&[])?;
    let mut figures = Vec::new();
    for piece in pieces(&mut maps)? {
        let one = program(&piece.code).with_context(|| piece.name)?;
        let first = difference(&nothing, &one, frame)?;
        let more = if piece.repeats {
            let many = program(&piece.code.repeat(COPIES)).with_context(|| piece.name)?;
            Some(difference(&one, &many, frame)? / (COPIES - 1) as f64)
        } else {
            None
        };
        figures.push((piece.name, first, more));
    }
    Ok(figures)
}

/// Mean of the middle half: the clock ticks too coarsely for a median.
fn middle(mut values: Vec<u32>) -> f64 {
    values.sort_unstable();
    let quarter = values.len() / 4;
    let middle = &values[quarter..values.len() - quarter];
    middle.iter().map(|value| f64::from(*value)).sum::<f64>() / middle.len() as f64
}

fn difference(less: &OwnedFd, more: &OwnedFd, frame: &[u8]) -> Result<f64> {
    const RUNS: usize = 20_000;
    let (mut a, mut b) = (Vec::with_capacity(RUNS), Vec::with_capacity(RUNS));
    for run in 0..RUNS + RUNS / 10 {
        let (first, second) = (test_run(less.as_raw_fd(), frame)?.0, test_run(more.as_raw_fd(), frame)?.0);
        if run >= RUNS / 10 {
            a.push(first);
            b.push(second);
        }
    }
    Ok(middle(b) - middle(a))
}
