//! Packets that reach a gateway: tunnelled ones from clients are unpacked, translated and sent on;
//! replies are translated back, tunnelled to the client and sent back.
//!
//! Fails closed for tunnelled packets: translated or dropped. Everything else that is not a known
//! reply is the local stack's.

use coil_common::{
    config::{CONFIG_SOURCE_PORT_AUTO, Config},
    stats::{DropReason, GatewayStat},
};

use super::{
    edit::End,
    nat, near,
    open::{self, Shape},
    wire,
};
use crate::{
    encap::Encap,
    family::Family,
    head::{Build, TCP, Tunnel, UDP},
    packet::{ETHERNET, Packet},
    parse::{
        Parse, l4, mss,
        tunnel::{self, Outer},
    },
    tables::{NatTables, Tally},
    verdict::{Answer, Decision, Path, Refusal, Rewrite, Verdict, Way, source_port},
};

/// How a translated packet counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Account<E> {
    /// The entry of its direction.
    pub entry: E,
    /// What the gateway counts.
    pub stat: GatewayStat,
    /// Its size.
    pub tally: Tally,
}

impl<E: Copy> Account<E> {
    /// Counts it.
    #[inline(always)]
    pub fn commit<F: Family, T: NatTables<F, Entry = E>>(&self, tables: &T) {
        tables.count_entry(self.entry, &self.tally);
        tables.count_gateway(self.stat, self.tally.packets, self.tally.bytes);
    }
}

/// Which way a packet goes through a gateway.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// It is tunnelled, from a client: [`out`].
    Out(Encap),
    /// It may be a reply: [`back`].
    Back,
    /// It is not for the gateway's address.
    Neither,
}

/// Looks which way a packet goes.
#[inline(always)]
pub fn direction<F: Outer, P: Packet>(packet: &mut P, config: &Config) -> Direction {
    let own = F::of_config(config);
    if F::is_zero(&own)
        || packet.ensure(ETHERNET + F::HEADER).is_err()
        || !F::load(packet, ETHERNET + F::DST_AT).is_ok_and(|dst| F::same(&dst, &own))
    {
        return Direction::Neither;
    }
    match tunnel::encap::<F, P>(packet, config.fou_port) {
        Some(encap) => Direction::Out(encap),
        None => Direction::Back,
    }
}

/// Decides about a packet that reached the gateway: [`direction`], then [`out`] or [`back`]. The
/// programs call these apart, since together they need more stack than a program has.
///
/// # Errors
///
/// Why the packet is dropped.
#[inline(always)]
pub fn gateway<F: Outer + Build, P: Packet, T: NatTables<F>>(
    packet: &mut P,
    config: &Config,
    tables: &T,
    rewrite: &mut Rewrite<F>,
) -> Decision<Account<T::Entry>> {
    match direction::<F, P>(packet, config) {
        Direction::Out(_) => out(packet, config, tables, rewrite),
        Direction::Back => back(packet, config, tables, rewrite),
        Direction::Neither => Ok(Verdict::Pass),
    }
}

/// A packet that a gateway sends is one of datagrams, in a tunnel by FOU, that are still to be cut: by the queue of
/// its interface, and nowhere else before the tunnel is gone.
#[inline(always)]
pub fn is_uncut<F: Build, P: Packet>(packet: &P) -> bool {
    let protocol = |at: usize| {
        let at = at + if F::INDEX == 0 { 8 } else { 6 };
        packet.load::<2>(at).map(|[a, b]| if F::INDEX == 0 { b } else { a })
    };
    // What is in no tunnel may be taken for either.
    packet.gso_size() != 0
        && protocol(ETHERNET).is_ok_and(|protocol| protocol == UDP)
        && !protocol(ETHERNET + F::OVERHEAD as usize).is_ok_and(|protocol| protocol == TCP)
}

/// What [`open`] must do for a tunnelled packet before it can be decided: a step of its own, since it
/// needs the stack that [`out`] needs too. The flow itself is what [`NatTables::ask`] was told last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attention {
    /// What the packet is to the translation of its flow.
    pub shape: Shape,
    /// Offset of the inner packet.
    pub at: u8,
}

impl Attention {
    /// What becomes of the packet if there is no translation for the reason with this index. There will
    /// be none for a while, so that its sender need not wait; but nothing is said about what belongs to
    /// no flow.
    ///
    /// # Errors
    ///
    /// The same index if it is only dropped.
    #[inline(always)]
    pub const fn refused<F: Build>(&self, reason: u32) -> Result<Answer, u32> {
        if open::is_refusal(reason) {
            let path = if self.at as usize == ETHERNET { Path::Back } else { Path::Tunnel };
            return Ok(Answer { at: self.at, path, kind: F::PROHIBITED, mtu: 0 });
        }
        Err(reason)
    }
}

