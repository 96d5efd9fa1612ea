//! The scenario table of `coil-ebpf` through the loaded programs: they and the library must agree.

#![expect(clippy::unwrap_used, reason = "tests")]

use std::collections::BTreeMap;
use std::path::PathBuf;

use aya::programs::ProgramFd;
use coil_agent::datapath::{Loaded, Role, SkBuff, load, seconds_since_boot, test_run};
use coil_common::config::Config;
use coil_common::names::{
    GATEWAY_MAPS, MAP_AFFINITY, MAP_CLIENTS_V4, MAP_CLIENTS_V6, MAP_CONFIG, MAP_DROPS, MAP_EGRESS_NAMES,
    MAP_EGRESS_STATS, MAP_EGRESSES, MAP_ENCAPS, MAP_EVENT_BUDGETS, MAP_EVENTS, MAP_EXCLUDED_PORTS,
    MAP_FLOWS_V4, MAP_FLOWS_V6, MAP_FULL_REMOTES, MAP_GATEWAY_STATS, MAP_GATEWAY_USAGE, MAP_GATEWAYS,
    MAP_ICMP_STATS, MAP_LISTENERS, MAP_NAT_FORWARD_V4, MAP_NAT_FORWARD_V6, MAP_NAT_REVERSE_V4,
    MAP_NAT_REVERSE_V6, MAP_PEERS_V4, MAP_PEERS_V6, MAP_POD_SLOTS, MAP_POD_USAGE, MAP_PODS, MAP_PORT_PROBES,
    NODE_MAPS, pod_slot,
};
use coil_common::values::{
    AffinityValue, Counter, FlowValue, FragmentValue, InboundValue, NatValue4, NatValue6, PodSlot, PodValue,
};
use coil_ebpf::testing::entries::{Entry, Key, Value};
use coil_ebpf::testing::memory::Memory;
use coil_ebpf::testing::scenario::{AGAIN, IFINDEX, Outcome};
use coil_ebpf::testing::{Action, Hook, Kernel, Scenario, scenarios};

use crate::support::BpfFs;
use crate::support::net::NetNs;
use crate::support::raw::RawMap;

/// Large arrays that the datapath reads and writes.
const ARRAYS: [&str; 5] =
    [MAP_EXCLUDED_PORTS, MAP_GATEWAY_USAGE, MAP_FULL_REMOTES, MAP_PORT_PROBES, MAP_POD_USAGE];

/// Seconds since boot that the table of scenarios is written for.
const TABLE_NOW: u32 = 1000;

/// Maps of counters.
const COUNTERS: [&str; 4] = [MAP_DROPS, MAP_EGRESS_STATS, MAP_GATEWAY_STATS, MAP_ICMP_STATS];
/// Maps of which scenarios use little.
const SMALL: [&str; 11] = [
    MAP_FLOWS_V4,
    MAP_FLOWS_V6,
    MAP_NAT_FORWARD_V4,
    MAP_NAT_FORWARD_V6,
    MAP_NAT_REVERSE_V4,
    MAP_NAT_REVERSE_V6,
    MAP_CLIENTS_V4,
    MAP_CLIENTS_V6,
    MAP_PEERS_V4,
    MAP_PEERS_V6,
    MAP_PODS,
];
/// Maps that programs leave alone while nobody listens.
const UNTOUCHED: [&str; 7] =
    [MAP_ENCAPS, MAP_POD_SLOTS, MAP_EGRESS_NAMES, MAP_CONFIG, MAP_EVENTS, MAP_LISTENERS, MAP_EVENT_BUDGETS];

/// The programs of a role under one configuration, and their maps.
pub(crate) struct Machine {
    loaded: Loaded,
    maps: BTreeMap<&'static str, RawMap>,
    _bpffs: BpfFs,
}

