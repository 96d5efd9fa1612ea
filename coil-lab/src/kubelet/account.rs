//! The credentials of a pod: a token of its service account, in a kubeconfig instead of the volume that a kubelet would
//! mount. On an API server that enforces roles a pod's processes can do what their account may, and no more.
//!
//! The embedded API knows no users; there a pod has the kubeconfig that everybody has.

use super::Host;
use crate::options::ApiSource;
use crate::paths;
use crate::state::{write_atomically, write_json};
use k8s_openapi::api::authentication::v1::{BoundObjectReference, TokenRequest, TokenRequestSpec};
use k8s_openapi::api::core::v1::{Pod, ServiceAccount};
use kube::Api;
use kube::api::PostParams;
use serde_json::{Value, json};
use std::io;
use std::path::{Path, PathBuf};
use tracing::debug;

/// Longer than any lab: nobody renews it.
const SECONDS: i64 = 30 * 24 * 3600;

/// Why a pod has no credentials.
#[derive(Debug, thiserror::Error)]
pub(super) enum AccountError {
    #[error("no token of service account {name}")]
    Token {
        name: String,
        #[source]
        source: Box<kube::Error>,
    },
    #[error("the credentials in {}", path.display())]
    File {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

/// Asks for a token and writes the kubeconfig of a pod. `None`: the pod uses the one of the lab.
pub(super) async fn kubeconfig(host: &Host, pod: &Pod) -> Result<Option<PathBuf>, AccountError> {
    if host.state.options.api == ApiSource::Embedded {
        return Ok(None);
    }
    let metadata = &pod.metadata;
    let (namespace, uid) = (metadata.namespace.as_deref().unwrap_or_default(), metadata.uid.clone());
    let folder = paths::account(uid.as_deref().unwrap_or_default());
    let spec = pod.spec.as_ref();
    let mounted = spec.and_then(|spec| spec.automount_service_account_token) != Some(false);
    let token = folder.join("token");
    let credentials = if mounted {
        let name = spec.and_then(|spec| spec.service_account_name.as_deref()).unwrap_or("default");
        let request = TokenRequest {
            spec: TokenRequestSpec {
                audiences: Vec::new(),
                bound_object_ref: Some(BoundObjectReference {
                    api_version: Some("v1".to_owned()),
                    kind: Some("Pod".to_owned()),
                    name: metadata.name.clone(),
                    uid,
                }),
                expiration_seconds: Some(SECONDS),
            },
            ..TokenRequest::default()
        };
        let accounts: Api<ServiceAccount> = Api::namespaced(host.client.clone(), namespace);
        let text = accounts
            .create_token_request(name, &PostParams::default(), &request)
            .await
            .map_err(|source| AccountError::Token { name: name.to_owned(), source: Box::new(source) })?
            .status
            .map(|status| status.token)
            .unwrap_or_default();
        write_atomically(&token, text.as_bytes())
            .map_err(|source| AccountError::File { path: token.clone(), source })?;
        json!({ "tokenFile": token })
    } else {
        json!({})
    };
    let file = paths::kubeconfig_cluster();
    let wrap = |path: &Path| {
        let path = path.to_owned();
        |source| AccountError::File { path, source }
    };
    let lab: Value =
        std::fs::read(&file).and_then(|text| Ok(serde_json::from_slice(&text)?)).map_err(wrap(&file))?;
    let own = folder.join("kubeconfig");
    write_json(&own, &with_user(&lab, namespace, credentials)).map_err(wrap(&own))?;
    Ok(Some(own))
}

/// Removes what [`kubeconfig`] has written.
pub(super) fn forget(uid: &str) {
    match std::fs::remove_dir_all(paths::account(uid)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => debug!(%error, "credentials of a pod"),
        _ => {}
    }
}

/// The cluster of a kubeconfig's current context, with another user.
fn with_user(config: &Value, namespace: &str, credentials: Value) -> Value {
    let named = |list: &str, name: &Value| {
        config[list].as_array().into_iter().flatten().find(|entry| entry["name"] == *name).cloned()
    };
    let context = named("contexts", &config["current-context"]).unwrap_or_default();
    let cluster = &context["context"]["cluster"];
    json!({
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [named("clusters", cluster)],
        "users": [{ "name": "pod", "user": credentials }],
        "contexts": [{
            "name": "pod",
            "context": { "cluster": cluster, "user": "pod", "namespace": namespace },
        }],
        "current-context": "pod",
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pod_keeps_the_cluster_and_loses_the_administrator() {
        let lab = json!({
            "clusters": [
                { "name": "other", "cluster": { "server": "https://192.0.2.1" } },
                { "name": "lab", "cluster": { "server": "https://172.30.0.1:6443" } },
            ],
            "users": [{ "name": "admin", "user": { "token": "secret" } }],
            "contexts": [{ "name": "c", "context": { "cluster": "lab", "user": "admin" } }],
            "current-context": "c",
        });
        let own = with_user(&lab, "shop", json!({ "tokenFile": "/t" }));
        assert_eq!(own["clusters"], json!([lab["clusters"][1]]));
        assert_eq!(own["users"], json!([{ "name": "pod", "user": { "tokenFile": "/t" } }]));
        assert_eq!(own["contexts"][0]["context"]["namespace"], "shop");
        assert!(!own.to_string().contains("secret"));
    }
}
