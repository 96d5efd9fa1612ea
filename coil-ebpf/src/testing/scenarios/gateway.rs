//! Packets that reach a gateway.

use std::net::IpAddr;

use coil_common::{
    config::{CONFIG_PICK_UP, CONFIG_SOURCE_PORT_AUTO},
    stats::{DropReason, GatewayStat},
    values::{STATE_FIN, STATE_REPLY, STATE_REPLY_FIN, STATE_SYN},
};

use super::world::{ACK, CONFIRMED, MSS_1460, MTU, Nat, PORTS, PORTS_BACK, SYN, SYN_ACK, World};
use crate::{
    family::{Family as _, V4, V6},
    testing::{
        Action,
        build::{FOU, Ip, tunnel},
        scenario::{Hook, Scenario},
    },
};

const HOOK: Hook = Hook::Gateway;

pub(super) fn rows(w: &World) -> Vec<Scenario> {
    [passes(w), refused(w), opened(w), picked_up(w), known(w), ports(w), replies(w), sizes(w)].concat()
}

fn row(w: &World, name: &str, packet: &[u8]) -> Scenario {
    w.scenario(HOOK, name, packet)
}

fn masqueraded(w: &World) -> GatewayStat {
    if w.is_v4() { GatewayStat::MasqueradedV4 } else { GatewayStat::MasqueradedV6 }
}

fn reply(w: &World) -> GatewayStat {
    if w.is_v4() { GatewayStat::ReplyV4 } else { GatewayStat::ReplyV6 }
}

fn new_flow(w: &World) -> GatewayStat {
    if w.is_v4() { GatewayStat::NewFlowV4 } else { GatewayStat::NewFlowV6 }
}

fn passes(w: &World) -> Vec<Scenario> {
    let tcp = w.reply().tcp((443, 40000), ACK, &[], b"data");
    let mut arp = row(w, "not IP", &tcp);
    arp.packet.bytes[12..14].copy_from_slice(&[8, 6]);
    let mut bad = row(w, "bad version", &tcp);
    bad.packet.bytes[14] = 0;
    let mut short = tcp.clone();
    short[w.header() + 12] = 0x10;
    let mut rows = vec![
        arp.passes(),
        row(w, "not for this address", &Ip::new(w.remote, w.stranger).udp(PORTS, b"x")).passes(),
        row(w, "no translation", &tcp).drops(DropReason::UnknownReply),
        bad.passes(),
        row(w, "bad TCP header", &short).passes(),
        row(w, "fragment", &w.reply().fragment(8, false).packet(17, &[7; 64]))
            .drops(DropReason::FragmentUnknown),
        row(w, "first fragment of a tunnelled packet", &{
            let payload = w.to_gateway(&w.out().udp(PORTS, b"x"))[w.header()..].to_vec();
            Ip::new(w.pod, w.gateway).fragment(0, true).packet(17, &payload)
        })
        .drops(DropReason::OuterFragment),
        row(w, "other protocol", &w.reply().packet(132, &[1; 40])).passes(),
        row(w, "ICMP error about nothing", &w.reply().icmp(3, 1, [0; 4], &[9; 48]))
            .drops(DropReason::IcmpQuote),
        row(w, "echo request to the gateway", &w.reply().echo(true, 77, b"ping")).passes(),
        row(w, "echo reply to the gateway", &w.reply().echo(false, 77, b"ping")).passes(),
    ];
    let mut no_address = row(w, "gateway without an address of the family", &tcp);
    no_address.config.ipv4 = [0; 4];
    no_address.config.ipv6 = [0; 16];
    rows.push(no_address.passes());
    for length in 0..tcp.len() {
        let mut row = row(w, &format!("cut after {length} bytes of IP"), &tcp);
        row.packet.bytes.truncate(14 + length);
        if length < w.header() {
            row = row.library_only("test runs want a whole IP header");
        }
        rows.push(row.passes());
    }
    rows
}

