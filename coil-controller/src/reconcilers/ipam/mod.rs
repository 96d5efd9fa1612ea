//! Address pools: answers requests for blocks, releases pools that were deleted, collects the blocks of
//! nodes that are gone.
//!
//! One task follows the watches, keeps the picture of the cluster, and starts what the changes call for;
//! whatever fails is logged, counted and tried again. Nothing is done before all first lists are complete.

mod fresh;
mod node;
mod pool;
mod queue;
mod request;
mod watches;

use std::collections::HashMap;
use std::error::Error;
use std::fmt::Debug;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use coil_api::BlockRequest;
use coil_runtime::clock::Clock;
use coil_runtime::tasks::Drain;
use futures::StreamExt;
use futures::stream::FuturesUnordered;
use k8s_openapi::api::core::v1::ObjectReference;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::api::{Patch, PatchParams};
use kube::runtime::events::{Event, EventType, Recorder};
use kube::{Api, Client, Resource};
use serde::de::DeserializeOwned;
use serde_json::json;

use super::apply::FIELD_MANAGER;
use super::bindings::sleep_until;
use crate::error::{ReconcileError, chain};
use crate::metrics::{Ended, IpamMetrics, ReconcileMetrics};
use crate::plan::ipam::{Book, Nodes};
pub(crate) use fresh::Fresh;
use queue::Queue;
pub(crate) use watches::Watches;

/// Requests to the API server under way at the same time, roughly.
const CONCURRENCY: usize = 32;

/// What can be set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IpamSettings {
    /// Time that a node must be missing before its blocks are collected.
    pub node_grace_period: Duration,
    /// Time between looks at everything, in case something was missed.
    pub gc_interval: Duration,
}

/// What all parts share.
pub(crate) struct Context {
    pub(crate) client: Client,
    pub(crate) recorder: Recorder,
    pub(crate) clock: Arc<dyn Clock>,
    pub(crate) settings: IpamSettings,
    pub(crate) metrics: IpamMetrics,
    pub(crate) reconciles: Reconciles,
    pub(crate) picture: Arc<Mutex<Picture>>,
    pub(crate) fresh: Fresh,
}

/// Counts of reconciliations, for each part.
pub(crate) struct Reconciles {
    pub(crate) pools: ReconcileMetrics,
    pub(crate) requests: ReconcileMetrics,
    pub(crate) nodes: ReconcileMetrics,
}

/// What is known of the cluster.
#[derive(Default)]
pub(crate) struct Picture {
    pub(crate) book: Book,
    pub(crate) nodes: Nodes,
    /// Requests that nobody has answered, by name.
    requests: HashMap<String, Arc<BlockRequest>>,
    /// What was last told of a pool in an Event, and when.
    told: HashMap<String, (String, Instant)>,
    lists: watches::Lists,
}

/// Something to do.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Work {
    Pool(String),
    Request(String),
    Node(String),
}

/// What follows from work that succeeded.
#[derive(Debug, Default)]
struct Next {
    /// Do it again after this time.
    again: Option<Duration>,
    /// Look at these pools.
    pools: Vec<String>,
    /// Nothing could be done: the specification is at fault.
    invalid: bool,
}

impl Context {
    fn picture(&self) -> MutexGuard<'_, Picture> {
        self.picture.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn reconciles(&self, work: &Work) -> &ReconcileMetrics {
        match work {
            Work::Pool(_) => &self.reconciles.pools,
            Work::Request(_) => &self.reconciles.requests,
            Work::Node(_) => &self.reconciles.nodes,
        }
    }

    /// An Event that cannot be written stops nothing.
    async fn publish(&self, metadata: &ObjectMeta, type_: EventType, reason: &str, note: String) {
        let regarding = ObjectReference {
            api_version: Some(coil_api::AddressPool::api_version(&()).into_owned()),
            kind: Some(coil_api::AddressPool::kind(&()).into_owned()),
            name: metadata.name.clone(),
            uid: metadata.uid.clone(),
            ..ObjectReference::default()
        };
        // The API allows less than 1024 bytes.
        let note: String = note.chars().take(250).collect();
        let (reason, action) = (reason.to_owned(), "Allocate".to_owned());
        let event = Event { type_, reason, note: Some(note), action, secondary: None };
        if let Err(error) = self.recorder.publish(&event, &regarding).await {
            tracing::debug!(error = &error as &dyn Error, "cannot write an Event");
        }
    }
}

