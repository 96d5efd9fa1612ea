//! Packets to the gateway: from clients and from the world.

use std::net::IpAddr;

use coil_common::stats::{DropReason, GatewayStat, IcmpStat};

use super::{
    End, Half, Input, Model, Note, Says, Seen, Should, Size, Tunnel, Tunnelled, clamp, datagram, error,
    follow, framed, hop, inner, is_local, is_too_big, is_uncut, marked,
    node::{inner_mtu, is_about_size, told_mtu},
    quoted_tunnel, refuse, set_address, set_port, set_tos, size, tunnelled, unknown_reply, unpack, wrap,
};
use crate::testing::{
    build::FOU,
    fuzz::{
        wire::{self, Flow, Ip, Kind, Transport, number},
        world::{EXCLUDED, MTU, NARROW, WIDE, hosts},
    },
    scenario::Action,
};

const MASQUERADED: [GatewayStat; 2] = [GatewayStat::MasqueradedV4, GatewayStat::MasqueradedV6];
const REPLY: [GatewayStat; 2] = [GatewayStat::ReplyV4, GatewayStat::ReplyV6];
const NEW_FLOW: [GatewayStat; 2] = [GatewayStat::NewFlowV4, GatewayStat::NewFlowV6];

fn is_client(address: IpAddr) -> bool {
    let hosts = hosts(address.is_ipv6());
    address == hosts.pod || address == hosts.other
}

fn add(sum: &mut Size, size: Size) {
    sum.0 += size.0;
    sum.1 += size.1;
}

impl Model {
    /// A packet to the gateway.
    ///
    /// # Errors
    ///
    /// A choice that was not allowed.
    pub fn gateway(&mut self, input: &Input, seen: &Seen) -> Result<Should, String> {
        let Some(v6) = input.family() else { return Ok(Should::pass(input)) };
        let packet = input.packet();
        let own = wire::octets(hosts(v6).gateway);
        let (_, dst_at) = wire::addresses(v6);
        if packet.len() < wire::least(v6) || packet[dst_at..dst_at + own.len()] != own[..] {
            return Ok(Should::pass(input));
        }
        match tunnelled(packet, v6) {
            Some(place) => self.out(input, place, v6, seen),
            None => Ok(self.back(input, v6)),
        }
    }

    fn out(
        &mut self,
        input: &Input,
        place: (usize, Tunnel),
        v6: bool,
        seen: &Seen,
    ) -> Result<Should, String> {
        let outer = match unpack(input.packet(), place, v6) {
            Ok(outer) => outer,
            Err(wrong) => return Ok(Should::drop_for(wrong)),
        };
        if !is_client(outer.src) {
            return Ok(Should::drop(DropReason::UnknownClient));
        }
        let ip = match inner(input, &outer, v6) {
            Ok(ip) => ip,
            Err(wrong) => return Ok(Should::drop_for(wrong)),
        };
        if ip.src != outer.src {
            return Ok(Should::drop(DropReason::InnerSourceMismatch));
        }
        if is_local(ip.dst) || ip.dst == hosts(v6).gateway {
            return Ok(Should::drop(DropReason::ForbiddenDestination));
        }
        match wire::transport(&ip, outer.inner) {
            Ok(transport) if is_uncut(input, &transport, outer.kind) => {
                Ok(Should::drop(DropReason::UncutDatagrams))
            }
            Ok(transport) => self.flow_out(input, &outer, &ip, &transport, seen),
            Err(DropReason::Fragment) => Ok(self.later_out(input, &outer, &ip)),
            Err(DropReason::UnsupportedIcmp) => Ok(self.icmp_out(input, &outer, &ip)),
            Err(reason) => Ok(Should::drop(reason)),
        }
    }

    /// A port that translation may use, or an identifier of echoes: those have a range of their own, if there is
    /// admission of translations.
    fn is_of_translation(&self, protocol: u8, port: u16) -> bool {
        if unknown_reply().is_some() && !matches!(protocol, 6 | 17) {
            return true;
        }
        let (first, last) = if self.narrow { NARROW } else { WIDE };
        (first..=last).contains(&port) && !EXCLUDED.contains(&port)
    }