fn refused(w: &World) -> Vec<Scenario> {
    let out = w.out();
    let inner = out.udp(PORTS, b"data");
    let outer = Ip::new(w.pod, w.gateway);
    let tunnelled = |inner: &[u8]| w.to_gateway(inner);
    let mut rows = vec![
        row(w, "unknown client", &tunnel(w.stranger, w.gateway, &inner)).drops(DropReason::UnknownClient),
        row(w, "unknown client, empty", &Ip::new(w.stranger, w.gateway).udp((FOU, FOU), b""))
            .drops(DropReason::UnknownClient),
        row(w, "inner source of another", &tunnelled(&Ip::new(w.stranger, w.remote).udp(PORTS, b"x")))
            .drops(DropReason::InnerSourceMismatch),
        row(w, "to the gateway itself", &tunnelled(&Ip::new(w.pod, w.gateway).udp(PORTS, b"x")))
            .drops(DropReason::ForbiddenDestination),
        row(w, "TCP without state", &tunnelled(&out.tcp(PORTS, ACK, &[], b"data")))
            .drops(DropReason::NoState),
        row(w, "SYN-ACK without state", &tunnelled(&out.tcp(PORTS, SYN_ACK, &[], b"")))
            .drops(DropReason::NoState),
        row(w, "RST without state", &tunnelled(&out.tcp(PORTS, 4, &[], b""))).drops(DropReason::NoState),
        row(w, "SYN and FIN", &tunnelled(&out.tcp(PORTS, SYN | 1, &[], b""))).drops(DropReason::NoState),
        row(w, "echo reply without state", &tunnelled(&out.echo(false, 77, b"ping")))
            .drops(DropReason::UnsupportedIcmp),
        row(w, "ICMP error about nothing from a client", &tunnelled(&out.icmp(3, 3, [0; 4], &[9; 48])))
            .drops(DropReason::IcmpQuote),
        row(w, "other protocol from a client", &tunnelled(&out.packet(132, &[1; 40])))
            .drops(DropReason::UnsupportedProtocol),
        row(w, "fragment from a client", &tunnelled(&out.clone().fragment(8, true).packet(17, &[7; 64])))
            .drops(DropReason::FragmentUnknown),
        row(w, "nothing inside", &outer.udp_unchecked((FOU, FOU), b"")).drops(DropReason::Truncated),
        row(w, "something else inside", &outer.udp_unchecked((FOU, FOU), &[0xff; 60]))
            .drops(DropReason::Malformed),
    ];
    let forbidden: &[&str] = if w.is_v4() {
        &["127.0.0.1", "0.0.0.0", "169.254.169.254", "224.0.0.1", "239.1.2.3", "255.255.255.255"]
    } else {
        &["::1", "::", "fe80::1", "febf::1", "ff02::1", "ff0e::1"]
    };
    for text in forbidden {
        if let Ok(dst) = text.parse::<IpAddr>() {
            rows.push(
                row(w, &format!("to {dst}"), &tunnelled(&Ip::new(w.pod, dst).udp(PORTS, b"x")))
                    .drops(DropReason::ForbiddenDestination),
            );
        }
    }
    for length in 0..inner.len() {
        let packet = outer.udp_unchecked((FOU, FOU), &inner[..length]);
        rows.push(
            row(w, &format!("cut after {length} bytes of the inner packet"), &packet)
                .drops(DropReason::Truncated),
        );
    }
    rows.extend(pieces(w));
    if !w.is_v4() {
        let mut routing = out.clone().extension(43, 24).packet(17, &inner[40..]);
        routing[43] = 1;
        rows.push(
            row(w, "routing header from a client", &tunnelled(&routing)).drops(DropReason::ExtensionHeaders),
        );
    }
    rows
}

/// A packet that makes a translation with its own port.
fn opens(w: &World, name: &str, inner: &[u8], leaves: &[u8], flow: Flow, state: u32) -> Scenario {
    let Flow { ports, protocol, port } = flow;
    row(w, name, &w.to_gateway(inner))
        .returns(leaves)
        .leaves(vec![
            w.forward(ports, protocol, port, Nat::one(state, inner)),
            w.reverse(ports, protocol, port, Nat::default()),
        ])
        .counts(masqueraded(w), 1, inner.len())
        .counts(new_flow(w), 1, 0)
}

