//! Address pools against an API server (`spec/coil.md` 8.5, A33 to A46), and what the original lacks.

use std::time::Duration;

use coil_api::{AddressBlock, AddressPool, BlockRequest, BlockRequestStatus, names};
use coil_controller::IpamSettings;
use k8s_openapi::api::core::v1::Node;
use k8s_openapi::api::events::v1::Event;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;
use kube::api::{DeleteParams, ListParams, Patch, PatchParams, PostParams};
use kube::{Api, Client, ResourceExt};
use serde_json::{Value, json};

use crate::support::{Cluster, eventually};

/// A long time, unless a test says otherwise.
pub const SETTINGS: IpamSettings =
    IpamSettings { node_grace_period: Duration::from_secs(3600), gc_interval: Duration::from_secs(3600) };
const AT_ONCE: IpamSettings = IpamSettings { node_grace_period: Duration::ZERO, ..SETTINGS };

/// The kinds of a cluster.
struct Kinds {
    pools: Api<AddressPool>,
    blocks: Api<AddressBlock>,
    requests: Api<BlockRequest>,
    nodes: Api<Node>,
    client: Client,
}

impl Kinds {
    async fn cluster() -> (Cluster, Self) {
        let cluster = Cluster::alone().await;
        let client = cluster.client();
        let kinds = Self {
            pools: Api::all(client.clone()),
            blocks: Api::all(client.clone()),
            requests: Api::all(client.clone()),
            nodes: Api::all(client.clone()),
            client,
        };
        (cluster, kinds)
    }

    async fn pool(&self, name: &str, bits: i32, subnets: Value) -> AddressPool {
        let pool =
            json!({ "metadata": { "name": name }, "spec": { "blockSizeBits": bits, "subnets": subnets } });
        let pool = serde_json::from_value(pool).unwrap();
        self.pools.create(&PostParams::default(), &pool).await.unwrap()
    }

    async fn node(&self, name: &str) {
        let node = serde_json::from_value(json!({ "metadata": { "name": name } })).unwrap();
        self.nodes.create(&PostParams::default(), &node).await.unwrap();
    }

    async fn request(&self, pool: &str, node: &str) -> BlockRequest {
        let name = names::request_name(pool, node);
        let request = json!({ "metadata": { "name": name }, "spec": { "nodeName": node, "poolName": pool } });
        let request = serde_json::from_value(request).unwrap();
        self.requests.create(&PostParams::default(), &request).await.unwrap()
    }

    /// The answer to a request: name of the block or why not.
    async fn answer(&self, pool: &str, node: &str) -> Result<String, String> {
        let name = names::request_name(pool, node);
        eventually("answer", || async {
            let request = self.requests.get(&name).await.unwrap();
            (!request.is_pending()).then(|| request.result().map(str::to_owned).map_err(|e| e.to_string()))
        })
        .await
    }

    /// Asks for a block, and for another one the next time.
    async fn ask(&self, pool: &str, node: &str) -> Result<String, String> {
        let name = names::request_name(pool, node);
        self.request(pool, node).await;
        let answer = self.answer(pool, node).await;
        self.requests.delete(&name, &DeleteParams::default()).await.unwrap();
        answer
    }

    /// A block that somebody else has made.
    async fn block(&self, name: &str, labels: Value, index: i32, ipv4: &str) -> AddressBlock {
        let metadata = json!({ "name": name, "labels": labels, "finalizers": [names::FINALIZER] });
        let block = json!({ "metadata": metadata, "index": index, "ipv4": ipv4 });
        self.blocks.create(&PostParams::default(), &serde_json::from_value(block).unwrap()).await.unwrap()
    }

    /// As coild returns a block.
    async fn give_back(&self, name: &str) {
        let patch = Patch::Merge(json!({ "metadata": { "finalizers": null } }));
        self.blocks.patch(name, &PatchParams::default(), &patch).await.unwrap();
        self.blocks.delete(name, &DeleteParams::default()).await.unwrap();
    }

