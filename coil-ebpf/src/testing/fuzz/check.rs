//! Looks at what the library has made of a packet: is it what the model says, and is it harmless, whatever
//! anybody says?

use std::{collections::BTreeMap, fmt};

use coil_common::{
    names,
    stats::DropReason,
    values::{Counter, FlowValue, NatValue4, NatValue6},
};

use super::{
    model::{Counters, Half, Input, Seen, Should, drop_counters},
    play::{Hop, Play},
    wire::{self, Flow, byte, number, octets},
    world::hosts,
};
use crate::testing::{
    build::FOU,
    interpret,
    memory::{Memory, Tables},
    scenario::{Action, Hook, IFINDEX},
};
use crate::{
    family::{V4, V6},
    tables::NatTables,
};

/// A case that went wrong.
#[derive(Clone, Debug)]
pub struct Failure {
    /// What is wrong.
    pub what: String,
    /// What has happened up to then, the last being the one that went wrong.
    pub hops: Vec<Hop>,
}

/// Hops that a failure shows, unless `#` asks for all.
const SHOWN: usize = 3;

/// Bytes that are printed of a frame: payload tells nothing.
const PRINTED: usize = 200;

fn hex(bytes: &[u8]) -> String {
    let mut text: String = bytes.iter().take(PRINTED).map(|byte| format!("{byte:02x}")).collect();
    if bytes.len() > PRINTED {
        text.push_str(&format!("… ({} bytes)", bytes.len()));
    }
    text
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let left_out = if f.alternate() { 0 } else { self.hops.len().saturating_sub(SHOWN) };
        if left_out != 0 {
            writeln!(f, "{left_out} packets before these")?;
        }
        for hop in &self.hops[left_out..] {
            let Hop { hook, now, packet, action, after } = hop;
            write!(f, "{} at {now} s, {action:?}", hook.program())?;
            if packet.gso_size != 0 {
                write!(f, ", segments of {} bytes, {} of them", packet.gso_size, packet.gso_segments)?;
            }
            writeln!(f, "\n  in  {}", hex(&packet.bytes))?;
            if *after != packet.bytes {
                writeln!(f, "  out {}", hex(after))?;
            }
        }
        write!(f, "{}", self.what)
    }
}

impl std::error::Error for Failure {}

fn failure(play: &Play, what: String) -> Box<Failure> {
    Box::new(Failure { what, hops: play.hops.clone() })
}

/// What the counters of a table have grown by.
fn growth(before: &Counters, after: &Counters) -> Counters {
    let mut grown = Counters::new();
    for (key, now) in after {
        let old = before.get(key).copied().unwrap_or_default();
        let counter = Counter { packets: now.packets - old.packets, bytes: now.bytes - old.bytes };
        if counter != Counter::default() {
            grown.insert(*key, counter);
        }
    }
    grown
}

/// Shows a frame to a program and to the model: what happened.
///
/// # Errors
///
/// They differ, or what happened may not happen.
pub fn hop(play: &mut Play, hook: Hook, packet: &Memory) -> Result<(Action, Vec<u8>), Box<Failure>> {
    // The model knows tunnels only.
    if hook == Hook::Gateway && is_handed_over(play, packet) {
        return Ok((Action::Pass, packet.bytes.clone()));
    }
    let (tables, config) = match hook {
        Hook::FromPod | Hook::ToPod => (&play.node, &play.world.node),
        Hook::Gateway => (&play.gateway, &play.world.gateway),
    };
    let before = tables.counters();
    let run = || interpret::run(hook, IFINDEX, packet, config, tables);
    let run = std::panic::catch_unwind(std::panic::AssertUnwindSafe(run));
    let grown = growth(&before, &tables.counters());
    let now = tables.now;
    let (action, after) = run.unwrap_or((Action::Drop, Vec::new()));
    let panicked = after.is_empty() && !packet.bytes.is_empty();
    play.hops.push(Hop { hook, now, packet: packet.clone(), action, after: after.clone() });
    if panicked {
        return Err(failure(play, "it panics".to_owned()));
    }
    let reasons: Vec<_> = grown
        .keys()
        .filter(|(map, _)| *map == names::MAP_DROPS)
        .filter_map(|(_, index)| DropReason::from_index(*index))
        .collect();
    if reasons.len() > 1 {
        return Err(failure(play, format!("dropped more than once: {reasons:?}")));
    }
    let input =
        Input { frame: &packet.bytes, gso_size: packet.gso_size as usize, segments: packet.gso_segments };
    let seen = Seen { action, frame: &after, reason: reasons.first().copied() };
    let should = match hook {
        Hook::FromPod => Ok(play.model.from_pod(&input, &seen)),
        Hook::ToPod => Ok(play.model.to_pod(&input)),
        Hook::Gateway => play.model.gateway(&input, &seen),
    };
    let judged = should.and_then(|should| {
        compare(&should, &input, &seen, &grown)?;
        harmless(hook, packet, action, &after)
    });
    match judged {
        Ok(()) => Ok((action, after)),
        Err(what) => Err(failure(play, what)),
    }
}

