//! The controllers on a real API server that comes without `kube-controller-manager` and `kube-scheduler`, as the
//! binaries for tests do. Passes are repeated instead of woken by watches, which is enough for the objects of a lab.

use std::collections::HashSet;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::http::{Method, Request, header};
use kube::Client;
use serde_json::{Value, json};
use tokio::runtime::Handle;

use super::backend::Backend;
use super::{Cluster, Pass};
use crate::api::delete::{DeleteOptions, Propagation};
use crate::api::registry::{GroupResource, Resource};
use crate::api::write::Part;
use crate::api::{ApiConfig, ApiError, ApiResult, ApiServer, crd, obj};

/// Pause between two passes.
const PAUSE: Duration = Duration::from_millis(300);
/// Pause between two passes over all objects.
const LONG_PAUSE: Duration = Duration::from_secs(2);
/// How often a change is tried again when somebody else wrote in between.
const RETRIES: usize = 8;
/// Kinds that own nothing and that nobody owns, but of which there are many.
const UNOWNED: [&str; 2] = ["events", "leases"];

/// Repeats a controller's pass for ever.
pub(super) async fn run(cluster: Cluster, pass: Pass) {
    let cluster = Arc::new(cluster);
    let name = cluster.name;
    let pause = if matches!(name, "garbage-collector" | "namespace-controller") { LONG_PAUSE } else { PAUSE };
    loop {
        let cluster = cluster.clone();
        match tokio::task::spawn_blocking(move || pass(&cluster)).await {
            Ok(Ok(_)) => {}
            Ok(Err(error)) => tracing::warn!(controller = name, %error, "a pass failed, trying again"),
            Err(error) => {
                tracing::error!(controller = name, %error, "a pass panicked");
                return;
            }
        }
        tokio::time::sleep(pause).await;
    }
}

/// A cluster behind an API server. All methods block, so they must not be called from asynchronous code.
pub(super) struct Remote {
    client: Client,
    /// Never served: it knows the kinds.
    kinds: Arc<ApiServer>,
    /// UIDs of the definitions that it has been told.
    told: Mutex<HashSet<String>>,
}

impl Remote {
    pub(super) fn new(client: Client) -> Self {
        Self { client, kinds: ApiServer::new(ApiConfig::default()), told: Mutex::default() }
    }

    fn request(&self, method: Method, path: &str, kind: &str, body: Option<&Value>) -> ApiResult<Value> {
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header(header::CONTENT_TYPE, kind)
            .body(body.map(|body| body.to_string().into_bytes()).unwrap_or_default())
            .map_err(ApiError::internal)?;
        Handle::current().block_on(self.client.request(request)).map_err(|error| match error {
            kube::Error::Api(status) => ApiError {
                code: status.code,
                reason: "RemoteError",
                message: format!("{path}: {}", status.message),
                details: None,
            },
            other => ApiError::internal(format!("{path}: {other}")),
        })
    }

    /// Learns definitions of custom resources.
    fn learn(&self) -> ApiResult<()> {
        let definitions = self.kinds.resource("apiextensions.k8s.io", "customresourcedefinitions")?;
        for definition in self.all(&definitions, None)? {
            if !obj::condition_is_true(&definition, "Established") {
                continue;
            }
            let new = self
                .told
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .insert(obj::uid(&definition).to_owned());
            if new {
                crd::serve(&self.kinds, &definition);
            }
        }
        Ok(())
    }

    /// The owners that a list taken kind by kind has missed. One whose kind we do not know counts as there.
    fn missed(&self, objects: &mut Vec<(GroupResource, Arc<Value>)>) -> ApiResult<()> {
        let known: HashSet<String> = objects.iter().map(|(_, object)| obj::uid(object).to_owned()).collect();
        let mut found = Vec::new();
        for (_, object) in objects.iter_mut() {
            let references = obj::items(object, &["metadata", "ownerReferences"]);
            let mut foreign = false;
            for reference in references.iter().filter(|one| !known.contains(obj::text(one, &["uid"]))) {
                let (version, kind) =
                    (obj::text(reference, &["apiVersion"]), obj::text(reference, &["kind"]));
                let Some(resource) = self.kinds.registry.by_kind(version, kind) else {
                    foreign = true;
                    continue;
                };
                let namespace = resource.namespaced.then(|| obj::namespace(object));
                match self.get(&resource, namespace, obj::text(reference, &["name"])) {
                    Ok(owner) if obj::uid(&owner) == obj::text(reference, &["uid"]) => {
                        found.push((resource.storage.clone(), owner));
                    }
                    Ok(_) => {}
                    Err(error) if error.is_not_found() => {}
                    Err(error) => return Err(error),
                }
            }
            if foreign {
                let mut kept = (**object).clone();
                obj::remove(&mut kept, &["metadata", "ownerReferences"]);
                *object = Arc::new(kept);
            }
        }
        objects.extend(found);
        Ok(())
    }
}

const JSON: &str = "application/json";
const MERGE: &str = "application/merge-patch+json";

fn path(resource: &Resource, namespace: Option<&str>, name: &str, part: Part) -> String {
    let mut path = match resource.group.as_str() {
        "" => format!("/api/{}", resource.version),
        group => format!("/apis/{group}/{}", resource.version),
    };
    if let Some(namespace) = namespace {
        path += &format!("/namespaces/{namespace}");
    }
    path += &format!("/{}", resource.plural);
    if !name.is_empty() {
        path += &format!("/{name}");
    }
    if part == Part::Status && resource.status {
        path += "/status";
    }
    path
}

