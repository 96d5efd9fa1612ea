//! The node's side against an API server. The controller is played by the test.

#![expect(clippy::unwrap_used, clippy::panic, reason = "tests")]

use std::future::Future;
use std::path::Path;
use std::time::Duration;

use coil_agent::ipam::api::BlockApi;
use coil_agent::ipam::core::Released;
use coil_agent::ipam::watch::{News, news};
use coil_agent::ipam::{
    Addresses, Assigned, IpamError, IpamMetrics, IpamOptions, IpamService, KubeApi, Owner, Pace,
};
use coil_agent::metrics::WatchMetrics;
use coil_agent::routes::NoExport;
use coil_lab::api::{ApiConfig, ApiServer};
use futures::StreamExt;
use kube::api::{ApiResource, DeleteParams, DynamicObject, GroupVersionKind, Patch, PatchParams, PostParams};
use kube::{Api, Client, Config};
use prometheus::Registry;
use serde_json::{Value, json};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

const DEADLINE: Duration = Duration::from_secs(60);

/// An API server with the definitions and two nodes.
struct Cluster {
    server: std::sync::Arc<ApiServer>,
    client: Client,
}

impl Cluster {
    async fn start() -> Self {
        let server = ApiServer::new(ApiConfig::default());
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        tokio::spawn(server.clone().serve(listener));
        let client = Client::try_from(Config::new(url.parse().unwrap())).unwrap();
        let cluster = Self { server, client };
        let crd = cluster.api(
            "apiextensions.k8s.io",
            "v1",
            "CustomResourceDefinition",
            "customresourcedefinitions",
        );
        for plural in ["addresspools", "addressblocks", "blockrequests"] {
            let file = format!("../manifests/crd/coil.cybozu.com_{plural}.yaml");
            let text = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(file)).unwrap();
            let object: Value = serde_saphyr::from_str(&text).unwrap();
            create(&crd, object).await;
        }
        for node in ["n1", "n2"] {
            create(&cluster.api("", "v1", "Node", "nodes"), json!({ "metadata": { "name": node } })).await;
        }
        eventually("the new kinds", async || cluster.requests().list(&Default::default()).await.ok()).await;
        let spec =
            json!({ "blockSizeBits": 1, "subnets": [{ "ipv4": "10.2.0.0/24", "ipv6": "fd02::/120" }] });
        create(&cluster.pools(), json!({ "metadata": { "name": "default" }, "spec": spec })).await;
        cluster
    }

    fn api(&self, group: &str, version: &str, kind: &str, plural: &str) -> Api<DynamicObject> {
        let resource =
            ApiResource::from_gvk_with_plural(&GroupVersionKind::gvk(group, version, kind), plural);
        Api::all_with(self.client.clone(), &resource)
    }

    fn pools(&self) -> Api<DynamicObject> {
        self.api("coil.cybozu.com", "v2", "AddressPool", "addresspools")
    }

    fn blocks(&self) -> Api<DynamicObject> {
        self.api("coil.cybozu.com", "v2", "AddressBlock", "addressblocks")
    }

    fn requests(&self) -> Api<DynamicObject> {
        self.api("coil.cybozu.com", "v2", "BlockRequest", "blockrequests")
    }

    /// A block of the pool, as the controller makes it.
    async fn block(&self, index: u8, node: &str) -> String {
        let name = format!("default-{index}");
        let labels = json!({ "coil.cybozu.com/pool": "default", "coil.cybozu.com/node": node });
        let object = json!({
            "metadata": { "name": name, "labels": labels, "finalizers": ["coil.cybozu.com"] },
            "index": index,
            "ipv4": format!("10.2.0.{}/31", index * 2),
            "ipv6": format!("fd02::{:x}/127", index * 2),
        });
        create(&self.blocks(), object).await;
        name
    }

    async fn label(&self, block: &str, key: &str, value: Value) {
        let patch = Patch::Merge(json!({ "metadata": { "labels": { key: value } } }));
        self.blocks().patch(block, &PatchParams::default(), &patch).await.unwrap();
    }

    /// Answers a request.
    async fn answer(&self, request: &str, block: Option<&str>) {
        let condition = |kind: &str, reason: &str| {
            let time = "2026-01-01T00:00:00Z";
            json!({ "type": kind, "status": "True", "reason": reason, "message": "", "lastProbeTime": time, "lastTransitionTime": time })
        };
        let conditions = match block {
            Some(_) => vec![condition("Complete", "allocated")],
            None => {
                vec![condition("Complete", "completed with failure"), condition("Failed", "out of blocks")]
            }
        };
        let status = json!({ "status": { "addressBlockName": block, "conditions": conditions } });
        self.requests().patch_status(request, &PatchParams::default(), &Patch::Merge(status)).await.unwrap();
    }

    async fn request_of(&self, node: &str) -> DynamicObject {
        let name = format!("req-default-{node}");
        eventually("a request", async || self.requests().get_opt(&name).await.unwrap()).await
    }

    fn kube_api(&self, node: &str) -> KubeApi {
        KubeApi::new(self.client.clone(), node.to_owned())
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        self.server.stop();
    }
}