#[derive(Clone, Copy)]
struct Flow {
    ports: (u16, u16),
    protocol: u8,
    port: u16,
}

/// What is in one piece and should not be.
fn pieces(w: &World) -> Vec<Scenario> {
    let inner = w.out().udp(PORTS, &[7; 300]);
    let halves = || {
        vec![
            w.forward(PORTS, 17, 50000, Nat::fresh(CONFIRMED)),
            w.reverse(PORTS, 17, 50000, Nat::fresh(STATE_REPLY)),
        ]
    };
    let mut rows = vec![
        row(w, "datagrams that nobody has cut", &w.to_gateway(&inner)).drops(DropReason::UncutDatagrams),
        row(w, "datagrams of a known flow that nobody has cut", &w.to_gateway(&inner))
            .and(halves())
            .leaves(halves())
            .drops(DropReason::UncutDatagrams),
    ];
    for row in &mut rows {
        (row.packet.gso_size, row.packet.gso_segments) = (100, 3);
    }
    let several = [inner.clone(), inner.clone(), inner].concat();
    let mut merged = row(w, "tunnelled packets that somebody has merged", &w.to_gateway(&several))
        .drops(DropReason::MergedTunnel);
    (merged.packet.gso_size, merged.packet.gso_segments) = (several.len() as u32 / 3, 3);
    rows.push(merged);
    rows
}

const TCP: Flow = Flow { ports: PORTS, protocol: 6, port: PORTS.0 };
const UDP: Flow = Flow { ports: PORTS, protocol: 17, port: PORTS.0 };

/// TCP from the middle of a connection, where that is picked up.
fn picked_up(w: &World) -> Vec<Scenario> {
    let (out, sent) = (w.out(), w.masqueraded());
    let (data, fin) = ((ACK, CONFIRMED), (ACK | 1, CONFIRMED | STATE_FIN));
    let opens = [("picked up: TCP without state", data), ("picked up: FIN without state", fin)].map(
        |(name, (flags, state))| {
            let (packet, leaves) =
                (out.tcp(PORTS, flags, &[], b"data"), sent.tcp(PORTS, flags, &[], b"data"));
            opens(w, name, &packet, &leaves, TCP, state)
        },
    );
    let refused = [("picked up: RST without state", 4), ("picked up: SYN-ACK without state", SYN_ACK)].map(
        |(name, flags)| {
            row(w, name, &w.to_gateway(&out.tcp(PORTS, flags, &[], b""))).drops(DropReason::NoState)
        },
    );
    let reply = Ip::new(w.remote, w.gateway).tcp(PORTS_BACK, ACK, &[], b"data");
    let stray = row(w, "picked up: nothing from the world", &reply).drops(DropReason::UnknownReply);
    let mut rows: Vec<_> = opens.into_iter().chain(refused).chain([stray]).collect();
    rows.iter_mut().for_each(|row| row.config.flags |= CONFIG_PICK_UP);
    rows
}

