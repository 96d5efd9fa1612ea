//! Carries verdicts out on bytes in memory, as the programs do on packets in the kernel.

use coil_common::{
    config::{CONFIG_NEAR, Config},
    stats::{DropReason, GatewayStat, IcmpStat},
    values::{NO_POLICY, POD_GATEWAY, PodValue},
};

use super::{
    Action, Hook,
    memory::{Memory, Tables},
};
use crate::{
    csum,
    decide::{
        dropped,
        fast::{self, Usual},
        fragment, from_pod, gateway,
        icmp::{self, ErrorRewrite},
        inbound,
        near::{self, Near},
        to_pod,
    },
    encap::{self, Encap},
    family::{Family, V4, V6},
    head::{Build, TUNNEL_TTL, Tunnel},
    packet::{ETHERNET, Packet as _},
    parse::{
        eth::{EtherType, ethertype},
        quote::Quoted,
        tunnel::{self, Outer},
    },
    tables::{NatTables, NodeTables},
    verdict::{Answer, Path, Refusal, Rewrite, Verdict, Way},
};

/// Runs a packet through a hook: what is left of it, and what happens to it.
#[must_use]
pub fn run(hook: Hook, ifindex: u32, packet: &Memory, config: &Config, tables: &Tables) -> (Action, Vec<u8>) {
    let mut packet = Memory { interface: ifindex, ..packet.clone() };
    let result = match ethertype(&mut packet) {
        Ok(EtherType::V4) => run_family::<V4>(hook, ifindex, &mut packet, config, tables),
        Ok(EtherType::V6) => run_family::<V6>(hook, ifindex, &mut packet, config, tables),
        Ok(EtherType::Other) | Err(_) => Ok(Action::Pass),
    };
    match result {
        Ok(action) => (action, packet.bytes),
        Err(reason) => {
            let counter = dropped(&packet);
            tables.count_drop(reason, counter);
            if let Some(stat) = invalid(reason, &packet) {
                tables.count_invalid(stat, counter);
            }
            (Action::Drop, packet.bytes)
        }
    }
}

/// What a gateway counts besides for a drop.
#[must_use]
pub fn invalid(reason: DropReason, packet: &Memory) -> Option<GatewayStat> {
    match (reason, packet.bytes.get(12)) {
        (DropReason::NoState, Some(8)) => Some(GatewayStat::InvalidV4),
        (DropReason::NoState, _) => Some(GatewayStat::InvalidV6),
        _ => None,
    }
}

/// The short way, as a program tries it first.
fn hit<F: Outer + Usual>(
    hook: Hook,
    ifindex: u32,
    packet: &mut Memory,
    config: &Config,
    tables: &Tables,
) -> Option<Action>
where
    Tables: NodeTables<F> + NatTables<F> + Near<F>,
{
    let mut rewrite = Rewrite::<F>::new();
    let pod = || tables.pod(ifindex);
    match hook {
        Hook::FromPod if pod()?.set == NO_POLICY => {
            let from = pod()?;
            if fast::unserved::<F, _>(packet, &from).is_none() {
                if config.flags & CONFIG_NEAR == 0 || from.flags != POD_GATEWAY {
                    return None;
                }
                let (_, hit) = near::client::<F, _, _>(packet, &from, tables)?;
                if let Some(hit) = hit {
                    hit.commit(tables);
                }
                return Some(Action::Back);
            }
        }
        Hook::FromPod => {
            let near = config.flags & CONFIG_NEAR != 0;
            let hit = if Encap::of_config(config).is_ipip() {
                fast::from_pod::<F, _, _, true>(packet, &pod()?, config, tables, &mut rewrite)?
            } else {
                fast::from_pod::<F, _, _, false>(packet, &pod()?, config, tables, &mut rewrite)?
            };
            if near && hit.answered && near::gateway(&rewrite, tables).is_some() {
                packet.bytes.copy_within(0..6, 6);
                hit.commit(tables);
                return Some(Action::Back);
            }
            apply(packet, &rewrite);
            hit.commit(tables);
        }
        Hook::ToPod => {
            let hit = if Encap::of_config(config).is_ipip() {
                fast::to_pod::<F, _, _, true>(packet, &pod()?, config, tables, &mut rewrite)?
            } else {
                fast::to_pod::<F, _, _, false>(packet, &pod()?, config, tables, &mut rewrite)?
            };
            apply(packet, &rewrite);
            hit.commit(tables);
        }
        Hook::Gateway => {
            let hit = match fast::out::<F, _, _, false>(packet, config, tables, &mut rewrite) {
                Some(hit) => hit,
                None => match fast::back(packet, config, tables, &mut rewrite) {
                    Some(Some(hit)) => hit,
                    Some(None) => return Some(Action::Pass),
                    None => match gateway::direction::<F, _>(packet, config) {
                        gateway::Direction::Out(encap) if encap.is_ipip() => {
                            fast::out::<F, _, _, true>(packet, config, tables, &mut rewrite)?
                        }
                        gateway::Direction::Neither => near::out(packet, config, tables, &mut rewrite)?,
                        _ => return None,
                    },
                },
            };
            apply(packet, &rewrite);
            hit.commit(tables);
        }
    }
    Some(match rewrite.way {
        Way::On => Action::Pass,
        Way::Back => Action::Back,
    })
}

