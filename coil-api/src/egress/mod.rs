//! `Egress`: pods of a namespace through which other pods leave the cluster.

#![expect(unreachable_pub, reason = "KubeSchema makes a private copy of the struct that it describes")]

mod schema;
mod validate;

use std::collections::BTreeMap;

use ipnet::IpNet;
use k8s_openapi::api::apps::v1::DeploymentStrategy;
use k8s_openapi::api::core::v1::{PodSpec, SessionAffinityConfig};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, LabelSelector};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub use schema::crd;
pub use validate::validate;

use crate::destination::{DestinationError, parse_destination};

/// Most entries of a list of networks; bounds the cost of the rules in the schema.
pub const MAX_DESTINATIONS: usize = 4096;
/// Most entries of `spec.clients`.
pub const MAX_CLIENTS: usize = 256;

/// Timeout of an affinity unless somebody says otherwise, in seconds, as that of a Service.
pub const DEFAULT_AFFINITY_SECONDS: u32 = 10_800;

/// What an Egress should be.
#[derive(CustomResource, KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq)]
#[kube(
    group = "coil.cybozu.com",
    version = "v2",
    kind = "Egress",
    plural = "egresses",
    singular = "egress",
    namespaced,
    status = "EgressStatus",
    derive = "PartialEq",
    doc = "Egress lets chosen pods leave the cluster with the addresses of a set of egress pods.",
    scale(
        spec_replicas_path = ".spec.replicas",
        status_replicas_path = ".status.replicas",
        label_selector_path = ".status.selector"
    ),
    printcolumn(
        name = "Replicas",
        type_ = "integer",
        json_path = ".spec.replicas",
        description = "Egress pods that are wanted."
    ),
    printcolumn(
        name = "Available",
        type_ = "integer",
        json_path = ".status.replicas",
        description = "Egress pods that take traffic."
    ),
    printcolumn(
        name = "Ready",
        type_ = "string",
        json_path = r#".status.conditions[?(@.type=="Ready")].status"#,
        description = "Whether any egress pod takes traffic."
    ),
    printcolumn(
        name = "Valid",
        type_ = "string",
        json_path = r#".status.conditions[?(@.type=="Valid")].status"#,
        description = "Whether the specification can be carried out."
    ),
    printcolumn(
        name = "Clients",
        type_ = "integer",
        json_path = ".status.clients",
        description = "Pods that use this Egress."
    ),
    printcolumn(name = "Destinations", type_ = "string", json_path = ".spec.destinations", priority = 1),
    printcolumn(name = "Affinity", type_ = "string", json_path = ".spec.sessionAffinity", priority = 1),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp"),
    validation = Rule::new("self.metadata.name.size() <= 63 && self.metadata.name.matches('^[a-z]([-a-z0-9]*[a-z0-9])?$')")
        .message("the name must be legal as the name of a Service: at most 63 lower-case letters, digits and '-', starting with a letter"),
)]
#[serde(rename_all = "camelCase")]
pub struct EgressSpec {
    /// Networks in CIDR notation, IPv4 and IPv6, that clients reach through the egress pods.
    #[schemars(schema_with = "schema::destinations")]
    pub destinations: Vec<String>,

    /// Networks in CIDR notation that clients reach directly although a destination contains them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(schema_with = "schema::excluded_destinations")]
    pub excluded_destinations: Vec<String>,

    /// Pods that use this Egress, in addition to those whose annotation names it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(schema_with = "schema::clients")]
    pub clients: Vec<EgressClient>,

    /// Number of egress pods.
    #[serde(default = "default_replicas")]
    #[schemars(range(min = 1))]
    pub replicas: i32,

    /// How egress pods are replaced by new ones; see Deployment.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "schema::strategy")]
    pub strategy: Option<DeploymentStrategy>,

    /// Changes to the egress pods. The container named `egress` is Coil's own; others are added to it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "schema::template")]
    pub template: Option<EgressPodTemplate>,

    /// Whether all flows of a client pod leave through the same egress pod.
    #[serde(default)]
    #[schemars(schema_with = "schema::session_affinity")]
    pub session_affinity: SessionAffinity,

    /// Details of the affinity; see Service.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "schema::session_affinity_config")]
    pub session_affinity_config: Option<SessionAffinityConfig>,

    /// Which ready egress pods take the new flows of a client pod: those on its node, those in its zone, or
    /// all. Where none is preferred, all do.
    #[serde(default)]
    #[schemars(schema_with = "schema::gateway_preference")]
    pub gateway_preference: GatewayPreference,

    /// Whether only connections that a client pod opens leave through the egress pods, not what answers
    /// those that others have opened to it.
    #[serde(default)]
    pub originating_only: bool,

    /// Whether the UDP source port of encapsulated packets follows the inner flow, so that the network
    /// can spread flows over paths and receive queues.
    #[serde(default)]
    pub fou_source_port_auto: bool,

