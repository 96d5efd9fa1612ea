//! A node loses its power and starts again. With the power go its namespace and those of its pods, all processes, what
//! is pinned and what is in `/run`; configuration and the container runtime's records are on disk and stay.

use super::background::Background;
use super::control::Request;
use super::{bpffs, objects};
use crate::cni::Attachment;
use crate::kubelet::Switch;
use crate::netns::Netns;
use crate::options::Networking;
use crate::paths;
use crate::process::{self, ProcessId};
use crate::state::State;
use crate::target::PodRecord;
use crate::topology::{self, Node};
use anyhow::{Context, ensure};
use kube::Client;
use std::collections::HashSet;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Duration;
use tracing::info;

/// Cuts the power of a node, starts one, or both.
pub(super) async fn serve(
    request: &Request,
    state: &State,
    client: &Client,
    background: &mut Background,
    switch: &Switch,
) -> anyhow::Result<()> {
    let find = |name: &str| state.topology.node(name).with_context(|| format!("there is no node {name}"));
    match request {
        Request::Reboot(name) => {
            let node = find(name)?;
            off(state, background, switch, node).await?;
            on(state, client, background, switch, node).await
        }
        Request::Off(name) => off(state, background, switch, find(name)?).await,
        Request::On(name) => on(state, client, background, switch, find(name)?).await,
    }
}

/// Returns when nothing of the node is left.
async fn off(state: &State, background: &mut Background, switch: &Switch, node: &Node) -> anyhow::Result<()> {
    let name = node.name.as_str();
    info!(node = name, "its power is cut");
    // First the link, so that nothing that ends can still say so.
    topology::unplug(&state.topology, node)?;
    background.stop(node);
    let namespaces = namespaces(node);
    switch.off(name).await?;
    let (id, killed) = (state.id.clone(), namespaces.clone());
    let rest =
        tokio::task::spawn_blocking(move || process::end(Duration::ZERO, || inside(&id, &killed))).await?;
    ensure!(rest.is_empty(), "processes of {name} that do not end: {rest:?}");
    for namespace in &namespaces {
        namespace.remove()?;
    }
    forget(node).with_context(|| format!("what {name} had in memory"))
}

/// Returns when Coil is ready on the node again.
async fn on(
    state: &State,
    client: &Client,
    background: &mut Background,
    switch: &Switch,
    node: &Node,
) -> anyhow::Result<()> {
    let name = node.name.as_str();
    info!(node = name, "it starts again");
    topology::plug(&state.topology, node)?;
    bpffs::folder(node)?;
    if state.options.wired_by() == Networking::Coil {
        background.routing_of(node)?;
    }
    switch.on(name).await?;
    if state.options.programs.is_some() {
        objects::coil_ready_on(client, state, name).await?;
    }
    Ok(())
}

/// A node's own namespace and those of its pods, those of attempts included.
fn namespaces(node: &Node) -> Vec<Netns> {
    let pods = PodRecord::all().into_iter().filter(|pod| pod.node == node.name && !pod.host_network);
    let attempts = Attachment::all().into_iter().filter(|attempt| attempt.node_netns == node.netns);
    let all: HashSet<Netns> =
        pods.map(|pod| pod.netns).chain(attempts.map(|attempt| attempt.netns)).collect();
    all.into_iter().chain([node.netns.clone()]).collect()
}

/// Processes of the lab in these namespaces.
fn inside(id: &str, namespaces: &[Netns]) -> Vec<ProcessId> {
    let inode = |path: &Path| std::fs::metadata(path).ok().map(|file| file.ino());
    let wanted: HashSet<u64> = namespaces.iter().filter_map(|namespace| inode(&namespace.path())).collect();
    let mut found = process::marked(Some(id));
    found.retain(|process| {
        let namespace = inode(Path::new(&format!("/proc/{}/ns/net", process.pid)));
        namespace.is_some_and(|namespace| wanted.contains(&namespace))
    });
    found
}

/// Removes pins, sockets and the like.
fn forget(node: &Node) -> io::Result<()> {
    let pins = paths::node_pins(&node.name);
    if pins.exists() {
        std::fs::remove_dir_all(pins)?;
    }
    for entry in std::fs::read_dir(paths::node(&node.name))? {
        let path = entry?.path();
        let kept = path.extension().is_some_and(|extension| extension == "conflist" || extension == "conf");
        if !kept {
            if path.is_dir() { std::fs::remove_dir_all(path)? } else { std::fs::remove_file(path)? }
        }
    }
    Ok(())
}
