//! A connection goes on while strangers send what they have made up: tunnelled packets, ICMP errors, RSTs.

#![expect(clippy::unwrap_used, reason = "tests")]

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsRawFd, OwnedFd};

use coil_common::stats::DropReason;
use coil_ebpf::testing::build::{self, Ip};
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrStorage, sendto, socket,
};

use crate::support::topology::Topology;
use crate::support::{DEADLINE, maps};
use crate::traffic::{dump, pattern};

const ACK: u8 = 16;
const RST: u8 = 4;
/// A port of translation that nobody has.
const NOBODY: u16 = 2000;
/// Times that everything is sent.
const ROUNDS: u64 = 40;

/// Sends IP packets as they are.
struct Raw(OwnedFd);

impl Raw {
    /// From the world.
    fn new(topology: &Topology, v6: bool) -> Self {
        let family = if v6 { AddressFamily::Inet6 } else { AddressFamily::Inet };
        let open = move || socket(family, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::Raw).unwrap();
        Self(topology.external.net.run(open))
    }

    fn send(&self, to: IpAddr, packet: &[u8]) {
        let to = SockaddrStorage::from(SocketAddr::new(to, 0));
        assert_eq!(sendto(self.0.as_raw_fd(), packet, &to, MsgFlags::empty()).unwrap(), packet.len());
    }
}

/// What is forged, to whom, and why it is dropped; `None`: it is passed on, and ends nothing.
fn forgeries(
    topology: &Topology,
    v6: bool,
    (server, seen): (u16, u16),
) -> Vec<(IpAddr, Vec<u8>, Option<DropReason>)> {
    let (world, gateway, pod) =
        (topology.external.address(v6), topology.gateway.address(v6), topology.client.address(v6));
    let unreachable = if v6 { (1, 4) } else { (3, 3) };
    let from_world = Ip::new(world, gateway);
    let error = |quoted: &[u8]| from_world.icmp(unreachable.0, unreachable.1, [0; 4], quoted);
    let inner = Ip::new(world, world).udp((1, 2), b"forged");
    let answer = Ip::new(world, pod).tcp((server, seen), ACK, &[], b"forged");
    let sent = |from, port| Ip::new(from, world).tcp((port, server), ACK, &[], b"forged");
    vec![
        (gateway, build::tunnel(world, gateway, &inner), Some(DropReason::UnknownClient)),
        (gateway, build::ipip(world, gateway, &inner), Some(DropReason::UnknownClient)),
        (pod, build::tunnel(world, pod, &answer), Some(DropReason::UnknownGateway)),
        (gateway, error(&sent(gateway, NOBODY)), Some(DropReason::IcmpNoFlow)),
        (gateway, error(&sent(pod, seen)), Some(DropReason::IcmpMismatch)),
        (gateway, from_world.tcp((server, NOBODY), ACK, &[], b"forged"), Some(DropReason::UnknownReply)),
        // Only the pod itself can see that the sequence numbers are wrong.
        (gateway, from_world.tcp((server, seen), RST, &[], b""), None),
        (gateway, error(&sent(gateway, seen)), None),
    ]
}

fn withstands(v6: bool) {
    let topology = Topology::new();
    let _node = topology.apply(topology.open_node(None), &topology.state());
    let _gateway = topology.open_gateway();
    let address = topology.external.address(v6);
    let listener = topology.external.net.run(move || TcpListener::bind((address, 0)).unwrap());
    let server = listener.local_addr().unwrap();
    let mut pod = topology.client.net.run(move || TcpStream::connect_timeout(&server, DEADLINE).unwrap());
    let (mut remote, seen) = listener.accept().unwrap();
    for stream in [&pod, &remote] {
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
    }
    assert_ne!(seen.port(), NOBODY);
    let forgeries = forgeries(&topology, v6, (server.port(), seen.port()));
    let raw = Raw::new(&topology, v6);
    let chunk = pattern(20_000);
    let mut buffer = vec![0; chunk.len()];
    for round in 0..ROUNDS {
        // While something is on its way.
        pod.write_all(&chunk).unwrap();
        forgeries.iter().for_each(|(to, packet, _)| raw.send(*to, packet));
        remote.read_exact(&mut buffer).unwrap();
        assert!(buffer == chunk, "round {round}, there: {}", dump(&topology));
        remote.write_all(&buffer).unwrap();
        pod.read_exact(&mut buffer).unwrap();
        assert!(buffer == chunk, "round {round}, back: {}", dump(&topology));
    }
    // Everything that was forged is counted, and nothing else is missing.
    let mut wanted = std::collections::BTreeMap::new();
    for reason in forgeries.iter().filter_map(|(.., reason)| *reason) {
        *wanted.entry(reason.name()).or_insert(0) += ROUNDS;
    }
    let places = [topology.bpffs.node(), topology.gateway_pins()];
    let counted = places.iter().flat_map(|place| maps::all_drops(place)).collect();
    assert_eq!(wanted, counted);
}

#[test]
#[ignore = "privileged: needs root and the eBPF object"]
fn a_connection_goes_on_beside_forgeries() {
    [false, true].into_iter().for_each(withstands);
}
