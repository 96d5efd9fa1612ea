//! ICMP errors on their way through the tunnel and the translation.
//!
//! An error is found by what it quotes, which is a packet of the flow in the opposite direction. Both
//! the addresses of the error and those inside the quote are translated, the quote's checksums
//! included, so that the receiver sees the very packet that it sent. An error goes to the host
//! whose packet it quotes and to nobody else; one about no known flow is dropped; none makes,
//! refreshes or ends any state (RFC 5508).
//!
//! Errors from the network between pod and gateway are about the packet outside the tunnel. Those
//! that say it was too big become errors about the packet inside it, for whoever sent that: nothing
//! has to be remembered.

use coil_common::{
    config::{CONFIG_SOURCE_PORT_AUTO, Config},
    stats::{Direction, DropReason, GatewayStat},
    values::{EGRESS_SOURCE_PORT_AUTO, PodValue},
};

use super::{
    from_pod::{self, Account},
    inbound,
    nat::OwnPorts,
    wire,
};
use crate::{
    csum,
    encap::Encap,
    family::Family,
    flow::Flow,
    head::{Build, TCP, Tunnel, UDP},
    packet::{ETHERNET, Packet},
    parse::{
        Ip, l4,
        quote::{self, ICMP_HEADER, Icmp, Place, Quote, QuoteEdit, Quoted, QuotedEnd},
        tunnel::{self, Outer, same},
    },
    tables::{NatTables, NodeTables, Ports, Tally},
    verdict::{Answer, Path, Refusal, Rewrite, Way, source_port},
};

/// What happens to an ICMP message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict<A> {
    /// It goes on as it is.
    Pass,
    /// It goes on changed as the [`ErrorRewrite`] says, and is counted.
    Rewrite(A),
    /// It is dropped, and another error takes its place, about what the [`ErrorRewrite`] has made of
    /// its quote.
    Refuse(Refusal),
}

impl<A> Verdict<A> {
    /// The same verdict, counted otherwise.
    #[inline(always)]
    pub fn map<B>(self, counted: impl FnOnce(A) -> B) -> Verdict<B> {
        match self {
            Self::Pass => Verdict::Pass,
            Self::Rewrite(account) => Verdict::Rewrite(counted(account)),
            Self::Refuse(refusal) => Verdict::Refuse(refusal),
        }
    }
}

/// The verdict, or why the message is dropped.
pub type Decision<A> = Result<Verdict<A>, DropReason>;

/// A change of an ICMP error. All bytes that change are known, and so is every checksum: no helper of
/// the kernel is needed for any, since nobody leaves the checksum of an error to a network card.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ErrorRewrite<F: Family> {
    /// Changes of the IP header, and the tunnel.
    pub base: Rewrite<F>,
    /// Changes of the quote.
    pub quote: QuoteEdit<F>,
    /// Offset of the ICMP checksum and its new value.
    pub check: Option<(usize, [u8; 2])>,
    /// Offset of the word after it and its new value.
    pub word: Option<(usize, [u8; 4])>,
}

impl<F: Family> ErrorRewrite<F> {
    /// Changes nothing.
    #[inline(always)]
    #[must_use]
    pub fn new() -> Self {
        Self { base: Rewrite::new(), quote: QuoteEdit::NONE, check: None, word: None }
    }

    /// Gives the error another source or destination. The ICMP checksum makes up for it in IPv6.
    #[inline(always)]
    fn move_to(&mut self, ip: &Ip<F>, at: usize, delta: u32, to: F::Addr) -> u32 {
        self.base.ip.addr = Some((self.base.ip.at + at, to));
        if F::CHECK_AT.is_some() {
            self.base.cover(ip, delta);
        }
        if F::ICMP_PSEUDO { delta } else { 0 }
    }

    /// Lowers the MTU that the error speaks of to `most`; it is never raised.
    #[inline(always)]
    fn limit(&mut self, at: usize, icmp: &Icmp, most: u32) -> u32 {
        if icmp.mtu::<F>() <= most {
            return 0;
        }
        let word = icmp.word_with::<F>((most & 0xffff) as u16);
        self.word = Some((at, word));
        csum::delta4(icmp.word, word)
    }
}

