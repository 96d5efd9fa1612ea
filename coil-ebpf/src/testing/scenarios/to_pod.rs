//! Packets to a pod.

use coil_common::{
    stats::{Direction, DropReason, IcmpStat},
    values::{FlowValue, NO_POLICY, POD_GATEWAY, PodValue, STATE_REPLY, STATE_REPLY_FIN, STATE_REPLY_RST},
};

use super::world::{ACK, MSS_1460, NOW, PORTS, PORTS_BACK, SYN, SYN_ACK, Tuple, World};
use crate::testing::{
    build::{FOU, Ip},
    scenario::{Hook, Scenario},
};

const HOOK: Hook = Hook::ToPod;

pub(super) fn rows(w: &World) -> Vec<Scenario> {
    [passes(w), refused(w), unpacked(w)].concat()
}

fn row(w: &World, name: &str, packet: &[u8]) -> Scenario {
    w.scenario(HOOK, name, packet)
}

/// A flow value after one packet to the pod.
fn received(value: FlowValue, ip: &[u8], state: u32) -> FlowValue {
    FlowValue {
        rx_packets: value.rx_packets + 1,
        rx_bytes: value.rx_bytes + ip.len() as u64,
        state: value.state | state,
        ..value
    }
}

fn passes(w: &World) -> Vec<Scenario> {
    let inner = w.back().tcp(PORTS_BACK, ACK, &[], b"data");
    let tunnelled = w.to_client(&inner);
    let from_gateway = Ip::new(w.gateway, w.pod);
    let mut arp = row(w, "not IP", &tunnelled);
    arp.packet.bytes[12..14].copy_from_slice(&[8, 6]);
    let pod = |value| w.node_entries_with(value);
    let mut rows = vec![
        arp.passes(),
        row(w, "unknown interface", &tunnelled).with(vec![]).passes(),
        row(w, "no policy", &tunnelled).with(pod(PodValue { set: NO_POLICY, ..w.pod_value() })).passes(),
        row(w, "to a gateway", &tunnelled)
            .with(pod(PodValue { flags: POD_GATEWAY, ..w.pod_value() }))
            .passes(),
        row(w, "TCP, not tunnelled", &inner).passes(),
        row(w, "UDP to another port", &w.back().udp((FOU, FOU + 1), &inner)).passes(),
        row(w, "TCP to the port of FOU", &w.back().tcp((1, FOU), ACK, &[], &inner)).passes(),
        row(w, "first fragment of a tunnelled packet", &{
            let payload = tunnelled[w.header()..].to_vec();
            from_gateway.clone().fragment(0, true).packet(17, &payload)
        })
        .drops(DropReason::OuterFragment),
        row(w, "packet too big from the node", &{
            let quoted = w.out().udp(PORTS, &[7; 200]);
            let (kind, code) = if w.is_v4() { (3, 4) } else { (2, 0) };
            Ip::new(w.stranger, w.pod).icmp(kind, code, [0, 0, 5, 0], &quoted)
        })
        .passes(),
    ];
    if w.is_v4() {
        let payload = tunnelled[20..].to_vec();
        let odd = from_gateway.options(&[1; 4]).packet(17, &payload);
        rows.push(row(w, "tunnelled with IPv4 options", &odd).passes());
    } else {
        let payload = tunnelled[40..].to_vec();
        for (name, ip) in [
            ("tunnelled with hop-by-hop options", from_gateway.clone().extension(0, 8)),
            ("tunnelled with long destination options", from_gateway.clone().extension(60, 16)),
        ] {
            rows.push(row(w, name, &ip.packet(17, &payload)).passes());
        }
    }
    rows
}

