//! Nodes that start again, and nodes that go.

use std::collections::BTreeSet;
use std::os::unix::fs::MetadataExt;

use anyhow::{Context, Result, ensure};
use coil_lab::drive::{apply, exec, get, kubectl, until, wait_for};
use coil_lab::footprint::{Footprint, nothing_left};
use coil_lab::{Lab, Target};
use ipnet::IpNet;
use serde_json::Value;

use crate::addresses::{NODES, all_talk, blocks, exported, server, servers};
use crate::support::{INTERNET, client, egress, ip, on_node, remove, scenarios, through};

scenarios! {
    a_node_that_starts_again_starts_from_nothing,
    a_node_starts_again_in_the_middle_of_adds_and_dels,
    a_deleted_node_loses_its_blocks_and_comes_back,
}

/// The node that loses its power.
const DARK: &str = NODES[1];
const NAMESPACE: &str = "dark";

/// A node with servers, clients of an Egress and its gateway loses its power. When it is back, its pods have addresses
/// of blocks of its own, all others have what they had, and all is reached again by everybody.
async fn a_node_that_starts_again_starts_from_nothing(lab: &Lab) -> Result<()> {
    servers(lab, NAMESPACE).await?;
    let (near, far) = (("dark-client", "near"), ("dark-client", "far"));
    let annotation = ("egress.coil.cybozu.com/dark-egress", "e");
    let manifest = egress("dark-egress", "e", &["203.0.113.0/24", "2001:db8:ffff::/48"], &on_node(DARK))
        + &client(near.0, near.1, DARK, &[annotation])
        + &client(far.0, far.1, NODES[0], &[annotation]);
    apply(lab, &manifest).await?;
    let all_ready = async || {
        wait_for(lab, "condition=Ready", NAMESPACE, &["pod", "--all"]).await?;
        wait_for(lab, "condition=Ready", near.0, &["pod", "--all"]).await?;
        wait_for(lab, "condition=Ready", "dark-egress", &["egress/e"]).await
    };
    let all_work = async || {
        all_talk(lab, NAMESPACE).await?;
        for client in [near, far] {
            for server in INTERNET.map(ip) {
                until("traffic goes through", || through(lab, client, server, ("dark-egress", "e"))).await?;
            }
        }
        anyhow::Ok(())
    };
    all_ready().await?;
    all_work().await?;
    let mut before = Vec::new();
    for node in NODES {
        before.push((addresses(lab, node).await?, blocks(lab, node).await?));
    }
    let namespace = inode(lab)?;

    lab.reboot(DARK).await?;
    ensure!(inode(lab)? != namespace, "the node has the network namespace that it had");
    all_ready().await?;
    let mut seen = BTreeSet::new();
    for (node, (addresses_before, blocks_before)) in NODES.iter().zip(&before) {
        let (addresses, blocks) = (addresses(lab, node).await?, blocks(lab, node).await?);
        ensure!(addresses.len() == addresses_before.len(), "{node}: {addresses:?}, {addresses_before:?}");
        for address in &addresses {
            let inside = blocks.iter().any(|net| net.parse().is_ok_and(|net: IpNet| net.contains(address)));
            ensure!(inside, "{address} on {node} is of none of its blocks {blocks:?}");
            ensure!(seen.insert(*address), "two pods have {address}");
        }
        if *node != DARK {
            ensure!(addresses == *addresses_before && blocks == *blocks_before, "{node} has noticed");
        }
        until(&format!("{node} exports its blocks"), || async {
            let exported = exported(lab, node).await?;
            ensure!(exported == blocks, "{node} exports {exported:?}, its blocks are {blocks:?}");
            Ok(())
        })
        .await?;
    }
    only_these_blocks(lab).await?;
    all_work().await?;
    // Nothing of before is there: a link, and a route of each family, for each pod.
    let pods = addresses(lab, DARK).await?.len() / 2;
    let dark = Target::Node(DARK.to_owned());
    let links: Vec<Value> =
        serde_json::from_str(&exec(lab, &dark, &["ip", "-j", "link", "show", "type", "veth"]).await?)?;
    ensure!(links.len() == pods + 1, "{pods} pods and the uplink, but {links:?}");
    for family in ["-4", "-6"] {
        let text = exec(lab, &dark, &["ip", "-j", family, "route", "show", "table", "116"]).await?;
        let routes: Vec<Value> = serde_json::from_str(&text)?;
        ensure!(routes.len() == pods, "{pods} pods, but {routes:?}");
    }
    // Pods were not replaced: they run for the second time.
    let name = format!("on-{DARK}");
    let pod = get(lab, &["--namespace", NAMESPACE, "pod", &name]).await?;
    ensure!(pod["status"]["containerStatuses"][0]["restartCount"] == 1, "{}", pod["status"]);
    remove(lab, &[NAMESPACE, "dark-client", "dark-egress"]).await
}

/// Pods of the scenario of this name.
const MANY: usize = 16;

