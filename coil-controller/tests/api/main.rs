//! The controller against an API server: the lab's embedded one, or the one that
//! `COIL_TEST_KUBECONFIG` names, which should be empty and is not cleaned up.

#![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

mod ipam;
mod pools;
mod support;

use coil_api::Egress;
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::{Namespace, Pod, Service, ServiceAccount};
use k8s_openapi::api::events::v1::Event;
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use k8s_openapi::api::rbac::v1::ClusterRoleBinding;
use kube::api::{DeleteParams, DynamicObject, ListParams, Patch, PatchParams, PostParams};
use kube::{Api, ResourceExt};
use serde_json::{Value, json};

use support::{Cluster, condition, eventually};

#[tokio::test(flavor = "multi_thread")]
async fn a59_a63_children_and_status() {
    let cluster = Cluster::start().await;
    let namespace = cluster.namespace("internet").await;
    cluster.egress(&namespace, "egress", json!({ "replicas": 2 })).await;
    let egresses: Api<Egress> = Api::namespaced(cluster.client(), &namespace);
    let deployments: Api<Deployment> = Api::namespaced(cluster.client(), &namespace);
    let services: Api<Service> = Api::namespaced(cluster.client(), &namespace);
    let accounts: Api<ServiceAccount> = Api::namespaced(cluster.client(), &namespace);

    let egress = eventually("the status", || async {
        let egress = egresses.get("egress").await.unwrap();
        (condition(&egress, "Reconciled") == "True").then_some(egress)
    })
    .await;
    let status = egress.status.unwrap();
    assert_eq!(
        status.selector.as_deref(),
        Some(
            "app.kubernetes.io/component=egress,app.kubernetes.io/instance=egress,app.kubernetes.io/name=coil"
        )
    );
    assert_eq!(status.observed_generation, Some(1));
    let deployment = deployments.get("egress").await.unwrap();
    assert_eq!(deployment.spec.as_ref().unwrap().replicas, Some(2));
    assert_eq!(deployment.owner_references()[0].kind, "Egress");
    let service = services.get("egress").await.unwrap();
    assert!(service.spec.unwrap().cluster_ip.is_some_and(|ip| !ip.is_empty()));
    accounts.get("coil-egress").await.unwrap();

    deployments.delete("egress", &DeleteParams::default()).await.unwrap();
    services.delete("egress", &DeleteParams::default()).await.unwrap();
    eventually("the Deployment again", || async {
        let again = deployments.get_opt("egress").await.unwrap()?;
        (again.metadata.uid != deployment.metadata.uid).then_some(())
    })
    .await;
    eventually("the Service again", || async { services.get_opt("egress").await.unwrap() }).await;

    // kubectl scale
    let scale = json!({ "spec": { "replicas": 3 } });
    egresses.patch_scale("egress", &PatchParams::default(), &Patch::Merge(scale)).await.unwrap();
    eventually("three replicas", || async {
        let deployment = deployments.get_opt("egress").await.unwrap()?;
        (deployment.spec?.replicas == Some(3)).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a62_a66_affinity_and_budget() {
    let cluster = Cluster::start().await;
    let namespace = cluster.namespace("internet").await;
    let services: Api<Service> = Api::namespaced(cluster.client(), &namespace);
    let budgets: Api<PodDisruptionBudget> = Api::namespaced(cluster.client(), &namespace);
    let extra = json!({ "sessionAffinity": "None", "podDisruptionBudget": { "minAvailable": 1 } });
    cluster.egress(&namespace, "egress", extra).await;
    let budget = eventually("the budget", || async { budgets.get_opt("egress").await.unwrap() }).await;
    assert!(budget.spec.unwrap().min_available.is_some());
    let affinity = || async {
        let spec = services.get_opt("egress").await.unwrap()?.spec?;
        let seconds = spec.session_affinity_config.and_then(|c| c.client_ip).and_then(|c| c.timeout_seconds);
        Some((spec.session_affinity?, seconds))
    };
    eventually("no affinity", || async { affinity().await.filter(|a| a.0 == "None") }).await;

    let change = json!({
        "sessionAffinity": "ClientIP",
        "sessionAffinityConfig": { "clientIP": { "timeoutSeconds": 100 } },
        "podDisruptionBudget": { "minAvailable": null, "maxUnavailable": "50%" },
    });
    cluster.patch(&namespace, "egress", change).await;
    eventually("affinity for 100 s", || async { affinity().await.filter(|a| a.1 == Some(100)) }).await;
    eventually("the other limit", || async {
        let spec = budgets.get_opt("egress").await.unwrap()?.spec?;
        (spec.min_available.is_none() && spec.max_unavailable.is_some()).then_some(())
    })
    .await;

    cluster.patch(&namespace, "egress", json!({ "podDisruptionBudget": null })).await;
    eventually("no budget", || async { budgets.get_opt("egress").await.unwrap().is_none().then_some(()) })
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a64_subjects_follow_the_namespaces() {
    let cluster = Cluster::start().await;
    let bindings: Api<ClusterRoleBinding> = Api::all(cluster.client());
    let first = cluster.namespace("one").await;
    let second = cluster.namespace("two").await;
    let namespaces = || async {
        let subjects = bindings.get("coil-egress").await.unwrap().subjects.unwrap_or_default();
        let mut found: Vec<String> = subjects.into_iter().filter_map(|s| s.namespace).collect();
        found.retain(|n| *n == first || *n == second);
        found
    };
    cluster.egress(&first, "a", json!({})).await;
    eventually("one subject", || async { (namespaces().await == [first.as_str()]).then_some(()) }).await;
    cluster.egress(&second, "b", json!({})).await;
    eventually("two subjects", || async { (namespaces().await.len() == 2).then_some(()) }).await;
    let egresses: Api<Egress> = Api::namespaced(cluster.client(), &second);
    egresses.delete("b", &DeleteParams::default()).await.unwrap();
    eventually("one subject again", || async { (namespaces().await == [first.as_str()]).then_some(()) })
        .await;
    // Garbage collection takes the children.
    let deployments: Api<Deployment> = Api::namespaced(cluster.client(), &second);
    eventually("no Deployment", || async { deployments.get_opt("b").await.unwrap().is_none().then_some(()) })
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a65_restart_annotation_stays_and_foreign_label_goes() {
    let cluster = Cluster::start().await;
    let namespace = cluster.namespace("internet").await;
    let deployments: Api<Deployment> = Api::namespaced(cluster.client(), &namespace);
    cluster.egress(&namespace, "egress", json!({})).await;
    eventually("the Deployment", || async { deployments.get_opt("egress").await.unwrap() }).await;
    let change = json!({ "spec": { "template": { "metadata": {
        "annotations": { "kubectl.kubernetes.io/restartedAt": "now" }, "labels": { "foreign": "label" },
    } } } });
    deployments.patch("egress", &PatchParams::default(), &Patch::Merge(change)).await.unwrap();
    let metadata = eventually("the label to go", || async {
        let metadata = deployments.get("egress").await.unwrap().spec?.template.metadata?;
        (!metadata.labels.as_ref()?.contains_key("foreign")).then_some(metadata)
    })
    .await;
    assert_eq!(metadata.annotations.unwrap()["kubectl.kubernetes.io/restartedAt"], "now");
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_written_when_nothing_changes() {
    let cluster = Cluster::start().await;
    let namespace = cluster.namespace("internet").await;
    let deployments: Api<Deployment> = Api::namespaced(cluster.client(), &namespace);
    cluster.egress(&namespace, "egress", json!({ "podDisruptionBudget": { "minAvailable": 1 } })).await;
    cluster.reconciled(&namespace, "egress").await;
    let writes = || cluster.metric("coil_controller_writes_total");
    let before = (writes(), cluster.metric("controller_runtime_reconcile_total"));
    // Wakes the reconciler up, changes nothing of ours.
    let change = json!({ "metadata": { "annotations": { "foreign": "annotation" } } });
    deployments.patch("egress", &PatchParams::default(), &Patch::Merge(change)).await.unwrap();
    eventually("a reconciliation", || async {
        (cluster.metric("controller_runtime_reconcile_total") > before.1).then_some(())
    })
    .await;
    assert_eq!(writes(), before.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_missing_binding_is_a_condition_and_its_arrival_wakes_us() {
    let cluster = Cluster::start().await;
    let namespace = cluster.namespace("internet").await;
    let bindings: Api<ClusterRoleBinding> = Api::all(cluster.client());
    let egresses: Api<Egress> = Api::namespaced(cluster.client(), &namespace);
    let deployments: Api<Deployment> = Api::namespaced(cluster.client(), &namespace);
    let mut binding = bindings.get("coil-egress").await.unwrap();
    bindings.delete("coil-egress", &DeleteParams::default()).await.unwrap();
    cluster.egress(&namespace, "egress", json!({})).await;
    let egress = eventually("the condition", || async {
        let egress = egresses.get("egress").await.unwrap();
        (condition(&egress, "Reconciled") == "False").then_some(egress)
    })
    .await;
    let conditions = egress.status.unwrap().conditions;
    let reconciled = conditions.iter().find(|c| c.type_ == "Reconciled").unwrap();
    assert_eq!(reconciled.reason, "PrerequisiteMissing");
    assert!(
        reconciled.message.contains("ClusterRoleBinding coil-egress is missing"),
        "{}",
        reconciled.message
    );
    assert!(deployments.get_opt("egress").await.unwrap().is_none());

    binding.metadata.resource_version = None;
    binding.metadata.uid = None;
    bindings.create(&PostParams::default(), &binding).await.unwrap();
    cluster.reconciled(&namespace, "egress").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn somebody_elses_deployment_is_not_touched() {
    let cluster = Cluster::start().await;
    let namespace = cluster.namespace("internet").await;
    let deployments: Api<Deployment> = Api::namespaced(cluster.client(), &namespace);
    let egresses: Api<Egress> = Api::namespaced(cluster.client(), &namespace);
    let theirs: Deployment = serde_json::from_value(json!({
        "metadata": { "name": "egress" },
        "spec": {
            "replicas": 0,
            "selector": { "matchLabels": { "app": "theirs" } },
            "template": {
                "metadata": { "labels": { "app": "theirs" } },
                "spec": { "containers": [{ "name": "c", "image": "i" }] },
            },
        },
    }))
    .unwrap();
    let theirs = deployments.create(&PostParams::default(), &theirs).await.unwrap();
    cluster.egress(&namespace, "egress", json!({})).await;
    eventually("the condition", || async {
        let status = egresses.get("egress").await.unwrap().status?;
        status.conditions.iter().any(|c| c.reason == "NameTaken").then_some(())
    })
    .await;
    assert_eq!(deployments.get("egress").await.unwrap().spec, theirs.spec);
    let events: Api<Event> = Api::namespaced(cluster.client(), &namespace);
    eventually("the event", || async {
        let list = events.list(&ListParams::default()).await.unwrap();
        list.iter().any(|e| e.reason.as_deref() == Some("NameTaken")).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_schema_refuses_what_validation_would() {
    let cluster = Cluster::start().await;
    let namespace = cluster.namespace("internet").await;
    let egresses: Api<DynamicObject> =
        Api::namespaced_with(cluster.client(), &namespace, &kube::api::ApiResource::erase::<Egress>(&()));
    let attempt = |name: &str, extra: Value| {
        let object: DynamicObject = serde_json::from_value(support::egress_object(name, extra)).unwrap();
        let egresses = &egresses;
        async move { egresses.create(&PostParams::default(), &object).await.err().map(|e| e.to_string()) }
    };
    for (index, (extra, text)) in [
        (json!({ "destinations": [] }), "destinations"),
        (json!({ "destinations": ["10.0.0.0"] }), "must be a CIDR"),
        (json!({ "destinations": ["2000:/64"] }), "must be a CIDR"),
        (json!({ "excludedDestinations": ["x"] }), "must be a CIDR"),
        (json!({ "replicas": -1 }), "replicas"),
        (json!({ "strategy": { "type": "Unknown" } }), "strategy"),
        (json!({ "strategy": {} }), "type"),
        (json!({ "strategy": { "type": "Recreate", "rollingUpdate": {} } }), "rollingUpdate needs type RollingUpdate"),
        (json!({ "sessionAffinity": "hoge" }), "sessionAffinity"),
        (json!({ "podDisruptionBudget": { "minAvailable": 1, "maxUnavailable": 1 } }), "exclude each other"),
        (json!({ "podDisruptionBudget": { "maxUnavailable": "120%" } }), "maxUnavailable"),
        (json!({ "clients": [{}] }), "is required"),
        (json!({ "template": { "spec": { "hostNetwork": true } } }), "hostNetwork"),
        (json!({ "template": { "spec": { "containers": [{ "image": "i" }] } } }), "name"),
        (json!({ "clients": [{ "podSelector": { "matchExpressions": [{ "key": "a", "operator": "In" }] } }] }), "need values"),
    ]
    .into_iter()
    .enumerate()
    {
        let error = attempt(&format!("bad-{index}"), extra.clone()).await;
        assert!(error.as_ref().is_some_and(|e| e.contains(text)), "{extra}: {error:?}");
    }
    let error = attempt("1bad", json!({})).await;
    assert!(error.as_ref().is_some_and(|e| e.contains("legal as the name of a Service")), "{error:?}");
    for (index, extra) in [
        json!({}),
        json!({ "strategy": { "type": "Recreate" } }),
        json!({ "template": { "metadata": { "annotations": { "a": "b" } }, "spec": { "schedulerName": "hoge" } } }),
        json!({ "sessionAffinity": "None", "podDisruptionBudget": { "minAvailable": 1 } }),
        json!({ "clients": [{ "namespaceSelector": {} }], "excludedDestinations": ["10.0.0.0/8", "fd00::/8"] }),
    ]
    .into_iter()
    .enumerate()
    {
        assert_eq!(attempt(&format!("good-{index}"), extra.clone()).await, None, "{extra}");
    }
    let stored = egresses.get("good-0").await.unwrap();
    assert_eq!(
        (&stored.data["spec"]["replicas"], &stored.data["spec"]["sessionAffinity"]),
        (&json!(1), &json!("ClientIP"))
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn an_invalid_egress_leaves_its_children_alone() {
    let cluster = Cluster::start().await;
    let namespace = cluster.namespace("internet").await;
    let deployments: Api<Deployment> = Api::namespaced(cluster.client(), &namespace);
    let egresses: Api<Egress> = Api::namespaced(cluster.client(), &namespace);
    cluster.egress(&namespace, "egress", json!({})).await;
    cluster.reconciled(&namespace, "egress").await;
    let before = deployments.get("egress").await.unwrap();
    // No schema sees this.
    let change = json!({ "replicas": 5, "template": { "spec": { "containers": [{ "name": "egress", "ports": "none" }] } } });
    cluster.patch(&namespace, "egress", change).await;
    let egress = eventually("the condition", || async {
        let egress = egresses.get("egress").await.unwrap();
        (condition(&egress, "Valid") == "False").then_some(egress)
    })
    .await;
    assert_eq!(egress.status.unwrap().observed_generation, Some(2));
    assert_eq!(deployments.get("egress").await.unwrap().spec, before.spec);
    // Corrected.
    cluster.patch(&namespace, "egress", json!({ "replicas": 2, "template": null })).await;
    eventually("validity", || async {
        (condition(&egresses.get("egress").await.unwrap(), "Valid") == "True").then_some(())
    })
    .await;
    eventually("two replicas", || async {
        (deployments.get("egress").await.unwrap().spec?.replicas == Some(2)).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_namespace_can_be_deleted_with_its_egress() {
    let cluster = Cluster::start().await;
    let namespace = cluster.namespace("internet").await;
    cluster.egress(&namespace, "egress", json!({})).await;
    cluster.reconciled(&namespace, "egress").await;
    let namespaces: Api<Namespace> = Api::all(cluster.client());
    namespaces.delete(&namespace, &DeleteParams::default()).await.unwrap();
    eventually("the namespace to go", || async {
        namespaces.get_opt(&namespace).await.unwrap().is_none().then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn running_clients_are_counted() {
    let cluster = Cluster::start().await;
    let namespace = cluster.namespace("internet").await;
    let egresses: Api<Egress> = Api::namespaced(cluster.client(), &namespace);
    let pods: Api<Pod> = Api::namespaced(cluster.client(), &namespace);
    cluster
        .egress(
            &namespace,
            "egress",
            json!({ "clients": [{ "podSelector": { "matchLabels": { "app": "web" } } }] }),
        )
        .await;
    let count = |wanted: i32| {
        let egresses = &egresses;
        eventually("count", move || async move {
            (egresses.get("egress").await.unwrap().status?.clients == Some(wanted)).then_some(())
        })
    };
    count(0).await;
    for (name, metadata) in [
        ("by-label", json!({ "labels": { "app": "web" } })),
        (
            "by-annotation",
            json!({ "annotations": { format!("egress.coil.cybozu.com/{namespace}"): "egress" } }),
        ),
        ("neither", json!({})),
    ] {
        let mut pod =
            json!({ "metadata": metadata, "spec": { "containers": [{ "name": "c", "image": "i" }] } });
        pod["metadata"]["name"] = json!(name);
        pods.create(&PostParams::default(), &serde_json::from_value(pod).unwrap()).await.unwrap();
        let running = Patch::Merge(json!({ "status": { "phase": "Running" } }));
        pods.patch_status(name, &PatchParams::default(), &running).await.unwrap();
    }
    count(2).await;
    pods.delete("by-label", &DeleteParams { grace_period_seconds: Some(0), ..DeleteParams::default() })
        .await
        .unwrap();
    count(1).await;
    // The reconciler leaves it alone.
    cluster.patch(&namespace, "egress", json!({ "replicas": 2 })).await;
    eventually("generation", || async {
        (egresses.get("egress").await.unwrap().status?.observed_generation == Some(2)).then_some(())
    })
    .await;
    count(1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_happens_while_the_api_is_away_is_caught_up_with() {
    let cluster = Cluster::start().await;
    let namespace = cluster.namespace("internet").await;
    let egresses: Api<Egress> = Api::namespaced(cluster.client(), &namespace);
    let deployments: Api<Deployment> = Api::namespaced(cluster.client(), &namespace);
    for name in ["changed", "deleted"] {
        cluster.egress(&namespace, name, json!({})).await;
        cluster.reconciled(&namespace, name).await;
    }
    cluster.set_reachable(false);
    cluster.patch(&namespace, "changed", json!({ "replicas": 4 })).await;
    cluster.egress(&namespace, "new", json!({})).await;
    egresses.delete("deleted", &DeleteParams::default()).await.unwrap();
    // Somebody else's work, too.
    deployments.delete("changed", &DeleteParams::default()).await.unwrap();
    cluster.set_reachable(true);
    eventually("the changed Deployment", || async {
        (deployments.get_opt("changed").await.unwrap()?.spec?.replicas == Some(4)).then_some(())
    })
    .await;
    cluster.reconciled(&namespace, "new").await;
    eventually("the end of the deleted one", || async {
        deployments.get_opt("deleted").await.unwrap().is_none().then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_egress_can_be_replaced_by_one_of_the_same_name() {
    let cluster = Cluster::start().await;
    let namespace = cluster.namespace("internet").await;
    let egresses: Api<Egress> = Api::namespaced(cluster.client(), &namespace);
    let deployments: Api<Deployment> = Api::namespaced(cluster.client(), &namespace);
    cluster.egress(&namespace, "egress", json!({})).await;
    cluster.reconciled(&namespace, "egress").await;
    let former = deployments.get("egress").await.unwrap().metadata.uid;
    egresses.delete("egress", &DeleteParams::default()).await.unwrap();
    cluster.egress(&namespace, "egress", json!({})).await;
    let uid = egresses.get("egress").await.unwrap().metadata.uid;
    eventually("a Deployment of the new one", || async {
        let deployment = deployments.get_opt("egress").await.unwrap()?;
        assert!(
            deployment.metadata.uid != former || deployment.owner_references()[0].uid != uid.clone().unwrap()
        );
        (deployment.metadata.uid != former).then_some(())
    })
    .await;
    cluster.reconciled(&namespace, "egress").await;
}
