//! Schemas of built-in kinds, generated from `k8s-openapi`, and the list merge rules that those schemas do not carry.

use std::collections::HashMap;
use std::sync::{Arc, LazyLock};

use k8s_openapi::api;
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use schemars::SchemaGenerator;
use schemars::generate::SchemaSettings;
use serde_json::{Map, Value};

use super::{Definitions, ListKind, Schema};

/// Raw definitions by their OpenAPI name.
pub static DEFINITIONS: LazyLock<Map<String, Value>> = LazyLock::new(generate);

static SCHEMAS: LazyLock<HashMap<String, Arc<Schema>>> = LazyLock::new(|| {
    let mut definitions = Definitions::new(&DEFINITIONS);
    DEFINITIONS.keys().map(|name| (name.clone(), definitions.resolve(name))).collect()
});

/// The schema of a definition such as `io.k8s.api.core.v1.Pod`; anything when unknown.
pub fn schema(definition: &str) -> Arc<Schema> {
    SCHEMAS.get(definition).cloned().unwrap_or_else(|| Arc::new(Schema::anything()))
}

fn generate() -> Map<String, Value> {
    let mut generator = SchemaGenerator::new(SchemaSettings::draft07().with(|settings| {
        settings.meta_schema = None;
        settings.inline_subschemas = false;
    }));
    macro_rules! kinds {
        ($($kind:ty),* $(,)?) => { $( generator.subschema_for::<$kind>(); )* };
    }
    kinds!(
        api::core::v1::Namespace,
        api::core::v1::Node,
        api::core::v1::Pod,
        api::core::v1::PodTemplate,
        api::core::v1::Service,
        api::core::v1::Endpoints,
        api::core::v1::ConfigMap,
        api::core::v1::Secret,
        api::core::v1::ServiceAccount,
        api::core::v1::Event,
        api::core::v1::PersistentVolume,
        api::core::v1::PersistentVolumeClaim,
        api::core::v1::ReplicationController,
        api::core::v1::ResourceQuota,
        api::core::v1::LimitRange,
        api::events::v1::Event,
        api::apps::v1::Deployment,
        api::apps::v1::ReplicaSet,
        api::apps::v1::DaemonSet,
        api::apps::v1::StatefulSet,
        api::apps::v1::ControllerRevision,
        api::policy::v1::PodDisruptionBudget,
        api::policy::v1::Eviction,
        api::discovery::v1::EndpointSlice,
        api::coordination::v1::Lease,
        api::rbac::v1::Role,
        api::rbac::v1::RoleBinding,
        api::rbac::v1::ClusterRole,
        api::rbac::v1::ClusterRoleBinding,
        api::batch::v1::Job,
        api::batch::v1::CronJob,
        api::networking::v1::NetworkPolicy,
        api::networking::v1::Ingress,
        api::scheduling::v1::PriorityClass,
        api::storage::v1::StorageClass,
        api::admissionregistration::v1::MutatingWebhookConfiguration,
        api::admissionregistration::v1::ValidatingWebhookConfiguration,
        api::autoscaling::v1::Scale,
        api::authentication::v1::SelfSubjectReview,
        api::authentication::v1::TokenRequest,
        api::authentication::v1::TokenReview,
        api::authorization::v1::LocalSubjectAccessReview,
        api::authorization::v1::SelfSubjectAccessReview,
        api::authorization::v1::SelfSubjectRulesReview,
        api::authorization::v1::SubjectAccessReview,
        api::core::v1::Binding,
        k8s_openapi::apimachinery::pkg::apis::meta::v1::DeleteOptions,
        CustomResourceDefinition,
    );
    let mut definitions = generator.take_definitions(true);
    for (name, schema) in &mut definitions {
        if FREE_FORM.iter().any(|free| is_named(name, free)) {
            let description = schema.get("description").cloned().unwrap_or_default();
            *schema = serde_json::json!({
                "description": description, "x-kubernetes-preserve-unknown-fields": true,
            });
        }
    }
    definitions
}

/// Definitions that hold whatever is written, although their generated schema says otherwise.
const FREE_FORM: [&str; 6] = [
    "FieldsV1",
    "JSON",
    "JSONSchemaPropsOrArray",
    "JSONSchemaPropsOrBool",
    "JSONSchemaPropsOrStringArray",
    "RawExtension",
];

const OWNER: &str = "io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta";

