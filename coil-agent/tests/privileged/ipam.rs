//! IPAM mode on the real kernel, from ADD to DEL: interface, routes and datapath, over a restart, many at once.
//! Only the API and the address service are played.

#![expect(clippy::unwrap_used, reason = "tests")]

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use coil_agent::cni::pod::ipam::{IpamPods, NamespaceApi};
use coil_agent::cni::pod::{Call, PodApi, Pods};
use coil_agent::cni::server::Handler;
use coil_agent::datapath::timeouts::Timeouts;
use coil_agent::datapath::{AttachChoice, IcmpLimit, NodeDatapath, NodeOptions, TunnelKind};
use coil_agent::index::{Change, PodView};
use coil_agent::ipam::{Addresses, Assigned, IpamError, NodeAddresses, Owner};
use coil_agent::local::{LocalPod, adopt_pods, watch_filters, watch_links};
use coil_agent::metrics::StateMetrics;
use coil_agent::netlink::RtNetlink;
use coil_agent::state::{Input, Snapshot, State};
use coil_agent::wiring::{Config, Told, Wire, Wiring, addresses};
use coil_agent::writer::Writer;
use coil_runtime::tasks::Drain;
use k8s_openapi::api::core::v1::Pod;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;

use crate::support::net::NetNs;
use crate::support::{BpfFs, DEADLINE, run};

/// Every pod exists, with its name as its UID; every namespace has the default pool.
#[derive(Clone)]
struct Everything;

fn object(name: &str) -> Pod {
    serde_json::from_value(serde_json::json!({
        "metadata": {"namespace": "demo", "name": name, "uid": name},
        "spec": {"containers": []},
    }))
    .unwrap()
}

impl PodApi for Everything {
    async fn get(&self, _namespace: &str, name: &str) -> Result<Option<Pod>, kube::Error> {
        Ok(Some(object(name)))
    }
}

impl NamespaceApi for Everything {
    async fn pool(&self, _namespace: &str) -> Result<Option<String>, kube::Error> {
        Ok(Some("default".into()))
    }
}

/// Hands out each address once.
#[derive(Clone, Default)]
struct Ledger(Arc<Mutex<(u8, BTreeMap<Owner, Assigned>)>>);

impl Addresses for Ledger {
    async fn allocate(&self, pool: &str, owner: &Owner) -> Result<Assigned, IpamError> {
        let mut ledger = self.0.lock().unwrap();
        if let Some(assigned) = ledger.1.get(owner) {
            return Ok(assigned.clone());
        }
        ledger.0 += 1;
        let next = ledger.0;
        let assigned = Assigned {
            pool: pool.to_owned(),
            ipv4: Some([10, 1, 0, next].into()),
            ipv6: Some(format!("fd01::{next:x}").parse().unwrap()),
        };
        ledger.1.insert(owner.clone(), assigned.clone());
        Ok(assigned)
    }

    async fn free(&self, owner: &Owner) -> Result<(), IpamError> {
        self.0.lock().unwrap().1.remove(owner);
        Ok(())
    }
}

/// `coild` without servers and watches.
struct Agent {
    pods: Arc<IpamPods<Everything, RtNetlink, Wiring, Ledger>>,
    wiring: Wiring,
    snapshots: watch::Receiver<Snapshot>,
    drain: Drain,
    tasks: Vec<JoinHandle<()>>,
}

