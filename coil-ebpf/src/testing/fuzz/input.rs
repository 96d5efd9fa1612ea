//! From bytes to packets. A case of the fuzzer is a string of bytes and every string is a case, so that it can
//! be changed blindly; what the bytes mean is said here and in [`super::play`], and nowhere else. Where they
//! end, zeros follow: the plainest choice.

use std::net::IpAddr;

use super::world::hosts;
use crate::testing::build::Ip;

/// The bytes of a case, read from front to back.
#[derive(Clone, Debug)]
pub struct Bytes<'a> {
    left: &'a [u8],
}

impl<'a> Bytes<'a> {
    /// All of them.
    #[must_use]
    pub const fn new(bytes: &'a [u8]) -> Self {
        Self { left: bytes }
    }

    /// Nothing is left.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.left.is_empty()
    }

    /// The next one.
    pub fn byte(&mut self) -> u8 {
        let Some((first, left)) = self.left.split_first() else { return 0 };
        self.left = left;
        *first
    }

    /// A number below `bound`, which is at most 256.
    pub fn below(&mut self, bound: usize) -> usize {
        usize::from(self.byte()) % bound
    }

    /// One of several.
    pub fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())]
    }

    /// True once in so many times.
    pub fn rarely(&mut self, times: usize) -> bool {
        self.below(times) == times - 1
    }
}

const PORTS: [u16; 10] = [40000, 40001, 40002, 1023, 8079, 8080, 8081, 53, 5555, 0xffff];
const REMOTE_PORTS: [u16; 5] = [443, 53, 80, 5555, 0];
const LENGTHS: [usize; 20] =
    [0, 1, 7, 8, 9, 20, 64, 100, 101, 333, 1000, 1392, 1400, 1412, 1432, 1440, 1444, 1452, 1472, 2000];
const TTLS: [u8; 8] = [64, 64, 64, 255, 128, 2, 1, 0];
const FLAGS: [u8; 10] = [2, 16, 18, 24, 17, 4, 20, 0, 3, 0xc2];
/// Options of TCP: MSS first, later, at an odd offset, twice, too small to change, of a wrong length, past the end.
const OPTIONS: [&[u8]; 9] = [
    &[],
    &[2, 4, 0x05, 0xb4],
    &[1, 1, 1, 2, 4, 0x05, 0xb4, 0],
    &[1, 2, 4, 0xff, 0xff, 4, 2, 0],
    &[2, 4, 0x02, 0x00],
    &[2, 4, 0x05, 0xb4, 2, 4, 0x05, 0xb4],
    &[2, 3, 0x05, 0xb4],
    &[8, 10, 1, 2, 3, 4, 5, 6, 7, 8, 2, 4],
    &[4, 0, 2, 4, 0x05, 0xb4, 1, 1],
];
const IP_OPTIONS: [&[u8]; 3] = [&[1, 1, 1, 0], &[7, 7, 4, 0, 0, 0, 0, 0], &[148, 4, 0, 0]];
const EXTENSIONS: [(u8, usize); 5] = [(0, 8), (60, 16), (43, 8), (44, 8), (60, 264)];

/// Ports of a packet: of the client's side, and of the remote's.
pub fn ports(bytes: &mut Bytes) -> (u16, u16) {
    (bytes.pick(&PORTS), bytes.pick(&REMOTE_PORTS))
}

/// A destination of the pod: a remote host of some kind, or a host of this world.
pub fn destination(bytes: &mut Bytes, v6: bool) -> IpAddr {
    let hosts = hosts(v6);
    match bytes.below(24) {
        index @ 0..12 => hosts.remotes[index],
        12 => hosts.gateway,
        13 => hosts.other,
        14 => hosts.pod,
        _ => hosts.remotes[0],
    }
}

/// Length of a payload.
pub fn length(bytes: &mut Bytes) -> usize {
    bytes.pick(&LENGTHS)
}

