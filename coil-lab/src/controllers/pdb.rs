//! PodDisruptionBudget status.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};

use super::{Cluster, each, number_or_percent, pods, set_condition};
use crate::api::selector::Labels;
use crate::api::{ApiResult, obj};

pub(super) fn pass(cluster: &Cluster) -> ApiResult<Option<Duration>> {
    let all_pods = cluster.list("", "pods")?;
    let sets = cluster.list("apps", "replicasets")?;
    let resource = cluster.resource("policy", "poddisruptionbudgets")?;
    each(cluster.list("policy", "poddisruptionbudgets")?, |budget| {
        let selector = obj::at(&budget, &["spec", "selector"]).unwrap_or(&Value::Null);
        let Some(labels) = Labels::from_object(selector) else { return Ok(()) };
        let selected: Vec<&Arc<Value>> = all_pods
            .iter()
            .filter(|pod| obj::namespace(pod) == obj::namespace(&budget) && labels.matches(pod))
            .filter(|pod| pods::is_active(pod))
            .collect();
        let healthy = count(selected.iter().filter(|pod| pods::is_ready(pod)).count());
        let expected = expected_pods(&selected, &sets);
        let desired = match obj::at(&budget, &["spec", "maxUnavailable"]) {
            Some(limit) => (expected - number_or_percent(Some(limit), expected, true)).max(0),
            None => number_or_percent(
                obj::at(&budget, &["spec", "minAvailable"]).or(Some(&json!(1))),
                expected,
                true,
            ),
        };
        let allowed = if expected > 0 { (healthy - desired).max(0) } else { 0 };
        let mut conditions = obj::items(&budget, &["status", "conditions"]).to_vec();
        let (word, reason) =
            if allowed > 0 { ("True", "SufficientPods") } else { ("False", "InsufficientPods") };
        set_condition(&mut conditions, "DisruptionAllowed", word, reason, "");
        for condition in &mut conditions {
            obj::remove(condition, &["lastUpdateTime"]);
        }
        let status = json!({
            "conditions": conditions, "currentHealthy": healthy, "desiredHealthy": desired,
            "disruptionsAllowed": allowed, "expectedPods": expected,
            "observedGeneration": obj::int(&budget, &["metadata", "generation"]).unwrap_or(1),
        });
        cluster.set_status(&resource, &budget, &status)
    })?;
    Ok(None)
}

fn count(number: usize) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

/// The wished sizes of the sets behind the pods, plus pods without a set.
fn expected_pods(selected: &[&Arc<Value>], sets: &[Arc<Value>]) -> i64 {
    let mut sizes: BTreeMap<&str, i64> = BTreeMap::new();
    let mut bare = 0;
    for pod in selected {
        let owner = obj::controller(pod).map_or("", |reference| obj::text(reference, &["uid"]));
        match sets.iter().find(|set| !owner.is_empty() && obj::uid(set) == owner) {
            Some(set) => {
                sizes.insert(owner, obj::int(set, &["spec", "replicas"]).unwrap_or(1));
            }
            None => bare += 1,
        }
    }
    bare + sizes.values().sum::<i64>()
}
