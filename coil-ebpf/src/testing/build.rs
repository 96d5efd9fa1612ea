//! Builds packets byte by byte, with checksums computed from scratch: nothing of the library is used,
//! so that it cannot be wrong in the same way.

use std::net::IpAddr;

/// MAC address of the sender in built packets.
pub const SENDER: [u8; 6] = [2, 0, 0, 0, 0, 1];
/// MAC address of the receiver in built packets.
pub const RECEIVER: [u8; 6] = [2, 0, 0, 0, 0, 2];
/// UDP port of FOU.
pub const FOU: u16 = 5555;

/// The IP header of a packet to build.
#[derive(Clone, Debug)]
pub struct Ip {
    /// Source.
    pub src: IpAddr,
    /// Destination.
    pub dst: IpAddr,
    /// TTL or hop limit.
    pub ttl: u8,
    /// Type of service or traffic class.
    pub tos: u8,
    /// Identification (IPv4) or the low bits of the flow label.
    pub id: u16,
    /// Don't fragment; IPv4 only.
    pub df: bool,
    /// IPv4 options, a multiple of four bytes.
    pub options: Vec<u8>,
    /// IPv6 extension headers, outermost first: type, then bytes whose first is filled in.
    pub extensions: Vec<(u8, Vec<u8>)>,
    /// Fragment offset in units of eight bytes, and whether more follow.
    pub fragment: Option<(u16, bool)>,
}

impl Ip {
    /// A plain header.
    #[must_use]
    pub fn new(src: impl Into<IpAddr>, dst: impl Into<IpAddr>) -> Self {
        Self {
            src: src.into(),
            dst: dst.into(),
            ttl: 64,
            tos: 0,
            id: 0x1234,
            df: true,
            options: Vec::new(),
            extensions: Vec::new(),
            fragment: None,
        }
    }

    /// With another TTL.
    #[must_use]
    pub const fn ttl(mut self, ttl: u8) -> Self {
        self.ttl = ttl;
        self
    }

    /// With another type of service.
    #[must_use]
    pub const fn tos(mut self, tos: u8) -> Self {
        self.tos = tos;
        self
    }

    /// With IPv4 options.
    #[must_use]
    pub fn options(mut self, options: &[u8]) -> Self {
        self.options = options.to_vec();
        self
    }

    /// With one more IPv6 extension header of `length` bytes, filled with padding options.
    #[must_use]
    pub fn extension(mut self, kind: u8, length: usize) -> Self {
        let mut bytes = vec![0; length];
        bytes[1] = u8::try_from(length / 8 - 1).unwrap_or(u8::MAX);
        if kind != 43 {
            // PadN over the rest.
            bytes[2] = 1;
            bytes[3] = u8::try_from(length - 4).unwrap_or(u8::MAX);
        }
        self.extensions.push((kind, bytes));
        self
    }

    /// As a fragment.
    #[must_use]
    pub const fn fragment(mut self, offset: u16, more: bool) -> Self {
        self.fragment = Some((offset, more));
        self
    }

    /// The protocol number of the family's ICMP.
    #[must_use]
    pub const fn icmp_protocol(&self) -> u8 {
        if self.src.is_ipv4() { 1 } else { 58 }
    }

