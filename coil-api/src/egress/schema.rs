//! Parts of the schema that types alone do not say: bounds, CEL rules, embedded Kubernetes types.
//!
//! Every list and text that a CEL rule reads is bounded, because the API server refuses rules whose
//! worst case it cannot bound. `isCIDR` needs Kubernetes 1.31.

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::CustomResourceExt;
use schemars::{Schema, SchemaGenerator, json_schema};
use serde_json::{Value, json};

use super::{Egress, MAX_CLIENTS, MAX_DESTINATIONS};

/// The CustomResourceDefinition of Egress.
#[must_use]
pub fn crd() -> CustomResourceDefinition {
    let mut crd = Egress::crd();
    crate::names::label(&mut crd.metadata);
    crd
}

pub(super) fn destinations(_: &mut SchemaGenerator) -> Schema {
    cidrs("Networks in CIDR notation, IPv4 and IPv6, that clients reach through the egress pods.", 1)
}

pub(super) fn excluded_destinations(_: &mut SchemaGenerator) -> Schema {
    cidrs("Networks in CIDR notation that clients reach directly although a destination contains them.", 0)
}

fn cidrs(description: &str, least: usize) -> Schema {
    json_schema!({
        "description": description,
        "type": "array",
        "minItems": least,
        "maxItems": MAX_DESTINATIONS,
        "items": {
            "type": "string",
            "minLength": 1,
            "maxLength": 64,
            "x-kubernetes-validations": [{
                "rule": "isCIDR(self)",
                "message": "must be a CIDR: an address and a prefix length, as 10.0.0.0/8 or fd00::/8",
            }],
        },
    })
}

pub(super) fn clients(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "description": "Pods that use this Egress, in addition to those whose annotation names it. The pods do not need to be restarted.",
        "type": "array",
        "maxItems": MAX_CLIENTS,
        "items": {
            "type": "object",
            "properties": {
                "namespaceSelector": label_selector("Namespaces of the pods; {} means all. Absent: only the namespace of the Egress."),
                "podSelector": label_selector("Pods in these namespaces. Absent: all."),
            },
            "x-kubernetes-validations": [{
                "rule": "has(self.namespaceSelector) || has(self.podSelector)",
                "message": "namespaceSelector or podSelector is required",
            }],
        },
    })
}

fn label_selector(description: &str) -> Value {
    json!({
        "description": description,
        "type": "object",
        "properties": {
            "matchLabels": { "type": "object", "additionalProperties": { "type": "string" } },
            "matchExpressions": {
                "type": "array",
                "maxItems": 64,
                "items": {
                    "type": "object",
                    "required": ["key", "operator"],
                    "properties": {
                        "key": { "type": "string", "minLength": 1 },
                        "operator": { "type": "string", "maxLength": 16, "enum": ["In", "NotIn", "Exists", "DoesNotExist"] },
                        "values": { "type": "array", "maxItems": 256, "items": { "type": "string" } },
                    },
                    "x-kubernetes-validations": [{
                        "rule": "(self.operator in ['In', 'NotIn']) == (has(self.values) && self.values.size() > 0)",
                        "message": "In and NotIn need values, Exists and DoesNotExist take none",
                    }],
                },
            },
        },
        "x-kubernetes-map-type": "atomic",
    })
}

pub(super) fn strategy(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "description": "How egress pods are replaced by new ones; see Deployment.",
        "type": "object",
        "required": ["type"],
        "properties": {
            "type": { "type": "string", "enum": ["Recreate", "RollingUpdate"] },
            "rollingUpdate": {
                "type": "object",
                "properties": {
                    "maxSurge": int_or_percent("Pods above the number wanted, a number or a percentage."),
                    "maxUnavailable": int_or_percent("Pods below the number wanted, a number or a percentage."),
                },
            },
        },
        "x-kubernetes-validations": [{
            "rule": "self.type == 'RollingUpdate' || !has(self.rollingUpdate)",
            "message": "rollingUpdate needs type RollingUpdate",
        }],
    })
}

pub(super) fn session_affinity(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "description": "Whether all flows of a client pod leave through the same egress pod.",
        "type": "string",
        "enum": ["ClientIP", "None"],
        "default": "ClientIP",
    })
}