fn opened(w: &World) -> Vec<Scenario> {
    let (out, sent) = (w.out(), w.masqueraded());
    let echo = Flow { ports: (7777, 0), protocol: w.icmp(), port: 7777 };
    let mut rows = vec![
        opens(
            w,
            "SYN",
            &out.tcp(PORTS, SYN, &MSS_1460, b""),
            &sent.tcp(PORTS, SYN, &w.mss_option(), b""),
            TCP,
            STATE_SYN,
        ),
        opens(w, "UDP", &out.udp(PORTS, b"data"), &sent.udp(PORTS, b"data"), UDP, 0),
        opens(
            w,
            "UDP without checksum",
            &out.udp_unchecked(PORTS, b"data"),
            &sent.udp_unchecked(PORTS, b"data"),
            UDP,
            0,
        ),
        opens(w, "echo request", &out.echo(true, 7777, b"ping"), &sent.echo(true, 7777, b"ping"), echo, 0),
    ];
    for (outer, inner, wanted) in [(3, 1, 3), (3, 2, 3), (3, 0, 0), (2, 1, 1)] {
        let packet = out.clone().tos(inner).udp(PORTS, b"data");
        let leaves = sent.clone().tos(wanted).udp(PORTS, b"data");
        let mut row =
            opens(w, &format!("congestion {outer} outside, {inner} inside"), &packet, &leaves, UDP, 0);
        row.packet.bytes = crate::testing::build::ethernet(
            &Ip::new(w.pod, w.gateway).tos(outer).udp_unchecked((FOU, FOU), &packet),
        );
        rows.push(row);
    }
    if w.is_v4() {
        let packet = out.clone().options(&[1; 8]).udp(PORTS, b"data");
        let leaves = sent.clone().options(&[1; 8]).udp(PORTS, b"data");
        rows.push(opens(w, "IPv4 options", &packet, &leaves, UDP, 0));
    } else {
        let packet = out.clone().extension(0, 8).extension(60, 16).udp(PORTS, b"data");
        let leaves = sent.clone().extension(0, 8).extension(60, 16).udp(PORTS, b"data");
        rows.push(opens(w, "extension headers", &packet, &leaves, UDP, 0));
        let packet = out.udp(PORTS, b"data");
        let mut row = opens(w, "outer destination options", &packet, &sent.udp(PORTS, b"data"), UDP, 0);
        row.packet.bytes = crate::testing::build::ethernet(
            &Ip::new(w.pod, w.gateway).extension(60, 8).udp_unchecked((45678, FOU), &packet),
        );
        rows.push(row);
    }
    let packet = out.udp(PORTS, b"data");
    rows.push(
        row(w, "reverse table full", &w.to_gateway(&packet))
            .and(vec![w.reverse((1, 2), 17, 1, Nat::default())])
            .full(w.reverse_map(), 1)
            .leaves(vec![w.reverse((1, 2), 17, 1, Nat::default())])
            .prohibits(w, DropReason::NatTableFull, &packet),
    );
    rows.push(
        row(w, "forward table full: the port is given back", &w.to_gateway(&packet))
            .and(vec![w.forward((1, 2), 17, 1, Nat::default())])
            .full(w.forward_map(), 1)
            .leaves(vec![w.forward((1, 2), 17, 1, Nat::default())])
            .prohibits(w, DropReason::NatTableFull, &packet),
    );
    rows
}

/// A packet of a translation that exists under `port`.
fn goes_on(
    w: &World,
    name: &str,
    (inner, leaves): (&[u8], &[u8]),
    flow: Flow,
    state: (u32, u32),
) -> Scenario {
    let Flow { ports, protocol, port } = flow;
    let before = Nat { state: state.0, packets: 3, bytes: 300 };
    let after = Nat { state: state.1, packets: 4, bytes: 300 + inner.len() as u64 };
    let reverse = w.reverse(ports, protocol, port, Nat { state: STATE_REPLY, packets: 2, bytes: 9 });
    row(w, name, &w.to_gateway(inner))
        .and(vec![w.forward(ports, protocol, port, before), reverse.clone()])
        .returns(leaves)
        .leaves(vec![w.forward(ports, protocol, port, after), reverse])
        .counts(masqueraded(w), 1, inner.len())
}

