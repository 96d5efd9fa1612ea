//! Headers of packets, as far as people want to know them. Lenient: what cannot be read is left out.

use std::net::IpAddr;

use super::conntrack::Tuple;

/// The addresses of a packet, and of the one inside if it is tunnelled.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Seen {
    /// The packet, or the outer packet of a tunnel.
    pub(crate) outer: Tuple,
    /// The packet inside.
    pub(crate) inner: Option<Tuple>,
}

impl Seen {
    /// What the packet is about.
    pub(crate) fn about(&self) -> &Tuple {
        self.inner.as_ref().unwrap_or(&self.outer)
    }
}

fn half_word(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes([*bytes.get(at)?, *bytes.get(at + 1)?]))
}

/// Extension headers of IPv6 that are walked over.
const EXTENSIONS: usize = 6;

/// Protocol and offset of the transport header; `None` for the offset in a fragment that has none.
fn ip(bytes: &[u8]) -> Option<(IpAddr, IpAddr, u8, Option<usize>)> {
    match bytes.first()? >> 4 {
        4 => {
            let header = usize::from(bytes[0] & 0xf) * 4;
            let src: [u8; 4] = bytes.get(12..16)?.try_into().ok()?;
            let dst: [u8; 4] = bytes.get(16..20)?.try_into().ok()?;
            let first = half_word(bytes, 6)? & 0x1fff == 0;
            Some((src.into(), dst.into(), *bytes.get(9)?, (first && header >= 20).then_some(header)))
        }
        6 => {
            let src: [u8; 16] = bytes.get(8..24)?.try_into().ok()?;
            let dst: [u8; 16] = bytes.get(24..40)?.try_into().ok()?;
            let (mut next, mut at, mut first) = (*bytes.get(6)?, 40, true);
            for _ in 0..EXTENSIONS {
                match next {
                    0 | 43 | 60 => {
                        let (Some(following), Some(length)) = (bytes.get(at), bytes.get(at + 1)) else {
                            break;
                        };
                        next = *following;
                        at += (usize::from(*length) + 1) * 8;
                    }
                    44 => {
                        let (Some(following), Some(offset)) = (bytes.get(at), half_word(bytes, at + 2))
                        else {
                            break;
                        };
                        next = *following;
                        first &= offset & 0xfff8 == 0;
                        at += 8;
                    }
                    _ => break,
                }
            }
            Some((src.into(), dst.into(), next, first.then_some(at)))
        }
        _ => None,
    }
}

/// Reads a packet from its IP header on; it may be cut anywhere behind that.
pub(crate) fn read(bytes: &[u8], fou_port: u16) -> Option<Seen> {
    let (outer, l4) = tuple(bytes)?;
    let header = match (outer.protocol, outer.src) {
        (17, _) if outer.dst_port == fou_port => Some(8),
        (4, IpAddr::V4(_)) | (41, IpAddr::V6(_)) => Some(0),
        _ => None,
    };
    let inner = l4.zip(header).and_then(|(at, header)| tuple(bytes.get(at + header..)?));
    Some(Seen { outer, inner: inner.map(|(inner, _)| inner) })
}

fn tuple(bytes: &[u8]) -> Option<(Tuple, Option<usize>)> {
    let (src, dst, protocol, l4) = ip(bytes)?;
    let (src_port, dst_port) = match (protocol, l4) {
        (6 | 17 | 132, Some(at)) => {
            (half_word(bytes, at).unwrap_or(0), half_word(bytes, at + 2).unwrap_or(0))
        }
        // An identifier stands at the end that asked.
        (1 | 58, Some(at)) => match (bytes.get(at), half_word(bytes, at + 4)) {
            (Some(8 | 128), Some(id)) => (id, 0),
            (Some(0 | 129), Some(id)) => (0, id),
            _ => (0, 0),
        },
        _ => (0, 0),
    };
    Some((Tuple { src, dst, src_port, dst_port, protocol }, l4))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use coil_ebpf::testing::build::Ip;

    use super::*;

    fn v6(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn packets_and_what_is_in_tunnels() {
        let inner = Ip::new([10, 1, 0, 2], [192, 0, 2, 2]).tcp((1000, 80), 2, &[], &[]);
        let packet = Ip::new([10, 1, 0, 2], [10, 2, 0, 2]).udp_unchecked((5555, 5555), &inner);
        let seen = read(&packet, 5555).unwrap();
        assert_eq!(
            (seen.outer.source(), seen.outer.destination()),
            ("10.1.0.2:5555".into(), "10.2.0.2:5555".into())
        );
        assert_eq!(
            (seen.about().source(), seen.about().destination()),
            ("10.1.0.2:1000".into(), "192.0.2.2:80".into())
        );
        assert_eq!(read(&packet, 5556).unwrap().inner, None);
        let packet = Ip::new([10, 1, 0, 2], [10, 2, 0, 2]).packet(4, &inner);
        let seen = read(&packet, 5555).unwrap();
        assert_eq!((seen.outer.source(), seen.about().source()), ("10.1.0.2".into(), "10.1.0.2:1000".into()));
        let inner = Ip::new(v6("fd00::1"), v6("2001:db8::1")).extension(0, 8).echo(true, 7, &[]);
        let packet =
            Ip::new(v6("fd00::1"), v6("fd00::2")).extension(60, 8).udp_unchecked((5555, 5555), &inner);
        let seen = read(&packet, 5555).unwrap();
        assert_eq!(seen.about().source(), "fd00::1 id 7");
    }

    #[test]
    fn cut_packets_say_what_they_can() {
        let packet = Ip::new([10, 1, 0, 2], [192, 0, 2, 2]).tcp((1000, 80), 2, &[], &[]);
        for length in 0..packet.len() {
            let seen = read(&packet[..length], 5555);
            assert_eq!(seen.is_some(), length >= 20, "{length}");
        }
        let later = Ip::new([10, 1, 0, 2], [192, 0, 2, 2]).fragment(10, false).packet(17, &[1, 2, 3, 4]);
        assert_eq!(read(&later, 5555).unwrap().outer.src_port, 0);
    }
}
