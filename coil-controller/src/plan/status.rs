//! The status of an Egress.

use coil_api::conditions::{self, Status, Wanted};
use coil_api::violation::{Violation, describe};
use coil_api::{Egress, EgressStatus, names};
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::ResourceExt;

/// Longest message of a condition; the API server refuses more than 32768 bytes.
const MAX_MESSAGE: usize = 4096;

/// How the attempt to bring the children up to date ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// All are as they should be.
    Done,
    /// The specification is invalid, so none was touched.
    Invalid(Vec<Violation>),
    /// Something went wrong.
    Failed {
        /// Reason, one of `coil_api::conditions`.
        reason: &'static str,
        /// For people.
        message: String,
    },
}

/// The status after an attempt. `deployment` is what is known of it, `None` if there is none. The count
/// of clients is somebody else's and kept.
#[must_use]
pub fn status(
    egress: &Egress,
    outcome: &Outcome,
    deployment: Option<&Deployment>,
    now: Time,
) -> EgressStatus {
    let old = egress.status.clone().unwrap_or_default();
    let generation = egress.metadata.generation;
    let available = available(deployment);
    let mut list = old.conditions;
    let (valid, reconciled) = from_outcome(outcome);
    for mut wanted in [valid, reconciled, ready(egress.spec.replicas, available, deployment)] {
        truncate(&mut wanted.message);
        conditions::set(&mut list, wanted, generation, now.clone());
    }
    EgressStatus {
        replicas: Some(available),
        selector: Some(names::egress_selector(&egress.name_any())),
        clients: old.clients,
        observed_generation: generation,
        conditions: list,
    }
}

fn from_outcome(outcome: &Outcome) -> (Wanted, Wanted) {
    let accepted = Wanted {
        kind: conditions::VALID,
        status: Status::True,
        reason: conditions::REASON_ACCEPTED,
        message: "the specification can be carried out".to_owned(),
    };
    match outcome {
        Outcome::Done => {
            let reconciled = Wanted {
                kind: conditions::RECONCILED,
                status: Status::True,
                reason: conditions::REASON_UP_TO_DATE,
                message: "all objects of this Egress are up to date".to_owned(),
            };
            (accepted, reconciled)
        }
        Outcome::Invalid(violations) => {
            let invalid = Wanted {
                kind: conditions::VALID,
                status: Status::False,
                reason: conditions::REASON_INVALID_SPEC,
                message: describe(violations),
            };
            let untouched = Wanted {
                kind: conditions::RECONCILED,
                status: Status::False,
                reason: conditions::REASON_INVALID_SPEC,
                message: "nothing was changed because the specification is invalid".to_owned(),
            };
            (invalid, untouched)
        }
        Outcome::Failed { reason, message } => {
            let failed = Wanted {
                kind: conditions::RECONCILED,
                status: Status::False,
                reason,
                message: message.clone(),
            };
            (accepted, failed)
        }
    }
}

/// Egress pods that take traffic.
fn available(deployment: Option<&Deployment>) -> i32 {
    deployment.and_then(|d| d.status.as_ref()).and_then(|s| s.available_replicas).unwrap_or(0)
}

fn ready(wanted: i32, available: i32, deployment: Option<&Deployment>) -> Wanted {
    let (status, reason) = match available {
        0 => (Status::False, conditions::REASON_NONE_AVAILABLE),
        n if n < wanted => (Status::True, conditions::REASON_SOME_AVAILABLE),
        _ => (Status::True, conditions::REASON_ALL_AVAILABLE),
    };
    let mut message = format!("{available} of {wanted} egress pods available");
    // Quotas and the like keep a Deployment from making pods; it is the only one who says so.
    let failure = deployment
        .and_then(|d| d.status.as_ref()?.conditions.as_ref())
        .and_then(|list| list.iter().find(|c| c.type_ == "ReplicaFailure" && c.status == "True"))
        .and_then(|c| c.message.as_deref());
    if let Some(failure) = failure {
        message.push_str(": ");
        message.push_str(failure);
    }
    Wanted { kind: conditions::READY, status, reason, message }
}

fn truncate(message: &mut String) {
    if message.len() > MAX_MESSAGE {
        let end = (0..=MAX_MESSAGE).rev().find(|&i| message.is_char_boundary(i)).unwrap_or(0);
        message.truncate(end);
        message.push('…');
    }
}
