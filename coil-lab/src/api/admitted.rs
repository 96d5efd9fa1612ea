//! Writes of clients: the same as in `write`, with admission webhooks asked where there are any.

use std::sync::Arc;

use serde_json::Value;

use super::admission::Review;
use super::delete::{DeleteOptions, Deleted};
use super::error::{ApiError, ApiResult};
use super::obj;
use super::patch::{Patch, managed};
use super::read::key;
use super::registry::Resource;
use super::server::ApiServer;
use super::write::{self, Part, WriteOptions};

type Change<'a> = &'a mut (dyn FnMut(&Value, &mut WriteOptions) -> ApiResult<Value> + Send);

impl ApiServer {
    /// Creates an object.
    pub async fn create(
        &self,
        resource: &Arc<Resource>,
        namespace: Option<&str>,
        object: Value,
        options: &mut WriteOptions,
    ) -> ApiResult<Arc<Value>> {
        if !self.has_webhooks(resource) {
            return self.create_now(resource, namespace, object, options);
        }
        let object = self.admitted_new(resource, namespace, object, options).await?;
        self.commit_new(resource, object, options)
    }

    /// Replaces an object.
    pub async fn update(
        &self,
        resource: &Arc<Resource>,
        namespace: Option<&str>,
        name: &str,
        mut object: Value,
        options: &mut WriteOptions,
    ) -> ApiResult<Arc<Value>> {
        if !self.has_webhooks(resource) {
            return self.update_now(resource, namespace, name, object, options);
        }
        write::check_identity(resource, namespace, Some(name), &mut object)?;
        let mut change = |old: &Value, _: &mut WriteOptions| write::replaced(resource, old, &object);
        self.rewrite_admitted(resource, namespace, name, options, &mut change).await
    }

    /// Patches an object. A server-side apply creates what is not there.
    pub async fn patch(
        &self,
        resource: &Arc<Resource>,
        namespace: Option<&str>,
        name: &str,
        patch: &Patch,
        options: &mut WriteOptions,
    ) -> ApiResult<Arc<Value>> {
        if !self.has_webhooks(resource) {
            return self.patch_now(resource, namespace, name, patch, options);
        }
        if let Patch::Apply(applied) = patch
            && options.part != Part::Status
            && self.store.get(&resource.storage, &key(namespace, name)).is_none()
        {
            let mut applied = applied.clone();
            write::check_identity(resource, namespace, Some(name), &mut applied)?;
            let mut object = self.admitted_new(resource, namespace, applied.clone(), options).await?;
            managed::record_apply_on_create(resource, &applied, &mut object, options);
            return self.commit_new(resource, object, options);
        }
        let mut change = |old: &Value, options: &mut WriteOptions| {
            write::patched(resource, namespace, old, patch, options)
        };
        self.rewrite_admitted(resource, namespace, name, options, &mut change).await
    }

    /// Deletes an object.
    pub async fn delete_admitted(
        &self,
        resource: &Arc<Resource>,
        namespace: Option<&str>,
        name: &str,
        options: &DeleteOptions,
    ) -> ApiResult<Deleted> {
        if self.has_webhooks(resource) {
            let old = self.get(resource, namespace, name)?;
            let mut review = Review {
                resource: resource.clone(),
                operation: "DELETE",
                subresource: "",
                object: Value::Null,
                old: (*old).clone(),
                dry_run: options.dry_run,
            };
            let mut warnings = Vec::new();
            self.mutate(&mut review, &mut warnings).await?;
            self.judge(&review, &mut warnings).await?;
        }
        self.delete(resource, namespace, name, options)
    }

    async fn admitted_new(
        &self,
        resource: &Arc<Resource>,
        namespace: Option<&str>,
        object: Value,
        options: &mut WriteOptions,
    ) -> ApiResult<Value> {
        let object = self.build_new(resource, namespace, object, options)?;
        self.admit(resource, object, None, options).await
    }

    async fn rewrite_admitted(
        &self,
        resource: &Arc<Resource>,
        namespace: Option<&str>,
        name: &str,
        options: &mut WriteOptions,
        change: Change<'_>,
    ) -> ApiResult<Arc<Value>> {
        let modified = || ApiError::modified(&resource.plural, &resource.group, name);
        for _ in 0..write::RETRIES {
            let old = self.get(resource, namespace, name)?;
            options.warnings.clear();
            let new = change(&old, options)?;
            let seen = obj::version(&new);
            if !seen.is_empty() && seen != obj::version(&old) {
                return Err(modified());
            }
            let new = self.build_update(resource, &old, new, options)?;
            let new = self.admit(resource, new, Some(&old), options).await?;
            match self.commit_update(resource, namespace, name, &old, new, options) {
                Err(None) => {}
                Err(Some(error)) => return Err(error),
                Ok(stored) => return Ok(stored),
            }
        }
        Err(modified())
    }

    /// Mutating webhooks, validation, validating webhooks.
    async fn admit(
        &self,
        resource: &Arc<Resource>,
        object: Value,
        old: Option<&Value>,
        options: &mut WriteOptions,
    ) -> ApiResult<Value> {
        let mut review = Review {
            resource: resource.clone(),
            operation: if old.is_some() { "UPDATE" } else { "CREATE" },
            subresource: if options.part == Part::Status { "status" } else { "" },
            object,
            old: old.cloned().unwrap_or_default(),
            dry_run: options.dry_run,
        };
        let mut warnings = Vec::new();
        self.mutate(&mut review, &mut warnings).await?;
        let object = self.reshape(resource, std::mem::take(&mut review.object), old, options)?;
        review.object = self.finish(resource, object, old, options)?;
        self.judge(&review, &mut warnings).await?;
        options.warnings.append(&mut warnings);
        Ok(review.object)
    }
}
