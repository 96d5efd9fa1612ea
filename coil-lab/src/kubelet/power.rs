//! Nodes that lose their power, and start again: what runs there ends at once, without CNI and without a word to the
//! API. When the node is back, every pod that is bound to it gets a new sandbox, once what is recorded of its old ones
//! was given to CNI DEL, as a container runtime does that has its records on disk.

use super::pod::Start;
use super::sandbox::Sandbox;
use super::{Kubelets, Running, node, uid};
use crate::target::PodRecord;
use anyhow::Context;
use k8s_openapi::api::core::v1::Pod;
use kube::api::{Api, ListParams};
use std::collections::{HashMap, HashSet};
use std::time::Duration;
use tokio::sync::{mpsc, oneshot};
use tracing::{debug, info, warn};

/// Pause before the API is asked again.
const PAUSE: Duration = Duration::from_millis(500);

pub(super) enum Command {
    Off { node: String, done: oneshot::Sender<()> },
    On { node: String, done: oneshot::Sender<()> },
}

/// Cuts and restores the power of nodes.
pub(crate) struct Switch(mpsc::Sender<Command>);

impl Switch {
    /// Cuts the power of a node. Returns when no process of its pods is left.
    pub(crate) async fn off(&self, node: &str) -> anyhow::Result<()> {
        self.send(|done| Command::Off { node: node.to_owned(), done }).await
    }

    /// Starts a node whose network is there again. Returns when the API knows that its pods do not run yet.
    pub(crate) async fn on(&self, node: &str) -> anyhow::Result<()> {
        self.send(|done| Command::On { node: node.to_owned(), done }).await
    }

    async fn send(&self, command: impl FnOnce(oneshot::Sender<()>) -> Command) -> anyhow::Result<()> {
        let (done, answer) = oneshot::channel();
        self.0.send(command(done)).await.ok().context("the kubelets have ended")?;
        answer.await.context("the kubelets have ended")
    }
}

/// Which nodes have no power, and how often each was started again.
pub(super) struct Nodes {
    commands: mpsc::Receiver<Command>,
    /// Who waits until nothing runs there.
    off: HashMap<String, Option<oneshot::Sender<()>>>,
    boots: HashMap<String, u32>,
}

impl Nodes {
    pub(super) fn new() -> (Self, Switch) {
        let (sender, commands) = mpsc::channel(1);
        (Self { commands, off: HashMap::new(), boots: HashMap::new() }, Switch(sender))
    }

    pub(super) async fn next(&mut self) -> Command {
        match self.commands.recv().await {
            Some(command) => command,
            None => std::future::pending().await,
        }
    }

    pub(super) fn is_off(&self, node: &str) -> bool {
        self.off.contains_key(node)
    }

    pub(super) fn boots(&self, node: &str) -> u32 {
        self.boots.get(node).copied().unwrap_or(0)
    }

    /// Tells those who wait for nodes on which nothing runs any more.
    pub(super) fn settle(&mut self, pods: &HashMap<String, Running>) {
        for (node, waiting) in &mut self.off {
            if pods.values().all(|running| running.node != *node)
                && let Some(done) = waiting.take()
            {
                tell(done);
            }
        }
    }
}

fn tell(done: oneshot::Sender<()>) {
    if done.send(()).is_err() {
        debug!("who asked is gone");
    }
}

impl Kubelets {
    pub(super) fn off(&mut self, node: String, done: oneshot::Sender<()>) {
        for running in self.pods.values().filter(|running| running.node == node) {
            running.updates.send_modify(|update| update.cut = true);
        }
        self.power.off.insert(node, Some(done));
        self.power.settle(&self.pods);
    }

    pub(super) async fn on(&mut self, name: String, done: oneshot::Sender<()>) {
        let Some(node) = self.host.state.topology.node(&name).cloned() else { return };
        self.power.off.remove(&name);
        let boot = self.power.boots(&name) + 1;
        self.power.boots.insert(name.clone(), boot);
        let pods: Vec<Pod> = loop {
            let work = async {
                node::register(&self.host.client, &node, boot).await?;
                Api::all(self.host.client.clone()).list(&ListParams::default()).await
            };
            match work.await {
                Ok(list) => break list.items,
                Err(error) => warn!(node = name, %error, "the API is not told that the node is back"),
            }
            tokio::time::sleep(PAUSE).await;
        };
        let here = |pod: &Pod| pod.spec.as_ref().and_then(|spec| spec.node_name.as_deref()) == Some(&name);
        let pods: Vec<Pod> = pods.into_iter().filter(here).collect();
        let known: HashSet<String> = pods.iter().map(uid).collect();
        let mut lost: HashMap<String, Vec<Sandbox>> = HashMap::new();
        for (uid, sandbox) in Sandbox::recorded(&node) {
            lost.entry(uid).or_default().push(sandbox);
        }
        info!(node = name, boot, pods = pods.len(), "started again");
        let mut waiting = Vec::new();
        for pod in pods {
            let (told, answer) = oneshot::channel();
            let lost = lost.remove(&uid(&pod)).unwrap_or_default();
            self.start(pod, Start { lost, told: Some(told), boot });
            waiting.push(answer);
        }
        // What is left belongs to pods that were deleted meanwhile.
        for sandbox in lost.into_values().flatten() {
            self.removals.spawn(async move { sandbox.discard(u32::MAX, None).await });
        }
        for record in PodRecord::all().iter().filter(|record| record.node == name) {
            if !known.contains(&record.uid)
                && let Err(error) = std::fs::remove_file(record.file())
            {
                debug!(%error, "record of a pod that is gone");
            }
        }
        tokio::spawn(async move {
            for answer in waiting {
                // A pod that has done its work, or is nobody's, has nothing to tell.
                if answer.await.is_err() {
                    debug!("a pod that does not start");
                }
            }
            tell(done);
        });
    }
}
