//! How cost depends on what the tables hold: from one tracked flow to a million, of 10,000 client pods
//! towards 10,000 destinations. IPv4.
//!
//! Each level is measured twice: with packets of one flow, which shows what the tables cost by
//! themselves, and with packets of any flow, one after the other, which adds that nothing about a flow
//! is in a cache, and that a gateway, which has not seen it in this tick, takes the long way.

use std::net::{IpAddr, Ipv4Addr};

use anyhow::{Context, Result};
use bytemuck::bytes_of;
use coil_common::keys::{ClientKey4, POLICY_SET_BITS, PolicyKey4};
use coil_common::names;
use coil_common::values::{ClientValue, FlowValue, NatValue4, PolicyValue, STATE_CONFIRMED, STATE_REPLY};

use crate::kernel::Kernel;
use crate::scene::{self, Entry, FOU, NEXT, REDIRECT, SET};

/// Tracked flows.
pub const LEVELS: [u32; 4] = [1, 1_000, 100_000, 1_000_000];
/// Client pods, and destinations.
const MANY: u32 = 10_000;
/// The remote's port.
const HTTPS: u16 = 443;

/// Flow number `i` as the gateway sees it: client, its port, destination, port of the translation.
fn flow(i: u32) -> (IpAddr, u16, IpAddr, u16) {
    let round = u16::try_from(i / MANY).expect("at most a million flows");
    let client = Ipv4Addr::from_bits(Ipv4Addr::new(10, 128, 0, 0).to_bits() + i % MANY);
    (client.into(), 40_000 + round, destination(i), 1024 + round)
}

fn destination(i: u32) -> IpAddr {
    Ipv4Addr::from_bits(Ipv4Addr::new(100, 64, 0, 0).to_bits() + i % MANY).into()
}

/// Entries that do not depend on the level.
pub fn fixed() -> impl Iterator<Item = Entry> {
    let client = |i: u32| {
        let key = ClientKey4 { addr: scene::four(flow(i).0) };
        let value = bytes_of(&ClientValue::default()).to_vec();
        Entry { map: names::MAP_CLIENTS_V4, key: bytes_of(&key).into(), value }
    };
    let policy = |i: u32| {
        let mut key = (POLICY_SET_BITS + 32).to_ne_bytes().to_vec();
        key.extend(bytes_of(&PolicyKey4 { set: SET.to_be_bytes(), dst: scene::four(destination(i)) }));
        let value = bytes_of(&PolicyValue { egress: 0 }).to_vec();
        Entry { map: names::MAP_POLICY_V4, key, value }
    };
    (0..MANY).map(client).chain((0..MANY).map(policy))
}

/// What the tables hold of one flow. The node knows flows of one pod: the scene's.
fn tracked(i: u32) -> [Entry; 3] {
    let (client, port, remote, translated) = flow(i);
    let (pod, gateway) = scene::ends();
    let known = FlowValue {
        set: SET,
        gateway_generation: 1,
        state: STATE_CONFIRMED | STATE_REPLY,
        ..FlowValue::default()
    };
    let nat = |addr, port: u16| NatValue4 {
        addr: scene::four(addr),
        port: port.to_be_bytes(),
        state: STATE_CONFIRMED | STATE_REPLY,
        ..NatValue4::default()
    };
    let entry = |map, key, value: &[u8]| Entry { map, key, value: value.into() };
    [
        entry(names::MAP_FLOWS_V4, scene::key(pod, remote, (port, HTTPS)), bytes_of(&known)),
        entry(
            names::MAP_NAT_FORWARD_V4,
            scene::key(client, remote, (port, HTTPS)),
            bytes_of(&nat(gateway, translated)),
        ),
        entry(
            names::MAP_NAT_REVERSE_V4,
            scene::key(remote, gateway, (HTTPS, translated)),
            bytes_of(&nat(client, port)),
        ),
    ]
}

/// A program with its packet of a flow and what it must return.
type Hook = (&'static str, &'static str, fn(u32) -> Vec<u8>, i32);

const HOOKS: [Hook; 4] = [
    ("from_pod v4 established flow", names::PROGRAM_FROM_POD, from_pod, NEXT),
    ("to_pod v4 established flow", names::PROGRAM_TO_POD, to_pod, NEXT),
    ("gateway v4 established flow, out", names::PROGRAM_GATEWAY, out, REDIRECT),
    ("gateway v4 established flow, back", names::PROGRAM_GATEWAY, back, REDIRECT),
];

fn from_pod(i: u32) -> Vec<u8> {
    let (_, port, remote, _) = flow(i);
    scene::frame(true, &scene::udp(scene::ends().0, remote, (port, HTTPS), &[0; scene::PAYLOAD]))
}

fn to_pod(i: u32) -> Vec<u8> {
    let (_, port, remote, _) = flow(i);
    let (pod, gateway) = scene::ends();
    let inner = scene::udp(remote, pod, (HTTPS, port), &[0; scene::PAYLOAD]);
    scene::frame(true, &scene::udp(gateway, pod, (FOU, FOU), &inner))
}

fn out(i: u32) -> Vec<u8> {
    let (client, port, remote, _) = flow(i);
    let inner = scene::udp(client, remote, (port, HTTPS), &[0; scene::PAYLOAD]);
    scene::frame(true, &scene::udp(client, scene::ends().1, (FOU, FOU), &inner))
}

fn back(i: u32) -> Vec<u8> {
    let (_, _, remote, translated) = flow(i);
    let ports = (HTTPS, translated);
    scene::frame(true, &scene::udp(remote, scene::ends().1, ports, &[0; scene::PAYLOAD]))
}

/// Fills the tables level by level. Calls `report` with a name and nanoseconds for each figure: one
/// flow, then any flow.
pub fn measure(kernel: &mut Kernel, mut report: impl FnMut(&str, u32, f64, f64)) -> Result<()> {
    for entry in fixed() {
        kernel.insert(&entry)?;
    }
    let mut filled = 0;
    for level in LEVELS {
        for i in filled..level {
            for entry in tracked(i) {
                kernel.insert(&entry).with_context(|| format!("flow {i}"))?;
            }
        }
        filled = level;
        for (name, program, frame, action) in HOOKS {
            let one = crate::time(kernel, program, action, |_| frame(0), |_| Ok(()))?;
            let any = crate::time(kernel, program, action, |run| frame(scatter(run, level)), |_| Ok(()))?;
            report(name, level, one, any);
        }
    }
    Ok(())
}

/// Some flow; no two runs in a row meet the same one.
fn scatter(run: usize, level: u32) -> u32 {
    let mixed = (run as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
    u32::try_from((mixed * u64::from(level)) >> 32).expect("below the level")
}
