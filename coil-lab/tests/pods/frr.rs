//! FRR in the place of BIRD on the nodes for IPv4, with the configuration of `docs/examples/frr-8.conf`.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use anyhow::{Context, Result, ensure};
use coil_lab::drive::{exec, pod, until};
use coil_lab::topology::Node;
use coil_lab::{Lab, Target, paths};
use nix::unistd::{User, chown};
use serde_json::Value;
use tokio::process::{Child, Command};

use crate::addresses::{NAMESPACE, NODES, all_talk, blocks, of, servers};
use crate::support::{INTERNET, ip, remove, scenarios};

scenarios! {
    pods_talk_by_frr,
}

const EXAMPLE: &str = include_str!("../../../docs/examples/frr-8.conf");
const PROGRAMS: &str = "/usr/lib/frr";
/// Where the daemons leave records of themselves.
const RECORDS: &str = "/var/tmp/frr";
/// What zebra marks its next hops with; its routes go with them.
const PROTOCOL: &str = "11";

async fn pods_talk_by_frr(lab: &Lab) -> Result<()> {
    servers(lab, NAMESPACE).await?;
    all_talk(lab, NAMESPACE).await?;
    let done = instead_of_bird(lab).await;
    for node in NODES {
        exec(lab, &Target::Node(node.to_owned()), &["ip", "nexthop", "flush", "proto", PROTOCOL]).await?;
    }
    bird(lab, "enable").await?;
    done?;
    all_talk(lab, NAMESPACE).await?;
    remove(lab, &[NAMESPACE]).await
}

async fn instead_of_bird(lab: &Lab) -> Result<()> {
    bird(lab, "disable").await?;
    // Else the rest would show nothing.
    learnt(lab, &BTreeSet::new()).await?;
    let address = of(lab, "on-worker2").await?.like(ip(INTERNET[0]))?.to_string();
    let reached = exec(lab, &pod(NAMESPACE, "on-worker1"), &["ping", "-c", "1", "-W", "1", &address]).await;
    ensure!(reached.is_err(), "pods talk without any routes");

    let mut daemons = Vec::new();
    for (node, number) in lab.topology().nodes.iter().zip(1..) {
        daemons.extend(start(lab, node, number)?);
    }
    let carried = carried(lab).await;
    if carried.is_err() {
        for daemon in &daemons {
            eprintln!("{}", std::fs::read_to_string(&daemon.log)?);
        }
    }
    carried
}

async fn carried(lab: &Lab) -> Result<()> {
    all_talk(lab, NAMESPACE).await?;
    let mut all = BTreeSet::new();
    for node in NODES {
        all.extend(blocks(lab, node).await?);
    }
    all.retain(|net| !net.contains(':'));
    learnt(lab, &all).await?;
    // What a node gives back is told of no more.
    remove(lab, &[NAMESPACE]).await?;
    learnt(lab, &BTreeSet::new()).await?;
    servers(lab, NAMESPACE).await?;
    all_talk(lab, NAMESPACE).await
}

/// Waits until the router has learnt of these and of nothing else.
async fn learnt(lab: &Lab, wanted: &BTreeSet<String>) -> Result<()> {
    until("the router has the blocks of the nodes, and nothing else", || async {
        let text = exec(lab, &Target::Router, &["ip", "-j", "-4", "route", "show", "proto", "bird"]).await?;
        let routes: Vec<Value> = serde_json::from_str(if text.trim().is_empty() { "[]" } else { &text })?;
        let routes: BTreeSet<String> =
            routes.iter().filter_map(|route| Some(route["dst"].as_str()?.to_owned())).collect();
        ensure!(routes == *wanted, "it has {routes:?}, the blocks are {wanted:?}");
        Ok(())
    })
    .await
}

/// Whether BIRD on the nodes talks to the router about IPv4.
async fn bird(lab: &Lab, verb: &str) -> Result<()> {
    for node in NODES {
        let socket = paths::node(node).join("bird.ctl").display().to_string();
        exec(lab, &Target::Node(node.to_owned()), &["birdc", "-s", &socket, verb, "router_ipv4"]).await?;
    }
    Ok(())
}

/// A daemon of FRR, killed when it is dropped.
struct Daemon {
    child: Child,
    log: PathBuf,
    name: &'static str,
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if let Some(pid) = self.child.id() {
            let record = Path::new(RECORDS).join(format!("{}.{pid}", self.name));
            if let Err(error) = std::fs::remove_dir_all(&record)
                && error.kind() != std::io::ErrorKind::NotFound
            {
                eprintln!("clean-up: {}: {error}", record.display());
            }
        }
        if let Err(error) = self.child.start_kill() {
            eprintln!("clean-up: {error}");
        }
    }
}

/// The two daemons of a node; `number` counts from 1.
fn start(lab: &Lab, node: &Node, number: usize) -> Result<[Daemon; 2]> {
    let folder = paths::node(&node.name).join("frr");
    std::fs::create_dir_all(&folder)?;
    let user = User::from_name("frr")?.context("no user frr (Debian package frr)")?;
    chown(&folder, Some(user.uid), Some(user.gid))?;
    // One for both, as in production: each passes over what is the other's.
    let configuration = folder.join("frr.conf");
    std::fs::write(&configuration, configure(node, number)?)?;
    Ok([daemon(lab, node, "zebra", &folder)?, daemon(lab, node, "bgpd", &folder)?])
}

fn daemon(lab: &Lab, node: &Node, name: &'static str, folder: &Path) -> Result<Daemon> {
    let log = folder.join(format!("{name}.log"));
    let mut command = std::process::Command::new(Path::new(PROGRAMS).join(name));
    command.arg("-f").arg(folder.join("frr.conf")).arg("-z").arg(folder.join("zserv.api"));
    command.arg("-i").arg(folder.join(format!("{name}.pid"))).arg("--vty_socket").arg(folder);
    command.args(["-P", "0", "--log", "stdout"]);
    let file = std::fs::File::create(&log)?;
    command.env(paths::MARKER, lab.id()).stdin(Stdio::null()).stdout(file.try_clone()?).stderr(file);
    node.netns.enter(&mut command)?;
    let child = Command::from(command)
        .kill_on_drop(true)
        .spawn()
        .with_context(|| format!("starting {name} (Debian package frr)"))?;
    Ok(Daemon { child, log, name })
}

/// The example with the numbers and addresses of the lab.
fn configure(node: &Node, number: usize) -> Result<String> {
    let of = |nets: &[ipnet::IpNet]| {
        let net = nets.iter().find(|net| net.addr().is_ipv4()).context("no IPv4 address")?;
        anyhow::Ok(net.addr().to_string())
    };
    let replacements = [
        ("64601", (64_600 + number).to_string()),
        ("192.0.2.11", of(&node.addresses)?),
        ("192.0.2.1 ", of(&node.gateways)? + " "),
    ];
    let mut text = EXAMPLE.to_owned();
    for (from, to) in replacements {
        ensure!(text.contains(from), "the example has no {from}");
        text = text.replace(from, &to);
    }
    Ok(text)
}
