//! Places pods on nodes: selectors, affinity, taints, anti-affinity, host ports, spreading.
//!
//! Resource requests are not counted: a lab node has no size.

use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};

use super::{Cluster, pods};
use crate::api::selector::Labels;
use crate::api::subresource::set_scheduled;
use crate::api::write::Part;
use crate::api::{ApiResult, obj};

pub(super) fn pass(cluster: &Cluster) -> ApiResult<Option<Duration>> {
    let nodes = cluster.list("", "nodes")?;
    let mut all_pods = cluster.list("", "pods")?;
    let mut waiting: Vec<Arc<Value>> = all_pods
        .iter()
        .filter(|pod| {
            obj::text(pod, &["spec", "nodeName"]).is_empty()
                && pods::is_active(pod)
                && obj::text(pod, &["spec", "schedulerName"]) == "default-scheduler"
                && obj::items(pod, &["spec", "schedulingGates"]).is_empty()
        })
        .cloned()
        .collect();
    waiting.sort_by_key(|pod| obj::text(pod, &["metadata", "creationTimestamp"]).to_owned());
    for pod in waiting {
        match place(&pod, &nodes, &all_pods) {
            Ok(node) => {
                let binding = json!({"target": {"kind": "Node", "name": node}});
                let (namespace, name) = (obj::namespace(&pod), obj::name(&pod));
                match cluster.backend.bind(namespace, name, &binding) {
                    Ok(()) => {
                        let message = format!("Successfully assigned {namespace}/{name} to {node}");
                        cluster.event(&pod, "Normal", "Scheduled", &message);
                        let mut placed = (*pod).clone();
                        obj::set(&mut placed, &["spec", "nodeName"], node);
                        all_pods.retain(|one| obj::uid(one) != obj::uid(&pod));
                        all_pods.push(Arc::new(placed));
                    }
                    Err(error) if error.is_not_found() || error.is_conflict() => {}
                    Err(error) => return Err(error),
                }
            }
            Err(message) => report_unschedulable(cluster, &pod, &message)?,
        }
    }
    Ok(None)
}

fn report_unschedulable(cluster: &Cluster, pod: &Value, message: &str) -> ApiResult<()> {
    let known =
        obj::condition(pod, "PodScheduled").is_some_and(|one| obj::text(one, &["message"]) == message);
    if known {
        return Ok(());
    }
    let resource = cluster.resource("", "pods")?;
    cluster.edit(&resource, pod, Part::Status, &|new| {
        if obj::text(new, &["spec", "nodeName"]).is_empty() {
            set_scheduled(new, false, "Unschedulable", message);
        }
    })?;
    cluster.event(pod, "Warning", "FailedScheduling", message);
    Ok(())
}

/// The best node, or why there is none.
fn place(pod: &Value, nodes: &[Arc<Value>], all_pods: &[Arc<Value>]) -> Result<String, String> {
    let mut reasons: Vec<(String, usize)> = Vec::new();
    let mut best: Option<((i64, i64, i64, i64), &str)> = None;
    for node in nodes {
        match refusal(pod, node, nodes, all_pods) {
            Some(reason) => match reasons.iter_mut().find(|(known, _)| *known == reason) {
                Some((_, count)) => *count += 1,
                None => reasons.push((reason, 1)),
            },
            None => {
                let cost = cost(pod, node, nodes, all_pods);
                if best.as_ref().is_none_or(|(known, _)| cost < *known) {
                    best = Some((cost, obj::name(node)));
                }
            }
        }
    }
    if let Some((_, name)) = best {
        return Ok(name.to_owned());
    }
    if nodes.is_empty() {
        return Err("no nodes available to schedule pods".to_owned());
    }
    let texts: Vec<String> = reasons.iter().map(|(reason, count)| format!("{count} {reason}")).collect();
    Err(format!("0/{} nodes are available: {}.", nodes.len(), texts.join(", ")))
}

