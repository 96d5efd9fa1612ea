//! Fragments: the first one has the ports, later ones follow it.
//!
//! The first fragment of a datagram takes the way of any packet, and its ports are noted under the
//! datagram's identification. Later ones are decided by what was noted; the transport checksum is in
//! the first alone, so only their addresses change. A later fragment that comes before the first is
//! dropped: nothing here can keep it. Nothing is put together and nothing is cut: a fragment that
//! does not fit the tunnel is refused like any packet, the first one with an ICMP error.
//!
//! At a gateway all clients share an address, so an identification says whose datagram it is only
//! as long as two remote flows do not use it at once: an unfinished datagram keeps it for a second.

use coil_common::{
    config::{CONFIG_SOURCE_PORT_AUTO, Config, FRAGMENT_TIMEOUT},
    stats::{Direction, DropReason, GatewayStat},
    values::{EGRESS_SOURCE_PORT_AUTO, FRAGMENT_OPEN, FragmentValue, POD_ANY_SOURCE, PodValue},
};

use super::{from_pod, gateway, inbound, wire};
use crate::{
    encap::Encap,
    family::Family,
    flow::Flow,
    head::{Build, Tunnel, UDP},
    packet::{ETHERNET, Packet},
    parse::{
        Ip, L4, Parse, l4,
        tunnel::{self, Outer},
    },
    tables::{Fragments, NatTables, NodeTables, Tally},
    verdict::{Decision, Rewrite, Verdict, Way, source_port},
};

/// Number of the fragment header, in place of a protocol in keys.
const HEADER: u8 = 44;
/// Seconds for which another client cannot have the identification of an unfinished datagram.
const EXCLUSIVE: u32 = 1;

/// Offset of what describes the fragment. The compiler knows a bound and forgets it; the verifier has to see it.
#[inline(always)]
fn id_at<F: Family>(ip: &Ip<F>) -> usize {
    core::hint::black_box(ip.at + usize::from(ip.fragment)) & 0x1fff
}

/// The key of a datagram, from one of its fragments.
#[inline(always)]
fn key<F: Family, P: Packet>(packet: &P, ip: &Ip<F>) -> Result<F::KeyWords, DropReason> {
    let at = id_at(ip);
    if F::INDEX == 0 {
        return Ok(F::key(&ip.src, &ip.dst, [0; 2], packet.load::<2>(at)?, ip.protocol));
    }
    let [a, b, c, d] = packet.load::<4>(at + 4)?;
    Ok(F::key(&ip.src, &ip.dst, [a, b], [c, d], HEADER))
}

/// More fragments follow this one.
#[inline(always)]
fn more<F: Family, P: Packet>(packet: &P, ip: &Ip<F>) -> Result<bool, DropReason> {
    let at = id_at(ip);
    if F::INDEX == 0 {
        let [flags, _] = packet.load::<2>(at + 2)?;
        return Ok(flags & 0x20 != 0);
    }
    let [_, flags] = packet.load::<2>(at + 2)?;
    Ok(flags & 1 != 0)
}

/// Notes a datagram of which this is the first fragment.
#[inline(always)]
fn remember<F: Family, P: Packet, T: Fragments<F>>(
    packet: &P,
    ip: &Ip<F>,
    l4: &L4,
    now: u32,
    tables: &T,
) -> Result<(), DropReason> {
    tables.put_fragment(&key(packet, ip)?, &value(ip, l4, now));
    Ok(())
}

#[inline(always)]
const fn value<F: Family>(ip: &Ip<F>, l4: &L4, now: u32) -> FragmentValue {
    FragmentValue {
        src_port: l4.src_port,
        dst_port: l4.dst_port,
        protocol: ip.protocol,
        flags: FRAGMENT_OPEN,
        pad: [0; 2],
        seen: now,
    }
}

