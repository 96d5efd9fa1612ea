//! Session affinity, gateways that drain, and flows that have come to the pod directly.

use coil_common::{
    keys::AffinityKey,
    names,
    stats::{Direction, DropReason},
    values::{
        AffinityValue, EGRESS_AFFINITY_SHIFT, EGRESS_CLIENT_AFFINITY, EGRESS_ORIGINATING_ONLY, FRAGMENT_OPEN,
        FlowValue, GATEWAY_DRAINING, GATEWAY_GONE, GATEWAY_READY, InboundValue, POD_ORIGINATING_ONLY,
        PodValue, STATE_CONFIRMED, STATE_FIN, STATE_REPLY, STATE_REPLY_FIN, STATE_REPLY_RST, STATE_RST,
        STATE_SYN,
    },
};

use super::world::{ACK, CONFIRMED, GENERATION, PORTS, PORTS_BACK, SET, SYN, SYN_ACK, Tuple, World, sent};
use crate::testing::{
    build::{self, FOU, Ip},
    entries::Entry,
    scenario::{Hook, Scenario},
};

/// Seconds since boot in this world.
const NOW: u32 = 1000;
/// Timeout of the affinity.
const TIMEOUT: u32 = 300;

pub(super) fn rows(w: &World) -> Vec<Scenario> {
    [affinities(w), draining(w), noted(w), answers(w), answers_in_parts(w), errors(w), settled(w)].concat()
}

fn affinity(w: &World, egress: u32, gateway: u32, generation: u32, last_used: u32) -> Entry {
    let mut client = World::octets6(w.pod);
    if w.is_v4() {
        client[..4].copy_from_slice(&World::octets4(w.pod));
    }
    let value = AffinityValue { gateway, generation, last_used, pad: 0 };
    Entry::new(names::MAP_AFFINITY, &AffinityKey { egress, client }, &value)
}

