//! One pod, from binding to removal.

use super::Host;
use super::account;
use super::container::{self, Container, Phase, Restart, Setting};
use super::events::{Events, News};
use super::sandbox::{DELETE_ATTEMPTS, FIRST_BACKOFF, LONGEST_BACKOFF, Sandbox, SandboxError};
use super::status::{self, Facts, Part};
use crate::netns::Netns;
use crate::state::write_json;
use crate::target::{ContainerRecord, PodRecord};
use crate::topology::Node;
use k8s_openapi::api::core::v1::{Container as Spec, Pod, PodSpec};
use k8s_openapi::jiff::Timestamp;
use kube::api::{DeleteParams, Patch, PatchParams, Preconditions};
use kube::{Api, Error};
use serde_json::{Value, json};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{Notify, mpsc, oneshot, watch};
use tracing::{Instrument, debug, info, info_span, warn};

/// How long containers get when the whole lab ends, or when the pod's object is gone already.
const SHORT_GRACE: Duration = Duration::from_secs(1);
/// What the watch says of a pod.
#[derive(Clone)]
pub(super) struct Update {
    pub(super) pod: Arc<Pod>,
    /// The object is no more.
    pub(super) gone: bool,
    /// The node has no power: all that runs of the pod ends at once, and nobody tells anybody.
    pub(super) cut: bool,
}

impl Update {
    fn ending(&self) -> bool {
        self.gone || self.pod.metadata.deletion_timestamp.is_some()
    }
}

/// How a worker begins.
#[derive(Default)]
pub(super) struct Start {
    /// How often the node has been started again.
    pub(super) boot: u32,
    /// What the node had of the pod before.
    pub(super) lost: Vec<Sandbox>,
    /// Told once the API knows that nothing of the pod runs yet.
    pub(super) told: Option<oneshot::Sender<()>>,
}

/// Runs one pod.
pub(super) struct Worker {
    host: Arc<Host>,
    node: Node,
    updates: watch::Receiver<Update>,
    events: Events,
    api: Api<Pod>,
    name: String,
    namespace: String,
    uid: String,
    since: Timestamp,
    start: Start,
    /// Restarts of containers that had run before the node was started again, by name.
    restarted: Vec<(String, i32)>,
    sandbox: Option<Sandbox>,
    /// Namespace and addresses of the sandbox; known also after a finished pod has given it back.
    network: Option<(Netns, Vec<IpAddr>)>,
    init: Vec<Container>,
    containers: Vec<Container>,
    changed: Arc<Notify>,
    news: mpsc::UnboundedSender<News>,
    heard: mpsc::UnboundedReceiver<News>,
    published: Option<Value>,
}

impl Worker {
    pub(super) fn new(host: Arc<Host>, node: Node, updates: watch::Receiver<Update>, start: Start) -> Self {
        let pod = updates.borrow().pod.clone();
        let metadata = &pod.metadata;
        let namespace = metadata.namespace.clone().unwrap_or_default();
        let (news, heard) = mpsc::unbounded_channel();
        Self {
            api: Api::namespaced(host.client.clone(), &namespace),
            events: Events::new(host.client.clone(), &node.name),
            name: metadata.name.clone().unwrap_or_default(),
            uid: metadata.uid.clone().unwrap_or_default(),
            namespace,
            host,
            node,
            updates,
            since: Timestamp::now(),
            restarted: if start.boot > 0 { restarted(&pod) } else { Vec::new() },
            start,
            sandbox: None,
            network: None,
            init: Vec::new(),
            containers: Vec::new(),
            changed: Arc::new(Notify::new()),
            news,
            heard,
            published: None,
        }
    }

    pub(super) async fn run(mut self) {
        let span = info_span!("pod", namespace = self.namespace, name = self.name, node = self.node.name);
        let mut power = self.updates.clone();
        let cut = async {
            // Without a sender nobody can say so.
            if power.wait_for(|update| update.cut).await.is_err() {
                std::future::pending::<()>().await;
            }
        };
        async {
            let cut = tokio::select! {
                () = self.whole_life() => false,
                () = cut => true,
            };
            if cut {
                self.power_off().await;
            }
        }
        .instrument(span)
        .await;
    }

