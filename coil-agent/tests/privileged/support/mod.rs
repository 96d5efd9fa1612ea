//! What the tests stand on: name spaces, BPF file systems, a small network, packets, waiting.
//!
//! Whatever a test makes is a guard that removes it, also when the test fails.

#![expect(clippy::panic, clippy::unwrap_used, reason = "tests")]

#[path = "../../../src/datapath/layout/builder.rs"]
mod builder;
pub(crate) mod foreign;
pub(crate) mod maps;
pub(crate) mod net;
pub(crate) mod other;
pub(crate) mod packets;
pub(crate) mod pieces;
pub(crate) mod raw;
pub(crate) mod topology;

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use nix::mount::{MntFlags, MsFlags, mount, umount2};

/// How long a test waits for something that should happen; emulated machines are slow.
pub(crate) const DEADLINE: Duration = Duration::from_secs(60);

/// A name that no other test has.
pub(crate) fn unique(what: &str) -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let next = NEXT.fetch_add(1, Ordering::Relaxed);
    format!("ct{}-{next}-{what}", std::process::id())
}

/// Runs a command that must succeed; its arguments are separated by blanks.
#[track_caller]
pub(crate) fn run(command: &str) -> String {
    let mut words = command.split_whitespace();
    let program = words.next().unwrap();
    let output = Command::new(program).args(words).output();
    let output = output.unwrap_or_else(|error| panic!("{program} cannot be run: {error}"));
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(output.status.success(), "{command}: {}", text(&output.stderr));
    text(&output.stdout)
}

/// The same for a command that reads its standard input.
#[track_caller]
pub(crate) fn run_with_input(command: &str, input: &str) {
    let mut words = command.split_whitespace();
    let mut child = Command::new(words.next().unwrap())
        .args(words)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| panic!("{command} cannot be run: {error}"));
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command}: {error}of\n{input}");
}

/// Waits until `condition` gives something.
#[track_caller]
pub(crate) fn wait_for<T>(what: &str, mut condition: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(value) = condition() {
            return value;
        }
        assert!(start.elapsed() < DEADLINE, "gave up waiting for {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// A BPF file system of the test's own.
pub(crate) struct BpfFs(PathBuf);

impl BpfFs {
    pub(crate) fn new() -> Self {
        let path = std::env::temp_dir().join(unique("bpffs"));
        std::fs::create_dir(&path).unwrap();
        mount(Some("bpf"), &path, Some("bpf"), MsFlags::empty(), None::<&str>).unwrap();
        Self(path)
    }

    /// Root for pins.
    pub(crate) fn root(&self) -> &Path {
        &self.0
    }

    /// Folder of the node's maps.
    pub(crate) fn node(&self) -> PathBuf {
        self.0.join("v1")
    }
}

impl Drop for BpfFs {
    fn drop(&mut self) {
        if let Err(error) = umount2(&self.0, MntFlags::MNT_DETACH) {
            eprintln!("cannot unmount {}: {error}", self.0.display());
        }
        if let Err(error) = std::fs::remove_dir(&self.0) {
            eprintln!("cannot remove {}: {error}", self.0.display());
        }
    }
}
