//! Admission cases of the original (`spec/coil.md` 8.5), as far as no API server is needed.

use serde_json::{Value, json};

use super::super::{Egress, EgressSpec, SessionAffinity};
use super::validate;
use crate::violation::describe;

fn egress(spec: Value) -> Egress {
    serde_json::from_value(json!({
        "apiVersion": "coil.cybozu.com/v2", "kind": "Egress",
        "metadata": { "namespace": "internet", "name": "egress" },
        "spec": spec,
    }))
    .expect("an Egress")
}

fn with(extra: Value) -> Egress {
    let mut spec = json!({ "destinations": ["10.1.2.0/24", "fd03::/64"] });
    for (key, value) in extra.as_object().expect("an object") {
        spec[key] = value.clone();
    }
    egress(spec)
}

#[track_caller]
fn accept(extra: Value) {
    let found = validate(&with(extra), None);
    assert!(found.is_empty(), "{}", describe(&found));
}

#[track_caller]
fn reject(extra: Value, fields: &[&str]) {
    let found = validate(&with(extra), None);
    assert_eq!(found.iter().map(|v| v.field.as_str()).collect::<Vec<_>>(), fields, "{}", describe(&found));
}

#[test]
fn a18_defaults() {
    let egress = with(json!({}));
    assert_eq!(egress.spec.replicas, 1);
    assert_eq!(egress.spec.session_affinity, SessionAffinity::ClientIP);
    assert!(!egress.spec.fou_source_port_auto);
    assert_eq!(egress.spec.destination_nets().expect("both families").len(), 2);
    assert_eq!(
        egress.spec,
        EgressSpec { destinations: egress.spec.destinations.clone(), ..EgressSpec::default() }
    );
    accept(json!({}));
}

#[test]
fn a19_empty_destinations() {
    reject(json!({ "destinations": [] }), &["spec.destinations"]);
}

#[test]
fn a20_bad_destinations() {
    reject(json!({ "destinations": ["10.1.2.0/24", "10.1.2.0"] }), &["spec.destinations[1]"]);
    reject(json!({ "destinations": ["2000:/64", "fd03::/64"] }), &["spec.destinations[0]"]);
    reject(json!({ "excludedDestinations": ["x"] }), &["spec.excludedDestinations[0]"]);
}

#[test]
fn a21_a29_negative_replicas() {
    reject(json!({ "replicas": -1 }), &["spec.replicas"]);
    reject(json!({ "replicas": 0 }), &["spec.replicas"]);
    assert!(!validate(&with(json!({ "replicas": -1 })), Some(&with(json!({})))).is_empty());
}

#[test]
fn a22_a23_strategy() {
    reject(json!({ "strategy": { "type": "Unknown" } }), &["spec.strategy.type"]);
    reject(json!({ "strategy": {} }), &["spec.strategy.type"]);
    accept(json!({ "strategy": { "type": "Recreate" } }));
    accept(
        json!({ "strategy": { "type": "RollingUpdate", "rollingUpdate": { "maxSurge": "30%", "maxUnavailable": 0 } } }),
    );
    reject(
        json!({ "strategy": { "type": "Recreate", "rollingUpdate": { "maxSurge": 1 } } }),
        &["spec.strategy.rollingUpdate"],
    );
}

#[test]
fn a24_a25_template() {
    reject(
        json!({ "template": { "metadata": { "annotations": { "a b": "c" } } } }),
        &["spec.template.metadata.annotations"],
    );
    reject(
        json!({ "template": { "metadata": { "labels": { "a": "-" } } } }),
        &["spec.template.metadata.labels[a]"],
    );
    accept(
        json!({ "template": { "metadata": { "annotations": { "ann1": "any text, really" }, "labels": { "l": "v" } },
        "spec": { "schedulerName": "hoge", "volumes": [{ "name": "dummy", "emptyDir": {} }] } } }),
    );
    reject(json!({ "template": { "spec": { "containers": "none" } } }), &["spec.template.spec"]);
    reject(json!({ "template": { "spec": { "hostNetwork": true } } }), &["spec.template.spec.hostNetwork"]);
}

#[test]
fn a26_unknown_affinity() {
    let result = serde_json::from_value::<EgressSpec>(
        json!({ "destinations": ["10.0.0.0/8"], "sessionAffinity": "hoge" }),
    );
    assert!(result.is_err());
}

#[test]
fn a27_a28_a30_other_values() {
    accept(json!({ "sessionAffinity": "None", "replicas": 3 }));
    accept(json!({ "sessionAffinityConfig": { "clientIP": { "timeoutSeconds": 100 } } }));
    reject(
        json!({ "sessionAffinityConfig": { "clientIP": { "timeoutSeconds": 0 } } }),
        &["spec.sessionAffinityConfig.clientIP.timeoutSeconds"],
    );
    assert!(validate(&with(json!({ "destinations": ["0.0.0.0/0"] })), Some(&with(json!({})))).is_empty());
    assert!(
        validate(&with(json!({ "replicas": 2, "sessionAffinity": "None" })), Some(&with(json!({}))))
            .is_empty()
    );
}

#[test]
fn a31_a32_pod_disruption_budget() {
    accept(json!({ "podDisruptionBudget": { "minAvailable": 1 } }));
    accept(json!({ "podDisruptionBudget": { "maxUnavailable": "100%" } }));
    reject(
        json!({ "podDisruptionBudget": { "minAvailable": 1, "maxUnavailable": 1 } }),
        &["spec.podDisruptionBudget.minAvailable"],
    );
    for bad in [json!("120%"), json!("10"), json!("%"), json!("-1%"), json!(-1)] {
        reject(
            json!({ "podDisruptionBudget": { "maxUnavailable": bad } }),
            &["spec.podDisruptionBudget.maxUnavailable"],
        );
    }
}

#[test]
fn clients_need_a_selector() {
    reject(json!({ "clients": [{}] }), &["spec.clients[0]"]);
    accept(
        json!({ "clients": [{ "namespaceSelector": {} }, { "podSelector": { "matchExpressions": [{ "key": "app", "operator": "Exists" }] } }] }),
    );
    reject(
        json!({ "clients": [{ "podSelector": { "matchExpressions": [{ "key": "app", "operator": "In" }] } }] }),
        &["spec.clients[0].podSelector.matchExpressions[0].values"],
    );
}

#[test]
fn the_name_must_be_legal_for_a_service() {
    for (name, good) in [("egress-1", true), ("1egress", false), ("a.b", false), (&*"a".repeat(64), false)] {
        let mut egress = with(json!({}));
        egress.metadata.name = Some(name.to_owned());
        assert_eq!(validate(&egress, None).is_empty(), good, "{name}");
    }
}
