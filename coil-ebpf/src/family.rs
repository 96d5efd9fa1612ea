//! What differs between IPv4 and IPv6, in one place.

use core::fmt::Debug;

use bytemuck::Pod;
use coil_common::{
    config::Config,
    keys::{FlowKey4, FlowKey6},
    stats::DropReason,
    values::{GatewayValue, NatValue4, NatValue6, PodValue},
};

use crate::{csum, packet::Packet};

/// An address family: either [`V4`] or [`V6`].
pub trait Family: Copy + Debug + PartialEq + Eq + 'static {
    /// An address: words in the order of memory, so that they are copied and compared as such.
    type Addr: Copy + Debug + PartialEq + Eq + Pod;
    /// Key of flow and translation tables, as it is shared.
    type Key: Copy + Debug + PartialEq + Eq + Pod;
    /// The same in words: stored byte by byte it would cost a call for each run of zeros.
    type KeyWords: Copy + Debug + PartialEq + Eq + Pod;
    /// Value of translation tables.
    type Nat: Copy + Debug + PartialEq + Eq;
    /// Words of an IP header without options and eight bytes after it: the outer headers of a tunnelled
    /// packet or the start of an ICMP error.
    type Head: Copy + Debug + PartialEq + Eq + Pod;

    /// 0 for IPv4, 1 for IPv6, as in the index of an egress.
    const INDEX: u32;
    /// Length of an IP header without options or extension headers.
    const HEADER: usize;
    /// Bytes that the tunnel adds to a packet.
    const OVERHEAD: u32;
    /// Offset of the half word in the IP header that holds the TTL or hop limit.
    const TTL_AT: usize;
    /// Offset of the checksum in the IP header, if there is one.
    const CHECK_AT: Option<usize>;
    /// Offset of the source address in the IP header.
    const SRC_AT: usize;
    /// Offset of the destination address in the IP header.
    const DST_AT: usize;
    /// Protocol number of this family's packets in a packet of this family.
    const IPIP: u8;
    /// Protocol number of this family's ICMP.
    const ICMP: u8;
    /// ICMP type of an echo request.
    const ECHO_REQUEST: u8;
    /// ICMP type of an echo reply.
    const ECHO_REPLY: u8;
    /// The pseudo header counts in the checksum of ICMP.
    const ICMP_PSEUDO: bool;
    /// Bytes of a packet that an ICMP error quotes.
    const QUOTE: usize;

    /// Reads an address that the packet is known to hold.
    ///
    /// # Errors
    ///
    /// [`DropReason::Truncated`] if it is not readable.
    fn load<P: Packet>(packet: &P, at: usize) -> Result<Self::Addr, DropReason>;
    /// The pod's address, all zero if it has none.
    fn of_pod(pod: &PodValue) -> Self::Addr;
    /// The address of ICMP errors and of a gateway, all zero if it has none.
    fn of_config(config: &Config) -> Self::Addr;
    /// The gateway's address.
    fn of_gateway(gateway: &GatewayValue) -> Self::Addr;
    /// The key of a flow.
    fn key(
        src: &Self::Addr,
        dst: &Self::Addr,
        src_port: [u8; 2],
        dst_port: [u8; 2],
        protocol: u8,
    ) -> Self::KeyWords;
    /// The key of a flow whose ports are in one word, as in a packet.
    fn key_of_words(src: &Self::Addr, dst: &Self::Addr, ports: u32, protocol: u8) -> Self::KeyWords;
    /// The source of a key.
    fn key_src(key: &Self::KeyWords) -> Self::Addr;
    /// The destination of a key.
    fn key_dst(key: &Self::KeyWords) -> Self::Addr;
    /// Source and destination port of a key.
    fn key_ports(key: &Self::KeyWords) -> ([u8; 2], [u8; 2]);
    /// A hash of a key.
    fn hash(seed: u64, key: &Self::KeyWords) -> u64;
    /// Writes the ports of a key.
    fn set_ports(key: &mut Self::KeyWords, src_port: [u8; 2], dst_port: [u8; 2]);
    /// Writes the source of a key, and the ports, which share a word.
    fn set_src(key: &mut Self::KeyWords, src: &Self::Addr, src_port: [u8; 2], dst_port: [u8; 2]);
    /// Writes the destination of a key, and the ports, which share a word.
    fn set_dst(key: &mut Self::KeyWords, dst: &Self::Addr, src_port: [u8; 2], dst_port: [u8; 2]);
    /// A fresh translation.
    fn translation(addr: &Self::Addr, port: [u8; 2], state: u32, now: u32) -> Self::Nat;
    /// Equality in whole words.
    fn same(a: &Self::Addr, b: &Self::Addr) -> bool;
    /// The address is all zero.
    fn is_zero(addr: &Self::Addr) -> bool;
    /// A source that a pod may use before or beside its address: unspecified, IPv6 link-local.
    fn is_interim_source(addr: &Self::Addr) -> bool;
    /// A destination that is never beyond a router: unspecified, loopback, link-local, multicast,
    /// limited broadcast.
    fn is_local_scope(addr: &Self::Addr) -> bool;
    /// An ICMP type of the link itself (neighbour discovery).
    fn is_link_icmp(kind: u8) -> bool;
    /// Mixes an address into a hash.
    fn mix(hash: u64, addr: &Self::Addr) -> u64;
    /// Checksum delta of an address that changes.
    fn delta(old: &Self::Addr, new: &Self::Addr) -> u32;
    /// Sum of an address.
    fn sum(addr: &Self::Addr) -> u32;
}

