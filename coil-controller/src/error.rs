//! Why an object could not be reconciled, and what that means for trying again.

use std::time::Duration;

use coil_api::conditions;

/// What to do about an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Class {
    /// Likely to go away: try again soon, then ever less often.
    Retry,
    /// Something must change first; a watch tells, the timer is only a net.
    Wait,
    /// Only another specification can help.
    Permanent,
}

/// Why an object could not be reconciled.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ReconcileError {
    /// A request failed.
    #[error("cannot {operation} {kind} {name}")]
    Api {
        /// What was tried.
        operation: &'static str,
        /// Kind of the object.
        kind: &'static str,
        /// Its name, with its namespace.
        name: String,
        /// What the API server said.
        #[source]
        source: Box<kube::Error>,
    },
    /// An object of the wanted name belongs to somebody else.
    #[error("{kind} {name} exists and does not belong to this Egress")]
    NotOurs {
        /// Kind of the object.
        kind: &'static str,
        /// Its name.
        name: String,
    },
    /// An object of a former Egress of the same name is not gone yet.
    #[error("{kind} {name} of a former Egress of this name is not gone yet")]
    Former {
        /// Kind of the object.
        kind: &'static str,
        /// Its name.
        name: String,
    },
    /// The ClusterRoleBinding that lets egress pods watch clients is not installed.
    #[error("ClusterRoleBinding {name} is missing; install Coil's manifests")]
    NoBinding {
        /// Its name.
        name: &'static str,
    },
    /// The template cannot be read; validation says so before it gets here.
    #[error("cannot read the pod template")]
    Template(#[from] serde_json::Error),
    /// The object cannot be read at all.
    #[error("cannot read the object: {0}")]
    Unreadable(String),
}

impl ReconcileError {
    pub(crate) fn api(
        operation: &'static str,
        kind: &'static str,
        name: &str,
    ) -> impl FnOnce(kube::Error) -> Self {
        let name = name.to_owned();
        move |source| Self::Api { operation, kind, name, source: Box::new(source) }
    }

    pub(crate) fn class(&self) -> Class {
        match self {
            Self::Api { source, .. } => match source.as_ref() {
                kube::Error::Api(status) => match status.code {
                    // Refused as it stands.
                    400 | 422 => Class::Permanent,
                    // No right, no quota, or the namespace is going.
                    401 | 403 | 404 | 405 => Class::Wait,
                    _ => Class::Retry,
                },
                _ => Class::Retry,
            },
            Self::NotOurs { .. } | Self::Former { .. } | Self::NoBinding { .. } => Class::Wait,
            Self::Template(_) | Self::Unreadable(_) => Class::Permanent,
        }
    }

    /// Reason of the condition `Reconciled`.
    pub(crate) fn reason(&self) -> &'static str {
        match (self, self.class()) {
            (Self::NotOurs { .. }, _) => conditions::REASON_NOT_OURS,
            (Self::Former { .. }, _) => conditions::REASON_DELETING,
            (Self::NoBinding { .. }, _) => conditions::REASON_PREREQUISITE,
            (_, Class::Retry) => conditions::REASON_API_ERROR,
            (_, Class::Wait | Class::Permanent) => conditions::REASON_REFUSED,
        }
    }

    /// Label of metrics.
    pub(crate) fn label(&self) -> &'static str {
        match self {
            Self::Api { .. } => "api",
            Self::NotOurs { .. } => "name_taken",
            Self::Former { .. } => "deleting",
            Self::NoBinding { .. } => "no_binding",
            Self::Template(_) => "template",
            Self::Unreadable(_) => "unreadable",
        }
    }

    /// The object is gone.
    pub(crate) fn is_not_found(&self) -> bool {
        matches!(self, Self::Api { source, .. }
            if matches!(source.as_ref(), kube::Error::Api(status) if status.code == 404))
    }

    /// A write that lost a race; the next attempt sees the other's work. Nobody needs to hear of it.
    pub(crate) fn is_conflict(&self) -> bool {
        matches!(self, Self::Api { source, .. }
            if matches!(source.as_ref(), kube::Error::Api(status) if status.code == 409))
    }
}

/// Time until the next attempt after `failures` failures in a row, at least 1.
pub(crate) fn delay(class: Class, failures: u32) -> Duration {
    let (first, most) = match class {
        Class::Retry => (Duration::from_millis(500), Duration::from_secs(60)),
        Class::Wait => (Duration::from_secs(5), Duration::from_secs(300)),
        Class::Permanent => (Duration::from_secs(300), Duration::from_secs(900)),
    };
    first.saturating_mul(1 << failures.saturating_sub(1).min(16)).min(most)
}

/// An error and its causes in one line.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        source = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delays_grow_and_end() {
        assert_eq!(delay(Class::Retry, 1), Duration::from_millis(500));
        assert_eq!(delay(Class::Retry, 2), Duration::from_secs(1));
        assert_eq!(delay(Class::Retry, 100), Duration::from_secs(60));
        assert_eq!(delay(Class::Wait, 1), Duration::from_secs(5));
        assert_eq!(delay(Class::Permanent, u32::MAX), Duration::from_secs(900));
    }
}