fn refusal(pod: &Value, node: &Value, nodes: &[Arc<Value>], all_pods: &[Arc<Value>]) -> Option<String> {
    let spec = pod.get("spec").unwrap_or(&Value::Null);
    if !obj::condition_is_true(node, "Ready") {
        return Some("node(s) were not ready".to_owned());
    }
    if obj::flag(node, &["spec", "unschedulable"]) {
        return Some("node(s) were unschedulable".to_owned());
    }
    if let Some(taint) = untolerated_taint(spec, node) {
        return Some(format!("node(s) had untolerated taint {{{taint}}}"));
    }
    if !node_selector_holds(spec, node) {
        return Some("node(s) didn't match Pod's node affinity/selector".to_owned());
    }
    if has_port_conflict(spec, node, all_pods) {
        return Some("node(s) didn't have free ports for the requested pod ports".to_owned());
    }
    let terms = |kind: &str| {
        obj::items(spec, &["affinity", kind, "requiredDuringSchedulingIgnoredDuringExecution"]).to_vec()
    };
    for term in terms("podAntiAffinity") {
        if matching_in_domain(pod, &term, node, nodes, all_pods) > 0 {
            return Some("node(s) didn't match pod anti-affinity rules".to_owned());
        }
    }
    for term in terms("podAffinity") {
        let anywhere = all_pods.iter().any(|other| term_selects(pod, &term, other));
        let is_own = term_selects(pod, &term, pod);
        let is_first = !anywhere && is_own;
        if !is_first && matching_in_domain(pod, &term, node, nodes, all_pods) == 0 {
            return Some("node(s) didn't match pod affinity rules".to_owned());
        }
    }
    let skewed = obj::items(spec, &["topologySpreadConstraints"]).iter().any(|one| {
        obj::text(one, &["whenUnsatisfiable"]) != "ScheduleAnyway"
            && is_skewed(pod, one, node, nodes, all_pods)
    });
    skewed.then(|| "node(s) didn't match pod topology spread constraints".to_owned())
}

/// Lower is better: unwanted neighbours, siblings of the same workload, preferred affinity missed, load.
fn cost(pod: &Value, node: &Value, nodes: &[Arc<Value>], all_pods: &[Arc<Value>]) -> (i64, i64, i64, i64) {
    let spec = pod.get("spec").unwrap_or(&Value::Null);
    let weighted = |kind: &str| -> i64 {
        obj::items(spec, &["affinity", kind, "preferredDuringSchedulingIgnoredDuringExecution"])
            .iter()
            .map(|one| {
                let term = one.get("podAffinityTerm").unwrap_or(&Value::Null);
                obj::int(one, &["weight"]).unwrap_or(1) * matching_in_domain(pod, term, node, nodes, all_pods)
            })
            .sum()
    };
    let preferred_node: i64 =
        obj::items(spec, &["affinity", "nodeAffinity", "preferredDuringSchedulingIgnoredDuringExecution"])
            .iter()
            .filter(|one| node_term_holds(one.get("preference").unwrap_or(&Value::Null), node))
            .map(|one| obj::int(one, &["weight"]).unwrap_or(1))
            .sum();
    let here = || {
        all_pods.iter().filter(|other| {
            obj::text(other, &["spec", "nodeName"]) == obj::name(node) && !pods::is_finished(other)
        })
    };
    let owner = obj::controller(pod).map(|reference| obj::text(reference, &["uid"]));
    let siblings = here().filter(|other| {
        owner.is_some() && obj::controller(other).map(|reference| obj::text(reference, &["uid"])) == owner
    });
    let count = |number: usize| i64::try_from(number).unwrap_or(i64::MAX);
    (
        weighted("podAntiAffinity") - weighted("podAffinity"),
        count(siblings.count()),
        -preferred_node,
        count(here().count()),
    )
}

/// The first taint that keeps pods away and that the spec does not tolerate.
pub(super) fn untolerated_taint(spec: &Value, node: &Value) -> Option<String> {
    let taint = obj::items(node, &["spec", "taints"]).iter().find(|taint| {
        obj::text(taint, &["effect"]) != "PreferNoSchedule"
            && !obj::items(spec, &["tolerations"]).iter().any(|toleration| tolerates(toleration, taint))
    })?;
    Some(format!("{}: {}", obj::text(taint, &["key"]), obj::text(taint, &["value"])))
}

