//! A real control plane from a folder as `KUBEBUILDER_ASSETS` names it: `etcd`, `kube-apiserver`, and if they are there
//! `kube-controller-manager` and `kube-scheduler`. It runs in the root namespace on loopback addresses.

use super::api::service_ranges;
use crate::paths;
use crate::state::{State, write_json};
use anyhow::{Context, bail};
use serde_json::json;
use std::net::TcpListener;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};
use tokio::process::{Child, Command};
use tracing::info;

/// The processes.
pub(super) struct ControlPlane {
    /// A kubeconfig with all rights.
    pub(super) kubeconfig: PathBuf,
    /// Whether `kube-controller-manager` and `kube-scheduler` run.
    pub(super) has_controllers: bool,
    children: Vec<(&'static str, Child)>,
}

impl ControlPlane {
    /// Ends when one of the processes does.
    pub(super) async fn watch(self) -> anyhow::Result<()> {
        let ends = self
            .children
            .into_iter()
            .map(|(name, mut child)| Box::pin(async move { (name, child.wait().await) }));
        let ((name, status), _, _) = futures::future::select_all(ends).await;
        bail!("{name} ended: {}; log: {}", status?, log(name).display())
    }
}

/// Starts what the folder holds and waits until the API answers.
pub(super) async fn start(state: &State, assets: &Path) -> anyhow::Result<ControlPlane> {
    for program in ["etcd", "kube-apiserver"] {
        if !assets.join(program).is_file() {
            bail!(
                "{} has no {program}: KUBEBUILDER_ASSETS must name a folder with etcd and kube-apiserver",
                assets.display()
            );
        }
    }
    let folder = Path::new(paths::ROOT).join("control-plane");
    std::fs::create_dir_all(&folder).with_context(|| format!("cannot create {}", folder.display()))?;
    let [client, peer, secure, manager, scheduler] = free_ports()?;
    let mut children = Vec::new();

    let etcd = format!("http://127.0.0.1:{client}");
    let arguments = [
        format!("--data-dir={}", folder.join("etcd").display()),
        format!("--listen-client-urls={etcd}"),
        format!("--advertise-client-urls={etcd}"),
        format!("--listen-peer-urls=http://127.0.0.1:{peer}"),
        "--unsafe-no-fsync".to_owned(),
    ];
    children.push(("etcd", run(state, assets, "etcd", &arguments)?));

    let key = folder.join("service-account.key");
    make_key(&key).await?;
    let token = uuid::Uuid::new_v4().simple().to_string();
    let tokens = folder.join("tokens.csv");
    std::fs::write(&tokens, format!("{token},lab,lab,system:masters\n"))?;
    let certificates = folder.join("certificates");
    let advertised = state.topology.api_addresses.first().context("the lab has no address for its API")?;
    let arguments = [
        format!("--etcd-servers={etcd}"),
        "--bind-address=127.0.0.1".to_owned(),
        // Of the same family as the services, and how the lab's namespaces reach it.
        format!("--advertise-address={advertised}"),
        format!("--secure-port={secure}"),
        format!("--cert-dir={}", certificates.display()),
        format!("--token-auth-file={}", tokens.display()),
        "--authorization-mode=RBAC".to_owned(),
        "--allow-privileged=true".to_owned(),
        "--disable-admission-plugins=ServiceAccount".to_owned(),
        "--service-account-issuer=https://coil-lab".to_owned(),
        format!("--service-account-key-file={}", key.display()),
        format!("--service-account-signing-key-file={}", key.display()),
        format!("--service-cluster-ip-range={}", service_ranges(&state.topology)),
    ];
    children.push(("kube-apiserver", run(state, assets, "kube-apiserver", &arguments)?));

    let kubeconfig = folder.join("kubeconfig");
    let config = json!({
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{
            "name": "coil-lab",
            "cluster": {
                "server": format!("https://127.0.0.1:{secure}"),
                // The server signs its own certificate; all of this stays on this machine's loopback and namespaces.
                "insecure-skip-tls-verify": true,
            },
        }],
        "users": [{ "name": "coil-lab", "user": { "token": token } }],
        "contexts": [{ "name": "coil-lab", "context": { "cluster": "coil-lab", "user": "coil-lab" } }],
        "current-context": "coil-lab",
    });
    write_json(&kubeconfig, &config)?;
    answer(&kubeconfig, &mut children).await?;

