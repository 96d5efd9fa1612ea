//! Fragments: first ones are noted, later ones follow.

use coil_common::{
    config::FRAGMENT_TIMEOUT,
    stats::{Direction, DropReason, GatewayStat},
    values::{FRAGMENT_OPEN, FlowValue, STATE_REPLY},
};

use super::world::{ACK, CONFIRMED, MTU, NOW, Nat, PORTS, PORTS_BACK, World, sent};
use crate::testing::{
    build::Ip,
    entries::{Entry, Value},
    scenario::{Hook, Scenario},
};

/// The port that the world sees.
const PORT: u16 = 50000;
const UDP: u8 = 17;

pub(super) fn rows(w: &World) -> Vec<Scenario> {
    let mut rows = [from_pod(w), to_pod(w), out(w), back(w), others(w, true), others(w, false)].concat();
    if !w.is_v4() {
        rows.extend(behind(w));
    }
    rows
}

/// IPv6 packets that end before the header that would make them fragments: what follows is padding.
fn behind(w: &World) -> Vec<Scenario> {
    // A first fragment whose next header is longer than it.
    let mut broken = w.reply();
    broken.extensions = vec![(44, vec![0, 0, 0, 1, 0, 0, 0, 9]), (60, vec![0, 9, 1, 4, 0, 0, 0, 0])];
    // One with more headers than are looked at, of a datagram that is known: it does not follow itself.
    let mut long = w.out();
    long.extensions = vec![(44, vec![0, 0, 0, 1, 0, 0, 0, 9])];
    let long = (0..4).fold(long, |ip, _| ip.extension(60, 8)).udp(PORTS, b"x");
    let flow = w.flow_entry((w.pod, w.remote, PORTS, UDP), w.flow_value());
    let known = vec![flow, w.datagram(w.pod, w.remote, PORTS, UDP, FRAGMENT_OPEN)];
    let ends = |ip: Ip| [ip.packet(44, &[]), vec![UDP, 0, 0, 8, 0, 0, 0, 9]].concat();
    vec![
        w.scenario(Hook::FromPod, "fragment header behind the end", &ends(w.out()))
            .drops(DropReason::Malformed),
        w.scenario(Hook::FromPod, "first fragment with too many headers", &long)
            .and(known.clone())
            .leaves(known)
            .drops(DropReason::ExtensionHeaders),
        w.scenario(Hook::Gateway, "fragment header behind the end", &ends(w.reply())).passes(),
        w.scenario(Hook::Gateway, "first fragment with a broken header", &broken.udp((PORTS.1, PORT), b"x"))
            .passes(),
    ]
}

/// A datagram in three fragments: the first has header and checksum of the whole.
fn pieces(ip: &Ip, ports: (u16, u16)) -> [Vec<u8>; 3] {
    cut(ip, UDP, &ip.udp(ports, &data()))
}

fn data() -> Vec<u8> {
    (0..200).collect()
}

/// The packet `whole` of `ip` in three fragments.
fn cut(ip: &Ip, protocol: u8, whole: &[u8]) -> [Vec<u8>; 3] {
    let header = if ip.src.is_ipv4() { 20 } else { 40 };
    let whole = &whole[header..];
    [
        ip.clone().fragment(0, true).packet(protocol, &whole[..80]),
        ip.clone().fragment(10, true).packet(protocol, &whole[80..160]),
        ip.clone().fragment(20, false).packet(protocol, &whole[160..]),
    ]
}

/// The same entry, noted so many seconds ago.
fn aged(mut entry: Entry, seconds: u32) -> Entry {
    let mut value: coil_common::values::FragmentValue = entry.value.read();
    value.seen = NOW - seconds;
    entry.value = Value::of(&value);
    entry
}

