//! Deletion: preconditions, grace for pods, finalizers, propagation policies.

use std::sync::Arc;

use serde_json::{Value, json};

use super::error::{ApiError, ApiResult};
use super::meta;
use super::obj;
use super::read::{Selection, key};
use super::registry::Resource;
use super::server::ApiServer;
use super::store::StoreError;

/// Finalizer of a deletion that waits for dependents.
pub const FOREGROUND: &str = "foregroundDeletion";
/// Finalizer of a deletion that leaves dependents alone.
pub const ORPHAN: &str = "orphan";

/// Longer graces are cut: a year.
const LONGEST_GRACE: i64 = 365 * 24 * 3600;

/// What happens to dependents.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Propagation {
    /// Deleted after the owner is gone.
    Background,
    /// Deleted before the owner goes.
    Foreground,
    /// Left alone.
    Orphan,
}

/// `DeleteOptions`, read.
#[derive(Debug, Clone)]
pub struct DeleteOptions {
    /// Grace for pods.
    pub grace: Option<i64>,
    /// The UID that the object must have.
    pub uid: Option<String>,
    /// The version that the object must be in.
    pub version: Option<String>,
    /// What happens to dependents.
    pub propagation: Propagation,
    /// Check only.
    pub dry_run: bool,
}

impl Default for DeleteOptions {
    fn default() -> Self {
        Self { grace: None, uid: None, version: None, propagation: Propagation::Background, dry_run: false }
    }
}

impl DeleteOptions {
    /// From a body (which may be null) and the query.
    pub fn read(body: &Value, query: &super::request::Query) -> ApiResult<Self> {
        let text = |path: &[&str]| Some(obj::text(body, path).to_owned()).filter(|text| !text.is_empty());
        let from_query = |name: &str| Some(query.get(name).to_owned()).filter(|text| !text.is_empty());
        let policy = text(&["propagationPolicy"]).or_else(|| from_query("propagationPolicy"));
        let orphan = obj::flag(body, &["orphanDependents"]) || query.flag("orphanDependents");
        let propagation = match policy.as_deref() {
            None if orphan => Propagation::Orphan,
            None | Some("Background") => Propagation::Background,
            Some("Foreground") => Propagation::Foreground,
            Some("Orphan") => Propagation::Orphan,
            Some(other) => {
                return Err(ApiError::bad_request(format!(
                    "propagationPolicy: Unsupported value: \"{other}\": supported values: \"Foreground\", \"Background\", \"Orphan\""
                )));
            }
        };
        let grace =
            obj::int(body, &["gracePeriodSeconds"]).or_else(|| query.get("gracePeriodSeconds").parse().ok());
        if grace.is_some_and(|grace| grace < 0) {
            return Err(ApiError::bad_request(
                "gracePeriodSeconds: Invalid value: must be greater than or equal to 0",
            ));
        }
        Ok(Self {
            grace,
            uid: text(&["preconditions", "uid"]),
            version: text(&["preconditions", "resourceVersion"]),
            propagation,
            dry_run: query.dry_run()? || obj::items(body, &["dryRun"]).iter().any(|one| one == "All"),
        })
    }
}

/// What a deletion led to.
#[derive(Debug)]
pub enum Deleted {
    /// The object is gone; this was its last state.
    Gone(Arc<Value>),
    /// It is marked and waits for a finalizer or a kubelet.
    Marked(Arc<Value>),
}

impl Deleted {
    /// The object.
    pub fn object(&self) -> &Arc<Value> {
        match self {
            Self::Gone(object) | Self::Marked(object) => object,
        }
    }
}

/// Whether nothing holds a marked object any more.
pub fn may_be_removed(resource: &Resource, object: &Value) -> bool {
    obj::is_deleting(object)
        && obj::items(object, &["metadata", "finalizers"]).is_empty()
        && (resource.kind != "Namespace" || obj::items(object, &["spec", "finalizers"]).is_empty())
        && obj::int(object, &["metadata", "deletionGracePeriodSeconds"]).unwrap_or(0) == 0
}

impl ApiServer {
    /// Deletes an object.
    pub fn delete(
        &self,
        resource: &Arc<Resource>,
        namespace: Option<&str>,
        name: &str,
        options: &DeleteOptions,
    ) -> ApiResult<Deleted> {
        loop {
            let old = self.get(resource, namespace, name)?;
            self.check_preconditions(resource, name, &old, options)?;
            let mut object = (*old).clone();
            mark(resource, &mut object, options);
            if options.dry_run {
                return Ok(Deleted::Marked(old));
            }
            let key = key(namespace, name);
            if may_be_removed(resource, &object) {
                match self.store.remove(&resource.storage, &key, Some(obj::version(&old))) {
                    Ok(last) => {
                        self.after_removal(resource, &last);
                        return Ok(Deleted::Gone(last));
                    }
                    Err(StoreError::Missing) => {
                        return Err(ApiError::not_found(&resource.plural, &resource.group, name));
                    }
                    Err(_) => continue,
                }
            }
            if object == *old {
                return Ok(Deleted::Marked(old));
            }
            match self.store.replace(&resource.storage, &key, obj::version(&old), object) {
                Ok(stored) => return Ok(Deleted::Marked(stored)),
                Err(StoreError::Missing) => {
                    return Err(ApiError::not_found(&resource.plural, &resource.group, name));
                }
                Err(_) => {}
            }
        }
    }

