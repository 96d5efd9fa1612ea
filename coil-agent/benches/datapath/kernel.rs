//! The same programs in the kernel: loaded without pins, run by `BPF_PROG_TEST_RUN`.

use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};

use anyhow::{Context, Result};
use aya::programs::{ProgramFd, SchedClassifier};
use aya::{Ebpf, EbpfLoader, VerifierLogLevel};
use coil_common::names;

use crate::scene::Entry;

const BPF_MAP_CREATE: libc::c_int = 0;
const BPF_MAP_UPDATE_ELEM: libc::c_int = 2;
const BPF_MAP_DELETE_ELEM: libc::c_int = 3;
const BPF_PROG_LOAD: libc::c_int = 5;
const BPF_PROG_TEST_RUN: libc::c_int = 10;

/// `union bpf_attr` for `BPF_MAP_CREATE`, as far as needed.
#[repr(C)]
#[derive(Default)]
struct CreateAttr {
    map_type: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
    map_flags: u32,
    rest: [u32; 3],
}

/// `union bpf_attr` for map elements (include/uapi/linux/bpf.h).
#[repr(C)]
#[derive(Default)]
struct ElementAttr {
    map_fd: u32,
    pad: u32,
    key: u64,
    value: u64,
    flags: u64,
}

/// `union bpf_attr` for `BPF_PROG_LOAD`, as far as needed.
#[repr(C)]
#[derive(Default)]
struct LoadAttr {
    prog_type: u32,
    insn_cnt: u32,
    insns: u64,
    license: u64,
    rest: [u64; 4],
}

/// `union bpf_attr` for `BPF_PROG_TEST_RUN`.
#[repr(C)]
#[derive(Default)]
struct TestAttr {
    prog_fd: u32,
    retval: u32,
    data_size_in: u32,
    data_size_out: u32,
    data_in: u64,
    data_out: u64,
    repeat: u32,
    duration: u32,
    ctx_size_in: u32,
    ctx_size_out: u32,
    ctx_in: u64,
    ctx_out: u64,
    flags: u32,
    cpu: u32,
    batch_size: u32,
    pad: u32,
}

