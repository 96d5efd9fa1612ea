//! ReplicaSet: as many active pods as wished.

use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};

use super::{Cluster, each, pods};
use crate::api::delete::DeleteOptions;
use crate::api::{ApiResult, obj};

/// At most this many pods of one set are created in a pass.
const BURST: i64 = 50;

pub(super) fn pass(cluster: &Cluster) -> ApiResult<Option<Duration>> {
    let all_pods = cluster.list("", "pods")?;
    let resource = cluster.resource("", "pods")?;
    let mut again: Option<Duration> = None;
    each(cluster.list("apps", "replicasets")?, |set| {
        let owned = cluster.claim(&resource, &set, &all_pods)?;
        let owned: Vec<&Arc<Value>> = owned.iter().collect();
        if !obj::is_deleting(&set) {
            scale(cluster, &set, &owned)?;
        }
        if let Some(wait) = write_status(cluster, &set, &owned)? {
            again = Some(again.map_or(wait, |earlier| earlier.min(wait)));
        }
        Ok(())
    })?;
    Ok(again)
}

fn scale(cluster: &Cluster, set: &Value, owned: &[&Arc<Value>]) -> ApiResult<()> {
    let resource = cluster.resource("", "pods")?;
    let mut active: Vec<&Arc<Value>> = owned.iter().copied().filter(|pod| pods::is_active(pod)).collect();
    let wished = obj::int(set, &["spec", "replicas"]).unwrap_or(1);
    let surplus = i64::try_from(active.len()).unwrap_or(i64::MAX) - wished;
    if surplus > 0 {
        active.sort_by_key(|pod| pods::removal_rank(pod));
        for pod in active.into_iter().take(usize::try_from(surplus).unwrap_or(0)) {
            cluster.delete(&resource, pod, DeleteOptions::default())?;
            cluster.event(set, "Normal", "SuccessfulDelete", &format!("Deleted pod: {}", obj::name(pod)));
        }
    }
    let template = obj::at(set, &["spec", "template"]).cloned().unwrap_or_default();
    for _ in 0..(-surplus).clamp(0, BURST) {
        let pod = pods::from_template(set, &template, &[]);
        match cluster.create("", "pods", Some(obj::namespace(set)), pod) {
            Ok(pod) => {
                cluster.event(
                    set,
                    "Normal",
                    "SuccessfulCreate",
                    &format!("Created pod: {}", obj::name(&pod)),
                );
            }
            // A namespace that is going away takes the set with it.
            Err(error) if error.is_not_found() || error.reason == "Forbidden" => return Ok(()),
            Err(error) => {
                cluster.event(set, "Warning", "FailedCreate", &format!("Error creating: {error}"));
                return Err(error);
            }
        }
    }
    Ok(())
}

fn write_status(cluster: &Cluster, set: &Value, owned: &[&Arc<Value>]) -> ApiResult<Option<Duration>> {
    let resource = cluster.resource("apps", "replicasets")?;
    let min_ready = obj::int(set, &["spec", "minReadySeconds"]).unwrap_or(0);
    let active: Vec<&&Arc<Value>> = owned.iter().filter(|pod| pods::is_active(pod)).collect();
    let ready = active.iter().filter(|pod| pods::is_ready(pod)).count();
    let waits: Vec<Duration> = active.iter().filter_map(|pod| pods::available_in(pod, min_ready)).collect();
    let available = waits.iter().filter(|wait| wait.is_zero()).count();
    let mut status = json!({
        "replicas": active.len(),
        "fullyLabeledReplicas": active.len(),
        "observedGeneration": obj::int(set, &["metadata", "generation"]).unwrap_or(1),
    });
    // Counts of zero are not written, as on the real server.
    for (field, count) in [("readyReplicas", ready), ("availableReplicas", available)] {
        if count > 0 {
            obj::set(&mut status, &[field], count);
        }
    }
    if active.is_empty() {
        obj::remove(&mut status, &["fullyLabeledReplicas"]);
    }
    cluster.set_status(&resource, set, &status)?;
    Ok(waits.into_iter().filter(|wait| !wait.is_zero()).min())
}