/// New flows of a client that has used the other gateway before, which the hash does not choose.
fn affinities(w: &World) -> Vec<Scenario> {
    let syn = w.out().tcp(PORTS, SYN, &[], b"");
    let tcp: Tuple = (w.pod, w.remote, PORTS, 6);
    let with_timeout = w.egress_entry(EGRESS_CLIENT_AFFINITY | TIMEOUT << EGRESS_AFFINITY_SHIFT, 2);
    let other = |state| w.gateway_entry(w.old_gateway_index(), w.old_gateway, 9, state);
    let remembered = |last_used| affinity(w, w.egress(), w.old_gateway_index(), 9, last_used);
    let hashed = || affinity(w, w.egress(), w.gateway_index(), GENERATION, 0);
    let via_other = FlowValue { gateway: w.old_gateway_index(), gateway_generation: 9, ..w.flow_value() };
    let row = |name: &str, entries: Vec<Entry>| {
        w.scenario(Hook::FromPod, name, &syn).counts_egress(w.egress(), Direction::Tx, &syn).and(entries)
    };
    let keeps = |name: &str, entries: Vec<Entry>, last_used| {
        row(name, entries)
            .and(vec![remembered(last_used)])
            .becomes(&build::tunnel(w.pod, w.old_gateway, &syn))
            .leaves(vec![w.flow_entry(tcp, sent(via_other, &syn, STATE_SYN)), remembered(0)])
    };
    let leaves = |name: &str, entries: Vec<Entry>| {
        row(name, entries)
            .becomes(&w.to_gateway(&syn))
            .leaves(vec![w.flow_entry(tcp, sent(w.flow_value(), &syn, STATE_SYN)), hashed()])
    };
    let ready = || vec![with_timeout.clone(), other(GATEWAY_READY)];
    let and = |mut entries: Vec<Entry>, entry| {
        entries.push(entry);
        entries
    };
    let plain = |flags| {
        row("", vec![w.egress_entry(flags, 2), other(GATEWAY_READY), remembered(NOW)])
            .becomes(&w.to_gateway(&syn))
            .leaves(vec![w.flow_entry(tcp, sent(w.flow_value(), &syn, STATE_SYN)), remembered(0)])
    };
    let named = |name: &str, mut scenario: Scenario| {
        scenario.name.push_str(name);
        scenario
    };
    vec![
        keeps("affinity: a client keeps its gateway", ready(), NOW),
        keeps("affinity: until the timeout", ready(), NOW - TIMEOUT + 1),
        leaves("affinity: a client is remembered", ready()),
        leaves("affinity: not after the timeout", and(ready(), remembered(NOW - TIMEOUT))),
        leaves(
            "affinity: a draining gateway takes no new flow",
            vec![with_timeout.clone(), other(GATEWAY_DRAINING), remembered(NOW)],
        ),
        leaves(
            "affinity: a gateway that is gone",
            vec![with_timeout.clone(), other(GATEWAY_GONE), remembered(NOW)],
        ),
        leaves(
            "affinity: another gateway with the same index",
            vec![
                with_timeout.clone(),
                w.gateway_entry(w.old_gateway_index(), w.old_gateway, 10, GATEWAY_READY),
                remembered(NOW),
            ],
        ),
        named("affinity: without a timeout the hash decides", plain(EGRESS_CLIENT_AFFINITY)),
        named("affinity: none", plain(TIMEOUT << EGRESS_AFFINITY_SHIFT)),
        row("affinity: of another egress", ready())
            .and(vec![affinity(w, w.egress() + 2, w.old_gateway_index(), 9, NOW)])
            .becomes(&w.to_gateway(&syn))
            .leaves(vec![
                w.flow_entry(tcp, sent(w.flow_value(), &syn, STATE_SYN)),
                affinity(w, w.egress() + 2, w.old_gateway_index(), 9, 0),
                hashed(),
            ]),
        {
            let data = w.out().tcp(PORTS, ACK, &[], b"data");
            w.scenario(Hook::FromPod, "affinity: a known flow neither asks nor tells", &data)
                .and(ready())
                .and(vec![remembered(NOW), w.flow_entry(tcp, w.flow_value())])
                .becomes(&w.to_gateway(&data))
                .leaves(vec![w.flow_entry(tcp, sent(w.flow_value(), &data, CONFIRMED)), remembered(0)])
                .counts_egress(w.egress(), Direction::Tx, &data)
        },
    ]
}

/// A new connection with the ports of an old one, whose gateway drains.
fn draining(w: &World) -> Vec<Scenario> {
    let syn = w.out().tcp(PORTS, SYN, &[], b"");
    let tcp: Tuple = (w.pod, w.remote, PORTS, 6);
    let old =
        |state| FlowValue { gateway: w.old_gateway_index(), gateway_generation: 9, state, ..w.flow_value() };
    let row = |name: &str, state, gateway| {
        w.scenario(Hook::FromPod, name, &syn)
            .and(vec![
                w.gateway_entry(w.old_gateway_index(), w.old_gateway, 9, gateway),
                w.flow_entry(tcp, old(state)),
            ])
            .counts_egress(w.egress(), Direction::Tx, &syn)
    };
    let over = STATE_SYN | STATE_FIN | STATE_REPLY_FIN;
    vec![
        row("a SYN with the ports of a closed flow leaves a draining gateway", over, GATEWAY_DRAINING)
            .becomes(&w.to_gateway(&syn))
            .leaves(vec![w.flow_entry(tcp, sent(w.flow_value(), &syn, STATE_SYN))]),
        row("a SYN with the ports of a closed flow stays with a ready gateway", over, GATEWAY_READY)
            .becomes(&build::tunnel(w.pod, w.old_gateway, &syn))
            .leaves(vec![w.flow_entry(tcp, sent(old(0), &syn, STATE_SYN))]),
        row("a SYN that is sent again stays with a draining gateway", STATE_SYN, GATEWAY_DRAINING)
            .becomes(&build::tunnel(w.pod, w.old_gateway, &syn))
            .leaves(vec![w.flow_entry(tcp, sent(old(STATE_SYN), &syn, STATE_SYN))]),
    ]
}

