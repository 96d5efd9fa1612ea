//! The way past the node's IP stack for tunnelled packets of flows that are known to go through.
//!
//! A node's stack finds for each tunnelled packet the same route to the same neighbour. With
//! `CONFIG_SHORTCUT` that is remembered for a tick of the datapath's clock: the first packet of each tick
//! goes through the stack, and the others of that tick leave where the routes said it would. So whatever
//! of the stack lives on seeing packets (neighbours, tables of connections, filters that change their
//! mind) sees some of every flow sixty times a second or oftener, order is kept, and nobody but the
//! kernel's own routes, rules and neighbours says where a packet goes.
//!
//! Packets that are not for the node, are tagged or marked, would not fit, or need anything else that the
//! stack knows and a route does not, are the stack's: so are all packets of a flow until it was answered.

use coil_common::config::Config;

use super::fast::Usual;
use crate::{
    csum,
    family::{Family, V4, V6},
    head::{TCP, UDP},
    packet::{ETHERNET, Packet, View},
    parse::Ip,
};

/// Slots of [`Hop`]s of each processor; a power of two.
pub const HOPS: usize = 1024;

/// What a route may depend on: interface, ports, the first word of an IPv6 header with its flow label,
/// and destination. The source is that of the pod behind the interface.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HopKey {
    /// Interface that the packet came in by.
    pub ifindex: u32,
    /// Outer ports, as in the packet.
    pub ports: u32,
    /// First word of an IPv6 header, 0 for IPv4.
    pub first: u32,
    /// Outer destination; an IPv4 address in the first word.
    pub dst: [u32; 4],
}

impl HopKey {
    /// The slot of such packets.
    #[inline(always)]
    #[must_use]
    pub const fn slot(&self) -> u32 {
        let [a, b, c, d] = self.dst;
        let mixed = (self.ifindex ^ self.ports ^ self.first ^ a ^ b ^ c ^ d).wrapping_mul(0x9e37_79b1);
        mixed >> (32 - HOPS.trailing_zeros())
    }

    /// Both are the same.
    #[inline(always)]
    #[must_use]
    pub fn is(&self, other: &Self) -> bool {
        let [a, b, c, d] = self.dst;
        let [e, f, g, h] = other.dst;
        let rest = (self.ifindex ^ other.ifindex) | (self.ports ^ other.ports) | (self.first ^ other.first);
        rest | (a ^ e) | (b ^ f) | (c ^ g) | (d ^ h) == 0
    }
}

/// Where packets leave, as the routes said at a tick.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Hop {
    /// Which packets.
    pub key: HopKey,
    /// When.
    pub tick: u32,
    /// Interface; 0: through the stack.
    pub ifindex: u32,
    /// Largest IP packet.
    pub mtu: u32,
    /// Ethernet addresses of the neighbour and of the interface; in words, since bytes would cost a call.
    pub macs: [u32; 3],
}

/// Families whose packets can be sent past the stack.
pub trait Onward: Usual {
    /// First word of the header as far as routes depend on it.
    fn first<V: View>(view: &V) -> u32;
    /// Destination of the outer header.
    fn dst<V: View>(view: &V) -> [u32; 4];
    /// The half words of TTL and, in IPv4, of the checksum after one more hop; offsets in the header.
    fn hop<V: View>(view: &V) -> Option<[(usize, u16); 2]>;
}

impl Onward for V4 {
    #[inline(always)]
    fn first<V: View>(_view: &V) -> u32 {
        0
    }

    #[inline(always)]
    fn dst<V: View>(view: &V) -> [u32; 4] {
        [view.word(ETHERNET + Self::DST_AT), 0, 0, 0]
    }

    #[inline(always)]
    fn hop<V: View>(view: &V) -> Option<[(usize, u16); 2]> {
        let old = view.half(ETHERNET + 8).to_ne_bytes();
        let [ttl, protocol] = old;
        if ttl <= 1 {
            return None;
        }
        let new = [ttl - 1, protocol];
        let check = csum::update(view.half(ETHERNET + 10).to_ne_bytes(), csum::delta2(old, new));
        Some([(8, u16::from_ne_bytes(new)), (10, u16::from_ne_bytes(check))])
    }
}

impl Onward for V6 {
    #[inline(always)]
    fn first<V: View>(view: &V) -> u32 {
        view.word(ETHERNET)
    }

    #[inline(always)]
    fn dst<V: View>(view: &V) -> [u32; 4] {
        let at = ETHERNET + Self::DST_AT;
        [view.word(at), view.word(at + 4), view.word(at + 8), view.word(at + 12)]
    }

    #[inline(always)]
    fn hop<V: View>(view: &V) -> Option<[(usize, u16); 2]> {
        let [next, ttl] = view.half(ETHERNET + 6).to_ne_bytes();
        if ttl <= 1 {
            return None;
        }
        let new = u16::from_ne_bytes([next, ttl - 1]);
        Some([(6, new), (6, new)])
    }
}

/// Bytes that are looked at: the outer headers.
#[inline(always)]
#[must_use]
pub const fn looked_at<F: Usual>() -> usize {
    ETHERNET + F::OVERHEAD as usize
}

