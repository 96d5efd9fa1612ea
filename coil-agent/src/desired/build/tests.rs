#![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

use coil_api::egress::GatewayPreference;
use ipnet::Ipv4Net;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;

use super::*;
use crate::index::testing::{egress, name, pod};
use crate::index::{Change, GatewayView, NamespaceView, SliceView};
use crate::local::LocalPod;

fn reset<T>(objects: Vec<T>) -> Change<T> {
    Change::Reset { objects, unreadable: vec![] }
}

fn annotated(name: &str, uid: &str, value: &str) -> PodView {
    PodView {
        annotations: [("egress.coil.cybozu.com/internet".into(), value.into())].into(),
        addresses: vec!["10.64.0.5".parse().unwrap(), "fd00::5".parse().unwrap()],
        ..pod(name, uid)
    }
}

fn local(ifindex: u32) -> LocalPod {
    LocalPod { ifname: "eth0".into(), ifindex, mtu: 1500, addresses: vec![] }
}

/// A complete picture with these pods, wired at interfaces 11, 12, …
fn picture(pods: Vec<PodView>, egresses: Vec<EgressView>) -> Picture {
    let mut picture = Picture { adopted: true, ..Picture::default() };
    picture.local.list(&[], 1);
    for (ifindex, pod) in (11..).zip(&pods) {
        picture.local.wire(&pod.uid, local(ifindex), 1);
    }
    picture.index.pods.change(reset(pods));
    picture.index.egresses.change(reset(egresses));
    picture.index.slices.change(reset(vec![]));
    picture.index.namespaces.change(reset(vec![NamespaceView {
        name: "demo".into(),
        labels: [("team".into(), "a".into())].into(),
    }]));
    picture
}

fn outcome(picture: &mut Picture) -> Outcome {
    picture.outcome(&mut PolicyCache::default())
}

fn v4(outcome: &Outcome, uid: &str) -> Vec<(String, PolicyAction)> {
    let policy = outcome.desired.pods[uid].policy.as_ref().unwrap();
    policy.v4.iter().map(|(p, a)| (p.to_string(), a.clone())).collect()
}

fn action(outcome: &Outcome, uid: &str, prefix: &str) -> PolicyAction {
    let policy = outcome.desired.pods[uid].policy.as_ref().unwrap();
    policy.v4[&prefix.parse::<Ipv4Net>().unwrap()].clone()
}

fn problems(outcome: &Outcome, uid: &str) -> Vec<&'static str> {
    outcome.problems.get(uid).map_or(vec![], |found| found.problems.iter().map(Problem::reason).collect())
}

#[test]
fn nothing_is_wanted_until_every_kind_is_listed() {
    let mut picture = Picture::default();
    picture.local.list(&[], 1);
    picture.local.wire("1", local(11), 1);
    picture.index.pods.change(reset(vec![annotated("a", "1", "x")]));
    picture.index.egresses.change(reset(vec![]));
    picture.index.slices.change(reset(vec![]));
    assert_eq!(outcome(&mut picture).desired, DesiredState::default());
    picture.index.namespaces.change(reset(vec![]));
    // A pod without a known interface must be looked for first.
    picture.index.pods.change(Change::Apply(annotated("b", "2", "x")));
    let waiting = outcome(&mut picture);
    assert_eq!(waiting.desired, DesiredState::default());
    assert_eq!(waiting.unwired.unwrap().keys().collect::<Vec<_>>(), ["2"]);
    picture.adopted = true;
    let done = outcome(&mut picture);
    assert!(done.desired.complete);
    assert_eq!(done.desired.pods.len(), 1);
}

