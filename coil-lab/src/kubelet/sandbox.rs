//! The network of one pod: a namespace of its own wired by CNI, or its node's.

use super::Host;
use super::events::{Events, News};
use crate::cni::{Attachment, CniError};
use crate::netns::{Netns, NetnsError};
use crate::paths;
use crate::topology::Node;
use k8s_openapi::api::core::v1::Pod;
use std::io;
use std::net::IpAddr;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;
use tracing::warn;

/// Pauses between attempts to make a sandbox or to remove it.
pub(super) const FIRST_BACKOFF: Duration = Duration::from_millis(200);
/// Longest pause.
pub(super) const LONGEST_BACKOFF: Duration = Duration::from_secs(3);
/// How often CNI DEL is tried before the namespace is removed without it.
pub(super) const DELETE_ATTEMPTS: u32 = 5;

/// What can go wrong.
#[derive(Debug, thiserror::Error)]
pub(super) enum SandboxError {
    #[error(transparent)]
    Netns(#[from] NetnsError),
    #[error(transparent)]
    Cni(#[from] CniError),
    #[error("cannot set up network namespace {}", netns.name())]
    Setup {
        netns: Netns,
        #[source]
        source: io::Error,
    },
    #[error("cannot read the CNI configuration {}", path.display())]
    Config {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

/// IPv6 settings of a new pod namespace, which must be there before CNI adds an address: duplicate address detection
/// costs a second per pod and can find nothing on these links.
const SYSCTLS: [(&str, &str); 4] = [
    ("net/ipv6/conf/all/disable_ipv6", "0"),
    ("net/ipv6/conf/default/disable_ipv6", "0"),
    ("net/ipv6/conf/default/accept_dad", "0"),
    ("net/ipv6/conf/default/dad_transmits", "0"),
];

/// The network of one pod.
#[derive(Clone, Debug)]
pub(super) struct Sandbox {
    pub(super) netns: Netns,
    pub(super) addresses: Vec<IpAddr>,
    attachment: Option<Attachment>,
}

impl Sandbox {
    /// The sandbox of a hostNetwork pod: there is nothing to make.
    pub(super) fn of_node(node: &Node) -> Self {
        Self {
            netns: node.netns.clone(),
            addresses: node.addresses.iter().map(ipnet::IpNet::addr).collect(),
            attachment: None,
        }
    }

    /// What is recorded of sandboxes on a node, with the UIDs of their pods: all of them are lost when it starts.
    pub(super) fn recorded(node: &Node) -> Vec<(String, Self)> {
        let of_node = Attachment::all().into_iter().filter(|one| one.node_netns == node.netns);
        of_node
            .map(|attachment| {
                let (uid, netns) = (attachment.uid.clone(), attachment.netns.clone());
                (uid, Self { netns, addresses: Vec::new(), attachment: Some(attachment) })
            })
            .collect()
    }

    /// Makes a namespace and wires it up. What a failed attempt has made is removed again. No attempt of no start of
    /// the node has the same identifier.
    pub(super) async fn create(
        host: &Host,
        node: &Node,
        pod: &Pod,
        (boot, attempt): (u32, u32),
    ) -> Result<Self, SandboxError> {
        let uid = pod.metadata.uid.clone().unwrap_or_default();
        let short = uid.replace('-', "");
        let netns = Netns::of(&format!("pod-{}", &short[..short.len().min(8)]));
        let path = paths::node(&node.name).join("10-lab.conflist");
        let config = std::fs::read(&path)
            .and_then(|text| Ok(serde_json::from_slice(&text)?))
            .map_err(|source| SandboxError::Config { path, source })?;
        let mut attachment = Attachment {
            container_id: format!("{short}{boot:04x}{attempt:04x}"),
            namespace: pod.metadata.namespace.clone().unwrap_or_default(),
            name: pod.metadata.name.clone().unwrap_or_default(),
            uid,
            netns: netns.clone(),
            node_netns: node.netns.clone(),
            marker: host.state.id.clone(),
            config,
            result: None,
        };
        netns.remove()?;
        netns.create()?;
        let made = async {
            prepare(&netns)?;
            Ok(attachment.add().await?)
        }
        .await;
        let mut sandbox = Self { netns, addresses: Vec::new(), attachment: Some(attachment) };
        match made {
            Ok(()) => {
                sandbox.addresses =
                    sandbox.attachment.as_ref().map(Attachment::addresses).unwrap_or_default();
                Ok(sandbox)
            }
            Err(error) => {
                // The failure of ADD is the one to report; DEL after it may well find nothing.
                if let Err(undo) = sandbox.delete().await {
                    tracing::debug!(%undo, "clean-up of a failed sandbox");
                    sandbox.netns.remove()?;
                }
                Err(error)
            }
        }
    }

    /// Undoes it. The namespace stays if CNI fails, so that another attempt finds it.
    pub(super) async fn delete(&self) -> Result<(), SandboxError> {
        if let Some(attachment) = &self.attachment {
            attachment.delete().await?;
            self.netns.remove()?;
        }
        Ok(())
    }

    /// Undoes it, after so many attempts without the help of CNI; tells the pod of those that have failed.
    pub(super) async fn discard(&self, attempts: u32, mut told: Option<(&mut Events, &Pod)>) {
        let mut backoff = FIRST_BACKOFF;
        for attempt in 1..=attempts {
            let Err(error) = self.delete().await else { return };
            let message = format!("{:#}", anyhow::Error::new(error));
            warn!(attempt, message, "sandbox not removed");
            if let Some((events, pod)) = &mut told {
                events.tell(pod, News::warning("FailedKillPod", message)).await;
            }
            tokio::time::sleep(backoff).await;
            backoff = (backoff * 2).min(LONGEST_BACKOFF);
        }
        if let Err(error) = self.abandon() {
            warn!(%error, "namespace not removed");
        }
    }

    /// Removes the namespace whatever CNI says.
    fn abandon(&self) -> Result<(), SandboxError> {
        if self.attachment.is_some() {
            self.netns.remove()?;
        }
        Ok(())
    }
}

fn prepare(netns: &Netns) -> Result<(), SandboxError> {
    let wrap = |source| SandboxError::Setup { netns: netns.clone(), source };
    netns.sysctls(&SYSCTLS)?.map_err(wrap)?;
    let mut command = Command::new("ip");
    command.args(["link", "set", "lo", "up"]).stdin(Stdio::null());
    netns.enter(&mut command)?;
    let status = command.status().map_err(wrap)?;
    if status.success() {
        Ok(())
    } else {
        Err(wrap(io::Error::other(format!("ip link set lo up: {status}"))))
    }
}