fn pod(w: &World) -> PodValue {
    PodValue { flags: POD_ORIGINATING_ONLY, ..w.pod_value() }
}

/// The maps of a node whose egress is for flows that the pod opens.
fn node(w: &World) -> Vec<Entry> {
    let mut entries = w.node_entries_with(pod(w));
    entries.retain(|entry| entry.map != names::MAP_EGRESSES);
    entries.push(w.egress_entry(EGRESS_ORIGINATING_ONLY, 1));
    entries
}

fn inbound(w: &World, tuple: Tuple, state: u32, last_seen: u32) -> Entry {
    let flow = w.flow_entry(tuple, FlowValue::default());
    let map = if w.is_v4() { names::MAP_INBOUND_V4 } else { names::MAP_INBOUND_V6 };
    Entry { key: flow.key, ..Entry::new(map, &0_u32, &InboundValue { state, last_seen }) }
}

/// As the pod answers.
fn answer(w: &World, protocol: u8) -> Tuple {
    (w.pod, w.remote, PORTS, protocol)
}

/// Packets to the pod that are not tunnelled.
fn noted(w: &World) -> Vec<Scenario> {
    let back = w.back();
    let (fin, rst) = (1, 4);
    let row = |name: &str, packet: &[u8]| w.scenario(Hook::ToPod, name, packet).with(node(w)).passes();
    let note = |name: &str, packet: &[u8], protocol, state| {
        row(name, packet).leaves(vec![inbound(w, answer(w, protocol), state, 0)])
    };
    let again = |name: &str, packet: &[u8], before, after| {
        row(name, packet).and(vec![inbound(w, answer(w, 6), before, NOW - 9)]).leaves(vec![inbound(
            w,
            answer(w, 6),
            after,
            0,
        )])
    };
    let syn = back.tcp(PORTS_BACK, SYN, &[], b"");
    let open = STATE_SYN | STATE_CONFIRMED | STATE_REPLY;
    let echo = (w.pod, w.remote, (0, 77), w.icmp());
    let mut rows = vec![
        note("inbound: a SYN", &syn, 6, STATE_SYN),
        note(
            "inbound: a connection that was there before",
            &back.tcp(PORTS_BACK, ACK, &[], b"x"),
            6,
            CONFIRMED,
        ),
        note("inbound: a datagram", &back.udp(PORTS_BACK, b"x"), 17, CONFIRMED),
        row("inbound: an echo request", &back.echo(true, 77, b"x"))
            .leaves(vec![inbound(w, echo, CONFIRMED, 0)]),
        again("inbound: more of it", &back.tcp(PORTS_BACK, ACK, &[], b"x"), STATE_SYN, STATE_SYN | CONFIRMED),
        again("inbound: a FIN", &back.tcp(PORTS_BACK, ACK | fin, &[], b""), open, open | STATE_FIN),
        again("inbound: a RST", &back.tcp(PORTS_BACK, rst, &[], b""), open, open | CONFIRMED | STATE_RST),
        row("inbound: a FIN opens nothing", &back.tcp(PORTS_BACK, ACK | fin, &[], b"")),
        row("inbound: a RST opens nothing", &back.tcp(PORTS_BACK, rst, &[], b"")),
        row("inbound: an echo reply opens nothing", &back.echo(false, 77, b"x")),
        row("inbound: to another address", &Ip::new(w.remote, w.stranger).udp(PORTS_BACK, b"x")),
        row("inbound: from where no egress leads", &Ip::new(w.inside, w.pod).udp(PORTS_BACK, b"x")),
        row("inbound: from where all is blocked", &Ip::new(w.blocked, w.pod).udp(PORTS_BACK, b"x")),
        row("inbound: not for this egress", &syn).and(vec![w.egress_entry(0, 1)]),
        row("inbound: not for this pod", &syn).and(vec![World::pod_entry(w.pod_value())]),
        row("inbound: no room", &syn)
            .and(vec![inbound(w, (w.pod, w.remote, (1, 2), 6), 0, NOW)])
            .full(if w.is_v4() { names::MAP_INBOUND_V4 } else { names::MAP_INBOUND_V6 }, 1)
            .leaves(vec![inbound(w, (w.pod, w.remote, (1, 2), 6), 0, 0)]),
        row("inbound: cut short", &syn[..w.header() + 4]).library_only("its length is wrong").leaves(vec![]),
    ];
    let inner = back.udp(PORTS_BACK, b"x");
    rows.push(
        w.scenario(Hook::ToPod, "inbound: a tunnelled packet has not come directly", &w.to_client(&inner))
            .with(node(w))
            .becomes(&inner),
    );
    rows.push({
        let other = build::tunnel(w.remote, w.pod, &inner);
        w.scenario(Hook::ToPod, "inbound: a tunnelled packet of a stranger is none either", &other)
            .with(node(w))
            .drops(DropReason::UnknownGateway)
    });
    rows.push(row("inbound: UDP from the port of FOU", &back.udp((FOU, 9), b"x")).leaves(vec![inbound(
        w,
        (w.pod, w.remote, (9, FOU), 17),
        CONFIRMED,
        0,
    )]));
    rows
}

