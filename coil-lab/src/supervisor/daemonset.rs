//! DaemonSets where nothing else looks after them: one pod per lab node, replaced when the template changes.

use crate::state::State;
use anyhow::Context;
use futures::StreamExt;
use k8s_openapi::api::apps::v1::DaemonSet;
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use kube::api::{Api, DeleteParams, ObjectMeta, Patch, PatchParams, PostParams};
use kube::runtime::reflector::Store;
use kube::runtime::{WatchStreamExt, reflector, watcher};
use kube::{Client, ResourceExt};
use serde_json::json;
use std::collections::hash_map::DefaultHasher;
use std::hash::{Hash, Hasher};
use std::sync::Arc;
use tracing::{info, warn};

const REVISION: &str = "controller-revision-hash";

/// What to do about one DaemonSet. Pure outcome of [`plan`].
#[derive(Debug, Default, PartialEq, Eq)]
struct Plan {
    /// Nodes that need a pod.
    create: Vec<String>,
    /// Pods that must go.
    delete: Vec<String>,
    /// Pods that are ready.
    ready: usize,
    /// Pods of the present template.
    updated: usize,
    /// Nodes that have a pod.
    current: usize,
}

/// Runs until a watch ends for good.
pub(super) async fn run(client: Client, state: State) -> anyhow::Result<()> {
    let (pods, pod_writer) = reflector::store();
    let (sets, set_writer) = reflector::store();
    let config = watcher::Config::default();
    let pod_events =
        watcher(Api::<Pod>::all(client.clone()), config.clone()).default_backoff().reflect(pod_writer);
    let set_events =
        watcher(Api::<DaemonSet>::all(client.clone()), config).default_backoff().reflect(set_writer);
    let mut events = futures::stream::select(
        pod_events.map(|event| event.map(drop)).boxed(),
        set_events.map(|event| event.map(drop)).boxed(),
    );
    loop {
        if let Err(error) = events.next().await.context("the watches have ended")? {
            warn!(%error, "watch");
        }
        // Pods that exist but are not known yet would be made a second time.
        let known = async { (pods.wait_until_ready().await.is_ok(), sets.wait_until_ready().await.is_ok()) };
        if !matches!(futures::poll!(Box::pin(known)), std::task::Poll::Ready((true, true))) {
            continue;
        }
        for set in sets.state() {
            if let Err(error) = reconcile(&client, &state, &set, &pods).await {
                warn!(%error, name = set.name_any(), "DaemonSet");
            }
        }
    }
}

async fn reconcile(
    client: &Client,
    state: &State,
    set: &DaemonSet,
    pods: &Store<Pod>,
) -> Result<(), kube::Error> {
    let namespace = set.namespace().unwrap_or_default();
    let api: Api<Pod> = Api::namespaced(client.clone(), &namespace);
    if set.metadata.deletion_timestamp.is_some() {
        return Ok(());
    }
    let nodes: Vec<&str> = state.topology.nodes.iter().map(|node| node.name.as_str()).collect();
    let revision = revision(set);
    let plan = plan(set, &revision, &nodes, &pods.state());
    for name in &plan.delete {
        match api.delete(name, &DeleteParams::default()).await {
            Err(kube::Error::Api(status)) if status.code == 404 => {}
            other => {
                other?;
            }
        }
    }
    for node in &plan.create {
        let pod = pod(set, &revision, node);
        match api.create(&PostParams::default(), &pod).await {
            // It is there already and the watch will tell.
            Err(kube::Error::Api(status)) if status.code == 409 => {}
            Err(error) => return Err(error),
            Ok(_) => info!(name = pod.name_any(), node, "pod made"),
        }
    }
    let status = json!({
        "observedGeneration": set.metadata.generation,
        "desiredNumberScheduled": nodes.len(),
        "currentNumberScheduled": plan.current,
        "updatedNumberScheduled": plan.updated,
        "numberReady": plan.ready,
        "numberAvailable": plan.ready,
        "numberUnavailable": nodes.len() - plan.ready.min(nodes.len()),
        "numberMisscheduled": 0,
    });
    let before = set.status.as_ref().and_then(|status| serde_json::to_value(status).ok()).unwrap_or_default();
    let changed =
        status.as_object().is_some_and(|fields| fields.iter().any(|(key, value)| before[key] != *value));
    if changed {
        let sets: Api<DaemonSet> = Api::namespaced(client.clone(), &namespace);
        let patch = json!({ "status": status });
        match sets.patch_status(&set.name_any(), &PatchParams::default(), &Patch::Merge(&patch)).await {
            Err(kube::Error::Api(status)) if status.code == 404 => {}
            other => {
                other?;
            }
        }
    }
    Ok(())
}