    /// Until nothing is left to do.
    async fn whole_life(&mut self) {
        let finished = matches!(
            self.pod().status.as_ref().and_then(|status| status.phase.as_deref()),
            Some("Succeeded" | "Failed")
        );
        if finished {
            self.start.told = None;
        } else {
            self.live().await;
            if !self.ending() {
                // What has done its work gives its network back at once; object and log stay.
                container::kill_pod(&self.uid);
                self.remove_sandbox().await;
                self.publish().await;
            }
        }
        self.wait_for_end().await;
        self.tear_down().await;
    }

    /// Everything ends at once. Records stay as they are: they are what a node finds when it starts again.
    async fn power_off(&mut self) {
        info!("no power");
        let containers: Vec<Container> = self.containers.drain(..).chain(self.init.drain(..)).collect();
        containers.iter().for_each(|container| container.stop(Duration::ZERO));
        for container in containers {
            container.ended().await;
        }
        container::kill_pod(&self.uid);
    }

    fn pod(&self) -> Arc<Pod> {
        self.updates.borrow().pod.clone()
    }

    fn spec(&self) -> PodSpec {
        self.pod().spec.clone().unwrap_or_default()
    }

    fn ending(&self) -> bool {
        self.host.shutdown.is_cancelled() || self.updates.borrow().ending()
    }

    fn restart(&self) -> Restart {
        match self.spec().restart_policy.as_deref() {
            Some("Never") => Restart::Never,
            Some("OnFailure") => Restart::OnFailure,
            _ => Restart::Always,
        }
    }

    /// Sandbox, init containers, containers. Returns when the pod is to end or has done its work.
    async fn live(&mut self) {
        self.publish().await;
        if self.start.told.take().is_some_and(|told| told.send(()).is_err()) {
            debug!("nobody waits for this pod");
        }
        if !self.make_sandbox().await {
            return;
        }
        let spec = self.spec();
        for init in spec.init_containers.iter().flatten() {
            let sidecar = init.restart_policy.as_deref() == Some("Always");
            let restart = match (sidecar, self.restart()) {
                (true, _) => Restart::Always,
                (false, Restart::Never) => Restart::Never,
                (false, _) => Restart::OnFailure,
            };
            let container = self.start(init.clone(), restart);
            self.init.push(container);
            if !self.init_done(sidecar).await {
                return;
            }
        }
        let restart = self.restart();
        for container in spec.containers {
            let container = self.start(container, restart);
            self.containers.push(container);
        }
        loop {
            self.publish().await;
            if self.ending() || self.containers.iter().all(|container| container.view().final_) {
                return;
            }
            self.wait().await;
        }
    }

    async fn make_sandbox(&mut self) -> bool {
        let pod = self.pod();
        if self.spec().host_network == Some(true) {
            self.wired(Sandbox::of_node(&self.node));
            return true;
        }
        let mut backoff = FIRST_BACKOFF;
        for attempt in 0.. {
            if self.ending() {
                return false;
            }
            match self.attempt(&pod, attempt).await {
                Ok(sandbox) => {
                    info!(addresses = ?sandbox.addresses, attempt, "sandbox made");
                    self.wired(sandbox);
                    return true;
                }
                Err(error) => {
                    let message = format!("Failed to create pod sandbox: {:#}", anyhow::Error::new(error));
                    warn!(attempt, message, "no sandbox");
                    self.events.tell(&pod, News::warning("FailedCreatePodSandBox", message)).await;
                }
            }
            tokio::select! {
                () = tokio::time::sleep(backoff) => {}
                () = ending(&mut self.updates) => {}
                () = self.host.shutdown.cancelled() => {}
            }
            backoff = (backoff * 2).min(LONGEST_BACKOFF);
        }
        false
    }

    /// One attempt at a sandbox, once those of before are no more.
    async fn attempt(&mut self, pod: &Pod, attempt: u32) -> Result<Sandbox, SandboxError> {
        while let Some(lost) = self.start.lost.last() {
            lost.delete().await?;
            self.start.lost.pop();
        }
        Sandbox::create(&self.host, &self.node, pod, (self.start.boot, attempt)).await
    }

    fn wired(&mut self, sandbox: Sandbox) {
        self.network = Some((sandbox.netns.clone(), sandbox.addresses.clone()));
        self.sandbox = Some(sandbox);
    }

