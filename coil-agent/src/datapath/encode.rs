//! Domain types to map contents; the only place that knows both.
//!
//! Pure. Numbers (policy sets, ids of Egresses, slots of gateways) are taken over from what the maps
//! hold, so that flows in the kernel keep their meaning across changes and restarts of the agent.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use coil_common::keys::{POLICY_SET_BITS, PeerKey4, PeerKey6, PolicyKey4, PolicyKey6};
use coil_common::values::{
    EGRESS_AFFINITY_SHIFT, EGRESS_BLOCK, EGRESS_CLIENT_AFFINITY, EGRESS_DELETED, EGRESS_DIRECT,
    EGRESS_ORIGINATING_ONLY, EGRESS_SOURCE_PORT_AUTO, EgressNameValue, EgressValue, GATEWAY_DRAINING,
    GATEWAY_GONE, GATEWAY_READY, GatewayValue, MAGLEV_SLOTS, NO_POLICY, POD_GATEWAY, POD_ORIGINATING_ONLY,
    PodValue, PolicyValue,
};
use ipnet::IpNet;

use super::maglev;
use super::state::{MapState, Prefix};
use crate::desired::{
    DesiredEgress, DesiredPod, DesiredState, EgressName, GatewayState, PodUid, Policy, PolicyAction,
};

/// How much fits into the maps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Limits {
    pub(crate) pods: usize,
    /// For each family.
    pub(crate) policies: usize,
    pub(crate) egresses: usize,
    pub(crate) gateways: usize,
    /// For each family.
    pub(crate) peers: usize,
}

/// Why something of the desired state cannot be expressed in the maps.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EncodeError {
    /// More than a map holds.
    #[error("no room for more than {limit} {what}")]
    Full {
        /// What there is too much of.
        what: &'static str,
        /// The capacity.
        limit: usize,
    },
    /// Two pods claim one interface.
    #[error("interface {ifindex} already belongs to another pod")]
    DuplicateInterface {
        /// Index of the interface.
        ifindex: u32,
    },
}

/// Map contents for a desired state.
#[derive(Debug, Default)]
pub(crate) struct Encoded {
    pub(crate) state: MapState,
    /// Pods that could not be served as desired: these are absent, or all that they send towards
    /// destinations beyond their node is dropped.
    pub(crate) failed: Vec<(PodUid, EncodeError)>,
    /// What else does not fit.
    pub(crate) problems: Vec<(EgressName, EncodeError)>,
}

/// Encodes `desired`, with the numbers that `old` has given; new policy sets count up from `next_set`,
/// so that a number is not used again while flows may carry it.
pub(crate) fn encode(desired: &DesiredState, old: &MapState, limits: &Limits, next_set: &mut u32) -> Encoded {
    let mut encoded = Encoded::default();
    let ids = assign_egresses(desired, old, limits, &mut encoded);
    let slots = assign_gateways(desired, old, limits, &mut encoded);
    for (name, egress) in &desired.egresses {
        if let Some(&id) = ids.get(name) {
            encoded.state.egresses.insert(id * 2, egress_v4(egress, &slots));
            encoded.state.egresses.insert(id * 2 + 1, egress_v6(egress, &slots));
        }
    }
    let mut modes = Modes::new(desired);
    let mut sets = Sets { desired, ids, slots, limits, known: known_sets(old), next: next_set };
    for (uid, pod) in &desired.pods {
        if encoded.state.pods.contains_key(&pod.ifindex) {
            let error = EncodeError::DuplicateInterface { ifindex: pod.ifindex };
            encoded.failed.push((uid.clone(), error));
            continue;
        }
        if encoded.state.pods.len() == limits.pods {
            let error = EncodeError::Full { what: "pods", limit: limits.pods };
            encoded.failed.push((uid.clone(), error));
            continue;
        }
        let set = match pod.policy.as_deref() {
            None => NO_POLICY,
            Some(policy) => match sets.place(sets.contents(policy), &mut encoded.state) {
                Ok(set) => set,
                Err(error) => {
                    encoded.failed.push((uid.clone(), error));
                    match sets.place(Contents::blocked(), &mut encoded.state) {
                        Ok(set) => set,
                        Err(_) => continue,
                    }
                }
            },
        };
        let mut value = pod_value(pod, set);
        if pod.policy.as_ref().is_some_and(|policy| modes.originating_only(policy)) {
            value.flags |= POD_ORIGINATING_ONLY;
        }
        encoded.state.pods.insert(pod.ifindex, value);
    }
    encoded
}