fn refused(w: &World) -> Vec<Scenario> {
    let inner = w.back().udp(PORTS_BACK, b"data");
    let tunnelled = w.to_client(&inner);
    let outer = Ip::new(w.gateway, w.pod);
    let header = w.header();
    let mut rows = vec![
        row(w, "from a stranger", &Ip::new(w.stranger, w.pod).udp_unchecked((FOU, FOU), &inner))
            .drops(DropReason::UnknownGateway),
        row(w, "from a stranger, empty", &Ip::new(w.stranger, w.pod).udp((FOU, FOU), b""))
            .drops(DropReason::UnknownGateway),
        row(w, "for another pod", &w.to_client(&Ip::new(w.remote, w.stranger).udp(PORTS, b"x")))
            .drops(DropReason::InnerDestinationMismatch),
        row(w, "nothing inside", &outer.udp_unchecked((FOU, FOU), b"")).drops(DropReason::Truncated),
        row(w, "something else inside", &outer.udp_unchecked((FOU, FOU), &[0xff; 60]))
            .drops(DropReason::Malformed),
    ];
    for length in 0..inner.len() {
        let packet = outer.udp_unchecked((FOU, FOU), &inner[..length]);
        rows.push(
            row(w, &format!("cut after {length} bytes of the inner packet"), &packet)
                .drops(DropReason::Truncated),
        );
    }
    let broken = |name: &str, at: usize, value: &[u8]| {
        let mut packet = tunnelled.clone();
        packet[at..at + value.len()].copy_from_slice(value);
        row(w, name, &packet)
    };
    let [a, b] = u16::try_from(inner.len() + 7).unwrap_or(0).to_be_bytes();
    rows.extend([
        broken("UDP length of 7", header + 4, &[0, 7]).drops(DropReason::Malformed),
        broken("UDP length more than the packet", header + 4, &[2, 0]).drops(DropReason::Malformed),
        broken("UDP length less than the inner packet", header + 4, &[a, b]).drops(DropReason::Malformed),
    ]);
    let in_pieces = |name: &str, packet: &[u8], size: usize, reason: DropReason| {
        let mut row = row(w, name, packet).drops(reason);
        (row.packet.gso_size, row.packet.gso_segments) = (u32::try_from(size).unwrap_or(0), 3);
        row
    };
    let uncut = w.to_client(&w.back().udp(PORTS_BACK, &[7; 300]));
    let several = w.to_client(&[inner.clone(), inner.clone(), inner.clone()].concat());
    let flow = || vec![w.flow_entry((w.pod, w.remote, PORTS, 17), w.flow_value())];
    rows.extend([
        in_pieces("datagrams that nobody has cut", &uncut, 100, DropReason::UncutDatagrams),
        in_pieces("datagrams of a known flow that nobody has cut", &uncut, 100, DropReason::UncutDatagrams)
            .and(flow())
            .leaves(flow()),
        in_pieces("merged by somebody", &several, inner.len(), DropReason::MergedTunnel),
    ]);
    // The outer packet claims more than there is.
    let mut short = row(w, "cut inside the tunnel", &tunnelled).drops(DropReason::Truncated);
    short.packet.bytes.pop();
    rows.push(short);
    rows
}

