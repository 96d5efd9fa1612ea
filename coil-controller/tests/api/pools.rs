//! What the schema of AddressPool says (`spec/coil.md` 8.5, A1 to A12). The original says it by a webhook.

use coil_api::AddressPool;
use kube::Api;
use kube::api::{DynamicObject, Patch, PatchParams, PostParams};
use serde_json::{Value, json};

use crate::support::{Cluster, eventually};

/// Pools as people write them, without our types.
struct Pools(Api<DynamicObject>);

impl Pools {
    fn new(cluster: &Cluster) -> Self {
        Self(Api::all_with(cluster.client(), &kube::api::ApiResource::erase::<AddressPool>(&())))
    }

    async fn create(&self, name: &str, spec: Value) -> Result<DynamicObject, String> {
        let object = json!({
            "apiVersion": "coil.cybozu.com/v2", "kind": "AddressPool", "metadata": { "name": name }, "spec": spec,
        });
        let object: DynamicObject = serde_json::from_value(object).unwrap();
        self.0.create(&PostParams::default(), &object).await.map_err(|error| error.to_string())
    }

    async fn change(&self, name: &str, spec: Value) -> Result<DynamicObject, String> {
        let patch = Patch::Merge(json!({ "spec": spec }));
        let answer = self.0.patch(name, &PatchParams::default(), &patch).await;
        answer.map_err(|error| error.to_string())
    }
}

#[track_caller]
fn refused(answer: Result<DynamicObject, String>, text: &str) {
    let error = answer.err().unwrap_or_else(|| panic!("accepted, want: {text}"));
    assert!(error.contains(text), "{error} does not say {text}");
}

