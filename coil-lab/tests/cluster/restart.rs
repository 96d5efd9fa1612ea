//! Agents killed while traffic flows, and the API away: nothing is lost.

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use coil_lab::drive::{Addresses, apply, ask, ask_for, exec, flow, get, pod, until, wait_for};
use coil_lab::report::{Peer, Stream, Udp};
use coil_lab::{Lab, Target, paths};
use serde_json::Value;

use crate::support::{ECHO, HTTP, INTERNET, client, egress, ip, on_node, ready, remove, scenarios, through};
use crate::tally::{Tally, Way};

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

/// How often all agents are killed in a row.
const KILLS: usize = 3;
/// Longest time that traffic may go on until all have been killed and are back.
const LIMIT: Duration = Duration::from_secs(450);

/// kill -9 of every `coild` and `coil-egress`, several times in a row, in the middle of a TCP stream and of
/// a UDP exchange of each family: every packet that one end sends arrives at the other, as counters at both
/// ends show, the new processes adopt maps and links, and the counters of the flows go on.
///
/// Segments that TCP sends again say nothing: a machine that is busy delays acknowledgements until TCP
/// takes them for lost. Such a duplicate arrives as well, or the counters differ.
async fn kill_9_loses_no_packet(lab: &Lab) -> Result<()> {
    let name = ("kill-client", "client");
    let manifest = egress("kill", "e", &["203.0.113.0/24", "2001:db8:ffff::/48"], &on_node("worker2"))
        + &client(name.0, name.1, "worker1", &[("egress.coil.cybozu.com/kill", "e")]);
    ready(lab, &manifest, ("kill", "e"), name).await?;
    let gateway = Addresses::of_egress(lab, "kill", "e").await?;
    let mut ways = Vec::new();
    for server in INTERNET.map(ip) {
        // Nothing is lost while a gateway learns of its client, either.
        through(lab, name, server, ("kill", "e")).await?;
        ways.push(Way { server, gateway: gateway.like(server)? });
    }
    let tally = Tally::start(lab, pod(name.0, name.1), Target::External, &ways, ECHO).await?;
    let done = killed_in_the_middle(lab, name, &tally).await;
    tally.stop(lab).await?;
    done?;
    // The new agents still do their work: a changed policy takes effect.
    let late = ("kill-client", "late");
    apply(lab, &client(late.0, late.1, "worker1", &[("egress.coil.cybozu.com/kill", "e")])).await?;
    wait_for(lab, "condition=Ready", late.0, &["pod", late.1]).await?;
    for server in INTERNET.map(ip) {
        through(lab, name, server, ("kill", "e")).await?;
        through(lab, late, server, ("kill", "e")).await?;
    }
    remove(lab, &["kill-client", "kill"]).await
}

async fn killed_in_the_middle(lab: &Lab, name: (&str, &str), tally: &Tally) -> Result<()> {
    let own = Addresses::of(lab, &["--namespace", name.0, "pod", name.1]).await?;
    let enough = std::path::Path::new(paths::ROOT).join("enough");
    let end = enough.display().to_string();
    let talk = |server: IpAddr| {
        let (place, end) = (pod(name.0, name.1), end.clone());
        async move {
            let to = SocketAddr::new(server, ECHO).to_string();
            let stream = ["--seconds", "430", "--rate", "1000000", "--stall-ms", "4000", "--until", &end];
            let stream = [&["stream", to.as_str()], stream.as_slice()].concat();
            let exchange = ["udp", &to, "--count", "86000", "--interval-ms", "5", "--until", &end];
            tokio::try_join!(
                ask_for::<Stream>(lab, &place, &stream, LIMIT),
                ask_for::<Udp>(lab, &place, &exchange, LIMIT)
            )
        }
    };
    let kill = async {
        for round in 0..KILLS {
            let begun = Instant::now();
            killed_once(lab, &own).await.with_context(|| format!("round {round}"))?;
            eprintln!("round {round} took {:.1} s", begun.elapsed().as_secs_f32());
        }
        Ok::<_, anyhow::Error>(())
    };
    let kill = async {
        let done = kill.await;
        std::fs::write(&enough, "")?;
        done
    };
    let [v4, v6] = INTERNET.map(ip);
    let (v4, v6, killed) = tokio::join!(talk(v4), talk(v6), kill);
    std::fs::remove_file(&enough)?;
    killed?;
    eprintln!("no packet lost: {:?}", tally.nothing_lost(lab).await?);
    for done in [v4, v6] {
        let (stream, exchange) = done?;
        ensure!(stream.ok, "{stream:?}");
        ensure!(exchange.ok && exchange.sent == exchange.received && exchange.sent > 100, "{exchange:?}");
        eprintln!("{stream:?}, {exchange:?}");
    }
    Ok(())
}

/// Kills all agents and waits until they are back, while the flows of both families go on.
async fn killed_once(lab: &Lab, own: &Addresses) -> Result<()> {
    let agents = ["--namespace", "kube-system", "pod", "--selector", "app.kubernetes.io/component=coild"];
    let gateways = ["--namespace", "kill", "pod"];
    let counted = || async {
        let mut flows = Vec::new();
        for server in INTERNET.map(ip) {
            flows.push(flow(lab, "worker1", TCP, own.like(server)?, (server, ECHO)).await?);
        }
        Ok::<_, anyhow::Error>(flows)
    };
    let before = (restarts(lab, &agents).await?, restarts(lab, &gateways).await?);
    let started = until("the streams have flows", || async {
        let flows = counted().await?;
        ensure!(flows.iter().all(|flow| flow.rx_packets > 100), "{flows:?}");
        Ok(flows)
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
    until("the flows' counters go on", || async {
        let later = counted().await?;
        let on = started
            .iter()
            .zip(&later)
            .all(|(before, after)| after.tx_packets > before.tx_packets && after.rx_bytes > before.rx_bytes);
        ensure!(on, "{started:?}, {later:?}");
        Ok(())
    })
    .await
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

/// Time from the end of an outage of the API until a pod made then is served. An agent tries to connect for
/// three seconds, of which the last two are silent, and waits for two at most; the rest is for making a pod.
const RECOVERY: Duration = Duration::from_secs(10);

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
        let begun = Instant::now();
        while begun.elapsed() < Duration::from_secs(60) {
            for server in INTERNET.map(ip) {
                gateways.expect(crate::support::peer(lab, name, server).await?)?;
            }
        }
        Ok::<_, anyhow::Error>(())
    }
    .await;
    exec(lab, &Target::Router, &["nft", "delete table inet away"]).await.context("giving the API back")?;
    let back = Instant::now();
    during?;
    let late = ("away-client", "late");
    apply(lab, &client(late.0, late.1, "worker1", &[("egress.coil.cybozu.com/away", "e")])).await?;
    wait_for(lab, "condition=Ready", late.0, &["pod", late.1]).await?;
    let made = back.elapsed();
    let server = SocketAddr::new(ip(INTERNET[1]), HTTP).to_string();
    let seen = until("the gateway knows the new client", || async {
        ask::<Peer>(lab, &pod(late.0, late.1), &["--timeout", "1", "peer", &server]).await
    })
    .await?;
    let served = back.elapsed();
    eprintln!("a new pod was ready {made:?} after the API was back, and served after {served:?}");
    gateways.expect(seen.peer)?;
    ensure!(
        served < RECOVERY,
        "it took {served:?} until a new client was served, {made:?} of them to make it"
    );
    remove(lab, &["away-client", "away"]).await
}
