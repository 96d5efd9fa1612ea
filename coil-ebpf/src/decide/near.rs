//! Client and gateway on one node: packets of established flows go from veth to veth without a tunnel.
//!
//! Only what the short way knows takes this way: data of TCP and UDP of flows that both ends know. All else (opening,
//! ending, fragments, errors) goes by the tunnel as ever, so that each flow can go on in it at any time: when the gateway is
//! another one, when the agent is told otherwise, when a pod is gone. The gateway answers as it was spoken to.
//!
//! Nobody else gets in. `from_pod` has checked the source of what it hands to a gateway, and the interface is that of an
//! egress pod with the gateway's address. To the gateway such a packet is one for somebody else from an address that is a
//! client; on any other way it would be routed or bridged to the gateway's interface, where `to_pod` drops what is not for
//! the gateway. Back, `from_pod` at the gateway's interface hands a packet only to a pod of this node that has the gateway
//! among its peers: who may answer by the tunnel may answer so.

use coil_common::{
    config::Config,
    stats::{Direction, DropReason, GatewayStat},
    values::{POD_GATEWAY, PodValue, STATE_CONFIRMED, STATE_REPLY_RST},
};

use super::{
    edit::End,
    fast::{self, EntryHit, FlowHit, Usual},
    gateway::{Account, Attention},
    nat,
    open::Shape,
    wire,
};
use crate::{
    family::Family,
    packet::{ETHERNET, Packet},
    parse::{
        Ip, L4,
        l4::{FIN, Kind, RST, SYN},
    },
    tables::{NatTables, NodeTables},
    verdict::{Decision, Refusal, Rewrite, Verdict, Way},
};

/// The pods of this node.
pub trait Near<F: Family> {
    /// The host-side interface of the pod with this address.
    fn near(&self, addr: &F::Addr) -> Option<u32>;
    /// The pod behind an interface.
    fn pod_at(&self, ifindex: u32) -> Option<PodValue>;
}

/// The interface of the pod with this address, and the pod.
#[inline(always)]
fn pod<F: Family, T: Near<F>>(addr: &F::Addr, tables: &T) -> Option<(u32, PodValue)> {
    let ifindex = tables.near(addr)?;
    let pod = tables.pod_at(ifindex)?;
    // What one table says the other may not know yet, or no more.
    F::same(&F::of_pod(&pod), addr).then_some((ifindex, pod))
}

/// The interface of the gateway that a packet of a pod would be tunnelled to, if it is on this node.
#[inline(always)]
pub fn gateway<F: Family, T: Near<F>>(rewrite: &Rewrite<F>, tables: &T) -> Option<u32> {
    let (ifindex, pod) = pod(&rewrite.push()?.dst, tables)?;
    (pod.flags & POD_GATEWAY != 0).then_some(ifindex)
}

/// A packet from a gateway's interface that does not have its address: the interface of the client that it is for.
#[inline(always)]
pub fn client<F: Usual, P: Packet, T: NodeTables<F> + Near<F>>(
    packet: &P,
    from: &PodValue,
    tables: &T,
) -> Option<(u32, Option<FlowHit<T::Flow>>)> {
    let view = packet.view(F::PLAIN)?;
    let ip = F::usual(&view, ETHERNET, packet.length())?;
    let l4 = fast::transport(&view, &ip)?;
    let (ifindex, pod) = pod(&ip.dst, tables)?;
    if !tables.is_peer(pod.set, &F::of_pod(from)) {
        return None;
    }
    let hit = match tables.flow(fast::answered(&view, &ip, &l4).key()) {
        None => None,
        Some(entry) => {
            let tally = wire::tally(packet, &ip, &l4, 0, 0);
            let value = tables.flow_value(entry);
            // A RST after which more comes was none.
            if value.state & STATE_REPLY_RST != 0 {
                tables.retract_flow(entry, STATE_REPLY_RST);
            }
            Some(FlowHit::new(entry, value.egress, Direction::Rx, tally.packets, tally.bytes))
        }
    };
    Some((ifindex, hit))
}

