//! What a cluster's controller manager and scheduler do, as far as the lab needs it, in-process on the embedded API
//! server.
//!
//! Each controller is level-triggered: a pass looks at all objects of its kinds and does what is missing; a pass runs
//! when one of those kinds changed. With the few objects of a lab that is simple and fast enough. On a real API server
//! without `kube-controller-manager` the same passes run through its API (`remote`).

mod backend;
mod daemonset;
mod deployment;
mod endpoints;
mod gc;
mod names;
mod namespace;
mod pdb;
mod pods;
mod remote;
mod replicaset;
mod scheduler;

use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::task::JoinSet;

use backend::Backend;

use crate::api::delete::DeleteOptions;
use crate::api::registry::Resource;
use crate::api::selector::Labels;
use crate::api::write::Part;
use crate::api::{ApiResult, ApiServer, obj};

/// Pause before a pass, in which changes gather.
const GATHER: Duration = Duration::from_millis(10);
/// Pause after a failed pass.
const RETRY: Duration = Duration::from_millis(500);
/// A pass runs at least this often.
const RESYNC: Duration = Duration::from_secs(30);

/// A pass of a controller. Returns when it wants to run again, if time matters to it.
type Pass = fn(&Cluster) -> ApiResult<Option<Duration>>;

/// Name, pass, resources that trigger it (all when empty).
const CONTROLLERS: &[(&str, Pass, &[(&str, &str)])] = &[
    ("namespace-controller", namespace::pass, &[]),
    ("serviceaccount-controller", namespace::accounts, &[("", "namespaces"), ("", "serviceaccounts")]),
    ("garbage-collector", gc::pass, &[]),
    (
        "deployment-controller",
        deployment::pass,
        &[("apps", "deployments"), ("apps", "replicasets"), ("", "pods")],
    ),
    ("replicaset-controller", replicaset::pass, &[("apps", "replicasets"), ("", "pods")]),
    ("daemonset-controller", daemonset::pass, &[("apps", "daemonsets"), ("", "nodes"), ("", "pods")]),
    ("endpointslice-controller", endpoints::pass, &[("", "services"), ("", "pods"), ("", "nodes")]),
    ("disruption-controller", pdb::pass, &[("policy", "poddisruptionbudgets"), ("", "pods")]),
    (SCHEDULER, scheduler::pass, &[("", "pods"), ("", "nodes")]),
];

const SCHEDULER: &str = "default-scheduler";

/// Which of the controllers something else runs already.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Elsewhere {
    /// All but the scheduler: a `kube-controller-manager`.
    pub manager: bool,
    /// The scheduler.
    pub scheduler: bool,
}

impl Elsewhere {
    /// A cluster that lacks nothing.
    pub const ALL: Self = Self { manager: true, scheduler: true };
    /// A bare API server.
    pub const NONE: Self = Self { manager: false, scheduler: false };

    fn runs(self, name: &str) -> bool {
        if name == SCHEDULER { self.scheduler } else { self.manager }
    }
}

/// Starts all controllers; they end when the server stops. The set ends early only if a controller panicked.
pub fn start(server: &Arc<ApiServer>) -> JoinSet<()> {
    let mut tasks = JoinSet::new();
    for &(name, pass, kinds) in CONTROLLERS {
        let cluster = Cluster { backend: server.clone(), name };
        tasks.spawn(run(cluster, server.clone(), pass, kinds));
    }
    tasks
}

/// Starts the controllers that an API server lacks. They end with the set.
pub fn start_remote(client: kube::Client, elsewhere: Elsewhere) -> JoinSet<()> {
    let mut tasks = JoinSet::new();
    let backend = Arc::new(remote::Remote::new(client));
    for &(name, pass, _) in CONTROLLERS.iter().filter(|(name, ..)| !elsewhere.runs(name)) {
        tasks.spawn(remote::run(Cluster { backend: backend.clone(), name }, pass));
    }
    tasks
}

async fn run(
    cluster: Cluster,
    server: Arc<ApiServer>,
    pass: Pass,
    kinds: &'static [(&'static str, &'static str)],
) {
    let stopped = server.stopped();
    let mut ticks: Vec<tokio::sync::watch::Receiver<u64>> = kinds
        .iter()
        .filter_map(|(group, plural)| cluster.resource(group, plural).ok())
        .map(|resource| server.store.subscribe(&resource.storage))
        .collect();
    if ticks.is_empty() {
        ticks.push(server.store.subscribe_all());
    }
    loop {
        for tick in &mut ticks {
            tick.mark_unchanged();
        }
        let wait = match pass(&cluster) {
            Ok(again) => again.unwrap_or(RESYNC).min(RESYNC),
            Err(error) => {
                tracing::warn!(controller = cluster.name, %error, "a pass failed, trying again");
                RETRY
            }
        };
        let changed = futures::future::select_all(ticks.iter_mut().map(|tick| Box::pin(tick.changed())));
        tokio::select! {
            _ = changed => {}
            () = tokio::time::sleep(wait) => {}
            () = stopped.cancelled() => return,
        }
        tokio::select! {
            () = tokio::time::sleep(GATHER) => {}
            () = stopped.cancelled() => return,
        }
    }
}

