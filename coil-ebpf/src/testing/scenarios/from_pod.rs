//! Packets from a pod.

use std::net::IpAddr;

use coil_common::{
    stats::{Direction, DropReason},
    values::{
        EGRESS_DELETED, EGRESS_SOURCE_PORT_AUTO, FlowValue, GATEWAY_DRAINING, GATEWAY_GONE, GATEWAY_READY,
        NO_POLICY, POD_ANY_SOURCE, POD_GATEWAY, PodValue, STATE_FIN, STATE_REPLY_FIN, STATE_SYN,
    },
};

use super::world::{ACK, CONFIRMED, GENERATION, MSS_1460, MTU, PORTS, SET, SYN, SYN_ACK, Tuple, World, sent};
use crate::{
    family::{Family as _, V4, V6, addr4, addr6},
    flow::{AUTO_PORT_FIRST, AUTO_PORTS, Flow},
    testing::{
        build::{self, Ip, tunnel_from},
        scenario::{Hook, Scenario},
    },
};

const HOOK: Hook = Hook::FromPod;

pub(super) fn rows(w: &World) -> Vec<Scenario> {
    [passes(w), sources(w), broken(w), unsupported(w), tunnelled(w), choices(w), sizes(w)].concat()
}

fn row(w: &World, name: &str, packet: &[u8]) -> Scenario {
    w.scenario(HOOK, name, packet)
}

/// The key of a flow from the pod to the remote.
fn tuple(w: &World, ports: (u16, u16), protocol: u8) -> Tuple {
    (w.pod, w.remote, ports, protocol)
}

/// A packet that is tunnelled and makes a flow of `tuple` with `state`.
fn new_flow(w: &World, name: &str, packet: &[u8], tuple: Tuple, state: u32) -> Scenario {
    row(w, name, packet)
        .becomes(&w.to_gateway(packet))
        .leaves(vec![w.flow_entry(tuple, sent(w.flow_value(), packet, state))])
        .counts_egress(w.egress(), Direction::Tx, packet)
}

fn passes(w: &World) -> Vec<Scenario> {
    let tcp = w.out().tcp(PORTS, ACK, &[], b"data");
    let mut arp = row(w, "not IP", &tcp);
    arp.packet.bytes[12..14].copy_from_slice(&[8, 6]);
    let inside = Ip::new(w.pod, w.inside);
    let mut rows = vec![
        arp.passes(),
        row(w, "unknown interface", &tcp).with(vec![]).passes(),
        row(w, "no policy", &tcp)
            .with(w.node_entries_with(PodValue { set: NO_POLICY, ..w.pod_value() }))
            .passes(),
        row(w, "a gateway's own", &tcp)
            .with(w.node_entries_with(PodValue { flags: POD_GATEWAY, ..w.pod_value() }))
            .passes(),
        row(w, "no policy for the destination", &tcp).with(vec![World::pod_entry(w.pod_value())]).passes(),
        row(w, "direct", &inside.tcp(PORTS, SYN, &MSS_1460, b"")).passes(),
        row(w, "direct fragment", &inside.clone().fragment(0, true).packet(17, &[7; 64])).passes(),
        row(w, "direct fragment, second", &inside.clone().fragment(8, false).packet(17, &[7; 64])).passes(),
        row(w, "direct, unknown protocol", &inside.packet(132, &[1; 40])).passes(),
        row(w, "direct, bad TCP header", &inside.packet(6, &[0; 20])).passes(),
        row(w, "direct, ICMP error", &inside.icmp(3, 1, [0; 4], &[9; 48])).passes(),
    ];
    let local: &[&str] =
        if w.is_v4() { &["224.0.0.1", "255.255.255.255", "169.254.1.1"] } else { &["ff02::1", "fe80::1"] };
    for text in local {
        if let Ok(dst) = text.parse::<IpAddr>() {
            let packet = Ip::new(w.pod, dst).udp(PORTS, b"hello");
            rows.push(row(w, &format!("to {dst}"), &packet).passes());
        }
    }
    if !w.is_v4() {
        for kind in 133..=137 {
            let packet = w.out().ttl(255).icmp(kind, 0, [0; 4], &[1; 24]);
            rows.push(row(w, &format!("neighbour discovery {kind}"), &packet).passes());
            let packet = w.out().ttl(254).icmp(kind, 0, [0; 4], &[1; 24]);
            rows.push(
                row(w, &format!("neighbour discovery {kind} from afar"), &packet)
                    .drops(DropReason::UnsupportedIcmp),
            );
        }
    }
    rows
}

