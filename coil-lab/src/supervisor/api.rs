//! The Kubernetes API of the lab: the embedded one, or a real one made reachable from the lab's namespaces. Writes the
//! kubeconfigs.

use super::control_plane;
use crate::api::{ApiConfig, ApiServer, PodLogs};
use crate::controllers::Elsewhere;
use crate::netns::Netns;
use crate::options::ApiSource;
use crate::state::State;
use crate::topology::{API_PORT, Topology};
use crate::{kubelet, paths};
use anyhow::Context;
use ipnet::IpNet;
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, Config};
use serde_json::{Value, json};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tracing::debug;

/// The API while it runs.
pub(super) struct Api {
    /// A client of it.
    pub(super) client: Client,
    /// Which of the lab's controllers something else runs.
    pub(super) elsewhere: Elsewhere,
    /// The embedded server, for its controllers.
    pub(super) embedded: Option<Arc<ApiServer>>,
    tasks: JoinSet<anyhow::Result<()>>,
}

impl Api {
    /// Starts it, or finds it, and writes the kubeconfigs.
    pub(super) async fn start(state: &mut State) -> anyhow::Result<Self> {
        match state.options.api.clone() {
            ApiSource::Embedded => embedded(state).await,
            ApiSource::Assets(folder) => {
                super::progress(format!("starting the control plane in {}", folder.display()));
                let plan = control_plane::Plan::of(state, &folder)?;
                let plane = control_plane::start(&plan).await?;
                let mut api = real(state, &plane.kubeconfig, plane.elsewhere).await?;
                api.tasks.spawn(plane.watch());
                Ok(api)
            }
            ApiSource::Kubeconfig(file) => {
                let elsewhere = if state.options.controllers { Elsewhere::NONE } else { Elsewhere::ALL };
                real(state, &file, elsewhere).await
            }
        }
    }

    /// Ends only if the API can no longer be served.
    pub(super) async fn failed(&mut self) -> anyhow::Result<()> {
        match self.tasks.join_next().await {
            Some(ended) => ended?.context("the API")?,
            None => std::future::pending::<()>().await,
        }
        anyhow::bail!("the API has ended")
    }
}

struct Logs;

impl PodLogs for Logs {
    fn log_file(
        &self,
        _namespace: &str,
        _pod: &str,
        uid: &str,
        container: Option<&str>,
        previous: bool,
    ) -> Option<PathBuf> {
        // All runs of a container share one file, so there is no previous one.
        if previous { None } else { kubelet::log_file(uid, container) }
    }
}

async fn embedded(state: &mut State) -> anyhow::Result<Api> {
    let topology = &state.topology;
    let config = ApiConfig {
        service_cidr_v4: topology.service_cidrs.iter().find_map(|net| match net {
            IpNet::V4(net) => Some(*net),
            IpNet::V6(_) => None,
        }),
        service_cidr_v6: topology.service_cidrs.iter().find_map(|net| match net {
            IpNet::V6(net) => Some(*net),
            IpNet::V4(_) => None,
        }),
        prefer_v6: !topology.family.v4(),
    };
    let server = ApiServer::new(config);
    server.set_pod_logs(Arc::new(Logs));
    let mut tasks = JoinSet::new();
    let local = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.context("cannot listen for the API")?;
    let url = format!("http://{}", local.local_addr()?);
    for listener in [local, listen(&topology.router, in_router())?] {
        let server = server.clone();
        tasks.spawn(async move { server.serve(listener).await.context("serving") });
    }
    let cluster = format!("http://{}", topology.api_authority());
    write_kubeconfig(&paths::kubeconfig(), &json!({ "server": url }), &json!({}))?;
    write_kubeconfig(&paths::kubeconfig_cluster(), &json!({ "server": cluster }), &json!({}))?;
    state.api_url = Some(url);
    state.save()?;
    let client = client(&paths::kubeconfig()).await?;
    Ok(Api { client, elsewhere: Elsewhere::ALL, embedded: Some(server), tasks })
}