/// Objects in lists come without their kind.
fn typed(resource: &Resource, mut object: Value) -> Value {
    obj::set(&mut object, &["apiVersion"], resource.api_version());
    obj::set(&mut object, &["kind"], resource.kind.as_str());
    object
}

impl Backend for Remote {
    fn resource(&self, group: &str, plural: &str) -> ApiResult<Arc<Resource>> {
        self.kinds.resource(group, plural).or_else(|_| {
            self.learn()?;
            self.kinds.resource(group, plural)
        })
    }

    fn resources(&self) -> ApiResult<Vec<Arc<Resource>>> {
        self.learn()?;
        Ok(self.kinds.registry.all())
    }

    fn all(&self, resource: &Resource, namespace: Option<&str>) -> ApiResult<Vec<Arc<Value>>> {
        match self.request(Method::GET, &path(resource, namespace, "", Part::Main), JSON, None) {
            Ok(mut list) => Ok(match list.get_mut("items").map(Value::take) {
                Some(Value::Array(items)) => {
                    items.into_iter().map(|item| Arc::new(typed(resource, item))).collect()
                }
                _ => Vec::new(),
            }),
            // The server has no such kind, or none that can be listed, so there are no objects of it.
            Err(error) if matches!(error.code, 404 | 405) => Ok(Vec::new()),
            Err(error) => Err(error),
        }
    }

    fn everything(&self) -> ApiResult<Vec<(GroupResource, Arc<Value>)>> {
        let mut objects = Vec::new();
        let mut listed = HashSet::new();
        for resource in self.resources()? {
            let kind = (resource.storage.group.clone(), resource.storage.resource.clone());
            if UNOWNED.contains(&resource.plural.as_str()) || !listed.insert(kind) {
                continue;
            }
            let all = self.all(&resource, None)?;
            objects.extend(all.into_iter().map(|object| (resource.storage.clone(), object)));
        }
        self.missed(&mut objects)?;
        Ok(objects)
    }

    fn get(&self, resource: &Resource, namespace: Option<&str>, name: &str) -> ApiResult<Arc<Value>> {
        let found = self.request(Method::GET, &path(resource, namespace, name, Part::Main), JSON, None)?;
        Ok(Arc::new(typed(resource, found)))
    }

    fn create(
        &self,
        manager: &str,
        resource: &Arc<Resource>,
        namespace: Option<&str>,
        object: Value,
    ) -> ApiResult<Arc<Value>> {
        let path = format!("{}?fieldManager={manager}", path(resource, namespace, "", Part::Main));
        self.request(Method::POST, &path, JSON, Some(&typed(resource, object))).map(Arc::new)
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
        let path = format!("{}?fieldManager={manager}", path(resource, namespace, name, part));
        self.request(Method::PATCH, &path, MERGE, Some(&patch)).map(Arc::new)
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
        let path = format!("{}?fieldManager={manager}", path(resource, namespace, name, part));
        let mut left = RETRIES;
        loop {
            let new = change(&*self.get(resource, namespace, name)?);
            left -= 1;
            match self.request(Method::PUT, &path, JSON, Some(&new)) {
                Err(error) if error.is_conflict() && left > 0 => {}
                other => return other.map(Arc::new),
            }
        }
    }

    fn delete(
        &self,
        resource: &Arc<Resource>,
        namespace: Option<&str>,
        name: &str,
        options: &DeleteOptions,
    ) -> ApiResult<()> {
        let propagation = match options.propagation {
            Propagation::Background => "Background",
            Propagation::Foreground => "Foreground",
            Propagation::Orphan => "Orphan",
        };
        let mut body = json!({"kind": "DeleteOptions", "apiVersion": "v1", "propagationPolicy": propagation});
        for (field, value) in [("uid", &options.uid), ("resourceVersion", &options.version)] {
            if let Some(value) = value {
                obj::set(&mut body, &["preconditions", field], value.as_str());
            }
        }
        if let Some(grace) = options.grace {
            obj::set(&mut body, &["gracePeriodSeconds"], grace);
        }
        self.request(Method::DELETE, &path(resource, namespace, name, Part::Main), JSON, Some(&body))
            .map(drop)
    }

    fn bind(&self, namespace: &str, name: &str, binding: &Value) -> ApiResult<()> {
        let mut body = binding.clone();
        obj::set(&mut body, &["apiVersion"], "v1");
        obj::set(&mut body, &["kind"], "Binding");
        obj::set(&mut body, &["metadata", "name"], name);
        let path = format!("/api/v1/namespaces/{namespace}/pods/{name}/binding");
        self.request(Method::POST, &path, JSON, Some(&body)).map(drop)
    }

    fn finalize_namespace(&self, namespace: &Value) -> ApiResult<Arc<Value>> {
        let mut body = namespace.clone();
        obj::set(&mut body, &["spec", "finalizers"], json!([]));
        let path = format!("/api/v1/namespaces/{}/finalize", obj::name(namespace));
        self.request(Method::PUT, &path, JSON, Some(&body)).map(Arc::new)
    }
}
