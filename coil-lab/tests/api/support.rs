//! A server per test, clients for it, a stand-in for kubelets.

use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use coil_lab::api::delete::DeleteOptions;
use coil_lab::api::write::{Part, WriteOptions};
use coil_lab::api::{ApiConfig, ApiServer, obj};
use kube::api::{Api, DynamicObject};
use kube::core::{ApiResource, GroupVersionKind};
use kube::{Client, Config};
use serde_json::{Value, json};

/// How long a condition may take to hold.
const DEADLINE: Duration = Duration::from_secs(20);

/// A server with controllers, ended when dropped.
pub(crate) struct Server {
    pub(crate) api: Arc<ApiServer>,
    pub(crate) address: SocketAddr,
    pub(crate) client: Client,
    _controllers: tokio::task::JoinSet<()>,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.api.stop();
    }
}

impl Server {
    pub(crate) async fn start() -> Self {
        let api = ApiServer::new(ApiConfig::default());
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let controllers = coil_lab::controllers::start(&api);
        tokio::spawn(api.clone().serve(listener));
        let client = Client::try_from(Config::new(format!("http://{address}").parse().unwrap())).unwrap();
        Self { api, address, client, _controllers: controllers }
    }

    /// Nodes whose pods become ready by themselves and go when they are deleted.
    pub(crate) async fn with_nodes(count: usize) -> Self {
        let server = Self::start().await;
        let nodes = server.api.resource("", "nodes").unwrap();
        for number in 1..=count {
            let node = json!({
                "metadata": {"name": format!("n{number}")},
                "status": {"conditions": [{"type": "Ready", "status": "True"}]},
            });
            server.api.create_now(&nodes, None, node, &mut WriteOptions::internal("test")).unwrap();
        }
        tokio::spawn(kubelet(server.api.clone()));
        server
    }

    /// A dynamic client for a kind; of namespace `default` if it is namespaced.
    pub(crate) fn dynamic(&self, group: &str, version: &str, kind: &str, plural: &str) -> Api<DynamicObject> {
        let resource =
            ApiResource::from_gvk_with_plural(&GroupVersionKind::gvk(group, version, kind), plural);
        Api::default_namespaced_with(self.client.clone(), &resource)
    }

    /// A raw request, without the retries of a client: status and body.
    pub(crate) async fn raw(
        &self,
        method: &str,
        path: &str,
        media: &str,
        body: impl Into<Vec<u8>>,
    ) -> (u16, Value) {
        let request = axum::http::Request::builder()
            .method(method)
            .uri(format!("http://{}{path}", self.address))
            .header("content-type", media)
            .body(axum::body::Body::from(body.into()))
            .unwrap();
        let client = hyper_util::client::legacy::Client::builder(hyper_util::rt::TokioExecutor::new())
            .build_http::<axum::body::Body>();
        let response = client.request(request).await.unwrap();
        let status = response.status().as_u16();
        let body = axum::body::Body::new(response.into_body());
        let bytes = axum::body::to_bytes(body, usize::MAX).await.unwrap();
        (status, serde_json::from_slice(&bytes).unwrap_or(Value::Null))
    }
}

/// Runs until the server stops.
async fn kubelet(api: Arc<ApiServer>) {
    let pods = api.resource("", "pods").unwrap();
    let mut tick = api.store.subscribe(&pods.storage);
    let mut last = 0_u8;
    while !api.stopped().is_cancelled() {
        tick.mark_unchanged();
        for pod in api.all(&pods, None) {
            let (namespace, name) = (Some(obj::namespace(&pod)), obj::name(&pod));
            if obj::text(&pod, &["spec", "nodeName"]).is_empty() {
                continue;
            }
            let outcome = if obj::is_deleting(&pod) {
                let now = DeleteOptions { grace: Some(0), ..DeleteOptions::default() };
                api.delete(&pods, namespace, name, &now).map(|_| ())
            } else if obj::text(&pod, &["status", "phase"]) == "Pending" {
                last = last.wrapping_add(1);
                let status = json!({
                    "phase": "Running", "podIP": format!("10.0.0.{last}"),
                    "podIPs": [{"ip": format!("10.0.0.{last}")}, {"ip": format!("fd00::{last:x}")}],
                    "conditions": [{"type": "Ready", "status": "True", "lastTransitionTime": obj::now()}],
                });
                let mut options = WriteOptions::internal("kubelet").with_part(Part::Status);
                api.rewrite(&pods, namespace, name, &mut options, &mut |old, _| {
                    let mut new = old.clone();
                    obj::set(&mut new, &["status"], status.clone());
                    Ok(new)
                })
                .map(|_| ())
            } else {
                Ok(())
            };
            if let Err(error) = outcome {
                assert!(error.is_not_found() || error.is_conflict(), "{error}");
            }
        }
        if tick.changed().await.is_err() {
            return;
        }
    }
}

/// Waits until `what` gives a value.
pub(crate) async fn eventually<T, F: Future<Output = Option<T>>>(
    what: &str,
    mut check: impl FnMut() -> F,
) -> T {
    let wait = async {
        loop {
            if let Some(found) = check().await {
                return found;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    match tokio::time::timeout(DEADLINE, wait).await {
        Ok(found) => found,
        Err(_) => panic!("did not happen: {what}"),
    }
}

/// The `Status` of a failed call.
pub(crate) fn status_of<T: std::fmt::Debug>(result: kube::Result<T>) -> (u16, String, String) {
    match result.unwrap_err() {
        kube::Error::Api(status) => (status.code, status.reason, status.message),
        other => panic!("no status: {other}"),
    }
}
