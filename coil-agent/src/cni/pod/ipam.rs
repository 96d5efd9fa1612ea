//! ADD, DEL and CHECK of a pod in IPAM mode: addresses are handed out, the pod is wired, and the answer is given
//! when the datapath serves it. What fails is undone: an address is given back only when its interface is gone.

use std::collections::BTreeSet;
use std::future::Future;
use std::path::PathBuf;
use std::sync::Arc;

use coil_api::names;
use k8s_openapi::api::core::v1::Namespace;
use kube::{Api, Client};
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout_at};
use tracing::Instrument;

use super::{Call, PodApi, Pods};
use crate::cni::error::{Failure, causes};
use crate::cni::proto::ErrorCode;
use crate::cni::result::add_result;
use crate::cni::server::Handler;
use crate::index::PodView;
use crate::ipam::{Addresses, IpamError, Owner};
use crate::local::LocalPod;
use crate::netlink::Netlink;
use crate::wiring::{ErrorClass, Request, Wire, Wired, WiringError, addresses};

const WIRING: &str = "failed to setup pod network IPAM";
const ALLOCATION: &str = "failed to allocate address";

/// Reads namespaces from the API server.
pub trait NamespaceApi: Send + Sync + 'static {
    /// The pool that a namespace names; `None` if there is no such namespace.
    fn pool(&self, namespace: &str) -> impl Future<Output = Result<Option<String>, kube::Error>> + Send;
}

impl NamespaceApi for Client {
    async fn pool(&self, namespace: &str) -> Result<Option<String>, kube::Error> {
        let object = Api::<Namespace>::all(self.clone()).get_opt(namespace).await?;
        Ok(object.map(|object| pool_of(&object)))
    }
}

/// The pool of a namespace's pods.
#[must_use]
pub fn pool_of(namespace: &Namespace) -> String {
    let annotations = namespace.metadata.annotations.as_ref();
    annotations
        .and_then(|annotations| annotations.get(names::ANNOTATION_POOL))
        .filter(|pool| !pool.is_empty())
        .map_or(names::DEFAULT_POOL, String::as_str)
        .to_owned()
}

/// A pod that could not be wired, for an Event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AddFailure {
    /// UID of the pod.
    pub uid: String,
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// What failed.
    pub message: &'static str,
    /// Why.
    pub details: String,
}

/// ADD, DEL and CHECK in IPAM mode.
#[derive(Debug)]
pub struct IpamPods<A, N, W, I>(Arc<Inner<A, N, W, I>>);

#[derive(Debug)]
struct Inner<A, N, W, I> {
    pods: Pods<A, N>,
    wire: W,
    addresses: I,
    compat_calico: bool,
    failures: mpsc::Sender<AddFailure>,
}

impl<A, N, W, I> IpamPods<A, N, W, I>
where
    A: PodApi + NamespaceApi,
    N: Netlink + 'static,
    W: Wire,
    I: Addresses,
{
    /// Works with these. Failures of ADD are told to `failures`, as long as somebody takes them.
    pub fn new(
        pods: Pods<A, N>,
        wire: W,
        addresses: I,
        compat_calico: bool,
        failures: mpsc::Sender<AddFailure>,
    ) -> Self {
        Self(Arc::new(Inner { pods, wire, addresses, compat_calico, failures }))
    }

    /// Carries a call out to its end, also if the caller gives up: half a pod would be left behind.
    async fn to_the_end<T, F>(&self, work: impl FnOnce(Arc<Inner<A, N, W, I>>) -> F) -> Result<T, Failure>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, Failure>> + Send + 'static,
    {
        let task = tokio::spawn(work(Arc::clone(&self.0)).in_current_span());
        task.await.map_err(|error| Failure::new(ErrorCode::Internal, WIRING, error.to_string()))?
    }
}

impl<A, N, W, I> Handler for IpamPods<A, N, W, I>
where
    A: PodApi + NamespaceApi,
    N: Netlink + 'static,
    W: Wire,
    I: Addresses,
{
    async fn add(&self, call: Call) -> Result<Vec<u8>, Failure> {
        self.to_the_end(|inner| async move { inner.add(&call).await }).await
    }

    async fn del(&self, call: Call) -> Result<(), Failure> {
        self.to_the_end(|inner| async move { inner.del(&owner_of(&call)).await }).await
    }

    async fn check(&self, call: Call) -> Result<(), Failure> {
        self.0.check(&call).await
    }

    async fn gc(&self, valid: BTreeSet<(String, String)>) -> Result<(), Failure> {
        self.to_the_end(|inner| async move { inner.gc(&valid).await }).await
    }

    fn status(&self) -> Result<(), Failure> {
        self.0.pods.status()
    }
}

