//! Columns and cells of built-in kinds, as the real server has them.

use serde_json::{Value, json};

use super::age;
use crate::api::obj::{self, items, text};

/// Headings behind the name, with priority (above 0: only in wide output).
pub fn columns(kind: &str) -> &'static [(&'static str, i64)] {
    match kind {
        "Pod" => &[
            ("Ready", 0),
            ("Status", 0),
            ("Restarts", 0),
            ("Age", 0),
            ("IP", 1),
            ("Node", 1),
            ("Nominated Node", 1),
            ("Readiness Gates", 1),
        ],
        "Deployment" => &[
            ("Ready", 0),
            ("Up-to-date", 0),
            ("Available", 0),
            ("Age", 0),
            ("Containers", 1),
            ("Images", 1),
            ("Selector", 1),
        ],
        "ReplicaSet" | "ReplicationController" => &[
            ("Desired", 0),
            ("Current", 0),
            ("Ready", 0),
            ("Age", 0),
            ("Containers", 1),
            ("Images", 1),
            ("Selector", 1),
        ],
        "DaemonSet" => &[
            ("Desired", 0),
            ("Current", 0),
            ("Ready", 0),
            ("Up-to-date", 0),
            ("Available", 0),
            ("Node Selector", 0),
            ("Age", 0),
            ("Containers", 1),
            ("Images", 1),
            ("Selector", 1),
        ],
        "StatefulSet" => &[("Ready", 0), ("Age", 0), ("Containers", 1), ("Images", 1)],
        "Job" => &[("Status", 0), ("Completions", 0), ("Duration", 0), ("Age", 0)],
        "Service" => {
            &[("Type", 0), ("Cluster-IP", 0), ("External-IP", 0), ("Port(s)", 0), ("Age", 0), ("Selector", 1)]
        }
        "Endpoints" => &[("Endpoints", 0), ("Age", 0)],
        "EndpointSlice" => &[("AddressType", 0), ("Ports", 0), ("Endpoints", 0), ("Age", 0)],
        "Node" => &[
            ("Status", 0),
            ("Roles", 0),
            ("Age", 0),
            ("Version", 0),
            ("Internal-IP", 1),
            ("External-IP", 1),
            ("OS-Image", 1),
            ("Kernel-Version", 1),
            ("Container-Runtime", 1),
        ],
        "Namespace" => &[("Status", 0), ("Age", 0)],
        "ConfigMap" => &[("Data", 0), ("Age", 0)],
        "Secret" => &[("Type", 0), ("Data", 0), ("Age", 0)],
        "ServiceAccount" => &[("Secrets", 0), ("Age", 0)],
        "Event" => &[
            ("Last Seen", 0),
            ("Type", 0),
            ("Reason", 0),
            ("Object", 0),
            ("Subobject", 1),
            ("Source", 1),
            ("Message", 0),
            ("First Seen", 1),
            ("Count", 1),
            ("Name", 1),
        ],
        "PodDisruptionBudget" => {
            &[("Min Available", 0), ("Max Unavailable", 0), ("Allowed Disruptions", 0), ("Age", 0)]
        }
        "Lease" => &[("Holder", 0), ("Age", 0)],
        "Role" | "ClusterRole" | "CustomResourceDefinition" => &[("Created At", 0)],
        "RoleBinding" | "ClusterRoleBinding" => &[("Role", 0), ("Age", 0)],
        "MutatingWebhookConfiguration" | "ValidatingWebhookConfiguration" => &[("Webhooks", 0), ("Age", 0)],
        "NetworkPolicy" => &[("Pod-Selector", 0), ("Age", 0)],
        _ => &[("Age", 0)],
    }
}

