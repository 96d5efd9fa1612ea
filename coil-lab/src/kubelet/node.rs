//! Node objects and their heartbeat.

use crate::topology::Node;
use k8s_openapi::api::core::v1::Node as NodeObject;
use k8s_openapi::jiff::Timestamp;
use kube::api::{Api, Patch, PatchParams, PostParams};
use kube::{Client, Error};
use serde_json::{Value, json};
use std::time::Duration;
use tracing::warn;

const NOT_READY: &str = "node.kubernetes.io/not-ready";

/// Makes or updates the node's object and reports it ready; `boot` counts how often it was started again.
pub(super) async fn register(client: &Client, node: &Node, boot: u32) -> Result<(), Error> {
    let nodes: Api<NodeObject> = Api::all(client.clone());
    let object = object(node);
    match serde_json::from_value(object.clone()) {
        Ok(new) => match nodes.create(&PostParams::default(), &new).await {
            Err(Error::Api(status)) if status.code == 409 => {
                nodes.patch(&node.name, &PatchParams::default(), &Patch::Merge(&object)).await?;
            }
            other => {
                other?;
            }
        },
        Err(error) => return Err(Error::SerdeError(error)),
    }
    report(client, node, Some(boot)).await?;
    untaint(&nodes, &node.name).await
}

/// An API server taints a new node until the controller of nodes finds it ready. That one does not run here: it would
/// evict pods whenever a busy machine delays a heartbeat.
async fn untaint(nodes: &Api<NodeObject>, name: &str) -> Result<(), Error> {
    let taints = nodes.get(name).await?.spec.and_then(|spec| spec.taints).unwrap_or_default();
    let kept: Vec<_> = taints.iter().filter(|taint| taint.key != NOT_READY).collect();
    if kept.len() == taints.len() {
        return Ok(());
    }
    let patch = json!({ "spec": { "taints": kept } });
    nodes.patch(name, &PatchParams::default(), &Patch::Merge(&patch)).await.map(|_| ())
}

/// Reports every node again and again, as a node controller expects.
pub(super) async fn heartbeats(client: Client, nodes: Vec<Node>) {
    let mut ticks = tokio::time::interval(Duration::from_secs(20));
    ticks.tick().await;
    loop {
        ticks.tick().await;
        for node in &nodes {
            if let Err(error) = report(&client, node, None).await {
                warn!(node = node.name, %error, "heartbeat");
            }
        }
    }
}

async fn report(client: &Client, node: &Node, boot: Option<u32>) -> Result<(), Error> {
    let nodes: Api<NodeObject> = Api::all(client.clone());
    let now = Timestamp::now();
    let since = nodes
        .get(&node.name)
        .await?
        .status
        .and_then(|status| status.conditions)
        .and_then(|conditions| conditions.into_iter().find(|condition| condition.type_ == "Ready"))
        .filter(|condition| condition.status == "True")
        .and_then(|condition| condition.last_transition_time)
        .map_or(now, |time| time.0);
    let mut status = status(node, since, now);
    if let Some(boot) = boot {
        status["nodeInfo"]["bootID"] = json!(format!("{}-{boot}", node.name));
    }
    let status = json!({ "status": status });
    nodes.patch_status(&node.name, &PatchParams::default(), &Patch::Merge(&status)).await.map(|_| ())
}

fn object(node: &Node) -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {
            "name": node.name,
            "labels": {
                "kubernetes.io/hostname": node.name,
                "kubernetes.io/os": "linux",
                "kubernetes.io/arch": "amd64",
                "topology.kubernetes.io/region": "lab",
                "topology.kubernetes.io/zone": node.zone,
            },
        },
        "spec": {
            "podCIDR": node.pod_cidrs.first(),
            "podCIDRs": node.pod_cidrs,
            "providerID": format!("coil-lab://{}", node.name),
        },
    })
}

fn status(node: &Node, since: Timestamp, now: Timestamp) -> Value {
    let mut addresses: Vec<Value> =
        node.addresses.iter().map(|net| json!({ "type": "InternalIP", "address": net.addr() })).collect();
    addresses.push(json!({ "type": "Hostname", "address": node.name }));
    let resources = json!({ "cpu": "64", "memory": "256Gi", "ephemeral-storage": "256Gi", "pods": "250" });
    // RFC 3339 with whole seconds is what the type metav1.Time holds.
    let time = |time: Timestamp| time.strftime("%Y-%m-%dT%H:%M:%SZ").to_string();
    let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    json!({
        "addresses": addresses,
        "capacity": resources,
        "allocatable": resources,
        "conditions": [{
            "type": "Ready",
            "status": "True",
            "reason": "KubeletReady",
            "message": "the lab's stand-in for the kubelet is ready",
            "lastTransitionTime": time(since),
            "lastHeartbeatTime": time(now),
        }],
        "daemonEndpoints": { "kubeletEndpoint": { "Port": 10250 } },
        "nodeInfo": {
            "architecture": "amd64",
            "operatingSystem": "linux",
            "osImage": "network namespace",
            "kernelVersion": kernel.trim(),
            "kubeletVersion": "v1.33.0-coil-lab",
            "kubeProxyVersion": "",
            "containerRuntimeVersion": "coil-lab://1",
            "machineID": node.name,
            "systemUUID": node.name,
        },
    })
}