/// What Egresses say about the pods that use them.
struct Modes<'a> {
    /// Egresses that are for connections that pods open.
    originating_only: BTreeSet<&'a EgressName>,
    /// Policies that have been looked at, which pods share.
    known: BTreeMap<*const Policy, bool>,
}

impl<'a> Modes<'a> {
    fn new(desired: &'a DesiredState) -> Self {
        let egresses = desired.egresses.iter().filter(|(_, egress)| egress.originating_only);
        Self { originating_only: egresses.map(|(name, _)| name).collect(), known: BTreeMap::new() }
    }

    /// Some Egress of a policy is for connections that pods open.
    fn originating_only(&mut self, policy: &Arc<Policy>) -> bool {
        let Self { originating_only, known } = self;
        if originating_only.is_empty() {
            return false;
        }
        *known.entry(Arc::as_ptr(policy)).or_insert_with(|| {
            let mut actions = policy.v4.values().chain(policy.v6.values());
            actions.any(|action| match action {
                PolicyAction::Egress(name) => originating_only.contains(name),
                _ => false,
            })
        })
    }
}

fn pod_value(pod: &DesiredPod, set: u32) -> PodValue {
    PodValue {
        ipv4: pod.ipv4.map_or([0; 4], |address| address.octets()),
        ipv6: pod.ipv6.map_or([0; 16], |address| address.octets()),
        set,
        flags: if pod.gateway { POD_GATEWAY } else { 0 },
        mtu: pod.mtu,
    }
}

/// Encodes a name, if it is not too long to be that of any Service.
pub(crate) fn egress_name(name: &EgressName) -> Option<EgressNameValue> {
    fn field(text: &str) -> Option<[u8; 64]> {
        let mut field = [0; 64];
        field.get_mut(..text.len())?.copy_from_slice(text.as_bytes());
        Some(field)
    }
    (!name.namespace.is_empty())
        .then(|| Some(EgressNameValue { namespace: field(&name.namespace)?, name: field(&name.name)? }))
        .flatten()
}

/// Decodes a name; `None` if the slot is free.
pub(crate) fn decode_egress_name(value: &EgressNameValue) -> Option<EgressName> {
    fn text(field: &[u8; 64]) -> String {
        let end = field.iter().position(|&byte| byte == 0).unwrap_or(field.len());
        String::from_utf8_lossy(&field[..end]).into_owned()
    }
    (value.namespace[0] != 0)
        .then(|| EgressName { namespace: text(&value.namespace), name: text(&value.name) })
}

/// Destinations by Egress, as policies of pods in the maps have them; for an agent that starts and has
/// to know what Egresses stood for that were deleted while it was away, or before.
pub(crate) fn destinations(maps: &MapState) -> BTreeMap<EgressName, BTreeSet<IpNet>> {
    let used: BTreeSet<u32> = maps.pods.values().map(|pod| pod.set).collect();
    let v4 = maps.policy_v4.iter().map(|((length, key), value)| {
        let length = length.saturating_sub(POLICY_SET_BITS);
        (key.set, IpAddr::from(key.dst), length, value.egress)
    });
    let v6 = maps.policy_v6.iter().map(|((length, key), value)| {
        let length = length.saturating_sub(POLICY_SET_BITS);
        (key.set, IpAddr::from(key.dst), length, value.egress)
    });
    let mut destinations: BTreeMap<EgressName, BTreeSet<IpNet>> = BTreeMap::new();
    for (set, address, length, egress) in v4.chain(v6) {
        if !used.contains(&u32::from_be_bytes(set)) {
            continue;
        }
        // No name has an id that stands for something else than an Egress.
        let name = maps.egress_names.get(&(egress / 2)).and_then(decode_egress_name);
        let net = u8::try_from(length).ok().and_then(|length| IpNet::new(address, length).ok());
        if let (Some(name), Some(net)) = (name, net) {
            destinations.entry(name).or_default().insert(net.trunc());
        }
    }
    destinations
}