/// Works until drained, then ends what it has begun.
pub(crate) async fn run(context: Arc<Context>, Watches(mut watches): Watches, drain: Drain) {
    let mut queue = Queue::default();
    let mut running = FuturesUnordered::new();
    let mut full_look = tokio::time::interval(context.settings.gc_interval.max(Duration::from_secs(1)));
    full_look.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        let may_start = running.len() < CONCURRENCY && context.picture().lists.are_whole();
        let due = queue.next_due();
        tokio::select! {
            () = drain.cancelled() => break,
            Some(event) = watches.next() => match event {
                Ok(event) => watches::follow(&context, event, &mut queue),
                Err(error) => {
                    tracing::warn!(error = &error as &dyn Error, "a watch of address pools failed; it starts again");
                }
            },
            Some((work, result)) = running.next(), if !running.is_empty() => settle(&work, result, &mut queue),
            () = sleep_until(due), if may_start => {
                if let Some(work) = queue.take(tokio::time::Instant::now()) {
                    running.push(carry_out(context.clone(), work));
                }
            }
            _ = full_look.tick() => watches::look_at_everything(&context, &mut queue),
        }
    }
    while running.next().await.is_some() {}
}

async fn carry_out(context: Arc<Context>, work: Work) -> (Work, Result<Next, ReconcileError>) {
    let metrics = context.reconciles(&work);
    metrics.started();
    let start = Instant::now();
    let result = match &work {
        Work::Pool(name) => pool::reconcile(&context, name).await,
        Work::Request(name) => request::reconcile(&context, name).await,
        Work::Node(name) => node::reconcile(&context, name).await,
    };
    let ended = match &result {
        Ok(next) if next.invalid => Ended::Invalid,
        Ok(_) => Ended::Success,
        Err(error) if error.is_conflict() => Ended::Conflict,
        Err(error) => Ended::Error(error.label()),
    };
    metrics.ended(ended, start.elapsed());
    (work, result)
}

fn settle(work: &Work, result: Result<Next, ReconcileError>, queue: &mut Queue<Work>) {
    let now = tokio::time::Instant::now();
    match result {
        Ok(next) => {
            queue.done(work);
            if let Some(again) = next.again {
                queue.push(work.clone(), now + again);
            }
            for pool in next.pools {
                queue.push(Work::Pool(pool), now);
            }
        }
        Err(error) => {
            let wait = queue.failed(work, error.class(), now);
            let (retry_seconds, chain) = (wait.as_secs_f64(), chain(&error));
            if error.is_conflict() {
                tracing::debug!(?work, error = chain, retry_seconds, "lost a race; trying again");
            } else {
                tracing::warn!(?work, error = chain, retry_seconds, "cannot carry out; trying again");
            }
        }
    }
}

/// Sets the finalizers of a cluster-wide object, provided that nobody has changed it since it was read.
async fn set_finalizers<K>(
    client: &Client,
    kind: &'static str,
    metadata: &ObjectMeta,
    finalizers: &[String],
) -> Result<ObjectMeta, ReconcileError>
where
    K: Resource<DynamicType = (), Scope = kube::core::ClusterResourceScope>
        + Clone
        + DeserializeOwned
        + Debug,
{
    let name = metadata.name.as_deref().unwrap_or_default();
    let patch = json!({ "metadata": {
        "uid": metadata.uid, "resourceVersion": metadata.resource_version, "finalizers": finalizers,
    } });
    let parameters = PatchParams { field_manager: Some(FIELD_MANAGER.to_owned()), ..PatchParams::default() };
    let api = Api::<K>::all(client.clone());
    let answer = api.patch_metadata(name, &parameters, &Patch::Merge(&patch)).await;
    answer.map(|object| object.metadata).map_err(ReconcileError::api("update finalizers of", kind, name))
}
