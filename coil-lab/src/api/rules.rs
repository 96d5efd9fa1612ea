//! Validation of built-in kinds beyond their schema: the mistakes that users make.

use serde_json::Value;

use super::error::FieldError;
use super::meta;
use super::obj;
use super::registry::Resource;
use super::selector::Labels;

/// What is wrong with an object of a built-in kind.
pub fn violations(resource: &Resource, object: &Value, old: Option<&Value>) -> Vec<FieldError> {
    let mut errors = Vec::new();
    match resource.kind.as_str() {
        "Pod" => {
            pod_spec(object, &["spec"], "spec", &mut errors);
            if let Some(old) = old {
                pod_update(object, old, &mut errors);
            }
        }
        "Deployment" | "ReplicaSet" | "DaemonSet" | "StatefulSet" => {
            workload(resource, object, old, &mut errors)
        }
        "Service" => service(object, &mut errors),
        "PodDisruptionBudget" => budget(object, &mut errors),
        "CustomResourceDefinition" => super::crd::violations(object, &mut errors),
        "ConfigMap" | "Secret" => immutable(object, old, &mut errors),
        "RoleBinding" | "ClusterRoleBinding" => {
            if let Some(old) = old
                && object.get("roleRef") != old.get("roleRef")
            {
                errors.push(FieldError::invalid(
                    "roleRef",
                    &object.get("roleRef").cloned().unwrap_or_default(),
                    "cannot change roleRef",
                ));
            }
        }
        _ => {}
    }
    errors
}

fn pod_spec(object: &Value, path: &[&str], field: &str, errors: &mut Vec<FieldError>) {
    let spec = obj::at(object, path).unwrap_or(&Value::Null);
    let containers = obj::items(spec, &["containers"]);
    if containers.is_empty() {
        errors.push(FieldError::required(format!("{field}.containers"), ""));
    }
    let mut names: Vec<&str> = Vec::new();
    for list in ["containers", "initContainers"] {
        for (index, container) in obj::items(spec, &[list]).iter().enumerate() {
            let at = format!("{field}.{list}[{index}]");
            let name = obj::text(container, &["name"]);
            if name.is_empty() {
                errors.push(FieldError::required(format!("{at}.name"), ""));
            } else if !meta::is_dns_label(name) {
                errors.push(FieldError::invalid(
                    format!("{at}.name"),
                    &name.into(),
                    "a lowercase RFC 1123 label must consist of lower case alphanumeric characters or '-'",
                ));
            } else if names.contains(&name) {
                errors.push(FieldError {
                    reason: "FieldValueDuplicate",
                    field: format!("{at}.name"),
                    message: format!("Duplicate value: \"{name}\""),
                });
            }
            names.push(name);
            if obj::text(container, &["image"]).is_empty() {
                errors.push(FieldError::required(format!("{at}.image"), ""));
            }
            for (number, port) in obj::items(container, &["ports"]).iter().enumerate() {
                let value = obj::int(port, &["containerPort"]).unwrap_or(0);
                if !(1..=65_535).contains(&value) {
                    errors.push(FieldError::invalid(
                        format!("{at}.ports[{number}].containerPort"),
                        &value.into(),
                        "must be between 1 and 65535, inclusive",
                    ));
                }
            }
        }
    }
    let policy = obj::text(spec, &["restartPolicy"]);
    let allowed = ["Always", "OnFailure", "Never"].map(str::to_owned);
    if !policy.is_empty() && !allowed.iter().any(|one| one == policy) {
        errors.push(FieldError::not_supported(format!("{field}.restartPolicy"), &policy.into(), &allowed));
    }
}

/// Of a pod's spec only images, deadlines and tolerations may change, and the node once.
fn pod_update(object: &Value, old: &Value, errors: &mut Vec<FieldError>) {
    let strip = |pod: &Value| {
        let mut spec = pod.get("spec").cloned().unwrap_or_default();
        for field in
            ["activeDeadlineSeconds", "tolerations", "terminationGracePeriodSeconds", "schedulingGates"]
        {
            obj::remove(&mut spec, &[field]);
        }
        for list in ["containers", "initContainers", "ephemeralContainers"] {
            for container in spec.get_mut(list).and_then(Value::as_array_mut).into_iter().flatten() {
                obj::remove(container, &["image"]);
            }
        }
        obj::remove(&mut spec, &["ephemeralContainers"]);
        if obj::text(old, &["spec", "nodeName"]).is_empty() {
            obj::remove(&mut spec, &["nodeName"]);
        }
        spec
    };
    if strip(object) != strip(old) {
        errors.push(FieldError::forbidden(
            "spec",
            "pod updates may not change fields other than `spec.containers[*].image`,`spec.initContainers[*].image`,`spec.activeDeadlineSeconds`,`spec.tolerations` (only additions to existing tolerations),`spec.terminationGracePeriodSeconds` (allow it to be set to 1 if it was previously negative)",
        ));
    }
}

