//! Packets from and to the pod.

use std::net::IpAddr;

use coil_common::stats::{DropReason, IcmpStat};

use super::{
    Input, Model, Note, PodFlow, Says, Seen, Should, Size, Tunnel, Tunnelled, chosen_port, clamp, datagram,
    error, follow, framed, inner, is_local, is_too_big, is_uncut, marked, quoted_tunnel, refuse, set_tos,
    size, tunnelled, unpack, wrap,
};
use crate::testing::{
    build::FOU,
    fuzz::{
        wire::{self, Flow, Ip, Transport, byte, number},
        world::{self, EGRESSES, MTU, hosts, policy},
    },
    scenario::Action,
};

/// The way that policy gives to a destination.
enum Route {
    Direct,
    Drop(DropReason),
    Egress(&'static world::Egress),
}

fn prefix_matches(address: IpAddr, prefix: IpAddr, length: u32) -> bool {
    let bits = |address| -> Vec<bool> {
        let octets = wire::octets(address);
        octets.iter().flat_map(|octet| (0..8).map(move |bit| octet & (0x80 >> bit) != 0)).collect()
    };
    bits(address).iter().zip(bits(prefix)).take(length as usize).all(|(a, b)| *a == b)
}

fn route(to: IpAddr) -> Route {
    let mut rules = policy(to.is_ipv6());
    rules.sort_by_key(|(_, length, _)| std::cmp::Reverse(*length));
    let found = rules.iter().find(|(prefix, length, _)| prefix_matches(to, *prefix, *length));
    match found.map(|(_, _, says)| *says) {
        None | Some(world::Says::Direct) => Route::Direct,
        Some(world::Says::Block) => Route::Drop(DropReason::EgressUnresolved),
        Some(world::Says::Egress(id)) => match EGRESSES.iter().find(|egress| egress.id == id) {
            None => Route::Drop(DropReason::EgressUnresolved),
            Some(egress) if egress.gateways == (false, false) => Route::Drop(DropReason::NoGateway),
            Some(egress) => Route::Egress(egress),
        },
    }
}

/// What becomes of a packet that cannot be translated: that matters only if it is for an Egress, existing
/// or not.
fn odd(input: &Input, to: IpAddr, reason: DropReason) -> Should {
    let mut rules = policy(to.is_ipv6());
    rules.sort_by_key(|(_, length, _)| std::cmp::Reverse(*length));
    let found = rules.iter().find(|(prefix, length, _)| prefix_matches(to, *prefix, *length));
    match found.map(|(_, _, says)| *says) {
        None | Some(world::Says::Direct) => Should::pass(input),
        Some(world::Says::Block) => Should::drop(DropReason::EgressUnresolved),
        Some(world::Says::Egress(_)) => Should::drop(reason),
    }
}

impl Model {
    /// How the node speaks to gateways.
    const fn tunnel(&self) -> Tunnel {
        if self.narrow { Tunnel::Ipip } else { Tunnel::Fou }
    }

    /// A packet from the pod.
    pub fn from_pod(&mut self, input: &Input, seen: &Seen) -> Should {
        let Some(v6) = input.family() else { return Should::pass(input) };
        let packet = input.packet();
        let ip = match wire::ip(packet, v6, input.is_segmented()) {
            Ok(ip) => ip,
            Err(wrong) => return Should::drop_for(wrong),
        };
        if ip.src.is_unspecified() || matches!(ip.src, IpAddr::V6(src) if src.is_unicast_link_local()) {
            return Should::pass(input);
        }
        if ip.src != hosts(v6).pod {
            return Should::drop(DropReason::SpoofedSource);
        }
        if is_local(ip.dst) {
            return Should::pass(input);
        }
        match wire::transport(&ip, packet) {
            Ok(transport) => self.flow_from_pod(input, &ip, &transport, seen),
            Err(DropReason::Fragment) => self.later_from_pod(input, &ip, seen),
            Err(DropReason::UnsupportedIcmp) => self.icmp_from_pod(input, &ip, seen),
            Err(reason) => odd(input, ip.dst, reason),
        }
    }

