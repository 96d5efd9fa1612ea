//! ICMP errors, fragments and path MTU with real stacks at both ends.

#![expect(clippy::unwrap_used, reason = "tests")]

use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::time::Duration;

use coil_common::names::MAP_ICMP_STATS;
use coil_common::stats::{DropReason, IcmpStat};
use nix::sys::socket::{setsockopt, sockopt};

use crate::support::topology::Topology;
use crate::support::{DEADLINE, maps, wait_for};
use crate::traffic::pattern;

fn any(v6: bool) -> SocketAddr {
    let any: IpAddr = if v6 { "::".parse().unwrap() } else { "0.0.0.0".parse().unwrap() };
    (any, 0).into()
}

/// A datagram socket of the client, connected to a port of the world.
fn connected(v6: bool, to: SocketAddr) -> UdpSocket {
    let socket = UdpSocket::bind(any(v6)).unwrap();
    socket.set_read_timeout(Some(DEADLINE)).unwrap();
    socket.connect(to).unwrap();
    socket
}

fn icmp(folder: &std::path::Path, stat: IcmpStat) -> u64 {
    maps::counter(folder, MAP_ICMP_STATS, stat.index()).packets
}

/// Sends a datagram from the client to the world and back; it arrived both times, as it was.
fn exchange(topology: &Topology, v6: bool, size: usize) -> bool {
    const PATIENCE: Duration = Duration::from_secs(2);
    let address = topology.external.address(v6);
    let (sender, receiver) = std::sync::mpsc::channel();
    let server = topology.external.net.spawn(move || {
        let socket = UdpSocket::bind((address, 0)).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        sender.send(socket.local_addr().unwrap()).unwrap();
        let mut buffer = vec![0; 65536];
        let (count, peer) = socket.recv_from(&mut buffer).ok()?;
        socket.send_to(&buffer[..count], peer).unwrap();
        Some(buffer[..count] == pattern(size))
    });
    let server_address = receiver.recv().unwrap();
    let came_back = topology.client.net.run(move || {
        let socket = UdpSocket::bind(any(v6)).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        let bytes = pattern(size);
        socket.send_to(&bytes, server_address).unwrap();
        let mut buffer = vec![0; 65536];
        socket.recv_from(&mut buffer).ok().map(|(count, _)| buffer[..count] == bytes)
    });
    let arrived = server.join().unwrap();
    assert!(arrived != Some(false) && came_back != Some(false), "{size} bytes arrived as others");
    arrived.is_some() && came_back.is_some()
}

/// Sends datagrams until one gets there and back: each end may lose one to learn the path's MTU.
fn exchange_in_the_end(topology: &Topology, v6: bool, size: usize) -> bool {
    (0..4).any(|_| exchange(topology, v6, size))
}

