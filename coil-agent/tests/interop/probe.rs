//! Traffic between the client pod and the world, and what each must have seen of it.

#![expect(clippy::unwrap_used, reason = "tests")]

use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsRawFd;
use std::process::Command;
use std::sync::mpsc::channel;

use crate::support::topology::Topology;
use crate::support::{DEADLINE, wait_for};

/// What fits into our own tunnel on a link of 1500 bytes.
pub(crate) fn our_mtu(v6: bool, plain: bool) -> usize {
    let udp = if plain { 0 } else { 8 };
    if v6 { 1500 - 40 - udp } else { 1500 - 20 - udp }
}

fn any(v6: bool) -> IpAddr {
    if v6 { Ipv6Addr::UNSPECIFIED.into() } else { Ipv4Addr::UNSPECIFIED.into() }
}

/// Bytes that differ from place to place.
fn pattern(length: usize) -> Vec<u8> {
    let mut state = 0x2545_f491_4f6c_dd1du64;
    let words = std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    });
    words.flatten().take(length).collect()
}

/// Echo requests and replies.
pub(crate) fn ping(topology: &Topology, v6: bool) -> bool {
    let target = topology.external.address(v6).to_string();
    topology.client.net.run(move || {
        let status = Command::new("ping").args(["-q", "-c", "3", "-i", "0.2", "-W", "5", &target]).output();
        status.unwrap().status.success()
    })
}

/// A datagram there and back; the peer that the world saw.
pub(crate) fn udp_echo(topology: &Topology, v6: bool, size: usize) -> Option<SocketAddr> {
    let (sender, receiver) = channel();
    let address = topology.external.address(v6);
    let server = topology.external.net.spawn(move || {
        let socket = UdpSocket::bind((address, 0)).unwrap();
        socket.set_read_timeout(Some(DEADLINE)).unwrap();
        sender.send(socket.local_addr().unwrap()).unwrap();
        let mut buffer = vec![0; 65536];
        let (count, peer) = socket.recv_from(&mut buffer).ok()?;
        socket.send_to(&buffer[..count], peer).unwrap();
        Some(peer)
    });
    let target = receiver.recv().unwrap();
    let echoed = topology.client.net.run(move || {
        let socket = UdpSocket::bind((any(v6), 0)).unwrap();
        socket.set_read_timeout(Some(DEADLINE)).unwrap();
        let bytes = pattern(size);
        socket.send_to(&bytes, target).unwrap();
        let mut buffer = vec![0; 65536];
        let answer = socket.recv_from(&mut buffer).ok();
        answer.is_some_and(|(count, from)| from == target && buffer[..count] == bytes)
    });
    server.join().unwrap().filter(|_| echoed)
}

/// A transfer there and back at once, compared byte by byte at both ends; the peer that the world saw.
pub(crate) fn tcp_echo(topology: &Topology, v6: bool, size: usize) -> SocketAddr {
    let (sender, receiver) = channel();
    let address = topology.external.address(v6);
    let server = topology.external.net.spawn(move || {
        let listener = TcpListener::bind((address, 0)).unwrap();
        sender.send(listener.local_addr().unwrap()).unwrap();
        let (mut stream, peer) = listener.accept().unwrap();
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        let mut all: Vec<u8> = Vec::new();
        let mut buffer = vec![0; 1 << 16];
        loop {
            let count = stream.read(&mut buffer).unwrap();
            if count == 0 {
                return (peer, all);
            }
            all.extend(&buffer[..count]);
            stream.write_all(&buffer[..count]).unwrap();
        }
    });
    let target = receiver.recv().unwrap();
    let sent = pattern(size);
    let bytes = sent.clone();
    let back = topology.client.net.run(move || {
        let mut stream = TcpStream::connect_timeout(&target, DEADLINE).unwrap();
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        let mut writer = stream.try_clone().unwrap();
        let writing = std::thread::spawn(move || {
            writer.write_all(&bytes).unwrap();
            writer.shutdown(Shutdown::Write).unwrap();
        });
        let mut back = Vec::new();
        stream.read_to_end(&mut back).unwrap();
        writing.join().unwrap();
        back
    });
    let (peer, arrived) = server.join().unwrap();
    assert!(arrived == sent, "bytes were changed or lost on their way out");
    assert!(back == sent, "bytes were changed or lost on their way back");
    peer
}

