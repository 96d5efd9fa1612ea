//! Gateways come and go under load: no connection notices.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use coil_lab::drive::{Addresses, get, kubectl, pod, scrape, sum, until};
use coil_lab::report::{Connections, Load};
use coil_lab::{ExecOptions, Lab};

use crate::support::{ECHO, INTERNET, client, egress, ip, peer, ready, remove, scenarios};

scenarios! {
    a_rolling_restart_breaks_no_connection,
    scaling_up_and_down_breaks_no_connection,
}

/// Port of a gateway's metrics.
pub const METRICS: u16 = 8080;
/// Longest time that a load may run.
const LIMIT: Duration = Duration::from_secs(400);
/// Each flow chooses its own gateway, so that all of them have flows.
const NO_AFFINITY: &str = "  sessionAffinity: None\n";

/// Files by which a load is followed and ended; gone with it.
pub struct Signals {
    ready: PathBuf,
    stop: PathBuf,
}

impl Signals {
    /// Of a load of this name.
    pub fn new(name: &str) -> Self {
        let path =
            |what| std::env::temp_dir().join(format!("coil-load-{}-{name}-{what}", std::process::id()));
        Self { ready: path("ready"), stop: path("stop") }
    }

    /// Waits until the lasting connections are up.
    pub async fn up(&self) -> Result<()> {
        until("the lasting connections are up", || async {
            ensure!(self.ready.exists(), "they are not");
            Ok(())
        })
        .await
    }

    /// Ends the load.
    pub fn stop(&self) -> Result<()> {
        std::fs::write(&self.stop, "").context("ending the load")
    }
}

impl Drop for Signals {
    fn drop(&mut self) {
        for path in [&self.ready, &self.stop] {
            if let Err(error) = std::fs::remove_file(path) {
                // One that was never made need not go.
                if error.kind() != std::io::ErrorKind::NotFound {
                    eprintln!("{}: {error}", path.display());
                }
            }
        }
    }
}