fn plan(set: &DaemonSet, revision: &str, nodes: &[&str], pods: &[Arc<Pod>]) -> Plan {
    let mut plan = Plan::default();
    let own: Vec<&Arc<Pod>> = pods
        .iter()
        .filter(|pod| {
            pod.owner_references().iter().any(|owner| Some(&owner.uid) == set.metadata.uid.as_ref())
        })
        .collect();
    for node in nodes {
        let mut here = own
            .iter()
            .filter(|pod| pod.spec.as_ref().and_then(|spec| spec.node_name.as_deref()) == Some(*node));
        let Some(pod) = here.next() else {
            plan.create.push((*node).to_owned());
            continue;
        };
        plan.current += 1;
        let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref());
        let updated = pod.labels().get(REVISION).map(String::as_str) == Some(revision);
        let over = matches!(phase, Some("Succeeded" | "Failed"));
        plan.updated += usize::from(updated);
        plan.ready += usize::from(ready(pod));
        if pod.metadata.deletion_timestamp.is_none() && (over || !updated) {
            plan.delete.push(pod.name_any());
        }
        plan.delete.extend(here.map(|pod| pod.name_any()));
    }
    plan
}

fn ready(pod: &Pod) -> bool {
    let conditions = pod.status.iter().flat_map(|status| status.conditions.iter().flatten());
    pod.metadata.deletion_timestamp.is_none()
        && conditions.into_iter().any(|condition| condition.type_ == "Ready" && condition.status == "True")
}

fn revision(set: &DaemonSet) -> String {
    let template = set.spec.as_ref().map(|spec| &spec.template);
    let text = serde_json::to_string(&template).unwrap_or_default();
    let mut hasher = DefaultHasher::new();
    text.hash(&mut hasher);
    format!("{:08x}", hasher.finish() & 0xffff_ffff)
}

fn pod(set: &DaemonSet, revision: &str, node: &str) -> Pod {
    let template = set.spec.as_ref().map(|spec| spec.template.clone()).unwrap_or_default();
    let metadata = template.metadata.unwrap_or_default();
    let mut labels = metadata.labels.unwrap_or_default();
    labels.insert(REVISION.to_owned(), revision.to_owned());
    let mut spec = template.spec.unwrap_or_default();
    spec.node_name = Some(node.to_owned());
    Pod {
        metadata: ObjectMeta {
            // A name per node: two reconciles at once cannot make two pods.
            name: Some(format!("{}-{node}-{revision}", set.name_any())),
            namespace: set.namespace(),
            labels: Some(labels),
            annotations: metadata.annotations,
            owner_references: Some(vec![OwnerReference {
                api_version: "apps/v1".to_owned(),
                kind: "DaemonSet".to_owned(),
                name: set.name_any(),
                uid: set.metadata.uid.clone().unwrap_or_default(),
                controller: Some(true),
                block_owner_deletion: Some(true),
            }]),
            ..ObjectMeta::default()
        },
        spec: Some(spec),
        status: None,
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]
    use super::*;

    fn set() -> DaemonSet {
        serde_json::from_value(json!({
            "metadata": { "name": "d", "namespace": "n", "uid": "s" },
            "spec": { "selector": {}, "template": { "metadata": { "labels": { "a": "b" } } } },
        }))
        .unwrap()
    }

    #[test]
    fn one_pod_per_node() {
        let set = set();
        let revision = revision(&set);
        let first = plan(&set, &revision, &["w1", "w2"], &[]);
        assert_eq!(first.create, ["w1", "w2"]);
        let made = Arc::new(pod(&set, &revision, "w1"));
        let second = plan(&set, &revision, &["w1", "w2"], std::slice::from_ref(&made));
        assert_eq!((second.create, second.current, second.updated), (vec!["w2".to_owned()], 1, 1));
        let changed = plan(&set, "other", &["w1"], &[made]);
        assert_eq!(changed.delete.len(), 1);
        assert!(changed.create.is_empty());
    }
}