fn sources(w: &World) -> Vec<Scenario> {
    let spoofed = Ip::new(w.stranger, w.remote).udp(PORTS, b"x");
    let mut rows = vec![
        row(w, "spoofed source", &spoofed).drops(DropReason::SpoofedSource),
        row(w, "spoofed source without policy", &spoofed)
            .with(w.node_entries_with(PodValue { set: NO_POLICY, ..w.pod_value() }))
            .drops(DropReason::SpoofedSource),
        row(w, "spoofed source of a gateway", &spoofed)
            .with(w.node_entries_with(PodValue { flags: POD_GATEWAY, ..w.pod_value() }))
            .drops(DropReason::SpoofedSource),
        row(w, "any source is allowed", &spoofed)
            .with(w.node_entries_with(PodValue { set: NO_POLICY, flags: POD_ANY_SOURCE, ..w.pod_value() }))
            .passes(),
        row(w, "a pod without an address of the family", &spoofed)
            .with(w.node_entries_with(PodValue { ipv4: [0; 4], ipv6: [0; 16], ..w.pod_value() }))
            .drops(DropReason::SpoofedSource),
    ];
    let interim: &[(&str, &str)] = if w.is_v4() {
        &[("0.0.0.0", "255.255.255.255")]
    } else {
        &[("::", "ff02::1:ff00:2"), ("fe80::2", "ff02::16"), ("fe80::2", "fe80::1")]
    };
    for (src, dst) in interim {
        if let (Ok(src), Ok(dst)) = (src.parse::<IpAddr>(), dst.parse::<IpAddr>()) {
            let packet = Ip::new(src, dst).udp((68, 67), b"hello");
            rows.push(row(w, &format!("from {src} to {dst}"), &packet).passes());
        }
    }
    rows
}

/// Packets cut short at each byte, and headers that cannot be.
fn broken(w: &World) -> Vec<Scenario> {
    let whole = w.out().udp(PORTS, b"data");
    let mut rows = Vec::new();
    for length in 0..whole.len() {
        let mut row = row(w, &format!("cut after {length} bytes of IP"), &whole).drops(DropReason::Truncated);
        row.packet.bytes.truncate(14 + length);
        if length < w.header() {
            row = row.library_only("test runs want a whole IP header");
        }
        rows.push(row);
    }
    for length in 0..14 {
        let mut row = row(w, &format!("cut after {length} bytes of Ethernet"), &whole)
            .library_only("test runs want an Ethernet header");
        row.packet.bytes.truncate(length);
        rows.push(row.passes());
    }
    let broken = |name: &str, at: usize, value: &[u8]| {
        let mut row = row(w, name, &whole);
        row.packet.bytes[14 + at..14 + at + value.len()].copy_from_slice(value);
        row
    };
    if w.is_v4() {
        rows.extend([
            broken("version 6 in IPv4", 0, &[0x65]).drops(DropReason::Malformed),
            broken("header of 16 bytes", 0, &[0x44]).drops(DropReason::Malformed),
            broken("header longer than the packet", 0, &[0x4f]).drops(DropReason::Malformed),
            broken("length less than the header", 2, &[0, 19]).drops(DropReason::Malformed),
            broken("length more than the packet", 2, &[0, 33]).drops(DropReason::Truncated),
            broken("length without end", 2, &[0xff, 0xff]).drops(DropReason::Truncated),
        ]);
    } else {
        rows.extend([
            broken("version 4 in IPv6", 0, &[0x40]).drops(DropReason::Malformed),
            broken("length more than the packet", 4, &[0, 13]).drops(DropReason::Truncated),
            broken("length without end", 4, &[0xff, 0xff]).drops(DropReason::Truncated),
        ]);
    }
    rows
}

