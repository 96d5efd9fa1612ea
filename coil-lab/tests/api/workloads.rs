//! Controllers: rollouts, endpoints, garbage collection, scheduling.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use coil_lab::api::obj;
use coil_lab::api::store::ChangeKind;
use k8s_openapi::api::apps::v1::{DaemonSet, Deployment, ReplicaSet};
use k8s_openapi::api::core::v1::{ConfigMap, Pod, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use kube::api::{Api, DeleteParams, ListParams, Patch, PatchParams, PostParams};
use serde_json::{Value, json};

use crate::support::{Server, eventually};

fn workload(kind: &str, spec: Value) -> Value {
    let mut object = json!({
        "apiVersion": "apps/v1", "kind": kind, "metadata": {"name": "w"},
        "spec": {
            "selector": {"matchLabels": {"app": "w"}},
            "template": {"metadata": {"labels": {"app": "w"}}, "spec": {"containers": [{"name": "c", "image": "i:1"}]}},
        },
    });
    json_patch::merge(&mut object, &json!({"spec": spec}));
    object
}

async fn rolled_out(api: &Api<Deployment>, replicas: i32) -> Deployment {
    eventually("the rollout is complete", || async {
        let found = api.get("w").await.unwrap();
        let status = found.status.clone()?;
        let is_done = status.observed_generation == found.metadata.generation
            && status.updated_replicas.unwrap_or(0) == replicas
            && status.replicas.unwrap_or(0) == replicas
            && status.available_replicas.unwrap_or(0) == replicas;
        is_done.then_some(found)
    })
    .await
}

/// Goes through all changes of pods since a version, with the pods that there were after each.
fn replay(server: &Server, since: u64, mut check: impl FnMut(&BTreeMap<String, Arc<Value>>)) {
    let pods = server.api.resource("", "pods").unwrap();
    let mut present = BTreeMap::new();
    for change in server.api.store.changes_since(&pods.storage, since).unwrap() {
        let name = obj::name(&change.object).to_owned();
        if change.kind == ChangeKind::Deleted {
            present.remove(&name);
        } else {
            present.insert(name, change.object.clone());
        }
        check(&present);
    }
}

#[tokio::test]
async fn deployments_roll_over_without_a_gap() {
    let server = Server::with_nodes(2).await;
    let start = server.api.store.version();
    let api: Api<Deployment> = Api::default_namespaced(server.client.clone());
    let rolling = json!({"replicas": 2, "strategy": {"rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}}});
    let object = serde_json::from_value(workload("Deployment", rolling)).unwrap();
    api.create(&PostParams::default(), &object).await.unwrap();
    let done = rolled_out(&api, 2).await;
    assert_eq!(done.metadata.annotations.unwrap()["deployment.kubernetes.io/revision"], "1");
    let pods: Api<Pod> = Api::default_namespaced(server.client.clone());
    let mut nodes: Vec<String> = pods
        .list(&ListParams::default())
        .await
        .unwrap()
        .into_iter()
        .map(|pod| pod.spec.unwrap().node_name.unwrap())
        .collect();
    nodes.sort();
    assert_eq!(nodes, ["n1", "n2"], "siblings spread");

    let image = Patch::Strategic(
        json!({"spec": {"template": {"spec": {"containers": [{"name": "c", "image": "i:2"}]}}}}),
    );
    api.patch("w", &PatchParams::default(), &image).await.unwrap();
    let done = rolled_out(&api, 2).await;
    assert_eq!(done.metadata.annotations.unwrap()["deployment.kubernetes.io/revision"], "2");
    let (mut was_up, mut most) = (false, 0);
    replay(&server, start, |pods| {
        let is_up = |pod: &&Arc<Value>| obj::condition_is_true(pod, "Ready") && !obj::is_deleting(pod);
        let up = pods.values().filter(is_up).count();
        was_up |= up == 2;
        assert!(!was_up || up >= 2, "{up} of 2 are up");
        most = most.max(pods.values().filter(|pod| !obj::is_deleting(pod)).count());
    });
    assert_eq!(most, 3, "one more than wished, never two");
    let sets: Api<ReplicaSet> = Api::default_namespaced(server.client.clone());
    assert_eq!(sets.list(&ListParams::default()).await.unwrap().items.len(), 2);

    api.delete("w", &DeleteParams::foreground()).await.unwrap();
    eventually("all is gone", || async {
        let empty = pods.list(&ListParams::default()).await.unwrap().items.is_empty()
            && sets.list(&ListParams::default()).await.unwrap().items.is_empty()
            && api.get_opt("w").await.unwrap().is_none();
        empty.then_some(())
    })
    .await;
}

#[tokio::test]
async fn sets_adopt_orphans_and_let_go_of_strangers() {
    let server = Server::with_nodes(1).await;
    let api: Api<Deployment> = Api::default_namespaced(server.client.clone());
    let object = serde_json::from_value(workload("Deployment", json!({"replicas": 1}))).unwrap();
    api.create(&PostParams::default(), &object).await.unwrap();
    rolled_out(&api, 1).await;
    let pods: Api<Pod> = Api::default_namespaced(server.client.clone());
    let names = async || -> Vec<String> {
        let list = pods.list(&ListParams::default()).await.unwrap();
        list.into_iter().map(|pod| pod.metadata.name.unwrap()).collect()
    };
    let first = names().await;
    // A deployment that comes back finds its set and its pod.
    api.delete("w", &DeleteParams::orphan()).await.unwrap();
    eventually("the deployment is gone", || async {
        api.get_opt("w").await.unwrap().is_none().then_some(())
    })
    .await;
    api.create(&PostParams::default(), &object).await.unwrap();
    rolled_out(&api, 1).await;
    assert_eq!(names().await, first);
    // A pod whose labels no longer match is set free and replaced.
    let relabel = Patch::Merge(json!({"metadata": {"labels": {"app": "suspect"}}}));
    pods.patch(&first[0], &PatchParams::default(), &relabel).await.unwrap();
    eventually("the pod is free and has a successor", || async {
        let freed = pods.get(&first[0]).await.unwrap();
        let is_free = freed.metadata.owner_references.is_none_or(|list| list.is_empty());
        (is_free && names().await.len() == 2).then_some(())
    })
    .await;
}

#[tokio::test]
async fn recreate_ends_all_before_it_starts_any() {
    let server = Server::with_nodes(1).await;
    let start = server.api.store.version();
    let api: Api<Deployment> = Api::default_namespaced(server.client.clone());
    let spec = json!({"replicas": 2, "strategy": {"type": "Recreate"}});
    api.create(&PostParams::default(), &serde_json::from_value(workload("Deployment", spec)).unwrap())
        .await
        .unwrap();
    rolled_out(&api, 2).await;
    let image = Patch::Strategic(
        json!({"spec": {"template": {"spec": {"containers": [{"name": "c", "image": "i:2"}]}}}}),
    );
    api.patch("w", &PatchParams::default(), &image).await.unwrap();
    rolled_out(&api, 2).await;
    let mut generations = BTreeSet::new();
    replay(&server, start, |pods| {
        let hashes: BTreeSet<&str> =
            pods.values().filter_map(|pod| obj::label(pod, "pod-template-hash")).collect();
        assert!(hashes.len() <= 1, "old and new together: {hashes:?}");
        generations.extend(hashes.into_iter().map(str::to_owned));
    });
    assert_eq!(generations.len(), 2);
}

#[tokio::test]
async fn services_have_slices_per_family_and_budgets_count() {
    let server = Server::with_nodes(2).await;
    let api: Api<Deployment> = Api::default_namespaced(server.client.clone());
    let object = serde_json::from_value(workload("Deployment", json!({"replicas": 2}))).unwrap();
    api.create(&PostParams::default(), &object).await.unwrap();
    let services: Api<Service> = Api::default_namespaced(server.client.clone());
    let service = json!({
        "metadata": {"name": "s", "labels": {"app.kubernetes.io/component": "egress"}},
        "spec": {"ipFamilyPolicy": "PreferDualStack", "selector": {"app": "w"}, "ports": [{"port": 5555, "protocol": "UDP"}]},
    });
    services.create(&PostParams::default(), &serde_json::from_value(service).unwrap()).await.unwrap();
    let budgets: Api<PodDisruptionBudget> = Api::default_namespaced(server.client.clone());
    let budget = json!({"metadata": {"name": "b"}, "spec": {"maxUnavailable": 1, "selector": {"matchLabels": {"app": "w"}}}});
    budgets.create(&PostParams::default(), &serde_json::from_value(budget).unwrap()).await.unwrap();
    let slices: Api<EndpointSlice> = Api::default_namespaced(server.client.clone());
    let by_label = ListParams::default().labels("app.kubernetes.io/component=egress");
    let found = eventually("two ready endpoints in each of two slices", || async {
        let list = slices.list(&by_label).await.unwrap().items;
        let is_ready = |slice: &EndpointSlice| {
            let ready = slice.endpoints.iter().filter(|one| {
                one.conditions.as_ref().is_some_and(|conditions| conditions.ready == Some(true))
            });
            ready.count() == 2
        };
        (list.len() == 2 && list.iter().all(is_ready)).then_some(list)
    })
    .await;
    let mut families: Vec<&str> = found.iter().map(|slice| slice.address_type.as_str()).collect();
    families.sort_unstable();
    assert_eq!(families, ["IPv4", "IPv6"]);
    eventually("the budget allows one", || async {
        let status = budgets.get("b").await.unwrap().status?;
        (status.disruptions_allowed == 1 && status.current_healthy == 2).then_some(())
    })
    .await;
}

#[tokio::test]
async fn daemon_sets_cover_all_nodes() {
    let server = Server::with_nodes(3).await;
    let api: Api<DaemonSet> = Api::default_namespaced(server.client.clone());
    let object = serde_json::from_value(workload("DaemonSet", json!({}))).unwrap();
    api.create(&PostParams::default(), &object).await.unwrap();
    eventually("three pods are ready", || async {
        (api.get("w").await.unwrap().status?.number_ready == 3).then_some(())
    })
    .await;
}

#[tokio::test]
async fn unschedulable_pods_say_why() {
    let server = Server::with_nodes(1).await;
    let pods: Api<Pod> = Api::default_namespaced(server.client.clone());
    let pod = json!({
        "metadata": {"name": "p"},
        "spec": {"nodeSelector": {"disk": "ssd"}, "containers": [{"name": "c", "image": "i"}]},
    });
    pods.create(&PostParams::default(), &serde_json::from_value(pod).unwrap()).await.unwrap();
    let message = eventually("the pod has a condition", || async {
        let conditions = pods.get("p").await.unwrap().status?.conditions?;
        conditions.into_iter().find(|one| one.reason.as_deref() == Some("Unschedulable"))?.message
    })
    .await;
    assert_eq!(message, "0/1 nodes are available: 1 node(s) didn't match Pod's node affinity/selector.");
}

#[tokio::test]
async fn dependents_go_with_their_owners() {
    let server = Server::start().await;
    let api: Api<ConfigMap> = Api::default_namespaced(server.client.clone());
    let make = async |value: Value| {
        api.create(&PostParams::default(), &serde_json::from_value(value).unwrap()).await.unwrap()
    };
    let dependent = |name: &str, owner: &ConfigMap, block: bool| {
        json!({"metadata": {"name": name, "ownerReferences": [{
            "apiVersion": "v1", "kind": "ConfigMap", "name": owner.metadata.name, "uid": owner.metadata.uid,
            "blockOwnerDeletion": block,
        }]}})
    };
    let gone = async |name: &str| {
        eventually(name, || async { api.get_opt(name).await.unwrap().is_none().then_some(()) }).await;
    };
    let first = make(json!({"metadata": {"name": "first"}})).await;
    make(dependent("child", &first, false)).await;
    api.delete("first", &DeleteParams::background()).await.unwrap();
    gone("child").await;

    // In the foreground the owner waits for what blocks it.
    let second = make(json!({"metadata": {"name": "second"}})).await;
    let mut held = dependent("held", &second, true);
    held["metadata"]["finalizers"] = json!(["test/hold"]);
    make(held).await;
    api.delete("second", &DeleteParams::foreground()).await.unwrap();
    eventually("the dependent is marked", || async {
        api.get("held").await.unwrap().metadata.deletion_timestamp
    })
    .await;
    assert!(api.get_opt("second").await.unwrap().is_some());
    let release = Patch::Merge(json!({"metadata": {"finalizers": null}}));
    api.patch("held", &PatchParams::default(), &release).await.unwrap();
    gone("second").await;

    let third = make(json!({"metadata": {"name": "third"}})).await;
    make(dependent("orphan", &third, true)).await;
    api.delete("third", &DeleteParams::orphan()).await.unwrap();
    gone("third").await;
    assert!(api.get("orphan").await.unwrap().metadata.owner_references.is_none_or(|list| list.is_empty()));
}

#[tokio::test]
async fn pods_wait_for_their_kubelet() {
    let server = Server::start().await;
    let pods: Api<Pod> = Api::default_namespaced(server.client.clone());
    let pod = |name: &str, node: Value| {
        serde_json::from_value(json!({
            "metadata": {"name": name},
            "spec": {"nodeName": node, "containers": [{"name": "c", "image": "i"}]},
        }))
        .unwrap()
    };
    pods.create(&PostParams::default(), &pod("bound", json!("n1"))).await.unwrap();
    pods.create(&PostParams::default(), &pod("free", Value::Null)).await.unwrap();
    pods.delete("free", &DeleteParams::default()).await.unwrap();
    assert!(pods.get_opt("free").await.unwrap().is_none());
    pods.delete("bound", &DeleteParams::default()).await.unwrap();
    let marked = pods.get("bound").await.unwrap();
    assert_eq!(marked.metadata.deletion_grace_period_seconds, Some(30));
    pods.delete("bound", &DeleteParams::default().grace_period(0)).await.unwrap();
    assert!(pods.get_opt("bound").await.unwrap().is_none());
}