fn unpacked(w: &World) -> Vec<Scenario> {
    let back = w.back();
    let tuple = |ports: (u16, u16), protocol: u8| -> Tuple { (w.pod, w.remote, ports, protocol) };
    let known = |name: &str, inner: &[u8], becomes: &[u8], flow: Tuple, state: u32| {
        row(w, name, &w.to_client(inner))
            .and(vec![w.flow_entry(flow, FlowValue { last_seen: NOW, ..w.flow_value() })])
            .becomes(becomes)
            .leaves(vec![w.flow_entry(flow, received(w.flow_value(), inner, STATE_REPLY | state))])
            .counts_egress(w.egress(), Direction::Rx, inner)
    };
    let tcp = tuple(PORTS, 6);
    let udp = tuple(PORTS, 17);
    let data = back.tcp(PORTS_BACK, ACK, &[], b"data");
    let reply = back.udp(PORTS_BACK, b"data");
    let echo = back.echo(false, 77, b"ping");
    let fin = back.tcp(PORTS_BACK, ACK | 1, &[], b"");
    let rst = back.tcp(PORTS_BACK, 4, &[], b"");
    let syn_ack = back.tcp(PORTS_BACK, SYN_ACK, &MSS_1460, b"");
    let clamped = back.tcp(PORTS_BACK, SYN_ACK, &w.mss_option(), b"");
    let syn = back.tcp(PORTS_BACK, SYN, &MSS_1460, b"");
    let clamped_syn = back.tcp(PORTS_BACK, SYN, &w.mss_option(), b"");
    let mut rows = vec![
        known("TCP", &data, &data, tcp, 0),
        known("TCP FIN", &fin, &fin, tcp, STATE_REPLY_FIN),
        known("TCP RST", &rst, &rst, tcp, STATE_REPLY_RST),
        known("UDP", &reply, &reply, udp, 0),
        known("echo reply", &echo, &echo, tuple((77, 0), w.icmp()), 0),
        known("SYN-ACK with a large MSS", &syn_ack, &clamped, tcp, 0),
        known("SYN with a large MSS", &syn, &clamped_syn, tcp, 0),
        row(w, "unknown flow", &w.to_client(&data)).becomes(&data),
        row(w, "unknown flow, SYN-ACK", &w.to_client(&syn_ack)).becomes(&clamped),
    ];
    // A gateway of an older release sends fragments, and what it does not understand.
    let fragment = back.clone().fragment(8, false).packet(17, &[7; 64]);
    let other = back.packet(132, &[1; 40]);
    let error = back.icmp(3, 1, [0; 4], &[9; 48]);
    for (name, inner) in [("fragment", &fragment), ("other protocol", &other)] {
        rows.push(row(w, name, &w.to_client(inner)).becomes(inner));
    }
    rows.push(row(w, "error", &w.to_client(&error)).becomes(&error).counts_icmp(IcmpStat::ToPod));
    // The checksum of the outer UDP header is nobody's business.
    let checked = Ip::new(w.gateway, w.pod).udp((FOU, FOU), &data);
    rows.push(
        row(w, "outer checksum", &checked)
            .and(vec![w.flow_entry(tcp, w.flow_value())])
            .becomes(&data)
            .leaves(vec![w.flow_entry(tcp, received(w.flow_value(), &data, STATE_REPLY))])
            .counts_egress(w.egress(), Direction::Rx, &data),
    );
    let auto = Ip::new(w.gateway, w.pod).udp_unchecked((45678, FOU), &data);
    rows.push(row(w, "another outer source port", &auto).becomes(&data));
    if !w.is_v4() {
        let mut limit = Ip::new(w.gateway, w.pod);
        // Tunnel encapsulation limit 0, as the kernel sends it, and anything else of that size.
        for option in [[4, 1, 0, 1, 1, 0], [0xff; 6]] {
            limit.extensions = vec![(60, [&[0, 0], &option[..]].concat())];
            let packet = limit.udp_unchecked((FOU, FOU), &data);
            rows.push(row(w, &format!("destination options {option:?}"), &packet).becomes(&data));
        }
        let inner = back.clone().extension(60, 8).udp(PORTS_BACK, b"data");
        rows.push(known("inner extension header", &inner, &inner, udp, 0));
    } else {
        let inner = back.clone().options(&[1; 8]).udp(PORTS_BACK, b"data");
        rows.push(known("inner options", &inner, &inner, udp, 0));
    }
    for (outer, inner_tos, wanted) in [(3, 1, 3), (3, 2, 3), (3, 0, 0), (1, 2, 2), (3, 0xb9, 0xbb)] {
        let inner = back.clone().tos(inner_tos).udp(PORTS_BACK, b"data");
        let marked = back.clone().tos(wanted).udp(PORTS_BACK, b"data");
        let packet = Ip::new(w.gateway, w.pod).tos(outer).udp_unchecked((FOU, FOU), &inner);
        rows.push(
            row(w, &format!("congestion {outer} outside, {inner_tos} inside"), &packet).becomes(&marked),
        );
    }
    rows
}
