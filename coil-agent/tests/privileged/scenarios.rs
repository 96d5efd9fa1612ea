//! The scenario table of `coil-ebpf` through the loaded programs: they and the library must agree.

#![expect(clippy::unwrap_used, reason = "tests")]

use std::collections::{BTreeMap, BTreeSet};
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
use coil_common::stats::DropReason;
use coil_common::usage::ROWS;
use coil_common::values::{
    AffinityValue, Counter, FlowValue, FragmentValue, InboundValue, NatValue4, NatValue6, PodSlot, PodValue,
};
use coil_ebpf::testing::entries::{Entry, Key, Value};
use coil_ebpf::testing::memory::Memory;
use coil_ebpf::testing::scenario::{AGAIN, IFINDEX, Outcome};
use coil_ebpf::testing::spoil::{bent, cut, representatives};
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

    /// Runs a scenario in the name space of this thread, and leaves the maps empty.
    fn run(&self, scenario: &Scenario) -> Result<(), String> {
        within_a_second(|| self.run_once(scenario))
    }

    fn run_once(&self, scenario: &Scenario) -> Result<(), String> {
        self.fill(&scenario.entries);
        let shown = self.show(scenario.hook, &scenario.packet);
        let (counters, entries) = (self.counters(), self.entries());
        self.clear(&scenario.entries);
        let (action, packet) = shown?;
        scenario.compare(action, &packet, &counters, &entries)
    }

    /// Fills the maps.
    pub(crate) fn fill(&self, entries: &[Entry]) {
        let now = seconds_since_boot().unwrap();
        for entry in entries {
            let entry = at(entry, now);
            self.maps[entry.map].set(&entry.key.0, &entry.value.0);
        }
    }

    /// The program of a hook.
    pub(crate) fn program(&self, hook: Hook) -> ProgramFd {
        self.loaded.program(hook.program()).unwrap()
    }

    /// How many flows of pods the quotas count.
    pub(crate) fn pod_flows(&self) -> u64 {
        let cells = self.maps[MAP_POD_USAGE].entries().into_iter();
        let sum: u64 = cells.map(|(_, count)| u64::from_ne_bytes(count.try_into().unwrap())).sum();
        // Each flow is counted in a cell of each row.
        sum / u64::from(ROWS)
    }

    /// Shows a packet to a program, in the name space of this thread.
    pub(crate) fn show(&self, hook: Hook, packet: &Memory) -> Result<(Action, Vec<u8>), String> {
        let program = self.program(hook);
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

    /// Sends the packet again and again, in the name space of this thread: what comes of each, what the tables hold in
    /// the end, and how many flows were found on the short way.
    fn run_again(&self, scenario: &Scenario) -> Result<(Vec<Outcome>, usize), String> {
        within_a_second(|| self.run_again_once(scenario))
    }

    fn run_again_once(&self, scenario: &Scenario) -> Result<(Vec<Outcome>, usize), String> {
        self.fill(&scenario.entries);
        for entry in scenario.entries.iter().filter(|entry| entry.map == MAP_PODS) {
            let slot = PodSlot { ifindex: IFINDEX, pod: entry.value.read::<PodValue>() };
            self.maps[MAP_POD_SLOTS].set(&pod_slot(IFINDEX).to_ne_bytes(), bytemuck::bytes_of(&slot));
        }
        let shown: Result<Vec<_>, _> =
            (0..AGAIN).map(|_| self.show(scenario.hook, &scenario.packet)).collect();
        let (counters, entries) = (self.counters(), self.entries());
        self.clear(&scenario.entries);
        if let Some(slots) = self.maps.get(MAP_POD_SLOTS) {
            slots.clear(&pod_slot(IFINDEX).to_ne_bytes());
        }
        let outcome =
            |(action, packet): (Action, Vec<u8>)| Outcome::new(action, &packet, counters.clone(), &entries);
        let ticked =
            |entry: &&Entry| entry.map.starts_with("flows_") && entry.value.read::<FlowValue>().tick != 0;
        Ok((shown?.into_iter().map(outcome).collect(), entries.iter().filter(ticked).count()))
    }

    /// All counters that are not zero.
    pub(crate) fn counters(&self) -> BTreeMap<(&'static str, u32), Counter> {
        let mut counters = BTreeMap::new();
        for name in COUNTERS {
            let Some(map) = self.maps.get(name) else { continue };
            for (key, values) in map.entries() {
                let index = u32::from_ne_bytes(key.as_slice().try_into().unwrap());
                let values = values.chunks(size_of::<Counter>()).map(bytemuck::pod_read_unaligned);
                let sum = values.fold(Counter::default(), |sum, value: Counter| Counter {
                    packets: sum.packets + value.packets,
                    bytes: sum.bytes + value.bytes,
                });
                if sum != Counter::default() {
                    counters.insert((name, index), sum);
                }
            }
        }
        counters
    }

    /// All entries of the tables of flows and translations.
    pub(crate) fn entries(&self) -> Vec<Entry> {
        let kinds = ["flows_", "nat_", "fragments_", "affinity", "inbound_"];
        let of_interest =
            self.maps.iter().filter(|(name, _)| kinds.iter().any(|kind| name.starts_with(kind)));
        of_interest
            .flat_map(|(name, map)| {
                let entries = map.entries().into_iter();
                entries.map(|(key, value)| Entry { map: name, key: Key(key), value: Value(value) })
            })
            .collect()
    }

    /// Empties the maps that programs write, and those of these entries.
    pub(crate) fn clear(&self, used: &[Entry]) {
        let counters = self.counters();
        for (name, index) in counters.keys() {
            self.maps[name].clear(&index.to_ne_bytes());
        }
        // A remote without a free port is remembered; of no use is that to who comes next.
        if counters.contains_key(&(MAP_DROPS, DropReason::PortsExhausted.index())) {
            let full = &self.maps[MAP_FULL_REMOTES];
            let noted = full.entries().into_iter().filter(|(_, note)| note.iter().any(|byte| *byte != 0));
            noted.for_each(|(remote, _)| full.clear(&remote));
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

/// What is wrong, each under the name of what was tried.
#[derive(Default)]
struct Failures {
    total: usize,
    texts: Vec<String>,
}

impl Failures {
    /// Failures that are printed.
    const SHOWN: usize = 10;

    fn note(&mut self, name: &str, result: Result<(), String>) {
        self.total += 1;
        if let Err(what) = result {
            self.texts.push(format!("{name}:\n{what}"));
        }
    }

    /// Whether nothing was wrong; says what was.
    fn none(&self, what: &str) -> bool {
        println!("{what}: {} tried, {} failed", self.total, self.texts.len());
        self.texts.iter().take(Self::SHOWN).for_each(|text| println!("{text}\n"));
        self.texts.is_empty()
    }
}

/// Differs from what is wanted, if it does.
fn differs<T: PartialEq + std::fmt::Debug>(found: T, wanted: T) -> Result<(), String> {
    if found == wanted { Ok(()) } else { Err(format!("found {found:#?}\nwanted {wanted:#?}")) }
}

/// Sends the packet of a scenario a few times; how many flows were found on the short way.
fn again(machine: &Machine, scenario: &Scenario) -> Result<usize, String> {
    let (found, hits) = machine.run_again(scenario)?;
    let wanted = scenario.again();
    // Packets one by one, tables in the end.
    let same = found.iter().zip(&wanted).all(|(found, wanted)| found.same_packet(wanted));
    if same && found.last() == wanted.last() {
        return Ok(hits);
    }
    differs(found, wanted).map(|()| hits)
}

/// All of the table, on one set of programs for each setting, since loading them takes longest: each packet once;
/// each packet several times in a row, of which the later ones take the short way; and packets of each kind
/// cut at each byte, and with bytes of their headers changed, whose harmlessness `coil-ebpf` tests.
#[test]
#[ignore = "privileged: needs root and the eBPF object"]
fn loaded_programs_agree_with_the_library() {
    let net = NetNs::new("scenarios");
    let mut groups: BTreeMap<Setting, Vec<Scenario>> = BTreeMap::new();
    let takes = |scenario: &Scenario| matches!(scenario.kernel, Kernel::Takes);
    let all = scenarios();
    let refused = all.iter().filter(|scenario| !takes(scenario)).count();
    for scenario in all {
        groups.entry(setting(&scenario)).or_default().push(scenario);
    }
    println!("{} settings, {refused} scenarios for the library alone", groups.len());
    let spoiled: BTreeSet<String> = representatives().into_iter().map(|scenario| scenario.name).collect();
    let (once, repeated, cuts, bents, short) = net.run(move || {
        let [mut once, mut repeated, mut cuts, mut bents] = std::array::from_fn(|_| Failures::default());
        let mut short = 0;
        for ((_, _, limit), scenarios) in groups {
            let machine = Machine::new(scenarios[0].hook, &scenarios[0].config, limit);
            for scenario in scenarios {
                if takes(&scenario) {
                    once.note(&scenario.name, machine.run(&scenario));
                }
                // Whether a packet takes the short way depends on the clock; those of the others do not differ.
                if takes(&scenario) && !scenario.near {
                    let hits = again(&machine, &scenario);
                    short += hits.as_ref().map_or(0, |hits| *hits);
                    repeated.note(&scenario.name, hits.map(drop));
                }
                if spoiled.contains(&scenario.name) {
                    let same = |variant: &Scenario| {
                        machine.found(variant).and_then(|found| differs(found, variant.found().0))
                    };
                    cut(&scenario).iter().filter(|it| takes(it)).for_each(|it| cuts.note(&it.name, same(it)));
                    // Every seventh: they are many, and seven is a divisor of none of the numbers that make them.
                    let some = bent(&scenario).into_iter().step_by(7);
                    some.filter(takes).for_each(|it| bents.note(&it.name, same(&it)));
                }
            }
        }
        (once, repeated, cuts, bents, short)
    });
    let results = [
        once.none("each packet"),
        repeated.none("packets of established flows"),
        cuts.none("packets cut at each byte"),
        bents.none("packets with a wrong byte"),
    ];
    println!("{short} flows were found on the short way");
    assert_eq!(results, [true; 4], "see above");
    assert!(short > 10, "only {short} flows were found on the short way");
    assert!(cuts.total > 1000 && bents.total > 1000, "{} cut, {} bent", cuts.total, bents.total);
}
