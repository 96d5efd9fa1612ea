//! Packets to a pod: tunnelled ones from its gateways are unpacked, all others pass.
//!
//! Fails closed for tunnelled packets from anybody else, open for the rest.

use coil_common::{
    config::{CONFIG_NEAR, Config},
    stats::{Direction, DropReason},
    values::{NO_POLICY, POD_GATEWAY, PodValue},
};

use super::{from_pod::Account, near, wire};
use crate::{
    encap::Encap,
    packet::{ETHERNET, Packet},
    parse::{
        l4, mss,
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
