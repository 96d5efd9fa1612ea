//! The programs as they are shipped: optimised and static, with the CNI plugin as a small program of its own.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::ebpf::{BuildEbpf, cargo};
use crate::process::{run, say};
use crate::target_dir;

/// The plugin must be smaller than this many bytes: it is started for every pod.
const MAX_PLUGIN: u64 = 5_000_000;
const TARGET: &str = "x86_64-unknown-linux-gnu";

/// Where they are.
pub struct Shipped {
    /// The multi-call binary.
    pub hypercoil: PathBuf,
    /// The CNI plugin.
    pub plugin: PathBuf,
}

/// Builds them, and checks that the plugin is what it should be.
pub fn build() -> Result<Shipped> {
    BuildEbpf::default().run()?;
    say("building the static programs (release)");
    run(release("build").args(["--package", "hypercoil", "--bin", "hypercoil"]))?;
    // The compiler's own linker keeps the tables for unwinding of all that it looks at, which is most of coild and
    // a third of the plugin; that of binutils keeps what is used. Its symbols nobody needs on a host.
    run(release("rustc")
        .args(["--package", "coil-agent", "--bin", "coil", "--"])
        .args(["-Clink-arg=-fuse-ld=bfd", "-Cstrip=symbols"]))?;
    let folder = target_dir().join(TARGET).join("release");
    let shipped = Shipped { hypercoil: folder.join("hypercoil"), plugin: folder.join("coil") };
    check(&shipped.plugin)?;
    Ok(shipped)
}

fn release(verb: &str) -> Command {
    let mut command = cargo();
    // With an explicit target the flag reaches the program and not the build scripts.
    command
        .args([verb, "--release", "--target", TARGET])
        .env("CARGO_PROFILE_RELEASE_STRIP", "debuginfo")
        .env("CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUSTFLAGS", "-Ctarget-feature=+crt-static");
    command
}

/// It runs on hosts of which nothing is known: it must need no library, and be small.
fn check(plugin: &Path) -> Result<()> {
    let bytes = fs::read(plugin).with_context(|| format!("reading {}", plugin.display()))?;
    let size = u64::try_from(bytes.len())?;
    ensure!(size < MAX_PLUGIN, "the CNI plugin has grown to {size} bytes; it must stay under {MAX_PLUGIN}");
    let interpreter = interpreter(&bytes).context("the CNI plugin is no program of 64 bits")?;
    ensure!(!interpreter, "the CNI plugin is not static: it asks for a dynamic linker");
    say(format!("CNI plugin: {size} bytes, static"));
    Ok(())
}

/// Whether an ELF file of 64 bits, little endian, names a dynamic linker.
fn interpreter(file: &[u8]) -> Option<bool> {
    const PT_INTERP: u64 = 3;
    let number = |at: usize, size: usize| {
        let mut bytes = [0; 8];
        bytes.get_mut(..size)?.copy_from_slice(file.get(at..at.checked_add(size)?)?);
        Some(u64::from_le_bytes(bytes))
    };
    let place = |at, size| usize::try_from(number(at, size)?).ok();
    if file.get(..6)? != b"\x7fELF\x02\x01" {
        return None;
    }
    let (table, size, count) = (place(32, 8)?, place(54, 2)?, place(56, 2)?);
    let mut found = false;
    for index in 0..count {
        found |= number(table + index * size, 4)? == PT_INTERP;
    }
    Some(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two segments of these types.
    fn file(types: [u32; 2]) -> Vec<u8> {
        let mut file = vec![0; 64 + 2 * 56];
        file[..6].copy_from_slice(b"\x7fELF\x02\x01");
        file[32] = 64;
        file[54] = 56;
        file[56] = 2;
        for (index, kind) in types.into_iter().enumerate() {
            file[64 + index * 56..][..4].copy_from_slice(&kind.to_le_bytes());
        }
        file
    }

    #[test]
    fn a_program_that_asks_for_a_linker_is_not_static() {
        assert_eq!(interpreter(&file([1, 3])), Some(true));
        assert_eq!(interpreter(&file([1, 2])), Some(false));
        assert_eq!(interpreter(&file([1, 2])[..100]), None);
        assert_eq!(interpreter(b"#!/bin/sh"), None);
    }

    /// This test program itself is linked to a library, as everything is that is not built to be shipped.
    #[test]
    fn real_programs_are_told_apart() -> Result<()> {
        let own = fs::read(std::env::current_exe()?)?;
        assert_eq!(interpreter(&own), Some(true));
        Ok(())
    }
}