/// Both ends learn what fits: exactly that arrives, one byte more is refused. `out` is what fits into the
/// client's end of the tunnel, `back` what fits into the gateway's.
pub(crate) fn path_mtu(topology: &Topology, v6: bool, out: usize, back: usize) {
    let headers = if v6 { 40 + 8 } else { 20 + 8 };
    let (sender, receiver) = channel();
    let address = topology.external.address(v6);
    let server = topology.external.net.spawn(move || {
        let socket = UdpSocket::bind((address, 0)).unwrap();
        socket.set_read_timeout(Some(DEADLINE)).unwrap();
        sender.send(socket.local_addr().unwrap()).unwrap();
        let mut buffer = vec![0; 65536];
        let (count, peer) = socket.recv_from(&mut buffer).unwrap();
        assert_eq!(count, out - headers);
        socket.connect(peer).unwrap();
        learns(&socket, v6, back);
        send_what_fits(&socket, &pattern(back - headers));
    });
    let target = receiver.recv().unwrap();
    topology.client.net.run(move || {
        let socket = UdpSocket::bind((any(v6), 0)).unwrap();
        socket.set_read_timeout(Some(DEADLINE)).unwrap();
        socket.connect(target).unwrap();
        learns(&socket, v6, out);
        send_what_fits(&socket, &pattern(out - headers));
        let mut buffer = vec![0; 65536];
        let count = socket.recv(&mut buffer).unwrap();
        assert!(buffer[..count] == pattern(back - headers));
    });
    server.join().unwrap();
}

/// Sends once; errors that earlier datagrams have brought about come first.
fn send_what_fits(socket: &UdpSocket, bytes: &[u8]) {
    wait_for("a datagram that fits to be sent", || match socket.send(bytes) {
        Ok(_) => Some(()),
        Err(error) if error.raw_os_error() == Some(libc::EMSGSIZE) => None,
        Err(error) => unreachable!("{error}"),
    });
}

/// Sends what does not fit until the socket refuses it, and checks the path MTU that it has learned.
fn learns(socket: &UdpSocket, v6: bool, mtu: usize) {
    const ALWAYS: libc::c_int = 2;
    let (level, discover, known) = if v6 {
        (libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER, libc::IPV6_MTU)
    } else {
        (libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, libc::IP_MTU)
    };
    // SAFETY: the option's value is an integer, alive during the call.
    let result = unsafe {
        let value = std::ptr::from_ref(&ALWAYS).cast();
        libc::setsockopt(socket.as_raw_fd(), level, discover, value, size_of_val(&ALWAYS) as libc::socklen_t)
    };
    assert_eq!(result, 0);
    let headers = if v6 { 40 + 8 } else { 20 + 8 };
    let large = pattern(mtu + 1 - headers);
    wait_for("the refusal of a datagram that does not fit", || match socket.send(&large) {
        Ok(_) => None,
        Err(error) if error.raw_os_error() == Some(libc::EMSGSIZE) => Some(()),
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => None,
        Err(error) => unreachable!("{error}"),
    });
    let mut value: libc::c_int = 0;
    let mut size = size_of_val(&value) as libc::socklen_t;
    // SAFETY: the kernel writes an integer and its size, both alive during the call.
    let result = unsafe {
        let value = std::ptr::from_mut(&mut value).cast();
        libc::getsockopt(socket.as_raw_fd(), level, known, value, &mut size)
    };
    assert_eq!(result, 0);
    assert_eq!(usize::try_from(value).unwrap(), mtu, "the path MTU that the socket has learned");
}
