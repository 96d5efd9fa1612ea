//! Which gateway a flow takes, and which flows take one.

use std::net::{IpAddr, SocketAddr};
use std::process::Stdio;

use anyhow::{Context, Result, ensure};
use coil_lab::drive::{Addresses, apply, ask, get, kubectl, pod, until, wait_for};
use coil_lab::report::{Peer, Udp};
use coil_lab::{Lab, Target};
use tokio::io::{AsyncBufReadExt, BufReader};

use crate::support::{
    ECHO, HTTP, INTERNET, client, egress, ip, options, peer, ready, remove, scenarios, through,
};

scenarios! {
    a_client_keeps_its_gateway_until_it_is_idle,
    near_gateways_are_preferred,
    answers_of_inbound_connections_leave_directly,
}

const NETWORKS: [&str; 2] = ["203.0.113.0/24", "2001:db8:ffff::/48"];

/// Changes an Egress.
async fn patch(lab: &Lab, namespace: &str, patch: &str) -> Result<()> {
    let arguments = ["--namespace", namespace, "patch", "egress", "e", "--type", "merge", "--patch", patch];
    kubectl(lab, &arguments, "").await.map(drop)
}

/// Waits until so many gateways of an Egress are ready; their addresses and nodes.
pub async fn gateways(lab: &Lab, namespace: &str, count: usize) -> Result<Vec<(IpAddr, String)>> {
    until("the gateways are ready", || async {
        let slices = get(lab, &["--namespace", namespace, "endpointslices"]).await?;
        let all: Vec<(IpAddr, String)> = slices["items"]
            .as_array()
            .into_iter()
            .flatten()
            .flat_map(|slice| slice["endpoints"].as_array().into_iter().flatten())
            .filter(|endpoint| endpoint["conditions"]["ready"] == true)
            .filter_map(|endpoint| {
                let address = endpoint["addresses"][0].as_str()?.parse().ok()?;
                Some((address, endpoint["nodeName"].as_str()?.to_owned()))
            })
            .collect();
        ensure!(all.len() == 2 * count, "{all:?}");
        Ok(all)
    })
    .await
}

