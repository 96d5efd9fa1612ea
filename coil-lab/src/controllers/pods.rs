//! What several controllers ask of pods.

use std::time::Duration;

use serde_json::{Value, json};

use crate::api::obj;

/// Whether a pod counts for its workload: not finished, not going away.
pub(super) fn is_active(pod: &Value) -> bool {
    !obj::is_deleting(pod) && !is_finished(pod)
}

/// Whether a pod has run to its end.
pub(super) fn is_finished(pod: &Value) -> bool {
    ["Succeeded", "Failed"].contains(&obj::text(pod, &["status", "phase"]))
}

/// Whether a pod is ready.
pub(super) fn is_ready(pod: &Value) -> bool {
    obj::condition_is_true(pod, "Ready")
}

/// How long until a ready pod counts as available; none if it is not ready, zero if it is available now.
pub(super) fn available_in(pod: &Value, min_ready_seconds: i64) -> Option<Duration> {
    let ready = obj::condition(pod, "Ready").filter(|one| obj::text(one, &["status"]) == "True")?;
    if min_ready_seconds <= 0 {
        return Some(Duration::ZERO);
    }
    let since: jiff::Timestamp = obj::text(ready, &["lastTransitionTime"]).parse().ok()?;
    let age = jiff::Timestamp::now().duration_since(since).as_secs();
    Some(Duration::from_secs(u64::try_from(min_ready_seconds - age).unwrap_or(0)))
}

/// A pod from a template.
pub(super) fn from_template(owner: &Value, template: &Value, extra_labels: &[(&str, &str)]) -> Value {
    let mut pod = json!({
        "metadata": {
            "generateName": format!("{}-", obj::name(owner)),
            "ownerReferences": [super::owner_reference(owner)],
        },
        "spec": template.get("spec").cloned().unwrap_or_default(),
    });
    for field in ["labels", "annotations", "finalizers"] {
        if let Some(value) = obj::at(template, &["metadata", field]) {
            obj::set(&mut pod, &["metadata", field], value.clone());
        }
    }
    for (key, value) in extra_labels {
        obj::set(&mut pod, &["metadata", "labels", key], *value);
    }
    pod
}

/// Order in which surplus pods go: first those whose loss hurts least.
pub(super) fn removal_rank(pod: &Value) -> (bool, bool, bool, std::cmp::Reverse<String>) {
    (
        !obj::text(pod, &["spec", "nodeName"]).is_empty(),
        obj::text(pod, &["status", "phase"]) == "Running",
        is_ready(pod),
        std::cmp::Reverse(obj::text(pod, &["metadata", "creationTimestamp"]).to_owned()),
    )
}
