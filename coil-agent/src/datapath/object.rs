//! The eBPF object that `build.rs` has found, as part of this program.

use super::loader::LoadError;

/// Aligned as an ELF file must be to be read in place.
#[repr(C, align(64))]
struct Aligned<T: ?Sized>(T);

static OBJECT: &Aligned<[u8]> = &Aligned(*include_bytes!(concat!(env!("OUT_DIR"), "/coil-ebpf.o")));

/// The object, unless this program was built without.
pub(crate) fn object() -> Result<&'static [u8], LoadError> {
    if cfg!(ebpf_stub) { Err(LoadError::NoObject) } else { Ok(&OBJECT.0) }
}
