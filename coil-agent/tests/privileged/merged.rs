//! Interfaces that merge UDP (GRO, by `rx-udp-gro-forwarding` or `rx-gro-list`): tunnels with checksums, of which
//! several packets become one, and the datagrams of flows. Our own tunnels have no checksum, so nobody merges them.

#![expect(clippy::unwrap_used, reason = "tests")]

use std::io::ErrorKind;
use std::net::{SocketAddr, UdpSocket};
use std::path::Path;

use coil_agent::datapath::TunnelKind;
use coil_common::stats::DropReason;
use nix::sys::socket::{setsockopt, sockopt::UdpGsoSegment};

use crate::summed::packet;
use crate::support::net::NetNs;
use crate::support::topology::{GATEWAY_UID, Host, Topology};
use crate::support::{DEADLINE, maps, wait_for};
use crate::traffic::dump;
use crate::tunnel::{many_datagrams_at_once, ways};

const FOU: u16 = 5555;
const COUNT: usize = 8;
const MERGERS: [&str; 2] = ["rx-udp-gro-forwarding", "rx-gro-list"];

/// The node merges what comes from a host, which its interface sends in single packets, but all at once.
fn merge(node: &NetNs, host: &Host, by: &str) {
    host.net.exec("ethtool -K eth0 tx-udp-segmentation off tso off");
    node.exec(&format!("ethtool -K {} gro on {by} on", host.at_node));
}

/// A receiver of datagrams, and where it is.
fn receiver(host: &Host, v6: bool) -> (UdpSocket, SocketAddr) {
    let address = host.address(v6);
    let socket = host.net.run(move || UdpSocket::bind((address, 0)).unwrap());
    socket.set_read_timeout(Some(DEADLINE)).unwrap();
    let at = socket.local_addr().unwrap();
    (socket, at)
}

/// What is in the tunnelled packet of this number.
fn data(number: usize) -> Vec<u8> {
    vec![u8::try_from(number).unwrap(); 500]
}

/// Sends tunnelled packets with checksums, all at once, as a stack that is not ours would.
fn burst(sender: &Host, to: &Host, v6: bool, inner: (SocketAddr, SocketAddr)) {
    let packets: Vec<_> = (0..COUNT).map(|number| packet(inner.0, inner.1, &data(number))).collect();
    let (own, to) = (sender.address(v6), to.address(v6));
    sender.net.run(move || {
        let socket = UdpSocket::bind((own, FOU)).unwrap();
        setsockopt(&socket, UdpGsoSegment, &i32::try_from(packets[0].len()).unwrap()).unwrap();
        socket.send_to(&packets.concat(), (to, FOU)).unwrap();
    });
}

/// All of them have arrived, whatever the order.
fn all_arrive(socket: &UdpSocket, what: &str, topology: &Topology) {
    let mut numbers = Vec::new();
    let mut buffer = [0; 2048];
    for _ in 0..COUNT {
        let Ok(count) = socket.recv(&mut buffer) else { break };
        assert_eq!(&buffer[..count], data(buffer[0].into()), "{what}");
        numbers.push(usize::from(buffer[0]));
    }
    numbers.sort_unstable();
    assert_eq!(numbers, (0..COUNT).collect::<Vec<_>>(), "{what}; {}", dump(topology));
}

/// Some of them were one, which was dropped and counted as so many; the others have arrived.
fn merged_are_counted(socket: &UdpSocket, pins: &Path, before: u64, what: &str) {
    let dropped = || usize::try_from(maps::drops(pins, DropReason::MergedTunnel) - before).unwrap();
    let mut arrived = 0;
    let mut buffer = [0; 2048];
    socket.set_nonblocking(true).unwrap();
    wait_for("the drops", || {
        match socket.recv(&mut buffer) {
            Ok(_) => arrived += 1,
            Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock),
        }
        (arrived + dropped() >= COUNT).then_some(())
    });
    socket.set_nonblocking(false).unwrap();
    assert_eq!(arrived + dropped(), COUNT, "{what}");
    // Or this test tests nothing.
    assert!(dropped() > 1, "{what}: nothing was merged");
}

