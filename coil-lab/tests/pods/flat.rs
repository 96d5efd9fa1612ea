//! `coil-router` on a flat network: all nodes share one link, and each has routes to the others' blocks, by way of the
//! other node itself. The routes by BIRD are made useless, so that nothing but these can carry what pods send.

use std::collections::BTreeSet;

use anyhow::{Context, Result, ensure};
use coil_lab::drive::{apply, exec, get, kubectl, scrape, sum, until, wait_for};
use coil_lab::topology::Node;
use coil_lab::{COIL_IMAGE, Lab, Target};
use serde_json::Value;

use crate::addresses::{NAMESPACE, NODES, all_talk, blocks, of, servers};
use crate::support::{remove, scenarios};

scenarios! {
    e12_coil_router_routes_over_a_flat_network,
}

const ROLES: &str = include_str!("../../../manifests/router/rbac.yaml");
const ROUTER: &str = include_str!("../../../manifests/router/router.yaml");
/// Port of its metrics.
const METRICS: u16 = 9388;
/// What its routes are marked with.
const PROTOCOL: &str = "31";
/// Before the rule for the main table.
const BARRIER: &str = "50";

async fn e12_coil_router_routes_over_a_flat_network(lab: &Lab) -> Result<()> {
    servers(lab, NAMESPACE).await?;
    all_talk(lab, NAMESPACE).await?;
    let done = over_the_link(lab).await;
    let undone = undo(lab).await;
    done?;
    undone?;
    // By BIRD as before.
    all_talk(lab, NAMESPACE).await?;
    remove(lab, &[NAMESPACE]).await
}

async fn over_the_link(lab: &Lab) -> Result<()> {
    link(lab).await.context("making the link")?;
    barrier(lab, "add").await?;
    // Else the rest would show nothing.
    let (from, to) = (coil_lab::drive::pod(NAMESPACE, "on-worker1"), of(lab, "on-worker2").await?);
    for family in crate::support::INTERNET.map(crate::support::ip) {
        let address = to.like(family)?.to_string();
        let reached = exec(lab, &from, &["ping", "-c", "1", "-W", "1", &address]).await;
        ensure!(reached.is_err(), "pods talk without any router");
    }

    apply(lab, ROLES).await?;
    let daemon_set: Vec<String> = ROUTER
        .lines()
        .map(|line| match line.split_once("image: ") {
            Some((indent, _)) => format!("{indent}image: \"{COIL_IMAGE}\""),
            None => line.to_owned(),
        })
        .collect();
    apply(lab, &daemon_set.join("\n")).await?;
    let status =
        ["--namespace", "kube-system", "rollout", "status", "daemonset/coil-router", "--timeout=60s"];
    kubectl(lab, &status, "").await?;
    let routers = ["pod", "--selector", "app.kubernetes.io/component=coil-router"];
    wait_for(lab, "condition=Ready", "kube-system", &routers).await?;

    all_talk(lab, NAMESPACE).await?;
    follow(lab).await?;
    // One more block of another node, and its end.
    let more = blocks(lab, NODES[2]).await?;
    let extra: String =
        (0..4).map(|number| crate::addresses::server("flat-more", &format!("m{number}"), NODES[2])).collect();
    apply(lab, &extra).await?;
    wait_for(lab, "condition=Ready", "flat-more", &["pod", "--all"]).await?;
    ensure!(blocks(lab, NODES[2]).await?.len() > more.len(), "no more blocks");
    follow(lab).await?;
    remove(lab, &["flat-more"]).await?;
    until("the blocks are given back", || async {
        let now = blocks(lab, NODES[2]).await?;
        ensure!(now.len() == more.len(), "{now:?}");
        Ok(())
    })
    .await?;
    follow(lab).await?;
    // What it has set stays when it ends.
    kubectl(lab, &["--namespace", "kube-system", "delete", "daemonset", "coil-router"], "").await?;
    until("coil-router is gone", || async {
        let left = get(lab, &[&["--namespace", "kube-system"], &routers[..]].concat()).await?;
        ensure!(left["items"].as_array().is_some_and(Vec::is_empty), "it still runs");
        Ok(())
    })
    .await?;
    all_talk(lab, NAMESPACE).await
}

