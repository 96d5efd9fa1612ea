//! Subresources beside status: scale, binding, eviction, token, finalize; and reviews, which always allow.

use std::sync::Arc;

use serde_json::{Value, json};

use super::delete::{DeleteOptions, Deleted};
use super::error::{ApiError, ApiResult, FieldError};
use super::obj;
use super::patch::{self, Patch};
use super::registry::{Resource, ScalePaths};
use super::selector::Labels;
use super::server::ApiServer;
use super::table::jsonpath::JsonPath;
use super::write::{Part, WriteOptions};

/// Resources that are answered and not stored, all `v1`: group, plural, kind, whether namespaced.
pub const REVIEWS: [(&str, &str, &str, bool); 6] = [
    ("authentication.k8s.io", "selfsubjectreviews", "SelfSubjectReview", false),
    ("authentication.k8s.io", "tokenreviews", "TokenReview", false),
    ("authorization.k8s.io", "localsubjectaccessreviews", "LocalSubjectAccessReview", true),
    ("authorization.k8s.io", "selfsubjectaccessreviews", "SelfSubjectAccessReview", false),
    ("authorization.k8s.io", "selfsubjectrulesreviews", "SelfSubjectRulesReview", false),
    ("authorization.k8s.io", "subjectaccessreviews", "SubjectAccessReview", false),
];

/// The user that everybody is.
const USER: &str = "system:admin";

/// The answer to a review, if the resource is one.
pub fn review(group: &str, resource: &str, mut object: Value) -> Option<Value> {
    match (group, resource) {
        ("authorization.k8s.io", "selfsubjectrulesreviews") => {
            obj::set(
                &mut object,
                &["status"],
                json!({
                    "resourceRules": [{"verbs": ["*"], "apiGroups": ["*"], "resources": ["*"]}],
                    "nonResourceRules": [{"verbs": ["*"], "nonResourceURLs": ["*"]}],
                    "incomplete": false,
                }),
            );
        }
        ("authorization.k8s.io", _) if REVIEWS.iter().any(|one| one.1 == resource) => {
            obj::set(
                &mut object,
                &["status"],
                json!({"allowed": true, "reason": "everything is allowed in the lab"}),
            );
        }
        ("authentication.k8s.io", "selfsubjectreviews") => {
            obj::set(
                &mut object,
                &["status", "userInfo"],
                json!({
                    "username": USER, "groups": ["system:masters", "system:authenticated"],
                }),
            );
        }
        ("authentication.k8s.io", "tokenreviews") => {
            obj::set(
                &mut object,
                &["status"],
                json!({
                    "authenticated": true,
                    "user": {"username": USER, "groups": ["system:masters", "system:authenticated"]},
                }),
            );
        }
        _ => return None,
    }
    Some(object)
}

/// The numbers and selector of a scale subresource.
fn number_at(path: &str, object: &Value) -> i64 {
    let path = JsonPath::parse(path).ok();
    path.and_then(|path| path.find(object).first().and_then(|found| found.as_i64())).unwrap_or(0)
}

/// The `Scale` of an object.
pub fn scale_of(paths: &ScalePaths, object: &Value) -> Value {
    let selector = match &paths.selector {
        Some(path) => JsonPath::parse(path)
            .ok()
            .and_then(|path| path.find(object).first().and_then(|found| found.as_str().map(str::to_owned)))
            .unwrap_or_default(),
        None => {
            let selector = obj::at(object, &["spec", "selector"]).unwrap_or(&Value::Null);
            let labels =
                if selector.get("matchLabels").is_some() || selector.get("matchExpressions").is_some() {
                    Labels::from_object(selector)
                } else {
                    Some(Labels::from_map(selector.as_object()))
                };
            labels.map(|labels| labels.to_string()).unwrap_or_default()
        }
    };
    let meta = |field: &str| obj::at(object, &["metadata", field]).cloned().unwrap_or_default();
    let mut scale = json!({
        "kind": "Scale",
        "apiVersion": "autoscaling/v1",
        "metadata": {
            "name": meta("name"), "uid": meta("uid"), "resourceVersion": meta("resourceVersion"),
            "creationTimestamp": meta("creationTimestamp"),
        },
        "spec": {"replicas": number_at(&paths.spec, object)},
        "status": {"replicas": number_at(&paths.status, object)},
    });
    if meta("namespace").is_string() {
        obj::set(&mut scale, &["metadata", "namespace"], meta("namespace"));
    }
    if !selector.is_empty() {
        obj::set(&mut scale, &["status", "selector"], selector);
    }
    scale
}