/// Cells behind the name.
pub fn cells(kind: &str, object: &Value) -> Vec<Value> {
    let old = age(text(object, &["metadata", "creationTimestamp"]));
    let count = |path: &[&str]| json!(obj::int(object, path).unwrap_or(0));
    match kind {
        "Pod" => pod(object, old),
        "Deployment" => {
            let ready = format!("{}/{}", count(&["status", "readyReplicas"]), count(&["spec", "replicas"]));
            let mut cells = vec![
                json!(ready),
                count(&["status", "updatedReplicas"]),
                count(&["status", "availableReplicas"]),
                json!(old),
            ];
            cells.extend(template(object, true));
            cells
        }
        "ReplicaSet" | "ReplicationController" => {
            let mut cells = vec![
                count(&["spec", "replicas"]),
                count(&["status", "replicas"]),
                count(&["status", "readyReplicas"]),
                json!(old),
            ];
            cells.extend(template(object, true));
            cells
        }
        "DaemonSet" => {
            let mut cells: Vec<Value> = [
                "desiredNumberScheduled",
                "currentNumberScheduled",
                "numberReady",
                "updatedNumberScheduled",
                "numberAvailable",
            ]
            .iter()
            .map(|field| count(&["status", field]))
            .collect();
            cells.push(json!(map_text(object, &["spec", "template", "spec", "nodeSelector"])));
            cells.push(json!(old));
            cells.extend(template(object, true));
            cells
        }
        "StatefulSet" => {
            let ready = format!("{}/{}", count(&["status", "readyReplicas"]), count(&["spec", "replicas"]));
            let mut cells = vec![json!(ready), json!(old)];
            cells.extend(template(object, false));
            cells
        }
        "Job" => {
            let done = format!("{}/{}", count(&["status", "succeeded"]), count(&["spec", "completions"]));
            vec![json!("Running"), json!(done), json!(""), json!(old)]
        }
        "Service" => service(object, old),
        "Endpoints" => vec![json!(endpoints(object)), json!(old)],
        "EndpointSlice" => endpoint_slice(object, old),
        "Node" => node(object, old),
        "Namespace" => vec![json!(text(object, &["status", "phase"])), json!(old)],
        "ConfigMap" => {
            let size = |field: &str| obj::map(object, &[field]).map_or(0, serde_json::Map::len);
            vec![json!(size("data") + size("binaryData")), json!(old)]
        }
        "Secret" => {
            let size = obj::map(object, &["data"]).map_or(0, serde_json::Map::len);
            vec![json!(text(object, &["type"])), json!(size), json!(old)]
        }
        "ServiceAccount" => vec![json!(items(object, &["secrets"]).len()), json!(old)],
        "Event" => event(object),
        "PodDisruptionBudget" => {
            let shown = |field: &str| match obj::at(object, &["spec", field]) {
                Some(Value::String(text)) => json!(text),
                Some(number) => json!(number.to_string()),
                None => json!("N/A"),
            };
            vec![
                shown("minAvailable"),
                shown("maxUnavailable"),
                count(&["status", "disruptionsAllowed"]),
                json!(old),
            ]
        }
        "Lease" => vec![json!(text(object, &["spec", "holderIdentity"])), json!(old)],
        "Role" | "ClusterRole" | "CustomResourceDefinition" => {
            vec![json!(text(object, &["metadata", "creationTimestamp"]))]
        }
        "RoleBinding" | "ClusterRoleBinding" => {
            let role =
                format!("{}/{}", text(object, &["roleRef", "kind"]), text(object, &["roleRef", "name"]));
            vec![json!(role), json!(old)]
        }
        "MutatingWebhookConfiguration" | "ValidatingWebhookConfiguration" => {
            vec![json!(items(object, &["webhooks"]).len()), json!(old)]
        }
        "NetworkPolicy" => vec![json!(selector_text(object, &["spec", "podSelector"])), json!(old)],
        _ => vec![json!(old)],
    }
}

fn or_none(text: &str) -> String {
    if text.is_empty() { "<none>".to_owned() } else { text.to_owned() }
}

fn map_text(object: &Value, path: &[&str]) -> String {
    let pairs: Vec<String> = obj::map(object, path)
        .into_iter()
        .flatten()
        .map(|(key, value)| format!("{key}={}", value.as_str().unwrap_or_default()))
        .collect();
    or_none(&pairs.join(","))
}

fn selector_text(object: &Value, path: &[&str]) -> String {
    let selector = obj::at(object, path).unwrap_or(&Value::Null);
    let labels = crate::api::selector::Labels::from_object(selector)
        .unwrap_or_else(|| crate::api::selector::Labels::from_map(selector.as_object()));
    or_none(&labels.to_string())
}

fn template(object: &Value, with_selector: bool) -> Vec<Value> {
    let containers = items(object, &["spec", "template", "spec", "containers"]);
    let joined = |field: &str| containers.iter().map(|one| text(one, &[field])).collect::<Vec<_>>().join(",");
    let mut cells = vec![json!(joined("name")), json!(joined("image"))];
    if with_selector {
        cells.push(json!(selector_text(object, &["spec", "selector"])));
    }
    cells
}