/// The controller sets the finalizer here, where the original has a webhook.
#[tokio::test(flavor = "multi_thread")]
async fn a1_defaults_and_finalizer() {
    let mut cluster = Cluster::alone().await;
    cluster.start_ipam(crate::ipam::SETTINGS).await;
    let pools = Pools::new(&cluster);
    let made = pools.create("a1", json!({ "subnets": [{ "ipv4": "10.2.0.0/16" }] })).await.unwrap();
    assert_eq!(made.data["spec"]["blockSizeBits"], json!(5));
    eventually("the finalizer", || async {
        (pools.0.get("a1").await.unwrap().metadata.finalizers? == ["coil.cybozu.com"]).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a2_a3_valid_pools() {
    let cluster = Cluster::alone().await;
    let pools = Pools::new(&cluster);
    let zero = json!({ "blockSizeBits": 0, "subnets": [{ "ipv4": "10.2.0.0/24" }] });
    assert_eq!(pools.create("a2", zero).await.unwrap().data["spec"]["blockSizeBits"], json!(0));
    pools.create("a3", json!({ "blockSizeBits": 2, "subnets": [{ "ipv4": "10.3.0.0/24" }] })).await.unwrap();
    let dual = json!({ "blockSizeBits": 2, "subnets": [{ "ipv4": "10.4.0.0/24", "ipv6": "fd04::/120" }] });
    pools.create("dual", dual).await.unwrap();
    // Bits of hosts are let pass, as in the original.
    pools
        .create("bits", json!({ "blockSizeBits": 0, "subnets": [{ "ipv4": "10.5.0.1/32" }] }))
        .await
        .unwrap();
    let most = json!({ "blockSizeBits": 24, "subnets": [{ "ipv6": "fd05::/64" }] });
    pools.create("most", most).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a4_a5_a6_a7_invalid_pools() {
    let cluster = Cluster::alone().await;
    let pools = Pools::new(&cluster);
    let v4 = |net: &str| json!([{ "ipv4": net }]);
    let many: Vec<Value> = (0..129).map(|i| json!({ "ipv4": format!("10.0.{i}.0/24") })).collect();
    for (index, (bits, subnets, text)) in [
        (2, v4("10.3.0.0"), "invalid IPv4 subnet"),
        (2, v4("10.3.0.0/33"), "invalid IPv4 subnet"),
        (2, v4("fd00::/64"), "invalid IPv4 subnet"),
        (2, json!([{ "ipv6": "10.3.0.0/24" }]), "invalid IPv6 subnet"),
        (-1, v4("10.3.0.0/24"), "blockSizeBits"),
        (25, v4("10.0.0.0/4"), "blockSizeBits"),
        (2, json!([]), "subnets"),
        (2, json!(null), "subnets"),
        (8, v4("10.3.0.0/30"), "too narrow subnet"),
        (8, json!([{ "ipv6": "fd00::/124" }]), "too narrow subnet"),
        (0, json!([{}]), "ipv4 or ipv6 is required"),
        (0, json!([{ "ipv4": "10.0.0.0/24", "ipv6": "fd00::/112" }]), "must be the same size"),
        (0, json!([{ "ipv4": "10.0.0.0/24" }, { "ipv6": "fd00::/120" }]), "must have the same families"),
        (0, json!([{ "ipv4": "10.0.0.0/24" }, { "ipv4": "10.0.0.128/25" }]), "must not overlap"),
        (0, json!([{ "ipv6": "fd00::/120" }, { "ipv6": "fd00::/64" }]), "must not overlap"),
        (0, json!(many), "subnets"),
    ]
    .into_iter()
    .enumerate()
    {
        let spec = json!({ "blockSizeBits": bits, "subnets": subnets });
        refused(pools.create(&format!("bad-{index}"), spec).await, text);
    }
    refused(pools.create(&"a".repeat(64), json!({ "subnets": v4("10.0.0.0/24") })).await, "at most 63");
}

#[tokio::test(flavor = "multi_thread")]
async fn a8_a9_a10_a11_a12_changes() {
    let cluster = Cluster::alone().await;
    let pools = Pools::new(&cluster);
    pools.create("a8", json!({ "blockSizeBits": 0, "subnets": [{ "ipv6": "fd02::/120" }] })).await.unwrap();
    let appended = json!({ "subnets": [{ "ipv6": "fd02::/120" }, { "ipv6": "fd03::/112" }] });
    pools.change("a8", appended).await.unwrap();

    let v4 = json!({ "blockSizeBits": 8, "subnets": [{ "ipv4": "10.2.0.0/16" }, { "ipv4": "10.3.0.0/16" }] });
    pools.create("v4", v4).await.unwrap();
    let list = |nets: &[&str]| json!({ "subnets": nets.iter().map(|net| json!({ "ipv4": net })).collect::<Vec<_>>() });
    refused(
        pools.change("v4", list(&["10.2.0.0/16", "10.3.0.0/16", "10.4.0.0/28"])).await,
        "too narrow subnet",
    );
    refused(pools.change("v4", json!({ "blockSizeBits": 7 })).await, "unchangeable");
    refused(pools.change("v4", json!({ "blockSizeBits": null })).await, "unchangeable");
    refused(pools.change("v4", list(&["10.2.0.0/16"])).await, "unshrinkable");
    refused(pools.change("v4", list(&["10.2.0.0/16", "10.5.0.0/16"])).await, "unchangeable");
    refused(pools.change("v4", list(&["10.3.0.0/16", "10.2.0.0/16"])).await, "unchangeable");
    refused(pools.change("v4", list(&["10.9.0.0/16", "10.2.0.0/16", "10.3.0.0/16"])).await, "unchangeable");
    pools.change("v4", list(&["10.2.0.0/16", "10.3.0.0/16", "10.9.0.0/16"])).await.unwrap();
    // A prefix of a text is not a prefix of a list.
    pools.create("text", json!({ "blockSizeBits": 0, "subnets": [{ "ipv4": "10.6.0.0/2" }] })).await.unwrap();
    refused(pools.change("text", list(&["10.6.0.0/24"])).await, "unchangeable");
}
