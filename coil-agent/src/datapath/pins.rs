//! Folders of pins on a BPF file system.

use std::fs::{File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use coil_common::names::{PIN_EGRESS, PIN_LINKS};
use nix::mount::{MsFlags, mount};
use nix::sys::statfs::{BPF_FS_MAGIC, statfs};

/// How long a process waits for another that is ending.
const LOCK_PATIENCE: Duration = Duration::from_secs(3);
const LOCK_INTERVAL: Duration = Duration::from_millis(50);

/// What can go wrong with the folder of pins.
#[derive(Debug, thiserror::Error)]
pub enum PinError {
    /// The folder is not on a BPF file system.
    #[error(
        "{} is not on a BPF file system; mount one with `mount -t bpf bpf {}` on the node, and into the \
         container as a hostPath volume, or point --bpffs-root at one", root.display(), mount_point.display()
    )]
    NotMounted {
        /// The folder.
        root: PathBuf,
        /// Where one is usually mounted.
        mount_point: PathBuf,
    },
    /// A BPF file system was missing and could not be mounted.
    #[error("cannot mount a BPF file system at {}", path.display())]
    Mount {
        /// Where.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// Another process has the folder.
    #[error("another coild works on {}; two of them would undo each other's changes", folder.display())]
    Busy {
        /// The folder.
        folder: PathBuf,
    },
    /// A pin or a folder of pins cannot be used.
    #[error("cannot {operation} {}", path.display())]
    Path {
        /// What was tried.
        operation: &'static str,
        /// With what.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

impl PinError {
    pub(crate) fn path(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Path { operation, path: path.to_path_buf(), source }
    }
}

/// What to do where no BPF file system is mounted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum IfUnmounted {
    /// Refuse: a mount made inside a container would not outlive it.
    Refuse,
    /// Mount one.
    Mount,
}

/// The folder of one ABI version below the root of all pins.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct PinFolder(PathBuf);

impl PinFolder {
    /// Checks that `root` is on a BPF file system and creates the folders of this ABI version.
    pub(crate) fn open(root: &Path, if_unmounted: IfUnmounted) -> Result<Self, PinError> {
        ensure_mounted(root, if_unmounted)?;
        let folder = Self(root.join(format!("v{}", coil_common::ABI_VERSION)));
        create(&folder.0)?;
        Ok(folder)
    }

    /// Keeps other processes from writing to the node's maps, until the lock is dropped or the process
    /// ends; waits a little for one that is ending.
    pub(crate) fn lock(&self) -> Result<File, PinError> {
        let folder = File::open(&self.0).map_err(PinError::path("open", &self.0))?;
        let start = Instant::now();
        loop {
            match folder.try_lock() {
                Ok(()) => return Ok(folder),
                Err(TryLockError::WouldBlock) if start.elapsed() < LOCK_PATIENCE => {
                    std::thread::sleep(LOCK_INTERVAL);
                }
                Err(TryLockError::WouldBlock) => return Err(PinError::Busy { folder: self.0.clone() }),
                Err(TryLockError::Error(error)) => return Err(PinError::path("lock", &self.0)(error)),
            }
        }
    }

    /// Where a node's maps are.
    pub(crate) fn maps(&self) -> &Path {
        &self.0
    }

    /// Where links are, created if need be.
    pub(crate) fn links(&self) -> Result<PathBuf, PinError> {
        let path = self.0.join(PIN_LINKS);
        create(&path)?;
        Ok(path)
    }

    /// Where the folders of gateways are; it need not exist.
    pub(crate) fn gateways(&self) -> PathBuf {
        self.0.join(PIN_EGRESS)
    }

    /// Folder of maps and link of one gateway, created if need be.
    pub(crate) fn gateway(&self, uid: &str) -> Result<PathBuf, PinError> {
        let path = self.gateways().join(uid);
        create(&path)?;
        Ok(path)
    }
}

fn create(path: &Path) -> Result<(), PinError> {
    std::fs::create_dir_all(path).map_err(PinError::path("create", path))
}

fn ensure_mounted(root: &Path, if_unmounted: IfUnmounted) -> Result<(), PinError> {
    let base = existing(root)?;
    if is_bpffs(base)? {
        return Ok(());
    }
    if if_unmounted == IfUnmounted::Refuse {
        return Err(PinError::NotMounted { root: root.to_path_buf(), mount_point: mount_point(root) });
    }
    // Folders cannot be made in /sys, but one for this purpose is there: /sys/fs/bpf.
    let target = match std::fs::create_dir_all(root) {
        Ok(()) => root,
        Err(_) => base,
    };
    mount(Some("bpf"), target, Some("bpf"), MsFlags::empty(), None::<&str>)
        .map_err(|errno| PinError::Mount { path: target.to_path_buf(), source: errno.into() })?;
    tracing::info!(path = %target.display(), "mounted a BPF file system; it lives as long as this container");
    Ok(())
}

/// The deepest part of a path that exists.
fn existing(path: &Path) -> Result<&Path, PinError> {
    for ancestor in path.ancestors() {
        if ancestor.try_exists().map_err(PinError::path("look at", ancestor))? {
            return Ok(ancestor);
        }
    }
    Ok(Path::new("."))
}

fn is_bpffs(path: &Path) -> Result<bool, PinError> {
    let stat = statfs(path).map_err(|errno| PinError::path("look at", path)(errno.into()))?;
    Ok(stat.filesystem_type() == BPF_FS_MAGIC)
}

fn mount_point(root: &Path) -> PathBuf {
    let usual = Path::new("/sys/fs/bpf");
    if root.starts_with(usual) { usual.to_path_buf() } else { root.to_path_buf() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_elsewhere_is_refused_with_the_remedy() {
        let error = PinFolder::open(Path::new("/tmp/no/bpffs"), IfUnmounted::Refuse);
        let Err(PinError::NotMounted { .. }) = &error else { unreachable!("{error:?}") };
        let text = error.map_or_else(|error| error.to_string(), |_| String::new());
        assert!(text.contains("mount -t bpf bpf /tmp/no/bpffs"), "{text}");
    }
}
