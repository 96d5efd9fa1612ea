//! Counts the BPF instructions that one packet costs, by executing the program's own instructions.
//!
//! The machines have no hardware counters and the kernel reports time only, so the instructions of
//! the object are interpreted here: registers, stack, packet and map values are real memory, helpers
//! do what the kernel's would do to bytes. What is counted is what the compiler emitted, before the
//! kernel rewrites context accesses and inlines look-ups.

use std::collections::{BTreeMap, HashMap};

use anyhow::{Context, Result, bail, ensure};
use aya_obj::generated::bpf_insn;
use aya_obj::{Object, maps::Map};

/// Largest packet with room for outer headers.
const PACKET_ROOM: usize = 4096;
/// Where the packet starts, so that headers can grow in front.
const HEADROOM: usize = 256;
/// More than any path may take: a guard against a loop.
const LIMIT: u64 = 1_000_000;

/// `struct __sk_buff` as far as programs read it (include/uapi/linux/bpf.h), by byte offset.
mod context {
    pub const SIZE: usize = 192;
    pub const LEN: usize = 0;
    pub const PROTOCOL: usize = 16;
    pub const INGRESS_IFINDEX: usize = 36;
    pub const IFINDEX: usize = 40;
    pub const DATA: usize = 76;
    pub const DATA_END: usize = 80;
}

/// What one run did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// Instructions executed.
    pub instructions: u64,
    /// Calls of helpers among them.
    pub helpers: u64,
    /// What the program returned.
    pub action: i32,
}

/// A map of the object, held in this process.
#[derive(Debug)]
struct Table {
    kind: u32,
    key_size: usize,
    value_size: usize,
    max_entries: usize,
    entries: BTreeMap<Vec<u8>, Box<[u8]>>,
}

/// The programs and maps of an object.
#[derive(Debug)]
pub struct Machine {
    programs: HashMap<String, Vec<bpf_insn>>,
    tables: Vec<Table>,
    names: HashMap<String, usize>,
    memory: LowMemory,
}

const ARRAY: u32 = 2;
const PERCPU_ARRAY: u32 = 6;
const LPM_TRIE: u32 = 11;

impl Machine {
    /// Reads the object; `globals` are values of its read-only variables by name.
    pub fn new(object: &[u8], globals: &[(&str, &[u8])]) -> Result<Self> {
        let mut object = Object::parse(object).context("parsing the object")?;
        let globals = globals.iter().map(|(name, value)| (*name, (*value, true))).collect();
        object.patch_map_data(globals).context("setting globals")?;
        let maps: Vec<(String, Map)> = object.maps.drain().collect();
        let text = object.functions.keys().map(|(section, _)| *section).collect();
        object
            .relocate_maps(
                maps.iter().enumerate().map(|(index, (name, map))| {
                    (name.as_str(), i32::try_from(index).expect("an object has few maps"), map)
                }),
                &text,
            )
            .context("relocating maps")?;
        object.relocate_calls(&text).context("relocating calls")?;
        let programs = object
            .programs
            .iter()
            .map(|(name, program)| {
                (name.clone(), object.functions[&program.function_key()].instructions.clone())
            })
            .collect();
        let mut tables = Vec::new();
        let mut names = HashMap::new();
        for (index, (name, map)) in maps.iter().enumerate() {
            let mut table = Table {
                kind: map.map_type(),
                key_size: map.key_size() as usize,
                value_size: map.value_size() as usize,
                max_entries: map.max_entries() as usize,
                entries: BTreeMap::new(),
            };
            if !map.data().is_empty() {
                table.entries.insert(vec![0; 4], map.data().into());
            }
            tables.push(table);
            names.insert(name.clone(), index);
        }
        Ok(Self { programs, tables, names, memory: LowMemory::new()? })
    }

    /// Forgets the contents of all maps but read-only data.
    pub fn clear(&mut self) {
        for (name, index) in &self.names {
            if !name.contains(".rodata") {
                self.tables[*index].entries.clear();
            }
        }
    }