    fn flow_from_pod(&mut self, input: &Input, ip: &Ip, transport: &Transport, seen: &Seen) -> Should {
        let egress = match route(ip.dst) {
            Route::Direct => return Should::pass(input),
            Route::Drop(reason) => return Should::drop(reason),
            Route::Egress(egress) => egress,
        };
        // A first fragment is noted whatever becomes of it, unless other headers stand before the one that says
        // that it is one: then it is dropped in the end, but only if nothing else is wrong.
        let plain = !ip.v6 || (byte(input.packet(), 6) == 44 && byte(input.packet(), 43) & 1 != 0);
        if plain {
            self.note_from_pod(ip, transport);
        }
        if is_too_big(input, ip, Some(transport), self.tunnel()) {
            let says = Says::too_big(ip.v6, MTU - self.tunnel().overhead(ip.v6));
            let error = error(input.packet(), ip.v6, None, &says);
            return refuse(input, DropReason::TooBig, error, true);
        }
        let tunnel = self.tunnel();
        let flow = self.flows.entry(transport.flow).or_insert(PodFlow {
            egress: egress.id,
            gateway: None,
            src_port: None,
            tx: (0, 0),
            rx: (0, 0),
        });
        if ip.fragment.is_some() && !plain {
            self.note_from_pod(ip, transport);
            return Should::drop(DropReason::ExtensionHeaders);
        }
        let changed = wire::change(input.packet(), ip, None, |bytes| clamp(bytes, ip, transport, tunnel));
        let src_port = *flow.src_port.get_or_insert_with(|| chosen_port(seen, ip.v6, egress.auto));
        let gateway = *flow.gateway.get_or_insert_with(|| chosen_gateway(egress.id, ip.v6, seen));
        let frame = wrap(tunnel, (ip.src, gateway), src_port, ip, &changed.bytes);
        let size = size(input, ip, Some(transport));
        add(&mut flow.tx, size);
        Should::becomes(Action::Pass, framed(input.frame, false, &frame))
            .loose(14 + tunnel.overhead(ip.v6), &changed)
            .egress(egress.id, ip.v6, false, size)
    }

    /// Notes the datagram of a first fragment.
    fn note_from_pod(&mut self, ip: &Ip, transport: &Transport) {
        if let Some((key, _)) = datagram(ip) {
            self.node_notes.insert(key, Note { flow: transport.flow, open: true, seen: self.now });
        }
    }

    fn later_from_pod(&mut self, input: &Input, ip: &Ip, seen: &Seen) -> Should {
        let tunnel = self.tunnel();
        let known = follow(&mut self.node_notes, ip, self.now);
        let Some((flow, known)) = known.and_then(|flow| self.flows.get_mut(&flow).map(|known| (flow, known)))
        else {
            return odd(input, ip.dst, DropReason::FragmentUnknown);
        };
        if is_too_big(input, ip, None, tunnel) {
            return Should::drop(DropReason::TooBig);
        }
        let auto = EGRESSES.iter().any(|egress| egress.id == known.egress && egress.auto);
        let src_port = *known.src_port.get_or_insert_with(|| chosen_port(seen, flow.is_v6(), auto));
        let gateway = *known.gateway.get_or_insert_with(|| chosen_gateway(known.egress, ip.v6, seen));
        let frame = wrap(tunnel, (ip.src, gateway), src_port, ip, input.packet());
        let size = size(input, ip, None);
        add(&mut known.tx, size);
        let egress = known.egress;
        Should::becomes(Action::Pass, framed(input.frame, false, &frame)).egress(egress, ip.v6, false, size)
    }

    fn icmp_from_pod(&mut self, input: &Input, ip: &Ip, seen: &Seen) -> Should {
        let packet = input.packet();
        let kind = byte(packet, ip.header);
        if !wire::is_error(ip.v6, kind) {
            // Neighbour discovery, which never crosses a router.
            if ip.v6 && ip.ttl == 255 && (133..=137).contains(&kind) {
                return Should::pass(input);
            }
            return odd(input, ip.dst, DropReason::UnsupportedIcmp);
        }
        let answer = odd(input, ip.dst, DropReason::IcmpNoFlow);
        if answer.action == Action::Pass || answer.reasons != [DropReason::IcmpNoFlow] {
            return answer;
        }
        if ip.fragment.is_some() {
            return Should::drop(DropReason::Fragment);
        }
        let quote = match wire::quote(packet, ip.header + 8, ip.total, ip.v6) {
            Ok(quote) => quote,
            Err(reason) => return Should::drop(reason),
        };
        if quote.flow.dst != ip.src || quote.flow.src != ip.dst {
            return Should::drop(DropReason::IcmpMismatch);
        }
        let (flow, tunnel) = (quote.flow.turned(), self.tunnel());
        let Some(known) = self.flows.get_mut(&flow) else {
            return Should::drop(DropReason::IcmpNoFlow);
        };
        if is_too_big(&Input { gso_size: 0, ..*input }, ip, None, tunnel) {
            return Should::drop(DropReason::TooBig);
        }
        let auto = EGRESSES.iter().any(|egress| egress.id == known.egress && egress.auto);
        let src_port = *known.src_port.get_or_insert_with(|| chosen_port(seen, ip.v6, auto));
        let gateway = *known.gateway.get_or_insert_with(|| chosen_gateway(known.egress, ip.v6, seen));
        let frame = wrap(tunnel, (ip.src, gateway), src_port, ip, packet);
        Should::becomes(Action::Pass, framed(input.frame, false, &frame))
            .egress(known.egress, ip.v6, false, (1, ip.total as u64))
            .icmp(IcmpStat::FromPod)
    }

