//! What has gone wrong in other products and takes more than one packet, or the clock, to see. The list is
//! in `docs/checklist.md`.

#![expect(clippy::unwrap_used, reason = "tests")]

use std::{
    cell::{Cell, RefCell},
    collections::BTreeMap,
    net::IpAddr,
    rc::Rc,
};

use coil_common::{
    names,
    stats::{DropReason, IcmpStat},
    values::{FlowValue, NatValue4, NatValue6},
};
use coil_ebpf::testing::{
    Action, Scenario,
    build::{self, Ip, ethernet},
    entries::{Entry, Key, Value},
    interpret,
    memory::{Memory, Source, Tables},
    scenario::IFINDEX,
    scenarios,
};

/// Port of the pod in the table of scenarios.
const PORT: u16 = 40000;

fn scenario(name: &str) -> Scenario {
    scenarios().into_iter().find(|scenario| scenario.name == name).unwrap()
}

/// Pod, gateway, remote, and somebody else.
fn hosts(v6: bool) -> [IpAddr; 4] {
    if v6 {
        ["fd01::2", "fd02::2", "2001:db8::2", "fd03::3"].map(|text| text.parse().unwrap())
    } else {
        ["10.1.0.2", "10.2.0.2", "192.0.2.2", "10.3.0.3"].map(|text| text.parse().unwrap())
    }
}

/// The reverse half of a translation for somebody else.
fn of_another(v6: bool) -> Value {
    match hosts(v6)[3] {
        IpAddr::V4(addr) => {
            Value::of(&NatValue4 { addr: addr.octets(), port: [0, 1], ..NatValue4::default() })
        }
        IpAddr::V6(addr) => {
            Value::of(&NatValue6 { addr: addr.octets(), port: [0, 1], ..NatValue6::default() })
        }
    }
}

fn family(v6: bool) -> (&'static str, &'static str, &'static str) {
    if v6 {
        ("v6", names::MAP_NAT_FORWARD_V6, names::MAP_NAT_REVERSE_V6)
    } else {
        ("v4", names::MAP_NAT_FORWARD_V4, names::MAP_NAT_REVERSE_V4)
    }
}

