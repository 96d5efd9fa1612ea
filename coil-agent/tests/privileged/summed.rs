//! Clients whose tunnel has UDP checksums: what the stack leaves to the device to fill in belongs to headers that
//! the gateway takes off.

#![expect(clippy::unwrap_used, reason = "tests")]

use std::net::{SocketAddr, UdpSocket};
use std::os::fd::AsRawFd;

use nix::libc::{IPPROTO_UDP, setsockopt, socklen_t};

use crate::support::packets::{checksum, frame};
use crate::support::topology::{GATEWAY_UID, Topology};
use crate::support::{DEADLINE, maps};
use crate::traffic::pattern;

const FOU: u16 = 5555;
/// Of the Ethernet header that [`frame`] makes.
const ETHERNET: usize = 14;

/// A UDP datagram with its checksum, as an IP packet.
pub(crate) fn packet(from: SocketAddr, to: SocketAddr, data: &[u8]) -> Vec<u8> {
    let length = u16::try_from(8 + data.len()).unwrap();
    let mut datagram = [from.port(), to.port(), length, 0].map(u16::to_be_bytes).concat();
    datagram.extend(data);
    let addresses = [from, to].map(|end| match end.ip() {
        std::net::IpAddr::V4(address) => address.octets().to_vec(),
        std::net::IpAddr::V6(address) => address.octets().to_vec(),
    });
    let pseudo = [addresses.concat(), [17, length].map(u16::to_be_bytes).concat()].concat();
    let check = checksum(&[&pseudo, &datagram]);
    datagram[6..8].copy_from_slice(&check.to_be_bytes());
    frame(from.ip(), to.ip(), 17, &datagram)[ETHERNET..].to_vec()
}

#[test]
#[ignore = "privileged: needs root and the eBPF object"]
fn a_gateway_takes_tunnels_with_checksums() {
    let topology = Topology::new();
    let mut state = topology.state();
    // The client is not ours: a stack sends the tunnel's packets as plain datagrams.
    state.pods.retain(|uid, _| uid == GATEWAY_UID);
    let node = topology.open_node(None);
    let _node = topology.apply(node, &state);
    let _gateway = topology.open_gateway();
    for offload in ["on", "off"] {
        topology.client.net.exec(&format!("ethtool -K eth0 tx {offload}"));
        for v6 in [false, true] {
            for size in [0, 1, 100, 1200] {
                exchange(&topology, v6, size);
            }
        }
    }
    assert_eq!(maps::all_drops(&topology.gateway_pins()), []);
}

/// Lets an IPv6 socket have datagrams without a checksum, which is how ours come (RFC 6935).
fn take_unsummed(socket: &UdpSocket) {
    const UDP_NO_CHECK6_RX: i32 = 102;
    let on = 1i32;
    // SAFETY: the descriptor is open, and the value as long as is said.
    let result = unsafe {
        setsockopt(
            socket.as_raw_fd(),
            IPPROTO_UDP,
            UDP_NO_CHECK6_RX,
            (&raw const on).cast(),
            size_of_val(&on) as socklen_t,
        )
    };
    assert_eq!(result, 0);
}

/// A datagram there and back, in a tunnel made of a socket.
fn exchange(topology: &Topology, v6: bool, size: usize) {
    let (client, gateway) = (topology.client.address(v6), topology.gateway.address(v6));
    let data = pattern(size);
    let address = topology.external.address(v6);
    let (sender, receiver) = std::sync::mpsc::channel();
    let server = topology.external.net.spawn(move || {
        let socket = UdpSocket::bind((address, 0)).unwrap();
        socket.set_read_timeout(Some(DEADLINE)).unwrap();
        sender.send(socket.local_addr().unwrap()).unwrap();
        let mut buffer = vec![0; 2048];
        let (count, peer) = socket.recv_from(&mut buffer).unwrap();
        socket.send_to(&buffer[..count], peer).unwrap();
        (peer, buffer[..count].to_vec())
    });
    let server_address = receiver.recv().unwrap();
    let there = packet(SocketAddr::new(client, 4000), server_address, &data);
    let mut back = topology.client.net.run(move || {
        let socket = UdpSocket::bind((client, FOU)).unwrap();
        socket.set_read_timeout(Some(DEADLINE)).unwrap();
        if v6 {
            take_unsummed(&socket);
        }
        socket.send_to(&there, (gateway, FOU)).unwrap();
        let mut buffer = vec![0; 2048];
        let (count, from) = socket.recv_from(&mut buffer).unwrap();
        assert_eq!(from, SocketAddr::new(gateway, FOU));
        buffer[..count].to_vec()
    });
    let (peer, arrived) = server.join().unwrap();
    assert_eq!(peer.ip(), gateway);
    assert_eq!(arrived, data);
    let mut expected = packet(server_address, SocketAddr::new(client, 4000), &data);
    // What routers and stacks choose: lifetime, flow label, the IPv4 header's identifier and checksum.
    for packet in [&mut back, &mut expected] {
        let chosen: &[usize] = if v6 { &[0, 1, 2, 3, 7] } else { &[1, 4, 5, 6, 8, 10, 11] };
        for at in chosen {
            packet[*at] = 0;
        }
    }
    // The checksum may be left to a device that never was: whoever receives between virtual devices knows.
    let check = if v6 { 46..48 } else { 26..28 };
    back[check.clone()].copy_from_slice(&expected[check]);
    assert_eq!(back, expected);
}
