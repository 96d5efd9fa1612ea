//! Tunnels without UDP: who uses them, who may, and what fits.

use coil_common::{
    config::CONFIG_IPIP,
    names,
    stats::{Direction, DropReason, GatewayStat, IcmpStat},
    values::{FlowValue, STATE_DIRECT, STATE_IPIP, STATE_REPLY, STATE_SYN},
};

use super::world::{ACK, CONFIRMED, MSS_1460, MTU, Nat, PORTS, PORTS_BACK, SYN, SYN_ACK, World, sent};
use crate::testing::{
    build::{self, Ip},
    entries::Entry,
    scenario::{Hook, Scenario},
};

pub(super) fn rows(w: &World) -> Vec<Scenario> {
    [from_pod(w), to_pod(w), refused(w), out(w), back(w), switched(w), errors(w), fragments(w)].concat()
}

/// A scenario of a node that uses these tunnels, or a gateway, for which it does not matter.
fn row(w: &World, hook: Hook, name: &str, packet: &[u8]) -> Scenario {
    let mut row = w.scenario(hook, &format!("IP in IP, {name}"), packet);
    if hook != Hook::Gateway {
        row.config.flags |= CONFIG_IPIP;
    }
    row
}

/// The same under a node that uses FOU.
fn fou(mut row: Scenario) -> Scenario {
    row.config.flags &= !CONFIG_IPIP;
    row.name.push_str(", node of FOU");
    row
}

fn to_gateway(w: &World, inner: &[u8]) -> Vec<u8> {
    build::ipip(w.pod, w.gateway, inner)
}

fn to_client(w: &World, inner: &[u8]) -> Vec<u8> {
    build::ipip(w.gateway, w.pod, inner)
}

/// The protocol number.
fn protocol(w: &World) -> u8 {
    if w.is_v4() { 4 } else { 41 }
}

/// Bytes of headers.
fn overhead(w: &World) -> u16 {
    w.overhead() - 8
}

