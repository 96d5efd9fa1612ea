//! Whose a child is, and the metadata that says so.

use std::collections::BTreeMap;

use coil_api::{Egress, names};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference};
use kube::{Resource, ResourceExt};

/// Whose a child is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Owner {
    /// Ours, or nobody's and marked as ours (restored from a backup).
    Us,
    /// Of an Egress of the same name that was deleted; garbage collection will take it.
    Former,
    /// Somebody else's.
    Others,
}

/// Whose a child is.
pub(super) fn owner_of(egress: &Egress, child: &ObjectMeta) -> Owner {
    let labels = child.labels.as_ref();
    let marked = names::egress_labels(&egress.name_any())
        .iter()
        .all(|(key, value)| labels.and_then(|l| l.get(key)) == Some(value));
    match child.owner_references.iter().flatten().find(|owner| owner.controller == Some(true)) {
        Some(owner) if Some(&owner.uid) == egress.metadata.uid.as_ref() => Owner::Us,
        Some(owner) if owner.kind == Egress::kind(&()) && owner.name == egress.name_any() => Owner::Former,
        Some(_) => Owner::Others,
        None if marked => Owner::Us,
        None => Owner::Others,
    }
}

/// Metadata of a child: what was observed, with our labels and our claim.
pub(super) fn claim(egress: &Egress, observed: Option<&ObjectMeta>) -> ObjectMeta {
    let mut metadata = observed.cloned().unwrap_or_else(|| ObjectMeta {
        name: egress.metadata.name.clone(),
        namespace: egress.metadata.namespace.clone(),
        ..ObjectMeta::default()
    });
    // Kept by the API server only; sending it back is noise.
    metadata.managed_fields = None;
    metadata.labels.get_or_insert_default().extend(names::egress_labels(&egress.name_any()));
    let owners = metadata.owner_references.get_or_insert_default();
    let ours = our_claim(egress);
    // A claim of an Egress of the same name that is gone would make the garbage collector remove the child.
    owners.retain(|o| o.uid == ours.uid || !(o.kind == ours.kind && o.name == ours.name));
    match owners.iter_mut().find(|o| o.uid == ours.uid) {
        Some(old) => *old = ours,
        None => owners.push(ours),
    }
    metadata
}

/// Whether the parts of the metadata that we set are as they should be.
pub(super) fn is_claimed(wanted: &ObjectMeta, observed: &ObjectMeta) -> bool {
    let nothing = BTreeMap::new();
    let labels = |m: &ObjectMeta| m.labels.clone().unwrap_or_else(|| nothing.clone());
    labels(wanted) == labels(observed) && wanted.owner_references == observed.owner_references
}

fn our_claim(egress: &Egress) -> OwnerReference {
    OwnerReference {
        api_version: Egress::api_version(&()).into_owned(),
        kind: Egress::kind(&()).into_owned(),
        name: egress.name_any(),
        uid: egress.metadata.uid.clone().unwrap_or_default(),
        controller: Some(true),
        block_owner_deletion: Some(true),
    }
}
