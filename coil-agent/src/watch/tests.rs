#![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use kube::client::Body;
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tonic::codegen::http;

use super::*;

/// What the API server answers, one after the other.
enum Answer {
    /// The connection fails.
    Away,
    List(Vec<Value>),
    /// Events of a watch, which then ends.
    Events(Vec<(&'static str, Value)>),
}

type Script = Arc<Mutex<VecDeque<Answer>>>;

/// A client of an API server that follows a script, and the requests that it got.
fn scripted(answers: Vec<Answer>) -> (Client, mpsc::UnboundedReceiver<String>) {
    let script: Script = Arc::new(Mutex::new(answers.into()));
    let (requests, received) = mpsc::unbounded_channel();
    let service = tower::service_fn(move |request: http::Request<Body>| {
        let answer = script.lock().unwrap().pop_front();
        let requests = requests.clone();
        async move {
            requests.send(request.uri().to_string()).unwrap();
            let body = match answer {
                Some(Answer::Away) => return Err(std::io::Error::from(std::io::ErrorKind::ConnectionRefused)),
                Some(Answer::List(items)) => {
                    json!({"kind": "List", "apiVersion": "v1", "metadata": {"resourceVersion": "1"}, "items": items})
                        .to_string()
                }
                Some(Answer::Events(events)) => events
                    .into_iter()
                    .map(|(kind, object)| format!("{}\n", json!({"type": kind, "object": object})))
                    .collect(),
                // The script is over: a watch in which nothing happens.
                None => std::future::pending().await,
            };
            Ok(http::Response::new(Body::from(body.into_bytes())))
        }
    });
    (Client::new(service, "default"), received)
}

fn metrics() -> (WatchMetrics, prometheus::Registry) {
    let registry = prometheus::Registry::new();
    (WatchMetrics::register(&registry).unwrap(), registry)
}

fn count(registry: &prometheus::Registry, name: &str, kind: &str) -> f64 {
    let families = registry.gather();
    let family = families.iter().find(|family| family.name() == name).unwrap();
    let metric = family.get_metric().iter().find(|m| m.get_label()[0].value() == kind).unwrap();
    metric.get_counter().get_value()
}

fn meta(name: &str) -> Value {
    json!({"namespace": "internet", "name": name, "uid": name, "resourceVersion": "1"})
}

fn egress(name: &str, spec: Value) -> Value {
    json!({"apiVersion": "coil.cybozu.com/v2", "kind": "Egress", "metadata": meta(name), "spec": spec})
}

async fn next(inputs: &mut mpsc::Receiver<Input>) -> Input {
    tokio::time::timeout(Duration::from_secs(20), inputs.recv()).await.unwrap().unwrap()
}

#[tokio::test]
async fn an_egress_that_cannot_be_read_stalls_nothing_and_closes_its_clients() {
    let good = json!({"destinations": ["8.0.0.0/8"]});
    let (client, _requests) = scripted(vec![
        Answer::List(vec![egress("bad", json!({"destinations": 7})), egress("good", good.clone())]),
        Answer::Events(vec![
            ("MODIFIED", egress("good", json!("nonsense"))),
            ("MODIFIED", egress("bad", good)),
            ("DELETED", egress("good", json!({}))),
        ]),
    ]);
    let (metrics, registry) = metrics();
    let (state, mut inputs) = StateHandle::for_tests();
    let task = tokio::spawn(egresses(client, state, metrics));
    let Input::Egresses(Change::Reset { objects, unreadable }) = next(&mut inputs).await else { panic!() };
    assert!(unreadable.is_empty());
    assert!(objects[0].problems[0].contains("cannot be read") && objects[0].destinations.is_empty());
    assert!(objects[1].problems.is_empty());
    let Input::Egresses(Change::Apply(view)) = next(&mut inputs).await else { panic!() };
    assert_eq!((&*view.key.name, view.problems.len()), ("good", 1));
    let Input::Egresses(Change::Apply(view)) = next(&mut inputs).await else { panic!() };
    assert_eq!((&*view.key.name, view.problems.len()), ("bad", 0));
    let Input::Egresses(Change::Delete(key)) = next(&mut inputs).await else { panic!() };
    assert_eq!(key, ObjectKey::new("internet", "good"));
    assert_eq!(count(&registry, "coil_watch_unreadable_objects_total", "egresses"), 2.0);
    task.abort();
}

#[tokio::test]
async fn a_pod_that_cannot_be_read_is_left_as_it_was() {
    let (client, mut requests) = scripted(vec![
        Answer::List(vec![
            json!({"metadata": meta("bad"), "spec": {"containers": "what"}}),
            json!({"metadata": meta("good"), "spec": {"containers": []}}),
        ]),
        Answer::Events(vec![("MODIFIED", json!({"metadata": meta("good"), "spec": 1}))]),
    ]);
    let (metrics, registry) = metrics();
    let (state, mut inputs) = StateHandle::for_tests();
    let task = tokio::spawn(pods(client, "n1".into(), state, metrics));
    let Input::Pods(Change::Reset { objects, unreadable }) = next(&mut inputs).await else { panic!() };
    assert_eq!(unreadable, [ObjectKey::new("internet", "bad")]);
    assert_eq!(objects.iter().map(|pod| &*pod.uid).collect::<Vec<_>>(), ["good"]);
    let list = requests.recv().await.unwrap();
    assert!(list.contains("fieldSelector=spec.nodeName%3Dn1"), "{list}");
    for _ in 0..2 {
        // The watch, and the next one after it has ended: by then the bad event was taken.
        requests.recv().await.unwrap();
    }
    assert!(inputs.try_recv().is_err());
    assert_eq!(count(&registry, "coil_watch_unreadable_objects_total", "pods"), 2.0);
    task.abort();
}

#[tokio::test]
async fn an_api_server_that_goes_away_changes_nothing_until_it_is_back() {
    let slice = |name: &str| {
        json!({"metadata": {"namespace": "internet", "name": name, "labels": {
            "app.kubernetes.io/instance": "a"}}, "addressType": "IPv4", "endpoints": []})
    };
    let (client, _requests) = scripted(vec![
        Answer::Away,
        Answer::List(vec![slice("a-1")]),
        Answer::Away,
        // The version that the watch wants to go on from is too old: everything is listed again.
        Answer::Events(vec![("ERROR", json!({"kind": "Status", "code": 410, "reason": "Expired"}))]),
        Answer::List(vec![slice("a-2")]),
    ]);
    let (metrics, registry) = metrics();
    let (state, mut inputs) = StateHandle::for_tests();
    let task = tokio::spawn(slices(client, state, metrics));
    for wanted in ["a-1", "a-2"] {
        let Input::Slices(Change::Reset { objects, .. }) = next(&mut inputs).await else { panic!() };
        assert_eq!(objects.iter().map(|slice| &*slice.key.name).collect::<Vec<_>>(), [wanted]);
    }
    assert!(count(&registry, "coil_watch_errors_total", "endpointslices") >= 2.0);
    task.abort();
}

#[tokio::test]
async fn namespaces_come_with_their_labels() {
    let (client, _requests) =
        scripted(vec![Answer::List(vec![json!({"metadata": {"name": "demo", "labels": {"team": "a"}}})])]);
    let (metrics, _registry) = metrics();
    let (state, mut inputs) = StateHandle::for_tests();
    let task = tokio::spawn(namespaces(client, state, metrics));
    let Input::Namespaces(Change::Reset { objects, .. }) = next(&mut inputs).await else { panic!() };
    assert_eq!(objects[0].name, "demo");
    assert_eq!(objects[0].labels["team"], "a");
    task.abort();
}
