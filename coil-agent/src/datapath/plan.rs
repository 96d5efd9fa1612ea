//! The difference between two map contents as an ordered list of changes.
//!
//! Pure. What is referred to comes before what refers to it, and removals come last in the opposite
//! order, so that the datapath never meets a reference to something that is not there. Nothing that
//! is in use is removed before its replacement stands.

use std::collections::BTreeMap;

use coil_common::values::GATEWAY_GONE;

use super::state::{MapOp, MapState};

/// What turns `old` into `new`.
#[must_use]
pub(crate) fn plan(old: &MapState, new: &MapState) -> Vec<MapOp> {
    let mut ops = Vec::new();
    for (index, value) in changed(&old.gateways, &new.gateways) {
        if value.state != GATEWAY_GONE {
            ops.push(MapOp::SetGateway(*index, *value));
        }
    }
    ops.extend(changed(&old.peers_v4, &new.peers_v4).map(|(k, v)| MapOp::SetPeer4(*k, *v)));
    ops.extend(changed(&old.peers_v6, &new.peers_v6).map(|(k, v)| MapOp::SetPeer6(*k, *v)));
    for (id, name) in changed(&old.egress_names, &new.egress_names) {
        // The counters of an earlier holder of the id are not this Egress's.
        ops.push(MapOp::ResetEgressStats(*id));
        ops.push(MapOp::SetEgressName(*id, *name));
    }
    ops.extend(changed(&old.egresses, &new.egresses).map(|(k, v)| MapOp::SetEgress(*k, *v)));
    ops.extend(changed(&old.policy_v4, &new.policy_v4).map(|(k, v)| MapOp::SetPolicy4(*k, *v)));
    ops.extend(changed(&old.policy_v6, &new.policy_v6).map(|(k, v)| MapOp::SetPolicy6(*k, *v)));
    ops.extend(changed(&old.pods, &new.pods).map(|(k, v)| MapOp::SetPod(*k, *v)));

    ops.extend(gone(&old.pods, &new.pods).map(|k| MapOp::RemovePod(*k)));
    ops.extend(gone(&old.policy_v4, &new.policy_v4).map(|k| MapOp::RemovePolicy4(*k)));
    ops.extend(gone(&old.policy_v6, &new.policy_v6).map(|k| MapOp::RemovePolicy6(*k)));
    ops.extend(gone(&old.peers_v4, &new.peers_v4).map(|k| MapOp::RemovePeer4(*k)));
    ops.extend(gone(&old.peers_v6, &new.peers_v6).map(|k| MapOp::RemovePeer6(*k)));
    ops.extend(gone(&old.egresses, &new.egresses).map(|k| MapOp::ClearEgress(*k)));
    ops.extend(gone(&old.egress_names, &new.egress_names).map(|k| MapOp::ClearEgressName(*k)));
    for (index, value) in changed(&old.gateways, &new.gateways) {
        if value.state == GATEWAY_GONE {
            ops.push(MapOp::ClearGateway(*index, *value));
        }
    }
    ops
}

fn changed<'a, K: Ord, V: PartialEq>(
    old: &'a BTreeMap<K, V>,
    new: &'a BTreeMap<K, V>,
) -> impl Iterator<Item = (&'a K, &'a V)> {
    new.iter().filter(|(key, value)| old.get(key) != Some(*value))
}

fn gone<'a, K: Ord, V>(old: &'a BTreeMap<K, V>, new: &'a BTreeMap<K, V>) -> impl Iterator<Item = &'a K> {
    old.keys().filter(|key| !new.contains_key(key))
}
