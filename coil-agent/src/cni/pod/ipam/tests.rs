#![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::sync::Mutex;
use std::time::Duration;

use serde_json::{Value, json};

use super::*;
use crate::cni::plugin::{Environment, run};
use crate::cni::pod::tests::{FakeApi, FakeDatapath, NETNS, World, args};
use crate::cni::proto::CniArgs;
use crate::cni::server;
use crate::index::testing::egress;
use crate::ipam::{Assigned, Found};
use crate::metrics::GrpcMetrics;
use crate::netlink::fake::FakeNetlink;
use crate::wiring::Link;

impl NamespaceApi for FakeApi {
    async fn pool(&self, namespace: &str) -> Result<Option<String>, kube::Error> {
        Ok(match namespace {
            "demo" => Some("default".into()),
            "annotated" => Some("global".into()),
            _ => None,
        })
    }
}

/// Addresses from memory: one for each owner, from a pool of two families or one.
#[derive(Clone, Default)]
struct FakeAddresses(Arc<Mutex<Ledger>>);

#[derive(Default)]
struct Ledger {
    given: BTreeMap<Owner, Assigned>,
    next: u8,
    refuse: Option<IpamError>,
    stuck: bool,
}

impl Addresses for FakeAddresses {
    async fn allocate(&self, pool: &str, owner: &Owner) -> Result<Assigned, IpamError> {
        let mut ledger = self.0.lock().unwrap();
        if let Some(error) = &ledger.refuse {
            return Err(error.clone());
        }
        if let Some(assigned) = ledger.given.get(owner) {
            return Ok(assigned.clone());
        }
        ledger.next += 1;
        let next = ledger.next;
        let assigned = match pool {
            "global" => Assigned { pool: pool.into(), ipv4: Some([8, 8, 8, 8].into()), ipv6: None },
            _ => Assigned {
                pool: pool.into(),
                ipv4: Some([10, 1, 0, next].into()),
                ipv6: Some(format!("fd01::{next:x}").parse().unwrap()),
            },
        };
        ledger.given.insert(owner.clone(), assigned.clone());
        Ok(assigned)
    }

    async fn free(&self, owner: &Owner) -> Result<(), IpamError> {
        let mut ledger = self.0.lock().unwrap();
        if ledger.stuck {
            return Err(IpamError::NotReady { source: None });
        }
        ledger.given.remove(owner);
        Ok(())
    }
}

/// Interfaces from memory.
#[derive(Clone, Default)]
struct FakeWire(Arc<Mutex<Links>>);

#[derive(Default)]
struct Links {
    links: BTreeMap<Owner, Link>,
    next: u32,
    /// All attempts fail in this way.
    broken: Option<i32>,
    undeletable: bool,
    /// ADD waits here.
    gate: Option<Arc<tokio::sync::Semaphore>>,
}

fn kernel(errno: i32) -> WiringError {
    WiringError::Kernel { operation: "do anything".into(), source: std::io::Error::from_raw_os_error(errno) }
}

impl Wire for FakeWire {
    async fn setup(&self, request: Request) -> Result<Wired, WiringError> {
        let gate = self.0.lock().unwrap().gate.clone();
        if let Some(gate) = gate {
            gate.acquire().await.unwrap().forget();
        }
        let mut links = self.0.lock().unwrap();
        if let Some(errno) = links.broken {
            return Err(kernel(errno));
        }
        if !request.netns.starts_with("/run/netns") {
            let source = std::io::Error::from_raw_os_error(libc::ENOENT);
            return Err(WiringError::Namespace { path: request.netns, source });
        }
        links.next += 1;
        let index = 100 + links.next;
        let found = Found { owner: request.owner.clone(), assigned: request.assigned };
        links.links.insert(request.owner, Link { found, index, mtu: 1500, uid: Some(request.uid) });
        Ok(Wired { index, name: format!("veth{index}"), mtu: 1500, mac: [2; 6], mac_inside: [6; 6] })
    }