/// Decodes the address of a gateway's slot, for the family in which it is used.
fn gateway_address(value: &GatewayValue) -> IpAddr {
    let [a, b, c, d, rest @ ..] = value.addr;
    // No IPv6 address in use ends in twelve zero bytes: `x:y::` is a subnet-router anycast address.
    if rest == [0; 12] { Ipv4Addr::new(a, b, c, d).into() } else { Ipv6Addr::from(value.addr).into() }
}

fn address_field(address: IpAddr) -> [u8; 16] {
    match address {
        IpAddr::V4(address) => {
            let mut field = [0; 16];
            field[..4].copy_from_slice(&address.octets());
            field
        }
        IpAddr::V6(address) => address.octets(),
    }
}

/// Ids of Egresses: those of `old` stay, others get the lowest that `old` does not use.
fn assign_egresses(
    desired: &DesiredState,
    old: &MapState,
    limits: &Limits,
    encoded: &mut Encoded,
) -> BTreeMap<EgressName, u32> {
    let known: BTreeMap<EgressName, u32> =
        old.egress_names.iter().filter_map(|(id, value)| Some((decode_egress_name(value)?, *id))).collect();
    let mut used: BTreeSet<u32> = old.egress_names.keys().copied().collect();
    let mut ids = BTreeMap::new();
    for name in desired.egresses.keys() {
        let full = || EncodeError::Full { what: "Egresses", limit: limits.egresses };
        let Some(value) = egress_name(name) else {
            encoded.problems.push((
                name.clone(),
                EncodeError::Full { what: "bytes of the name of an Egress", limit: 64 },
            ));
            continue;
        };
        let id = match known.get(name) {
            Some(&id) => id,
            None => match lowest_free(&used, limits.egresses) {
                Some(id) => id,
                None => {
                    encoded.problems.push((name.clone(), full()));
                    continue;
                }
            },
        };
        used.insert(id);
        ids.insert(name.clone(), id);
        encoded.state.egress_names.insert(id, value);
    }
    ids
}

fn lowest_free(used: &BTreeSet<u32>, limit: usize) -> Option<u32> {
    (0..u32::try_from(limit).unwrap_or(u32::MAX)).find(|index| !used.contains(index))
}

/// Slots of gateways: those of `old` stay, others get the lowest that `old` does not use.
fn assign_gateways(
    desired: &DesiredState,
    old: &MapState,
    limits: &Limits,
    encoded: &mut Encoded,
) -> BTreeMap<IpAddr, u16> {
    let mut known = BTreeMap::new();
    let mut used = BTreeSet::new();
    for (&slot, value) in &old.gateways {
        if value.state != GATEWAY_GONE {
            known.insert(gateway_address(value), slot);
            used.insert(slot);
        }
        // Kept for its generation, and overwritten below if the gateway stays.
        encoded.state.gateways.insert(slot, GatewayValue { state: GATEWAY_GONE, ..*value });
    }
    let mut slots = BTreeMap::new();
    // Indices in tables have 16 bits.
    let limit = limits.gateways.min(usize::from(u16::MAX));
    for (name, egress) in &desired.egresses {
        let v4 = egress.v4.iter().map(|(address, state)| (IpAddr::V4(*address), state));
        let v6 = egress.v6.iter().map(|(address, state)| (IpAddr::V6(*address), state));
        for (address, state) in v4.chain(v6) {
            let slot = slots
                .get(&address)
                .copied()
                .map(u32::from)
                .or_else(|| known.get(&address).copied().or_else(|| lowest_free(&used, limit)));
            let Some(slot) = slot.and_then(|slot| u16::try_from(slot).ok()) else {
                encoded.problems.push((name.clone(), EncodeError::Full { what: "gateways", limit }));
                continue;
            };
            let index = u32::from(slot);
            used.insert(index);
            let generation = match old.gateways.get(&index) {
                None => 1,
                Some(value) if known.get(&address) == Some(&index) => value.generation,
                Some(value) => value.generation.wrapping_add(1),
            };
            let ready = matches!(state, GatewayState::Ready | GatewayState::Reserve)
                || (slots.contains_key(&address) && encoded.state.gateways[&index].state == GATEWAY_READY);
            let state = if ready { GATEWAY_READY } else { GATEWAY_DRAINING };
            slots.insert(address, slot);
            encoded
                .state
                .gateways
                .insert(index, GatewayValue { addr: address_field(address), generation, state });
        }
    }
    slots
}

