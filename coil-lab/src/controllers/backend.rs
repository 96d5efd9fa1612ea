//! What controllers ask of a cluster, whoever stores its objects.

use std::sync::Arc;

use serde_json::{Value, json};

use crate::api::delete::DeleteOptions;
use crate::api::patch::Patch;
use crate::api::registry::{GroupResource, Resource};
use crate::api::write::{Part, WriteOptions};
use crate::api::{ApiResult, ApiServer, obj};

/// Reads and writes objects. `manager` names the writer.
pub(super) trait Backend: Send + Sync {
    /// A resource by group and plural name.
    fn resource(&self, group: &str, plural: &str) -> ApiResult<Arc<Resource>>;

    /// All resources.
    fn resources(&self) -> ApiResult<Vec<Arc<Resource>>>;

    /// All objects of a resource, of one namespace if one is given.
    fn all(&self, resource: &Resource, namespace: Option<&str>) -> ApiResult<Vec<Arc<Value>>>;

    /// All objects that garbage collection is about.
    fn everything(&self) -> ApiResult<Vec<(GroupResource, Arc<Value>)>>;

    /// One object.
    fn get(&self, resource: &Resource, namespace: Option<&str>, name: &str) -> ApiResult<Arc<Value>>;

    /// Makes an object.
    fn create(
        &self,
        manager: &str,
        resource: &Arc<Resource>,
        namespace: Option<&str>,
        object: Value,
    ) -> ApiResult<Arc<Value>>;

    /// Merges a patch into an object.
    fn merge(
        &self,
        manager: &str,
        resource: &Arc<Resource>,
        namespace: Option<&str>,
        name: &str,
        part: Part,
        patch: Value,
    ) -> ApiResult<Arc<Value>>;

    /// Reads, changes and writes an object; again if somebody else wrote.
    fn rewrite(
        &self,
        manager: &str,
        resource: &Arc<Resource>,
        namespace: Option<&str>,
        name: &str,
        part: Part,
        change: &dyn Fn(&Value) -> Value,
    ) -> ApiResult<Arc<Value>>;

    /// Deletes an object.
    fn delete(
        &self,
        resource: &Arc<Resource>,
        namespace: Option<&str>,
        name: &str,
        options: &DeleteOptions,
    ) -> ApiResult<()>;

    /// Binds a pod to a node.
    fn bind(&self, namespace: &str, name: &str, binding: &Value) -> ApiResult<()>;

    /// Lets an empty namespace go.
    fn finalize_namespace(&self, namespace: &Value) -> ApiResult<Arc<Value>>;
}

impl Backend for ApiServer {
    fn resource(&self, group: &str, plural: &str) -> ApiResult<Arc<Resource>> {
        Self::resource(self, group, plural)
    }

    fn resources(&self) -> ApiResult<Vec<Arc<Resource>>> {
        Ok(self.registry.all())
    }

    fn all(&self, resource: &Resource, namespace: Option<&str>) -> ApiResult<Vec<Arc<Value>>> {
        Ok(Self::all(self, resource, namespace))
    }

    fn everything(&self) -> ApiResult<Vec<(GroupResource, Arc<Value>)>> {
        Ok(self.store.everything())
    }

    fn get(&self, resource: &Resource, namespace: Option<&str>, name: &str) -> ApiResult<Arc<Value>> {
        Self::get(self, resource, namespace, name)
    }

    fn create(
        &self,
        manager: &str,
        resource: &Arc<Resource>,
        namespace: Option<&str>,
        object: Value,
    ) -> ApiResult<Arc<Value>> {
        self.create_now(resource, namespace, object, &mut WriteOptions::internal(manager))
    }

    fn merge(
        &self,
        manager: &str,
        resource: &Arc<Resource>,
        namespace: Option<&str>,
        name: &str,
        part: Part,
        patch: Value,
    ) -> ApiResult<Arc<Value>> {
        let mut options = WriteOptions::internal(manager).with_part(part);
        self.patch_now(resource, namespace, name, &Patch::Merge(patch), &mut options)
    }

    fn rewrite(
        &self,
        manager: &str,
        resource: &Arc<Resource>,
        namespace: Option<&str>,
        name: &str,
        part: Part,
        change: &dyn Fn(&Value) -> Value,
    ) -> ApiResult<Arc<Value>> {
        let mut options = WriteOptions::internal(manager).with_part(part);
        Self::rewrite(self, resource, namespace, name, &mut options, &mut |old, _| Ok(change(old)))
    }

    fn delete(
        &self,
        resource: &Arc<Resource>,
        namespace: Option<&str>,
        name: &str,
        options: &DeleteOptions,
    ) -> ApiResult<()> {
        Self::delete(self, resource, namespace, name, options).map(drop)
    }

    fn bind(&self, namespace: &str, name: &str, binding: &Value) -> ApiResult<()> {
        Self::bind(self, namespace, name, binding)
    }

    fn finalize_namespace(&self, namespace: &Value) -> ApiResult<Arc<Value>> {
        Self::finalize_namespace(self, obj::name(namespace), &json!({"spec": {"finalizers": []}}))
    }
}