/// Everything of an IP header but who talks to whom.
pub fn header(bytes: &mut Bytes, mut ip: Ip) -> Ip {
    if !bytes.rarely(2) {
        return ip;
    }
    ip.ttl = bytes.pick(&TTLS);
    ip.tos = bytes.byte();
    ip.df = !bytes.rarely(2);
    if bytes.rarely(4) {
        if ip.src.is_ipv4() {
            ip = ip.options(IP_OPTIONS[bytes.below(IP_OPTIONS.len())]);
        } else {
            for _ in 0..=bytes.below(5) {
                let (kind, length) = bytes.pick(&EXTENSIONS);
                ip = ip.extension(kind, length);
                if let Some((44, last)) = ip.extensions.last_mut() {
                    // A fragment header of a whole packet, or one that others follow.
                    last.fill(0);
                    last[3] = bytes.byte() & 1;
                    last[7] = 9;
                }
            }
        }
    }
    if bytes.rarely(4) {
        // Few identifications, so that datagrams meet.
        ip.id = 0x1234 + u16::from(bytes.byte() & 1);
        ip = match bytes.below(4) {
            0 | 1 => ip.fragment(0, true),
            2 => ip.fragment(1 + u16::from(bytes.byte()), true),
            _ => ip.fragment(1 + u16::from(bytes.byte()), false),
        };
    }
    ip
}

/// Which protocol a packet is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sort {
    /// UDP.
    Udp,
    /// UDP whose checksum is zero.
    Unchecked,
    /// TCP with flags.
    Tcp(u8),
    /// Echo, request or reply.
    Echo(bool),
    /// Another protocol.
    Other(u8),
    /// Another ICMP message.
    Icmp(u8, u8),
}

/// A protocol.
pub fn sort(bytes: &mut Bytes, v6: bool) -> Sort {
    match bytes.below(12) {
        0..=2 => Sort::Udp,
        3 => Sort::Unchecked,
        4..=7 => Sort::Tcp(bytes.pick(&FLAGS)),
        8 => Sort::Echo(true),
        9 => Sort::Echo(bytes.rarely(2)),
        10 => Sort::Other(bytes.pick(&[132, 47, 50, 4, 41, 59, 51, 1, 58, 255])),
        _ if v6 => Sort::Icmp(bytes.pick(&[135, 133, 137, 128, 1, 2, 3, 4, 130, 200]), bytes.byte() & 1),
        _ => Sort::Icmp(bytes.pick(&[13, 5, 8, 3, 11, 12, 4, 0, 9, 200]), bytes.byte() & 1),
    }
}

/// A packet.
pub fn packet(bytes: &mut Bytes, ip: &Ip, sort: Sort, ports: (u16, u16), length: usize) -> Vec<u8> {
    // Not all zero, or sums would tell nothing.
    let first = bytes.byte();
    let payload: Vec<u8> = (0..length).map(|index| first.wrapping_add((index % 251) as u8)).collect();
    match sort {
        Sort::Udp => ip.udp(ports, &payload),
        Sort::Unchecked => ip.udp_unchecked(ports, &payload),
        Sort::Tcp(flags) => {
            let options = if flags & 2 != 0 { OPTIONS[bytes.below(OPTIONS.len())] } else { &[] };
            ip.tcp(ports, flags, options, &payload)
        }
        Sort::Echo(request) => ip.echo(request, ports.0, &payload),
        Sort::Other(protocol) => ip.packet(protocol, &payload),
        Sort::Icmp(kind, code) => ip.icmp(kind, code, [0; 4], &payload),
    }
}

/// Does harm to a frame, as often as not none.
pub fn spoil(bytes: &mut Bytes, frame: &mut Vec<u8>) {
    for _ in 0..bytes.pick(&[0, 0, 0, 0, 1, 1, 2, 3]) {
        let reach = frame.len().saturating_sub(14).min(130);
        if reach == 0 {
            return;
        }
        let at = 14 + bytes.below(reach);
        match bytes.below(8) {
            0 | 1 => frame[at] = bytes.byte(),
            2 => frame[at] ^= 1 << bytes.below(8),
            3 => frame.truncate(at),
            4 => {
                let last = frame.len() - bytes.below(9).min(frame.len() - 14);
                frame.truncate(last);
            }
            5 => {
                let count = bytes.pick(&[1, 4, 8, 20]);
                let value = bytes.byte();
                frame.splice(at..at, std::iter::repeat_n(value, count));
            }
            6 => frame.extend(std::iter::repeat_n(0, bytes.below(60))),
            _ => {
                // A word that makes much of a length.
                let value = bytes.pick(&[0u16, 1, 7, 8, 20, 0x40, 0x7fff, 0xffff]).to_be_bytes();
                let at = at & !1;
                if at + 2 <= frame.len() {
                    frame[at..at + 2].copy_from_slice(&value);
                }
            }
        }
    }
}
