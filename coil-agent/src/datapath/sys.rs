//! The `bpf` system call where `aya` has no public function for it: links by interface index, what
//! a pin is, batched look-ups, test runs.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::atomic::AtomicI64;

use bytemuck::{Pod, Zeroable};

use super::abi::{BatchAttribute, LOOKUP_BATCH};

const PROG_LOAD: libc::c_int = 5;
const OBJ_PIN: libc::c_int = 6;
const OBJ_GET: libc::c_int = 7;
const PROG_TEST_RUN: libc::c_int = 10;
const OBJ_GET_INFO_BY_FD: libc::c_int = 15;
const LINK_CREATE: libc::c_int = 28;
const LINK_UPDATE: libc::c_int = 29;

/// `BPF_TCX_INGRESS`.
pub(crate) const TCX_INGRESS: u32 = 46;
/// `BPF_TCX_EGRESS`.
pub(crate) const TCX_EGRESS: u32 = 47;

/// Calls `bpf`; the kernel takes every field that is beyond the attribute as zero.
pub(super) fn bpf<T: Pod>(command: libc::c_int, attribute: &mut T) -> io::Result<libc::c_long> {
    // SAFETY: `attribute` is plain data, alive and writable during the call, and its size is passed.
    // Addresses in it come from the safe wrappers below, which keep what they point to alive.
    let result =
        unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attribute), size_of::<T>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// Takes over the descriptor that a system call has returned.
pub(super) fn owned(fd: libc::c_long) -> io::Result<OwnedFd> {
    let fd = libc::c_int::try_from(fd).map_err(|_| io::ErrorKind::InvalidData)?;
    // SAFETY: the kernel has just returned this descriptor to us and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

pub(super) fn raw(fd: impl AsFd) -> u32 {
    fd.as_fd().as_raw_fd().cast_unsigned()
}

pub(super) fn address<T>(pointer: *const T) -> u64 {
    pointer.addr() as u64
}

pub(super) fn c_path(path: &Path) -> io::Result<CString> {
    CString::new(path.as_os_str().as_bytes()).map_err(|_| io::ErrorKind::InvalidInput.into())
}

/// What a pin holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ObjectKind {
    Map,
    Program,
    Link,
    Other,
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct ObjectAttribute {
    path: u64,
    fd: u32,
    flags: u32,
}

/// `BPF_F_RDONLY`
const READ_ONLY: u32 = 1 << 3;

/// Opens a pinned map so that it can only be read; needs no more than the right to read the pin.
pub(crate) fn object_get_read_only(path: &Path) -> io::Result<OwnedFd> {
    let c_path = c_path(path)?;
    let mut attribute = ObjectAttribute { path: address(c_path.as_ptr()), fd: 0, flags: READ_ONLY };
    owned(bpf(OBJ_GET, &mut attribute)?)
}

/// Opens a pin and says what it is.
pub(crate) fn object_get(path: &Path) -> io::Result<(OwnedFd, ObjectKind)> {
    let c_path = c_path(path)?;
    let mut attribute = ObjectAttribute { path: address(c_path.as_ptr()), fd: 0, flags: 0 };
    let fd = owned(bpf(OBJ_GET, &mut attribute)?)?;
    let target = std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()))?;
    let kind = match target.to_string_lossy().replace(['[', ']'], "").as_str() {
        "anon_inode:bpf-map" => ObjectKind::Map,
        "anon_inode:bpf-prog" => ObjectKind::Program,
        "anon_inode:bpf_link" | "anon_inode:bpf-link" => ObjectKind::Link,
        _ => ObjectKind::Other,
    };
    Ok((fd, kind))
}

