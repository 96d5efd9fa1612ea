#![allow(clippy::unwrap_used, reason = "tests")]

use coil_common::keys::FlowKey4;
use coil_common::usage::{GATEWAY_USAGE, gateway_total};
use coil_common::values::{NatValue4, STATE_CONFIRMED, STATE_FIN, STATE_REPLY, STATE_REPLY_FIN, STATE_SYN};

use super::super::nat::fake::FakeNat;
use super::*;
use crate::datapath::internal::FakeUsage;

const TCP_OPENING: u32 = 30;
const TCP_OPENING_PRESSED: u32 = 10;
const TCP_ESTABLISHED: u32 = 7440;
const TCP_CLOSED: u32 = 60;
const UDP_DNS: u32 = 30;

const CLIENT: [u8; 4] = [10, 0, 0, 1];
const GATEWAY: [u8; 4] = [10, 9, 0, 1];
const REMOTE: [u8; 4] = [192, 0, 2, 1];
const OPEN: [u32; 2] = [STATE_SYN | STATE_CONFIRMED, STATE_REPLY];

type Tables = FakeNat<V4>;

fn forward_key(port: u16, remote_port: u16, protocol: u8) -> FlowKey4 {
    FlowKey4 {
        src: CLIENT,
        dst: REMOTE,
        src_port: port.to_be_bytes(),
        dst_port: remote_port.to_be_bytes(),
        protocol,
        ..FlowKey4::default()
    }
}

/// Adds a translation of `port` to `port + 1`, with states and times of both halves.
fn add(tables: &mut Tables, port: u16, remote_port: u16, protocol: u8, state: [u32; 2], seen: [u32; 2]) {
    let value = |addr, port: u16, state, last_seen, bytes| NatValue4 {
        addr,
        port: port.to_be_bytes(),
        state,
        last_seen,
        bytes,
        packets: 1,
        ..NatValue4::default()
    };
    let key = forward_key(port, remote_port, protocol);
    let forward = value(GATEWAY, port + 1, state[0], seen[0], 100);
    let reverse_key = V4::reverse_key(&key, &forward);
    let reverse = value(CLIENT, port, state[1], seen[1], 1000);
    assert_eq!(V4::forward_key(&reverse_key, &reverse), key);
    tables.forward.insert(key, forward);
    tables.reverse.insert(reverse_key, reverse);
}

fn collector(tables: Tables, capacity: usize) -> Collector<V4, Tables, FakeUsage> {
    let rules = Rules { capacity, timeouts: Timeouts::default(), seed: 7 };
    Collector::new(tables, FakeUsage::new(GATEWAY_USAGE), rules)
}

fn walk(tables: Tables, now: u32) -> (Tables, Totals) {
    let mut collector = collector(tables, 100);
    while !collector.sweep(now, 1000).unwrap() {}
    (collector.store, collector.totals)
}

#[test]
fn halves_expire_together_by_their_joint_state() {
    let mut tables = Tables::default();
    let start = 1000;
    // Opening; established; closed by both sides; DNS; established, and only one direction active.
    add(&mut tables, 1, 443, 6, [STATE_SYN, 0], [start, start]);
    add(&mut tables, 2, 443, 6, OPEN, [start, start]);
    add(&mut tables, 3, 443, 6, [OPEN[0] | STATE_FIN, OPEN[1] | STATE_REPLY_FIN], [start; 2]);
    add(&mut tables, 4, 53, 17, [0, STATE_REPLY], [start; 2]);
    add(&mut tables, 5, 443, 6, OPEN, [start, start + TCP_ESTABLISHED]);
    let left = |tables: &Tables| -> Vec<u16> {
        assert_eq!(tables.forward.len(), tables.reverse.len());
        tables.forward.keys().map(|key| u16::from_be_bytes(key.src_port)).collect()
    };
    let (tables, totals) = walk(tables, start + TCP_OPENING - 1);
    assert_eq!(left(&tables), [1, 2, 3, 4, 5]);
    assert_eq!((totals.expired, totals.entries), (0, 5));
    assert_eq!(TCP_OPENING, UDP_DNS);
    let (tables, totals) = walk(tables, start + TCP_OPENING + 2);
    assert_eq!(left(&tables), [2, 3, 5]);
    assert_eq!((totals.expired, totals.entries, totals.overdue), (2, 3, 2));
    assert_eq!((totals.sent_bytes, totals.received_bytes), (200, 2000));
    let (tables, _) = walk(tables, start + TCP_CLOSED);
    assert_eq!(left(&tables), [2, 5]);
    let (tables, totals) = walk(tables, start + TCP_ESTABLISHED);
    assert_eq!(left(&tables), [5]);
    assert_eq!(totals.orphans, 0);
}

