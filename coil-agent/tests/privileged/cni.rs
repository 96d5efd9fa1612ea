//! The control side on the real kernel: from CNI ADD until the interface is gone, and over restarts.

#![expect(clippy::unwrap_used, reason = "tests")]

use std::future::Future;
use std::path::PathBuf;
use std::sync::Arc;

use coil_agent::cni::pod::{Call, PodApi, Pods};
use coil_agent::datapath::NodeDatapath;
use coil_agent::desired::GatewayState;
use coil_agent::index::{Change, EgressView, GatewayView, ObjectKey, PodView, SliceView};
use coil_agent::local::{adopt_pods, watch_links};
use coil_agent::metrics::StateMetrics;
use coil_agent::netlink::{Netlink, RtNetlink};
use coil_agent::state::{Input, Snapshot, State, StateHandle};
use coil_agent::writer::Writer;
use coil_runtime::tasks::Drain;
use k8s_openapi::api::core::v1::Pod;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::support::DEADLINE;
use crate::support::net::NetNs;
use crate::support::topology::{Topology, egress_name};

const UID: &str = "client-uid";

/// Knows one pod.
struct OnePod;

impl PodApi for OnePod {
    async fn get(&self, _namespace: &str, _name: &str) -> Result<Option<Pod>, kube::Error> {
        Ok(Some(object()))
    }
}

fn object() -> Pod {
    serde_json::from_value(serde_json::json!({
        "metadata": {"namespace": "demo", "name": "client", "uid": UID,
            "annotations": {"egress.coil.cybozu.com/internet": "nat"}},
        "spec": {"containers": []},
    }))
    .unwrap()
}

fn egress(destinations: &[&str]) -> EgressView {
    EgressView {
        key: ObjectKey::new("internet", "nat"),
        destinations: destinations.iter().map(|text| text.parse().unwrap()).collect(),
        ..EgressView::default()
    }
}

/// Everything of `coild` but watches and servers.
struct Agent {
    netlink: Arc<RtNetlink>,
    state: StateHandle,
    snapshots: watch::Receiver<Snapshot>,
    pods: Pods<OnePod, RtNetlink>,
    drain: Drain,
    tasks: Vec<JoinHandle<()>>,
}

/// What the test needs to know of its surroundings, inside the runtime.
#[derive(Clone)]
struct Surroundings {
    options: coil_agent::datapath::NodeOptions,
    call: Call,
    gateway: std::net::IpAddr,
    links: PathBuf,
    ifindex: u32,
}

impl Surroundings {
    fn of(topology: &Topology) -> Self {
        Self {
            options: topology.node_options(),
            call: Call {
                container: "c1".into(),
                netns: topology.client.net.path().display().to_string(),
                ifname: "eth0".into(),
                namespace: "demo".into(),
                pod: "client".into(),
                chained: true,
                addresses: vec![topology.client.address(false), topology.client.address(true)],
            },
            gateway: topology.gateway.address(false),
            links: topology.bpffs.node().join("links"),
            ifindex: topology.node.ifindex("vclient"),
        }
    }

    fn attached(&self) -> bool {
        ["from_pod", "to_pod"]
            .iter()
            .all(|program| self.links.join(format!("{}-{program}", self.ifindex)).exists())
    }

    async fn until_attached(&self, wanted: bool) {
        let waiting = async {
            while self.attached() != wanted {
                tokio::time::sleep(std::time::Duration::from_millis(10)).await;
            }
        };
        tokio::time::timeout(DEADLINE, waiting).await.unwrap();
    }
}

