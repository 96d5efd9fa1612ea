#![allow(clippy::unwrap_used, reason = "tests")]

use proptest::prelude::*;

use super::super::encode::tests::{LIMITS, egress, name, pod, policy, state, wide};
use super::fake::{Event, Fake, Refused};
use super::*;
use crate::desired::PolicyAction;

fn writer(fake: &Fake) -> Writer<Fake, Fake> {
    Writer::new(fake.clone(), fake.clone(), LIMITS, 1)
}

fn apply(writer: &mut Writer<Fake, Fake>, state: &DesiredState) -> Result<ApplyReport, Refused> {
    writer.apply(state)
}

fn one_client() -> DesiredState {
    state(vec![pod(7, Some(wide()))], vec![("nat", egress(&["10.9.0.1"], &[]))])
}

#[test]
fn a_pod_gets_its_programs_after_its_policy_and_loses_them_before() {
    let fake = Fake::default();
    let mut writer = writer(&fake);
    let report = apply(&mut writer, &one_client()).unwrap();
    assert_eq!(report.attached, ["uid7"]);
    let events = std::mem::take(&mut fake.0.borrow_mut().events);
    assert_eq!(events.last(), Some(&Event::Attach(7)));
    let report = apply(&mut writer, &state(vec![], vec![])).unwrap();
    assert_eq!(report.detached, [7]);
    let events = std::mem::take(&mut fake.0.borrow_mut().events);
    let detach = events.iter().position(|event| *event == Event::Detach(7)).unwrap();
    let remove = events.iter().position(|event| *event == Event::Op(MapOp::RemovePod(7))).unwrap();
    assert!(detach < remove, "{events:?}");
    let kernel = fake.0.borrow();
    assert!(kernel.maps.pods.is_empty() && kernel.maps.policy_v4.is_empty());
    assert!(kernel.maps.egress_names.is_empty() && kernel.maps.peers_v4.is_empty());
}

#[test]
fn the_same_again_does_nothing() {
    let fake = Fake::default();
    let mut writer = writer(&fake);
    apply(&mut writer, &one_client()).unwrap();
    fake.0.borrow_mut().events.clear();
    let report = apply(&mut writer, &one_client()).unwrap();
    assert_eq!(report.operations, 0);
    assert!(fake.0.borrow().events.is_empty());
    assert_eq!(fake.0.borrow().dumps, 1);
}

#[test]
fn a_restart_adopts_and_removes_what_is_left_over() {
    let fake = Fake::default();
    let two = state(vec![pod(7, Some(wide())), pod(8, None)], vec![("nat", egress(&["10.9.0.1"], &[]))]);
    apply(&mut writer(&fake), &two).unwrap();
    fake.0.borrow_mut().events.clear();
    let report = apply(&mut writer(&fake), &one_client()).unwrap();
    // The program of 7 is replaced, its maps stay as they are.
    assert_eq!(report.attached, [] as [&str; 0]);
    assert_eq!(report.detached, [8]);
    let events = &fake.0.borrow().events;
    assert_eq!(*events, [Event::Attach(7), Event::Detach(8), Event::Op(MapOp::RemovePod(8))]);
}

#[test]
fn nothing_is_taken_away_or_replaced_before_the_picture_is_complete() {
    let fake = Fake::default();
    apply(&mut writer(&fake), &one_client()).unwrap();
    let before = fake.0.borrow().maps.clone();
    let mut partial = state(
        // The Egress is not listed yet, and neither is the annotation of 7; 9 is new.
        vec![pod(7, None), pod(9, None)],
        vec![("nat", egress(&[], &[]))],
    );
    partial.complete = false;
    let mut writer = writer(&fake);
    let report = apply(&mut writer, &partial).unwrap();
    assert_eq!(report.attached, ["uid9"]);
    assert_eq!(report.detached, [] as [u32; 0]);
    let mut expected = before.clone();
    expected.pods.insert(9, fake.0.borrow().maps.pods[&9]);
    assert_eq!(fake.0.borrow().maps, expected);
    apply(&mut writer, &one_client()).unwrap();
    assert_eq!(fake.0.borrow().maps, before);
}

#[test]
fn a_missing_interface_fails_its_pod_alone() {
    let fake = Fake::default();
    fake.0.borrow_mut().missing.insert(7);
    let both = state(vec![pod(7, None), pod(8, None)], vec![]);
    let mut writer = writer(&fake);
    let report = apply(&mut writer, &both).unwrap();
    assert_eq!(report.attached, ["uid8"]);
    assert!(matches!(&report.failed[..], [(uid, PodError::InterfaceGone { .. })] if uid == "uid7"));
    fake.0.borrow_mut().missing.clear();
    assert_eq!(apply(&mut writer, &both).unwrap().attached, ["uid7"]);
}

#[test]
fn another_pod_at_the_same_index_is_attached_anew() {
    let fake = Fake::default();
    let mut writer = writer(&fake);
    apply(&mut writer, &state(vec![pod(7, None)], vec![])).unwrap();
    fake.0.borrow_mut().events.clear();
    let mut next = state(vec![], vec![]);
    next.pods.insert("another".into(), pod(7, None));
    apply(&mut writer, &next).unwrap();
    assert_eq!(fake.0.borrow().events, [Event::Attach(7)]);
}

