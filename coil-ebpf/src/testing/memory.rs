//! A packet and tables in memory.

use std::{
    cell::{Cell, RefCell},
    collections::{BTreeMap, BTreeSet},
};

use coil_common::{
    config::Config,
    names,
    stats::{Direction, DropReason, GatewayStat, IcmpStat, egress_stat},
    usage,
    values::{
        Counter, EgressValue, FlowValue, FragmentValue, GatewayValue, NatValue4, NatValue6, PodValue,
        STATE_ENCAP,
    },
};

use super::entries::{Bytes, Entry, Key, Value};
use crate::{
    decide::{
        near::Near,
        open::{self, How, Shape, Work},
    },
    encap::Encap,
    family::{Family, V4, V6, addr4, addr6},
    flow::Flow,
    packet::{Packet, View},
    tables::{Clock, Fragments, Full, NatTables, NodeTables, ReserveError, Tally, Translation},
};

/// A packet in memory.
#[derive(Clone, Debug, Default)]
pub struct Memory {
    /// Its bytes, Ethernet header first.
    pub bytes: Vec<u8>,
    /// Transport payload of each segment, 0 if it is not a GSO packet.
    pub gso_size: u32,
    /// Number of segments, 0 if unknown.
    pub gso_segments: u32,
    /// Index of the interface that it is at.
    pub interface: u32,
}

impl Memory {
    /// A packet that is no GSO packet.
    #[must_use]
    pub const fn new(bytes: Vec<u8>) -> Self {
        Self { bytes, gso_size: 0, gso_segments: 0, interface: 0 }
    }
}

/// The first bytes of a packet.
#[derive(Clone, Debug)]
pub struct Start(Vec<u8>);

impl Start {
    fn read<const N: usize>(&self, at: usize) -> [u8; N] {
        self.0.get(at..at + N).and_then(|bytes| bytes.try_into().ok()).unwrap_or([0; N])
    }
}

impl View for Start {
    fn half(&self, at: usize) -> u16 {
        u16::from_ne_bytes(self.read(at))
    }

    fn word(&self, at: usize) -> u32 {
        u32::from_ne_bytes(self.read(at))
    }
}

impl Packet for Memory {
    type View = Start;

    fn view(&self, len: usize) -> Option<Start> {
        self.bytes.get(..len).map(|bytes| Start(bytes.to_vec()))
    }

    fn ensure(&mut self, len: usize) -> Result<(), DropReason> {
        if len <= self.bytes.len() { Ok(()) } else { Err(DropReason::Truncated) }
    }

    fn load<const N: usize>(&self, offset: usize) -> Result<[u8; N], DropReason> {
        let bytes = self.bytes.get(offset..offset + N).ok_or(DropReason::Truncated)?;
        bytes.try_into().map_err(|_| DropReason::Truncated)
    }

    fn words<const N: usize>(&self, offset: usize) -> Result<[u32; N], DropReason> {
        let mut out = [0; N];
        for (index, word) in out.iter_mut().enumerate() {
            *word = u32::from_ne_bytes(self.load::<4>(offset + index * 4)?);
        }
        Ok(out)
    }

    fn length(&self) -> u32 {
        u32::try_from(self.bytes.len()).unwrap_or(u32::MAX)
    }

    fn interface(&self) -> u32 {
        self.interface
    }

    fn gso_size(&self) -> u32 {
        self.gso_size
    }

    fn gso_segments(&self) -> u32 {
        self.gso_segments
    }
}

