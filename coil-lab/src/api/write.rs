//! Create, update and patch: what happens to an object between a request and the store.

use std::sync::Arc;

use serde_json::Value;

use super::error::{ApiError, ApiResult, FieldError};
use super::patch::{self, Patch, managed};
use super::read::key;
use super::registry::Resource;
use super::request::FieldValidation;
use super::server::ApiServer;
use super::store::StoreError;
use super::{crd, defaults, events, meta, obj, rules, schema};

/// How often a write that does not name a version is tried again when others write in between.
pub(super) const RETRIES: usize = 32;

/// Which part of an object is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// Everything but status.
    Main,
    /// Status only.
    Status,
    /// Everything, for internal writers.
    Whole,
}

/// How to write.
#[derive(Debug)]
pub struct WriteOptions {
    /// Who writes.
    pub manager: String,
    /// Check only.
    pub dry_run: bool,
    /// Treatment of unknown fields.
    pub validation: FieldValidation,
    /// Apply: take fields from other managers.
    pub force: bool,
    /// Which part.
    pub part: Part,
    /// Set by an apply: the managers of fields are up to date already.
    pub applied: bool,
    /// Texts for `Warning` headers, filled in by the write.
    pub warnings: Vec<String>,
}

impl WriteOptions {
    /// Options of a writer within this process.
    pub fn internal(manager: &str) -> Self {
        Self {
            manager: manager.to_owned(),
            dry_run: false,
            validation: FieldValidation::Ignore,
            force: false,
            part: Part::Main,
            applied: false,
            warnings: Vec::new(),
        }
    }

    /// The same for a part.
    pub fn with_part(mut self, part: Part) -> Self {
        self.part = part;
        self
    }
}

impl ApiServer {
    /// Creates an object without asking webhooks.
    pub fn create_now(
        &self,
        resource: &Arc<Resource>,
        namespace: Option<&str>,
        object: Value,
        options: &mut WriteOptions,
    ) -> ApiResult<Arc<Value>> {
        let object = self.build_new(resource, namespace, object, options)?;
        let object = self.finish(resource, object, None, options)?;
        self.commit_new(resource, object, options)
    }

    /// A new object before validation.
    pub(super) fn build_new(
        &self,
        resource: &Arc<Resource>,
        namespace: Option<&str>,
        mut object: Value,
        options: &mut WriteOptions,
    ) -> ApiResult<Value> {
        check_identity(resource, namespace, None, &mut object)?;
        if !obj::version(&object).is_empty() {
            return Err(ApiError::bad_request("resourceVersion should not be set on objects to be created"));
        }
        if resource.namespaced {
            self.check_namespace(resource, namespace.unwrap_or_default(), &object)?;
        }
        if resource.group == "events.k8s.io" {
            object = events::to_core(&object);
        }
        shape(resource, &mut object, options)?;
        if options.part != Part::Whole && resource.status && resource.kind != "Node" {
            obj::remove(&mut object, &["status"]);
        }
        meta::stamp_new(resource, &mut object);
        defaults::apply(resource, &mut object, None);
        if resource.plural == "customresourcedefinitions" {
            crd::prepare(self, &mut object);
        }
        Ok(object)
    }

    /// Validates an object and writes what follows from it.
    pub(super) fn finish(
        &self,
        resource: &Arc<Resource>,
        mut object: Value,
        old: Option<&Value>,
        options: &WriteOptions,
    ) -> ApiResult<Value> {
        validate(resource, &object, old)?;
        if options.part != Part::Status && resource.plural == "services" && resource.group.is_empty() {
            self.service_ips.assign(&mut object, old, self.config.prefer_v6)?;
        }
        if let Some(old) = old {
            meta::bump_generation(resource, &mut object, old);
        }
        managed::record_update(resource, old, &mut object, options);
        Ok(object)
    }

    /// What a webhook made of an object, in shape again.
    pub(super) fn reshape(
        &self,
        resource: &Arc<Resource>,
        mut object: Value,
        old: Option<&Value>,
        options: &mut WriteOptions,
    ) -> ApiResult<Value> {
        let validation = std::mem::replace(&mut options.validation, FieldValidation::Ignore);
        let shaped = shape(resource, &mut object, options);
        options.validation = validation;
        shaped?;
        defaults::apply(resource, &mut object, old);
        Ok(object)
    }

