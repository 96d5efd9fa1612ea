#![allow(clippy::unwrap_used, reason = "tests")]

use std::sync::Arc;

use super::super::plan::plan;
use super::super::state::MapOp;
use super::*;

pub(crate) const LIMITS: Limits = Limits { pods: 8, policies: 32, egresses: 4, gateways: 8, peers: 32 };

pub(crate) fn name(text: &str) -> EgressName {
    EgressName { namespace: "internet".into(), name: text.into() }
}

pub(crate) fn policy(entries: &[(&str, PolicyAction)]) -> Arc<Policy> {
    let mut policy = Policy::default();
    for (net, action) in entries {
        match net.parse().unwrap() {
            ipnet::IpNet::V4(net) => policy.v4.insert(net, action.clone()),
            ipnet::IpNet::V6(net) => policy.v6.insert(net, action.clone()),
        };
    }
    Arc::new(policy)
}

pub(crate) fn egress(ready: &[&str], draining: &[&str]) -> DesiredEgress {
    let mut egress = DesiredEgress::default();
    let all = ready.iter().map(|a| (a, GatewayState::Ready));
    for (address, state) in all.chain(draining.iter().map(|a| (a, GatewayState::Draining))) {
        match address.parse().unwrap() {
            IpAddr::V4(address) => egress.v4.insert(address, state),
            IpAddr::V6(address) => egress.v6.insert(address, state),
        };
    }
    egress
}

pub(crate) fn pod(ifindex: u32, policy: Option<Arc<Policy>>) -> DesiredPod {
    DesiredPod {
        namespace: "default".into(),
        name: format!("pod{ifindex}"),
        ifindex,
        ipv4: Some(Ipv4Addr::new(10, 1, 0, u8::try_from(ifindex).unwrap())),
        ipv6: None,
        gateway: false,
        mtu: 1500,
        policy,
    }
}

pub(crate) fn wide() -> Arc<Policy> {
    policy(&[
        ("10.0.0.0/8", PolicyAction::Direct),
        ("0.0.0.0/0", PolicyAction::Egress(name("nat"))),
        ("::/0", PolicyAction::Egress(name("nat"))),
    ])
}

pub(crate) fn state(pods: Vec<DesiredPod>, egresses: Vec<(&str, DesiredEgress)>) -> DesiredState {
    DesiredState {
        pods: pods.into_iter().map(|pod| (format!("uid{}", pod.ifindex), pod)).collect(),
        egresses: egresses.into_iter().map(|(n, egress)| (name(n), egress)).collect(),
        complete: true,
    }
}

fn encode_ok(desired: &DesiredState, old: &MapState, next: &mut u32) -> MapState {
    let encoded = encode(desired, old, &LIMITS, next);
    assert!(encoded.failed.is_empty(), "{:?}", encoded.failed);
    assert!(encoded.problems.is_empty(), "{:?}", encoded.problems);
    encoded.state
}

fn v4_key(set: u32, net: &str) -> (u32, PolicyKey4) {
    let net: ipnet::Ipv4Net = net.parse().unwrap();
    let key = PolicyKey4 { set: set.to_be_bytes(), dst: net.addr().octets() };
    (u32::from(net.prefix_len()) + 32, key)
}

#[test]
fn a_policy_becomes_one_set_shared_by_its_pods() {
    let desired = state(
        vec![pod(7, Some(wide())), pod(8, Some(wide())), pod(9, None)],
        vec![("nat", egress(&["10.9.0.1", "fd00::1"], &["10.9.0.2"]))],
    );
    let mut next = 5;
    let maps = encode_ok(&desired, &MapState::default(), &mut next);
    assert_eq!(maps.pods[&7].set, 5);
    assert_eq!(maps.pods[&8].set, 5);
    assert_eq!(maps.pods[&9].set, NO_POLICY);
    assert_eq!(maps.pods[&7].ipv4, [10, 1, 0, 7]);
    assert_eq!(maps.policy_v4.len(), 2);
    assert_eq!(maps.policy_v4[&v4_key(5, "10.0.0.0/8")].egress, EGRESS_DIRECT);
    assert_eq!(maps.policy_v4[&v4_key(5, "0.0.0.0/0")].egress, 0);
    assert_eq!(maps.policy_v6.values().map(|v| v.egress).collect::<Vec<_>>(), [1]);
    assert_eq!((maps.egresses[&0].gateways, maps.egresses[&1].gateways), (1, 1));
    // Draining gateways take no new flows, but may still send.
    let peers: Vec<_> = maps.peers_v4.keys().map(|peer| peer.addr).collect();
    assert_eq!(peers, [[10, 9, 0, 1], [10, 9, 0, 2]]);
    assert_eq!(maps.peers_v6.len(), 1);
    let states: Vec<_> = maps.gateways.values().map(|slot| slot.state).collect();
    assert_eq!(states, [GATEWAY_READY, GATEWAY_DRAINING, GATEWAY_READY]);
}