    /// A packet with `payload` as it is.
    #[must_use]
    pub fn packet(&self, protocol: u8, payload: &[u8]) -> Vec<u8> {
        match (self.src, self.dst) {
            (IpAddr::V4(src), IpAddr::V4(dst)) => {
                let header = 20 + self.options.len();
                let mut out = vec![0; 20];
                out[0] = 0x40 | u8::try_from(header / 4).unwrap_or(0);
                out[1] = self.tos;
                out[2..4].copy_from_slice(&be(header + payload.len()));
                out[4..6].copy_from_slice(&self.id.to_be_bytes());
                let mut flags = if self.df { 0x4000 } else { 0 };
                if let Some((offset, more)) = self.fragment {
                    flags = offset | if more { 0x2000 } else { 0 };
                }
                out[6..8].copy_from_slice(&flags.to_be_bytes());
                out[8] = self.ttl;
                out[9] = protocol;
                out[12..16].copy_from_slice(&src.octets());
                out[16..20].copy_from_slice(&dst.octets());
                out.extend_from_slice(&self.options);
                let check = !sum(&out);
                out[10..12].copy_from_slice(&check.to_be_bytes());
                out.extend_from_slice(payload);
                out
            }
            (IpAddr::V6(src), IpAddr::V6(dst)) => {
                let mut chain = self.extensions.clone();
                if let Some((offset, more)) = self.fragment {
                    let word = (offset << 3) | u16::from(more);
                    let [a, b] = word.to_be_bytes();
                    chain.push((44, vec![0, 0, a, b, 0, 0, 0, 9]));
                }
                let mut rest = Vec::new();
                for (index, (_, bytes)) in chain.iter().enumerate() {
                    let at = rest.len();
                    rest.extend_from_slice(bytes);
                    rest[at] = chain.get(index + 1).map_or(protocol, |next| next.0);
                }
                rest.extend_from_slice(payload);
                let mut out = vec![0; 40];
                out[0] = 0x60 | (self.tos >> 4);
                out[1] = self.tos << 4;
                out[2..4].copy_from_slice(&self.id.to_be_bytes());
                out[4..6].copy_from_slice(&be(rest.len()));
                out[6] = chain.first().map_or(protocol, |next| next.0);
                out[7] = self.ttl;
                out[8..24].copy_from_slice(&src.octets());
                out[24..40].copy_from_slice(&dst.octets());
                out.extend_from_slice(&rest);
                out
            }
            _ => Vec::new(),
        }
    }

    /// A TCP packet.
    #[must_use]
    pub fn tcp(&self, ports: (u16, u16), flags: u8, options: &[u8], payload: &[u8]) -> Vec<u8> {
        let mut l4 = vec![0; 20];
        l4[0..2].copy_from_slice(&ports.0.to_be_bytes());
        l4[2..4].copy_from_slice(&ports.1.to_be_bytes());
        l4[4..8].copy_from_slice(&[1, 2, 3, 4]);
        l4[12] = u8::try_from((20 + options.len()) / 4).unwrap_or(0) << 4;
        l4[13] = flags;
        l4[14..16].copy_from_slice(&[0xfa, 0xf0]);
        l4.extend_from_slice(options);
        l4.extend_from_slice(payload);
        self.checked(6, 16, l4)
    }

    /// A UDP packet.
    #[must_use]
    pub fn udp(&self, ports: (u16, u16), payload: &[u8]) -> Vec<u8> {
        let l4 = udp_header(ports, payload);
        self.checked(17, 6, l4)
    }

    /// A UDP packet whose checksum is zero.
    #[must_use]
    pub fn udp_unchecked(&self, ports: (u16, u16), payload: &[u8]) -> Vec<u8> {
        self.packet(17, &udp_header(ports, payload))
    }

    /// An ICMP or ICMPv6 message.
    #[must_use]
    pub fn icmp(&self, kind: u8, code: u8, rest: [u8; 4], payload: &[u8]) -> Vec<u8> {
        let mut l4 = vec![kind, code, 0, 0];
        l4.extend_from_slice(&rest);
        l4.extend_from_slice(payload);
        self.checked(self.icmp_protocol(), 2, l4)
    }

    /// An echo request or reply.
    #[must_use]
    pub fn echo(&self, request: bool, id: u16, payload: &[u8]) -> Vec<u8> {
        let kind = match (self.src.is_ipv4(), request) {
            (true, true) => 8,
            (true, false) => 0,
            (false, true) => 128,
            (false, false) => 129,
        };
        let [a, b] = id.to_be_bytes();
        self.icmp(kind, 0, [a, b, 0, 7], payload)
    }

    /// Fills the checksum at `at` in and wraps the transport part up.
    fn checked(&self, protocol: u8, at: usize, mut l4: Vec<u8>) -> Vec<u8> {
        let mut check = !sum(&[self.pseudo(protocol, l4.len()), l4.clone()].concat());
        if protocol == 17 && check == 0 {
            check = 0xffff;
        }
        l4[at..at + 2].copy_from_slice(&check.to_be_bytes());
        self.packet(protocol, &l4)
    }

