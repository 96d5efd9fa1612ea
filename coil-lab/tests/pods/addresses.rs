//! Addresses of pods, the blocks they come from, and the routes to them.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};

use anyhow::{Context, Result, ensure};
use coil_lab::drive::{Addresses, apply, ask, exec, get, kubectl, pod, until, wait_for};
use coil_lab::report::Peer;
use coil_lab::{Lab, Target};
use serde_json::Value;

use crate::support::{
    HTTP, INTERNET, client, direct, egress, ip, on_node, ready, remove, scenarios, through,
};

scenarios! {
    e7_every_pod_of_coil_is_ready,
    e8_pods_of_different_nodes_talk,
    e10_exported_routes_are_the_blocks_of_the_node,
    e9_a_restarted_coild_keeps_pods_and_blocks,
    egress_works_with_addresses_of_our_own,
    e11_without_pods_there_are_no_blocks,
    e13_a_pool_that_nobody_uses_can_go,
}

pub(crate) const NODES: [&str; 3] = ["worker1", "worker2", "worker3"];
pub(crate) const NAMESPACE: &str = "talk";

/// A pod on a node that serves HTTP on its own addresses.
pub(crate) fn server(namespace: &str, name: &str, node: &str) -> String {
    let run = "exec lab-server $(echo $ADDRESSES | sed 's/[^,]*/--address &/g; s/,/ /g')";
    format!(
        "---\napiVersion: v1\nkind: Namespace\nmetadata: {{name: {namespace}}}\n\
         ---\napiVersion: v1\nkind: Pod\n\
         metadata: {{namespace: {namespace}, name: {name}, annotations: {{lab.coil.cybozu.com/run: \"true\"}}}}\n\
         spec:\n  nodeSelector: {{kubernetes.io/hostname: {node}}}\n  terminationGracePeriodSeconds: 1\n  containers:\n\
         \x20 - name: main\n    image: lab\n    command: [sh, -c, \"{run}\"]\n\
         \x20   env: [{{name: ADDRESSES, valueFrom: {{fieldRef: {{fieldPath: status.podIPs}}}}}}]\n"
    )
}

/// Blocks of a node: those of the API.
pub(crate) async fn blocks(lab: &Lab, node: &str) -> Result<BTreeSet<String>> {
    let selector = format!("coil.cybozu.com/node={node}");
    let list = get(lab, &["addressblocks", "--selector", &selector]).await?;
    let items = list["items"].as_array().context("no list of blocks")?;
    let nets = items.iter().flat_map(|block| [&block["ipv4"], &block["ipv6"]]);
    Ok(nets.filter_map(Value::as_str).map(str::to_owned).collect())
}

/// What a node exports.
pub(crate) async fn exported(lab: &Lab, node: &str) -> Result<BTreeSet<String>> {
    let place = Target::Node(node.to_owned());
    let mut nets = BTreeSet::new();
    for family in ["-4", "-6"] {
        let text = exec(lab, &place, &["ip", "-j", family, "route", "show", "table", "119"]).await;
        // A table that nobody has used yet is an error to iproute2.
        let Ok(text) = text else { continue };
        let routes: Vec<Value> = serde_json::from_str(if text.trim().is_empty() { "[]" } else { &text })?;
        nets.extend(routes.iter().filter_map(|route| route["dst"].as_str()).map(|net| {
            let whole = if family == "-4" { "/32" } else { "/128" };
            if net.contains('/') { net.to_owned() } else { format!("{net}{whole}") }
        }));
    }
    Ok(nets)
}

/// Names of the lab's nodes.
fn nodes(lab: &Lab) -> impl Iterator<Item = &str> {
    lab.topology().nodes.iter().map(|node| node.name.as_str())
}

/// Servers on all nodes.
pub(crate) async fn servers(lab: &Lab, namespace: &str) -> Result<()> {
    let manifest: String = nodes(lab).map(|node| server(namespace, &format!("on-{node}"), node)).collect();
    apply(lab, &manifest).await?;
    for node in nodes(lab) {
        wait_for(lab, "condition=Ready", namespace, &["pod", &format!("on-{node}")]).await?;
    }
    Ok(())
}

pub(crate) async fn of(lab: &Lab, name: &str) -> Result<Addresses> {
    Addresses::of(lab, &["--namespace", NAMESPACE, "pod", name]).await
}

/// Each server reaches each other one in all families, and is seen with its own address.
pub(crate) async fn all_talk(lab: &Lab, namespace: &str) -> Result<()> {
    let on = async |node: &str| {
        Addresses::of(lab, &["--namespace", namespace, "pod", &format!("on-{node}")]).await
    };
    for from in nodes(lab) {
        let place = pod(namespace, &format!("on-{from}"));
        let own = on(from).await?;
        for to in nodes(lab).filter(|node| *node != from) {
            let other = on(to).await?;
            for family in INTERNET.map(ip).into_iter().filter(|server| lab.options().family.has(*server)) {
                let address = SocketAddr::new(other.like(family)?, HTTP).to_string();
                let seen: Peer = until(&format!("{from} reaches {to}"), || async {
                    ask(lab, &place, &["--timeout", "4", "peer", &address]).await
                })
                .await?;
                ensure!(seen.peer == own.like(family)?, "{from} was seen as {} at {to}", seen.peer);
            }
        }
    }
    Ok(())
}

async fn e7_every_pod_of_coil_is_ready(lab: &Lab) -> Result<()> {
    let select = ["pod", "--selector", "app.kubernetes.io/name=coil"];
    wait_for(lab, "condition=Ready", "kube-system", &select).await
}