fn egress_v4(egress: &DesiredEgress, slots: &BTreeMap<IpAddr, u16>) -> EgressValue {
    egress_value(egress, egress.v4.iter().map(|(a, s)| (IpAddr::V4(*a), *s)), slots)
}

fn egress_v6(egress: &DesiredEgress, slots: &BTreeMap<IpAddr, u16>) -> EgressValue {
    egress_value(egress, egress.v6.iter().map(|(a, s)| (IpAddr::V6(*a), *s)), slots)
}

fn egress_value(
    egress: &DesiredEgress,
    gateways: impl Iterator<Item = (IpAddr, GatewayState)>,
    slots: &BTreeMap<IpAddr, u16>,
) -> EgressValue {
    let mut flags = 0;
    if egress.client_affinity {
        let seconds = egress.affinity_seconds.min(u32::MAX >> EGRESS_AFFINITY_SHIFT);
        flags |= EGRESS_CLIENT_AFFINITY | seconds << EGRESS_AFFINITY_SHIFT;
    }
    if egress.originating_only {
        flags |= EGRESS_ORIGINATING_ONLY;
    }
    if egress.source_port_auto {
        flags |= EGRESS_SOURCE_PORT_AUTO;
    }
    if egress.deleted {
        flags |= EGRESS_DELETED;
    }
    let (addresses, ready): (Vec<IpAddr>, Vec<u16>) = gateways
        .filter(|(_, state)| *state == GatewayState::Ready)
        .filter_map(|(address, _)| Some((address, *slots.get(&address)?)))
        .unzip();
    let mut table = [0; MAGLEV_SLOTS];
    if !ready.is_empty() {
        for (entry, index) in table.iter_mut().zip(maglev::table(&addresses)) {
            *entry = ready[index];
        }
    }
    EgressValue { flags, gateways: u16::try_from(ready.len()).unwrap_or(u16::MAX), table }
}

/// Contents of a policy set, without its number: value by prefix length and destination.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
struct Contents {
    v4: BTreeMap<(u32, [u8; 4]), u32>,
    v6: BTreeMap<(u32, [u8; 16]), u32>,
}

impl Contents {
    fn blocked() -> Self {
        Self {
            v4: BTreeMap::from([((0, [0; 4]), EGRESS_BLOCK)]),
            v6: BTreeMap::from([((0, [0; 16]), EGRESS_BLOCK)]),
        }
    }
}

/// Sets that the maps hold, by contents.
fn known_sets(old: &MapState) -> BTreeMap<Contents, u32> {
    let mut sets: BTreeMap<u32, Contents> = BTreeMap::new();
    for ((length, key), value) in &old.policy_v4 {
        let contents = sets.entry(u32::from_be_bytes(key.set)).or_default();
        contents.v4.insert((length.saturating_sub(POLICY_SET_BITS), key.dst), value.egress);
    }
    for ((length, key), value) in &old.policy_v6 {
        let contents = sets.entry(u32::from_be_bytes(key.set)).or_default();
        contents.v6.insert((length.saturating_sub(POLICY_SET_BITS), key.dst), value.egress);
    }
    // Of equal sets the lowest number wins.
    sets.into_iter().rev().map(|(set, contents)| (contents, set)).collect()
}

/// Gives policies their sets.
struct Sets<'a> {
    desired: &'a DesiredState,
    ids: BTreeMap<EgressName, u32>,
    slots: BTreeMap<IpAddr, u16>,
    limits: &'a Limits,
    known: BTreeMap<Contents, u32>,
    next: &'a mut u32,
}

