#![allow(clippy::unwrap_used, reason = "tests")]

use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use serde_json::json;

use super::*;

fn key(name: &str) -> PodKey {
    PodKey { namespace: "default".into(), name: name.into() }
}

fn view(name: &str, egress: Option<&str>, phase: &str, ips: &[&str]) -> PodView {
    let ips: Vec<_> = ips.iter().map(|ip| json!({ "ip": ip })).collect();
    let annotations = egress.map(|egress| json!({ "egress.coil.cybozu.com/internet": egress }));
    let pod = serde_json::from_value(json!({
        "metadata": { "namespace": "default", "name": name, "annotations": annotations,
                      "labels": { "app": name } },
        "status": { "phase": phase, "podIPs": ips },
    }));
    PodView::of(&pod.unwrap()).unwrap()
}

fn client(name: &str, ips: &[&str]) -> PodView {
    view(name, Some("nat"), "Running", ips)
}

fn apply(view: PodView) -> Input {
    Input::Pods(Change::Apply(view))
}

fn delete(name: &str) -> Input {
    Input::Pods(Change::Delete(key(name)))
}

/// A complete picture of some pods.
fn index(pods: Vec<PodView>) -> ClientIndex {
    let mut index = ClientIndex::new(EgressRef::new("internet", "nat"));
    index.apply(Input::Egress(vec![]));
    index.apply(Input::Namespaces(Change::Reset(vec![])));
    index.apply(Input::Pods(Change::Reset(pods)));
    assert!(index.is_complete());
    index
}

fn addresses(index: &ClientIndex) -> Vec<String> {
    index.addresses().map(|address| address.to_string()).collect()
}

#[test]
fn only_pods_that_name_this_egress_are_clients() {
    let index = index(vec![
        client("a", &["10.0.0.1", "fd00::1"]),
        view("b", Some("other"), "Running", &["10.0.0.2"]),
        view("c", Some("other,nat"), "Pending", &["10.0.0.3"]),
        view("d", None, "Running", &["10.0.0.4"]),
        view("e", Some("nat"), "Succeeded", &["10.0.0.5"]),
        client("f", &[]),
    ]);
    assert_eq!(addresses(&index), ["10.0.0.1", "10.0.0.3", "fd00::1"]);
    // A client without an address is one all the same.
    assert_eq!(index.clients().len(), 3);
}

#[test]
fn changes_of_a_running_pod_count_at_once() {
    let mut index = index(vec![view("a", None, "Running", &["10.0.0.1"])]);
    assert!(addresses(&index).is_empty());
    assert!(index.apply(apply(client("a", &["10.0.0.1"]))));
    assert!(!index.apply(apply(client("a", &["10.0.0.1"]))));
    assert_eq!(addresses(&index), ["10.0.0.1"]);
    assert!(index.apply(apply(client("a", &["10.0.0.9"]))));
    assert_eq!(addresses(&index), ["10.0.0.9"]);
    assert!(index.apply(apply(view("a", None, "Running", &["10.0.0.9"]))));
    assert!(addresses(&index).is_empty() && index.clients().is_empty());
}

#[test]
fn an_address_stays_while_any_live_client_has_it() {
    let mut index = index(vec![client("job-1", &["10.0.0.1"])]);
    // The job ends, its address goes to the next, and only then the first is deleted.
    index.apply(apply(client("job-2", &["10.0.0.1"])));
    index.apply(apply(view("job-1", Some("nat"), "Succeeded", &["10.0.0.1"])));
    assert_eq!(addresses(&index), ["10.0.0.1"]);
    index.apply(delete("job-1"));
    assert_eq!(addresses(&index), ["10.0.0.1"]);
    assert!(index.apply(delete("job-2")));
    assert!(!index.apply(delete("job-2")));
    assert!(addresses(&index).is_empty());
}

#[test]
fn a_relist_forgets_what_is_not_in_it_and_nothing_else() {
    let mut index = index(vec![client("a", &["10.0.0.1"]), client("b", &["10.0.0.2"])]);
    let again = vec![client("b", &["10.0.0.2"]), client("c", &["10.0.0.3"])];
    assert!(index.apply(Input::Pods(Change::Reset(again.clone()))));
    assert_eq!(addresses(&index), ["10.0.0.2", "10.0.0.3"]);
    assert!(!index.apply(Input::Pods(Change::Reset(again))));
}

#[test]
fn selectors_follow_labels_of_pods_and_namespaces() {
    let mut index = index(vec![view("web", None, "Running", &["10.0.0.1"])]);
    let selector = |key: &str, value: &str| {
        Some(LabelSelector {
            match_labels: Some(BTreeMap::from([(key.to_owned(), value.to_owned())])),
            ..LabelSelector::default()
        })
    };
    let clients =
        EgressClient { namespace_selector: selector("team", "a"), pod_selector: selector("app", "web") };
    assert!(!index.apply(Input::Egress(vec![clients])));
    let labels = |team: &str| ("default".to_owned(), BTreeMap::from([("team".to_owned(), team.to_owned())]));
    assert!(index.apply(Input::Namespaces(Change::Apply(labels("a")))));
    assert_eq!(addresses(&index), ["10.0.0.1"]);
    assert!(index.apply(Input::Namespaces(Change::Apply(labels("b")))));
    assert!(addresses(&index).is_empty());
    index.apply(Input::Namespaces(Change::Reset(vec![labels("a")])));
    assert_eq!(addresses(&index), ["10.0.0.1"]);
    assert!(index.apply(Input::Egress(vec![])));
    assert!(addresses(&index).is_empty());
}

#[test]
fn nothing_is_removed_before_the_picture_is_complete() {
    let mut index = ClientIndex::new(EgressRef::new("internet", "nat"));
    assert!(!index.apply(Input::Namespaces(Change::Reset(vec![]))));
    assert!(index.apply(Input::Pods(Change::Reset(vec![client("a", &["10.0.0.1"])]))));
    assert!(!index.is_complete());
    assert!(index.apply(Input::Egress(vec![])), "completion is a change");
    let set = |ips: &[&str]| ips.iter().map(|ip| ip.parse().unwrap()).collect::<BTreeSet<IpAddr>>();
    let (old, new) = (set(&["10.0.0.1", "10.0.0.2"]), set(&["10.0.0.2", "10.0.0.3"]));
    let three: Vec<IpAddr> = vec!["10.0.0.3".parse().unwrap()];
    assert_eq!(difference(&old, &new, false), (three.clone(), vec![]));
    assert_eq!(difference(&old, &new, true), (three, vec!["10.0.0.1".parse().unwrap()]));
}
