//! A real container runtime: Podman, by its CNI backend and `runc`, starts a container on a lab node with addresses of
//! Coil. It talks to a pod of another node and is talked to, over IPv4 and IPv6; when it is gone nothing is left.

#![expect(clippy::unwrap_used, reason = "tests")]

use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use coil_lab::drive::{Addresses, apply, ask, exec, fresh, pod, until, wait_for};
use coil_lab::footprint::{Footprint, nothing_left};
use coil_lab::options::Networking;
use coil_lab::report::Peer;
use coil_lab::{Family, Lab, MIRROR_ANNOTATION, Options, Target, paths, traffic};
use serde_json::{Value, json};

const NODE: &str = "worker1";
const NAMESPACE: &str = "containers";
/// The container, which is its pod's name: Podman knows no other.
const NAME: &str = "by-podman";

fn program() -> &'static str {
    env!("CARGO_BIN_EXE_coil-lab")
}

/// Takes the lab down whatever happens.
struct Down;

impl Drop for Down {
    fn drop(&mut self) {
        if let Err(error) = Lab::down(|_| {}) {
            eprintln!("clean-up: {error}");
        }
    }
}

#[test]
#[ignore = "privileged: makes network namespaces and runs a container"]
fn a_container_of_podman_has_addresses_of_coil_and_leaves_nothing() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let done: Result<()> = runtime.block_on(async {
        let options = Options {
            family: Family::Dual,
            networking: Networking::Coil,
            ..Options::with_launcher(vec![program().into()])
        };
        let lab = fresh(options, |step| eprintln!("{step}")).await?;
        let _down = Down;
        let done = story(&lab).await;
        if done.is_err() {
            for entry in std::fs::read_dir(paths::logs())?.flatten() {
                if entry.file_name().to_string_lossy().contains("coild") {
                    eprintln!("{}", std::fs::read_to_string(entry.path())?);
                }
            }
        }
        done
    });
    if let Err(error) = done {
        eprintln!("{error:#}");
        std::panic::resume_unwind(Box::new(format!("{error:#}")));
    }
}

async fn story(lab: &Lab) -> Result<()> {
    apply(lab, &manifest()).await?;
    wait_for(lab, "condition=Ready", NAMESPACE, &["pod", "server"]).await?;
    let server = Addresses::of(lab, &["--namespace", NAMESPACE, "pod", "server"]).await?;
    let before = (Footprint::of(lab, NODE).await?, spaces()?);

    let podman = Podman::new(lab)?;
    podman.start().await?;
    let own = podman.addresses().await?;
    for (address, net) in own.iter().zip(&lab.topology().pool) {
        ensure!(net.contains(address), "{address} is not in {net}");
        // Both ways, and each end sees the other's own address.
        let other = SocketAddr::new(server.like(*address)?, traffic::HTTP_PORT).to_string();
        let seen = until("the container reaches the pod", || podman.peer(&other)).await?;
        ensure!(seen.peer == *address, "the pod sees {seen:?}, the container has {own:?}");
        let back = SocketAddr::new(*address, traffic::HTTP_PORT).to_string();
        let seen: Peer = until("the pod reaches the container", || async {
            ask(lab, &pod(NAMESPACE, "server"), &["--timeout", "4", "peer", &back]).await
        })
        .await?;
        ensure!(seen.peer == server.like(*address)?, "the container sees {seen:?}");
    }
    let during = Footprint::of(lab, NODE).await?;
    ensure!(during.beyond(&before.0).iter().any(|line| line.starts_with("link ")), "{during:?}");

    podman.run(&["rm", "--force", "--time", "0", NAME]).await?;
    nothing_left(lab, NODE, &before.0).await?;
    let after = spaces()?;
    ensure!(after == before.1, "network namespaces {after:?}, before {:?}", before.1);
    Ok(())
}

/// A namespace, a pod that the lab's kubelet leaves to Podman, and a pod of the other node.
fn manifest() -> String {
    let run = "exec lab-server $(echo $ADDRESSES | sed 's/[^,]*/--address &/g; s/,/ /g')";
    let ours = json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": { "namespace": NAMESPACE, "name": NAME, "annotations": { MIRROR_ANNOTATION: "podman" } },
        "spec": { "nodeName": NODE, "containers": [{ "name": "main", "image": "none" }] },
    });
    let other = json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {
            "namespace": NAMESPACE, "name": "server",
            "annotations": { coil_lab::RUN_ANNOTATION: "true" },
        },
        "spec": {
            "nodeName": "worker2", "terminationGracePeriodSeconds": 1,
            "containers": [{
                "name": "main", "image": "none", "command": ["sh", "-c", run],
                "env": [{
                    "name": "ADDRESSES", "valueFrom": { "fieldRef": { "fieldPath": "status.podIPs" } },
                }],
            }],
        },
    });
    format!("apiVersion: v1\nkind: Namespace\nmetadata: {{name: {NAMESPACE}}}\n---\n{ours}\n---\n{other}\n")
}

/// Named network namespaces that are not the lab's own: those that Podman makes.
fn spaces() -> Result<Vec<String>> {
    let mut names: Vec<String> = std::fs::read_dir(paths::NETNS_ROOT)?
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .filter(|name| !name.starts_with(paths::NETNS_PREFIX))
        .collect();
    names.sort();
    Ok(names)
}

/// Podman on the lab's node, with all its files in a folder of its own.
struct Podman<'a> {
    lab: &'a Lab,
    folder: PathBuf,
}

