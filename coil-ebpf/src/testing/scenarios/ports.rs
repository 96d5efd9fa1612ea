//! Who gets a port at a gateway, who does not, and what is done about halves that are gone.

use std::net::IpAddr;

use coil_common::{
    config::CONFIG_ADDRESS_ONLY,
    names,
    stats::{Direction, DropReason, GatewayStat, IcmpStat},
    usage::{Share, excluded_port, full_remote, gateway_cells, gateway_total, pod_cells},
    values::{
        FRAGMENT_OPEN, NatValue4, NatValue6, STATE_FIN, STATE_REPLY, STATE_REPLY_FIN, STATE_REPLY_RST,
        STATE_RST, STATE_SYN,
    },
};

use super::world::{ACK, CONFIRMED, Nat, PORTS, SYN, World, sent};
use crate::{
    family::{Family, V4, V6, addr4, addr6},
    flow::Flow,
    testing::{
        build::Ip,
        entries::{Entry, Value},
        scenario::{Hook, IFINDEX, Scenario},
    },
    usage,
};

/// The table's clock.
const NOW: u32 = 1000;
/// The seed of the world's programs.
const SEED: u32 = 42;
const SCTP: u8 = 132;

pub(super) fn rows(w: &World) -> Vec<Scenario> {
    [shares(w), reuse(w), halves(w), resets(w), strangers(w), identifiers(w), bare(w), pods(w)].concat()
}

