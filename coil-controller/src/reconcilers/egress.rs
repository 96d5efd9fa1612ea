//! The reconciler of Egress: validates, brings the children up to date, writes the status.

use std::collections::HashMap;
use std::error::Error;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use coil_api::egress::validate;
use coil_api::violation::describe;
use coil_api::{Egress, EgressStatus, conditions, names};
use coil_runtime::clock::Clock;
use coil_runtime::patience;
use coil_runtime::tasks::Drain;
use futures::StreamExt;
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::{ObjectReference, Service};
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, ObjectMeta};
use kube::api::{Patch, PatchParams};
use kube::core::DeserializeGuard;
use kube::runtime::controller::{self, Action, Controller};
use kube::runtime::events::{Event, EventType, Recorder};
use kube::runtime::watcher;
use kube::{Api, Client, Resource, ResourceExt};
use prometheus::Registry;

use super::apply;
use super::bindings::Bindings;
use crate::error::{Class, ReconcileError, chain, delay};
use crate::metrics::{EgressCollector, Ended, ReconcileMetrics, Writes};
use crate::plan::egress::{Observed, Outcome, Settings, Written, plan, status};

/// Objects that nothing wakes up are looked at again after this time.
const RESYNC: Duration = Duration::from_secs(900);
/// Events within this time lead to one reconciliation.
const SETTLE: Duration = Duration::from_millis(50);
const CONCURRENCY: u16 = 8;
/// Most objects whose failures are remembered.
const MOST_FAILURES: usize = 65_536;

/// What reconciliations share.
pub(crate) struct Context {
    pub(crate) client: Client,
    pub(crate) settings: Settings,
    pub(crate) clock: Arc<dyn Clock>,
    pub(crate) recorder: Recorder,
    pub(crate) bindings: Arc<Bindings>,
    pub(crate) metrics: ReconcileMetrics,
    pub(crate) writes: Writes,
    pub(crate) memory: Mutex<Memory>,
}

/// What is remembered between reconciliations; all of it can be lost.
#[derive(Default)]
pub(crate) struct Memory {
    written: Written,
    /// Failures in a row, by UID.
    failures: HashMap<String, u32>,
}