fn unsupported(w: &World) -> Vec<Scenario> {
    let out = w.out();
    let mut short_tcp = out.tcp(PORTS, ACK, &[], b"");
    let header = w.header();
    short_tcp[header + 12] = 0x40;
    let mut long_tcp = out.tcp(PORTS, ACK, &[], b"");
    long_tcp[header + 12] = 0x60;
    let mut short_udp = out.udp(PORTS, b"data");
    short_udp[header + 4..header + 6].copy_from_slice(&[0, 7]);
    let mut long_udp = out.udp(PORTS, b"data");
    long_udp[header + 4..header + 6].copy_from_slice(&[0, 13]);
    let mut rows = vec![
        row(w, "unknown protocol", &out.packet(132, &[1; 40])).drops(DropReason::UnsupportedProtocol),
        row(w, "the other family's ICMP", &out.packet(59 - w.icmp(), &[8; 40]))
            .drops(DropReason::UnsupportedProtocol),
        row(w, "ICMP error about nothing", &out.icmp(3, 3, [0; 4], &[9; 48])).drops(DropReason::IcmpQuote),
        row(w, "echo with a code", &out.icmp(if w.is_v4() { 8 } else { 128 }, 1, [0; 4], &[9; 8]))
            .drops(DropReason::UnsupportedIcmp),
        row(w, "second fragment", &out.clone().fragment(8, false).packet(17, &[7; 64]))
            .drops(DropReason::FragmentUnknown),
        row(w, "no room for TCP", &out.packet(6, &[0; 19])).drops(DropReason::Truncated),
        row(w, "no room for UDP", &out.packet(17, &[0; 7])).drops(DropReason::Truncated),
        row(w, "no room for ICMP", &out.packet(w.icmp(), &[8; 7])).drops(DropReason::Truncated),
        row(w, "TCP header of 16 bytes", &short_tcp).drops(DropReason::Malformed),
        row(w, "TCP header longer than the packet", &long_tcp).drops(DropReason::Malformed),
        row(w, "UDP length of 7", &short_udp).drops(DropReason::Malformed),
        row(w, "UDP length more than the packet", &long_udp).drops(DropReason::Malformed),
        row(w, "blocked", &Ip::new(w.pod, w.blocked).tcp(PORTS, SYN, &[], b""))
            .drops(DropReason::EgressUnresolved),
        row(w, "blocked, unknown protocol", &Ip::new(w.pod, w.blocked).packet(132, &[1; 40]))
            .drops(DropReason::EgressUnresolved),
    ];
    if !w.is_v4() {
        let udp = out.udp(PORTS, b"data")[40..].to_vec();
        let with = |kinds: &[(u8, usize)]| {
            kinds.iter().fold(out.clone(), |ip, (kind, length)| ip.extension(*kind, *length))
        };
        let mut routing = with(&[(43, 24)]).packet(17, &udp);
        routing[43] = 1;
        let mut beyond = with(&[(60, 8)]).packet(17, &udp);
        beyond[41] = 200;
        rows.extend([
            row(w, "routing header with segments left", &routing).drops(DropReason::ExtensionHeaders),
            row(
                w,
                "five extension headers",
                &with(&[(0, 8), (60, 8), (60, 8), (60, 8), (60, 8)]).packet(17, &udp),
            )
            .drops(DropReason::ExtensionHeaders),
            row(w, "extension header beyond the packet", &beyond).drops(DropReason::Malformed),
            row(w, "extension header cut short", &with(&[(0, 8)]).packet(60, &[17]))
                .drops(DropReason::Truncated),
        ]);
    }
    rows
}