/// `bpf(2)` with an attribute of ours.
fn bpf<T>(command: libc::c_int, attr: &mut T) -> io::Result<libc::c_long> {
    // SAFETY: `T` is one of the attributes above, laid out as the kernel reads it; the memory that its
    // addresses name outlives the call.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attr), size_of::<T>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// Room for tracked flows.
const ROOM: u32 = 1_100_000;

/// The object in the kernel.
pub struct Kernel {
    ebpf: Ebpf,
    baseline: OwnedFd,
}

impl Kernel {
    /// Loads all programs.
    pub fn new(object: &[u8], config: &coil_common::config::Config) -> Result<Self> {
        let mut ebpf = EbpfLoader::new()
            .verifier_log_level(VerifierLogLevel::default())
            .override_global(coil_common::config::CONFIG, config, true)
            .map_max_entries(names::MAP_FLOWS_V4, ROOM)
            .map_max_entries(names::MAP_NAT_FORWARD_V4, ROOM)
            .map_max_entries(names::MAP_NAT_REVERSE_V4, ROOM)
            .load(object)
            .context("loading the object (this needs root)")?;
        for (name, program) in ebpf.programs_mut() {
            let name = name.to_owned();
            let program: &mut SchedClassifier = program.try_into()?;
            program.load().with_context(|| format!("the verifier refused {name}"))?;
        }
        Ok(Self { ebpf, baseline: baseline()? })
    }

    /// Puts an entry into its map.
    pub fn insert(&mut self, entry: &Entry) -> Result<()> {
        update(self.map_fd(entry.map)?, &entry.key, &entry.value)
            .with_context(|| format!("writing to {}", entry.map))
    }

    /// Removes a key, which need not be there.
    pub fn remove(&mut self, map: &str, key: &[u8]) -> Result<()> {
        let mut attr = ElementAttr {
            map_fd: u32::try_from(self.map_fd(map)?)?,
            key: key.as_ptr() as u64,
            ..ElementAttr::default()
        };
        match bpf(BPF_MAP_DELETE_ELEM, &mut attr) {
            Err(error) if error.raw_os_error() != Some(libc::ENOENT) => {
                Err(error).with_context(|| format!("removing from {map}"))
            }
            _ => Ok(()),
        }
    }

    fn map_fd(&self, name: &str) -> Result<RawFd> {
        use aya::maps::Map;
        let map = self.ebpf.map(name).with_context(|| format!("no map {name}"))?;
        let data = match map {
            Map::Array(data) | Map::HashMap(data) | Map::LpmTrie(data) | Map::PerCpuArray(data) => data,
            _ => anyhow::bail!("map {name} is of a type that is not expected"),
        };
        Ok(data.fd().as_fd().as_raw_fd())
    }

    /// Bytes that a map takes, as the kernel says (exact since 6.4).
    pub fn memory(&self, map: &str) -> Result<u64> {
        let path = format!("/proc/self/fdinfo/{}", self.map_fd(map)?);
        let text = std::fs::read_to_string(&path).with_context(|| format!("reading {path}"))?;
        let line = text.lines().find_map(|line| line.strip_prefix("memlock:")).context("no memlock")?;
        line.trim().parse().context("reading memlock")
    }

    /// Runs a program once over a frame: nanoseconds, and what it returned.
    pub fn run(&self, program: &str, frame: &[u8]) -> Result<(u32, i32)> {
        let program: &SchedClassifier =
            self.ebpf.program(program).with_context(|| format!("no program {program}"))?.try_into()?;
        let fd: &ProgramFd = program.fd()?;
        test_run(fd.as_fd().as_raw_fd(), frame)
    }

    /// What the measurement itself costs: a program that does nothing.
    pub fn run_nothing(&self, frame: &[u8]) -> Result<u32> {
        Ok(test_run(self.baseline.as_raw_fd(), frame)?.0)
    }
}

/// Runs a program once over a frame: nanoseconds, and what it returned.
pub fn test_run(fd: RawFd, frame: &[u8]) -> Result<(u32, i32)> {
    let mut out = [0_u8; 4096];
    let mut attr = TestAttr {
        prog_fd: u32::try_from(fd)?,
        data_in: frame.as_ptr() as u64,
        data_size_in: u32::try_from(frame.len())?,
        data_out: out.as_mut_ptr() as u64,
        data_size_out: u32::try_from(out.len())?,
        repeat: 1,
        ..TestAttr::default()
    };
    bpf(BPF_PROG_TEST_RUN, &mut attr).context("BPF_PROG_TEST_RUN")?;
    Ok((attr.duration, attr.retval as i32))
}

/// `r0 = -1; exit`.
fn baseline() -> Result<OwnedFd> {
    let code: [[u8; 8]; 2] = [[0xb7, 0, 0, 0, 0xff, 0xff, 0xff, 0xff], [0x95, 0, 0, 0, 0, 0, 0, 0]];
    load(&code).context("loading the empty program")
}

/// Loads a classifier.
pub fn load(code: &[[u8; 8]]) -> Result<OwnedFd> {
    const SCHED_CLS: u32 = 3;
    let mut attr = LoadAttr {
        prog_type: SCHED_CLS,
        insn_cnt: u32::try_from(code.len())?,
        insns: code.as_ptr() as u64,
        license: c"GPL".as_ptr() as u64,
        ..LoadAttr::default()
    };
    descriptor(bpf(BPF_PROG_LOAD, &mut attr).context("BPF_PROG_LOAD")?)
}

/// Creates a map with room for some entries.
pub fn create_map(map_type: u32, key_size: u32, value_size: u32, map_flags: u32) -> Result<OwnedFd> {
    let mut attr =
        CreateAttr { map_type, key_size, value_size, max_entries: 64, map_flags, ..CreateAttr::default() };
    descriptor(bpf(BPF_MAP_CREATE, &mut attr).context("BPF_MAP_CREATE")?)
}

/// Puts an entry into a map.
pub fn update(map: RawFd, key: &[u8], value: &[u8]) -> Result<()> {
    let mut attr = ElementAttr {
        map_fd: u32::try_from(map)?,
        key: key.as_ptr() as u64,
        value: value.as_ptr() as u64,
        ..ElementAttr::default()
    };
    bpf(BPF_MAP_UPDATE_ELEM, &mut attr).context("BPF_MAP_UPDATE_ELEM")?;
    Ok(())
}

fn descriptor(fd: libc::c_long) -> Result<OwnedFd> {
    // SAFETY: the kernel has just given us this descriptor and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(RawFd::try_from(fd)?) })
}