fn known(w: &World) -> Vec<Scenario> {
    let (out, sent) = (w.out(), w.masqueraded());
    let other = (50000, PORTS.1);
    let moved = |flow: Flow| Flow { port: 50000, ..flow };
    let data = (out.tcp(PORTS, ACK, &[], b"data"), sent.tcp(other, ACK, &[], b"data"));
    let fin = (out.tcp(PORTS, ACK | 1, &[], b""), sent.tcp(PORTS, ACK | 1, &[], b""));
    let udp = (out.udp(PORTS, b"data"), sent.udp(other, b"data"));
    let unchecked = (out.udp_unchecked(PORTS, b"x"), sent.udp_unchecked(other, b"x"));
    let echo = (out.echo(true, 77, b"ping"), sent.echo(true, 50000, b"ping"));
    let echo_flow = Flow { ports: (77, 0), protocol: w.icmp(), port: 50000 };
    let syn = (
        out.tcp(PORTS, SYN, &[1, 2, 4, 5, 0xb4, 1, 1, 1], b""),
        sent.tcp(
            other,
            SYN,
            &{
                let [a, b] = w.mss().to_be_bytes();
                [1, 2, 4, a, b, 1, 1, 1]
            },
            b"",
        ),
    );
    let on = |name, pair: &(Vec<u8>, Vec<u8>), flow, state| goes_on(w, name, (&pair.0, &pair.1), flow, state);
    let mut rows = vec![
        on("TCP of a flow, other port", &data, moved(TCP), (STATE_SYN, STATE_SYN | CONFIRMED)),
        on("FIN of a flow", &fin, TCP, (CONFIRMED, CONFIRMED | STATE_FIN)),
        on("UDP of a flow, other port", &udp, moved(UDP), (0, CONFIRMED)),
        on("UDP without checksum, other port", &unchecked, moved(UDP), (0, CONFIRMED)),
        on("echo request of a flow, other identifier", &echo, echo_flow, (0, CONFIRMED)),
        on("SYN again, other port", &syn, moved(TCP), (STATE_SYN, STATE_SYN)),
    ];
    // A new connection over the ports of a closed one.
    let closed = Nat { state: CONFIRMED | STATE_SYN | STATE_FIN, packets: 3, bytes: 300 };
    let answered = Nat { state: STATE_REPLY | STATE_REPLY_FIN, packets: 2, bytes: 200 };
    let syn = out.tcp(PORTS, SYN, &[], b"");
    rows.push(
        row(w, "SYN over a closed flow", &w.to_gateway(&syn))
            .and(vec![w.forward(PORTS, 6, 50000, closed), w.reverse(PORTS, 6, 50000, answered)])
            .returns(&sent.tcp(other, SYN, &[], b""))
            .leaves(vec![
                w.forward(
                    PORTS,
                    6,
                    50000,
                    Nat { state: STATE_SYN, packets: 4, bytes: 300 + syn.len() as u64 },
                ),
                w.reverse(PORTS, 6, 50000, Nat { state: 0, ..answered }),
            ])
            .counts(masqueraded(w), 1, syn.len()),
    );
    // The other half is gone.
    let before = Nat { state: CONFIRMED, packets: 3, bytes: 300 };
    let after = Nat { packets: 4, bytes: 300 + udp.0.len() as u64, ..before };
    rows.push(
        row(w, "the reverse half is rebuilt", &w.to_gateway(&udp.0))
            .and(vec![w.forward(PORTS, 17, 50000, before)])
            .returns(&udp.1)
            .leaves(vec![w.forward(PORTS, 17, 50000, after), w.reverse(PORTS, 17, 50000, Nat::default())])
            .counts(masqueraded(w), 1, udp.0.len()),
    );
    rows.push(
        row(w, "the reverse half is gone and there is no room for it", &w.to_gateway(&udp.0))
            .and(vec![w.forward(PORTS, 17, 50000, before), w.reverse((1, 2), 17, 1, Nat::default())])
            .full(w.reverse_map(), 1)
            .leaves(vec![w.forward(PORTS, 17, 50000, before), w.reverse((1, 2), 17, 1, Nat::default())])
            .prohibits(w, DropReason::NatTableFull, &udp.0),
    );
    rows
}

