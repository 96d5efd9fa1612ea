//! ADD, DEL and CHECK of a pod in egress-only mode: another plugin has wired the pod, we learn which
//! interface is whose and answer when its policy holds.

pub mod ipam;

use std::collections::BTreeSet;
use std::future::Future;
use std::net::IpAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::Pod;
use kube::{Api, Client};
use tokio::sync::watch;
use tokio::time::Instant;

use super::error::{Failure, causes};
use super::locks::Locks;
use super::proto::{CniArgs, ErrorCode};
use super::server::Handler;
use crate::index::PodView;
use crate::local::{LocalPod, alias};
use crate::netlink::{Link, Netlink, NetlinkError};
use crate::state::{Snapshot, StateHandle};
use crate::writer::Applied;

/// Time for ADD; the plugin gives up after a minute.
const ADD_TIMEOUT: Duration = Duration::from_secs(50);
/// An Egress that was made together with its client may reach us a little later.
const EGRESS_GRACE: Duration = Duration::from_secs(5);

/// Reads pods from the API server itself, never from a cache.
pub trait PodApi: Send + Sync + 'static {
    /// A pod, if it exists.
    fn get(
        &self,
        namespace: &str,
        name: &str,
    ) -> impl Future<Output = Result<Option<Pod>, kube::Error>> + Send;
}

impl PodApi for Client {
    async fn get(&self, namespace: &str, name: &str) -> Result<Option<Pod>, kube::Error> {
        Api::<Pod>::namespaced(self.clone(), namespace).get_opt(name).await
    }
}

/// A call, checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Call {
    /// Identifier of the sandbox.
    pub container: String,
    /// Path of the network namespace; may be empty for DEL.
    pub netns: String,
    /// Name of the interface inside.
    pub ifname: String,
    /// Namespace of the pod.
    pub namespace: String,
    /// Name of the pod.
    pub pod: String,
    /// Another plugin has run before.
    pub chained: bool,
    /// Addresses of the previous result.
    pub addresses: Vec<IpAddr>,
}

impl Call {
    /// Checks the arguments of a call.
    pub fn of(args: CniArgs) -> Result<Self, Failure> {
        let call = Self::of_any(args)?;
        if call.namespace.is_empty() {
            return Err(missing("K8S_POD_NAMESPACE"));
        }
        if call.pod.is_empty() {
            return Err(missing("K8S_POD_NAME"));
        }
        Ok(call)
    }

    /// Checks the arguments of a call that does not need to know the pod: DEL.
    pub fn of_any(args: CniArgs) -> Result<Self, Failure> {
        let mut values = args.args;
        let mut take = |key: &str| values.remove(key).filter(|value| !value.is_empty());
        let call = Self {
            namespace: take("K8S_POD_NAMESPACE").unwrap_or_default(),
            pod: take("K8S_POD_NAME").unwrap_or_default(),
            chained: take("IS_CHAINED").is_some_and(|value| value == "true"),
            container: args.container_id,
            netns: args.netns,
            ifname: args.ifname,
            addresses: args
                .ips
                .iter()
                .map(|text| {
                    text.parse().map_err(|_| {
                        Failure::new(
                            ErrorCode::InvalidNetworkConfig,
                            ARGUMENTS,
                            format!("{text:?} is not an address"),
                        )
                    })
                })
                .collect::<Result<_, _>>()?,
        };
        if call.container.is_empty() {
            return Err(missing("the container ID"));
        }
        if call.ifname.is_empty() {
            return Err(missing("the interface name"));
        }
        Ok(call)
    }
}

const ARGUMENTS: &str = "failed to get CNI arguments";

fn missing(key: &str) -> Failure {
    Failure::new(ErrorCode::InvalidEnvironmentVariables, ARGUMENTS, format!("{key} is missing"))
}

impl<A: PodApi, N: Netlink + 'static> Handler for Pods<A, N> {
    async fn add(&self, call: Call) -> Result<Vec<u8>, Failure> {
        self.add(&call).await?;
        // Chained: the plugin answers with the previous result.
        Ok(Vec::new())
    }

    async fn del(&self, call: Call) -> Result<(), Failure> {
        self.del(&call).await
    }

    async fn check(&self, call: Call) -> Result<(), Failure> {
        self.check(&call).await
    }

    async fn gc(&self, valid: BTreeSet<(String, String)>) -> Result<(), Failure> {
        self.gc(&valid).await
    }

    fn status(&self) -> Result<(), Failure> {
        self.status()
    }
}