    async fn names_of_blocks(&self) -> Vec<String> {
        let mut names: Vec<_> = self
            .blocks
            .list(&ListParams::default())
            .await
            .unwrap()
            .iter()
            .map(ResourceExt::name_any)
            .collect();
        names.sort();
        names
    }

    async fn gone(&self, block: &str) {
        eventually("the end of the block", || async {
            self.blocks.get_opt(block).await.unwrap().is_none().then_some(())
        })
        .await;
    }

    async fn event(&self, pool: &str, reason: &str) -> String {
        let events: Api<Event> = Api::all(self.client.clone());
        eventually(reason, || async {
            let list = events.list(&ListParams::default()).await.unwrap();
            let about = |e: &&Event| {
                e.reason.as_deref() == Some(reason)
                    && e.regarding.as_ref().is_some_and(|r| r.name.as_deref() == Some(pool))
            };
            list.iter().find(about).and_then(|event| event.note.clone())
        })
        .await
    }
}

fn v4(net: &str) -> Value {
    json!([{ "ipv4": net }])
}

fn of_node(pool: &str, node: &str) -> Value {
    json!({ names::LABEL_POOL: pool, names::LABEL_NODE: node })
}

async fn value(cluster: &Cluster, name: &str, wanted: f64) {
    eventually(name, || async { (cluster.metric(name) >= wanted).then_some(()) }).await;
    assert!((cluster.metric(name) - wanted).abs() < 0.1, "{name} is {}, not {wanted}", cluster.metric(name));
}

