//! Agents killed while traffic flows, and the API away: nothing is lost.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use coil_lab::drive::{Addresses, apply, ask, exec, flow, get, pod, until, wait_for};
use coil_lab::report::{Stream, Udp};
use coil_lab::{Lab, Target};
use serde_json::Value;

use crate::support::{ECHO, INTERNET, client, egress, ip, on_node, ready, remove, scenarios, through};

scenarios! {
    kill_9_loses_no_packet,
    api_away_changes_nothing,
}

/// Restarts of the containers of pods, added up.
pub(crate) async fn restarts(lab: &Lab, arguments: &[&str]) -> Result<i64> {
    let found = get(lab, arguments).await?;
    let items = found["items"].as_array().cloned().unwrap_or_default();
    ensure!(!items.is_empty(), "no pods: {arguments:?}");
    let mut sum = 0;
    for item in &items {
        let ready = item["status"]["conditions"]
            .as_array()
            .into_iter()
            .flatten()
            .any(|condition: &Value| condition["type"] == "Ready" && condition["status"] == "True");
        ensure!(ready, "{} is not ready", item["metadata"]["name"]);
        sum += item["status"]["containerStatuses"][0]["restartCount"].as_i64().unwrap_or_default();
    }
    Ok(sum)
}

/// kill -9 of every `coild` and `coil-egress` in the middle of a TCP stream and of a UDP exchange: no
/// segment is sent again, no datagram is missing, the new processes adopt maps and links, and the
/// counters of the flow go on.
async fn kill_9_loses_no_packet(lab: &Lab) -> Result<()> {
    let name = ("kill-client", "client");
    let manifest = egress("kill", "e", &["203.0.113.0/24", "2001:db8:ffff::/48"], &on_node("worker2"))
        + &client(name.0, name.1, "worker1", &[("egress.coil.cybozu.com/kill", "e")]);
    ready(lab, &manifest, ("kill", "e"), name).await?;
    let own = Addresses::of(lab, &["--namespace", name.0, "pod", name.1]).await?;
    let place = pod(name.0, name.1);
    // A busy machine delays acknowledgements by more than two round trips, and then tail loss probes send
    // again what was never lost. Without them each segment that is sent again was missing.
    let no_probes = "echo 0 > /proc/sys/net/ipv4/tcp_early_retrans";
    exec(lab, &place, &["sh", "-c", no_probes]).await?;
    let agents = ["--namespace", "kube-system", "pod", "--selector", "app.kubernetes.io/component=coild"];
    let gateways = ["--namespace", "kill", "pod"];
    for server in INTERNET.map(ip) {
        let to = SocketAddr::new(server, ECHO).to_string();
        let before = (restarts(lab, &agents).await?, restarts(lab, &gateways).await?);
        let arguments = ["stream", &to, "--seconds", "12", "--rate", "2000000", "--stall-ms", "2000"];
        let stream = ask::<Stream>(lab, &place, &arguments);
        let datagrams = ["udp", &to, "--count", "2000", "--interval-ms", "5"];
        let exchange = ask::<Udp>(lab, &place, &datagrams);
        let kill = async {
            let started = until("the stream has a flow", || async {
                let started = flow(lab, "worker1", TCP, own.like(server)?, (server, ECHO)).await?;
                ensure!(started.rx_packets > 100, "{started:?}");
                Ok(started)
            })
            .await?;
            let killed = kill_9(lab, &["coild", "coil-egress"])?;
            ensure!(killed >= 3, "only {killed} processes were killed");
            until("the agents are back", || async {
                let now = (restarts(lab, &agents).await?, restarts(lab, &gateways).await?);
                ensure!(now.0 >= before.0 + 2 && now.1 > before.1, "restarts {before:?}, now {now:?}");
                Ok(())
            })
            .await?;
            until("the flow's counters go on", || async {
                let later = flow(lab, "worker1", TCP, own.like(server)?, (server, ECHO)).await?;
                ensure!(
                    later.tx_packets > started.tx_packets && later.rx_bytes > started.rx_bytes,
                    "{started:?}, {later:?}"
                );
                Ok(())
            })
            .await
        };
        let (stream, exchange, killed) = tokio::join!(stream, exchange, kill);
        killed?;
        let (stream, exchange) = (stream?, exchange?);
        ensure!(stream.ok && stream.retransmits == 0, "{stream:?}");
        ensure!(exchange.ok && exchange.sent == exchange.received, "{exchange:?}");
        // The new agents still do their work: a changed policy takes effect.
        through(lab, name, server, ("kill", "e")).await?;
    }
    let late = ("kill-client", "late");
    apply(lab, &client(late.0, late.1, "worker1", &[("egress.coil.cybozu.com/kill", "e")])).await?;
    wait_for(lab, "condition=Ready", late.0, &["pod", late.1]).await?;
    through(lab, late, ip(INTERNET[0]), ("kill", "e")).await?;
    remove(lab, &["kill-client", "kill"]).await
}

