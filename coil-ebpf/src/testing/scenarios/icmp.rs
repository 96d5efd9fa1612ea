//! ICMP errors on their way through the tunnel and the translation. What must come out is built from
//! nothing, checksums included.

use coil_common::stats::{Direction, DropReason, GatewayStat, IcmpStat};

use super::world::{ACK, MTU, Nat, PORTS, PORTS_BACK, World};
use crate::testing::{
    build::{FOU, Ip},
    entries::Entry,
    scenario::{Hook, Scenario},
};

/// The port that the world sees.
const PORT: u16 = 50000;

pub(super) fn rows(w: &World) -> Vec<Scenario> {
    [from_world(w), forged(w), from_client(w), from_pod(w), to_pod(w), underlay(w)].concat()
}

/// Types and codes: port unreachable, time exceeded, parameter problem, too big.
fn kinds(w: &World) -> [(&'static str, u8, u8); 4] {
    if w.is_v4() {
        [
            ("port unreachable", 3, 3),
            ("time exceeded", 11, 0),
            ("parameter problem", 12, 0),
            ("too big", 3, 4),
        ]
    } else {
        [("port unreachable", 1, 4), ("time exceeded", 3, 0), ("parameter problem", 4, 0), ("too big", 2, 0)]
    }
}

fn too_big(w: &World) -> (u8, u8) {
    if w.is_v4() { (3, 4) } else { (2, 0) }
}

fn unreachable(w: &World) -> (u8, u8) {
    if w.is_v4() { (3, 3) } else { (1, 4) }
}

/// Both halves of a flow of each protocol, under another port.
fn halves(w: &World) -> Vec<Entry> {
    let echo = (77, 0);
    [(PORTS, 6), (PORTS, 17), (echo, w.icmp())]
        .into_iter()
        .flat_map(|(ports, protocol)| {
            [
                w.forward(ports, protocol, PORT, Nat::default()),
                w.reverse(ports, protocol, PORT, Nat::default()),
            ]
        })
        .collect()
}

/// The same packet before and after translation, for each protocol.
fn pairs(w: &World, inside: &Ip, outside: &Ip, out: bool) -> Vec<(&'static str, Vec<u8>, Vec<u8>)> {
    let data: Vec<u8> = (0..=99).collect();
    let ports = |port| if out { (port, PORTS.1) } else { (PORTS.1, port) };
    let (near, far) = (ports(PORTS.0), ports(PORT));
    let mut pairs = vec![
        ("TCP", inside.tcp(near, ACK, &[], &data), outside.tcp(far, ACK, &[], &data)),
        ("UDP", inside.udp(near, &data), outside.udp(far, &data)),
        ("odd UDP", inside.udp(near, &data[..33]), outside.udp(far, &data[..33])),
        ("UDP without checksum", inside.udp_unchecked(near, &data), outside.udp_unchecked(far, &data)),
        ("echo", inside.echo(out, 77, &data), outside.echo(out, PORT, &data)),
    ];
    let (inside, outside) = if w.is_v4() {
        (inside.clone().options(&[1; 8]), outside.clone().options(&[1; 8]))
    } else {
        (inside.clone().extension(0, 8).extension(60, 16), outside.clone().extension(0, 8).extension(60, 16))
    };
    pairs.push(("UDP with options", inside.udp(near, &data), outside.udp(far, &data)));
    let (inside, outside) = (inside.clone().fragment(0, true), outside.clone().fragment(0, true));
    pairs.push(("a first fragment", inside.udp(near, &data), outside.udp(far, &data)));
    pairs
}

/// How much of a packet is quoted: eight bytes after its header, not quite a TCP header, all.
fn cuts(w: &World, packet: &[u8]) -> [usize; 4] {
    let header = packet.len().min(w.header() + 8);
    [header, w.header() + 16, w.header() + 18, packet.len()]
}

fn row(w: &World, name: &str, packet: &[u8]) -> Scenario {
    w.scenario(Hook::Gateway, name, packet).and(halves(w)).leaves(halves(w))
}

fn reply(w: &World) -> GatewayStat {
    if w.is_v4() { GatewayStat::ReplyV4 } else { GatewayStat::ReplyV6 }
}

fn masqueraded(w: &World) -> GatewayStat {
    if w.is_v4() { GatewayStat::MasqueradedV4 } else { GatewayStat::MasqueradedV6 }
}

/// From a router or the remote host to the gateway.
fn from_world(w: &World) -> Vec<Scenario> {
    let mut rows = Vec::new();
    let translated = |name: &str, error: Vec<u8>, wanted: Vec<u8>| {
        row(w, name, &error)
            .returns(&w.to_client(&wanted))
            .counts(reply(w), 1, error.len())
            .counts_icmp(IcmpStat::ToPod)
    };
    for (who, from) in [("a router", w.stranger), ("the remote", w.remote)] {
        let (outer, inner) = (Ip::new(from, w.gateway), Ip::new(from, w.pod).ttl(63));
        for (kind_name, kind, code) in kinds(w) {
            for (protocol, inside, outside) in pairs(w, &w.out().ttl(1), &w.masqueraded().ttl(1), true) {
                for length in cuts(w, &outside) {
                    // Options in front of the ports.
                    if protocol.ends_with("options") && length < outside.len() {
                        continue;
                    }
                    if protocol.ends_with("fragment") && length < outside.len() {
                        continue;
                    }
                    let rest = [0, 0, 5, 0];
                    rows.push(translated(
                        &format!("{kind_name} from {who} about {protocol}, {length} bytes"),
                        outer.icmp(kind, code, rest, &outside[..length]),
                        inner.icmp(kind, code, rest, &inside[..length]),
                    ));
                }
            }
        }
    }
    // The tunnel has less room than the link far away.
    let (kind, code) = too_big(w);
    let (outer, inner) = (Ip::new(w.stranger, w.gateway), Ip::new(w.stranger, w.pod).ttl(63));
    let (outside, inside) = (w.masqueraded().udp((PORT, 443), b"x"), w.out().ttl(63).udp(PORTS, b"x"));
    let most = MTU - w.overhead();
    for (mtu, wanted) in [(most - 1, most - 1), (most, most), (most + 1, most), (MTU, most), (9000, most)] {
        let word = |mtu: u16| {
            let [a, b] = mtu.to_be_bytes();
            [0, 0, a, b]
        };
        rows.push(translated(
            &format!("too big for {mtu}"),
            outer.icmp(kind, code, word(mtu), &outside),
            inner.icmp(kind, code, word(wanted), &inside),
        ));
    }
    // Extensions after the quote (RFC 4884): 128 bytes of quote, then an object.
    let (kind, code) = if w.is_v4() { (11, 0) } else { (3, 0) };
    let pad = |packet: &[u8]| {
        let mut quote = packet.to_vec();
        quote.resize(128, 0);
        quote.extend_from_slice(&[0x20, 0, 0xaa, 0xbb, 0, 8, 1, 1, 1, 2, 3, 4]);
        quote
    };
    let length = if w.is_v4() { [0, 32, 0, 0] } else { [16, 0, 0, 0] };
    rows.push(translated(
        "time exceeded with extensions",
        outer.icmp(kind, code, length, &pad(&outside)),
        inner.icmp(kind, code, length, &pad(&inside)),
    ));
    rows
}

/// Errors that are not what they say.
fn forged(w: &World) -> Vec<Scenario> {
    let (kind, code) = unreachable(w);
    let error = |from, to, quote: &[u8]| Ip::new(from, to).icmp(kind, code, [0; 4], quote);
    let to_gateway = |quote: &[u8]| error(w.stranger, w.gateway, quote);
    let known = w.masqueraded().udp((PORT, 443), b"x");
    let later = w.masqueraded().fragment(8, false).packet(17, &[7; 64]);
    let mut rows = vec![
        row(w, "error about no flow", &to_gateway(&w.masqueraded().udp((PORT + 1, 443), b"x")))
            .drops(DropReason::IcmpNoFlow),
        row(w, "error about a flow to another port", &to_gateway(&w.masqueraded().udp((PORT, 444), b"x")))
            .drops(DropReason::IcmpNoFlow),
        row(
            w,
            "error about a flow to another host",
            &to_gateway(&Ip::new(w.gateway, w.inside).udp((PORT, 443), b"x")),
        )
        .drops(DropReason::IcmpNoFlow),
        row(w, "error about the gateway's own port", &to_gateway(&w.masqueraded().udp((8080, 443), b"x")))
            .passes(),
        row(w, "error about a packet of another", &to_gateway(&w.out().udp(PORTS, b"x")))
            .drops(DropReason::IcmpMismatch),
        row(w, "error about a later fragment", &to_gateway(&later)).drops(DropReason::IcmpQuoteFragment),
        row(w, "error about another protocol", &to_gateway(&w.masqueraded().packet(132, &[1; 40])))
            .drops(DropReason::IcmpQuote),
        row(w, "error about an error", &to_gateway(&w.masqueraded().icmp(kind, code, [0; 4], &known)))
            .drops(DropReason::IcmpQuote),
        row(w, "error with too short a quote", &to_gateway(&known[..w.header() + 7]))
            .drops(DropReason::IcmpQuote),
        row(w, "error with half an IP header", &to_gateway(&known[..w.header() - 1]))
            .drops(DropReason::IcmpQuote),
        row(w, "error without a quote", &to_gateway(b"")).drops(DropReason::IcmpQuote),
        row(w, "error with TTL 1", &Ip::new(w.stranger, w.gateway).ttl(1).icmp(kind, code, [0; 4], &known))
            .drops(DropReason::TtlExceeded),
        row(
            w,
            "error in fragments",
            &Ip::new(w.stranger, w.gateway).fragment(0, true).icmp(kind, code, [0; 4], &known),
        )
        .drops(DropReason::Fragment),
        row(w, "error that is too big", &to_gateway(&w.masqueraded().udp((PORT, 443), &[7; 1440])))
            .drops(DropReason::TooBig),
        row(w, "error to somebody else", &error(w.stranger, w.remote, &known)).passes(),
    ];
    let redirect = if w.is_v4() { (5, 1) } else { (137, 0) };
    rows.push(
        row(w, "redirect", &Ip::new(w.stranger, w.gateway).icmp(redirect.0, redirect.1, [0; 4], &known))
            .passes(),
    );
    rows
}

/// From a client, through the tunnel.
fn from_client(w: &World) -> Vec<Scenario> {
    let (kind, code) = unreachable(w);
    let mut rows = Vec::new();
    for (protocol, inside, outside) in pairs(w, &w.back().ttl(62), &w.reply().ttl(62), false) {
        for length in [inside.len(), w.header() + 8] {
            if length < inside.len() && (protocol.ends_with("options") || protocol.ends_with("fragment")) {
                continue;
            }
            let error = w.out().icmp(kind, code, [0; 4], &inside[..length]);
            let wanted = w.masqueraded().icmp(kind, code, [0; 4], &outside[..length]);
            rows.push(
                row(
                    w,
                    &format!("port unreachable from a client about {protocol}, {length} bytes"),
                    &w.to_gateway(&error),
                )
                .returns(&wanted)
                .counts(masqueraded(w), 1, error.len())
                .counts_icmp(IcmpStat::FromPod),
            );
        }
    }
    let about = |quote: &[u8]| w.to_gateway(&w.out().icmp(kind, code, [0; 4], quote));
    let known = w.back().udp(PORTS_BACK, b"x");
    rows.extend([
        row(w, "error from a client about no flow", &about(&w.back().udp((444, 40000), b"x")))
            .drops(DropReason::IcmpNoFlow),
        row(w, "error from a client about its own packet", &about(&w.out().udp(PORTS, b"x")))
            .drops(DropReason::IcmpMismatch),
        row(
            w,
            "error from a client to another host",
            &w.to_gateway(&Ip::new(w.pod, w.inside).icmp(kind, code, [0; 4], &known)),
        )
        .drops(DropReason::IcmpMismatch),
        row(
            w,
            "error from a client with TTL 1",
            &w.to_gateway(&w.out().ttl(1).icmp(kind, code, [0; 4], &known)),
        )
        .drops(DropReason::TtlExceeded),
    ]);
    rows
}

/// From a pod of this node.
fn from_pod(w: &World) -> Vec<Scenario> {
    let (kind, code) = unreachable(w);
    let row = |name: &str, packet: &[u8]| w.scenario(Hook::FromPod, name, packet);
    let known = w.back().udp(PORTS_BACK, b"data");
    let flow = || vec![w.flow_entry((w.pod, w.remote, PORTS, 17), w.flow_value())];
    let error = w.out().icmp(kind, code, [0; 4], &known);
    vec![
        row("port unreachable", &error)
            .and(flow())
            .becomes(&w.to_gateway(&error))
            .leaves(flow())
            .counts_egress(w.egress(), Direction::Tx, &error)
            .counts_icmp(IcmpStat::FromPod),
        row("error about no flow", &error).drops(DropReason::IcmpNoFlow),
        row("error about a packet to another", &w.out().icmp(kind, code, [0; 4], &w.out().udp(PORTS, b"x")))
            .and(flow())
            .leaves(flow())
            .drops(DropReason::IcmpMismatch),
        row("error that goes directly", &Ip::new(w.pod, w.inside).icmp(kind, code, [0; 4], &known)).passes(),
    ]
}

/// To a pod, in the tunnel.
fn to_pod(w: &World) -> Vec<Scenario> {
    let (kind, code) = unreachable(w);
    let error = Ip::new(w.stranger, w.pod).icmp(kind, code, [0; 4], &w.out().udp(PORTS, b"data"));
    let flow = || vec![w.flow_entry((w.pod, w.remote, PORTS, 17), w.flow_value())];
    vec![
        w.scenario(Hook::ToPod, "port unreachable of a flow", &w.to_client(&error))
            .and(flow())
            .becomes(&error)
            .leaves(flow())
            .counts_egress(w.egress(), Direction::Rx, &error)
            .counts_icmp(IcmpStat::ToPod),
    ]
}

/// About tunnelled packets, from the network between pod and gateway.
fn underlay(w: &World) -> Vec<Scenario> {
    let (kind, code) = too_big(w);
    let overhead = w.overhead();
    let word = |mtu: u16| {
        let [a, b] = mtu.to_be_bytes();
        [0, 0, a, b]
    };
    let least = if w.is_v4() { 68 } else { 1280 };
    let mut rows = Vec::new();
    let tcp = w.out().tcp(PORTS, ACK, &[], &[7; 300]);
    let flow = || vec![w.flow_entry((w.pod, w.remote, PORTS, 6), w.flow_value())];
    let to_pod = |name: &str, mtu, quote: &[u8]| {
        let error = Ip::new(w.stranger, w.pod).icmp(kind, code, word(mtu), quote);
        w.scenario(Hook::ToPod, name, &error).and(flow()).leaves(flow())
    };
    let outer = w.to_gateway(&tcp);
    let start = usize::from(overhead);
    for (mtu, wanted) in
        [(1400, 1400 - overhead), (overhead + least - 1, least), (0, (576 - overhead).max(least))]
    {
        for length in [outer.len(), start + w.header() + 8] {
            let quoted = &outer[start..length];
            let mut row =
                to_pod(&format!("tunnelled packet too big for {mtu}, {length} bytes"), mtu, &outer[..length])
                    .becomes(&w.error(w.remote, w.pod, [kind, code], wanted, quoted))
                    .counts_icmp(IcmpStat::Answered);
            row.expect.drop = Some(DropReason::UnderlayTooBig);
            rows.push(row);
        }
    }
    let other = w.out().tcp((1, 2), ACK, &[], b"x");
    rows.extend([
        to_pod("tunnelled packet too big, of no flow", 1400, &w.to_gateway(&other))
            .drops(DropReason::IcmpNoFlow),
        to_pod("tunnelled packet too big, only the tunnel is quoted", 1400, &outer[..start])
            .drops(DropReason::IcmpQuote),
        to_pod(
            "packet too big to a stranger",
            1400,
            &Ip::new(w.pod, w.stranger).udp_unchecked((FOU, FOU), &tcp),
        )
        .passes(),
        to_pod("packet too big that is not tunnelled", 1400, &w.out().udp(PORTS, b"x")).passes(),
    ]);
    let row = |name: &str, mtu, quote: &[u8]| {
        row(w, name, &Ip::new(w.stranger, w.gateway).icmp(kind, code, word(mtu), quote))
    };
    for (protocol, inside, outside) in pairs(w, &w.back().ttl(63), &w.reply().ttl(63), false) {
        rows.push(
            row(&format!("tunnelled {protocol} to a client is too big"), 1400, &w.to_client(&inside))
                .answers(
                    DropReason::UnderlayTooBig,
                    &w.error(w.gateway, w.remote, [kind, code], 1400 - overhead, &outside),
                ),
        );
    }
    rows.extend([
        row(
            "tunnelled packet of no flow to a client is too big",
            1400,
            &w.to_client(&w.back().udp((1, 2), b"x")),
        )
        .drops(DropReason::IcmpNoFlow),
        row("packet in the tunnel to a stranger is too big", 1400, &{
            let inner = w.back().udp(PORTS_BACK, b"x");
            Ip::new(w.gateway, w.stranger).udp_unchecked((FOU, FOU), &inner)
        })
        .passes(),
    ]);
    rows
}
