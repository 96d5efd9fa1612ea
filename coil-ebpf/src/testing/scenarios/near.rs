//! Client and gateway on one node: who goes without a tunnel, and who may.

use std::net::IpAddr;

use coil_common::{
    config::CONFIG_NEAR,
    keys::{ClientKey4, ClientKey6},
    names,
    stats::{Direction, DropReason, GatewayStat},
    values::{
        FlowValue, NO_POLICY, POD_GATEWAY, PodValue, STATE_DIRECT, STATE_IPIP, STATE_REPLY, STATE_REPLY_FIN,
    },
};

use super::world::{ACK, CONFIRMED, Nat, PORTS, PORTS_BACK, SYN, World, sent};
use crate::testing::{
    Action, build,
    build::Ip,
    entries::Entry,
    scenario::{Hook, Scenario},
};

/// The interface of the other pod.
const OTHER: u32 = 9;

pub(super) fn rows(w: &World) -> Vec<Scenario> {
    [there(w), back(w), strays(w), at_gateway(w)].concat()
}

fn row(w: &World, hook: Hook, name: &str, packet: &[u8]) -> Scenario {
    let mut row = w.scenario(hook, &format!("same node, {name}"), packet);
    if hook != Hook::Gateway {
        row.config.flags |= CONFIG_NEAR;
    }
    row.near = true;
    row
}

fn off(mut row: Scenario) -> Scenario {
    row.config.flags &= !CONFIG_NEAR;
    row.name.push_str(", switched off");
    row
}

/// A pod of this node by its address.
fn near(addr: IpAddr, ifindex: u32) -> Entry {
    match addr {
        IpAddr::V4(addr) => Entry::new(names::MAP_NEAR_V4, &ClientKey4 { addr: addr.octets() }, &ifindex),
        IpAddr::V6(addr) => Entry::new(names::MAP_NEAR_V6, &ClientKey6 { addr: addr.octets() }, &ifindex),
    }
}

/// A gateway's pod.
fn gateway(addr: IpAddr) -> PodValue {
    PodValue {
        ipv4: World::octets4(addr),
        ipv6: World::octets6(addr),
        set: NO_POLICY,
        flags: POD_GATEWAY,
        mtu: 1500,
    }
}

fn pod(ifindex: u32, value: PodValue) -> Entry {
    Entry::new(names::MAP_PODS, &ifindex, &value)
}

/// A packet goes to another pod as it is, with these Ethernet addresses.
fn goes(mut row: Scenario, from: [u8; 6], to: [u8; 6]) -> Scenario {
    let mut bytes = row.packet.bytes.clone();
    bytes[..6].copy_from_slice(&to);
    bytes[6..12].copy_from_slice(&from);
    row.expect.action = Action::Back;
    row.expect.packet = Some(crate::testing::interpret::canonical(&bytes));
    row
}

fn there(w: &World) -> Vec<Scenario> {
    let tuple = (w.pod, w.remote, PORTS, 6);
    let flow = FlowValue { state: CONFIRMED | STATE_REPLY, ..w.flow_value() };
    let young = FlowValue { state: CONFIRMED, ..w.flow_value() };
    let data = w.out().tcp(PORTS, ACK, &[], b"data");
    let fin = w.out().tcp(PORTS, ACK | 1, &[], b"");
    let local = || vec![near(w.gateway, OTHER), pod(OTHER, gateway(w.gateway))];
    let known = |name: &str, packet: &[u8], flow: FlowValue, entries: Vec<Entry>, state: u32| {
        row(w, Hook::FromPod, name, packet)
            .and(entries)
            .and(vec![w.flow_entry(tuple, flow)])
            .leaves(vec![w.flow_entry(tuple, sent(flow, packet, state))])
            .counts_egress(w.egress(), Direction::Tx, packet)
    };
    let tunnelled = |row: Scenario, packet: &[u8]| row.becomes(&w.to_gateway(packet));
    let plain = PodValue { flags: 0, ..gateway(w.gateway) };
    vec![
        goes(known("known flow", &data, flow, local(), 0), build::RECEIVER, build::RECEIVER),
        off(tunnelled(known("known flow", &data, flow, local(), 0), &data)),
        tunnelled(known("not answered yet", &data, young, local(), 0), &data),
        tunnelled(known("it ends", &fin, flow, local(), coil_common::values::STATE_FIN), &fin),
        tunnelled(known("gateway elsewhere", &data, flow, vec![], 0), &data),
        tunnelled(known("interface of no pod", &data, flow, vec![near(w.gateway, OTHER)], 0), &data),
        tunnelled(
            known(
                "interface of another pod by now",
                &data,
                flow,
                vec![near(w.gateway, OTHER), pod(OTHER, gateway(w.stranger))],
                0,
            ),
            &data,
        ),
        tunnelled(
            known("no gateway any more", &data, flow, vec![near(w.gateway, OTHER), pod(OTHER, plain)], 0),
            &data,
        ),
    ]
}

