//! What the tables of a node answer.

use aya_ebpf::{
    bindings::{BPF_ANY, BPF_NOEXIST},
    maps::lpm_trie::Key,
};
use coil_common::{
    keys::{ClientKey4, ClientKey6, POLICY_SET_BITS, PeerKey4, PeerKey6, PolicyKey4, PolicyKey6},
    stats::{Direction, egress_stat},
    values::{EgressValue, FlowValue, GatewayValue, PodValue},
};
use coil_ebpf::{
    decide::near::Near,
    family::{Family, V4, V6, bytes6},
    tables::{Full, NodeTables, Tally},
};

use super::{
    super::{atomic, events},
    EGRESS_STATS, EGRESSES, EXISTS, FLOWS_V4, FLOWS_V6, GATEWAYS, Maps, NEAR_V4, NEAR_V6, PEERS_V4, PEERS_V6,
    POD_USAGE, POLICY_V4, POLICY_V6, add, count_flow, hit_flow, pod, shared,
};

macro_rules! node_tables {
    ($family:ty, $bytes:expr, $policy:ident, $policy_key:ident, $peers:ident, $peer_key:ident, $flows:ident) => {
        impl NodeTables<$family> for Maps {
            type Flow = *mut FlowValue;

            #[inline(always)]
            fn policy(&self, set: u32, dst: &<$family as Family>::Addr) -> Option<u32> {
                let key = Key::new(
                    POLICY_SET_BITS + size_of::<<$family as Family>::Addr>() as u32 * 8,
                    $policy_key { set: set.to_be_bytes(), dst: $bytes(*dst) },
                );
                $policy.get(&key).map(|value| value.egress)
            }

            #[inline(always)]
            fn egress(&self, index: u32) -> Option<&EgressValue> {
                EGRESSES.get(index)
            }

            #[inline(always)]
            fn gateway(&self, index: u32) -> Option<&GatewayValue> {
                GATEWAYS.get(index)
            }

            #[inline(always)]
            fn is_peer(&self, set: u32, addr: &<$family as Family>::Addr) -> bool {
                $peers.get_ptr($peer_key { set, addr: $bytes(*addr) }).is_some()
            }

            #[inline(always)]
            fn flow(&self, key: &<$family as Family>::KeyWords) -> Option<*mut FlowValue> {
                $flows.get_ptr_mut(shared::<$family>(key))
            }

            #[inline(always)]
            fn pod_usage(&self, cell: u32) -> i64 {
                POD_USAGE.get(cell).map_or(0, |count| *count as i64)
            }

            #[inline(always)]
            fn pod_uses_more(&self, cell: u32) {
                if let Some(count) = POD_USAGE.get_ptr_mut(cell) {
                    // SAFETY: points to a map value.
                    unsafe { atomic::add(count, 1) }
                }
            }

            #[inline(always)]
            fn flow_value(&self, flow: *mut FlowValue) -> FlowValue {
                // SAFETY: points to a map value that stays until the program ends.
                unsafe { *flow }
            }

            #[inline(always)]
            fn put_flow(
                &self,
                key: &<$family as Family>::KeyWords,
                value: &FlowValue,
                replace: bool,
            ) -> Result<bool, Full> {
                let how = if replace { BPF_ANY } else { BPF_NOEXIST };
                match $flows.insert(shared::<$family>(key), value, u64::from(how)) {
                    Ok(()) => {
                        events::flow(shared::<$family>(key), value.egress, value.gateway);
                        Ok(!replace)
                    }
                    Err(EXISTS) => Ok(false),
                    Err(_) => Err(Full),
                }
            }

            #[inline(always)]
            fn decide_flow(&self, flow: *mut FlowValue, value: &FlowValue) {
                // SAFETY: points to a map value that stays until the program ends. A packet that
                // reads a mixture finds a generation that does not match, and decides by itself.
                unsafe {
                    (*flow).gateway_generation = value.gateway_generation;
                    (*flow).gateway = value.gateway;
                    (*flow).egress = value.egress;
                    (*flow).set = value.set;
                }
            }

            #[inline(always)]
            fn retract_flow(&self, flow: *mut FlowValue, bits: u32) {
                // SAFETY: points to a map value that stays until the program ends. What another packet
                // notes at the same moment may be lost with it: it is noted again, or times out later.
                unsafe { (*flow).state &= !bits }
            }

            #[inline(always)]
            fn count_flow(&self, flow: *mut FlowValue, direction: Direction, tally: &Tally) {
                count_flow(flow, direction, tally);
            }

            #[inline(always)]
            fn hit_flow(&self, flow: *mut FlowValue, direction: Direction, packets: u32, bytes: u32) {
                hit_flow(flow, direction, packets, bytes);
            }

            #[inline(always)]
            fn hit_egress(&self, egress: u32, direction: Direction, packets: u32, bytes: u32) {
                if let Some(total) = EGRESS_STATS.get_ptr_mut(egress_stat(egress, direction)) {
                    // SAFETY: a per-CPU value.
                    unsafe { add(total, u64::from(packets), u64::from(bytes)) }
                }
            }

            #[inline(always)]
            fn count_egress(&self, egress: u32, direction: Direction, tally: &Tally) {
                if let Some(total) = EGRESS_STATS.get_ptr_mut(egress_stat(egress, direction)) {
                    // SAFETY: a per-CPU value.
                    unsafe { add(total, u64::from(tally.packets), u64::from(tally.bytes)) }
                }
            }
        }
    };
}

node_tables!(V4, u32::to_ne_bytes, POLICY_V4, PolicyKey4, PEERS_V4, PeerKey4, FLOWS_V4);
node_tables!(V6, bytes6, POLICY_V6, PolicyKey6, PEERS_V6, PeerKey6, FLOWS_V6);

macro_rules! near {
    ($family:ty, $bytes:expr, $near:ident, $key:ident) => {
        impl Near<$family> for Maps {
            #[inline(always)]
            fn near(&self, addr: &<$family as Family>::Addr) -> Option<u32> {
                // SAFETY: without preallocation an entry stays until the program ends, even if it is removed.
                unsafe { $near.get($key { addr: $bytes(*addr) }).copied() }
            }

            #[inline(always)]
            fn pod_at(&self, ifindex: u32) -> Option<PodValue> {
                pod(ifindex).copied()
            }
        }
    };
}

near!(V4, u32::to_ne_bytes, NEAR_V4, ClientKey4);
near!(V6, bytes6, NEAR_V6, ClientKey6);