    /// A packet to the pod.
    pub fn to_pod(&mut self, input: &Input) -> Should {
        let Some(v6) = input.family() else { return Should::pass(input) };
        let packet = input.packet();
        let Some(place) = tunnelled(packet, v6) else { return self.outside(input, v6) };
        let outer = match unpack(packet, place, v6) {
            Ok(outer) => outer,
            Err(wrong) => return Should::drop_for(wrong),
        };
        if !is_peer(outer.src) {
            // Where nobody speaks IP in IP a pod may have such tunnels of its own.
            if outer.kind == Tunnel::Ipip && self.tunnel() == Tunnel::Fou {
                return Should::pass(input);
            }
            return Should::drop(DropReason::UnknownGateway);
        }
        let ip = match inner(input, &outer, v6) {
            Ok(ip) => ip,
            Err(wrong) => return Should::drop_for(wrong),
        };
        if ip.dst != hosts(v6).pod {
            return Should::drop(DropReason::InnerDestinationMismatch);
        }
        match wire::transport(&ip, outer.inner) {
            Ok(transport) if is_uncut(input, &transport, outer.kind) => {
                Should::drop(DropReason::UncutDatagrams)
            }
            Ok(transport) => {
                if let Some((key, _)) = datagram(&ip) {
                    let note = Note { flow: transport.flow, open: true, seen: self.now };
                    self.node_notes.insert(key, note);
                }
                let size = size(input, &ip, Some(&transport));
                let delivered = deliver(input, &outer, &ip, Some((&transport, self.tunnel())));
                self.received(delivered, transport.flow.turned(), size, true)
            }
            Err(DropReason::Fragment) => {
                let delivered = deliver(input, &outer, &ip, None);
                match follow(&mut self.node_notes, &ip, self.now) {
                    Some(flow) => self.received(delivered, flow.turned(), size(input, &ip, None), true),
                    None => delivered,
                }
            }
            Err(DropReason::UnsupportedIcmp) => {
                let delivered = deliver(input, &outer, &ip, None).icmp(IcmpStat::ToPod);
                let is_error = wire::is_error(v6, byte(outer.inner, ip.header)) && ip.fragment.is_none();
                match wire::quote(outer.inner, ip.header + 8, ip.total, v6) {
                    Ok(quote) if is_error => {
                        self.received(delivered, quote.flow, (1, ip.total as u64), false)
                    }
                    _ => delivered,
                }
            }
            Err(_) => deliver(input, &outer, &ip, None),
        }
    }

    /// Counts what a flow has received, if there is such a flow.
    fn received(&mut self, should: Should, flow: Flow, size: Size, of_flow: bool) -> Should {
        let Some(known) = self.flows.get_mut(&flow) else { return should };
        if of_flow {
            add(&mut known.rx, size);
        }
        should.egress(known.egress, flow.is_v6(), true, size)
    }