/// Decides about a tunnelled packet: unpacked, translated and sent on. Once for a flow, once a second,
/// and where a packet changes its state, the translation must first be looked after.
///
/// # Errors
///
/// Why the packet is dropped.
#[inline(always)]
pub fn out<F: Outer + Build, P: Packet, T: NatTables<F>>(
    packet: &mut P,
    config: &Config,
    tables: &T,
    rewrite: &mut Rewrite<F>,
) -> Decision<Account<T::Entry>> {
    let Some(udp) = tunnel::locate::<F, P>(packet, config.fou_port) else {
        return Ok(Verdict::Pass);
    };
    let outer = tunnel::outer::<F, P>(packet, udp)?;
    if !tables.is_client(&outer.src) {
        return Err(DropReason::UnknownClient);
    }
    let inner = tunnel::inner(packet, &outer)?;
    if !F::same(&inner.src, &outer.src) {
        return Err(DropReason::InnerSourceMismatch);
    }
    if F::is_local_scope(&inner.dst) || F::same(&inner.dst, &F::of_config(config)) {
        return Err(DropReason::ForbiddenDestination);
    }
    let l4 = match l4::parse_any(packet, &inner, config) {
        Ok(l4) => l4,
        Err(DropReason::Fragment) => return Ok(Verdict::Fragment),
        Err(DropReason::UnsupportedIcmp) => return Ok(Verdict::Icmp),
        Err(reason) => return Err(reason),
    };
    wire::must_have_been_cut(packet, &l4, outer.encap)?;
    if inner.ttl <= 1 {
        return Ok(Verdict::Refuse(Refusal::time_exceeded(&inner)));
    }
    let flow = l4.flow(&inner);
    let now = tables.now();
    let known = tables.forward(flow.key());
    if !rewrite.attended && !nat::is_settled(known, &l4, now, tables) {
        tables.ask(&flow);
        let shape = Shape::of(&l4, inner.protocol, config);
        return Ok(Verdict::Attend(Attention { shape, at: inner.at as u8 }));
    }
    // Should it be removed under our hands, the next packet finds or makes it.
    let entry = known.ok_or(DropReason::NoState)?;
    let to = tables.translation(entry);
    if inner.fragment != 0 && !rewrite.noted {
        return Ok(Verdict::Fragment);
    }

    rewrite.begin(&inner, Way::Back);
    rewrite.decrement_ttl(&inner);
    rewrite.take_congestion(&inner, outer.tos);
    rewrite.translate(packet, &inner, &l4, End::Source, &to)?;
    // Read again, for want of room on the stack.
    let mtu = tunnel::outermost::<F, P>(packet).like_fou(config.mtu);
    rewrite.clamp(&l4, mss::clamp(packet, &l4, wire::inner_mss::<F>(mtu))?);
    rewrite.pop = rewrite.ip.at - ETHERNET;
    let state = wire::shows(&l4, to.used, &wire::INITIATOR);
    Ok(Verdict::Rewrite(Account {
        entry,
        stat: if F::INDEX == 0 { GatewayStat::MasqueradedV4 } else { GatewayStat::MasqueradedV6 },
        tally: wire::tally(packet, &inner, &l4, now, state),
    }))
}

/// Decides about a packet from the world: a reply is translated back and tunnelled to its client.
///
/// # Errors
///
/// Why the packet is dropped.
#[inline(always)]
pub fn back<F: Parse + Build, P: Packet, T: NatTables<F>>(
    packet: &mut P,
    config: &Config,
    tables: &T,
    rewrite: &mut Rewrite<F>,
) -> Decision<Account<T::Entry>> {
    // What is broken, or cannot be translated, is the local stack's to judge.
    let Ok(ip) = F::parse(packet, ETHERNET) else {
        return Ok(Verdict::Pass);
    };
    let ip = &ip;
    let l4 = match l4::parse_any(packet, ip, config) {
        Ok(l4) => l4,
        Err(DropReason::Fragment) => return Ok(Verdict::Fragment),
        Err(DropReason::UnsupportedIcmp) => return Ok(Verdict::Icmp),
        Err(_) if ip.fragment != 0 && ip.obstacle.is_none() => return Ok(Verdict::Fragment),
        Err(_) => return Ok(Verdict::Pass),
    };
    let now = tables.now();
    let flow = l4.flow(ip);
    let Some(entry) = nat::inbound(&flow, now, tables) else {
        if !nat::is_own::<F, T, _>(&flow, &l4, &nat::OwnPorts(config), tables) {
            return Err(DropReason::UnknownReply);
        }
        return Ok(if ip.fragment == 0 { Verdict::Pass } else { Verdict::Fragment });
    };
    if ip.ttl <= 1 {
        return Ok(Verdict::Refuse(Refusal::time_exceeded(ip)));
    }
    let mtu = tables.translation(entry).encap.like_fou(config.mtu);
    if wire::exceeds(packet, ip, &l4, mtu) {
        return Ok(Verdict::Refuse(wire::too_big(ip, mtu)));
    }

    rewrite.begin_at(ETHERNET, Way::Back);
    rewrite.clamp(&l4, mss::clamp(packet, &l4, wire::inner_mss::<F>(mtu))?);
    rewrite.decrement_ttl(ip);
    let to = tables.translation(entry);
    if ip.fragment != 0 && !rewrite.noted {
        return Ok(Verdict::Fragment);
    }
    rewrite.translate(packet, ip, &l4, End::Destination, &to)?;
    // Where it came without a tunnel it goes back without one, if it may.
    if !(to.encap.is_direct() && near::takes(ip, &l4)) {
        let hash = flow.hash(config.seed);
        rewrite.cut = wire::must_be_cut(packet, &l4, config);
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
    }
    let state = wire::shows(&l4, true, &wire::RESPONDER);
    let state = nat::believed(state, &flow, entry, now, tables);
    Ok(Verdict::Rewrite(Account {
        entry,
        stat: if F::INDEX == 0 { GatewayStat::ReplyV4 } else { GatewayStat::ReplyV6 },
        tally: wire::tally(packet, ip, &l4, now, state),
    }))
}
