//! The one owner of the picture: takes changes of all sources in order, computes what follows and
//! publishes it when it differs. Bursts coalesce; whoever reads sees the latest.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use ipnet::IpNet;
use tokio::sync::{mpsc, oneshot, watch};

use crate::desired::build::{Outcome, Picture};
use crate::desired::policy::PolicyCache;
use crate::desired::{DesiredState, EgressName, PodUid};
use crate::index::{Change, EgressView, NamespaceView, PodView, SliceView};
use crate::local::LocalPod;
use crate::netlink::Link;

/// Changes that wait to be taken; senders wait when there are more.
const QUEUE: usize = 1024;

/// A change of the picture.
#[derive(Debug)]
pub enum Input {
    /// What Egresses stood for when the datapath was last changed; comes before all else.
    Remembered(BTreeMap<EgressName, BTreeSet<IpNet>>),
    /// Pods of this node.
    Pods(Change<PodView>),
    /// Egresses.
    Egresses(Change<EgressView>),
    /// EndpointSlices.
    Slices(Change<SliceView>),
    /// Namespaces.
    Namespaces(Change<NamespaceView>),
    /// Interfaces of this host, and the number of the listing that found them.
    Links(Vec<Link>, u64),
    /// The zone of this node.
    Zone(Option<String>),
    /// Largest packet of the node's way out.
    UplinkMtu(Option<u32>),
    /// A pod's interface is known.
    Wired(PodUid, LocalPod),
    /// The interface with this index was removed.
    Unwired(u32),
    /// Pods without a known interface have been looked for.
    Adopted,
    /// The container runtime has wired a pod; answered when what follows is published.
    Added(Box<PodView>, LocalPod, oneshot::Sender<()>),
}

/// What follows from the picture.
#[derive(Clone, Debug, Default)]
pub struct Snapshot {
    /// Grows with each change of the desired state.
    pub revision: u64,
    /// For the datapath.
    pub desired: Arc<DesiredState>,
    /// Problems of pods, pods to look for, gateways of this node. The desired state in here is empty.
    pub rest: Arc<Outcome>,
}

/// Tells the picture of changes.
#[derive(Clone, Debug)]
pub struct StateHandle {
    sender: mpsc::Sender<Input>,
    listings: Arc<AtomicU64>,
}

/// The owner of the picture is gone: the process is ending.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("shutting down")]
pub struct Closed;

impl StateHandle {
    /// A handle whose changes the test takes itself.
    #[cfg(test)]
    pub(crate) fn for_tests() -> (Self, mpsc::Receiver<Input>) {
        let (sender, inputs) = mpsc::channel(QUEUE);
        (Self { sender, listings: Arc::default() }, inputs)
    }

    /// Hands over a change.
    pub async fn send(&self, input: Input) -> Result<(), Closed> {
        self.sender.send(input).await.map_err(|_| Closed)
    }

    /// Begins a listing of interfaces: pods that are wired after this call are not missed by it.
    #[must_use]
    pub fn begin_listing(&self) -> u64 {
        self.listings.fetch_add(1, Ordering::SeqCst) + 1
    }

    /// Tells that an interface was removed: the next listing need not find out.
    pub async fn unwired(&self, ifindex: u32) -> Result<(), Closed> {
        self.send(Input::Unwired(ifindex)).await
    }

    /// Hands over a pod that the container runtime has wired, and waits until what follows from it is
    /// published.
    pub async fn added(&self, pod: PodView, local: LocalPod) -> Result<(), Closed> {
        let (done, published) = oneshot::channel();
        self.send(Input::Added(Box::new(pod), local, done)).await?;
        published.await.map_err(|_| Closed)
    }
}

/// The owner.
#[derive(Debug)]
pub struct State {
    picture: Picture,
    cache: PolicyCache,
    inputs: mpsc::Receiver<Input>,
    listings: Arc<AtomicU64>,
    publisher: watch::Sender<Snapshot>,
}

impl State {
    /// An empty picture and the handle to fill it.
    #[must_use]
    pub fn new() -> (Self, StateHandle, watch::Receiver<Snapshot>) {
        Self::with(Picture::default())
    }

    /// The same with a picture that something is known of.
    #[must_use]
    pub fn with(picture: Picture) -> (Self, StateHandle, watch::Receiver<Snapshot>) {
        let (sender, inputs) = mpsc::channel(QUEUE);
        let (publisher, snapshots) = watch::channel(Snapshot::default());
        let listings = Arc::new(AtomicU64::new(0));
        let state = Self {
            picture,
            cache: PolicyCache::default(),
            inputs,
            listings: Arc::clone(&listings),
            publisher,
        };
        (state, StateHandle { sender, listings }, snapshots)
    }

    /// Takes changes until all handles are gone.
    pub async fn run(mut self) {
        let mut batch = Vec::with_capacity(QUEUE);
        while self.inputs.recv_many(&mut batch, QUEUE).await > 0 {
            let mut waiting = Vec::new();
            for input in batch.drain(..) {
                waiting.extend(self.take(input));
            }
            self.publish();
            for done in waiting {
                if done.send(()).is_err() {
                    tracing::debug!("whoever asked has given up; the pod stays known");
                }
            }
        }
    }

