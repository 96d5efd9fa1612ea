//! What runs where, for people and for programs.

use crate::paths;
use crate::process::{self, ProcessId};
use crate::state::{Phase, State};
use crate::target::PodRecord;
use crate::topology::Topology;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::path::PathBuf;

/// The lab at one moment.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Status {
    /// How far it has come.
    pub phase: Phase,
    /// Whether its supervisor runs.
    pub supervised: bool,
    /// The supervisor.
    pub supervisor: Option<ProcessId>,
    /// URL of the API in the root namespace.
    pub api_url: Option<String>,
    /// Kubeconfig for programs of the root namespace.
    pub kubeconfig: PathBuf,
    /// Nodes, router and external host with their namespaces and addresses.
    pub topology: Topology,
    /// Pods on lab nodes.
    pub pods: Vec<PodRecord>,
    /// All processes of the lab.
    pub pids: Vec<i32>,
    /// All log files.
    pub logs: Vec<PathBuf>,
}

impl Status {
    /// Collects it.
    pub fn of(state: &State) -> Self {
        let mut logs: Vec<PathBuf> = std::fs::read_dir(paths::logs())
            .into_iter()
            .flatten()
            .flatten()
            .map(|entry| entry.path())
            .collect();
        logs.sort();
        let mut pids: Vec<i32> = process::marked(Some(&state.id)).iter().map(|process| process.pid).collect();
        pids.sort_unstable();
        Self {
            phase: state.phase,
            supervised: state.supervised(),
            supervisor: state.supervisor,
            api_url: state.api_url.clone(),
            kubeconfig: paths::kubeconfig(),
            topology: state.topology.clone(),
            pods: PodRecord::all(),
            pids,
            logs,
        }
    }
}

fn list<T: fmt::Display>(items: impl IntoIterator<Item = T>) -> String {
    items.into_iter().map(|item| item.to_string()).collect::<Vec<_>>().join(" ")
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let phase = match (self.phase, self.supervised) {
            (Phase::Starting, true) => "starting",
            (Phase::Ready, true) => "ready",
            (Phase::Stopping, _) => "being taken down",
            (_, false) => "broken: the supervisor is gone (`lab up` or `lab down` cleans up)",
        };
        writeln!(f, "lab         {phase}")?;
        if let Some(supervisor) = self.supervisor {
            writeln!(f, "supervisor  pid {}", supervisor.pid)?;
        }
        if let Some(url) = &self.api_url {
            writeln!(f, "API         {url} (in the lab: {})", self.topology.api_authority())?;
        }
        writeln!(f, "kubeconfig  {}", self.kubeconfig.display())?;
        writeln!(f, "logs        {}", paths::logs().display())?;
        writeln!(f, "\nNODES")?;
        for node in &self.topology.nodes {
            let pods = match node.pod_cidrs.as_slice() {
                [] => String::new(),
                fixed => format!("  pods {}", list(fixed)),
            };
            writeln!(
                f,
                "  {:<12} netns {:<20} addresses {}{pods}",
                node.name,
                node.netns.name(),
                list(&node.addresses)
            )?;
        }
        let topology = &self.topology;
        writeln!(
            f,
            "  {:<12} netns {:<20} addresses {}",
            "router",
            topology.router.name(),
            list(&topology.api_addresses)
        )?;
        writeln!(
            f,
            "  {:<12} netns {:<20} addresses {}",
            "external",
            topology.external.netns.name(),
            list(&topology.external.addresses)
        )?;
        if !topology.pool.is_empty() {
            writeln!(f, "\nPOOL default  {}", list(&topology.pool))?;
        }
        writeln!(f, "\nPODS")?;
        for pod in &self.pods {
            writeln!(
                f,
                "  {:<44} node {:<10} netns {:<22} addresses {}",
                format!("{}/{}", pod.namespace, pod.name),
                pod.node,
                pod.netns.name(),
                list(&pod.addresses)
            )?;
            for container in pod.containers.iter().filter(|container| container.pid.is_some()) {
                let pid = container.pid.map(|pid| pid.to_string()).unwrap_or_default();
                writeln!(f, "      {:<12} pid {pid:<8} log {}", container.name, container.log.display())?;
            }
        }
        writeln!(f, "\nPROCESSES {}", list(&self.pids))?;
        writeln!(f, "\nLOGS")?;
        self.logs.iter().try_for_each(|log| writeln!(f, "  {}", log.display()))
    }
}
