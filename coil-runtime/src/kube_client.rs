//! The Kubernetes client of every program: where the API server is, how long to wait for it, who we are.

use std::time::Duration;

use axum::http::HeaderValue;
use axum::http::header::USER_AGENT;
use kube::config::{InClusterError, InferConfigError, KubeConfigOptions, KubeconfigError};
use kube::{Client, Config};

/// Time to connect.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
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
    Client::try_from(config).map_err(|error| ClientError::Build(Box::new(error)))
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
