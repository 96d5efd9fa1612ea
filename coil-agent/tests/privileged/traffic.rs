//! Real traffic from a client pod through a gateway to the world and back.

#![expect(clippy::unwrap_used, reason = "tests")]

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::OwnedFd;
use std::time::Duration;

use coil_agent::datapath::{AttachMode, Datapath, TunnelKind};
use coil_agent::gateway::ports::{NatPorts, PortSet};
use coil_common::keys::{FlowKey4, FlowKey6};
use coil_common::names::{
    MAP_EGRESS_STATS, MAP_FLOWS_V4, MAP_FLOWS_V6, MAP_GATEWAY_STATS, MAP_NAT_FORWARD_V4, MAP_NAT_REVERSE_V4,
};
use coil_common::stats::{Direction, DropReason, GatewayStat, egress_stat};
use coil_common::values::{FlowValue, NatValue4};
use nix::sys::socket::{AddressFamily, SockFlag, SockProtocol, SockType, socket};

use crate::support::topology::{Topology, egress_name};
use crate::support::{DEADLINE, maps, wait_for};

/// Bytes of a transfer, the same at both ends.
pub(crate) fn pattern(length: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend(state.to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

/// A TCP server in the world that sends back what it gets; returns its address and, when joined, the
/// peer's address and what it had sent.
pub(crate) fn echo_server(
    topology: &Topology,
    v6: bool,
) -> (SocketAddr, std::thread::JoinHandle<(SocketAddr, Vec<u8>)>) {
    let address = topology.external.address(v6);
    let (sender, receiver) = std::sync::mpsc::channel();
    let server = topology.external.net.spawn(move || {
        let listener = TcpListener::bind((address, 0)).unwrap();
        sender.send(listener.local_addr().unwrap()).unwrap();
        let (mut stream, peer) = listener.accept().unwrap();
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        let mut all = Vec::new();
        let mut buffer = vec![0; 1 << 16];
        loop {
            let count = stream.read(&mut buffer).unwrap();
            if count == 0 {
                break;
            }
            all.extend(&buffer[..count]);
            stream.write_all(&buffer[..count]).unwrap();
        }
        (peer, all)
    });
    (receiver.recv().unwrap(), server)
}

/// Sends bytes from the client pod, and returns what comes back.
pub(crate) fn send_tcp(topology: &Topology, server: SocketAddr, bytes: Vec<u8>) -> Vec<u8> {
    topology.client.net.run(move || {
        let mut stream = TcpStream::connect_timeout(&server, DEADLINE).unwrap();
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        let mut writer = stream.try_clone().unwrap();
        let sender = std::thread::spawn(move || {
            writer.write_all(&bytes).unwrap();
            writer.shutdown(std::net::Shutdown::Write).unwrap();
        });
        let mut back = Vec::new();
        stream.read_to_end(&mut back).unwrap();
        sender.join().unwrap();
        back
    })
}

/// A datagram there and back; the address that the world sees.
pub(crate) fn udp_peer(topology: &Topology, v6: bool, size: usize) -> Option<SocketAddr> {
    let address = topology.external.address(v6);
    let (sender, receiver) = std::sync::mpsc::channel();
    let server = topology.external.net.spawn(move || {
        let socket = UdpSocket::bind((address, 0)).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
        sender.send(socket.local_addr().unwrap()).unwrap();
        let mut buffer = vec![0; 65536];
        let (count, peer) = socket.recv_from(&mut buffer).ok()?;
        socket.send_to(&buffer[..count], peer).unwrap();
        Some(peer)
    });
    let server_address = receiver.recv().unwrap();
    let echoed = topology.client.net.run(move || {
        let any: IpAddr = if v6 { "::".parse().unwrap() } else { "0.0.0.0".parse().unwrap() };
        let socket = UdpSocket::bind((any, 0)).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
        let bytes = pattern(size);
        socket.send_to(&bytes, server_address).unwrap();
        let mut buffer = vec![0; 65536];
        let answer = socket.recv_from(&mut buffer).ok();
        answer.map(|(count, from)| from == server_address && buffer[..count] == bytes)
    });
    let peer = server.join().unwrap();
    assert_eq!(peer.is_some(), echoed == Some(true), "an answer must arrive as it was sent");
    peer
}

/// An echo request there and back.
fn ping(topology: &Topology, v6: bool) -> bool {
    let target = SocketAddr::new(topology.external.address(v6), 0);
    topology.client.net.run(move || {
        let (family, protocol, request, reply) = if v6 {
            (AddressFamily::Inet6, SockProtocol::IcmpV6, 128, 129)
        } else {
            (AddressFamily::Inet, SockProtocol::Icmp, 8, 0)
        };
        let socket: OwnedFd = socket(family, SockType::Raw, SockFlag::SOCK_CLOEXEC, protocol).unwrap();
        let socket = UdpSocket::from(socket);
        socket.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
        let mut packet = vec![request, 0, 0, 0, 0x12, 0x34, 0, 1];
        packet.extend(pattern(56));
        if !v6 {
            let sum: u32 =
                packet.chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum();
            let check = !((sum & 0xffff) + (sum >> 16)) as u16;
            packet[2..4].copy_from_slice(&check.to_be_bytes());
        }
        socket.send_to(&packet, target).unwrap();
        let mut buffer = vec![0; 2048];
        // Other messages, router advertisements for example, may come first.
        while let Ok((count, from)) = socket.recv_from(&mut buffer) {
            let message = if v6 { &buffer[..count] } else { &buffer[20..count] };
            if message[0] == reply && message[4..8] == packet[4..8] {
                assert_eq!(from.ip(), target.ip());
                assert_eq!(message[8..], packet[8..]);
                return true;
            }
        }
        false
    })
}

pub(crate) fn everything_works(topology: &Topology, mode: Option<AttachMode>) {
    let node = topology.open_node(mode);
    let node = topology.apply(node, &topology.state());
    let _gateway = topology.open_gateway();
    for v6 in [false, true] {
        let gateway = topology.gateway.address(v6);
        assert!(ping(topology, v6), "no echo reply; v6: {v6}\n{}", dump(topology));
        let peer = udp_peer(topology, v6, 1200);
        assert_eq!(peer.map(|peer| peer.ip()), Some(gateway), "{}", dump(topology));
        let (address, server) = echo_server(topology, v6);
        let sent = pattern(8 << 20);
        let back = send_tcp(topology, address, sent.clone());
        let (peer, arrived) = server.join().unwrap();
        assert_eq!(peer.ip(), gateway);
        assert!(arrived == sent && back == sent, "bytes were changed on their way");
        let map = if v6 { MAP_FLOWS_V6 } else { MAP_FLOWS_V4 };
        let flows = if v6 {
            maps::entries::<FlowKey6, FlowValue>(&topology.bpffs.node(), map).len()
        } else {
            maps::entries::<FlowKey4, FlowValue>(&topology.bpffs.node(), map).len()
        };
        assert_eq!(flows, 3, "one flow each for ping, UDP and TCP");
        let stat = |direction| {
            let index = egress_stat(u32::from(v6), direction);
            maps::counter(&topology.bpffs.node(), MAP_EGRESS_STATS, index)
        };
        let at_gateway = |v4, v6_stat| {
            let stat: GatewayStat = if v6 { v6_stat } else { v4 };
            maps::counter(&topology.gateway_pins(), MAP_GATEWAY_STATS, stat.index())
        };
        let tx = at_gateway(GatewayStat::MasqueradedV4, GatewayStat::MasqueradedV6);
        let rx = at_gateway(GatewayStat::ReplyV4, GatewayStat::ReplyV6);
        // What the node has counted is what the gateway has counted: nothing is lost here.
        assert_eq!((stat(Direction::Tx), stat(Direction::Rx)), (tx, rx), "{}", dump(topology));
        assert!(tx.bytes > 8 << 20 && rx.bytes > 8 << 20);
    }
    assert_eq!(maps::all_drops(&topology.bpffs.node()), []);
    assert_eq!(maps::all_drops(&topology.gateway_pins()), []);
    check_metrics(topology, &node);
}

/// What Prometheus is told is what the maps say.
fn check_metrics(topology: &Topology, node: &coil_agent::datapath::NodeDatapath) {
    let registry = prometheus::Registry::new();
    registry.register(node.collector().unwrap()).unwrap();
    let text = prometheus::TextEncoder::new().encode_to_string(&registry.gather()).unwrap();
    let tx = maps::counter(&topology.bpffs.node(), MAP_EGRESS_STATS, egress_stat(0, Direction::Tx));
    let labels = r#"{egress="nat",family="ipv4",namespace="internet"}"#;
    for line in [
        format!("coil_egress_tx_packets_total{labels} {}", tx.packets),
        format!("coil_egress_tx_bytes_total{labels} {}", tx.bytes),
        r#"coil_drops_total{reason="spoofed_source"} 0"#.to_owned(),
        r#"coil_datapath_map_entries{map="gateways"} 2"#.to_owned(),
        r#"coil_datapath_map_capacity{map="flows_v4"} 4096"#.to_owned(),
    ] {
        assert!(text.lines().any(|found| found == line), "{line}\n{text}");
    }
}

/// What helps to understand a failure.
pub(crate) fn dump(topology: &Topology) -> String {
    let node = topology.bpffs.node();
    let gateway = topology.gateway_pins();
    let gateway_drops = if gateway.exists() { maps::all_drops(&gateway) } else { Vec::new() };
    format!("drops: node {:?}, gateway {gateway_drops:?}", maps::all_drops(&node))
}

#[test]
#[ignore = "privileged: needs root and the eBPF object"]
fn traffic_goes_through_the_gateway_and_comes_back() {
    everything_works(&Topology::new(), None);
}

#[test]
#[ignore = "privileged: needs root and the eBPF object"]
fn traffic_goes_through_the_gateway_with_clsact() {
    everything_works(&Topology::new(), Some(AttachMode::Clsact));
}

#[test]
#[ignore = "privileged: needs root and the eBPF object"]
fn traffic_goes_through_a_gateway_on_another_node() {
    everything_works(&Topology::across(), None);
}

#[test]
#[ignore = "privileged: needs root and the eBPF object"]
fn policy_takes_effect_on_a_running_pod() {
    let topology = Topology::new();
    let node = topology.open_node(None);
    let with = topology.state();
    let mut without = with.clone();
    for pod in without.pods.values_mut() {
        pod.policy = None;
    }
    let mut closed = with.clone();
    closed.egresses.clear();
    let mut empty = with.clone();
    let egress = empty.egresses.get_mut(&egress_name()).unwrap();
    egress.v4.clear();
    egress.v6.clear();
    let _gateway = topology.open_gateway();
    let mut node = topology.apply(node, &without);
    for v6 in [false, true] {
        let (client, gateway) = (topology.client.address(v6), topology.gateway.address(v6));
        let peer = |topology: &Topology| udp_peer(topology, v6, 100).map(|peer| peer.ip());
        node = topology.apply(node, &without);
        assert_eq!(peer(&topology), Some(client));
        node = topology.apply(node, &with);
        assert_eq!(peer(&topology), Some(gateway), "{}", dump(&topology));
        // No gateway, or no Egress at all: nothing leaves, in particular not with its own address.
        node = topology.apply(node, &empty);
        assert_eq!(peer(&topology), None);
        node = topology.apply(node, &closed);
        assert_eq!(peer(&topology), None);
        node = topology.apply(node, &with);
        assert_eq!(peer(&topology), Some(gateway));
    }
    let pins = topology.bpffs.node();
    assert_eq!(maps::drops(&pins, DropReason::NoGateway), 2);
    assert_eq!(maps::drops(&pins, DropReason::EgressUnresolved), 2);
}

#[test]
#[ignore = "privileged: needs root and the eBPF object"]
fn a_gateway_serves_registered_clients_only() {
    let topology = Topology::new();
    let node = topology.open_node(None);
    let _node = topology.apply(node, &topology.state());
    let mut gateway = topology.open_gateway();
    gateway.clients.sync(&[].into(), true).unwrap();
    assert_eq!(udp_peer(&topology, false, 100), None);
    assert_eq!(maps::drops(&topology.gateway_pins(), DropReason::UnknownClient), 1);
    gateway.clients.sync(&[topology.client.address(false)].into(), true).unwrap();
    assert!(udp_peer(&topology, false, 100).is_some());
}

#[test]
#[ignore = "privileged: needs root and the eBPF object"]
fn bytes_are_exact_whatever_is_offloaded() {
    offloads(&Topology::new());
}

#[test]
#[ignore = "privileged: needs root and the eBPF object"]
fn bytes_are_exact_whatever_is_offloaded_across_nodes() {
    offloads(&Topology::across());
}

pub(crate) fn offloads(topology: &Topology) {
    let node = topology.open_node(None);
    let _node = topology.apply(node, &topology.state());
    let _gateway = topology.open_gateway();
    let sent = pattern(2 << 20);
    let mut hops = vec![
        (&topology.client.net, "eth0"),
        (&topology.node, "vclient"),
        (&topology.gateway.net, "eth0"),
        (topology.there(), "vgateway"),
        (&topology.external.net, "eth0"),
        (topology.there(), "vexternal"),
    ];
    if let Some(far) = &topology.far {
        hops.extend([(&topology.node, "vfar"), (far, "vnear")]);
    }
    for features in ["tso off gso off gro off", "tx off rx off", "tso on gso on gro on tx on rx on"] {
        for (space, name) in &hops {
            space.exec(&format!("ethtool -K {name} {features}"));
            for v6 in [false, true] {
                let (address, server) = echo_server(topology, v6);
                let back = send_tcp(topology, address, sent.clone());
                let (peer, arrived) = server.join().unwrap();
                assert_eq!(peer.ip(), topology.gateway.address(v6));
                assert!(arrived == sent && back == sent, "{features} at {name}, v6: {v6}");
            }
        }
    }
    assert_eq!(maps::all_drops(&topology.gateway_pins()), []);
}

/// Packets of clients come and go by interfaces that the node's routes name, so that a strict reverse path filter finds
/// nothing to object to, on any node or in any pod.
#[test]
#[ignore = "privileged: needs root and the eBPF object"]
fn everything_works_with_strict_reverse_path_filters() {
    for topology in [Topology::new(), Topology::across(), Topology::across().by(TunnelKind::Ipip)] {
        let hosts = [&topology.client.net, &topology.gateway.net, &topology.external.net];
        for space in hosts.into_iter().chain([&topology.node, topology.there()]) {
            space.sysctl("net.ipv4.conf.all.rp_filter", "1");
        }
        everything_works(&topology, None);
    }
}

#[test]
#[ignore = "privileged: needs root and the eBPF object"]
fn both_ends_learn_what_fits_into_the_tunnel() {
    let topology = Topology::new();
    let node = topology.open_node(None);
    let _node = topology.apply(node, &topology.state());
    let _gateway = topology.open_gateway();
    for v6 in [false, true] {
        let (family, data, mtu) = if v6 { ("-6", 1452, "mtu 14") } else { ("-4", 1472, "mtu 1472") };
        let external = topology.external.address(v6);
        // The first is too large, and is answered by an ICMP error; the route then knows.
        assert_eq!(udp_peer(&topology, v6, data), None);
        wait_for("the client's path MTU", || {
            let route = topology.client.net.ip(&format!("{family} route get {external}"));
            route.contains(mtu).then_some(())
        });
        // What is small goes there, and what is large cannot come back.
        let gateway = topology.gateway.address(v6);
        let (sender, receiver) = std::sync::mpsc::channel();
        let server = topology.external.net.spawn(move || {
            let socket = UdpSocket::bind((external, 0)).unwrap();
            sender.send(socket.local_addr().unwrap()).unwrap();
            socket.set_read_timeout(Some(DEADLINE)).unwrap();
            let (_, peer) = socket.recv_from(&mut [0; 10]).unwrap();
            socket.send_to(&pattern(data), peer).unwrap();
            socket
        });
        let address = receiver.recv().unwrap();
        topology.client.net.run(move || {
            let any: IpAddr = if v6 { "::".parse().unwrap() } else { "0.0.0.0".parse().unwrap() };
            UdpSocket::bind((any, 0)).unwrap().send_to(&[1], address).unwrap();
        });
        // An error for a socket that is closed teaches nobody.
        let _socket = server.join().unwrap();
        wait_for("the server's path MTU", || {
            let route = topology.external.net.ip(&format!("{family} route get {gateway}"));
            route.contains(mtu).then_some(())
        });
    }
    assert_eq!(maps::drops(&topology.bpffs.node(), DropReason::TooBig), 2);
    assert_eq!(maps::drops(&topology.gateway_pins(), DropReason::TooBig), 2);
}

#[test]
#[ignore = "privileged: needs root and the eBPF object"]
fn a_gateway_out_of_ports_keeps_what_it_has() {
    let topology = Topology::new();
    let node = topology.open_node(None);
    let _node = topology.apply(node, &topology.state());
    let mut options = topology.gateway_options();
    options.ports = NatPorts { range: 2000..=2003, identifiers: 2000..=2003, excluded: PortSet::of([2001]) };
    let mut gateway = topology.open_gateway_with(options);
    let external = topology.external.address(false);
    let (sender, receiver) = std::sync::mpsc::channel();
    let server = topology.external.net.spawn(move || {
        let socket = UdpSocket::bind((external, 0)).unwrap();
        sender.send(socket.local_addr().unwrap()).unwrap();
        socket.set_read_timeout(Some(DEADLINE)).unwrap();
        let mut peers = std::collections::BTreeSet::new();
        // Three fit; then the first again.
        for _ in 0..4 {
            let (_, peer) = socket.recv_from(&mut [0; 10]).unwrap();
            peers.insert(peer.port());
        }
        peers
    });
    let address = receiver.recv().unwrap();
    topology.client.net.run(move || {
        let sockets: Vec<_> = (0..10).map(|_| UdpSocket::bind("0.0.0.0:0").unwrap()).collect();
        for socket in &sockets {
            socket.send_to(&[1], address).unwrap();
        }
        sockets[0].send_to(&[1], address).unwrap();
    });
    let ports: Vec<u16> = server.join().unwrap().into_iter().collect();
    assert_eq!(ports, [2000, 2002, 2003], "no port twice, none that is excluded");
    let refused = [DropReason::PortsExhausted, DropReason::DestinationFull]
        .map(|reason| maps::drops(&topology.gateway_pins(), reason));
    assert!(refused[0] >= 1 && refused.iter().sum::<u64>() == 7, "{refused:?}");
    // Expired translations give their ports back.
    let translations = || {
        let count = |map| maps::entries::<FlowKey4, NatValue4>(&topology.gateway_pins(), map).len();
        (count(MAP_NAT_FORWARD_V4), count(MAP_NAT_REVERSE_V4))
    };
    assert_eq!(translations(), (3, 3));
    let now = coil_agent::datapath::seconds_since_boot().unwrap();
    while !gateway.collector.sweep(now, 100).unwrap() {}
    assert_eq!(translations(), (3, 3));
    while !gateway.collector.sweep(now + 1000, 100).unwrap() {}
    assert_eq!(translations(), (0, 0));
    assert!(udp_peer(&topology, false, 100).is_some());
}

#[test]
#[ignore = "privileged: needs root and the eBPF object"]
fn idle_flows_are_swept() {
    let topology = Topology::new();
    let node = topology.open_node(None);
    let mut node = topology.apply(node, &topology.state());
    let _gateway = topology.open_gateway();
    assert!(udp_peer(&topology, false, 100).is_some());
    let now = coil_agent::datapath::seconds_since_boot().unwrap();
    let first = node.sweep(now, 10_000).unwrap();
    assert_eq!((first.scanned, first.expired, first.finished), (1, 0, true));
    let later = node.sweep(now + 10_000, 10_000).unwrap();
    assert_eq!((later.expired, later.finished), (1, true));
    assert!(maps::entries::<FlowKey4, FlowValue>(&topology.bpffs.node(), MAP_FLOWS_V4).is_empty());
}
