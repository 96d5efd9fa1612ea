//! Named network namespaces: make, enter, run a function or a command inside, remove.

use crate::paths::{NETNS_PREFIX, NETNS_ROOT};
use nix::mount::{MntFlags, umount2};
use nix::sched::{CloneFlags, setns};
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// What can go wrong with a network namespace.
#[derive(Debug, thiserror::Error)]
pub enum NetnsError {
    /// The namespace's file cannot be opened.
    #[error("cannot open network namespace {name}")]
    Open {
        /// Name of the namespace.
        name: String,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The kernel refused the change of namespace.
    #[error("cannot enter network namespace {name}")]
    Enter {
        /// Name of the namespace.
        name: String,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// It could not be made.
    #[error("cannot create network namespace {name}: {detail}")]
    Create {
        /// Name of the namespace.
        name: String,
        /// What `ip netns add` said.
        detail: String,
    },
    /// It could not be removed.
    #[error("cannot remove network namespace {name}")]
    Remove {
        /// Name of the namespace.
        name: String,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// No thread could be started to work inside it, or the thread panicked.
    #[error("no thread for network namespace {name}: {detail}")]
    Thread {
        /// Name of the namespace.
        name: String,
        /// What happened.
        detail: String,
    },
}

/// A named network namespace, which may or may not exist.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Netns(String);

impl Netns {
    /// The namespace of a node, of `router` or of `external`.
    pub fn of(part: &str) -> Self {
        Self(format!("{NETNS_PREFIX}{part}"))
    }

    /// Any namespace by its whole name.
    pub fn named(name: impl Into<String>) -> Self {
        Self(name.into())
    }

    /// The namespace's name as `ip netns list` shows it.
    pub fn name(&self) -> &str {
        &self.0
    }

    /// The file that holds it.
    pub fn path(&self) -> PathBuf {
        Path::new(NETNS_ROOT).join(&self.0)
    }

    /// All namespaces of the lab that exist, by name alone.
    pub fn all_of_lab() -> Vec<Self> {
        let Ok(entries) = std::fs::read_dir(NETNS_ROOT) else {
            return Vec::new();
        };
        let mut found: Vec<String> = entries
            .flatten()
            .filter_map(|entry| entry.file_name().into_string().ok())
            .filter(|name| name.starts_with(NETNS_PREFIX))
            .collect();
        found.sort();
        found.into_iter().map(Self).collect()
    }

    /// Makes it; an existing one of that name is an error.
    pub fn create(&self) -> Result<(), NetnsError> {
        // iproute2 also makes /run/netns a shared mount, without which its own later `ip netns` calls would hide ours.
        let out = Command::new("ip").args(["netns", "add", &self.0]).stdin(Stdio::null()).output();
        let detail = match out {
            Ok(out) if out.status.success() => return Ok(()),
            Ok(out) => String::from_utf8_lossy(&out.stderr).trim().to_owned(),
            Err(error) => error.to_string(),
        };
        Err(NetnsError::Create { name: self.0.clone(), detail })
    }

    /// Removes it; one that does not exist is no error.
    pub fn remove(&self) -> Result<(), NetnsError> {
        let path = self.path();
        let wrap = |source| NetnsError::Remove { name: self.0.clone(), source };
        match umount2(&path, MntFlags::MNT_DETACH) {
            // EINVAL: a file that is no mount, left by a crash between its creation and the mount.
            Ok(()) | Err(nix::errno::Errno::ENOENT | nix::errno::Errno::EINVAL) => {}
            Err(errno) => return Err(wrap(errno.into())),
        }
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(wrap(error)),
            _ => Ok(()),
        }
    }

    /// Opens the namespace's file.
    pub fn open(&self) -> Result<File, NetnsError> {
        File::open(self.path()).map_err(|source| NetnsError::Open { name: self.0.clone(), source })
    }

    /// Runs `work` on a new thread inside the namespace. Sockets that it makes stay in the namespace for good.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T, NetnsError> {
        let file = self.open()?;
        let thread = |detail: String| NetnsError::Thread { name: self.0.clone(), detail };
        std::thread::scope(|scope| {
            std::thread::Builder::new()
                .name(format!("ns:{}", self.0))
                .spawn_scoped(scope, || setns(&file, CloneFlags::CLONE_NEWNET).map(|()| work()))
                .map_err(|error| thread(error.to_string()))?
                .join()
                .map_err(|_| thread("it panicked".to_owned()))?
                .map_err(|errno| NetnsError::Enter { name: self.0.clone(), source: errno.into() })
        })
    }

    /// Makes `command` start inside the namespace.
    pub fn enter(&self, command: &mut Command) -> Result<(), NetnsError> {
        let file = self.open()?;
        // SAFETY: the closure runs between fork and exec and only makes one system call; it neither allocates nor
        // takes a lock. The file stays open in the parent for as long as the command lives.
        unsafe {
            command.pre_exec(move || setns(&file, CloneFlags::CLONE_NEWNET).map_err(io::Error::from));
        }
        Ok(())
    }

    /// Writes sysctls, given as path below `/proc/sys` and value. Those that this kernel lacks are passed over.
    pub fn sysctls(&self, values: &[(&str, &str)]) -> Result<io::Result<()>, NetnsError> {
        self.run(|| {
            for (key, value) in values {
                match std::fs::write(Path::new("/proc/sys").join(key), value) {
                    Err(error) if error.kind() != io::ErrorKind::NotFound => {
                        return Err(io::Error::new(error.kind(), format!("sysctl {key}={value}: {error}")));
                    }
                    _ => {}
                }
            }
            Ok(())
        })
    }
}