    /// A packet to the pod that is not in a tunnel: only what is about tunnelled ones is of interest.
    fn outside(&mut self, input: &Input, v6: bool) -> Should {
        let packet = input.packet();
        // What stands for a fragment, and for ICMP, is looked for in the header alone.
        let (fragmented, protocol) = if v6 {
            (byte(packet, 6) == 44, byte(packet, 6))
        } else {
            (byte(packet, 6) & 0x20 != 0, byte(packet, 9))
        };
        let Ok(ip) = wire::ip(packet, v6, input.is_segmented()) else { return Should::pass(input) };
        if !fragmented && protocol != wire::icmp_of(v6) {
            return Should::pass(input);
        }
        if ip.fragment.is_some() {
            let outer = match wire::transport(&ip, packet) {
                Ok(transport) => ip.protocol == 17 && transport.flow.dst_port == FOU,
                Err(_) => ip.trouble.is_none() && ip.protocol == wire::ipip_of(v6),
            };
            let drop = outer && is_peer(ip.src);
            return if drop { Should::drop(DropReason::OuterFragment) } else { Should::pass(input) };
        }
        let own = hosts(v6).pod;
        if ip.protocol != wire::icmp_of(v6) || ip.trouble.is_some() || !is_about_size(packet, &ip) {
            return Should::pass(input);
        }
        let Ok(outer) = wire::quote(packet, ip.header + 8, ip.total, v6) else { return Should::pass(input) };
        let Some(tunnel) = quoted_tunnel(&outer, v6) else { return Should::pass(input) };
        if outer.flow.src != own || !is_peer(outer.flow.dst) {
            return Should::pass(input);
        }
        let inner = match wire::quote(packet, outer.l4 + tunnel.header(), ip.total, v6) {
            Ok(inner) => inner,
            Err(reason) => return Should::drop(reason),
        };
        if inner.flow.src != own {
            return Should::drop(DropReason::IcmpMismatch);
        }
        if !self.flows.contains_key(&inner.flow) {
            return Should::drop(DropReason::IcmpNoFlow);
        }
        // No further than a program can look.
        if 14 + inner.at > 0x7f {
            return Should::drop(DropReason::IcmpQuote);
        }
        let says = Says::too_big(v6, inner_mtu(packet, &ip, tunnel));
        let error = error(&packet[inner.at..], v6, None, &says);
        refuse(input, DropReason::UnderlayTooBig, error, false)
    }
}

/// The gateway that was chosen for a flow, which must be one of its Egress.
fn chosen_gateway(egress: u32, v6: bool, seen: &Seen) -> IpAddr {
    let hosts = hosts(v6);
    let (_, dst_at) = wire::addresses(v6);
    let second = wire::octets(hosts.second);
    let took_second = seen.frame.get(14 + dst_at..14 + dst_at + second.len()) == Some(&second[..]);
    let gateways = EGRESSES.iter().find(|known| known.id == egress).map(|known| known.gateways);
    match gateways {
        Some((true, true)) if took_second => hosts.second,
        Some((true, _)) => hosts.gateway,
        _ => hosts.second,
    }
}

fn is_peer(address: IpAddr) -> bool {
    let hosts = hosts(address.is_ipv6());
    address == hosts.gateway || address == hosts.second
}

/// An ICMP error that says that a packet was too big.
pub(super) fn is_about_size(packet: &[u8], ip: &Ip) -> bool {
    let kind = (byte(packet, ip.header), byte(packet, ip.header + 1));
    kind == if ip.v6 { (2, 0) } else { (3, 4) }
}

/// The MTU that an error speaks of.
pub(super) fn told_mtu(packet: &[u8], ip: &Ip) -> usize {
    let low = usize::from(number(packet, ip.header + 6));
    if ip.v6 { (usize::from(number(packet, ip.header + 4)) << 16) | low } else { low }
}

/// What a link between pod and gateway leaves to the packets inside the tunnel.
pub(super) fn inner_mtu(packet: &[u8], ip: &Ip, tunnel: Tunnel) -> usize {
    let told = told_mtu(packet, ip);
    // A router that says nothing has the least that was usual.
    let told = if told == 0 { 576 } else { told };
    told.saturating_sub(tunnel.overhead(ip.v6)).max(if ip.v6 { 1280 } else { 68 })
}

fn add(sum: &mut Size, size: Size) {
    sum.0 += size.0;
    sum.1 += size.1;
}

/// The packet that was in the tunnel.
fn deliver(input: &Input, outer: &Tunnelled, ip: &Ip, transport: Option<(&Transport, Tunnel)>) -> Should {
    let changed = wire::change(outer.inner, ip, None, |bytes| {
        set_tos(bytes, ip.v6, marked(outer.tos, ip.tos));
        if let Some((transport, tunnel)) = transport {
            clamp(bytes, ip, transport, tunnel);
        }
    });
    Should::becomes(Action::Pass, framed(input.frame, false, &changed.bytes)).loose(14, &changed)
}