/// Pins an object; the path must be free.
pub(crate) fn object_pin(fd: impl AsFd, path: &Path) -> io::Result<()> {
    let c_path = c_path(path)?;
    let mut attribute = ObjectAttribute { path: address(c_path.as_ptr()), fd: raw(fd), flags: 0 };
    bpf(OBJ_PIN, &mut attribute).map(drop)
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct InfoAttribute {
    fd: u32,
    length: u32,
    info: u64,
}

/// Describes an object of the kernel.
pub(super) fn info<T: Pod>(fd: impl AsFd) -> io::Result<T> {
    let mut info = T::zeroed();
    info_into(fd, &mut info)?;
    Ok(info)
}

/// The same, where the kernel first reads from `info` what it shall write to.
pub(super) fn info_into<T: Pod>(fd: impl AsFd, info: &mut T) -> io::Result<()> {
    let mut attribute = InfoAttribute {
        fd: raw(fd),
        length: u32::try_from(size_of::<T>()).map_err(|_| io::ErrorKind::InvalidInput)?,
        info: address(std::ptr::from_mut(info)),
    };
    bpf(OBJ_GET_INFO_BY_FD, &mut attribute).map(drop)
}

/// The kernel's description of a map: the head of `bpf_map_info`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub(crate) struct MapInfo {
    pub(crate) map_type: u32,
    pub(crate) id: u32,
    pub(crate) key_size: u32,
    pub(crate) value_size: u32,
    pub(crate) max_entries: u32,
    pub(crate) flags: u32,
}

/// The kernel's description of a tcx link: the head of `bpf_link_info`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub(crate) struct LinkInfo {
    pub(crate) link_type: u32,
    pub(crate) id: u32,
    pub(crate) program_id: u32,
    pad: u32,
    /// 0 once the interface is gone.
    pub(crate) ifindex: u32,
    pub(crate) attach_type: u32,
}

/// The beginning of `struct bpf_prog_info` (include/uapi/linux/bpf.h); the kernel fills in as much as is asked.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct ProgramInfo {
    kind: u32,
    id: u32,
}

/// The id of a program.
pub(crate) fn program_id(fd: impl AsFd) -> io::Result<u32> {
    Ok(info::<ProgramInfo>(fd)?.id)
}