pub(super) fn gateway_preference(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "description": "Which ready egress pods take the new flows of a client pod: those on its Node (or, where there is none, in its zone), those in the Zone of its node, or all (None). Where no preferred one is ready, all do.",
        "type": "string",
        "enum": ["None", "Zone", "Node"],
        "default": "None",
    })
}

pub(super) fn session_affinity_config(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "description": "Details of the affinity; see Service.",
        "type": "object",
        "properties": {
            "clientIP": {
                "type": "object",
                "properties": {
                    "timeoutSeconds": { "type": "integer", "format": "int32", "minimum": 1, "maximum": 86400 },
                },
            },
        },
    })
}

pub(super) fn pod_disruption_budget(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "description": "Limits for voluntary disruptions of the egress pods; at most one of the two.",
        "type": "object",
        "properties": {
            "minAvailable": int_or_percent("Egress pods that must stay, a number or a percentage."),
            "maxUnavailable": int_or_percent("Egress pods that may go, a number or a percentage."),
        },
        "x-kubernetes-validations": [{
            "rule": "!(has(self.minAvailable) && has(self.maxUnavailable))",
            "message": "minAvailable and maxUnavailable exclude each other",
        }],
    })
}

/// `pattern` speaks of texts only, `minimum` of numbers only.
fn int_or_percent(description: &str) -> Value {
    json!({
        "description": description,
        "x-kubernetes-int-or-string": true,
        "minimum": 0,
        "pattern": "^0*(100|[0-9]{1,2})%$",
    })
}

/// The PodSpec is left open: the full schema of its many hundred fields would make the CRD too large for
/// client-side apply once descriptions are counted, and would drop every field that is newer than it.
/// The API server checks it when the Deployment is written; what it says becomes a condition.
pub(super) fn template(_: &mut SchemaGenerator) -> Schema {
    let named = json!({
        "type": "array",
        "items": {
            "type": "object",
            "required": ["name"],
            "properties": { "name": { "type": "string", "minLength": 1 } },
            "x-kubernetes-preserve-unknown-fields": true,
        },
        "x-kubernetes-list-type": "map",
        "x-kubernetes-list-map-keys": ["name"],
    });
    let strings = json!({ "type": "object", "additionalProperties": { "type": "string" } });
    json_schema!({
        "description": "Changes to the egress pods.",
        "type": "object",
        "properties": {
            "metadata": {
                "type": "object",
                "properties": { "labels": strings, "annotations": strings },
            },
            "spec": {
                "type": "object",
                "properties": {
                    "containers": named,
                    "initContainers": named,
                    "volumes": named,
                    "nodeSelector": strings,
                    "hostNetwork": { "type": "boolean", "enum": [false] },
                    "schedulerName": { "type": "string" },
                    "priorityClassName": { "type": "string" },
                    "terminationGracePeriodSeconds": { "type": "integer", "format": "int64", "minimum": 0 },
                    "affinity": { "type": "object", "x-kubernetes-preserve-unknown-fields": true },
                    "tolerations": {
                        "type": "array",
                        "items": { "type": "object", "x-kubernetes-preserve-unknown-fields": true },
                    },
                    "topologySpreadConstraints": {
                        "type": "array",
                        "items": { "type": "object", "x-kubernetes-preserve-unknown-fields": true },
                    },
                },
                "x-kubernetes-preserve-unknown-fields": true,
            },
        },
    })
}

pub(super) fn conditions(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "description": "Valid: the specification can be carried out. Reconciled: all objects that belong to the Egress are as they should be. Ready: egress pods take traffic.",
        "type": "array",
        "items": {
            "type": "object",
            "required": ["type", "status", "lastTransitionTime", "reason", "message"],
            "properties": {
                "type": { "type": "string", "maxLength": 316 },
                "status": { "type": "string", "enum": ["True", "False", "Unknown"] },
                "observedGeneration": { "type": "integer", "format": "int64", "minimum": 0 },
                "lastTransitionTime": { "type": "string", "format": "date-time" },
                "reason": { "type": "string", "minLength": 1, "maxLength": 1024 },
                "message": { "type": "string", "maxLength": 32768 },
            },
        },
        "x-kubernetes-list-type": "map",
        "x-kubernetes-list-map-keys": ["type"],
    })
}
