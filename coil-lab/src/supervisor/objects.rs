//! The objects that a lab starts with: custom resource definitions and the pods of Coil itself; and waiting for them.

use crate::options::Networking;
use crate::state::State;
use anyhow::{Context, bail};
use ipnet::IpNet;
use k8s_openapi::api::core::v1::Pod;
use kube::api::{Api, DynamicObject, ListParams, Patch, PatchParams};
use kube::core::GroupVersionKind;
use kube::{Client, ResourceExt, discovery};
use serde_json::{Value, json};
use std::path::Path;
use std::time::{Duration, Instant};

const COIL: &str = include_str!("coil.yaml");
/// What the programs may do is what the product's manifests say, so that an API server which enforces roles tests them.
const ROLES: [&str; 4] = [
    include_str!("../../../manifests/agent/rbac.yaml"),
    include_str!("../../../manifests/rbac/controller.yaml"),
    include_str!("../../../manifests/rbac/egress.yaml"),
    include_str!("../../../manifests/rbac/leader-election.yaml"),
];
/// Small, so that a few pods need several blocks.
const BLOCK_SIZE_BITS: u32 = 2;
const FIELD_MANAGER: &str = "coil-lab";

/// Applies every manifest of a folder, and waits until the API serves the kinds that they define.
pub(super) async fn definitions(client: &Client, folder: &Path) -> anyhow::Result<()> {
    let entries = std::fs::read_dir(folder)
        .with_context(|| format!("cannot read the custom resource definitions in {}", folder.display()))?;
    let mut files: Vec<_> = entries.flatten().map(|entry| entry.path()).collect();
    files.retain(|path| path.extension().is_some_and(|extension| extension == "yaml" || extension == "yml"));
    // What is for kubectl alone, not for the API.
    files.retain(|path| path.file_stem().is_none_or(|stem| stem != "kustomization"));
    files.sort();
    for file in files {
        let text =
            std::fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))?;
        for definition in apply(client, &text).await.with_context(|| format!("{}", file.display()))? {
            established(client, &definition).await?;
        }
    }
    Ok(())
}

/// Applies the roles and the pods of Coil.
pub(super) async fn coil(client: &Client, state: &State) -> anyhow::Result<()> {
    for text in ROLES {
        apply(client, text).await?;
    }
    let ipam = state.options.wired_by() == Networking::Coil;
    let text = COIL
        .replace("@IMAGE@", crate::COIL_IMAGE)
        .replace("@ROOT@", crate::paths::ROOT)
        .replace("@IPAM@", &ipam.to_string());
    if ipam {
        apply(client, &pool(&state.topology.pool).to_string()).await?;
    }
    apply(client, &text).await.map(drop)
}

/// The pool that pods get their addresses from unless their namespace names another.
fn pool(subnets: &[IpNet]) -> Value {
    let of = |v4: bool| subnets.iter().find(|net| net.addr().is_ipv4() == v4);
    let mut subnet = serde_json::Map::new();
    for (family, net) in [("ipv4", of(true)), ("ipv6", of(false))] {
        if let Some(net) = net {
            subnet.insert(family.to_owned(), json!(net));
        }
    }
    json!({
        "apiVersion": "coil.cybozu.com/v2",
        "kind": "AddressPool",
        "metadata": { "name": "default" },
        "spec": { "blockSizeBits": BLOCK_SIZE_BITS, "subnets": [subnet] },
    })
}

