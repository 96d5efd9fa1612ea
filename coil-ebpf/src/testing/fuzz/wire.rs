//! Packets as the model sees them: taken apart with plain slices, written anew, every checksum summed
//! up from the first byte to the last. Written from the RFCs (791, 792, 768, 9293, 8200, 4443) and
//! deliberately from nothing else: none of it is code that the programs run.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use coil_common::stats::DropReason::{self, *};

use crate::testing::build::FOU;

/// Extension headers that a packet may have before it counts as too odd.
const MOST_EXTENSIONS: usize = 4;

/// A piece of a datagram.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fragment {
    /// It is not the first one: it has no transport header.
    pub later: bool,
    /// Others follow.
    pub more: bool,
    /// The datagram that it belongs to.
    pub id: u32,
}

/// An IP header and what follows it.
#[derive(Clone, Debug)]
pub struct Ip {
    /// IPv6.
    pub v6: bool,
    /// Source.
    pub src: IpAddr,
    /// Destination.
    pub dst: IpAddr,
    /// Type of service, traffic class.
    pub tos: u8,
    /// TTL, hop limit.
    pub ttl: u8,
    /// Length of the packet by its own word.
    pub total: usize,
    /// Where the transport header begins.
    pub header: usize,
    /// What it is.
    pub protocol: u8,
    /// Set if the packet is a fragment.
    pub fragment: Option<Fragment>,
    /// Why there is no transport header to be used, if there is none.
    pub trouble: Option<DropReason>,
}

/// What the transport header is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// TCP with these flags.
    Tcp(u8),
    /// UDP.
    Udp,
    /// Echo request.
    Request,
    /// Echo reply.
    Reply,
}

/// Who talks to whom.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Flow {
    /// Source.
    pub src: IpAddr,
    /// Destination.
    pub dst: IpAddr,
    /// Source port, or identifier of an echo request.
    pub src_port: u16,
    /// Destination port, or identifier of an echo reply.
    pub dst_port: u16,
    /// Protocol.
    pub protocol: u8,
}

impl Flow {
    /// The other direction.
    #[must_use]
    pub const fn turned(self) -> Self {
        let Self { src, dst, src_port, dst_port, protocol } = self;
        Self { src: dst, dst: src, src_port: dst_port, dst_port: src_port, protocol }
    }

    /// Source and destination are IPv6 addresses.
    #[must_use]
    pub const fn is_v6(&self) -> bool {
        self.src.is_ipv6()
    }
}

/// A transport header.
#[derive(Clone, Copy, Debug)]
pub struct Transport {
    /// What it is.
    pub kind: Kind,
    /// Its length.
    pub header: usize,
    /// Who talks to whom.
    pub flow: Flow,
}

/// Two bytes as a number; zero if they are not there.
#[must_use]
pub fn number(bytes: &[u8], at: usize) -> u16 {
    bytes.get(at..at + 2).map_or(0, |pair| u16::from_be_bytes([pair[0], pair[1]]))
}

/// One byte; zero if it is not there.
#[must_use]
pub fn byte(bytes: &[u8], at: usize) -> u8 {
    bytes.get(at).copied().unwrap_or(0)
}

fn address(bytes: &[u8], at: usize, v6: bool) -> IpAddr {
    let byte = |index: usize| byte(bytes, at + index);
    if v6 {
        IpAddr::V6(Ipv6Addr::from(std::array::from_fn::<u8, 16, _>(byte)))
    } else {
        IpAddr::V4(Ipv4Addr::from(std::array::from_fn::<u8, 4, _>(byte)))
    }
}

/// The bytes of an address.
#[must_use]
pub fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}

/// Length of a header without options.
#[must_use]
pub const fn least(v6: bool) -> usize {
    if v6 { 40 } else { 20 }
}

/// Offset of source and destination address in the IP header.
#[must_use]
pub const fn addresses(v6: bool) -> (usize, usize) {
    if v6 { (8, 24) } else { (12, 16) }
}