    async fn destroy(&self, owner: &Owner) -> Result<Vec<u32>, WiringError> {
        let mut links = self.0.lock().unwrap();
        if links.undeletable {
            return Err(kernel(libc::EBUSY));
        }
        Ok(links.links.remove(owner).map(|link| link.index).into_iter().collect())
    }

    async fn check(&self, owner: &Owner) -> Result<Link, WiringError> {
        let links = self.0.lock().unwrap();
        links.links.get(owner).cloned().ok_or_else(|| WiringError::Missing { owner: owner.to_string() })
    }

    async fn list(&self) -> Result<Vec<Link>, WiringError> {
        Ok(self.0.lock().unwrap().links.values().cloned().collect())
    }
}

type Tested = IpamPods<FakeApi, FakeNetlink, FakeWire, FakeAddresses>;

struct Ipam {
    world: World,
    pods: Tested,
    wire: FakeWire,
    addresses: FakeAddresses,
    failures: mpsc::Receiver<AddFailure>,
}

impl Ipam {
    /// With a pod, and everything listed.
    async fn new() -> Self {
        Self::with(|_| {}).await
    }

    async fn with(change: impl FnOnce(&mut Pods<FakeApi, FakeNetlink>)) -> Self {
        let mut world = World::new();
        world.api.set("a", None);
        world.listed(vec![egress("x", &["8.0.0.0/8"])]).await;
        let (wire, addresses) = (FakeWire::default(), FakeAddresses::default());
        let (sender, failures) = mpsc::channel(8);
        let mut inner = world.pods.take().unwrap();
        change(&mut inner);
        let pods = IpamPods::new(inner, wire.clone(), addresses.clone(), false, sender);
        Self { world, pods, wire, addresses, failures }
    }

    async fn add(&self, call: &Call) -> Result<Value, Failure> {
        let bytes = self.pods.add(call.clone()).await?;
        Ok(serde_json::from_slice(&bytes).unwrap())
    }

    #[track_caller]
    fn nothing_is_left(&self) {
        assert_eq!(self.wire.0.lock().unwrap().links.len(), 0);
        assert_eq!(self.addresses.0.lock().unwrap().given.len(), 0);
    }

    fn held(&self, datapath: &FakeDatapath) -> Vec<(String, u32, Option<Ipv4Addr>)> {
        let state = datapath.state.lock().unwrap();
        state.pods.iter().map(|(uid, pod)| (uid.clone(), pod.ifindex, pod.ipv4)).collect()
    }
}

fn ipam_args() -> CniArgs {
    let mut args = args();
    args.args.insert("IS_CHAINED".into(), "false".into());
    args.ips.clear();
    args.interfaces.clear();
    args
}

fn call() -> Call {
    Call::of(ipam_args()).unwrap()
}

#[tokio::test]
async fn a78_add_of_a_pod_that_does_not_exist() {
    let ipam = Ipam::new().await;
    let failure = ipam.add(&Call { pod: "nobody".into(), ..call() }).await.unwrap_err();
    assert_eq!((failure.code, failure.message), (ErrorCode::UnknownContainer, "failed to get pod"));
    let failure = ipam.add(&Call { namespace: "nowhere".into(), ..call() }).await.unwrap_err();
    assert_eq!((failure.code, failure.message), (ErrorCode::UnknownContainer, "failed to get namespace"));
    ipam.nothing_is_left();
}

/// The original answers 999 to both; the code says what is wrong.
#[test]
fn a79_add_without_namespace() {
    let mut args = ipam_args();
    args.args.remove("K8S_POD_NAMESPACE");
    let failure = Call::of(args.clone()).unwrap_err();
    assert_eq!(failure.code, ErrorCode::InvalidEnvironmentVariables);
    assert_eq!(failure.details, "K8S_POD_NAMESPACE is missing");
    // DEL has to work with what there is.
    assert!(Call::of_any(args).is_ok());
}

#[test]
fn a80_add_without_name() {
    let mut args = ipam_args();
    args.args.insert("K8S_POD_NAME".into(), String::new());
    let failure = Call::of(args.clone()).unwrap_err();
    assert_eq!(failure.code, ErrorCode::InvalidEnvironmentVariables);
    assert_eq!(failure.details, "K8S_POD_NAME is missing");
    assert!(Call::of_any(args).is_ok());
}