/// Packets of the pod towards where a flow has come from.
fn answers(w: &World) -> Vec<Scenario> {
    let out = w.out();
    let tcp = answer(w, 6);
    let opened = STATE_SYN;
    let row = |name: &str, packet: &[u8], entry: Entry| {
        w.scenario(Hook::FromPod, name, packet).with(node(w)).and(vec![entry])
    };
    let direct = |name: &str, packet: &[u8], tuple, before, after| {
        row(name, packet, inbound(w, tuple, before, NOW)).passes().leaves(vec![inbound(w, tuple, after, 0)])
    };
    let egress = |name: &str, packet: &[u8], tuple: Tuple, entry: Entry, state| {
        let left = Entry { value: entry.timeless().value, ..entry.clone() };
        row(name, packet, entry)
            .becomes(&w.to_gateway(packet))
            .leaves(vec![w.flow_entry(tuple, sent(w.flow_value(), packet, state)), left])
            .counts_egress(w.egress(), Direction::Tx, packet)
    };
    let syn_ack = out.tcp(PORTS, SYN_ACK, &[], b"");
    let data = out.tcp(PORTS, ACK, &[], b"data");
    let udp = out.udp(PORTS, b"x");
    let noted = |protocol, last_seen| inbound(w, answer(w, protocol), opened, last_seen);
    let mut rows = vec![
        direct("answer: a SYN-ACK", &syn_ack, tcp, opened, opened | STATE_REPLY),
        direct("answer: data", &data, tcp, opened, opened | STATE_REPLY),
        direct(
            "answer: a FIN",
            &out.tcp(PORTS, ACK | 1, &[], b""),
            tcp,
            opened,
            opened | STATE_REPLY | STATE_REPLY_FIN,
        ),
        direct(
            "answer: a RST",
            &out.tcp(PORTS, 4, &[], b""),
            tcp,
            opened,
            opened | STATE_REPLY | STATE_REPLY_RST,
        ),
        direct("answer: a datagram", &udp, answer(w, 17), CONFIRMED, CONFIRMED | STATE_REPLY),
        direct(
            "answer: an echo reply",
            &out.echo(false, 77, b"x"),
            (w.pod, w.remote, (0, 77), w.icmp()),
            CONFIRMED,
            CONFIRMED | STATE_REPLY,
        ),
        egress(
            "answer: an echo request of the pod's own is none",
            &out.echo(true, 77, b"x"),
            (w.pod, w.remote, (77, 0), w.icmp()),
            inbound(w, (w.pod, w.remote, (0, 77), w.icmp()), 0, NOW),
            0,
        ),
        egress(
            "answer: a SYN of the pod's own is none",
            &out.tcp(PORTS, SYN, &[], b""),
            tcp,
            noted(6, NOW),
            STATE_SYN,
        ),
        egress(
            "answer: to another port",
            &out.udp((PORTS.0, 1), b"x"),
            (w.pod, w.remote, (PORTS.0, 1), 17),
            noted(17, NOW),
            0,
        ),
        egress("answer: a datagram long after", &udp, answer(w, 17), noted(17, NOW - 300), 0),
        row("answer: a connection that was quiet for long", &data, noted(6, NOW - 900))
            .passes()
            .leaves(vec![inbound(w, tcp, opened | STATE_REPLY, 0)]),
        egress("answer: the egress has not the mode any more", &data, tcp, noted(6, NOW), CONFIRMED)
            .and(vec![w.egress_entry(0, 1)]),
        egress("answer: the pod has not the mode", &data, tcp, noted(6, NOW), CONFIRMED)
            .and(vec![World::pod_entry(w.pod_value())]),
    ];
    // A flow that an egress has keeps it.
    rows.push(
        row("answer: a flow of an egress stays", &udp, noted(17, NOW))
            .and(vec![w.flow_entry(answer(w, 17), w.flow_value())])
            .becomes(&w.to_gateway(&udp))
            .leaves(vec![
                w.flow_entry(answer(w, 17), sent(w.flow_value(), &udp, CONFIRMED)),
                inbound(w, answer(w, 17), opened, 0),
            ])
            .counts_egress(w.egress(), Direction::Tx, &udp),
    );
    let older = FlowValue { set: SET - 1, ..w.flow_value() };
    rows.push(
        row("answer: also when the policy has changed around it", &udp, noted(17, NOW))
            .and(vec![w.flow_entry(answer(w, 17), older)])
            .becomes(&w.to_gateway(&udp))
            .leaves(vec![
                w.flow_entry(answer(w, 17), sent(w.flow_value(), &udp, CONFIRMED)),
                inbound(w, answer(w, 17), opened, 0),
            ])
            .counts_egress(w.egress(), Direction::Tx, &udp),
    );
    rows
}