#[test]
fn a_packet_between_reading_and_removing_saves_the_translation() {
    let mut tables = Tables::default();
    add(&mut tables, 1, 443, 6, OPEN, [1000, 1000]);
    let key = forward_key(1, 443, 6);
    let now = 1000 + TCP_ESTABLISHED;
    let fresh = NatValue4 { last_seen: now, ..tables.forward[&key] };
    tables.refreshed.insert(key, fresh);
    let (tables, totals) = walk(tables, now);
    assert_eq!((tables.forward.len(), tables.reverse.len(), totals.expired), (1, 1, 0));
}

#[test]
fn halves_left_over_expire_by_what_they_know() {
    let mut tables = Tables::default();
    add(&mut tables, 1, 443, 6, OPEN, [1000, 1000]);
    add(&mut tables, 2, 443, 6, OPEN, [1000, 1000]);
    tables.forward.remove(&forward_key(1, 443, 6));
    let lost = forward_key(2, 443, 6);
    let reverse = V4::reverse_key(&lost, &tables.forward[&lost]);
    tables.reverse.remove(&reverse);
    let (tables, totals) = walk(tables, 1010);
    assert_eq!((tables.forward.len(), tables.reverse.len(), totals.orphans), (1, 1, 0));
    let (tables, totals) = walk(tables, 1000 + TCP_OPENING);
    assert_eq!((tables.forward.len(), tables.reverse.len(), totals.orphans), (0, 0, 2));
}

#[test]
fn a_forward_half_whose_port_is_anothers_goes_at_once() {
    let mut tables = Tables::default();
    add(&mut tables, 1, 443, 6, OPEN, [1000, 1000]);
    let mut stale = tables.forward[&forward_key(1, 443, 6)];
    stale.bytes = 7;
    tables.forward.insert(forward_key(9, 443, 6), stale);
    let (tables, totals) = walk(tables, 1000);
    assert_eq!(tables.forward.keys().next(), Some(&forward_key(1, 443, 6)));
    assert_eq!((tables.forward.len(), tables.reverse.len(), totals.orphans), (1, 1, 1));
}

#[test]
fn a_full_table_is_rid_of_opening_packets_sooner() {
    let mut tables = Tables::default();
    for port in 1..=5 {
        add(&mut tables, port * 2, 443, 6, [STATE_SYN, 0], [1000, 1000]);
    }
    add(&mut tables, 99, 53, 17, [0, 0], [1000, 1000]);
    let mut collector = collector(tables, 6);
    let now = 1000 + TCP_OPENING_PRESSED;
    while !collector.sweep(now, 1000).unwrap() {}
    assert_eq!((collector.totals.entries, collector.totals.expired), (6, 0));
    while !collector.sweep(now, 1000).unwrap() {}
    assert_eq!((collector.totals.entries, collector.totals.expired), (1, 5));
}

#[test]
fn counts_follow_what_is_removed_and_are_put_right() {
    let mut tables = Tables::default();
    add(&mut tables, 1, 443, 6, OPEN, [1000, 1000]);
    add(&mut tables, 3, 443, 6, OPEN, [1000, 1000]);
    add(&mut tables, 5, 53, 17, [0, 0], [1000, 1000]);
    let mut collector = collector(tables, 100);
    let cells = |port, remote, protocol| V4::cells(7, &forward_key(port, remote, protocol));
    let (tcp, dns) = (cells(1, 443, 6), cells(5, 53, 17));
    assert_eq!(tcp, cells(3, 443, 6));
    let count = |collector: &Collector<V4, Tables, FakeUsage>, cell: u32| collector.usage.get(cell);
    // Nobody has counted so far, as after an upgrade.
    while !collector.sweep(1001, 1000).unwrap() {}
    assert_eq!(count(&collector, gateway_total(0)), 3);
    assert_eq!((count(&collector, tcp[1]), count(&collector, tcp[3]), count(&collector, dns[3])), (3, 2, 1));
    assert_eq!(collector.totals.corrected, 3 + 2 * 3 + 2 * 2 + 2);
    // DNS expires; somebody else has removed one of the others.
    let key = forward_key(3, 443, 6);
    let value = collector.store.forward.remove(&key).unwrap();
    collector.store.reverse.remove(&V4::reverse_key(&key, &value));
    while !collector.sweep(1000 + UDP_DNS, 1000).unwrap() {}
    assert_eq!((count(&collector, gateway_total(0)), count(&collector, tcp[1])), (1, 1));
    assert_eq!((count(&collector, tcp[3]), count(&collector, dns[3])), (1, 0));
    // Nothing to correct any more.
    let corrected = collector.totals.corrected;
    while !collector.sweep(1000 + UDP_DNS, 1000).unwrap() {}
    assert_eq!(collector.totals.corrected, corrected);
}

#[test]
fn a_walk_may_take_many_steps() {
    let mut tables = Tables::default();
    for port in 1..100 {
        add(&mut tables, port * 2, 443, 6, OPEN, [1000, 1000]);
    }
    let mut collector = collector(tables, 1000);
    let mut steps = 0;
    while !collector.sweep(1001, 1).unwrap() {
        steps += 1;
    }
    assert!(steps >= 1);
    assert_eq!((collector.totals.entries, collector.totals.expired), (99, 0));
}