/// Describes a link.
pub(crate) fn link_info(fd: impl AsFd) -> io::Result<LinkInfo> {
    info(fd)
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct LinkCreateAttribute {
    program: u32,
    ifindex: u32,
    attach_type: u32,
    flags: u32,
}

/// Attaches a program to an interface of the current network name space, after those already there.
pub(crate) fn tcx_attach(program: impl AsFd, ifindex: u32, attach_type: u32) -> io::Result<OwnedFd> {
    let mut attribute = LinkCreateAttribute { program: raw(program), ifindex, attach_type, flags: 0 };
    owned(bpf(LINK_CREATE, &mut attribute)?)
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct LinkUpdateAttribute {
    link: u32,
    program: u32,
    flags: u32,
    old: u32,
}

/// Replaces the program of a link; no packet sees neither.
pub(crate) fn link_update(link: impl AsFd, program: impl AsFd) -> io::Result<()> {
    let mut attribute = LinkUpdateAttribute { link: raw(link), program: raw(program), flags: 0, old: 0 };
    bpf(LINK_UPDATE, &mut attribute).map(drop)
}

/// Whether the kernel has tcx links (6.6).
pub(crate) fn has_tcx(program: impl AsFd) -> bool {
    // No interface has this index: a kernel with tcx says so, an older one rejects the type.
    let absent = libc::c_int::MAX.cast_unsigned();
    tcx_attach(program, absent, TCX_INGRESS).is_err_and(|error| error.raw_os_error() == Some(libc::ENODEV))
}

/// An instruction of a program.
#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
pub(crate) struct Instruction {
    code: u8,
    registers: u8,
    offset: i16,
    immediate: i32,
}

impl Instruction {
    pub(crate) fn new(code: u8, destination: u8, source: u8, offset: i16, immediate: i32) -> Self {
        Self { code, registers: source << 4 | destination, offset, immediate }
    }
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct LoadAttribute {
    program_type: u32,
    count: u32,
    instructions: u64,
    license: u64,
}

/// Whether the kernel takes a program for traffic control.
pub(crate) fn program_loads(instructions: &[Instruction]) -> io::Result<bool> {
    const SCHED_CLS: u32 = 3;
    let mut attribute = LoadAttribute {
        program_type: SCHED_CLS,
        count: u32::try_from(instructions.len()).map_err(|_| io::ErrorKind::InvalidInput)?,
        instructions: address(instructions.as_ptr()),
        license: address(c"GPL".as_ptr()),
    };
    match bpf(PROG_LOAD, &mut attribute) {
        Ok(program) => owned(program).map(|_| true),
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Where a walk through a hash map stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Cursor(Option<u32>);

impl Cursor {
    /// At the first entry.
    pub(crate) fn is_start(self) -> bool {
        self.0.is_none()
    }
}

/// Reads about `count` entries of a hash map from `cursor` on, and moves it; at the end of the map it
/// returns to the start. Entries that stay in the map all the while are seen.
pub(crate) fn lookup_batch<K: Pod, V: Pod>(
    map: impl AsFd,
    cursor: &mut Cursor,
    count: usize,
) -> io::Result<Vec<(K, V)>> {
    let (mut keys, mut values) = (Vec::new(), Vec::new());
    let sizes = (size_of::<K>(), size_of::<V>());
    let read = lookup_batch_bytes(map, cursor, count, sizes, &mut keys, &mut values)?;
    let keys = keys.chunks_exact(sizes.0).map(bytemuck::pod_read_unaligned);
    let values = values.chunks_exact(sizes.1).map(bytemuck::pod_read_unaligned);
    Ok(keys.zip(values).take(read).collect())
}

/// The same for a map of which only the sizes of keys and values are known; how many were read.
pub(super) fn lookup_batch_bytes(
    map: impl AsFd,
    cursor: &mut Cursor,
    count: usize,
    (key_size, value_size): (usize, usize),
    keys: &mut Vec<u8>,
    values: &mut Vec<u8>,
) -> io::Result<usize> {
    let map = map.as_fd();
    let mut count = count.max(64);
    loop {
        keys.resize(count * key_size, 0);
        values.resize(count * value_size, 0);
        let from = cursor.0;
        let mut to = 0u32;
        let mut attribute = BatchAttribute {
            from: from.as_ref().map_or(0, |from| address(std::ptr::from_ref(from))),
            to: address(std::ptr::from_mut(&mut to)),
            keys: address(keys.as_mut_ptr()),
            values: address(values.as_mut_ptr()),
            count: u32::try_from(count).map_err(|_| io::ErrorKind::InvalidInput)?,
            map: raw(map),
            element_flags: 0,
            flags: 0,
        };
        match bpf(LOOKUP_BATCH, &mut attribute) {
            Ok(_) => cursor.0 = Some(to),
            Err(error) => match error.raw_os_error() {
                Some(libc::ENOENT) => *cursor = Cursor::default(),
                // A single bucket holds more than there is room for.
                Some(libc::ENOSPC) if count < 1 << 20 => {
                    count *= 2;
                    continue;
                }
                _ => return Err(error),
            },
        }
        return Ok(usize::try_from(attribute.count).unwrap_or(0).min(count));
    }
}

/// An array of double words that the kernel's programs and we have in common.
#[derive(Debug)]
pub(crate) struct SharedMemory {
    start: std::ptr::NonNull<AtomicI64>,
    words: usize,
}

// SAFETY: the memory stays mapped as long as this value lives, and is only reached through atomics.
unsafe impl Send for SharedMemory {}
// SAFETY: as above.
unsafe impl Sync for SharedMemory {}

impl SharedMemory {
    /// Maps an array map with values of eight bytes and the flag `BPF_F_MMAPABLE`.
    pub(crate) fn new(map: impl AsFd, words: usize) -> io::Result<Self> {
        // SAFETY: asks for new memory, nothing that exists is touched.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                words * size_of::<AtomicI64>(),
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                map.as_fd().as_raw_fd(),
                0,
            )
        };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let start = std::ptr::NonNull::new(start.cast()).ok_or(io::ErrorKind::InvalidData)?;
        Ok(Self { start, words })
    }

    /// The double words.
    pub(crate) fn words(&self) -> &[AtomicI64] {
        // SAFETY: so many words are mapped and aligned to a page, and everybody changes them atomically.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.words) }
    }
}

impl Drop for SharedMemory {
    fn drop(&mut self) {
        // SAFETY: what `new` has mapped, and nobody has a reference any more.
        if unsafe { libc::munmap(self.start.as_ptr().cast(), self.words * size_of::<AtomicI64>()) } != 0 {
            tracing::debug!("cannot unmap an array");
        }
    }
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct TestRunAttribute {
    program: u32,
    result: u32,
    data_size_in: u32,
    data_size_out: u32,
    data_in: u64,
    data_out: u64,
    repeat: u32,
    duration: u32,
    context_size_in: u32,
    context_size_out: u32,
    context_in: u64,
    context_out: u64,
    flags: u32,
    cpu: u32,
    batch_size: u32,
    pad: u32,
}

/// `__sk_buff`, as a test run takes it.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Pod, Zeroable)]
pub struct SkBuff {
    /// Length; set by the kernel.
    pub len: u32,
    /// Packet type; set by the kernel.
    pub pkt_type: u32,
    /// Mark.
    pub mark: u32,
    /// Queue; set by the kernel.
    pub queue_mapping: u32,
    /// Ethernet protocol; set by the kernel.
    pub protocol: u32,
    /// VLAN fields; must be zero.
    pub vlan: [u32; 3],
    /// Priority.
    pub priority: u32,
    /// Interface that the packet came in by.
    pub ingress_ifindex: u32,
    /// Interface; must exist in the current network name space, 0 for the loopback interface.
    pub ifindex: u32,
    /// Traffic control index; must be zero.
    pub tc_index: u32,
    /// Scratch.
    pub cb: [u32; 5],
    /// Fields that a test does not use: must be zero.
    pub unused: [u32; 21],
    /// Time stamp.
    pub tstamp: [u32; 2],
    /// On the wire; set by the kernel if zero.
    pub wire_len: u32,
    /// Segments of a GSO packet.
    pub gso_segs: u32,
    /// Socket; must be zero.
    pub sk: [u32; 2],
    /// Payload of each segment of a GSO packet.
    pub gso_size: u32,
    /// Must be zero.
    pub tail: [u32; 3],
}

const _: () = assert!(size_of::<SkBuff>() == 192);

/// What a test run gave.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TestRun {
    /// The program's return value.
    pub action: u32,
    /// The packet afterwards.
    pub packet: Vec<u8>,
    /// Mean duration of a run in nanoseconds.
    pub nanoseconds: u32,
}

/// Runs a program on a packet, `repeat` times (a program that changes the packet sees its own change).
pub fn test_run(program: impl AsFd, packet: &[u8], context: SkBuff, repeat: u32) -> io::Result<TestRun> {
    let size = |size: usize| u32::try_from(size).map_err(|_| io::ErrorKind::InvalidInput);
    let mut output = vec![0u8; packet.len() + 4096];
    let mut context_out = SkBuff::default();
    let mut attribute = TestRunAttribute::zeroed();
    attribute.program = raw(program);
    attribute.data_size_in = size(packet.len())?;
    attribute.data_size_out = size(output.len())?;
    attribute.data_in = address(packet.as_ptr());
    attribute.data_out = address(output.as_mut_ptr());
    attribute.repeat = repeat;
    attribute.context_size_in = size(size_of::<SkBuff>())?;
    attribute.context_size_out = attribute.context_size_in;
    attribute.context_in = address(std::ptr::from_ref(&context));
    attribute.context_out = address(std::ptr::from_mut(&mut context_out));
    bpf(PROG_TEST_RUN, &mut attribute)?;
    output.truncate(usize::try_from(attribute.data_size_out).unwrap_or(0));
    Ok(TestRun { action: attribute.result, packet: output, nanoseconds: attribute.duration })
}