fn tolerates(toleration: &Value, taint: &Value) -> bool {
    let (key, effect) = (obj::text(toleration, &["key"]), obj::text(toleration, &["effect"]));
    let exists = obj::text(toleration, &["operator"]) == "Exists";
    (effect.is_empty() || effect == obj::text(taint, &["effect"]))
        && (key.is_empty() && exists || key == obj::text(taint, &["key"]))
        && (exists || obj::text(toleration, &["value"]) == obj::text(taint, &["value"]))
}

/// Whether a pod spec's node selector and required node affinity admit a node.
pub(super) fn node_selector_holds(spec: &Value, node: &Value) -> bool {
    let simple = Labels::from_map(obj::map(spec, &["nodeSelector"])).matches(node);
    let required =
        obj::at(spec, &["affinity", "nodeAffinity", "requiredDuringSchedulingIgnoredDuringExecution"]);
    simple
        && required.is_none_or(|required| {
            obj::items(required, &["nodeSelectorTerms"]).iter().any(|term| node_term_holds(term, node))
        })
}

fn node_term_holds(term: &Value, node: &Value) -> bool {
    let (expressions, fields) = (obj::items(term, &["matchExpressions"]), obj::items(term, &["matchFields"]));
    let label = |one: &Value| obj::label(node, obj::text(one, &["key"])).map(str::to_owned);
    (!expressions.is_empty() || !fields.is_empty())
        && expressions.iter().all(|one| requirement_holds(one, label(one).as_deref()))
        && fields.iter().all(|one| requirement_holds(one, Some(obj::name(node))))
}

fn requirement_holds(requirement: &Value, value: Option<&str>) -> bool {
    let values = obj::items(requirement, &["values"]);
    let is_in = value.is_some_and(|value| values.iter().any(|one| one == value));
    let number = |text: Option<&str>| text.and_then(|text| text.parse::<i64>().ok());
    let limit = number(values.first().and_then(Value::as_str));
    match obj::text(requirement, &["operator"]) {
        "In" => is_in,
        "NotIn" => !is_in,
        "Exists" => value.is_some(),
        "DoesNotExist" => value.is_none(),
        "Gt" => number(value).zip(limit).is_some_and(|(value, limit)| value > limit),
        "Lt" => number(value).zip(limit).is_some_and(|(value, limit)| value < limit),
        _ => false,
    }
}

fn has_port_conflict(spec: &Value, node: &Value, all_pods: &[Arc<Value>]) -> bool {
    let ports = |spec: &Value| -> Vec<(i64, String)> {
        obj::items(spec, &["containers"])
            .iter()
            .flat_map(|container| obj::items(container, &["ports"]))
            .filter_map(|port| {
                Some((
                    obj::int(port, &["hostPort"]).filter(|&number| number != 0)?,
                    obj::text(port, &["protocol"]).to_owned(),
                ))
            })
            .collect()
    };
    let wished = ports(spec);
    !wished.is_empty()
        && all_pods
            .iter()
            .filter(|other| {
                obj::text(other, &["spec", "nodeName"]) == obj::name(node) && !pods::is_finished(other)
            })
            .any(|other| ports(&other["spec"]).iter().any(|port| wished.contains(port)))
}

/// Whether an affinity term of `pod` selects `other`.
fn term_selects(pod: &Value, term: &Value, other: &Value) -> bool {
    let namespaces = obj::items(term, &["namespaces"]);
    let is_in_scope = if namespaces.is_empty() {
        obj::namespace(other) == obj::namespace(pod)
            || term.get("namespaceSelector").is_some_and(Value::is_object)
    } else {
        namespaces.iter().any(|one| one == obj::namespace(other))
    };
    let selector = term.get("labelSelector").unwrap_or(&Value::Null);
    is_in_scope && Labels::from_object(selector).is_some_and(|labels| labels.matches(other))
}

