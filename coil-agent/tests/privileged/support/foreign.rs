//! Maps as another version of the software would have pinned them: the same entries, other layouts.

#![expect(clippy::unwrap_used, reason = "tests")]

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use super::builder::Builder;

const MAP_CREATE: libc::c_int = 0;
const MAP_UPDATE: libc::c_int = 2;
const OBJ_PIN: libc::c_int = 6;
const BTF_LOAD: libc::c_int = 18;
const TYPE_HASH: u32 = 1;
/// `BPF_F_NO_PREALLOC`
const NO_PREALLOC: u32 = 1;

/// Name, bytes of an element, elements (0: no array) of each member, without gaps.
pub(crate) type Members<'a> = &'a [(&'a str, u32, u32)];

/// A hash map.
pub(crate) struct ForeignMap(OwnedFd);

pub(super) fn bpf(command: libc::c_int, attribute: &[u64]) -> io::Result<OwnedFd> {
    let length = size_of_val(attribute);
    // SAFETY: the attribute is alive, and what it points to is kept alive by the callers below.
    let fd = unsafe { libc::syscall(libc::SYS_bpf, command, attribute.as_ptr(), length) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made it. Commands that make none return 0, and are not asked for one.
    Ok(unsafe { OwnedFd::from_raw_fd(libc::c_int::try_from(fd).unwrap()) })
}

pub(super) fn act(command: libc::c_int, attribute: &[u64]) -> io::Result<()> {
    // SAFETY: as above.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, attribute.as_ptr(), size_of_val(attribute)) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Two halves of a double word as the kernel reads them.
pub(super) fn pair(low: u32, high: u32) -> u64 {
    u64::from(low) | u64::from(high) << 32
}

fn structure(btf: &mut Builder, name: &str, members: Members<'_>) -> (u32, u32) {
    let mut offset = 0;
    let mut list = Vec::new();
    for &(name, bytes, count) in members {
        let int = btf.int(bytes);
        let id = if count == 0 { int } else { btf.array(int, count) };
        list.push((name, id, offset));
        offset += bytes * count.max(1);
    }
    (btf.structure(name, offset, &list), offset)
}

impl ForeignMap {
    pub(crate) fn create(key: Members<'_>, value: Members<'_>, capacity: u32) -> Self {
        let mut btf = Builder::default();
        let (key_id, key_size) = structure(&mut btf, "Key", key);
        let (value_id, value_size) = structure(&mut btf, "Value", value);
        let bytes = btf.blob();
        let length = u32::try_from(bytes.len()).unwrap();
        let btf = bpf(BTF_LOAD, &[bytes.as_ptr().addr() as u64, 0, pair(length, 0), 0]).unwrap();
        let btf_fd = btf.as_raw_fd().cast_unsigned();
        let map = bpf(
            MAP_CREATE,
            &[
                pair(TYPE_HASH, key_size),
                pair(value_size, capacity),
                pair(NO_PREALLOC, 0),
                // NUMA node and name.
                0,
                0,
                pair(0, 0),
                pair(btf_fd, key_id),
                pair(value_id, 0),
            ],
        );
        Self(map.unwrap())
    }

    pub(crate) fn insert(&self, key: &[u8], value: &[u8]) {
        let map = self.0.as_raw_fd().cast_unsigned();
        let (key, value) = (key.as_ptr().addr() as u64, value.as_ptr().addr() as u64);
        act(MAP_UPDATE, &[pair(map, 0), key, value, 0]).unwrap();
    }

    pub(crate) fn pin(&self, path: &Path) {
        let path = std::ffi::CString::new(path.as_os_str().as_bytes()).unwrap();
        let map = self.0.as_raw_fd().cast_unsigned();
        act(OBJ_PIN, &[path.as_ptr().addr() as u64, pair(map, 0)]).unwrap();
    }
}
