//! The Kubernetes client of every program: where the API server is, how long to wait for it, who we are.
//!
//! A server that is gone without a word, as with a machine that lost its power or a packet filter that
//! drops, leaves its watches open and silent: nothing is ever sent on them, so nothing fails. Keep-alive
//! probes notice within twenty seconds. What the server still had to say would come, too, but only when
//! its kernel tries again, which after a minute of silence may be a minute later.

use std::error::Error;
use std::time::Duration;

use axum::http::HeaderValue;
use axum::http::header::USER_AGENT;
use hyper_timeout::TimeoutConnector;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use kube::client::{Body, ClientBuilder, ConfigExt};
use kube::config::{InClusterError, InferConfigError, KubeConfigOptions, KubeconfigError};
use kube::{Client, Config};
use tower::ServiceExt;
use tower::util::option_layer;

/// Time to connect, TLS included.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Time for the TCP handshake alone. It allows for one packet lost, which is sent again after a second;
/// later ones come too far apart to notice soon that the server is back.
const TCP_TIMEOUT: Duration = Duration::from_secs(3);
/// Silence after which the peer is asked whether it is still there, and how often before it is given up.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(10);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(3);
const KEEPALIVE_PROBES: u32 = 3;
/// Time after which a connection is given up whose data nobody acknowledges.
const UNACKNOWLEDGED_TIMEOUT: Duration = Duration::from_secs(15);
/// Silence after which a connection is given up. Watches are quiet for less: bookmarks come each minute,
/// and a watch is renewed in less than five minutes.
const READ_TIMEOUT: Duration = Duration::from_secs(300);

/// Why there is no client.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// `KUBECONFIG` is set but of no use.
    #[error("cannot use the file named by KUBECONFIG")]
    Kubeconfig(#[from] KubeconfigError),
    /// We run in a pod, but the service account is of no use.
    #[error("cannot use the service account of this pod")]
    InCluster(#[from] InClusterError),
    /// Neither a file nor a pod.
    #[error("no Kubernetes configuration found: set KUBECONFIG, or run in a pod")]
    Infer(#[from] InferConfigError),
    /// The client cannot be built, for example because of bad certificates.
    #[error("cannot build a Kubernetes client")]
    Build(#[source] Box<kube::Error>),
}

/// A client for the API server that `KUBECONFIG`, else the pod, else `~/.kube/config` names. Nothing is
/// sent yet.
///
/// # Errors
/// There is no usable configuration.
pub async fn client(program: &str) -> Result<Client, ClientError> {
    let mut config = config().await?;
    config.connect_timeout = Some(CONNECT_TIMEOUT);
    config.read_timeout = Some(READ_TIMEOUT);
    config.reset_reader_on_write = true;
    if let Ok(agent) = HeaderValue::from_str(&format!("{program}/{}", crate::cli::version())) {
        config.headers.push((USER_AGENT, agent));
    }
    tracing::info!(server = %config.cluster_url, "using Kubernetes API server");
    build(config).map_err(|error| ClientError::Build(Box::new(error)))
}

/// What `Client::try_from` makes, but for two things. The connections notice a dead peer. And answers that
/// say "later" go to whoever asked: all of ours ask again by themselves, sooner than the usual layer would,
/// whose pauses grow to many minutes.
fn build(config: Config) -> kube::Result<Client> {
    if config.proxy_url.is_some() {
        return Client::try_from(config);
    }
    let mut tcp = HttpConnector::new();
    tcp.enforce_http(false);
    tcp.set_nodelay(true);
    tcp.set_connect_timeout(Some(TCP_TIMEOUT));
    tcp.set_keepalive(Some(KEEPALIVE_IDLE));
    tcp.set_keepalive_interval(Some(KEEPALIVE_INTERVAL));
    tcp.set_keepalive_retries(Some(KEEPALIVE_PROBES));
    tcp.set_tcp_user_timeout(Some(UNACKNOWLEDGED_TIMEOUT));
    let mut connector = TimeoutConnector::new(config.rustls_https_connector_with_connector(tcp)?);
    connector.set_connect_timeout(config.connect_timeout);
    connector.set_read_timeout(config.read_timeout);
    connector.set_write_timeout(config.write_timeout);
    connector.set_reset_reader_on_write(config.reset_reader_on_write);
    let http = hyper_util::client::legacy::Client::builder(TokioExecutor::new())
        .build::<_, Body>(connector)
        .map_err(Box::<dyn Error + Send + Sync>::from);
    Ok(ClientBuilder::new(http, config.default_namespace.clone())
        .with_layer(&config.extra_headers_layer()?)
        .with_layer(&option_layer(config.auth_layer()?))
        .with_layer(&config.base_uri_layer())
        .build())
}

async fn config() -> Result<Config, ClientError> {
    let set = |name: &str| std::env::var_os(name).is_some_and(|value| !value.is_empty());
    if set("KUBECONFIG") {
        Ok(Config::from_kubeconfig(&KubeConfigOptions::default()).await?)
    } else if set("KUBERNETES_SERVICE_HOST") {
        Ok(Config::incluster()?)
    } else {
        Ok(Config::infer().await?)
    }
}