/// Lasting and short connections of a client to a server until they are told to end.
pub async fn load(
    lab: &Lab,
    from: (&str, &str),
    server: IpAddr,
    (long, rate): (u64, u64),
    signals: &Signals,
) -> Result<Load> {
    let server = SocketAddr::new(server, ECHO).to_string();
    let (long, rate) = (long.to_string(), rate.to_string());
    let (ready, stop) = (signals.ready.display().to_string(), signals.stop.display().to_string());
    let arguments = ["load", &server, "--long", &long, "--rate", &rate, "--ready", &ready, "--until", &stop];
    let options = ExecOptions { limit: LIMIT, ..ExecOptions::default() };
    let output = lab.exec(&pod(from.0, from.1), &lab.client(&arguments), options).await?;
    let answer = String::from_utf8_lossy(&output.stdout).into_owned();
    let told = || format!("{answer} {}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_str(answer.trim()).with_context(told)
}

/// Fails if any connection has.
pub fn unharmed(what: &str, load: &Load, long: u64) -> Result<()> {
    eprintln!(
        "{what}: {} s, {} lasting connections with {} exchanges (longest {} ms), {} short ones of {} begun \
         (longest exchange {} ms), gateways {:?} and {:?}",
        load.seconds.round(),
        load.long.opened,
        load.long.exchanges,
        load.long.longest_ms,
        load.short.opened,
        load.started,
        load.short.longest_ms,
        load.long.peers,
        load.short.peers,
    );
    let Connections { opened, failed, .. } = &load.long;
    ensure!(*opened == long && *failed == 0, "{what}, lasting: {:?}", load.long);
    let Connections { opened, failed, exchanges, .. } = &load.short;
    ensure!(
        *failed == 0 && *opened == load.started && *exchanges == load.started,
        "{what}, short, {} begun: {:?}",
        load.started,
        load.short
    );
    Ok(())
}

/// Egress pods that are being deleted, and those that are ready and are not.
struct Pods {
    ending: Vec<String>,
    ready: Vec<String>,
}

async fn pods(lab: &Lab, namespace: &str) -> Result<Pods> {
    let found = get(lab, &["--namespace", namespace, "pod"]).await?;
    let mut pods = Pods { ending: Vec::new(), ready: Vec::new() };
    for item in found["items"].as_array().into_iter().flatten() {
        let name = item["metadata"]["name"].as_str().unwrap_or_default().to_owned();
        let ready = item["status"]["conditions"]
            .as_array()
            .into_iter()
            .flatten()
            .any(|condition| condition["type"] == "Ready" && condition["status"] == "True");
        if item["metadata"]["deletionTimestamp"].is_string() {
            pods.ending.push(name);
        } else if ready {
            pods.ready.push(name);
        }
    }
    Ok(pods)
}

/// Waits until so many gateways are ready and those of before that are not wanted any more are ending.
async fn settled(lab: &Lab, namespace: &str, ready: usize, ending: usize) -> Result<Pods> {
    until("the gateways are as wanted", || async {
        let pods = pods(lab, namespace).await?;
        ensure!(
            pods.ready.len() == ready && pods.ending.len() == ending,
            "ready {:?}, ending {:?}, wanted {ready} and {ending}",
            pods.ready,
            pods.ending
        );
        Ok(pods)
    })
    .await
}

/// Fails unless every one of these gateways waits for flows, takes no new ones, and says so.
async fn draining(lab: &Lab, namespace: &str, names: &[String]) -> Result<()> {
    for name in names {
        let place = pod(namespace, name);
        until("a gateway drains", || async {
            let metrics = scrape(lab, &place, METRICS).await?;
            let flows = sum(&metrics, "coil_egress_draining_flows", &[("kind", "tcp")]);
            ensure!(sum(&metrics, "coil_egress_draining", &[]) == 1.0 && flows > 0.0, "{flows} flows");
            Ok(())
        })
        .await?;
        let unready = ["sh", "-c", "! curl --silent --fail http://localhost:8081/readyz"];
        coil_lab::drive::exec(lab, &place, &unready).await.context("a draining gateway is not ready")?;
    }
    let slices = get(lab, &["--namespace", namespace, "endpointslices"]).await?;
    let endpoints: Vec<_> = slices["items"]
        .as_array()
        .into_iter()
        .flatten()
        .flat_map(|slice| slice["endpoints"].as_array().into_iter().flatten())
        .collect();
    for name in names {
        let mut conditions = endpoints
            .iter()
            .filter(|endpoint| endpoint["targetRef"]["name"] == name.as_str())
            .map(|endpoint| &endpoint["conditions"])
            .peekable();
        ensure!(conditions.peek().is_some(), "{name} is in no slice");
        for conditions in conditions {
            ensure!(
                conditions["ready"] == false && conditions["terminating"] == true,
                "{name}: {conditions}"
            );
        }
    }
    Ok(())
}

/// New connections go to the ready gateways and nowhere else.
async fn elsewhere(lab: &Lab, client: (&str, &str), namespace: &str, ready: &[String]) -> Result<()> {
    let mut wanted = Vec::new();
    for name in ready {
        wanted.push(Addresses::of(lab, &["--namespace", namespace, "pod", name]).await?);
    }
    for server in INTERNET.map(ip) {
        for _ in 0..8 {
            let seen = peer(lab, client, server).await?;
            if !wanted.iter().any(|addresses| addresses.expect(seen).is_ok()) {
                bail!("a new connection to {server} was seen from {seen}, not from one of {wanted:?}");
            }
        }
    }
    Ok(())
}

/// `kubectl rollout restart` of two gateways under 200 connections that last longer than the rollout and 200 new
/// ones per second: none fails. The old gateways stay until their connections end, and no longer.
async fn a_rolling_restart_breaks_no_connection(lab: &Lab) -> Result<()> {
    let name = ("roll-client", "client");
    let networks = ["203.0.113.0/24", "2001:db8:ffff::/48"];
    let extra = format!("  replicas: 2\n{NO_AFFINITY}  podDisruptionBudget: {{maxUnavailable: 1}}\n");
    let manifest = egress("roll", "e", &networks, &extra)
        + &client(name.0, name.1, "worker1", &[("egress.coil.cybozu.com/roll", "e")]);
    ready(lab, &manifest, ("roll", "e"), name).await?;
    let old = settled(lab, "roll", 2, 0).await?.ready;
    let signals = [Signals::new("roll-v4"), Signals::new("roll-v6")];
    let [v4, v6] = INTERNET.map(ip);
    let loads = async {
        tokio::join!(
            load(lab, name, v4, (100, 100), &signals[0]),
            load(lab, name, v6, (100, 100), &signals[1])
        )
    };
    let restart = async {
        let work = async {
            for signals in &signals {
                signals.up().await?;
            }
            kubectl(lab, &["--namespace", "roll", "rollout", "restart", "deployment/e"], "").await?;
            let pods = settled(lab, "roll", 2, 2).await?;
            ensure!(old.iter().all(|name| pods.ending.contains(name)), "{old:?} and {:?}", pods.ending);
            draining(lab, "roll", &old).await?;
            elsewhere(lab, name, "roll", &pods.ready).await
        };
        let outcome = work.await;
        // Whatever happened, the load is to end.
        for signals in &signals {
            signals.stop()?;
        }
        outcome
    };
    let ((v4, v6), restarted) = tokio::join!(loads, restart);
    restarted?;
    let (v4, v6) = (v4?, v6?);
    unharmed("IPv4", &v4, 100)?;
    unharmed("IPv6", &v6, 100)?;
    for load in [&v4, &v6] {
        ensure!(load.long.peers.len() == 2 && load.short.peers.len() >= 3, "{load:?}");
    }
    // Nothing keeps them now.
    settled(lab, "roll", 2, 0).await?;
    remove(lab, &["roll-client", "roll"]).await
}

/// From two gateways to five and from these to one: connections stay where they are, new ones spread.
async fn scaling_up_and_down_breaks_no_connection(lab: &Lab) -> Result<()> {
    let name = ("scale-client", "client");
    let networks = ["203.0.113.0/24", "2001:db8:ffff::/48"];
    let manifest = egress("scale", "e", &networks, &format!("  replicas: 2\n{NO_AFFINITY}"))
        + &client(name.0, name.1, "worker1", &[("egress.coil.cybozu.com/scale", "e")]);
    ready(lab, &manifest, ("scale", "e"), name).await?;
    settled(lab, "scale", 2, 0).await?;
    let signals = Signals::new("scale");
    let scale = async |replicas: usize| {
        let replicas = format!("--replicas={replicas}");
        kubectl(lab, &["--namespace", "scale", "scale", "egress", "e", &replicas], "").await
    };
    let change = async {
        let work = async {
            signals.up().await?;
            scale(5).await?;
            let five = settled(lab, "scale", 5, 0).await?.ready;
            // Each of the five gets new connections.
            let mut waiting = Vec::new();
            for pod in &five {
                waiting.push(Addresses::of(lab, &["--namespace", "scale", "pod", pod]).await?);
            }
            let mut tries = 0;
            while !waiting.is_empty() {
                let seen = peer(lab, name, ip(INTERNET[0])).await?;
                waiting.retain(|addresses| addresses.expect(seen).is_err());
                tries += 1;
                ensure!(tries < 200, "no new connection came to {waiting:?}");
            }
            scale(1).await?;
            // Gateways without lasting connections may be gone already; those with some stay.
            let pods = until("one gateway is left", || async {
                let pods = pods(lab, "scale").await?;
                ensure!(
                    pods.ready.len() == 1 && !pods.ending.is_empty(),
                    "{:?}, {:?}",
                    pods.ready,
                    pods.ending
                );
                Ok(pods)
            })
            .await?;
            elsewhere(lab, name, "scale", &pods.ready).await
        };
        let outcome = work.await;
        signals.stop()?;
        outcome
    };
    let (load, changed) = tokio::join!(load(lab, name, ip(INTERNET[0]), (60, 60), &signals), change);
    changed?;
    let load = load?;
    unharmed("scaling", &load, 60)?;
    ensure!(load.long.peers.len() == 2 && load.short.peers.len() >= 4, "{load:?}");
    settled(lab, "scale", 1, 0).await?;
    remove(lab, &["scale-client", "scale"]).await
}