    fn check_preconditions(
        &self,
        resource: &Resource,
        name: &str,
        old: &Value,
        options: &DeleteOptions,
    ) -> ApiResult<()> {
        let protected = ["default", "kube-system", "kube-public"];
        if resource.kind == "Namespace" && protected.contains(&name) {
            return Err(ApiError::forbidden(&resource.plural, "", name, "this namespace may not be deleted"));
        }
        let failed = |what: &str, wanted: &str, found: &str| {
            ApiError::conflict(
                &resource.plural,
                &resource.group,
                name,
                &format!(
                    "Precondition failed: {what} in precondition: {wanted}, {what} in object meta: {found}"
                ),
            )
        };
        if let Some(uid) = options.uid.as_deref().filter(|&uid| uid != obj::uid(old)) {
            return Err(failed("UID", uid, obj::uid(old)));
        }
        if let Some(version) = options.version.as_deref().filter(|&version| version != obj::version(old)) {
            return Err(failed("ResourceVersion", version, obj::version(old)));
        }
        Ok(())
    }

    /// Deletes all that is selected.
    pub fn delete_all(
        &self,
        resource: &Arc<Resource>,
        selection: &Selection,
        options: &DeleteOptions,
    ) -> ApiResult<Vec<Arc<Value>>> {
        let mut deleted = Vec::new();
        for object in self.all(resource, selection.namespace.as_deref()) {
            if !selection.matches(&object) {
                continue;
            }
            let namespace = resource.namespaced.then(|| obj::namespace(&object));
            match self.delete(resource, namespace, obj::name(&object), options) {
                Ok(done) => deleted.push(done.object().clone()),
                Err(error) if error.is_not_found() => {}
                Err(error) => return Err(error),
            }
        }
        Ok(deleted)
    }
}

/// Writes the wish to delete into an object.
fn mark(resource: &Resource, object: &mut Value, options: &DeleteOptions) {
    let grace = grace_of(resource, object, options);
    let earlier = obj::int(object, &["metadata", "deletionGracePeriodSeconds"]);
    if !obj::is_deleting(object) {
        let when = jiff::Timestamp::now() + jiff::SignedDuration::from_secs(grace);
        obj::set(object, &["metadata", "deletionTimestamp"], obj::stamp(when));
        obj::set(object, &["metadata", "deletionGracePeriodSeconds"], grace);
        meta::raise_generation(object);
    } else if earlier.is_some_and(|earlier| grace < earlier) {
        let when = jiff::Timestamp::now() + jiff::SignedDuration::from_secs(grace);
        obj::set(object, &["metadata", "deletionTimestamp"], obj::stamp(when));
        obj::set(object, &["metadata", "deletionGracePeriodSeconds"], grace);
    }
    if resource.kind == "Namespace" {
        obj::set(object, &["status", "phase"], "Terminating");
    }
    let mut finalizers = obj::items(object, &["metadata", "finalizers"]).to_vec();
    let before = finalizers.len();
    let wanted = match options.propagation {
        Propagation::Background => None,
        Propagation::Foreground => Some(FOREGROUND),
        Propagation::Orphan => Some(ORPHAN),
    };
    // The collector is not involved with namespaces, and a pod has no dependents that matter.
    if let Some(wanted) = wanted.filter(|_| resource.kind != "Namespace" && resource.kind != "Pod")
        && !finalizers.iter().any(|one| one == wanted)
    {
        finalizers.push(json!(wanted));
    }
    if finalizers.len() != before {
        obj::set(object, &["metadata", "finalizers"], finalizers);
    }
}

fn grace_of(resource: &Resource, object: &Value, options: &DeleteOptions) -> i64 {
    if resource.kind != "Pod" {
        return 0;
    }
    let is_bound = !obj::text(object, &["spec", "nodeName"]).is_empty();
    let is_finished = ["Succeeded", "Failed"].contains(&obj::text(object, &["status", "phase"]));
    if !is_bound || is_finished {
        return 0;
    }
    let own = obj::int(object, &["spec", "terminationGracePeriodSeconds"]).unwrap_or(30);
    options.grace.unwrap_or(own).clamp(0, LONGEST_GRACE)
}

impl ApiServer {
    /// Takes over the finalizers of a namespace's spec; without any it goes.
    pub fn finalize_namespace(&self, name: &str, wanted: &Value) -> ApiResult<Arc<Value>> {
        let namespaces = self.resource("", "namespaces")?;
        let mut options =
            super::write::WriteOptions::internal("namespace-controller").with_part(super::write::Part::Whole);
        self.rewrite(&namespaces, None, name, &mut options, &mut |old, _| {
            let mut new = old.clone();
            obj::set(&mut new, &["spec", "finalizers"], obj::items(wanted, &["spec", "finalizers"]).to_vec());
            Ok(new)
        })
    }
}
