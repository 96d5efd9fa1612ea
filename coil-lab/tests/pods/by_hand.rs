//! Pods that a scenario wires itself, as a container runtime does: objects that the lab's kubelet leaves alone, network
//! namespaces, and calls of the node's CNI configuration.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use coil_lab::cni::{Attachment, CniError};
use coil_lab::drive::{STEP, apply, exec, kubectl, until};
use coil_lab::footprint::Footprint;
use coil_lab::netns::Netns;
use coil_lab::process::{self, ProcessId};
use coil_lab::{Lab, MIRROR_ANNOTATION, Target, paths};
use serde_json::{Value, json};
use tokio::task::JoinSet;

use crate::addresses::blocks;
use crate::support::remove;

/// "Try again later", of the CNI specification.
pub const TRY_AGAIN: u32 = 11;
/// Between two attempts of a runtime.
const PAUSE: Duration = Duration::from_millis(200);

/// Makes a namespace with pods on a node that nobody but the scenario wires.
pub async fn objects(lab: &Lab, namespace: &str, node: &str, names: &[String]) -> Result<()> {
    let mut text = format!("apiVersion: v1\nkind: Namespace\nmetadata: {{name: {namespace}}}\n");
    for name in names {
        let pod = json!({
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {
                "namespace": namespace, "name": name, "annotations": { MIRROR_ANNOTATION: "by-hand" },
            },
            "spec": { "nodeName": node, "containers": [{ "name": "main", "image": "none" }] },
        });
        text += &format!("---\n{pod}\n");
    }
    apply(lab, &text).await.map(drop)
}

/// What a node has when the pods of earlier scenarios are gone, and the blocks that they were in.
pub async fn quiet(lab: &Lab, node: &str) -> Result<Footprint> {
    until(&format!("{node} has no blocks"), || async {
        let blocks = blocks(lab, node).await?;
        ensure!(blocks.is_empty(), "{blocks:?}");
        Footprint::of(lab, node).await
    })
    .await
}

/// The network of one sandbox of a pod.
#[derive(Debug)]
pub struct Sandbox {
    /// What is told to the plugins.
    pub attachment: Attachment,
}

impl Sandbox {
    /// A network namespace, which is removed when this is dropped.
    pub fn new(lab: &Lab, node: &str, namespace: &str, pod: &str, container: &str) -> Result<Self> {
        let netns = Netns::of(&format!("hand-{container}"));
        netns.remove()?;
        netns.create()?;
        let path = paths::node(node).join("10-lab.conflist");
        let list = std::fs::read(&path).with_context(|| format!("reading {}", path.display()))?;
        let node_netns = lab.topology().node(node).context("no such node")?.netns.clone();
        let sandbox = Self {
            attachment: Attachment {
                container_id: container.to_owned(),
                namespace: namespace.to_owned(),
                name: pod.to_owned(),
                uid: container.to_owned(),
                netns,
                node_netns,
                marker: lab.id().to_owned(),
                config: serde_json::from_slice(&list)?,
                result: None,
            },
        };
        // As the lab's kubelet has it: detection of duplicates takes a second.
        let values =
            [("net/ipv6/conf/default/accept_dad", "0"), ("net/ipv6/conf/default/dad_transmits", "0")];
        sandbox.attachment.netns.sysctls(&values)??;
        Ok(sandbox)
    }

    /// Addresses that ADD has answered with, IPv4 first.
    pub fn addresses(&self) -> Vec<IpAddr> {
        self.attachment.addresses()
    }

    /// Addresses of the interface inside, those of the link left out.
    pub async fn inside(&self, lab: &Lab) -> Result<Vec<IpAddr>> {
        let mut command = std::process::Command::new("ip");
        command.args(["-j", "address", "show", "dev", "eth0"]).env(paths::MARKER, lab.id());
        self.attachment.netns.enter(&mut command)?;
        command.stdin(Stdio::null());
        let output = tokio::process::Command::from(command).output().await.context("running ip")?;
        ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let links: Value = serde_json::from_slice(&output.stdout)?;
        let all = links[0]["addr_info"].as_array().context("no addresses")?.iter();
        let global = all.filter(|address| address["scope"] == "global");
        Ok(global.filter_map(|address| address["local"].as_str()?.parse().ok()).collect())
    }