/// Entries that [`Tables`] look up when nobody has put them in: those of a running datapath, for example.
pub trait Source: core::fmt::Debug {
    /// The value under a key, as the map holds them; the key of a longest-prefix map has full length.
    fn read(&self, map: &'static str, key: &[u8]) -> Option<Vec<u8>>;
}

/// Tables in memory: what the agent writes is fixed, what the datapath writes is behind a cell.
#[derive(Debug, Default)]
pub struct Tables {
    /// Seconds since boot.
    pub now: u32,
    /// The clock of the short way.
    pub tick: u32,
    /// Packets take the long way only.
    pub long_way_only: bool,
    /// Packets that took the short way.
    pub hits: Cell<u32>,
    source: Option<Box<dyn Source>>,
    /// Entries of the source that count as removed.
    removed: RefCell<BTreeSet<(&'static str, Key)>>,
    fixed: BTreeMap<(&'static str, Key), Value>,
    live: RefCell<BTreeMap<(&'static str, Key), Value>>,
    counters: RefCell<BTreeMap<(&'static str, u32), Counter>>,
    capacity: BTreeMap<&'static str, usize>,
    asked_v4: Cell<Option<Flow<V4>>>,
    asked_v6: Cell<Option<Flow<V6>>>,
}

impl Tables {
    /// Tables with these entries; the clock shows `now`.
    #[must_use]
    pub fn new(entries: &[Entry], now: u32) -> Self {
        let mut tables = Self { now, tick: 77, ..Self::default() };
        for Entry { map, key, value } in entries {
            if is_live(map) {
                tables.live.borrow_mut().insert((map, key.clone()), value.clone());
            } else {
                tables.fixed.insert((map, key.clone()), value.clone());
            }
        }
        tables
    }

    /// Tables over other ones, which are read and never changed: changes stay in memory. Packets take the
    /// long way, which does the same and needs no clock of its own.
    #[must_use]
    pub fn over(source: Box<dyn Source>, now: u32) -> Self {
        Self { now, long_way_only: true, source: Some(source), ..Self::default() }
    }

    /// An entry of the source, unless it counts as removed or has another size than it should.
    fn sourced(&self, map: &'static str, key: &Key, size: usize) -> Option<Value> {
        let source = self.source.as_ref()?;
        if self.removed.borrow().contains(&(map, key.clone())) {
            return None;
        }
        source.read(map, &key.0).filter(|value| value.len() == size).map(Value)
    }

    /// Takes an entry of the source over, so that it can be changed.
    fn fetch(&self, map: &'static str, key: &Key, size: usize) {
        if self.source.is_some()
            && !self.live.borrow().contains_key(&(map, key.clone()))
            && let Some(value) = self.sourced(map, key, size)
        {
            self.live.borrow_mut().insert((map, key.clone()), value);
        }
    }

    fn remove(&self, map: &'static str, key: Key) {
        self.live.borrow_mut().remove(&(map, key.clone()));
        if self.source.is_some() {
            self.removed.borrow_mut().insert((map, key));
        }
    }

    /// The datapath has removed an entry that the source has.
    #[must_use]
    pub fn is_removed(&self, map: &'static str, key: &Key) -> bool {
        self.removed.borrow().contains(&(map, key.clone()))
    }

    /// Limits a map to so many entries.
    pub fn limit(&mut self, map: &'static str, entries: usize) {
        self.capacity.insert(map, entries);
    }

    /// The entries that the datapath may write.
    #[must_use]
    pub fn entries(&self) -> Vec<Entry> {
        let live = self.live.borrow();
        let hashed = live.iter().filter(|((map, _), _)| !ARRAYS.contains(map));
        hashed.map(|((map, key), value)| Entry { map, key: key.clone(), value: value.clone() }).collect()
    }

    /// All counters that are not zero.
    #[must_use]
    pub fn counters(&self) -> BTreeMap<(&'static str, u32), Counter> {
        let mut counters = self.counters.borrow().clone();
        counters.retain(|(map, _), _| *map != names::MAP_PORT_PROBES);
        counters
    }

    /// New flows that needed so many tries for a port.
    #[must_use]
    pub fn probes(&self, tries: u32) -> u64 {
        self.counters.borrow().get(&(names::MAP_PORT_PROBES, tries)).map_or(0, |counter| counter.packets)
    }

    /// The pod behind an interface.
    #[must_use]
    pub fn pod(&self, ifindex: u32) -> Option<PodValue> {
        self.fixed(names::MAP_PODS, &ifindex)
    }

    /// Counts a drop.
    pub fn count_drop(&self, reason: DropReason, counter: Counter) {
        self.count(names::MAP_DROPS, reason.index(), counter.packets, counter.bytes);
    }

    /// Counts an ICMP error.
    pub fn count_icmp(&self, stat: IcmpStat) {
        self.count(names::MAP_ICMP_STATS, stat.index(), 1, 0);
    }

    /// Counts a drop for want of state.
    pub fn count_invalid(&self, stat: GatewayStat, counter: Counter) {
        self.count(names::MAP_GATEWAY_STATS, stat.index(), counter.packets, counter.bytes);
    }

    fn fixed<V: bytemuck::AnyBitPattern>(&self, map: &'static str, key: &impl Bytes) -> Option<V> {
        let key = Key::of(key);
        match self.fixed.get(&(map, key.clone())) {
            Some(value) => Some(value.read()),
            None => self.sourced(map, &key, size_of::<V>()).map(|value| value.read()),
        }
    }

    pub(super) fn handle<V: bytemuck::AnyBitPattern>(
        &self,
        map: &'static str,
        key: Key,
    ) -> Option<&'static (&'static str, Key)> {
        self.live::<V>(map, &key).map(|_| leak((map, key)))
    }

    pub(super) fn live<V: bytemuck::AnyBitPattern>(&self, map: &'static str, key: &Key) -> Option<V> {
        self.fetch(map, key, size_of::<V>());
        self.live.borrow().get(&(map, key.clone())).map(Value::read)
    }

    /// An element of an array of `u64`.
    #[must_use]
    pub fn element(&self, map: &'static str, index: u32) -> u64 {
        self.live(map, &Key::of(&index)).unwrap_or_default()
    }

    /// Writes an element of an array of `u64`.
    pub fn set_element(&self, map: &'static str, index: u32, value: u64) {
        self.live.borrow_mut().insert((map, Key::of(&index)), Value::of(&value));
    }

    /// Removes an entry that the datapath has made, as an operator may; true if there was one.
    pub fn cut(&self, map: &'static str, key: &Key) -> bool {
        self.live.borrow_mut().remove(&(map, key.clone())).is_some()
    }

    pub(super) fn put(
        &self,
        map: &'static str,
        key: &Key,
        value: &impl Bytes,
        replace: bool,
    ) -> Result<(), ReserveError> {
        self.fetch(map, key, value.bytes().len());
        let mut live = self.live.borrow_mut();
        let exists = live.contains_key(&(map, key.clone()));
        if exists && !replace {
            return Err(ReserveError::Taken);
        }
        let used = live.keys().filter(|(name, _)| *name == map).count();
        if !exists && self.capacity.get(map).is_some_and(|most| used >= *most) {
            return Err(ReserveError::Full);
        }
        live.insert((map, key.clone()), Value::of(value));
        Ok(())
    }

    pub(super) fn change<V: Bytes + bytemuck::AnyBitPattern>(
        &self,
        (map, key): &(&'static str, Key),
        change: impl FnOnce(&mut V),
    ) {
        if let Some(value) = self.live.borrow_mut().get_mut(&(*map, key.clone())) {
            let mut typed: V = value.read();
            change(&mut typed);
            *value = Value::of(&typed);
        }
    }

    fn count(&self, map: &'static str, index: u32, packets: u64, bytes: u64) {
        let mut counters = self.counters.borrow_mut();
        let counter = counters.entry((map, index)).or_default();
        counter.packets += packets;
        counter.bytes += bytes;
    }

    /// Longest prefix match.
    fn longest<K: bytemuck::Pod>(&self, map: &'static str, wanted: &K) -> Option<u32> {
        if self.source.is_some() {
            let bits = u32::try_from(size_of::<K>() * 8).unwrap_or(u32::MAX);
            return self.sourced(map, &Key::prefix(bits, wanted), 4).map(|value| value.read());
        }
        let wanted = bytemuck::bytes_of(wanted);
        let mut best: Option<(u32, u32)> = None;
        for ((name, key), value) in &self.fixed {
            if *name != map {
                continue;
            }
            let (length, data) = key.split_prefix();
            let matches = (0..length as usize).all(|bit| {
                let mask = 0x80 >> (bit % 8);
                data[bit / 8] & mask == wanted[bit / 8] & mask
            });
            if matches && best.is_none_or(|(longest, _)| longest < length) {
                best = Some((length, value.read::<u32>()));
            }
        }
        best.map(|(_, value)| value)
    }
}

/// The datapath writes entries of this map.
fn is_live(map: &str) -> bool {
    ["flows_", "nat_", "fragments_", "affinity", "inbound_"].iter().any(|prefix| map.starts_with(prefix))
        || ARRAYS.contains(&map)
}

/// Arrays of `u64` that the datapath reads and writes.
const ARRAYS: [&str; 4] =
    [names::MAP_EXCLUDED_PORTS, names::MAP_GATEWAY_USAGE, names::MAP_FULL_REMOTES, names::MAP_POD_USAGE];

impl Clock for Tables {
    fn now(&self) -> u32 {
        self.now
    }

    fn tick(&self) -> u32 {
        self.tick
    }
}

/// A reference that lives as long as the process: tests are short.
fn leak<T>(value: T) -> &'static T {
    Box::leak(Box::new(value))
}

macro_rules! tables {
    ($family:ty, $nat:ty, $addr:expr, $bytes:expr, $policy:ident, $peer:ident, $client:ident,
     $asked:ident, $maps:expr) => {
        impl Fragments<$family> for Tables {
            fn fragment(&self, key: &<$family as Family>::KeyWords) -> Option<FragmentValue> {
                self.live($maps[6], &Key::of(key))
            }

            fn put_fragment(&self, key: &<$family as Family>::KeyWords, value: &FragmentValue) {
                self.live.borrow_mut().insert(($maps[6], Key::of(key)), Value::of(value));
            }

            fn close_fragment(&self, key: &<$family as Family>::KeyWords) {
                self.change::<FragmentValue>(&($maps[6], Key::of(key)), |value| value.flags = 0);
            }
        }

        impl NodeTables<$family> for Tables {
            type Flow = &'static (&'static str, Key);

            fn policy(&self, set: u32, dst: &<$family as Family>::Addr) -> Option<u32> {
                let key = coil_common::keys::$policy { set: set.to_be_bytes(), dst: $bytes(*dst) };
                self.longest($maps[0], &key)
            }

            fn egress(&self, index: u32) -> Option<&EgressValue> {
                self.fixed::<EgressValue>(names::MAP_EGRESSES, &index).map(|value| leak(value) as &_)
            }

            fn gateway(&self, index: u32) -> Option<&GatewayValue> {
                self.fixed::<GatewayValue>(names::MAP_GATEWAYS, &index).map(|value| leak(value) as &_)
            }

            fn is_peer(&self, set: u32, addr: &<$family as Family>::Addr) -> bool {
                let key = coil_common::keys::$peer { set, addr: $bytes(*addr) };
                self.fixed::<u32>($maps[1], &key).is_some()
            }

            fn flow(&self, key: &<$family as Family>::KeyWords) -> Option<Self::Flow> {
                let key = Key::of(key);
                self.live::<FlowValue>($maps[2], &key).map(|_| &*leak(($maps[2], key)))
            }

            fn pod_usage(&self, cell: u32) -> i64 {
                self.element(names::MAP_POD_USAGE, cell).cast_signed()
            }

            fn pod_uses_more(&self, cell: u32) {
                self.set_element(names::MAP_POD_USAGE, cell, self.element(names::MAP_POD_USAGE, cell) + 1);
            }

            fn flow_value(&self, flow: Self::Flow) -> FlowValue {
                self.live(flow.0, &flow.1).unwrap_or_default()
            }

            fn put_flow(
                &self,
                key: &<$family as Family>::KeyWords,
                value: &FlowValue,
                replace: bool,
            ) -> Result<bool, Full> {
                match self.put($maps[2], &Key::of(key), value, replace) {
                    Ok(()) => Ok(!replace),
                    Err(ReserveError::Taken) => Ok(false),
                    Err(ReserveError::Full) => Err(Full),
                }
            }

            fn decide_flow(&self, flow: Self::Flow, value: &FlowValue) {
                self.change::<FlowValue>(flow, |old| {
                    old.set = value.set;
                    old.egress = value.egress;
                    old.gateway = value.gateway;
                    old.gateway_generation = value.gateway_generation;
                });
            }

            fn retract_flow(&self, flow: Self::Flow, bits: u32) {
                self.change::<FlowValue>(flow, |old| old.state &= !bits);
            }

            fn count_flow(&self, flow: Self::Flow, direction: Direction, tally: &Tally) {
                self.change::<FlowValue>(flow, |old| {
                    let (packets, bytes) = match direction {
                        Direction::Tx => (&mut old.tx_packets, &mut old.tx_bytes),
                        Direction::Rx => (&mut old.rx_packets, &mut old.rx_bytes),
                    };
                    *packets += u64::from(tally.packets);
                    *bytes += u64::from(tally.bytes);
                    old.last_seen = tally.now;
                    old.state |= tally.state;
                });
            }

            fn hit_flow(&self, flow: Self::Flow, direction: Direction, packets: u32, bytes: u32) {
                let state = self.live::<FlowValue>(flow.0, &flow.1).unwrap_or_default().state;
                let tally = Tally { packets, bytes, now: self.now, state };
                NodeTables::<$family>::count_flow(self, flow, direction, &tally);
                self.change::<FlowValue>(flow, |old| old.tick = self.tick as u16);
            }

            fn hit_egress(&self, egress: u32, direction: Direction, packets: u32, bytes: u32) {
                let tally = Tally { packets, bytes, now: self.now, state: 0 };
                NodeTables::<$family>::count_egress(self, egress, direction, &tally);
                self.hits.set(self.hits.get() + 1);
            }

            fn count_egress(&self, egress: u32, direction: Direction, tally: &Tally) {
                self.count(
                    names::MAP_EGRESS_STATS,
                    egress_stat(egress, direction),
                    u64::from(tally.packets),
                    u64::from(tally.bytes),
                );
            }
        }

        impl Near<$family> for Tables {
            fn near(&self, addr: &<$family as Family>::Addr) -> Option<u32> {
                let key = coil_common::keys::$client { addr: $bytes(*addr) };
                self.fixed::<u32>(
                    if $maps[0] == names::MAP_POLICY_V4 { names::MAP_NEAR_V4 } else { names::MAP_NEAR_V6 },
                    &key,
                )
            }

            fn pod_at(&self, ifindex: u32) -> Option<PodValue> {
                self.pod(ifindex)
            }
        }

        impl NatTables<$family> for Tables {
            type Entry = &'static (&'static str, Key);

            fn is_client(&self, addr: &<$family as Family>::Addr) -> bool {
                let key = coil_common::keys::$client { addr: $bytes(*addr) };
                self.fixed::<u32>($maps[3], &key).is_some()
            }

            fn forward(&self, key: &<$family as Family>::KeyWords) -> Option<Self::Entry> {
                let key = Key::of(key);
                self.live::<$nat>($maps[4], &key).map(|_| &*leak(($maps[4], key)))
            }

            fn reverse(&self, key: &<$family as Family>::KeyWords) -> Option<Self::Entry> {
                let key = Key::of(key);
                self.live::<$nat>($maps[5], &key).map(|_| &*leak(($maps[5], key)))
            }

            fn translation(&self, entry: Self::Entry) -> Translation<$family> {
                let value = self.live::<$nat>(entry.0, &entry.1).unwrap_or_default();
                Translation {
                    addr: $addr(value.addr),
                    port: value.port,
                    state: value.state & !STATE_ENCAP,
                    encap: Encap::of_state(value.state),
                    last_seen: value.last_seen,
                    used: value.packets != 0,
                    tick: value.tick,
                }
            }

            fn reserve(
                &self,
                key: &<$family as Family>::KeyWords,
                value: &<$family as Family>::Nat,
            ) -> Result<(), ReserveError> {
                self.put($maps[5], &Key::of(key), value, false)
            }

            fn release(&self, key: &<$family as Family>::KeyWords) {
                self.remove($maps[5], Key::of(key));
            }

            fn put_forward(
                &self,
                key: &<$family as Family>::KeyWords,
                value: &<$family as Family>::Nat,
            ) -> Result<(), Full> {
                self.put($maps[4], &Key::of(key), value, true).map_err(|_| Full)
            }

            fn add_forward(
                &self,
                key: &<$family as Family>::KeyWords,
                value: &<$family as Family>::Nat,
            ) -> Result<(), ReserveError> {
                self.put($maps[4], &Key::of(key), value, false)
            }

            fn restore_forward(
                &self,
                key: &<$family as Family>::KeyWords,
                value: &<$family as Family>::Nat,
            ) -> Result<(), ReserveError> {
                self.put($maps[4], &Key::of(key), value, false)
            }

            fn remove_forward(&self, key: &<$family as Family>::KeyWords) {
                self.remove($maps[4], Key::of(key));
            }

            fn retract(&self, entry: Self::Entry, bits: u32) {
                self.change::<$nat>(entry, |old| old.state &= !bits);
            }

            fn reown(&self, entry: Self::Entry, port: [u8; 2], now: u32) {
                self.change::<$nat>(entry, |old| {
                    old.port = port;
                    old.state &= STATE_ENCAP;
                    old.created = now;
                    old.last_seen = now;
                });
            }

            fn is_excluded(&self, udp: bool, port: u16) -> bool {
                let (word, bit) = usage::excluded_port(udp, port);
                self.element(names::MAP_EXCLUDED_PORTS, word) & bit != 0
            }

            fn usage(&self, cell: u32) -> i64 {
                self.element(names::MAP_GATEWAY_USAGE, cell).cast_signed()
            }

            fn use_more(&self, cell: u32) {
                let map = names::MAP_GATEWAY_USAGE;
                self.set_element(map, cell, self.element(map, cell).wrapping_add(1));
            }

            fn full_remote(&self, index: u32) -> u64 {
                self.element(names::MAP_FULL_REMOTES, index)
            }

            fn set_full_remote(&self, index: u32, note: u64) {
                self.set_element(names::MAP_FULL_REMOTES, index, note);
            }

            fn count_probes(&self, tries: u32) {
                self.count(names::MAP_PORT_PROBES, tries, 1, 0);
            }

            fn ask(&self, flow: &Flow<$family>) {
                self.$asked.set(Some(*flow));
            }

            fn attend(&self, shape: Shape, config: &Config) -> Result<(), u32> {
                let flow = self.$asked.get().ok_or(DropReason::NoState.index())?;
                open::attend(&mut Work::new(&flow), shape, config, self)
            }

            fn look_after(&self, work: &mut Work<$family>, shape: Shape, _: &Config) -> u32 {
                open::look_after(work, shape, self)
            }

            fn refusal(&self, work: &mut Work<$family>, shape: Shape, config: &Config) -> u32 {
                open::refusal(work, shape, config, self)
            }

            fn search(&self, work: &mut Work<$family>, shape: Shape, refusal: u32, config: &Config) -> u32 {
                open::search(work, shape, refusal, config, self)
            }

            fn settle(&self, work: &mut Work<$family>, shape: Shape, found: u32, config: &Config) -> u32 {
                open::settle(work, shape, found, config, self)
            }

            fn take_over(&self, work: &mut Work<$family>, port: u16, config: &Config) -> u32 {
                open::take_over(work, port, config, self)
            }

            fn in_vain(&self, work: &mut Work<$family>, shape: Shape, refusal: u32, config: &Config) -> u32 {
                open::in_vain(work, shape, refusal, config, self)
            }

            fn probe(&self, work: &mut Work<$family>, how: How) -> u32 {
                open::probe(work, how, self)
            }

            fn mend(&self, flow: &Flow<$family>, now: u32) {
                open::mend(&mut Work::new(flow), now, self);
            }

            fn restart(&self, entry: Self::Entry) {
                self.change::<$nat>(entry, |old| old.state &= STATE_ENCAP);
            }

            fn set_encap(&self, entry: Self::Entry, encap: Encap) {
                self.change::<$nat>(entry, |old| old.state = old.state & !STATE_ENCAP | encap.bits());
            }

            fn count_entry(&self, entry: Self::Entry, tally: &Tally) {
                self.change::<$nat>(entry, |old| {
                    old.packets += u64::from(tally.packets);
                    old.bytes += u64::from(tally.bytes);
                    old.last_seen = tally.now;
                    old.state |= tally.state;
                    old.tick = self.tick as u16;
                });
            }

            fn hit_entry(&self, entry: Self::Entry, packets: u32, bytes: u32) {
                self.change::<$nat>(entry, |old| {
                    old.packets += u64::from(packets);
                    old.bytes += u64::from(bytes);
                });
                self.hits.set(self.hits.get() + 1);
            }

            fn count_gateway(&self, stat: GatewayStat, packets: u32, bytes: u32) {
                self.count(names::MAP_GATEWAY_STATS, stat.index(), u64::from(packets), u64::from(bytes));
            }
        }
    };
}

tables!(
    V4,
    NatValue4,
    addr4,
    u32::to_ne_bytes,
    PolicyKey4,
    PeerKey4,
    ClientKey4,
    asked_v4,
    [
        names::MAP_POLICY_V4,
        names::MAP_PEERS_V4,
        names::MAP_FLOWS_V4,
        names::MAP_CLIENTS_V4,
        names::MAP_NAT_FORWARD_V4,
        names::MAP_NAT_REVERSE_V4,
        names::MAP_FRAGMENTS_V4
    ]
);
tables!(
    V6,
    NatValue6,
    addr6,
    crate::family::bytes6,
    PolicyKey6,
    PeerKey6,
    ClientKey6,
    asked_v6,
    [
        names::MAP_POLICY_V6,
        names::MAP_PEERS_V6,
        names::MAP_FLOWS_V6,
        names::MAP_CLIENTS_V6,
        names::MAP_NAT_FORWARD_V6,
        names::MAP_NAT_REVERSE_V6,
        names::MAP_FRAGMENTS_V6
    ]
);