#[test]
fn encoding_again_changes_nothing_whatever_the_counter() {
    let desired = state(
        vec![pod(7, Some(wide())), pod(8, Some(policy(&[("8.8.8.0/24", PolicyAction::Block)])))],
        vec![("nat", egress(&["10.9.0.1"], &[])), ("other", egress(&["10.9.0.3"], &[]))],
    );
    let first = encode_ok(&desired, &MapState::default(), &mut 1);
    let again = encode_ok(&desired, &first, &mut 100);
    assert_eq!(plan(&first, &again), []);
}

#[test]
fn changed_contents_get_another_set_and_the_old_one_goes_last() {
    let nat = || vec![("nat", egress(&["10.9.0.1"], &[]))];
    let mut next = 1;
    let old = encode_ok(&state(vec![pod(7, Some(wide()))], nat()), &MapState::default(), &mut next);
    let narrow = policy(&[("192.0.2.0/24", PolicyAction::Egress(name("nat")))]);
    let new = encode_ok(&state(vec![pod(7, Some(narrow))], nat()), &old, &mut next);
    assert_ne!(old.pods[&7].set, new.pods[&7].set);
    let ops = plan(&old, &new);
    let at = |wanted: fn(&MapOp) -> bool| ops.iter().position(wanted).unwrap();
    let policy = at(|op| matches!(op, MapOp::SetPolicy4(..)));
    let peer = at(|op| matches!(op, MapOp::SetPeer4(..)));
    let pod = at(|op| matches!(op, MapOp::SetPod(..)));
    let gone = at(|op| matches!(op, MapOp::RemovePolicy4(..)));
    assert!(peer < pod && policy < pod && pod < gone, "{ops:?}");
}

#[test]
fn ids_survive_and_are_not_given_away_in_the_same_change() {
    let mut next = 1;
    let with = |names: &[&str]| {
        let egresses = names.iter().map(|n| (*n, egress(&["10.9.0.1"], &[]))).collect();
        state(vec![], egresses)
    };
    let old = encode_ok(&with(&["b", "c"]), &MapState::default(), &mut next);
    let new = encode_ok(&with(&["a", "c"]), &old, &mut next);
    let ids: BTreeMap<_, _> =
        new.egress_names.iter().map(|(id, value)| (decode_egress_name(value).unwrap().name, *id)).collect();
    assert_eq!(ids, BTreeMap::from([("a".to_owned(), 2), ("c".to_owned(), 1)]));
    let reset = MapOp::ResetEgressStats(2);
    assert!(plan(&old, &new).contains(&reset), "an id's counters begin at zero");
    assert!(!plan(&old, &new).contains(&MapOp::ResetEgressStats(1)));
}

#[test]
fn a_slot_that_is_used_again_has_another_generation() {
    let mut next = 1;
    let with = |ready: &[&str]| state(vec![], vec![("nat", egress(ready, &[]))]);
    let one = encode_ok(&with(&["10.9.0.1"]), &MapState::default(), &mut next);
    assert_eq!(one.gateways[&0].generation, 1);
    // The old slot is not re-used while flows may still be with it.
    let two = encode_ok(&with(&["10.9.0.2"]), &one, &mut next);
    assert_eq!((two.gateways[&0].state, two.gateways[&0].generation), (GATEWAY_GONE, 1));
    assert_eq!(two.gateways[&1].addr[..4], [10, 9, 0, 2]);
    let last = plan(&one, &two).pop();
    assert!(matches!(last, Some(MapOp::ClearGateway(0, _))), "{last:?}");
    let three = encode_ok(&with(&["10.9.0.2", "10.9.0.3"]), &two, &mut next);
    assert_eq!((three.gateways[&0].state, three.gateways[&0].generation), (GATEWAY_READY, 2));
    assert_eq!(three.gateways[&1], two.gateways[&1]);
}

#[test]
fn an_unknown_egress_is_closed() {
    let maps = encode_ok(&state(vec![pod(7, Some(wide()))], vec![]), &MapState::default(), &mut 1);
    assert_eq!(maps.policy_v4[&v4_key(1, "0.0.0.0/0")].egress, EGRESS_BLOCK);
}

#[test]
fn what_does_not_fit_fails_alone_and_closed() {
    let many: Vec<_> = (0..40u8).map(|n| (format!("192.0.{n}.0/24"), PolicyAction::Direct)).collect();
    let many: Vec<_> = many.iter().map(|(net, action)| (net.as_str(), action.clone())).collect();
    let long = "n".repeat(65);
    let desired = state(
        vec![pod(6, Some(policy(&many))), pod(7, Some(wide()))],
        vec![("nat", egress(&["10.9.0.1"], &[])), (&long, egress(&["10.9.0.2"], &[]))],
    );
    let encoded = encode(&desired, &MapState::default(), &LIMITS, &mut 1);
    let [(uid, EncodeError::Full { limit: 32, .. })] = &encoded.failed[..] else {
        unreachable!("{:?}", encoded.failed)
    };
    assert_eq!(uid, "uid6");
    assert_eq!(encoded.problems.len(), 1);
    let set = encoded.state.pods[&6].set;
    assert_eq!(encoded.state.policy_v4[&v4_key(set, "0.0.0.0/0")].egress, EGRESS_BLOCK);
    assert_ne!(encoded.state.pods[&7].set, set);
}

