//! What is to happen to a packet, as data.
//!
//! All offsets are those of the packet as it came. Whoever carries a [`Rewrite`] out writes bytes
//! first, then corrects checksums, then removes outer headers, then adds new ones: so no offset
//! ever moves under its user.

use coil_common::{
    config::{CONFIG_SOURCE_PORT_AUTO, Config},
    stats::DropReason,
};

use crate::{
    decide::gateway::Attention,
    encap::Encap,
    family::Family,
    flow::{AUTO_PORT_FIRST, AUTO_PORTS, Hash},
    head::{Build, IcmpError, Tunnel},
    packet::{ETHERNET, Packet},
    parse::{Ip, mss::MssEdit},
};

/// What is to happen to a packet, and how it counts if that succeeds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict<A> {
    /// It goes on as it is.
    Pass,
    /// It goes on changed as the [`Rewrite`] says that was handed in to be filled (a copy of it here
    /// would not fit on the small stack of a kernel program), and is counted.
    Rewrite(A),
    /// It is dropped, and its sender gets an ICMP error.
    Refuse(Refusal),
    /// It is a fragment: [`decide::fragment`](crate::decide::fragment) decides. If that says the same, it
    /// has noted a datagram of which this is the first fragment, and the packet is decided again with
    /// [`Rewrite::noted`] set.
    Fragment,
    /// A gateway must look after its translation, and then decide again with [`Rewrite::attended`] set.
    Attend(Attention),
    /// It is an ICMP message other than echo: [`decide::icmp`](crate::decide::icmp) decides.
    Icmp,
}

impl<A> Verdict<A> {
    /// The same verdict, counted otherwise.
    #[inline(always)]
    pub fn map<B>(self, counted: impl FnOnce(A) -> B) -> Verdict<B> {
        match self {
            Self::Pass => Verdict::Pass,
            Self::Rewrite(account) => Verdict::Rewrite(counted(account)),
            Self::Refuse(refusal) => Verdict::Refuse(refusal),
            Self::Fragment => Verdict::Fragment,
            Self::Attend(attention) => Verdict::Attend(attention),
            Self::Icmp => Verdict::Icmp,
        }
    }
}

/// The verdict, or why the packet is dropped.
pub type Decision<A> = Result<Verdict<A>, DropReason>;

/// Where a rewritten packet goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// On, where it was going.
    On,
    /// Back out of the interface that it came in by, to the neighbour that it came from.
    Back,
}

/// A change of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rewrite<F: Family> {
    /// Changes of the (inner) IP header at this offset.
    pub ip: IpEdit<F>,
    /// A port or identifier.
    pub port: Option<PortEdit>,
    /// The MSS option.
    pub mss: Option<MssEdit>,
    /// Change by both of what the transport checksum covers itself; see [`Rewrite::plain_delta`].
    pub plain: u32,
    /// Corrections of the transport checksum.
    pub check: CheckEdit,
    /// Bytes after the Ethernet header to remove.
    pub pop: usize,
    /// Tunnel headers to put after the Ethernet header, if [`Self::pushes`]. Not an option: older verifiers do not
    /// believe that what is in one is not looked at where there is none.
    pub(crate) tunnel: Tunnel<F>,
    /// There are tunnel headers to put there.
    pub(crate) pushes: bool,
    /// It is a GSO packet of datagrams, which must be cut into them when it is next sent: after a
    /// tunnel has been taken off the kernel would cut it as if it still had one.
    pub cut: bool,
    /// Where it goes.
    pub way: Way,
    /// For whoever decides: should this be the first fragment of a datagram, that has been noted.
    pub noted: bool,
    /// For whoever decides: the translation has been looked after.
    pub attended: bool,
}

/// A change of an IP header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IpEdit<F: Family> {
    /// Offset of the header.
    pub at: usize,
    /// The half word of the traffic class.
    pub first: Option<[u8; 2]>,
    /// The half word of TTL or hop limit.
    pub ttl: Option<[u8; 2]>,
    /// Offset of an address and its new value.
    pub addr: Option<(usize, F::Addr)>,
    /// Header checksum; only IPv4 has one.
    pub check: Option<[u8; 2]>,
    /// Change of bytes that no checksum inside the IP header makes up for; only in IPv6. It matters
    /// where a network card has summed the whole packet.
    pub uncovered: Option<u32>,
}

