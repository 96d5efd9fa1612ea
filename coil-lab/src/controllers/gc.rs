//! Garbage collection along owner references, foreground and orphaning deletion, and objects of removed definitions.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use serde_json::Value;

use super::{Cluster, each};
use crate::api::crd::CLEANUP;
use crate::api::delete::{DeleteOptions, FOREGROUND, ORPHAN, Propagation};
use crate::api::registry::{GroupResource, Resource};
use crate::api::write::Part;
use crate::api::{ApiResult, obj};

pub(super) fn pass(cluster: &Cluster) -> ApiResult<Option<Duration>> {
    let objects = cluster.backend.everything()?;
    let by_uid: HashMap<&str, &Value> =
        objects.iter().map(|(_, object)| (obj::uid(object), &**object)).collect();
    let mut dependents: HashMap<&str, Vec<&(GroupResource, Arc<Value>)>> = HashMap::new();
    for entry in &objects {
        for reference in obj::items(&entry.1, &["metadata", "ownerReferences"]) {
            dependents.entry(obj::text(reference, &["uid"])).or_default().push(entry);
        }
    }
    each(&objects, |(kind, object)| {
        let Ok(resource) = cluster.resource(&kind.group, &kind.resource) else {
            return Ok(());
        };
        collect(cluster, &resource, object, &by_uid)?;
        if obj::is_deleting(object) {
            let mine = dependents.get(obj::uid(object)).map(Vec::as_slice).unwrap_or_default();
            finish(cluster, &resource, object, mine)?;
            if resource.kind == "CustomResourceDefinition" {
                clean_up(cluster, &resource, object)?;
            }
        }
        Ok(())
    })?;
    Ok(None)
}

fn has_finalizer(object: &Value, finalizer: &str) -> bool {
    obj::items(object, &["metadata", "finalizers"]).iter().any(|one| one == finalizer)
}

/// What to do about an object with owners.
#[derive(Debug, PartialEq, Eq)]
enum Fate {
    Keep,
    Delete(Propagation),
    DropReferences(HashSet<String>),
}

fn fate(object: &Value, by_uid: &HashMap<&str, &Value>) -> Fate {
    let references = obj::items(object, &["metadata", "ownerReferences"]);
    if references.is_empty() || obj::is_deleting(object) {
        return Fate::Keep;
    }
    let (mut solid, mut waiting, mut dangling) = (0, 0, HashSet::new());
    for reference in references {
        let uid = obj::text(reference, &["uid"]);
        match by_uid.get(uid) {
            None => {
                dangling.insert(uid.to_owned());
            }
            Some(owner) if obj::is_deleting(owner) && has_finalizer(owner, FOREGROUND) => waiting += 1,
            Some(_) => solid += 1,
        }
    }
    match (solid, waiting, dangling.is_empty()) {
        (0, 0, _) => Fate::Delete(Propagation::Background),
        (0, _, _) => Fate::Delete(Propagation::Foreground),
        (_, _, false) => Fate::DropReferences(dangling),
        _ => Fate::Keep,
    }
}

fn collect(
    cluster: &Cluster,
    resource: &Arc<Resource>,
    object: &Value,
    by_uid: &HashMap<&str, &Value>,
) -> ApiResult<()> {
    match fate(object, by_uid) {
        Fate::Keep => Ok(()),
        Fate::Delete(propagation) => {
            tracing::debug!(kind = resource.kind, name = obj::name(object), "owner is gone");
            cluster.delete(resource, object, DeleteOptions { propagation, ..DeleteOptions::default() })
        }
        Fate::DropReferences(gone) => drop_references(cluster, resource, object, &gone),
    }
}

fn drop_references(
    cluster: &Cluster,
    resource: &Arc<Resource>,
    object: &Value,
    gone: &HashSet<String>,
) -> ApiResult<()> {
    edit(cluster, resource, object, |new| {
        let mut left = obj::items(new, &["metadata", "ownerReferences"]).to_vec();
        left.retain(|reference| !gone.contains(obj::text(reference, &["uid"])));
        obj::set(new, &["metadata", "ownerReferences"], left);
    })
}

