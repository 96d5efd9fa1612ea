//! Packets to a pod: tunnelled ones from its gateways are unpacked, all others pass.
//!
//! Fails closed for tunnelled packets from anybody else, open for the rest.

use coil_common::{
    config::{CONFIG_NEAR, Config},
    stats::{Direction, DropReason},
    values::{FlowValue, NO_POLICY, POD_GATEWAY, PodValue, STATE_REPLY_RST},
};

use super::{from_pod::Account, nat::RST_WINDOW, near, wire};
use crate::{
    encap::Encap,
    family::Family,
    packet::{ETHERNET, Packet},
    parse::{
        L4, l4, mss,
        tunnel::{self, Outer},
    },
    tables::NodeTables,
    verdict::{Decision, Rewrite, Verdict, Way},
};

/// Decides about a packet to `pod`.
///
/// # Errors
///
/// Why the packet is dropped.
#[inline(always)]
pub fn to_pod<F: Outer, P: Packet, T: NodeTables<F>>(
    packet: &mut P,
    pod: &PodValue,
    config: &Config,
    tables: &T,
    rewrite: &mut Rewrite<F>,
) -> Decision<Option<Account<T::Flow>>> {
    if config.flags & CONFIG_NEAR != 0 && pod.flags & POD_GATEWAY != 0 && near::is_stray::<F, P>(packet, pod)
    {
        return Err(DropReason::NotForGateway);
    }
    if pod.set == NO_POLICY || pod.flags & POD_GATEWAY != 0 {
        return Ok(Verdict::Pass);
    }
    let Some(udp) = tunnel::locate::<F, P>(packet, config.fou_port) else {
        // Only an error about a tunnelled packet, or a fragment of one, is not the pod's own business.
        return Ok(if F::is_odd(packet) { Verdict::Icmp } else { Verdict::Pass });
    };
    let outer = tunnel::outer::<F, P>(packet, udp)?;
    if !tables.is_peer(pod.set, &outer.src) {
        // Where no gateway is spoken to by IP in IP, a pod may have such tunnels of its own. It gets them
        // as they are: nothing is unpacked for strangers.
        if outer.encap.is_ipip() && !Encap::of_config(config).is_ipip() {
            return Ok(Verdict::Pass);
        }
        return Err(DropReason::UnknownGateway);
    }
    let inner = tunnel::inner(packet, &outer)?;
    if !F::same(&inner.dst, &F::of_pod(pod)) {
        return Err(DropReason::InnerDestinationMismatch);
    }

    rewrite.begin(&inner, Way::On);
    rewrite.take_congestion(&inner, outer.tos);
    rewrite.pop = rewrite.ip.at - ETHERNET;
    // What cannot be translated (a fragment from a gateway of an older release) is delivered all the
    // same; it belongs to no flow.
    let l4 = match l4::parse_any(packet, &inner, config) {
        Ok(l4) => l4,
        Err(DropReason::Fragment) => return Ok(Verdict::Fragment),
        Err(DropReason::UnsupportedIcmp) => return Ok(Verdict::Icmp),
        Err(_) => return Ok(Verdict::Rewrite(None)),
    };
    wire::must_have_been_cut(packet, &l4, outer.encap)?;
    if inner.fragment != 0 && !rewrite.noted {
        return Ok(Verdict::Fragment);
    }
    rewrite.clamp(
        &l4,
        mss::clamp(packet, &l4, wire::inner_mss::<F>(Encap::of_config(config).like_fou(pod.mtu)))?,
    );
    let flow = tables.flow(l4.flow(&inner).reversed().key());
    let account = match flow {
        None => None,
        Some(entry) => {
            let value = tables.flow_value(entry);
            let (now, state) = believed(entry, &value, &l4, tables);
            Some(Account {
                flow: Some(entry),
                egress: value.egress,
                direction: Direction::Rx,
                tally: wire::tally(packet, &inner, &l4, now, state),
            })
        }
    };
    Ok(Verdict::Rewrite(account))
}

/// When a packet of a flow came and what it shows, as far as it is believed.
///
/// As at a gateway (see [`nat`](super::nat)): a RST out of a long silence ends nothing, and makes nothing last
/// longer; one after which more comes was none.
#[inline(always)]
fn believed<F: Family, T: NodeTables<F>>(
    entry: T::Flow,
    value: &FlowValue,
    l4: &L4,
    tables: &T,
) -> (u32, u32) {
    let now = tables.now();
    let state = wire::shows(l4, true, &wire::RESPONDER);
    if state & STATE_REPLY_RST == 0 {
        if value.state & STATE_REPLY_RST != 0 {
            tables.retract_flow(entry, STATE_REPLY_RST);
        }
        return (now, state);
    }
    // Clocks of processors may differ by a tick.
    if now > value.last_seen && now - value.last_seen >= RST_WINDOW {
        return (value.last_seen, state & !STATE_REPLY_RST);
    }
    (now, state)
}