async fn create(api: &Api<DynamicObject>, object: Value) {
    // The definitions bring theirs.
    let mut object = object;
    let resource = object.as_object_mut().unwrap();
    resource.entry("apiVersion").or_insert("x".into());
    resource.entry("kind").or_insert("x".into());
    let mut object: DynamicObject = serde_json::from_value(object).unwrap();
    object.types = object.types.filter(|types| types.kind != "x");
    api.create(&PostParams::default(), &object).await.unwrap();
}

async fn eventually<T, F: Future<Output = Option<T>>>(what: &str, ask: impl Fn() -> F) -> T {
    let asking = async {
        loop {
            if let Some(answer) = ask().await {
                return answer;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(DEADLINE, asking).await.unwrap_or_else(|_| panic!("no {what}"))
}

fn owner(container: &str) -> Owner {
    Owner { container_id: container.to_owned(), ifname: "eth0".to_owned() }
}

fn watch_metrics() -> WatchMetrics {
    WatchMetrics::register(&Registry::new()).unwrap()
}

/// The service of a node.
fn start(cluster: &Cluster, node: &str) -> (IpamService, CancellationToken) {
    let options = IpamOptions {
        node: node.to_owned(),
        pace: Pace { release_delay: Duration::from_millis(50), wait: DEADLINE, ..Pace::default() },
        clear_routes_on_shutdown: false,
    };
    let service = IpamService::new(options, vec![], IpamMetrics::register(&Registry::new()).unwrap());
    let drain = CancellationToken::new();
    let news = news(&cluster.client, node, &watch_metrics());
    tokio::spawn(service.clone().run(cluster.kube_api(node), NoExport, news, drain.clone()));
    (service, drain)
}

fn add(service: &IpamService, container: &str) -> JoinHandle<Result<Assigned, IpamError>> {
    let (service, owner) = (service.clone(), owner(container));
    tokio::spawn(async move { service.allocate("default", &owner).await })
}

#[tokio::test]
async fn a41_a_request_counts_once_it_is_answered() {
    let cluster = Cluster::start().await;
    let mut told = news(&cluster.client, "n1", &watch_metrics());
    let (service, _drain) = start(&cluster, "n1");
    let waiting = add(&service, "a");
    let request = cluster.request_of("n1").await;
    let owner = &request.metadata.owner_references.as_ref().unwrap()[0];
    assert_eq!((owner.kind.as_str(), owner.name.as_str(), owner.controller), ("Node", "n1", None));
    assert_eq!(request.data["spec"], json!({ "nodeName": "n1", "poolName": "default" }));
    // There is a block, but nobody has said so.
    let block = cluster.block(0, "n1").await;
    let pending = async |told: &mut futures::stream::BoxStream<'static, News>| loop {
        if let News::Request(view) = told.next().await.unwrap() {
            return view.answer;
        }
    };
    let first = tokio::time::timeout(DEADLINE, pending(&mut told)).await.unwrap();
    assert_eq!(first, coil_agent::ipam::demand::Answer::Pending);
    assert!(!waiting.is_finished());
    cluster.answer("req-default-n1", Some(&block)).await;
    let second = tokio::time::timeout(DEADLINE, pending(&mut told)).await.unwrap();
    assert_eq!(second, coil_agent::ipam::demand::Answer::Block(block.clone()));
    let assigned = waiting.await.unwrap().unwrap();
    assert_eq!(assigned.ipv4, Some("10.2.0.0".parse().unwrap()));
    assert_eq!(assigned.ipv6, Some("fd02::".parse().unwrap()));
    // The request has served its purpose, and the next is another.
    let third = tokio::time::timeout(DEADLINE, async {
        loop {
            match told.next().await.unwrap() {
                News::RequestGone(view) => return view.uid,
                news => assert!(!matches!(news, News::Request(_)), "{news:?}"),
            }
        }
    });
    assert_eq!(Some(third.await.unwrap()), request.metadata.uid);
    assert!(add(&service, "b").await.unwrap().is_ok(), "the other address of the block");
    let waiting = add(&service, "c");
    cluster.request_of("n1").await;
    cluster.answer("req-default-n1", None).await;
    let error = waiting.await.unwrap().unwrap_err();
    assert!(matches!(error, IpamError::Exhausted { .. }), "{error:?}");
    // An empty block goes for good, whatever its finalizer.
    service.free(&self::owner("a")).await.unwrap();
    service.free(&self::owner("b")).await.unwrap();
    eventually("release", async || cluster.blocks().get_opt(&block).await.unwrap().is_none().then_some(()))
        .await;
}

#[tokio::test]
async fn a42_requests_of_other_nodes_are_ignored() {
    let cluster = Cluster::start().await;
    let metrics = watch_metrics();
    let mut told = news(&cluster.client, "n1", &metrics);
    // One of another node, with its label; one with our label by mistake; then ours.
    cluster.kube_api("n2").request("default").await.unwrap();
    let wrong = json!({
        "metadata": { "name": "wrong", "labels": { "coil.cybozu.com/node": "n1" } },
        "spec": { "nodeName": "n2", "poolName": "default" },
    });
    create(&cluster.requests(), wrong).await;
    cluster.answer("req-default-n2", Some("default-0")).await;
    cluster.answer("wrong", Some("default-0")).await;
    cluster.kube_api("n1").request("default").await.unwrap();
    cluster.answer("req-default-n1", Some("default-1")).await;
    let collected = tokio::time::timeout(DEADLINE, async {
        let mut seen = Vec::new();
        loop {
            if let News::Request(view) = told.next().await.unwrap() {
                let done = view.answer == coil_agent::ipam::demand::Answer::Block("default-1".into());
                seen.push(view.name);
                if done {
                    return seen;
                }
            }
        }
    });
    let collected = collected.await.unwrap();
    assert!(!collected.is_empty() && collected.iter().all(|name| name == "req-default-n1"), "{collected:?}");
    // An answer with a block of another node is of no use to us.
    cluster.block(1, "n2").await;
    assert_eq!(cluster.kube_api("n1").block("default-1").await.unwrap(), None);
    assert!(cluster.kube_api("n2").block("default-1").await.unwrap().is_some());
}

#[tokio::test]
async fn a_request_is_found_again_and_deleted_but_not_another() {
    let cluster = Cluster::start().await;
    let api = cluster.kube_api("n1");
    let (first, created) = api.request("default").await.unwrap();
    assert!(created);
    let (again, created) = api.request("default").await.unwrap();
    assert_eq!((again.uid.as_str(), created), (first.uid.as_str(), false));
    api.forget(&first.name, "another-uid").await.unwrap();
    assert!(api.poll(&first.name).await.unwrap().is_some());
    api.forget(&first.name, &first.uid).await.unwrap();
    assert_eq!(api.poll(&first.name).await.unwrap(), None);
    api.forget(&first.name, &first.uid).await.unwrap();
    // Two pairs of names give one name of a request.
    let spec = json!({ "subnets": [{ "ipv4": "10.3.0.0/24" }] });
    create(&cluster.pools(), json!({ "metadata": { "name": "a-b" }, "spec": spec.clone() })).await;
    create(&cluster.api("", "v1", "Node", "nodes"), json!({ "metadata": { "name": "b-n" } })).await;
    create(&cluster.api("", "v1", "Node", "nodes"), json!({ "metadata": { "name": "n" } })).await;
    cluster.kube_api("b-n").request("a").await.unwrap();
    let error = cluster.kube_api("n").request("a-b").await.unwrap_err();
    assert!(error.to_string().contains("req-a-b-n"), "{error}");
    // A pool, there or not, being deleted or not.
    assert_eq!(api.pool("default").await.unwrap(), Some(false));
    assert_eq!(api.pool("nothing").await.unwrap(), None);
    assert!(api.node_exists().await.unwrap());
    assert!(!cluster.kube_api("n3").node_exists().await.unwrap());
    let error = cluster.kube_api("n3").request("default").await.unwrap_err();
    assert!(error.to_string().contains("get Node"), "{error}");
}

#[tokio::test]
async fn a_block_is_deleted_only_as_it_is_known() {
    let cluster = Cluster::start().await;
    let api = cluster.kube_api("n1");
    let name = cluster.block(0, "n1").await;
    let view = api.block(&name).await.unwrap().unwrap();
    assert_eq!(api.blocks().await.unwrap(), std::slice::from_ref(&view));
    // Reserved in the meantime.
    cluster.label(&name, "coil.cybozu.com/reserved", "true".into()).await;
    let kept = api.release(&view).await.unwrap();
    let Released::Kept(kept) = kept else { panic!("{kept:?}") };
    assert!(kept.reserved && !kept.deleted);
    // Changed otherwise, and deleted by somebody else, whom the finalizer stopped.
    cluster.label(&name, "coil.cybozu.com/reserved", Value::Null).await;
    cluster.blocks().delete(&name, &DeleteParams::default()).await.unwrap();
    assert!(api.block(&name).await.unwrap().unwrap().deleted);
    assert_eq!(api.release(&view).await.unwrap(), Released::Gone);
    assert_eq!(api.block(&name).await.unwrap(), None);
    assert_eq!(api.release(&view).await.unwrap(), Released::Gone, "twice");
    // Another one of that name is none of our business.
    cluster.block(0, "n1").await;
    assert_eq!(api.release(&view).await.unwrap(), Released::Gone);
    let other = api.block(&name).await.unwrap().unwrap();
    assert_ne!(other.uid, view.uid);
    // Nor is one that has become another node's.
    cluster.label(&name, "coil.cybozu.com/node", "n2".into()).await;
    assert_eq!(api.release(&other).await.unwrap(), Released::Gone);
    assert!(cluster.kube_api("n2").block(&name).await.unwrap().is_some());
    assert_eq!(api.blocks().await.unwrap(), []);
    // One that the original had begun to delete has no finalizer.
    let name = cluster.block(1, "n1").await;
    let patch = Patch::Merge(json!({ "metadata": { "finalizers": null } }));
    cluster.blocks().patch(&name, &PatchParams::default(), &patch).await.unwrap();
    let view = api.block(&name).await.unwrap().unwrap();
    assert_eq!(api.release(&view).await.unwrap(), Released::Gone);
    // One that cannot be read stalls nothing.
    let broken = json!({ "metadata": { "name": "default-7", "labels": {
        "coil.cybozu.com/pool": "default", "coil.cybozu.com/node": "n1" } }, "index": 7, "ipv4": "nonsense" });
    create(&cluster.blocks(), broken).await;
    cluster.block(2, "n1").await;
    let names: Vec<_> = api.blocks().await.unwrap().into_iter().map(|view| view.name).collect();
    assert_eq!(names, ["default-2"]);
}
