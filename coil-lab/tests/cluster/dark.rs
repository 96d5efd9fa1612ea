//! A node that dies hard, with its gateways: nothing on it says good-bye, and until somebody tells the API nobody knows.
//!
//! Who tells it is the controller of nodes, once the node has been silent for its grace period (40 s by default); that
//! one does not run in the lab, so that the scenario writes what it would.

use std::net::IpAddr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use coil_lab::Lab;
use coil_lab::drive::{get, kubectl, until, wait_for};

use crate::choice::gateways;
use crate::gateways::{Signals, load};
use crate::support::{INTERNET, client, egress, ip, peer, ready, remove, scenarios, through};

scenarios! {
    new_connections_leave_a_node_that_died,
}

/// The node that dies.
const DARK: &str = "worker2";
const NAMESPACE: &str = "dead";
/// Lasting connections of each family.
const LONG: u64 = 24;
/// Longest time from the moment that the API knows until new connections avoid the dead gateways. One that was begun
/// before may wait four seconds of it for an answer.
const BOUND: Duration = Duration::from_secs(10);
/// New connections of each family that must come up one after the other: with half of the gateways dead, none of them
/// takes one of those by accident.
const STREAK: usize = 16;

/// Two gateways on each of two nodes, of which one loses its power. As long as the API does not know, new connections
/// that choose a gateway there get no answer. As soon as it does, none goes there any more; established ones of the
/// other gateways have not noticed anything, and those of the dead ones are over.
async fn new_connections_leave_a_node_that_died(lab: &Lab) -> Result<()> {
    let name = ("dead-client", "client");
    let networks = ["203.0.113.0/24", "2001:db8:ffff::/48"];
    let manifest = egress(NAMESPACE, "e", &networks, "  replicas: 4\n  sessionAffinity: None\n")
        + &client(name.0, name.1, "worker1", &[("egress.coil.cybozu.com/dead", "e")]);
    ready(lab, &manifest, (NAMESPACE, "e"), name).await?;
    let all = gateways(lab, NAMESPACE, 4).await?;
    let on = |dark: bool| -> Vec<IpAddr> {
        all.iter().filter(|(_, node)| (node == DARK) == dark).map(|(address, _)| *address).collect()
    };
    let (dead, alive) = (on(true), on(false));
    ensure!(!dead.is_empty() && !alive.is_empty(), "all gateways are on one node: {all:?}");

    let signals = [Signals::new("dark-v4"), Signals::new("dark-v6")];
    let [v4, v6] = INTERNET.map(ip);
    let loads = async {
        tokio::join!(load(lab, name, v4, (LONG, 1), &signals[0]), load(lab, name, v6, (LONG, 1), &signals[1]))
    };
    let death = async {
        let work = async {
            for signals in &signals {
                signals.up().await?;
            }
            lab.power_off(DARK).await?;
            dies(lab, name, &alive).await
        };
        let outcome = work.await;
        for signals in &signals {
            signals.stop()?;
        }
        outcome
    };
    let ((v4, v6), died) = tokio::join!(loads, death);
    // Whatever happened, other scenarios need the node.
    lab.power_on(DARK).await?;
    died?;
    for load in [v4?, v6?] {
        let of = |gateways: &[IpAddr]| -> u64 {
            load.long.peers.iter().filter(|(peer, _)| gateways.contains(peer)).map(|(_, count)| count).sum()
        };
        let (lost, kept) = (of(&dead), of(&alive));
        eprintln!("{kept} lasting connections by living gateways, {lost} by dead ones: {:?}", load.long);
        ensure!(load.long.opened == LONG && lost + kept == LONG && kept > 0 && lost > 0, "{:?}", load.long);
        // Each of those got its error, and none of the others.
        ensure!(load.long.failed == lost, "{:?}", load.long);
    }
    // With the node its gateways come back.
    wait_for(lab, "condition=Ready", NAMESPACE, &["pod", "--all"]).await?;
    gateways(lab, NAMESPACE, 4).await?;
    for server in INTERNET.map(ip) {
        until("traffic goes through", || through(lab, name, server, (NAMESPACE, "e"))).await?;
    }
    remove(lab, &["dead-client", NAMESPACE]).await
}

/// What happens while the node is dark.
async fn dies(lab: &Lab, name: (&str, &str), alive: &[IpAddr]) -> Result<()> {
    // The API has not noticed: its gateways are chosen, in vain.
    gateways(lab, NAMESPACE, 4).await?;
    let mut tries = 0;
    while let Ok(seen) = peer(lab, name, ip(INTERNET[0])).await {
        ensure!(alive.contains(&seen), "{seen} is dead");
        tries += 1;
        ensure!(tries < 64, "no new connection takes a gateway on {DARK}");
    }

    tell(lab).await?;
    let told = Instant::now();
    for server in INTERNET.map(ip) {
        let mut streak = 0;
        let mut begun = Instant::now();
        while streak < STREAK {
            match peer(lab, name, server).await {
                Ok(seen) => {
                    ensure!(alive.contains(&seen), "{seen} is none of {alive:?}");
                    streak += 1;
                }
                Err(error) => {
                    eprintln!("{:.1} s after it was told: {error:#}", told.elapsed().as_secs_f32());
                    ensure!(begun.duration_since(told) < BOUND, "dead gateways are still chosen: {error:#}");
                    (streak, begun) = (0, Instant::now());
                }
            }
        }
        let after = begun.saturating_duration_since(told);
        eprintln!("{server}: all came up that were begun {:.1} s after it was told", after.as_secs_f32());
        ensure!(after < BOUND, "new connections avoid dead gateways only after {after:?}");
    }
    // As it goes on in a cluster: the pods are deleted, and with them their endpoints. Nothing changes for those who live.
    let names: Vec<String> = there(lab).await?;
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let delete = ["--namespace", NAMESPACE, "delete", "pod", "--force", "--grace-period=0", "--wait=false"];
    kubectl(lab, &[&delete[..], &names].concat(), "").await?;
    until("their endpoints are gone", || async {
        let slices = get(lab, &["--namespace", NAMESPACE, "endpointslices"]).await?.to_string();
        ensure!(!names.iter().any(|name| slices.contains(&format!("\"{name}\""))), "{slices}");
        Ok(())
    })
    .await?;
    for server in INTERNET.map(ip) {
        for _ in 0..STREAK {
            let seen = peer(lab, name, server).await.context("after the pods were deleted")?;
            ensure!(alive.contains(&seen), "{seen} is none of {alive:?}");
        }
    }
    Ok(())
}

/// Gateways on the dead node.
async fn there(lab: &Lab) -> Result<Vec<String>> {
    let selector = format!("--field-selector=spec.nodeName={DARK}");
    let found = get(lab, &["--namespace", NAMESPACE, "pods", &selector]).await?;
    let items = found["items"].as_array().into_iter().flatten();
    Ok(items.filter_map(|pod| pod["metadata"]["name"].as_str().map(str::to_owned)).collect())
}

/// What the controller of nodes says of the pods of a node that is silent.
async fn tell(lab: &Lab) -> Result<()> {
    let status = r#"{"status":{"conditions":[{"type":"Ready","status":"False","reason":"NodeNotReady"}]}}"#;
    for name in there(lab).await? {
        let patch =
            ["--namespace", NAMESPACE, "patch", "pod", &name, "--subresource=status", "--patch", status];
        kubectl(lab, &patch, "").await?;
    }
    Ok(())
}