/// How a scale is written.
#[derive(Debug)]
pub enum ScaleChange {
    /// By a whole `Scale`.
    Replace(Value),
    /// By a patch of one.
    Patch(Patch),
}

impl ApiServer {
    /// Writes the scale subresource.
    pub fn write_scale(
        &self,
        resource: &Arc<Resource>,
        namespace: Option<&str>,
        name: &str,
        change: &ScaleChange,
        options: &mut WriteOptions,
    ) -> ApiResult<Value> {
        let paths = resource.scale.clone().ok_or_else(ApiError::unknown_path)?;
        let spec = JsonPath::parse(&paths.spec).map_err(ApiError::internal)?;
        let stored = self.rewrite(resource, namespace, name, options, &mut |old, _| {
            let shown = scale_of(&paths, old);
            let scale = match change {
                ScaleChange::Replace(scale) => scale.clone(),
                ScaleChange::Patch(
                    Patch::Merge(wanted) | Patch::Strategic(wanted) | Patch::Apply(wanted),
                ) => {
                    let mut scale = shown;
                    patch::merge::apply(&mut scale, wanted);
                    scale
                }
                ScaleChange::Patch(Patch::Json(wanted)) => {
                    let mut scale = shown;
                    json_patch::patch(&mut scale, wanted)
                        .map_err(|error| ApiError::bad_request(error.to_string()))?;
                    scale
                }
            };
            let seen = obj::version(&scale);
            if !seen.is_empty() && seen != obj::version(old) {
                return Err(ApiError::modified(&resource.plural, &resource.group, name));
            }
            let replicas = obj::at(&scale, &["spec", "replicas"]).cloned().unwrap_or(json!(0));
            if !replicas.as_i64().is_some_and(|number| (0..=i64::from(i32::MAX)).contains(&number)) {
                let error =
                    FieldError::invalid("spec.replicas", &replicas, "must be greater than or equal to 0");
                return Err(ApiError::invalid("Scale", "autoscaling", name, &[error]));
            }
            let mut new = old.clone();
            spec.set(&mut new, replicas);
            Ok(new)
        })?;
        Ok(scale_of(&paths, &stored))
    }

    /// Binds a pod to a node.
    pub fn bind(&self, namespace: &str, name: &str, binding: &Value) -> ApiResult<()> {
        let pods = self.resource("", "pods")?;
        let node = obj::text(binding, &["target", "name"]).to_owned();
        if node.is_empty() {
            let error = FieldError::required("target.name", "");
            return Err(ApiError::invalid("Binding", "", name, &[error]));
        }
        let mut options = WriteOptions::internal("scheduler").with_part(Part::Whole);
        self.rewrite(&pods, Some(namespace), name, &mut options, &mut |old, _| {
            let bound = obj::text(old, &["spec", "nodeName"]);
            if !bound.is_empty() {
                let detail = format!("pod {name} is already assigned to node \"{bound}\"");
                return Err(ApiError::conflict("pods/binding", "", name, &detail));
            }
            if obj::is_deleting(old) {
                let detail = format!("pod {name} is being deleted, cannot be assigned to a host");
                return Err(ApiError::conflict("pods/binding", "", name, &detail));
            }
            let mut new = old.clone();
            obj::set(&mut new, &["spec", "nodeName"], node.clone());
            set_scheduled(&mut new, true, "", "");
            Ok(new)
        })?;
        Ok(())
    }