/// A packet is one that reaches a gateway from a client of its node without a tunnel: it is for somebody else.
fn is_handed_over(play: &Play, packet: &Memory) -> bool {
    let input = Input { frame: &packet.bytes, gso_size: 0, segments: 0 };
    let Some(v6) = input.family() else { return false };
    let (bytes, (src_at, dst_at)) = (input.packet(), wire::addresses(v6));
    let own = octets(hosts(v6).gateway);
    if bytes.len() < wire::least(v6) || bytes[dst_at..dst_at + own.len()] == own[..] {
        return false;
    }
    let word = |at: usize| u32::from_ne_bytes([0, 1, 2, 3].map(|index| bytes[at + index]));
    if v6 {
        let src = [0, 4, 8, 12].map(|offset| word(src_at + offset));
        NatTables::<V6>::is_client(&play.gateway, &src)
    } else {
        NatTables::<V4>::is_client(&play.gateway, &word(src_at))
    }
}

/// Compares what was seen with what should have been.
fn compare(should: &Should, input: &Input, seen: &Seen, grown: &Counters) -> Result<(), String> {
    let mut counters = should.counters.clone();
    match seen.reason {
        Some(reason) if should.reasons.contains(&reason) => {
            for (key, counter) in drop_counters(input, reason) {
                counters.insert(key, counter);
            }
        }
        None if should.reasons.is_empty() => {}
        reason => {
            return Err(format!(
                "dropped for {reason:?}, should be for {:?}, and {:?}",
                should.reasons, should.action
            ));
        }
    }
    if seen.action != should.action {
        return Err(format!("{:?}, should be {:?}", seen.action, should.action));
    }
    if *grown != counters {
        return Err(format!("counted {grown:?}\n should be {counters:?}"));
    }
    let Some(frame) = &should.frame else { return Ok(()) };
    if seen.frame == input.frame && frame == input.frame {
        return Ok(());
    }
    let [mut found, wanted] = [seen.frame, frame].map(neutral);
    if seen.reason.is_some() {
        // Behind an error that takes the place of a packet, what Ethernet had put behind that may remain.
        found.truncate(wanted.len());
    }
    for at in &should.loose {
        // One of the zeros for the other.
        if number(&found, *at) % 0xffff == number(&wanted, *at) % 0xffff && found.len() >= at + 2 {
            found[*at..at + 2].copy_from_slice(&wanted[*at..at + 2]);
        }
    }
    if found != wanted {
        return Err(format!("becomes   {}\nshould be {}", hex(&found), hex(&wanted)));
    }
    Ok(())
}

/// A frame without what a tunnel may choose freely: identification or flow label, and the header checksum that
/// follows from it, which must be right.
fn neutral(frame: &[u8]) -> Vec<u8> {
    let mut frame = frame.to_vec();
    let v6 = number(&frame, 12) == 0x86dd;
    if !in_tunnel(&frame) || frame.len() < 14 + wire::least(v6) + 8 {
        return frame;
    }
    if v6 {
        frame[15] &= 0xf0;
        frame[16..18].fill(0);
    } else if frame[14] == 0x45 && wire::residue(&frame[14..34]) == 0 {
        frame[18..20].fill(0);
        frame[24..26].fill(0);
    }
    frame
}

/// What must hold even if the model is wrong.
fn harmless(hook: Hook, packet: &Memory, action: Action, after: &[u8]) -> Result<(), String> {
    if action == Action::Drop || after == packet.bytes {
        return Ok(());
    }
    let v6 = number(after, 12) == 0x86dd;
    let (src_at, _) = wire::addresses(v6);
    let from = |address| {
        let octets = octets(address);
        after.get(14 + src_at..14 + src_at + octets.len()) == Some(&octets[..])
    };
    let hosts = hosts(v6);
    let own = match (hook, action) {
        (Hook::Gateway, _) => from(hosts.gateway),
        (Hook::FromPod, Action::Pass) => from(hosts.pod),
        _ => true,
    };
    if !own {
        return Err(format!("leaves with another's address: {}", hex(after)));
    }
    let is_wrapped = match hook {
        Hook::FromPod => action == Action::Pass,
        Hook::Gateway => !in_tunnel(&packet.bytes),
        Hook::ToPod => false,
    };
    if packet.gso_size == 0 && sound(&packet.bytes, in_tunnel(&packet.bytes)).is_ok() {
        sound(after, is_wrapped)
            .map_err(|wrong| format!("was a sound packet, becomes one that is not: {wrong}"))?;
    }
    Ok(())
}

/// Offset of the UDP header of a frame that may be a tunnelled one.
fn udp_at(frame: &[u8]) -> usize {
    match (number(frame, 12), byte(frame, 20)) {
        (0x86dd, 60) => 62,
        (0x86dd, _) => 54,
        _ => 34,
    }
}

