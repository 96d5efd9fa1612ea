//! Literal objects for tests.
#![allow(clippy::unwrap_used, reason = "tests")]

use super::{EgressView, ObjectKey, PodView};
use crate::desired::EgressName;

/// A pod of namespace `demo`.
pub(crate) fn pod(name: &str, uid: &str) -> PodView {
    PodView { key: ObjectKey::new("demo", name), uid: uid.into(), ..PodView::default() }
}

/// An Egress of namespace `internet`.
pub(crate) fn egress(name: &str, destinations: &[&str]) -> EgressView {
    EgressView {
        key: ObjectKey::new("internet", name),
        destinations: destinations.iter().map(|d| d.parse().unwrap()).collect(),
        client_affinity: true,
        ..EgressView::default()
    }
}

/// The name of an Egress of namespace `internet`.
pub(crate) fn name(name: &str) -> EgressName {
    EgressName { namespace: "internet".into(), name: name.into() }
}