/// Notes a datagram from the world to the client at `owner`.
#[inline(always)]
fn claim<F: Family, P: Packet, T: NatTables<F>>(
    packet: &P,
    ip: &Ip<F>,
    l4: &L4,
    owner: &F::Addr,
    now: u32,
    tables: &T,
) -> Result<(), DropReason> {
    let key = key(packet, ip)?;
    if let Some(old) = tables.fragment(&key)
        && old.flags & FRAGMENT_OPEN != 0
        && now.wrapping_sub(old.seen) <= EXCLUSIVE
    {
        let flow = Flow::<F>::new(&ip.src, &ip.dst, old.src_port, old.dst_port, old.protocol);
        if let Some(entry) = tables.reverse(flow.key())
            && !F::same(&tables.translation(entry).addr, owner)
        {
            return Err(DropReason::FragmentConflict);
        }
    }
    tables.put_fragment(&key, &value(ip, l4, now));
    Ok(())
}

/// The flow of a later fragment.
#[inline(always)]
fn follow<F: Family, P: Packet, T: Fragments<F>>(
    packet: &P,
    ip: &Ip<F>,
    now: u32,
    config: &Config,
    tables: &T,
) -> Result<Flow<F>, DropReason> {
    let key = key(packet, ip)?;
    let first = tables.fragment(&key).ok_or(DropReason::FragmentUnknown)?;
    // Clocks of processors may differ by a tick.
    if now > first.seen && now - first.seen > config.timeouts[FRAGMENT_TIMEOUT] {
        return Err(DropReason::FragmentUnknown);
    }
    if !more(packet, ip)? {
        tables.close_fragment(&key);
    }
    Ok(Flow::new(&ip.src, &ip.dst, first.src_port, first.dst_port, first.protocol))
}

/// Notes a datagram of which this is the first fragment; it is decided again.
#[inline(always)]
fn note<F: Family, P: Packet, T: Fragments<F>, A>(
    packet: &mut P,
    ip: &Ip<F>,
    now: u32,
    config: &Config,
    tables: &T,
) -> Decision<A> {
    let l4 = l4::parse_any(packet, ip, config)?;
    remember(packet, ip, &l4, now, tables)?;
    Ok(Verdict::Fragment)
}

/// How a fragment counts.
#[inline(always)]
const fn tally<F: Family>(ip: &Ip<F>, now: u32) -> Tally {
    Tally { packets: 1, bytes: ip.length, now, state: 0 }
}

/// It does not fit the tunnel. Nobody is told: the first fragment was as large.
#[inline(always)]
fn exceeds<F: Family>(ip: &Ip<F>, mtu: u32) -> bool {
    ip.length > wire::inner_mtu::<F>(mtu)
}

/// The packet is the first fragment of a datagram, with nothing in front of what says so. A program
/// asks before it decides about a packet from a pod, so that it need not decide twice: that function is
/// the largest that there is.
#[inline(always)]
pub fn is_first<F: Family, P: Packet>(packet: &mut P) -> bool {
    if F::INDEX == 0 {
        return packet.ensure(ETHERNET + F::HEADER).is_ok()
            && packet.load::<2>(ETHERNET + 6).is_ok_and(|[a, b]| a & 0x3f == 0x20 && b == 0);
    }
    packet.ensure(ETHERNET + F::HEADER + 8).is_ok()
        && packet.load::<2>(ETHERNET + 6).is_ok_and(|[next, _]| next == HEADER)
        && packet.load::<2>(ETHERNET + F::HEADER + 2).is_ok_and(|[a, b]| a == 0 && b & 0xf9 == 1)
}