    let has = |program: &str| assets.join(program).is_file();
    let has_controllers = has("kube-controller-manager") && has("kube-scheduler");
    if has_controllers {
        let config = format!("--kubeconfig={}", kubeconfig.display());
        let arguments = [
            config.clone(),
            format!("--secure-port={manager}"),
            "--bind-address=127.0.0.1".to_owned(),
            format!("--cert-dir={}", folder.join("manager").display()),
            "--leader-elect=false".to_owned(),
            // It would call nodes dead that have no kubelet to renew their leases.
            "--controllers=*,-node-lifecycle-controller".to_owned(),
            format!("--service-account-private-key-file={}", key.display()),
        ];
        children
            .push(("kube-controller-manager", run(state, assets, "kube-controller-manager", &arguments)?));
        let arguments = [
            config,
            format!("--secure-port={scheduler}"),
            "--bind-address=127.0.0.1".to_owned(),
            format!("--cert-dir={}", folder.join("scheduler").display()),
            "--leader-elect=false".to_owned(),
        ];
        children.push(("kube-scheduler", run(state, assets, "kube-scheduler", &arguments)?));
    }
    Ok(ControlPlane { kubeconfig, has_controllers, children })
}

async fn answer(kubeconfig: &Path, children: &mut [(&'static str, Child)]) -> anyhow::Result<()> {
    let config = kube::config::Kubeconfig::read_from(kubeconfig)?;
    let config = kube::Config::from_custom_kubeconfig(config, &Default::default()).await?;
    let client = kube::Client::try_from(config)?;
    let begun = Instant::now();
    loop {
        for (name, child) in children.iter_mut() {
            if let Some(status) = child.try_wait()? {
                bail!("{name} ended: {status}; log: {}", log(name).display());
            }
        }
        let request = axum::http::Request::get("/readyz").body(Vec::new())?;
        match client.request_text(request).await {
            Ok(_) => {
                info!(seconds = begun.elapsed().as_secs_f32(), "the API server is ready");
                return Ok(());
            }
            Err(error) if begun.elapsed() > Duration::from_secs(60) => {
                return Err(error).context("the API server does not become ready");
            }
            Err(_) => tokio::time::sleep(Duration::from_millis(200)).await,
        }
    }
}

async fn make_key(path: &Path) -> anyhow::Result<()> {
    let made = Command::new("openssl")
        .args(["ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out"])
        .arg(path)
        .stdin(Stdio::null())
        .output()
        .await
        .context("cannot run openssl (Debian package openssl)")?;
    if !made.status.success() {
        bail!("openssl: {}", String::from_utf8_lossy(&made.stderr).trim());
    }
    Ok(())
}

fn run(state: &State, assets: &Path, name: &'static str, arguments: &[String]) -> anyhow::Result<Child> {
    let path = log(name);
    let file = std::fs::File::create(&path).with_context(|| format!("cannot create {}", path.display()))?;
    let mut command = std::process::Command::new(assets.join(name));
    command
        .args(arguments)
        .env(paths::MARKER, &state.id)
        .stdin(Stdio::null())
        .stdout(file.try_clone()?)
        .stderr(file)
        .process_group(0);
    Command::from(command).kill_on_drop(true).spawn().with_context(|| format!("cannot start {name}"))
}

fn log(name: &str) -> PathBuf {
    paths::logs().join(format!("{name}.log"))
}

/// Ports that nobody uses now.
fn free_ports<const N: usize>() -> anyhow::Result<[u16; N]> {
    let mut ports = [0; N];
    // All are held at once, so that no two are the same.
    let mut held = Vec::new();
    for port in &mut ports {
        let listener = TcpListener::bind(("127.0.0.1", 0)).context("no free port")?;
        *port = listener.local_addr()?.port();
        held.push(listener);
    }
    Ok(ports)
}