/// A packet of a gateway is one that it has tunnelled to a client.
#[inline(always)]
pub fn is_reply<F: Usual, P: Packet>(packet: &P, ip: &Ip<F>, config: &Config) -> bool {
    let Some(view) = packet.view(looked_at::<F>()) else {
        return false;
    };
    ip.protocol == UDP && view.half(ETHERNET + F::HEADER + 2) == u16::from_ne_bytes(config.fou_port)
}

/// What the route of a tunnelled packet may depend on.
#[inline(always)]
pub fn key<F: Onward, V: View>(view: &V, ifindex: u32) -> HopKey {
    HopKey { ifindex, ports: view.word(ETHERNET + F::HEADER), first: F::first(view), dst: F::dst(view) }
}

/// The tunnelled packet, or each packet on the wire that it will be cut into, fits an MTU; `false` where
/// that is hard to say.
#[inline(always)]
pub fn fits<F: Usual, P: Packet>(packet: &P, mtu: u32) -> bool {
    let size = packet.gso_size();
    if size == 0 {
        return packet.length() <= mtu + ETHERNET as u32;
    }
    let Some(view) = packet.view(F::TUNNELLED) else {
        return false;
    };
    let Some(inner) = F::usual(&view, ETHERNET + F::OVERHEAD as usize, packet.length()) else {
        return false;
    };
    let [offset, _] = view.half(inner.l4 + 12).to_ne_bytes();
    let headers = F::OVERHEAD + F::HEADER as u32 + u32::from(offset >> 4) * 4;
    inner.protocol == TCP && size + headers <= mtu
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use coil_common::values::PodValue;

    use super::*;
    use crate::{
        decide::fast::unserved,
        parse::l4::ACK,
        testing::{build, memory::Memory},
    };

    fn tunnelled(inner: &[u8]) -> Memory {
        let outer = build::Ip::new([10, 1, 0, 2], [10, 2, 0, 2]);
        let bytes = build::ethernet(&outer.udp((40_000, 5555), inner));
        Memory::new(bytes)
    }

    fn inner() -> build::Ip {
        build::Ip::new([10, 1, 0, 2], [192, 0, 2, 2])
    }

    #[test]
    fn what_the_packet_is_on_the_wire_must_fit() {
        let mut packet = tunnelled(&inner().udp((1, 2), &[7; 100]));
        assert!(fits::<V4, _>(&packet, 156) && !fits::<V4, _>(&packet, 155));
        // Datagrams that are not cut yet.
        packet.gso_size = 10;
        assert!(!fits::<V4, _>(&packet, 1500));
        let mut packet = tunnelled(&inner().tcp((1, 2), ACK, &[1; 12], &[7; 3000]));
        packet.gso_size = 1000;
        let wire = 1000 + 28 + 20 + 32;
        assert!(fits::<V4, _>(&packet, wire) && !fits::<V4, _>(&packet, wire - 1));
    }

    #[test]
    fn one_hop_more_leaves_the_header_checksum_true() {
        let mut packet = tunnelled(&inner().udp((1, 2), &[]));
        for _ in 0..300 {
            let view = packet.view(looked_at::<V4>()).unwrap();
            let Some(edits) = V4::hop(&view) else {
                break;
            };
            for (at, half) in edits {
                packet.bytes[ETHERNET + at..ETHERNET + at + 2].copy_from_slice(&half.to_ne_bytes());
            }
            let header = &packet.bytes[ETHERNET..ETHERNET + 20];
            let sum = header
                .chunks(2)
                .fold(0, |sum, half| csum::add(sum, u32::from(u16::from_ne_bytes([half[0], half[1]]))));
            assert_eq!(csum::finish(sum), [0, 0]);
        }
        assert_eq!(packet.bytes[ETHERNET + 8], 1);
    }

    #[test]
    fn only_tunnelled_packets_of_the_gateway_itself_are_replies() {
        let config = Config { fou_port: 5555u16.to_be_bytes(), ..Config::default() };
        let pod = |ipv4| PodValue { ipv4, ..PodValue::default() };
        let is = |packet: &Memory, config, address| {
            unserved::<V4, _>(packet, &pod(address)).is_some_and(|ip| is_reply(packet, &ip, config))
        };
        let packet = tunnelled(&inner().udp((1, 2), &[]));
        assert!(is(&packet, &config, [10, 1, 0, 2]));
        assert!(!is(&packet, &config, [10, 1, 0, 3]));
        let other = Config { fou_port: 5556u16.to_be_bytes(), ..config };
        assert!(!is(&packet, &other, [10, 1, 0, 2]));
        let tcp = build::ethernet(&inner().tcp((1, 5555), ACK, &[], &[7; 50]));
        let tcp = Memory::new(tcp);
        assert!(!is(&tcp, &config, [10, 1, 0, 2]));
    }

    #[test]
    fn slots_are_inside_and_keys_differ() {
        let key = HopKey { ifindex: 7, ports: 8, first: 9, dst: [1, 2, 3, 4] };
        assert!((key.slot() as usize) < HOPS);
        assert!(key.is(&key));
        for other in [
            HopKey { ifindex: 8, ..key },
            HopKey { ports: 9, ..key },
            HopKey { first: 8, ..key },
            HopKey { dst: [1, 2, 3, 5], ..key },
            HopKey { dst: [2, 2, 3, 4], ..key },
        ] {
            assert!(!key.is(&other));
        }
    }
}