/// Entries of a scenario, and what `reverse` says when it is asked for a reverse half for the `n`th time.
#[derive(Debug)]
struct World {
    entries: BTreeMap<(&'static str, Vec<u8>), Vec<u8>>,
    map: &'static str,
    /// The time that it has somebody else's half, all times if 0.
    time: u32,
    value: Value,
    asked: Rc<Cell<u32>>,
    had: Rc<RefCell<Option<Vec<u8>>>>,
}

impl World {
    fn new(scenario: &Scenario, v6: bool, time: u32) -> Self {
        let entries = scenario.entries.iter();
        let entries = entries.map(|Entry { map, key, value }| ((*map, key.0.clone()), value.0.clone()));
        Self {
            entries: entries.collect(),
            map: family(v6).2,
            time,
            value: of_another(v6),
            asked: Rc::default(),
            had: Rc::default(),
        }
    }
}

impl Source for World {
    fn read(&self, map: &'static str, key: &[u8]) -> Option<Vec<u8>> {
        if map != self.map {
            return self.entries.get(&(map, key.to_vec())).cloned();
        }
        self.asked.set(self.asked.get() + 1);
        if self.time != 0 && self.asked.get() != self.time {
            return None;
        }
        *self.had.borrow_mut() = Some(key.to_vec());
        Some(self.value.0.clone())
    }
}

/// Somebody else gets a port between the look at it and its reservation: it stays theirs, and the flow gets another.
fn loses_a_port(v6: bool, name: &str) {
    let (family, forward, reverse) = family(v6);
    let scenario = scenario(&format!("gateway {family}: {name}"));
    let world = World::new(&scenario, v6, 2);
    let had = Rc::clone(&world.had);
    let tables = Tables::over(Box::new(world), 1000);
    let (action, frame) = interpret::run(scenario.hook, IFINDEX, &scenario.packet, &scenario.config, &tables);
    assert_eq!(action, Action::Back, "{name}");
    let lost = had.borrow().clone().unwrap();
    let entries = tables.entries();
    let of = |map: &str| entries.iter().filter(|entry| entry.map == map).collect::<Vec<_>>();
    let theirs = of(reverse).into_iter().find(|entry| entry.key == Key(lost.clone())).unwrap();
    assert_eq!(theirs.value, of_another(v6), "{name}: the other's half is not written over");
    assert_eq!(of(reverse).len(), 2, "{name}: {entries:?}");
    // What leaves has a port that is the flow's own.
    let at = if v6 { 54 } else { 34 } + if name.starts_with("echo") { 4 } else { 0 };
    let ours = of(reverse).into_iter().find(|entry| entry.key != Key(lost.clone())).unwrap();
    let port_at = if v6 { 34 } else { 10 };
    assert_eq!(frame[at..at + 2], ours.key.0[port_at..port_at + 2], "{name}");
    assert_ne!(frame[at..at + 2], lost[port_at..port_at + 2], "{name}");
    assert_eq!(of(forward).len(), 1, "{name}: {entries:?}");
}

#[test]
fn a_port_that_somebody_else_gets_meanwhile_stays_theirs() {
    for v6 in [false, true] {
        // A new flow, and one whose reverse half has gone.
        for name in ["UDP", "SYN", "echo request", "the reverse half is rebuilt"] {
            loses_a_port(v6, name);
        }
    }
}

/// Another packet of the same flow gets a port between the look at it and its reservation, on another processor: the
/// flow keeps that one, and nothing is left over.
#[test]
fn a_port_that_the_same_flow_gets_meanwhile_is_its_own() {
    for v6 in [false, true] {
        let (family, forward, reverse) = family(v6);
        let port = PORT.to_be_bytes();
        let own = match hosts(v6)[0] {
            IpAddr::V4(addr) => Value::of(&NatValue4 { addr: addr.octets(), port, ..NatValue4::default() }),
            IpAddr::V6(addr) => Value::of(&NatValue6 { addr: addr.octets(), port, ..NatValue6::default() }),
        };
        for name in ["UDP", "SYN", "the reverse half is rebuilt"] {
            let scenario = scenario(&format!("gateway {family}: {name}"));
            let world = World { value: own.clone(), ..World::new(&scenario, v6, 2) };
            let had = Rc::clone(&world.had);
            let tables = Tables::over(Box::new(world), 1000);
            let (action, _) =
                interpret::run(scenario.hook, IFINDEX, &scenario.packet, &scenario.config, &tables);
            assert_eq!(action, Action::Back, "{name}");
            let entries = tables.entries();
            let of = |map: &str| entries.iter().filter(|entry| entry.map == map).collect::<Vec<_>>();
            assert_eq!(of(reverse).len(), 1, "{name}: {entries:?}");
            assert_eq!(Some(&of(reverse)[0].key.0), had.borrow().as_ref(), "{name}");
            assert_eq!(of(forward).len(), 1, "{name}: {entries:?}");
        }
    }
}

#[test]
fn a_destination_without_a_free_port_costs_few_look_ups() {
    for v6 in [false, true] {
        let scenario = scenario(&format!("gateway {}: UDP", family(v6).0));
        assert!(scenario.config.nat_port_last - scenario.config.nat_port_first > 60_000);
        let world = World::new(&scenario, v6, 0);
        let asked = Rc::clone(&world.asked);
        let tables = Tables::over(Box::new(world), 1000);
        let [pod, gateway, remote, _] = hosts(v6);
        let mut reasons = Vec::new();
        for flow in 0..16 {
            let inner = Ip::new(pod, remote).udp((PORT + flow, 443), b"x");
            let packet = Memory::new(ethernet(&build::tunnel(pod, gateway, &inner)));
            asked.set(0);
            let (action, _) = interpret::run(scenario.hook, IFINDEX, &packet, &scenario.config, &tables);
            assert_eq!(action, Action::Back, "the client is told");
            let full =
                tables.counters().contains_key(&(names::MAP_DROPS, DropReason::DestinationFull.index()));
            let most = if full { 1 } else { 32 };
            assert!(asked.get() <= most, "flow {flow}: {} ports were looked at", asked.get());
            reasons.push(full);
        }
        // Bad luck a few times, and then nobody tries.
        assert_eq!(reasons.iter().filter(|full| **full).count(), 8, "{reasons:?}");
        assert!(reasons.is_sorted());
    }
}

#[test]
fn an_icmp_error_neither_prolongs_nor_changes_any_flow() {
    let mut count = 0;
    for scenario in scenarios() {
        let told = [IcmpStat::ToPod, IcmpStat::FromPod]
            .iter()
            .any(|stat| scenario.expect.counters.contains_key(&(names::MAP_ICMP_STATS, stat.index())));
        if !told && scenario.expect.drop != Some(DropReason::UnderlayTooBig) {
            continue;
        }
        // Long after the flow was seen last.
        let tables = Tables::new(&scenario.entries, 100_000);
        let before = tables.entries();
        let (action, _) = interpret::run(scenario.hook, IFINDEX, &scenario.packet, &scenario.config, &tables);
        assert_eq!(action, scenario.expect.action, "{}", scenario.name);
        assert_eq!(tables.entries(), before, "{}", scenario.name);
        count += usize::from(!before.is_empty());
    }
    assert!(count > 200, "{count} errors about flows");
}

#[test]
fn a_reset_out_of_a_long_silence_does_not_prolong() {
    for (name, prolongs) in [("a RST", true), ("a RST out of a long silence", false)] {
        for hook in ["to_pod v4", "to_pod v6"] {
            let scenario = scenario(&format!("{hook}: reset: {name}"));
            let tables = Tables::new(&scenario.entries, 1000);
            let last_seen = |entries: Vec<Entry>| {
                let flow = entries.into_iter().find(|entry| entry.map.starts_with("flows_")).unwrap();
                flow.value.read::<FlowValue>().last_seen
            };
            let before = last_seen(tables.entries());
            let (action, _) =
                interpret::run(scenario.hook, IFINDEX, &scenario.packet, &scenario.config, &tables);
            assert_eq!(action, Action::Pass, "it is delivered");
            let wanted = if prolongs { 1000 } else { before };
            assert_eq!(last_seen(tables.entries()), wanted, "{hook}: {name}");
        }
    }
}

#[test]
fn flows_of_pods_with_originating_only_take_the_short_way() {
    let found = scenarios().into_iter().filter(|scenario| scenario.name.contains("originating-only: "));
    let hits: Vec<_> = found.map(|scenario| scenario.check_short_way().unwrap()).collect();
    assert!(hits.len() == 4 && hits.iter().all(|hits| *hits > 0), "{hits:?}");
}
