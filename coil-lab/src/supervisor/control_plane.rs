//! A real control plane from a folder as `KUBEBUILDER_ASSETS` names it: `etcd`, `kube-apiserver`, and if they are there
//! `kube-controller-manager` and `kube-scheduler`. It runs in the root namespace on loopback addresses.

use super::api::service_ranges;
use crate::controllers::Elsewhere;
use crate::paths;
use crate::state::{State, write_json};
use anyhow::{Context, bail};
use kube::config::Kubeconfig;
use serde_json::json;
use std::net::{IpAddr, TcpListener};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};
use tokio::process::{Child, Command};
use tracing::info;

/// How long the API server may take until it is ready.
const START: Duration = Duration::from_secs(90);

/// What is started, and where it keeps its things.
pub(super) struct Plan {
    /// The folder of the programs.
    assets: PathBuf,
    /// Data, keys, the kubeconfig.
    folder: PathBuf,
    logs: PathBuf,
    /// Value of the marker in the environment of each process.
    marker: String,
    /// How the lab's namespaces reach the API server; of the same family as the services.
    advertised: IpAddr,
    service_ranges: String,
}

impl Plan {
    /// For a lab.
    pub(super) fn of(state: &State, assets: &Path) -> anyhow::Result<Self> {
        let advertised =
            state.topology.api_addresses.first().context("the lab has no address for its API")?;
        Ok(Self {
            assets: assets.to_owned(),
            folder: Path::new(paths::ROOT).join("control-plane"),
            logs: paths::logs(),
            marker: state.id.clone(),
            advertised: *advertised,
            service_ranges: service_ranges(&state.topology),
        })
    }

    fn log(&self, program: &str) -> PathBuf {
        self.logs.join(format!("{program}.log"))
    }

    fn has(&self, program: &str) -> bool {
        self.assets.join(program).is_file()
    }

    fn run(&self, name: &'static str, arguments: &[String]) -> anyhow::Result<Process> {
        let log = self.log(name);
        let file = std::fs::File::create(&log).with_context(|| format!("cannot create {}", log.display()))?;
        let mut command = std::process::Command::new(self.assets.join(name));
        command
            .args(arguments)
            .env(paths::MARKER, &self.marker)
            .stdin(Stdio::null())
            .stdout(file.try_clone()?)
            .stderr(file)
            .process_group(0);
        let child = Command::from(command)
            .kill_on_drop(true)
            .spawn()
            .with_context(|| format!("cannot start {}", self.assets.join(name).display()))?;
        Ok(Process { name, log, child })
    }
}

struct Process {
    name: &'static str,
    log: PathBuf,
    child: Child,
}

/// The processes. They end with it.
pub(super) struct ControlPlane {
    /// A kubeconfig with all rights.
    pub(super) kubeconfig: PathBuf,
    /// What it runs beside the API server.
    pub(super) elsewhere: Elsewhere,
    processes: Vec<Process>,
}

impl ControlPlane {
    /// Ends when one of the processes does.
    pub(super) async fn watch(mut self) -> anyhow::Result<()> {
        let ends = self.processes.iter_mut().map(|process| {
            Box::pin(async { (process.name, process.log.display(), process.child.wait().await) })
        });
        let ((name, log, status), _, _) = futures::future::select_all(ends).await;
        bail!("{name} ended: {}; log: {log}", status?)
    }
}

