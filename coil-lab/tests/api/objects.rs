//! Create, read, update, patch, delete.

use k8s_openapi::api::core::v1::{ConfigMap, Event, Namespace, Pod, Service};
use kube::api::{Api, DeleteParams, ListParams, Patch, PatchParams, PostParams, Preconditions};
use serde_json::json;

use std::io::Write;
use std::path::PathBuf;
use std::sync::Arc;

use futures::AsyncReadExt;

use crate::support::{Server, eventually, status_of};

fn config_map(value: serde_json::Value) -> ConfigMap {
    serde_json::from_value(value).unwrap()
}

#[tokio::test]
async fn optimistic_concurrency() {
    let server = Server::start().await;
    let api: Api<ConfigMap> = Api::default_namespaced(server.client.clone());
    let made = config_map(json!({"metadata": {"name": "a", "labels": {"x": "1"}}, "data": {"k": "1"}}));
    let first = api.create(&PostParams::default(), &made).await.unwrap();
    assert!(first.metadata.uid.is_some() && first.metadata.creation_timestamp.is_some());
    let taken = status_of(api.create(&PostParams::default(), &made).await);
    assert_eq!(taken, (409, "AlreadyExists".into(), "configmaps \"a\" already exists".into()));

    let mut second = first.clone();
    second.data = Some([("k".to_owned(), "2".to_owned())].into());
    let second = api.replace("a", &PostParams::default(), &second).await.unwrap();
    assert_ne!(first.metadata.resource_version, second.metadata.resource_version);
    let (code, reason, _) = status_of(api.replace("a", &PostParams::default(), &first).await);
    assert_eq!((code, reason.as_str()), (409, "Conflict"));
    // A write that changes nothing is no change.
    let same = api.replace("a", &PostParams::default(), &second).await.unwrap();
    assert_eq!(same.metadata.resource_version, second.metadata.resource_version);

    let missing = status_of(api.get("b").await);
    assert_eq!(missing, (404, "NotFound".into(), "configmaps \"b\" not found".into()));
    let dry = PostParams { dry_run: true, ..PostParams::default() };
    api.create(&dry, &config_map(json!({"metadata": {"name": "dry"}}))).await.unwrap();
    assert!(api.get_opt("dry").await.unwrap().is_none());
    let generated = config_map(json!({"metadata": {"generateName": "gen-"}}));
    let generated = api.create(&PostParams::default(), &generated).await.unwrap();
    assert!(generated.metadata.name.unwrap().starts_with("gen-"));

    let wrong = Preconditions { uid: Some("other".to_owned()), resource_version: None };
    let params = DeleteParams { preconditions: Some(wrong), ..DeleteParams::default() };
    assert_eq!(status_of(api.delete("a", &params).await).0, 409);
    assert!(api.delete("a", &DeleteParams::default()).await.unwrap().is_right());
}

#[tokio::test]
async fn lists_select_and_page() {
    let server = Server::start().await;
    let api: Api<ConfigMap> = Api::default_namespaced(server.client.clone());
    for number in 0..5 {
        let parity = if number % 2 == 0 { "even" } else { "odd" };
        let made = json!({"metadata": {"name": format!("c{number}"), "labels": {"parity": parity}}});
        api.create(&PostParams::default(), &config_map(made)).await.unwrap();
    }
    let names = |list: kube::core::ObjectList<ConfigMap>| -> Vec<String> {
        list.items.into_iter().map(|one| one.metadata.name.unwrap()).collect()
    };
    let odd = ListParams::default().labels("parity in (odd)");
    assert_eq!(names(api.list(&odd).await.unwrap()), ["c1", "c3"]);
    let one = ListParams::default().fields("metadata.name=c2");
    assert_eq!(names(api.list(&one).await.unwrap()), ["c2"]);
    let page = api.list(&ListParams::default().limit(2)).await.unwrap();
    let token = page.metadata.continue_.clone().unwrap();
    assert_eq!(page.metadata.remaining_item_count, Some(3));
    assert_eq!(names(page), ["c0", "c1"]);
    let rest = api.list(&ListParams::default().continue_token(&token)).await.unwrap();
    assert_eq!(names(rest), ["c2", "c3", "c4"]);
    assert_eq!(status_of(api.list(&ListParams::default().fields("data.k=1")).await).0, 400);
    assert!(api.delete_collection(&DeleteParams::default(), &odd).await.unwrap().is_left());
    assert_eq!(names(api.list(&ListParams::default()).await.unwrap()), ["c0", "c2", "c4"]);
}