    /// The port of a flow: the one that it has, or a new one that was chosen. `None` if there is none.
    fn port(
        &mut self,
        input: &Input,
        ip: &Ip,
        transport: &Transport,
        seen: &Seen,
    ) -> Result<Result<(u16, bool), DropReason>, String> {
        let flow = transport.flow;
        if let Some(half) = self.forward.get(&flow) {
            return Ok(Ok((half.port, false)));
        }
        match transport.kind {
            Kind::Tcp(flags) if flags & 0b1_0111 != 0b0_0010 => return Ok(Err(DropReason::NoState)),
            Kind::Reply => return Ok(Err(DropReason::UnsupportedIcmp)),
            _ => {}
        }
        let own = hosts(ip.v6).gateway;
        let may = |port: u16| self.is_of_translation(transport.flow.protocol, port);
        let back = |port: u16| Flow { src: own, src_port: port, ..flow }.turned();
        let taken = |port: u16| self.reverse.contains_key(&back(port));
        let full = [Some(DropReason::PortsExhausted), super::reason("destination_full")];
        if let Some(reason) = seen.reason.filter(|reason| full.contains(&Some(*reason))) {
            if self.narrow && (NARROW.0..=NARROW.1).filter(|port| taken(*port)).count() >= 2 {
                return Ok(Err(reason));
            }
            return Err("no port, though almost all are free".to_owned());
        }
        // Where it stands in the packet that leaves.
        let at = 14 + ip.header + if matches!(transport.kind, Kind::Tcp(_) | Kind::Udp) { 0 } else { 4 };
        let port = number(seen.frame, at);
        if seen.action != Action::Back || input.frame.len() < at {
            return Ok(Ok((flow.src_port, true)));
        }
        if !may(port) {
            return Err(format!("port {port} is not one of translation"));
        }
        if taken(port) {
            return Err(format!("port {port} is another's"));
        }
        if may(flow.src_port) && !taken(flow.src_port) && port != flow.src_port {
            return Err(format!("port {port}, though {} is free", flow.src_port));
        }
        Ok(Ok((port, true)))
    }

    fn flow_out(
        &mut self,
        input: &Input,
        outer: &Tunnelled,
        ip: &Ip,
        transport: &Transport,
        seen: &Seen,
    ) -> Result<Should, String> {
        let own = hosts(ip.v6).gateway;
        let tell = |reason, says: &Says| {
            let wrapped = |error: Vec<u8>| {
                let said = wire::ip(&error, ip.v6, false).ok()?;
                // Not what the sender has marked: an error is of no class of its own.
                let said = Ip { tos: 0, ..said };
                Some(wrap(outer.kind, (own, ip.src), FOU, &said, &error))
            };
            refuse(input, reason, error(outer.inner, ip.v6, Some(own), says).and_then(wrapped), true)
        };
        if ip.ttl <= 1 {
            return Ok(tell(DropReason::TtlExceeded, &Says::time_exceeded(ip.v6)));
        }
        let (port, new) = match self.port(input, ip, transport, seen)? {
            Ok(port) => port,
            // A client that gets no translation is told, if it could have got one.
            Err(reason @ (DropReason::NoState | DropReason::UnsupportedIcmp)) => {
                return Ok(Should::drop(reason));
            }
            Err(reason) if unknown_reply().is_some() => {
                return Ok(tell(reason, &Says::prohibited(ip.v6)));
            }
            Err(reason) => return Ok(Should::drop(reason)),
        };
        let changed = wire::change(outer.inner, ip, None, |bytes| {
            set_tos(bytes, ip.v6, marked(outer.tos, ip.tos));
            hop(bytes, ip.v6);
            set_address(bytes, 0, End::Source, own);
            set_port(bytes, ip.header, ip.protocol, End::Source, port);
            clamp(bytes, ip, transport, outer.kind);
        });
        if let Some((key, _)) = datagram(ip) {
            let note = Note { flow: transport.flow, open: true, seen: self.now };
            self.gateway_notes.insert(key, note);
        }
        let size = size(input, ip, Some(transport));
        let flow = transport.flow;
        let tunnel = outer.kind;
        let half = self.forward.entry(flow).or_insert(Half { to: own, port, size: (0, 0), tunnel });
        add(&mut half.size, size);
        let back = Flow { src: own, src_port: port, ..flow }.turned();
        let half = Half { to: flow.src, port: flow.src_port, size: (0, 0), tunnel };
        // The gateway answers as it was spoken to last.
        self.reverse.entry(back).or_insert(half).tunnel = tunnel;
        let should = Should::becomes(Action::Back, framed(input.frame, true, &changed.bytes))
            .loose(14, &changed)
            .gateway(MASQUERADED, ip.v6, size);
        Ok(if new { should.gateway(NEW_FLOW, ip.v6, (1, 0)) } else { should })
    }

