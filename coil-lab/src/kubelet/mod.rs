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
use pod::{Update, Worker};
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
    pods: HashMap<String, watch::Sender<Update>>,
    workers: JoinSet<String>,
}

impl Kubelets {
    /// Registers the nodes.
    pub(crate) async fn register(
        client: Client,
        state: State,
        shutdown: CancellationToken,
    ) -> anyhow::Result<Self> {
        let host = Arc::new(Host { client, state, shutdown });
        for node in &host.state.topology.nodes {
            node::register(&host.client, node).await.with_context(|| format!("node {}", node.name))?;
        }
        Ok(Self { host, pods: HashMap::new(), workers: JoinSet::new() })
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
                    Ok(uid) => { self.pods.remove(&uid); }
                    Err(error) => warn!(%error, "a pod's worker panicked"),
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
        let uid = uid(&pod);
        if let Some(updates) = self.pods.get(&uid) {
            updates.send_replace(Update { pod: Arc::new(pod), gone: false });
            return;
        }
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
        let (sender, receiver) = watch::channel(Update { pod: Arc::new(pod), gone: false });
        self.pods.insert(uid.clone(), sender);
        let worker = Worker::new(self.host.clone(), node, receiver);
        self.workers.spawn(async move {
            worker.run().await;
            uid
        });
    }

    fn gone(&mut self, uid: &str) {
        if let Some(updates) = self.pods.get(uid) {
            updates.send_modify(|update| update.gone = true);
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