#[test]
#[ignore = "privileged: needs root and the eBPF object"]
fn merged_tunnels_are_taken_apart_before_a_gateway() {
    for by in MERGERS {
        let topology = Topology::new();
        let mut state = topology.state();
        // The client is not ours.
        state.pods.retain(|uid, _| uid == GATEWAY_UID);
        let mut node = topology.apply(topology.open_node(None), &state);
        let _gateway = topology.open_gateway();
        merge(&topology.node, &topology.client, by);
        let pins = topology.gateway_pins();
        for v6 in [false, true] {
            let what = format!("{by}, v6: {v6}");
            let (socket, server) = receiver(&topology.external, v6);
            let inner = (SocketAddr::new(topology.client.address(v6), 4000), server);
            burst(&topology.client, &topology.gateway, v6, inner);
            all_arrive(&socket, &what, &topology);
            assert_eq!(maps::drops(&pins, DropReason::MergedTunnel), if v6 { COUNT as u64 } else { 0 });

            // Without what the agent does at the gateway's interface.
            topology.node.exec("ethtool -K vgateway tx-udp-segmentation on");
            let before = maps::drops(&pins, DropReason::MergedTunnel);
            burst(&topology.client, &topology.gateway, v6, inner);
            merged_are_counted(&socket, &pins, before, &what);

            // It does it again.
            coil_agent::datapath::Datapath::resync(&mut node);
            node = topology.apply(node, &state);
            burst(&topology.client, &topology.gateway, v6, inner);
            all_arrive(&socket, &what, &topology);
        }
    }
}

#[test]
#[ignore = "privileged: needs root and the eBPF object"]
fn merged_tunnels_to_a_client_are_dropped_and_counted() {
    for by in MERGERS {
        let topology = Topology::new();
        let _node = topology.apply(topology.open_node(None), &topology.state());
        // The gateway is not ours.
        merge(&topology.node, &topology.gateway, by);
        let pins = topology.bpffs.node();
        for v6 in [false, true] {
            let what = format!("{by}, v6: {v6}");
            let (socket, client) = receiver(&topology.client, v6);
            let inner = (SocketAddr::new(topology.external.address(v6), 4000), client);
            let before = maps::drops(&pins, DropReason::MergedTunnel);
            burst(&topology.gateway, &topology.client, v6, inner);
            merged_are_counted(&socket, &pins, before, &what);

            // The remedy.
            topology.node.exec(&format!("ethtool -K vgateway {by} off"));
            burst(&topology.gateway, &topology.client, v6, inner);
            all_arrive(&socket, &what, &topology);
            topology.node.exec(&format!("ethtool -K vgateway {by} on"));
        }
    }
}

/// Packets that the node's stack has been handed, of both families.
fn received(node: &NetNs) -> u64 {
    let v4 = node.exec("cat /proc/net/snmp");
    let mut lines = v4.lines().filter(|line| line.starts_with("Ip:"));
    let (names, values) = (lines.next().unwrap(), lines.next().unwrap());
    let at = names.split(' ').position(|name| name == "InReceives").unwrap();
    let v4: u64 = values.split(' ').nth(at).unwrap().parse().unwrap();
    let v6 = node.exec("cat /proc/net/snmp6");
    let v6 = v6.lines().find_map(|line| line.strip_prefix("Ip6InReceives")).unwrap();
    v4 + v6.trim().parse::<u64>().unwrap()
}

/// Datagrams of a flow that the node merges on both sides of it.
#[test]
#[ignore = "privileged: needs root and the eBPF object"]
fn merged_datagrams_of_a_flow_arrive() {
    for by in MERGERS {
        for (topology, redirect) in ways().filter(|(topology, _)| topology.far.is_none()) {
            merge(&topology.node, &topology.client, by);
            merge(&topology.node, &topology.external, by);
            let before = received(&topology.node);
            many_datagrams_at_once(&topology, redirect);
            let received = received(&topology.node) - before;
            // Twenty there and back, in two families, each at two of the node's interfaces: 160 if none were merged.
            assert!(received < 120, "{by}: nothing was merged: {received} packets");
            assert_eq!(maps::all_drops(&topology.bpffs.node()), [], "{by}");
            assert_eq!(maps::all_drops(&topology.gateway_pins()), [], "{by}");
        }
    }
}

/// Tunnels of ours have no checksum, which is what merging them takes.
#[test]
#[ignore = "privileged: needs root and the eBPF object"]
fn nobody_merges_our_tunnels() {
    for by in MERGERS {
        for kind in [TunnelKind::Fou, TunnelKind::Ipip] {
            let topology = Topology::across().by(kind);
            let far = topology.there();
            for (net, card) in [(&topology.node, "vfar"), (far, "vnear")] {
                net.exec(&format!(
                    "ethtool -K {card} tx-udp-segmentation off tx-udp_tnl-segmentation off tso off gro on {by} on"
                ));
            }
            many_datagrams_at_once(&topology, false);
            assert_eq!(maps::all_drops(&topology.bpffs.node()), [], "{by}, {kind:?}");
            assert_eq!(maps::all_drops(&topology.gateway_pins()), [], "{by}, {kind:?}");
        }
    }
}
