//! Which processes are ours, and ending them. A process is known by pid and start time, so that a reused pid is never
//! taken for it, or by the marker in its environment; never by name.

use crate::paths::MARKER;
use serde::{Deserialize, Serialize};
use std::collections::HashSet;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::{Duration, Instant};

/// A process, safe against reuse of its pid.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ProcessId {
    /// Its pid.
    pub pid: i32,
    /// When it started, in clock ticks since boot (field 22 of `/proc/<pid>/stat`).
    pub start: u64,
}

/// What `/proc/<pid>/stat` says.
struct Stat {
    state: char,
    parent: i32,
    start: u64,
}

impl ProcessId {
    /// The process that has this pid now.
    pub fn of(pid: i32) -> Option<Self> {
        stat(pid).map(|stat| Self { pid, start: stat.start })
    }

    /// This process.
    pub fn own() -> Option<Self> {
        Self::of(i32::try_from(std::process::id()).ok()?)
    }

    /// Whether it still runs. One that waits to be reaped does not.
    pub fn alive(self) -> bool {
        stat(self.pid).is_some_and(|stat| stat.start == self.start && !matches!(stat.state, 'Z' | 'X'))
    }

    /// Sends it a signal, unless its pid has passed to another process.
    pub fn signal(self, signal: nix::sys::signal::Signal) {
        // SAFETY: pidfd_open takes a pid and flags and touches no memory of ours.
        let raw = unsafe { libc::syscall(libc::SYS_pidfd_open, self.pid, 0) };
        let Ok(raw) = i32::try_from(raw) else { return };
        if raw < 0 {
            return;
        }
        // SAFETY: the kernel has just given us this descriptor, and nobody else knows it.
        let fd = unsafe { OwnedFd::from_raw_fd(raw) };
        // The descriptor names one process for good, so a check after opening is final.
        if self.alive() {
            // SAFETY: a null siginfo is allowed; the descriptor is open.
            unsafe {
                libc::syscall(
                    libc::SYS_pidfd_send_signal,
                    fd.as_raw_fd(),
                    signal as libc::c_int,
                    std::ptr::null::<libc::siginfo_t>(),
                    0,
                );
            }
        }
    }
}

/// All processes that carry the marker: those of lab `id`, or of any lab where it is not known. This process and its
/// ancestors are left out, since `down` may itself have been started from inside the lab.
pub fn marked(id: Option<&str>) -> Vec<ProcessId> {
    let mut found = with_variable(MARKER, id);
    if id.is_none() {
        // A lab in a container with mounts of its own is not the one whose record is missing here.
        let mounts = |pid: &str| std::fs::read_link(format!("/proc/{pid}/ns/mnt")).ok();
        let own = mounts("self");
        found.retain(|process| mounts(&process.pid.to_string()) == own);
    }
    found
}

/// All processes with this environment variable, except this one and its ancestors; with this value, where one is given.
pub fn with_variable(name: &str, value: Option<&str>) -> Vec<ProcessId> {
    let spared = ancestors();
    let prefix = format!("{name}=");
    let Ok(entries) = std::fs::read_dir("/proc") else {
        return Vec::new();
    };
    entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok())
        .filter(|pid| !spared.contains(pid))
        .filter_map(|pid| {
            // The identity is read first: were the pid reused in between, the later check of the start time fails.
            let process = ProcessId::of(pid)?;
            let environment = std::fs::read(format!("/proc/{pid}/environ")).ok()?;
            environment
                .split(|byte| *byte == 0)
                .filter_map(|variable| variable.strip_prefix(prefix.as_bytes()))
                .any(|found| value.is_none_or(|value| found == value.as_bytes()))
                .then_some(process)
        })
        .collect()
}

/// Ends processes: SIGTERM, then SIGKILL to those that are still there after `grace`. `find` is asked again and again,
/// since a process may start another while it ends. Returns what would not go.
pub fn end(grace: Duration, mut find: impl FnMut() -> Vec<ProcessId>) -> Vec<ProcessId> {
    use nix::sys::signal::Signal::{SIGKILL, SIGTERM};
    let begun = Instant::now();
    let mut told = HashSet::new();
    let mut seen = HashSet::new();
    loop {
        let rest: Vec<_> = find().into_iter().filter(|process| process.alive()).collect();
        if rest.is_empty() || begun.elapsed() > grace + Duration::from_secs(5) {
            await_reaping(&seen);
            return rest;
        }
        seen.extend(rest.iter().copied());
        for process in rest {
            if begun.elapsed() >= grace {
                process.signal(SIGKILL);
            } else if told.insert(process) {
                process.signal(SIGTERM);
            }
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Gives the parents of ended processes, mostly init, a moment to reap them, so that `ps` shows nothing afterwards.
fn await_reaping(ended: &HashSet<ProcessId>) {
    let deadline = Instant::now() + Duration::from_secs(2);
    let there = |process: &ProcessId| ProcessId::of(process.pid) == Some(*process);
    while ended.iter().any(there) && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// The same for processes of which only the pid is known: waits for those that have ended but are still listed.
pub fn await_zombies(pids: &[i32]) {
    let deadline = Instant::now() + Duration::from_secs(2);
    let zombie = |pid: &i32| stat(*pid).is_some_and(|stat| stat.state == 'Z');
    while pids.iter().any(zombie) && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn ancestors() -> HashSet<i32> {
    let mut found = HashSet::new();
    let mut pid = i32::try_from(std::process::id()).unwrap_or(0);
    while pid > 0 && found.insert(pid) {
        pid = stat(pid).map_or(0, |stat| stat.parent);
    }
    found
}

fn stat(pid: i32) -> Option<Stat> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The second field is the program's name in parentheses and may itself hold blanks and parentheses.
    let mut fields = text.get(text.rfind(')')? + 1..)?.split_ascii_whitespace();
    Some(Stat {
        state: fields.next()?.chars().next()?,
        parent: fields.next()?.parse().ok()?,
        start: fields.nth(17)?.parse().ok()?,
    })
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use std::process::Command;

    #[test]
    fn knows_itself() {
        let own = ProcessId::own().unwrap();
        assert!(own.alive());
        assert!(!ProcessId { start: own.start + 1, ..own }.alive());
    }

    #[test]
    fn ends_only_marked_processes() {
        let id = format!("test-{}", std::process::id());
        let mut ours = Command::new("sleep").arg("60").env(MARKER, &id).spawn().unwrap();
        let mut other = Command::new("sleep").arg("60").env(MARKER, "another").spawn().unwrap();
        // The marker is visible only once the child has executed its program.
        let deadline = Instant::now() + Duration::from_secs(5);
        while marked(Some(&id)).is_empty() && Instant::now() < deadline {
            std::thread::yield_now();
        }
        assert!(end(Duration::from_secs(2), || marked(Some(&id))).is_empty());
        assert!(!ours.wait().unwrap().success());
        assert!(other.try_wait().unwrap().is_none());
        other.kill().unwrap();
        other.wait().unwrap();
    }
}
