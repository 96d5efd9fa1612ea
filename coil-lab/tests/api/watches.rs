//! Watches as reflectors use them, and their edges.

use futures::{StreamExt, TryStreamExt};
use k8s_openapi::api::core::v1::ConfigMap;
use kube::api::{Api, DeleteParams, Patch, PatchParams, PostParams, WatchEvent, WatchParams};
use kube::runtime::watcher;
use serde_json::{Value, json};

use crate::support::{Server, eventually};

async fn make(api: &Api<ConfigMap>, name: &str) -> ConfigMap {
    let made = serde_json::from_value(json!({"metadata": {"name": name, "labels": {"on": "yes"}}})).unwrap();
    api.create(&PostParams::default(), &made).await.unwrap()
}

#[tokio::test]
async fn selected_objects_come_and_go() {
    let server = Server::start().await;
    let api: Api<ConfigMap> = Api::default_namespaced(server.client.clone());
    let first = make(&api, "a").await;
    let version = first.metadata.resource_version.unwrap();
    let watch = api.watch(&WatchParams::default().labels("on=yes"), &version).await.unwrap();
    let mut watch = watch.boxed();
    let label = |value: Value| Patch::Merge(json!({"metadata": {"labels": {"on": value}}}));
    make(&api, "b").await;
    api.patch("b", &PatchParams::default(), &label(json!("no"))).await.unwrap();
    api.patch("b", &PatchParams::default(), &label(json!("yes"))).await.unwrap();
    api.delete("a", &DeleteParams::default()).await.unwrap();
    let mut seen = Vec::new();
    while seen.len() < 4 {
        let (what, object) = match watch.try_next().await.unwrap().unwrap() {
            WatchEvent::Added(object) => ("added", object),
            WatchEvent::Modified(object) => ("modified", object),
            WatchEvent::Deleted(object) => ("deleted", object),
            other => panic!("unexpected {other:?}"),
        };
        seen.push(format!("{what} {}", object.metadata.name.unwrap()));
    }
    assert_eq!(seen, ["added b", "deleted b", "added b", "deleted a"]);
}

#[tokio::test]
async fn too_old_and_too_new_versions() {
    let server = Server::start().await;
    let api: Api<ConfigMap> = Api::default_namespaced(server.client.clone());
    let mut watch = api.watch(&WatchParams::default(), "1").await.unwrap().boxed();
    match watch.try_next().await.unwrap().unwrap() {
        WatchEvent::Error(status) => assert_eq!((status.code, status.reason.as_str()), (410, "Expired")),
        other => panic!("unexpected {other:?}"),
    }
    assert!(watch.try_next().await.unwrap().is_none());
    let path = "/api/v1/configmaps?watch=1&resourceVersion=99999999999999999";
    assert_eq!(server.raw("GET", path, "", "").await.0, 504);
}

#[tokio::test]
async fn timeouts_end_watches() {
    let server = Server::start().await;
    let api: Api<ConfigMap> = Api::default_namespaced(server.client.clone());
    make(&api, "a").await;
    let watch = api.watch(&WatchParams::default().timeout(1).disable_bookmarks(), "0").await.unwrap();
    let events: Vec<_> = watch.try_collect().await.unwrap();
    assert_eq!(events.len(), 1);
}

/// Both ways to get the initial state, then changes.
#[tokio::test]
async fn reflectors_follow() {
    let server = Server::start().await;
    let api: Api<ConfigMap> = Api::default_namespaced(server.client.clone());
    make(&api, "a").await;
    for config in [watcher::Config::default(), watcher::Config::default().streaming_lists()] {
        let (reader, writer) = kube::runtime::reflector::store();
        let follow = kube::runtime::reflector(writer, watcher(api.clone(), config));
        let task = tokio::spawn(follow.for_each(|_| async {}));
        reader.wait_until_ready().await.unwrap();
        assert_eq!(reader.len(), 1);
        make(&api, "b").await;
        eventually("the new object is seen", || async { (reader.len() == 2).then_some(()) }).await;
        api.delete("b", &DeleteParams::default()).await.unwrap();
        eventually("the removal is seen", || async { (reader.len() == 1).then_some(()) }).await;
        task.abort();
    }
}

#[tokio::test]
async fn streaming_lists_end_with_a_marked_bookmark() {
    let server = Server::start().await;
    let api: Api<ConfigMap> = Api::default_namespaced(server.client.clone());
    make(&api, "a").await;
    let query = "watch=1&sendInitialEvents=true&resourceVersionMatch=NotOlderThan&allowWatchBookmarks=true&timeoutSeconds=1";
    let request = axum::http::Request::get(format!("/api/v1/configmaps?{query}")).body(Vec::new()).unwrap();
    let text = server.client.request_text(request).await.unwrap();
    let events: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(events[0]["type"], "ADDED");
    assert_eq!(events[1]["type"], "BOOKMARK");
    assert_eq!(events[1]["object"]["metadata"]["annotations"]["k8s.io/initial-events-end"], "true");
    assert!(events[1]["object"]["metadata"]["resourceVersion"].is_string());
}