impl<F: Family> Default for ErrorRewrite<F> {
    fn default() -> Self {
        Self::new()
    }
}

/// Outer header of the tunnel for an error.
#[inline(always)]
fn through<F: Family>(
    ip: &Ip<F>,
    flow: &Flow<F>,
    (src, dst): (F::Addr, F::Addr),
    encap: Encap,
    auto: bool,
    config: &Config,
) -> Tunnel<F> {
    let hash = flow.hash(config.seed);
    Tunnel {
        encap,
        src,
        dst,
        src_port: source_port(auto, hash, config),
        dst_port: config.fou_port,
        ecn: ip.tos & 3,
        inner: (ip.length & 0xffff) as u16,
        label: hash.bits16(),
    }
}

#[inline(always)]
const fn tally<F: Family>(ip: &Ip<F>) -> Tally {
    Tally { packets: 1, bytes: ip.length, now: 0, state: 0 }
}

/// The MTU that is left of one that a link between pod and gateway has.
#[inline(always)]
fn inner_mtu<F: Build>(icmp: &Icmp, encap: Encap) -> u16 {
    // What old routers mean that say nothing.
    const UNKNOWN: u32 = 576;
    let least = if F::INDEX == 0 { 68 } else { 1280 };
    let outer = icmp.mtu::<F>();
    let outer = if outer == 0 { UNKNOWN } else { outer };
    // Room for what is added to a number that anybody may have written.
    let outer = if outer > 0xf_ffff { 0xf_ffff } else { outer };
    let inner = wire::inner_mtu::<F>(encap.like_fou(outer));
    let inner = if inner < least { least } else { inner };
    if inner > 0xffff { 0xffff } else { inner as u16 }
}

/// An error about the packet that is quoted inside the tunnel's headers.
#[inline(always)]
fn underlay<F: Build>(
    inner: &Quote<F>,
    icmp: &Icmp,
    encap: Encap,
    path: Path,
) -> Result<Refusal, DropReason> {
    // As far as a refusal can look.
    if inner.at > 0x7f {
        return Err(DropReason::IcmpQuote);
    }
    let answer = Answer { at: inner.at as u8, path, kind: F::TOO_BIG, mtu: inner_mtu::<F>(icmp, encap) };
    Ok(Refusal { reason: DropReason::UnderlayTooBig, answer })
}

/// It says that a packet was too big.
#[inline(always)]
fn is_too_big<F: Build>(icmp: &Icmp) -> bool {
    u16::from_ne_bytes(icmp.kind) == u16::from_ne_bytes(F::TOO_BIG)
}

/// The kind of tunnel if what is quoted is a tunnelled packet.
#[inline(always)]
fn tunnelled<F: Family>(quote: &Quote<F>, config: &Config) -> Option<Encap> {
    let [a, b] = quote.dst_port;
    let [p, q] = config.fou_port;
    let ipip = same(quote.protocol, F::IPIP);
    let fou = same(quote.protocol, UDP) & same(a, p) & same(b, q);
    (ipip | fou != 0).then_some(Encap::ipip_if(ipip))
}

/// Offset of the packet inside a tunnelled one that is quoted.
#[inline(always)]
fn inside<F: Family>(outer: &Quote<F>, encap: Encap) -> usize {
    outer.l4 + (encap.overhead::<F>() as usize - F::HEADER)
}

