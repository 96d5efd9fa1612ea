//! Numbers and structures of `bpf(2)` for maps, as in the kernel's `include/uapi/linux/bpf.h`.

use bytemuck::{Pod, Zeroable};

/// `BPF_MAP_LOOKUP_ELEM`
pub(super) const LOOKUP_ELEM: libc::c_int = 1;
/// `BPF_MAP_UPDATE_ELEM`
pub(super) const UPDATE_ELEM: libc::c_int = 2;
/// `BPF_MAP_GET_NEXT_KEY`
pub(super) const GET_NEXT_KEY: libc::c_int = 4;
/// `BPF_MAP_LOOKUP_BATCH`
pub(super) const LOOKUP_BATCH: libc::c_int = 24;

/// `BPF_MAP_TYPE_HASH`
pub(crate) const TYPE_HASH: u32 = 1;
/// `BPF_MAP_TYPE_ARRAY`
pub(crate) const TYPE_ARRAY: u32 = 2;
/// `BPF_MAP_TYPE_PERCPU_HASH`
pub(super) const TYPE_PERCPU_HASH: u32 = 5;
/// `BPF_MAP_TYPE_PERCPU_ARRAY`
pub(crate) const TYPE_PERCPU_ARRAY: u32 = 6;
/// `BPF_MAP_TYPE_LRU_HASH`
pub(crate) const TYPE_LRU_HASH: u32 = 9;
/// `BPF_MAP_TYPE_LRU_PERCPU_HASH`
pub(super) const TYPE_LRU_PERCPU_HASH: u32 = 10;
/// `BPF_MAP_TYPE_LPM_TRIE`
pub(crate) const TYPE_LPM_TRIE: u32 = 11;

/// For calls about one entry.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub(super) struct ElementAttribute {
    pub(super) map: u32,
    pub(super) pad: u32,
    pub(super) key: u64,
    /// Or the next key.
    pub(super) value: u64,
    pub(super) flags: u64,
}

/// For calls about many.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub(super) struct BatchAttribute {
    pub(super) from: u64,
    pub(super) to: u64,
    pub(super) keys: u64,
    pub(super) values: u64,
    pub(super) count: u32,
    pub(super) map: u32,
    pub(super) element_flags: u64,
    pub(super) flags: u64,
}