#[test]
fn two_pods_cannot_have_one_interface() {
    let mut desired = state(vec![pod(7, None)], vec![]);
    desired.pods.insert("zzz".into(), pod(7, Some(wide())));
    let encoded = encode(&desired, &MapState::default(), &LIMITS, &mut 1);
    let expected = ("zzz".to_owned(), EncodeError::DuplicateInterface { ifindex: 7 });
    assert_eq!(encoded.failed, [expected]);
    assert_eq!(encoded.state.pods[&7].set, NO_POLICY);
}

#[test]
fn the_table_names_ready_gateways_by_slot() {
    let desired = state(vec![], vec![("nat", egress(&["10.9.0.1", "10.9.0.3"], &["10.9.0.2"]))]);
    let maps = encode_ok(&desired, &MapState::default(), &mut 1);
    let slots: BTreeSet<u16> = maps.egresses[&0].table.iter().copied().collect();
    let addresses: Vec<_> = slots.iter().map(|slot| maps.gateways[&u32::from(*slot)].addr[3]).collect();
    assert_eq!(addresses, [1, 3]);
    assert_eq!(maps.egresses[&1].gateways, 0);
}

#[test]
fn a_deleted_egress_keeps_its_destinations_in_the_maps() {
    let live = state(
        vec![pod(
            7,
            Some(policy(&[
                ("10.9.0.0/16", PolicyAction::Egress(name("nat"))),
                ("fd00:9::/32", PolicyAction::Egress(name("nat"))),
                ("8.8.8.0/24", PolicyAction::Block),
                ("10.9.1.0/24", PolicyAction::Direct),
            ])),
        )],
        vec![("nat", egress(&["10.9.0.1"], &[]))],
    );
    let mut next = 1;
    let before = encode_ok(&live, &MapState::default(), &mut next);
    let expected = BTreeMap::from([(
        name("nat"),
        BTreeSet::from(["10.9.0.0/16".parse().unwrap(), "fd00:9::/32".parse().unwrap()]),
    )]);
    assert_eq!(destinations(&before), expected);

    let deleted = state(
        vec![pod(
            7,
            Some(policy(&[
                ("10.9.0.0/16", PolicyAction::Deleted(name("nat"))),
                ("fd00:9::/32", PolicyAction::Deleted(name("nat"))),
                ("0.0.0.0/0", PolicyAction::Block),
                ("::/0", PolicyAction::Block),
            ])),
        )],
        vec![("nat", DesiredEgress { deleted: true, ..DesiredEgress::default() })],
    );
    let after = encode_ok(&deleted, &before, &mut next);
    assert_eq!(destinations(&after), expected);
    assert_eq!((after.egresses[&0].flags, after.egresses[&0].gateways), (EGRESS_DELETED, 0));
    assert!(after.peers_v4.is_empty());

    // Sets that no pod has are left-overs and say nothing.
    let unused = MapState { pods: BTreeMap::new(), ..after };
    assert!(destinations(&unused).is_empty());
}

#[test]
fn a_reserve_keeps_its_flows_and_is_in_no_table() {
    let mut nat = egress(&["10.9.0.1", "10.9.0.2"], &[]);
    nat.v4.insert(Ipv4Addr::new(10, 9, 0, 2), GatewayState::Reserve);
    let maps =
        encode_ok(&state(vec![pod(7, Some(wide()))], vec![("nat", nat)]), &MapState::default(), &mut 5);
    assert!(maps.gateways.values().all(|slot| slot.state == GATEWAY_READY));
    assert_eq!((maps.egresses[&0].gateways, maps.egresses[&0].table), (1, [0; MAGLEV_SLOTS]));
    assert_eq!(maps.peers_v4.len(), 2);
}

#[test]
fn affinity_and_mode_are_in_the_flags() {
    let mut nat = egress(&["10.9.0.1"], &[]);
    (nat.client_affinity, nat.affinity_seconds, nat.originating_only) = (true, 10_800, true);
    let other = policy(&[("8.8.8.0/24", PolicyAction::Egress(name("other")))]);
    let desired = state(
        vec![pod(7, Some(wide())), pod(8, Some(other)), pod(9, None)],
        vec![("nat", nat), ("other", egress(&["10.9.0.3"], &[]))],
    );
    let maps = encode_ok(&desired, &MapState::default(), &mut 5);
    assert_eq!(maps.egresses[&0].affinity_seconds(), 10_800);
    assert_eq!(maps.egresses[&0].flags & 0xff, EGRESS_CLIENT_AFFINITY | EGRESS_ORIGINATING_ONLY);
    assert_eq!(maps.egresses[&2].flags, 0);
    // Only pods that the mode is about pay for it.
    let flags: Vec<_> = maps.pods.values().map(|pod| pod.flags).collect();
    assert_eq!(flags, [POD_ORIGINATING_ONLY, 0, 0]);
}