/// Takes an IP packet apart. `whole`: it is a segmented one, of which a length of zero means all there is.
///
/// # Errors
///
/// What is wrong with it: any of these may be the reason for which it is refused.
pub fn ip(bytes: &[u8], v6: bool, whole: bool) -> Result<Ip, Vec<DropReason>> {
    if bytes.len() < least(v6) {
        return Err(vec![Truncated]);
    }
    let version = bytes[0] >> 4;
    let (src_at, dst_at) = addresses(v6);
    let mut ip = Ip {
        v6,
        src: address(bytes, src_at, v6),
        dst: address(bytes, dst_at, v6),
        tos: 0,
        ttl: 0,
        total: 0,
        header: 0,
        protocol: 0,
        fragment: None,
        trouble: None,
    };
    let mut wrong = Vec::new();
    if v6 {
        ip.tos = (bytes[0] << 4) | (bytes[1] >> 4);
        ip.ttl = bytes[7];
        ip.total = 40 + usize::from(number(bytes, 4));
        if ip.total == 40 && whole {
            ip.total = bytes.len();
        }
        if version != 6 {
            wrong.push(Malformed);
        }
    } else {
        ip.tos = bytes[1];
        ip.ttl = bytes[8];
        ip.protocol = bytes[9];
        ip.header = usize::from(bytes[0] & 0xf) * 4;
        ip.total = usize::from(number(bytes, 2));
        if ip.total == 0 && whole {
            ip.total = bytes.len();
        }
        if version != 4 || ip.header < 20 || ip.total < ip.header {
            wrong.push(Malformed);
        }
        let word = number(bytes, 6);
        let (offset, more) = (word & 0x1fff, word & 0x2000 != 0);
        if offset != 0 || more {
            let id = u32::from(number(bytes, 4));
            ip.fragment = Some(Fragment { later: offset != 0, more, id });
            ip.trouble = (offset != 0).then_some(DropReason::Fragment);
        }
    }
    if ip.total > bytes.len() {
        wrong.push(Truncated);
    }
    if !wrong.is_empty() {
        return Err(wrong);
    }
    if v6 {
        walk(&mut ip, bytes);
    }
    Ok(ip)
}

/// Walks over the extension headers of IPv6.
fn walk(ip: &mut Ip, bytes: &[u8]) {
    ip.header = 40;
    ip.protocol = bytes[6];
    for _ in 0..MOST_EXTENSIONS {
        if ![0, 43, 44, 60].contains(&ip.protocol) {
            return;
        }
        let here = &bytes[ip.header..ip.total];
        if here.len() < 8 {
            // It ends with the packet, or the packet claims to have ended before.
            ip.trouble = Some(if bytes.len() < ip.header + 8 { Truncated } else { Malformed });
            return;
        }
        let mut length = 8;
        if ip.protocol == 44 {
            let word = number(here, 2);
            let (offset, more) = (word >> 3, word & 1 != 0);
            if offset != 0 || more {
                let id = u32::from_be_bytes([here[4], here[5], here[6], here[7]]);
                ip.fragment = Some(Fragment { later: offset != 0, more, id });
            }
            if offset != 0 {
                ip.trouble = Some(DropReason::Fragment);
                return;
            }
        } else {
            length = (usize::from(here[1]) + 1) * 8;
        }
        if length > here.len() {
            ip.trouble = Some(Malformed);
            return;
        }
        if ip.protocol == 43 && here[3] != 0 {
            ip.trouble = Some(ExtensionHeaders);
            return;
        }
        ip.protocol = here[0];
        ip.header += length;
    }
    if [0, 43, 44, 60].contains(&ip.protocol) {
        ip.trouble = Some(ExtensionHeaders);
    }
}

/// Protocol number of a family's ICMP.
#[must_use]
pub const fn icmp_of(v6: bool) -> u8 {
    if v6 { 58 } else { 1 }
}

/// Protocol number of packets of the family inside IP.
#[must_use]
pub const fn ipip_of(v6: bool) -> u8 {
    if v6 { 41 } else { 4 }
}

/// Reads the transport header.
///
/// # Errors
///
/// Why it is of no use.
pub fn transport(ip: &Ip, bytes: &[u8]) -> Result<Transport, DropReason> {
    if let Some(trouble) = ip.trouble {
        return Err(trouble);
    }
    let l4 = &bytes[ip.header..ip.total];
    let flow =
        |src_port, dst_port| Flow { src: ip.src, dst: ip.dst, src_port, dst_port, protocol: ip.protocol };
    let ports = flow(number(l4, 0), number(l4, 2));
    match ip.protocol {
        6 if l4.len() < 20 => Err(Truncated),
        6 => {
            let header = usize::from(l4[12] >> 4) * 4;
            if header < 20 || header > l4.len() {
                return Err(Malformed);
            }
            Ok(Transport { kind: Kind::Tcp(l4[13]), header, flow: ports })
        }
        17 if l4.len() < 8 => Err(Truncated),
        17 => {
            let length = usize::from(number(l4, 4));
            if length < 8 || (length > l4.len() && ip.fragment.is_none()) {
                return Err(Malformed);
            }
            Ok(Transport { kind: Kind::Udp, header: 8, flow: ports })
        }
        protocol if protocol == icmp_of(ip.v6) => {
            if l4.len() < 8 {
                return Err(Truncated);
            }
            let id = number(l4, 4);
            match (ip.v6, l4[0], l4[1]) {
                (false, 8, 0) | (true, 128, 0) => {
                    Ok(Transport { kind: Kind::Request, header: 8, flow: flow(id, 0) })
                }
                (false, 0, 0) | (true, 129, 0) => {
                    Ok(Transport { kind: Kind::Reply, header: 8, flow: flow(0, id) })
                }
                _ => Err(UnsupportedIcmp),
            }
        }
        _ => Err(UnsupportedProtocol),
    }
}

