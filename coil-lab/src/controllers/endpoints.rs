//! Service to EndpointSlices, one set of slices per family, and the older Endpoints object.

use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};

use super::{Cluster, each, names, owner_reference, pods};
use crate::api::delete::DeleteOptions;
use crate::api::selector::Labels;
use crate::api::write::Part;
use crate::api::{ApiResult, obj};

const SERVICE: &str = "kubernetes.io/service-name";
const MANAGED_BY: &str = "endpointslice.kubernetes.io/managed-by";
const MANAGER: &str = "endpointslice-controller.k8s.io";
const HEADLESS: &str = "service.kubernetes.io/headless";
/// Endpoints per slice.
const SLICE_SIZE: usize = 100;

pub(super) fn pass(cluster: &Cluster) -> ApiResult<Option<Duration>> {
    let all_pods = cluster.list("", "pods")?;
    let nodes = cluster.list("", "nodes")?;
    let slices = cluster.list("discovery.k8s.io", "endpointslices")?;
    each(cluster.list("", "services")?, |service| {
        let selector = obj::map(&service, &["spec", "selector"]);
        let is_selecting = selector.is_some_and(|selector| !selector.is_empty());
        if obj::is_deleting(&service) || !is_selecting {
            return Ok(());
        }
        let labels = Labels::from_map(selector);
        let mut selected: Vec<&Arc<Value>> = all_pods
            .iter()
            .filter(|pod| {
                obj::namespace(pod) == obj::namespace(&service)
                    && !pods::is_finished(pod)
                    && labels.matches(pod)
            })
            .collect();
        selected.sort_by_key(|pod| obj::name(pod).to_owned());
        let wanted = slices_of(&service, &selected, &nodes);
        write_slices(cluster, &service, wanted, &slices)?;
        write_endpoints(cluster, &service, &selected)
    })?;
    Ok(None)
}

fn ips(pod: &Value) -> Vec<&str> {
    let mut ips: Vec<&str> =
        obj::items(pod, &["status", "podIPs"]).iter().map(|one| obj::text(one, &["ip"])).collect();
    let first = obj::text(pod, &["status", "podIP"]);
    if ips.is_empty() && !first.is_empty() {
        ips.push(first);
    }
    ips
}

fn of_family<'a>(pod: &'a Value, family: &str) -> Option<&'a str> {
    ips(pod).into_iter().find(|ip| ip.contains(':') == (family == "IPv6"))
}

/// The endpoint of a pod.
fn endpoint(service: &Value, pod: &Value, ip: &str, nodes: &[Arc<Value>]) -> Value {
    let is_ready = pods::is_ready(pod);
    let is_leaving = obj::is_deleting(pod);
    let always = obj::flag(service, &["spec", "publishNotReadyAddresses"]);
    let mut endpoint = json!({
        "addresses": [ip],
        "conditions": {
            "ready": always || is_ready && !is_leaving,
            "serving": is_ready,
            "terminating": is_leaving,
        },
        "targetRef": {
            "kind": "Pod", "name": obj::name(pod), "namespace": obj::namespace(pod), "uid": obj::uid(pod),
        },
    });
    let node = obj::text(pod, &["spec", "nodeName"]);
    if !node.is_empty() {
        obj::set(&mut endpoint, &["nodeName"], node);
        let zone = nodes.iter().find(|one| obj::name(one) == node);
        if let Some(zone) = zone.and_then(|node| obj::label(node, "topology.kubernetes.io/zone")) {
            obj::set(&mut endpoint, &["zone"], zone);
        }
    }
    let (hostname, subdomain) =
        (obj::text(pod, &["spec", "hostname"]), obj::text(pod, &["spec", "subdomain"]));
    if !hostname.is_empty() && subdomain == obj::name(service) {
        obj::set(&mut endpoint, &["hostname"], hostname);
    }
    endpoint
}

/// The ports as a pod offers them.
fn ports(service: &Value, pod: Option<&Value>) -> Vec<Value> {
    obj::items(service, &["spec", "ports"])
        .iter()
        .filter_map(|port| {
            let target = port.get("targetPort").or_else(|| port.get("port"));
            let number = match target {
                Some(Value::Number(number)) => number.as_i64(),
                Some(Value::String(name)) => pod.and_then(|pod| named_port(pod, name, port)),
                _ => None,
            }?;
            let mut result = json!({
                "name": obj::text(port, &["name"]), "port": number, "protocol": obj::text(port, &["protocol"]),
            });
            if let Some(app) = port.get("appProtocol") {
                obj::set(&mut result, &["appProtocol"], app.clone());
            }
            Some(result)
        })
        .collect()
}