#[tokio::test]
async fn patches_of_all_types() {
    let server = Server::start().await;
    let api: Api<Pod> = Api::default_namespaced(server.client.clone());
    let pod = json!({
        "metadata": {"name": "p", "labels": {"a": "1", "b": "1"}},
        "spec": {"containers": [{"name": "c", "image": "i:1"}, {"name": "d", "image": "i:1"}]},
    });
    api.create(&PostParams::default(), &serde_json::from_value(pod).unwrap()).await.unwrap();
    let params = PatchParams::default();
    let merged =
        api.patch("p", &params, &Patch::Merge(json!({"metadata": {"labels": {"a": null}}}))).await.unwrap();
    assert_eq!(merged.metadata.labels.unwrap().keys().collect::<Vec<_>>(), ["b"]);
    let strategic = json!({"spec": {"containers": [{"name": "d", "image": "i:2"}]}});
    let patched = api.patch("p", &params, &Patch::Strategic(strategic)).await.unwrap();
    let images: Vec<String> =
        patched.spec.unwrap().containers.into_iter().map(|one| one.image.unwrap()).collect();
    assert_eq!(images, ["i:1", "i:2"]);
    let add = r#"[{"op": "add", "path": "/metadata/labels/z", "value": "1"}]"#;
    let path = "/api/v1/namespaces/default/pods/p";
    let (code, patched) = server.raw("PATCH", path, "application/json-patch+json", add).await;
    assert_eq!((code, patched["metadata"]["labels"]["z"].as_str()), (200, Some("1")));
    // What a pod is cannot be changed; its status is written apart.
    let forbidden = Patch::Merge(json!({"spec": {"hostNetwork": true}}));
    assert_eq!(status_of(api.patch("p", &params, &forbidden).await).0, 422);
    let both = Patch::Merge(json!({"metadata": {"labels": {"s": "1"}}, "status": {"phase": "Running"}}));
    let main = api.patch("p", &params, &both).await.unwrap();
    assert_eq!(main.status.unwrap().phase.as_deref(), Some("Pending"));
    let status = api.patch_status("p", &params, &both).await.unwrap();
    assert_eq!(status.status.unwrap().phase.as_deref(), Some("Running"));
}

#[tokio::test]
async fn namespaces_go_with_what_they_hold() {
    let server = Server::start().await;
    let namespaces: Api<Namespace> = Api::all(server.client.clone());
    let made = serde_json::from_value(json!({"metadata": {"name": "x"}})).unwrap();
    namespaces.create(&PostParams::default(), &made).await.unwrap();
    let maps: Api<ConfigMap> = Api::namespaced(server.client.clone(), "x");
    let held = json!({"metadata": {"name": "held", "finalizers": ["test/hold"]}});
    maps.create(&PostParams::default(), &config_map(held)).await.unwrap();
    let nowhere: Api<ConfigMap> = Api::namespaced(server.client.clone(), "nowhere");
    let lost = nowhere.create(&PostParams::default(), &config_map(json!({"metadata": {"name": "a"}}))).await;
    assert_eq!(status_of(lost).2, "namespaces \"nowhere\" not found");

    namespaces.delete("x", &DeleteParams::default()).await.unwrap();
    eventually("the map is marked", || async { maps.get("held").await.unwrap().metadata.deletion_timestamp })
        .await;
    let late = maps.create(&PostParams::default(), &config_map(json!({"metadata": {"name": "late"}}))).await;
    assert_eq!(status_of(late).0, 403);
    let release = Patch::Merge(json!({"metadata": {"finalizers": null}}));
    maps.patch("held", &PatchParams::default(), &release).await.unwrap();
    eventually("the namespace is gone", || async {
        namespaces.get_opt("x").await.unwrap().is_none().then_some(())
    })
    .await;
}