#[test]
fn a_failure_at_any_point_is_repaired_by_the_next_attempt() {
    let narrow = policy(&[("192.0.2.0/24", PolicyAction::Egress(name("nat")))]);
    let after = state(
        vec![pod(7, Some(narrow)), pod(8, Some(wide()))],
        vec![("nat", egress(&["10.9.0.2", "fd00::2"], &["10.9.0.1"]))],
    );
    for fail_after in 0.. {
        let fake = Fake::default();
        let mut writer = writer(&fake);
        apply(&mut writer, &one_client()).unwrap();
        fake.0.borrow_mut().fail_after = Some(fail_after);
        let failed = apply(&mut writer, &after).is_err();
        fake.0.borrow_mut().fail_after = None;
        apply(&mut writer, &after).unwrap();
        assert_eq!(writer.maps(), Some(&fake.0.borrow().maps));
        let kernel = fake.0.borrow();
        assert_eq!(kernel.maps.pods.len(), 2);
        let sets: BTreeSet<u32> = kernel.maps.pods.values().map(|pod| pod.set).collect();
        let filled: BTreeSet<u32> =
            kernel.maps.policy_v4.keys().map(|(_, key)| u32::from_be_bytes(key.set)).collect();
        assert_eq!(sets, filled, "no set is left over and none is missing");
        if !failed {
            assert!(fail_after > 5, "the change has several operations");
            break;
        }
    }
}

/// Every reference in the maps leads somewhere.
fn check_references(maps: &MapState) -> Result<(), TestCaseError> {
    use coil_common::values::{EGRESS_BLOCK, GATEWAY_GONE, NO_POLICY};
    for pod in maps.pods.values().filter(|pod| pod.set != NO_POLICY) {
        let set = pod.set.to_be_bytes();
        prop_assert!(
            maps.policy_v4.keys().any(|(_, key)| key.set == set)
                || maps.policy_v6.keys().any(|(_, key)| key.set == set),
            "pod refers to a missing set"
        );
    }
    let values = maps.policy_v4.values().chain(maps.policy_v6.values());
    for egress in values.map(|value| value.egress).filter(|egress| *egress < EGRESS_BLOCK) {
        prop_assert!(maps.egresses.contains_key(&egress), "policy refers to a missing Egress");
        prop_assert!(maps.egress_names.contains_key(&(egress / 2)), "Egress has no name");
    }
    for egress in maps.egresses.values().filter(|egress| egress.gateways > 0) {
        for slot in egress.table {
            let gateway = maps.gateways.get(&u32::from(slot));
            prop_assert!(gateway.is_some_and(|g| g.state != GATEWAY_GONE), "table entry is gone");
        }
    }
    Ok(())
}

fn any_state() -> impl Strategy<Value = DesiredState> {
    let policy = prop_oneof![
        Just(None),
        Just(Some(wide())),
        Just(Some(policy(&[("192.0.2.0/24", PolicyAction::Egress(name("other")))]))),
        Just(Some(policy(&[("0.0.0.0/0", PolicyAction::Egress(name("gone")))]))),
    ];
    let pods = proptest::collection::btree_map(1u32..6, policy, 0..5);
    let gateways = proptest::collection::btree_map(1u8..5, any::<bool>(), 0..4);
    let egresses = proptest::collection::btree_map(
        prop_oneof![Just("nat"), Just("other"), Just("unused")],
        gateways,
        0..3,
    );
    (pods, egresses, any::<bool>()).prop_map(|(pods, egresses, complete)| {
        let pods = pods.into_iter().map(|(ifindex, policy)| pod(ifindex, policy)).collect();
        let egresses = egresses
            .into_iter()
            .map(|(name, gateways)| {
                let with = |wanted| {
                    let chosen = gateways.iter().filter(move |(_, ready)| **ready == wanted);
                    chosen.map(|(n, _)| format!("10.9.0.{n}")).collect::<Vec<_>>()
                };
                let (ready, draining) = (with(true), with(false));
                let ready: Vec<_> = ready.iter().map(String::as_str).collect();
                let draining: Vec<_> = draining.iter().map(String::as_str).collect();
                (name, egress(&ready, &draining))
            })
            .collect();
        DesiredState { complete, ..state(pods, egresses) }
    })
}

proptest! {
    #[test]
    fn references_hold_after_every_single_operation(
        states in proptest::collection::vec(any_state(), 1..6),
        restart in any::<bool>(),
    ) {
        let fake = Fake::default();
        let mut current = writer(&fake);
        for state in &states {
            if restart {
                current = writer(&fake);
            }
            let before = fake.0.borrow().maps.clone();
            fake.0.borrow_mut().events.clear();
            apply(&mut current, state).unwrap();
            prop_assert_eq!(current.maps(), Some(&fake.0.borrow().maps));
            // Replay the operations one by one and look at what the datapath would see.
            let events = fake.0.borrow().events.clone();
            let replay = Fake::default();
            replay.0.borrow_mut().maps = before;
            let mut store = replay.clone();
            for event in events {
                if let Event::Op(op) = event {
                    store.execute(&op).unwrap();
                    check_references(&replay.0.borrow().maps)?;
                }
            }
        }
    }
}
