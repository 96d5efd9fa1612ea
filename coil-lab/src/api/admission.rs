//! Admission webhooks: which ones want to see a write, asking them, what they change and refuse.
//!
//! Only requests of clients are reviewed; what the lab's own controllers write is not.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::ByteString;
use kube::{Client, Config};
use serde_json::{Value, json};

use super::error::{ApiError, ApiResult};
use super::obj;
use super::registry::Resource;
use super::selector::Labels;
use super::server::ApiServer;

const GROUP: &str = "admissionregistration.k8s.io";
const MUTATING: &str = "mutatingwebhookconfigurations";
const VALIDATING: &str = "validatingwebhookconfigurations";

/// How a webhook's endpoint is reached from this process; the lab's pods live in other network namespaces.
pub trait WebhookRoute: Send + Sync {
    /// The address to connect to instead of an endpoint's own.
    fn route(&self, endpoint: SocketAddr) -> SocketAddr;
}

/// A write under review.
#[derive(Debug, Clone)]
pub struct Review {
    /// What is written.
    pub resource: Arc<Resource>,
    /// `CREATE`, `UPDATE` or `DELETE`.
    pub operation: &'static str,
    /// `status` or the like, empty for the object itself.
    pub subresource: &'static str,
    /// The object as it would be stored, null for deletions.
    pub object: Value,
    /// The stored object, null for creations.
    pub old: Value,
    /// Whether the write is only tried.
    pub dry_run: bool,
}

impl Review {
    fn subject(&self) -> &Value {
        if self.object.is_null() { &self.old } else { &self.object }
    }

    fn request(&self, uid: &str) -> Value {
        let resource = &self.resource;
        let kind = json!({"group": resource.group, "version": resource.version, "kind": resource.kind});
        let path = json!({"group": resource.group, "version": resource.version, "resource": resource.plural});
        json!({
            "apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview",
            "request": {
                "uid": uid, "kind": kind, "resource": path, "requestKind": kind, "requestResource": path,
                "subResource": self.subresource, "requestSubResource": self.subresource,
                "name": obj::name(self.subject()), "namespace": obj::namespace(self.subject()),
                "operation": self.operation, "object": self.object, "oldObject": self.old,
                "userInfo": {"username": "system:admin", "groups": ["system:masters", "system:authenticated"]},
                "dryRun": self.dry_run, "options": null,
            },
        })
    }
}

/// Why a webhook gave no answer.
#[derive(Debug, thiserror::Error)]
enum CallError {
    #[error("its client configuration cannot be used: {0}")]
    Config(String),
    #[error("no endpoints available for service \"{0}\"")]
    NoEndpoints(String),
    #[error("Post {url}: {source}")]
    Request { url: String, source: Box<kube::Error> },
    #[error("context deadline exceeded")]
    Timeout,
    #[error("the answer is no review: {0}")]
    Answer(String),
}

impl ApiServer {
    /// Whether any webhook is registered for a resource.
    pub(super) fn has_webhooks(&self, resource: &Resource) -> bool {
        resource.group != GROUP
            && [MUTATING, VALIDATING].iter().any(|plural| {
                self.webhooks(plural).iter().any(|hook| {
                    obj::items(hook, &["rules"]).iter().any(|rule| names_resource(rule, resource, None))
                })
            })
    }

    fn webhooks(&self, plural: &str) -> Vec<Value> {
        let Ok(resource) = self.resource(GROUP, plural) else { return Vec::new() };
        self.all(&resource, None).iter().flat_map(|one| obj::items(one, &["webhooks"]).to_vec()).collect()
    }

    fn matching(&self, plural: &str, review: &Review) -> Vec<Value> {
        let mut hooks = self.webhooks(plural);
        hooks.retain(|hook| self.wants(hook, review));
        hooks
    }

