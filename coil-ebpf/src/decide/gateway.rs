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
    from_pod::source_port,
    nat,
    to_pod::{Unpacked, is_tunnelled, unpack},
    wire,
};
use crate::{
    family::Family,
    head::{Build, Tunnel},
    packet::{ETHERNET, Packet},
    parse::{Ip, Parse, l4, mss},
    tables::{NatTables, Ports, Tally},
    verdict::{Decision, Rewrite, Verdict, Way},
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
    /// It opened the flow.
    pub new: bool,
}

impl<E: Copy> Account<E> {
    /// Counts it.
    #[inline(always)]
    pub fn commit<F: Family, T: NatTables<F, Entry = E>>(&self, tables: &T) {
        tables.count_entry(self.entry, &self.tally);
        tables.count_gateway(self.stat, self.tally.packets, self.tally.bytes);
        if self.new {
            let stat =
                if F::INDEX == 0 { GatewayStat::NewFlowV4 } else { GatewayStat::NewFlowV6 };
            tables.count_gateway(stat, 1, 0);
        }
    }
}

/// All ports of the gateway's own address.
pub struct OwnPorts<'a>(pub &'a Config);

impl<F: Family> Ports<F> for OwnPorts<'_> {
    #[inline(always)]
    fn address(&self) -> F::Addr {
        F::of_config(self.0)
    }

    #[inline(always)]
    fn range(&self) -> (u16, u16) {
        (self.0.nat_port_first, self.0.nat_port_last)
    }

    #[inline(always)]
    fn is_excluded(&self, port: u16) -> bool {
        let [a, b, c, d, e] = self.0.nat_port_excluded;
        port == 0 || port == a || port == b || port == c || port == d || port == e
    }
}

/// Decides about a packet that reached the gateway.
///
/// # Errors
///
/// Why the packet is dropped.
#[inline(always)]
pub fn gateway<F: Parse + Build, P: Packet, T: NatTables<F>>(
    packet: &mut P,
    config: &Config,
    tables: &T,
    rewrite: &mut Rewrite<F>,
) -> Decision<F, Account<T::Entry>> {
    let own = F::of_config(config);
    let Ok(ip) = F::parse(packet, ETHERNET) else {
        return Ok(Verdict::Pass);
    };
    if F::is_zero(&own) || !F::same(&ip.dst, &own) {
        return Ok(Verdict::Pass);
    }
    if is_tunnelled(packet, &ip, config) {
        return out(packet, ip, config, tables, rewrite);
    }
    back(packet, &ip, config, tables, rewrite)
}

/// From a client.
#[inline(always)]
fn out<F: Parse + Build, P: Packet, T: NatTables<F>>(
    packet: &mut P,
    outer: Ip<F>,
    config: &Config,
    tables: &T,
    rewrite: &mut Rewrite<F>,
) -> Decision<F, Account<T::Entry>> {
    if !tables.is_client(&outer.src) {
        return Err(DropReason::UnknownClient);
    }
    let Unpacked { outer, inner } = unpack(packet, outer)?;
    if !F::same(&inner.src, &outer.src) {
        return Err(DropReason::InnerSourceMismatch);
    }
    if F::is_local_scope(&inner.dst) || F::same(&inner.dst, &F::of_config(config)) {
        return Err(DropReason::ForbiddenDestination);
    }
    if inner.ttl <= 1 {
        return Err(DropReason::TtlExceeded);
    }
    let l4 = l4::parse(packet, &inner)?;
    let flow = l4.flow(&inner);
    let now = tables.now();
    let found = nat::outbound(&flow, &l4, &OwnPorts(config), config.seed, now, tables)?;

    rewrite.begin(&inner, Way::Back);
    rewrite.decrement_ttl(&inner);
    rewrite.take_congestion(&inner, outer.tos);
    rewrite.translate(&inner, &l4, End::Source, &found.addr, found.port);
    rewrite.clamp(&l4, mss::clamp(packet, &l4, wire::inner_mss::<F>(config.mtu))?);
    rewrite.pop = inner.at - ETHERNET;
    let state = wire::shows(&l4, !found.new, &wire::INITIATOR);
    Ok(Verdict::Rewrite(Account {
            entry: found.entry,
            stat: if F::INDEX == 0 {
                GatewayStat::MasqueradedV4
            } else {
                GatewayStat::MasqueradedV6
            },
            tally: wire::tally(packet, &inner, &l4, now, state),
            new: found.new,
    }))
}

/// From the world.
#[inline(always)]
fn back<F: Parse + Build, P: Packet, T: NatTables<F>>(
    packet: &mut P,
    ip: &Ip<F>,
    config: &Config,
    tables: &T,
    rewrite: &mut Rewrite<F>,
) -> Decision<F, Account<T::Entry>> {
    let Ok(l4) = l4::parse(packet, ip) else {
        return Ok(Verdict::Pass);
    };
    let now = tables.now();
    let flow = l4.flow(ip);
    let Some(found) = nat::inbound(&flow, now, tables) else {
        return Ok(Verdict::Pass);
    };
    if ip.ttl <= 1 {
        return Err(DropReason::TtlExceeded);
    }
    if wire::exceeds(packet, ip, &l4, config.mtu) {
        return Ok(Verdict::TooBig(wire::refuse(ip, F::of_config(config), config.mtu)));
    }

    let hash = flow.hash(config.seed);
    rewrite.begin(ip, Way::Back);
    rewrite.decrement_ttl(ip);
    rewrite.translate(ip, &l4, End::Destination, &found.addr, found.port);
    rewrite.clamp(&l4, mss::clamp(packet, &l4, wire::inner_mss::<F>(config.mtu))?);
    rewrite.push = Some(Tunnel {
        src: ip.dst,
        dst: found.addr,
        src_port: source_port(config.flags & CONFIG_SOURCE_PORT_AUTO != 0, hash, config),
        dst_port: config.fou_port,
        ecn: ip.tos & 3,
        inner: (ip.length & 0xffff) as u16,
        label: hash.bits16(),
    });
    let state = wire::shows(&l4, true, &wire::RESPONDER);
    Ok(Verdict::Rewrite(Account {
            entry: found.entry,
            stat: if F::INDEX == 0 { GatewayStat::ReplyV4 } else { GatewayStat::ReplyV6 },
            tally: wire::tally(packet, ip, &l4, now, state),
            new: false,
    }))
}