    /// Puts an entry into a map.
    pub fn insert(&mut self, map: &str, key: &[u8], value: &[u8]) -> Result<()> {
        let index = *self.names.get(map).with_context(|| format!("no map {map}"))?;
        let table = &mut self.tables[index];
        ensure!(key.len() == table.key_size, "{map}: key of {} bytes, not {}", key.len(), table.key_size);
        ensure!(
            value.len() == table.value_size,
            "{map}: value of {} bytes, not {}",
            value.len(),
            table.value_size
        );
        table.entries.insert(key.to_vec(), value.into());
        Ok(())
    }

    /// Runs a program over an Ethernet frame that came in or leaves on an interface.
    pub fn run(&mut self, program: &str, frame: &[u8], ifindex: u32) -> Result<Run> {
        let code = self.programs.get(program).with_context(|| format!("no program {program}"))?.clone();
        self.memory.load(frame, ifindex)?;
        let mut stack = [0_u64; 512 / 8 * 8];
        let mut registers = [0_u64; 11];
        registers[1] = self.memory.context_address();
        registers[10] = stack.as_mut_ptr_range().end as u64;
        let mut frames: Vec<(usize, [u64; 5])> = Vec::new();
        let mut run = Run { instructions: 0, helpers: 0, action: 0 };
        let mut pc = 0;
        loop {
            let insn = code.get(pc).copied().with_context(|| format!("{program}: jump to {pc}, outside"))?;
            run.instructions += 1;
            ensure!(run.instructions < LIMIT, "{program}: more than {LIMIT} instructions");
            pc += 1;
            match insn.code & 0x07 {
                0x00 => {
                    ensure!(insn.code == 0x18, "{program}: load {:#x} is not known", insn.code);
                    let high = code.get(pc).context("half a wide load")?.imm;
                    pc += 1;
                    registers[usize::from(insn.dst_reg())] = match insn.src_reg() {
                        1 => insn.imm as u32 as u64,
                        2 => self.value_address(insn.imm, high)?,
                        _ => u64::from(insn.imm as u32) | (u64::from(high as u32) << 32),
                    };
                }
                0x01 => load(&mut registers, insn)?,
                0x02 | 0x03 => store(&mut registers, insn)?,
                0x04 | 0x07 => arithmetic(&mut registers, insn)?,
                _ if insn.code == 0x85 && insn.src_reg() == 1 => {
                    frames
                        .push((pc, [registers[6], registers[7], registers[8], registers[9], registers[10]]));
                    registers[10] -= 512;
                    pc = usize::try_from(pc as i64 + i64::from(insn.imm))?;
                }
                _ if insn.code == 0x85 => {
                    run.helpers += 1;
                    registers[0] = self.helper(insn.imm, &registers)?;
                }
                _ if insn.code == 0x95 => match frames.pop() {
                    Some((back, saved)) => {
                        pc = back;
                        registers[6..11].copy_from_slice(&saved);
                    }
                    None => {
                        run.action = registers[0] as i32;
                        return Ok(run);
                    }
                },
                _ => {
                    if let Some(offset) = jump(&registers, insn)? {
                        pc = usize::try_from(pc as i64 + offset)?;
                    }
                }
            }
        }
    }

    fn value_address(&mut self, map: i32, offset: i32) -> Result<u64> {
        let table = self.tables.get_mut(map as usize).context("no such map")?;
        let value = table.entries.get_mut(&vec![0; 4]).context("read-only data is missing")?;
        Ok(value.as_mut_ptr() as u64 + offset as u64)
    }