    pub(super) fn commit_new(
        &self,
        resource: &Arc<Resource>,
        object: Value,
        options: &WriteOptions,
    ) -> ApiResult<Arc<Value>> {
        let namespace = resource.namespaced.then(|| obj::namespace(&object).to_owned());
        let name = obj::name(&object).to_owned();
        let key = key(namespace.as_deref(), &name);
        let exists = || ApiError::already_exists(&resource.plural, &resource.group, &name);
        if options.dry_run {
            return match self.store.get(&resource.storage, &key) {
                Some(_) => Err(exists()),
                None => {
                    self.release_ips(resource, &object);
                    Ok(Arc::new(object))
                }
            };
        }
        let released = (resource.plural == "services").then(|| object.clone());
        let stored = self.store.insert(&resource.storage, key, object);
        if stored.is_err() {
            if let Some(object) = released {
                self.release_ips(resource, &object);
            }
            return Err(exists());
        }
        let stored = stored.map_err(|_| exists())?;
        self.after_write(resource, &stored);
        Ok(stored)
    }

    /// Replaces an object without asking webhooks.
    pub fn update_now(
        &self,
        resource: &Arc<Resource>,
        namespace: Option<&str>,
        name: &str,
        mut object: Value,
        options: &mut WriteOptions,
    ) -> ApiResult<Arc<Value>> {
        check_identity(resource, namespace, Some(name), &mut object)?;
        if resource.group == "events.k8s.io" {
            object = events::to_core(&object);
        }
        self.rewrite(resource, namespace, name, options, &mut |old, _| replaced(resource, old, &object))
    }

    /// Patches an object without asking webhooks. A server-side apply creates what is not there.
    pub fn patch_now(
        &self,
        resource: &Arc<Resource>,
        namespace: Option<&str>,
        name: &str,
        patch: &Patch,
        options: &mut WriteOptions,
    ) -> ApiResult<Arc<Value>> {
        if let Patch::Apply(applied) = patch {
            let mut applied = applied.clone();
            check_identity(resource, namespace, Some(name), &mut applied)?;
            if self.store.get(&resource.storage, &key(namespace, name)).is_none() {
                if options.part == Part::Status {
                    return Err(ApiError::not_found(&resource.plural, &resource.group, name));
                }
                let created = self.create_applied(resource, namespace, applied.clone(), options);
                match created {
                    Err(error) if error.reason == "AlreadyExists" => {}
                    other => return other,
                }
            }
        }
        self.rewrite(resource, namespace, name, options, &mut |old, options| {
            patched(resource, namespace, old, patch, options)
        })
    }

    fn create_applied(
        &self,
        resource: &Arc<Resource>,
        namespace: Option<&str>,
        applied: Value,
        options: &mut WriteOptions,
    ) -> ApiResult<Arc<Value>> {
        let object = self.build_new(resource, namespace, applied.clone(), options)?;
        let mut object = self.finish(resource, object, None, options)?;
        managed::record_apply_on_create(resource, &applied, &mut object, options);
        self.commit_new(resource, object, options)
    }

    /// Reads, changes and writes an object; again if somebody else wrote and the change names no version.
    pub fn rewrite(
        &self,
        resource: &Arc<Resource>,
        namespace: Option<&str>,
        name: &str,
        options: &mut WriteOptions,
        change: &mut dyn FnMut(&Value, &mut WriteOptions) -> ApiResult<Value>,
    ) -> ApiResult<Arc<Value>> {
        for _ in 0..RETRIES {
            let old = self.get(resource, namespace, name)?;
            options.warnings.clear();
            let new = change(&old, options)?;
            let seen = obj::version(&new);
            if !seen.is_empty() && seen != obj::version(&old) {
                return Err(ApiError::modified(&resource.plural, &resource.group, name));
            }
            let new = self.build_update(resource, &old, new, options)?;
            let new = self.finish(resource, new, Some(&old), options)?;
            match self.commit_update(resource, namespace, name, &old, new, options) {
                Err(None) => {}
                Err(Some(error)) => return Err(error),
                Ok(stored) => return Ok(stored),
            }
        }
        Err(ApiError::modified(&resource.plural, &resource.group, name))
    }

    /// A changed object before validation.
    pub(super) fn build_update(
        &self,
        resource: &Arc<Resource>,
        old: &Value,
        mut object: Value,
        options: &mut WriteOptions,
    ) -> ApiResult<Value> {
        shape(resource, &mut object, options)?;
        meta::keep_identity(&mut object, old);
        match options.part {
            Part::Main if resource.status => copy_part(&mut object, old, "status"),
            Part::Status => object = with_status_of(resource, object, old),
            Part::Main | Part::Whole => {}
        }
        if options.part != Part::Status {
            defaults::apply(resource, &mut object, Some(old));
        }
        if resource.plural == "customresourcedefinitions" {
            crd::prepare(self, &mut object);
        }
        Ok(object)
    }