const TCP: u8 = 6;

/// Kills the lab's processes that run one of these programs; how many they were.
pub(crate) fn kill_9(lab: &Lab, programs: &[&str]) -> Result<usize> {
    let mut killed = 0;
    for entry in std::fs::read_dir("/proc").context("listing processes")? {
        let path = entry?.path();
        let Some(pid) = path.file_name().and_then(|name| name.to_str()?.parse::<i32>().ok()) else {
            continue;
        };
        // Processes come and go; one that is gone is none of ours.
        let Ok(environment) = std::fs::read(path.join("environ")) else { continue };
        let Ok(line) = std::fs::read(path.join("cmdline")) else { continue };
        let ours = environment.split(|byte| *byte == 0).any(|variable| variable.starts_with(b"COIL_LAB="));
        let program =
            String::from_utf8_lossy(line.split(|byte| *byte == 0).next().unwrap_or_default()).into_owned();
        if ours && programs.iter().any(|name| program.rsplit('/').next() == Some(name)) {
            nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL)
                .with_context(|| format!("killing {program}, process {pid}"))?;
            killed += 1;
        }
    }
    ensure!(killed > 0, "no process of {programs:?} in the lab: {}", crate::support::state(lab));
    Ok(killed)
}

/// The API is unreachable for a while: traffic goes on, new connections too, and nothing is forgotten.
async fn api_away_changes_nothing(lab: &Lab) -> Result<()> {
    let name = ("away-client", "client");
    let manifest = egress("away", "e", &["203.0.113.0/24", "2001:db8:ffff::/48"], "")
        + &client(name.0, name.1, "worker1", &[("egress.coil.cybozu.com/away", "e")]);
    ready(lab, &manifest, ("away", "e"), name).await?;
    let gateways = Addresses::of_egress(lab, "away", "e").await?;
    // Nodes and pods reach the API at the router; refusing its port there takes the API away from them
    // and leaves it to this test.
    let refuse = "add table inet away; add chain inet away in { type filter hook input priority 0; }; \
                  add rule inet away in tcp dport 6443 drop";
    exec(lab, &Target::Router, &["nft", refuse]).await.context("taking the API away")?;
    let during = async {
        let begun = std::time::Instant::now();
        while begun.elapsed() < Duration::from_secs(60) {
            for server in INTERNET.map(ip) {
                gateways.expect(crate::support::peer(lab, name, server).await?)?;
            }
        }
        Ok::<_, anyhow::Error>(())
    }
    .await;
    exec(lab, &Target::Router, &["nft", "delete table inet away"]).await.context("giving the API back")?;
    during?;
    let late = ("away-client", "late");
    apply(lab, &client(late.0, late.1, "worker1", &[("egress.coil.cybozu.com/away", "e")])).await?;
    wait_for(lab, "condition=Ready", late.0, &["pod", late.1]).await?;
    // Watches that were cut off come back with a delay that grows.
    until("the gateway knows the new client", || through(lab, late, ip(INTERNET[1]), ("away", "e"))).await?;
    remove(lab, &["away-client", "away"]).await
}
