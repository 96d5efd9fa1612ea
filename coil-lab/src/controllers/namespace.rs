//! Namespaces: the default service account of each, and the emptying of deleted ones.

use std::time::Duration;

use serde_json::{Value, json};

use super::{Cluster, each};
use crate::api::delete::DeleteOptions;
use crate::api::{ApiResult, obj};

pub(super) fn pass(cluster: &Cluster) -> ApiResult<Option<Duration>> {
    let deleted = cluster.list("", "namespaces")?.into_iter().filter(|namespace| obj::is_deleting(namespace));
    each(deleted, |namespace| empty(cluster, &namespace))?;
    Ok(None)
}

/// Apart from the emptying, which may take a while: pods of a new namespace wait for its account.
pub(super) fn accounts(cluster: &Cluster) -> ApiResult<Option<Duration>> {
    let kept = cluster.list("", "namespaces")?.into_iter().filter(|namespace| !obj::is_deleting(namespace));
    each(kept, |namespace| ensure_account(cluster, obj::name(&namespace)))?;
    Ok(None)
}

fn ensure_account(cluster: &Cluster, namespace: &str) -> ApiResult<()> {
    let accounts = cluster.resource("", "serviceaccounts")?;
    if cluster.backend.get(&accounts, Some(namespace), "default").is_ok() {
        return Ok(());
    }
    let account = json!({"metadata": {"name": "default"}});
    super::settled(cluster.create("", "serviceaccounts", Some(namespace), account))
}

fn empty(cluster: &Cluster, namespace: &Value) -> ApiResult<()> {
    let name = obj::name(namespace);
    let mut left = 0;
    let mut stored = Vec::new();
    for resource in cluster.backend.resources()? {
        if !resource.namespaced || stored.contains(&resource.storage) {
            continue;
        }
        stored.push(resource.storage.clone());
        for object in cluster.backend.all(&resource, Some(name))? {
            if !obj::is_deleting(&object) {
                cluster.delete(&resource, &object, DeleteOptions::default())?;
            }
        }
        left += cluster.backend.all(&resource, Some(name))?.len();
    }
    if left == 0 {
        super::settled(cluster.backend.finalize_namespace(namespace))?;
    }
    Ok(())
}
