//! What an ICMP error quotes: the start of the packet that it is about.
//!
//! Routers quote what they like: eight bytes of the transport header or a whole packet, with a length
//! field that says how long the packet was and not how much of it is there. What follows the quote
//! (extensions, RFC 4884) is nobody's business here. Only the ICMP checksum covers all of it.

use coil_common::{
    config::{CONFIG_ADDRESS_ONLY, Config},
    stats::DropReason,
};

use super::{Ip, Parse, l4::is_bare};
use crate::{
    csum,
    family::{Family, V4, V6},
    flow::Flow,
    head::{TCP, UDP},
    packet::Packet,
    tables::Translation,
};

/// Length of the ICMP header of an error; the quote follows.
pub const ICMP_HEADER: usize = 8;

/// Where the ports of a quoted packet are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// TCP and UDP: source, then destination.
    Ports,
    /// The identifier of an ICMP echo, which belongs to the sender of a request and to the receiver
    /// of a reply.
    Identifier,
    /// Nowhere: only the addresses of the protocol are translated.
    None,
}

/// The facts of a quoted packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Quote<F: Family> {
    /// Offset of its IP header.
    pub at: usize,
    /// Source.
    pub src: F::Addr,
    /// Destination.
    pub dst: F::Addr,
    /// Protocol of the transport header.
    pub protocol: u8,
    /// Offset of the transport header, of which eight bytes are there.
    pub l4: usize,
    /// Source port as in a flow key.
    pub src_port: [u8; 2],
    /// Destination port as in a flow key.
    pub dst_port: [u8; 2],
    /// Where the ports are.
    pub place: Place,
    /// Offset of the transport checksum, 0 if it is not there.
    pub check_at: usize,
    /// Checksum of the IP header, zero in IPv6.
    pub ip_check: [u8; 2],
}

/// Which end of a quoted packet is rewritten.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QuotedEnd {
    /// Its source.
    Source,
    /// Its destination.
    Destination,
}

/// Changes of a quoted packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QuoteEdit<F: Family> {
    /// Offset of an address and its new value.
    pub addr: Option<(usize, F::Addr)>,
    /// Offset of the checksum of the IP header and its new value.
    pub ip_check: Option<(usize, [u8; 2])>,
    /// Offset of a port and its new value.
    pub port: Option<(usize, [u8; 2])>,
    /// Offset of the transport checksum and its new value.
    pub check: Option<(usize, [u8; 2])>,
}

impl<F: Family> QuoteEdit<F> {
    /// Nothing.
    pub const NONE: Self = Self { addr: None, ip_check: None, port: None, check: None };
}

/// Reads what ICMP errors quote.
pub trait Quoted: Parse {
    /// An ICMP type that is an error with a quote.
    fn is_error(kind: u8) -> bool;

    /// Reads the IP header that is quoted at `at`, in an error that ends at `end`: what is before the
    /// transport header of a packet that is not a later fragment.
    ///
    /// # Errors
    ///
    /// See [`parse`].
    fn quoted_ip<P: Packet>(packet: &mut P, at: usize, end: usize) -> Result<Quote<Self>, DropReason>;
}

/// A quote of which only the IP header is known.
#[inline(always)]
const fn quote<F: Family>(at: usize, src: F::Addr, dst: F::Addr, protocol: u8, l4: usize) -> Quote<F> {
    Quote {
        at,
        src,
        dst,
        protocol,
        l4,
        src_port: [0; 2],
        dst_port: [0; 2],
        place: Place::Ports,
        check_at: 0,
        ip_check: [0; 2],
    }
}

impl Quoted for V4 {
    #[inline(always)]
    fn is_error(kind: u8) -> bool {
        // Unreachable, source quench, time exceeded, parameter problem; never redirects.
        matches!(kind, 3 | 4 | 11 | 12)
    }