    fn wants(&self, hook: &Value, review: &Review) -> bool {
        let rules = obj::items(hook, &["rules"]);
        let by_rule = rules.iter().any(|rule| {
            let operations = obj::items(rule, &["operations"]);
            operations.iter().any(|one| one == review.operation || one == "*")
                && names_resource(rule, &review.resource, Some(review.subresource))
        });
        let selects = |field: &str, object: &Value| {
            let selector = hook.get(field).unwrap_or(&Value::Null);
            Labels::from_object(selector).is_none_or(|labels| labels.matches(object))
        };
        by_rule
            && (selects("objectSelector", review.subject()) || selects("objectSelector", &review.old))
            && self.namespace_of(review).is_none_or(|namespace| selects("namespaceSelector", &namespace))
    }

    /// The namespace whose labels a selector looks at.
    fn namespace_of(&self, review: &Review) -> Option<Arc<Value>> {
        if review.resource.kind == "Namespace" && review.resource.group.is_empty() {
            return Some(Arc::new(review.subject().clone()));
        }
        let namespaces = self.resource("", "namespaces").ok()?;
        let name = obj::namespace(review.subject());
        if name.is_empty() { None } else { self.get(&namespaces, None, name).ok() }
    }

    /// Lets mutating webhooks change the object.
    pub(super) async fn mutate(&self, review: &mut Review, warnings: &mut Vec<String>) -> ApiResult<()> {
        for hook in self.matching(MUTATING, review) {
            let Some(response) = self.ask(&hook, review, warnings).await? else { continue };
            let patch = obj::text(&response, &["patch"]);
            if patch.is_empty() {
                continue;
            }
            let failed = |error: &dyn std::fmt::Display| {
                let name = obj::text(&hook, &["name"]);
                ApiError::internal(format!("failed calling webhook \"{name}\": its patch: {error}"))
            };
            let bytes = decoded(patch).ok_or_else(|| failed(&"not base64"))?;
            let patch: json_patch::Patch = serde_json::from_slice(&bytes).map_err(|error| failed(&error))?;
            json_patch::patch(&mut review.object, &patch).map_err(|error| failed(&error))?;
        }
        Ok(())
    }

    /// Lets validating webhooks refuse the write.
    pub(super) async fn judge(&self, review: &Review, warnings: &mut Vec<String>) -> ApiResult<()> {
        for hook in self.matching(VALIDATING, review) {
            self.ask(&hook, review, warnings).await?;
        }
        Ok(())
    }

    /// The response of a webhook that allows; none of one that failed and may be ignored.
    async fn ask(
        &self,
        hook: &Value,
        review: &Review,
        warnings: &mut Vec<String>,
    ) -> ApiResult<Option<Value>> {
        let name = obj::text(hook, &["name"]);
        let seconds = obj::int(hook, &["timeoutSeconds"]).unwrap_or(10).clamp(1, 30);
        let limit = Duration::from_secs(u64::try_from(seconds).unwrap_or(10));
        let answer = tokio::time::timeout(limit, self.call(hook, review)).await;
        let response = match answer.unwrap_or(Err(CallError::Timeout)) {
            Ok(response) => response,
            Err(error) if obj::text(hook, &["failurePolicy"]) == "Ignore" => {
                tracing::warn!(webhook = name, %error, "a webhook failed and is ignored");
                return Ok(None);
            }
            Err(error) => {
                return Err(ApiError::internal(format!("failed calling webhook \"{name}\": {error}")));
            }
        };
        let texts = obj::items(&response, &["warnings"]).iter();
        warnings.extend(texts.filter_map(|one| one.as_str().map(str::to_owned)));
        if obj::flag(&response, &["allowed"]) {
            return Ok(Some(response));
        }
        let message = obj::text(&response, &["status", "message"]);
        let message = match (message, obj::text(&response, &["status", "reason"])) {
            ("", "") => format!("admission webhook \"{name}\" denied the request without explanation"),
            ("", reason) => format!("admission webhook \"{name}\" denied the request: {reason}"),
            (message, _) => format!("admission webhook \"{name}\" denied the request: {message}"),
        };
        let code = obj::int(&response, &["status", "code"]).and_then(|code| u16::try_from(code).ok());
        let code = code.filter(|code| (400..600).contains(code)).unwrap_or(403);
        let reason = match code {
            400 => "BadRequest",
            409 => "Conflict",
            422 => "Invalid",
            _ => "Forbidden",
        };
        Err(ApiError { code, reason, message, details: obj::at(&response, &["status", "details"]).cloned() })
    }

