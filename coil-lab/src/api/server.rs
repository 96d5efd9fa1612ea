//! The server object: configuration, state, listeners.

use std::path::PathBuf;
use std::sync::{Arc, RwLock};

use ipnet::{Ipv4Net, Ipv6Net};
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use super::admission::WebhookRoute;
use super::error::{ApiError, ApiResult};
use super::ipalloc::ServiceIps;
use super::registry::{Registry, Resource};
use super::store::Store;
use super::write::WriteOptions;
use super::{kinds, routes};

/// Namespaces of every cluster.
const NAMESPACES: [&str; 4] = ["default", "kube-system", "kube-public", "kube-node-lease"];

/// What a cluster is set up with.
#[derive(Debug, Clone)]
pub struct ApiConfig {
    /// Service addresses of IPv4, if the cluster has the family.
    pub service_cidr_v4: Option<Ipv4Net>,
    /// Service addresses of IPv6, if the cluster has the family.
    pub service_cidr_v6: Option<Ipv6Net>,
    /// Whether IPv6 comes first where a family must be chosen.
    pub prefer_v6: bool,
}

impl Default for ApiConfig {
    fn default() -> Self {
        Self {
            service_cidr_v4: Some(Ipv4Net::new_assert(std::net::Ipv4Addr::new(10, 96, 0, 0), 16)),
            service_cidr_v6: Some(Ipv6Net::new_assert(
                std::net::Ipv6Addr::new(0xfd00, 0x96, 0, 0, 0, 0, 0, 0),
                112,
            )),
            prefer_v6: false,
        }
    }
}

/// Where logs of containers are; the lab's kubelet stand-in knows.
pub trait PodLogs: Send + Sync {
    /// The log file of a pod's container (the first one if not named).
    fn log_file(
        &self,
        namespace: &str,
        pod: &str,
        uid: &str,
        container: Option<&str>,
        previous: bool,
    ) -> Option<PathBuf>;
}

/// The API server.
pub struct ApiServer {
    /// Configuration.
    pub config: ApiConfig,
    /// Objects.
    pub store: Store,
    /// Served resources.
    pub registry: Registry,
    pub(super) service_ips: ServiceIps,
    pub(super) openapi: super::openapi::Cache,
    pub(super) shutdown: CancellationToken,
    logs: RwLock<Option<Arc<dyn PodLogs>>>,
    webhook_route: RwLock<Option<Arc<dyn WebhookRoute>>>,
}

impl std::fmt::Debug for ApiServer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ApiServer").field("config", &self.config).finish_non_exhaustive()
    }
}

impl ApiServer {
    /// A server with the namespaces of every cluster and nothing else.
    pub fn new(config: ApiConfig) -> Arc<Self> {
        let registry = Registry::new();
        kinds::register(&registry);
        let server = Arc::new(Self {
            service_ips: ServiceIps::new(config.service_cidr_v4, config.service_cidr_v6),
            config,
            store: Store::new(),
            registry,
            openapi: super::openapi::Cache::default(),
            shutdown: CancellationToken::new(),
            logs: RwLock::new(None),
            webhook_route: RwLock::new(None),
        });
        server.make_first_objects();
        server
    }

    fn make_first_objects(&self) {
        let mut first: Vec<(&str, &str, Option<&str>, Value)> = Vec::new();
        for name in NAMESPACES {
            first.push(("", "namespaces", None, json!({"metadata": {"name": name}})));
            first.push(("", "serviceaccounts", Some(name), json!({"metadata": {"name": "default"}})));
        }
        first.push((
            "",
            "services",
            Some("default"),
            json!({
                "metadata": {
                    "name": "kubernetes",
                    "labels": {"component": "apiserver", "provider": "kubernetes"},
                },
                "spec": {"ports": [{"name": "https", "port": 443, "targetPort": 6443}]},
            }),
        ));
        for (group, plural, namespace, object) in first {
            let made = self.resource(group, plural).and_then(|resource| {
                self.create_now(&resource, namespace, object, &mut WriteOptions::internal("kube-apiserver"))
            });
            if let Err(error) = made {
                tracing::error!(%error, plural, "a first object of the cluster was not made");
            }
        }
    }

    /// Serves on a listener until [`Self::stop`]. May be called for several listeners.
    pub async fn serve(self: Arc<Self>, listener: tokio::net::TcpListener) -> std::io::Result<()> {
        let stop = self.shutdown.clone();
        let router = routes::router(self);
        axum::serve(listener, router).with_graceful_shutdown(async move { stop.cancelled().await }).await
    }

    /// Ends all listeners and watches.
    pub fn stop(&self) {
        self.shutdown.cancel();
    }

    /// A token that is cancelled by [`Self::stop`].
    pub fn stopped(&self) -> CancellationToken {
        self.shutdown.clone()
    }

    /// Says where logs are.
    pub fn set_pod_logs(&self, logs: Arc<dyn PodLogs>) {
        *self.logs.write().unwrap_or_else(std::sync::PoisonError::into_inner) = Some(logs);
    }

    pub(super) fn pod_logs(&self) -> Option<Arc<dyn PodLogs>> {
        self.logs.read().unwrap_or_else(std::sync::PoisonError::into_inner).clone()
    }

    /// Says how webhooks are reached.
    pub fn set_webhook_route(&self, route: Arc<dyn WebhookRoute>) {
        *self.webhook_route.write().unwrap_or_else(std::sync::PoisonError::into_inner) = Some(route);
    }

    pub(super) fn webhook_route(&self, endpoint: std::net::SocketAddr) -> std::net::SocketAddr {
        let route = self.webhook_route.read().unwrap_or_else(std::sync::PoisonError::into_inner);
        route.as_ref().map_or(endpoint, |route| route.route(endpoint))
    }

    /// A resource by group and plural name.
    pub fn resource(&self, group: &str, plural: &str) -> ApiResult<Arc<Resource>> {
        self.registry.any_version(group, plural).ok_or_else(ApiError::unknown_path)
    }
}