fn run_family<F: Outer + Usual + Quoted>(
    hook: Hook,
    ifindex: u32,
    packet: &mut Memory,
    config: &Config,
    tables: &Tables,
) -> Result<Action, DropReason>
where
    Tables: NodeTables<F> + NatTables<F> + Near<F>,
{
    if !tables.long_way_only
        && let Some(action) = hit::<F>(hook, ifindex, packet, config, tables)
    {
        return Ok(action);
    }
    let mut rewrite = Rewrite::<F>::new();
    let pod = tables.pod(ifindex);
    if let (Hook::ToPod, Some(pod)) = (hook, &pod)
        && inbound::notes(pod)
    {
        inbound::note(packet, pod, config, tables);
    }
    let verdict = match (hook, pod) {
        (Hook::FromPod | Hook::ToPod, None) => return Ok(Action::Pass),
        (Hook::FromPod, Some(pod)) => {
            if pod.set != NO_POLICY && fragment::is_first::<F, _>(packet) {
                let noted = fragment::from_pod(packet, &pod, config, tables, &mut rewrite);
                rewrite.noted = matches!(noted, Ok(Verdict::Fragment));
            }
            let mut verdict = from_pod::from_pod(packet, &pod, config, tables, &mut rewrite)?;
            if matches!(verdict, Verdict::Fragment) {
                rewrite = Rewrite::new();
                verdict = fragment::from_pod(packet, &pod, config, tables, &mut rewrite)?;
            }
            if matches!(verdict, Verdict::Fragment) {
                return Err(DropReason::ExtensionHeaders);
            }
            verdict.map(|account: from_pod::Account<_>| Counted::Flow(Some(account)))
        }
        (Hook::ToPod, Some(pod)) => {
            let mut verdict = to_pod::to_pod(packet, &pod, config, tables, &mut rewrite)?;
            if matches!(verdict, Verdict::Fragment) {
                rewrite = Rewrite::new();
                verdict = fragment::to_pod(packet, config, tables, &mut rewrite)?;
            }
            if matches!(verdict, Verdict::Fragment) {
                rewrite = Rewrite { noted: true, ..Rewrite::new() };
                verdict = to_pod::to_pod(packet, &pod, config, tables, &mut rewrite)?;
            }
            verdict.map(Counted::Flow)
        }
        (Hook::Gateway, _) => {
            let direct = matches!(gateway::direction::<F, _>(packet, config), gateway::Direction::Neither);
            let decide = |packet: &mut Memory, rewrite: &mut Rewrite<F>| {
                if direct {
                    near::out_long(packet, config, tables, rewrite)
                } else {
                    gateway::gateway(packet, config, tables, rewrite)
                }
            };
            let mut verdict = decide(packet, &mut rewrite)?;
            if let Verdict::Attend(attention) = verdict {
                rewrite = Rewrite { attended: true, ..Rewrite::new() };
                verdict = match NatTables::<F>::attend(tables, attention.shape, config) {
                    Ok(()) => decide(packet, &mut rewrite)?,
                    Err(index) => {
                        let reason = DropReason::ALL[index as usize];
                        let answer = attention.refused::<F>(index).map_err(|_| reason)?;
                        Verdict::Refuse(Refusal { reason, answer })
                    }
                };
            }
            if matches!(verdict, Verdict::Fragment) {
                rewrite = Rewrite::new();
                verdict = match gateway::direction::<F, _>(packet, config) {
                    gateway::Direction::Out(_) => fragment::out(packet, config, tables, &mut rewrite)?,
                    _ => fragment::back(packet, config, tables, &mut rewrite)?,
                };
            }
            if matches!(verdict, Verdict::Fragment) {
                rewrite = Rewrite { noted: true, attended: true, ..Rewrite::new() };
                verdict = decide(packet, &mut rewrite)?;
            }
            verdict.map(Counted::Entry)
        }
    };
    match verdict {
        Verdict::Pass => Ok(Action::Pass),
        Verdict::Rewrite(counted) => {
            let outward = gateway::direction::<F, _>(packet, config);
            apply(packet, &rewrite);
            match (hook, outward) {
                (Hook::Gateway, gateway::Direction::Out(encap)) => {
                    encap::note::<F, _, _>(packet, encap, tables)
                }
                (Hook::Gateway, gateway::Direction::Neither) => {
                    encap::note::<F, _, _>(packet, Encap::DIRECT, tables);
                }
                _ => {}
            }
            counted.commit::<F>(tables);
            Ok(action(rewrite.way))
        }
        Verdict::Refuse(refusal) => Ok(drop_and_tell::<F>(packet, &refusal, config, tables)),
        Verdict::Icmp => run_icmp::<F>(hook, ifindex, packet, config, tables),
        // Whoever decides about fragments never says that it is one, and nobody asks twice.
        Verdict::Fragment | Verdict::Attend(_) => Err(DropReason::RewriteFailed),
    }
}