/// Starts what the folder holds and waits until the API answers.
pub(super) async fn start(plan: &Plan) -> anyhow::Result<ControlPlane> {
    let folder = &plan.folder;
    std::fs::create_dir_all(folder).with_context(|| format!("cannot create {}", folder.display()))?;
    let [client, peer, secure, manager, scheduler] = free_ports()?;

    let etcd = format!("http://127.0.0.1:{client}");
    let arguments = [
        format!("--data-dir={}", folder.join("etcd").display()),
        format!("--listen-client-urls={etcd}"),
        format!("--advertise-client-urls={etcd}"),
        format!("--listen-peer-urls=http://127.0.0.1:{peer}"),
        "--unsafe-no-fsync".to_owned(),
    ];
    let mut processes = vec![plan.run("etcd", &arguments)?];

    let key = folder.join("service-account.key");
    make_key(&key).await?;
    let token = uuid::Uuid::new_v4().simple().to_string();
    let tokens = folder.join("tokens.csv");
    std::fs::write(&tokens, format!("{token},lab,lab,system:masters\n"))?;
    let certificates = folder.join("certificates");
    let arguments = [
        format!("--etcd-servers={etcd}"),
        "--bind-address=127.0.0.1".to_owned(),
        format!("--advertise-address={}", plan.advertised),
        format!("--secure-port={secure}"),
        format!("--cert-dir={}", certificates.display()),
        format!("--token-auth-file={}", tokens.display()),
        "--authorization-mode=RBAC".to_owned(),
        "--allow-privileged=true".to_owned(),
        "--service-account-issuer=https://coil-lab".to_owned(),
        format!("--service-account-key-file={}", key.display()),
        format!("--service-account-signing-key-file={}", key.display()),
        format!("--service-cluster-ip-range={}", plan.service_ranges),
    ];
    processes.push(plan.run("kube-apiserver", &arguments)?);

    // Made by the server when it starts: its certificate, and that of an authority of its own.
    let authority = certificates.join("apiserver.crt");
    let kubeconfig = folder.join("kubeconfig");
    let config = json!({
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{
            "name": "coil-lab",
            "cluster": {
                "server": format!("https://127.0.0.1:{secure}"),
                "certificate-authority": authority,
            },
        }],
        "users": [{ "name": "coil-lab", "user": { "token": token } }],
        "contexts": [{ "name": "coil-lab", "context": { "cluster": "coil-lab", "user": "coil-lab" } }],
        "current-context": "coil-lab",
    });
    write_json(&kubeconfig, &config)?;
    answer(&kubeconfig, &mut processes).await?;

    let elsewhere =
        Elsewhere { manager: plan.has("kube-controller-manager"), scheduler: plan.has("kube-scheduler") };
    let config = format!("--kubeconfig={}", kubeconfig.display());
    if elsewhere.manager {
        let arguments = [
            config.clone(),
            format!("--secure-port={manager}"),
            "--bind-address=127.0.0.1".to_owned(),
            format!("--cert-dir={}", folder.join("manager").display()),
            "--leader-elect=false".to_owned(),
            // It would call nodes dead whose heartbeat is late on a busy machine.
            "--controllers=*,-node-lifecycle-controller".to_owned(),
            format!("--service-account-private-key-file={}", key.display()),
            format!("--root-ca-file={}", authority.display()),
        ];
        processes.push(plan.run("kube-controller-manager", &arguments)?);
    }
    if elsewhere.scheduler {
        let arguments = [
            config,
            format!("--secure-port={scheduler}"),
            "--bind-address=127.0.0.1".to_owned(),
            format!("--cert-dir={}", folder.join("scheduler").display()),
            "--leader-elect=false".to_owned(),
        ];
        processes.push(plan.run("kube-scheduler", &arguments)?);
    }
    Ok(ControlPlane { kubeconfig, elsewhere, processes })
}

async fn answer(kubeconfig: &Path, processes: &mut [Process]) -> anyhow::Result<()> {
    let begun = Instant::now();
    loop {
        for process in processes.iter_mut() {
            if let Some(status) = process.child.try_wait()? {
                bail!("{} ended: {status}; log: {}", process.name, process.log.display());
            }
        }
        match ready(kubeconfig).await {
            Ok(()) => {
                info!(seconds = begun.elapsed().as_secs_f32(), "the API server is ready");
                return Ok(());
            }
            Err(error) if begun.elapsed() > START => {
                return Err(error).context("the API server does not become ready");
            }
            Err(_) => tokio::time::sleep(Duration::from_millis(200)).await,
        }
    }
}