fn pod(object: &Value, old: String) -> Vec<Value> {
    let statuses = items(object, &["status", "containerStatuses"]);
    let total = items(object, &["spec", "containers"]).len();
    let ready = statuses.iter().filter(|one| obj::flag(one, &["ready"])).count();
    let restarts: i64 = statuses.iter().filter_map(|one| obj::int(one, &["restartCount"])).sum();
    let last_restart = statuses
        .iter()
        .map(|one| text(one, &["lastState", "terminated", "finishedAt"]))
        .max()
        .unwrap_or_default();
    let restarts = if restarts > 0 && !last_restart.is_empty() {
        format!("{restarts} ({} ago)", age(last_restart))
    } else {
        restarts.to_string()
    };
    let gates = items(object, &["spec", "readinessGates"]);
    let open =
        gates.iter().filter(|gate| obj::condition_is_true(object, text(gate, &["conditionType"]))).count();
    let gates = if gates.is_empty() { "<none>".to_owned() } else { format!("{open}/{}", gates.len()) };
    vec![
        json!(format!("{ready}/{total}")),
        json!(pod_status(object)),
        json!(restarts),
        json!(old),
        json!(or_none(text(object, &["status", "podIP"]))),
        json!(or_none(text(object, &["spec", "nodeName"]))),
        json!(or_none(text(object, &["status", "nominatedNodeName"]))),
        json!(gates),
    ]
}

/// The word in the STATUS column.
fn pod_status(object: &Value) -> String {
    let phase = text(object, &["status", "phase"]);
    let mut reason = match text(object, &["status", "reason"]) {
        "" => phase.to_owned(),
        reason => reason.to_owned(),
    };
    let mut is_running = false;
    for status in items(object, &["status", "containerStatuses"]).iter().rev() {
        let waiting = text(status, &["state", "waiting", "reason"]);
        let terminated = obj::at(status, &["state", "terminated"]);
        if !waiting.is_empty() {
            reason = waiting.to_owned();
        } else if let Some(terminated) = terminated.filter(|one| one.is_object()) {
            reason = match text(terminated, &["reason"]) {
                "" => match obj::int(terminated, &["signal"]).filter(|&signal| signal != 0) {
                    Some(signal) => format!("Signal:{signal}"),
                    None => format!("ExitCode:{}", obj::int(terminated, &["exitCode"]).unwrap_or(0)),
                },
                known => known.to_owned(),
            };
        } else if obj::at(status, &["state", "running"]).is_some() {
            is_running |= obj::flag(status, &["ready"]);
        }
    }
    if reason == "Completed" && is_running {
        let is_ready = obj::condition_is_true(object, "Ready");
        reason = if is_ready { "Running".to_owned() } else { "NotReady".to_owned() };
    }
    if obj::is_deleting(object) {
        if text(object, &["status", "reason"]) == "NodeLost" {
            return "Unknown".to_owned();
        }
        return "Terminating".to_owned();
    }
    reason
}

fn service(object: &Value, old: String) -> Vec<Value> {
    let kind = text(object, &["spec", "type"]);
    let ports: Vec<String> = items(object, &["spec", "ports"])
        .iter()
        .map(|port| {
            let number = obj::int(port, &["port"]).unwrap_or(0);
            let node_port = obj::int(port, &["nodePort"]).filter(|&number| number != 0);
            let node_port = node_port.map(|number| format!(":{number}")).unwrap_or_default();
            format!("{number}{node_port}/{}", text(port, &["protocol"]))
        })
        .collect();
    let external: Vec<&str> =
        items(object, &["spec", "externalIPs"]).iter().filter_map(Value::as_str).collect();
    let external = match kind {
        "ExternalName" => text(object, &["spec", "externalName"]).to_owned(),
        "LoadBalancer" if external.is_empty() => "<pending>".to_owned(),
        _ => or_none(&external.join(",")),
    };
    vec![
        json!(kind),
        json!(or_none(text(object, &["spec", "clusterIP"]))),
        json!(external),
        json!(or_none(&ports.join(","))),
        json!(old),
        json!(map_text(object, &["spec", "selector"])),
    ]
}