    fn start(&self, spec: Spec, restart: Restart) -> Container {
        let (netns, addresses) =
            self.network.clone().unwrap_or_else(|| (self.node.netns.clone(), Vec::new()));
        let setting = Setting {
            host: self.host.clone(),
            node: self.node.clone(),
            pod: self.pod(),
            netns,
            addresses,
            changed: self.changed.clone(),
            news: self.news.clone(),
        };
        let before = self.restarted.iter().find(|(name, _)| *name == spec.name);
        let restarts = before.map_or(0, |(_, restarts)| *restarts);
        Container::start(setting, spec, restart, restarts)
    }

    /// Waits for the last init container. False: the pod is to end, or has failed.
    async fn init_done(&mut self, sidecar: bool) -> bool {
        loop {
            self.publish().await;
            if self.ending() {
                return false;
            }
            let Some(view) = self.init.last().map(Container::view) else { return true };
            match view.phase {
                Phase::Ended(ended) if view.final_ => return ended.code == 0,
                Phase::Running { .. } if sidecar && view.started => return true,
                _ => {}
            }
            self.wait().await;
        }
    }

    /// Waits until something has changed.
    async fn wait(&mut self) {
        tokio::select! {
            () = self.changed.notified() => {}
            Some(news) = self.heard.recv() => {
                let pod = self.pod();
                self.events.tell(&pod, news).await;
            }
            changed = self.updates.changed() => {
                if changed.is_err() {
                    debug!("no more updates");
                    self.host.shutdown.cancelled().await;
                }
            }
            () = self.host.shutdown.cancelled() => {}
        }
    }

    /// A pod that has done its work stays until it is deleted.
    async fn wait_for_end(&mut self) {
        tokio::select! {
            () = ending(&mut self.updates) => {}
            () = self.host.shutdown.cancelled() => {}
        }
    }

    async fn tear_down(&mut self) {
        let pod = self.pod();
        let gone = self.updates.borrow().gone;
        let shutdown = self.host.shutdown.clone();
        let grace = if gone || shutdown.is_cancelled() {
            SHORT_GRACE
        } else {
            let seconds = pod.metadata.deletion_grace_period_seconds.unwrap_or(30);
            Duration::from_secs(seconds.try_into().unwrap_or(0))
        };
        info!(gone, grace = grace.as_secs(), "ending");
        let mut cut = false;
        // Containers before init containers: the latter are sidecars, if any still run.
        for containers in [&self.containers, &self.init] {
            containers.iter().for_each(|container| container.stop(grace));
        }
        while self.containers.iter().chain(&self.init).any(|container| !container.stopped()) {
            if !gone {
                self.publish().await;
            }
            tokio::select! {
                () = self.changed.notified() => {}
                () = tokio::time::sleep(Duration::from_millis(100)) => {}
                () = shutdown.cancelled(), if !cut => {
                    cut = true;
                    self.containers.iter().chain(&self.init).for_each(|container| container.stop(SHORT_GRACE));
                }
            }
        }
        container::kill_pod(&self.uid);
        if shutdown.is_cancelled() {
            // `down` removes namespaces and records of all pods at once.
            return;
        }
        self.remove_sandbox().await;
        if !gone {
            self.publish().await;
            self.delete_object().await;
        }
        account::forget(&self.uid);
        // Last, since publishing writes it.
        if let Err(error) = std::fs::remove_file(self.record().file()) {
            debug!(%error, "record");
        }
    }

    async fn remove_sandbox(&mut self) {
        let pod = self.pod();
        for sandbox in std::mem::take(&mut self.start.lost) {
            sandbox.discard(u32::MAX, Some((&mut self.events, &pod))).await;
        }
        if let Some(sandbox) = self.sandbox.take() {
            sandbox.discard(DELETE_ATTEMPTS, Some((&mut self.events, &pod))).await;
        }
    }