/// A packet at a gateway that is for somebody else: the short way of one from a client.
#[inline(always)]
pub fn out<F: Usual, P: Packet, T: NatTables<F>>(
    packet: &P,
    config: &Config,
    tables: &T,
    rewrite: &mut Rewrite<F>,
) -> Option<EntryHit<T::Entry>> {
    let view = packet.view(F::PLAIN)?;
    let ip = F::usual(&view, ETHERNET, packet.length())?;
    if F::same(&ip.dst, &F::of_config(config)) || ip.ttl <= 1 {
        return None;
    }
    let l4 = fast::transport(&view, &ip)?;
    let entry = tables.forward(fast::flow(&view, &ip, &l4).key())?;
    let to = tables.translation(entry);
    if to.tick != tables.tick() as u16 || to.state & STATE_CONFIRMED == 0 || !to.encap.is_direct() {
        return None;
    }
    let tally = wire::tally(packet, &ip, &l4, 0, 0);
    rewrite.begin_at(ETHERNET, Way::Back);
    rewrite.decrement_ttl(&ip);
    rewrite.translate(packet, &ip, &l4, End::Source, &to).ok()?;
    let stat = if F::INDEX == 0 { GatewayStat::MasqueradedV4 } else { GatewayStat::MasqueradedV6 };
    Some(EntryHit::new(entry, stat, tally.packets, tally.bytes))
}

/// The long way of such a packet. What is from no client, or is nothing that would come this way, is the local stack's.
///
/// # Errors
///
/// Why the packet is dropped.
#[inline(always)]
pub fn out_long<F: Usual, P: Packet, T: NatTables<F>>(
    packet: &mut P,
    config: &Config,
    tables: &T,
    rewrite: &mut Rewrite<F>,
) -> Decision<Account<T::Entry>> {
    let own = F::of_config(config);
    let Some(view) = packet.view(F::PLAIN) else {
        return Ok(Verdict::Pass);
    };
    let Some(ip) = F::usual(&view, ETHERNET, packet.length()) else {
        return Ok(Verdict::Pass);
    };
    let ours = F::is_zero(&own) || F::same(&ip.dst, &own) || F::is_local_scope(&ip.dst);
    if ours || !tables.is_client(&ip.src) {
        return Ok(Verdict::Pass);
    }
    let Some(l4) = fast::transport(&view, &ip) else {
        return Ok(Verdict::Pass);
    };
    if ip.ttl <= 1 {
        return Ok(Verdict::Refuse(Refusal::time_exceeded(&ip)));
    }
    let flow = l4.flow(&ip);
    let now = tables.now();
    let known = tables.forward(flow.key());
    if !rewrite.attended && !nat::is_settled(known, &l4, now, tables) {
        tables.ask(&flow);
        return Ok(Verdict::Attend(Attention {
            shape: Shape::of(&l4, ip.protocol, config),
            at: ETHERNET as u8,
        }));
    }
    let entry = known.ok_or(DropReason::NoState)?;
    let to = tables.translation(entry);
    rewrite.begin_at(ETHERNET, Way::Back);
    rewrite.decrement_ttl(&ip);
    rewrite.translate(packet, &ip, &l4, End::Source, &to)?;
    let state = wire::shows(&l4, to.used, &wire::INITIATOR);
    Ok(Verdict::Rewrite(Account {
        entry,
        stat: if F::INDEX == 0 { GatewayStat::MasqueradedV4 } else { GatewayStat::MasqueradedV6 },
        tally: wire::tally(packet, &ip, &l4, now, state),
    }))
}

/// A packet is one that [`client`] will take.
#[inline(always)]
pub(super) const fn takes<F: Family>(ip: &Ip<F>, l4: &L4) -> bool {
    let data = match l4.kind {
        Kind::Tcp => l4.flags & (SYN | FIN | RST) == 0,
        Kind::Udp => true,
        Kind::EchoRequest | Kind::EchoReply | Kind::Bare => false,
    };
    data && ip.fragment == 0 && l4.at == ip.at + F::HEADER
}

/// A packet to an egress pod that is in no tunnel and not for the pod: none that comes the usual way has any business
/// there.
#[inline(always)]
pub fn is_stray<F: Family, P: Packet>(packet: &mut P, pod: &PodValue) -> bool {
    let own = F::of_pod(pod);
    packet.ensure(ETHERNET + F::HEADER).is_ok()
        && F::load(packet, ETHERNET + F::DST_AT)
            .is_ok_and(|dst| !F::same(&dst, &own) && !F::is_local_scope(&dst))
}