impl Agent {
    /// Starts with these pods in the API.
    async fn start(surroundings: &Surroundings, pods: Vec<PodView>) -> Self {
        fn reset<T>(objects: Vec<T>) -> Change<T> {
            Change::Reset { objects, unreadable: vec![] }
        }
        let netlink = Arc::new(RtNetlink::new().unwrap());
        let (state, handle, snapshots) = State::new();
        let datapath = NodeDatapath::open(surroundings.options.clone()).unwrap();
        let metrics = StateMetrics::register(&prometheus::Registry::new()).unwrap();
        let (writer, applied) = Writer::new(datapath, snapshots.clone(), metrics);
        let drain = Drain::new();
        let (links, adoption) = (
            watch_links(Arc::clone(&netlink), handle.clone(), snapshots.clone()),
            adopt_pods(Arc::clone(&netlink), handle.clone(), snapshots.clone()),
        );
        let writing = writer.run(drain.clone(), || {});
        let tasks = vec![
            tokio::spawn(state.run()),
            tokio::spawn(async move { writing.await.unwrap() }),
            tokio::spawn(async move { assert!(links.await.is_err(), "it ended by itself") }),
            tokio::spawn(async move { assert!(adoption.await.is_err(), "it ended by itself") }),
        ];
        handle.send(Input::Pods(reset(pods))).await.unwrap();
        handle.send(Input::Egresses(reset(vec![egress(&["0.0.0.0/0"])]))).await.unwrap();
        let slice = SliceView {
            key: egress(&[]).key,
            egress: egress_name(),
            gateways: [(surroundings.gateway, GatewayView::new(GatewayState::Ready))].into(),
        };
        handle.send(Input::Slices(reset(vec![slice]))).await.unwrap();
        handle.send(Input::Namespaces(reset(vec![]))).await.unwrap();
        let pods = Pods::new(OnePod, Arc::clone(&netlink), handle.clone(), snapshots.clone(), applied);
        Self { netlink, state: handle, snapshots, pods, drain, tasks }
    }

    async fn alias(&self, ifindex: u32) -> Option<String> {
        self.netlink.link(ifindex).await.unwrap().unwrap().alias
    }

    /// Ends it as a kill would: nothing is undone.
    async fn kill(self) {
        self.drain.cancel();
        for task in &self.tasks {
            task.abort();
        }
        for task in self.tasks {
            if let Err(error) = task.await {
                assert!(error.is_cancelled(), "{error}");
            }
        }
    }
}

fn in_runtime<F: Future<Output = ()>>(space: &NetNs, work: impl FnOnce() -> F + Send + 'static) {
    space.run(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async { work().await });
    });
}

#[test]
#[ignore = "privileged: needs root and the eBPF object"]
fn a_pod_is_served_from_add_until_its_interface_is_gone() {
    let topology = Topology::new();
    let surroundings = Surroundings::of(&topology);
    in_runtime(&topology.node, move || async move {
        let agent = Agent::start(&surroundings, vec![]).await;
        agent.pods.add(&surroundings.call).await.unwrap();
        assert!(surroundings.attached());
        assert_eq!(agent.alias(surroundings.ifindex).await.as_deref(), Some("COIL::client-uid:eth0"));
        agent.pods.check(&surroundings.call).await.unwrap();
        agent.kill().await;
        assert!(surroundings.attached());

        // A new process finds the pod by the alias of its interface.
        let agent = Agent::start(&surroundings, vec![PodView::of(&object()).unwrap()]).await;
        let mut snapshots = agent.snapshots.clone();
        snapshots.wait_for(|s| s.desired.pods.contains_key(UID)).await.unwrap();
        agent.pods.add(&surroundings.call).await.unwrap();

        // Neither DEL nor the end of the object take the policy away while the pod can still send.
        agent.pods.del(&surroundings.call).await.unwrap();
        let key = ObjectKey::new("demo", "client");
        agent.state.send(Input::Pods(Change::Delete(key))).await.unwrap();
        // The policy is still kept up to date; this also tells that the deletion was taken.
        agent
            .state
            .send(Input::Egresses(Change::Apply(egress(&["0.0.0.0/0", "10.9.0.0/16"]))))
            .await
            .unwrap();
        let followed = |snapshot: &Snapshot| {
            let policy = snapshot.desired.pods.get(UID).and_then(|pod| pod.policy.as_ref());
            policy.is_some_and(|policy| policy.v4.keys().any(|net| net.to_string() == "10.9.0.0/16"))
        };
        snapshots.wait_for(followed).await.unwrap();
        assert!(surroundings.attached());
        let status = std::process::Command::new("ip").args(["link", "del", "vclient"]).status().unwrap();
        assert!(status.success());
        surroundings.until_attached(false).await;
        assert!(agent.snapshots.borrow().desired.pods.is_empty());
        agent.kill().await;
    });
}

#[test]
#[ignore = "privileged: needs root and the eBPF object"]
fn a_pod_older_than_coil_is_found_by_its_route() {
    let topology = Topology::new();
    let surroundings = Surroundings::of(&topology);
    let mut pod = PodView::of(&object()).unwrap();
    pod.addresses = surroundings.call.addresses.clone();
    in_runtime(&topology.node, move || async move {
        let agent = Agent::start(&surroundings, vec![pod]).await;
        surroundings.until_attached(true).await;
        assert_eq!(agent.alias(surroundings.ifindex).await.as_deref(), Some("COIL::client-uid:eth0"));
        agent.kill().await;
    });
}
