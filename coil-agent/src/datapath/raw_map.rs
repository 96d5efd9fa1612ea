//! Maps as bytes: for copies between maps whose types the compiler does not know.

use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

use bytemuck::{Pod, Zeroable};

use super::abi::{
    ElementAttribute, GET_NEXT_KEY, LOOKUP_ELEM, TYPE_ARRAY, TYPE_HASH, TYPE_LPM_TRIE, TYPE_LRU_HASH,
    TYPE_LRU_PERCPU_HASH, TYPE_PERCPU_ARRAY, TYPE_PERCPU_HASH, UPDATE_ELEM,
};
use super::layout::btf::{Btf, Layout};
use super::sys::{
    Cursor, MapInfo, ObjectKind, address, bpf, info, info_into, lookup_batch_bytes, object_get, owned, raw,
};

const BTF_GET_FD_BY_ID: libc::c_int = 19;

/// `BPF_ANY`, `BPF_NOEXIST`.
const ANY: u64 = 0;
const NOEXIST: u64 = 1;
/// Entries that one call reads.
const BATCH: usize = 4096;

/// `bpf_map_info` as far as its BTF.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct LongMapInfo {
    head: MapInfo,
    name: [u8; 16],
    ifindex: u32,
    vmlinux_value_type: u32,
    netns: [u64; 2],
    btf: u32,
    btf_key_type: u32,
    btf_value_type: u32,
    pad: u32,
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct BtfInfo {
    btf: u64,
    size: u32,
    id: u32,
}

/// Layouts of a map's keys and values.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Layouts {
    pub(crate) key: Layout,
    pub(crate) value: Layout,
}

impl Layouts {
    /// From type information and the ids of both types.
    pub(crate) fn of(btf: &Btf, key: u32, value: u32) -> Option<Self> {
        Some(Self { key: btf.layout(key)?, value: btf.layout(value)? })
    }
}

/// What became of an insertion.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Inserted {
    Done,
    Exists,
    Full,
}

/// An open map.
#[derive(Debug)]
pub(crate) struct RawMap {
    fd: OwnedFd,
    pub(crate) info: MapInfo,
}