fn tunnelled(w: &World) -> Vec<Scenario> {
    let out = w.out();
    let clamped = out.tcp(PORTS, SYN, &w.mss_option(), b"");
    let syn = out.tcp(PORTS, SYN, &MSS_1460, b"");
    let tcp = tuple(w, PORTS, 6);
    let syn_flow = w.flow_entry(tcp, sent(w.flow_value(), &syn, STATE_SYN));
    let syn_row = |name: &str, options: &[u8], wanted: &[u8]| {
        let packet = out.tcp(PORTS, SYN, options, b"");
        row(w, name, &packet)
            .becomes(&w.to_gateway(&out.tcp(PORTS, SYN, wanted, b"")))
            .leaves(vec![w.flow_entry(tcp, sent(w.flow_value(), &packet, STATE_SYN))])
            .counts_egress(w.egress(), Direction::Tx, &packet)
    };
    let [a, b] = w.mss().to_be_bytes();
    let small = [2, 4, 0x02, 0x00];
    let mut rows = vec![
        row(w, "SYN with a large MSS", &syn)
            .becomes(&w.to_gateway(&clamped))
            .leaves(vec![syn_flow])
            .counts_egress(w.egress(), Direction::Tx, &syn),
        syn_row("SYN with a small MSS", &small, &small),
        syn_row("SYN without MSS", &[1, 1, 4, 2], &[1, 1, 4, 2]),
        syn_row("SYN with MSS at an odd offset", &[1, 2, 4, 5, 0xb4, 1, 1, 1], &[1, 2, 4, a, b, 1, 1, 1]),
        syn_row(
            "SYN with MSS after others",
            &[4, 2, 8, 10, 1, 2, 3, 4, 5, 6, 7, 8, 2, 4, 9, 9],
            &[4, 2, 8, 10, 1, 2, 3, 4, 5, 6, 7, 8, 2, 4, a, b],
        ),
        syn_row(
            "SYN with options that end early",
            &[0, 0, 0, 0, 2, 4, 5, 0xb4],
            &[0, 0, 0, 0, 2, 4, 5, 0xb4],
        ),
        syn_row(
            "SYN with an option of length zero",
            &[9, 0, 2, 4, 5, 0xb4, 1, 1],
            &[9, 0, 2, 4, 5, 0xb4, 1, 1],
        ),
        syn_row("SYN with an MSS of the wrong length", &[2, 3, 5, 0xb4], &[2, 3, 5, 0xb4]),
    ];
    let syn_ack = out.tcp(PORTS, SYN_ACK, &MSS_1460, b"");
    rows.push(
        row(w, "SYN-ACK with a large MSS", &syn_ack)
            .becomes(&w.to_gateway(&out.tcp(PORTS, SYN_ACK, &w.mss_option(), b"")))
            .leaves(vec![w.flow_entry(tcp, sent(w.flow_value(), &syn_ack, 0))])
            .counts_egress(w.egress(), Direction::Tx, &syn_ack),
    );
    let data = out.tcp(PORTS, ACK, &MSS_1460, b"data");
    rows.push(new_flow(w, "TCP data makes a flow, its options stay", &data, tcp, CONFIRMED));
    let udp = tuple(w, PORTS, 17);
    rows.push(new_flow(w, "UDP", &out.udp(PORTS, b"data"), udp, 0));
    rows.push(new_flow(w, "UDP without checksum", &out.udp_unchecked(PORTS, b"data"), udp, 0));
    rows.push(new_flow(w, "UDP without payload", &out.udp(PORTS, b""), udp, 0));
    rows.push(new_flow(
        w,
        "UDP to the port of FOU",
        &out.udp((1000, build::FOU), b"data"),
        tuple(w, (1000, build::FOU), 17),
        0,
    ));
    let echo = tuple(w, (77, 0), w.icmp());
    rows.push(new_flow(w, "echo request", &out.echo(true, 77, b"ping"), echo, 0));
    let echo = tuple(w, (0, 77), w.icmp());
    rows.push(new_flow(w, "echo reply", &out.echo(false, 77, b"ping"), echo, 0));
    for tos in [0x01, 0x02, 0x03, 0xb8] {
        let packet = out.clone().tos(tos).udp(PORTS, b"data");
        rows.push(new_flow(w, &format!("type of service {tos:#x}"), &packet, udp, 0));
    }
    let mut padded = new_flow(w, "padding after the packet", &out.udp(PORTS, b"x"), udp, 0);
    padded.packet.bytes.extend([0; 11]);
    if let Some(packet) = &mut padded.expect.packet {
        packet.extend([0; 11]);
    }
    rows.push(padded);
    if w.is_v4() {
        let packet = out.clone().options(&[1; 12]).udp(PORTS, b"data");
        rows.push(new_flow(w, "IPv4 options", &packet, udp, 0));
        let packet = out.clone().options(&[1; 40]).tcp(PORTS, ACK, &[1; 40], b"data");
        rows.push(new_flow(w, "all options that there can be", &packet, tcp, CONFIRMED));
        let mut packet = out.clone();
        packet.df = false;
        rows.push(new_flow(w, "without DF", &packet.udp(PORTS, b"data"), udp, 0));
    } else {
        let with = out.clone().extension(0, 8).extension(60, 16).extension(43, 24);
        rows.push(new_flow(w, "extension headers", &with.udp(PORTS, b"data"), udp, 0));
        let with = out.clone().extension(60, 248);
        rows.push(new_flow(w, "long extension header", &with.udp(PORTS, b"data"), udp, 0));
    }
    rows
}

