//! Maps as bytes, for tables of entries of any type.

#![expect(clippy::unwrap_used, reason = "tests")]

use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::path::Path;

use aya::maps::{MapData, MapInfo, MapType};

const LOOKUP: libc::c_int = 1;
const UPDATE: libc::c_int = 2;
const DELETE: libc::c_int = 3;
const NEXT_KEY: libc::c_int = 4;

/// `union bpf_attr` for operations on elements.
#[repr(C)]
#[derive(Default)]
struct Element {
    map: u32,
    pad: u32,
    key: u64,
    value: u64,
    flags: u64,
}

/// A pinned map.
pub(crate) struct RawMap {
    map: MapData,
    info: MapInfo,
}

impl RawMap {
    pub(crate) fn open(folder: &Path, name: &str) -> Self {
        let map = MapData::from_pin(folder.join(name)).unwrap();
        let info = map.info().unwrap();
        Self { map, info }
    }

    fn call(&self, command: libc::c_int, key: Option<&[u8]>, value: *mut u8) -> io::Result<()> {
        if let Some(key) = key {
            assert_eq!(key.len(), self.info.key_size() as usize);
        }
        let attribute = Element {
            map: self.map.fd().as_fd().as_raw_fd().cast_unsigned(),
            key: key.map_or(0, |key| key.as_ptr().addr() as u64),
            value: value.addr() as u64,
            ..Element::default()
        };
        // SAFETY: the key is as long as the map's keys are, and so is, by its caller, the value.
        let result = unsafe {
            let attribute = std::ptr::from_ref(&attribute);
            libc::syscall(libc::SYS_bpf, command, attribute, size_of::<Element>())
        };
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    /// Bytes of a value, all processors' if there is one for each.
    fn value_size(&self) -> usize {
        let size = self.info.value_size() as usize;
        match self.info.map_type().unwrap() {
            MapType::PerCpuArray | MapType::PerCpuHash => {
                size.next_multiple_of(8) * aya::util::nr_cpus().unwrap()
            }
            _ => size,
        }
    }

    /// Whether entries can only be overwritten.
    fn is_array(&self) -> bool {
        matches!(self.info.map_type().unwrap(), MapType::PerCpuArray | MapType::Array)
    }

    pub(crate) fn get(&self, key: &[u8]) -> Option<Vec<u8>> {
        let mut value = vec![0; self.value_size()];
        match self.call(LOOKUP, Some(key), value.as_mut_ptr()) {
            Ok(()) => Some(value),
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => None,
            Err(error) => unreachable!("{error}"),
        }
    }

    pub(crate) fn set(&self, key: &[u8], value: &[u8]) {
        assert_eq!(value.len(), self.value_size());
        let mut value = value.to_vec();
        self.call(UPDATE, Some(key), value.as_mut_ptr()).unwrap();
    }

    pub(crate) fn keys(&self) -> Vec<Vec<u8>> {
        let mut keys: Vec<Vec<u8>> = Vec::new();
        loop {
            let mut next = vec![0; self.info.key_size() as usize];
            let last = keys.last().map(Vec::as_slice);
            match self.call(NEXT_KEY, last, next.as_mut_ptr()) {
                Ok(()) => keys.push(next),
                Err(error) if error.raw_os_error() == Some(libc::ENOENT) => return keys,
                Err(error) => unreachable!("{error}"),
            }
        }
    }

    /// Removes an entry, or zeroes it where there is no removing.
    pub(crate) fn clear(&self, key: &[u8]) {
        if self.is_array() {
            self.set(key, &vec![0; self.value_size()]);
        } else {
            self.call(DELETE, Some(key), std::ptr::null_mut()).unwrap();
        }
    }
}