/// The power goes while pods are made, and again while they are removed: in the end each has an address of its own, and
/// then nothing is left of any.
async fn a_node_starts_again_in_the_middle_of_adds_and_dels(lab: &Lab) -> Result<()> {
    let clean = until("the node has no pods", || async {
        ensure!(
            blocks(lab, DARK).await?.is_empty() && exported(lab, DARK).await?.is_empty(),
            "it has blocks"
        );
        Footprint::of(lab, DARK).await
    })
    .await?;
    let manifest: String = (0..MANY).map(|number| client("many", &format!("p{number}"), DARK, &[])).collect();
    apply(lab, &manifest).await?;
    let count = async || Ok::<_, anyhow::Error>(addresses(lab, DARK).await?.len() / 2);
    until("some have their networks", || async {
        let count = count().await?;
        ensure!(count > 0, "none yet");
        Ok(())
    })
    .await?;
    let wired = count().await?;
    lab.reboot(DARK).await?;
    wait_for(lab, "condition=Ready", "many", &["pod", "--all"]).await?;
    // A set, so that each counts once.
    let addresses = addresses(lab, DARK).await?;
    ensure!(addresses.len() == 2 * MANY, "{MANY} pods have {addresses:?}");
    until("the node has the blocks that it needs, and exports them", || async {
        let (blocks, exported) = (blocks(lab, DARK).await?, exported(lab, DARK).await?);
        ensure!(blocks == exported, "{blocks:?}, exported {exported:?}");
        // One more, where the power went when it was asked for and not yet given.
        ensure!((MANY / 4..=MANY / 4 + 1).contains(&(blocks.len() / 2)), "{MANY} pods use {blocks:?}");
        Ok(())
    })
    .await?;

    kubectl(lab, &["--namespace", "many", "delete", "pod", "--all", "--wait=false"], "").await?;
    until("some are gone", || async {
        let found = get(lab, &["--namespace", "many", "pods"]).await?;
        let left = found["items"].as_array().map_or(0, Vec::len);
        ensure!(left < MANY, "all are there");
        Ok(left)
    })
    .await
    .map(|left| {
        eprintln!("{wired} of {MANY} pods were wired, and {left} not yet removed, when the power went")
    })?;
    lab.reboot(DARK).await?;
    remove(lab, &["many"]).await?;
    nothing_left(lab, DARK, &clean).await?;
    only_these_blocks(lab).await
}

/// The network namespace of the node.
fn inode(lab: &Lab) -> Result<u64> {
    let path = lab.topology().node(DARK).context("no such node")?.netns.path();
    Ok(std::fs::metadata(path)?.ino())
}

/// Addresses of pods on a node that have networks of their own.
async fn addresses(lab: &Lab, node: &str) -> Result<BTreeSet<std::net::IpAddr>> {
    let field = format!("spec.nodeName={node}");
    let list = get(lab, &["pods", "--all-namespaces", "--field-selector", &field]).await?;
    let pods = list["items"].as_array().context("no list of pods")?;
    let own = pods.iter().filter(|pod| pod["spec"]["hostNetwork"] != true);
    own.flat_map(|pod| pod["status"]["podIPs"].as_array().into_iter().flatten())
        .map(|address| Ok(address["ip"].as_str().context("an address")?.parse()?))
        .collect()
}

/// Every block is of a node, and the router has a route to each and to nothing else in the pool.
async fn only_these_blocks(lab: &Lab) -> Result<()> {
    let mut wanted = BTreeSet::new();
    for node in NODES {
        wanted.extend(blocks(lab, node).await?);
    }
    let list = get(lab, &["addressblocks"]).await?;
    let count = list["items"].as_array().map_or(0, Vec::len);
    ensure!(2 * count == wanted.len(), "{count} blocks, of nodes {wanted:?}");
    until("the router has the routes to all blocks", || async {
        let mut routes = BTreeSet::new();
        for family in ["-4", "-6"] {
            let text =
                exec(lab, &Target::Router, &["ip", "-j", family, "route", "show", "proto", "bird"]).await?;
            let found: Vec<Value> = serde_json::from_str(if text.trim().is_empty() { "[]" } else { &text })?;
            routes.extend(found.iter().filter_map(|route| route["dst"].as_str()).map(str::to_owned));
        }
        ensure!(routes == wanted, "routes to {routes:?}, blocks {wanted:?}");
        Ok(())
    })
    .await
}

/// Its blocks are anybody's, and nobody is told any more that it has them; when it starts again it is a node like any
/// other.
async fn a_deleted_node_loses_its_blocks_and_comes_back(lab: &Lab) -> Result<()> {
    let node = NODES[2];
    apply(lab, &server("gone", "one", node)).await?;
    wait_for(lab, "condition=Ready", "gone", &["pod", "one"]).await?;
    ensure!(!blocks(lab, node).await?.is_empty(), "no blocks");
    until("the node exports its blocks", || async {
        ensure!(exported(lab, node).await? == blocks(lab, node).await?, "not yet");
        Ok(())
    })
    .await?;
    kubectl(lab, &["delete", "node", node], "").await?;
    // Whether anybody else ends the pods of a node that is no more, and when, is the control plane's business.
    let field = format!("spec.nodeName={node}");
    let pods =
        ["--namespace", "kube-system", "delete", "pod", "--field-selector", &field, "--ignore-not-found"];
    kubectl(lab, &pods, "").await?;
    until("the blocks of the node are gone, and so are its routes", || async {
        let (blocks, exported) = (blocks(lab, node).await?, exported(lab, node).await?);
        ensure!(blocks.is_empty() && exported.is_empty(), "{blocks:?}, exported {exported:?}");
        Ok(())
    })
    .await?;
    only_these_blocks(lab).await?;

    lab.reboot(node).await?;
    wait_for(lab, "condition=Ready", "default", &["node", node]).await?;
    servers(lab, "gone").await?;
    all_talk(lab, "gone").await?;
    only_these_blocks(lab).await?;
    remove(lab, &["gone"]).await
}