/// ADD, DEL and CHECK.
#[derive(Debug)]
pub struct Pods<A, N> {
    api: A,
    netlink: Arc<N>,
    state: StateHandle,
    snapshots: watch::Receiver<Snapshot>,
    applied: watch::Receiver<Applied>,
    locks: Locks,
    add_timeout: Duration,
    egress_grace: Duration,
}

impl<A: PodApi, N: Netlink> Pods<A, N> {
    /// Works with these.
    pub fn new(
        api: A,
        netlink: Arc<N>,
        state: StateHandle,
        snapshots: watch::Receiver<Snapshot>,
        applied: watch::Receiver<Applied>,
    ) -> Self {
        Self {
            api,
            netlink,
            state,
            snapshots,
            applied,
            locks: Locks::default(),
            add_timeout: ADD_TIMEOUT,
            egress_grace: EGRESS_GRACE,
        }
    }

    /// Learns of a pod and waits until the datapath holds what its annotations ask for.
    pub async fn add(&self, call: &Call) -> Result<(), Failure> {
        let deadline = Instant::now() + self.add_timeout;
        let _held = self.locks.hold(&call.container).await;
        if !call.chained {
            return Err(Failure::new(
                ErrorCode::InvalidNetworkConfig,
                "coil has to follow another plugin in egress-only mode",
                "configuration error: there is no prevResult",
            ));
        }
        if call.addresses.is_empty() {
            return Err(Failure::new(
                ErrorCode::InvalidNetworkConfig,
                "failed to get CNI arguments",
                "the previous result has no address",
            ));
        }
        if call.netns.is_empty() {
            return Err(Failure::new(
                ErrorCode::InvalidEnvironmentVariables,
                "failed to get CNI arguments",
                "the network namespace is missing",
            ));
        }
        let pod = self.pod(call).await?;
        if pod.host_network {
            return Ok(());
        }
        let link = self.interface(call).await?;
        self.netlink
            .set_alias(link.index, &alias(&pod.uid, &call.ifname))
            .await
            .map_err(|error| netlink_failure(&error))?;
        let uid = pod.uid.clone();
        let local = LocalPod {
            ifname: call.ifname.clone(),
            ifindex: link.index,
            mtu: link.mtu,
            addresses: call.addresses.clone(),
        };
        self.state
            .added(pod, local)
            .await
            .map_err(|closed| Failure::retry("failed to setup pod network egress", closed.to_string()))?;
        let revision = self.resolved(&uid, link.index, deadline).await?;
        self.programmed(&uid, revision, deadline).await
    }

    /// Nothing to undo: the plugin that made the interface removes it, and with it all that we have
    /// attached to it. Until then the pod's policy stays, since sockets of its namespace may still send.
    pub async fn del(&self, call: &Call) -> Result<(), Failure> {
        let _held = self.locks.hold(&call.container).await;
        Ok(())
    }

    /// Whether the datapath serves the pod at the interface that it has.
    pub async fn check(&self, call: &Call) -> Result<(), Failure> {
        const MESSAGE: &str = "check failed";
        let _held = self.locks.hold(&call.container).await;
        let pod = self.pod(call).await?;
        if pod.host_network {
            return Ok(());
        }
        let fail = |details: String| Failure::new(ErrorCode::Internal, MESSAGE, details);
        let snapshot = self.snapshots.borrow().clone();
        let ifindex = snapshot
            .desired
            .pods
            .get(&pod.uid)
            .map(|pod| pod.ifindex)
            .ok_or_else(|| fail("the interface of the pod is not known".into()))?;
        let link = self
            .netlink
            .link(ifindex)
            .await
            .map_err(|error| Failure::caused(ErrorCode::TryAgainLater, MESSAGE, &error))?
            .ok_or_else(|| fail(format!("interface {ifindex} does not exist")))?;
        if link.alias.as_deref() != Some(&alias(&pod.uid, &call.ifname)) {
            return Err(fail(format!("interface {} is not marked as this pod's", link.name)));
        }
        let applied = self.applied.borrow();
        if let Some(error) = applied.failed.get(&pod.uid) {
            return Err(fail(error.clone()));
        }
        if !applied.pods.contains(&pod.uid) {
            return Err(Failure::retry(MESSAGE, "the datapath does not hold the pod yet"));
        }
        Ok(())
    }

    /// Removes what is left of attachments that are not among these (container, interface). Nothing to do:
    /// see [`Self::del`].
    pub async fn gc(&self, _valid: &BTreeSet<(String, String)>) -> Result<(), Failure> {
        Ok(())
    }

