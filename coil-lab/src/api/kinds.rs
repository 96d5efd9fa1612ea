//! The built-in resources.

use super::registry::{GroupResource, Registry, Resource, ScalePaths};
use super::schema::builtin;

const NAMESPACED: bool = true;
const CLUSTER: bool = false;

struct Kind {
    group: &'static str,
    version: &'static str,
    kind: &'static str,
    plural: &'static str,
    namespaced: bool,
    short: &'static [&'static str],
    all: bool,
    status: bool,
    scale: bool,
    definition: &'static str,
}

const fn kind(
    api: (&'static str, &'static str),
    kind: &'static str,
    plural: &'static str,
    namespaced: bool,
    short: &'static [&'static str],
    definition: &'static str,
) -> Kind {
    Kind {
        group: api.0,
        version: api.1,
        kind,
        plural,
        namespaced,
        short,
        all: false,
        status: false,
        scale: false,
        definition,
    }
}

impl Kind {
    const fn with_status(mut self) -> Self {
        self.status = true;
        self
    }
    const fn with_scale(mut self) -> Self {
        self.scale = true;
        self
    }
    const fn in_all(mut self) -> Self {
        self.all = true;
        self
    }
}

const CORE: (&str, &str) = ("", "v1");
const APPS: (&str, &str) = ("apps", "v1");
const RBAC: (&str, &str) = ("rbac.authorization.k8s.io", "v1");
const ADMISSION: (&str, &str) = ("admissionregistration.k8s.io", "v1");

const KINDS: &[Kind] = &[
    kind(CORE, "Namespace", "namespaces", CLUSTER, &["ns"], "core.v1.Namespace").with_status(),
    kind(CORE, "Node", "nodes", CLUSTER, &["no"], "core.v1.Node").with_status(),
    kind(CORE, "Pod", "pods", NAMESPACED, &["po"], "core.v1.Pod").with_status().in_all(),
    kind(CORE, "PodTemplate", "podtemplates", NAMESPACED, &[], "core.v1.PodTemplate"),
    kind(CORE, "Service", "services", NAMESPACED, &["svc"], "core.v1.Service").with_status().in_all(),
    kind(CORE, "Endpoints", "endpoints", NAMESPACED, &["ep"], "core.v1.Endpoints"),
    kind(CORE, "ConfigMap", "configmaps", NAMESPACED, &["cm"], "core.v1.ConfigMap"),
    kind(CORE, "Secret", "secrets", NAMESPACED, &[], "core.v1.Secret"),
    kind(CORE, "ServiceAccount", "serviceaccounts", NAMESPACED, &["sa"], "core.v1.ServiceAccount"),
    kind(CORE, "Event", "events", NAMESPACED, &["ev"], "core.v1.Event"),
    kind(CORE, "PersistentVolume", "persistentvolumes", CLUSTER, &["pv"], "core.v1.PersistentVolume")
        .with_status(),
    kind(
        CORE,
        "PersistentVolumeClaim",
        "persistentvolumeclaims",
        NAMESPACED,
        &["pvc"],
        "core.v1.PersistentVolumeClaim",
    )
    .with_status(),
    kind(
        CORE,
        "ReplicationController",
        "replicationcontrollers",
        NAMESPACED,
        &["rc"],
        "core.v1.ReplicationController",
    )
    .with_status()
    .with_scale()
    .in_all(),
    kind(CORE, "ResourceQuota", "resourcequotas", NAMESPACED, &["quota"], "core.v1.ResourceQuota")
        .with_status(),
    kind(CORE, "LimitRange", "limitranges", NAMESPACED, &["limits"], "core.v1.LimitRange"),
    kind(("events.k8s.io", "v1"), "Event", "events", NAMESPACED, &["ev"], "events.v1.Event"),
    kind(APPS, "Deployment", "deployments", NAMESPACED, &["deploy"], "apps.v1.Deployment")
        .with_status()
        .with_scale()
        .in_all(),
    kind(APPS, "ReplicaSet", "replicasets", NAMESPACED, &["rs"], "apps.v1.ReplicaSet")
        .with_status()
        .with_scale()
        .in_all(),
    kind(APPS, "DaemonSet", "daemonsets", NAMESPACED, &["ds"], "apps.v1.DaemonSet").with_status().in_all(),
    kind(APPS, "StatefulSet", "statefulsets", NAMESPACED, &["sts"], "apps.v1.StatefulSet")
        .with_status()
        .with_scale()
        .in_all(),
    kind(APPS, "ControllerRevision", "controllerrevisions", NAMESPACED, &[], "apps.v1.ControllerRevision"),
    kind(
        ("policy", "v1"),
        "PodDisruptionBudget",
        "poddisruptionbudgets",
        NAMESPACED,
        &["pdb"],
        "policy.v1.PodDisruptionBudget",
    )
    .with_status(),
    kind(
        ("discovery.k8s.io", "v1"),
        "EndpointSlice",
        "endpointslices",
        NAMESPACED,
        &[],
        "discovery.v1.EndpointSlice",
    ),
    kind(("coordination.k8s.io", "v1"), "Lease", "leases", NAMESPACED, &[], "coordination.v1.Lease"),
    kind(RBAC, "Role", "roles", NAMESPACED, &[], "rbac.v1.Role"),
    kind(RBAC, "RoleBinding", "rolebindings", NAMESPACED, &[], "rbac.v1.RoleBinding"),
    kind(RBAC, "ClusterRole", "clusterroles", CLUSTER, &[], "rbac.v1.ClusterRole"),
    kind(RBAC, "ClusterRoleBinding", "clusterrolebindings", CLUSTER, &[], "rbac.v1.ClusterRoleBinding"),
    kind(("batch", "v1"), "Job", "jobs", NAMESPACED, &[], "batch.v1.Job").with_status().in_all(),
    kind(("batch", "v1"), "CronJob", "cronjobs", NAMESPACED, &["cj"], "batch.v1.CronJob")
        .with_status()
        .in_all(),
    kind(
        ("networking.k8s.io", "v1"),
        "NetworkPolicy",
        "networkpolicies",
        NAMESPACED,
        &["netpol"],
        "networking.v1.NetworkPolicy",
    ),
    kind(("networking.k8s.io", "v1"), "Ingress", "ingresses", NAMESPACED, &["ing"], "networking.v1.Ingress")
        .with_status(),
    kind(
        ("scheduling.k8s.io", "v1"),
        "PriorityClass",
        "priorityclasses",
        CLUSTER,
        &["pc"],
        "scheduling.v1.PriorityClass",
    ),
    kind(
        ("storage.k8s.io", "v1"),
        "StorageClass",
        "storageclasses",
        CLUSTER,
        &["sc"],
        "storage.v1.StorageClass",
    ),
    kind(
        ADMISSION,
        "MutatingWebhookConfiguration",
        "mutatingwebhookconfigurations",
        CLUSTER,
        &[],
        "admissionregistration.v1.MutatingWebhookConfiguration",
    ),
    kind(
        ADMISSION,
        "ValidatingWebhookConfiguration",
        "validatingwebhookconfigurations",
        CLUSTER,
        &[],
        "admissionregistration.v1.ValidatingWebhookConfiguration",
    ),
    kind(
        ("apiextensions.k8s.io", "v1"),
        "CustomResourceDefinition",
        "customresourcedefinitions",
        CLUSTER,
        &["crd", "crds"],
        "",
    )
    .with_status(),
];