    fn later_out(&mut self, input: &Input, outer: &Tunnelled, ip: &Ip) -> Should {
        let known = follow(&mut self.gateway_notes, ip, self.now);
        let Some(half) = known.and_then(|flow| self.forward.get_mut(&flow)) else {
            return Should::drop(DropReason::FragmentUnknown);
        };
        if ip.ttl <= 1 {
            return Should::drop(DropReason::TtlExceeded);
        }
        let changed = wire::change(outer.inner, ip, None, |bytes| {
            set_tos(bytes, ip.v6, marked(outer.tos, ip.tos));
            hop(bytes, ip.v6);
            set_address(bytes, 0, End::Source, half.to);
        });
        let size = size(input, ip, None);
        add(&mut half.size, size);
        Should::becomes(Action::Back, framed(input.frame, true, &changed.bytes)).loose(14, &changed).gateway(
            MASQUERADED,
            ip.v6,
            size,
        )
    }

    fn icmp_out(&mut self, input: &Input, outer: &Tunnelled, ip: &Ip) -> Should {
        let packet = outer.inner;
        if !wire::is_error(ip.v6, packet[ip.header]) {
            return Should::drop(DropReason::UnsupportedIcmp);
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
        let Some(half) = self.forward.get(&quote.flow.turned()).copied() else {
            return Should::drop(DropReason::IcmpNoFlow);
        };
        if ip.ttl <= 1 {
            return Should::drop(DropReason::TtlExceeded);
        }
        let changed = wire::change(packet, ip, Some(&quote), |bytes| {
            set_tos(bytes, ip.v6, marked(outer.tos, ip.tos));
            hop(bytes, ip.v6);
            set_address(bytes, 0, End::Source, half.to);
            set_address(bytes, quote.at, End::Destination, half.to);
            set_port(bytes, quote.l4, quote.flow.protocol, End::Destination, half.port);
        });
        Should::becomes(Action::Back, framed(input.frame, true, &changed.bytes))
            .loose(14, &changed)
            .gateway(MASQUERADED, ip.v6, (1, ip.total as u64))
            .icmp(IcmpStat::FromPod)
    }

    /// A packet from the world.
    fn back(&mut self, input: &Input, v6: bool) -> Should {
        let packet = input.packet();
        // The local stack judges what is broken.
        let Ok(ip) = wire::ip(packet, v6, input.is_segmented()) else { return Should::pass(input) };
        let transport = match wire::transport(&ip, packet) {
            Ok(transport) => transport,
            Err(DropReason::Fragment) => return self.later_back(input, &ip),
            Err(DropReason::UnsupportedIcmp) => return self.icmp_back(input, &ip),
            Err(_) if ip.fragment.is_some() && ip.trouble.is_none() && ip.protocol == wire::ipip_of(v6) => {
                return Should::drop(DropReason::OuterFragment);
            }
            Err(_) => return Should::pass(input),
        };
        let own = hosts(v6).gateway;
        let key = datagram(&ip).map(|(key, _)| key);
        let note = Note { flow: transport.flow, open: true, seen: self.now };
        let Some(half) = self.reverse.get(&transport.flow).copied() else {
            // A connection to the gateway itself may begin, and so may an exchange of echoes.
            let begins = match transport.kind {
                Kind::Tcp(flags) => flags & 0b1_0010 == 0b0_0010,
                Kind::Udp => false,
                Kind::Request | Kind::Reply => true,
            };
            if let Some(reason) = unknown_reply()
                && !begins
                && self.is_of_translation(ip.protocol, transport.flow.dst_port)
            {
                return Should::drop(reason);
            }
            if let Some(key) = key {
                if ip.protocol == 17 && transport.flow.dst_port == FOU {
                    return Should::drop(DropReason::OuterFragment);
                }
                self.gateway_notes.insert(key, note);
            }
            return Should::pass(input);
        };
        if ip.ttl <= 1 {
            let error = error(packet, v6, Some(own), &Says::time_exceeded(v6));
            return refuse(input, DropReason::TtlExceeded, error, true);
        }
        if is_too_big(input, &ip, Some(&transport), half.tunnel) {
            let error = error(packet, v6, Some(own), &Says::too_big(v6, MTU - half.tunnel.overhead(v6)));
            return refuse(input, DropReason::TooBig, error, true);
        }
        if let Some(key) = key {
            // While another client's datagram with this identification is not complete, for a second.
            let other = self.gateway_notes.get(&key).is_some_and(|old| {
                let owner = self.reverse.get(&old.flow);
                old.open && self.now - old.seen <= 1 && owner.is_some_and(|owner| owner.to != half.to)
            });
            if other {
                return Should::drop(DropReason::FragmentConflict);
            }
            self.gateway_notes.insert(key, note);
        }
        let changed = wire::change(packet, &ip, None, |bytes| {
            hop(bytes, v6);
            set_address(bytes, 0, End::Destination, half.to);
            set_port(bytes, ip.header, ip.protocol, End::Destination, half.port);
            clamp(bytes, &ip, &transport, half.tunnel);
        });
        let size = size(input, &ip, Some(&transport));
        if let Some(half) = self.reverse.get_mut(&transport.flow) {
            add(&mut half.size, size);
        }
        let frame = wrap(half.tunnel, (own, half.to), FOU, &ip, &changed.bytes);
        Should::becomes(Action::Back, framed(input.frame, true, &frame))
            .loose(14 + half.tunnel.overhead(v6), &changed)
            .gateway(REPLY, v6, size)
    }

    fn later_back(&mut self, input: &Input, ip: &Ip) -> Should {
        let Some(flow) = follow(&mut self.gateway_notes, ip, self.now) else {
            return Should::drop(DropReason::FragmentUnknown);
        };
        let Some(half) = self.reverse.get_mut(&flow) else { return Should::pass(input) };
        if ip.ttl <= 1 {
            return Should::drop(DropReason::TtlExceeded);
        }
        if is_too_big(&Input { gso_size: 0, ..*input }, ip, None, half.tunnel) {
            return Should::drop(DropReason::TooBig);
        }
        let changed = wire::change(input.packet(), ip, None, |bytes| {
            hop(bytes, ip.v6);
            set_address(bytes, 0, End::Destination, half.to);
        });
        let size = size(input, ip, None);
        add(&mut half.size, size);
        let frame = wrap(half.tunnel, (hosts(ip.v6).gateway, half.to), FOU, ip, &changed.bytes);
        Should::becomes(Action::Back, framed(input.frame, true, &frame))
            .loose(14 + half.tunnel.overhead(ip.v6), &changed)
            .gateway(REPLY, ip.v6, size)
    }

    fn icmp_back(&mut self, input: &Input, ip: &Ip) -> Should {
        let packet = input.packet();
        if !wire::is_error(ip.v6, packet[ip.header]) {
            return Should::pass(input);
        }
        if ip.fragment.is_some() {
            return Should::drop(DropReason::Fragment);
        }
        let quote = match wire::quote(packet, ip.header + 8, ip.total, ip.v6) {
            Ok(quote) => quote,
            Err(reason) => return Should::drop(reason),
        };
        let own = hosts(ip.v6).gateway;
        if quote.flow.src != ip.dst {
            return Should::drop(DropReason::IcmpMismatch);
        }
        if let Some(tunnel) = quoted_tunnel(&quote, ip.v6)
            && is_client(quote.flow.dst)
        {
            return self.underlay_back(input, ip, &quote, tunnel);
        }
        let Some(half) = self.reverse.get(&quote.flow.turned()).copied() else {
            let Flow { src_port, protocol, .. } = quote.flow;
            let own = protocol == wire::ipip_of(ip.v6) || !self.is_of_translation(protocol, src_port);
            return if own { Should::pass(input) } else { Should::drop(DropReason::IcmpNoFlow) };
        };
        if ip.ttl <= 1 {
            return Should::drop(DropReason::TtlExceeded);
        }
        if is_too_big(&Input { gso_size: 0, ..*input }, ip, None, half.tunnel) {
            return Should::drop(DropReason::TooBig);
        }
        let most = MTU - half.tunnel.overhead(ip.v6);
        let changed = wire::change(packet, ip, Some(&quote), |bytes| {
            hop(bytes, ip.v6);
            set_address(bytes, 0, End::Destination, half.to);
            set_address(bytes, quote.at, End::Source, half.to);
            set_port(bytes, quote.l4, quote.flow.protocol, End::Source, half.port);
            if is_about_size(packet, ip) && told_mtu(packet, ip) > most {
                if ip.v6 {
                    bytes[ip.header + 4..ip.header + 6].copy_from_slice(&[0, 0]);
                }
                let most = u16::try_from(most).unwrap_or(0).to_be_bytes();
                bytes[ip.header + 6..ip.header + 8].copy_from_slice(&most);
            }
        });
        let frame = wrap(half.tunnel, (own, half.to), FOU, ip, &changed.bytes);
        Should::becomes(Action::Back, framed(input.frame, true, &frame))
            .loose(14 + half.tunnel.overhead(ip.v6), &changed)
            .gateway(REPLY, ip.v6, (1, ip.total as u64))
            .icmp(IcmpStat::ToPod)
    }

    /// An error about a packet that the gateway has sent to a client through the tunnel.
    fn underlay_back(&mut self, input: &Input, ip: &Ip, quote: &wire::Quote, tunnel: Tunnel) -> Should {
        let packet = input.packet();
        if !is_about_size(packet, ip) {
            return Should::pass(input);
        }
        let inner = match wire::quote(packet, quote.l4 + tunnel.header(), ip.total, ip.v6) {
            Ok(inner) => inner,
            Err(reason) => return Should::drop(reason),
        };
        if inner.flow.dst != quote.flow.dst {
            return Should::drop(DropReason::IcmpMismatch);
        }
        let Some(half) = self.forward.get(&inner.flow.turned()).copied() else {
            return Should::drop(DropReason::IcmpNoFlow);
        };
        if 14 + inner.at > 0x7f {
            return Should::drop(DropReason::IcmpQuote);
        }
        // As the remote has sent it.
        let restored = wire::change(packet, ip, Some(&inner), |bytes| {
            set_address(bytes, inner.at, End::Destination, half.to);
            set_port(bytes, inner.l4, inner.flow.protocol, End::Destination, half.port);
        });
        let own = hosts(ip.v6).gateway;
        let says = Says::too_big(ip.v6, inner_mtu(packet, ip, tunnel));
        let error = error(&restored.bytes[inner.at..], ip.v6, Some(own), &says);
        refuse(input, DropReason::UnderlayTooBig, error, true)
    }
}