fn from_pod(w: &World) -> Vec<Scenario> {
    let row = |name: &str, packet: &[u8]| w.scenario(Hook::FromPod, name, packet);
    let [first, second, third] = pieces(&w.out(), PORTS);
    let flow = |value| w.flow_entry((w.pod, w.remote, PORTS, UDP), value);
    let noted = |flags| w.datagram(w.pod, w.remote, PORTS, UDP, flags);
    let follows = |name: &str, packet: &[u8], before: Entry, flags| {
        row(name, packet)
            .and(vec![flow(w.flow_value()), before])
            .becomes(&w.to_gateway(packet))
            .leaves(vec![flow(sent(w.flow_value(), packet, 0)), noted(flags)])
            .counts_egress(w.egress(), Direction::Tx, packet)
    };
    let left = |packet: &[u8], name: &str, before: Entry| {
        row(name, packet)
            .and(vec![flow(w.flow_value()), before.clone()])
            .leaves(vec![flow(w.flow_value()), before])
            .drops(DropReason::FragmentUnknown)
    };
    let large = usize::from(MTU - w.overhead()) - w.header();
    let too_big = w.out().fragment(10, false).packet(UDP, &vec![7; large + 8]);
    let inside = Ip::new(w.pod, w.inside);
    vec![
        row("first fragment", &first)
            .becomes(&w.to_gateway(&first))
            .leaves(vec![flow(sent(w.flow_value(), &first, 0)), noted(FRAGMENT_OPEN)])
            .counts_egress(w.egress(), Direction::Tx, &first),
        follows("fragment in the middle", &second, noted(FRAGMENT_OPEN), FRAGMENT_OPEN),
        follows("last fragment", &third, noted(FRAGMENT_OPEN), 0),
        follows("fragment after the last", &second, noted(0), 0),
        left(&second, "fragment of an old datagram", aged(noted(FRAGMENT_OPEN), 7)),
        left(&second, "fragment before the first", w.datagram(w.pod, w.stranger, PORTS, UDP, 1)),
        {
            let before = aged(noted(FRAGMENT_OPEN), 7);
            let mut row =
                follows("fragment of an old datagram, known for longer", &second, before, FRAGMENT_OPEN);
            row.config.timeouts[FRAGMENT_TIMEOUT] = 7;
            row
        },
        row("fragment of a datagram whose flow is gone", &second)
            .and(vec![noted(FRAGMENT_OPEN)])
            .leaves(vec![noted(FRAGMENT_OPEN)])
            .drops(DropReason::FragmentUnknown),
        row("fragment of a flow whose decision is old", &second)
            .and(vec![flow(FlowValue { set: 1, ..w.flow_value() }), noted(FRAGMENT_OPEN)])
            .leaves(vec![flow(FlowValue { set: 1, ..w.flow_value() }), noted(FRAGMENT_OPEN)])
            .drops(DropReason::FragmentUnknown),
        row("later fragment that is too big", &too_big)
            .and(vec![flow(w.flow_value()), noted(FRAGMENT_OPEN)])
            .leaves(vec![flow(w.flow_value()), noted(0)])
            .drops(DropReason::TooBig),
        row("first fragment without a whole header", &w.out().fragment(0, true).packet(UDP, &[0; 7]))
            .drops(DropReason::Truncated),
        row("first fragment without a whole TCP header", &w.out().fragment(0, true).packet(6, &[0; 16]))
            .drops(DropReason::Truncated),
        row(
            "fragment of a blocked destination",
            &Ip::new(w.pod, w.blocked).fragment(8, true).packet(UDP, &[7; 64]),
        )
        .drops(DropReason::EgressUnresolved),
        row("spoofed first fragment", &pieces(&Ip::new(w.stranger, w.remote), PORTS)[0])
            .drops(DropReason::SpoofedSource),
        row("spoofed fragment", &Ip::new(w.stranger, w.remote).fragment(8, true).packet(UDP, &[7; 64]))
            .drops(DropReason::SpoofedSource),
        row("last direct fragment", &inside.fragment(8, false).packet(UDP, &[7; 64])).passes(),
    ]
}