fn ports(w: &World) -> Vec<Scenario> {
    let (out, sent) = (w.out(), w.masqueraded());
    let inner = out.udp(PORTS, b"data");
    let taken = |port: u16| w.reverse_of(w.stranger, (1, PORTS.1), 17, port, Nat::default());
    // In a range of two ports the free one is the only answer.
    let narrow = |name: &str, range: (u16, u16), before: Vec<_>, ports: (u16, u16), port: u16| {
        let inner = out.udp(ports, b"data");
        let mut left = before.clone();
        left.push(w.forward(ports, 17, port, Nat::one(0, &inner)));
        left.push(w.reverse(ports, 17, port, Nat::default()));
        let mut row = row(w, name, &w.to_gateway(&inner))
            .and(before)
            .returns(&sent.udp((port, ports.1), b"data"))
            .leaves(left)
            .counts(masqueraded(w), 1, inner.len())
            .counts(new_flow(w), 1, 0);
        row.config.nat_port_first = range.0;
        row.config.nat_port_last = range.1;
        row
    };
    let mut exhausted = row(w, "no port is free", &w.to_gateway(&inner))
        .and(vec![taken(40000)])
        .leaves(vec![taken(40000)])
        .prohibits(w, DropReason::PortsExhausted, &inner);
    exhausted.config.nat_port_first = 40000;
    exhausted.config.nat_port_last = 40000;
    let mut excluded_all = row(w, "all ports are excluded", &w.to_gateway(&inner)).prohibits(
        w,
        DropReason::PortsExhausted,
        &inner,
    );
    excluded_all.config.nat_port_first = 8080;
    excluded_all.config.nat_port_last = 8081;
    // Another flow got the port after the reverse half was lost.
    let before = Nat { state: CONFIRMED, packets: 3, bytes: 300 };
    let mut lost = row(w, "the reverse half belongs to another flow by now", &w.to_gateway(&inner))
        .and(vec![w.forward(PORTS, 17, 50000, before), taken(50001)])
        .returns(&sent.udp((50000, PORTS.1), b"data"))
        .leaves(vec![
            w.forward(PORTS, 17, 50000, Nat { packets: 4, bytes: 300 + inner.len() as u64, ..before }),
            taken(50001),
            w.reverse(PORTS, 17, 50000, Nat::default()),
        ])
        .counts(masqueraded(w), 1, inner.len());
    lost.name = format!("gateway {}: the reverse half is rebuilt beside another flow", w.name);
    vec![
        narrow("the port is taken", (40000, 40001), vec![taken(40000)], PORTS, 40001),
        narrow("the port is below the range", (40001, 40001), vec![], PORTS, 40001),
        narrow("the port is above the range", (39999, 39999), vec![], PORTS, 39999),
        narrow("the port is excluded", (8081, 8082), vec![], (8081, 443), 8082),
        narrow("the port is the first", (40000, 50000), vec![], PORTS, 40000),
        narrow("the port is the last", (30000, 40000), vec![], PORTS, 40000),
        narrow("the whole range", (0, 65535), vec![], PORTS, 40000),
        narrow(
            "the same port to another remote port is free",
            (40000, 40000),
            vec![w.reverse_of(w.stranger, (1, 80), 17, 40000, Nat::default())],
            PORTS,
            40000,
        ),
        narrow("the port was lost to another flow", (40000, 40001), vec![taken(40000)], PORTS, 40001)
            .and(vec![w.forward(PORTS, 17, 40000, before)]),
        lost,
        exhausted,
        excluded_all,
    ]
}

