//! Defaults of built-in kinds that clients rely on.

use serde_json::{Value, json};

use super::obj::{self, set, set_default};
use super::registry::Resource;

/// Writes the defaults of a built-in kind. `old` is the stored object on updates.
pub fn apply(resource: &Resource, object: &mut Value, old: Option<&Value>) {
    if resource.custom {
        return;
    }
    match resource.kind.as_str() {
        "Namespace" => namespace(object, old),
        "Pod" => pod(object, old),
        "Service" => service(object),
        "Deployment" => deployment(object),
        "ReplicaSet" | "ReplicationController" => {
            set_default(object, &["spec", "replicas"], 1);
            template(object);
        }
        "DaemonSet" => daemon_set(object),
        "StatefulSet" => stateful_set(object),
        "Job" => job(object),
        "Secret" => secret(object),
        "EndpointSlice" => endpoint_slice(object),
        "Node" => node(object, old),
        "Event" => event(object),
        "MutatingWebhookConfiguration" | "ValidatingWebhookConfiguration" => webhooks(object),
        _ => {}
    }
}

fn namespace(object: &mut Value, old: Option<&Value>) {
    let name = obj::name(object).to_owned();
    set(object, &["metadata", "labels", "kubernetes.io/metadata.name"], name);
    if old.is_none() {
        set(object, &["spec", "finalizers"], json!(["kubernetes"]));
        set(object, &["status", "phase"], "Active");
    }
}

fn pod(object: &mut Value, old: Option<&Value>) {
    if old.is_none() {
        set_default(object, &["status", "phase"], "Pending");
        let class = qos_class(object);
        set(object, &["status", "qosClass"], class);
    }
    if let Some(spec) = object.get_mut("spec") {
        let account = obj::text(spec, &["serviceAccountName"]).to_owned();
        if account.is_empty() {
            let deprecated = obj::text(spec, &["serviceAccount"]).to_owned();
            let account = if deprecated.is_empty() { "default".to_owned() } else { deprecated };
            set(spec, &["serviceAccountName"], account.clone());
            set(spec, &["serviceAccount"], account);
        } else {
            set(spec, &["serviceAccount"], account);
        }
        set_default(spec, &["enableServiceLinks"], true);
        set_default(spec, &["preemptionPolicy"], "PreemptLowerPriority");
        set_default(spec, &["priority"], 0);
        if old.is_none() {
            not_ready_tolerations(spec);
        }
        pod_spec(spec);
    }
}