fn back(w: &World) -> Vec<Scenario> {
    let tuple = (w.pod, w.remote, PORTS, 6);
    let flow = FlowValue { state: CONFIRMED | STATE_REPLY, ..w.flow_value() };
    let data = w.back().tcp(PORTS_BACK, ACK, &[], b"data");
    let syn = w.back().tcp(PORTS_BACK, SYN, &[], b"");
    let own = Ip::new(w.gateway, w.remote).tcp(PORTS, ACK, &[], b"data");
    let from = |name: &str, packet: &[u8]| {
        row(w, Hook::FromPod, name, packet)
            .with(w.node_entries_with(gateway(w.gateway)))
            .and(vec![near(w.pod, OTHER), pod(OTHER, w.pod_value())])
    };
    let answer = |name: &str, packet: &[u8]| {
        let mut received = flow;
        received.rx_packets += 1;
        received.rx_bytes += packet.len() as u64;
        goes(from(name, packet), build::SENDER, build::RECEIVER)
            .and(vec![w.flow_entry(tuple, flow)])
            .leaves(vec![w.flow_entry(tuple, received)])
            .counts_egress(w.egress(), Direction::Rx, packet)
    };
    let strange = PodValue { set: 77, ..w.pod_value() };
    let moved = PodValue { ipv4: [9; 4], ipv6: [9; 16], ..w.pod_value() };
    vec![
        answer("answer", &data),
        goes(from("answer to no known flow", &data), build::SENDER, build::RECEIVER),
        off(from("answer", &data).drops(DropReason::SpoofedSource)),
        from("what is no data", &syn).drops(DropReason::SpoofedSource),
        from("to a pod that is no client of it", &data)
            .and(vec![pod(OTHER, strange)])
            .drops(DropReason::SpoofedSource),
        from("to a pod that is another by now", &data)
            .and(vec![pod(OTHER, moved)])
            .drops(DropReason::SpoofedSource),
        from("to nobody here", &Ip::new(w.remote, w.stranger).tcp(PORTS_BACK, ACK, &[], b"data"))
            .drops(DropReason::SpoofedSource),
        from("what it has translated", &own).passes(),
        from("by the tunnel", &w.to_client(&data)).passes(),
    ]
}

/// What comes to a gateway's interface by routes or bridges.
fn strays(w: &World) -> Vec<Scenario> {
    let to = |name: &str, dst: IpAddr| {
        row(w, Hook::ToPod, name, &Ip::new(w.pod, dst).udp(PORTS, b"data"))
            .with(w.node_entries_with(gateway(w.gateway)))
    };
    let group: IpAddr = if w.is_v4() { [224, 0, 0, 1].into() } else { [0xff02, 0, 0, 0, 0, 0, 0, 1].into() };
    vec![
        to("stray packet", w.remote).drops(DropReason::NotForGateway),
        off(to("stray packet", w.remote).passes()),
        to("for the gateway", w.gateway).passes(),
        to("for a group", group).passes(),
    ]
}