/// A change of a port or identifier; it may be none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PortEdit {
    /// Its offset.
    pub at: usize,
    /// What is there.
    pub old: [u8; 2],
    /// What shall be there.
    pub new: [u8; 2],
}

impl PortEdit {
    /// It changes something.
    #[inline(always)]
    #[must_use]
    pub const fn changes(&self) -> bool {
        u16::from_ne_bytes(self.old) != u16::from_ne_bytes(self.new)
    }
}

/// A correction of a transport checksum. What follows from a port or the MSS is not in here: see
/// [`Rewrite::plain_delta`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CheckEdit {
    /// Offset of the checksum.
    pub at: usize,
    /// Change of the pseudo header.
    pub pseudo: Option<u32>,
    /// A checksum of zero means that there is none (UDP).
    pub optional: bool,
}

impl CheckEdit {
    /// Nothing to correct.
    pub const NONE: Self = Self { at: 0, pseudo: None, optional: false };
}

impl<F: Family> Rewrite<F> {
    /// Changes nothing.
    #[inline(always)]
    #[must_use]
    pub fn new() -> Self {
        Self {
            ip: IpEdit { at: 0, first: None, ttl: None, addr: None, check: None, uncovered: None },
            port: None,
            mss: None,
            plain: 0,
            check: CheckEdit::NONE,
            pop: 0,
            tunnel: Tunnel::none(),
            pushes: false,
            cut: false,
            way: Way::On,
            noted: false,
            attended: false,
        }
    }

    /// Change of what the transport checksum covers itself, `None` if there is none. It is a number from
    /// the start, since verifiers before 6.3 do not believe that what is in an option is not looked at
    /// where there is none.
    #[inline(always)]
    #[must_use]
    pub const fn plain_delta(&self) -> Option<u32> {
        if self.plain == 0 { None } else { Some(self.plain) }
    }

    /// Tunnel headers to put after the Ethernet header.
    #[inline(always)]
    #[must_use]
    pub const fn push(&self) -> Option<&Tunnel<F>> {
        if self.pushes { Some(&self.tunnel) } else { None }
    }

    /// Puts these tunnel headers after the Ethernet header.
    #[inline(always)]
    pub(crate) const fn enter_tunnel(&mut self, tunnel: Tunnel<F>) {
        self.tunnel = tunnel;
        self.pushes = true;
    }

    /// Chooses the header to change and the way to go.
    #[inline(always)]
    pub(crate) fn begin(&mut self, ip: &Ip<F>, way: Way) {
        // Tunnels are of different length: the compiler knows what it has compared and forgets it, since
        // the verifier has to see it compared for each offset that is not the same for all packets.
        self.begin_at(core::hint::black_box(ip.at), way);
    }

    /// The same for a header that is at the same offset in all packets that come here.
    #[inline(always)]
    pub(crate) const fn begin_at(&mut self, at: usize, way: Way) {
        self.ip.at = at;
        self.way = way;
    }
}

impl<F: Family> Default for Rewrite<F> {
    fn default() -> Self {
        Self::new()
    }
}

/// A packet is dropped and its sender is told by ICMP.
///
/// Errors about ICMP errors and about later fragments are forbidden: whoever refuses has to know
/// that it is about neither.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// Why it is dropped, for the counters.
    pub reason: DropReason,
    /// What its sender is told.
    pub answer: Answer,
}

impl Refusal {
    /// The packet does not fit; `mtu` bytes would.
    #[inline(always)]
    #[must_use]
    pub const fn too_big<F: Build>(ip: &Ip<F>, mtu: u32) -> Self {
        let mtu = if mtu > 0xffff { 0xffff } else { mtu as u16 };
        Self { reason: DropReason::TooBig, answer: Answer::about(ip, F::TOO_BIG, mtu) }
    }

    /// Its TTL or hop limit is used up.
    #[inline(always)]
    #[must_use]
    pub const fn time_exceeded<F: Build>(ip: &Ip<F>) -> Self {
        Self { reason: DropReason::TtlExceeded, answer: Answer::about(ip, F::TIME_EXCEEDED, 0) }
    }

    /// It is not let through for `reason`: "communication administratively prohibited".
    #[inline(always)]
    #[must_use]
    pub const fn prohibited<F: Build>(ip: &Ip<F>, reason: DropReason) -> Self {
        Self { reason, answer: Answer::about(ip, F::PROHIBITED, 0) }
    }
}