fn shorten(mut list: Vec<String>) -> String {
    const SHOWN: usize = 3;
    let more = list.len().saturating_sub(SHOWN);
    list.truncate(SHOWN);
    let text = or_none(&list.join(","));
    if more > 0 { format!("{text} + {more} more...") } else { text }
}

fn endpoints(object: &Value) -> String {
    let mut all = Vec::new();
    for subset in items(object, &["subsets"]) {
        for port in items(subset, &["ports"]) {
            for address in items(subset, &["addresses"]) {
                let ip = text(address, &["ip"]);
                all.push(format!("{ip}:{}", obj::int(port, &["port"]).unwrap_or(0)));
            }
        }
    }
    shorten(all)
}

fn endpoint_slice(object: &Value, old: String) -> Vec<Value> {
    let ports = items(object, &["ports"])
        .iter()
        .map(|port| obj::int(port, &["port"]).map_or_else(|| "*".to_owned(), |number| number.to_string()));
    let addresses = items(object, &["endpoints"])
        .iter()
        .flat_map(|one| items(one, &["addresses"]))
        .filter_map(|one| one.as_str().map(str::to_owned));
    let unset = |text: String| {
        if text == "<none>" { "<unset>".to_owned() } else { text }
    };
    vec![
        json!(text(object, &["addressType"])),
        json!(unset(shorten(ports.collect()))),
        json!(unset(shorten(addresses.collect()))),
        json!(old),
    ]
}

fn node(object: &Value, old: String) -> Vec<Value> {
    let mut status = match obj::condition(object, "Ready").map(|ready| text(ready, &["status"])) {
        Some("True") => "Ready",
        Some(_) => "NotReady",
        None => "Unknown",
    }
    .to_owned();
    if obj::flag(object, &["spec", "unschedulable"]) {
        status.push_str(",SchedulingDisabled");
    }
    let mut roles: Vec<&str> = obj::map(object, &["metadata", "labels"])
        .into_iter()
        .flatten()
        .filter_map(|(key, _)| key.strip_prefix("node-role.kubernetes.io/"))
        .collect();
    roles.sort_unstable();
    let address = |kind: &str| {
        let found = items(object, &["status", "addresses"]).iter().find(|one| text(one, &["type"]) == kind);
        or_none(found.map(|one| text(one, &["address"])).unwrap_or_default())
    };
    let info = |field: &str| {
        let value = text(object, &["status", "nodeInfo", field]);
        if value.is_empty() { "<unknown>".to_owned() } else { value.to_owned() }
    };
    vec![
        json!(status),
        json!(or_none(&roles.join(","))),
        json!(old),
        json!(text(object, &["status", "nodeInfo", "kubeletVersion"])),
        json!(address("InternalIP")),
        json!(address("ExternalIP")),
        json!(info("osImage")),
        json!(info("kernelVersion")),
        json!(info("containerRuntimeVersion")),
    ]
}

fn event(object: &Value) -> Vec<Value> {
    let first_of = |paths: &[&[&str]]| {
        paths
            .iter()
            .map(|path| text(object, path))
            .find(|text| !text.is_empty())
            .unwrap_or_default()
            .to_owned()
    };
    let first = first_of(&[&["firstTimestamp"], &["eventTime"], &["metadata", "creationTimestamp"]]);
    let last = first_of(&[
        &["series", "lastObservedTime"],
        &["lastTimestamp"],
        &["eventTime"],
        &["metadata", "creationTimestamp"],
    ]);
    let count = obj::int(object, &["series", "count"]).or_else(|| obj::int(object, &["count"])).unwrap_or(1);
    let target = match text(object, &["involvedObject", "name"]) {
        "" => text(object, &["involvedObject", "kind"]).to_lowercase(),
        name => format!("{}/{name}", text(object, &["involvedObject", "kind"]).to_lowercase()),
    };
    let source =
        [first_of(&[&["source", "component"], &["reportingComponent"]]), first_of(&[&["source", "host"]])];
    let source: Vec<&str> = source.iter().map(String::as_str).filter(|text| !text.is_empty()).collect();
    vec![
        json!(age(&last)),
        json!(text(object, &["type"])),
        json!(text(object, &["reason"])),
        json!(target),
        json!(text(object, &["involvedObject", "fieldPath"])),
        json!(source.join(", ")),
        json!(text(object, &["message"]).trim()),
        json!(age(&first)),
        json!(count),
        json!(obj::name(object)),
    ]
}