/// IPv4.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct V4;

/// IPv6.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct V6;

/// Mixes a word into a hash: one round of multiply and fold.
#[inline(always)]
#[must_use]
pub const fn mix(hash: u64, word: u32) -> u64 {
    let hash = (hash ^ word as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    hash ^ (hash >> 32)
}

/// An IPv4 address from the bytes that shared structs hold.
#[inline(always)]
#[must_use]
pub const fn addr4(bytes: [u8; 4]) -> u32 {
    u32::from_ne_bytes(bytes)
}

/// An IPv6 address from the bytes that shared structs hold.
#[inline(always)]
#[must_use]
pub fn addr6(bytes: [u8; 16]) -> [u32; 4] {
    bytemuck::cast(bytes)
}

/// The bytes of an IPv6 address.
#[inline(always)]
#[must_use]
pub fn bytes6(addr: [u32; 4]) -> [u8; 16] {
    bytemuck::cast(addr)
}

/// Zero, hidden from the compiler, which makes a run of zeros a call that writes byte by byte.
#[inline(always)]
fn zero() -> u64 {
    core::hint::black_box(0)
}

/// The word of a key that holds the ports.
#[inline(always)]
const fn ports(src_port: [u8; 2], dst_port: [u8; 2]) -> u32 {
    let [a, b] = src_port;
    let [c, d] = dst_port;
    u32::from_ne_bytes([a, b, c, d])
}

/// The inverse of [`ports`].
#[inline(always)]
const fn split_ports(word: u32) -> ([u8; 2], [u8; 2]) {
    let [a, b, c, d] = word.to_ne_bytes();
    ([a, b], [c, d])
}

/// The word of a key that holds the protocol.
#[inline(always)]
const fn protocol_word(protocol: u8) -> u32 {
    u32::from_ne_bytes([protocol, 0, 0, 0])
}

/// Byte `index` of an IPv4 address.
#[inline(always)]
const fn byte4(addr: u32, index: u32) -> u32 {
    (u32::from_be(addr) >> (24 - 8 * index)) & 0xff
}

impl Family for V4 {
    type Addr = u32;
    type Key = FlowKey4;
    type KeyWords = [u32; 4];
    type Nat = NatValue4;
    type Head = [u32; 7];

    const INDEX: u32 = 0;
    const HEADER: usize = 20;
    const OVERHEAD: u32 = 28;
    const TTL_AT: usize = 8;
    const CHECK_AT: Option<usize> = Some(10);
    const SRC_AT: usize = 12;
    const DST_AT: usize = 16;
    const IPIP: u8 = 4;
    const ICMP: u8 = 1;
    const ECHO_REQUEST: u8 = 8;
    const ECHO_REPLY: u8 = 0;
    const ICMP_PSEUDO: bool = false;
    const QUOTE: usize = 128;

    #[inline(always)]
    fn load<P: Packet>(packet: &P, at: usize) -> Result<u32, DropReason> {
        let [word] = packet.words::<1>(at)?;
        Ok(word)
    }

    #[inline(always)]
    fn of_pod(pod: &PodValue) -> u32 {
        addr4(pod.ipv4)
    }

    #[inline(always)]
    fn of_config(config: &Config) -> u32 {
        addr4(config.ipv4)
    }

    #[inline(always)]
    fn of_gateway(gateway: &GatewayValue) -> u32 {
        let a = &gateway.addr;
        addr4([a[0], a[1], a[2], a[3]])
    }

    #[inline(always)]
    fn key(src: &u32, dst: &u32, src_port: [u8; 2], dst_port: [u8; 2], protocol: u8) -> [u32; 4] {
        [*src, *dst, ports(src_port, dst_port), protocol_word(protocol)]
    }

    #[inline(always)]
    fn key_of_words(src: &u32, dst: &u32, ports: u32, protocol: u8) -> [u32; 4] {
        [*src, *dst, ports, protocol_word(protocol)]
    }

    #[inline(always)]
    fn key_src(key: &[u32; 4]) -> u32 {
        key[0]
    }

    #[inline(always)]
    fn key_dst(key: &[u32; 4]) -> u32 {
        key[1]
    }

    #[inline(always)]
    fn key_ports(key: &[u32; 4]) -> ([u8; 2], [u8; 2]) {
        split_ports(key[2])
    }

    #[inline(always)]
    fn hash(seed: u64, key: &[u32; 4]) -> u64 {
        mix(mix(mix(mix(seed, key[0]), key[1]), key[2]), key[3])
    }

    #[inline(always)]
    fn set_ports(key: &mut [u32; 4], src_port: [u8; 2], dst_port: [u8; 2]) {
        key[2] = ports(src_port, dst_port);
    }

    #[inline(always)]
    fn set_src(key: &mut [u32; 4], src: &u32, src_port: [u8; 2], dst_port: [u8; 2]) {
        key[0] = *src;
        key[2] = ports(src_port, dst_port);
    }

    #[inline(always)]
    fn set_dst(key: &mut [u32; 4], dst: &u32, src_port: [u8; 2], dst_port: [u8; 2]) {
        key[1] = *dst;
        key[2] = ports(src_port, dst_port);
    }

    #[inline(always)]
    fn translation(addr: &u32, port: [u8; 2], state: u32, now: u32) -> NatValue4 {
        NatValue4 {
            addr: addr.to_ne_bytes(),
            port,
            tick: 0,
            state,
            last_seen: now,
            created: now,
            reserved: 0,
            packets: zero(),
            bytes: zero(),
        }
    }

    #[inline(always)]
    fn same(a: &u32, b: &u32) -> bool {
        a == b
    }

    #[inline(always)]
    fn is_zero(addr: &u32) -> bool {
        *addr == 0
    }

    #[inline(always)]
    fn is_interim_source(addr: &u32) -> bool {
        Self::is_zero(addr)
    }

    #[inline(always)]
    fn is_local_scope(addr: &u32) -> bool {
        // 224.0.0.0/4 is multicast; what follows, 240.0.0.0/4, is reserved and ends with broadcast.
        let first = byte4(*addr, 0);
        first == 0 || first == 127 || first >= 224 || (first == 169 && byte4(*addr, 1) == 254)
    }

    #[inline(always)]
    fn is_link_icmp(_kind: u8) -> bool {
        false
    }

    #[inline(always)]
    fn mix(hash: u64, addr: &u32) -> u64 {
        mix(hash, *addr)
    }

    #[inline(always)]
    fn delta(old: &u32, new: &u32) -> u32 {
        csum::add(!*old, *new)
    }

    #[inline(always)]
    fn sum(addr: &u32) -> u32 {
        *addr
    }
}

/// In fe80::/10.
#[inline(always)]
const fn is_link_local(addr: &[u32; 4]) -> bool {
    u32::from_be(addr[0]) >> 22 == 0xfe80 >> 6
}

impl Family for V6 {
    type Addr = [u32; 4];
    type Key = FlowKey6;
    type KeyWords = [u32; 10];
    type Nat = NatValue6;
    type Head = [u32; 12];

    const INDEX: u32 = 1;
    const HEADER: usize = 40;
    const OVERHEAD: u32 = 48;
    const TTL_AT: usize = 6;
    const CHECK_AT: Option<usize> = None;
    const SRC_AT: usize = 8;
    const DST_AT: usize = 24;
    const IPIP: u8 = 41;
    const ICMP: u8 = 58;
    const ECHO_REQUEST: u8 = 128;
    const ECHO_REPLY: u8 = 129;
    const ICMP_PSEUDO: bool = true;
    const QUOTE: usize = 256;

    #[inline(always)]
    fn load<P: Packet>(packet: &P, at: usize) -> Result<[u32; 4], DropReason> {
        packet.words::<4>(at)
    }

    #[inline(always)]
    fn of_pod(pod: &PodValue) -> [u32; 4] {
        addr6(pod.ipv6)
    }

    #[inline(always)]
    fn of_config(config: &Config) -> [u32; 4] {
        addr6(config.ipv6)
    }

    #[inline(always)]
    fn of_gateway(gateway: &GatewayValue) -> [u32; 4] {
        addr6(gateway.addr)
    }

    #[inline(always)]
    fn key(src: &[u32; 4], dst: &[u32; 4], src_port: [u8; 2], dst_port: [u8; 2], protocol: u8) -> [u32; 10] {
        let [s0, s1, s2, s3] = *src;
        let [d0, d1, d2, d3] = *dst;
        let ports = ports(src_port, dst_port);
        [s0, s1, s2, s3, d0, d1, d2, d3, ports, protocol_word(protocol)]
    }

    #[inline(always)]
    fn key_of_words(src: &[u32; 4], dst: &[u32; 4], ports: u32, protocol: u8) -> [u32; 10] {
        let [s0, s1, s2, s3] = *src;
        let [d0, d1, d2, d3] = *dst;
        [s0, s1, s2, s3, d0, d1, d2, d3, ports, protocol_word(protocol)]
    }

    #[inline(always)]
    fn key_src(key: &[u32; 10]) -> [u32; 4] {
        [key[0], key[1], key[2], key[3]]
    }

    #[inline(always)]
    fn key_dst(key: &[u32; 10]) -> [u32; 4] {
        [key[4], key[5], key[6], key[7]]
    }

    #[inline(always)]
    fn key_ports(key: &[u32; 10]) -> ([u8; 2], [u8; 2]) {
        split_ports(key[8])
    }

    #[inline(always)]
    fn hash(seed: u64, key: &[u32; 10]) -> u64 {
        let src = mix(mix(mix(mix(seed, key[0]), key[1]), key[2]), key[3]);
        let dst = mix(mix(mix(mix(src, key[4]), key[5]), key[6]), key[7]);
        mix(mix(dst, key[8]), key[9])
    }

    #[inline(always)]
    fn set_ports(key: &mut [u32; 10], src_port: [u8; 2], dst_port: [u8; 2]) {
        key[8] = ports(src_port, dst_port);
    }

    #[inline(always)]
    fn set_src(key: &mut [u32; 10], src: &[u32; 4], src_port: [u8; 2], dst_port: [u8; 2]) {
        [key[0], key[1], key[2], key[3]] = *src;
        key[8] = ports(src_port, dst_port);
    }

    #[inline(always)]
    fn set_dst(key: &mut [u32; 10], dst: &[u32; 4], src_port: [u8; 2], dst_port: [u8; 2]) {
        [key[4], key[5], key[6], key[7]] = *dst;
        key[8] = ports(src_port, dst_port);
    }

    #[inline(always)]
    fn translation(addr: &[u32; 4], port: [u8; 2], state: u32, now: u32) -> NatValue6 {
        NatValue6 {
            addr: bytes6(*addr),
            port,
            tick: 0,
            state,
            last_seen: now,
            created: now,
            packets: zero(),
            bytes: zero(),
        }
    }

    #[inline(always)]
    fn same(a: &[u32; 4], b: &[u32; 4]) -> bool {
        a[0] == b[0] && a[1] == b[1] && a[2] == b[2] && a[3] == b[3]
    }

    #[inline(always)]
    fn is_zero(addr: &[u32; 4]) -> bool {
        addr[0] | addr[1] | addr[2] | addr[3] == 0
    }

    #[inline(always)]
    fn is_interim_source(addr: &[u32; 4]) -> bool {
        is_link_local(addr) || Self::is_zero(addr)
    }

    #[inline(always)]
    fn is_local_scope(addr: &[u32; 4]) -> bool {
        let unspecified_or_loopback = addr[0] | addr[1] | addr[2] == 0 && u32::from_be(addr[3]) <= 1;
        u32::from_be(addr[0]) >> 24 == 0xff || is_link_local(addr) || unspecified_or_loopback
    }

    #[inline(always)]
    fn is_link_icmp(kind: u8) -> bool {
        // Router and neighbour solicitation and advertisement, redirect.
        matches!(kind, 133..=137)
    }

    #[inline(always)]
    fn mix(hash: u64, addr: &[u32; 4]) -> u64 {
        mix(mix(mix(mix(hash, addr[0]), addr[1]), addr[2]), addr[3])
    }

    #[inline(always)]
    fn delta(old: &[u32; 4], new: &[u32; 4]) -> u32 {
        csum::add(
            csum::add(csum::add(!old[0], new[0]), csum::add(!old[1], new[1])),
            csum::add(csum::add(!old[2], new[2]), csum::add(!old[3], new[3])),
        )
    }

    #[inline(always)]
    fn sum(addr: &[u32; 4]) -> u32 {
        csum::add(csum::add(addr[0], addr[1]), csum::add(addr[2], addr[3]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn local_scope_of_ipv4() {
        let local = |bytes| V4::is_local_scope(&addr4(bytes));
        for bytes in [
            [0, 0, 0, 0],
            [127, 0, 0, 1],
            [169, 254, 1, 1],
            [224, 0, 0, 1],
            [239, 255, 255, 255],
            [240, 0, 0, 1],
            [255, 255, 255, 255],
        ] {
            assert!(local(bytes), "{bytes:?}");
        }
        for bytes in [[1, 1, 1, 1], [10, 0, 0, 1], [126, 255, 255, 255], [169, 253, 0, 1], [223, 0, 0, 1]] {
            assert!(!local(bytes), "{bytes:?}");
        }
    }

    #[test]
    fn local_scope_of_ipv6() {
        let local = |text: &str| -> bool {
            let addr: std::net::Ipv6Addr = text.parse().unwrap_or(std::net::Ipv6Addr::UNSPECIFIED);
            V6::is_local_scope(&addr6(addr.octets()))
        };
        for text in ["::", "::1", "fe80::1", "febf::1", "ff02::1", "ff0e::1"] {
            assert!(local(text), "{text}");
        }
        for text in ["::2", "fec0::1", "fd00::1", "2001:db8::1", "1::"] {
            assert!(!local(text), "{text}");
        }
    }

    #[test]
    fn parts_of_a_key() {
        let (src, dst) = ([1, 2, 3, 4], [5, 6, 7, 8]);
        let key = V6::key(&src, &dst, [0, 80], [1, 187], 6);
        assert_eq!(V6::key_src(&key), src);
        assert_eq!(V6::key_dst(&key), dst);
        assert_eq!(V6::key_ports(&key), ([0, 80], [1, 187]));
        let shared: &FlowKey6 = bytemuck::cast_ref(&key);
        assert_eq!(shared.src, bytes6(src));
        assert_eq!((shared.src_port, shared.dst_port, shared.protocol), ([0, 80], [1, 187], 6));
    }
}