/// A frame has the protocol, and port, of a tunnel.
fn in_tunnel(frame: &[u8]) -> bool {
    let protocol = match udp_at(frame) {
        62 => byte(frame, 54),
        54 => byte(frame, 20),
        _ => byte(frame, 23),
    };
    protocol == wire::ipip_of(number(frame, 12) == 0x86dd)
        || protocol == 17 && number(frame, udp_at(frame) + 2) == FOU
}

/// Offset of the packet in the tunnel, of a frame that has one.
fn inner_at(frame: &[u8]) -> usize {
    let at = udp_at(frame);
    let is_udp = matches!(
        (at, byte(frame, 23), byte(frame, 20), byte(frame, 54)),
        (34, 17, ..) | (54, _, 17, _) | (62, _, _, 17)
    );
    at + if is_udp { 8 } else { 0 }
}

/// A frame, and what is in the tunnel if it is in one, is as its receiver wants it.
fn sound(frame: &[u8], is_wrapped: bool) -> Result<(), String> {
    let v6 = number(frame, 12) == 0x86dd;
    wire::verify(frame.get(14..).unwrap_or_default(), v6)?;
    if is_wrapped && in_tunnel(frame) {
        let inner = frame.get(inner_at(frame)..).unwrap_or_default();
        return wire::verify(inner, v6).map_err(|wrong| format!("in the tunnel: {wrong}"));
    }
    Ok(())
}

/// The key of a table.
fn key(flow: &Flow) -> Vec<u8> {
    let mut bytes = [octets(flow.src), octets(flow.dst)].concat();
    bytes.extend(flow.src_port.to_be_bytes());
    bytes.extend(flow.dst_port.to_be_bytes());
    bytes.extend([flow.protocol, 0, 0, 0]);
    bytes
}

/// A table in which the key leads to what is compared.
type Table = BTreeMap<(&'static str, Vec<u8>), Vec<u64>>;

fn halves(halves: &BTreeMap<Flow, Half>, maps: [&'static str; 2]) -> Table {
    let entry = |(flow, half): (&Flow, &Half)| {
        let mut value: Vec<u64> = octets(half.to).into_iter().map(u64::from).collect();
        value.extend([u64::from(half.port), half.size.0, half.size.1]);
        ((maps[usize::from(flow.is_v6())], key(flow)), value)
    };
    halves.iter().map(entry).collect()
}

/// What the tables hold of flows and translations.
fn found(tables: &Tables) -> Table {
    let mut found = Table::new();
    for entry in tables.entries() {
        let value = match entry.map {
            names::MAP_FLOWS_V4 | names::MAP_FLOWS_V6 => {
                let value: FlowValue = entry.value.read();
                vec![value.tx_packets, value.tx_bytes, value.rx_packets, value.rx_bytes]
            }
            names::MAP_NAT_FORWARD_V4 | names::MAP_NAT_REVERSE_V4 => {
                let value: NatValue4 = entry.value.read();
                let port = u64::from(u16::from_be_bytes(value.port));
                value.addr.into_iter().map(u64::from).chain([port, value.packets, value.bytes]).collect()
            }
            names::MAP_NAT_FORWARD_V6 | names::MAP_NAT_REVERSE_V6 => {
                let value: NatValue6 = entry.value.read();
                let port = u64::from(u16::from_be_bytes(value.port));
                value.addr.into_iter().map(u64::from).chain([port, value.packets, value.bytes]).collect()
            }
            _ => continue,
        };
        found.insert((entry.map, entry.key.0.clone()), value);
    }
    found
}

/// Compares the tables with the model's.
///
/// # Errors
///
/// They differ.
pub fn state(play: &Play) -> Result<(), Box<Failure>> {
    let model = &play.model;
    let flows = model.flows.iter().map(|(flow, known)| {
        let map = [names::MAP_FLOWS_V4, names::MAP_FLOWS_V6][usize::from(flow.is_v6())];
        ((map, key(flow)), vec![known.tx.0, known.tx.1, known.rx.0, known.rx.1])
    });
    let mut wanted: Table = flows.collect();
    wanted.extend(halves(&model.forward, [names::MAP_NAT_FORWARD_V4, names::MAP_NAT_FORWARD_V6]));
    wanted.extend(halves(&model.reverse, [names::MAP_NAT_REVERSE_V4, names::MAP_NAT_REVERSE_V6]));
    let mut both = found(&play.node);
    both.extend(found(&play.gateway));
    if both == wanted {
        return Ok(());
    }
    let only = |a: &Table, b: &Table| -> Vec<String> {
        let differs = a.iter().filter(|(key, value)| b.get(*key) != Some(*value));
        differs.map(|((map, key), value)| format!("{map} {}: {value:?}", hex(key))).collect()
    };
    Err(failure(
        play,
        format!("tables hold {:#?}\nshould hold {:#?}", only(&both, &wanted), only(&wanted, &both)),
    ))
}