/// An ICMP message other than echo.
fn run_icmp<F: Outer + Usual + Quoted>(
    hook: Hook,
    ifindex: u32,
    packet: &mut Memory,
    config: &Config,
    tables: &Tables,
) -> Result<Action, DropReason>
where
    Tables: NodeTables<F> + NatTables<F> + Near<F>,
{
    let mut rewrite = ErrorRewrite::<F>::new();
    let Some(pod) = tables.pod(ifindex).or((hook == Hook::Gateway).then(PodValue::default)) else {
        return Ok(Action::Pass);
    };
    let outward =
        || matches!(gateway::direction::<F, _>(&mut packet.clone(), config), gateway::Direction::Out(_));
    let verdict = match hook {
        Hook::FromPod => icmp::from_pod(packet, &pod, config, tables, &mut rewrite)?
            .map(|account: from_pod::Account<_>| Counted::Flow(Some(account))),
        Hook::ToPod => icmp::to_pod(packet, &pod, config, tables, &mut rewrite)?.map(Counted::Flow),
        Hook::Gateway if outward() => icmp::out(packet, config, tables, &mut rewrite)?.map(Counted::Gateway),
        Hook::Gateway => icmp::back(packet, config, tables, &mut rewrite)?.map(Counted::Gateway),
    };
    match verdict {
        icmp::Verdict::Pass => Ok(Action::Pass),
        icmp::Verdict::Rewrite(counted) => {
            apply_error(packet, &rewrite);
            counted.commit::<F>(tables);
            tables.count_icmp(match (hook, rewrite.base.push().is_some()) {
                (Hook::FromPod, _) | (Hook::Gateway, false) => IcmpStat::FromPod,
                (Hook::ToPod, _) | (Hook::Gateway, true) => IcmpStat::ToPod,
            });
            Ok(action(rewrite.base.way))
        }
        icmp::Verdict::Refuse(refusal) => {
            let counter = dropped(packet);
            apply_quote(packet, &rewrite);
            tables.count_drop(refusal.reason, counter);
            Ok(refuse::<F>(packet, &refusal.answer, config, tables))
        }
    }
}

/// How a packet counts that was rewritten.
enum Counted<H, E> {
    Flow(Option<from_pod::Account<H>>),
    Entry(gateway::Account<E>),
    Gateway(icmp::GatewayAccount),
}