/// Decides about an ICMP message from `pod` that is not an echo, after its source was checked.
///
/// # Errors
///
/// Why it is dropped.
#[inline(always)]
pub fn from_pod<F: Quoted + Build, P: Packet, T: NodeTables<F>>(
    packet: &mut P,
    pod: &PodValue,
    config: &Config,
    tables: &T,
    rewrite: &mut ErrorRewrite<F>,
) -> Decision<Account<T::Flow>> {
    let ip = F::parse(packet, ETHERNET)?;
    if quote::error(packet, &ip)?.is_none() {
        return match from_pod::unsupported(packet, pod, &ip, DropReason::UnsupportedIcmp, tables) {
            Ok(_) => Ok(Verdict::Pass),
            Err(reason) => Err(reason),
        };
    }
    let Some(egress) = from_pod::policy(pod, &ip.dst, tables)? else {
        return Ok(Verdict::Pass);
    };
    if ip.fragment != 0 {
        return Err(DropReason::Fragment);
    }
    let quote = quote::parse(packet, ip.l4 + ICMP_HEADER, ip.end(), config)?;
    let own = F::of_pod(pod);
    if !F::same(&quote.dst, &own) || !F::same(&ip.src, &own) || !F::same(&quote.src, &ip.dst) {
        return Err(DropReason::IcmpMismatch);
    }
    let flow = quote.flow().reversed();
    let Some(entry) = tables.flow(flow.key()) else {
        // An error about what has come in directly leaves directly, and makes nothing last longer.
        let is_tcp = quote.protocol == TCP;
        return match inbound::noted(pod, egress, &flow, is_tcp, tables.now(), tables) {
            Some(_) => Ok(Verdict::Pass),
            None => Err(DropReason::IcmpNoFlow),
        };
    };
    let choice = from_pod::kept(entry, pod, &l4::L4::UNKNOWN, tables).ok_or(DropReason::IcmpNoFlow)?;
    let encap = Encap::of_config(config);
    if ip.length > wire::inner_mtu::<F>(encap.like_fou(pod.mtu)) {
        return Err(DropReason::TooBig);
    }
    let egress = tables.egress(choice.value.egress).ok_or(DropReason::EgressUnresolved)?;
    let auto = egress.flags & EGRESS_SOURCE_PORT_AUTO != 0;
    rewrite.base.begin_at(ETHERNET, Way::On);
    rewrite.base.enter_tunnel(through(&ip, &flow, (own, choice.gateway), encap, auto, config));
    Ok(Verdict::Rewrite(Account {
        flow: None,
        egress: choice.value.egress,
        direction: Direction::Tx,
        tally: tally(&ip),
    }))
}

/// Decides about an ICMP message in the tunnel to a pod, which was found to be from its gateway; and
/// about one, or a fragment, to a pod outside the tunnel.
///
/// # Errors
///
/// Why it is dropped.
#[inline(always)]
pub fn to_pod<F: Quoted + Outer + Build, P: Packet, T: NodeTables<F>>(
    packet: &mut P,
    pod: &PodValue,
    config: &Config,
    tables: &T,
    rewrite: &mut ErrorRewrite<F>,
) -> Decision<Option<Account<T::Flow>>> {
    let Some(udp) = tunnel::locate::<F, P>(packet, config.fou_port) else {
        return outside(packet, pod, config, tables);
    };
    let outer = tunnel::outer::<F, P>(packet, udp)?;
    let inner = tunnel::inner(packet, &outer)?;
    rewrite.base.begin(&inner, Way::On);
    rewrite.base.take_congestion(&inner, outer.tos);
    rewrite.base.pop = rewrite.base.ip.at - ETHERNET;
    // What is wrong with it the gateway should have seen; it counts if it can be counted.
    let quoted = match quote::error(packet, &inner) {
        Ok(Some(_)) if inner.fragment == 0 => {
            quote::parse::<F, P>(packet, inner.l4 + ICMP_HEADER, inner.end(), config)
        }
        _ => return Ok(Verdict::Rewrite(None)),
    };
    let account = match quoted {
        Ok(quote) => tables.flow(quote.flow().key()),
        Err(_) => None,
    };
    Ok(Verdict::Rewrite(match account {
        None => None,
        Some(entry) => Some(Account {
            flow: None,
            egress: tables.flow_value(entry).egress,
            direction: Direction::Rx,
            tally: tally(&inner),
        }),
    }))
}

