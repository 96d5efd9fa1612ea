//! Kinds of tunnels, and changing from one to the other while traffic flows.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use coil_lab::drive::{Addresses, ask, ask_for, exec, kubectl, pod, until};
use coil_lab::report::{Stream, Transfer, Udp};
use coil_lab::{Lab, Target, paths};

use crate::support::{ECHO, HTTP, INTERNET, client, egress, ip, on_node, ready, remove, scenarios};
use crate::tally::{Tally, Way};

scenarios! {
    a_cluster_changes_to_ip_in_ip_and_back,
    a_node_does_without_the_tunnel_and_back,
}

/// The table of the packet filter that counts tunnelled packets.
const TABLE: &str = "coil_tunnels";

/// Longest time that traffic may go on until all has changed.
const LIMIT: Duration = Duration::from_secs(450);

/// The agents are told to use IP in IP, and FOU again, in the middle of TCP streams and UDP exchanges of both families:
/// nothing is lost, and the packets that cross the router are those of the kind that was asked for.
async fn a_cluster_changes_to_ip_in_ip_and_back(lab: &Lab) -> Result<()> {
    let name = ("ipip-client", "client");
    let manifest = egress("ipip", "e", &["203.0.113.0/24", "2001:db8:ffff::/48"], &on_node("worker2"))
        + &client(name.0, name.1, "worker1", &[("egress.coil.cybozu.com/ipip", "e")]);
    ready(lab, &manifest, ("ipip", "e"), name).await?;
    let gateway = Addresses::of_egress(lab, "ipip", "e").await?;
    let mut ways = Vec::new();
    for server in INTERNET.map(ip) {
        crate::support::through(lab, name, server, ("ipip", "e")).await?;
        ways.push(Way { server, gateway: gateway.like(server)? });
    }
    count(lab, &Target::Router).await?;
    let tally = Tally::start(lab, pod(name.0, name.1), Target::External, &ways, ECHO).await?;
    let done = changed_in_the_middle(lab, name, &tally).await;
    // Whatever happened, the others want the cluster as it was.
    let back = tunnel(lab, "fou").await;
    tally.stop(lab).await?;
    exec(lab, &Target::Router, &["nft", &format!("delete table inet {TABLE}")]).await?;
    done?;
    back?;
    remove(lab, &["ipip-client", "ipip"]).await
}

/// Counts the tunnelled packets that a place forwards.
async fn count(lab: &Lab, place: &Target) -> Result<()> {
    let rules = format!(
        "add table inet {TABLE}; add counter inet {TABLE} ipip; add counter inet {TABLE} fou; \
         add chain inet {TABLE} c {{ type filter hook forward priority 0; }}; \
         add rule inet {TABLE} c meta l4proto {{4, 41}} counter name ipip; \
         add rule inet {TABLE} c udp dport 5555 counter name fou;"
    );
    exec(lab, place, &["nft", &rules]).await.map(drop)
}

/// Tells all agents what to use, and waits until they do.
async fn tunnel(lab: &Lab, kind: &str) -> Result<()> {
    set(lab, &format!("COIL_TUNNEL={kind}")).await
}

/// Gives all agents a variable, and waits until they have it.
async fn set(lab: &Lab, variable: &str) -> Result<()> {
    let system = ["--namespace", "kube-system"];
    kubectl(lab, &[&system[..], &["set", "env", "daemonset/coild", variable]].concat(), "").await?;
    let wait = ["rollout", "status", "daemonset/coild", "--timeout=120s"];
    kubectl(lab, &[&system[..], &wait].concat(), "").await.map(drop)
}

/// Packets by IP in IP and by FOU that the router has forwarded.
async fn crossed(lab: &Lab, place: &Target) -> Result<[u64; 2]> {
    let mut counts = [0; 2];
    for (count, name) in counts.iter_mut().zip(["ipip", "fou"]) {
        let text = exec(lab, place, &["nft", "list", "counter", "inet", TABLE, name]).await?;
        let mut words = text.split_whitespace().skip_while(|word| *word != "packets");
        *count = words.nth(1).with_context(|| format!("no number in {text}"))?.parse()?;
    }
    Ok(counts)
}

/// Waits until packets cross the router by one kind alone.
async fn only(lab: &Lab, kind: usize) -> Result<()> {
    until("tunnelled packets are of the kind that was asked for", || async {
        let before = crossed(lab, &Target::Router).await?;
        until("packets cross the router", || async {
            let now = crossed(lab, &Target::Router).await?;
            ensure!(now[kind] > before[kind] + 100, "{before:?}, {now:?}");
            Ok(())
        })
        .await?;
        let now = crossed(lab, &Target::Router).await?;
        ensure!(now[1 - kind] == before[1 - kind], "{before:?}, {now:?}");
        Ok(())
    })
    .await
}