    #[inline(always)]
    fn quoted_ip<P: Packet>(packet: &mut P, at: usize, end: usize) -> Result<Quote<Self>, DropReason> {
        // What the compiler knows of its bits it would add to by "or", which verifiers do not follow.
        let at = core::hint::black_box(at);
        if at + Self::HEADER > end {
            return Err(DropReason::IcmpQuote);
        }
        packet.ensure(at + Self::HEADER)?;
        let [version, _] = packet.load::<2>(at)?;
        let [_, _, f0, f1] = packet.load::<4>(at + 4)?;
        let [_, protocol, c0, c1] = packet.load::<4>(at + 8)?;
        let header = usize::from(version & 0xf) * 4;
        if version >> 4 != 4 || header < Self::HEADER {
            return Err(DropReason::IcmpQuote);
        }
        if f0 & 0x1f != 0 || f1 != 0 {
            return Err(DropReason::IcmpQuoteFragment);
        }
        let src = Self::load(packet, at + Self::SRC_AT)?;
        let dst = Self::load(packet, at + Self::DST_AT)?;
        let mut quote = quote(at, src, dst, protocol, at + header);
        quote.ip_check = [c0, c1];
        Ok(quote)
    }
}

impl Quoted for V6 {
    #[inline(always)]
    fn is_error(kind: u8) -> bool {
        matches!(kind, 1..=4)
    }

    #[inline(always)]
    fn quoted_ip<P: Packet>(packet: &mut P, at: usize, end: usize) -> Result<Quote<Self>, DropReason> {
        // What the compiler knows of its bits it would add to by "or", which verifiers do not follow.
        let at = core::hint::black_box(at);
        if at + Self::HEADER > end {
            return Err(DropReason::IcmpQuote);
        }
        packet.ensure(at + Self::HEADER)?;
        let [version, _] = packet.load::<2>(at)?;
        let [next, _] = packet.load::<2>(at + 6)?;
        if version >> 4 != 6 {
            return Err(DropReason::IcmpQuote);
        }
        let start = at + Self::HEADER;
        let found = packet.walk_extensions(start, next, end - start);
        match found.obstacle {
            None => {}
            Some(DropReason::Fragment) => return Err(DropReason::IcmpQuoteFragment),
            Some(_) => return Err(DropReason::IcmpQuote),
        }
        let src = Self::load(packet, at + Self::SRC_AT)?;
        let dst = Self::load(packet, at + Self::DST_AT)?;
        Ok(quote(at, src, dst, found.protocol, start + usize::from(found.length)))
    }
}

/// Reads the packet that is quoted at `at`, in an ICMP error that ends at `end`.
///
/// # Errors
///
/// [`DropReason::IcmpQuoteFragment`] if it is a later fragment, which has no ports;
/// [`DropReason::IcmpQuote`] if too little of it is there, or it has a protocol that is not translated.
#[inline(always)]
pub fn parse<F: Quoted, P: Packet>(
    packet: &mut P,
    at: usize,
    end: usize,
    config: &Config,
) -> Result<Quote<F>, DropReason> {
    let mut quote = F::quoted_ip(packet, at, end)?;
    let l4 = quote.l4;
    if l4 + 8 > end {
        return Err(DropReason::IcmpQuote);
    }
    packet.ensure(l4 + 8)?;
    let [a, b, c, d] = packet.load::<4>(l4)?;
    if quote.protocol == TCP || quote.protocol == UDP {
        quote.src_port = [a, b];
        quote.dst_port = [c, d];
        if quote.protocol == UDP {
            quote.check_at = l4 + 6;
        } else if l4 + 18 <= end && packet.ensure(l4 + 18).is_ok() {
            quote.check_at = l4 + 16;
        }
        return Ok(quote);
    }
    // A tunnelled packet.
    if quote.protocol == F::IPIP {
        return Ok(quote);
    }
    if config.flags & CONFIG_ADDRESS_ONLY != 0 && is_bare::<F>(quote.protocol) {
        quote.place = Place::None;
        return Ok(quote);
    }
    if quote.protocol != F::ICMP {
        return Err(DropReason::IcmpQuote);
    }
    let id = packet.load::<2>(l4 + 4)?;
    if a == F::ECHO_REQUEST {
        quote.src_port = id;
    } else if a == F::ECHO_REPLY {
        quote.dst_port = id;
    } else {
        return Err(DropReason::IcmpQuote);
    }
    quote.place = Place::Identifier;
    quote.check_at = l4 + 2;
    Ok(quote)
}

