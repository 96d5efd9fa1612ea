//! A stand-in for the kubelet of every lab node: registers the nodes, and for each pod bound to one of them makes the
//! sandbox, runs the containers that have something to run, probes them, and reports status.
//!
//! A container runs as a plain process in the pod's network namespace if its image is [`COIL_IMAGE`] or its pod carries
//! the annotation [`RUN_ANNOTATION`]. Any other container has no process and counts as running: there are no images
//! here. A pod with the annotation [`MIRROR_ANNOTATION`] is somebody else's business. Volumes, users, limits, hooks at a start and `kubectl exec` do not exist either.

mod account;
mod container;
mod environment;
mod events;
mod node;
mod pod;
mod power;
mod probe;
mod sandbox;
mod status;

use crate::state::State;
use crate::target::PodRecord;
use anyhow::Context;
use futures::StreamExt;
use k8s_openapi::api::core::v1::Pod;
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Api, Client};
pub(crate) use power::Switch;

use pod::{Start, Update, Worker};
use power::{Command, Nodes};
use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

/// Image name of everything that Coil runs in the lab.
pub const COIL_IMAGE: &str = "coil:lab";
/// A pod with this annotation set to `true` has its commands run as processes.
pub const RUN_ANNOTATION: &str = "lab.coil.cybozu.com/run";
/// A pod with this annotation is run by somebody who tells the API about it: it is left alone, as a kubelet does.
pub const MIRROR_ANNOTATION: &str = "kubernetes.io/config.mirror";
/// Environment variable of every process of a pod; its value is the pod's UID.
const POD_MARKER: &str = "COIL_LAB_POD";

/// What all pods share.
pub(crate) struct Host {
    /// The API.
    pub(crate) client: Client,
    /// The lab.
    pub(crate) state: State,
    /// Cancelled when the lab ends.
    pub(crate) shutdown: CancellationToken,
}

/// The kubelets of all nodes.
pub(crate) struct Kubelets {
    host: Arc<Host>,
    pods: HashMap<String, Running>,
    workers: JoinSet<String>,
    /// Ends of sandboxes whose pods are no more.
    removals: JoinSet<()>,
    power: Nodes,
}

/// A pod's worker.
struct Running {
    node: String,
    updates: watch::Sender<Update>,
}

impl Kubelets {
    /// Registers the nodes.
    pub(crate) async fn register(
        client: Client,
        state: State,
        shutdown: CancellationToken,
    ) -> anyhow::Result<(Self, Switch)> {
        let host = Arc::new(Host { client, state, shutdown });
        for node in &host.state.topology.nodes {
            node::register(&host.client, node, 0).await.with_context(|| format!("node {}", node.name))?;
        }
        let (power, switch) = Nodes::new();
        let (workers, removals) = (JoinSet::new(), JoinSet::new());
        Ok((Self { host, pods: HashMap::new(), workers, removals, power }, switch))
    }

    /// Runs pods until the lab ends; then ends them all.
    pub(crate) async fn run(mut self) -> anyhow::Result<()> {
        let host = self.host.clone();
        let heartbeats =
            tokio::spawn(node::heartbeats(host.client.clone(), host.state.topology.nodes.clone()));
        let pods: Api<Pod> = Api::all(host.client.clone());
        let mut events = watcher(pods, watcher::Config::default()).default_backoff().boxed();
        let mut listed = Vec::new();
        loop {
            tokio::select! {
                event = events.next() => match event.context("the watch of pods ended")? {
                    Ok(watcher::Event::Apply(pod)) => self.apply(pod),
                    Ok(watcher::Event::Delete(pod)) => self.gone(&uid(&pod)),
                    Ok(watcher::Event::Init) => listed.clear(),
                    Ok(watcher::Event::InitApply(pod)) => {
                        listed.push(uid(&pod));
                        self.apply(pod);
                    }
                    Ok(watcher::Event::InitDone) => {
                        let lost: Vec<String> =
                            self.pods.keys().filter(|uid| !listed.contains(uid)).cloned().collect();
                        lost.iter().for_each(|uid| self.gone(uid));
                    }
                    Err(error) => warn!(%error, "watch of pods"),
                },
                Some(ended) = self.workers.join_next() => match ended {
                    Ok(uid) => {
                        self.pods.remove(&uid);
                        self.power.settle(&self.pods);
                    }
                    Err(error) => warn!(%error, "a pod's worker panicked"),
                },
                Some(ended) = self.removals.join_next() => if let Err(error) = ended {
                    warn!(%error, "removal of a sandbox");
                },
                command = self.power.next() => match command {
                    Command::Off { node, done } => self.off(node, done),
                    Command::On { node, done } => tokio::select! {
                        () = self.on(node, done) => {}
                        () = host.shutdown.cancelled() => break,
                    },
                },
                () = host.shutdown.cancelled() => break,
            }
        }
        heartbeats.abort();
        info!(pods = self.pods.len(), "ending all pods");
        let all = async { while self.workers.join_next().await.is_some() {} };
        if tokio::time::timeout(Duration::from_secs(3), all).await.is_err() {
            warn!("some pods did not end in time");
        }
        Ok(())
    }

    fn apply(&mut self, pod: Pod) {
        if let Some(running) = self.pods.get(&uid(&pod)) {
            let pod = Arc::new(pod);
            running.updates.send_modify(|update| (update.pod, update.gone) = (pod, false));
            return;
        }
        self.start(pod, Start::default());
    }

    /// Starts a pod, unless it is not for us to do.
    fn start(&mut self, pod: Pod, start: Start) {
        if pod.metadata.annotations.as_ref().is_some_and(|all| all.contains_key(MIRROR_ANNOTATION)) {
            return;
        }
        let Some(node) = pod
            .spec
            .as_ref()
            .and_then(|spec| spec.node_name.as_deref())
            .and_then(|name| self.host.state.topology.node(name))
            .cloned()
        else {
            return;
        };
        // When it is started again, all its pods are.
        if self.power.is_off(&node.name) {
            return;
        }
        let uid = uid(&pod);
        let (updates, receiver) = watch::channel(Update { pod: Arc::new(pod), gone: false, cut: false });
        self.pods.insert(uid.clone(), Running { node: node.name.clone(), updates });
        let start = Start { boot: self.power.boots(&node.name), ..start };
        let worker = Worker::new(self.host.clone(), node, receiver, start);
        self.workers.spawn(async move {
            worker.run().await;
            uid
        });
    }

    fn gone(&mut self, uid: &str) {
        if let Some(running) = self.pods.get(uid) {
            running.updates.send_modify(|update| update.gone = true);
        }
    }
}

/// Finds the log file of a container, for `kubectl logs`.
pub(crate) fn log_file(uid: &str, container: Option<&str>) -> Option<PathBuf> {
    let record = PodRecord::all().into_iter().find(|record| record.uid == uid)?;
    let mut containers = record.containers.into_iter();
    let found = match container {
        Some(name) => containers.find(|container| container.name == name),
        None => containers.next(),
    };
    found.map(|container| container.log)
}

fn uid(pod: &Pod) -> String {
    pod.metadata.uid.clone().unwrap_or_default()
}