fn choices(w: &World) -> Vec<Scenario> {
    let data = w.out().tcp(PORTS, ACK, &[], b"data");
    let tcp = tuple(w, PORTS, 6);
    let old = FlowValue {
        gateway: w.old_gateway_index(),
        gateway_generation: 9,
        tx_packets: 5,
        tx_bytes: 500,
        rx_packets: 4,
        rx_bytes: 400,
        ..w.flow_value()
    };
    let old_gateway = |state| w.gateway_entry(w.old_gateway_index(), w.old_gateway, 9, state);
    let via_old = build::tunnel(w.pod, w.old_gateway, &data);
    let kept = |name: &str, value: FlowValue, state: u32| {
        row(w, name, &data)
            .and(vec![old_gateway(state), w.flow_entry(tcp, value)])
            .becomes(&via_old)
            .leaves(vec![w.flow_entry(tcp, sent(FlowValue { set: SET, ..value }, &data, CONFIRMED))])
            .counts_egress(w.egress(), Direction::Tx, &data)
    };
    let moved = |name: &str, gateway, value: FlowValue, left: FlowValue| {
        row(w, name, &data)
            .and(vec![gateway, w.flow_entry(tcp, value)])
            .becomes(&w.to_gateway(&data))
            .leaves(vec![w.flow_entry(tcp, sent(left, &data, CONFIRMED))])
            .counts_egress(w.egress(), Direction::Tx, &data)
    };
    let to_ready = FlowValue { gateway: w.gateway_index(), gateway_generation: GENERATION, ..old };
    let mut rows = vec![
        kept("a flow stays with its gateway", old, GATEWAY_READY),
        kept("a flow stays with a draining gateway", old, GATEWAY_DRAINING),
        kept(
            "a flow stays with its gateway when the policy changes around it",
            FlowValue { set: SET - 1, ..old },
            GATEWAY_DRAINING,
        ),
        moved("a flow leaves a gateway that is gone", old_gateway(GATEWAY_GONE), old, to_ready),
        moved(
            "a flow leaves a gateway whose index has a new holder",
            w.gateway_entry(w.old_gateway_index(), w.old_gateway, 10, GATEWAY_READY),
            old,
            to_ready,
        ),
        moved(
            "a flow of another egress starts over",
            old_gateway(GATEWAY_READY),
            FlowValue { set: SET - 1, egress: w.egress() + 2, ..old },
            w.flow_value(),
        ),
        row(w, "a flow whose destination is direct now", &Ip::new(w.pod, w.inside).udp(PORTS, b""))
            .and(vec![w.flow_entry((w.pod, w.inside, PORTS, 17), FlowValue { set: SET - 1, ..old })])
            .leaves(vec![w.flow_entry((w.pod, w.inside, PORTS, 17), FlowValue { set: SET - 1, ..old })])
            .passes(),
        row(w, "no gateway", &data).and(vec![w.egress_entry(0, 0)]).drops(DropReason::NoGateway),
        row(w, "a deleted egress", &data)
            .and(vec![w.egress_entry(EGRESS_DELETED, 0)])
            .drops(DropReason::EgressUnresolved),
        row(w, "the chosen gateway is gone", &data)
            .and(vec![w.gateway_entry(w.gateway_index(), w.gateway, GENERATION, GATEWAY_GONE)])
            .drops(DropReason::NoGateway),
        row(w, "an egress that does not exist", &data)
            .and(vec![w.policy_entry(if w.is_v4() { 32 } else { 128 }, w.remote, 1_000_000)])
            .drops(DropReason::EgressUnresolved),
        row(w, "flow table full", &data)
            .and(vec![w.flow_entry((w.pod, w.remote, (1, 2), 6), old)])
            .full(w.flow_map(), 1)
            .leaves(vec![w.flow_entry((w.pod, w.remote, (1, 2), 6), old)])
            .drops(DropReason::FlowTableFull),
    ];
    let auto = if w.is_v4() {
        let (a, b) = (World::octets4(w.pod), World::octets4(w.remote));
        Flow::<V4>::new(&addr4(a), &addr4(b), be(PORTS.0), be(PORTS.1), 6).hash(42)
    } else {
        let (a, b) = (World::octets6(w.pod), World::octets6(w.remote));
        Flow::<V6>::new(&addr6(a), &addr6(b), be(PORTS.0), be(PORTS.1), 6).hash(42)
    };
    let port = AUTO_PORT_FIRST + auto.below(AUTO_PORTS);
    rows.push(
        row(w, "source port that follows the flow", &data)
            .and(vec![w.egress_entry(EGRESS_SOURCE_PORT_AUTO, 1)])
            .becomes(&tunnel_from(w.pod, w.gateway, port, &data))
            .leaves(vec![w.flow_entry(tcp, sent(w.flow_value(), &data, CONFIRMED))])
            .counts_egress(w.egress(), Direction::Tx, &data),
    );
    let syn = w.out().tcp(PORTS, SYN, &[], b"");
    let closed = FlowValue { state: STATE_SYN | STATE_FIN | STATE_REPLY_FIN, ..w.flow_value() };
    rows.push(
        row(w, "a SYN reuses a closed flow", &syn)
            .and(vec![w.flow_entry(tcp, closed)])
            .becomes(&w.to_gateway(&syn))
            .leaves(vec![w.flow_entry(tcp, sent(w.flow_value(), &syn, STATE_SYN))])
            .counts_egress(w.egress(), Direction::Tx, &syn),
    );
    let fin = w.out().tcp(PORTS, ACK | 1, &[], b"");
    rows.push(
        row(w, "a FIN is noted", &fin)
            .and(vec![w.flow_entry(tcp, w.flow_value())])
            .becomes(&w.to_gateway(&fin))
            .leaves(vec![w.flow_entry(tcp, sent(w.flow_value(), &fin, CONFIRMED | STATE_FIN))])
            .counts_egress(w.egress(), Direction::Tx, &fin),
    );
    rows
}