    /// The helpers that the datapath calls, by number (include/uapi/linux/bpf.h).
    fn helper(&mut self, number: i32, r: &[u64; 11]) -> Result<u64> {
        const FAILED: u64 = -22_i64 as u64;
        Ok(match number {
            1 => {
                let table = self.table(r[1])?;
                let key = bytes(r[2], table.key_size);
                table.find(key).map_or(0, |value| value.as_mut_ptr() as u64)
            }
            2 => {
                let table = self.table(r[1])?;
                let key = bytes(r[2], table.key_size).to_vec();
                if r[4] == 1 && table.entries.contains_key(&key) {
                    -17_i64 as u64
                } else if table.entries.len() >= table.max_entries {
                    -7_i64 as u64
                } else {
                    let value = bytes(r[3], table.value_size).into();
                    table.entries.insert(key, value);
                    0
                }
            }
            3 => {
                let table = self.table(r[1])?;
                let key = bytes(r[2], table.key_size);
                if table.entries.remove(key).is_some() { 0 } else { -2_i64 as u64 }
            }
            // ktime_get_ns, ktime_get_boot_ns, ktime_get_coarse_ns
            5 | 125 | 160 => 1_000_000_000_000,
            // jiffies64
            118 => 4_300_000_000,
            // get_prandom_u32, get_smp_processor_id
            7 | 8 => 4,
            // skb_store_bytes
            9 => {
                let data = bytes(r[3], r[4] as usize).to_vec();
                self.memory.packet_mut(r[2] as usize, data.len()).map_or(FAILED, |to| {
                    to.copy_from_slice(&data);
                    0
                })
            }
            // l3_csum_replace, l4_csum_replace: the value of a checksum changes no path
            10 | 11 => 0,
            // redirect
            23 => 7,
            // skb_load_bytes
            26 => match self.memory.packet_mut(r[2] as usize, r[4] as usize) {
                Some(from) => {
                    let data = from.to_vec();
                    bytes_mut(r[3], data.len()).copy_from_slice(&data);
                    0
                }
                None => FAILED,
            },
            // csum_diff
            28 => 0,
            // skb_change_tail
            38 => self.memory.change_tail(r[2] as usize),
            // skb_pull_data, set_hash_invalid, skb_change_type, csum_update, csum_level
            39 | 48 | 32 | 40 | 135 => 0,
            // skb_adjust_room
            50 => self.memory.adjust_room(r[2] as i32),
            // check_mtu, fib_lookup
            163 | 69 => 0,
            other => bail!("helper {other} is not known here"),
        })
    }

    fn table(&mut self, map: u64) -> Result<&mut Table> {
        self.tables.get_mut(usize::try_from(map)?).with_context(|| format!("no map {map}"))
    }
}

impl Table {
    fn find(&mut self, key: &[u8]) -> Option<&mut Box<[u8]>> {
        match self.kind {
            ARRAY | PERCPU_ARRAY => {
                let index = u32::from_ne_bytes(key.try_into().ok()?) as usize;
                let size = self.value_size;
                (index < self.max_entries)
                    .then(|| self.entries.entry(key.to_vec()).or_insert_with(|| vec![0; size].into()))
            }
            LPM_TRIE => {
                let best =
                    self.entries.keys().filter(|prefix| covers(prefix, key)).max_by_key(|p| bits(p))?.clone();
                self.entries.get_mut(&best)
            }
            _ => self.entries.get_mut(key),
        }
    }
}

fn bits(key: &[u8]) -> u32 {
    u32::from_ne_bytes([key[0], key[1], key[2], key[3]])
}

fn covers(prefix: &[u8], key: &[u8]) -> bool {
    (0..bits(prefix) as usize).all(|bit| {
        let mask = 0x80 >> (bit % 8);
        prefix[4 + bit / 8] & mask == key[4 + bit / 8] & mask
    })
}

/// Context and packet below 4 GiB, where the 32-bit addresses of `__sk_buff` can reach.
#[derive(Debug)]
struct LowMemory {
    base: *mut u8,
    start: usize,
    end: usize,
}

const LOW_SIZE: usize = context::SIZE + PACKET_ROOM;

