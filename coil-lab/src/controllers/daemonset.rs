//! DaemonSet: one pod on each eligible node, replaced when the template changes.

use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};

use super::scheduler::{node_selector_holds, untolerated_taint};
use super::{Cluster, each, names, number_or_percent, pods};
use crate::api::delete::DeleteOptions;
use crate::api::{ApiResult, obj};

const HASH: &str = "controller-revision-hash";

/// Taints that pods of daemon sets tolerate without saying so.
const TOLERATED: [&str; 6] = [
    "node.kubernetes.io/not-ready",
    "node.kubernetes.io/unreachable",
    "node.kubernetes.io/disk-pressure",
    "node.kubernetes.io/memory-pressure",
    "node.kubernetes.io/pid-pressure",
    "node.kubernetes.io/unschedulable",
];

pub(super) fn pass(cluster: &Cluster) -> ApiResult<Option<Duration>> {
    let all_pods = cluster.list("", "pods")?;
    let nodes = cluster.list("", "nodes")?;
    let resource = cluster.resource("", "pods")?;
    each(cluster.list("apps", "daemonsets")?, |set| {
        if obj::is_deleting(&set) {
            return Ok(());
        }
        let owned = cluster.claim(&resource, &set, &all_pods)?;
        sync(cluster, &set, &owned, &nodes)
    })?;
    Ok(None)
}

fn template_of(set: &Value) -> Value {
    let mut template = obj::at(set, &["spec", "template"]).cloned().unwrap_or_default();
    let mut tolerations = obj::items(&template, &["spec", "tolerations"]).to_vec();
    for key in TOLERATED {
        let effect = if key.ends_with("not-ready") || key.ends_with("unreachable") {
            "NoExecute"
        } else {
            "NoSchedule"
        };
        tolerations.push(json!({"key": key, "operator": "Exists", "effect": effect}));
    }
    if obj::flag(&template, &["spec", "hostNetwork"]) {
        tolerations.push(json!({
            "key": "node.kubernetes.io/network-unavailable", "operator": "Exists", "effect": "NoSchedule",
        }));
    }
    obj::set(&mut template, &["spec", "tolerations"], tolerations);
    template
}

fn is_eligible(template: &Value, node: &Value) -> bool {
    let spec = template.get("spec").unwrap_or(&Value::Null);
    node_selector_holds(spec, node) && untolerated_taint(spec, node).is_none() && !obj::is_deleting(node)
}

fn sync(cluster: &Cluster, set: &Value, owned: &[Arc<Value>], nodes: &[Arc<Value>]) -> ApiResult<()> {
    let resource = cluster.resource("", "pods")?;
    let template = template_of(set);
    let hash = names::hash(obj::at(set, &["spec", "template"]).unwrap_or(&Value::Null));
    let eligible: Vec<&str> =
        nodes.iter().filter(|node| is_eligible(&template, node)).map(|node| obj::name(node)).collect();
    let node_of = |pod: &Value| obj::text(pod, &["spec", "nodeName"]).to_owned();
    let is_current = |pod: &Value| obj::label(pod, HASH) == Some(&hash);
    let active: Vec<&Arc<Value>> = owned.iter().filter(|pod| !obj::is_deleting(pod)).collect();

    for pod in
        active.iter().filter(|pod| !eligible.contains(&node_of(pod).as_str()) || pods::is_finished(pod))
    {
        cluster.delete(&resource, pod, DeleteOptions::default())?;
    }
    for node in &eligible {
        // A pod that is going away still holds its node's ports and names.
        if owned.iter().any(|pod| node_of(pod) == *node) {
            continue;
        }
        let mut pod = pods::from_template(set, &template, &[(HASH, &hash)]);
        obj::set(&mut pod, &["spec", "nodeName"], *node);
        let pod = cluster.create("", "pods", Some(obj::namespace(set)), pod)?;
        cluster.event(set, "Normal", "SuccessfulCreate", &format!("Created pod: {}", obj::name(&pod)));
    }
    if obj::text(set, &["spec", "updateStrategy", "type"]) == "RollingUpdate" {
        let wished = i64::try_from(eligible.len()).unwrap_or(0);
        let limit = obj::at(set, &["spec", "updateStrategy", "rollingUpdate", "maxUnavailable"]);
        let limit = number_or_percent(limit, wished, true).max(1);
        let up = active.iter().filter(|pod| pods::is_ready(pod)).count();
        let mut may_go = limit - (wished - i64::try_from(up).unwrap_or(0));
        for pod in active.iter().filter(|pod| !is_current(pod) && eligible.contains(&node_of(pod).as_str())) {
            if !pods::is_ready(pod) || may_go > 0 {
                may_go -= i64::from(pods::is_ready(pod));
                cluster.delete(&resource, pod, DeleteOptions::default())?;
            }
        }
    }
    write_status(cluster, set, &active, &eligible, &hash)
}

fn write_status(
    cluster: &Cluster,
    set: &Value,
    active: &[&Arc<Value>],
    eligible: &[&str],
    hash: &str,
) -> ApiResult<()> {
    let placed: Vec<&&Arc<Value>> =
        active.iter().filter(|pod| eligible.contains(&obj::text(pod, &["spec", "nodeName"]))).collect();
    let ready = placed.iter().filter(|pod| pods::is_ready(pod)).count();
    let updated = placed.iter().filter(|pod| obj::label(pod, HASH) == Some(hash)).count();
    let mut status = json!({
        "currentNumberScheduled": placed.len(),
        "desiredNumberScheduled": eligible.len(),
        "numberMisscheduled": active.len() - placed.len(),
        "numberReady": ready,
        "observedGeneration": obj::int(set, &["metadata", "generation"]).unwrap_or(1),
    });
    for (field, number) in [
        ("updatedNumberScheduled", updated),
        ("numberAvailable", ready),
        ("numberUnavailable", eligible.len().saturating_sub(ready)),
    ] {
        if number > 0 {
            obj::set(&mut status, &[field], number);
        }
    }
    cluster.set_status(&cluster.resource("apps", "daemonsets")?, set, &status)
}