fn row(w: &World, name: &str, packet: &[u8]) -> Scenario {
    w.scenario(Hook::Gateway, name, packet)
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

/// A translation of which the last packet was seen at this second.
fn seen(entry: Entry, last_seen: u32) -> Entry {
    let value = if entry.map.ends_with("_v4") {
        Value::of(&NatValue4 { last_seen, ..entry.value.read() })
    } else {
        Value::of(&NatValue6 { last_seen, ..entry.value.read() })
    };
    Entry { value, ..entry }
}

/// Hashes of the pod, of the remote with a port, and of both.
fn hashes(w: &World, port: u16, protocol: u8) -> [u64; 3] {
    fn of<F: Family>(src: &F::Addr, dst: &F::Addr, port: u16, protocol: u8) -> [u64; 3] {
        let flow = Flow::<F>::new(src, dst, [0; 2], port.to_be_bytes(), protocol);
        usage::of_flow::<F>(SEED, &flow, protocol)
    }
    if w.is_v4() {
        let [src, dst] = [w.pod, w.remote].map(|addr| addr4(World::octets4(addr)));
        of::<V4>(&src, &dst, port, protocol)
    } else {
        let [src, dst] = [w.pod, w.remote].map(|addr| addr6(World::octets6(addr)));
        of::<V6>(&src, &dst, port, protocol)
    }
}

fn family(w: &World) -> u32 {
    u32::from(!w.is_v4())
}

fn counts(map: &'static str, cells: [u32; 2], counts: [u64; 2]) -> Vec<Entry> {
    cells.iter().zip(counts).map(|(cell, count)| Entry::new(map, cell, &count)).collect()
}

/// A UDP packet that makes a translation with its own port.
fn opens(w: &World, name: &str) -> Scenario {
    let inner = w.out().udp(PORTS, b"data");
    row(w, name, &w.to_gateway(&inner))
        .returns(&w.masqueraded().udp(PORTS, b"data"))
        .leaves(vec![
            w.forward(PORTS, 17, PORTS.0, Nat::one(0, &inner)),
            w.reverse(PORTS, 17, PORTS.0, Nat::default()),
        ])
        .counts(masqueraded(w), 1, inner.len())
        .counts(new_flow(w), 1, 0)
}

/// The same packet, refused.
fn refused(w: &World, name: &str, reason: DropReason) -> Scenario {
    let inner = w.out().udp(PORTS, b"data");
    row(w, name, &w.to_gateway(&inner)).prohibits(w, reason, &inner)
}

fn shares(w: &World) -> Vec<Scenario> {
    let [client, remote, pair] = hashes(w, PORTS.1, 17);
    let usage = |cells, of| counts(names::MAP_GATEWAY_USAGE, cells, of);
    let client = |of| usage(gateway_cells(family(w), Share::Client, client), of);
    let pair = |of| usage(gateway_cells(family(w), Share::Remote, pair), of);
    let total = |of: u64| vec![Entry::new(names::MAP_GATEWAY_USAGE, &gateway_total(family(w)), &of)];
    let full = |hash: u64, until: u32| {
        let note = (hash >> 40 << 40) | (8 << 32) | u64::from(until);
        vec![Entry::new(names::MAP_FULL_REMOTES, &full_remote(family(w), remote), &note)]
    };
    let limited = |mut row: Scenario| {
        row.config.nat_admit = 900;
        row.config.nat_client_flows = 100;
        row.config.nat_client_ports = 10;
        row
    };
    let inner = w.out().udp(PORTS, b"data");
    let before = Nat { state: CONFIRMED, packets: 3, bytes: 300 };
    let after = Nat { packets: 4, bytes: 300 + inner.len() as u64, ..before };
    let known = row(w, "a flow that exists goes on, whatever is used up", &w.to_gateway(&inner))
        .and([client([100; 2]), pair([10; 2]), total(900), full(remote, u32::MAX)].concat())
        .and(vec![w.forward(PORTS, 17, 50000, before), w.reverse(PORTS, 17, 50000, Nat::default())])
        .returns(&w.masqueraded().udp((50000, PORTS.1), b"data"))
        .leaves(vec![w.forward(PORTS, 17, 50000, after), w.reverse(PORTS, 17, 50000, Nat::default())])
        .counts(masqueraded(w), 1, inner.len());
    let refused = |name, reason, entries| limited(refused(w, name, reason).and(entries));
    let opens = |name, entries| limited(opens(w, name).and(entries));
    vec![
        limited(known),
        opens("clients below their shares", [client([99; 2]), pair([9; 2]), total(899)].concat()),
        opens("others share one cell of two", [client([100, 3]), pair([3, 10])].concat()),
        opens("counts below zero", [client([u64::MAX; 2]), pair([u64::MAX; 2]), total(u64::MAX)].concat()),
        refused("table nearly full", DropReason::NatAdmission, total(900)),
        refused("client with its share of flows", DropReason::ClientFlowQuota, client([100, 107])),
        refused("client with its share of ports", DropReason::ClientPortQuota, pair([11, 10])),
        refused("remote noted as full", DropReason::DestinationFull, full(remote, u32::MAX)),
        opens("remote noted as full a while ago", full(remote, 1)),
        opens("another remote noted as full", full(!remote, u32::MAX)),
    ]
}

/// The only port of the range belongs to another connection, from port 39999 of the pod by default.
fn one_port(mut row: Scenario) -> Scenario {
    row.config.nat_port_first = PORTS.0;
    row.config.nat_port_last = PORTS.0;
    row
}

fn reuse(w: &World) -> Vec<Scenario> {
    let syn = w.out().tcp(PORTS, SYN, &[], b"");
    let old = (39999, PORTS.1);
    let forward = |state| w.forward(old, 6, PORTS.0, Nat { state, packets: 5, bytes: 500 });
    let reverse = |state| w.reverse(old, 6, PORTS.0, Nat { state, packets: 7, bytes: 700 });
    let exhausted = |name: &str, entries: Vec<Entry>| {
        one_port(row(w, name, &w.to_gateway(&syn)).and(entries.clone()).leaves(entries).prohibits(
            w,
            DropReason::PortsExhausted,
            &syn,
        ))
    };
    let taken_over = |name: &str, entries: Vec<Entry>| {
        one_port(
            row(w, name, &w.to_gateway(&syn))
                .and(entries)
                .returns(&w.masqueraded().tcp(PORTS, SYN, &[], b""))
                .leaves(vec![
                    w.forward(PORTS, 6, PORTS.0, Nat::one(STATE_SYN, &syn)),
                    w.reverse(PORTS, 6, PORTS.0, Nat { state: 0, packets: 7, bytes: 700 }),
                ])
                .counts(masqueraded(w), 1, syn.len())
                .counts(new_flow(w), 1, 0),
        )
    };
    let (fin, fins) = (CONFIRMED | STATE_FIN, STATE_REPLY | STATE_REPLY_FIN);
    let [_, _, pair] = hashes(w, PORTS.1, 6);
    let quota = |mut row: Scenario| {
        row.config.nat_client_ports = 10;
        let cells = gateway_cells(family(w), Share::Remote, pair);
        row.and(counts(names::MAP_GATEWAY_USAGE, cells, [10; 2]))
    };
    let mut others = exhausted(
        "the closed connection is another client's",
        vec![w.reverse_of(w.stranger, (7, PORTS.1), 6, PORTS.0, Nat { state: fins, packets: 7, bytes: 1 })],
    );
    others.config.nat_client_ports = 10;
    let mut refused =
        quota(exhausted("share of ports, none closed", vec![forward(CONFIRMED), reverse(STATE_REPLY)]));
    refused.expect.drop = Some(DropReason::ClientPortQuota);
    vec![
        taken_over(
            "a connection that both sides have closed gives its port",
            vec![forward(fin), reverse(fins)],
        ),
        taken_over(
            "a connection that was reset gives its port",
            vec![forward(CONFIRMED), reverse(STATE_REPLY | STATE_REPLY_RST)],
        ),
        taken_over("a closed connection without a forward half gives its port", vec![reverse(fins)]),
        quota(taken_over("share of ports, one closed", vec![forward(fin), reverse(fins)])),
        exhausted(
            "a connection that one side has closed keeps its port",
            vec![forward(CONFIRMED), reverse(fins)],
        ),
        exhausted("a connection that goes on keeps its port", vec![forward(CONFIRMED), reverse(STATE_REPLY)]),
        exhausted(
            "a connection closed just now keeps its port",
            vec![seen(forward(fin), NOW), seen(reverse(fins), NOW)],
        )
        .library_only("its clock goes on meanwhile"),
        others,
        refused,
    ]
}

fn halves(w: &World) -> Vec<Scenario> {
    let data = w.out().tcp(PORTS, ACK, &[], b"data");
    let syn = w.out().tcp(PORTS, SYN, &[], b"");
    let udp = w.out().udp(PORTS, b"data");
    let had = Nat { state: STATE_REPLY, packets: 7, bytes: 700 };
    let at = |mut row: Scenario, port: u16| {
        row.config.nat_port_first = port;
        row.config.nat_port_last = port;
        row
    };
    let found = |name: &str, (inner, leaves): (&[u8], &[u8]), protocol, port, state, reverse: Nat| {
        row(w, name, &w.to_gateway(inner))
            .and(vec![w.reverse(PORTS, protocol, port, had)])
            .returns(leaves)
            .leaves(vec![
                w.forward(PORTS, protocol, port, Nat::one(state, inner)),
                w.reverse(PORTS, protocol, port, reverse),
            ])
            .counts(masqueraded(w), 1, inner.len())
    };
    let out = w.masqueraded();
    let moved = (50000, PORTS.1);
    vec![
        found(
            "the forward half of a connection is rebuilt",
            (&data, &out.tcp(PORTS, ACK, &[], b"data")),
            6,
            PORTS.0,
            CONFIRMED,
            had,
        ),
        at(
            found(
                "the forward half of a connection with another port is rebuilt",
                (&data, &out.tcp(moved, ACK, &[], b"data")),
                6,
                50000,
                CONFIRMED,
                had,
            ),
            50000,
        ),
        found(
            "the forward half of a UDP flow is rebuilt",
            (&udp, &out.udp(PORTS, b"data")),
            17,
            PORTS.0,
            0,
            had,
        ),
        found(
            "a connection starts over where the forward half was lost",
            (&syn, &out.tcp(PORTS, SYN, &[], b"")),
            6,
            PORTS.0,
            STATE_SYN,
            Nat { state: 0, ..had },
        ),
        row(w, "no half of a connection is rebuilt from another's", &w.to_gateway(&data))
            .and(vec![w.reverse_of(w.stranger, PORTS, 6, PORTS.0, had)])
            .leaves(vec![w.reverse_of(w.stranger, PORTS, 6, PORTS.0, had)])
            .drops(DropReason::NoState),
    ]
}

fn resets(w: &World) -> Vec<Scenario> {
    let open = Nat { state: CONFIRMED, packets: 5, bytes: 500 };
    let (from, to) = ((443, 50000), (443, 40000));
    let back = |name: &str, flags: u8, last_seen: u32, state: (u32, u32)| {
        let packet = w.reply().tcp(from, flags, &[], b"");
        let forward = seen(w.forward(PORTS, 6, 50000, open), last_seen);
        let after = Nat { state: state.1, packets: 3, bytes: 200 + packet.len() as u64 };
        row(w, name, &packet)
            .and(vec![
                forward.clone(),
                w.reverse(PORTS, 6, 50000, Nat { state: state.0, packets: 2, bytes: 200 }),
            ])
            .returns(&w.to_client(&w.back().ttl(63).tcp(to, flags, &[], b"")))
            .leaves(vec![forward, w.reverse(PORTS, 6, 50000, after)])
            .counts(reply(w), 1, packet.len())
    };
    let reset = STATE_REPLY | STATE_REPLY_RST;
    let data = w.out().tcp(PORTS, ACK, &[], b"data");
    let belied = Nat { state: CONFIRMED | STATE_RST, ..open };
    let reverse = w.reverse(PORTS, 6, 50000, Nat { state: STATE_REPLY, packets: 2, bytes: 9 });
    vec![
        back("RST after the client has sent", 4, NOW - 1, (STATE_REPLY, reset)),
        back("RST after a long silence", 4, NOW - 60, (STATE_REPLY, STATE_REPLY)),
        back("more after a RST", ACK, NOW - 1, (reset, STATE_REPLY)),
        back("RST after a RST", 4, NOW - 1, (reset, reset)),
        row(w, "more from the client after its RST", &w.to_gateway(&data))
            .and(vec![seen(w.forward(PORTS, 6, 50000, belied), NOW), reverse.clone()])
            .returns(&w.masqueraded().tcp((50000, PORTS.1), ACK, &[], b"data"))
            .leaves(vec![
                w.forward(PORTS, 6, 50000, Nat { packets: 6, bytes: 500 + data.len() as u64, ..open }),
                reverse,
            ])
            .counts(masqueraded(w), 1, data.len()),
    ]
}

/// Packets from the world that are no replies.
fn strangers(w: &World) -> Vec<Scenario> {
    let world = w.reply();
    let tcp = |port, flags| world.tcp((443, port), flags, &[], b"");
    let excluded = |udp: bool| {
        let (word, bit) = excluded_port(udp, 9999);
        vec![Entry::new(names::MAP_EXCLUDED_PORTS, &word, &bit)]
    };
    vec![
        row(w, "ACK to a port of translation", &tcp(9999, ACK)).drops(DropReason::UnknownReply),
        row(w, "SYN-ACK to a port of translation", &tcp(9999, 18)).drops(DropReason::UnknownReply),
        row(w, "RST to a port of translation", &tcp(9999, 4)).drops(DropReason::UnknownReply),
        row(w, "UDP to a port of translation", &world.udp((443, 9999), b"x")).drops(DropReason::UnknownReply),
        row(w, "SYN to a port of translation", &tcp(9999, SYN)).passes(),
        row(w, "ACK to a port of the gateway's own", &tcp(8080, ACK)).passes(),
        row(w, "ACK to a port that a sidecar has", &tcp(9999, ACK)).and(excluded(false)).passes(),
        row(w, "ACK to a port that a sidecar has for UDP", &tcp(9999, ACK))
            .and(excluded(true))
            .drops(DropReason::UnknownReply),
        row(w, "UDP to a port that a sidecar has", &world.udp((443, 9999), b"x"))
            .and(excluded(true))
            .passes(),
        row(w, "ACK below the ports of translation", &tcp(1023, ACK)).passes(),
    ]
}

fn identifiers(w: &World) -> Vec<Scenario> {
    let inner = w.out().echo(true, 7777, b"ping");
    let mut moved = row(w, "identifier outside its range", &w.to_gateway(&inner))
        .returns(&w.masqueraded().echo(true, 500, b"ping"))
        .leaves(vec![
            w.forward((7777, 0), w.icmp(), 500, Nat::one(0, &inner)),
            w.reverse((7777, 0), w.icmp(), 500, Nat::default()),
        ])
        .counts(masqueraded(w), 1, inner.len())
        .counts(new_flow(w), 1, 0);
    moved.config.nat_id_first = 500;
    moved.config.nat_id_last = 500;
    vec![moved]
}

fn bare(w: &World) -> Vec<Scenario> {
    let payload = [0x1f, 0x90, 0, 80, 1, 2, 3, 4, 5, 6, 7, 8];
    let inner = w.out().packet(SCTP, &payload);
    let none = (0, 0);
    let address_only = |mut row: Scenario| {
        row.config.flags |= CONFIG_ADDRESS_ONLY;
        row
    };
    let opened = row(w, "SCTP by address", &w.to_gateway(&inner))
        .returns(&w.masqueraded().packet(SCTP, &payload))
        .leaves(vec![w.forward(none, SCTP, 0, Nat::one(0, &inner)), w.reverse(none, SCTP, 0, Nat::default())])
        .counts(masqueraded(w), 1, inner.len())
        .counts(new_flow(w), 1, 0);
    let theirs = w.reverse_of(w.stranger, none, SCTP, 0, Nat::default());
    let answer = w.reply().packet(SCTP, &payload);
    let halves =
        |reverse| vec![w.forward(none, SCTP, 0, Nat::one(0, &inner)), w.reverse(none, SCTP, 0, reverse)];
    let mut from_pod = w
        .scenario(Hook::FromPod, "SCTP by address", &inner)
        .becomes(&w.to_gateway(&inner))
        .leaves(vec![w.flow_entry((w.pod, w.remote, none, SCTP), sent(w.flow_value(), &inner, 0))])
        .counts_egress(w.egress(), Direction::Tx, &inner);
    from_pod.config.flags |= CONFIG_ADDRESS_ONLY;
    let mut rows = vec![
        address_only(opened),
        address_only(
            row(w, "SCTP to where another client sends it", &w.to_gateway(&inner))
                .and(vec![theirs.clone()])
                .leaves(vec![theirs])
                .prohibits(w, DropReason::AddressBusy, &inner),
        ),
        address_only(
            row(w, "SCTP of a reply", &answer)
                .and(halves(Nat::default()))
                .returns(&w.to_client(&w.back().ttl(63).packet(SCTP, &payload)))
                .leaves(halves(Nat::one(STATE_REPLY, &answer)))
                .counts(reply(w), 1, answer.len()),
        ),
        address_only(row(w, "SCTP of nobody", &answer).passes()),
        address_only(
            row(w, "SCTP cut short", &w.to_gateway(&w.out().packet(SCTP, &[1, 2, 3])))
                .drops(DropReason::Truncated),
        ),
        from_pod,
    ];
    rows.extend(bare_errors(w).map(address_only));
    // Their checksums cover addresses.
    for protocol in [33, 136] {
        let name = format!("protocol {protocol} by address");
        let packet = w.to_gateway(&w.out().packet(protocol, &payload));
        rows.push(address_only(row(w, &name, &packet).drops(DropReason::UnsupportedProtocol)));
    }
    rows
}

/// ICMP errors about packets of a protocol without ports, both ways; and its fragments.
fn bare_errors(w: &World) -> [Scenario; 5] {
    let payload = [0x1f, 0x90, 0, 80, 1, 2, 3, 4, 5, 6, 7, 8];
    let none = (0, 0);
    let (kind, code) = if w.is_v4() { (3, 1) } else { (1, 3) };
    let halves = || {
        let value = Nat::default();
        vec![w.forward(none, SCTP, 0, value), w.reverse(none, SCTP, 0, value)]
    };
    let about = |packet: &[u8], from: IpAddr, to: IpAddr| Ip::new(from, to).icmp(kind, code, [0; 4], packet);
    let theirs = about(&w.masqueraded().packet(SCTP, &payload), w.stranger, w.gateway);
    let ours =
        Ip::new(w.stranger, w.pod).ttl(63).icmp(kind, code, [0; 4], &w.out().ttl(63).packet(SCTP, &payload));
    let sent = about(&w.back().packet(SCTP, &payload), w.pod, w.remote);
    let masqueraded_error =
        Ip::new(w.gateway, w.remote).ttl(63).icmp(kind, code, [0; 4], &w.reply().packet(SCTP, &payload));
    let first = w.out().fragment(0, true).packet(SCTP, &[5; 64]);
    let later = w.out().fragment(8, false).packet(SCTP, &[6; 32]);
    let noted = |flags| w.datagram(w.pod, w.remote, none, SCTP, flags);
    [
        row(w, "ICMP error about SCTP", &theirs)
            .and(halves())
            .returns(&w.to_client(&ours))
            .leaves(halves())
            .counts(reply(w), 1, theirs.len())
            .counts_icmp(IcmpStat::ToPod),
        row(w, "ICMP error about SCTP of nobody", &theirs).passes(),
        row(w, "ICMP error of a pod about SCTP", &w.to_gateway(&sent))
            .and(halves())
            .returns(&masqueraded_error)
            .leaves(halves())
            .counts(masqueraded(w), 1, sent.len())
            .counts_icmp(IcmpStat::FromPod),
        row(w, "first fragment of SCTP", &w.to_gateway(&first))
            .returns(&w.masqueraded().fragment(0, true).packet(SCTP, &[5; 64]))
            .leaves(vec![
                w.forward(none, SCTP, 0, Nat::one(0, &first)),
                w.reverse(none, SCTP, 0, Nat::default()),
                noted(FRAGMENT_OPEN),
            ])
            .counts(masqueraded(w), 1, first.len())
            .counts(new_flow(w), 1, 0),
        row(w, "later fragment of SCTP", &w.to_gateway(&later))
            .and([halves(), vec![noted(FRAGMENT_OPEN)]].concat())
            .returns(&w.masqueraded().fragment(8, false).packet(SCTP, &[6; 32]))
            .leaves(vec![
                w.forward(none, SCTP, 0, Nat::one(0, &later)),
                w.reverse(none, SCTP, 0, Nat::default()),
                noted(0),
            ])
            .counts(masqueraded(w), 1, later.len()),
    ]
}

/// Shares of the node's table.
fn pods(w: &World) -> Vec<Scenario> {
    let packet = w.out().udp(PORTS, b"data");
    let tuple = (w.pod, w.remote, PORTS, 17);
    let cells = pod_cells(family(w), usage::pod(SEED, IFINDEX as u16));
    let row = |name: &str, used: u64| {
        let mut row = w.scenario(Hook::FromPod, name, &packet);
        row.config.pod_flows = 10;
        row.and(counts(names::MAP_POD_USAGE, cells, [used, used]))
    };
    vec![
        row("pod below its share of flows", 9)
            .becomes(&w.to_gateway(&packet))
            .leaves(vec![w.flow_entry(tuple, sent(w.flow_value(), &packet, 0))])
            .counts_egress(w.egress(), Direction::Tx, &packet),
        row("pod with its share of flows", 10)
            .answers(DropReason::PodFlowQuota, &w.error(w.remote, w.pod, w.prohibited(), 0, &packet)),
        row("a flow of a pod with its share goes on", 10)
            .and(vec![w.flow_entry(tuple, w.flow_value())])
            .becomes(&w.to_gateway(&packet))
            .leaves(vec![w.flow_entry(tuple, sent(w.flow_value(), &packet, CONFIRMED))])
            .counts_egress(w.egress(), Direction::Tx, &packet),
    ]
}