/// OpenAPI name of the definition of custom resource definitions.
pub const CRD_DEFINITION: &str =
    "io.k8s.apiextensions-apiserver.pkg.apis.apiextensions.v1.CustomResourceDefinition";

/// The OpenAPI name of a built-in kind's definition.
pub fn definition(group: &str, kind: &str) -> Option<String> {
    let found = KINDS.iter().find(|one| one.group == group && one.kind == kind)?;
    Some(full_definition(found.definition))
}

fn full_definition(short: &str) -> String {
    if short.is_empty() { CRD_DEFINITION.to_owned() } else { format!("io.k8s.api.{short}") }
}

/// Serves all built-in resources.
pub fn register(registry: &Registry) {
    for one in KINDS {
        registry.add(resource(one));
    }
}

fn resource(one: &Kind) -> Resource {
    let mut subresources: Vec<(&'static str, &'static str, &'static [&'static str])> = Vec::new();
    match one.plural {
        "pods" => {
            subresources.push(("binding", "Binding", &["create"]));
            subresources.push(("eviction", "Eviction", &["create"]));
            subresources.push(("log", "Pod", &["get"]));
        }
        "namespaces" => subresources.push(("finalize", "Namespace", &["update"])),
        "serviceaccounts" => subresources.push(("token", "TokenRequest", &["create"])),
        _ => {}
    }
    let storage_group = if one.kind == "Event" { "" } else { one.group };
    Resource {
        group: one.group.to_owned(),
        version: one.version.to_owned(),
        plural: one.plural.to_owned(),
        singular: one.kind.to_lowercase(),
        kind: one.kind.to_owned(),
        list_kind: format!("{}List", one.kind),
        namespaced: one.namespaced,
        short_names: one.short.iter().map(|&short| short.to_owned()).collect(),
        categories: if one.all { vec!["all".to_owned()] } else { Vec::new() },
        status: one.status,
        scale: one.scale.then(|| ScalePaths {
            spec: ".spec.replicas".to_owned(),
            status: ".status.replicas".to_owned(),
            selector: None,
        }),
        subresources,
        storage: GroupResource::new(storage_group, one.plural),
        schema: builtin::schema(&full_definition(one.definition)),
        raw_schema: serde_json::Value::Null,
        custom: false,
        columns: Vec::new(),
    }
}