fn be(port: u16) -> [u8; 2] {
    port.to_be_bytes()
}

fn sizes(w: &World) -> Vec<Scenario> {
    let headers = w.header() + 8;
    let largest = usize::from(MTU - w.overhead());
    let udp = tuple(w, PORTS, 17);
    let fits = w.out().udp(PORTS, &vec![7; largest - headers]);
    let exceeds = w.out().udp(PORTS, &vec![7; largest - headers + 1]);
    let mut no_df = w.out();
    no_df.df = false;
    let exceeds_no_df = no_df.udp(PORTS, &vec![7; largest - headers + 1]);
    let error = |from: IpAddr, packet: &[u8]| {
        let mut ip = Ip::new(from, w.pod).tos(0xc0);
        ip.id = 0;
        ip.df = false;
        let [a, b] = (MTU - w.overhead()).to_be_bytes();
        if w.is_v4() {
            ip.icmp(3, 4, [0, 0, a, b], &packet[..V4::QUOTE])
        } else {
            ip.icmp(2, 0, [0, 0, a, b], &packet[..V6::QUOTE])
        }
    };
    let too_big = |name: &str, packet: &[u8]| {
        let mut row = row(w, name, packet).returns(&error(w.remote, packet));
        row.expect.drop = Some(DropReason::TooBig);
        row
    };
    let mut from_node = too_big("too big, the node has an address", &exceeds);
    from_node.config.ipv4 = World::octets4(w.stranger);
    from_node.config.ipv6 = World::octets6(w.stranger);
    let mut rows = vec![
        new_flow(w, "as big as can be", &fits, udp, 0),
        too_big("too big", &exceeds),
        too_big("too big, without DF", &exceeds_no_df),
        from_node.returns(&error(w.stranger, &exceeds)),
        row(w, "too big for the tunnel, but direct", &Ip::new(w.pod, w.inside).udp(PORTS, &[7; 1465]))
            .passes(),
    ];
    if w.is_v4() {
        let packet = w.out().options(&[1; 16]).udp(PORTS, &vec![7; largest - headers]);
        rows.push(too_big("too big, with options", &packet));
    } else {
        let packet = w.out().extension(60, 16).udp(PORTS, &vec![7; largest - headers]);
        rows.push(too_big("too big, with an extension header", &packet));
    }
    rows.extend(segmented(w));
    rows
}