async fn changed_in_the_middle(lab: &Lab, name: (&str, &str), tally: &Tally) -> Result<()> {
    let enough = std::path::Path::new(paths::ROOT).join("enough-tunnels");
    let end = enough.display().to_string();
    let talk = |server: IpAddr| {
        let (place, end) = (pod(name.0, name.1), end.clone());
        async move {
            let to = SocketAddr::new(server, ECHO).to_string();
            let stream = ["--seconds", "400", "--rate", "1000000", "--stall-ms", "4000", "--until", &end];
            let stream = [&["stream", to.as_str()], stream.as_slice()].concat();
            let exchange = ["udp", &to, "--count", "80000", "--interval-ms", "5", "--until", &end];
            tokio::try_join!(
                ask_for::<Stream>(lab, &place, &stream, LIMIT),
                ask_for::<Udp>(lab, &place, &exchange, LIMIT)
            )
        }
    };
    let change = async {
        only(lab, 1).await.context("at first")?;
        tunnel(lab, "ipip").await?;
        only(lab, 0).await.context("after the change")?;
        transfers(lab, name).await?;
        tunnel(lab, "fou").await?;
        only(lab, 1).await.context("after the change back")
    };
    let change = async {
        let done = change.await;
        std::fs::write(&enough, "")?;
        done
    };
    let [v4, v6] = INTERNET.map(ip);
    let (v4, v6, changed) = tokio::join!(talk(v4), talk(v6), change);
    std::fs::remove_file(&enough)?;
    changed?;
    eprintln!("no packet lost: {:?}", tally.nothing_lost(lab).await?);
    for done in [v4, v6] {
        let (stream, exchange) = done?;
        ensure!(stream.ok, "{stream:?}");
        ensure!(exchange.ok && exchange.sent == exchange.received && exchange.sent > 100, "{exchange:?}");
    }
    Ok(())
}

/// Byte-exact transfers both ways, of both families.
async fn transfers(lab: &Lab, name: (&str, &str)) -> Result<()> {
    for server in INTERNET.map(ip) {
        for verb in ["upload", "download"] {
            let server = SocketAddr::new(server, HTTP).to_string();
            let arguments = ["--timeout", "60", verb, &server, "--bytes", "8388608"];
            let done: Transfer = ask(lab, &pod(name.0, name.1), &arguments).await?;
            ensure!(done.ok && done.bytes == 8_388_608, "{verb}, {server}: {done:?}");
        }
    }
    Ok(())
}

/// The agents are told to leave the tunnel out inside a node, and to use it again, in the middle of TCP streams of both
/// families: the streams go on, transfers are exact, and next to nothing of them is tunnelled.
async fn a_node_does_without_the_tunnel_and_back(lab: &Lab) -> Result<()> {
    let name = ("near-client", "client");
    let manifest = egress("near", "e", &["203.0.113.0/24", "2001:db8:ffff::/48"], &on_node("worker1"))
        + &client(name.0, name.1, "worker1", &[("egress.coil.cybozu.com/near", "e")]);
    ready(lab, &manifest, ("near", "e"), name).await?;
    let node = Target::Node("worker1".to_owned());
    count(lab, &node).await?;
    let done = left_out_in_the_middle(lab, name, &node).await;
    let back = set(lab, "COIL_SAME_NODE_BYPASS=false").await;
    exec(lab, &node, &["nft", &format!("delete table inet {TABLE}")]).await?;
    done?;
    back?;
    remove(lab, &["near-client", "near"]).await
}

async fn left_out_in_the_middle(lab: &Lab, name: (&str, &str), node: &Target) -> Result<()> {
    let enough = std::path::Path::new(paths::ROOT).join("enough-near");
    let end = enough.display().to_string();
    let talk = |server: IpAddr| {
        let (place, end) = (pod(name.0, name.1), end.clone());
        async move {
            let to = SocketAddr::new(server, ECHO).to_string();
            let stream = ["--seconds", "400", "--rate", "1000000", "--stall-ms", "4000", "--until", &end];
            let arguments = [&["stream", to.as_str()], stream.as_slice()].concat();
            ask_for::<Stream>(lab, &place, &arguments, LIMIT).await
        }
    };
    let tunnelled = || async {
        let before = crossed(lab, node).await?;
        transfers(lab, name).await?;
        let now = crossed(lab, node).await?;
        Ok::<_, anyhow::Error>(now[0] + now[1] - before[0] - before[1])
    };
    let change = async {
        let by_tunnel = tunnelled().await?;
        ensure!(by_tunnel > 500, "only {by_tunnel} packets in tunnels");
        set(lab, "COIL_SAME_NODE_BYPASS=true").await?;
        // Openings and ends of four transfers.
        let few = tunnelled().await?;
        ensure!(few < 100, "{few} packets in tunnels, {by_tunnel} before");
        set(lab, "COIL_SAME_NODE_BYPASS=false").await?;
        let again = tunnelled().await?;
        ensure!(again > 500, "only {again} packets in tunnels");
        Ok(())
    };
    let change = async {
        let done = change.await;
        std::fs::write(&enough, "")?;
        done
    };
    let [v4, v6] = INTERNET.map(ip);
    let (v4, v6, changed) = tokio::join!(talk(v4), talk(v6), change);
    std::fs::remove_file(&enough)?;
    changed?;
    for done in [v4?, v6?] {
        ensure!(done.ok, "{done:?}");
    }
    Ok(())
}
