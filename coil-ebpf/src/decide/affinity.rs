//! Session affinity: a client's new flows go where its last new one went, until it has begun none for a
//! while.
//!
//! The hash of the client chooses a gateway that stays the same only as long as the set of gateways does.
//! Memory of the choice makes it last when others come. It is asked for new flows alone, and as no more
//! than a hint: lost memory means a choice by hash, never a dropped packet.

use coil_common::values::{AffinityValue, EGRESS_CLIENT_AFFINITY, EgressValue, GATEWAY_READY};

use crate::{family::Family, tables::NodeTables};

/// The gateway for a new flow of `client` where its hash says `hashed`.
#[inline(always)]
pub(super) fn gateway<F: Family, T: NodeTables<F>>(
    index: u32,
    egress: &EgressValue,
    client: &F::Addr,
    hashed: u32,
    now: u32,
    tables: &T,
) -> u32 {
    let seconds = egress.affinity_seconds();
    if egress.flags & EGRESS_CLIENT_AFFINITY == 0 || seconds == 0 {
        return hashed;
    }
    if let Some(known) = tables.affinity(client, index) {
        let AffinityValue { gateway, generation, last_used, .. } = tables.affinity_value(known);
        // Clocks of CPUs may differ by a tick.
        let recent = now <= last_used || now - last_used < seconds;
        if recent && takes_new_flows(gateway, generation, tables) {
            tables.use_affinity(known, now);
            return gateway;
        }
    }
    if let Some(gateway) = tables.gateway(hashed) {
        let value = AffinityValue { gateway: hashed, generation: gateway.generation, last_used: now, pad: 0 };
        tables.put_affinity(client, index, &value);
    }
    hashed
}

/// A gateway that is still the one that was meant takes new flows.
#[inline(always)]
fn takes_new_flows<F: Family, T: NodeTables<F>>(index: u32, generation: u32, tables: &T) -> bool {
    match tables.gateway(index) {
        Some(gateway) => gateway.generation == generation && gateway.state == GATEWAY_READY,
        None => false,
    }
}