fn replies(w: &World) -> Vec<Scenario> {
    let world = w.reply();
    let inner = w.back().ttl(63);
    let back = |name: &str, packet: &[u8], becomes: &[u8], flow: Flow, state: u32| {
        let Flow { ports, protocol, port } = flow;
        let forward = w.forward(ports, protocol, port, Nat { state: 0, packets: 1, bytes: 50 });
        row(w, name, packet)
            .and(vec![forward.clone(), w.reverse(ports, protocol, port, Nat::default())])
            .returns(&w.to_client(becomes))
            .leaves(vec![forward, w.reverse(ports, protocol, port, Nat::one(STATE_REPLY | state, packet))])
            .counts(reply(w), 1, packet.len())
    };
    let (from, to) = ((443, 50000), (443, 40000));
    let tcp = Flow { port: 50000, ..TCP };
    let udp = Flow { port: 50000, ..UDP };
    let echo = Flow { ports: (77, 0), protocol: w.icmp(), port: 50000 };
    let data = world.tcp(from, ACK, &[], b"data");
    let mut rows = vec![
        back("TCP reply", &data, &inner.tcp(to, ACK, &[], b"data"), tcp, 0),
        back(
            "TCP reply, same port",
            &world.tcp(to, ACK, &[], b"data"),
            &inner.tcp(to, ACK, &[], b"data"),
            TCP,
            0,
        ),
        back(
            "SYN-ACK with a large MSS",
            &world.tcp(from, SYN_ACK, &MSS_1460, b""),
            &inner.tcp(to, SYN_ACK, &w.mss_option(), b""),
            tcp,
            0,
        ),
        back("FIN", &world.tcp(from, 17, &[], b""), &inner.tcp(to, 17, &[], b""), tcp, STATE_REPLY_FIN),
        back("UDP reply", &world.udp(from, b"data"), &inner.udp(to, b"data"), udp, 0),
        back(
            "UDP reply without checksum",
            &world.udp_unchecked(from, b"data"),
            &inner.udp_unchecked(to, b"data"),
            udp,
            0,
        ),
        back("echo reply", &world.echo(false, 50000, b"ping"), &inner.echo(false, 77, b"ping"), echo, 0),
    ];
    for tos in [1, 2, 3, 0xb8] {
        rows.push(back(
            &format!("type of service {tos:#x}"),
            &world.clone().tos(tos).udp(from, b"data"),
            &inner.clone().tos(tos).udp(to, b"data"),
            udp,
            0,
        ));
    }
    if w.is_v4() {
        rows.push(back(
            "reply with IPv4 options",
            &world.clone().options(&[1; 8]).udp(from, b"data"),
            &inner.clone().options(&[1; 8]).udp(to, b"data"),
            udp,
            0,
        ));
    } else {
        rows.push(back(
            "reply with an extension header",
            &world.clone().extension(60, 8).udp(from, b"data"),
            &inner.clone().extension(60, 8).udp(to, b"data"),
            udp,
            0,
        ));
    }
    // The forward half is gone.
    rows.push(
        row(w, "the forward half is rebuilt", &data)
            .and(vec![w.reverse(PORTS, 6, 50000, Nat::default())])
            .returns(&w.to_client(&inner.tcp(to, ACK, &[], b"data")))
            .leaves(vec![
                w.forward(PORTS, 6, 50000, Nat::fresh(0)),
                w.reverse(PORTS, 6, 50000, Nat::one(STATE_REPLY, &data)),
            ])
            .counts(reply(w), 1, data.len()),
    );
    let halves =
        || vec![w.forward(PORTS, 6, 50000, Nat::default()), w.reverse(PORTS, 6, 50000, Nat::default())];
    let fragment = world.clone().fragment(8, true).packet(6, &[7; 64]);
    rows.push(
        row(w, "fragment of a reply", &fragment)
            .and(halves())
            .leaves(halves())
            .drops(DropReason::FragmentUnknown),
    );
    rows.push(auto_port(w));
    rows
}

/// The outer source port of a reply follows the flow.
fn auto_port(w: &World) -> Scenario {
    use crate::{
        family::{addr4, addr6},
        flow::{AUTO_PORT_FIRST, AUTO_PORTS, Flow as Key},
    };
    let packet = w.reply().udp((443, 50000), b"data");
    let (a, b) = (443u16.to_be_bytes(), 50000u16.to_be_bytes());
    let hash = if w.is_v4() {
        let (src, dst) = (World::octets4(w.remote), World::octets4(w.gateway));
        Key::<V4>::new(&addr4(src), &addr4(dst), a, b, 17).hash(42)
    } else {
        let (src, dst) = (World::octets6(w.remote), World::octets6(w.gateway));
        Key::<V6>::new(&addr6(src), &addr6(dst), a, b, 17).hash(42)
    };
    let port = AUTO_PORT_FIRST + hash.below(AUTO_PORTS);
    let inner = w.back().ttl(63).udp((443, 40000), b"data");
    let forward = w.forward(PORTS, 17, 50000, Nat::default());
    let mut row = row(w, "outer source port follows the flow", &packet)
        .and(vec![forward.clone(), w.reverse(PORTS, 17, 50000, Nat::default())])
        .returns(&crate::testing::build::tunnel_from(w.gateway, w.pod, port, &inner))
        .leaves(vec![forward, w.reverse(PORTS, 17, 50000, Nat::one(STATE_REPLY, &packet))])
        .counts(reply(w), 1, packet.len());
    row.config.flags = CONFIG_SOURCE_PORT_AUTO;
    row
}