    /// Limits for voluntary disruptions of the egress pods.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "schema::pod_disruption_budget")]
    pub pod_disruption_budget: Option<EgressPdb>,
}

/// Pods that use an Egress, chosen by labels. With only `podSelector`: pods of the Egress's own
/// namespace.
#[derive(Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct EgressClient {
    /// Namespaces of the pods; the empty selector means all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub namespace_selector: Option<LabelSelector>,
    /// Pods in these namespaces; absent means all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pod_selector: Option<LabelSelector>,
}

/// Affinity between client pods and egress pods.
#[derive(Serialize, Deserialize, Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum SessionAffinity {
    /// All flows of a client pod leave through the same egress pod.
    #[default]
    ClientIP,
    /// Each flow chooses for itself.
    None,
}

impl SessionAffinity {
    /// As the API writes it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::ClientIP => "ClientIP",
            Self::None => "None",
        }
    }
}

/// Egress pods that are preferred for new flows.
#[derive(Serialize, Deserialize, Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum GatewayPreference {
    /// All alike.
    #[default]
    None,
    /// Those in the zone of the client pod's node.
    Zone,
    /// Those on the client pod's node; where there is none, those in its zone.
    Node,
}

/// Changes to the egress pods.
#[derive(Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
pub struct EgressPodTemplate {
    /// Labels and annotations of the pods.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub metadata: Option<EgressPodMetadata>,
    /// Specification of the pods.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub spec: Option<RawPodSpec>,
}

/// Labels and annotations of egress pods.
#[derive(Serialize, Deserialize, Clone, Debug, Default, PartialEq, Eq)]
pub struct EgressPodMetadata {
    /// Labels; those that Coil sets win.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
    /// Annotations.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub annotations: BTreeMap<String, String>,
}

/// A PodSpec as it was written. It is read only where it is needed, so that a template that this
/// version cannot read stops neither the watches nor the rest of the Egress from being understood.
#[derive(Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[serde(transparent)]
pub struct RawPodSpec(pub serde_json::Value);

impl RawPodSpec {
    /// Reads it.
    ///
    /// # Errors
    /// It is not a PodSpec.
    pub fn parse(&self) -> Result<PodSpec, serde_json::Error> {
        PodSpec::deserialize(&self.0)
    }
}

/// Limits for voluntary disruptions; at most one of the two.
#[derive(Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct EgressPdb {
    /// Egress pods that must stay, a number or a percentage.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub min_available: Option<IntOrString>,
    /// Egress pods that may go, a number or a percentage.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_unavailable: Option<IntOrString>,
}

/// What was seen of an Egress.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct EgressStatus {
    /// Egress pods that take traffic.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replicas: Option<i32>,
    /// Selector of the egress pods, for the scale subresource.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub selector: Option<String>,
    /// Running pods that are clients of this Egress.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub clients: Option<i32>,
    /// Generation of the specification that the rest of the status speaks of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// `Valid`, `Reconciled`, `Ready`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(schema_with = "schema::conditions")]
    pub conditions: Vec<Condition>,
}

impl Default for EgressSpec {
    fn default() -> Self {
        Self {
            destinations: Vec::new(),
            excluded_destinations: Vec::new(),
            clients: Vec::new(),
            replicas: default_replicas(),
            strategy: None,
            template: None,
            session_affinity: SessionAffinity::default(),
            session_affinity_config: None,
            gateway_preference: GatewayPreference::default(),
            originating_only: false,
            fou_source_port_auto: false,
            pod_disruption_budget: None,
        }
    }
}

impl EgressSpec {
    /// Seconds for which a client keeps its egress pod for new flows after its last one, where
    /// `sessionAffinity` is `ClientIP`; what a Service has unless somebody says otherwise.
    #[must_use]
    pub fn affinity_seconds(&self) -> u32 {
        let config = self.session_affinity_config.as_ref().and_then(|config| config.client_ip.as_ref());
        let seconds = config.and_then(|client| client.timeout_seconds);
        seconds.and_then(|seconds| seconds.try_into().ok()).unwrap_or(DEFAULT_AFFINITY_SECONDS)
    }

    /// Parses the destinations.
    ///
    /// # Errors
    /// The first one that is not a CIDR.
    pub fn destination_nets(&self) -> Result<Vec<IpNet>, DestinationError> {
        self.destinations.iter().map(|d| parse_destination(d)).collect()
    }

    /// Parses the exclusions.
    ///
    /// # Errors
    /// The first one that is not a CIDR.
    pub fn excluded_nets(&self) -> Result<Vec<IpNet>, DestinationError> {
        self.excluded_destinations.iter().map(|d| parse_destination(d)).collect()
    }
}

fn default_replicas() -> i32 {
    1
}