    fn take(&mut self, input: Input) -> Option<oneshot::Sender<()>> {
        let picture = &mut self.picture;
        match input {
            Input::Remembered(egresses) => {
                for (name, destinations) in egresses {
                    picture.index.egresses.remember(name, destinations);
                }
            }
            Input::Pods(change) => {
                let gone = picture.index.pods.change(change);
                self.retire(gone);
            }
            Input::Egresses(change) => picture.index.egresses.change(change),
            Input::Slices(change) => picture.index.slices.change(change),
            Input::Namespaces(change) => picture.index.namespaces.change(change),
            Input::Links(links, listing) => {
                for uid in picture.local.list(&links, listing) {
                    tracing::info!(pod.uid = uid, "the interface of a pod is gone");
                    picture.retired.remove(&uid);
                }
            }
            Input::Zone(zone) => picture.place.zone = zone,
            Input::UplinkMtu(mtu) => picture.uplink_mtu = mtu,
            Input::Unwired(ifindex) => {
                for uid in picture.local.unwire(ifindex) {
                    picture.retired.remove(&uid);
                }
            }
            Input::Adopted => picture.adopted = true,
            Input::Wired(uid, local) => self.wire(&uid, local),
            Input::Added(pod, local, done) => {
                let uid = pod.uid.clone();
                let gone = picture.index.pods.learn(*pod);
                self.retire(gone);
                self.wire(&uid, local);
                return Some(done);
            }
        }
        None
    }

    fn wire(&mut self, uid: &str, local: LocalPod) {
        let listing = self.listings.load(Ordering::SeqCst);
        for before in self.picture.local.wire(uid, local, listing) {
            self.picture.retired.remove(&before);
        }
    }

    /// Keeps pods that are gone while their interface exists.
    fn retire(&mut self, gone: Vec<PodView>) {
        for pod in gone {
            if self.picture.local.get(&pod.uid).is_some() {
                self.picture.retired.insert(pod.uid.clone(), pod);
            }
        }
        let known = &self.picture.index.pods;
        self.picture.retired.retain(|uid, _| known.get(uid).is_none());
    }

    fn publish(&mut self) {
        let mut outcome = self.picture.outcome(&mut self.cache);
        let desired = std::mem::take(&mut outcome.desired);
        self.publisher.send_if_modified(|snapshot| {
            let new_state = *snapshot.desired != desired;
            let new_rest = *snapshot.rest != outcome;
            if new_state {
                snapshot.desired = Arc::new(desired);
                snapshot.revision += 1;
            }
            if new_rest {
                snapshot.rest = Arc::new(outcome);
            }
            new_state || new_rest
        });
    }
}

impl Snapshot {
    /// Pods whose interface is not known, with their addresses; `None` until pods and interfaces have
    /// been listed.
    #[must_use]
    pub fn unwired(&self) -> Option<&BTreeMap<PodUid, Vec<IpAddr>>> {
        self.rest.unwired.as_ref()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

    use super::*;
    use crate::index::testing::pod;

    fn local(ifindex: u32) -> LocalPod {
        LocalPod { ifname: "eth0".into(), ifindex, mtu: 1500, addresses: vec!["10.0.0.1".parse().unwrap()] }
    }

    fn reset<T>(objects: Vec<T>) -> Change<T> {
        Change::Reset { objects, unreadable: vec![] }
    }

    fn link(index: u32) -> Link {
        Link {
            index,
            name: format!("veth{index}"),
            alias: Some("COIL::1:eth0".into()),
            kind: Some("veth".into()),
            mtu: 1500,
            peer: Some(2),
            peer_netns: Some(0),
            pod: None,
        }
    }

    async fn synced(handle: &StateHandle) {
        let listing = handle.begin_listing();
        handle.send(Input::Links(vec![], listing)).await.unwrap();
        handle.send(Input::Pods(reset(vec![]))).await.unwrap();
        handle.send(Input::Egresses(reset(vec![]))).await.unwrap();
        handle.send(Input::Slices(reset(vec![]))).await.unwrap();
        handle.send(Input::Namespaces(reset(vec![]))).await.unwrap();
        handle.send(Input::Adopted).await.unwrap();
    }

    #[tokio::test]
    async fn a_pod_is_published_before_its_add_is_answered() {
        let (state, handle, snapshots) = State::new();
        let task = tokio::spawn(state.run());
        synced(&handle).await;
        handle.added(pod("a", "1"), local(5)).await.unwrap();
        let snapshot = snapshots.borrow().clone();
        assert!(snapshot.desired.complete);
        assert_eq!(snapshot.desired.pods["1"].ifindex, 5);
        drop(handle);
        task.await.unwrap();
    }

    #[tokio::test]
    async fn a_deleted_pod_stays_until_its_interface_is_gone() {
        let (state, handle, mut snapshots) = State::new();
        let task = tokio::spawn(state.run());
        synced(&handle).await;
        handle.added(pod("a", "1"), local(5)).await.unwrap();
        handle.send(Input::Pods(Change::Delete(pod("a", "1").key))).await.unwrap();
        let listing = handle.begin_listing();
        handle.send(Input::Links(vec![link(5)], listing)).await.unwrap();
        handle.added(pod("b", "2"), local(6)).await.unwrap();
        assert_eq!(snapshots.borrow_and_update().desired.pods.len(), 2);
        let listing = handle.begin_listing();
        handle.send(Input::Links(vec![], listing)).await.unwrap();
        snapshots.wait_for(|s| s.desired.pods.is_empty()).await.unwrap();
        drop(handle);
        task.await.unwrap();
    }

    #[tokio::test]
    async fn what_does_not_matter_is_not_published() {
        let (state, handle, mut snapshots) = State::new();
        let task = tokio::spawn(state.run());
        synced(&handle).await;
        handle.added(pod("a", "1"), local(5)).await.unwrap();
        let revision = snapshots.borrow_and_update().revision;
        handle.added(pod("a", "1"), local(5)).await.unwrap();
        assert!(!snapshots.has_changed().unwrap());
        assert_eq!(snapshots.borrow().revision, revision);
        drop(handle);
        task.await.unwrap();
    }
}