impl RawMap {
    /// Opens a pinned map; `None` if there is none.
    pub(crate) fn open(path: &Path) -> io::Result<Option<Self>> {
        match object_get(path) {
            Ok((fd, ObjectKind::Map)) => Ok(Some(Self { info: info(&fd)?, fd })),
            Ok(_) => Err(io::ErrorKind::InvalidData.into()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Layouts as the kernel keeps them; `None` if the map came without type information.
    pub(crate) fn layouts(&self) -> io::Result<Option<Layouts>> {
        let map: LongMapInfo = info(&self.fd)?;
        if map.btf == 0 {
            return Ok(None);
        }
        let mut by_id = [map.btf, 0, 0];
        let btf = owned(bpf(BTF_GET_FD_BY_ID, &mut by_id)?)?;
        let empty: BtfInfo = info(&btf)?;
        let mut bytes = vec![0; size(empty.size)?];
        let mut request = BtfInfo { btf: address(bytes.as_mut_ptr()), size: empty.size, id: 0 };
        info_into(&btf, &mut request)?;
        let parsed = Btf::parse(&bytes);
        Ok(parsed.and_then(|btf| Layouts::of(&btf, map.btf_key_type, map.btf_value_type)))
    }

    /// Entries can be listed and put.
    pub(crate) fn is_table(&self) -> bool {
        self.is_keyed() || self.is_array()
    }

    fn is_keyed(&self) -> bool {
        matches!(
            self.info.map_type,
            TYPE_HASH | TYPE_PERCPU_HASH | TYPE_LRU_HASH | TYPE_LRU_PERCPU_HASH | TYPE_LPM_TRIE
        )
    }

    /// Every key exists.
    pub(crate) fn is_array(&self) -> bool {
        matches!(self.info.map_type, TYPE_ARRAY | TYPE_PERCPU_ARRAY)
    }

    /// Values of one entry that a look-up returns: one, or one for each processor.
    pub(crate) fn values(&self) -> io::Result<usize> {
        match self.info.map_type {
            TYPE_PERCPU_HASH | TYPE_PERCPU_ARRAY | TYPE_LRU_PERCPU_HASH => {
                aya::util::nr_cpus().map_err(|(_, error)| error)
            }
            _ => Ok(1),
        }
    }

    /// Bytes from one value of an entry to the next.
    pub(crate) fn stride(&self) -> io::Result<usize> {
        let size = size(self.info.value_size)?;
        Ok(if self.values()? == 1 { size } else { size.next_multiple_of(8) })
    }

    /// Calls back with each key and value. What comes or goes meanwhile may be missed.
    pub(crate) fn each(&self, mut found: impl FnMut(&[u8], &[u8]) -> io::Result<()>) -> io::Result<()> {
        let key_size = size(self.info.key_size)?;
        let value_size = self.stride()? * self.values()?;
        if self.info.map_type == TYPE_HASH {
            return self.each_batch(key_size, value_size, &mut found);
        }
        let (mut key, mut next, mut value) = (None, vec![0; key_size], vec![0; value_size]);
        while self.next_key(key.as_deref(), &mut next)? {
            if self.get(&next, &mut value)? {
                found(&next, &value)?;
            }
            key = Some(next.clone());
        }
        Ok(())
    }

    fn each_batch(
        &self,
        key_size: usize,
        value_size: usize,
        found: &mut impl FnMut(&[u8], &[u8]) -> io::Result<()>,
    ) -> io::Result<()> {
        let (mut cursor, mut keys, mut values) = (Cursor::default(), Vec::new(), Vec::new());
        loop {
            let sizes = (key_size, value_size);
            let read = lookup_batch_bytes(&self.fd, &mut cursor, BATCH, sizes, &mut keys, &mut values)?;
            for (key, value) in keys.chunks(key_size).zip(values.chunks(value_size)).take(read) {
                found(key, value)?;
            }
            if cursor.is_start() {
                return Ok(());
            }
        }
    }

    fn next_key(&self, key: Option<&[u8]>, next: &mut [u8]) -> io::Result<bool> {
        let mut attribute = ElementAttribute {
            map: raw(&self.fd),
            pad: 0,
            key: key.map_or(0, |key| address(key.as_ptr())),
            value: address(next.as_mut_ptr()),
            flags: 0,
        };
        absent(bpf(GET_NEXT_KEY, &mut attribute))
    }

    /// Reads a value of the right length; false if there is none.
    pub(crate) fn get(&self, key: &[u8], value: &mut [u8]) -> io::Result<bool> {
        let mut attribute = ElementAttribute {
            map: raw(&self.fd),
            pad: 0,
            key: address(key.as_ptr()),
            value: address(value.as_mut_ptr()),
            flags: 0,
        };
        absent(bpf(LOOKUP_ELEM, &mut attribute))
    }

    /// Puts an entry unless there is one.
    pub(crate) fn insert(&self, key: &[u8], value: &[u8]) -> io::Result<Inserted> {
        // An array has them all, a trie takes no such flag.
        let flags = if self.is_array() || self.info.map_type == TYPE_LPM_TRIE { ANY } else { NOEXIST };
        match self.update(key, value, flags) {
            Ok(()) => Ok(Inserted::Done),
            Err(error) => match error.raw_os_error() {
                Some(libc::EEXIST) => Ok(Inserted::Exists),
                Some(libc::E2BIG | libc::ENOSPC) => Ok(Inserted::Full),
                _ => Err(error),
            },
        }
    }

    /// Puts an entry, whatever there is.
    pub(crate) fn put(&self, key: &[u8], value: &[u8]) -> io::Result<()> {
        self.update(key, value, ANY)
    }

    fn update(&self, key: &[u8], value: &[u8], flags: u64) -> io::Result<()> {
        let mut attribute = ElementAttribute {
            map: raw(&self.fd),
            pad: 0,
            key: address(key.as_ptr()),
            value: address(value.as_ptr()),
            flags,
        };
        bpf(UPDATE_ELEM, &mut attribute).map(drop)
    }
}

fn absent(result: io::Result<libc::c_long>) -> io::Result<bool> {
    match result {
        Ok(_) => Ok(true),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(false),
        Err(error) => Err(error),
    }
}

fn size(bytes: u32) -> io::Result<usize> {
    usize::try_from(bytes).map_err(|_| io::ErrorKind::InvalidData.into())
}