/// GSO packets, whose segments count.
fn segmented(w: &World) -> Vec<Scenario> {
    const REASON: &str = "test runs make GSO packets that no helper accepts";
    let tcp = tuple(w, PORTS, 6);
    let repeated = w.header() + 20;
    let size = usize::from(w.mss());
    let packet = w.out().tcp(PORTS, ACK, &[], &vec![7; size * 3 + 1]);
    let gso = |name: &str, size: usize, segments: u32| {
        let mut row = new_flow(w, name, &packet, tcp, CONFIRMED).library_only(REASON);
        row.packet.gso_size = u32::try_from(size).unwrap_or(0);
        row.packet.gso_segments = segments;
        let bytes = (packet.len() + 3 * repeated) as u64;
        for counter in row.expect.counters.values_mut() {
            counter.packets = 4;
            counter.bytes = bytes;
        }
        let value = FlowValue { tx_packets: 4, tx_bytes: bytes, state: CONFIRMED, ..w.flow_value() };
        row.leaves(vec![w.flow_entry(tcp, value)])
    };
    // Longer than a length field can say.
    let mut jumbo = Ip::new(w.pod, w.inside).tcp(PORTS, ACK, &[], &vec![7; 70_000]);
    let at = if w.is_v4() { 2 } else { 4 };
    jumbo[at..at + 2].copy_from_slice(&[0, 0]);
    let mut direct = row(w, "BIG TCP that is direct", &jumbo).passes().library_only(REASON);
    direct.packet.gso_size = 1000;
    let mut beyond = w.out().tcp(PORTS, ACK, &[], &vec![7; 70_000]);
    beyond[at..at + 2].copy_from_slice(&[0, 0]);
    let mut beyond = row(w, "BIG TCP", &beyond).drops(DropReason::TooBig).library_only(REASON);
    beyond.packet.gso_size = 1000;
    beyond.expect.action = crate::testing::Action::Back;
    let mut exceeds = row(w, "segments are too big", &packet).drops(DropReason::TooBig).library_only(REASON);
    exceeds.packet.gso_size = u32::try_from(size + 1).unwrap_or(0);
    exceeds.packet.gso_segments = 4;
    exceeds.expect.action = crate::testing::Action::Back;
    // The outer headers have room for a length of 64 KiB less one byte, and no more.
    let largest = w.out().tcp(PORTS, ACK, &[], &vec![7; 0xffff - usize::from(w.overhead()) - repeated]);
    let segments = (largest.len() - repeated).div_ceil(size);
    let mut fits = new_flow(w, "as large as a length can say", &largest, tcp, CONFIRMED).library_only(REASON);
    fits.packet.gso_size = u32::try_from(size).unwrap_or(0);
    let (packets, bytes) = (segments as u64, (largest.len() + (segments - 1) * repeated) as u64);
    for counter in fits.expect.counters.values_mut() {
        (counter.packets, counter.bytes) = (packets, bytes);
    }
    let value = FlowValue { tx_packets: packets, tx_bytes: bytes, state: CONFIRMED, ..w.flow_value() };
    let fits = fits.leaves(vec![w.flow_entry(tcp, value)]);
    let more = w.out().tcp(PORTS, ACK, &[], &vec![7; largest.len() - repeated + 1]);
    let mut more = row(w, "larger than a length can say once it is tunnelled", &more)
        .drops(DropReason::TooBig)
        .library_only(REASON);
    more.packet.gso_size = u32::try_from(size).unwrap_or(0);
    more.expect.action = crate::testing::Action::Back;
    vec![
        gso("segments count", size, 4),
        gso("segments count although nobody has counted them", size, 0),
        exceeds,
        direct,
        beyond,
        fits,
        more,
    ]
}