impl<'a> Podman<'a> {
    fn new(lab: &'a Lab) -> Result<Self> {
        let folder = std::env::temp_dir().join(format!("coil-lab-podman-{}", std::process::id()));
        let podman = Self { lab, folder };
        let rootfs = podman.folder.join("rootfs");
        for name in ["usr", "proc", "sys", "dev", "etc", "run", "tmp"] {
            std::fs::create_dir_all(rootfs.join(name))?;
        }
        // The container has the programs of this machine, read-only.
        for name in ["bin", "sbin", "lib", "lib64"] {
            std::os::unix::fs::symlink(Path::new("usr").join(name), rootfs.join(name))?;
        }
        std::fs::create_dir_all(podman.folder.join("net"))?;
        std::fs::write(podman.folder.join("net/10-coil.conflist"), network()?)?;
        let configuration = format!(
            "[network]\nnetwork_backend = \"cni\"\ncni_plugin_dirs = [\"{}\"]\nnetwork_config_dir = \"{}\"\n\
             [engine]\ncgroup_manager = \"cgroupfs\"\nevents_logger = \"none\"\n",
            paths::bin().display(),
            podman.folder.join("net").display(),
        );
        std::fs::write(podman.folder.join("containers.conf"), configuration)?;
        Ok(podman)
    }

    fn path(&self, name: &str) -> String {
        self.folder.join(name).display().to_string()
    }

    /// The command line of Podman up to its command.
    fn command(&self) -> Vec<String> {
        let configuration = format!("CONTAINERS_CONF={}", self.path("containers.conf"));
        let (root, run, temporary) = (self.path("root"), self.path("run"), self.path("tmp"));
        let words = [
            "env",
            &configuration,
            "podman",
            "--root",
            &root,
            "--runroot",
            &run,
            "--tmpdir",
            &temporary,
            "--storage-driver",
            "vfs",
            "--runtime",
            "runc",
        ];
        words.map(str::to_owned).to_vec()
    }

    async fn run(&self, arguments: &[&str]) -> Result<String> {
        let arguments = arguments.iter().map(|argument| (*argument).to_owned());
        let words: Vec<String> = self.command().into_iter().chain(arguments).collect();
        exec(self.lab, &Target::Node(NODE.to_owned()), &words).await
    }

    /// Starts a container that serves HTTP on all its addresses.
    async fn start(&self) -> Result<()> {
        let (system, own) = ("/usr:/usr:ro".to_owned(), format!("{}:/run/coil-lab:ro", program()));
        let rootfs = self.path("rootfs");
        // The server asks for large buffers, which is not for everybody.
        let words = [
            "run",
            "--detach",
            "--cap-add",
            "NET_ADMIN",
            // By itself Podman asks for as much as the kernel can give, which not every machine lets a process have.
            "--ulimit",
            "nofile=1024:1024",
            "--ulimit",
            "nproc=1024:1024",
            "--name",
            NAME,
            "--network",
            "coil-lab",
            "--log-driver",
            "none",
            "--volume",
            &system,
            "--volume",
            &own,
            "--rootfs",
            &rootfs,
            "/run/coil-lab",
            "http",
            "--address",
            "::",
        ];
        self.run(&words).await.map(drop)
    }

    /// What Podman says of the container's addresses, IPv4 first.
    async fn addresses(&self) -> Result<[IpAddr; 2]> {
        let text = self.run(&["inspect", "--format", "{{json .NetworkSettings.Networks}}", NAME]).await?;
        let networks: Value = serde_json::from_str(text.trim()).context("reading what podman printed")?;
        let network = &networks["coil-lab"];
        let read = |key: &str| -> Result<IpAddr> {
            let address = network[key].as_str().with_context(|| format!("no {key}: {networks}"))?;
            address.parse().with_context(|| format!("{key}: {networks}"))
        };
        Ok([read("IPAddress")?, read("GlobalIPv6Address")?])
    }

    /// Whom a server sees when the container connects to it.
    async fn peer(&self, server: &str) -> Result<Peer> {
        let answer =
            self.run(&["exec", NAME, "/run/coil-lab", "client", "--timeout", "4", "peer", server]).await?;
        serde_json::from_str(answer.trim()).with_context(|| format!("reading {answer}"))
    }
}

impl Drop for Podman<'_> {
    fn drop(&mut self) {
        let mut words = self.command();
        words.extend(["rm", "--force", "--ignore", "--time", "0", NAME].map(str::to_owned));
        let removed = self
            .lab
            .command(&Target::Node(NODE.to_owned()), &words)
            .map_err(anyhow::Error::from)
            .and_then(|mut command| Ok(command.output()?));
        match removed {
            Ok(output) if output.status.success() => {}
            other => eprintln!("clean-up: {other:?}"),
        }
        if let Err(error) = std::fs::remove_dir_all(&self.folder) {
            eprintln!("clean-up: {}: {error}", self.folder.display());
        }
    }
}

/// The node's own network, and for its pods a namespace, of which Podman has none.
fn network() -> Result<String> {
    let path = paths::node(NODE).join("10-lab.conflist");
    let text = std::fs::read(&path).with_context(|| format!("reading {}", path.display()))?;
    let mut list: Value = serde_json::from_slice(&text)?;
    for plugin in list["plugins"].as_array_mut().context("a list without plugins")? {
        plugin["podNamespace"] = json!(NAMESPACE);
    }
    Ok(list.to_string())
}