/// How the lists of built-in kinds merge: definition, field, keys of elements for apply, key for strategic merge patch.
/// The first key is the strategic merge key unless noted.
const LISTS: &[(&str, &str, &[&str])] = &[
    (OWNER, "ownerReferences", &["uid"]),
    ("PodSpec", "containers", &["name"]),
    ("PodSpec", "initContainers", &["name"]),
    ("PodSpec", "ephemeralContainers", &["name"]),
    ("PodSpec", "volumes", &["name"]),
    ("PodSpec", "imagePullSecrets", &["name"]),
    ("PodSpec", "hostAliases", &["ip"]),
    ("PodSpec", "topologySpreadConstraints", &["topologyKey", "whenUnsatisfiable"]),
    ("PodSpec", "resourceClaims", &["name"]),
    ("PodStatus", "conditions", &["type"]),
    ("PodStatus", "podIPs", &["ip"]),
    ("PodStatus", "hostIPs", &["ip"]),
    ("Container", "ports", &["containerPort", "protocol"]),
    ("Container", "env", &["name"]),
    ("Container", "volumeMounts", &["mountPath"]),
    ("Container", "volumeDevices", &["devicePath"]),
    ("EphemeralContainer", "env", &["name"]),
    ("EphemeralContainer", "volumeMounts", &["mountPath"]),
    ("ResourceRequirements", "claims", &["name"]),
    ("ServiceSpec", "ports", &["port", "protocol"]),
    ("ServiceStatus", "conditions", &["type"]),
    ("ServiceAccount", "secrets", &["name"]),
    ("NodeSpec", "taints", &[]),
    ("NodeStatus", "conditions", &["type"]),
    ("NodeStatus", "addresses", &["type", "address"]),
    ("NamespaceStatus", "conditions", &["type"]),
    ("DeploymentStatus", "conditions", &["type"]),
    ("ReplicaSetStatus", "conditions", &["type"]),
    ("DaemonSetStatus", "conditions", &["type"]),
    ("StatefulSetStatus", "conditions", &["type"]),
    ("JobStatus", "conditions", &["type"]),
    ("PodDisruptionBudgetStatus", "conditions", &["type"]),
    ("CustomResourceDefinitionStatus", "conditions", &["type"]),
    ("MutatingWebhookConfiguration", "webhooks", &["name"]),
    ("ValidatingWebhookConfiguration", "webhooks", &["name"]),
    ("MutatingWebhook", "matchConditions", &["name"]),
    ("ValidatingWebhook", "matchConditions", &["name"]),
];

/// Lists of scalars that merge as sets.
const SETS: &[(&str, &str)] = &[(OWNER, "finalizers"), ("NodeSpec", "podCIDRs")];

/// The keys by which elements of a list of a built-in definition merge, if they do.
pub fn list_keys(definition: &str, field: &str) -> Option<&'static [&'static str]> {
    LISTS
        .iter()
        .find(|(owner, name, keys)| *name == field && !keys.is_empty() && is_named(definition, owner))
        .map(|(_, _, keys)| *keys)
}

/// Whether a list of a built-in definition is a set of scalars.
pub fn is_set(definition: &str, field: &str) -> bool {
    SETS.iter().any(|(owner, name)| *name == field && is_named(definition, owner))
}

fn is_named(definition: &str, owner: &str) -> bool {
    definition == owner || definition.rsplit('.').next() == Some(owner)
}

/// Adds the merge rule of a list to its schema.
pub(super) fn mark_list(owner: &str, field: &str, schema: &mut Schema) {
    if owner.is_empty() {
        return;
    }
    if let Some(keys) = list_keys(owner, field) {
        schema.list = ListKind::Map(keys.iter().map(|&key| key.to_owned()).collect());
        schema.merge_key = keys.first().map(|&key| key.to_owned());
        if keys.contains(&"protocol") {
            default_protocol(schema);
        }
    } else if is_set(owner, field) {
        schema.list = ListKind::Set;
        schema.merge_scalars = true;
    }
}

/// Ports are told apart by protocol, too, which is TCP unless said otherwise.
fn default_protocol(list: &mut Schema) {
    let Some(items) = &list.items else { return };
    let mut items = (**items).clone();
    if let Some(protocol) = items.properties.get("protocol") {
        let protocol = Schema { default: Some("TCP".into()), ..(**protocol).clone() };
        items.properties.insert("protocol".to_owned(), Arc::new(protocol));
    }
    list.items = Some(Arc::new(items));
}