    async fn call(&self, hook: &Value, review: &Review) -> Result<Value, CallError> {
        let (config, path) = self.client_config(hook)?;
        let url = format!("{}{path}", config.cluster_url.to_string().trim_end_matches('/'));
        let uid = uuid::Uuid::new_v4().to_string();
        let failed = |source: kube::Error| CallError::Request { url: url.clone(), source: Box::new(source) };
        let client = Client::try_from(config).map_err(failed)?;
        let request = axum::http::Request::post(path)
            .header("content-type", "application/json")
            .body(review.request(&uid).to_string().into_bytes())
            .map_err(|error| CallError::Config(error.to_string()))?;
        let answer: Value = client.request(request).await.map_err(failed)?;
        let response = answer.get("response").cloned().unwrap_or_default();
        if obj::text(&response, &["uid"]) != uid {
            return Err(CallError::Answer("it answers another request".to_owned()));
        }
        Ok(response)
    }

    /// Where and how to reach a webhook: the client's configuration and the path.
    fn client_config(&self, hook: &Value) -> Result<(Config, String), CallError> {
        let settings = hook.get("clientConfig").unwrap_or(&Value::Null);
        let bad = |text: &str| CallError::Config(text.to_owned());
        let (base, path, server_name) = match obj::text(settings, &["url"]) {
            "" => self.service_url(settings)?,
            url => {
                let uri: axum::http::Uri = url.parse().map_err(|_| bad("its url is not one"))?;
                let scheme = uri.scheme_str().ok_or_else(|| bad("its url has no scheme"))?;
                let authority = uri.authority().ok_or_else(|| bad("its url has no host"))?;
                let path = uri.path_and_query().map_or("/", |path| path.as_str());
                (format!("{scheme}://{authority}"), path.to_owned(), None)
            }
        };
        let mut config = Config::new(base.parse().map_err(|_| bad("its address is not one"))?);
        config.tls_server_name = server_name;
        config.default_retry = false;
        let bundle = obj::text(settings, &["caBundle"]);
        if !bundle.is_empty() {
            let pem = decoded(bundle).ok_or_else(|| bad("its caBundle is not base64"))?;
            config.root_cert = Some(certificates(&String::from_utf8_lossy(&pem)));
        }
        Ok((config, path))
    }

    fn service_url(&self, settings: &Value) -> Result<(String, String, Option<String>), CallError> {
        let reference = settings.get("service").unwrap_or(&Value::Null);
        let (namespace, name) = (obj::text(reference, &["namespace"]), obj::text(reference, &["name"]));
        let missing = || CallError::NoEndpoints(name.to_owned());
        let port = obj::int(reference, &["port"]).unwrap_or(443);
        let services = self.resource("", "services").map_err(|_| missing())?;
        let service = self.get(&services, Some(namespace), name).map_err(|_| missing())?;
        let ports = obj::items(&service, &["spec", "ports"]);
        let port = ports.iter().find(|one| obj::int(one, &["port"]) == Some(port)).ok_or_else(missing)?;
        let slices = self.resource("discovery.k8s.io", "endpointslices").map_err(|_| missing())?;
        let endpoint = self.all(&slices, Some(namespace)).iter().find_map(|slice| {
            let is_of_service = obj::label(slice, "kubernetes.io/service-name") == Some(name);
            let number = obj::items(slice, &["ports"])
                .iter()
                .find(|one| obj::text(one, &["name"]) == obj::text(port, &["name"]))
                .and_then(|one| obj::int(one, &["port"]))?;
            let ready = obj::items(slice, &["endpoints"])
                .iter()
                .find(|one| is_of_service && obj::flag(one, &["conditions", "ready"]))?;
            let ip = obj::items(ready, &["addresses"]).first()?.as_str()?.parse().ok()?;
            Some(SocketAddr::new(ip, u16::try_from(number).ok()?))
        });
        let address = self.webhook_route(endpoint.ok_or_else(missing)?);
        let path = format!("/{}", obj::text(reference, &["path"]).trim_start_matches('/'));
        Ok((format!("https://{address}"), path, Some(format!("{name}.{namespace}.svc"))))
    }
}

