//! What an Egress asks for: a Deployment, a Service, perhaps a PodDisruptionBudget, and a status.
//!
//! Children are written whole, with the version that was observed, so a field that is no longer asked for
//! goes, and two writers cannot mix. What the API server fills in by default would make every comparison
//! fail, so for kinds with a generation the plan compares against what was written last ([`Written`]).

use std::collections::HashMap;
use std::hash::{BuildHasher, BuildHasherDefault, DefaultHasher};

use coil_api::egress::{EgressPdb, SessionAffinity};
use coil_api::{Egress, names};
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::{ClientIPConfig, Service, ServicePort, ServiceSpec, SessionAffinityConfig};
use k8s_openapi::api::policy::v1::{PodDisruptionBudget, PodDisruptionBudgetSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, ObjectMeta};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use kube::ResourceExt;

use super::deployment;
use super::ownership::{Owner, claim, is_claimed, owner_of};
pub use super::status::{Outcome, status};

/// UDP port of FOU unless somebody says otherwise.
pub const DEFAULT_FOU_PORT: u16 = 5555;
/// Most children that are remembered.
const MOST_WRITTEN: usize = 65_536;
/// Seconds that the API server fills in for `sessionAffinity: ClientIP`.
const DEFAULT_AFFINITY_SECONDS: i32 = 10800;

/// What the controller was started with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Image of egress pods.
    pub image: String,
    /// UDP port of FOU.
    pub fou_port: u16,
    /// Seconds that egress pods have to drain, unless their template gives them another time to end.
    pub drain_timeout: u32,
}

/// Children as they are.
#[derive(Clone, Debug, Default)]
pub struct Observed {
    /// The Deployment.
    pub deployment: Option<Deployment>,
    /// The Service.
    pub service: Option<Service>,
    /// The PodDisruptionBudget.
    pub budget: Option<PodDisruptionBudget>,
}

/// What was written last: generation that resulted and digest of what was asked for, by UID of the child.
/// Lost on restart, after which each child is written once more.
#[derive(Clone, Debug, Default)]
pub struct Written(HashMap<String, (Option<i64>, u64)>);

impl Written {
    /// Notes the answer to a write.
    pub fn note(&mut self, answer: &ObjectMeta, digest: u64) {
        // Children that are gone are not told to us. Forgetting all costs one write of each that is left.
        if self.0.len() >= MOST_WRITTEN {
            self.0.clear();
        }
        if let Some(uid) = &answer.uid {
            self.0.insert(uid.clone(), (answer.generation, digest));
        }
    }

    fn holds(&self, child: &ObjectMeta, digest: u64) -> bool {
        child.uid.as_ref().and_then(|uid| self.0.get(uid)) == Some(&(child.generation, digest))
    }
}

/// A change to a child.
#[derive(Clone, Debug, PartialEq)]
pub enum Write {
    /// Make it.
    Create {
        /// The child.
        child: Child,
        /// For [`Written::note`].
        digest: u64,
    },
    /// Replace the version that was observed.
    Replace {
        /// The child.
        child: Child,
        /// For [`Written::note`].
        digest: u64,
    },
    /// Remove the PodDisruptionBudget.
    DeleteBudget {
        /// What was observed.
        metadata: Box<ObjectMeta>,
    },
    /// A child of a former Egress of this name is not gone yet.
    Await {
        /// Kind.
        kind: &'static str,
        /// Name.
        name: String,
    },
    /// A child of this name belongs to somebody else.
    Refuse {
        /// Kind.
        kind: &'static str,
        /// Name.
        name: String,
    },
}

/// A child as it should be.
#[derive(Clone, Debug, PartialEq)]
pub enum Child {
    /// The Deployment.
    Deployment(Box<Deployment>),
    /// The Service.
    Service(Box<Service>),
    /// The PodDisruptionBudget.
    Budget(Box<PodDisruptionBudget>),
}

/// Changes that bring the children to where a valid Egress wants them, in this order.
///
/// # Errors
/// The template is not a PodSpec; validation says so before.
pub fn plan(
    egress: &Egress,
    settings: &Settings,
    observed: &Observed,
    written: &Written,
) -> Result<Vec<Write>, serde_json::Error> {
    let mut writes = Vec::new();
    plan_deployment(egress, settings, observed.deployment.as_ref(), written, &mut writes)?;
    plan_service(egress, settings, observed.service.as_ref(), &mut writes);
    plan_budget(egress, observed.budget.as_ref(), written, &mut writes);
    Ok(writes)
}

fn plan_deployment(
    egress: &Egress,
    settings: &Settings,
    observed: Option<&Deployment>,
    written: &Written,
    writes: &mut Vec<Write>,
) -> Result<(), serde_json::Error> {
    let wanted = deployment::deployment(egress, settings, observed)?;
    let digest = digest(&deployment::statement(&wanted));
    let unchanged = |old: &Deployment| written.holds(&old.metadata, digest);
    let metadata = (wanted.metadata.clone(), observed.map(|d| &d.metadata));
    let child = Child::Deployment(Box::new(wanted));
    decide(egress, "Deployment", metadata, observed.map(unchanged), child, digest, writes);
    Ok(())
}

