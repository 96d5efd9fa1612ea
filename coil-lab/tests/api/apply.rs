//! Server-side apply through kube-rs.

use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::Service;
use kube::api::{Api, Patch, PatchParams};
use serde_json::{Value, json};

use crate::support::{Server, status_of};

fn deployment(replicas: Option<i32>, labels: Value) -> Patch<Value> {
    let mut object = json!({
        "apiVersion": "apps/v1", "kind": "Deployment",
        "metadata": {"name": "d", "labels": labels},
        "spec": {
            "selector": {"matchLabels": {"a": "b"}},
            "template": {
                "metadata": {"labels": {"a": "b"}},
                "spec": {"containers": [{"name": "c", "image": "i", "ports": [{"containerPort": 1}]}]},
            },
        },
    });
    if let Some(replicas) = replicas {
        object["spec"]["replicas"] = json!(replicas);
    }
    Patch::Apply(object)
}

#[tokio::test]
async fn managers_share_an_object() {
    let server = Server::start().await;
    let api: Api<Deployment> = Api::default_namespaced(server.client.clone());
    let (one, two) = (PatchParams::apply("one"), PatchParams::apply("two"));
    let made = api.patch("d", &one, &deployment(Some(1), json!({"x": "1"}))).await.unwrap();
    assert_eq!(made.metadata.managed_fields.unwrap().len(), 1);
    let again = api.patch("d", &one, &deployment(Some(1), json!({"x": "1"}))).await.unwrap();
    assert_eq!(again.metadata.generation, Some(1));

    let (code, reason, message) = status_of(api.patch("d", &two, &deployment(Some(2), json!({}))).await);
    assert_eq!((code, reason.as_str()), (409, "Conflict"));
    assert_eq!(message, "Apply failed with 1 conflict: conflict with \"one\": .spec.replicas");
    let forced = api.patch("d", &two.clone().force(), &deployment(Some(2), json!({"y": "1"}))).await.unwrap();
    assert_eq!(forced.spec.unwrap().replicas, Some(2));
    // What a manager no longer applies goes, unless another one holds it.
    let dropped = api.patch("d", &one, &deployment(None, json!({}))).await.unwrap();
    let labels = dropped.metadata.labels.unwrap();
    assert_eq!(labels.keys().collect::<Vec<_>>(), ["y"]);
    assert_eq!(dropped.spec.unwrap().replicas, Some(2));
}

#[tokio::test]
async fn a_field_that_is_dropped_falls_back_to_its_default() {
    let server = Server::start().await;
    let api: Api<Service> = Api::default_namespaced(server.client.clone());
    let service = |affinity: Option<&str>| {
        let mut object = json!({
            "apiVersion": "v1", "kind": "Service", "metadata": {"name": "s"},
            "spec": {"ports": [{"port": 5555, "protocol": "UDP"}], "selector": {"a": "b"}},
        });
        if let Some(affinity) = affinity {
            object["spec"]["sessionAffinity"] = json!(affinity);
        }
        Patch::Apply(object)
    };
    let params = PatchParams::apply("one").force();
    let made = api.patch("s", &params, &service(Some("ClientIP"))).await.unwrap();
    let first = made.spec.unwrap();
    assert!(first.session_affinity_config.is_some());
    let changed = api.patch("s", &params, &service(None)).await.unwrap().spec.unwrap();
    assert_eq!(changed.session_affinity.as_deref(), Some("None"));
    assert_eq!(changed.cluster_ip, first.cluster_ip);
}

#[tokio::test]
async fn an_apply_needs_a_manager_and_no_managed_fields() {
    let server = Server::start().await;
    let path = "/api/v1/namespaces/default/configmaps/a";
    let media = "application/apply-patch+yaml";
    let body = "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: a}\n";
    assert_eq!(server.raw("PATCH", path, media, body).await.0, 400);
    let path = format!("{path}?fieldManager=m");
    assert_eq!(server.raw("PATCH", &path, media, body).await.0, 201);
    let bad = "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: a, managedFields: [{manager: x}]}\n";
    assert_eq!(server.raw("PATCH", &path, media, bad).await.0, 400);
}