/// An API server that runs already: its kubeconfig is copied, and the lab's namespaces reach it through the router.
async fn real(state: &mut State, file: &Path, elsewhere: Elsewhere) -> anyhow::Result<Api> {
    let config = load(file).await?;
    let host =
        config.cluster_url.host().context("the API server's URL has no host")?.trim_matches(['[', ']']);
    let secure = config.cluster_url.scheme_str() == Some("https");
    let port = config.cluster_url.port_u16().unwrap_or(if secure { 443 } else { 80 });
    let upstream = tokio::net::lookup_host((host, port))
        .await
        .with_context(|| format!("cannot resolve {host}"))?
        .next()
        .with_context(|| format!("{host} has no address"))?;
    let mut tasks = JoinSet::new();
    tasks.spawn(forward(listen(&state.topology.router, in_router())?, upstream));

    let text = std::fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()))?;
    let whole: Value = serde_saphyr::from_str(&text).with_context(|| format!("{}", file.display()))?;
    crate::state::write_atomically(
        &paths::kubeconfig(),
        absolute(whole.clone(), file).to_string().as_bytes(),
    )?;
    let mut inside = absolute(whole, file);
    let scheme = if secure { "https" } else { "http" };
    let server = format!("{scheme}://{}", state.topology.api_authority());
    for cluster in inside["clusters"].as_array_mut().into_iter().flatten() {
        let cluster = &mut cluster["cluster"];
        cluster["server"] = json!(server);
        if secure {
            // The certificate names the server's own address, not the router's.
            cluster["tls-server-name"] = json!(host);
        }
    }
    crate::state::write_atomically(&paths::kubeconfig_cluster(), inside.to_string().as_bytes())?;
    state.api_url = Some(config.cluster_url.to_string());
    state.save()?;
    let client = Client::try_from(config).context("client of the API")?;
    client.apiserver_version().await.context("the API server does not answer")?;
    Ok(Api { client, elsewhere, embedded: None, tasks })
}

/// File names in a kubeconfig are relative to it; its copies are elsewhere.
fn absolute(mut config: Value, file: &Path) -> Value {
    let folder = file.parent().unwrap_or(Path::new("/")).to_owned();
    for (list, inner, keys) in [
        ("clusters", "cluster", &["certificate-authority"][..]),
        ("users", "user", &["client-certificate", "client-key", "tokenFile"][..]),
    ] {
        for entry in config[list].as_array_mut().into_iter().flatten() {
            for key in keys {
                if let Some(path) = entry[inner][*key].as_str().map(|path| folder.join(path)) {
                    entry[inner][*key] = json!(path);
                }
            }
        }
    }
    config
}

async fn load(file: &Path) -> anyhow::Result<Config> {
    let config = Kubeconfig::read_from(file).with_context(|| format!("cannot read {}", file.display()))?;
    Config::from_custom_kubeconfig(config, &KubeConfigOptions::default())
        .await
        .with_context(|| format!("kubeconfig {}", file.display()))
}

async fn client(file: &Path) -> anyhow::Result<Client> {
    Client::try_from(load(file).await?).context("client of the API")
}

fn write_kubeconfig(path: &Path, cluster: &Value, user: &Value) -> anyhow::Result<()> {
    // JSON is YAML, and kubectl reads it.
    let config = json!({
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{ "name": "coil-lab", "cluster": cluster }],
        "users": [{ "name": "coil-lab", "user": user }],
        "contexts": [{ "name": "coil-lab", "context": { "cluster": "coil-lab", "user": "coil-lab" } }],
        "current-context": "coil-lab",
    });
    crate::state::write_json(path, &config).with_context(|| format!("cannot write {}", path.display()))
}

/// Where the API listens in the router's namespace: all addresses of both families.
fn in_router() -> SocketAddr {
    (Ipv6Addr::UNSPECIFIED, API_PORT).into()
}

/// A listener inside a namespace, for the runtime of this process.
fn listen(namespace: &Netns, address: SocketAddr) -> anyhow::Result<TcpListener> {
    let listener = namespace
        .run(|| std::net::TcpListener::bind(address))?
        .with_context(|| format!("cannot listen on {address} in {}", namespace.name()))?;
    listener.set_nonblocking(true)?;
    Ok(TcpListener::from_std(listener)?)
}

async fn forward(listener: TcpListener, upstream: SocketAddr) -> anyhow::Result<()> {
    loop {
        let (mut inner, peer) = listener.accept().await.context("accepting for the API")?;
        tokio::spawn(async move {
            let copied = async {
                let mut outer = TcpStream::connect(upstream).await?;
                tokio::io::copy_bidirectional(&mut inner, &mut outer).await
            };
            if let Err(error) = copied.await {
                debug!(%peer, %error, "forwarding to the API");
            }
        });
    }
}

/// Service ranges as command line arguments want them.
pub(super) fn service_ranges(topology: &Topology) -> String {
    topology.service_cidrs.iter().map(ToString::to_string).collect::<Vec<_>>().join(",")
}
