//! Transport headers: TCP, UDP, ICMP echo.

use coil_common::{
    config::{CONFIG_ADDRESS_ONLY, Config},
    stats::DropReason,
};

use super::Ip;
use crate::{
    family::{Family, V4, V6},
    flow::Flow,
    head::{TCP, UDP},
    packet::Packet,
};

/// TCP flag.
pub const FIN: u8 = 1 << 0;
/// TCP flag.
pub const SYN: u8 = 1 << 1;
/// TCP flag.
pub const RST: u8 = 1 << 2;
/// TCP flag.
pub const ACK: u8 = 1 << 4;

/// What kind of transport header it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// ICMP echo request.
    EchoRequest,
    /// ICMP echo reply.
    EchoReply,
    /// A protocol without ports that are known here.
    Bare,
}

/// The facts of a transport header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct L4 {
    /// Its kind.
    pub kind: Kind,
    /// Its offset.
    pub at: usize,
    /// Its length.
    pub header: usize,
    /// Source port as in a flow key.
    pub src_port: [u8; 2],
    /// Destination port as in a flow key.
    pub dst_port: [u8; 2],
    /// TCP flags; of other protocols none. Not a part of the kind: what is not always written older verifiers
    /// refuse to read, before they know that it is there.
    pub flags: u8,
}

impl L4 {
    /// A packet in the middle of a flow whose transport header is not there.
    pub const UNKNOWN: Self =
        Self { kind: Kind::Udp, at: 0, header: 0, src_port: [0; 2], dst_port: [0; 2], flags: 0 };

    /// Offset of the checksum.
    #[inline(always)]
    #[must_use]
    pub const fn check_at(&self) -> usize {
        match self.kind {
            Kind::Tcp => self.at + 16,
            Kind::Udp => self.at + 6,
            Kind::EchoRequest | Kind::EchoReply => self.at + 2,
            Kind::Bare => self.at,
        }
    }

    /// Offset of the port or identifier that belongs to the sender.
    #[inline(always)]
    #[must_use]
    pub const fn src_port_at(&self) -> usize {
        match self.kind {
            Kind::Tcp | Kind::Udp | Kind::Bare => self.at,
            Kind::EchoRequest | Kind::EchoReply => self.at + 4,
        }
    }

    /// Offset of the port or identifier that belongs to the receiver.
    #[inline(always)]
    #[must_use]
    pub const fn dst_port_at(&self) -> usize {
        match self.kind {
            Kind::Tcp | Kind::Udp | Kind::Bare => self.at + 2,
            Kind::EchoRequest | Kind::EchoReply => self.at + 4,
        }
    }

    /// The flow of the packet.
    #[inline(always)]
    #[must_use]
    pub fn flow<F: Family>(&self, ip: &Ip<F>) -> Flow<F> {
        Flow::new(&ip.src, &ip.dst, self.src_port, self.dst_port, ip.protocol)
    }
}

/// Protocols that survive a change of their addresses, since no checksum of theirs covers one: GRE, ESP,
/// L2TP, SCTP, and the other family's packets. The same family's are taken for tunnelled ones.
const BARE: [u8; 4] = [47, 50, 115, 132];

/// The protocol can be translated by its addresses alone.
#[inline(always)]
pub(super) fn is_bare<F: Family>(protocol: u8) -> bool {
    let other = if F::INDEX == 0 { V6::IPIP } else { V4::IPIP };
    let [a, b, c, d] = BARE.map(|bare| u64::from(bare ^ protocol));
    // A product is zero if one of its factors is: one comparison for the verifier.
    a * b * c * d * u64::from(other ^ protocol) == 0
}

/// Bytes that a packet without known ports must have after its IP header.
const BARE_ROOM: usize = 4;

/// [`parse`], and what it does not know is taken as it is, if the configuration permits that.
///
/// # Errors
///
/// As [`parse`].
#[inline(always)]
pub fn parse_any<F: Family, P: Packet>(
    packet: &mut P,
    ip: &Ip<F>,
    config: &Config,
) -> Result<L4, DropReason> {
    match parse(packet, ip) {
        Err(reason)
            if reason as u32 == DropReason::UnsupportedProtocol as u32
                && config.flags & CONFIG_ADDRESS_ONLY != 0 =>
        {
            if !is_bare::<F>(ip.protocol) {
                return Err(reason);
            }
            if ip.payload() < BARE_ROOM {
                return Err(DropReason::Truncated);
            }
            packet.ensure(ip.l4 + BARE_ROOM)?;
            Ok(L4 { kind: Kind::Bare, at: ip.l4, header: 0, src_port: [0; 2], dst_port: [0; 2], flags: 0 })
        }
        parsed => parsed,
    }
}

/// Reads the transport header of a packet.
///
/// # Errors
///
/// Why the packet cannot be translated: the obstacle of its IP header, a protocol or ICMP message
/// that is not supported, a header cut short or with impossible lengths.
#[inline(always)]
pub fn parse<F: Family, P: Packet>(packet: &mut P, ip: &Ip<F>) -> Result<L4, DropReason> {
    if let Some(reason) = ip.obstacle {
        return Err(reason);
    }
    let at = ip.l4;
    let room = ip.payload();
    if ip.protocol == TCP {
        if room < 20 {
            return Err(DropReason::Truncated);
        }
        packet.ensure(at + 20)?;
        let [s0, s1, d0, d1] = packet.load::<4>(at)?;
        let [offset, flags] = packet.load::<2>(at + 12)?;
        let header = usize::from(offset >> 4) * 4;
        if header < 20 || header > room {
            return Err(DropReason::Malformed);
        }
        return Ok(L4 { kind: Kind::Tcp, at, header, src_port: [s0, s1], dst_port: [d0, d1], flags });
    }
    if ip.protocol == UDP {
        if room < 8 {
            return Err(DropReason::Truncated);
        }
        packet.ensure(at + 8)?;
        let [s0, s1, d0, d1] = packet.load::<4>(at)?;
        let length = usize::from(u16::from_be_bytes(packet.load::<2>(at + 4)?));
        // The length is that of the whole datagram, of which a fragment holds a part.
        if length < 8 || (length > room && ip.fragment == 0) {
            return Err(DropReason::Malformed);
        }
        return Ok(L4 { kind: Kind::Udp, at, header: 8, src_port: [s0, s1], dst_port: [d0, d1], flags: 0 });
    }
    if ip.protocol == F::ICMP {
        if room < 8 {
            return Err(DropReason::Truncated);
        }
        packet.ensure(at + 8)?;
        let [kind, code] = packet.load::<2>(at)?;
        let id = packet.load::<2>(at + 4)?;
        if code != 0 {
            return Err(DropReason::UnsupportedIcmp);
        }
        let (kind, src_port, dst_port) = if kind == F::ECHO_REQUEST {
            (Kind::EchoRequest, id, [0; 2])
        } else if kind == F::ECHO_REPLY {
            (Kind::EchoReply, [0; 2], id)
        } else {
            return Err(DropReason::UnsupportedIcmp);
        };
        return Ok(L4 { kind, at, header: 8, src_port, dst_port, flags: 0 });
    }
    Err(DropReason::UnsupportedProtocol)
}