impl<F: Family> Quote<F> {
    /// The flow of the quoted packet.
    #[inline(always)]
    #[must_use]
    pub fn flow(&self) -> Flow<F> {
        Flow::new(&self.src, &self.dst, self.src_port, self.dst_port, self.protocol)
    }

    /// Says how one end becomes another, and returns the change of the bytes that the ICMP checksum
    /// covers.
    ///
    /// # Errors
    ///
    /// [`DropReason::Truncated`] if the packet is not the one that was parsed.
    #[inline(always)]
    pub fn translate<P: Packet>(
        &self,
        packet: &P,
        end: QuotedEnd,
        to: &Translation<F>,
        edit: &mut QuoteEdit<F>,
    ) -> Result<u32, DropReason> {
        let (addr_at, addr, port_at, port) = match end {
            QuotedEnd::Source => (self.at + F::SRC_AT, self.src, self.l4, self.src_port),
            QuotedEnd::Destination => (self.at + F::DST_AT, self.dst, self.l4 + 2, self.dst_port),
        };
        let port_at = if matches!(self.place, Place::Identifier) { self.l4 + 4 } else { port_at };
        let address = F::delta(&addr, &to.addr);
        let ports = csum::delta2(port, to.port);
        let both = csum::add(address, ports);
        let mut change = both;
        edit.addr = Some((addr_at, to.addr));
        if !matches!(self.place, Place::None) {
            edit.port = Some((port_at, to.port));
        }
        if let Some(at) = F::CHECK_AT {
            let new = csum::update(self.ip_check, address);
            edit.ip_check = Some((self.at + at, new));
            change = csum::add(change, csum::delta2(self.ip_check, new));
        }
        if self.check_at != 0 {
            let old = packet.load::<2>(self.check_at)?;
            let udp = self.protocol == UDP;
            // Zero means that there is none.
            if !udp || u16::from_ne_bytes(old) != 0 {
                let pseudo = F::ICMP_PSEUDO || matches!(self.place, Place::Ports);
                let mut new = csum::update(old, if pseudo { both } else { ports });
                if udp && u16::from_ne_bytes(new) == 0 {
                    new = [0xff; 2];
                }
                edit.check = Some((self.check_at, new));
                change = csum::add(change, csum::delta2(old, new));
            }
        }
        Ok(change)
    }
}

/// The ICMP header of a packet: type, code, checksum and the word after it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Icmp {
    /// Type and code.
    pub kind: [u8; 2],
    /// Checksum.
    pub check: [u8; 2],
    /// The word after it: for errors about size its low half is the MTU.
    pub word: [u8; 4],
}

/// Reads the ICMP header of an error, or `None` if the packet is another ICMP message.
///
/// # Errors
///
/// [`DropReason::Truncated`] if the packet ends inside it.
#[inline(always)]
pub fn error<F: Quoted, P: Packet>(packet: &mut P, ip: &Ip<F>) -> Result<Option<Icmp>, DropReason> {
    if ip.protocol != F::ICMP {
        return Ok(None);
    }
    packet.ensure(ip.l4 + ICMP_HEADER)?;
    let [kind, code, a, b] = packet.load::<4>(ip.l4)?;
    if !F::is_error(kind) {
        return Ok(None);
    }
    Ok(Some(Icmp { kind: [kind, code], check: [a, b], word: packet.load::<4>(ip.l4 + 4)? }))
}

impl Icmp {
    /// The MTU that it speaks of.
    #[inline(always)]
    #[must_use]
    pub const fn mtu<F: Family>(&self) -> u32 {
        let [a, b, c, d] = self.word;
        if F::INDEX == 0 { u16::from_be_bytes([c, d]) as u32 } else { u32::from_be_bytes([a, b, c, d]) }
    }

    /// The word that speaks of another MTU.
    #[inline(always)]
    #[must_use]
    pub const fn word_with<F: Family>(&self, mtu: u16) -> [u8; 4] {
        let [a, b, ..] = self.word;
        let [c, d] = mtu.to_be_bytes();
        // In IPv4 the high half is not the MTU's.
        if F::INDEX == 0 { [a, b, c, d] } else { [0, 0, c, d] }
    }
}
