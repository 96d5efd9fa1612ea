//! Takes a lab down, whatever is left of it. Works from the record, and where that is lost from names and markers.

use crate::netns::{Netns, NetnsError};
use crate::paths;
use crate::process::{self, ProcessId};
use crate::state::{Phase, State, StateError};
use crate::target::PodRecord;
use nix::mount::{MntFlags, umount2};
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// How long the supervisor gets to end pods in good order.
const SUPERVISOR_GRACE: Duration = Duration::from_secs(4);
/// How long any other process gets.
const GRACE: Duration = Duration::from_secs(1);

/// What can be left over.
#[derive(Debug, thiserror::Error)]
pub enum DownError {
    /// The record cannot be updated.
    #[error(transparent)]
    State(#[from] StateError),
    /// Processes that survive SIGKILL.
    #[error("processes {pids:?} of the lab do not end")]
    Processes {
        /// Their pids.
        pids: Vec<i32>,
    },
    /// A namespace that cannot be removed.
    #[error(transparent)]
    Netns(#[from] NetnsError),
    /// A folder or mount that cannot be removed.
    #[error("cannot remove {}", path.display())]
    Remove {
        /// Its path.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
}

/// Whether anything of a lab is there.
pub fn leftovers() -> bool {
    Path::new(paths::ROOT).exists()
        || paths::pins().exists()
        || !Netns::all_of_lab().is_empty()
        || !process::marked(None).is_empty()
}

/// Removes everything that `up` made. Every step is tried; the first failure is reported.
pub fn down(progress: &impl Fn(&str)) -> Result<(), DownError> {
    // A record that cannot be read must not keep us from cleaning up: names and markers are enough.
    let state = match State::load() {
        Ok(state) => state,
        Err(error) => {
            progress(&format!("{error}; going by names instead"));
            None
        }
    };
    // Killed processes that init has not reaped yet still show in `ps`.
    let known: Vec<i32> = PodRecord::all()
        .iter()
        .flat_map(|pod| &pod.containers)
        .filter_map(|container| i32::try_from(container.pid?).ok())
        .chain(state.as_ref().and_then(|state| state.supervisor).map(|process| process.pid))
        .collect();
    let mut first = Ok(());
    let mut keep = |result: Result<(), DownError>| {
        if first.is_ok() {
            first = result;
        }
    };
    let id = state.as_ref().map(|state| state.id.clone());
    if let Some(mut state) = state {
        let supervisor = state.supervisor.filter(|process| process.alive());
        state.phase = Phase::Stopping;
        keep(state.save().map_err(Into::into));
        if let Some(supervisor) = supervisor {
            progress("stopping the supervisor and its pods");
            keep(ended(process::end(SUPERVISOR_GRACE, || vec![supervisor])));
        }
    }
    keep(ended(process::end(GRACE, || process::marked(id.as_deref()))));

    let namespaces = Netns::all_of_lab();
    if !namespaces.is_empty() {
        progress(&format!("removing {} network namespaces", namespaces.len()));
    }
    for namespace in namespaces {
        keep(namespace.remove().map_err(Into::into));
    }
    keep(remove_folder(&paths::pins()));
    // What others have pinned meanwhile would be lost with the mount. The kernel's own iterators are always there.
    let others = std::fs::read_dir(paths::BPFFS).is_ok_and(|entries| {
        entries
            .flatten()
            .any(|entry| !matches!(entry.file_name().to_str(), Some("maps.debug" | "progs.debug")))
    });
    if bpffs_is_ours() && !others {
        progress("unmounting the BPF file system");
        keep(match umount2(Path::new(paths::BPFFS), MntFlags::empty()) {
            // EINVAL: no longer mounted. EBUSY: somebody else has begun to use it, so it is no longer ours to remove.
            Ok(()) | Err(nix::errno::Errno::EINVAL | nix::errno::Errno::EBUSY) => Ok(()),
            Err(errno) => Err(DownError::Remove { path: paths::BPFFS.into(), source: errno.into() }),
        });
    }
    process::await_zombies(&known);
    // The record goes last: after a failure above, another `down` still knows all.
    if first.is_ok() {
        first = remove_folder(Path::new(paths::ROOT));
    }
    first
}

/// Whether the lab has mounted the BPF file system.
fn bpffs_is_ours() -> bool {
    let ours = format!("{} {} bpf ", paths::BPFFS_SOURCE, paths::BPFFS);
    std::fs::read_to_string("/proc/self/mounts")
        .is_ok_and(|table| table.lines().any(|line| line.starts_with(&ours)))
}

fn ended(rest: Vec<ProcessId>) -> Result<(), DownError> {
    if rest.is_empty() {
        return Ok(());
    }
    Err(DownError::Processes { pids: rest.iter().map(|process| process.pid).collect() })
}

fn remove_folder(path: &Path) -> Result<(), DownError> {
    match std::fs::remove_dir_all(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(DownError::Remove { path: path.to_owned(), source: error })
        }
        _ => Ok(()),
    }
}