impl<H: Copy, E: Copy> Counted<H, E> {
    fn commit<F: Family>(&self, tables: &Tables)
    where
        Tables: NodeTables<F, Flow = H> + NatTables<F, Entry = E>,
    {
        match self {
            Self::Flow(account) => account.iter().for_each(|account| account.commit(tables)),
            Self::Entry(account) => account.commit(tables),
            Self::Gateway(account) => account.commit::<F, _>(tables),
        }
    }
}

fn action(way: Way) -> Action {
    match way {
        Way::On => Action::Pass,
        Way::Back => Action::Back,
    }
}

fn drop_and_tell<F: Outer + Build>(
    packet: &mut Memory,
    refusal: &Refusal,
    config: &Config,
    tables: &Tables,
) -> Action {
    let counter = dropped(packet);
    tables.count_drop(refusal.reason, counter);
    if let Some(stat) = invalid(refusal.reason, packet) {
        tables.count_invalid(stat, counter);
    }
    refuse::<F>(packet, &refusal.answer, config, tables)
}

/// Changes the quote of an ICMP error.
fn apply_quote<F: Family>(packet: &mut Memory, rewrite: &ErrorRewrite<F>) {
    let quote = &rewrite.quote;
    if let Some((at, addr)) = quote.addr {
        write(&mut packet.bytes, at, bytemuck::bytes_of(&addr));
    }
    for (at, value) in [quote.ip_check, quote.port, quote.check].into_iter().flatten() {
        write(&mut packet.bytes, at, &value);
    }
}

/// Changes an ICMP error.
fn apply_error<F: Build>(packet: &mut Memory, rewrite: &ErrorRewrite<F>) {
    apply_quote(packet, rewrite);
    if let Some((at, check)) = rewrite.check {
        write(&mut packet.bytes, at, &check);
    }
    if let Some((at, word)) = rewrite.word {
        write(&mut packet.bytes, at, &word);
    }
    apply(packet, &rewrite.base);
}

/// Changes a packet.
pub fn apply<F: Build>(packet: &mut Memory, rewrite: &Rewrite<F>) {
    if matches!(rewrite.way, Way::Back) {
        turn_around(&mut packet.bytes);
    }
    let ip = &rewrite.ip;
    if let Some(first) = ip.first {
        write(&mut packet.bytes, ip.at, &first);
    }
    if let Some(ttl) = ip.ttl {
        write(&mut packet.bytes, ip.at + F::TTL_AT, &ttl);
    }
    if let (Some(at), Some(check)) = (F::CHECK_AT, ip.check) {
        write(&mut packet.bytes, ip.at + at, &check);
    }
    if let Some((at, addr)) = ip.addr {
        write(&mut packet.bytes, at, bytemuck::bytes_of(&addr));
    }
    if let Some(port) = rewrite.port {
        write(&mut packet.bytes, port.at, &port.new);
    }
    if let Some(mss) = rewrite.mss {
        write(&mut packet.bytes, mss.at, &mss.value);
    }
    let check = &rewrite.check;
    for delta in [check.pseudo, rewrite.plain_delta()].into_iter().flatten() {
        update(&mut packet.bytes, check.at, delta, check.optional);
    }
    packet.bytes.drain(ETHERNET..ETHERNET + rewrite.pop);
    if let Some(tunnel) = rewrite.push() {
        insert_tunnel(&mut packet.bytes, tunnel);
    }
}

/// Makes an ICMP error of a packet, as often as is allowed.
fn refuse<F: Outer + Build>(
    packet: &mut Memory,
    answer: &Answer,
    config: &Config,
    tables: &Tables,
) -> Action {
    if config.icmp_rate != 0 && config.icmp_burst == 0 {
        tables.count_icmp(IcmpStat::Suppressed);
        return Action::Drop;
    }
    match respond::<F>(packet, answer, config) {
        Ok(()) => {
            tables.count_icmp(IcmpStat::Answered);
            if answer.path == Path::On { Action::Pass } else { Action::Back }
        }
        Err(_) => {
            tables.count_icmp(IcmpStat::Unanswerable);
            Action::Drop
        }
    }
}

