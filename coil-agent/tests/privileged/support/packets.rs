//! Packets from bytes: builders that can also build what no stack would send.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// Small, fast and the same everywhere.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// A number below `limit`.
    pub(crate) fn below(&mut self, limit: usize) -> usize {
        usize::try_from(self.next() % (limit.max(1) as u64)).unwrap_or(0)
    }

    pub(crate) fn pick<T: Clone>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())].clone()
    }

    pub(crate) fn byte(&mut self) -> u8 {
        self.next().to_le_bytes()[3]
    }
}

/// One's complement sum, folded.
pub(crate) fn checksum(parts: &[&[u8]]) -> u16 {
    let mut sum = 0u32;
    for part in parts {
        for pair in part.chunks(2) {
            let low = pair.get(1).copied().unwrap_or(0);
            sum += u32::from(u16::from_be_bytes([pair[0], low]));
        }
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !u16::try_from(sum).unwrap_or(0)
}

/// An IP packet in an Ethernet frame, addresses of the same family.
pub(crate) fn frame(source: IpAddr, destination: IpAddr, protocol: u8, payload: &[u8]) -> Vec<u8> {
    let mut frame = vec![2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1];
    match (source, destination) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            frame.extend([8, 0]);
            frame.extend(ipv4(source, destination, protocol, payload));
        }
        (IpAddr::V6(source), IpAddr::V6(destination)) => {
            frame.extend([0x86, 0xdd]);
            frame.extend(ipv6(source, destination, protocol, payload));
        }
        _ => unreachable!("addresses of two families"),
    }
    frame
}

fn ipv4(source: Ipv4Addr, destination: Ipv4Addr, protocol: u8, payload: &[u8]) -> Vec<u8> {
    let length = u16::try_from(20 + payload.len()).unwrap_or(u16::MAX).to_be_bytes();
    let mut packet = vec![0x45, 0, length[0], length[1], 0, 1, 0x40, 0, 64, protocol, 0, 0];
    packet.extend(source.octets());
    packet.extend(destination.octets());
    let check = checksum(&[&packet]).to_be_bytes();
    packet[10..12].copy_from_slice(&check);
    packet.extend(payload);
    packet
}

fn ipv6(source: Ipv6Addr, destination: Ipv6Addr, protocol: u8, payload: &[u8]) -> Vec<u8> {
    let length = u16::try_from(payload.len()).unwrap_or(u16::MAX).to_be_bytes();
    let mut packet = vec![0x60, 0, 0, 0, length[0], length[1], protocol, 64];
    packet.extend(source.octets());
    packet.extend(destination.octets());
    packet.extend(payload);
    packet
}

/// A TCP segment; its checksum is wrong, which no router minds.
pub(crate) fn tcp(source: u16, destination: u16, flags: u8, data: usize) -> Vec<u8> {
    let mut segment = Vec::new();
    segment.extend(source.to_be_bytes());
    segment.extend(destination.to_be_bytes());
    segment.extend([0, 0, 0, 1, 0, 0, 0, 0, 0x60, flags, 0xff, 0xff, 0x12, 0x34, 0, 0]);
    segment.extend([2, 4, 0x05, 0xb4]);
    segment.resize(segment.len() + data, 0x55);
    segment
}

/// A UDP datagram without a checksum.
pub(crate) fn udp(source: u16, destination: u16, data: usize) -> Vec<u8> {
    let mut datagram = Vec::new();
    datagram.extend(source.to_be_bytes());
    datagram.extend(destination.to_be_bytes());
    datagram.extend(u16::try_from(8 + data).unwrap_or(u16::MAX).to_be_bytes());
    datagram.extend([0, 0]);
    datagram.resize(datagram.len() + data, 0x55);
    datagram
}

/// An ICMP or ICMPv6 message of a type.
pub(crate) fn icmp(kind: u8, id: u16, data: usize) -> Vec<u8> {
    let id = id.to_be_bytes();
    let mut message = vec![kind, 0, 0x12, 0x34, id[0], id[1], 0, 1];
    message.resize(message.len() + data, 0x55);
    message
}
