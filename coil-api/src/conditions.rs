//! Types and reasons of `status.conditions`, and the one way to set a condition.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};

/// The specification can be carried out. False: nothing that runs is touched until it is corrected.
pub const VALID: &str = "Valid";
/// Enough gateways take new flows.
pub const READY: &str = "Ready";
/// The last attempt to write the objects that belong to the Egress succeeded.
pub const RECONCILED: &str = "Reconciled";

/// Reason of [`VALID`] = True.
pub const REASON_ACCEPTED: &str = "Accepted";
/// Reason of [`VALID`] = False: a field has a value that is not allowed.
pub const REASON_INVALID_SPEC: &str = "InvalidSpec";
/// Reason of [`READY`] = True: all gateways that were asked for are available.
pub const REASON_ALL_AVAILABLE: &str = "AllReplicasAvailable";
/// Reason of [`READY`] = True: some gateways are available, fewer than were asked for.
pub const REASON_SOME_AVAILABLE: &str = "SomeReplicasAvailable";
/// Reason of [`READY`] = False: no gateway is available.
pub const REASON_NONE_AVAILABLE: &str = "NoReplicaAvailable";
/// Reason of [`RECONCILED`] = True.
pub const REASON_UP_TO_DATE: &str = "UpToDate";
/// Reason of [`RECONCILED`] = False: an object of the same name belongs to somebody else.
pub const REASON_NOT_OURS: &str = "NameTaken";
/// Reason of [`RECONCILED`] = False: an object of a former Egress of the same name is not gone yet.
pub const REASON_DELETING: &str = "WaitingForDeletion";
/// Reason of [`RECONCILED`] = False: the API server refuses an object as it stands.
pub const REASON_REFUSED: &str = "RefusedByApi";
/// Reason of [`RECONCILED`] = False: something that the controller needs is missing.
pub const REASON_PREREQUISITE: &str = "PrerequisiteMissing";
/// Reason of [`RECONCILED`] = False: the API server does not answer as it should; tried again.
pub const REASON_API_ERROR: &str = "ApiError";

/// Value of a condition.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// It holds.
    True,
    /// It does not hold.
    False,
    /// It cannot be told.
    Unknown,
}

impl Status {
    /// As the API writes it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::True => "True",
            Self::False => "False",
            Self::Unknown => "Unknown",
        }
    }
}

impl From<bool> for Status {
    fn from(value: bool) -> Self {
        if value { Self::True } else { Self::False }
    }
}

/// What a condition should say; [`set`] puts it into a list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// Type of the condition.
    pub kind: &'static str,
    /// Value.
    pub status: Status,
    /// Reason, one of this module's constants.
    pub reason: &'static str,
    /// For people.
    pub message: String,
}

/// Sets a condition. The transition time changes only with the status, as Kubernetes demands.
pub fn set(conditions: &mut Vec<Condition>, wanted: Wanted, generation: Option<i64>, now: Time) {
    let status = wanted.status.as_str();
    match conditions.iter_mut().find(|c| c.type_ == wanted.kind) {
        Some(existing) => {
            if existing.status != status {
                status.clone_into(&mut existing.status);
                existing.last_transition_time = now;
            }
            wanted.reason.clone_into(&mut existing.reason);
            existing.message = wanted.message;
            existing.observed_generation = generation;
        }
        None => conditions.push(Condition {
            last_transition_time: now,
            message: wanted.message,
            observed_generation: generation,
            reason: wanted.reason.to_owned(),
            status: status.to_owned(),
            type_: wanted.kind.to_owned(),
        }),
    }
}

/// Whether the condition `kind` is present and true.
#[must_use]
pub fn is_true(conditions: &[Condition], kind: &str) -> bool {
    conditions.iter().any(|c| c.type_ == kind && c.status == "True")
}

#[cfg(test)]
mod tests {
    use super::*;
    use k8s_openapi::jiff::Timestamp;

    fn at(second: i64) -> Time {
        Time(Timestamp::from_second(second).expect("in range"))
    }

    fn ready(status: Status, message: &str) -> Wanted {
        Wanted { kind: READY, status, reason: REASON_NONE_AVAILABLE, message: message.to_owned() }
    }

    #[test]
    fn transition_time_follows_the_status_only() {
        let mut list = Vec::new();
        set(&mut list, ready(Status::False, "a"), Some(1), at(1));
        set(&mut list, ready(Status::False, "b"), Some(2), at(2));
        assert_eq!(list.len(), 1);
        assert_eq!(list[0].last_transition_time, at(1));
        assert_eq!(list[0].message, "b");
        assert_eq!(list[0].observed_generation, Some(2));
        set(&mut list, ready(Status::True, "c"), Some(2), at(3));
        assert_eq!(list[0].last_transition_time, at(3));
        assert!(is_true(&list, READY));
        assert!(!is_true(&list, VALID));
    }
}
