#![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Mutex;

use coil_runtime::tasks::Drain;
use serde_json::json;

use super::*;
use crate::cni::error::detail;
use crate::cni::plugin::{Environment, run};
use crate::cni::proto::CniArgs;
use crate::cni::server;
use crate::datapath::{ApplyReport, Datapath, DatapathError, SweepReport};
use crate::desired::DesiredState;
use crate::index::testing::egress;
use crate::index::{Change, EgressView};
use crate::metrics::{GrpcMetrics, StateMetrics};
use crate::netlink::fake::FakeNetlink;
use crate::state::{Input, State};
use crate::writer::Writer;

pub(super) const NETNS: &str = "/run/netns/a";

#[derive(Clone, Default)]
pub(super) struct FakeApi(Arc<Mutex<BTreeMap<String, Pod>>>);

impl PodApi for FakeApi {
    async fn get(&self, _namespace: &str, name: &str) -> Result<Option<Pod>, kube::Error> {
        Ok(self.0.lock().unwrap().get(name).cloned())
    }
}

impl FakeApi {
    pub(super) fn set(&self, name: &str, annotation: Option<&str>) {
        let pod = json!({
            "metadata": {"name": name, "namespace": "demo", "uid": format!("uid-{name}"),
                "annotations": annotation.map(|a| json!({"egress.coil.cybozu.com/internet": a}))},
            "spec": {"containers": []},
        });
        let pod = serde_json::from_value(pod).unwrap();
        self.0.lock().unwrap().insert(name.into(), pod);
    }
}

/// A datapath that holds what it is told, unless it is broken.
#[derive(Clone, Default)]
pub(super) struct FakeDatapath {
    pub(super) state: Arc<Mutex<DesiredState>>,
    pub(super) broken: Arc<Mutex<bool>>,
}

impl Datapath for FakeDatapath {
    fn apply(&mut self, state: &DesiredState) -> Result<ApplyReport, DatapathError> {
        if *self.broken.lock().unwrap() {
            return Err(DatapathError::System { what: "anything", source: std::io::ErrorKind::Other.into() });
        }
        *self.state.lock().unwrap() = state.clone();
        Ok(ApplyReport::default())
    }

    fn resync(&mut self) {}

    fn sweep(&mut self, _now: u32, _budget: usize) -> Result<SweepReport, DatapathError> {
        Ok(SweepReport { finished: true, ..SweepReport::default() })
    }

    fn gc_gateways(&mut self, _live: &BTreeSet<String>) -> Result<(), DatapathError> {
        Ok(())
    }
}

pub(super) struct World {
    pub(super) api: FakeApi,
    netlink: Arc<FakeNetlink>,
    pub(super) datapath: FakeDatapath,
    pub(super) state: StateHandle,
    pub(super) pods: Option<Pods<FakeApi, FakeNetlink>>,
    pub(super) drain: Drain,
}

impl World {
    /// Everything but the watches, which the tests are.
    pub(super) fn new() -> Self {
        let (state, handle, snapshots) = State::new();
        let (api, netlink) = (FakeApi::default(), Arc::new(FakeNetlink::default()));
        let (datapath, drain) = (FakeDatapath::default(), Drain::new());
        let metrics = StateMetrics::register(&prometheus::Registry::new()).unwrap();
        let (writer, applied) = Writer::new(datapath.clone(), snapshots.clone(), metrics);
        tokio::spawn(state.run());
        tokio::spawn(writer.run(drain.clone(), || {}));
        let mut pods = Pods::new(api.clone(), Arc::clone(&netlink), handle.clone(), snapshots, applied);
        pods.add_timeout = Duration::from_secs(5);
        pods.egress_grace = Duration::from_millis(50);
        netlink.add_pod(7, NETNS, "eth0", "10.0.0.7".parse().unwrap());
        Self { api, netlink, datapath, state: handle, pods: Some(pods), drain }
    }