fn to_pod(w: &World) -> Vec<Scenario> {
    let row = |name: &str, packet: &[u8]| w.scenario(Hook::ToPod, name, &w.to_client(packet));
    let [first, second, third] = pieces(&w.back(), PORTS_BACK);
    let flow = |value| w.flow_entry((w.pod, w.remote, PORTS, UDP), value);
    let noted = |flags| w.datagram(w.remote, w.pod, PORTS_BACK, UDP, flags);
    let received = |packet: &[u8], state| FlowValue {
        rx_packets: 1,
        rx_bytes: packet.len() as u64,
        state,
        ..w.flow_value()
    };
    let arrives = |name: &str, packet: &[u8], before: Vec<Entry>, state, flags| {
        row(name, packet)
            .and(vec![flow(w.flow_value())])
            .and(before)
            .becomes(packet)
            .leaves(vec![flow(received(packet, state)), noted(flags)])
            .counts_egress(w.egress(), Direction::Rx, packet)
    };
    vec![
        arrives("first fragment", &first, vec![], STATE_REPLY, FRAGMENT_OPEN),
        arrives("fragment in the middle", &second, vec![noted(FRAGMENT_OPEN)], 0, FRAGMENT_OPEN),
        arrives("last fragment", &third, vec![noted(FRAGMENT_OPEN)], 0, 0),
        row("fragment before the first", &second)
            .and(vec![flow(w.flow_value())])
            .becomes(&second)
            .leaves(vec![flow(w.flow_value())]),
        w.scenario(Hook::ToPod, "fragment that is not tunnelled", &first).passes(),
    ]
}

fn halves(w: &World, forward: Nat, reverse: Nat) -> Vec<Entry> {
    vec![w.forward(PORTS, UDP, PORT, forward), w.reverse(PORTS, UDP, PORT, reverse)]
}

fn out(w: &World) -> Vec<Scenario> {
    let row = |name: &str, packet: &[u8]| w.scenario(Hook::Gateway, name, &w.to_gateway(packet));
    let inside = pieces(&w.out(), PORTS);
    let outside = pieces(&w.masqueraded(), (PORT, PORTS.1));
    let noted = |flags| w.datagram(w.pod, w.remote, PORTS, UDP, flags);
    let stat = if w.is_v4() { GatewayStat::MasqueradedV4 } else { GatewayStat::MasqueradedV6 };
    let new = if w.is_v4() { GatewayStat::NewFlowV4 } else { GatewayStat::NewFlowV6 };
    let goes = |name: &str, index: usize, flags, state, before: Vec<Entry>| {
        let packet = &inside[index];
        let mut left = halves(w, Nat::one(state, packet), Nat::default());
        left.push(noted(flags));
        row(name, packet)
            .and(halves(w, Nat::default(), Nat::default()))
            .and(before)
            .returns(&outside[index])
            .leaves(left)
            .counts(stat, 1, packet.len())
    };
    let known = || halves(w, Nat::default(), Nat::default());
    let same = pieces(&w.masqueraded(), PORTS);
    let left = vec![
        w.forward(PORTS, UDP, PORTS.0, Nat::one(0, &inside[0])),
        w.reverse(PORTS, UDP, PORTS.0, Nat::default()),
        noted(FRAGMENT_OPEN),
    ];
    let orphan = w.out().fragment(8, true).packet(UDP, &[7; 64]);
    vec![
        row("first fragment of a new flow", &inside[0])
            .returns(&same[0])
            .leaves(left)
            .counts(stat, 1, inside[0].len())
            .counts(new, 1, 0),
        goes("first fragment of a flow", 0, FRAGMENT_OPEN, 0, vec![]),
        goes("fragment in the middle", 1, FRAGMENT_OPEN, 0, vec![noted(FRAGMENT_OPEN)]),
        goes("last fragment", 2, 0, 0, vec![noted(FRAGMENT_OPEN)]),
        goes(
            "the first fragment again, with other ports before",
            0,
            FRAGMENT_OPEN,
            0,
            vec![w.datagram(w.pod, w.remote, (1, 2), UDP, FRAGMENT_OPEN)],
        ),
        row("fragment before the first", &orphan)
            .and(known())
            .leaves(known())
            .drops(DropReason::FragmentUnknown),
        row("fragment with TTL 1", &{
            let [_, second, _] = pieces(&w.out().ttl(1), PORTS);
            second
        })
        .and(known())
        .and(vec![noted(FRAGMENT_OPEN)])
        .leaves([known(), vec![noted(FRAGMENT_OPEN)]].concat())
        .drops(DropReason::TtlExceeded),
        row("first fragment with TTL 1", &{
            let [first, _, _] = pieces(&w.out().ttl(1), PORTS);
            first
        })
        .answers(DropReason::TtlExceeded, &{
            let [first, _, _] = pieces(&w.out().ttl(1), PORTS);
            let kind = if w.is_v4() { [11, 0] } else { [3, 0] };
            w.to_client(&w.error(w.gateway, w.pod, kind, 0, &first))
        }),
    ]
}