fn respond<F: Outer + Build>(
    packet: &mut Memory,
    answer: &Answer,
    config: &Config,
) -> Result<(), DropReason> {
    let at = usize::from(answer.at);
    packet.ensure(at + F::HEADER)?;
    let length = if F::INDEX == 0 {
        usize::from(u16::from_be_bytes(packet.load::<2>(at + 2)?))
    } else {
        usize::from(u16::from_be_bytes(packet.load::<2>(at + 4)?)) + F::HEADER
    };
    let whole = if length < F::HEADER { F::QUOTE } else { length.min(F::QUOTE) };
    let quoted = whole.min(packet.bytes.len() - at);
    if quoted < 28 {
        return Err(DropReason::RewriteFailed);
    }
    let length = u16::try_from(quoted).map_err(|_| DropReason::RewriteFailed)?;
    let error = answer.error::<F, _>(packet, config, length)?;
    let encap = tunnel::outermost::<F, _>(packet);
    let tunnel = answer.tunnel::<F>(encap, config, &error.dst, length);
    let head = F::error(&error, sum(&packet.bytes[at..at + quoted]));
    if answer.path != Path::On {
        turn_around(&mut packet.bytes);
    }
    packet.bytes.truncate(at + F::QUOTE);
    packet.bytes.drain(ETHERNET..at);
    insert(&mut packet.bytes, bytemuck::bytes_of(&head));
    if let Some(tunnel) = tunnel {
        insert_tunnel(&mut packet.bytes, &tunnel);
    }
    packet.gso_size = 0;
    Ok(())
}

/// Swaps the Ethernet addresses.
fn turn_around(bytes: &mut [u8]) {
    let (to, from) = bytes.split_at_mut(6);
    to.swap_with_slice(&mut from[..6]);
}

fn write(bytes: &mut [u8], at: usize, value: &[u8]) {
    bytes[at..at + value.len()].copy_from_slice(value);
}

fn insert_tunnel<F: Build>(bytes: &mut Vec<u8>, tunnel: &Tunnel<F>) {
    let head = F::tunnel(tunnel);
    insert(bytes, &bytemuck::bytes_of(&head)[..tunnel.encap.overhead::<F>() as usize]);
}

fn insert(bytes: &mut Vec<u8>, head: &[u8]) {
    bytes.splice(ETHERNET..ETHERNET, head.iter().copied());
}

/// What the helper of the kernel does to a checksum that is complete.
fn update(bytes: &mut [u8], at: usize, delta: u32, optional: bool) {
    let old = [bytes[at], bytes[at + 1]];
    if optional && old == [0, 0] {
        return;
    }
    let mut new = csum::update(old, delta);
    if optional && new == [0, 0] {
        new = [0xff, 0xff];
    }
    write(bytes, at, &new);
}

/// Sum of bytes in the order of memory.
fn sum(bytes: &[u8]) -> u32 {
    bytes.chunks(2).fold(0, |sum, pair| {
        csum::add(sum, u32::from(u16::from_ne_bytes([pair[0], pair.get(1).copied().unwrap_or(0)])))
    })
}

/// A packet without what a tunnel may choose freely: identification or flow label of an outer header
/// are zero, and the outer header checksum follows.
#[must_use]
pub fn canonical(bytes: &[u8]) -> Vec<u8> {
    let mut out = bytes.to_vec();
    let is_fou = |at: usize| out.get(at..at + 2) == Some(&super::build::FOU.to_be_bytes()[..]);
    let ttl = |at: usize| out.get(at) == Some(&TUNNEL_TTL);
    match out.get(12..15) {
        Some([8, 0, 0x45])
            if out.get(23) == Some(&17) && is_fou(36) || out.len() >= 34 && out[23] == 4 && ttl(22) =>
        {
            let sum_before = super::build::sum(&out[14..34]);
            if sum_before == 0xffff {
                write(&mut out, 18, &[0, 0]);
                write(&mut out, 24, &[0, 0]);
                let check = !super::build::sum(&out[14..34]);
                write(&mut out, 24, &check.to_be_bytes());
            }
        }
        Some([0x86, 0xdd, _])
            if out.get(20) == Some(&17) && is_fou(56) || out.get(20) == Some(&41) && ttl(21) =>
        {
            out[15] &= 0xf0;
            write(&mut out, 16, &[0, 0]);
        }
        _ => {}
    }
    out
}