    /// `Err(None)` asks for another try.
    pub(super) fn commit_update(
        &self,
        resource: &Arc<Resource>,
        namespace: Option<&str>,
        name: &str,
        old: &Arc<Value>,
        mut object: Value,
        options: &WriteOptions,
    ) -> Result<Arc<Value>, Option<ApiError>> {
        obj::set(&mut object, &["metadata", "resourceVersion"], obj::version(old).to_owned());
        if options.dry_run {
            return Ok(Arc::new(object));
        }
        let without_stamp = managed::same_but_for_times(&object, old);
        if without_stamp {
            return Ok(old.clone());
        }
        let key = key(namespace, name);
        let gone = super::delete::may_be_removed(resource, &object);
        let written = self.store.replace(&resource.storage, &key, obj::version(old), object);
        let stored = match written {
            Ok(stored) => stored,
            Err(StoreError::Missing) => {
                return Err(Some(ApiError::not_found(&resource.plural, &resource.group, name)));
            }
            Err(_) => return Err(None),
        };
        if gone && let Ok(last) = self.store.remove(&resource.storage, &key, Some(obj::version(&stored))) {
            self.after_removal(resource, &last);
            return Ok(last);
        }
        self.after_write(resource, &stored);
        Ok(stored)
    }

    fn check_namespace(&self, resource: &Resource, namespace: &str, object: &Value) -> ApiResult<()> {
        let namespaces = self.resource("", "namespaces")?;
        let found = self.get(&namespaces, None, namespace)?;
        if obj::is_deleting(&found) && resource.kind != "Event" {
            return Err(ApiError::forbidden(
                &resource.plural,
                &resource.group,
                obj::name(object),
                &format!(
                    "unable to create new content in namespace {namespace} because it is being terminated"
                ),
            ));
        }
        Ok(())
    }

    fn after_write(&self, resource: &Resource, object: &Value) {
        if resource.plural == "customresourcedefinitions" {
            crd::serve(self, object);
        }
    }

    pub(super) fn after_removal(&self, resource: &Resource, object: &Value) {
        self.release_ips(resource, object);
        if resource.plural == "customresourcedefinitions" {
            crd::forget(self, object);
        }
    }

    fn release_ips(&self, resource: &Resource, object: &Value) {
        if resource.plural == "services" && resource.group.is_empty() {
            self.service_ips.release(object);
        }
    }
}

/// The object that replaces `old`, if it is meant to.
pub(super) fn replaced(resource: &Resource, old: &Value, object: &Value) -> ApiResult<Value> {
    let (wanted, found) = (obj::uid(object), obj::uid(old));
    if !wanted.is_empty() && wanted != found {
        let detail =
            format!("Precondition failed: UID in precondition: {wanted}, UID in object meta: {found}");
        return Err(ApiError::conflict(&resource.plural, &resource.group, obj::name(old), &detail));
    }
    Ok(object.clone())
}

/// The object after a patch.
pub(super) fn patched(
    resource: &Resource,
    namespace: Option<&str>,
    old: &Value,
    patch: &Patch,
    options: &mut WriteOptions,
) -> ApiResult<Value> {
    let is_event = resource.group == "events.k8s.io";
    let shown = if is_event { events::to_new(old) } else { old.clone() };
    let mut patched = patch::apply_patch(resource, &shown, patch, options)?;
    check_identity(resource, namespace, Some(obj::name(old)), &mut patched)?;
    Ok(if is_event { events::to_core(&patched) } else { patched })
}

/// Makes group, kind, namespace and name of an object agree with the request's.
pub(super) fn check_identity(
    resource: &Resource,
    namespace: Option<&str>,
    name: Option<&str>,
    object: &mut Value,
) -> ApiResult<()> {
    if !object.is_object() {
        return Err(ApiError::bad_request("the object provided is unrecognized: it is not a JSON object"));
    }
    let version = resource.api_version();
    let found = obj::text(object, &["apiVersion"]).to_owned();
    if found.is_empty() {
        obj::set(object, &["apiVersion"], version.clone());
    } else if found != version {
        return Err(ApiError::bad_request(format!(
            "the API version in the data ({found}) does not match the expected API version ({version})"
        )));
    }
    let kind = obj::text(object, &["kind"]).to_owned();
    if kind.is_empty() {
        obj::set(object, &["kind"], resource.kind.clone());
    } else if kind != resource.kind {
        return Err(ApiError::bad_request(format!(
            "{kind} in version \"{}\" cannot be handled as a {}: the kind in the data does not match the resource",
            resource.version, resource.kind
        )));
    }
    if !object.get("metadata").is_none_or(|meta| meta.is_object() || meta.is_null()) {
        return Err(ApiError::bad_request("metadata: must be an object"));
    }
    for field in ["name", "namespace", "generateName", "uid", "resourceVersion"] {
        if obj::at(object, &["metadata", field]).is_some_and(|value| !value.is_string() && !value.is_null()) {
            return Err(ApiError::bad_request(format!("metadata.{field}: must be a string")));
        }
    }
    match namespace.filter(|_| resource.namespaced) {
        Some(namespace) => {
            let given = obj::namespace(object);
            if !given.is_empty() && given != namespace {
                return Err(ApiError::bad_request(format!(
                    "the namespace of the provided object does not match the namespace sent on the request ({given} vs {namespace})"
                )));
            }
            obj::set(object, &["metadata", "namespace"], namespace);
        }
        None => {
            obj::remove(object, &["metadata", "namespace"]);
        }
    }
    if let Some(name) = name {
        let given = obj::name(object);
        if !given.is_empty() && given != name {
            return Err(ApiError::bad_request(format!(
                "the name of the object ({given}) does not match the name on the URL ({name})"
            )));
        }
        obj::set(object, &["metadata", "name"], name);
    }
    Ok(())
}