impl Context {
    fn memory(&self) -> MutexGuard<'_, Memory> {
        self.memory.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Reconciles until drained.
pub(crate) async fn run(context: Arc<Context>, registry: &Registry, drain: Drain) -> prometheus::Result<()> {
    let client = context.client.clone();
    let ours = watcher::Config::default().labels(&format!(
        "{}={},{}={}",
        names::LABEL_APP_NAME,
        names::APP_NAME,
        names::LABEL_APP_COMPONENT,
        names::COMPONENT_EGRESS,
    ));
    let controller =
        Controller::new(Api::<DeserializeGuard<Egress>>::all(client.clone()), watcher::Config::default());
    registry.register(Box::new(EgressCollector::new(controller.store())?))?;
    controller
        .owns(Api::<Deployment>::all(client.clone()), ours.clone())
        .owns(Api::<Service>::all(client.clone()), ours.clone())
        .owns(Api::<PodDisruptionBudget>::all(client), ours)
        .reconcile_all_on(context.bindings.changes())
        .trigger_backoff(patience::backoff())
        .with_config(controller::Config::default().debounce(SETTLE).concurrency(CONCURRENCY))
        .graceful_shutdown_on(drain.cancelled_owned())
        .run(reconcile, error_policy, context)
        .for_each(|result| async move {
            match result {
                // The object went while it waited for its turn.
                Ok(_) | Err(controller::Error::ObjectNotFound(_)) => {}
                // Reported where it happened.
                Err(controller::Error::ReconcilerFailed(..)) => {}
                Err(error) => tracing::warn!(error = &error as &dyn Error, "a watch failed; it starts again"),
            }
        })
        .await;
    Ok(())
}

async fn reconcile(
    guarded: Arc<DeserializeGuard<Egress>>,
    context: Arc<Context>,
) -> Result<Action, ReconcileError> {
    let egress = match &guarded.0 {
        Ok(egress) => egress,
        Err(invalid) => {
            context.metrics.unreadable();
            let error = ReconcileError::Unreadable(invalid.error.clone());
            let name = invalid.metadata.name.as_deref().unwrap_or_default();
            let namespace = invalid.metadata.namespace.as_deref().unwrap_or_default();
            tracing::warn!(namespace, name, error = chain(&error), "skipping an Egress");
            let regarding = reference(&invalid.metadata);
            publish(&context, &regarding, EventType::Warning, "Unreadable", "Read", chain(&error)).await;
            return Ok(Action::await_change());
        }
    };
    let namespace = egress.namespace().unwrap_or_default();
    let name = egress.name_any();
    if egress.metadata.deletion_timestamp.is_some() {
        // Children go with it by garbage collection.
        return Ok(Action::await_change());
    }
    context.metrics.started();
    let start = Instant::now();
    let result = reconcile_one(egress, &namespace, &name, &context).await;
    let ended = match &result {
        Ok(true) => Ended::Success,
        Ok(false) => Ended::Invalid,
        Err(error) if error.is_conflict() => Ended::Conflict,
        Err(error) => Ended::Error(error.label()),
    };
    context.metrics.ended(ended, start.elapsed());
    if let Err(error) = &result {
        if error.is_conflict() {
            tracing::debug!(namespace, egress = name, error = chain(error), "lost a race; trying again");
        } else {
            tracing::warn!(namespace, egress = name, class = ?error.class(), error = chain(error), "cannot reconcile");
        }
    }
    result?;
    context.memory().failures.remove(egress.metadata.uid.as_deref().unwrap_or_default());
    Ok(Action::requeue(RESYNC))
}

/// Returns whether the specification is valid.
async fn reconcile_one(
    egress: &Egress,
    namespace: &str,
    name: &str,
    context: &Context,
) -> Result<bool, ReconcileError> {
    let violations = validate(egress, None);
    let valid = violations.is_empty();
    let observed = apply::observe(&context.client, namespace, name).await;
    let (outcome, deployment, error) = match observed {
        Ok(observed) if !valid => (Outcome::Invalid(violations), observed.deployment, None),
        Ok(observed) => {
            let deployment = observed.deployment.clone();
            match update_children(egress, namespace, name, &observed, context).await {
                Ok(()) => (Outcome::Done, deployment, None),
                Err(error) => (failed(&error), deployment, Some(error)),
            }
        }
        // Nothing is known of the children, so the status has nothing new to say of them.
        Err(error) => return Err(error),
    };
    if error.as_ref().is_some_and(ReconcileError::is_conflict) {
        return Err(error.unwrap_or_else(|| ReconcileError::Unreadable(String::new())));
    }
    write_status(egress, namespace, name, &outcome, deployment.as_ref(), context).await?;
    error.map_or(Ok(valid), Err)
}

fn failed(error: &ReconcileError) -> Outcome {
    Outcome::Failed { reason: error.reason(), message: chain(error) }
}

async fn update_children(
    egress: &Egress,
    namespace: &str,
    name: &str,
    observed: &Observed,
    context: &Context,
) -> Result<(), ReconcileError> {
    if let Some(done) = apply::ensure_service_account(&context.client, namespace).await? {
        report(egress, context, done).await;
    }
    context.bindings.sync(Some(namespace)).await?;
    let writes = plan(egress, &context.settings, observed, &context.memory().written.clone())?;
    for write in writes {
        let done = apply::carry_out(&context.client, namespace, name, write).await?;
        report(egress, context, done).await;
    }
    Ok(())
}

/// Remembers, counts and tells what was done.
async fn report(egress: &Egress, context: &Context, done: apply::Done) {
    if let Some((metadata, digest)) = &done.answer {
        context.memory().written.note(metadata, *digest);
    }
    context.writes.wrote(done.kind, done.operation);
    let namespace = egress.namespace().unwrap_or_default();
    tracing::info!(
        namespace,
        egress = egress.name_any(),
        kind = done.kind,
        operation = done.operation,
        "wrote"
    );
    let (reason, verb) = match done.operation {
        "create" => ("Created", "created"),
        "delete" => ("Deleted", "deleted"),
        // Updates are too many to tell.
        _ => return,
    };
    let note = format!("{verb} {} {}", done.kind, done.name);
    publish(context, &egress.object_ref(&()), EventType::Normal, reason, "Reconcile", note).await;
}

async fn write_status(
    egress: &Egress,
    namespace: &str,
    name: &str,
    outcome: &Outcome,
    deployment: Option<&Deployment>,
    context: &Context,
) -> Result<(), ReconcileError> {
    let old = egress.status.clone().unwrap_or_default();
    let new = status(egress, outcome, deployment, context.clock.now_time());
    tell_about_conditions(egress, &old, &new, outcome, context).await;
    if new == old {
        return Ok(());
    }
    // The count of clients is written by another part; a patch without it leaves it alone.
    let patch = serde_json::json!({ "status": EgressStatus { clients: None, ..new } });
    let api = Api::<Egress>::namespaced(context.client.clone(), namespace);
    let parameters =
        PatchParams { field_manager: Some(apply::FIELD_MANAGER.to_owned()), ..PatchParams::default() };
    match api.patch_status(name, &parameters, &Patch::Merge(&patch)).await {
        Ok(_) => Ok(()),
        // Deleted in the meantime.
        Err(kube::Error::Api(status)) if status.code == 404 => Ok(()),
        Err(error) => {
            Err(ReconcileError::api("update status of", "Egress", &format!("{namespace}/{name}"))(error))
        }
    }
}

/// Events for conditions that say something new. Errors that will likely go away only show as condition.
async fn tell_about_conditions(
    egress: &Egress,
    old: &EgressStatus,
    new: &EgressStatus,
    outcome: &Outcome,
    context: &Context,
) {
    let regarding = egress.object_ref(&());
    let news = |kind: &str| {
        let find = |list: &[Condition]| {
            list.iter().find(|c| c.type_ == kind).map(|c| (c.status.clone(), c.message.clone()))
        };
        let now = find(&new.conditions);
        (find(&old.conditions) != now).then_some(now).flatten()
    };
    match outcome {
        Outcome::Invalid(violations) => {
            if news(conditions::VALID).is_some() {
                let note = describe(violations);
                publish(
                    context,
                    &regarding,
                    EventType::Warning,
                    conditions::REASON_INVALID_SPEC,
                    "Validate",
                    note,
                )
                .await;
            }
        }
        Outcome::Failed { reason, message } => {
            let passing = [conditions::REASON_API_ERROR, conditions::REASON_DELETING].contains(reason);
            if !passing && news(conditions::RECONCILED).is_some() {
                publish(context, &regarding, EventType::Warning, reason, "Reconcile", message.clone()).await;
            }
        }
        Outcome::Done => {
            let was_bad = |kind: &str| old.conditions.iter().any(|c| c.type_ == kind && c.status == "False");
            if was_bad(conditions::VALID) || was_bad(conditions::RECONCILED) {
                let note = "all objects of this Egress are up to date again".to_owned();
                publish(
                    context,
                    &regarding,
                    EventType::Normal,
                    conditions::REASON_UP_TO_DATE,
                    "Reconcile",
                    note,
                )
                .await;
            }
        }
    }
}

/// An Event that cannot be written stops nothing.
async fn publish(
    context: &Context,
    regarding: &ObjectReference,
    type_: EventType,
    reason: &str,
    action: &str,
    mut note: String,
) {
    // The API allows less than 1024 bytes.
    if note.len() > 1000 {
        let end = (0..=1000).rev().find(|&i| note.is_char_boundary(i)).unwrap_or(0);
        note.truncate(end);
        note.push('…');
    }
    let event = Event {
        type_,
        reason: reason.to_owned(),
        note: Some(note),
        action: action.to_owned(),
        secondary: None,
    };
    if let Err(error) = context.recorder.publish(&event, regarding).await {
        tracing::debug!(error = &error as &dyn Error, reason, "cannot write an Event");
    }
}

fn reference(metadata: &ObjectMeta) -> ObjectReference {
    ObjectReference {
        api_version: Some(Egress::api_version(&()).into_owned()),
        kind: Some(Egress::kind(&()).into_owned()),
        namespace: metadata.namespace.clone(),
        name: metadata.name.clone(),
        uid: metadata.uid.clone(),
        ..ObjectReference::default()
    }
}

#[expect(clippy::needless_pass_by_value, reason = "signature of kube's Controller")]
fn error_policy(
    guarded: Arc<DeserializeGuard<Egress>>,
    error: &ReconcileError,
    context: Arc<Context>,
) -> Action {
    if error.is_conflict() {
        return Action::requeue(Duration::from_millis(100));
    }
    let uid = guarded.meta().uid.clone().unwrap_or_default();
    let mut memory = context.memory();
    // Objects that are gone are not told to us; who fails again starts again.
    if memory.failures.len() >= MOST_FAILURES {
        memory.failures.clear();
    }
    let failures = memory.failures.entry(uid).or_default();
    *failures = failures.saturating_add(1);
    let class: Class = error.class();
    Action::requeue(delay(class, *failures))
}