    pub(super) async fn listed(&self, egresses: Vec<EgressView>) {
        fn reset<T>(objects: Vec<T>) -> Change<T> {
            Change::Reset { objects, unreadable: vec![] }
        }
        let listing = self.state.begin_listing();
        self.state.send(Input::Links(vec![], listing)).await.unwrap();
        self.state.send(Input::Pods(reset(vec![]))).await.unwrap();
        self.state.send(Input::Egresses(reset(egresses))).await.unwrap();
        self.state.send(Input::Slices(reset(vec![]))).await.unwrap();
        self.state.send(Input::Namespaces(reset(vec![]))).await.unwrap();
        self.state.send(Input::Adopted).await.unwrap();
    }

    fn pods(&self) -> &Pods<FakeApi, FakeNetlink> {
        self.pods.as_ref().unwrap()
    }

    async fn add(&self) -> Result<(), Failure> {
        self.pods().add(&Call::of(args()).unwrap()).await
    }
}

impl Drop for World {
    fn drop(&mut self) {
        self.drain.cancel();
    }
}

pub(super) fn args() -> CniArgs {
    let pairs = [("K8S_POD_NAMESPACE", "demo"), ("K8S_POD_NAME", "a"), ("IS_CHAINED", "true")];
    CniArgs {
        container_id: "c1".into(),
        netns: NETNS.into(),
        ifname: "eth0".into(),
        args: pairs.map(|(k, v)| (k.to_owned(), v.to_owned())).into(),
        ips: vec!["10.0.0.7".into(), "fd00::7".into()],
        interfaces: HashMap::from([("veth7".into(), false), ("eth0".into(), true)]),
        ..CniArgs::default()
    }
}

fn code(result: Result<(), Failure>) -> (ErrorCode, String) {
    let failure = result.unwrap_err();
    (failure.code, failure.details)
}

#[tokio::test]
async fn a86_in_egress_only_mode_add_answers_when_the_datapath_holds_the_pod() {
    let world = World::new();
    world.api.set("a", Some("x"));
    world.listed(vec![egress("x", &["8.0.0.0/8"])]).await;
    world.add().await.unwrap();
    let held = world.datapath.state.lock().unwrap().pods["uid-a"].clone();
    assert_eq!((held.ifindex, held.ipv4), (7, Some([10, 0, 0, 7].into())));
    assert!(held.ipv6.is_some() && held.policy.is_some());
    let link = world.netlink.link(7).await.unwrap().unwrap();
    assert_eq!(link.alias.as_deref(), Some("COIL::uid-a:eth0"));
    // The same again is no mistake, and CHECK agrees until the interface is gone.
    world.add().await.unwrap();
    let call = Call::of(args()).unwrap();
    world.pods().check(&call).await.unwrap();
    world.netlink.remove_link(7);
    assert_eq!(code(world.pods().check(&call).await).0, ErrorCode::Internal);
    world.pods().del(&call).await.unwrap();
}

#[tokio::test]
async fn a87_a_missing_egress_is_worth_another_attempt_and_the_pod_is_closed() {
    let world = World::new();
    world.api.set("a", Some("x"));
    world.listed(vec![]).await;
    let (code, details) = code(world.add().await);
    assert_eq!(code, ErrorCode::TryAgainLater);
    assert!(details.contains("Egress internet/x does not exist"), "{details}");
    let applied = world.pods().applied.clone().wait_for(|a| a.pods.contains("uid-a")).await.map(|_| ());
    applied.unwrap();
    let held = world.datapath.state.lock().unwrap().pods["uid-a"].clone();
    assert!(held.policy.unwrap().v4.values().any(|action| *action == crate::desired::PolicyAction::Block));
    world.state.send(Input::Egresses(Change::Apply(egress("x", &["8.0.0.0/8"])))).await.unwrap();
    world.add().await.unwrap();
}