impl LowMemory {
    fn new() -> Result<Self> {
        // SAFETY: a fresh anonymous mapping; nothing else refers to it.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                LOW_SIZE,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_32BIT,
                -1,
                0,
            )
        };
        ensure!(base != libc::MAP_FAILED, "mmap: {}", std::io::Error::last_os_error());
        Ok(Self { base: base.cast(), start: HEADROOM, end: HEADROOM })
    }

    fn context_address(&self) -> u64 {
        self.base as u64
    }

    fn room(&mut self) -> &mut [u8] {
        // SAFETY: the mapping has `LOW_SIZE` bytes and lives as long as `self`.
        unsafe { std::slice::from_raw_parts_mut(self.base.add(context::SIZE), PACKET_ROOM) }
    }

    fn set(&mut self, offset: usize, value: u32) {
        // SAFETY: `offset` is one of the constants of `context`, inside the mapping.
        unsafe { self.base.add(offset).cast::<u32>().write_unaligned(value) };
    }

    fn load(&mut self, frame: &[u8], ifindex: u32) -> Result<()> {
        ensure!(HEADROOM + frame.len() <= PACKET_ROOM, "frame of {} bytes is too long", frame.len());
        self.start = HEADROOM;
        self.end = HEADROOM + frame.len();
        let (start, end) = (self.start, self.end);
        self.room()[start..end].copy_from_slice(frame);
        let protocol = frame.get(12..14).map_or(0, |p| u16::from_ne_bytes([p[0], p[1]]));
        self.set(context::PROTOCOL, u32::from(protocol));
        self.set(context::INGRESS_IFINDEX, ifindex);
        self.set(context::IFINDEX, ifindex);
        self.publish();
        Ok(())
    }

    fn publish(&mut self) {
        let data = self.base as usize + context::SIZE;
        let (start, end) = (self.start, self.end);
        self.set(context::LEN, (end - start) as u32);
        self.set(context::DATA, (data + start) as u32);
        self.set(context::DATA_END, (data + end) as u32);
    }

    fn packet_mut(&mut self, offset: usize, len: usize) -> Option<&mut [u8]> {
        let (start, end) = (self.start, self.end);
        self.room()[start..end].get_mut(offset..offset.checked_add(len)?)
    }

    /// Grows or shrinks between the Ethernet header and the rest.
    fn adjust_room(&mut self, by: i32) -> u64 {
        const ETHERNET: usize = 14;
        let (old, by) = (self.start, by as isize);
        let Some(start) = old.checked_add_signed(-by) else { return -12_i64 as u64 };
        if start + ETHERNET > self.end {
            return -22_i64 as u64;
        }
        self.room().copy_within(old..old + ETHERNET, start);
        self.start = start;
        self.publish();
        0
    }

    fn change_tail(&mut self, len: usize) -> u64 {
        self.end = (self.start + len).min(PACKET_ROOM);
        self.publish();
        0
    }
}

impl Drop for LowMemory {
    fn drop(&mut self) {
        // SAFETY: made by `mmap` with this size and not used again.
        unsafe { libc::munmap(self.base.cast(), LOW_SIZE) };
    }
}

fn bytes<'a>(address: u64, len: usize) -> &'a [u8] {
    // SAFETY: the verifier has proven for every program run here that its helpers get readable memory
    // of this length; addresses come from the program's own registers, which point into our buffers.
    unsafe { std::slice::from_raw_parts(address as *const u8, len) }
}

fn bytes_mut<'a>(address: u64, len: usize) -> &'a mut [u8] {
    // SAFETY: as in `bytes`; the memory is writable and nobody else refers to it during the call.
    unsafe { std::slice::from_raw_parts_mut(address as *mut u8, len) }
}

fn size(code: u8) -> usize {
    match code & 0x18 {
        0x00 => 4,
        0x08 => 2,
        0x10 => 1,
        _ => 8,
    }
}

fn load(registers: &mut [u64; 11], insn: bpf_insn) -> Result<()> {
    let address = registers[usize::from(insn.src_reg())].wrapping_add(insn.off as u64);
    let len = size(insn.code);
    let mut value = [0; 8];
    value[..len].copy_from_slice(bytes(address, len));
    let value = u64::from_ne_bytes(value);
    registers[usize::from(insn.dst_reg())] = match insn.code & 0xe0 {
        0x60 => value,
        0x80 => match len {
            1 => value as i8 as u64,
            2 => value as i16 as u64,
            _ => value as i32 as u64,
        },
        mode => bail!("load mode {mode:#x} is not known"),
    };
    Ok(())
}

fn store(registers: &mut [u64; 11], insn: bpf_insn) -> Result<()> {
    let address = registers[usize::from(insn.dst_reg())].wrapping_add(insn.off as u64);
    let len = size(insn.code);
    let source =
        if insn.code & 0x07 == 0x02 { insn.imm as u64 } else { registers[usize::from(insn.src_reg())] };
    if insn.code & 0xe0 != 0xc0 {
        bytes_mut(address, len).copy_from_slice(&source.to_ne_bytes()[..len]);
        return Ok(());
    }
    let mut old = [0; 8];
    old[..len].copy_from_slice(bytes(address, len));
    let old = u64::from_ne_bytes(old);
    let new = match insn.imm & 0xf0 {
        0x00 => old.wrapping_add(source),
        0x40 => old | source,
        0x50 => old & source,
        0xa0 => old ^ source,
        0xe0 => source,
        0xf0 if old == registers[0] => source,
        0xf0 => old,
        other => bail!("atomic operation {other:#x} is not known"),
    };
    bytes_mut(address, len).copy_from_slice(&new.to_ne_bytes()[..len]);
    if insn.imm & 0xf0 == 0xf0 {
        registers[0] = old;
    } else if insn.imm & 1 == 1 {
        registers[usize::from(insn.src_reg())] = old;
    }
    Ok(())
}