/// A large datagram that answers one that has come in directly.
fn answers_in_parts(w: &World) -> Vec<Scenario> {
    let udp = w.out().udp(PORTS, &[7; 200]);
    let part = |at: usize, more: bool, bytes: &[u8]| w.out().fragment(at as u16, more).packet(17, bytes);
    let payload = &udp[w.header()..];
    let parts =
        [part(0, true, &payload[..80]), part(10, true, &payload[80..160]), part(20, false, &payload[160..])];
    let before = inbound(w, answer(w, 17), CONFIRMED, NOW);
    let after = || inbound(w, answer(w, 17), CONFIRMED | STATE_REPLY, 0);
    let datagram = |ports, flags| w.datagram(w.pod, w.remote, ports, 17, flags);
    let row = |name: &str, packet: &[u8]| {
        w.scenario(Hook::FromPod, name, packet).with(node(w)).and(vec![before.clone()])
    };
    let untouched = || inbound(w, answer(w, 17), CONFIRMED, 0);
    vec![
        row("answer: the first fragment of a datagram", &parts[0])
            .passes()
            .leaves(vec![after(), datagram(PORTS, FRAGMENT_OPEN)]),
        row("answer: a fragment in the middle", &parts[1])
            .and(vec![datagram(PORTS, FRAGMENT_OPEN)])
            .passes()
            .leaves(vec![after(), datagram(PORTS, FRAGMENT_OPEN)]),
        row("answer: the last fragment", &parts[2])
            .and(vec![datagram(PORTS, FRAGMENT_OPEN)])
            .passes()
            .leaves(vec![after(), datagram(PORTS, 0)]),
        row("answer: a fragment before the first", &parts[1])
            .drops(DropReason::FragmentUnknown)
            .leaves(vec![untouched()]),
        row("answer: a fragment of another datagram", &parts[1])
            .and(vec![datagram((PORTS.0, 1), FRAGMENT_OPEN)])
            .drops(DropReason::FragmentUnknown)
            .leaves(vec![untouched(), datagram((PORTS.0, 1), FRAGMENT_OPEN)]),
    ]
}

