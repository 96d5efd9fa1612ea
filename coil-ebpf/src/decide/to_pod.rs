//! Packets to a pod: tunnelled ones from its gateways are unpacked, all others pass.
//!
//! Fails closed for tunnelled packets from anybody else, open for the rest.

use coil_common::{
    stats::{Direction, DropReason},
    config::Config,
    values::{NO_POLICY, POD_GATEWAY, PodValue},
};

use super::{from_pod::Account, wire};
use crate::{
    head::UDP,
    packet::{ETHERNET, Packet},
    parse::{Ip, Parse, l4, mss},
    tables::NodeTables,
    verdict::{Decision, Rewrite, Verdict, Way},
};

/// A tunnelled packet: its inner header, and what is in front of it.
pub(super) struct Unpacked<F: Parse> {
    pub(super) outer: Ip<F>,
    pub(super) inner: Ip<F>,
}

/// Looks whether a packet is a tunnelled one: UDP to the port of FOU, not a fragment.
#[inline(always)]
pub(super) fn is_tunnelled<F: Parse, P: Packet>(
    packet: &mut P,
    outer: &Ip<F>,
    config: &Config,
) -> bool {
    outer.obstacle.is_none()
        && outer.protocol == UDP
        && packet.ensure(outer.l4 + 8).is_ok()
        && packet
            .load::<2>(outer.l4 + 2)
            .is_ok_and(|port| u16::from_ne_bytes(port) == u16::from_ne_bytes(config.fou_port))
}

/// Reads the headers of a tunnelled packet.
#[inline(always)]
pub(super) fn unpack<F: Parse, P: Packet>(
    packet: &mut P,
    outer: Ip<F>,
) -> Result<Unpacked<F>, DropReason> {
    let length = usize::from(u16::from_be_bytes(packet.load::<2>(outer.l4 + 4)?));
    if length < 8 || length > outer.payload() {
        return Err(DropReason::Malformed);
    }
    let inner = F::parse(packet, outer.l4 + 8)?;
    // A GSO packet of which the inner header does not know the whole length is not one that a
    // tunnel made: somebody merged datagrams.
    if inner.end() > outer.end() && packet.gso_size() == 0
        || packet.gso_size() != 0 && inner.end() as u32 != packet.length()
    {
        return Err(DropReason::Malformed);
    }
    Ok(Unpacked { outer, inner })
}

/// Decides about a packet to `pod`.
///
/// # Errors
///
/// Why the packet is dropped.
#[inline(always)]
pub fn to_pod<F: Parse, P: Packet, T: NodeTables<F>>(
    packet: &mut P,
    pod: &PodValue,
    config: &Config,
    tables: &T,
    rewrite: &mut Rewrite<F>,
) -> Decision<F, Option<Account<T::Flow>>> {
    if pod.set == NO_POLICY || pod.flags & POD_GATEWAY != 0 {
        return Ok(Verdict::Pass);
    }
    // A broken header is for the pod's own stack to judge.
    let Ok(outer) = F::parse(packet, ETHERNET) else {
        return Ok(Verdict::Pass);
    };
    if !is_tunnelled(packet, &outer, config) {
        return Ok(Verdict::Pass);
    }
    if !tables.is_peer(pod.set, &outer.src) {
        return Err(DropReason::UnknownGateway);
    }
    let Unpacked { outer, inner } = unpack(packet, outer)?;
    if !F::same(&inner.dst, &F::of_pod(pod)) {
        return Err(DropReason::InnerDestinationMismatch);
    }

    rewrite.begin(&inner, Way::On);
    rewrite.take_congestion(&inner, outer.tos);
    rewrite.pop = inner.at - ETHERNET;
    // What cannot be translated (a fragment from a gateway of an older release) is delivered all the
    // same; it belongs to no flow.
    let Ok(l4) = l4::parse(packet, &inner) else {
        return Ok(Verdict::Rewrite(None));
    };
    rewrite.clamp(&l4, mss::clamp(packet, &l4, wire::inner_mss::<F>(pod.mtu))?);
    let flow = tables.flow(&l4.flow(&inner).reversed().key());
    let account = match flow {
        None => None,
        Some(entry) => {
            let state = wire::shows(&l4, true, &wire::RESPONDER);
            Some(Account {
                flow: Some(entry),
                egress: tables.flow_value(entry).egress,
                direction: Direction::Rx,
                tally: wire::tally(packet, &inner, &l4, tables.now(), state),
            })
        }
    };
    Ok(Verdict::Rewrite(account))
}