/// Waits until all of Coil's own pods are ready.
pub(super) async fn coil_ready(client: &Client, state: &State) -> anyhow::Result<()> {
    let limit = Duration::from_secs(state.options.wait_seconds);
    let begun = Instant::now();
    let mut told = 0;
    loop {
        let mut waiting = Vec::new();
        for (kind, name, wanted, ready) in [
            ("DaemonSet", "coild", "desiredNumberScheduled", "numberReady"),
            ("Deployment", "coil-controller", "replicas", "readyReplicas"),
        ] {
            let object = api(client, "apps", "v1", kind, Some("kube-system")).await?.get(name).await?;
            let status = &object.data["status"];
            let count = |key: &str| status[key].as_i64().unwrap_or(0);
            let expected = if kind == "DaemonSet" { state.options.nodes as i64 } else { 1 };
            if count(ready) < expected || count(wanted) < expected {
                waiting.push(format!("{name} ({} of {expected} ready)", count(ready)));
            }
        }
        if waiting.is_empty() {
            return Ok(());
        }
        if begun.elapsed().as_secs() / 5 > told {
            told = begun.elapsed().as_secs() / 5;
            super::progress(format!("waiting for {}", waiting.join(", ")));
        }
        if begun.elapsed() > limit {
            bail!("not ready after {} s: {}", limit.as_secs(), waiting.join(", "));
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// Waits until Coil's own pods on a node are ready.
pub(super) async fn coil_ready_on(client: &Client, state: &State, node: &str) -> anyhow::Result<()> {
    let pods: Api<Pod> = Api::namespaced(client.clone(), "kube-system");
    let selector = ListParams::default().labels("app.kubernetes.io/name=coil");
    let limit = Duration::from_secs(state.options.wait_seconds);
    let begun = Instant::now();
    loop {
        let list = pods.list(&selector).await.context("listing the pods of Coil")?.items;
        let bound = |pod: &&Pod| pod.spec.as_ref().and_then(|spec| spec.node_name.as_deref()) == Some(node);
        let here: Vec<&Pod> = list.iter().filter(bound).collect();
        let waiting: Vec<_> = here.iter().filter(|pod| !ready(pod)).map(|pod| pod.name_any()).collect();
        // A node that was deleted has none until the control plane knows it again.
        if waiting.is_empty() && !here.is_empty() {
            return Ok(());
        }
        if begun.elapsed() > limit {
            bail!("not ready on {node} after {} s: {}", limit.as_secs(), waiting.join(", "));
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

fn ready(pod: &Pod) -> bool {
    let conditions = pod.status.as_ref().and_then(|status| status.conditions.as_ref());
    conditions.into_iter().flatten().any(|condition| condition.type_ == "Ready" && condition.status == "True")
}

/// Applies the objects of a manifest in order.
async fn apply(client: &Client, text: &str) -> anyhow::Result<Vec<DynamicObject>> {
    let values: Vec<Value> = serde_saphyr::from_multiple(text).context("the manifest is no YAML")?;
    let mut applied = Vec::new();
    for value in values.into_iter().filter(|value| !value.is_null()) {
        let object: DynamicObject =
            serde_json::from_value(value.clone()).context("an object without kind")?;
        let types = object.types.clone().context("an object without kind")?;
        let name = object.name_any();
        let subject = format!("{} {name}", types.kind);
        let (group, version) = types.api_version.split_once('/').unwrap_or(("", &types.api_version));
        let api = api(client, group, version, &types.kind, object.namespace().as_deref()).await?;
        let parameters = PatchParams::apply(FIELD_MANAGER).force();
        applied.push(api.patch(&name, &parameters, &Patch::Apply(&value)).await.with_context(|| subject)?);
    }
    Ok(applied)
}

async fn api(
    client: &Client,
    group: &str,
    version: &str,
    kind: &str,
    namespace: Option<&str>,
) -> anyhow::Result<Api<DynamicObject>> {
    let kind = GroupVersionKind::gvk(group, version, kind);
    let (resource, _) =
        discovery::pinned_kind(client, &kind).await.with_context(|| format!("the API knows no {kind:?}"))?;
    Ok(match namespace {
        Some(namespace) => Api::namespaced_with(client.clone(), namespace, &resource),
        None => Api::all_with(client.clone(), &resource),
    })
}

/// Waits until a custom resource definition is served.
async fn established(client: &Client, definition: &DynamicObject) -> anyhow::Result<()> {
    let name = definition.name_any();
    let api = api(client, "apiextensions.k8s.io", "v1", "CustomResourceDefinition", None).await?;
    let begun = Instant::now();
    loop {
        let conditions = api.get(&name).await?.data["status"]["conditions"].clone();
        let served = conditions
            .as_array()
            .into_iter()
            .flatten()
            .any(|condition| condition["type"] == "Established" && condition["status"] == "True");
        if served {
            return Ok(());
        }
        if begun.elapsed() > Duration::from_secs(30) {
            bail!("{name} is not served: {conditions}");
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}