/// Decides about an ICMP message or a fragment to `pod` that is not tunnelled.
#[inline(always)]
fn outside<F: Quoted + Build, P: Packet, T: NodeTables<F>>(
    packet: &mut P,
    pod: &PodValue,
    config: &Config,
    tables: &T,
) -> Decision<Option<Account<T::Flow>>> {
    let Ok(ip) = F::parse(packet, ETHERNET) else {
        return Ok(Verdict::Pass);
    };
    if ip.fragment != 0 {
        let outer = match l4::parse(packet, &ip) {
            Ok(l4) => {
                ip.protocol == UDP && u16::from_ne_bytes(l4.dst_port) == u16::from_ne_bytes(config.fou_port)
            }
            Err(_) => ip.obstacle.is_none() && ip.protocol == F::IPIP,
        };
        return if outer && tables.is_peer(pod.set, &ip.src) {
            Err(DropReason::OuterFragment)
        } else {
            Ok(Verdict::Pass)
        };
    }
    let icmp = match quote::error(packet, &ip) {
        Ok(Some(icmp)) if is_too_big::<F>(&icmp) => icmp,
        _ => return Ok(Verdict::Pass),
    };
    let Ok(outer) = quote::parse::<F, P>(packet, ip.l4 + ICMP_HEADER, ip.end(), config) else {
        return Ok(Verdict::Pass);
    };
    let own = F::of_pod(pod);
    let Some(encap) = tunnelled(&outer, config) else {
        return Ok(Verdict::Pass);
    };
    if !F::same(&outer.src, &own) || !tables.is_peer(pod.set, &outer.dst) {
        return Ok(Verdict::Pass);
    }
    let inner = quote::parse::<F, P>(packet, inside(&outer, encap), ip.end(), config)?;
    if !F::same(&inner.src, &own) {
        return Err(DropReason::IcmpMismatch);
    }
    if tables.flow(inner.flow().key()).is_none() {
        return Err(DropReason::IcmpNoFlow);
    }
    Ok(Verdict::Refuse(underlay(&inner, &icmp, encap, Path::On)?))
}

/// How a translated error counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GatewayAccount {
    /// What the gateway counts.
    pub stat: GatewayStat,
    /// Bytes of the packet.
    pub bytes: u32,
}

impl GatewayAccount {
    /// Counts it.
    #[inline(always)]
    pub fn commit<F: Family, T: NatTables<F>>(&self, tables: &T) {
        tables.count_gateway(self.stat, 1, self.bytes);
    }
}

/// Decides about an ICMP message in the tunnel to a gateway, which was found to be from a client.
///
/// # Errors
///
/// Why it is dropped.
#[inline(always)]
pub fn out<F: Quoted + Outer + Build, P: Packet, T: NatTables<F>>(
    packet: &mut P,
    config: &Config,
    tables: &T,
    rewrite: &mut ErrorRewrite<F>,
) -> Decision<GatewayAccount> {
    let Some(udp) = tunnel::locate::<F, P>(packet, config.fou_port) else {
        return Ok(Verdict::Pass);
    };
    let outer = tunnel::outer::<F, P>(packet, udp)?;
    let inner = tunnel::inner(packet, &outer)?;
    let Some(icmp) = quote::error(packet, &inner)? else {
        return Err(DropReason::UnsupportedIcmp);
    };
    if inner.fragment != 0 {
        return Err(DropReason::Fragment);
    }
    let quote = quote::parse(packet, inner.l4 + ICMP_HEADER, inner.end(), config)?;
    if !F::same(&quote.dst, &inner.src) || !F::same(&quote.src, &inner.dst) {
        return Err(DropReason::IcmpMismatch);
    }
    let entry = tables.forward(quote.flow().reversed().key()).ok_or(DropReason::IcmpNoFlow)?;
    if inner.ttl <= 1 {
        return Err(DropReason::TtlExceeded);
    }
    let to = tables.translation(entry);
    rewrite.base.begin(&inner, Way::Back);
    rewrite.base.decrement_ttl(&inner);
    rewrite.base.take_congestion(&inner, outer.tos);
    rewrite.base.pop = rewrite.base.ip.at - ETHERNET;
    let delta = F::delta(&inner.src, &to.addr);
    let change = rewrite.move_to(&inner, F::SRC_AT, delta, to.addr);
    let quoted = quote.translate(packet, QuotedEnd::Destination, &to, &mut rewrite.quote)?;
    rewrite.check = Some((inner.l4 + 2, csum::update(icmp.check, csum::add(change, quoted))));
    Ok(Verdict::Rewrite(GatewayAccount {
        stat: if F::INDEX == 0 { GatewayStat::MasqueradedV4 } else { GatewayStat::MasqueradedV6 },
        bytes: inner.length,
    }))
}