#[tokio::test(flavor = "multi_thread")]
async fn a33_a34_when_pools_are_looked_at() {
    const LOOKS: &str = "controller_runtime_reconcile_total/addresspool";
    let (mut cluster, kinds) = Kinds::cluster().await;
    for (name, net) in [("one", "10.1.0.0/24"), ("two", "10.2.0.0/24")] {
        kinds.pool(name, 0, v4(net)).await;
        let finalizer = Patch::Merge(json!({ "metadata": { "finalizers": [names::FINALIZER] } }));
        kinds.pools.patch(name, &PatchParams::default(), &finalizer).await.unwrap();
    }
    cluster.start_ipam(SETTINGS).await;
    // Each once at the start.
    value(&cluster, LOOKS, 2.0).await;
    kinds.node("n").await;
    kinds.block("one-7", of_node("one", "n"), 7, "10.1.0.7/32").await;
    value(&cluster, "coil_controller_allocated_blocks/one", 1.0).await;
    assert!((cluster.metric(LOOKS) - 2.0).abs() < 0.1, "a new block makes nobody look");
    kinds.give_back("one-7").await;
    value(&cluster, LOOKS, 3.0).await;
    assert!(cluster.metric("coil_controller_allocated_blocks/one") < 0.1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a35_a36_a44_a_pool_from_first_to_last() {
    let (mut cluster, kinds) = Kinds::cluster().await;
    cluster.start_ipam(SETTINGS).await;
    kinds.node("n").await;
    let subnets = json!([{ "ipv4": "10.2.0.0/29", "ipv6": "fd02::200/125" }, { "ipv4": "10.3.0.0/30", "ipv6": "fd02::300/126" }]);
    let pool = kinds.pool("default", 1, subnets).await;
    for index in 0..6 {
        assert_eq!(kinds.ask("default", "n").await, Ok(format!("default-{index}")));
    }
    value(&cluster, "coil_controller_max_blocks/default", 6.0).await;
    value(&cluster, "coil_controller_allocated_blocks/default", 6.0).await;
    let block = kinds.blocks.get("default-0").await.unwrap();
    assert_eq!((block.ipv4.as_deref(), block.ipv6.as_deref()), (Some("10.2.0.0/31"), Some("fd02::200/127")));
    assert_eq!((block.pool(), block.node()), (Some("default"), Some("n")));
    assert_eq!(block.finalizers(), [names::FINALIZER]);
    let owner = &block.owner_references()[0];
    assert_eq!((owner.kind.as_str(), &owner.uid), ("AddressPool", &pool.uid().unwrap()));
    assert_eq!(kinds.ask("default", "n").await, Err("out of blocks".to_owned()));
    assert!(kinds.event("default", "OutOfBlocks").await.contains("append a subnet"));

    kinds.give_back("default-4").await;
    kinds.gone("default-4").await;
    assert_eq!(kinds.ask("default", "m").await, Ok("default-4".to_owned()));
    let block = kinds.blocks.get("default-4").await.unwrap();
    assert_eq!((block.node(), block.ipv6.as_deref()), (Some("m"), Some("fd02::300/127")));

    // The pool stays until the last block is gone, and no block is handed out meanwhile.
    kinds.give_back("default-5").await;
    kinds.pools.delete("default", &DeleteParams::background()).await.unwrap();
    assert_eq!(kinds.ask("default", "n").await, Err("out of blocks".to_owned()));
    for name in kinds.names_of_blocks().await {
        assert!(kinds.pools.get_opt("default").await.unwrap().is_some(), "{name} is left");
        kinds.give_back(&name).await;
    }
    eventually("the end of the pool", || async {
        kinds.pools.get_opt("default").await.unwrap().is_none().then_some(())
    })
    .await;
    eventually("the end of its series", || async {
        (cluster.metric("coil_controller_max_blocks") < 0.1).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a37_a38_requests_from_before_the_start() {
    let (mut cluster, kinds) = Kinds::cluster().await;
    kinds.node("n").await;
    kinds.pool("p", 0, v4("10.1.0.0/24")).await;
    kinds.pool("q", 0, v4("10.2.0.0/24")).await;
    kinds.pool("done", 0, v4("10.3.0.0/24")).await;
    kinds.request("p", "n").await;
    // Somebody has made the block, but died before he could say so.
    let half = kinds.request("q", "n").await;
    let mut labels = of_node("q", "n");
    labels[names::LABEL_REQUEST] = json!(half.uid().unwrap());
    kinds.block("q-3", labels, 3, "10.2.0.3/32").await;
    // Answered long ago.
    kinds.request("done", "n").await;
    let status = BlockRequestStatus::allocated("done-9", &Time(Timestamp::from_second(0).unwrap()));
    let done = Patch::Merge(json!({ "status": status }));
    let done = kinds.requests.patch_status("req-done-n", &PatchParams::default(), &done).await.unwrap();

    cluster.start_ipam(SETTINGS).await;
    assert_eq!(kinds.answer("p", "n").await, Ok("p-0".to_owned()));
    assert_eq!(kinds.answer("q", "n").await, Ok("q-3".to_owned()));
    assert_eq!(kinds.names_of_blocks().await, ["p-0", "q-3"]);
    let still = kinds.requests.get("req-done-n").await.unwrap();
    assert_eq!(still.metadata.resource_version, done.metadata.resource_version);
}

#[tokio::test(flavor = "multi_thread")]
async fn a39_a40_a45_requests_and_exhaustion() {
    let (mut cluster, kinds) = Kinds::cluster().await;
    cluster.start_ipam(SETTINGS).await;
    kinds.node("n").await;
    kinds.pool("v4", 1, v4("10.4.0.0/30")).await;
    assert_eq!(kinds.ask("v4", "n").await, Ok("v4-0".to_owned()));
    assert_eq!(kinds.ask("v4", "n").await, Ok("v4-1".to_owned()));
    kinds.request("v4", "n").await;
    assert_eq!(kinds.answer("v4", "n").await, Err("out of blocks".to_owned()));
    let status = kinds.requests.get("req-v4-n").await.unwrap().status.unwrap();
    assert_eq!(status.address_block_name, None);
    let said: Vec<_> = status.conditions.iter().map(|c| (c.type_.as_str(), c.reason.as_str())).collect();
    assert_eq!(said, [("Complete", "completed with failure"), ("Failed", "out of blocks")]);
    assert!(status.conditions[1].message.contains("v4"), "{}", status.conditions[1].message);
    assert_eq!(kinds.names_of_blocks().await.len(), 2);
    value(&cluster, "coil_controller_block_requests_total/allocated", 2.0).await;
    value(&cluster, "coil_controller_block_requests_total/out_of_blocks", 1.0).await;
    // The original lets the node wait for its time-out.
    assert_eq!(kinds.ask("none", "n").await, Err("pool not found".to_owned()));
}

#[tokio::test(flavor = "multi_thread")]
async fn many_requests_at_once_get_a_block_each() {
    let (mut cluster, kinds) = Kinds::cluster().await;
    cluster.start_ipam(SETTINGS).await;
    kinds.pool("p", 0, v4("10.1.0.0/24")).await;
    let nodes: Vec<String> = (0..100).map(|i| format!("n{i}")).collect();
    for node in &nodes {
        kinds.node(node).await;
    }
    futures::future::join_all(nodes.iter().map(|node| kinds.request("p", node))).await;
    let mut blocks = Vec::new();
    for node in &nodes {
        blocks.push(kinds.answer("p", node).await.unwrap());
    }
    blocks.sort();
    blocks.dedup();
    assert_eq!(blocks.len(), 100);
    assert_eq!(kinds.names_of_blocks().await, blocks);
}

#[tokio::test(flavor = "multi_thread")]
async fn a46_blocks_of_nodes_that_do_not_exist_go() {
    let (mut cluster, kinds) = Kinds::cluster().await;
    kinds.node("here").await;
    kinds.pool("p", 0, v4("10.1.0.0/24")).await;
    kinds.block("p-0", of_node("p", "here"), 0, "10.1.0.0/32").await;
    kinds.block("p-1", of_node("p", "gone"), 1, "10.1.0.1/32").await;
    kinds.block("p-2", of_node("p", ""), 2, "10.1.0.2/32").await;
    kinds.block("p-3", json!({ names::LABEL_POOL: "p" }), 3, "10.1.0.3/32").await;
    // Somebody keeps it for himself; the original takes it from him.
    let reserved = json!({ names::LABEL_POOL: "p", names::LABEL_RESERVED: "true" });
    kinds.block("p-4", reserved, 4, "10.1.0.4/32").await;
    cluster.start_ipam(AT_ONCE).await;
    for block in ["p-1", "p-2", "p-3"] {
        kinds.gone(block).await;
    }
    assert_eq!(kinds.names_of_blocks().await, ["p-0", "p-4"]);
    // The original looks once an hour; a deletion is seen at once here.
    kinds.nodes.delete("here", &DeleteParams::default()).await.unwrap();
    kinds.gone("p-0").await;
    assert_eq!(kinds.names_of_blocks().await, ["p-4"]);
    value(&cluster, "coil_controller_collected_blocks_total", 4.0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn blocks_of_a_node_that_comes_back_stay() {
    let (mut cluster, kinds) = Kinds::cluster().await;
    kinds.node("n").await;
    kinds.pool("p", 0, v4("10.1.0.0/24")).await;
    kinds.block("p-0", of_node("p", "n"), 0, "10.1.0.0/32").await;
    let grace = IpamSettings { node_grace_period: Duration::from_secs(3), ..SETTINGS };
    cluster.start_ipam(grace).await;
    value(&cluster, "coil_controller_allocated_blocks/p", 1.0).await;
    kinds.nodes.delete("n", &DeleteParams::default()).await.unwrap();
    value(&cluster, "coil_controller_missing_nodes", 1.0).await;
    kinds.node("n").await;
    eventually("its return", || async {
        (cluster.metric("coil_controller_missing_nodes") < 0.1).then_some(())
    })
    .await;
    // Another one, deleted after that, is collected when its time is up: that of the first is up, too.
    kinds.block("p-1", of_node("p", "other"), 1, "10.1.0.1/32").await;
    kinds.gone("p-1").await;
    assert_eq!(kinds.names_of_blocks().await, ["p-0"]);
}

/// The original asks the API server for the same name again and again. Here somebody takes names that the
/// controller is about to use, before any watch can tell: another leader, who should not be there at all.
#[tokio::test(flavor = "multi_thread")]
async fn names_that_somebody_else_takes_first_are_stepped_over() {
    let (mut cluster, kinds) = Kinds::cluster().await;
    cluster.start_ipam(SETTINGS).await;
    cluster.start_second_ipam(SETTINGS);
    kinds.pool("p", 0, v4("10.1.0.0/24")).await;
    let nodes: Vec<String> = (0..60).map(|i| format!("n{i}")).collect();
    for node in &nodes {
        kinds.node(node).await;
    }
    futures::future::join_all(nodes.iter().map(|node| kinds.request("p", node))).await;
    let mut addresses = Vec::new();
    for node in &nodes {
        let name = kinds.answer("p", node).await.unwrap();
        let block = kinds.blocks.get(&name).await.unwrap();
        assert_eq!(block.node(), Some(node.as_str()), "{name}");
        addresses.push(block.ipv4.unwrap());
    }
    addresses.sort();
    addresses.dedup();
    assert_eq!(addresses.len(), 60);
    let failures = cluster.metric("coil_controller_reconcile_failures_total");
    assert!(failures < 0.1, "{failures} requests were given up");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_invalid_pool_gets_an_event_and_nothing_is_carved_from_it() {
    let (mut cluster, kinds) = Kinds::cluster().await;
    cluster.start_ipam(SETTINGS).await;
    kinds.node("n").await;
    kinds.pool("a-first", 0, v4("10.1.0.0/24")).await;
    kinds.pool("b-second", 0, v4("10.1.0.0/16")).await;
    let note = kinds.event("b-second", "InvalidPool").await;
    assert!(note.contains("10.1.0.0/16 overlaps with 10.1.0.0/24 of AddressPool a-first"), "{note}");
    assert_eq!(kinds.ask("b-second", "n").await, Err("invalid pool".to_owned()));
    assert_eq!(kinds.ask("a-first", "n").await, Ok("a-first-0".to_owned()));
    kinds.give_back("a-first-0").await;
    kinds.pools.delete("a-first", &DeleteParams::default()).await.unwrap();
    kinds.event("b-second", "Valid").await;
    assert_eq!(kinds.ask("b-second", "n").await, Ok("b-second-0".to_owned()));
    value(&cluster, "coil_controller_pool_valid", 1.0).await;
}

/// Its controller is away when the pool is made, changed and deleted.
#[tokio::test(flavor = "multi_thread")]
async fn the_api_server_may_go_away_and_nothing_ends() {
    let (mut cluster, kinds) = Kinds::cluster().await;
    cluster.start_ipam(AT_ONCE).await;
    kinds.node("n").await;
    kinds.node("m").await;
    kinds.pool("p", 0, v4("10.1.0.0/24")).await;
    assert_eq!(kinds.ask("p", "n").await, Ok("p-0".to_owned()));
    assert_eq!(kinds.ask("p", "m").await, Ok("p-1".to_owned()));
    cluster.set_reachable(false);
    kinds.request("p", "n").await;
    kinds.nodes.delete("m", &DeleteParams::default()).await.unwrap();
    kinds.pool("q", 0, v4("10.2.0.0/24")).await;
    kinds.request("q", "n").await;
    cluster.set_reachable(true);
    assert_eq!(kinds.answer("q", "n").await, Ok("q-0".to_owned()));
    // Depending on which comes first, the block of the other node is given out again.
    let second = kinds.answer("p", "n").await.unwrap();
    assert!(["p-1", "p-2"].contains(&second.as_str()), "{second}");
    eventually("the end of the other node's block", || async {
        let blocks = kinds.blocks.list(&ListParams::default()).await.unwrap();
        blocks.iter().all(|block| block.node() == Some("n")).then_some(())
    })
    .await;
    assert!(cluster.ipam_runs());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_leader_goes_on_where_the_old_one_ended() {
    let (mut cluster, kinds) = Kinds::cluster().await;
    cluster.start_ipam(SETTINGS).await;
    kinds.node("n").await;
    kinds.pool("p", 0, v4("10.1.0.0/24")).await;
    assert_eq!(kinds.ask("p", "n").await, Ok("p-0".to_owned()));
    cluster.stop_ipam().await;
    kinds.request("p", "n").await;
    cluster.start_ipam(SETTINGS).await;
    assert_eq!(kinds.answer("p", "n").await, Ok("p-1".to_owned()));
    value(&cluster, "coil_controller_allocated_blocks/p", 2.0).await;
}