fn not_ready_tolerations(spec: &mut Value) {
    let mut tolerations = obj::items(spec, &["tolerations"]).to_vec();
    for key in ["node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable"] {
        let covered = tolerations.iter().any(|one| {
            let (its, operator) = (obj::text(one, &["key"]), obj::text(one, &["operator"]));
            its == key || its.is_empty() && operator == "Exists"
        });
        if !covered {
            tolerations.push(
                json!({"key": key, "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 300}),
            );
        }
    }
    set(spec, &["tolerations"], tolerations);
}

/// Defaults of a pod spec, also within templates.
fn pod_spec(spec: &mut Value) {
    if !spec.is_object() {
        return;
    }
    set_default(spec, &["restartPolicy"], "Always");
    set_default(spec, &["terminationGracePeriodSeconds"], 30);
    set_default(spec, &["dnsPolicy"], "ClusterFirst");
    set_default(spec, &["schedulerName"], "default-scheduler");
    set_default(spec, &["securityContext"], json!({}));
    let account = obj::text(spec, &["serviceAccountName"]).to_owned();
    if !account.is_empty() {
        set(spec, &["serviceAccount"], account);
    }
    let is_host_network = obj::flag(spec, &["hostNetwork"]);
    for list in ["containers", "initContainers"] {
        for container in spec.get_mut(list).and_then(Value::as_array_mut).into_iter().flatten() {
            if container.is_object() {
                defaults_of_container(container, is_host_network);
            }
        }
    }
    for volume in spec.get_mut("volumes").and_then(Value::as_array_mut).into_iter().flatten() {
        for source in ["configMap", "secret", "projected"] {
            if volume.get(source).is_some_and(Value::is_object) {
                set_default(volume, &[source, "defaultMode"], 420);
            }
        }
        if volume.get("hostPath").is_some_and(Value::is_object) {
            set_default(volume, &["hostPath", "type"], "");
        }
    }
}

fn defaults_of_container(container: &mut Value, is_host_network: bool) {
    let image = obj::text(container, &["image"]);
    let tag = image.rsplit('/').next().and_then(|last| last.split_once(':')).map(|(_, tag)| tag);
    let policy =
        if tag.is_none_or(|tag| tag == "latest") && !image.contains('@') { "Always" } else { "IfNotPresent" };
    set_default(container, &["imagePullPolicy"], policy);
    set_default(container, &["terminationMessagePath"], "/dev/termination-log");
    set_default(container, &["terminationMessagePolicy"], "File");
    set_default(container, &["resources"], json!({}));
    for port in container.get_mut("ports").and_then(Value::as_array_mut).into_iter().flatten() {
        if port.is_object() {
            set_default(port, &["protocol"], "TCP");
            if let Some(number) = obj::int(port, &["containerPort"]).filter(|_| is_host_network) {
                set_default(port, &["hostPort"], number);
            }
        }
    }
    for probe in ["livenessProbe", "readinessProbe", "startupProbe"] {
        if container.get(probe).is_some_and(Value::is_object) {
            set_default(container, &[probe, "timeoutSeconds"], 1);
            set_default(container, &[probe, "periodSeconds"], 10);
            set_default(container, &[probe, "successThreshold"], 1);
            set_default(container, &[probe, "failureThreshold"], 3);
            if obj::at(container, &[probe, "httpGet"]).is_some_and(Value::is_object) {
                set_default(container, &[probe, "httpGet", "scheme"], "HTTP");
                set_default(container, &[probe, "httpGet", "path"], "/");
            }
        }
    }
    for env in container.get_mut("env").and_then(Value::as_array_mut).into_iter().flatten() {
        if obj::at(env, &["valueFrom", "fieldRef"]).is_some_and(Value::is_object) {
            set_default(env, &["valueFrom", "fieldRef", "apiVersion"], "v1");
        }
    }
}

fn qos_class(object: &Value) -> &'static str {
    let containers = obj::items(object, &["spec", "containers"]);
    let part = |container: &Value, part: &str| {
        obj::map(container, &["resources", part]).cloned().unwrap_or_default()
    };
    let none =
        containers.iter().all(|one| part(one, "requests").is_empty() && part(one, "limits").is_empty());
    let full = |one: &Value| {
        let (limits, requests) = (part(one, "limits"), part(one, "requests"));
        ["cpu", "memory"].iter().all(|&name| {
            limits.contains_key(name) && requests.get(name).is_none_or(|wish| Some(wish) == limits.get(name))
        })
    };
    if none {
        "BestEffort"
    } else if containers.iter().all(full) {
        "Guaranteed"
    } else {
        "Burstable"
    }
}

fn template(object: &mut Value) {
    if let Some(template) = object.get_mut("spec").and_then(|spec| spec.get_mut("template")) {
        if !template.is_object() {
            return;
        }
        set_default(template, &["metadata"], json!({}));
        if obj::at(template, &["metadata", "creationTimestamp"]).is_some() {
            obj::remove(template, &["metadata", "creationTimestamp"]);
        }
        if let Some(spec) = template.get_mut("spec") {
            pod_spec(spec);
        }
    }
}

fn deployment(object: &mut Value) {
    set_default(object, &["spec", "replicas"], 1);
    set_default(object, &["spec", "revisionHistoryLimit"], 10);
    set_default(object, &["spec", "progressDeadlineSeconds"], 600);
    set_default(object, &["spec", "strategy", "type"], "RollingUpdate");
    if obj::text(object, &["spec", "strategy", "type"]) == "RollingUpdate" {
        set_default(object, &["spec", "strategy", "rollingUpdate", "maxUnavailable"], "25%");
        set_default(object, &["spec", "strategy", "rollingUpdate", "maxSurge"], "25%");
    }
    template(object);
}

fn daemon_set(object: &mut Value) {
    set_default(object, &["spec", "revisionHistoryLimit"], 10);
    set_default(object, &["spec", "updateStrategy", "type"], "RollingUpdate");
    if obj::text(object, &["spec", "updateStrategy", "type"]) == "RollingUpdate" {
        set_default(object, &["spec", "updateStrategy", "rollingUpdate", "maxUnavailable"], 1);
        set_default(object, &["spec", "updateStrategy", "rollingUpdate", "maxSurge"], 0);
    }
    template(object);
}

fn stateful_set(object: &mut Value) {
    set_default(object, &["spec", "replicas"], 1);
    set_default(object, &["spec", "revisionHistoryLimit"], 10);
    set_default(object, &["spec", "podManagementPolicy"], "OrderedReady");
    set_default(object, &["spec", "updateStrategy", "type"], "RollingUpdate");
    template(object);
}

fn job(object: &mut Value) {
    set_default(object, &["spec", "completions"], 1);
    set_default(object, &["spec", "parallelism"], 1);
    set_default(object, &["spec", "backoffLimit"], 6);
    template(object);
}

fn service(object: &mut Value) {
    set_default(object, &["spec", "type"], "ClusterIP");
    set_default(object, &["spec", "sessionAffinity"], "None");
    set_default(object, &["spec", "internalTrafficPolicy"], "Cluster");
    if obj::text(object, &["spec", "sessionAffinity"]) == "ClientIP" {
        set_default(object, &["spec", "sessionAffinityConfig", "clientIP", "timeoutSeconds"], 10_800);
    } else {
        obj::remove(object, &["spec", "sessionAffinityConfig"]);
    }
    let ports = object.get_mut("spec").and_then(|spec| spec.get_mut("ports")).and_then(Value::as_array_mut);
    for port in ports.into_iter().flatten().filter(|port| port.is_object()) {
        set_default(port, &["protocol"], "TCP");
        if let Some(number) = port.get("port").cloned() {
            set_default(port, &["targetPort"], number);
        }
    }
}

/// `stringData` is written as `data`.
fn secret(object: &mut Value) {
    set_default(object, &["type"], "Opaque");
    if let Some(Value::Object(texts)) = obj::remove(object, &["stringData"]) {
        for (key, text) in texts {
            let encoded = base64(text.as_str().unwrap_or_default().as_bytes());
            set(object, &["data", &key], encoded);
        }
    }
}

/// Standard base64 with padding.
pub fn base64(bytes: &[u8]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for chunk in bytes.chunks(3) {
        let byte = |index: usize| u32::from(chunk.get(index).copied().unwrap_or(0));
        let bits = byte(0) << 16 | byte(1) << 8 | byte(2);
        for position in 0..4_usize {
            if position <= chunk.len() {
                let index = (bits >> (18 - 6 * position)) & 0x3f;
                text.push(char::from(ALPHABET[index as usize]));
            } else {
                text.push('=');
            }
        }
    }
    text
}

fn endpoint_slice(object: &mut Value) {
    let ports = object.get_mut("ports").and_then(Value::as_array_mut);
    for port in ports.into_iter().flatten().filter(|port| port.is_object()) {
        set_default(port, &["protocol"], "TCP");
        set_default(port, &["name"], "");
    }
}

fn node(object: &mut Value, old: Option<&Value>) {
    if old.is_none() {
        let name = obj::name(object).to_owned();
        set_default(object, &["metadata", "labels", "kubernetes.io/hostname"], name);
    }
}

fn event(object: &mut Value) {
    set_default(object, &["type"], "Normal");
    if obj::at(object, &["eventTime"]).is_none() {
        let now = obj::now();
        set_default(object, &["firstTimestamp"], now.clone());
        set_default(object, &["lastTimestamp"], now);
        set_default(object, &["count"], 1);
    }
}

fn webhooks(object: &mut Value) {
    for hook in object.get_mut("webhooks").and_then(Value::as_array_mut).into_iter().flatten() {
        if !hook.is_object() {
            continue;
        }
        set_default(hook, &["failurePolicy"], "Fail");
        set_default(hook, &["matchPolicy"], "Equivalent");
        set_default(hook, &["timeoutSeconds"], 10);
        set_default(hook, &["namespaceSelector"], json!({}));
        set_default(hook, &["objectSelector"], json!({}));
        if obj::at(hook, &["clientConfig", "service"]).is_some_and(Value::is_object) {
            set_default(hook, &["clientConfig", "service", "port"], 443);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_of_all_lengths() {
        for (plain, encoded) in
            [("", ""), ("f", "Zg=="), ("fo", "Zm8="), ("foo", "Zm9v"), ("foob", "Zm9vYg==")]
        {
            assert_eq!(base64(plain.as_bytes()), encoded);
        }
    }
}