/// What scenarios must have in common to run on one machine.
pub(crate) type Setting = (bool, Vec<u8>, Option<(&'static str, usize)>);

pub(crate) fn setting(scenario: &Scenario) -> Setting {
    let config = bytemuck::bytes_of(&scenario.config).to_vec();
    (scenario.hook == Hook::Gateway, config, scenario.limit)
}

/// Tries again what a scenario says if a second began meanwhile: entries are as old as they say only in the
/// second in which they were made, and a busy machine may stop a test for long.
fn within_a_second<T>(mut attempt: impl FnMut() -> T) -> T {
    const ATTEMPTS: usize = 20;
    for _ in 1..ATTEMPTS {
        let begun = seconds_since_boot().unwrap();
        let done = attempt();
        if seconds_since_boot().unwrap() == begun {
            return done;
        }
    }
    attempt()
}

impl Machine {
    pub(crate) fn new(hook: Hook, config: &Config, limit: Option<(&'static str, usize)>) -> Self {
        let bpffs = BpfFs::new();
        let folder: PathBuf = bpffs.root().join("maps");
        std::fs::create_dir(&folder).unwrap();
        let (role, names) = match hook {
            Hook::Gateway => (Role::Gateway, GATEWAY_MAPS),
            Hook::FromPod | Hook::ToPod => (Role::Node, NODE_MAPS),
        };
        // Small, since walking over a table takes as long as it is large; the limit counts, being first.
        let limit = limit.map(|(map, entries)| (map, u32::try_from(entries).unwrap()));
        let sizes: Vec<_> =
            limit.into_iter().chain([(MAP_EGRESS_STATS, 64)]).chain(SMALL.map(|map| (map, 512))).collect();
        let loaded = load(role, &folder, config, &sizes).unwrap();
        let maps = names.iter().map(|name| (*name, RawMap::open(&folder, name))).collect();
        Self { loaded, maps, _bpffs: bpffs }
    }

    /// Runs a scenario, and leaves the maps empty.
    fn run(&self, net: &NetNs, scenario: &Scenario) -> Result<(), String> {
        within_a_second(|| self.run_once(net, scenario))
    }

    fn run_once(&self, net: &NetNs, scenario: &Scenario) -> Result<(), String> {
        self.fill(&scenario.entries);
        let program: ProgramFd = self.loaded.program(scenario.hook.program()).unwrap();
        let context = SkBuff {
            ifindex: IFINDEX,
            gso_size: scenario.packet.gso_size,
            gso_segs: scenario.packet.gso_segments,
            ..SkBuff::default()
        };
        let packet = scenario.packet.bytes.clone();
        let run = net.run(move || test_run(&program, &packet, context, 1));
        let (counters, entries) = (self.counters(), self.entries());
        self.clear(&scenario.entries);
        let run = run.map_err(|error| format!("the kernel refuses to run it: {error}"))?;
        let action = [Action::Pass, Action::Drop, Action::Back]
            .into_iter()
            .find(|action| action.code().cast_unsigned() == run.action)
            .ok_or_else(|| format!("unknown action {}", run.action))?;
        scenario.compare(action, &run.packet, &counters, &entries)
    }

    /// Fills the maps.
    pub(crate) fn fill(&self, entries: &[Entry]) {
        let now = seconds_since_boot().unwrap();
        for entry in entries {
            let entry = at(entry, now);
            self.maps[entry.map].set(&entry.key.0, &entry.value.0);
        }
    }

    /// Shows a packet to a program, in the name space of this thread.
    pub(crate) fn show(&self, hook: Hook, packet: &Memory) -> Result<(Action, Vec<u8>), String> {
        let program: ProgramFd = self.loaded.program(hook.program()).unwrap();
        let context = SkBuff {
            ifindex: IFINDEX,
            gso_size: packet.gso_size,
            gso_segs: packet.gso_segments,
            ..SkBuff::default()
        };
        let run = test_run(&program, &packet.bytes, context, 1)
            .map_err(|error| format!("the kernel refuses to run it: {error}"))?;
        let action = [Action::Pass, Action::Drop, Action::Back]
            .into_iter()
            .find(|action| action.code().cast_unsigned() == run.action)
            .ok_or_else(|| format!("unknown action {}", run.action))?;
        Ok((action, run.packet))
    }

    /// What comes of the packet of a scenario, in the name space of this thread; the maps are empty then.
    pub(crate) fn found(&self, scenario: &Scenario) -> Result<Outcome, String> {
        within_a_second(|| self.found_once(scenario))
    }

    fn found_once(&self, scenario: &Scenario) -> Result<Outcome, String> {
        self.fill(&scenario.entries);
        let shown = self.show(scenario.hook, &scenario.packet);
        let (counters, entries) = (self.counters(), self.entries());
        self.clear(&scenario.entries);
        let (action, packet) = shown?;
        Ok(Outcome::new(action, &packet, counters, &entries))
    }

    /// Sends the packet again and again: what comes of it, and how many flows were found on the short
    /// way in the end.
    fn run_again(&self, net: &NetNs, scenario: &Scenario) -> (Vec<Outcome>, usize) {
        within_a_second(|| self.run_again_once(net, scenario))
    }

    fn run_again_once(&self, net: &NetNs, scenario: &Scenario) -> (Vec<Outcome>, usize) {
        let now = seconds_since_boot().unwrap();
        for entry in &scenario.entries {
            let entry = at(entry, now);
            self.maps[entry.map].set(&entry.key.0, &entry.value.0);
            if entry.map == MAP_PODS {
                let pod: PodValue = entry.value.read();
                let slot = PodSlot { ifindex: IFINDEX, pod };
                let key = pod_slot(IFINDEX).to_ne_bytes();
                self.maps[MAP_POD_SLOTS].set(&key, bytemuck::bytes_of(&slot));
            }
        }
        let program: ProgramFd = self.loaded.program(scenario.hook.program()).unwrap();
        let context = SkBuff {
            ifindex: IFINDEX,
            gso_size: scenario.packet.gso_size,
            gso_segs: scenario.packet.gso_segments,
            ..SkBuff::default()
        };
        let packet = scenario.packet.bytes.clone();
        let runs = net.run(move || {
            (0..AGAIN).map(|_| test_run(&program, &packet, context, 1).unwrap()).collect::<Vec<_>>()
        });
        let known = |run: u32| {
            [Action::Pass, Action::Drop, Action::Back]
                .into_iter()
                .find(|action| action.code().cast_unsigned() == run)
                .unwrap()
        };
        // The tables show what is true after the last packet only.
        let outcomes = runs
            .iter()
            .map(|run| Outcome::new(known(run.action), &run.packet, self.counters(), &self.entries()))
            .collect();
        let ticked =
            |entry: &Entry| entry.map.starts_with("flows_") && entry.value.read::<FlowValue>().tick != 0;
        let hits = self.entries().iter().filter(|entry| ticked(entry)).count();
        self.clear(&scenario.entries);
        if let Some(slots) = self.maps.get(MAP_POD_SLOTS) {
            slots.clear(&pod_slot(IFINDEX).to_ne_bytes());
        }
        (outcomes, hits)
    }

    /// All counters that are not zero.
    pub(crate) fn counters(&self) -> BTreeMap<(&'static str, u32), Counter> {
        let mut counters = BTreeMap::new();
        for name in COUNTERS {
            let Some(map) = self.maps.get(name) else { continue };
            for key in map.keys() {
                let index = u32::from_ne_bytes(key.as_slice().try_into().unwrap());
                let values = map.get(&key).unwrap();
                let sum = values.chunks(size_of::<Counter>()).map(bytemuck::pod_read_unaligned).fold(
                    Counter::default(),
                    |sum, value: Counter| Counter {
                        packets: sum.packets + value.packets,
                        bytes: sum.bytes + value.bytes,
                    },
                );
                if sum != Counter::default() {
                    counters.insert((name, index), sum);
                }
            }
        }
        counters
    }

    /// All entries of the tables of flows and translations.
    pub(crate) fn entries(&self) -> Vec<Entry> {
        let mut entries = Vec::new();
        for (name, map) in &self.maps {
            let kinds = ["flows_", "nat_", "fragments_", "affinity", "inbound_"];
            if kinds.iter().any(|prefix| name.starts_with(prefix)) {
                entries.extend(map.keys().into_iter().map(|key| {
                    let value = Value(map.get(&key).unwrap());
                    Entry { map: name, key: Key(key), value }
                }));
            }
        }
        entries
    }

    /// Empties the maps that programs write, and those of these entries.
    pub(crate) fn clear(&self, used: &[Entry]) {
        for ((name, index), _) in self.counters() {
            self.maps[name].clear(&index.to_ne_bytes());
        }
        for (name, map) in &self.maps {
            // Arrays are left as they are where a scenario has not set them: 100,000 calls for each would take
            // minutes.
            if [MAP_EGRESSES, MAP_GATEWAYS].contains(name) || ARRAYS.contains(name) {
                let used = used.iter().filter(|entry| entry.map == *name);
                used.for_each(|entry| map.clear(&entry.key.0));
            } else if !COUNTERS.contains(name) && !UNTOUCHED.contains(name) {
                map.keys().iter().for_each(|key| map.clear(key));
            }
        }
    }
}

/// An entry with points in time moved to where the kernel's clock is.
fn at(entry: &Entry, now: u32) -> Entry {
    fn moved(time: u32, now: u32) -> u32 {
        now.wrapping_add(time.wrapping_sub(TABLE_NOW))
    }
    macro_rules! moved {
        ($type:ty) => {{
            let mut value: $type = entry.value.read();
            value.last_seen = moved(value.last_seen, now);
            value.created = moved(value.created, now);
            Value::of(&value)
        }};
    }
    let value = match entry.map {
        map if map.starts_with("flows_") => moved!(FlowValue),
        map if map.starts_with("fragments_") => {
            let mut value: FragmentValue = entry.value.read();
            value.seen = moved(value.seen, now);
            Value::of(&value)
        }
        map if map.starts_with("nat_") && map.ends_with("_v4") => moved!(NatValue4),
        map if map.starts_with("nat_") => moved!(NatValue6),
        map if map.starts_with("inbound_") => {
            let value: InboundValue = entry.value.read();
            Value::of(&InboundValue { last_seen: moved(value.last_seen, now), ..value })
        }
        MAP_AFFINITY => {
            let value: AffinityValue = entry.value.read();
            Value::of(&AffinityValue { last_used: moved(value.last_used, now), ..value })
        }
        _ => entry.value.clone(),
    };
    Entry { value, ..entry.clone() }
}

#[test]
#[ignore = "privileged: needs root and the eBPF object"]
fn loaded_programs_agree_with_the_library() {
    let net = NetNs::new("scenarios");
    let mut groups: BTreeMap<Setting, Vec<Scenario>> = BTreeMap::new();
    let mut refused = 0;
    for scenario in scenarios() {
        match scenario.kernel {
            Kernel::Takes => groups.entry(setting(&scenario)).or_default().push(scenario),
            Kernel::Refuses(_) => refused += 1,
        }
    }
    let total: usize = groups.values().map(Vec::len).sum();
    println!("{total} scenarios in {} settings, {refused} for the library alone", groups.len());
    let mut failed = Vec::new();
    for ((_, _, limit), scenarios) in groups {
        let machine = Machine::new(scenarios[0].hook, &scenarios[0].config, limit);
        for scenario in scenarios {
            if let Err(difference) = machine.run(&net, &scenario) {
                failed.push(format!("{}:\n{difference}", scenario.name));
            }
        }
    }
    assert!(failed.is_empty(), "{} of {total} failed\n{}", failed.len(), failed.join("\n\n"));
}

#[test]
#[ignore = "privileged: needs root and the eBPF object"]
fn packets_of_established_flows_meet_the_same_fate() {
    let net = NetNs::new("again");
    let mut groups: BTreeMap<Setting, Vec<Scenario>> = BTreeMap::new();
    for scenario in scenarios() {
        // Whether a packet takes the short way depends on the clock; those of the others do not differ.
        if matches!(scenario.kernel, Kernel::Takes) && !scenario.near {
            groups.entry(setting(&scenario)).or_default().push(scenario);
        }
    }
    let mut failed = Vec::new();
    let mut short = 0;
    for ((_, _, limit), scenarios) in groups {
        let machine = Machine::new(scenarios[0].hook, &scenarios[0].config, limit);
        for scenario in scenarios {
            let (found, hits) = machine.run_again(&net, &scenario);
            short += hits;
            let wanted = scenario.again();
            // Packets one by one, tables in the end.
            let same = found.iter().zip(&wanted).all(|(found, wanted)| found.same_packet(wanted));
            if !same || found.last() != wanted.last() {
                failed.push(format!("{}:\nfound {found:#?}\nwanted {wanted:#?}", scenario.name));
            }
        }
    }
    assert!(failed.is_empty(), "{} failed\n{}", failed.len(), failed.join("\n\n"));
    println!("{short} flows were found on the short way");
    assert!(short > 10, "only {short} flows were found on the short way");
}