fn named_port(pod: &Value, name: &str, port: &Value) -> Option<i64> {
    obj::items(pod, &["spec", "containers"])
        .iter()
        .flat_map(|container| obj::items(container, &["ports"]))
        .find(|one| {
            obj::text(one, &["name"]) == name
                && (obj::text(one, &["protocol"]) == obj::text(port, &["protocol"]))
        })
        .and_then(|one| obj::int(one, &["containerPort"]))
}

/// The slices that a service should have.
fn slices_of(service: &Value, selected: &[&Arc<Value>], nodes: &[Arc<Value>]) -> Vec<Value> {
    let mut labels = obj::at(service, &["metadata", "labels"]).cloned().unwrap_or(json!({}));
    obj::set(&mut labels, &[SERVICE], obj::name(service));
    obj::set(&mut labels, &[MANAGED_BY], MANAGER);
    if obj::text(service, &["spec", "clusterIP"]) == "None" {
        obj::set(&mut labels, &[HEADLESS], "");
    }
    let mut slices = Vec::new();
    for family in obj::items(service, &["spec", "ipFamilies"]).iter().filter_map(Value::as_str) {
        let reachable: Vec<&Arc<Value>> =
            selected.iter().copied().filter(|pod| of_family(pod, family).is_some()).collect();
        let ports = ports(service, reachable.first().map(|pod| &***pod));
        let endpoints: Vec<Value> = reachable
            .iter()
            .filter_map(|pod| Some(endpoint(service, pod, of_family(pod, family)?, nodes)))
            .collect();
        let chunks: Vec<&[Value]> =
            if endpoints.is_empty() { vec![&[]] } else { endpoints.chunks(SLICE_SIZE).collect() };
        for (index, chunk) in chunks.into_iter().enumerate() {
            let suffix = names::hash(&json!([family, index, obj::uid(service)]));
            slices.push(json!({
                "metadata": {
                    "name": format!("{}-{}", obj::name(service), &suffix[..5]),
                    "labels": labels,
                    "ownerReferences": [owner_reference(service)],
                },
                "addressType": family,
                "ports": ports,
                "endpoints": chunk,
            }));
        }
    }
    slices
}

fn write_slices(
    cluster: &Cluster,
    service: &Value,
    wanted: Vec<Value>,
    slices: &[Arc<Value>],
) -> ApiResult<()> {
    let resource = cluster.resource("discovery.k8s.io", "endpointslices")?;
    let namespace = obj::namespace(service);
    let present: Vec<&Arc<Value>> = slices
        .iter()
        .filter(|slice| {
            obj::namespace(slice) == namespace
                && obj::label(slice, SERVICE) == Some(obj::name(service))
                && obj::label(slice, MANAGED_BY) == Some(MANAGER)
        })
        .collect();
    for slice in &present {
        if !wanted.iter().any(|one| obj::name(one) == obj::name(slice)) {
            cluster.delete(&resource, slice, DeleteOptions::default())?;
        }
    }
    for slice in wanted {
        match present.iter().find(|one| obj::name(one) == obj::name(&slice)) {
            None => {
                let created = cluster.create("discovery.k8s.io", "endpointslices", Some(namespace), slice);
                super::settled(created)?;
            }
            Some(old) => {
                let mut new = (***old).clone();
                for field in ["ports", "endpoints", "addressType"] {
                    obj::set(&mut new, &[field], slice.get(field).cloned().unwrap_or_default());
                }
                let labels = obj::at(&slice, &["metadata", "labels"]).cloned().unwrap_or_default();
                obj::set(&mut new, &["metadata", "labels"], labels);
                if new != ***old {
                    // Another writer's change in between is overwritten: nobody else writes these.
                    cluster.edit(&resource, &new, Part::Main, &|slot| {
                        let version = obj::version(slot).to_owned();
                        *slot = new.clone();
                        obj::set(slot, &["metadata", "resourceVersion"], version);
                    })?;
                }
            }
        }
    }
    Ok(())
}

