//! Originating-only: what answers a flow that has come to the pod directly leaves directly.
//!
//! `to_pod` notes flows that come from destinations of an egress without a tunnel; `from_pod` asks for a
//! note where it would otherwise begin a flow through that egress. A flow that an egress has keeps it, and a
//! TCP SYN of the pod's own always begins one: nobody outside can make the pod's connections leave with its
//! own address by packets sent ahead.
//!
//! A full table means that answers take the egress, as without this mode: fails closed.

use coil_common::{
    config::Config,
    values::{
        EGRESS_BLOCK, EGRESS_DIRECT, EGRESS_ORIGINATING_ONLY, InboundValue, POD_ORIGINATING_ONLY, PodValue,
        STATE_FIN, STATE_RST,
    },
};

use super::wire;
use crate::{
    family::Family,
    flow::Flow,
    packet::{ETHERNET, Packet},
    parse::{
        L4, Parse,
        l4::{self, Kind},
    },
    tables::NodeTables,
};

/// Seconds without a packet after which a flow without connections is not known any more, whether or not
/// it has been swept away.
const IDLE: u32 = 300;

/// Flows that come to the pod are to be noted.
#[inline(always)]
#[must_use]
pub const fn notes(pod: &PodValue) -> bool {
    pod.flags & POD_ORIGINATING_ONLY != 0
}

/// Notes the flow of a packet to `pod`, unless it is tunnelled or opens nothing.
#[inline(always)]
pub fn note<F: Parse, P: Packet, T: NodeTables<F>>(
    packet: &mut P,
    pod: &PodValue,
    config: &Config,
    tables: &T,
) {
    let Ok(ip) = F::parse(packet, ETHERNET) else { return };
    if !F::same(&ip.dst, &F::of_pod(pod)) {
        return;
    }
    let Ok(l4) = l4::parse(packet, &ip) else { return };
    let ignored = match l4.kind {
        Kind::Tcp | Kind::EchoRequest => false,
        Kind::Udp => l4.dst_port == config.fou_port,
        Kind::EchoReply | Kind::Bare => true,
    };
    if ignored {
        return;
    }
    // As the pod answers.
    let flow = l4.flow(&ip).reversed();
    let (now, state) = (tables.now(), wire::shows(&l4, true, &wire::INITIATOR));
    if let Some(known) = tables.inbound(flow.key()) {
        tables.see_inbound(known, now, state);
        return;
    }
    if state & (STATE_FIN | STATE_RST) != 0 {
        return;
    }
    let egress = match tables.policy(pod.set, &ip.src) {
        None | Some(EGRESS_DIRECT | EGRESS_BLOCK) => return,
        Some(egress) => egress,
    };
    if is_originating_only(egress, tables) {
        // No room: said above.
        if tables.put_inbound(flow.key(), &InboundValue { last_seen: now, state }).is_err() {}
    }
}

/// The packet of a pod, for which policy says `egress`, answers a flow that has come in directly. Of a later
/// fragment the flow is what was noted of the first.
#[inline(always)]
pub(super) fn answers<F: Family, T: NodeTables<F>>(
    pod: &PodValue,
    egress: u32,
    flow: &Flow<F>,
    l4: &L4,
    now: u32,
    tables: &T,
) -> bool {
    if wire::opens(l4) {
        return false;
    }
    match noted(pod, egress, flow, matches!(l4.kind, Kind::Tcp), now, tables) {
        Some(known) => {
            tables.see_inbound(known, now, wire::shows(l4, true, &wire::RESPONDER));
            true
        }
        None => false,
    }
}

/// What is noted of a flow, as the pod answers it, that has come in directly.
#[inline(always)]
pub(super) fn noted<F: Family, T: NodeTables<F>>(
    pod: &PodValue,
    egress: u32,
    flow: &Flow<F>,
    is_tcp: bool,
    now: u32,
    tables: &T,
) -> Option<T::Inbound> {
    if pod.flags & POD_ORIGINATING_ONLY == 0 {
        return None;
    }
    let known = tables.inbound(flow.key())?;
    let last_seen = tables.inbound_value(known).last_seen;
    let over = !is_tcp && now > last_seen && now - last_seen >= IDLE;
    (!over && is_originating_only(egress, tables)).then_some(known)
}

#[inline(always)]
fn is_originating_only<F: Family, T: NodeTables<F>>(egress: u32, tables: &T) -> bool {
    tables.egress(egress).is_some_and(|egress| egress.flags & EGRESS_ORIGINATING_ONLY != 0)
}