fn drop_finalizer(
    cluster: &Cluster,
    resource: &Arc<Resource>,
    object: &Value,
    finalizer: &str,
) -> ApiResult<()> {
    edit(cluster, resource, object, |new| {
        let mut left = obj::items(new, &["metadata", "finalizers"]).to_vec();
        left.retain(|one| one != finalizer);
        obj::set(new, &["metadata", "finalizers"], left);
    })
}

fn edit(
    cluster: &Cluster,
    resource: &Arc<Resource>,
    object: &Value,
    change: impl Fn(&mut Value),
) -> ApiResult<()> {
    cluster.edit(resource, object, Part::Main, &change)
}

/// Takes the collector's finalizers off a deleted object when their work is done.
fn finish(
    cluster: &Cluster,
    resource: &Arc<Resource>,
    object: &Value,
    dependents: &[&(GroupResource, Arc<Value>)],
) -> ApiResult<()> {
    if has_finalizer(object, ORPHAN) {
        let uid = HashSet::from([obj::uid(object).to_owned()]);
        for (kind, dependent) in dependents {
            if let Ok(resource) = cluster.resource(&kind.group, &kind.resource) {
                drop_references(cluster, &resource, dependent, &uid)?;
            }
        }
        return drop_finalizer(cluster, resource, object, ORPHAN);
    }
    if has_finalizer(object, FOREGROUND) {
        let is_blocked = dependents.iter().any(|(_, dependent)| {
            obj::items(dependent, &["metadata", "ownerReferences"]).iter().any(|reference| {
                obj::text(reference, &["uid"]) == obj::uid(object)
                    && obj::flag(reference, &["blockOwnerDeletion"])
            })
        });
        if !is_blocked {
            return drop_finalizer(cluster, resource, object, FOREGROUND);
        }
    }
    Ok(())
}

/// Deletes the objects of a definition that is being deleted, then lets the definition go.
fn clean_up(cluster: &Cluster, resource: &Arc<Resource>, definition: &Value) -> ApiResult<()> {
    if !has_finalizer(definition, CLEANUP) {
        return Ok(());
    }
    let group = obj::text(definition, &["spec", "group"]);
    let plural = obj::text(definition, &["spec", "names", "plural"]);
    if let Some(custom) = cluster.resource(group, plural).ok().filter(|one| one.custom) {
        let objects = cluster.backend.all(&custom, None)?;
        for object in objects.iter().filter(|object| !obj::is_deleting(object)) {
            cluster.delete(&custom, object, DeleteOptions::default())?;
        }
        if !cluster.backend.all(&custom, None)?.is_empty() {
            return Ok(());
        }
    }
    drop_finalizer(cluster, resource, definition, CLEANUP)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn fates() {
        let live = json!({"metadata": {"uid": "live"}});
        let leaving = json!({"metadata": {
            "uid": "leaving", "deletionTimestamp": "x", "finalizers": [FOREGROUND],
        }});
        let by_uid = HashMap::from([("live", &live), ("leaving", &leaving)]);
        let owned = |uids: &[&str]| {
            let references: Vec<Value> = uids.iter().map(|uid| json!({"uid": uid})).collect();
            json!({"metadata": {"ownerReferences": references}})
        };
        assert_eq!(fate(&owned(&[]), &by_uid), Fate::Keep);
        assert_eq!(fate(&owned(&["live"]), &by_uid), Fate::Keep);
        assert_eq!(fate(&owned(&["gone"]), &by_uid), Fate::Delete(Propagation::Background));
        assert_eq!(fate(&owned(&["leaving"]), &by_uid), Fate::Delete(Propagation::Foreground));
        let gone = HashSet::from(["gone".to_owned()]);
        assert_eq!(fate(&owned(&["gone", "live"]), &by_uid), Fate::DropReferences(gone));
    }
}