/// Defaults and prunes by schema.
fn shape(resource: &Resource, object: &mut Value, options: &mut WriteOptions) -> ApiResult<()> {
    let schema = resource.schema_for_storage();
    let unknown = schema::prune::apply(&schema, object, true);
    schema::default::apply(&schema, object);
    if !resource.custom {
        check_shape(resource, &schema, object)?;
    }
    report_unknown(unknown.iter().map(|path| format!("unknown field \"{path}\"")), options)
}

/// A built-in object of the wrong shape does not even decode on the real server. What is missing is a matter of later
/// checks.
fn check_shape(resource: &Resource, schema: &schema::Schema, object: &Value) -> ApiResult<()> {
    let errors = schema::validate::check(schema, object, None);
    match errors.iter().find(|error| error.reason != "FieldValueRequired") {
        None => Ok(()),
        Some(error) => Err(ApiError::bad_request(format!(
            "{} in version \"{}\" cannot be handled as a {}: {}",
            resource.kind,
            resource.version,
            resource.kind,
            error.text()
        ))),
    }
}

/// Refuses or warns of fields that are unknown or repeated.
pub fn report_unknown(texts: impl Iterator<Item = String>, options: &mut WriteOptions) -> ApiResult<()> {
    let texts: Vec<String> = texts.collect();
    match options.validation {
        _ if texts.is_empty() => Ok(()),
        FieldValidation::Ignore => Ok(()),
        FieldValidation::Warn => {
            options.warnings.extend(texts);
            Ok(())
        }
        FieldValidation::Strict => {
            Err(ApiError::bad_request(format!("strict decoding error: {}", texts.join(", "))))
        }
    }
}

fn validate(resource: &Resource, object: &Value, old: Option<&Value>) -> ApiResult<()> {
    let mut errors =
        if resource.custom { schema::validate::check(&resource.schema, object, old) } else { Vec::new() };
    errors.splice(0..0, meta::violations(resource, object));
    if !resource.custom {
        errors.extend(rules::violations(resource, object, old));
    }
    errors.extend(old.map(|old| deletion_violations(object, old)).unwrap_or_default());
    if errors.is_empty() {
        Ok(())
    } else {
        Err(ApiError::invalid(&resource.kind, &resource.group, obj::name(object), &errors))
    }
}

/// While an object is being deleted no finalizer may be added.
fn deletion_violations(object: &Value, old: &Value) -> Vec<FieldError> {
    if !obj::is_deleting(old) {
        return Vec::new();
    }
    let before = obj::items(old, &["metadata", "finalizers"]);
    let added: Vec<String> = obj::items(object, &["metadata", "finalizers"])
        .iter()
        .filter(|one| !before.contains(one))
        .map(|one| one.as_str().unwrap_or_default().to_owned())
        .collect();
    if added.is_empty() {
        return Vec::new();
    }
    vec![FieldError::forbidden(
        "metadata.finalizers",
        format!(
            "no new finalizers can be added if the object is being deleted, found new finalizers {added:?}"
        ),
    )]
}

fn copy_part(object: &mut Value, old: &Value, part: &str) {
    match old.get(part) {
        Some(value) => obj::set(object, &[part], value.clone()),
        None => {
            obj::remove(object, &[part]);
        }
    }
}

/// The old object with the new one's status; built-in kinds also take labels and annotations.
fn with_status_of(resource: &Resource, new: Value, old: &Value) -> Value {
    let mut result = old.clone();
    copy_part(&mut result, &new, "status");
    if let Some(fields) = obj::at(&new, &["metadata", "managedFields"]) {
        obj::set(&mut result, &["metadata", "managedFields"], fields.clone());
    }
    if !resource.custom {
        for part in ["labels", "annotations"] {
            if let Some(value) = obj::at(&new, &["metadata", part]) {
                obj::set(&mut result, &["metadata", part], value.clone());
            }
        }
    }
    result
}
