//! The lab itself, without Coil: it comes up, runs pods, and leaves nothing behind, whatever was killed.

#![expect(clippy::unwrap_used, reason = "tests")]

use coil_lab::drive::{apply, exec, get, kubectl, pod, until, wait_for};
use coil_lab::netns::Netns;
use coil_lab::report::{Peer, Transfer};
use coil_lab::{Family, Lab, Options, Target, drive, paths, process};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// There is one lab per machine.
static ONE: Mutex<()> = Mutex::new(());

/// Takes the lab down whatever happens in a test.
struct Down<'a>(#[expect(dead_code, reason = "held")] MutexGuard<'a, ()>);

impl Drop for Down<'_> {
    fn drop(&mut self) {
        if let Err(error) = Lab::down(|_| {}) {
            eprintln!("clean-up: {error}");
        }
    }
}

fn program() -> &'static str {
    env!("CARGO_BIN_EXE_coil-lab")
}

fn options(family: Family) -> Options {
    Options { family, programs: None, ..Options::with_launcher(vec![program().into()]) }
}

fn run<F: Future<Output = anyhow::Result<()>>>(test: impl FnOnce() -> F) {
    let _down = Down(ONE.lock().unwrap_or_else(PoisonError::into_inner));
    let runtime = tokio::runtime::Runtime::new().unwrap();
    if let Err(error) = runtime.block_on(test()) {
        let log = std::fs::read_to_string(paths::supervisor_log()).unwrap_or_default();
        eprintln!("{log}\n{error:#}");
        std::panic::resume_unwind(Box::new(format!("{error:#}")));
    }
}

fn nothing_left() {
    assert!(Netns::all_of_lab().is_empty(), "namespaces: {:?}", Netns::all_of_lab());
    assert!(!Path::new(paths::ROOT).exists());
    assert!(!paths::pins().exists());
    assert!(process::marked(None).is_empty(), "processes: {:?}", process::marked(None));
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap();
    assert!(!mounts.lines().any(|line| line.starts_with(paths::BPFFS_SOURCE)), "mounts: {mounts}");
}