/// An ICMP type that reports an error and quotes a packet.
#[must_use]
pub const fn is_error(v6: bool, kind: u8) -> bool {
    if v6 { matches!(kind, 1..=4) } else { matches!(kind, 3 | 4 | 11 | 12) }
}

/// A packet that an ICMP error quotes, or as much of it as there is.
#[derive(Clone, Copy, Debug)]
pub struct Quote {
    /// Its flow.
    pub flow: Flow,
    /// Where it begins.
    pub at: usize,
    /// Where its transport header begins.
    pub l4: usize,
    /// Length of what is quoted.
    pub end: usize,
}

/// Reads the packet that is quoted in `bytes` from `at` to `end`. Its length field says how long it was, and
/// nothing about how much of it is here.
///
/// # Errors
///
/// Why it is of no use.
pub fn quote(bytes: &[u8], at: usize, end: usize, v6: bool) -> Result<Quote, DropReason> {
    let quoted = bytes.get(at..end).ok_or(IcmpQuote)?;
    if quoted.len() < least(v6) {
        return Err(IcmpQuote);
    }
    // What it says of its length is made to be what is here.
    let mut fixed = quoted.to_vec();
    let length = if v6 { quoted.len() - 40 } else { quoted.len() };
    let field = u16::try_from(length).map_err(|_| IcmpQuote)?.to_be_bytes();
    let length_at = if v6 { 4 } else { 2 };
    fixed[length_at..length_at + 2].copy_from_slice(&field);
    let ip = match ip(&fixed, v6, false) {
        Ok(ip) => ip,
        Err(_) if !v6 && fixed[0] >> 4 == 4 && fixed[0] & 0xf >= 5 && number(&fixed, 6) & 0x1fff != 0 => {
            return Err(IcmpQuoteFragment);
        }
        Err(_) => return Err(IcmpQuote),
    };
    match ip.trouble {
        None => {}
        Some(DropReason::Fragment) => return Err(IcmpQuoteFragment),
        Some(_) => return Err(IcmpQuote),
    }
    let l4 = &fixed[ip.header..];
    if l4.len() < 8 {
        return Err(IcmpQuote);
    }
    let flow =
        |src_port, dst_port| Flow { src: ip.src, dst: ip.dst, src_port, dst_port, protocol: ip.protocol };
    let flow = match (ip.protocol, l4[0]) {
        (6 | 17, _) => flow(number(l4, 0), number(l4, 2)),
        (protocol, _) if protocol == ipip_of(v6) => flow(0, 0),
        (protocol, kind) if protocol == icmp_of(v6) => match (v6, kind) {
            (false, 8) | (true, 128) => flow(number(l4, 4), 0),
            (false, 0) | (true, 129) => flow(0, number(l4, 4)),
            _ => return Err(IcmpQuote),
        },
        _ => return Err(IcmpQuote),
    };
    Ok(Quote { flow, at, l4: at + ip.header, end })
}

/// Sum of bytes as checksums have it, but in numbers modulo 65535: both zeros of one's complement are one.
#[must_use]
pub fn residue(bytes: &[u8]) -> u32 {
    bytes
        .chunks(2)
        .fold(0, |sum, pair| (sum + u32::from(u16::from_be_bytes([pair[0], byte(pair, 1)]))) % 0xffff)
}

/// A checksum in a packet: where it stands, and what it covers.
#[derive(Clone, Debug)]
struct Check {
    at: usize,
    /// Addresses that count besides, by where they stand.
    pseudo: Vec<(usize, usize)>,
    cover: (usize, usize),
    /// Zero means that there is none, and all ones is the other zero.
    udp: bool,
}

impl Check {
    fn residue(&self, bytes: &[u8]) -> u32 {
        let mut all: Vec<u8> = self.pseudo.iter().flat_map(|(from, to)| bytes[*from..*to].to_vec()).collect();
        all.extend_from_slice(&bytes[self.cover.0..self.cover.1]);
        residue(&all)
    }
}

/// The checksum of the IP header at `at`.
fn header_check(bytes: &[u8], at: usize, v6: bool) -> Option<Check> {
    let end = at + usize::from(byte(bytes, at) & 0xf) * 4;
    (!v6 && end <= bytes.len()).then_some(Check {
        at: at + 10,
        pseudo: Vec::new(),
        cover: (at, end),
        udp: false,
    })
}