impl Agent {
    async fn start(options: NodeOptions, ledger: Ledger, known: Vec<PodView>) -> Self {
        fn reset<T>(objects: Vec<T>) -> Change<T> {
            Change::Reset { objects, unreadable: vec![] }
        }
        let wiring = Wiring::new(Config {
            pod_table: 116,
            rule_priority: 2000,
            protocol: 30,
            compat_calico: false,
            register_from_main: false,
        });
        wiring.set_node(NodeAddresses {
            ipv4: Some([192, 168, 7, 1].into()),
            ipv6: Some("fd07::1".parse().unwrap()),
        });
        wiring.prepare_host(&mut Told::default()).await;
        let recovered = wiring.list().await.unwrap();
        let netlink = Arc::new(RtNetlink::new().unwrap());
        let (state, handle, snapshots) = State::new();
        let datapath = NodeDatapath::open_with(options, AttachChoice::Auto.mode(true)).unwrap();
        let metrics = StateMetrics::register(&prometheus::Registry::new()).unwrap();
        let (writer, applied) = Writer::new(datapath, snapshots.clone(), metrics);
        let drain = Drain::new();
        let filters = watch_filters(snapshots.clone(), writer.alarm());
        let writing = writer.run(drain.clone(), || {});
        let mut tasks = vec![tokio::spawn(state.run()), tokio::spawn(async move { writing.await.unwrap() })];
        for link in recovered {
            let local = LocalPod {
                ifname: link.found.owner.ifname.clone(),
                ifindex: link.index,
                mtu: link.mtu,
                addresses: addresses(&link.found.assigned),
            };
            handle.send(Input::Wired(link.uid.unwrap(), local)).await.unwrap();
        }
        let links = watch_links(Arc::clone(&netlink), handle.clone(), snapshots.clone());
        let adoption = adopt_pods(Arc::clone(&netlink), handle.clone(), snapshots.clone());
        tasks.push(tokio::spawn(async move { assert!(links.await.is_err()) }));
        tasks.push(tokio::spawn(async move { assert!(filters.await.is_err()) }));
        tasks.push(tokio::spawn(async move { assert!(adoption.await.is_err()) }));
        handle.send(Input::Pods(reset(known))).await.unwrap();
        handle.send(Input::Egresses(reset(vec![]))).await.unwrap();
        handle.send(Input::Slices(reset(vec![]))).await.unwrap();
        handle.send(Input::Namespaces(reset(vec![]))).await.unwrap();
        let inner = Pods::new(Everything, netlink, handle, snapshots.clone(), applied);
        let (failures, _) = mpsc::channel(1);
        let pods = Arc::new(IpamPods::new(inner, wiring.clone(), ledger, false, failures));
        Self { pods, wiring, snapshots, drain, tasks }
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

struct Bed {
    node: NetNs,
    bpffs: BpfFs,
}

impl Bed {
    fn new() -> Self {
        Self { node: NetNs::new("node"), bpffs: BpfFs::new() }
    }

    fn options(&self) -> NodeOptions {
        NodeOptions {
            bpffs_root: self.bpffs.root().to_owned(),
            fou_port: 5555,
            tunnel: TunnelKind::Fou,
            node_ipv4: Some([192, 168, 7, 1].into()),
            node_ipv6: Some("fd07::1".parse().unwrap()),
            max_flows: 4096,
            icmp: IcmpLimit::default(),
            shortcut: false,
            same_node_bypass: false,
            max_pod_flows: 0,
            address_only: false,
            timeouts: Timeouts::default(),
        }
    }

    fn run<F: Future<Output = ()>>(&self, work: impl FnOnce() -> F + Send + 'static) {
        self.node.run(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async { work().await });
        });
    }

    fn links(&self) -> PathBuf {
        self.bpffs.node().join("links")
    }
}

fn call(number: usize, netns: PathBuf) -> Call {
    Call {
        container: format!("c{number}"),
        netns: netns.display().to_string(),
        ifname: "eth0".into(),
        namespace: "demo".into(),
        pod: format!("pod-{number}"),
        chained: false,
        addresses: vec![],
    }
}

fn attached(links: &std::path::Path) -> usize {
    std::fs::read_dir(links).unwrap().count()
}

async fn until(what: &str, condition: impl Fn() -> bool) {
    let waiting = async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(DEADLINE, waiting)
        .await
        .unwrap_or_else(|_| unreachable!("gave up waiting for {what}"));
}