/// Decides about a later fragment from `pod`, after its source was checked, or notes the datagram of a
/// first one.
///
/// # Errors
///
/// Why it is dropped.
#[inline(always)]
pub fn from_pod<F: Parse + Build, P: Packet, T: NodeTables<F>>(
    packet: &mut P,
    pod: &PodValue,
    config: &Config,
    tables: &T,
    rewrite: &mut Rewrite<F>,
) -> Decision<from_pod::Account<T::Flow>> {
    let ip = F::parse(packet, ETHERNET)?;
    let now = tables.now();
    if ip.obstacle.is_none() {
        if pod.flags & POD_ANY_SOURCE == 0 && !F::same(&ip.src, &F::of_pod(pod)) {
            return Err(DropReason::SpoofedSource);
        }
        return match from_pod::policy(pod, &ip.dst, tables)? {
            None => Ok(Verdict::Pass),
            Some(_) => note(packet, &ip, now, config, tables),
        };
    }
    // A first fragment with headers that are of no use is none that could follow another.
    if let Some(reason) = ip.obstacle
        && reason as u32 != DropReason::Fragment as u32
    {
        return Err(reason);
    }
    let flow = follow(packet, &ip, now, config, tables);
    let entry = match &flow {
        Ok(flow) => tables.flow(flow.key()),
        Err(_) => None,
    };
    let (Ok(flow), Some(entry)) = (&flow, entry) else {
        // No policy knows of the datagram, or it answers one that has come in directly, or there is a policy
        // and the first fragment was not seen.
        let Some(egress) = from_pod::policy(pod, &ip.dst, tables)? else {
            return Ok(Verdict::Pass);
        };
        return match &flow {
            Ok(flow) if inbound::answers(pod, egress, flow, &L4::UNKNOWN, now, tables) => Ok(Verdict::Pass),
            _ => Err(DropReason::FragmentUnknown),
        };
    };
    let Some(choice) = from_pod::kept(entry, pod, &L4::UNKNOWN, tables) else {
        return Err(DropReason::FragmentUnknown);
    };
    let encap = Encap::of_config(config);
    if exceeds(&ip, encap.like_fou(pod.mtu)) {
        return Err(DropReason::TooBig);
    }
    let egress = tables.egress(choice.value.egress).ok_or(DropReason::EgressUnresolved)?;
    let hash = flow.hash(config.seed);
    rewrite.begin_at(ETHERNET, Way::On);
    rewrite.enter_tunnel(Tunnel {
        encap,
        src: F::of_pod(pod),
        dst: choice.gateway,
        src_port: source_port(egress.flags & EGRESS_SOURCE_PORT_AUTO != 0, hash, config),
        dst_port: config.fou_port,
        ecn: ip.tos & 3,
        inner: (ip.length & 0xffff) as u16,
        label: hash.bits16(),
    });
    Ok(Verdict::Rewrite(from_pod::Account {
        flow: Some(entry),
        egress: choice.value.egress,
        direction: Direction::Tx,
        tally: tally(&ip, now),
    }))
}

/// Decides about a fragment in the tunnel to a pod, which was found to be from its gateway. One
/// that is not known is delivered all the same: it only belongs to no flow.
///
/// # Errors
///
/// Why it is dropped.
#[inline(always)]
pub fn to_pod<F: Outer, P: Packet, T: NodeTables<F>>(
    packet: &mut P,
    config: &Config,
    tables: &T,
    rewrite: &mut Rewrite<F>,
) -> Decision<Option<from_pod::Account<T::Flow>>> {
    let Some(udp) = tunnel::locate::<F, P>(packet, config.fou_port) else {
        return Ok(Verdict::Pass);
    };
    let outer = tunnel::outer::<F, P>(packet, udp)?;
    let inner = tunnel::inner(packet, &outer)?;
    let now = tables.now();
    if inner.obstacle.is_none() {
        return note(packet, &inner, now, config, tables);
    }
    rewrite.begin(&inner, Way::On);
    rewrite.take_congestion(&inner, outer.tos);
    rewrite.pop = rewrite.ip.at - ETHERNET;
    let Ok(flow) = follow(packet, &inner, now, config, tables) else {
        return Ok(Verdict::Rewrite(None));
    };
    let account = match tables.flow(flow.reversed().key()) {
        None => None,
        Some(entry) => Some(from_pod::Account {
            flow: Some(entry),
            egress: tables.flow_value(entry).egress,
            direction: Direction::Rx,
            tally: tally(&inner, now),
        }),
    };
    Ok(Verdict::Rewrite(account))
}