/// Each node has exactly the blocks of the others in its main table, by way of the node that has them, and says so in
/// its metrics.
async fn follow(lab: &Lab) -> Result<()> {
    for node in &lab.topology().nodes {
        let place = Target::Node(node.name.clone());
        until(&format!("{} has routes to all blocks of others", node.name), || async {
            let mut wanted = BTreeSet::new();
            for other in lab.topology().nodes.iter().filter(|other| other.name != node.name) {
                for net in blocks(lab, &other.name).await? {
                    let via = gateway(other, net.contains(':'))?;
                    wanted.insert((net, via, "flat".to_owned()));
                }
            }
            let routes = routes(lab, &place).await?;
            ensure!(routes == wanted, "{routes:?}, the blocks of others are {wanted:?}");
            let metrics = scrape(lab, &place, METRICS).await?;
            let of = |name: &str| sum(&metrics, name, &[]);
            ensure!(of("coil_router_routes_synced") == wanted.len() as f64, "{metrics}");
            ensure!(of("coil_router_syncs_total") >= 1.0, "{metrics}");
            Ok(())
        })
        .await?;
    }
    Ok(())
}

fn gateway(node: &Node, v6: bool) -> Result<String> {
    let mut addresses = node.addresses.iter().map(ipnet::IpNet::addr);
    let address = addresses.find(|address| address.is_ipv6() == v6).context("no address of this family")?;
    Ok(address.to_string())
}

/// Routes of `coil-router`: destination, next router, interface.
async fn routes(lab: &Lab, place: &Target) -> Result<BTreeSet<(String, String, String)>> {
    let mut found = BTreeSet::new();
    for family in ["-4", "-6"] {
        let text = exec(lab, place, &["ip", "-j", family, "route", "show", "proto", PROTOCOL]).await?;
        let routes: Vec<Value> = serde_json::from_str(if text.trim().is_empty() { "[]" } else { &text })?;
        let field = |route: &Value, name: &str| route[name].as_str().unwrap_or_default().to_owned();
        found.extend(routes.iter().map(|r| (field(r, "dst"), field(r, "gateway"), field(r, "dev"))));
    }
    Ok(found)
}

/// Joins all nodes by a bridge, and tells each that the others are on that link.
async fn link(lab: &Lab) -> Result<()> {
    exec(lab, &Target::Router, &["ip", "link", "add", "name", "flat", "type", "bridge"]).await?;
    exec(lab, &Target::Router, &["ip", "link", "set", "flat", "up"]).await?;
    for node in &lab.topology().nodes {
        let port = format!("flat-{}", node.name);
        let script = format!(
            "ip link add {port} type veth peer name flat netns {space} && ip link set {port} master flat up",
            space = node.netns.name(),
        );
        exec(lab, &Target::Router, &["sh", "-e", "-c", &script]).await?;
        let [own4, own6] = [gateway(node, false)?, gateway(node, true)?];
        // To be asked for by neighbours, an IPv6 address must be on the link.
        let mut script =
            format!("ip link set flat up\nip -6 address add {own6}/128 dev flat nodad noprefixroute\n");
        for other in lab.topology().nodes.iter().filter(|other| other.name != node.name) {
            let [other4, other6] = [gateway(other, false)?, gateway(other, true)?];
            script += &format!("ip route add {other4}/32 dev flat scope link src {own4}\n");
            script += &format!("ip -6 route add {other6}/128 dev flat src {own6}\n");
        }
        exec(lab, &Target::Node(node.name.clone()), &["sh", "-e", "-c", &script]).await?;
    }
    Ok(())
}

/// Whether the router drops what is for pods.
async fn barrier(lab: &Lab, verb: &str) -> Result<()> {
    for net in &lab.topology().pool {
        let family = if net.addr().is_ipv4() { "-4" } else { "-6" };
        let net = net.to_string();
        let rule = ["ip", family, "rule", verb, "pref", BARRIER, "to", &net, "type", "blackhole"];
        exec(lab, &Target::Router, &rule).await?;
    }
    Ok(())
}

/// Removes everything, whatever of it there is.
async fn undo(lab: &Lab) -> Result<()> {
    let ignore = ["--namespace", "kube-system", "delete", "daemonset", "coil-router", "--ignore-not-found"];
    kubectl(lab, &ignore, "").await?;
    kubectl(lab, &["delete", "--ignore-not-found", "-f", "-"], ROLES).await?;
    let up = barrier(lab, "delete").await;
    exec(lab, &Target::Router, &["ip", "link", "delete", "flat"]).await?;
    for node in &lab.topology().nodes {
        let flush = format!(
            "ip route flush proto {PROTOCOL}; ip -6 route flush proto {PROTOCOL}; ip link delete flat"
        );
        exec(lab, &Target::Node(node.name.clone()), &["sh", "-c", &flush]).await?;
    }
    up
}