#[test]
#[ignore = "privileged: needs root and the eBPF object"]
fn a_pod_is_wired_and_served_from_add_to_del_over_a_restart() {
    let (bed, pod) = (Bed::new(), NetNs::new("pod"));
    let (options, links, call) = (bed.options(), bed.links(), call(1, pod.path()));
    bed.run(move || async move {
        let ledger = Ledger::default();
        let agent = Agent::start(options.clone(), ledger.clone(), vec![]).await;
        let result: serde_json::Value =
            serde_json::from_slice(&agent.pods.add(call.clone()).await.unwrap()).unwrap();
        assert_eq!(result["ips"][0]["address"], "10.1.0.1/32");
        // Both programs, before the answer.
        assert_eq!(attached(&links), 2);
        agent.pods.check(call.clone()).await.unwrap();
        let before = agent.snapshots.borrow().desired.pods["pod-1"].clone();
        agent.kill().await;

        // The API has not been told the addresses of the pod yet: the interface itself tells whose it is, and the
        // table of pods the addresses.
        let agent = Agent::start(options, ledger.clone(), vec![PodView::of(&object("pod-1")).unwrap()]).await;
        let mut snapshots = agent.snapshots.clone();
        snapshots.wait_for(|snapshot| snapshot.desired.complete).await.unwrap();
        assert_eq!(snapshots.borrow().desired.pods["pod-1"], before);
        let serving = async {
            while agent.pods.check(call.clone()).await.is_err() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(DEADLINE, serving).await.unwrap();
        assert_eq!(attached(&links), 2);

        agent.pods.del(call.clone()).await.unwrap();
        until("the programs to go", || attached(&links) == 0).await;
        assert!(agent.wiring.list().await.unwrap().is_empty());
        assert!(ledger.0.lock().unwrap().1.is_empty());
        agent.pods.del(call).await.unwrap();
        agent.kill().await;
    });
    assert!(!pod.ip("link show").contains("eth0"));
}

/// Other software may clear an interface: the pod's packets must not go past its policy for long.
#[test]
#[ignore = "privileged: needs root and the eBPF object"]
fn filters_that_somebody_removes_are_back_at_once() {
    let (bed, pod) = (Bed::new(), NetNs::new("pod"));
    let (options, call, space) = (bed.options(), call(1, pod.path()), bed.node.name().to_owned());
    bed.run(move || async move {
        let agent = Agent::start(options, Ledger::default(), vec![]).await;
        let mut snapshots = agent.snapshots.clone();
        snapshots.wait_for(|snapshot| snapshot.desired.complete).await.unwrap();
        let result: serde_json::Value = serde_json::from_slice(&agent.pods.add(call).await.unwrap()).unwrap();
        let link = result["interfaces"][1]["name"].as_str().unwrap().to_owned();
        let tc = |words: &str| run(&format!("ip netns exec {space} tc {words}"));
        let both = || {
            ["ingress", "egress"].iter().all(|hook| {
                // Not while the queueing discipline is missing.
                tc("qdisc show").contains(&format!("clsact ffff: dev {link}"))
                    && tc(&format!("filter show dev {link} {hook}")).contains("direct-action")
            })
        };
        for removal in
            ["qdisc del dev LINK clsact", "filter del dev LINK egress", "filter del dev LINK ingress"]
        {
            assert!(both());
            tc(&removal.replace("LINK", &link));
            // The writer looks by itself only every five minutes.
            until("the filters to be back", both).await;
        }
        agent.kill().await;
    });
}

#[test]
#[ignore = "privileged: needs root and the eBPF object"]
fn a_hundred_pods_are_served_at_once_and_removed_again() {
    const PODS: usize = 100;
    let bed = Bed::new();
    let spaces: Vec<NetNs> = (0..PODS).map(|number| NetNs::new(&format!("m{number}"))).collect();
    let calls: Vec<Call> =
        spaces.iter().enumerate().map(|(number, space)| call(number, space.path())).collect();
    let (options, links) = (bed.options(), bed.links());
    bed.run(move || async move {
        let ledger = Ledger::default();
        let agent = Agent::start(options, ledger.clone(), vec![]).await;
        let mut snapshots = agent.snapshots.clone();
        snapshots.wait_for(|snapshot| snapshot.desired.complete).await.unwrap();
        let begin = Instant::now();
        let all = |calls: Vec<Call>, add: bool| {
            let pods = Arc::clone(&agent.pods);
            async move {
                let tasks: Vec<_> = calls
                    .into_iter()
                    .map(|call| {
                        let pods = Arc::clone(&pods);
                        tokio::spawn(async move {
                            if add { pods.add(call).await.map(drop) } else { pods.del(call).await }
                        })
                    })
                    .collect();
                for task in tasks {
                    task.await.unwrap().unwrap();
                }
            }
        };
        all(calls.clone(), true).await;
        println!("ADD of {PODS} at once: {:?}", begin.elapsed());
        assert_eq!(attached(&links), 2 * PODS);
        let begin = Instant::now();
        all(calls.clone(), false).await;
        println!("DEL of {PODS} at once: {:?}", begin.elapsed());
        until("the programs to go", || attached(&links) == 0).await;
        assert!(ledger.0.lock().unwrap().1.is_empty());
        let (mut adds, mut dels) = (Vec::new(), Vec::new());
        for call in calls {
            let begin = Instant::now();
            agent.pods.add(call.clone()).await.unwrap();
            adds.push(begin.elapsed());
            let begin = Instant::now();
            agent.pods.del(call).await.unwrap();
            dels.push(begin.elapsed());
        }
        for (what, mut times) in [("ADD", adds), ("DEL", dels)] {
            times.sort();
            println!(
                "{what} alone: p50 {:?}, p99 {:?}",
                times[times.len() / 2],
                times[times.len() * 99 / 100]
            );
        }
        agent.kill().await;
    });
}