fn sizes(w: &World) -> Vec<Scenario> {
    let headers = w.header() + 8;
    let largest = usize::from(MTU - w.overhead());
    let from = (443, 50000);
    let halves =
        || vec![w.forward(PORTS, 17, 50000, Nat::default()), w.reverse(PORTS, 17, 50000, Nat::default())];
    let fits = w.reply().udp(from, &vec![7; largest - headers]);
    let exceeds = w.reply().udp(from, &vec![7; largest - headers + 1]);
    let mut ip = Ip::new(w.gateway, w.remote).tos(0xc0);
    ip.id = 0;
    ip.df = false;
    let [a, b] = (MTU - w.overhead()).to_be_bytes();
    let error = if w.is_v4() {
        ip.icmp(3, 4, [0, 0, a, b], &exceeds[..V4::QUOTE])
    } else {
        ip.icmp(2, 0, [0, 0, a, b], &exceeds[..V6::QUOTE])
    };
    let inner = w.back().ttl(63).udp((443, 40000), &vec![7; largest - headers]);
    let mut too_big =
        row(w, "reply that is too big", &exceeds).and(halves()).leaves(halves()).returns(&error);
    too_big.expect.drop = Some(DropReason::TooBig);
    too_big.expect.action = Action::Back;
    vec![
        row(w, "reply as big as can be", &fits)
            .and(halves())
            .returns(&w.to_client(&inner))
            .leaves(vec![
                w.forward(PORTS, 17, 50000, Nat::default()),
                w.reverse(PORTS, 17, 50000, Nat::one(STATE_REPLY, &fits)),
            ])
            .counts(reply(w), 1, fits.len()),
        too_big,
        row(w, "too big, but nobody's reply", &exceeds).drops(DropReason::UnknownReply),
        long_reply(w, 0),
        long_reply(w, 1),
    ]
}

/// A reply in one piece that is as long as the outer headers can say, or longer.
fn long_reply(w: &World, beyond: usize) -> Scenario {
    let repeated = w.header() + 20;
    let data = vec![7; 0xffff - usize::from(w.overhead()) - repeated + beyond];
    let size = usize::from(w.mss());
    let packet = w.reply().tcp((443, 50000), ACK, &[], &data);
    let halves =
        |reverse| vec![w.forward(PORTS, 6, 50000, Nat::default()), w.reverse(PORTS, 6, 50000, reverse)];
    let name = ["reply as long as a length can say", "reply that is longer than a length can say"][beyond];
    let mut row = row(w, name, &packet)
        .and(halves(Nat::default()))
        .library_only("test runs make GSO packets that no helper accepts");
    row.packet.gso_size = u32::try_from(size).unwrap_or(0);
    if beyond > 0 {
        let mut row = row.leaves(halves(Nat::default())).drops(DropReason::TooBig);
        row.expect.action = Action::Back;
        return row;
    }
    let segments = data.len().div_ceil(size);
    let bytes = packet.len() + (segments - 1) * repeated;
    let after = Nat { state: STATE_REPLY, packets: segments as u64, bytes: bytes as u64 };
    row.returns(&w.to_client(&w.back().ttl(63).tcp((443, 40000), ACK, &[], &data)))
        .leaves(halves(after))
        .counts(reply(w), segments as u64, bytes)
}