#[tokio::test]
async fn a81_add_answers_with_both_addresses_when_the_datapath_holds_the_pod() {
    let mut ipam = Ipam::new().await;
    let result = ipam.add(&call()).await.unwrap();
    assert_eq!(
        result,
        json!({
            "cniVersion": "1.1.0",
            "interfaces": [
                {"name": "eth0", "mac": "06:06:06:06:06:06", "sandbox": NETNS},
                {"name": "veth101", "mac": "02:02:02:02:02:02"},
            ],
            "ips": [
                {"address": "10.1.0.1/32", "interface": 0},
                {"address": "fd01::1/128", "interface": 0},
            ],
            "dns": {},
        })
    );
    assert_eq!(
        ipam.held(&ipam.world.datapath),
        [("uid-a".to_owned(), 101, Some(Ipv4Addr::new(10, 1, 0, 1)))]
    );
    // The same again: other interface, same addresses.
    let again = ipam.add(&call()).await.unwrap();
    assert_eq!(again["ips"], result["ips"]);
    assert_eq!(ipam.held(&ipam.world.datapath)[0].1, 102);
    assert!(ipam.failures.try_recv().is_err());
}

/// Through the plugin, the socket and the server; log fields and metrics are those of the original.
#[tokio::test(flavor = "multi_thread")]
async fn a81_the_plugin_prints_the_result_in_its_own_version() {
    let ipam = Ipam::new().await;
    let socket = std::env::temp_dir().join(format!("coild-ipam-{}.sock", std::process::id()));
    let listener = server::bind(&socket).unwrap();
    let registry = prometheus::Registry::new();
    let metrics = GrpcMetrics::register(&registry, "pkg.cnirpc.CNI", &server::METHODS).unwrap();
    let server = tokio::spawn(server::serve(listener, ipam.pods, metrics, ipam.world.drain.clone()));
    let config = json!({"cniVersion": "0.4.0", "name": "net", "type": "coil", "socket": socket});
    let call = |command: &str, with_pod: bool| {
        let (command, input) = (command.to_owned(), config.to_string());
        tokio::task::spawn_blocking(move || {
            let mut pairs = vec![
                ("CNI_COMMAND", command),
                ("CNI_CONTAINERID", "c1".into()),
                ("CNI_NETNS", NETNS.into()),
                ("CNI_IFNAME", "eth0".into()),
            ];
            if with_pod {
                pairs.push(("CNI_ARGS", "K8S_POD_NAMESPACE=demo;K8S_POD_NAME=a".into()));
            }
            let variables = pairs.into_iter().map(|(k, v)| (k.to_owned(), v)).collect();
            run(&Environment { variables }, input.as_bytes()).0
        })
    };
    let result = call("ADD", true).await.unwrap().unwrap().unwrap();
    assert_eq!(result["cniVersion"], "0.4.0");
    assert_eq!(result["ips"][0]["address"], "10.1.0.1/32");
    assert_eq!(result["ips"][0]["version"], "4");
    assert_eq!(result["interfaces"][0]["sandbox"], NETNS);
    assert_eq!(call("DEL", false).await.unwrap().unwrap(), None);
    let text = String::from_utf8(coil_runtime::metrics::render(&registry).unwrap()).unwrap();
    for line in [
        r#"grpc_server_handled_total{grpc_code="OK",grpc_method="Add",grpc_service="pkg.cnirpc.CNI",grpc_type="unary"} 1"#,
        r#"grpc_server_handling_seconds_count{grpc_method="Add",grpc_service="pkg.cnirpc.CNI",grpc_type="unary"} 1"#,
    ] {
        assert!(text.contains(line), "{line} in\n{text}");
    }
    ipam.world.drain.cancel();
    server.await.unwrap().unwrap();
    std::fs::remove_file(&socket).unwrap();
}