/// An ICMP error in place of a packet: headers before the packet that it is about are removed, at
/// most [`Family::QUOTE`] bytes of that are kept, and IP and ICMP headers go in front.
///
/// It comes from the address of the configuration, or, if there is none, from where the packet was
/// going.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Answer {
    /// Offset of the packet that it is about.
    pub at: u8,
    /// Where it goes.
    pub path: Path,
    /// Type and code.
    pub kind: [u8; 2],
    /// Largest packet that would fit, 0 if that is not the point.
    pub mtu: u16,
}

/// Where an error goes that stands in place of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Path {
    /// Where the packet came from, as [`Way::Back`] says.
    Back = 0,
    /// Where the packet came from, through the tunnel.
    Tunnel = 1,
    /// On, where the packet was going: it was itself an error, about a tunnelled packet.
    On = 2,
}

impl Answer {
    /// About a packet that is here; back through the tunnel if it came by one.
    #[inline(always)]
    const fn about<F: Family>(ip: &Ip<F>, kind: [u8; 2], mtu: u16) -> Self {
        let path = if ip.at == ETHERNET { Path::Back } else { Path::Tunnel };
        Self { at: ip.at as u8, path, kind, mtu }
    }

    /// As a number of 48 bits, for a function that can return nothing else.
    #[inline(always)]
    #[must_use]
    pub const fn pack(&self) -> u64 {
        let kind = u16::from_ne_bytes(self.kind) as u64;
        (self.at as u64) | ((self.path as u64) << 8) | (kind << 16) | ((self.mtu as u64) << 32)
    }

    /// The inverse of [`Answer::pack`].
    #[inline(always)]
    #[must_use]
    pub const fn unpack(packed: u64) -> Self {
        Self {
            at: (packed & 0xff) as u8,
            path: match packed >> 8 & 0xff {
                0 => Path::Back,
                1 => Path::Tunnel,
                _ => Path::On,
            },
            kind: ((packed >> 16 & 0xffff) as u16).to_ne_bytes(),
            mtu: (packed >> 32 & 0xffff) as u16,
        }
    }

    /// What the error says if `quoted` bytes are quoted.
    ///
    /// # Errors
    ///
    /// [`DropReason::Truncated`] if the packet that it is about has no whole IP header.
    #[inline(always)]
    pub fn error<F: Family, P: Packet>(
        &self,
        packet: &P,
        config: &Config,
        quoted: u16,
    ) -> Result<IcmpError<F>, DropReason> {
        let at = usize::from(self.at);
        let own = F::of_config(config);
        let src = if F::is_zero(&own) { F::load(packet, at + F::DST_AT)? } else { own };
        let dst = F::load(packet, at + F::SRC_AT)?;
        Ok(IcmpError { src, dst, kind: self.kind, mtu: self.mtu, quoted })
    }

    /// The tunnel that an error to `to` takes, if it takes one: of the kind by which the packet came.
    #[inline(always)]
    pub fn tunnel<F: Family>(
        &self,
        encap: Encap,
        config: &Config,
        to: &F::Addr,
        quoted: u16,
    ) -> Option<Tunnel<F>> {
        if !matches!(self.path, Path::Tunnel) {
            return None;
        }
        let hash = Hash::of_client::<F>(to);
        Some(Tunnel {
            encap,
            src: F::of_config(config),
            dst: *to,
            src_port: source_port(config.flags & CONFIG_SOURCE_PORT_AUTO != 0, hash, config),
            dst_port: config.fou_port,
            ecn: 0,
            inner: quoted.wrapping_add((F::HEADER + 8) as u16),
            label: hash.bits16(),
        })
    }
}

/// The outer source port of a flow.
#[inline(always)]
pub(crate) fn source_port(auto: bool, hash: Hash, config: &Config) -> [u8; 2] {
    if auto { (AUTO_PORT_FIRST + hash.below(AUTO_PORTS)).to_be_bytes() } else { config.fou_port }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_survive_packing() {
        for (at, path, mtu) in [(14, Path::Back, 0), (70, Path::Tunnel, 1280), (0xff, Path::On, 0xffff)] {
            for kind in [[3, 4], [1, 1], [0xff, 0xff]] {
                let answer = Answer { at, path, kind, mtu };
                assert_eq!(Answer::unpack(answer.pack()), answer);
                assert!(answer.pack() >> 48 == 0);
            }
        }
    }
}