/// Clients of one gateway stay there when three others appear, and spread once their time without a new flow is
/// over.
async fn a_client_keeps_its_gateway_until_it_is_idle(lab: &Lab) -> Result<()> {
    let names = ["c1", "c2", "c3", "c4", "c5", "c6"];
    let extra = "  sessionAffinityConfig: {clientIP: {timeoutSeconds: 3600}}\n";
    let mut manifest = egress("sticky", "e", &NETWORKS, extra);
    for name in names {
        manifest += &client("sticky-client", name, "worker1", &[("egress.coil.cybozu.com/sticky", "e")]);
    }
    ready(lab, &manifest, ("sticky", "e"), ("sticky-client", "c1")).await?;
    wait_for(lab, "condition=Ready", "sticky-client", &["pod", "--all"]).await?;
    let first = Addresses::of_egress(lab, "sticky", "e").await?;
    for name in names {
        for server in INTERNET.map(ip) {
            first.expect(peer(lab, ("sticky-client", name), server).await?)?;
        }
    }
    kubectl(lab, &["--namespace", "sticky", "scale", "egress", "e", "--replicas=4"], "").await?;
    gateways(lab, "sticky", 4).await?;
    // A client that nothing is remembered of goes where its address says: the node knows the new gateways as
    // soon as one of some such clients is seen from one.
    let fresh = ["n1", "n2", "n3", "n4", "n5", "n6"];
    let mut manifest = String::new();
    for name in fresh {
        manifest += &client("sticky-client", name, "worker1", &[("egress.coil.cybozu.com/sticky", "e")]);
    }
    apply(lab, &manifest).await?;
    wait_for(lab, "condition=Ready", "sticky-client", &["pod", "--all"]).await?;
    for server in INTERNET.map(ip) {
        let mut elsewhere = 0;
        for name in fresh {
            elsewhere +=
                usize::from(first.expect(peer(lab, ("sticky-client", name), server).await?).is_err());
        }
        ensure!(elsewhere > 0, "no new client uses a new gateway");
        for name in names {
            for _ in 0..3 {
                let seen = peer(lab, ("sticky-client", name), server).await?;
                first.expect(seen).with_context(|| format!("{name} has left its gateway"))?;
            }
        }
    }
    // From now on a second is enough.
    patch(lab, "sticky", r#"{"spec":{"sessionAffinityConfig":{"clientIP":{"timeoutSeconds":1}}}}"#).await?;
    until("clients spread", || async {
        for name in names {
            if first.expect(peer(lab, ("sticky-client", name), ip(INTERNET[0])).await?).is_err() {
                return Ok(());
            }
        }
        anyhow::bail!("all are where they were")
    })
    .await?;
    remove(lab, &["sticky-client", "sticky"]).await
}

/// With a preference new flows take gateways of the client's node, or zone, while there are any.
async fn near_gateways_are_preferred(lab: &Lab) -> Result<()> {
    let zones = async |change: [&str; 2]| {
        for (node, label) in ["worker1", "worker2"].into_iter().zip(change) {
            let label = format!("topology.kubernetes.io/zone{label}");
            kubectl(lab, &["label", "--overwrite", "node", node, &label], "").await?;
        }
        anyhow::Ok(())
    };
    zones(["=west", "=east"]).await?;
    let outcome = near(lab).await;
    zones(["-", "-"]).await?;
    outcome?;
    remove(lab, &["near-client", "near"]).await
}

async fn near(lab: &Lab) -> Result<()> {
    let name = ("near-client", "client");
    let extra = "  replicas: 4\n  sessionAffinity: None\n  gatewayPreference: Node\n";
    let manifest = egress("near", "e", &NETWORKS, extra)
        + &client(name.0, name.1, "worker1", &[("egress.coil.cybozu.com/near", "e")]);
    ready(lab, &manifest, ("near", "e"), name).await?;
    let all = gateways(lab, "near", 4).await?;
    let here = all.iter().filter(|(_, node)| node == "worker1").count();
    ensure!(here > 0 && here < all.len(), "all gateways are on one node: {all:?}");
    let node_of = async |server| {
        let seen = peer(lab, name, server).await?;
        let found = all.iter().find(|(address, _)| *address == seen);
        Ok::<_, anyhow::Error>(found.with_context(|| format!("{seen} is none of {all:?}"))?.1.clone())
    };
    let only = async |wanted: &str| {
        for server in INTERNET.map(ip) {
            // Each flow chooses for itself; the chance that sixteen agree by accident is small.
            for _ in 0..16 {
                let node = node_of(server).await?;
                ensure!(node == wanted, "a flow to {server} took a gateway on {node}");
            }
        }
        Ok(())
    };
    let both = async || {
        for server in INTERNET.map(ip) {
            let mut seen = std::collections::BTreeSet::new();
            for _ in 0..24 {
                seen.insert(node_of(server).await?);
            }
            ensure!(seen.len() == 2, "only gateways on {seen:?} were used");
        }
        anyhow::Ok(())
    };
    until("those of the node are preferred", || only("worker1")).await?;
    patch(lab, "near", r#"{"spec":{"gatewayPreference":"None"}}"#).await?;
    until("all are used", &both).await?;
    patch(lab, "near", r#"{"spec":{"gatewayPreference":"Zone"}}"#).await?;
    until("those of the zone are preferred", || only("worker1")).await?;
    // A node without a zone is in that of nobody.
    kubectl(lab, &["label", "--overwrite", "node", "worker1", "topology.kubernetes.io/zone-"], "").await?;
    until("without a zone all are used", &both).await
}

/// Whether the external host reaches a server in a pod.
async fn reaches(lab: &Lab, server: IpAddr) -> Result<Peer> {
    let address = SocketAddr::new(server, HTTP).to_string();
    ask(lab, &Target::External, &["--timeout", "3", "peer", &address]).await
}

/// Connections to a client pod: without the mode their answers leave through the Egress and are lost, with it they
/// leave directly; connections of the pod's own take the Egress in both cases.
async fn answers_of_inbound_connections_leave_directly(lab: &Lab) -> Result<()> {
    let name = ("inbound-client", "client");
    let manifest = egress("inbound", "e", &NETWORKS, "")
        + &client(name.0, name.1, "worker1", &[("egress.coil.cybozu.com/inbound", "e")]);
    ready(lab, &manifest, ("inbound", "e"), name).await?;
    let own = Addresses::of(lab, &["--namespace", name.0, "pod", name.1]).await?;
    let servers = [own.like(ip(INTERNET[0]))?, own.like(ip(INTERNET[1]))?];
    let mut argv: Vec<String> =
        options().launcher.iter().map(|part| part.to_string_lossy().into_owned()).collect();
    argv.push("http".into());
    for server in servers {
        argv.extend(["--address".into(), server.to_string()]);
    }
    let mut command = lab.command(&pod(name.0, name.1), &argv)?;
    command.stdin(Stdio::null()).stdout(Stdio::piped());
    let mut process = tokio::process::Command::from(command).kill_on_drop(true).spawn()?;
    let mut lines = BufReader::new(process.stdout.take().context("no output")?).lines();
    ensure!(lines.next_line().await?.as_deref() == Some("serving"), "the server in the pod has ended");

    // The external host speaks with addresses of its own, which so far no Egress is about.
    let mut networks = NETWORKS.map(str::to_owned).to_vec();
    for server in servers {
        networks.push(ipnet::IpNet::from(reaches(lab, server).await?.peer).to_string());
    }
    let destinations = serde_json::json!({"spec": {"destinations": networks}});
    patch(lab, "inbound", &destinations.to_string()).await?;
    let lost = async |server| {
        until("the pod is not reached", || async {
            let answer = reaches(lab, server).await;
            ensure!(answer.is_err(), "{server} is reached without the mode, by {answer:?}");
            Ok(())
        })
        .await
    };
    for server in servers {
        lost(server).await?;
    }
    patch(lab, "inbound", r#"{"spec":{"originatingOnly":true}}"#).await?;
    for server in servers {
        until("the pod is reached", || reaches(lab, server)).await?;
        let to = SocketAddr::new(server, ECHO).to_string();
        let datagrams: Udp = ask(lab, &Target::External, &["udp", &to, "--count", "20"]).await?;
        ensure!(datagrams.ok, "{datagrams:?}");
        let arguments = ["upload", &SocketAddr::new(server, HTTP).to_string(), "--bytes", "3000000"];
        let sent: coil_lab::report::Transfer = ask(lab, &Target::External, &arguments).await?;
        ensure!(sent.ok, "{sent:?}");
    }
    for server in INTERNET.map(ip) {
        through(lab, name, server, ("inbound", "e")).await?;
    }
    patch(lab, "inbound", r#"{"spec":{"originatingOnly":false}}"#).await?;
    for server in servers {
        lost(server).await?;
    }
    process.kill().await?;
    remove(lab, &["inbound-client", "inbound"]).await
}