#[test]
#[ignore = "privileged: needs root and the eBPF object"]
fn errors_find_their_way() {
    let topology = Topology::new();
    let node = topology.open_node(None);
    let _node = topology.apply(node, &topology.state());
    let _gateway = topology.open_gateway();
    for v6 in [false, true] {
        let external = topology.external.address(v6);
        // Nobody listens there: the remote host says so.
        let refused = topology.client.net.run(move || {
            let socket = connected(v6, (external, 9).into());
            socket.send(b"hello").unwrap();
            socket.recv(&mut [0; 10]).map_err(|error| error.kind())
        });
        assert_eq!(refused, Err(ErrorKind::ConnectionRefused), "v6: {v6}");

        // The pod does not listen any more: the pod says so.
        let (sender, receiver) = std::sync::mpsc::channel();
        let (go, gone) = std::sync::mpsc::channel();
        let server = topology.external.net.spawn(move || {
            let socket = UdpSocket::bind((external, 0)).unwrap();
            socket.set_read_timeout(Some(DEADLINE)).unwrap();
            sender.send(socket.local_addr().unwrap()).unwrap();
            let (_, peer) = socket.recv_from(&mut [0; 10]).unwrap();
            socket.connect(peer).unwrap();
            gone.recv_timeout(DEADLINE).unwrap();
            socket.send(b"too late").unwrap();
            socket.recv(&mut [0; 10]).map_err(|error| error.kind())
        });
        let address = receiver.recv().unwrap();
        topology.client.net.run(move || connected(v6, address).send(b"hello").unwrap());
        go.send(()).unwrap();
        assert_eq!(server.join().unwrap(), Err(ErrorKind::ConnectionRefused), "v6: {v6}");

        // The gateway is a hop, and says so.
        let expired = topology.client.net.run(move || {
            let socket = connected(v6, (external, 9).into());
            if v6 {
                setsockopt(&socket, sockopt::Ipv6RecvErr, &true).unwrap();
                setsockopt(&socket, sockopt::Ipv6Ttl, &1).unwrap();
            } else {
                setsockopt(&socket, sockopt::Ipv4RecvErr, &true).unwrap();
                socket.set_ttl(1).unwrap();
            }
            socket.send(&pattern(1000)).unwrap();
            socket.recv(&mut [0; 10]).map_err(|error| error.kind())
        });
        assert_eq!(expired, Err(ErrorKind::HostUnreachable), "v6: {v6}");
    }
    let (node, gateway) = (topology.bpffs.node(), topology.gateway_pins());
    assert_eq!(maps::all_drops(&node), []);
    assert_eq!(maps::all_drops(&gateway), [(DropReason::TtlExceeded.name(), 2)]);
    assert_eq!(icmp(&gateway, IcmpStat::ToPod), 2);
    assert_eq!(icmp(&gateway, IcmpStat::FromPod), 2);
    assert_eq!(icmp(&gateway, IcmpStat::Answered), 2);
    assert_eq!(icmp(&node, IcmpStat::FromPod), 2);
}

#[test]
#[ignore = "privileged: needs root and the eBPF object"]
fn datagrams_in_fragments_arrive_whole() {
    let topology = Topology::across();
    let node = topology.open_node(None);
    let _node = topology.apply(node, &topology.state());
    let _gateway = topology.open_gateway();
    for v6 in [false, true] {
        // The first fragments of the first datagram each way are too large, and both ends learn that.
        assert!(exchange_in_the_end(&topology, v6, 8192), "v6: {v6}");
        for size in [1473, 2945, 20_001, 60_000] {
            assert!(exchange(&topology, v6, size), "{size} bytes, v6: {v6}");
        }
    }
}

#[test]
#[ignore = "privileged: needs root and the eBPF object"]
fn both_ends_learn_what_fits_between_pod_and_gateway() {
    let topology = Topology::across();
    let node = topology.open_node(None);
    let _node = topology.apply(node, &topology.state());
    let _gateway = topology.open_gateway();
    topology.node.ip("link set vfar mtu 1400");
    topology.there().ip("link set vnear mtu 1400");
    for v6 in [false, true] {
        let (family, mtu) = if v6 { ("-6", "mtu 1352") } else { ("-4", "mtu 1372") };
        let external = topology.external.address(v6);
        // Fits the tunnel, as far as its ends know.
        assert!(!exchange(&topology, v6, 1400));
        wait_for("the client's path MTU", || {
            let route = topology.client.net.ip(&format!("{family} route get {external}"));
            route.contains(mtu).then_some(())
        });
        // In fragments it gets there, and back once the remote host has learnt too.
        assert!(exchange_in_the_end(&topology, v6, 1400), "v6: {v6}");
        let gateway = topology.gateway.address(v6);
        let route = topology.external.net.ip(&format!("{family} route get {gateway}"));
        assert!(route.contains(mtu), "{route}");
    }
    assert!(maps::drops(&topology.bpffs.node(), DropReason::UnderlayTooBig) >= 2);
    assert!(maps::drops(&topology.gateway_pins(), DropReason::UnderlayTooBig) >= 2);
}