#[test]
fn a_client_gets_policy_and_gateways() {
    let mut picture =
        picture(vec![annotated("a", "1", "x"), pod("b", "2")], vec![egress("x", &["8.0.0.0/8"])]);
    picture.uplink_mtu = Some(1400);
    picture.index.slices.change(Change::Apply(SliceView {
        key: ObjectKey::new("internet", "x-1"),
        egress: name("x"),
        gateways: [("10.64.9.9".parse().unwrap(), GatewayView::new(super::super::GatewayState::Ready))]
            .into(),
    }));
    let done = outcome(&mut picture);
    let client = &done.desired.pods["1"];
    assert_eq!((client.ifindex, client.mtu), (11, 1400));
    assert_eq!(client.ipv4, Some([10, 64, 0, 5].into()));
    assert!(client.ipv6.is_some());
    assert_eq!(v4(&done, "1"), [("8.0.0.0/8".into(), PolicyAction::Egress(name("x")))]);
    assert!(done.desired.pods["2"].policy.is_none());
    assert_eq!(done.desired.egresses[&name("x")].v4.len(), 1);
    assert!(done.desired.egresses[&name("x")].client_affinity);
    assert!(done.problems.is_empty());
}

#[test]
fn annotations_take_effect_and_end_on_a_running_pod() {
    let mut picture = picture(vec![pod("a", "1")], vec![egress("x", &["8.0.0.0/8"])]);
    assert!(outcome(&mut picture).desired.pods["1"].policy.is_none());
    picture.index.pods.change(Change::Apply(annotated("a", "1", "x")));
    assert!(outcome(&mut picture).desired.pods["1"].policy.is_some());
    picture.index.pods.change(Change::Apply(pod("a", "1")));
    let done = outcome(&mut picture);
    assert!(done.desired.pods["1"].policy.is_none());
    assert!(done.desired.egresses.is_empty());
}

#[test]
fn a_missing_egress_blocks_and_is_reported() {
    let mut picture = picture(vec![annotated("a", "1", "nope,x")], vec![egress("x", &["8.0.0.0/8"])]);
    let done = outcome(&mut picture);
    assert_eq!(action(&done, "1", "0.0.0.0/0"), PolicyAction::Block);
    assert_eq!(action(&done, "1", "8.0.0.0/8"), PolicyAction::Egress(name("x")));
    assert_eq!(action(&done, "1", "10.0.0.0/8"), PolicyAction::Direct);
    assert_eq!(problems(&done, "1"), ["missing_egress"]);
    // It appears: all is well.
    picture.index.egresses.change(Change::Apply(egress("nope", &["9.0.0.0/8"])));
    assert!(outcome(&mut picture).problems.is_empty());
}

#[test]
fn a_deleted_egress_keeps_blocking_its_destinations() {
    let mut picture =
        picture(vec![annotated("a", "1", "x")], vec![egress("x", &["8.0.0.0/8", "10.9.0.0/16"])]);
    outcome(&mut picture);
    picture.index.egresses.change(Change::Delete(egress("x", &[]).key));
    for _ in 0..2 {
        let done = outcome(&mut picture);
        assert_eq!(action(&done, "1", "0.0.0.0/0"), PolicyAction::Block);
        assert_eq!(action(&done, "1", "10.9.0.0/16"), PolicyAction::Deleted(name("x")));
        assert_eq!(problems(&done, "1"), ["missing_egress"]);
        let gone = &done.desired.egresses[&name("x")];
        assert!(gone.deleted && gone.v4.is_empty() && gone.v6.is_empty());
    }
    // Once nobody names it, it is forgotten: only the wide block remains for a later client.
    picture.index.pods.change(Change::Apply(pod("a", "1")));
    outcome(&mut picture);
    picture.index.pods.change(Change::Apply(annotated("a", "1", "x")));
    let done = outcome(&mut picture);
    assert!(!v4(&done, "1").iter().any(|(prefix, _)| prefix == "10.9.0.0/16"));
}

#[test]
fn a_deleted_egress_has_no_gateways_whatever_still_runs() {
    let mut picture = picture(vec![annotated("a", "1", "x")], vec![egress("x", &["8.0.0.0/8"])]);
    picture.index.slices.change(Change::Apply(SliceView {
        key: ObjectKey::new("internet", "x-1"),
        egress: name("x"),
        gateways: [("10.64.9.9".parse().unwrap(), GatewayView::new(super::super::GatewayState::Ready))]
            .into(),
    }));
    assert_eq!(outcome(&mut picture).desired.egresses[&name("x")].v4.len(), 1);
    picture.index.egresses.change(Change::Delete(egress("x", &[]).key));
    assert!(outcome(&mut picture).desired.egresses[&name("x")].v4.is_empty());
}