/// The original refuses ADD without a Service and looks at its addresses; what counts with us are the gateways
/// that there are: the pod starts, and what has no gateway is dropped until there is one.
#[tokio::test]
async fn a87_an_egress_has_the_gateways_that_there_are_of_each_family() {
    let world = World::new();
    world.api.set("a", Some("x"));
    world.listed(vec![egress("x", &["8.0.0.0/8", "2001:db8::/32"])]).await;
    world.add().await.unwrap();
    let name = crate::desired::EgressName { namespace: "internet".into(), name: "x".into() };
    let gateways = |world: &World| {
        let egress = world.datapath.state.lock().unwrap().egresses[&name].clone();
        (egress.v4.len(), egress.v6.len())
    };
    assert_eq!(gateways(&world), (0, 0));
    let slice = crate::index::SliceView {
        key: egress("x", &[]).key,
        egress: name.clone(),
        gateways: [(
            "10.2.0.1".parse().unwrap(),
            crate::index::GatewayView::new(crate::desired::GatewayState::Ready),
        )]
        .into(),
    };
    world.state.send(Input::Slices(Change::Apply(slice))).await.unwrap();
    let applied = async {
        while gateways(&world) != (1, 0) {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(5), applied).await.unwrap();
}

#[tokio::test]
async fn an_egress_that_comes_a_little_later_is_waited_for() {
    let mut world = World::new();
    world.pods.as_mut().unwrap().egress_grace = Duration::from_secs(5);
    world.api.set("a", Some("x"));
    world.listed(vec![]).await;
    let late = async {
        let mut snapshots = world.pods().snapshots.clone();
        snapshots.wait_for(|s| s.rest.problems.contains_key("uid-a")).await.unwrap();
        world.state.send(Input::Egresses(Change::Apply(egress("x", &["8.0.0.0/8"])))).await.unwrap();
    };
    let (added, ()) = tokio::join!(world.add(), late);
    added.unwrap();
}

#[tokio::test]
async fn a_broken_datapath_is_told() {
    let mut world = World::new();
    world.pods.as_mut().unwrap().add_timeout = Duration::from_millis(300);
    *world.datapath.broken.lock().unwrap() = true;
    world.api.set("a", None);
    world.listed(vec![]).await;
    let (code, details) = code(world.add().await);
    assert_eq!(code, ErrorCode::TryAgainLater);
    assert!(details.contains("cannot read anything"), "{details}");
    // It works again: the writer tries on by itself.
    *world.datapath.broken.lock().unwrap() = false;
    world.add().await.unwrap();
}

#[tokio::test]
async fn before_the_first_lists_nobody_is_let_through() {
    let mut world = World::new();
    world.pods.as_mut().unwrap().add_timeout = Duration::from_millis(100);
    world.api.set("a", None);
    let (code, details) = code(world.add().await);
    assert_eq!(code, ErrorCode::TryAgainLater);
    assert!(details.contains("first lists"), "{details}");
    assert!(world.datapath.state.lock().unwrap().pods.is_empty());
}

#[tokio::test]
async fn mistakes_have_their_codes() {
    let world = World::new();
    world.listed(vec![]).await;
    assert_eq!(code(world.add().await).0, ErrorCode::UnknownContainer);
    world.api.set("a", None);
    let with = |change: fn(&mut CniArgs)| {
        let mut args = args();
        change(&mut args);
        args
    };
    for (args, wanted) in [
        (with(|a| drop(a.args.remove("IS_CHAINED"))), ErrorCode::InvalidNetworkConfig),
        (with(|a| a.ips.clear()), ErrorCode::InvalidNetworkConfig),
        (with(|a| a.netns.clear()), ErrorCode::InvalidEnvironmentVariables),
        (with(|a| a.netns = "/run/netns/gone".into()), ErrorCode::UnknownContainer),
        (with(|a| a.ifname = "eth9".into()), ErrorCode::InvalidNetworkConfig),
    ] {
        let result = world.pods().add(&Call::of(args).unwrap()).await;
        assert_eq!(code(result).0, wanted);
    }
    for args in [
        with(|a| drop(a.args.remove("K8S_POD_NAME"))),
        with(|a| drop(a.args.insert("K8S_POD_NAMESPACE".into(), String::new()))),
        with(|a| a.container_id.clear()),
        with(|a| a.ifname.clear()),
    ] {
        assert_eq!(Call::of(args).unwrap_err().code, ErrorCode::InvalidEnvironmentVariables);
    }
}

/// The real plugin against the real server on a socket, down to the JSON on standard output.
#[tokio::test(flavor = "multi_thread")]
async fn the_plugin_and_the_server_understand_each_other() {
    let mut world = World::new();
    world.api.set("a", None);
    world.listed(vec![]).await;
    let socket = std::env::temp_dir().join(format!("coild-test-{}.sock", std::process::id()));
    // What an earlier run has left is replaced.
    drop(server::bind(&socket).unwrap());
    let listener = server::bind(&socket).unwrap();
    let registry = prometheus::Registry::new();
    let metrics = GrpcMetrics::register(&registry, "pkg.cnirpc.CNI", &server::METHODS).unwrap();
    let pods = world.pods.take().unwrap();
    let server = tokio::spawn(server::serve(listener, pods, metrics, world.drain.clone()));

    let config = json!({"cniVersion": "1.0.0", "name": "net", "type": "coil", "socket": socket,
        "prevResult": {"cniVersion": "1.0.0", "ips": [{"address": "10.0.0.7/32"}]}});
    let call = |command: &str, pod: &str| {
        let (command, pod, input) = (command.to_owned(), pod.to_owned(), config.to_string());
        tokio::task::spawn_blocking(move || {
            let pairs = [
                ("CNI_COMMAND", command),
                ("CNI_CONTAINERID", "c1".into()),
                ("CNI_NETNS", NETNS.into()),
                ("CNI_IFNAME", "eth0".into()),
                ("CNI_ARGS", format!("K8S_POD_NAMESPACE=demo;K8S_POD_NAME={pod}")),
            ];
            let variables = pairs.map(|(k, v)| (k.to_owned(), v)).into();
            run(&Environment { variables }, input.as_bytes()).0
        })
    };
    let result = call("ADD", "a").await.unwrap().unwrap().unwrap();
    assert_eq!(result["ips"][0]["address"], "10.0.0.7/32");
    assert_eq!(call("CHECK", "a").await.unwrap().unwrap(), None);
    assert_eq!(call("DEL", "a").await.unwrap().unwrap(), None);
    let error = format!("{:?}", call("ADD", "other").await.unwrap().unwrap_err());
    assert!(error.contains("code: 3") && error.contains("pod demo/other does not exist"), "{error}");

    let text = String::from_utf8(coil_runtime::metrics::render(&registry).unwrap()).unwrap();
    for line in [
        r#"grpc_server_handled_total{grpc_code="OK",grpc_method="Add",grpc_service="pkg.cnirpc.CNI",grpc_type="unary"} 1"#,
        r#"grpc_server_handled_total{grpc_code="NotFound",grpc_method="Add",grpc_service="pkg.cnirpc.CNI",grpc_type="unary"} 1"#,
        r#"grpc_server_handled_total{grpc_code="Aborted",grpc_method="Del",grpc_service="pkg.cnirpc.CNI",grpc_type="unary"} 0"#,
        r#"grpc_server_started_total{grpc_method="Check",grpc_service="pkg.cnirpc.CNI",grpc_type="unary"} 1"#,
    ] {
        assert!(text.contains(line), "{line} in\n{text}");
    }
    world.drain.cancel();
    server.await.unwrap().unwrap();
    std::fs::remove_file(&socket).unwrap();
}

#[test]
fn a_failure_without_detail_is_told_as_it_is() {
    assert!(detail(&tonic::Status::unknown("x")).is_none());
}