fn mss_option(w: &World) -> [u8; 4] {
    let [a, b] = (w.mss() + 8).to_be_bytes();
    [2, 4, a, b]
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

fn from_pod(w: &World) -> Vec<Scenario> {
    let new = |name: &str, packet: &[u8], becomes: &[u8], protocol: u8, state: u32| {
        let tuple = (w.pod, w.remote, PORTS, protocol);
        row(w, Hook::FromPod, name, packet)
            .becomes(&to_gateway(w, becomes))
            .leaves(vec![w.flow_entry(tuple, sent(w.flow_value(), packet, state))])
            .counts_egress(w.egress(), Direction::Tx, packet)
    };
    let syn = w.out().tcp(PORTS, SYN, &MSS_1460, b"");
    let clamped = w.out().tcp(PORTS, SYN, &mss_option(w), b"");
    let udp = w.out().udp(PORTS, b"data");
    let marked = w.out().tos(0xb9).udp(PORTS, b"data");
    let tuple = (w.pod, w.remote, PORTS, 6);
    let data = w.out().tcp(PORTS, ACK, &[], b"data");
    let known = FlowValue { state: CONFIRMED, ..w.flow_value() };
    let room = usize::from(MTU - overhead(w));
    let sized = |size: usize| w.out().udp(PORTS, &vec![7; size - w.header() - 8]);
    let (fits, too_big) = (sized(room), sized(room + 1));
    let kind = if w.is_v4() { [3, 4] } else { [2, 0] };
    vec![
        new("SYN", &syn, &clamped, 6, STATE_SYN),
        new("UDP", &udp, &udp, 17, 0),
        new("congestion is kept", &marked, &marked, 17, 0),
        new("largest packet", &fits, &fits, 17, 0),
        row(w, Hook::FromPod, "known flow", &data)
            .and(vec![w.flow_entry(tuple, known)])
            .becomes(&to_gateway(w, &data))
            .leaves(vec![w.flow_entry(tuple, sent(known, &data, 0))])
            .counts_egress(w.egress(), Direction::Tx, &data),
        row(w, Hook::FromPod, "one byte too many", &too_big)
            .answers(DropReason::TooBig, &w.error(w.remote, w.pod, kind, MTU - overhead(w), &too_big)),
    ]
}

fn received(value: FlowValue, ip: &[u8]) -> FlowValue {
    FlowValue {
        rx_packets: value.rx_packets + 1,
        rx_bytes: value.rx_bytes + ip.len() as u64,
        state: value.state | STATE_REPLY,
        ..value
    }
}

fn to_pod(w: &World) -> Vec<Scenario> {
    let tuple = (w.pod, w.remote, PORTS, 6);
    let flow = FlowValue { state: CONFIRMED | STATE_REPLY, ..w.flow_value() };
    let comes = |name: &str, packet: &[u8], inner: &[u8], becomes: &[u8]| {
        row(w, Hook::ToPod, name, packet)
            .and(vec![w.flow_entry(tuple, flow)])
            .becomes(becomes)
            .leaves(vec![w.flow_entry(tuple, received(flow, inner))])
            .counts_egress(w.egress(), Direction::Rx, inner)
    };
    let data = w.back().tcp(PORTS_BACK, ACK, &[], b"data");
    let syn_ack = w.back().tcp(PORTS_BACK, SYN_ACK, &MSS_1460, b"");
    let clamped = w.back().tcp(PORTS_BACK, SYN_ACK, &mss_option(w), b"");
    let clamped_fou = w.back().tcp(PORTS_BACK, SYN_ACK, &w.mss_option(), b"");
    let mut rows = vec![
        comes("known flow", &to_client(w, &data), &data, &data),
        fou(comes("known flow", &to_client(w, &data), &data, &data)),
        comes("an answer by FOU", &w.to_client(&data), &data, &data),
        comes("SYN-ACK", &to_client(w, &syn_ack), &syn_ack, &clamped),
        // What the pod may send by is what counts.
        fou(comes("SYN-ACK", &to_client(w, &syn_ack), &syn_ack, &clamped_fou)),
    ];
    for (outer, inner, wanted) in [(3, 1, 3), (3, 0, 0), (1, 2, 2)] {
        let packet = w.back().tos(inner).udp(PORTS_BACK, b"data");
        let marked = w.back().tos(wanted).udp(PORTS_BACK, b"data");
        let packet = Ip::new(w.gateway, w.pod).tos(outer).packet(protocol(w), &packet);
        rows.push(
            row(w, Hook::ToPod, &format!("congestion {outer} outside, {inner} inside"), &packet)
                .becomes(&marked),
        );
    }
    if !w.is_v4() {
        let mut limit = Ip::new(w.gateway, w.pod);
        // Tunnel encapsulation limit 4, as ip6tnl sends it.
        limit.extensions = vec![(60, vec![0, 0, 4, 1, 4, 1, 1, 0])];
        rows.push(comes("destination options", &limit.packet(41, &data), &data, &data));
    }
    rows
}

fn refused(w: &World) -> Vec<Scenario> {
    let reply = w.back().udp(PORTS_BACK, b"data");
    let data = w.out().udp(PORTS, b"data");
    let stranger = build::ipip(w.stranger, w.pod, &reply);
    let other = build::ipip(w.gateway, w.pod, &Ip::new(w.remote, w.stranger).udp(PORTS, b"x"));
    let mut rows = vec![
        row(w, Hook::ToPod, "from a stranger", &stranger).drops(DropReason::UnknownGateway),
        // The pod's own business, and nothing is unpacked.
        fou(row(w, Hook::ToPod, "from a stranger", &stranger).passes()),
        row(w, Hook::ToPod, "for another pod", &other).drops(DropReason::InnerDestinationMismatch),
        fou(row(w, Hook::ToPod, "for another pod", &other).drops(DropReason::InnerDestinationMismatch)),
        row(w, Hook::Gateway, "unknown client", &build::ipip(w.stranger, w.gateway, &data))
            .drops(DropReason::UnknownClient),
        row(
            w,
            Hook::Gateway,
            "inner source of another",
            &to_gateway(w, &Ip::new(w.stranger, w.remote).udp(PORTS, b"x")),
        )
        .drops(DropReason::InnerSourceMismatch),
        row(w, Hook::Gateway, "to the gateway", &to_gateway(w, &Ip::new(w.pod, w.gateway).udp(PORTS, b"x")))
            .drops(DropReason::ForbiddenDestination),
        row(w, Hook::Gateway, "TCP without state", &to_gateway(w, &w.out().tcp(PORTS, ACK, &[], b"data")))
            .drops(DropReason::NoState),
        row(w, Hook::Gateway, "something else inside", &{
            Ip::new(w.pod, w.gateway).packet(protocol(w), &[0xff; 60])
        })
        .drops(DropReason::Malformed),
    ];
    for length in 8..reply.len() {
        let packet = Ip::new(w.gateway, w.pod).packet(protocol(w), &reply[..length]);
        rows.push(
            row(w, Hook::ToPod, &format!("cut after {length} bytes of the inner packet"), &packet)
                .drops(DropReason::Truncated),
        );
        let packet = Ip::new(w.pod, w.gateway).packet(protocol(w), &data[..length]);
        rows.push(
            row(w, Hook::Gateway, &format!("cut after {length} bytes of the inner packet"), &packet)
                .drops(DropReason::Truncated),
        );
    }
    // The outer packet claims more, or less, than there is inside.
    let mut short = row(w, Hook::ToPod, "cut inside the tunnel", &to_client(w, &reply));
    short.packet.bytes.pop();
    rows.push(short.drops(DropReason::Truncated));
    let mut less = to_client(w, &reply);
    less.truncate(less.len() - 4);
    let outer = Ip::new(w.gateway, w.pod).packet(protocol(w), &less[w.header()..]);
    rows.push(
        row(w, Hook::ToPod, "inner packet longer than the outer one", &[&outer[..], &[0; 4]].concat())
            .drops(DropReason::Malformed),
    );
    rows
}

/// Both halves of the translation of a flow, noted as one of these tunnels, after some packets.
fn halves(w: &World, protocol: u8, states: [u32; 2]) -> Vec<Entry> {
    let [forward, reverse] = states;
    vec![
        w.forward(PORTS, protocol, PORTS.0, Nat::fresh(forward)),
        w.reverse(PORTS, protocol, PORTS.0, Nat::fresh(reverse)),
    ]
}

fn out(w: &World) -> Vec<Scenario> {
    let opens = |name: &str, inner: &[u8], leaves: &[u8], protocol: u8, state: u32| {
        row(w, Hook::Gateway, name, &to_gateway(w, inner))
            .returns(leaves)
            .leaves(vec![
                w.forward(PORTS, protocol, PORTS.0, Nat::one(state | STATE_IPIP, inner)),
                w.reverse(PORTS, protocol, PORTS.0, Nat::fresh(STATE_IPIP)),
            ])
            .counts(masqueraded(w), 1, inner.len())
            .counts(new_flow(w), 1, 0)
    };
    let (out, sent) = (w.out(), w.masqueraded());
    let mut rows = vec![
        opens(
            "SYN",
            &out.tcp(PORTS, SYN, &MSS_1460, b""),
            &sent.tcp(PORTS, SYN, &mss_option(w), b""),
            6,
            STATE_SYN,
        ),
        opens("UDP", &out.udp(PORTS, b"data"), &sent.udp(PORTS, b"data"), 17, 0),
    ];
    let data = out.tcp(PORTS, ACK, &[], b"data");
    rows.push(
        row(w, Hook::Gateway, "known flow", &to_gateway(w, &data))
            .and(halves(w, 6, [CONFIRMED | STATE_IPIP, STATE_REPLY | STATE_IPIP]))
            .returns(&sent.tcp(PORTS, ACK, &[], b"data"))
            .leaves(vec![
                w.forward(PORTS, 6, PORTS.0, Nat::one(CONFIRMED | STATE_IPIP, &data)),
                w.reverse(PORTS, 6, PORTS.0, Nat::fresh(STATE_REPLY | STATE_IPIP)),
            ])
            .counts(masqueraded(w), 1, data.len()),
    );
    let late = out.clone().ttl(1).udp(PORTS, b"data");
    let exceeded = w.error(w.gateway, w.pod, if w.is_v4() { [11, 0] } else { [3, 0] }, 0, &late);
    rows.push(
        row(w, Hook::Gateway, "TTL used up", &to_gateway(w, &late))
            .answers(DropReason::TtlExceeded, &to_client(w, &exceeded)),
    );
    rows
}

fn back(w: &World) -> Vec<Scenario> {
    let answers = |name: &str, ip: &Ip, states: [u32; 2]| {
        let packet = ip.tcp(PORTS_BACK, ACK, &[], b"data");
        let inner = w.back().ttl(63).tcp(PORTS_BACK, ACK, &[], b"data");
        row(w, Hook::Gateway, name, &packet)
            .and(halves(w, 6, states))
            .returns(&to_client(w, &inner))
            .leaves(vec![
                w.forward(PORTS, 6, PORTS.0, Nat::fresh(states[0])),
                w.reverse(PORTS, 6, PORTS.0, Nat::one(states[1] | STATE_REPLY, &packet)),
            ])
            .counts(reply(w), 1, packet.len())
    };
    let open = CONFIRMED | STATE_IPIP;
    let room = usize::from(MTU - overhead(w));
    let sized = |size: usize| w.reply().udp(PORTS_BACK, &vec![7; size - w.header() - 8]);
    let fits = sized(room);
    let too_big = sized(room + 1);
    let kind = if w.is_v4() { [3, 4] } else { [2, 0] };
    let mut inner = w.back().ttl(63);
    inner.id = 0x1234;
    let syn_ack = w.reply().tcp(PORTS_BACK, SYN_ACK, &MSS_1460, b"");
    let clamped = w.back().ttl(63).tcp(PORTS_BACK, SYN_ACK, &mss_option(w), b"");
    vec![
        answers("reply", &w.reply(), [open, STATE_IPIP]),
        answers("reply to what has been answered", &w.reply(), [open, STATE_REPLY | STATE_IPIP]),
        row(w, Hook::Gateway, "SYN-ACK", &syn_ack)
            .and(halves(w, 6, [STATE_SYN | STATE_IPIP, STATE_IPIP]))
            .returns(&to_client(w, &clamped))
            .leaves(vec![
                w.forward(PORTS, 6, PORTS.0, Nat::fresh(STATE_SYN | STATE_IPIP)),
                w.reverse(PORTS, 6, PORTS.0, Nat::one(STATE_REPLY | STATE_IPIP, &syn_ack)),
            ])
            .counts(reply(w), 1, syn_ack.len()),
        row(w, Hook::Gateway, "largest reply", &fits)
            .and(halves(w, 17, [STATE_IPIP, STATE_IPIP]))
            .returns(&to_client(w, &inner.udp(PORTS_BACK, &vec![7; room - w.header() - 8])))
            .leaves(vec![
                w.forward(PORTS, 17, PORTS.0, Nat::fresh(STATE_IPIP)),
                w.reverse(PORTS, 17, PORTS.0, Nat::one(STATE_REPLY | STATE_IPIP, &fits)),
            ])
            .counts(reply(w), 1, fits.len()),
        row(w, Hook::Gateway, "reply that is too big", &too_big)
            .and(halves(w, 17, [STATE_IPIP, STATE_IPIP]))
            .answers(DropReason::TooBig, &w.error(w.gateway, w.remote, kind, MTU - overhead(w), &too_big))
            .leaves(halves(w, 17, [STATE_IPIP, STATE_IPIP])),
    ]
}

/// Clients that change from one kind to the other while flows exist.
fn switched(w: &World) -> Vec<Scenario> {
    let data = w.out().tcp(PORTS, ACK, &[], b"data");
    let turns = |name: &str, packet: &[u8], before: [u32; 2], after: u32| {
        row(w, Hook::Gateway, name, packet)
            .and(halves(w, 6, before.map(|encap| CONFIRMED | STATE_REPLY | encap)))
            .returns(&w.masqueraded().tcp(PORTS, ACK, &[], b"data"))
            .leaves(vec![
                w.forward(PORTS, 6, PORTS.0, Nat::one(CONFIRMED | STATE_REPLY | after, &data)),
                w.reverse(PORTS, 6, PORTS.0, Nat::fresh(CONFIRMED | STATE_REPLY | after)),
            ])
            .counts(masqueraded(w), 1, data.len())
    };
    let ipip = to_gateway(w, &data);
    vec![
        turns("a client begins with it", &ipip, [0, 0], STATE_IPIP),
        turns("the half of answers was made anew", &ipip, [STATE_IPIP, 0], STATE_IPIP),
        turns("the half of the client was made anew", &ipip, [0, STATE_IPIP], STATE_IPIP),
        turns(
            "a client of the same node uses it again",
            &ipip,
            [STATE_DIRECT, STATE_IPIP | STATE_DIRECT],
            STATE_IPIP,
        ),
        turns("a client goes back to FOU", &w.to_gateway(&data), [STATE_IPIP, STATE_IPIP], 0)
            .and(vec![Entry::new(names::MAP_ENCAPS, &0u32, &STATE_IPIP)]),
    ]
}

/// A router between pod and gateway finds a packet too big.
fn errors(w: &World) -> Vec<Scenario> {
    let (kind, code) = if w.is_v4() { (3, 4) } else { (2, 0) };
    let word = [0, 0, 5, 120];
    let mtu = 1400 - overhead(w);
    let tcp = w.out().tcp(PORTS, ACK, &[], &[7; 300]);
    let flow = || vec![w.flow_entry((w.pod, w.remote, PORTS, 6), w.flow_value())];
    let outer = to_gateway(w, &tcp);
    let error = |quote: &[u8]| Ip::new(w.stranger, w.pod).icmp(kind, code, word, quote);
    let mut told = row(w, Hook::ToPod, "too big for a router", &error(&outer))
        .and(flow())
        .leaves(flow())
        .becomes(&w.error(w.remote, w.pod, [kind, code], mtu, &tcp))
        .counts_icmp(IcmpStat::Answered);
    told.expect.drop = Some(DropReason::UnderlayTooBig);
    let unknown = to_gateway(w, &w.out().tcp((1, 2), ACK, &[], b"x"));
    let stranger = build::ipip(w.pod, w.stranger, &tcp);
    let answer = w.back().ttl(63).tcp(PORTS_BACK, ACK, &[], &[7; 300]);
    let before = w.reply().ttl(63).tcp(PORTS_BACK, ACK, &[], &[7; 300]);
    let halves = || halves(w, 6, [CONFIRMED | STATE_IPIP, STATE_REPLY | STATE_IPIP]);
    let at_gateway = Ip::new(w.stranger, w.gateway).icmp(kind, code, word, &to_client(w, &answer));
    let mut back = row(w, Hook::Gateway, "answer too big for a router", &at_gateway)
        .and(halves())
        .leaves(halves())
        .answers(DropReason::UnderlayTooBig, &w.error(w.gateway, w.remote, [kind, code], mtu, &before));
    back.expect.counters.clear();
    let reset = w.back().icmp(if w.is_v4() { 3 } else { 1 }, 1, [0; 4], &tcp);
    vec![
        told,
        back,
        row(w, Hook::ToPod, "too big, of no flow", &error(&unknown))
            .and(flow())
            .leaves(flow())
            .drops(DropReason::IcmpNoFlow),
        row(w, Hook::ToPod, "too big, to a stranger", &error(&stranger)).and(flow()).leaves(flow()).passes(),
        row(w, Hook::ToPod, "an error inside", &to_client(w, &reset))
            .and(flow())
            .leaves(flow())
            .becomes(&reset)
            .counts_egress(w.egress(), Direction::Rx, &reset)
            .counts_icmp(IcmpStat::ToPod),
    ]
}

fn fragments(w: &World) -> Vec<Scenario> {
    let inner = w.out().udp(PORTS, &[7; 64]);
    let piece = |src, dst| Ip::new(src, dst).fragment(0, true).packet(protocol(w), &inner);
    let first = w.out().fragment(0, true).packet(17, &w.out().udp(PORTS, &[7; 64])[w.header()..]);
    let sent =
        w.masqueraded().fragment(0, true).packet(17, &w.masqueraded().udp(PORTS, &[7; 64])[w.header()..]);
    vec![
        row(w, Hook::ToPod, "fragment of a tunnelled packet", &piece(w.gateway, w.pod))
            .drops(DropReason::OuterFragment),
        row(w, Hook::ToPod, "fragment of a stranger's", &piece(w.stranger, w.pod)).passes(),
        row(w, Hook::Gateway, "fragment of a tunnelled packet", &piece(w.pod, w.gateway))
            .drops(DropReason::OuterFragment),
        row(w, Hook::Gateway, "first fragment inside", &to_gateway(w, &first))
            .returns(&sent)
            .leaves(vec![
                w.forward(PORTS, 17, PORTS.0, Nat::one(STATE_IPIP, &first)),
                w.reverse(PORTS, 17, PORTS.0, Nat::fresh(STATE_IPIP)),
                w.datagram(w.pod, w.remote, PORTS, 17, coil_common::values::FRAGMENT_OPEN),
            ])
            .counts(masqueraded(w), 1, first.len())
            .counts(new_flow(w), 1, 0),
    ]
}