    /// The pseudo header.
    fn pseudo(&self, protocol: u8, length: usize) -> Vec<u8> {
        match (self.src, self.dst) {
            (IpAddr::V4(_), IpAddr::V4(_)) if protocol == 1 => Vec::new(),
            (IpAddr::V4(src), IpAddr::V4(dst)) => {
                let mut out = [src.octets(), dst.octets()].concat();
                out.extend_from_slice(&[0, protocol]);
                out.extend_from_slice(&be(length));
                out
            }
            (IpAddr::V6(src), IpAddr::V6(dst)) => {
                let mut out = [src.octets(), dst.octets()].concat();
                out.extend_from_slice(&[0, 0]);
                out.extend_from_slice(&be(length));
                out.extend_from_slice(&[0, 0, 0, protocol]);
                out
            }
            _ => Vec::new(),
        }
    }
}

/// A UDP header without checksum, and its payload.
fn udp_header(ports: (u16, u16), payload: &[u8]) -> Vec<u8> {
    let mut l4 = vec![0; 8];
    l4[0..2].copy_from_slice(&ports.0.to_be_bytes());
    l4[2..4].copy_from_slice(&ports.1.to_be_bytes());
    l4[4..6].copy_from_slice(&be(8 + payload.len()));
    l4.extend_from_slice(payload);
    l4
}

/// The low 16 bits of a length.
fn be(length: usize) -> [u8; 2] {
    u16::try_from(length).unwrap_or(u16::MAX).to_be_bytes()
}

/// One's complement sum of bytes, computed the simple way.
#[must_use]
pub fn sum(bytes: &[u8]) -> u16 {
    let mut sum = 0u32;
    for pair in bytes.chunks(2) {
        sum += u32::from(u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]));
        sum = (sum & 0xffff) + (sum >> 16);
    }
    u16::try_from(sum).unwrap_or(0)
}

/// An Ethernet frame around an IP packet, from [`SENDER`] to [`RECEIVER`].
#[must_use]
pub fn ethernet(ip: &[u8]) -> Vec<u8> {
    frame(RECEIVER, SENDER, ip)
}

/// The frame that goes back where [`ethernet`] came from.
#[must_use]
pub fn ethernet_back(ip: &[u8]) -> Vec<u8> {
    frame(SENDER, RECEIVER, ip)
}

fn frame(to: [u8; 6], from: [u8; 6], ip: &[u8]) -> Vec<u8> {
    let kind = if ip.first().is_some_and(|first| first >> 4 == 4) { [8, 0] } else { [0x86, 0xdd] };
    [&to[..], &from[..], &kind[..], ip].concat()
}

/// An IP packet in a tunnel as the datapath makes it; identification and flow label are zero.
#[must_use]
pub fn tunnel(src: IpAddr, dst: IpAddr, inner: &[u8]) -> Vec<u8> {
    tunnel_from(src, dst, FOU, inner)
}

/// `inner` in another packet, as the datapath tunnels it by IP in IP.
#[must_use]
pub fn ipip(src: IpAddr, dst: IpAddr, inner: &[u8]) -> Vec<u8> {
    let (protocol, ecn) = if src.is_ipv4() { (4, inner[1] & 3) } else { (41, (inner[1] >> 4) & 3) };
    let mut ip = Ip::new(src, dst).ttl(225).tos(ecn);
    ip.id = 0;
    ip.packet(protocol, inner)
}

/// The same as [`tunnel`] with another UDP source port.
#[must_use]
pub fn tunnel_from(src: IpAddr, dst: IpAddr, src_port: u16, inner: &[u8]) -> Vec<u8> {
    let ecn = match inner.first().map(|first| first >> 4) {
        Some(4) => inner[1] & 3,
        Some(6) => (inner[1] >> 4) & 3,
        _ => 0,
    };
    let mut ip = Ip::new(src, dst).ttl(225).tos(ecn);
    ip.id = 0;
    ip.udp_unchecked((src_port, FOU), inner)
}