/// Errors of the pod about what has come in directly.
fn errors(w: &World) -> Vec<Scenario> {
    let (out, back) = (w.out(), w.back());
    let (unreachable, too_big) = if w.is_v4() { ((3, 3), (3, 4)) } else { ((1, 4), (2, 0)) };
    let error = |(kind, code): (u8, u8), quoted: &[u8]| out.icmp(kind, code, [0, 0, 5, 0], quoted);
    let about_udp = error(unreachable, &back.udp(PORTS_BACK, b"x"));
    let about_tcp = error(too_big, &back.tcp(PORTS_BACK, ACK, &[], b"data"));
    let about_echo = error(unreachable, &back.echo(true, 77, b"x"));
    let row = |name: &str, packet: &[u8], before: Entry, state| {
        let left = Entry { value: inbound(w, answer(w, 6), state, 0).value, ..before.clone() };
        w.scenario(Hook::FromPod, name, packet).with(node(w)).and(vec![before]).leaves(vec![left])
    };
    let noted = |protocol, last_seen| inbound(w, answer(w, protocol), CONFIRMED, last_seen);
    let echo = inbound(w, (w.pod, w.remote, (0, 77), w.icmp()), CONFIRMED, NOW);
    vec![
        row("answer: an error about a datagram", &about_udp, noted(17, NOW), CONFIRMED).passes(),
        row("answer: an error about a connection", &about_tcp, noted(6, NOW - 900), CONFIRMED).passes(),
        row("answer: an error about an echo request", &about_echo, echo, CONFIRMED).passes(),
        row("answer: an error about a datagram long after", &about_udp, noted(17, NOW - 300), CONFIRMED)
            .drops(DropReason::IcmpNoFlow),
        row("answer: an error about nothing that has come", &about_udp, noted(6, NOW), CONFIRMED)
            .drops(DropReason::IcmpNoFlow),
        row("answer: an error, but the egress has not the mode", &about_udp, noted(17, NOW), CONFIRMED)
            .and(vec![w.egress_entry(0, 1)])
            .drops(DropReason::IcmpNoFlow),
    ]
}

/// Flows that the egress has, of a pod whose answers leave directly: what is usual stays usual.
fn settled(w: &World) -> Vec<Scenario> {
    let tuple = answer(w, 6);
    let known = FlowValue { state: CONFIRMED | STATE_REPLY, ..w.flow_value() };
    let data = w.out().tcp(PORTS, ACK, &[], b"data");
    let reply = w.back().tcp(PORTS_BACK, ACK, &[], b"data");
    let received = FlowValue { rx_packets: 1, rx_bytes: reply.len() as u64, ..known };
    let row = |hook, name: &str, packet: &[u8]| {
        w.scenario(hook, name, packet).with(node(w)).and(vec![w.flow_entry(tuple, known)])
    };
    vec![
        row(Hook::FromPod, "originating-only: a flow of an egress", &data)
            .becomes(&w.to_gateway(&data))
            .leaves(vec![w.flow_entry(tuple, sent(known, &data, 0))])
            .counts_egress(w.egress(), Direction::Tx, &data),
        row(Hook::ToPod, "originating-only: its reply", &w.to_client(&reply))
            .becomes(&reply)
            .leaves(vec![w.flow_entry(tuple, received)])
            .counts_egress(w.egress(), Direction::Rx, &reply),
    ]
}