/// A pod whose command keeps running, on a node.
fn runner(name: &str, node: &str, command: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Pod\n\
         metadata: {{name: {name}, namespace: default, annotations: {{lab.coil.cybozu.com/run: \"true\"}}}}\n\
         spec:\n  nodeName: {node}\n  terminationGracePeriodSeconds: 1\n  containers:\n  \
         - {{name: main, image: none, command: [sh, -c, \"{command}\"], \
         env: [{{name: POD_IPS, valueFrom: {{fieldRef: {{fieldPath: status.podIPs}}}}}}]}}\n---\n"
    )
}

#[test]
#[ignore = "privileged: makes network namespaces"]
fn pods_of_every_family_reach_everything() {
    for family in [Family::V4, Family::V6, Family::Dual] {
        run(|| async move {
            let lab = Lab::up(options(family), |_| {}).await?;
            let manifest = runner("a", "worker1", "echo $(POD_IPS); exec sleep 1000")
                + &runner("b", "worker2", "exec sleep 1000");
            apply(&lab, &manifest).await?;
            wait_for(&lab, "condition=Ready", "default", &["pod", "a", "b"]).await?;
            let of = |name: &str| get_addresses(name.to_owned());
            let (a, b) = (of("a"), of("b"));
            let families = usize::from(family.v4()) + usize::from(family.v6());
            assert_eq!((a.len(), b.len()), (families, families));
            for to in &b {
                exec(&lab, &pod("default", "a"), &["ping", "-c1", "-W2", &to.to_string()]).await?;
            }
            for server in &lab.topology().external.addresses {
                let server = std::net::SocketAddr::new(*server, 80).to_string();
                let seen: Peer = drive::ask(&lab, &pod("default", "a"), &["peer", &server]).await?;
                assert!(a.contains(&seen.peer), "{seen:?} is none of {a:?}");
            }
            let server = std::net::SocketAddr::new(lab.topology().external.addresses[0], 80).to_string();
            for verb in ["upload", "download"] {
                let arguments = [verb, &server, "--bytes", "5000000"];
                let done: Transfer = drive::ask(&lab, &pod("default", "b"), &arguments).await?;
                assert!(done.ok, "{done:?}");
            }
            let log = kubectl(&lab, &["logs", "a"], "").await?;
            let text: Vec<String> = a.iter().map(ToString::to_string).collect();
            assert_eq!(log.trim(), text.join(","));
            kubectl(&lab, &["delete", "pod", "a", "b"], "").await?;
            until("no record is left", || async {
                anyhow::ensure!(Lab::open()?.status().pods.is_empty());
                Ok(())
            })
            .await?;
            assert!(Netns::all_of_lab().iter().all(|netns| !netns.name().contains("-pod-")));
            Lab::down(|_| {})?;
            nothing_left();
            Ok(())
        });
    }
}

fn get_addresses(name: String) -> Vec<std::net::IpAddr> {
    let status = Lab::open().unwrap().status();
    status.pods.into_iter().find(|pod| pod.name == name).unwrap().addresses
}

#[test]
#[ignore = "privileged: makes network namespaces"]
fn ends_restarts_and_failures_are_told() {
    run(|| async {
        let lab = Lab::up(options(Family::Dual), |_| {}).await?;
        let never =
            |manifest: String| manifest.replace("  containers:", "  restartPolicy: Never\n  containers:");
        let manifest = never(runner("good", "worker1", "exit 0"))
            + &never(runner("bad", "worker1", "exit 3"))
            + &runner("again", "worker2", "exit 4");
        apply(&lab, &manifest).await?;
        for (name, phase) in [("good", "Succeeded"), ("bad", "Failed")] {
            until(phase, || async {
                let found = get(&lab, &["pod", name]).await?;
                anyhow::ensure!(found["status"]["phase"] == phase, "{}", found["status"]);
                Ok(())
            })
            .await?;
        }
        let bad = get(&lab, &["pod", "bad"]).await?;
        assert_eq!(bad["status"]["containerStatuses"][0]["state"]["terminated"]["exitCode"], 3);
        until("restarts", || async {
            let found = get(&lab, &["pod", "again"]).await?;
            let status = &found["status"]["containerStatuses"][0];
            anyhow::ensure!(status["restartCount"].as_i64() >= Some(2), "{status}");
            anyhow::ensure!(status["lastState"]["terminated"]["exitCode"] == 4, "{status}");
            Ok(())
        })
        .await
    });
}

#[test]
#[ignore = "privileged: makes network namespaces"]
fn exec_passes_status_and_pipes_through() {
    run(|| async {
        let lab = Lab::up(options(Family::V4), |_| {}).await?;
        let lab_exec = |target: &str, script: &str| {
            let mut command = Command::new(program());
            command.args(["exec", target, "--", "sh", "-c", script]).stdin(Stdio::null());
            command.output().unwrap()
        };
        assert_eq!(lab_exec("node/worker1", "exit 7").status.code(), Some(7));
        let out = lab_exec("external", "ip -o addr show dev lo");
        assert!(String::from_utf8_lossy(&out.stdout).contains("203.0.113.10"));
        let out = lab_exec("node/worker9", "true");
        assert!(!out.status.success() && String::from_utf8_lossy(&out.stderr).contains("worker1, worker2"));
        let out = lab_exec("node/worker2", "lab-client peer 203.0.113.11:80");
        assert!(String::from_utf8_lossy(&out.stdout).contains("172.30.2.2"), "{out:?}");
        let options = coil_lab::ExecOptions { stdin: b"hello".to_vec(), ..Default::default() };
        let out = lab.exec(&Target::Router, &["cat"], options).await?;
        assert_eq!(out.stdout, b"hello");
        let limit = std::time::Duration::from_millis(300);
        let options = coil_lab::ExecOptions { limit, ..Default::default() };
        assert!(lab.exec(&Target::External, &["sleep", "60"], options).await.is_err());
        Ok(())
    });
}

#[test]
#[ignore = "privileged: makes network namespaces"]
fn kill_9_of_anything_leaves_nothing() {
    use nix::sys::signal::Signal::SIGKILL;
    run(|| async {
        let lab = Lab::up(options(Family::Dual), |_| {}).await?;
        // A process that leaves its group and session is still one of the lab's.
        let manifest = runner("a", "worker1", "setsid sleep 1000 & exec sleep 1000");
        apply(&lab, &manifest).await?;
        wait_for(&lab, "condition=Ready", "default", &["pod", "a"]).await?;
        lab.status().supervisor.unwrap().signal(SIGKILL);
        until("the supervisor is gone", || async {
            anyhow::ensure!(!lab.status().supervised);
            Ok(())
        })
        .await?;
        assert!(Lab::open().is_err());
        assert!(!process::marked(None).is_empty());
        Lab::down(|_| {})?;
        nothing_left();

        // The same with `up` cleaning up, and with the record lost as well.
        let lab = Lab::up(options(Family::V6), |_| {}).await?;
        lab.status().supervisor.unwrap().signal(SIGKILL);
        std::fs::remove_file(paths::state_file())?;
        let lab = Lab::up(options(Family::V4), |_| {}).await?;
        assert_eq!(lab.options().family, Family::V4);
        let other = Lab::up(options(Family::V6), |_| {}).await;
        assert!(other.unwrap_err().to_string().contains("other options"));
        Lab::down(|_| {})?;
        nothing_left();
        Ok(())
    });
}

/// A node loses its power: what ran there runs again with a network of its own, what is elsewhere or done does not
/// notice, and nothing of before is left.
#[test]
#[ignore = "privileged: makes network namespaces"]
fn a_node_that_starts_again_runs_its_pods_again() {
    run(|| async {
        let lab = Lab::up(options(Family::Dual), |_| {}).await?;
        let done = runner("done", "worker1", "exit 0")
            .replace("  containers:", "  restartPolicy: Never\n  containers:");
        let manifest = runner("a", "worker1", "setsid sleep 1000 & exec sleep 1000")
            + &runner("b", "worker2", "exec sleep 1000")
            + &done;
        apply(&lab, &manifest).await?;
        wait_for(&lab, "condition=Ready", "default", &["pod", "a", "b"]).await?;
        let over = || async {
            let found = get(&lab, &["pod", "done"]).await?;
            anyhow::ensure!(found["status"]["phase"] == "Succeeded", "{}", found["status"]);
            Ok(())
        };
        until("its work is done", over).await?;
        let record = |name: &str| lab.status().pods.into_iter().find(|pod| pod.name == name).unwrap();
        let inode = |netns: &Netns| std::fs::metadata(netns.path()).unwrap().ino();
        let node = lab.topology().node("worker1").unwrap().netns.clone();
        let (a, b) = (record("a"), record("b"));
        let before = (inode(&node), inode(&a.netns), process::with_variable("COIL_LAB_POD", Some(&a.uid)));
        assert_eq!(before.2.len(), 2);

        lab.reboot("worker1").await?;
        assert!(before.2.iter().all(|process| !process.alive()), "a process has outlived the node");
        wait_for(&lab, "condition=Ready", "default", &["pod", "a", "b"]).await?;
        assert_ne!((inode(&node), inode(&record("a").netns)), (before.0, before.1));
        assert_eq!(record("b"), b);
        over().await?;
        for (name, restarts) in [("a", 1), ("b", 0)] {
            let found = get(&lab, &["pod", name]).await?;
            assert_eq!(found["status"]["containerStatuses"][0]["restartCount"], restarts, "{name}");
        }
        for to in &b.addresses {
            exec(&lab, &pod("default", "a"), &["ping", "-c1", "-W2", &to.to_string()]).await?;
        }
        let names = std::fs::read_dir(paths::cni().join("host-local/worker1/coil-lab"))?;
        let mut used: Vec<std::net::IpAddr> =
            names.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect();
        used.sort();
        let mut addresses = record("a").addresses;
        addresses.sort();
        assert_eq!(used, addresses, "addresses that are in use");

        let refused = lab.reboot("worker9").await.unwrap_err().to_string();
        assert!(refused.contains("there is no node worker9"), "{refused}");
        Ok(())
    });
}

/// An API server that somebody else runs and that has no controllers, as the binaries for tests are: the lab's own do
/// the work through its API.
#[test]
#[ignore = "privileged: makes network namespaces"]
fn foreign_api_server_without_controllers() {
    use coil_lab::ApiSource;
    use coil_lab::api::{ApiConfig, ApiServer};
    run(|| async {
        let server = ApiServer::new(ApiConfig::default());
        let listener = tokio::net::TcpListener::bind(("127.0.0.1", 0)).await?;
        let folder = std::env::temp_dir().join(format!("coil-lab-test-{}", std::process::id()));
        std::fs::create_dir_all(&folder)?;
        let file = folder.join("kubeconfig");
        std::fs::write(
            &file,
            format!(
                "{{apiVersion: v1, kind: Config, current-context: c, users: [{{name: u, user: {{}}}}],\n\
                 contexts: [{{name: c, context: {{cluster: k, user: u}}}}],\n\
                 clusters: [{{name: k, cluster: {{server: \"http://{}\"}}}}]}}\n",
                listener.local_addr()?
            ),
        )?;
        let serving = tokio::spawn(server.clone().serve(listener));
        let api = ApiSource::Kubeconfig(file);
        let lab = Lab::up(Options { api, controllers: true, ..options(Family::Dual) }, |_| {}).await?;
        let manifest = serde_json::json!({ "apiVersion": "v1", "kind": "List", "items": [
            { "apiVersion": "v1", "kind": "Namespace", "metadata": { "name": "shop" } },
            {
                "apiVersion": "apps/v1", "kind": "Deployment", "metadata": { "name": "web", "namespace": "shop" },
                "spec": {
                    "replicas": 3,
                    "selector": { "matchLabels": { "app": "web" } },
                    "template": {
                        "metadata": { "labels": { "app": "web" } },
                        "spec": {
                            "terminationGracePeriodSeconds": 1,
                            "containers": [{ "name": "c", "image": "pause" }],
                        },
                    },
                },
            },
            {
                "apiVersion": "v1", "kind": "Service", "metadata": { "name": "web", "namespace": "shop" },
                "spec": {
                    "ipFamilyPolicy": "PreferDualStack", "selector": { "app": "web" }, "ports": [{ "port": 80 }],
                },
            },
        ]});
        let manifest = &manifest.to_string();
        apply(&lab, manifest).await?;
        kubectl(&lab, &["rollout", "status", "-n", "shop", "deploy/web", "--timeout=30s"], "").await?;
        until("endpoints of both families", || async {
            let found = get(&lab, &["-n", "shop", "endpointslices"]).await?;
            let slices = found["items"].as_array().cloned().unwrap_or_default();
            let full =
                slices.iter().filter(|one| one["endpoints"].as_array().is_some_and(|all| all.len() == 3));
            anyhow::ensure!(full.count() == 2, "{found}");
            Ok(())
        })
        .await?;
        kubectl(&lab, &["scale", "-n", "shop", "deploy/web", "--replicas=1"], "").await?;
        until("one pod is left", || async {
            let found = get(&lab, &["-n", "shop", "pods"]).await?;
            anyhow::ensure!(found["items"].as_array().is_some_and(|all| all.len() == 1));
            Ok(())
        })
        .await?;
        // Owners first, then what they own; then the namespace that holds it all.
        kubectl(&lab, &["delete", "-n", "shop", "deploy/web"], "").await?;
        until("no pod is left", || async {
            let found = get(&lab, &["-n", "shop", "pods,replicasets"]).await?;
            anyhow::ensure!(found["items"].as_array().is_some_and(Vec::is_empty));
            Ok(())
        })
        .await?;
        kubectl(&lab, &["delete", "namespace", "shop", "--timeout=30s"], "").await?;
        Lab::down(|_| {})?;
        nothing_left();
        server.stop();
        serving.await??;
        std::fs::remove_dir_all(folder)?;
        Ok(())
    });
}

#[test]
#[ignore = "privileged: makes network namespaces"]
fn probes_decide_about_readiness_and_restarts() {
    run(|| async {
        let lab = Lab::up(options(Family::V6), |_| {}).await?;
        let sick = Path::new(paths::ROOT).join("sick");
        let ready = Path::new(paths::ROOT).join("ready");
        let serve = format!("exec {} http --address $(POD_IP)", program());
        let pod = serde_json::json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {
                "name": "server", "namespace": "default", "annotations": { "lab.coil.cybozu.com/run": "true" },
            },
            "spec": {
                "terminationGracePeriodSeconds": 1,
                "containers": [{
                    "name": "main", "image": "none", "command": ["sh", "-c", serve],
                    "env": [{ "name": "POD_IP", "valueFrom": { "fieldRef": { "fieldPath": "status.podIP" } } }],
                    "ports": [{ "name": "http", "containerPort": 80 }],
                    "startupProbe": { "tcpSocket": { "port": 7 }, "periodSeconds": 1, "failureThreshold": 20 },
                    "livenessProbe": {
                        "exec": { "command": ["test", "!", "-e", sick] }, "periodSeconds": 1, "failureThreshold": 1,
                    },
                    "readinessProbe": {
                        "exec": { "command": ["test", "-e", ready] }, "periodSeconds": 1, "failureThreshold": 1,
                    },
                }],
            },
        });
        apply(&lab, &pod.to_string()).await?;
        let status = || async {
            let found = get(&lab, &["pod", "server"]).await?;
            Ok::<_, anyhow::Error>(found["status"]["containerStatuses"].clone())
        };
        let is = |what: &'static str, want: &'static dyn Fn(&serde_json::Value) -> bool| {
            until(what, move || async move {
                let now = status().await?;
                anyhow::ensure!(want(&now), "{now}");
                Ok(())
            })
        };
        is("started, not ready", &|now| now[0]["started"] == true && now[0]["ready"] == false).await?;
        std::fs::write(&ready, "")?;
        wait_for(&lab, "condition=Ready", "default", &["pod", "server"]).await?;
        std::fs::remove_file(&ready)?;
        is("no longer ready", &|now| now[0]["ready"] == false && now[0]["restartCount"] == 0).await?;
        std::fs::write(&sick, "")?;
        is("restarted", &|now| now[0]["restartCount"].as_i64() >= Some(1)).await?;
        std::fs::remove_file(&sick)?;
        std::fs::write(&ready, "")?;
        wait_for(&lab, "condition=Ready", "default", &["pod", "server"]).await
    });
}