fn arithmetic(registers: &mut [u64; 11], insn: bpf_insn) -> Result<()> {
    let wide = insn.code & 0x07 == 0x07;
    let dst = usize::from(insn.dst_reg());
    let source = if insn.code & 0x08 != 0 { registers[usize::from(insn.src_reg())] } else { insn.imm as u64 };
    let (a, b) = if wide {
        (registers[dst], source)
    } else {
        (u64::from(registers[dst] as u32), u64::from(source as u32))
    };
    let shift = (b & if wide { 63 } else { 31 }) as u32;
    let signed = insn.off == 1;
    let value = match insn.code & 0xf0 {
        0x00 => a.wrapping_add(b),
        0x10 => a.wrapping_sub(b),
        0x20 => a.wrapping_mul(b),
        0x30 if signed => bail!("signed division is not known"),
        0x30 => a.checked_div(b).unwrap_or(0),
        0x40 => a | b,
        0x50 => a & b,
        0x60 => a << shift,
        0x70 => a >> shift,
        0x80 => a.wrapping_neg(),
        0x90 => a.checked_rem(b).unwrap_or(a),
        0xa0 => a ^ b,
        0xb0 => match insn.off {
            8 => b as i8 as u64,
            16 => b as i16 as u64,
            32 => b as i32 as u64,
            _ => b,
        },
        0xc0 if wide => ((a as i64) >> shift) as u64,
        0xc0 => ((a as i32) >> shift) as u64,
        // Byte order: `insn.imm` is the width; to big endian, or swapped unconditionally.
        0xd0 => match (wide || insn.code & 0x08 != 0, insn.imm) {
            (true, 16) => u64::from((registers[dst] as u16).swap_bytes()),
            (true, 32) => u64::from((registers[dst] as u32).swap_bytes()),
            (true, 64) => registers[dst].swap_bytes(),
            (false, 16) => registers[dst] & 0xffff,
            (false, 32) => registers[dst] & 0xffff_ffff,
            (false, _) => registers[dst],
            (true, width) => bail!("byte order of {width} bits is not known"),
        },
        other => bail!("arithmetic {other:#x} is not known"),
    };
    let keeps_width = wide || insn.code & 0xf0 == 0xd0;
    registers[dst] = if keeps_width { value } else { u64::from(value as u32) };
    Ok(())
}

fn jump(registers: &[u64; 11], insn: bpf_insn) -> Result<Option<i64>> {
    if insn.code == 0x05 {
        return Ok(Some(i64::from(insn.off)));
    }
    if insn.code == 0x06 {
        return Ok(Some(i64::from(insn.imm)));
    }
    let wide = insn.code & 0x07 == 0x05;
    let source = if insn.code & 0x08 != 0 { registers[usize::from(insn.src_reg())] } else { insn.imm as u64 };
    let a = registers[usize::from(insn.dst_reg())];
    let (a, b) = if wide { (a, source) } else { (u64::from(a as u32), u64::from(source as u32)) };
    let (sa, sb) = if wide { (a as i64, b as i64) } else { (i64::from(a as i32), i64::from(b as i32)) };
    let taken = match insn.code & 0xf0 {
        0x10 => a == b,
        0x20 => a > b,
        0x30 => a >= b,
        0x40 => a & b != 0,
        0x50 => a != b,
        0x60 => sa > sb,
        0x70 => sa >= sb,
        0xa0 => a < b,
        0xb0 => a <= b,
        0xc0 => sa < sb,
        0xd0 => sa <= sb,
        other => bail!("jump {other:#x} is not known"),
    };
    Ok(taken.then_some(i64::from(insn.off)))
}