    /// The last act of a kubelet: the object goes for good.
    async fn delete_object(&mut self) {
        let parameters = DeleteParams {
            grace_period_seconds: Some(0),
            preconditions: Some(Preconditions { uid: Some(self.uid.clone()), resource_version: None }),
            ..DeleteParams::default()
        };
        loop {
            match self.api.delete(&self.name, &parameters).await {
                Ok(_) => return,
                Err(Error::Api(status)) if matches!(status.code, 404 | 409) => return,
                Err(error) => warn!(%error, "pod object not deleted"),
            }
            tokio::select! {
                () = tokio::time::sleep(Duration::from_secs(1)) => {}
                () = self.host.shutdown.cancelled() => return,
            }
        }
    }

    /// Writes the record, and the status if it has changed.
    async fn publish(&mut self) {
        let record = self.record();
        if self.network.is_some()
            && let Err(error) = write_json(&record.file(), &record)
        {
            warn!(%error, "record of the pod");
        }
        let status = self.status();
        if self.published.as_ref() == Some(&status) || self.host.shutdown.is_cancelled() {
            return;
        }
        let patch = json!({ "metadata": { "uid": self.uid }, "status": status });
        match self.api.patch_status(&self.name, &PatchParams::default(), &Patch::Merge(&patch)).await {
            Ok(_) => self.published = Some(status),
            Err(Error::Api(answer)) if matches!(answer.code, 404 | 409) => {
                debug!(code = answer.code, "status of a pod that is gone");
            }
            Err(error) => {
                warn!(%error, "status not written");
                let changed = self.changed.clone();
                tokio::spawn(async move {
                    tokio::time::sleep(Duration::from_millis(500)).await;
                    changed.notify_one();
                });
            }
        }
    }

    fn status(&self) -> Value {
        let pod = self.pod();
        let spec = pod.spec.clone().unwrap_or_default();
        // What we have published last is newer than what the watch has brought.
        let conditions: Vec<Value> = match &self.published {
            Some(status) => status["conditions"].as_array().cloned().unwrap_or_default(),
            None => pod
                .status
                .iter()
                .flat_map(|status| status.conditions.iter().flatten())
                .filter_map(|condition| serde_json::to_value(condition).ok())
                .collect(),
        };
        let host_addresses: Vec<IpAddr> = self.node.addresses.iter().map(ipnet::IpNet::addr).collect();
        let init_specs = spec.init_containers.unwrap_or_default();
        status::status(&Facts {
            uid: &self.uid,
            conditions: &conditions,
            now: Timestamp::now(),
            since: self.since,
            host_addresses: &host_addresses,
            addresses: self.network.as_ref().map_or(&[], |(_, addresses)| addresses),
            sandbox: self.sandbox.is_some(),
            init: parts(&init_specs, &self.init),
            containers: parts(&spec.containers, &self.containers),
            restart: self.restart(),
            ending: self.ending(),
        })
    }

    fn record(&self) -> PodRecord {
        let (netns, addresses) =
            self.network.clone().unwrap_or_else(|| (self.node.netns.clone(), Vec::new()));
        PodRecord {
            namespace: self.namespace.clone(),
            name: self.name.clone(),
            uid: self.uid.clone(),
            node: self.node.name.clone(),
            netns,
            host_network: self.spec().host_network == Some(true),
            addresses,
            containers: self
                .containers
                .iter()
                .chain(&self.init)
                .map(|container| ContainerRecord {
                    name: container.name.clone(),
                    pid: container.view().pid,
                    log: container.log.clone(),
                })
                .collect(),
        }
    }
}

/// Containers that have run, each restarted once more.
fn restarted(pod: &Pod) -> Vec<(String, i32)> {
    let status = pod.status.clone().unwrap_or_default();
    let lists = [status.container_statuses, status.init_container_statuses];
    let ran = lists.into_iter().flatten().flatten().filter(|container| container.container_id.is_some());
    ran.map(|container| (container.name, container.restart_count + 1)).collect()
}

fn parts<'a>(specs: &'a [Spec], running: &'a [Container]) -> Vec<Part<'a>> {
    specs
        .iter()
        .map(|spec| {
            let container = running.iter().find(|container| container.name == spec.name);
            Part {
                name: &spec.name,
                image: container
                    .map_or(spec.image.as_deref().unwrap_or_default(), |container| &container.image),
                view: container.map(Container::view),
            }
        })
        .collect()
}

async fn ending(updates: &mut watch::Receiver<Update>) {
    if updates.wait_for(Update::ending).await.is_err() {
        debug!("no more updates");
    }
}
