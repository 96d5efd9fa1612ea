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
const LOOKUP_BATCH: libc::c_int = 24;
/// `ENOTSUPP` of the kernel, which is none of the C library's.
const NOT_SUPPORTED: libc::c_int = 524;

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

/// `union bpf_attr` for operations on many elements.
#[repr(C)]
#[derive(Default)]
struct Batch {
    from: u64,
    to: u64,
    keys: u64,
    values: u64,
    count: u32,
    map: u32,
    element_flags: u64,
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

    /// All entries, in as few calls as the kernel allows: walks through maps are most of what tests do.
    pub(crate) fn entries(&self) -> Vec<(Vec<u8>, Vec<u8>)> {
        self.batch().unwrap_or_else(|| {
            self.keys().into_iter().filter_map(|key| self.get(&key).map(|value| (key, value))).collect()
        })
    }

    /// All entries, many at a time; nothing where the kernel has no such call for this kind of map.
    fn batch(&self) -> Option<Vec<(Vec<u8>, Vec<u8>)>> {
        // More than a bucket of a hash table holds, of which all must fit.
        let most = self.info.max_entries().min(128);
        let (key, value) = (self.info.key_size() as usize, self.value_size());
        let mut keys = vec![0u8; most as usize * key];
        let mut values = vec![0u8; most as usize * value];
        let mut position: Option<u32> = None;
        let mut entries = Vec::new();
        loop {
            let mut next = 0u32;
            let mut batch = Batch {
                from: position.as_ref().map_or(0, |position| std::ptr::from_ref(position).addr() as u64),
                to: std::ptr::from_mut(&mut next).addr() as u64,
                keys: keys.as_mut_ptr().addr() as u64,
                values: values.as_mut_ptr().addr() as u64,
                count: most,
                map: self.map.fd().as_fd().as_raw_fd().cast_unsigned(),
                ..Batch::default()
            };
            // SAFETY: there is room for `most` keys and values, and positions in hash tables and arrays take four
            // bytes.
            let result = unsafe {
                let batch = std::ptr::from_mut(&mut batch);
                libc::syscall(libc::SYS_bpf, LOOKUP_BATCH, batch, size_of::<Batch>())
            };
            let error = io::Error::last_os_error().raw_os_error().filter(|_| result < 0);
            if matches!(error, Some(libc::EINVAL | NOT_SUPPORTED | libc::EOPNOTSUPP)) {
                return None;
            }
            let found = keys.chunks_exact(key).zip(values.chunks_exact(value)).take(batch.count as usize);
            entries.extend(found.map(|(key, value)| (key.to_vec(), value.to_vec())));
            match error {
                None => position = Some(next),
                Some(libc::ENOENT) => return Some(entries),
                Some(error) => unreachable!("{}", io::Error::from_raw_os_error(error)),
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