/// The cluster as one controller sees it.
struct Cluster {
    backend: Arc<dyn Backend>,
    name: &'static str,
}

impl Cluster {
    fn resource(&self, group: &str, plural: &str) -> ApiResult<Arc<Resource>> {
        self.backend.resource(group, plural)
    }

    /// All objects of a resource.
    fn list(&self, group: &str, plural: &str) -> ApiResult<Vec<Arc<Value>>> {
        self.backend.all(&*self.resource(group, plural)?, None)
    }

    fn create(
        &self,
        group: &str,
        plural: &str,
        namespace: Option<&str>,
        object: Value,
    ) -> ApiResult<Arc<Value>> {
        self.backend.create(self.name, &self.resource(group, plural)?, namespace, object)
    }

    /// Merges a patch into an object as seen; a lost race or a gone object is no error, the next pass sees it.
    fn merge(&self, resource: &Arc<Resource>, object: &Value, part: Part, patch: Value) -> ApiResult<()> {
        let namespace = resource.namespaced.then(|| obj::namespace(object));
        settled(self.backend.merge(self.name, resource, namespace, obj::name(object), part, patch))
    }

    /// Changes an object as seen (by UID), whatever version it is in; a gone object is no error.
    fn edit(
        &self,
        resource: &Arc<Resource>,
        object: &Value,
        part: Part,
        change: &dyn Fn(&mut Value),
    ) -> ApiResult<()> {
        let namespace = resource.namespaced.then(|| obj::namespace(object));
        let same = |old: &Value| {
            let mut new = old.clone();
            if obj::uid(old) == obj::uid(object) {
                change(&mut new);
            }
            new
        };
        settled(self.backend.rewrite(self.name, resource, namespace, obj::name(object), part, &same))
    }

    /// The objects of a controlling owner: those that it owns and selects. What it owns and does not select any more is
    /// let go; what it selects and nobody owns is taken.
    fn claim(
        &self,
        resource: &Arc<Resource>,
        owner: &Value,
        candidates: &[Arc<Value>],
    ) -> ApiResult<Vec<Arc<Value>>> {
        let selector = obj::at(owner, &["spec", "selector"]).unwrap_or(&Value::Null);
        let labels = Labels::from_object(selector);
        let mut mine = Vec::new();
        for one in candidates.iter().filter(|one| obj::namespace(one) == obj::namespace(owner)) {
            let is_selected = labels.as_ref().is_some_and(|labels| !labels.is_empty() && labels.matches(one));
            let is_stable = !obj::is_deleting(one) && !obj::is_deleting(owner);
            match (is_controlled_by(one, owner), is_selected) {
                (true, false) if is_stable => self.edit(resource, one, Part::Main, &|new| {
                    let mut left = obj::items(new, &["metadata", "ownerReferences"]).to_vec();
                    left.retain(|reference| obj::text(reference, &["uid"]) != obj::uid(owner));
                    obj::set(new, &["metadata", "ownerReferences"], left);
                })?,
                (true, _) => mine.push(one.clone()),
                (false, true) if is_stable && obj::controller(one).is_none() => {
                    self.edit(resource, one, Part::Main, &|new| {
                        let mut all = obj::items(new, &["metadata", "ownerReferences"]).to_vec();
                        all.push(owner_reference(owner));
                        obj::set(new, &["metadata", "ownerReferences"], all);
                    })?;
                    mine.push(one.clone());
                }
                (false, _) => {}
            }
        }
        Ok(mine)
    }

    /// Writes `status` if it differs from what the object has.
    fn set_status(&self, resource: &Arc<Resource>, object: &Value, status: &Value) -> ApiResult<()> {
        if object.get("status") == Some(status) {
            return Ok(());
        }
        self.edit(resource, object, Part::Status, &|new| obj::set(new, &["status"], status.clone()))
    }

    /// Deletes an object as seen (by UID).
    fn delete(&self, resource: &Arc<Resource>, object: &Value, options: DeleteOptions) -> ApiResult<()> {
        let options = DeleteOptions { uid: Some(obj::uid(object).to_owned()), ..options };
        let namespace = resource.namespaced.then(|| obj::namespace(object));
        match self.backend.delete(resource, namespace, obj::name(object), &options) {
            Err(error) if !(error.is_not_found() || error.is_conflict()) => Err(error),
            _ => Ok(()),
        }
    }