fn back(w: &World) -> Vec<Scenario> {
    let row = |name: &str, packet: &[u8]| w.scenario(Hook::Gateway, name, packet);
    let outside = pieces(&w.reply(), (PORTS.1, PORT));
    let inside = pieces(&w.back().ttl(63), PORTS_BACK);
    let noted = |flags| w.datagram(w.remote, w.gateway, (PORTS.1, PORT), UDP, flags);
    let stat = if w.is_v4() { GatewayStat::ReplyV4 } else { GatewayStat::ReplyV6 };
    let known = || halves(w, Nat::default(), Nat::default());
    let comes = |name: &str, index: usize, state, flags, before: Vec<Entry>| {
        let packet = &outside[index];
        let mut left = halves(w, Nat::default(), Nat::one(state, packet));
        left.push(noted(flags));
        row(name, packet).and(known()).and(before).returns(&w.to_client(&inside[index])).leaves(left).counts(
            stat,
            1,
            packet.len(),
        )
    };
    // A flow of another client to the same remote.
    let other = || w.reverse_of(w.stranger, (1, PORTS.1), UDP, PORT + 1, Nat::default());
    let others = |flags| w.datagram(w.remote, w.gateway, (PORTS.1, PORT + 1), UDP, flags);
    let taken = |name: &str, before: Entry| {
        let mut row = comes(name, 0, STATE_REPLY, FRAGMENT_OPEN, vec![other(), before]);
        row.expect.entries.push(other());
        row
    };
    let own = pieces(&w.reply(), (53, 8080));
    let own_noted = |flags| w.datagram(w.remote, w.gateway, (53, 8080), UDP, flags);
    let large = usize::from(MTU - w.overhead()) - w.header();
    let too_big = w.reply().fragment(10, false).packet(UDP, &vec![7; large + 8]);
    vec![
        comes("first fragment of a reply", 0, STATE_REPLY, FRAGMENT_OPEN, vec![]),
        comes("fragment in the middle of a reply", 1, 0, FRAGMENT_OPEN, vec![noted(FRAGMENT_OPEN)]),
        comes("last fragment of a reply", 2, 0, 0, vec![noted(FRAGMENT_OPEN)]),
        row("fragment of a reply before the first", &outside[1])
            .and(known())
            .leaves(known())
            .drops(DropReason::FragmentUnknown),
        row("first fragment of a reply over the datagram of another client", &outside[0])
            .and(known())
            .and(vec![other(), others(FRAGMENT_OPEN)])
            .leaves([known(), vec![other(), others(FRAGMENT_OPEN)]].concat())
            .drops(DropReason::FragmentConflict),
        taken("first fragment of a reply after the datagram of another client", others(0)),
        taken("first fragment of a reply over an old datagram", aged(others(FRAGMENT_OPEN), 3)),
        row("later fragment of a reply that is too big", &too_big)
            .and(known())
            .and(vec![noted(FRAGMENT_OPEN)])
            .leaves([known(), vec![noted(0)]].concat())
            .drops(DropReason::TooBig),
        row("first fragment to the gateway", &own[0]).leaves(vec![own_noted(FRAGMENT_OPEN)]).passes(),
        row("last fragment to the gateway", &own[2])
            .and(vec![own_noted(FRAGMENT_OPEN)])
            .leaves(vec![own_noted(0)])
            .passes(),
    ]
}