#[tokio::test]
async fn a82_what_cannot_be_wired_is_undone_and_later_works_from_the_pool_of_the_namespace() {
    let mut ipam = Ipam::new().await;
    ipam.wire.0.lock().unwrap().broken = Some(libc::ENOBUFS);
    let call = Call { namespace: "annotated".into(), ..call() };
    let failure = ipam.add(&call).await.unwrap_err();
    assert_eq!(
        (failure.code, failure.message),
        (ErrorCode::TryAgainLater, "failed to setup pod network IPAM")
    );
    ipam.nothing_is_left();
    let told = ipam.failures.try_recv().unwrap();
    assert_eq!((told.uid.as_str(), told.name.as_str()), ("uid-a", "a"));
    assert!(told.details.contains("cannot do anything"), "{told:?}");
    ipam.wire.0.lock().unwrap().broken = None;
    let result = ipam.add(&call).await.unwrap();
    assert_eq!(result["ips"], json!([{"address": "8.8.8.8/32", "interface": 0}]));
}

#[tokio::test]
async fn a83_failures_of_allocation_have_the_code_that_fits() {
    let ipam = Ipam::new().await;
    let pool = || "default".to_owned();
    for (error, code) in [
        (IpamError::Exhausted { pool: pool() }, ErrorCode::TryAgainLater),
        (IpamError::Refused { pool: pool(), reason: "why".into() }, ErrorCode::InvalidNetworkConfig),
        (IpamError::Timeout { pool: pool(), source: None }, ErrorCode::TryAgainLater),
        (IpamError::NotReady { source: None }, ErrorCode::TryAgainLater),
        (IpamError::UnknownPool { pool: pool() }, ErrorCode::InvalidNetworkConfig),
        (IpamError::PoolDeleted { pool: pool() }, ErrorCode::InvalidNetworkConfig),
    ] {
        let text = error.to_string();
        ipam.addresses.0.lock().unwrap().refuse = Some(error);
        let failure = ipam.add(&call()).await.unwrap_err();
        assert_eq!((failure.code, failure.message), (code, "failed to allocate address"));
        assert!(failure.details.contains(&text), "{failure:?}");
        ipam.nothing_is_left();
    }
}

#[tokio::test]
async fn a84_check_follows_what_there_is() {
    let ipam = Ipam::new().await;
    let code = |result: Result<(), Failure>| result.unwrap_err().code;
    assert_eq!(code(ipam.pods.check(call()).await), ErrorCode::Internal);
    ipam.add(&call()).await.unwrap();
    ipam.pods.check(call()).await.unwrap();
    // The runtime tells what it was given.
    let with = |address: &str| Call { addresses: vec![address.parse().unwrap()], ..call() };
    ipam.pods.check(with("10.1.0.1")).await.unwrap();
    assert_eq!(code(ipam.pods.check(with("10.1.0.2")).await), ErrorCode::Internal);
    ipam.pods.del(call()).await.unwrap();
    assert_eq!(code(ipam.pods.check(call()).await), ErrorCode::Internal);
}