impl<A, N, W, I> Inner<A, N, W, I>
where
    A: PodApi + NamespaceApi,
    N: Netlink + 'static,
    W: Wire,
    I: Addresses,
{
    async fn add(&self, call: &Call) -> Result<Vec<u8>, Failure> {
        let deadline = Instant::now() + self.pods.add_timeout;
        if call.chained {
            return Err(Failure::new(
                ErrorCode::InvalidNetworkConfig,
                "coil must be the first plugin in the list when it hands out addresses",
                "configuration error",
            ));
        }
        if call.netns.is_empty() {
            return Err(Failure::new(
                ErrorCode::InvalidEnvironmentVariables,
                "failed to get CNI arguments",
                "the network namespace is missing",
            ));
        }
        let _container = self.pods.locks.hold(&call.container).await;
        // With names that follow from the pod, two sandboxes of one pod meet.
        let _pod = if self.compat_calico {
            Some(self.pods.locks.hold(&format!("{}/{}", call.namespace, call.pod)).await)
        } else {
            None
        };
        let asked = async { tokio::try_join!(self.pods.pod(call), self.pool(call)) };
        let (pod, pool) = timeout_at(deadline, asked)
            .await
            .unwrap_or_else(|_| Err(Failure::retry("failed to get pod", "no answer from the API server")))?;
        if pod.host_network {
            return Err(Failure::new(
                ErrorCode::InvalidNetworkConfig,
                WIRING,
                format!("pod {}/{} uses the network of the node", call.namespace, call.pod),
            ));
        }
        let told = (pod.uid.clone(), pod.key.clone());
        let result = self.attach(call, pod, &pool, deadline).await;
        if let Err(failure) = &result {
            let (uid, key) = told;
            let failure = AddFailure {
                uid,
                namespace: key.namespace,
                name: key.name,
                message: failure.message,
                details: failure.details.clone(),
            };
            // Nobody waits for an Event: kubelet is told in any case.
            if self.failures.try_send(failure).is_err() {
                tracing::debug!("no Event is published for this failure");
            }
        }
        result
    }

    async fn attach(
        &self,
        call: &Call,
        pod: PodView,
        pool: &str,
        deadline: Instant,
    ) -> Result<Vec<u8>, Failure> {
        let owner = owner_of(call);
        let assigned = self.addresses.allocate(pool, &owner).await.map_err(|error| ipam_failure(&error))?;
        let request = Request {
            owner: owner.clone(),
            assigned: assigned.clone(),
            netns: PathBuf::from(&call.netns),
            namespace: call.namespace.clone(),
            pod: call.pod.clone(),
            uid: pod.uid.clone(),
        };
        let wired = match self.wire.setup(request.clone()).await {
            Ok(wired) => wired,
            Err(error) => {
                self.undo(&owner).await;
                return Err(wiring_failure(WIRING, &error));
            }
        };
        let served = self.serve(call, pod, &wired, &request, deadline).await;
        if let Err(failure) = served {
            self.undo(&owner).await;
            return Err(failure);
        }
        let result = add_result(&call.ifname, &request.netns, &wired, &assigned);
        serde_json::to_vec(&result).map_err(|error| {
            Failure::new(ErrorCode::Internal, "failed to marshal the result", error.to_string())
        })
    }

    /// Waits until the datapath holds what the pod's annotations ask for.
    async fn serve(
        &self,
        call: &Call,
        pod: PodView,
        wired: &Wired,
        request: &Request,
        deadline: Instant,
    ) -> Result<(), Failure> {
        let uid = pod.uid.clone();
        let local = LocalPod {
            ifname: call.ifname.clone(),
            ifindex: wired.index,
            mtu: wired.mtu,
            addresses: addresses(&request.assigned),
        };
        self.pods
            .state
            .added(pod, local)
            .await
            .map_err(|closed| Failure::retry("failed to setup pod network egress", closed.to_string()))?;
        let revision = self.pods.resolved(&uid, wired.index, deadline).await?;
        self.pods.programmed(&uid, revision, deadline).await
    }

    /// Takes back what an ADD has done that failed later. What cannot be undone is left to DEL.
    async fn undo(&self, owner: &Owner) {
        if let Err(failure) = self.detach(owner).await {
            tracing::warn!(%owner, message = failure.message, error = failure.details, "cannot undo ADD");
        }
    }

    async fn del(&self, owner: &Owner) -> Result<(), Failure> {
        let _container = self.pods.locks.hold(&owner.container_id).await;
        self.detach(owner).await
    }

    /// Removes the interface, then frees the addresses: not the other way round, or two pods would have them.
    async fn detach(&self, owner: &Owner) -> Result<(), Failure> {
        let removed = self
            .wire
            .destroy(owner)
            .await
            .map_err(|error| wiring_failure("failed to destroy pod network", &error))?;
        for ifindex in removed {
            if self.pods.state.unwired(ifindex).await.is_err() {
                tracing::debug!("shutting down");
            }
        }
        self.addresses.free(owner).await.map_err(|error| {
            let code = if error.is_transient() { ErrorCode::TryAgainLater } else { ErrorCode::Internal };
            Failure::caused(code, "failed to free addresses", &error)
        })
    }

    async fn check(&self, call: &Call) -> Result<(), Failure> {
        const MESSAGE: &str = "check failed";
        let _container = self.pods.locks.hold(&call.container).await;
        let checked =
            self.wire.check(&owner_of(call)).await.map_err(|error| wiring_failure(MESSAGE, &error))?;
        let fail = |details: String| Err(Failure::new(ErrorCode::Internal, MESSAGE, details));
        let routed = addresses(&checked.found.assigned);
        if let Some(address) = call.addresses.iter().find(|address| !routed.contains(address)) {
            return fail(format!("{address} is not routed to the interface of this container"));
        }
        let snapshot = self.pods.snapshots.borrow().clone();
        let Some((uid, _)) = snapshot.desired.pods.iter().find(|(_, pod)| pod.ifindex == checked.index)
        else {
            return fail("the datapath does not know the interface of this container".into());
        };
        let applied = self.pods.applied.borrow();
        if let Some(error) = applied.failed.get(uid) {
            return fail(error.clone());
        }
        if !applied.pods.contains(uid) {
            return Err(Failure::retry(MESSAGE, "the datapath does not hold the pod yet"));
        }
        Ok(())
    }

    /// Removes what is left of attachments that the runtime does not know any more.
    async fn gc(&self, valid: &BTreeSet<(String, String)>) -> Result<(), Failure> {
        const MESSAGE: &str = "failed to collect garbage";
        let found = self.wire.list().await.map_err(|error| wiring_failure(MESSAGE, &error))?;
        let mut errors = Vec::new();
        for owner in found.into_iter().map(|link| link.found.owner) {
            if valid.contains(&(owner.container_id.clone(), owner.ifname.clone())) {
                continue;
            }
            tracing::info!(%owner, "removing the interface of a container that the runtime does not know");
            if let Err(failure) = self.del(&owner).await {
                errors.push(format!("{owner}: {}: {}", failure.message, failure.details));
            }
        }
        if errors.is_empty() { Ok(()) } else { Err(Failure::retry(MESSAGE, errors.join("; "))) }
    }

    async fn pool(&self, call: &Call) -> Result<String, Failure> {
        const MESSAGE: &str = "failed to get namespace";
        let name = &call.namespace;
        self.pods
            .api
            .pool(name)
            .await
            .map_err(|error| Failure::retry(MESSAGE, format!("namespace {name}: {}", causes(&error))))?
            .ok_or_else(|| {
                let details = format!("namespace {name} does not exist");
                Failure::new(ErrorCode::UnknownContainer, MESSAGE, details)
            })
    }
}

fn owner_of(call: &Call) -> Owner {
    Owner { container_id: call.container.clone(), ifname: call.ifname.clone() }
}

fn ipam_failure(error: &IpamError) -> Failure {
    let code = if error.is_transient() { ErrorCode::TryAgainLater } else { ErrorCode::InvalidNetworkConfig };
    Failure::caused(code, ALLOCATION, error)
}

fn wiring_failure(message: &'static str, error: &WiringError) -> Failure {
    let code = match error.class() {
        ErrorClass::Retry => ErrorCode::TryAgainLater,
        ErrorClass::Gone => ErrorCode::UnknownContainer,
        ErrorClass::Request => ErrorCode::InvalidEnvironmentVariables,
        ErrorClass::Configuration => ErrorCode::InvalidNetworkConfig,
        ErrorClass::Internal => ErrorCode::Internal,
    };
    Failure::caused(code, message, error)
}

#[cfg(test)]
mod tests;