    /// Whether ADD could be served now.
    pub fn status(&self) -> Result<(), Failure> {
        const MESSAGE: &str = "coild cannot serve ADD";
        let fail = |details: &str| Failure::new(ErrorCode::PluginNotAvailable, MESSAGE, details);
        if !self.snapshots.borrow().desired.complete {
            return Err(fail("the first lists from the API server are not complete"));
        }
        match &self.applied.borrow().error {
            Some(error) => Err(fail(error)),
            None => Ok(()),
        }
    }

    async fn pod(&self, call: &Call) -> Result<PodView, Failure> {
        const MESSAGE: &str = "failed to get pod";
        let name = || format!("pod {}/{}", call.namespace, call.pod);
        let pod = self
            .api
            .get(&call.namespace, &call.pod)
            .await
            .map_err(|error| Failure::retry(MESSAGE, format!("{}: {}", name(), causes(&error))))?
            .ok_or_else(|| {
                Failure::new(ErrorCode::UnknownContainer, MESSAGE, format!("{} does not exist", name()))
            })?;
        PodView::of(&pod)
            .ok_or_else(|| Failure::new(ErrorCode::Internal, MESSAGE, format!("{} has no UID", name())))
    }

    async fn interface(&self, call: &Call) -> Result<Link, Failure> {
        self.netlink
            .host_peer(Path::new(&call.netns), &call.ifname)
            .await
            .map_err(|error| netlink_failure(&error))
    }

    /// Waits until the desired state holds the pod with all its Egresses known.
    async fn resolved(&self, uid: &str, ifindex: u32, deadline: Instant) -> Result<u64, Failure> {
        let mut snapshots = self.snapshots.clone();
        let give_up = deadline.min(Instant::now() + self.egress_grace);
        // Problems are final only when the picture is whole and has had time to follow.
        let mut patience = deadline;
        loop {
            let (complete, revision, problem) = {
                let snapshot = snapshots.borrow_and_update();
                let known = snapshot.desired.pods.get(uid).map(|pod| pod.ifindex) == Some(ifindex);
                let problems = snapshot.rest.problems.get(uid);
                let problem: Vec<String> = problems
                    .into_iter()
                    .flat_map(|pod| &pod.problems)
                    .filter(|problem| problem.prevents_start())
                    .map(ToString::to_string)
                    .collect();
                let problem = (!problem.is_empty()).then(|| problem.join("; "));
                (snapshot.desired.complete, known.then_some(snapshot.revision), problem)
            };
            match (revision, &problem) {
                (Some(revision), None) if complete => return Ok(revision),
                (_, Some(_)) if complete => patience = patience.min(give_up),
                _ => {}
            }
            let failure = || match &problem {
                Some(problem) => Failure::retry("failed to setup NAT hook", problem.clone()),
                None => Failure::retry(
                    "failed to setup pod network egress",
                    if complete {
                        "the pod is gone"
                    } else {
                        "the first lists from the API server are not complete"
                    },
                ),
            };
            match tokio::time::timeout_at(patience, snapshots.changed()).await {
                Ok(Ok(())) => {}
                Ok(Err(_)) => {
                    return Err(Failure::retry("failed to setup pod network egress", "shutting down"));
                }
                Err(_) => return Err(failure()),
            }
        }
    }

    /// Waits until the datapath holds at least this revision of the pod.
    async fn programmed(&self, uid: &str, revision: u64, deadline: Instant) -> Result<(), Failure> {
        const MESSAGE: &str = "failed to setup pod network egress";
        let mut applied = self.applied.clone();
        let done = |applied: &Applied| applied.revision >= revision && applied.pods.contains(uid);
        let waited = tokio::time::timeout_at(deadline, applied.wait_for(done)).await;
        match waited {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(_)) => Err(Failure::retry(MESSAGE, "shutting down")),
            Err(_) => {
                let applied = self.applied.borrow();
                let reason = applied.failed.get(uid).or(applied.error.as_ref());
                Err(Failure::retry(MESSAGE, reason.map_or("the datapath is not programmed in time", |r| r)))
            }
        }
    }
}

fn netlink_failure(error: &NetlinkError) -> Failure {
    let code = match error {
        NetlinkError::NoHostPeer { .. } => ErrorCode::InvalidNetworkConfig,
        error if error.is_gone() => ErrorCode::UnknownContainer,
        _ => ErrorCode::TryAgainLater,
    };
    Failure::caused(code, "failed to find the interface of the pod", error)
}

#[cfg(test)]
mod tests;