/// The older Endpoints object: ready and not ready addresses of the first family.
fn write_endpoints(cluster: &Cluster, service: &Value, selected: &[&Arc<Value>]) -> ApiResult<()> {
    let resource = cluster.resource("", "endpoints")?;
    let family =
        obj::items(service, &["spec", "ipFamilies"]).first().and_then(Value::as_str).unwrap_or("IPv4");
    let reachable: Vec<&Arc<Value>> =
        selected.iter().copied().filter(|pod| of_family(pod, family).is_some()).collect();
    let always = obj::flag(service, &["spec", "publishNotReadyAddresses"]);
    let addresses = |wanted: bool| -> Vec<Value> {
        reachable
            .iter()
            .filter(|pod| (always || pods::is_ready(pod) && !obj::is_deleting(pod)) == wanted)
            .filter(|pod| wanted || !obj::is_deleting(pod))
            .map(|pod| {
                json!({
                    "ip": of_family(pod, family), "nodeName": obj::text(pod, &["spec", "nodeName"]),
                    "targetRef": {
                        "kind": "Pod", "name": obj::name(pod), "namespace": obj::namespace(pod),
                        "uid": obj::uid(pod),
                    },
                })
            })
            .collect()
    };
    let mut subset = json!({"ports": ports(service, reachable.first().map(|pod| &***pod))});
    let (ready, not_ready) = (addresses(true), addresses(false));
    let is_empty = ready.is_empty() && not_ready.is_empty();
    for (field, list) in [("addresses", ready), ("notReadyAddresses", not_ready)] {
        if !list.is_empty() {
            obj::set(&mut subset, &[field], list);
        }
    }
    for port in subset.get_mut("ports").and_then(Value::as_array_mut).into_iter().flatten() {
        if obj::text(port, &["name"]).is_empty() {
            obj::remove(port, &["name"]);
        }
    }
    let subsets = if is_empty { json!([]) } else { json!([subset]) };
    let (namespace, name) = (obj::namespace(service), obj::name(service));
    match cluster.backend.get(&resource, Some(namespace), name) {
        Err(_) => {
            let labels = obj::at(service, &["metadata", "labels"]).cloned().unwrap_or(json!({}));
            let object = json!({
                "metadata": {"name": name, "labels": labels, "ownerReferences": [owner_reference(service)]},
                "subsets": subsets,
            });
            super::settled(cluster.create("", "endpoints", Some(namespace), object))
        }
        Ok(old) if old.get("subsets").unwrap_or(&json!([])) == &subsets => Ok(()),
        Ok(old) => cluster.merge(&resource, &old, Part::Main, json!({"subsets": subsets})),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    fn pod(name: &str, ready: bool, leaving: bool) -> Arc<Value> {
        let mut pod = json!({
            "metadata": {"name": name, "namespace": "n", "uid": name},
            "spec": {"nodeName": "n1", "containers": [{"ports": [{"name": "web", "containerPort": 8080, "protocol": "TCP"}]}]},
            "status": {
                "podIPs": [{"ip": "10.0.0.1"}, {"ip": "fd00::1"}],
                "conditions": [{"type": "Ready", "status": if ready { "True" } else { "False" }}],
            },
        });
        if leaving {
            obj::set(&mut pod, &["metadata", "deletionTimestamp"], "2026-01-01T00:00:00Z");
        }
        Arc::new(pod)
    }

    #[test]
    fn one_slice_per_family_with_conditions() {
        let service = json!({
            "metadata": {"name": "s", "namespace": "n", "uid": "u", "labels": {"app": "x"}},
            "spec": {
                "ipFamilies": ["IPv4", "IPv6"],
                "ports": [{"name": "a", "port": 80, "targetPort": "web", "protocol": "TCP"}],
            },
        });
        let pods = [pod("a", true, false), pod("b", false, false), pod("c", true, true)];
        let selected: Vec<&Arc<Value>> = pods.iter().collect();
        let slices = slices_of(&service, &selected, &[]);
        assert_eq!(slices.len(), 2);
        assert_eq!(slices[1]["addressType"], "IPv6");
        assert_eq!(slices[1]["endpoints"][0]["addresses"], json!(["fd00::1"]));
        assert_eq!(slices[0]["ports"], json!([{"name": "a", "port": 8080, "protocol": "TCP"}]));
        assert_eq!(slices[0]["metadata"]["labels"]["app"], "x");
        assert_eq!(slices[0]["metadata"]["labels"][SERVICE], "s");
        let conditions = |index: usize| slices[0]["endpoints"][index]["conditions"].clone();
        assert_eq!(conditions(0), json!({"ready": true, "serving": true, "terminating": false}));
        assert_eq!(conditions(1), json!({"ready": false, "serving": false, "terminating": false}));
        assert_eq!(conditions(2), json!({"ready": false, "serving": true, "terminating": true}));
        assert_ne!(obj::name(&slices[0]), obj::name(&slices[1]));
    }
}