/// Decides about an ICMP message from the world to the address of a gateway.
///
/// # Errors
///
/// Why it is dropped.
#[inline(always)]
pub fn back<F: Quoted + Build, P: Packet, T: NatTables<F>>(
    packet: &mut P,
    config: &Config,
    tables: &T,
    rewrite: &mut ErrorRewrite<F>,
) -> Decision<GatewayAccount> {
    let Ok(ip) = F::parse(packet, ETHERNET) else {
        return Ok(Verdict::Pass);
    };
    let icmp = match quote::error(packet, &ip) {
        Ok(Some(icmp)) => icmp,
        _ => return Ok(Verdict::Pass),
    };
    if ip.fragment != 0 {
        return Err(DropReason::Fragment);
    }
    let quote = quote::parse(packet, ip.l4 + ICMP_HEADER, ip.end(), config)?;
    if !F::same(&quote.src, &ip.dst) {
        return Err(DropReason::IcmpMismatch);
    }
    if let Some(encap) = tunnelled(&quote, config)
        && tables.is_client(&quote.dst)
    {
        if !is_too_big::<F>(&icmp) {
            return Ok(Verdict::Pass);
        }
        let inner = quote::parse(packet, inside(&quote, encap), ip.end(), config)?;
        if !F::same(&inner.dst, &quote.dst) {
            return Err(DropReason::IcmpMismatch);
        }
        let entry = tables.forward(inner.flow().reversed().key()).ok_or(DropReason::IcmpNoFlow)?;
        let to = tables.translation(entry);
        // The checksum of the error that takes its place is made anew.
        inner.translate(packet, QuotedEnd::Destination, &to, &mut rewrite.quote)?;
        return Ok(Verdict::Refuse(underlay(&inner, &icmp, encap, Path::Back)?));
    }
    let flow = quote.flow().reversed();
    let Some(entry) = tables.reverse(flow.key()) else {
        // The local stack has ports of its own.
        return if is_own(&quote, config, tables) { Ok(Verdict::Pass) } else { Err(DropReason::IcmpNoFlow) };
    };
    if ip.ttl <= 1 {
        return Err(DropReason::TtlExceeded);
    }
    let to = tables.translation(entry);
    let most = wire::inner_mtu::<F>(to.encap.like_fou(config.mtu));
    if ip.length > most {
        return Err(DropReason::TooBig);
    }
    rewrite.base.begin_at(ETHERNET, Way::Back);
    rewrite.base.decrement_ttl(&ip);
    let delta = F::delta(&ip.dst, &to.addr);
    let mut change = rewrite.move_to(&ip, F::DST_AT, delta, to.addr);
    change = csum::add(change, quote.translate(packet, QuotedEnd::Source, &to, &mut rewrite.quote)?);
    if is_too_big::<F>(&icmp) {
        change = csum::add(change, rewrite.limit(ip.l4 + 4, &icmp, most));
    }
    rewrite.check = Some((ip.l4 + 2, csum::update(icmp.check, change)));
    let auto = config.flags & CONFIG_SOURCE_PORT_AUTO != 0;
    rewrite.base.enter_tunnel(through(&ip, &flow, (F::of_config(config), to.addr), to.encap, auto, config));
    Ok(Verdict::Rewrite(GatewayAccount {
        stat: if F::INDEX == 0 { GatewayStat::ReplyV4 } else { GatewayStat::ReplyV6 },
        bytes: ip.length,
    }))
}

/// The quoted packet was sent from a port that translation does not use.
#[inline(always)]
fn is_own<F: Family, T: NatTables<F>>(quote: &Quote<F>, config: &Config, tables: &T) -> bool {
    let port = u16::from_be_bytes(quote.src_port);
    let identifier = matches!(quote.place, Place::Identifier);
    let (first, last) = Ports::<F>::range(&OwnPorts(config), identifier);
    // Without ports there is nothing to tell them apart by.
    if matches!(quote.place, Place::None) {
        return true;
    }
    port < first || port > last || (!identifier && tables.is_excluded(quote.protocol == UDP, port))
}