fn domain<'a>(node: &'a Value, key: &str) -> Option<&'a str> {
    obj::label(node, key).or_else(|| (key == "kubernetes.io/hostname").then(|| obj::name(node)))
}

/// How many pods that a term selects are in the node's domain.
fn matching_in_domain(
    pod: &Value,
    term: &Value,
    node: &Value,
    nodes: &[Arc<Value>],
    all_pods: &[Arc<Value>],
) -> i64 {
    let key = obj::text(term, &["topologyKey"]);
    let Some(here) = domain(node, key) else { return 0 };
    let found = all_pods.iter().filter(|other| {
        let name = obj::text(other, &["spec", "nodeName"]);
        !name.is_empty()
            && !pods::is_finished(other)
            && obj::uid(other) != obj::uid(pod)
            && term_selects(pod, term, other)
            && nodes.iter().any(|node| obj::name(node) == name && domain(node, key) == Some(here))
    });
    i64::try_from(found.count()).unwrap_or(i64::MAX)
}

fn is_skewed(
    pod: &Value,
    constraint: &Value,
    node: &Value,
    nodes: &[Arc<Value>],
    all_pods: &[Arc<Value>],
) -> bool {
    let key = obj::text(constraint, &["topologyKey"]);
    let limit = obj::int(constraint, &["maxSkew"]).unwrap_or(1);
    let counts = nodes
        .iter()
        .filter(|one| domain(one, key).is_some())
        .map(|one| matching_in_domain(pod, constraint, one, nodes, all_pods));
    let least = counts.min().unwrap_or(0);
    domain(node, key).is_none()
        || matching_in_domain(pod, constraint, node, nodes, all_pods) + 1 - least > limit
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    fn node(name: &str) -> Arc<Value> {
        Arc::new(json!({
            "metadata": {"name": name, "labels": {"kubernetes.io/hostname": name, "disk": name}},
            "status": {"conditions": [{"type": "Ready", "status": "True"}]},
        }))
    }

    fn pod(name: &str, on: &str, spec: Value) -> Arc<Value> {
        let mut pod = json!({
            "metadata": {
                "name": name, "uid": name, "namespace": "n", "labels": {"app": "a"},
                "ownerReferences": [{"uid": "set", "controller": true}],
            },
            "spec": spec,
        });
        obj::set(&mut pod, &["spec", "nodeName"], on);
        Arc::new(pod)
    }

    #[test]
    fn selectors_and_taints() {
        let nodes = [node("n1"), node("n2")];
        let selected = pod("x", "", json!({"nodeSelector": {"disk": "n2"}}));
        assert_eq!(place(&selected, &nodes, &[]).unwrap(), "n2");
        let mut tainted = (*nodes[1]).clone();
        obj::set(
            &mut tainted,
            &["spec", "taints"],
            json!([{"key": "k", "value": "v", "effect": "NoSchedule"}]),
        );
        let nodes = [nodes[0].clone(), Arc::new(tainted)];
        assert_eq!(
            place(&selected, &nodes, &[]).unwrap_err(),
            "0/2 nodes are available: 1 node(s) didn't match Pod's node affinity/selector, 1 node(s) had untolerated taint {k: v}."
        );
        let tolerant =
            pod("x", "", json!({"nodeSelector": {"disk": "n2"}, "tolerations": [{"operator": "Exists"}]}));
        assert_eq!(place(&tolerant, &nodes, &[]).unwrap(), "n2");
    }

    #[test]
    fn siblings_spread_and_required_anti_affinity_refuses() {
        let nodes = [node("n1"), node("n2")];
        let first = pod("a", "n1", json!({}));
        let next = pod("b", "", json!({}));
        assert_eq!(place(&next, &nodes, std::slice::from_ref(&first)).unwrap(), "n2");
        let strict = json!({"affinity": {"podAntiAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [{
            "topologyKey": "kubernetes.io/hostname", "labelSelector": {"matchLabels": {"app": "a"}},
        }]}}});
        let second = pod("b", "n2", strict.clone());
        assert!(place(&pod("c", "", strict), &nodes, &[first, second]).is_err());
    }
}