#[tokio::test]
async fn a85_del_removes_the_interface_before_the_addresses_are_free() {
    let ipam = Ipam::new().await;
    ipam.add(&call()).await.unwrap();
    // The interface stays: so must the addresses, or another pod would have them too.
    ipam.wire.0.lock().unwrap().undeletable = true;
    let failure = ipam.pods.del(call()).await.unwrap_err();
    assert_eq!((failure.code, failure.message), (ErrorCode::TryAgainLater, "failed to destroy pod network"));
    assert_eq!(ipam.addresses.0.lock().unwrap().given.len(), 1);
    ipam.wire.0.lock().unwrap().undeletable = false;
    ipam.addresses.0.lock().unwrap().stuck = true;
    let failure = ipam.pods.del(call()).await.unwrap_err();
    assert_eq!((failure.code, failure.message), (ErrorCode::TryAgainLater, "failed to free addresses"));
    ipam.addresses.0.lock().unwrap().stuck = false;
    // It can be repeated, before and after it has succeeded.
    ipam.pods.del(call()).await.unwrap();
    ipam.nothing_is_left();
    ipam.pods.del(call()).await.unwrap();
    // The datapath forgets the interface without waiting for a listing.
    let forgotten = ipam.world.datapath.clone();
    let done = async {
        while !ipam.held(&forgotten).is_empty() {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(5), done).await.unwrap();
}

#[tokio::test]
async fn after_another_plugin_or_without_a_name_space_it_is_refused() {
    let ipam = Ipam::new().await;
    for (call, code) in [
        (Call { chained: true, ..call() }, ErrorCode::InvalidNetworkConfig),
        (Call { netns: String::new(), ..call() }, ErrorCode::InvalidEnvironmentVariables),
        (Call { netns: "/proc/1/gone".into(), ..call() }, ErrorCode::UnknownContainer),
    ] {
        assert_eq!(ipam.add(&call).await.unwrap_err().code, code, "{call:?}");
        ipam.nothing_is_left();
    }
}

#[tokio::test]
async fn a_pod_whose_policy_cannot_hold_is_undone() {
    let ipam = Ipam::with(|pods| pods.add_timeout = Duration::from_millis(300)).await;
    *ipam.world.datapath.broken.lock().unwrap() = true;
    let failure = ipam.add(&call()).await.unwrap_err();
    assert_eq!(failure.code, ErrorCode::TryAgainLater);
    ipam.nothing_is_left();
    *ipam.world.datapath.broken.lock().unwrap() = false;
    ipam.world.api.set("b", Some("no-such-egress"));
    let failure = ipam.add(&Call { pod: "b".into(), ..call() }).await.unwrap_err();
    assert_eq!((failure.code, failure.message), (ErrorCode::TryAgainLater, "failed to setup NAT hook"));
    ipam.nothing_is_left();
}

/// kubelet gives up and asks for the removal, while the ADD is still at work.
#[tokio::test]
async fn del_during_add_waits_and_then_removes_all() {
    let ipam = Ipam::new().await;
    let gate = Arc::new(tokio::sync::Semaphore::new(0));
    ipam.wire.0.lock().unwrap().gate = Some(Arc::clone(&gate));
    {
        // The caller goes away in the middle.
        let adding = ipam.pods.add(call());
        tokio::pin!(adding);
        let waiting = async {
            while ipam.addresses.0.lock().unwrap().given.is_empty() {
                tokio::task::yield_now().await;
            }
        };
        tokio::select! {
            _ = &mut adding => panic!("it should wait"),
            () = waiting => {}
        }
    }
    let deleting = ipam.pods.del(call());
    tokio::pin!(deleting);
    tokio::select! {
        biased;
        _ = &mut deleting => panic!("it should wait"),
        () = tokio::task::yield_now() => {}
    }
    gate.add_permits(1);
    deleting.await.unwrap();
    ipam.nothing_is_left();
}

#[tokio::test]
async fn garbage_is_what_the_runtime_does_not_name() {
    let ipam = Ipam::new().await;
    ipam.add(&call()).await.unwrap();
    ipam.world.api.set("b", None);
    let other = Call { container: "c2".into(), pod: "b".into(), ..call() };
    ipam.add(&other).await.unwrap();
    ipam.pods.gc([("c2".to_owned(), "eth0".to_owned())].into()).await.unwrap();
    let left: Vec<String> = ipam.wire.0.lock().unwrap().links.keys().map(ToString::to_string).collect();
    assert_eq!(left, ["c2:eth0"]);
    assert_eq!(ipam.addresses.0.lock().unwrap().given.len(), 1);
}

#[test]
fn the_pool_of_a_namespace() {
    let with = |annotations: Value| {
        let object = json!({"metadata": {"name": "n", "annotations": annotations}});
        pool_of(&serde_json::from_value(object).unwrap())
    };
    assert_eq!(with(json!({})), "default");
    assert_eq!(with(json!({"coil.cybozu.com/pool": "global"})), "global");
    assert_eq!(with(json!({"coil.cybozu.com/pool": ""})), "default");
}