/// Pods on three nodes, from a pool of both families, without any translation between them.
async fn e8_pods_of_different_nodes_talk(lab: &Lab) -> Result<()> {
    servers(lab, NAMESPACE).await?;
    all_talk(lab, NAMESPACE).await
}

async fn e10_exported_routes_are_the_blocks_of_the_node(lab: &Lab) -> Result<()> {
    for node in NODES {
        let blocks = blocks(lab, node).await?;
        ensure!(!blocks.is_empty(), "{node} has no blocks");
        until(&format!("{node} exports its blocks"), || async {
            let exported = exported(lab, node).await?;
            ensure!(exported == blocks, "{node} exports {exported:?}, its blocks are {blocks:?}");
            Ok(())
        })
        .await?;
    }
    Ok(())
}

/// All agents are replaced: nobody loses an address or a block, and what is handed out next is in nobody's use.
async fn e9_a_restarted_coild_keeps_pods_and_blocks(lab: &Lab) -> Result<()> {
    let mut before = Vec::new();
    for node in NODES {
        before.push(blocks(lab, node).await?);
    }
    let system = ["--namespace", "kube-system"];
    let coild = ["pod", "--selector", "app.kubernetes.io/component=coild"];
    kubectl(lab, &[&system[..], &["delete", "--wait=true"], &coild].concat(), "").await?;
    let status = ["rollout", "status", "daemonset/coild", "--timeout=120s"];
    kubectl(lab, &[&system[..], &status].concat(), "").await?;
    wait_for(lab, "condition=Ready", "kube-system", &coild).await?;
    for (node, before) in NODES.iter().zip(&before) {
        let after = blocks(lab, node).await?;
        ensure!(after == *before, "{node} had {before:?} and has {after:?}");
    }
    all_talk(lab, NAMESPACE).await?;
    apply(lab, &server(NAMESPACE, "late", NODES[0])).await?;
    wait_for(lab, "condition=Ready", NAMESPACE, &["pod", "late"]).await?;
    let pods = get(lab, &["--namespace", NAMESPACE, "pods"]).await?;
    let pods = pods["items"].as_array().context("no list of pods")?;
    let addresses: Vec<IpAddr> = pods
        .iter()
        .flat_map(|pod| pod["status"]["podIPs"].as_array().into_iter().flatten())
        .filter_map(|address| address["ip"].as_str()?.parse().ok())
        .collect();
    let different: BTreeSet<_> = addresses.iter().collect();
    ensure!(addresses.len() == 8 && different.len() == 8, "{addresses:?}");
    all_talk(lab, NAMESPACE).await
}

async fn egress_works_with_addresses_of_our_own(lab: &Lab) -> Result<()> {
    let name = ("out-client", "client");
    let manifest = egress("out", "e", &["203.0.113.0/24", "2001:db8:ffff::/48"], &on_node("worker2"))
        + &client(name.0, name.1, "worker1", &[("egress.coil.cybozu.com/out", "e")]);
    ready(lab, &manifest, ("out", "e"), name).await?;
    for server in INTERNET.map(ip) {
        through(lab, name, server, ("out", "e")).await?;
    }
    kubectl(lab, &["annotate", "--namespace", name.0, "pod", name.1, "egress.coil.cybozu.com/out-"], "")
        .await?;
    for server in INTERNET.map(ip) {
        until("the pod leaves directly", || direct(lab, name, server)).await?;
    }
    remove(lab, &["out-client", "out"]).await
}

async fn e11_without_pods_there_are_no_blocks(lab: &Lab) -> Result<()> {
    remove(lab, &[NAMESPACE]).await?;
    for node in NODES {
        until(&format!("{node} has given its blocks back"), || async {
            let (blocks, exported) = (blocks(lab, node).await?, exported(lab, node).await?);
            ensure!(blocks.is_empty() && exported.is_empty(), "{node}: {blocks:?}, exported {exported:?}");
            Ok(())
        })
        .await?;
    }
    Ok(())
}

/// A namespace may name a pool; the pool stays as long as it is used, and goes afterwards.
async fn e13_a_pool_that_nobody_uses_can_go(lab: &Lab) -> Result<()> {
    let pool = "---\napiVersion: coil.cybozu.com/v2\nkind: AddressPool\nmetadata: {name: other}\n\
                spec: {blockSizeBits: 0, subnets: [{ipv4: 10.245.0.0/30, ipv6: fd00:10:245::/126}]}\n\
                ---\napiVersion: v1\nkind: Namespace\n\
                metadata: {name: pooled, annotations: {coil.cybozu.com/pool: other}}\n";
    apply(lab, pool).await?;
    apply(lab, &server("pooled", "one", NODES[1]).split("---").skip(2).collect::<String>()).await?;
    wait_for(lab, "condition=Ready", "pooled", &["pod", "one"]).await?;
    let address = Addresses::of(lab, &["--namespace", "pooled", "pod", "one"]).await?.like(ip("0.0.0.0"))?;
    ensure!(address.to_string().starts_with("10.245.0."), "{address}");
    kubectl(lab, &["delete", "addresspool", "other", "--wait=false"], "").await?;
    let still = get(lab, &["addresspool", "other"]).await?;
    ensure!(still["metadata"]["deletionTimestamp"].is_string(), "{still}");
    remove(lab, &["pooled"]).await?;
    kubectl(lab, &["wait", "--for=delete", "addresspool/other", "--timeout=60s"], "").await?;
    let left = get(lab, &["addresspools"]).await?;
    ensure!(left["items"].as_array().map(Vec::len) == Some(1), "{left}");
    Ok(())
}