/// Fails also while there is no certificate yet.
async fn ready(kubeconfig: &Path) -> anyhow::Result<()> {
    let config = Kubeconfig::read_from(kubeconfig)?;
    let config = kube::Config::from_custom_kubeconfig(config, &Default::default()).await?;
    let client = kube::Client::try_from(config)?;
    let request = axum::http::Request::get("/readyz").body(Vec::new())?;
    client.request_text(request).await?;
    Ok(())
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

#[cfg(test)]
mod tests {
    //! Without the real programs: shell scripts take their places, and `openssl s_server` plays an API server that is
    //! ready. What a real one makes of our arguments only the real one can tell (docs/lab.md).
    #![expect(clippy::unwrap_used, reason = "tests")]

    use super::*;
    use crate::process::ProcessId;
    use nix::sys::signal::Signal;
    use std::os::unix::fs::PermissionsExt;

    const SLEEPS: &str = "exec sleep 600";
    const ENDS: &str = "echo unknown flag >&2; exit 3";
    /// Makes the certificate where a real one does, then serves the file `readyz`.
    const READY: &str = r#"
for argument; do case $argument in
    --cert-dir=*) folder=${argument#*=} ;;
    --secure-port=*) port=${argument#*=} ;;
esac; done
mkdir -p "$folder" && cd "$folder" && echo ok > readyz
printf '[req]\ndistinguished_name=n\nx509_extensions=e\nprompt=no\n[n]\nCN=lab\n[e]\nsubjectAltName=IP:127.0.0.1\n' > c
openssl req -x509 -newkey rsa:2048 -nodes -config c -keyout key -out new.crt
mv new.crt apiserver.crt
exec openssl s_server -quiet -WWW -accept "127.0.0.1:$port" -cert apiserver.crt -key key"#;

    struct Folder(PathBuf);

    impl Drop for Folder {
        fn drop(&mut self) {
            if let Err(error) = std::fs::remove_dir_all(&self.0) {
                eprintln!("{}: {error}", self.0.display());
            }
        }
    }

    fn plan(programs: &[(&str, &str)]) -> (Folder, Plan) {
        let root = std::env::temp_dir().join(format!("coil-control-plane-{}", uuid::Uuid::new_v4().simple()));
        let (assets, logs) = (root.join("assets"), root.join("logs"));
        for folder in [&assets, &logs] {
            std::fs::create_dir_all(folder).unwrap();
        }
        for (name, script) in programs {
            let path = assets.join(name);
            std::fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        }
        let plan = Plan {
            assets,
            folder: root.join("control-plane"),
            logs,
            marker: root.file_name().unwrap().to_string_lossy().into_owned(),
            advertised: "172.30.0.1".parse().unwrap(),
            service_ranges: "10.96.0.0/16".to_owned(),
        };
        (Folder(root), plan)
    }

    fn running(plan: &Plan) -> Vec<ProcessId> {
        let all = crate::process::with_variable(paths::MARKER, Some(&plan.marker));
        all.into_iter().filter(|process| process.alive()).collect()
    }

    async fn all_gone(plan: &Plan) {
        let begun = Instant::now();
        while !running(plan).is_empty() {
            assert!(begun.elapsed() < Duration::from_secs(30), "still there: {:?}", running(plan));
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    #[tokio::test]
    async fn a_program_that_does_not_start_is_told_with_its_log() {
        let (_folder, plan) = plan(&[("etcd", SLEEPS), ("kube-apiserver", ENDS)]);
        let error = start(&plan).await.err().unwrap().to_string();
        let log = plan.log("kube-apiserver");
        assert_eq!(error, format!("kube-apiserver ended: exit status: 3; log: {}", log.display()));
        assert_eq!(std::fs::read_to_string(log).unwrap(), "unknown flag\n");
        all_gone(&plan).await;
    }

    #[tokio::test]
    async fn a_missing_program_is_named() {
        let (_folder, plan) = plan(&[("etcd", SLEEPS)]);
        let error = format!("{:#}", start(&plan).await.err().unwrap());
        let path = plan.assets.join("kube-apiserver");
        assert_eq!(error, format!("cannot start {}: No such file or directory (os error 2)", path.display()));
        all_gone(&plan).await;
    }

    #[tokio::test]
    async fn what_the_folder_lacks_is_left_to_the_lab() {
        let bare: &[_] = &[("etcd", SLEEPS), ("kube-apiserver", READY)];
        let manager = ("kube-controller-manager", SLEEPS);
        let scheduler = ("kube-scheduler", SLEEPS);
        for (more, elsewhere) in [
            (&[][..], Elsewhere::NONE),
            (&[manager][..], Elsewhere { manager: true, scheduler: false }),
            (&[manager, scheduler][..], Elsewhere::ALL),
        ] {
            let (_folder, plan) = plan(&[bare, more].concat());
            let plane = start(&plan).await.unwrap();
            assert_eq!(plane.elsewhere, elsewhere);
            // A process that was started just now has its mark once it has become the program.
            let begun = Instant::now();
            while running(&plan).len() != 2 + more.len() {
                assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", running(&plan).len());
                tokio::task::yield_now().await;
            }
            drop(plane);
            all_gone(&plan).await;
        }
    }

    #[tokio::test]
    async fn the_end_of_any_process_is_the_end_of_all() {
        for victim in [0, 1] {
            let (_folder, plan) = plan(&[("etcd", SLEEPS), ("kube-apiserver", READY)]);
            let plane = start(&plan).await.unwrap();
            let name = plane.processes[victim].name;
            let pid = plane.processes[victim].child.id().unwrap();
            ProcessId::of(pid.try_into().unwrap()).unwrap().signal(Signal::SIGKILL);
            let error = plane.watch().await.unwrap_err().to_string();
            let log = plan.log(name);
            assert_eq!(error, format!("{name} ended: signal: 9 (SIGKILL); log: {}", log.display()));
            all_gone(&plan).await;
        }
    }
}