fn at_gateway(w: &World) -> Vec<Scenario> {
    let (masqueraded, new, reply) = if w.is_v4() {
        (GatewayStat::MasqueradedV4, GatewayStat::NewFlowV4, GatewayStat::ReplyV4)
    } else {
        (GatewayStat::MasqueradedV6, GatewayStat::NewFlowV6, GatewayStat::ReplyV6)
    };
    // Shorter ones come by the tunnel.
    let udp = w.out().udp(PORTS, b"data of a datagram");
    let data = w.out().tcp(PORTS, ACK, &[], b"data");
    let half = |state: u32| {
        vec![
            w.forward(PORTS, 6, PORTS.0, Nat::fresh(CONFIRMED | state)),
            w.reverse(PORTS, 6, PORTS.0, Nat::fresh(STATE_REPLY | state)),
        ]
    };
    let known = |name: &str, before: u32, after: u32| {
        row(w, Hook::Gateway, name, &data)
            .and(half(before))
            .returns(&w.masqueraded().tcp(PORTS, ACK, &[], b"data"))
            .leaves(vec![
                w.forward(PORTS, 6, PORTS.0, Nat::one(CONFIRMED | after, &data)),
                w.reverse(PORTS, 6, PORTS.0, Nat::fresh(STATE_REPLY | after)),
            ])
            .counts(masqueraded, 1, data.len())
    };
    let late = w.out().ttl(1).udp(PORTS, b"data of a datagram");
    let exceeded = w.error(w.gateway, w.pod, if w.is_v4() { [11, 0] } else { [3, 0] }, 0, &late);
    let answer = w.reply().tcp(PORTS_BACK, ACK, &[], b"data");
    let inner = w.back().ttl(63).tcp(PORTS_BACK, ACK, &[], b"data");
    let end = w.reply().tcp(PORTS_BACK, ACK | 1, &[], b"");
    let ended = w.back().ttl(63).tcp(PORTS_BACK, ACK | 1, &[], b"");
    let replies = |name: &str, packet: &[u8], becomes: &[u8], state: u32| {
        row(w, Hook::Gateway, name, packet)
            .and(half(STATE_DIRECT))
            .returns(becomes)
            .leaves(vec![
                w.forward(PORTS, 6, PORTS.0, Nat::fresh(CONFIRMED | STATE_DIRECT)),
                w.reverse(PORTS, 6, PORTS.0, Nat::one(STATE_REPLY | STATE_DIRECT | state, packet)),
            ])
            .counts(reply, 1, packet.len())
    };
    vec![
        known("flow that was tunnelled", 0, STATE_DIRECT),
        known("flow that was tunnelled by IP in IP", STATE_IPIP, STATE_IPIP | STATE_DIRECT),
        known("flow that was not", STATE_DIRECT, STATE_DIRECT),
        row(w, Hook::Gateway, "datagram of a flow that the gateway has lost", &udp)
            .returns(&w.masqueraded().udp(PORTS, b"data of a datagram"))
            .leaves(vec![
                w.forward(PORTS, 17, PORTS.0, Nat::one(STATE_DIRECT, &udp)),
                w.reverse(PORTS, 17, PORTS.0, Nat::fresh(STATE_DIRECT)),
            ])
            .counts(masqueraded, 1, udp.len())
            .counts(new, 1, 0),
        row(w, Hook::Gateway, "segment of a flow that the gateway has lost", &data)
            .drops(DropReason::NoState),
        row(w, Hook::Gateway, "from a stranger", &Ip::new(w.stranger, w.remote).udp(PORTS, b"x")).passes(),
        row(w, Hook::Gateway, "fragment", &w.out().fragment(0, true).packet(17, &udp[w.header()..])).passes(),
        row(w, Hook::Gateway, "TTL used up", &late).answers(DropReason::TtlExceeded, &exceeded),
        replies("answer", &answer, &inner, 0),
        // What is no data goes by the tunnel.
        replies("end of an answer", &end, &w.to_client(&ended), STATE_REPLY_FIN),
    ]
}