    /// Repeats ADD until it succeeds; whoever refuses must say that it is worth it.
    pub async fn add(&mut self) -> Result<()> {
        let start = Instant::now();
        loop {
            match self.attachment.add().await {
                Ok(()) => return Ok(()),
                Err(error) => worth_another(error, start)?,
            }
            tokio::time::sleep(PAUSE).await;
        }
    }

    /// Repeats DEL in the same way.
    pub async fn delete(&self) -> Result<()> {
        let start = Instant::now();
        loop {
            match self.attachment.delete().await {
                Ok(()) => return Ok(()),
                Err(error) => worth_another(error, start)?,
            }
            tokio::time::sleep(PAUSE).await;
        }
    }
}

impl Drop for Sandbox {
    fn drop(&mut self) {
        if let Err(error) = self.attachment.netns.remove() {
            eprintln!("clean-up: {error}");
        }
    }
}

/// Fails unless a refusal is one that another attempt may cure, and there is time for one.
fn worth_another(error: CniError, start: Instant) -> Result<()> {
    let code = refusal(&error).with_context(|| format!("{error:#}"))?;
    ensure!(code == TRY_AGAIN, "{error:#}");
    ensure!(start.elapsed() < STEP, "for {:?}: {error:#}", start.elapsed());
    Ok(())
}

/// The code that a plugin has refused with.
pub fn refusal(error: &CniError) -> Option<u32> {
    match error {
        CniError::Refused { code, .. } => Some(*code),
        _ => None,
    }
}

/// Carries work out on many sandboxes at a time; the first failure is reported when all have ended.
pub async fn together<F, W>(sandboxes: Vec<Sandbox>, work: W) -> Result<Vec<Sandbox>>
where
    W: Fn(Sandbox) -> F,
    F: Future<Output = (Sandbox, Result<()>)> + Send + 'static,
{
    let mut running = JoinSet::new();
    for sandbox in sandboxes {
        running.spawn(work(sandbox));
    }
    let (mut done, mut first) = (Vec::new(), Ok(()));
    while let Some(ended) = running.join_next().await {
        let (sandbox, outcome) = ended?;
        first = first.and(outcome.with_context(|| sandbox.attachment.container_id.clone()));
        done.push(sandbox);
    }
    first.map(|()| done)
}

/// The process of a node's `coild`.
pub fn coild(lab: &Lab, node: &str) -> Result<ProcessId> {
    let ours: BTreeSet<i32> = process::marked(Some(lab.id())).iter().map(|process| process.pid).collect();
    let found = process::with_variable("COIL_NODE_NAME", Some(node)).into_iter().find(|process| {
        let line = std::fs::read(format!("/proc/{}/cmdline", process.pid)).unwrap_or_default();
        let program = line.split(|byte| *byte == 0).next().unwrap_or_default();
        ours.contains(&process.pid) && (program == b"coild" || program.ends_with(b"/coild"))
    });
    match found {
        Some(process) => Ok(process),
        None => bail!("no coild runs on {node}"),
    }
}

/// Fails unless the node reaches all of these addresses.
pub async fn reachable(lab: &Lab, node: &str, addresses: Vec<IpAddr>) -> Result<()> {
    let mut running = JoinSet::new();
    for address in addresses {
        let (lab, place) = (lab.clone(), Target::Node(node.to_owned()));
        running.spawn(async move {
            // The first packet may be lost while a neighbour is asked for.
            exec(&lab, &place, &["ping", "-c", "3", "-i", "0.2", "-W", "2", &address.to_string()])
                .await
                .with_context(|| format!("{address}"))
        });
    }
    let mut first = Ok(());
    while let Some(ended) = running.join_next().await {
        first = first.and(ended?.map(drop));
    }
    first
}

/// Deletes a namespace of such pods: no kubelet ends them.
pub async fn remove_objects(lab: &Lab, namespace: &str) -> Result<()> {
    let force = ["delete", "pod", "--all", "--force", "--grace-period=0", "--namespace", namespace];
    kubectl(lab, &force, "").await?;
    remove(lab, &[namespace]).await
}