#[test]
fn what_the_datapath_remembers_of_a_deleted_egress_blocks_after_a_restart() {
    let mut picture = picture(vec![annotated("a", "1", "x,y")], vec![]);
    let remembered = |net: &str| vec![net.parse().unwrap()];
    picture.index.egresses.remember(name("x"), remembered("10.9.0.0/16"));
    picture.index.egresses.remember(name("z"), remembered("10.8.0.0/16"));
    let done = outcome(&mut picture);
    assert_eq!(action(&done, "1", "10.9.0.0/16"), PolicyAction::Deleted(name("x")));
    assert!(!v4(&done, "1").iter().any(|(prefix, _)| prefix == "10.8.0.0/16"));
    picture.index.egresses.change(Change::Apply(egress("x", &["10.9.0.0/16"])));
    assert_eq!(action(&outcome(&mut picture), "1", "10.9.0.0/16"), PolicyAction::Egress(name("x")));
}

#[test]
fn unreadable_annotations_and_bad_destinations_block() {
    let bad = EgressView { problems: vec!["\"1/33\" is not a CIDR".into()], ..egress("bad", &["8.0.0.0/8"]) };
    let mut picture = picture(vec![annotated("a", "1", " x"), annotated("b", "2", "bad")], vec![bad]);
    let done = outcome(&mut picture);
    assert_eq!(problems(&done, "1"), ["unreadable_annotation"]);
    assert_eq!(action(&done, "1", "0.0.0.0/0"), PolicyAction::Block);
    assert_eq!(problems(&done, "2"), ["invalid_egress"]);
    assert_eq!(action(&done, "2", "0.0.0.0/0"), PolicyAction::Block);
    assert_eq!(action(&done, "2", "8.0.0.0/8"), PolicyAction::Egress(name("bad")));
}

#[test]
fn selectors_make_clients() {
    let selecting = EgressView {
        clients: vec![coil_api::egress::EgressClient {
            namespace_selector: Some(LabelSelector {
                match_labels: Some([("team".into(), "a".into())].into()),
                ..LabelSelector::default()
            }),
            pod_selector: None,
        }],
        ..egress("x", &["8.0.0.0/8"])
    };
    let mut picture = picture(vec![pod("a", "1")], vec![selecting]);
    assert!(outcome(&mut picture).desired.pods["1"].policy.is_some());
    picture
        .index
        .namespaces
        .change(Change::Apply(NamespaceView { name: "demo".into(), labels: BTreeMap::new() }));
    assert!(outcome(&mut picture).desired.pods["1"].policy.is_none());
}

#[test]
fn gateways_are_recognised_and_never_their_own_clients() {
    let mut gateway = annotated("x-1", "1", "x,y");
    gateway.key.namespace = "internet".into();
    gateway.labels = coil_api::names::egress_labels("x");
    let mut picture = picture(vec![gateway], vec![egress("x", &["0.0.0.0/0"]), egress("y", &["8.0.0.0/8"])]);
    let done = outcome(&mut picture);
    assert!(done.desired.pods["1"].gateway);
    assert_eq!(v4(&done, "1"), [("8.0.0.0/8".into(), PolicyAction::Egress(name("y")))]);
    assert!(done.gateway_folders.contains("1"));
    assert!(done.gateway_folders.contains("internet_x-1"));
}

#[test]
fn a_finished_pod_is_not_looked_for_but_keeps_the_policy_of_its_interface() {
    let finished = PodView { finished: true, ..annotated("a", "1", "x") };
    let mut picture = picture(vec![finished.clone()], vec![egress("x", &["8.0.0.0/8"])]);
    assert!(outcome(&mut picture).desired.pods["1"].policy.is_some());
    // Its address belongs to another pod now; a route must not lead to that one's interface.
    picture.local.list(&[], 9);
    picture.index.pods.change(Change::Apply(annotated("b", "2", "x")));
    let done = outcome(&mut picture);
    assert!(done.desired.pods.is_empty());
    assert_eq!(done.unwired.unwrap().keys().collect::<Vec<_>>(), ["2"]);
}

