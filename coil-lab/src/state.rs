//! The record of a lab, from which `down` works. It is written before each thing is made, in one atomic step.

use crate::options::Options;
use crate::paths;
use crate::process::ProcessId;
use crate::topology::Topology;
use serde::{Deserialize, Serialize};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

/// How far a lab has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    /// `up` is at work, or died at it.
    Starting,
    /// All is up.
    Ready,
    /// `down` is at work, or died at it.
    Stopping,
}

/// The record.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct State {
    /// Value of the marker in the environment of every process of this lab.
    pub id: String,
    /// How far it has come.
    pub phase: Phase,
    /// What was asked for.
    pub options: Options,
    /// The network.
    pub topology: Topology,
    /// The process that runs it all.
    pub supervisor: Option<ProcessId>,
    /// URL of the API in the root namespace.
    pub api_url: Option<String>,
}

/// What can go wrong with the record.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// The file cannot be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The file is not what we write.
    #[error("{} is not a lab's record", path.display())]
    Parse {
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: serde_json::Error,
    },
    /// The file cannot be written.
    #[error("cannot write {}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
}

impl State {
    /// Reads the record. `None`: there is no lab.
    pub fn load() -> Result<Option<Self>, StateError> {
        let path = paths::state_file();
        let text = match std::fs::read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(StateError::Read { path, source }),
        };
        serde_json::from_slice(&text).map(Some).map_err(|source| StateError::Parse { path, source })
    }

    /// Writes the record.
    pub fn save(&self) -> Result<(), StateError> {
        let path = paths::state_file();
        write_json(&path, self).map_err(|source| StateError::Write { path, source })
    }

    /// Whether the supervisor of this lab still runs.
    pub fn supervised(&self) -> bool {
        self.supervisor.is_some_and(ProcessId::alive)
    }
}

/// Writes a file so that a reader sees either the old or the new content.
pub fn write_atomically(path: &Path, content: &[u8]) -> io::Result<()> {
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder)?;
    }
    let temporary = path.with_extension("tmp");
    let mut file = std::fs::File::create(&temporary)?;
    file.write_all(content)?;
    drop(file);
    std::fs::rename(&temporary, path)
}

/// Writes a value as JSON, atomically.
pub fn write_json(path: &Path, value: &impl Serialize) -> io::Result<()> {
    let mut text = serde_json::to_vec_pretty(value)?;
    text.push(b'\n');
    write_atomically(path, &text)
}