#[tokio::test]
async fn services_get_addresses_of_both_families() {
    let server = Server::start().await;
    let api: Api<Service> = Api::default_namespaced(server.client.clone());
    let service = json!({
        "metadata": {"name": "s"},
        "spec": {"ports": [{"port": 80}], "ipFamilyPolicy": "PreferDualStack", "selector": {"a": "b"}},
    });
    let made = api.create(&PostParams::default(), &serde_json::from_value(service).unwrap()).await.unwrap();
    let spec = made.spec.unwrap();
    assert_eq!(spec.ip_families.unwrap(), ["IPv4", "IPv6"]);
    assert_eq!(spec.cluster_ips.unwrap().len(), 2);
    assert_eq!(spec.type_.as_deref(), Some("ClusterIP"));
}

#[tokio::test]
async fn events_are_one_storage_with_two_views() {
    let server = Server::start().await;
    let reference = k8s_openapi::api::core::v1::ObjectReference {
        kind: Some("Pod".into()),
        name: Some("p".into()),
        namespace: Some("default".into()),
        ..Default::default()
    };
    let recorder = kube::runtime::events::Recorder::new(
        server.client.clone(),
        kube::runtime::events::Reporter { controller: "test".into(), instance: None },
    );
    let event = kube::runtime::events::Event {
        type_: kube::runtime::events::EventType::Warning,
        reason: "Reason".into(),
        note: Some("text".into()),
        action: "Act".into(),
        secondary: None,
    };
    recorder.publish(&event, &reference).await.unwrap();
    recorder.publish(&event, &reference).await.unwrap();
    let core: Api<Event> = Api::default_namespaced(server.client.clone());
    let fields = ListParams::default().fields("involvedObject.name=p,type=Warning");
    let list = core.list(&fields).await.unwrap();
    assert_eq!(list.items.len(), 1);
    assert_eq!(list.items[0].message.as_deref(), Some("text"));
}

struct Logs(PathBuf);

impl coil_lab::api::PodLogs for Logs {
    fn log_file(&self, _: &str, _: &str, _: &str, _: Option<&str>, previous: bool) -> Option<PathBuf> {
        (!previous).then(|| self.0.clone())
    }
}

#[tokio::test]
async fn logs_come_from_files_and_are_followed() {
    let server = Server::start().await;
    let path = std::env::temp_dir().join(format!("coil-lab-log-{}", server.address.port()));
    let mut file = std::fs::File::create(&path).unwrap();
    file.write_all(b"one\ntwo\nthree\n").unwrap();
    server.api.set_pod_logs(Arc::new(Logs(path.clone())));
    let pods: Api<Pod> = Api::default_namespaced(server.client.clone());
    let pod = json!({"metadata": {"name": "p"}, "spec": {"nodeName": "n", "containers": [{"name": "c", "image": "i"}]}});
    pods.create(&PostParams::default(), &serde_json::from_value(pod).unwrap()).await.unwrap();
    let tail = kube::api::LogParams { tail_lines: Some(2), ..Default::default() };
    assert_eq!(pods.logs("p", &tail).await.unwrap(), "two\nthree\n");
    let other = kube::api::LogParams { container: Some("x".into()), ..Default::default() };
    assert_eq!(status_of(pods.logs("p", &other).await).0, 400);
    let follow = kube::api::LogParams { follow: true, tail_lines: Some(1), ..Default::default() };
    let mut stream = Box::pin(pods.log_stream("p", &follow).await.unwrap());
    let mut text = vec![0; 6];
    stream.read_exact(&mut text).await.unwrap();
    file.write_all(b"four\n").unwrap();
    let mut more = vec![0; 5];
    stream.read_exact(&mut more).await.unwrap();
    assert_eq!((text.as_slice(), more.as_slice()), (&b"three\n"[..], &b"four\n"[..]));
    pods.delete("p", &DeleteParams::default().grace_period(0)).await.unwrap();
    let mut rest = Vec::new();
    stream.read_to_end(&mut rest).await.unwrap();
    std::fs::remove_file(path).unwrap();
}