/// The checksum of the transport header at `l4` of a packet at `at`, of which `end` is the end, if it is there.
fn transport_check(at: usize, l4: usize, end: usize, protocol: u8, v6: bool) -> Option<Check> {
    let (offset, pseudo) = match protocol {
        6 => (16, true),
        17 => (6, true),
        protocol if protocol == icmp_of(v6) => (2, v6),
        _ => return None,
    };
    if l4 + offset + 2 > end {
        return None;
    }
    let (src, dst) = addresses(v6);
    let length = if v6 { 16 } else { 4 };
    let pseudo = if pseudo { vec![(at + src, at + dst), (at + dst, at + dst + length)] } else { Vec::new() };
    Some(Check { at: l4 + offset, pseudo, cover: (l4, end), udp: protocol == 17 })
}

/// All checksums of a packet that a change must keep as right or as wrong as they were, innermost first.
fn checks(bytes: &[u8], ip: &Ip, quote: Option<&Quote>) -> Vec<Check> {
    let mut found = Vec::new();
    if let Some(quote) = quote {
        found.extend(header_check(bytes, quote.at, ip.v6));
        found.extend(transport_check(quote.at, quote.l4, quote.end, quote.flow.protocol, ip.v6));
    }
    if ip.trouble.is_none() {
        found.extend(transport_check(0, ip.header, ip.total, ip.protocol, ip.v6));
    }
    found.extend(header_check(bytes, 0, ip.v6));
    found
}

/// A packet that was changed, and where zero may stand in its other form.
#[derive(Clone, Debug)]
pub struct Changed {
    /// It.
    pub bytes: Vec<u8>,
    /// Offsets of checksums that came in a form that no stack writes.
    pub loose: Vec<usize>,
}

/// Changes a packet and computes every checksum anew, so that what was right is right and what was wrong is
/// wrong by as much.
#[must_use]
pub fn change(bytes: &[u8], ip: &Ip, quote: Option<&Quote>, edit: impl FnOnce(&mut Vec<u8>)) -> Changed {
    let mut new = bytes.to_vec();
    edit(&mut new);
    let mut loose = Vec::new();
    for check in checks(bytes, ip, quote) {
        let field = number(bytes, check.at);
        if check.udp && field == 0 {
            continue;
        }
        if field == 0xffff && !check.udp {
            loose.push(check.at);
        }
        let mut without = new.clone();
        without[check.at..check.at + 2].copy_from_slice(&[0, 0]);
        let missing = (check.residue(bytes) + 0xffff - check.residue(&without)) % 0xffff;
        let field = if missing == 0 && check.udp { 0xffff } else { u16::try_from(missing).unwrap_or(0) };
        new[check.at..check.at + 2].copy_from_slice(&field.to_be_bytes());
    }
    Changed { bytes: new, loose }
}

/// Looks a packet over as its receiver would: lengths and every checksum, the quotes of ICMP errors included.
///
/// # Errors
///
/// What is wrong.
pub fn verify(bytes: &[u8], v6: bool) -> Result<(), String> {
    let ip = ip(bytes, v6, false).map_err(|wrong| format!("{wrong:?}"))?;
    if !v6 && residue(&bytes[..ip.header]) != 0 {
        return Err("checksum of the IP header".to_owned());
    }
    if ip.fragment.is_some() || ip.trouble.is_some() {
        return Ok(());
    }
    let l4 = &bytes[ip.header..ip.total];
    let Some(check) = transport_check(0, ip.header, ip.total, ip.protocol, v6) else { return Ok(()) };
    if !(check.udp && number(bytes, check.at) == 0) {
        let length = u32::try_from(l4.len()).unwrap_or(0);
        let rest = if check.pseudo.is_empty() { 0 } else { length + u32::from(ip.protocol) };
        if (check.residue(bytes) + rest) % 0xffff != 0 {
            return Err(format!("checksum of protocol {}", ip.protocol));
        }
    }
    if ip.protocol == icmp_of(v6) && is_error(v6, byte(l4, 0)) {
        return verify_quote(bytes, ip.header + 8, ip.total, v6);
    }
    Ok(())
}

/// Looks a quoted packet over, as far as it is there, and what is in the tunnel if it is a tunnelled one.
fn verify_quote(bytes: &[u8], at: usize, end: usize, v6: bool) -> Result<(), String> {
    let Ok(quote) = quote(bytes, at, end, v6) else { return Ok(()) };
    if header_check(bytes, at, v6).is_some_and(|check| check.residue(bytes) != 0) {
        return Err("checksum of the quoted IP header".to_owned());
    }
    match (quote.flow.protocol, quote.flow.dst_port) {
        (17, FOU) => verify_quote(bytes, quote.l4 + 8, end, v6)?,
        (protocol, _) if protocol == ipip_of(v6) => verify_quote(bytes, quote.l4, end, v6)?,
        _ => {}
    }
    let quoted = &bytes[at..end];
    if ip(quoted, v6, false).is_ok() {
        return verify(quoted, v6).map_err(|wrong| format!("quote: {wrong}"));
    }
    Ok(())
}