#[test]
fn a_pod_of_the_host_network_is_left_alone() {
    let host = PodView { host_network: true, ..annotated("a", "1", "x") };
    let mut picture = picture(vec![host], vec![]);
    assert!(outcome(&mut picture).desired.pods.is_empty());
    assert!(outcome(&mut picture).problems.is_empty());
}

#[test]
fn addresses_of_the_runtime_win_and_none_at_all_close_the_door() {
    let mut picture = picture(vec![annotated("a", "1", "x")], vec![]);
    let fresh = LocalPod { addresses: vec!["10.64.0.77".parse().unwrap()], ..local(12) };
    picture.local.wire("1", fresh, 1);
    let done = outcome(&mut picture);
    assert_eq!(done.desired.pods["1"].ipv4, Some([10, 64, 0, 77].into()));
    assert_eq!(done.desired.pods["1"].ipv6, None);
    let mut unknown = annotated("a", "1", "x");
    unknown.addresses.clear();
    picture.index.pods.change(Change::Apply(unknown));
    picture.local.wire("1", local(13), 1);
    let done = outcome(&mut picture);
    assert_eq!((done.desired.pods["1"].ipv4, done.desired.pods["1"].ipv6), (None, None));
}

#[test]
fn the_interface_of_a_pod_that_is_no_more_lets_nothing_through() {
    let mut picture = picture(vec![pod("a", "1")], vec![]);
    picture.local.wire("gone", local(99), 1);
    let done = outcome(&mut picture);
    let closed = &done.desired.pods["gone"];
    assert_eq!((closed.ifindex, closed.ipv4, closed.ipv6), (99, None, None));
    assert!(closed.policy.is_none() && !closed.gateway);
}

#[test]
fn pods_with_equal_wishes_share_a_policy() {
    let mut picture =
        picture(vec![annotated("a", "1", "x"), annotated("b", "2", "x")], vec![egress("x", &["8.0.0.0/8"])]);
    let done = outcome(&mut picture);
    let policy = |uid: &str| done.desired.pods[uid].policy.clone().unwrap();
    assert!(Arc::ptr_eq(&policy("1"), &policy("2")));
}

#[test]
fn what_an_egress_says_about_gateways_reaches_the_datapath() {
    use crate::desired::GatewayState::{Ready, Reserve};
    let near = GatewayView { node: Some("here".into()), ..GatewayView::new(Ready) };
    let far = GatewayView { node: Some("there".into()), ..GatewayView::new(Ready) };
    let view = EgressView {
        preference: GatewayPreference::Node,
        affinity_seconds: 77,
        originating_only: true,
        ..egress("x", &["8.0.0.0/8"])
    };
    let plain = egress("y", &["9.0.0.0/8"]);
    let mut picture = picture(vec![annotated("a", "1", "x,y")], vec![view, plain]);
    picture.place.node = "here".into();
    for name_of in ["x", "y"] {
        picture.index.slices.change(Change::Apply(SliceView {
            key: ObjectKey::new("internet", format!("{name_of}-1")),
            egress: name(name_of),
            gateways: [
                ("10.64.9.1".parse().unwrap(), near.clone()),
                ("10.64.9.2".parse().unwrap(), far.clone()),
            ]
            .into(),
        }));
    }
    let desired = outcome(&mut picture).desired;
    let of = |desired: &DesiredState, egress: &str| {
        let egress = &desired.egresses[&name(egress)];
        let states: Vec<_> = egress.v4.values().copied().collect();
        (states, egress.originating_only, egress.affinity_seconds)
    };
    assert_eq!(of(&desired, "x"), (vec![Ready, Reserve], true, 77));
    assert_eq!(of(&desired, "y"), (vec![Ready, Ready], false, 0));
    // The node's mode is that of all its Egresses.
    picture.originating_only = true;
    assert!(of(&outcome(&mut picture).desired, "y").1);
}

#[test]
fn without_egress_nobody_is_a_client() {
    let mut picture = picture(vec![annotated("a", "1", "nat,missing")], vec![egress("nat", &["8.0.0.0/8"])]);
    picture.no_egress = true;
    let outcome = outcome(&mut picture);
    assert!(outcome.problems.is_empty());
    assert!(outcome.desired.pods["1"].policy.is_none() && outcome.desired.egresses.is_empty());
}