/// Decides about a fragment in the tunnel to a gateway, which was found to be from a client.
///
/// # Errors
///
/// Why it is dropped.
#[inline(always)]
pub fn out<F: Outer, P: Packet, T: NatTables<F>>(
    packet: &mut P,
    config: &Config,
    tables: &T,
    rewrite: &mut Rewrite<F>,
) -> Decision<gateway::Account<T::Entry>> {
    let Some(udp) = tunnel::locate::<F, P>(packet, config.fou_port) else {
        return Ok(Verdict::Pass);
    };
    let outer = tunnel::outer::<F, P>(packet, udp)?;
    let inner = tunnel::inner(packet, &outer)?;
    let now = tables.now();
    if inner.obstacle.is_none() {
        return note(packet, &inner, now, config, tables);
    }
    let flow = follow(packet, &inner, now, config, tables)?;
    let entry = tables.forward(flow.key()).ok_or(DropReason::FragmentUnknown)?;
    if inner.ttl <= 1 {
        return Err(DropReason::TtlExceeded);
    }
    let to = tables.translation(entry);
    rewrite.begin(&inner, Way::Back);
    rewrite.decrement_ttl(&inner);
    rewrite.take_congestion(&inner, outer.tos);
    rewrite.ip.addr = Some((rewrite.ip.at + F::SRC_AT, to.addr));
    rewrite.cover(&inner, F::delta(&inner.src, &to.addr));
    rewrite.pop = rewrite.ip.at - ETHERNET;
    Ok(Verdict::Rewrite(gateway::Account {
        entry,
        stat: if F::INDEX == 0 { GatewayStat::MasqueradedV4 } else { GatewayStat::MasqueradedV6 },
        tally: tally(&inner, now),
    }))
}

/// Decides about a fragment from the world.
///
/// # Errors
///
/// Why it is dropped.
#[inline(always)]
pub fn back<F: Parse + Build, P: Packet, T: NatTables<F>>(
    packet: &mut P,
    config: &Config,
    tables: &T,
    rewrite: &mut Rewrite<F>,
) -> Decision<gateway::Account<T::Entry>> {
    let Ok(ip) = F::parse(packet, ETHERNET) else {
        return Ok(Verdict::Pass);
    };
    let now = tables.now();
    if ip.obstacle.is_none() {
        if ip.protocol == F::IPIP {
            return Err(DropReason::OuterFragment);
        }
        let Ok(l4) = l4::parse_any(packet, &ip, config) else {
            return Ok(Verdict::Pass);
        };
        if ip.protocol == UDP && u16::from_ne_bytes(l4.dst_port) == u16::from_ne_bytes(config.fou_port) {
            return Err(DropReason::OuterFragment);
        }
        let Some(entry) = tables.reverse(l4.flow(&ip).key()) else {
            // The local stack's; so will be what follows.
            remember(packet, &ip, &l4, now, tables)?;
            return Ok(Verdict::Pass);
        };
        claim(packet, &ip, &l4, &tables.translation(entry).addr, now, tables)?;
        return Ok(Verdict::Fragment);
    }
    let flow = follow(packet, &ip, now, config, tables)?;
    let Some(entry) = tables.reverse(flow.key()) else {
        return Ok(Verdict::Pass);
    };
    if ip.ttl <= 1 {
        return Err(DropReason::TtlExceeded);
    }
    let to = tables.translation(entry);
    if exceeds(&ip, to.encap.like_fou(config.mtu)) {
        return Err(DropReason::TooBig);
    }
    let hash = flow.hash(config.seed);
    rewrite.begin_at(ETHERNET, Way::Back);
    rewrite.decrement_ttl(&ip);
    rewrite.ip.addr = Some((rewrite.ip.at + F::DST_AT, to.addr));
    rewrite.cover(&ip, F::delta(&ip.dst, &to.addr));
    rewrite.enter_tunnel(Tunnel {
        encap: to.encap,
        src: F::of_config(config),
        dst: to.addr,
        src_port: source_port(config.flags & CONFIG_SOURCE_PORT_AUTO != 0, hash, config),
        dst_port: config.fou_port,
        ecn: ip.tos & 3,
        inner: (ip.length & 0xffff) as u16,
        label: hash.bits16(),
    });
    Ok(Verdict::Rewrite(gateway::Account {
        entry,
        stat: if F::INDEX == 0 { GatewayStat::ReplyV4 } else { GatewayStat::ReplyV6 },
        tally: tally(&ip, now),
    }))
}