/// Echoes, or segments of TCP, which are cut like datagrams: out of the pod, out of the gateway, and back.
fn others(w: &World, echo: bool) -> Vec<Scenario> {
    let (what, protocol, own, state) =
        if echo { ("an echo", w.icmp(), (77, 0), 0) } else { ("a segment", 6, PORTS, CONFIRMED) };
    let asks = |ip: &Ip, port: u16| {
        let whole =
            if echo { ip.echo(true, port, &data()) } else { ip.tcp((port, PORTS.1), ACK, &[], &data()) };
        cut(ip, protocol, &whole)
    };
    let answers = |ip: &Ip, port: u16| {
        let whole =
            if echo { ip.echo(false, port, &data()) } else { ip.tcp((PORTS.1, port), ACK, &[], &data()) };
        cut(ip, protocol, &whole)
    };
    let (v4, v6) = (
        (GatewayStat::MasqueradedV4, GatewayStat::ReplyV4),
        (GatewayStat::MasqueradedV6, GatewayStat::ReplyV6),
    );
    let (masqueraded, reply) = if w.is_v4() { v4 } else { v6 };
    let halves = |forward, reverse| {
        vec![w.forward(own, protocol, PORT, forward), w.reverse(own, protocol, PORT, reverse)]
    };
    let known = || halves(Nat::default(), Nat::default());
    let flow = |value| w.flow_entry((w.pod, w.remote, own, protocol), value);
    let asked = asks(&w.out(), own.0);
    let translated = asks(&w.masqueraded(), PORT);
    let answered = answers(&w.reply(), PORT);
    let received = answers(&w.back().ttl(63), own.0);
    let from_client = |flags| w.datagram(w.pod, w.remote, own, protocol, flags);
    let from_world = |flags| w.datagram(w.remote, w.gateway, (own.1, PORT), protocol, flags);
    let mut rows = Vec::new();
    for (index, place) in ["first", "middle", "last"].into_iter().enumerate() {
        let (before, after) = (index > 0, if index < 2 { FRAGMENT_OPEN } else { 0 });
        let shows = |state| if before { 0 } else { state };
        let noted = |entry: &dyn Fn(u8) -> Entry| if before { vec![entry(FRAGMENT_OPEN)] } else { vec![] };
        let row = |hook, name: &str, packet: &[u8]| {
            w.scenario(hook, &format!("{place} fragment of {what}{name}"), packet)
        };
        let (packet, answer) = (&asked[index], &answered[index]);
        rows.extend([
            row(Hook::FromPod, "", packet)
                .and(vec![flow(w.flow_value())])
                .and(noted(&from_client))
                .becomes(&w.to_gateway(packet))
                .leaves(vec![flow(sent(w.flow_value(), packet, shows(CONFIRMED))), from_client(after)])
                .counts_egress(w.egress(), Direction::Tx, packet),
            row(Hook::Gateway, "", &w.to_gateway(packet))
                .and(known())
                .and(noted(&from_client))
                .returns(&translated[index])
                .leaves(
                    [halves(Nat::one(shows(state), packet), Nat::default()), vec![from_client(after)]]
                        .concat(),
                )
                .counts(masqueraded, 1, packet.len()),
            row(Hook::Gateway, " in answer", answer)
                .and(known())
                .and(noted(&from_world))
                .returns(&w.to_client(&received[index]))
                .leaves(
                    [halves(Nat::default(), Nat::one(shows(STATE_REPLY), answer)), vec![from_world(after)]]
                        .concat(),
                )
                .counts(reply, 1, answer.len()),
        ]);
    }
    rows
}