impl Sets<'_> {
    fn contents(&self, policy: &Policy) -> Contents {
        let value = |action: &PolicyAction, family| match action {
            PolicyAction::Direct => EGRESS_DIRECT,
            PolicyAction::Block => EGRESS_BLOCK,
            // An Egress that is not known here cannot be used: fails closed.
            PolicyAction::Egress(name) | PolicyAction::Deleted(name) => {
                self.ids.get(name).map_or(EGRESS_BLOCK, |id| id * 2 + family)
            }
        };
        Contents {
            v4: policy
                .v4
                .iter()
                .map(|(net, action)| {
                    let key = (u32::from(net.prefix_len()), net.network().octets());
                    (key, value(action, 0))
                })
                .collect(),
            v6: policy
                .v6
                .iter()
                .map(|(net, action)| {
                    let key = (u32::from(net.prefix_len()), net.network().octets());
                    (key, value(action, 1))
                })
                .collect(),
        }
    }

    /// Puts a set into `state` unless it is there, and returns its number.
    fn place(&mut self, contents: Contents, state: &mut MapState) -> Result<u32, EncodeError> {
        if contents == Contents::default() {
            return Ok(NO_POLICY);
        }
        let set = match self.known.get(&contents) {
            Some(&set) => set,
            None => self.fresh(),
        };
        let v4 = contents.v4.iter().map(|(&(length, dst), &egress)| {
            let key = PolicyKey4 { set: set.to_be_bytes(), dst };
            ((length + POLICY_SET_BITS, key), PolicyValue { egress })
        });
        let v6 = contents.v6.iter().map(|(&(length, dst), &egress)| {
            let key = PolicyKey6 { set: set.to_be_bytes(), dst };
            ((length + POLICY_SET_BITS, key), PolicyValue { egress })
        });
        let (v4, v6): (Vec<(Prefix<_>, _)>, Vec<(Prefix<_>, _)>) = (v4.collect(), v6.collect());
        if v4.first().is_some_and(|(key, _)| state.policy_v4.contains_key(key))
            || v6.first().is_some_and(|(key, _)| state.policy_v6.contains_key(key))
        {
            return Ok(set);
        }
        let (peers_v4, peers_v6) = self.peers(set, &contents);
        let fits = |has: usize, more: usize, limit: usize, what| {
            if has + more > limit { Err(EncodeError::Full { what, limit }) } else { Ok(()) }
        };
        let Limits { policies, peers, .. } = *self.limits;
        fits(state.policy_v4.len(), v4.len(), policies, "IPv4 policy prefixes")?;
        fits(state.policy_v6.len(), v6.len(), policies, "IPv6 policy prefixes")?;
        fits(state.peers_v4.len(), peers_v4.len(), peers, "pairs of policy and IPv4 gateway")?;
        fits(state.peers_v6.len(), peers_v6.len(), peers, "pairs of policy and IPv6 gateway")?;
        state.policy_v4.extend(v4);
        state.policy_v6.extend(v6);
        state.peers_v4.extend(peers_v4);
        state.peers_v6.extend(peers_v6);
        self.known.insert(contents, set);
        Ok(set)
    }

    fn fresh(&mut self) -> u32 {
        loop {
            let set = *self.next;
            *self.next = self.next.wrapping_add(1);
            if set != NO_POLICY && !self.known.values().any(|known| *known == set) {
                return set;
            }
        }
    }

    /// Gateways that may send to the pods of a set: all of the Egresses that it refers to.
    fn peers(&self, set: u32, contents: &Contents) -> (BTreeMap<PeerKey4, u32>, BTreeMap<PeerKey6, u32>) {
        let used_v4: BTreeSet<u32> = contents.v4.values().copied().collect();
        let used_v6: BTreeSet<u32> = contents.v6.values().copied().collect();
        let mut v4 = BTreeMap::new();
        let mut v6 = BTreeMap::new();
        for (name, id) in &self.ids {
            let Some(egress) = self.desired.egresses.get(name) else { continue };
            if used_v4.contains(&(id * 2)) {
                v4.extend(egress.v4.keys().filter_map(|address| {
                    let slot = self.slots.get(&IpAddr::V4(*address))?;
                    Some((PeerKey4 { set, addr: address.octets() }, u32::from(*slot)))
                }));
            }
            if used_v6.contains(&(id * 2 + 1)) {
                v6.extend(egress.v6.keys().filter_map(|address| {
                    let slot = self.slots.get(&IpAddr::V6(*address))?;
                    Some((PeerKey6 { set, addr: address.octets() }, u32::from(*slot)))
                }));
            }
        }
        (v4, v6)
    }
}

#[cfg(test)]
#[path = "encode_tests.rs"]
pub(crate) mod tests;