    /// Tells the user something about an object.
    fn event(&self, object: &Value, kind: &str, reason: &str, message: &str) {
        let namespace = match obj::namespace(object) {
            "" => "default",
            namespace => namespace,
        };
        let name = format!("{}.{:016x}", obj::name(object), jiff::Timestamp::now().as_microsecond());
        let event = json!({
            "metadata": {"name": name},
            "involvedObject": {
                "kind": obj::text(object, &["kind"]), "apiVersion": obj::text(object, &["apiVersion"]),
                "namespace": obj::namespace(object), "name": obj::name(object), "uid": obj::uid(object),
                "resourceVersion": obj::version(object),
            },
            "type": kind, "reason": reason, "message": message, "count": 1,
            "source": {"component": self.name}, "reportingComponent": self.name,
        });
        if let Err(error) = self.create("", "events", Some(namespace), event)
            && error.reason != "Forbidden"
        {
            tracing::debug!(controller = self.name, %error, reason, "no event");
        }
    }
}

/// Does all of a pass's items; one that fails does not keep the others from their turn. The first failure counts.
fn each<T>(items: impl IntoIterator<Item = T>, mut act: impl FnMut(T) -> ApiResult<()>) -> ApiResult<()> {
    let mut first = Ok(());
    for item in items {
        let done = act(item);
        if first.is_ok() {
            first = done;
        }
    }
    first
}

fn settled(written: ApiResult<Arc<Value>>) -> ApiResult<()> {
    match written {
        Ok(_) => Ok(()),
        Err(error) if error.is_not_found() || error.is_conflict() => Ok(()),
        Err(error) => Err(error),
    }
}

/// An owner reference to a controlling object.
fn owner_reference(owner: &Value) -> Value {
    json!({
        "apiVersion": obj::text(owner, &["apiVersion"]), "kind": obj::text(owner, &["kind"]),
        "name": obj::name(owner), "uid": obj::uid(owner), "controller": true, "blockOwnerDeletion": true,
    })
}

/// Whether an object is controlled by another.
fn is_controlled_by(object: &Value, owner: &Value) -> bool {
    obj::controller(object).is_some_and(|reference| obj::text(reference, &["uid"]) == obj::uid(owner))
}

/// A number or a percentage of `total`, rounded up or down.
fn number_or_percent(value: Option<&Value>, total: i64, round_up: bool) -> i64 {
    // Far more than any workload has, far less than what overflows.
    let sane = |number: i64| number.clamp(0, i64::from(i32::MAX));
    match value {
        Some(Value::Number(number)) => sane(number.as_i64().unwrap_or(0)),
        Some(Value::String(text)) => match text.strip_suffix('%').and_then(|text| text.parse::<i64>().ok()) {
            Some(percent) if round_up => (total * sane(percent) + 99) / 100,
            Some(percent) => total * sane(percent) / 100,
            None => sane(text.parse().unwrap_or(0)),
        },
        _ => 0,
    }
}

/// Sets a condition in a list of conditions; its time moves only when its status does.
fn set_condition(conditions: &mut Vec<Value>, kind: &str, status: &str, reason: &str, message: &str) {
    let now = obj::now();
    let old = conditions.iter().find(|one| obj::text(one, &["type"]) == kind).cloned();
    let same_status = old.as_ref().is_some_and(|old| obj::text(old, &["status"]) == status);
    let same = same_status
        && old.as_ref().is_some_and(|old| {
            obj::text(old, &["reason"]) == reason && obj::text(old, &["message"]) == message
        });
    if same {
        return;
    }
    let since = old.filter(|_| same_status).map(|old| obj::text(&old, &["lastTransitionTime"]).to_owned());
    let condition = json!({
        "type": kind, "status": status, "reason": reason, "message": message,
        "lastTransitionTime": since.unwrap_or_else(|| now.clone()), "lastUpdateTime": now,
    });
    match conditions.iter_mut().find(|one| obj::text(one, &["type"]) == kind) {
        Some(slot) => *slot = condition,
        None => conditions.push(condition),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentages() {
        assert_eq!(number_or_percent(Some(&json!("25%")), 2, true), 1);
        assert_eq!(number_or_percent(Some(&json!("25%")), 2, false), 0);
        assert_eq!(number_or_percent(Some(&json!("100%")), 3, true), 3);
        assert_eq!(number_or_percent(Some(&json!(2)), 3, true), 2);
        assert_eq!(number_or_percent(None, 3, true), 0);
        assert_eq!(number_or_percent(Some(&json!(i64::MAX)), 3, true), i64::from(i32::MAX));
        assert_eq!(number_or_percent(Some(&json!("-5%")), 3, true), 0);
    }
}