/// Whether a rule names a resource; with its subresource if that is given.
fn names_resource(rule: &Value, resource: &Resource, subresource: Option<&str>) -> bool {
    let lists =
        |field: &str, value: &str| obj::items(rule, &[field]).iter().any(|one| one == value || one == "*");
    let scope = match obj::text(rule, &["scope"]) {
        "Cluster" => !resource.namespaced,
        "Namespaced" => resource.namespaced,
        _ => true,
    };
    let named = obj::items(rule, &["resources"]).iter().filter_map(Value::as_str).any(|one| {
        let (plural, sub) = one.split_once('/').unwrap_or((one, ""));
        let sub_matches = subresource
            .is_none_or(|wanted| sub == wanted || sub == "*" && (plural == "*" || !wanted.is_empty()));
        (plural == "*" || plural == resource.plural) && sub_matches
    });
    scope && named && lists("apiGroups", &resource.group) && lists("apiVersions", &resource.version)
}

fn decoded(text: &str) -> Option<Vec<u8>> {
    serde_json::from_value::<ByteString>(json!(text)).ok().map(|bytes| bytes.0)
}

/// The certificates of a PEM text.
fn certificates(pem: &str) -> Vec<Vec<u8>> {
    pem.split("-----BEGIN CERTIFICATE-----")
        .skip(1)
        .filter_map(|part| part.split_once("-----END CERTIFICATE-----"))
        .filter_map(|(body, _)| decoded(&body.split_whitespace().collect::<String>()))
        .collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use crate::api::{kinds, registry::Registry};

    #[test]
    fn rules_name_resources() {
        let registry = Registry::new();
        kinds::register(&registry);
        let pods = registry.get("", "v1", "pods").unwrap();
        let rule = |resources: Value| json!({"apiGroups": [""], "apiVersions": ["v1"], "operations": ["CREATE"], "resources": resources});
        for (resources, sub, expected) in [
            (json!(["pods"]), "", true),
            (json!(["pods"]), "status", false),
            (json!(["pods/status"]), "status", true),
            (json!(["pods/*"]), "status", true),
            (json!(["pods/*"]), "", false),
            (json!(["*"]), "", true),
            (json!(["*"]), "status", false),
            (json!(["*/*"]), "", true),
            (json!(["*/*"]), "status", true),
            (json!(["nodes"]), "", false),
        ] {
            assert_eq!(
                names_resource(&rule(resources.clone()), &pods, Some(sub)),
                expected,
                "{resources} {sub}"
            );
        }
        let mut cluster = rule(json!(["*"]));
        obj::set(&mut cluster, &["scope"], "Cluster");
        assert!(!names_resource(&cluster, &pods, Some("")));
    }

    #[test]
    fn pem_texts() {
        let pem = "-----BEGIN CERTIFICATE-----\nZm9v\nYmFy\n-----END CERTIFICATE-----\n-----BEGIN CERTIFICATE-----\nZm9v\n-----END CERTIFICATE-----\n";
        assert_eq!(certificates(pem), [b"foobar".to_vec(), b"foo".to_vec()]);
        assert!(certificates("nothing").is_empty());
    }
}