fn workload(resource: &Resource, object: &Value, old: Option<&Value>, errors: &mut Vec<FieldError>) {
    if let Some(replicas) = obj::int(object, &["spec", "replicas"]).filter(|&replicas| replicas < 0) {
        errors.push(FieldError::invalid(
            "spec.replicas",
            &replicas.into(),
            "must be greater than or equal to 0",
        ));
    }
    let selector = obj::at(object, &["spec", "selector"]).unwrap_or(&Value::Null);
    match Labels::from_object(selector) {
        None => errors.push(FieldError::required("spec.selector", "")),
        Some(labels) if labels.is_empty() => errors.push(FieldError::invalid(
            "spec.selector",
            selector,
            format!("empty selector is invalid for {}", resource.singular),
        )),
        Some(labels) => {
            if !labels.matches_map(obj::map(object, &["spec", "template", "metadata", "labels"])) {
                let value = obj::at(object, &["spec", "template", "metadata", "labels"]).cloned();
                errors.push(FieldError::invalid(
                    "spec.template.metadata.labels",
                    &value.unwrap_or_default(),
                    "`selector` does not match template `labels`",
                ));
            }
        }
    }
    meta::label_violations(
        object,
        &["spec", "template", "metadata", "labels"],
        "spec.template.metadata.labels",
        errors,
    );
    pod_spec(object, &["spec", "template", "spec"], "spec.template.spec", errors);
    let restart = obj::text(object, &["spec", "template", "spec", "restartPolicy"]);
    if restart != "Always" && ["OnFailure", "Never"].contains(&restart) {
        errors.push(FieldError::not_supported(
            "spec.template.spec.restartPolicy",
            &restart.into(),
            &["Always".to_owned()],
        ));
    }
    if let Some(old) = old
        && obj::at(old, &["spec", "selector"]) != obj::at(object, &["spec", "selector"])
    {
        errors.push(FieldError::invalid("spec.selector", selector, "field is immutable"));
    }
    if resource.kind == "Deployment" {
        strategy(object, errors);
    }
}

fn strategy(object: &Value, errors: &mut Vec<FieldError>) {
    let kind = obj::text(object, &["spec", "strategy", "type"]);
    let allowed = ["Recreate", "RollingUpdate"].map(str::to_owned);
    if !allowed.iter().any(|one| one == kind) {
        errors.push(FieldError::not_supported("spec.strategy.type", &kind.into(), &allowed));
    }
    let rolling = obj::at(object, &["spec", "strategy", "rollingUpdate"]);
    if kind == "Recreate" && rolling.is_some_and(|rolling| !rolling.is_null()) {
        errors.push(FieldError::forbidden(
            "spec.strategy.rollingUpdate",
            "may not be specified when strategy `type` is 'Recreate'",
        ));
    }
    let is_zero = |field: &str| {
        let value = rolling.and_then(|rolling| rolling.get(field));
        value.is_some_and(|value| {
            *value == 0 || value.as_str().is_some_and(|text| text == "0%" || text == "0")
        })
    };
    if is_zero("maxSurge") && is_zero("maxUnavailable") {
        errors.push(FieldError::invalid(
            "spec.strategy.rollingUpdate.maxUnavailable",
            &0.into(),
            "may not be 0 when `maxSurge` is 0",
        ));
    }
}

fn service(object: &Value, errors: &mut Vec<FieldError>) {
    let kind = obj::text(object, &["spec", "type"]);
    let allowed = ["ClusterIP", "ExternalName", "LoadBalancer", "NodePort"].map(str::to_owned);
    if !allowed.iter().any(|one| one == kind) {
        errors.push(FieldError::not_supported("spec.type", &kind.into(), &allowed));
    }
    let affinity = obj::text(object, &["spec", "sessionAffinity"]);
    let affinities = ["ClientIP", "None"].map(str::to_owned);
    if !affinities.iter().any(|one| one == affinity) {
        errors.push(FieldError::not_supported("spec.sessionAffinity", &affinity.into(), &affinities));
    }
    let ports = obj::items(object, &["spec", "ports"]);
    let is_headless = obj::text(object, &["spec", "clusterIP"]) == "None";
    if ports.is_empty() && !is_headless && kind != "ExternalName" {
        errors.push(FieldError::required("spec.ports", ""));
    }
    for (index, port) in ports.iter().enumerate() {
        let at = format!("spec.ports[{index}]");
        let number = obj::int(port, &["port"]).unwrap_or(0);
        if !(1..=65_535).contains(&number) {
            errors.push(FieldError::invalid(
                format!("{at}.port"),
                &number.into(),
                "must be between 1 and 65535, inclusive",
            ));
        }
        if ports.len() > 1 && obj::text(port, &["name"]).is_empty() {
            errors.push(FieldError::required(format!("{at}.name"), ""));
        }
        let protocol = obj::text(port, &["protocol"]);
        let protocols = ["SCTP", "TCP", "UDP"].map(str::to_owned);
        if !protocols.iter().any(|one| one == protocol) {
            errors.push(FieldError::not_supported(format!("{at}.protocol"), &protocol.into(), &protocols));
        }
    }
}

fn budget(object: &Value, errors: &mut Vec<FieldError>) {
    let (min, max) =
        (obj::at(object, &["spec", "minAvailable"]), obj::at(object, &["spec", "maxUnavailable"]));
    if min.is_some() && max.is_some() {
        errors.push(FieldError::invalid(
            "spec",
            &object.get("spec").cloned().unwrap_or_default(),
            "minAvailable and maxUnavailable cannot be both set",
        ));
    }
    for (name, value) in [("minAvailable", min), ("maxUnavailable", max)] {
        let Some(value) = value else { continue };
        let is_ok = match value {
            Value::Number(number) => number.as_i64().is_some_and(|number| number >= 0),
            Value::String(text) => text
                .strip_suffix('%')
                .and_then(|number| number.parse::<u32>().ok())
                .is_some_and(|percent| percent <= 100),
            _ => false,
        };
        if !is_ok {
            errors.push(FieldError::invalid(
                format!("spec.{name}"),
                value,
                "must be a non-negative integer or a percentage of at most 100%",
            ));
        }
    }
}

fn immutable(object: &Value, old: Option<&Value>, errors: &mut Vec<FieldError>) {
    let Some(old) = old.filter(|old| obj::flag(old, &["immutable"])) else {
        return;
    };
    for field in ["data", "binaryData"] {
        if object.get(field) != old.get(field) {
            errors.push(FieldError::forbidden(field, "field is immutable when `immutable` is set"));
        }
    }
}
