//! Places of the lab in which a command can run, and running it there.

use crate::netns::{Netns, NetnsError};
use crate::paths;
use crate::state::State;
use serde::{Deserialize, Serialize};
use std::ffi::OsStr;
use std::fmt;
use std::net::IpAddr;
use std::process::Command;
use std::str::FromStr;

/// A place in which a command can run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// A pod.
    Pod {
        /// Its namespace.
        namespace: String,
        /// Its name.
        name: String,
    },
    /// A node.
    Node(String),
    /// The outside world.
    External,
    /// The router.
    Router,
}

/// Why a place cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TargetError {
    /// Not a place.
    #[error("`{0}` is no place of the lab: use pod/NAMESPACE/NAME, node/NAME, external or router")]
    Parse(String),
    /// No such node.
    #[error("there is no node {name}; nodes: {known}")]
    NoNode {
        /// What was asked for.
        name: String,
        /// The names that exist.
        known: String,
    },
    /// No such pod, or not running.
    #[error(
        "pod {namespace}/{name} has no network namespace in this lab (does it exist, and is it running?)"
    )]
    NoPod {
        /// Its namespace.
        namespace: String,
        /// Its name.
        name: String,
    },
    /// The namespace is not there.
    #[error(transparent)]
    Netns(#[from] NetnsError),
}

impl FromStr for Target {
    type Err = TargetError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let parts: Vec<&str> = text.split('/').collect();
        match parts.as_slice() {
            ["external"] => Ok(Self::External),
            ["router"] => Ok(Self::Router),
            ["node", name] if !name.is_empty() => Ok(Self::Node((*name).to_owned())),
            ["pod", namespace, name] if !namespace.is_empty() && !name.is_empty() => {
                Ok(Self::Pod { namespace: (*namespace).to_owned(), name: (*name).to_owned() })
            }
            _ => Err(TargetError::Parse(text.to_owned())),
        }
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pod { namespace, name } => write!(f, "pod/{namespace}/{name}"),
            Self::Node(name) => write!(f, "node/{name}"),
            Self::External => f.write_str("external"),
            Self::Router => f.write_str("router"),
        }
    }
}

/// The kubelet stand-in's record of a pod, one file each, so that commands find pods without asking the API.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodRecord {
    /// Namespace.
    pub namespace: String,
    /// Name.
    pub name: String,
    /// UID.
    pub uid: String,
    /// Node that it runs on.
    pub node: String,
    /// Its network namespace: its own, or the node's where it is a hostNetwork pod.
    pub netns: Netns,
    /// Whether it shares the node's namespace.
    pub host_network: bool,
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
    /// Its containers.
    pub containers: Vec<ContainerRecord>,
}

/// One container in a [`PodRecord`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContainerRecord {
    /// Its name.
    pub name: String,
    /// Its process, if it has one that runs.
    pub pid: Option<u32>,
    /// Its log file.
    pub log: std::path::PathBuf,
}

impl PodRecord {
    /// The file that holds it.
    pub fn file(&self) -> std::path::PathBuf {
        paths::pods().join(format!("{}.json", self.uid))
    }

    /// All records.
    pub fn all() -> Vec<Self> {
        let Ok(entries) = std::fs::read_dir(paths::pods()) else {
            return Vec::new();
        };
        let mut found: Vec<Self> = entries
            .flatten()
            .filter(|entry| entry.path().extension() == Some(OsStr::new("json")))
            .filter_map(|entry| serde_json::from_slice(&std::fs::read(entry.path()).ok()?).ok())
            .collect();
        found.sort_by(|a, b| (&a.namespace, &a.name, &a.uid).cmp(&(&b.namespace, &b.name, &b.uid)));
        found
    }
}

impl Target {
    /// The place's namespace, and its node if it is on one.
    pub fn resolve(&self, state: &State) -> Result<(Netns, Option<String>), TargetError> {
        let topology = &state.topology;
        match self {
            Self::External => Ok((topology.external.netns.clone(), None)),
            Self::Router => Ok((topology.router.clone(), None)),
            Self::Node(name) => match topology.node(name) {
                Some(node) => Ok((node.netns.clone(), Some(name.clone()))),
                None => Err(TargetError::NoNode {
                    name: name.clone(),
                    known: topology
                        .nodes
                        .iter()
                        .map(|node| node.name.as_str())
                        .collect::<Vec<_>>()
                        .join(", "),
                }),
            },
            Self::Pod { namespace, name } => PodRecord::all()
                .into_iter()
                .find(|pod| pod.namespace == *namespace && pod.name == *name)
                .map(|pod| (pod.netns, Some(pod.node)))
                .ok_or_else(|| TargetError::NoPod { namespace: namespace.clone(), name: name.clone() }),
        }
    }

    /// A command that runs in this place, with the lab's environment.
    pub fn command<S: AsRef<OsStr>>(&self, state: &State, program: S) -> Result<Command, TargetError> {
        let (namespace, node) = self.resolve(state)?;
        let mut command = Command::new(program);
        environment(&mut command, state, node.as_deref());
        namespace.enter(&mut command)?;
        Ok(command)
    }
}

/// The environment of every process in the lab: the marker, the API, and on a node its pins and programs.
pub fn environment(command: &mut Command, state: &State, node: Option<&str>) {
    let path = std::env::var_os("PATH").unwrap_or_else(|| "/usr/sbin:/usr/bin:/sbin:/bin".into());
    let mut folders = vec![paths::bin()];
    folders.extend(std::env::split_paths(&path));
    if let Ok(path) = std::env::join_paths(folders) {
        command.env("PATH", path);
    }
    command.env(paths::MARKER, &state.id);
    command.env("KUBECONFIG", paths::kubeconfig_cluster());
    if let Some(node) = node {
        command.env("COIL_BPFFS_ROOT", paths::node_pins(node));
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]
    use super::*;

    #[test]
    fn targets_read_and_print_alike() {
        for text in ["external", "router", "node/worker1", "pod/default/web-0"] {
            assert_eq!(text.parse::<Target>().unwrap().to_string(), text);
        }
        for text in ["", "pod", "pod/x", "pod//x", "node/", "node/a/b", "web-0"] {
            assert!(text.parse::<Target>().is_err(), "{text}");
        }
    }
}