    /// Deletes a pod unless a disruption budget forbids it.
    pub fn evict(&self, namespace: &str, name: &str, options: &DeleteOptions) -> ApiResult<Deleted> {
        let pods = self.resource("", "pods")?;
        let pod = self.get(&pods, Some(namespace), name)?;
        let budgets = self.resource("policy", "poddisruptionbudgets")?;
        for budget in self.all(&budgets, Some(namespace)) {
            let selector = obj::at(&budget, &["spec", "selector"]).unwrap_or(&Value::Null);
            if !Labels::from_object(selector).is_some_and(|labels| labels.matches(&pod)) {
                continue;
            }
            let is_running = obj::condition_is_true(&pod, "Ready");
            if is_running && obj::int(&budget, &["status", "disruptionsAllowed"]).unwrap_or(0) < 1 {
                return Err(ApiError::too_many_requests(
                    "Cannot evict pod as it would violate the pod's disruption budget.",
                )
                .with_details(json!({"causes": [{
                    "reason": "DisruptionBudget",
                    "message": format!("The disruption budget {} does not allow more disruptions", obj::name(&budget)),
                }]})));
            }
        }
        self.delete(&pods, Some(namespace), name, options)
    }

    /// The contents of a pod's log; `tail` lines at most.
    pub fn pod_log_file(
        &self,
        namespace: &str,
        name: &str,
        container: Option<&str>,
        previous: bool,
    ) -> ApiResult<std::path::PathBuf> {
        let pods = self.resource("", "pods")?;
        let pod = self.get(&pods, Some(namespace), name)?;
        let containers = obj::items(&pod, &["spec", "containers"]);
        if let Some(container) = container {
            let all = containers.iter().chain(obj::items(&pod, &["spec", "initContainers"]));
            if !all.map(|one| obj::text(one, &["name"])).any(|known| known == container) {
                return Err(ApiError::bad_request(format!(
                    "container {container} is not valid for pod {name}"
                )));
            }
        } else if containers.len() > 1 {
            let names: Vec<&str> = containers.iter().map(|one| obj::text(one, &["name"])).collect();
            return Err(ApiError::bad_request(format!(
                "a container name must be specified for pod {name}, choose one of: [{}]",
                names.join(" ")
            )));
        }
        let shown =
            container.unwrap_or_else(|| containers.first().map_or("", |one| obj::text(one, &["name"])));
        let logs = self.pod_logs();
        let file = logs.and_then(|logs| logs.log_file(namespace, name, obj::uid(&pod), container, previous));
        file.ok_or_else(|| {
            ApiError::bad_request(format!(
                "container \"{shown}\" in pod \"{name}\" is waiting to start: there is no log yet"
            ))
        })
    }
}

/// Sets the `PodScheduled` condition of a pod.
pub fn set_scheduled(pod: &mut Value, is_scheduled: bool, reason: &str, message: &str) {
    let status = if is_scheduled { "True" } else { "False" };
    let mut condition = json!({
        "type": "PodScheduled", "status": status, "lastProbeTime": null, "lastTransitionTime": obj::now(),
    });
    if !reason.is_empty() {
        obj::set(&mut condition, &["reason"], reason);
        obj::set(&mut condition, &["message"], message);
    }
    let mut conditions = obj::items(pod, &["status", "conditions"]).to_vec();
    if let Some(old) = conditions.iter().find(|one| obj::text(one, &["type"]) == "PodScheduled")
        && obj::text(old, &["status"]) == status
        && let Some(since) = old.get("lastTransitionTime")
    {
        obj::set(&mut condition, &["lastTransitionTime"], since.clone());
    }
    conditions.retain(|one| obj::text(one, &["type"]) != "PodScheduled");
    obj::remove(&mut condition, &["lastProbeTime"]);
    conditions.push(condition);
    obj::set(pod, &["status", "conditions"], conditions);
}

/// A token for a service account. It says who the account is; nothing checks it.
pub fn token(namespace: &str, name: &str, mut request: Value) -> Value {
    let seconds = obj::int(&request, &["spec", "expirationSeconds"]).unwrap_or(3600).clamp(600, 1 << 32);
    let expires = jiff::Timestamp::now() + jiff::SignedDuration::from_secs(seconds);
    obj::set(
        &mut request,
        &["status"],
        json!({
            "token": format!("lab.{namespace}.{name}.{}", uuid::Uuid::new_v4()),
            "expirationTimestamp": obj::stamp(expires),
        }),
    );
    request
}
