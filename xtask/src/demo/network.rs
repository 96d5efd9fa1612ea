//! The first chapter: who has given the pods their addresses, and that they reach each other.

use std::collections::BTreeSet;
use std::net::IpAddr;

use anyhow::{Context, Result, ensure};
use coil_lab::drive::{Addresses, exec, get, pod, until};
use coil_lab::options::Networking;
use coil_lab::{Lab, Target};
use serde_json::Value;

use super::Report;
use crate::process::say;

/// Tells it; `servers` are addresses of the families that the cluster has.
pub async fn tell(lab: &Lab, servers: &[IpAddr], report: &mut Report) -> Result<()> {
    say("pods on two nodes");
    let client = pod("team-a", "client");
    let far = Addresses::of(lab, &["--namespace", "team-a", "pod", "far"]).await?;
    for server in servers {
        let family = if server.is_ipv4() { "v4" } else { "v6" };
        let far = far.like(*server)?.to_string();
        let ping = ["ping", "-c", "1", "-W", "2", &far];
        let reached = until("the other node is reached", || exec(lab, &client, &ping)).await;
        report.add(
            format!("{family}: a pod reaches a pod on another node"),
            reached.map(|text| text.lines().nth(1).unwrap_or_default().to_owned()),
        );
    }
    if lab.options().wired_by() == Networking::Coil {
        for node in ["worker1", "worker2"] {
            report.add(
                format!("{node}: `ip route show table 119` equals the node's address blocks"),
                until("the node exports its blocks", || exported(lab, node)).await,
            );
        }
    }
    Ok(())
}

/// Fails unless a node exports the blocks that it has.
async fn exported(lab: &Lab, node: &str) -> Result<String> {
    let selector = format!("coil.cybozu.com/node={node}");
    let list = get(lab, &["addressblocks", "--selector", &selector]).await?;
    let items = list["items"].as_array().context("no list of blocks")?;
    let nets = items.iter().flat_map(|block| [&block["ipv4"], &block["ipv6"]]);
    let blocks: BTreeSet<&str> = nets.filter_map(Value::as_str).collect();
    let mut routes = String::new();
    for family in ["-4", "-6"] {
        // To iproute2 a table that nobody has used yet is an error.
        let table = "ip \"$0\" route show table 119 2>/dev/null; true";
        routes += &exec(lab, &Target::Node(node.to_owned()), &["sh", "-c", table, family]).await?;
    }
    let exported: BTreeSet<&str> = routes.lines().filter_map(|line| line.split_whitespace().next()).collect();
    ensure!(!blocks.is_empty() && exported == blocks, "exported {exported:?}, blocks {blocks:?}");
    Ok(exported.into_iter().collect::<Vec<_>>().join(", "))
}
