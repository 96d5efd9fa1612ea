//! Pinned maps that are only read, as bytes: for tools, which must cope with maps of other builds and with
//! entries that come and go while they read.

use std::collections::BTreeSet;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;

use bytemuck::{AnyBitPattern, NoUninit};
use coil_common::values::Counter;

use super::abi::{
    BatchAttribute, ElementAttribute, GET_NEXT_KEY, LOOKUP_BATCH, LOOKUP_ELEM, TYPE_ARRAY, TYPE_HASH,
    TYPE_LPM_TRIE, TYPE_LRU_HASH, TYPE_LRU_PERCPU_HASH, TYPE_PERCPU_ARRAY, TYPE_PERCPU_HASH,
};
use super::sys::{self, MapInfo};

/// Entries asked for at a time.
const BATCH: usize = 4096;
/// `ENOTSUPP`, which the kernel has for itself.
const NOT_SUPPORTED: i32 = 524;

/// A pinned map that is only read.
#[derive(Debug)]
pub(crate) struct ReadMap {
    fd: OwnedFd,
    info: MapInfo,
}

fn size(size: u32) -> usize {
    usize::try_from(size).unwrap_or(usize::MAX)
}

impl ReadMap {
    /// Opens a pin.
    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        let fd = sys::object_get_read_only(path)?;
        let info = sys::info(&fd)?;
        Ok(Self { fd, info })
    }

    /// The kernel's description.
    pub(crate) fn info(&self) -> &MapInfo {
        &self.info
    }

    /// Memory that the kernel counts for it, in bytes.
    pub(crate) fn memory(&self) -> Option<u64> {
        let text = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", self.fd.as_raw_fd())).ok()?;
        let line = text.lines().find_map(|line| line.strip_prefix("memlock:"))?;
        line.trim().parse().ok()
    }

    fn is_per_cpu(&self) -> bool {
        matches!(self.info.map_type, TYPE_PERCPU_HASH | TYPE_PERCPU_ARRAY | TYPE_LRU_PERCPU_HASH)
    }

    /// Bytes of a value as the kernel hands it over.
    fn value_size(&self) -> io::Result<usize> {
        let value = size(self.info.value_size);
        if !self.is_per_cpu() {
            return Ok(value);
        }
        let cpus = aya::util::nr_cpus().map_err(|(_, error)| error)?;
        Ok(value.next_multiple_of(8) * cpus)
    }

    /// The value under a key; all processors' for a map that has one for each.
    pub(crate) fn lookup(&self, key: &[u8]) -> io::Result<Option<Vec<u8>>> {
        if key.len() != size(self.info.key_size) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let mut value = vec![0u8; self.value_size()?];
        let mut attribute = ElementAttribute {
            map: sys::raw(&self.fd),
            pad: 0,
            key: sys::address(key.as_ptr()),
            value: sys::address(value.as_mut_ptr()),
            flags: 0,
        };
        match sys::bpf(LOOKUP_ELEM, &mut attribute) {
            Ok(_) => Ok(Some(value)),
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The value under a key, if it has the size of `V`.
    pub(crate) fn get<V: AnyBitPattern>(&self, key: &impl NoUninit) -> io::Result<Option<V>> {
        let value = self.lookup(bytemuck::bytes_of(key))?;
        Ok(value.and_then(|value| bytemuck::try_pod_read_unaligned(&value).ok()))
    }

    /// Values of all processors under an index.
    pub(crate) fn per_cpu<V: AnyBitPattern>(&self, index: u32) -> io::Result<Vec<V>> {
        let value = self.lookup(&index.to_ne_bytes())?.unwrap_or_default();
        let stride = size(self.info.value_size).next_multiple_of(8).max(1);
        let part = |chunk: &[u8]| {
            chunk.get(..size_of::<V>()).and_then(|chunk| bytemuck::try_pod_read_unaligned(chunk).ok())
        };
        Ok(value.chunks(stride).filter_map(part).collect())
    }

    /// Sum over all processors of a counter.
    pub(crate) fn counter(&self, index: u32) -> io::Result<Counter> {
        Ok(self.per_cpu::<Counter>(index)?.into_iter().fold(Counter::default(), |sum, value| Counter {
            packets: sum.packets.wrapping_add(value.packets),
            bytes: sum.bytes.wrapping_add(value.bytes),
        }))
    }

    /// All entries as typed values; those of another size are left out.
    pub(crate) fn typed<K: AnyBitPattern, V: AnyBitPattern>(&self) -> io::Result<Vec<(K, V)>> {
        let mut all = Vec::new();
        self.each(|key, value| {
            let pair = (bytemuck::try_pod_read_unaligned(key), bytemuck::try_pod_read_unaligned(value));
            if let (Ok(key), Ok(value)) = pair {
                all.push((key, value));
            }
        })?;
        Ok(all)
    }

    /// Shows all entries to `show`: those that stay in the map all the while, each once.
    pub(crate) fn each(&self, mut show: impl FnMut(&[u8], &[u8])) -> io::Result<()> {
        let batched = matches!(self.info.map_type, TYPE_HASH | TYPE_ARRAY | TYPE_LRU_HASH | TYPE_LPM_TRIE);
        if batched {
            match self.batches(&mut show) {
                // Not before entries have been shown.
                Err((false, error))
                    if matches!(
                        error.raw_os_error(),
                        Some(libc::EINVAL | libc::EOPNOTSUPP | NOT_SUPPORTED | libc::EINTR | libc::EAGAIN)
                    ) => {}
                Err((_, error)) => return Err(error),
                Ok(()) => return Ok(()),
            }
        }
        self.walk(show)
    }

    /// The quick way. An error says whether entries have been shown before.
    fn batches(&self, show: &mut impl FnMut(&[u8], &[u8])) -> Result<(), (bool, io::Error)> {
        let (key_size, value_size) = (size(self.info.key_size), size(self.info.value_size));
        let mut from: Option<Vec<u8>> = None;
        let mut count = BATCH;
        let mut shown = false;
        loop {
            let mut keys = vec![0u8; count * key_size];
            let mut values = vec![0u8; count * value_size];
            // A number or a key, by type of map.
            let mut to = vec![0u8; key_size.max(8)];
            let mut attribute = BatchAttribute {
                from: from.as_ref().map_or(0, |from| sys::address(from.as_ptr())),
                to: sys::address(to.as_mut_ptr()),
                keys: sys::address(keys.as_mut_ptr()),
                values: sys::address(values.as_mut_ptr()),
                count: u32::try_from(count).unwrap_or(u32::MAX),
                map: sys::raw(&self.fd),
                element_flags: 0,
                flags: 0,
            };
            let last = match sys::bpf(LOOKUP_BATCH, &mut attribute) {
                Ok(_) => false,
                Err(error) => match error.raw_os_error() {
                    Some(libc::ENOENT) => true,
                    // A single bucket holds more than there is room for.
                    Some(libc::ENOSPC) if count < 1 << 20 => {
                        count *= 2;
                        continue;
                    }
                    _ => return Err((shown, error)),
                },
            };
            let read = size(attribute.count).min(count);
            for index in 0..read {
                show(
                    &keys[index * key_size..(index + 1) * key_size],
                    &values[index * value_size..(index + 1) * value_size],
                );
            }
            shown |= read > 0;
            if last {
                return Ok(());
            }
            from = Some(to);
        }
    }

    /// The way that every map knows. A key that is removed meanwhile sends it back to the start: so many
    /// steps and no more.
    fn walk(&self, mut show: impl FnMut(&[u8], &[u8])) -> io::Result<()> {
        let mut seen: BTreeSet<Vec<u8>> = BTreeSet::new();
        let mut last: Option<Vec<u8>> = None;
        let steps = size(self.info.max_entries).saturating_mul(2).saturating_add(64);
        for _ in 0..steps {
            let mut next = vec![0u8; size(self.info.key_size)];
            let mut attribute = ElementAttribute {
                map: sys::raw(&self.fd),
                pad: 0,
                key: last.as_ref().map_or(0, |last| sys::address(last.as_ptr())),
                value: sys::address(next.as_mut_ptr()),
                flags: 0,
            };
            match sys::bpf(GET_NEXT_KEY, &mut attribute) {
                Ok(_) => {}
                Err(error) if error.raw_os_error() == Some(libc::ENOENT) => break,
                Err(error) => return Err(error),
            }
            if seen.insert(next.clone())
                && let Some(value) = self.lookup(&next)?
            {
                show(&next, &value);
            }
            last = Some(next);
        }
        Ok(())
    }
}

impl AsFd for ReadMap {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