fn plan_service(egress: &Egress, settings: &Settings, observed: Option<&Service>, writes: &mut Vec<Write>) {
    let wanted = service(egress, settings, observed);
    let unchanged = |old: &Service| service_statement(&wanted) == service_statement(old);
    let unchanged = observed.map(unchanged);
    let metadata = (wanted.metadata.clone(), observed.map(|s| &s.metadata));
    decide(egress, "Service", metadata, unchanged, Child::Service(Box::new(wanted)), 0, writes);
}

fn plan_budget(
    egress: &Egress,
    observed: Option<&PodDisruptionBudget>,
    written: &Written,
    writes: &mut Vec<Write>,
) {
    let Some(limits) = &egress.spec.pod_disruption_budget else {
        // Somebody else's, or one that a user made by hand for these pods, is none of our business.
        if let Some(old) = observed
            && old.owner_references().iter().any(|o| Some(&o.uid) == egress.metadata.uid.as_ref())
            && old.metadata.deletion_timestamp.is_none()
        {
            writes.push(Write::DeleteBudget { metadata: Box::new(old.metadata.clone()) });
        }
        return;
    };
    let wanted = budget(egress, limits, observed);
    let digest = digest(&serde_json::json!(wanted.spec));
    let unchanged = |old: &PodDisruptionBudget| written.holds(&old.metadata, digest);
    let metadata = (wanted.metadata.clone(), observed.map(|b| &b.metadata));
    let child = Child::Budget(Box::new(wanted));
    decide(egress, "PodDisruptionBudget", metadata, observed.map(unchanged), child, digest, writes);
}

fn decide(
    egress: &Egress,
    kind: &'static str,
    (wanted, observed): (ObjectMeta, Option<&ObjectMeta>),
    unchanged: Option<bool>,
    child: Child,
    digest: u64,
    writes: &mut Vec<Write>,
) {
    match observed {
        None => writes.push(Write::Create { child, digest }),
        Some(old) if owner_of(egress, old) == Owner::Others => {
            writes.push(Write::Refuse { kind, name: egress.name_any() });
        }
        Some(old) if owner_of(egress, old) == Owner::Former => {
            writes.push(Write::Await { kind, name: egress.name_any() });
        }
        // Its deletion will wake us up again.
        Some(old) if old.deletion_timestamp.is_some() => {}
        Some(old) if unchanged == Some(true) && is_claimed(&wanted, old) => {}
        Some(_) => writes.push(Write::Replace { child, digest }),
    }
}

fn service(egress: &Egress, settings: &Settings, observed: Option<&Service>) -> Service {
    // Addresses and the like that the API server gave it stay.
    let mut spec = observed.and_then(|s| s.spec.clone()).unwrap_or_default();
    let port = i32::from(settings.fou_port);
    spec.type_ = Some("ClusterIP".to_owned());
    spec.selector = Some(names::egress_labels(&egress.name_any()));
    spec.ports = Some(vec![ServicePort {
        port,
        target_port: Some(IntOrString::Int(port)),
        protocol: Some("UDP".to_owned()),
        ..ServicePort::default()
    }]);
    spec.ip_family_policy = Some("PreferDualStack".to_owned());
    spec.session_affinity = Some(egress.spec.session_affinity.as_str().to_owned());
    spec.session_affinity_config = match egress.spec.session_affinity {
        SessionAffinity::ClientIP => egress.spec.session_affinity_config.clone(),
        SessionAffinity::None => None,
    };
    Service {
        metadata: claim(egress, observed.map(|s| &s.metadata)),
        spec: Some(spec),
        status: observed.and_then(|s| s.status.clone()),
    }
}

/// The parts of a Service that are ours, with the API server's defaults filled in.
fn service_statement(service: &Service) -> impl PartialEq + use<> {
    let spec: ServiceSpec = service.spec.clone().unwrap_or_default();
    let affinity = spec.session_affinity.unwrap_or_else(|| "None".to_owned());
    let seconds = (affinity == "ClientIP").then(|| {
        let config: SessionAffinityConfig = spec.session_affinity_config.unwrap_or_default();
        let client_ip: ClientIPConfig = config.client_ip.unwrap_or_default();
        client_ip.timeout_seconds.unwrap_or(DEFAULT_AFFINITY_SECONDS)
    });
    let ports: Vec<_> = spec
        .ports
        .unwrap_or_default()
        .into_iter()
        .map(|p| (p.name.filter(|n| !n.is_empty()), p.port, p.target_port, p.protocol))
        .collect();
    (
        spec.type_.unwrap_or_else(|| "ClusterIP".to_owned()),
        spec.selector,
        ports,
        spec.ip_family_policy,
        affinity,
        seconds,
    )
}

fn budget(
    egress: &Egress,
    limits: &EgressPdb,
    observed: Option<&PodDisruptionBudget>,
) -> PodDisruptionBudget {
    let labels = names::egress_labels(&egress.name_any());
    PodDisruptionBudget {
        metadata: claim(egress, observed.map(|b| &b.metadata)),
        spec: Some(PodDisruptionBudgetSpec {
            selector: Some(LabelSelector { match_labels: Some(labels), match_expressions: None }),
            min_available: limits.min_available.clone(),
            max_unavailable: limits.max_unavailable.clone(),
            ..PodDisruptionBudgetSpec::default()
        }),
        status: observed.and_then(|b| b.status.clone()),
    }
}

fn digest(statement: &serde_json::Value) -> u64 {
    BuildHasherDefault::<DefaultHasher>::default().hash_one(statement.to_string())
}
