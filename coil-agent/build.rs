//! Embeds the eBPF object named by `COIL_EBPF_OBJECT`, or an empty stub, so that everything builds on
//! a machine without an eBPF toolchain.

use std::path::PathBuf;
use std::{env, fs, io};

fn main() -> io::Result<()> {
    println!("cargo::rustc-check-cfg=cfg(ebpf_stub)");
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-env-changed=COIL_EBPF_OBJECT");
    let out = PathBuf::from(env::var_os("OUT_DIR").ok_or(io::ErrorKind::NotFound)?);
    let embedded = out.join("coil-ebpf.o");
    let object = env::var_os("COIL_EBPF_OBJECT").filter(|path| !path.is_empty()).map(PathBuf::from);
    if let Some(object) = &object {
        // Also while it does not exist: building it must bring about another build of this package.
        println!("cargo::rerun-if-changed={}", object.display());
    }
    match object.filter(|object| object.is_file()) {
        Some(object) => fs::copy(object, embedded).map(drop),
        None => {
            println!("cargo::rustc-cfg=ebpf_stub");
            fs::write(embedded, [])
        }
    }
}
