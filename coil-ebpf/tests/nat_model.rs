//! Translation against a small model of it: who has which port, and where replies go.

#![expect(clippy::unwrap_used, reason = "tests")]

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use coil_common::{names, stats::DropReason};
use coil_ebpf::testing::{
    Action, Hook, Scenario,
    build::{Ip, ethernet, tunnel},
    entries::Key,
    interpret,
    memory::{Memory, Tables},
    scenario::IFINDEX,
    scenarios,
};
use proptest::{collection::vec, prelude::*};

/// First and last port of translation: so few that clients collide, and that every port is tried.
const RANGE: (u16, u16) = (40000, 40006);
/// A port of the range that must not be used.
const EXCLUDED: u16 = 40003;
/// Seconds for which nobody tries again after no port was free.
const FULL: u32 = 2;

/// What happens.
#[derive(Clone, Copy, Debug)]
enum Step {
    /// The pod sends from one of its ports to one of the remote's.
    Send { port: u16, remote: u16, udp: bool },
    /// The remote answers to a port of translation.
    Answer { remote: u16, port: u16, udp: bool },
    /// The operator removes the forward half of what the pod sends.
    CutForward { port: u16, remote: u16, udp: bool },
    /// The operator removes a reverse half.
    CutReverse { remote: u16, port: u16, udp: bool },
}

fn steps() -> impl Strategy<Value = Step> {
    let own = || 39998u16..40008;
    let outside = || RANGE.0..=RANGE.1;
    let remote = || 1u16..3;
    prop_oneof![
        6 => (own(), remote(), any::<bool>()).prop_map(|(port, remote, udp)| Step::Send { port, remote, udp }),
        4 => (remote(), outside(), any::<bool>())
            .prop_map(|(remote, port, udp)| Step::Answer { remote, port, udp }),
        1 => (own(), remote(), any::<bool>())
            .prop_map(|(port, remote, udp)| Step::CutForward { port, remote, udp }),
        1 => (remote(), outside(), any::<bool>())
            .prop_map(|(remote, port, udp)| Step::CutReverse { remote, port, udp }),
    ]
}

/// A flow of the pod: its port, the remote's, and whether it is UDP.
type Flow = (u16, u16, bool);
/// What a port of translation is taken towards: the remote's port, itself, UDP.
type Outside = (u16, u16, bool);

/// What should be.
#[derive(Debug, Default)]
struct Model {
    /// Reverse halves: who owns a port.
    owners: BTreeMap<Outside, Flow>,
    /// Forward halves: the port that a flow sends from.
    sends: BTreeMap<Flow, u16>,
    /// When no port was free, by the remote's port.
    full: BTreeMap<(u16, bool), u32>,
}

/// The gateway.
struct World {
    scenario: Scenario,
    tables: Tables,
    pod: IpAddr,
    gateway: IpAddr,
    remote: IpAddr,
    v6: bool,
}

impl World {
    fn new(v6: bool) -> Self {
        let name = if v6 { "gateway v6: UDP" } else { "gateway v4: UDP" };
        let mut scenario = scenarios().into_iter().find(|scenario| scenario.name == name).unwrap();
        scenario.config.nat_port_first = RANGE.0;
        scenario.config.nat_port_last = RANGE.1;
        let tables = Tables::new(&scenario.entries, 1000);
        for udp in [false, true] {
            let (word, bit) = coil_common::usage::excluded_port(udp, EXCLUDED);
            tables.set_element(names::MAP_EXCLUDED_PORTS, word, bit);
        }
        let address = |v4: &str, six: &str| if v6 { six.parse().unwrap() } else { v4.parse().unwrap() };
        Self {
            scenario,
            tables,
            pod: address("10.1.0.2", "fd01::2"),
            gateway: address("10.2.0.2", "fd02::2"),
            remote: address("192.0.2.2", "2001:db8::2"),
            v6,
        }
    }

    fn run(&self, ip: &[u8]) -> (Action, Vec<u8>) {
        let packet = Memory::new(ethernet(ip));
        interpret::run(Hook::Gateway, IFINDEX, &packet, &self.scenario.config, &self.tables)
    }

    fn drops(&self, reason: DropReason) -> u64 {
        let counters = self.tables.counters();
        counters.get(&(names::MAP_DROPS, reason.index())).map_or(0, |counter| counter.packets)
    }

    /// Drops of new flows for want of a port.
    fn refused(&self) -> [u64; 2] {
        [self.drops(DropReason::PortsExhausted), self.drops(DropReason::DestinationFull)]
    }

    fn packet(ip: &Ip, ports: (u16, u16), flags: u8, udp: bool) -> Vec<u8> {
        if udp { ip.udp(ports, b"x") } else { ip.tcp(ports, flags, &[], b"") }
    }

    /// The key of a table: as the pod sends, or as the remote does.
    fn key(&self, forward: bool, ports: (u16, u16), udp: bool) -> Key {
        let (src, dst) = if forward { (self.pod, self.remote) } else { (self.remote, self.gateway) };
        let mut bytes = Vec::new();
        for address in [src, dst] {
            match address {
                IpAddr::V4(address) => bytes.extend(address.octets()),
                IpAddr::V6(address) => bytes.extend(address.octets()),
            }
        }
        bytes.extend(ports.0.to_be_bytes());
        bytes.extend(ports.1.to_be_bytes());
        bytes.extend([if udp { 17 } else { 6 }, 0, 0, 0]);
        Key(bytes)
    }

    fn cut(&self, forward: bool, ports: (u16, u16), udp: bool) -> bool {
        let map = match (forward, self.v6) {
            (true, false) => names::MAP_NAT_FORWARD_V4,
            (true, true) => names::MAP_NAT_FORWARD_V6,
            (false, false) => names::MAP_NAT_REVERSE_V4,
            (false, true) => names::MAP_NAT_REVERSE_V6,
        };
        self.tables.cut(map, &self.key(forward, ports, udp))
    }

    /// Source and destination port behind the IP header at `at`.
    fn ports(&self, frame: &[u8], tunnelled: bool) -> (u16, u16) {
        let header = if self.v6 { 40 } else { 20 };
        let at = 14 + header + if tunnelled { header + 8 } else { 0 };
        let port = |at: usize| u16::from_be_bytes([frame[at], frame[at + 1]]);
        (port(at), port(at + 2))
    }
}

impl Model {
    fn send(&mut self, world: &World, now: u32, flow: Flow) {
        let (port, remote, udp) = flow;
        let inner = World::packet(&Ip::new(world.pod, world.remote), (port, remote), 2, udp);
        let before = world.refused();
        let (action, frame) = world.run(&tunnel(world.pod, world.gateway, &inner));
        let after = world.refused();
        let owned = |outside: &Outside| self.owners.get(outside);
        let own = self.owners.iter().find(|(_, owner)| **owner == flow).map(|((_, port, _), _)| *port);
        if after != before {
            let free: Vec<u16> = (RANGE.0..=RANGE.1)
                .filter(|port| *port != EXCLUDED && owned(&(remote, *port, udp)).is_none())
                .collect();
            let noted = self.full.get(&(remote, udp)).is_some_and(|since| now < since + FULL);
            assert!(own.is_none() || !self.sends.contains_key(&flow), "{flow:?} had a translation");
            assert!(free.is_empty() || noted, "{flow:?} refused, though {free:?} are free");
            assert!(free.is_empty() || after[1] > before[1], "{flow:?}: every port is tried");
            if after[0] > before[0] {
                self.full.insert((remote, udp), now);
            }
            return;
        }
        assert_eq!(action, Action::Back, "{flow:?}");
        let (outside, to) = world.ports(&frame, false);
        assert_eq!(to, remote);
        assert!((RANGE.0..=RANGE.1).contains(&outside) && outside != EXCLUDED, "{outside}");
        if let Some(owner) = owned(&(remote, outside, udp)) {
            assert_eq!(*owner, flow, "port {outside} is another's");
        }
        // Whoever has both halves keeps its port; one half is enough to get it again.
        match (self.sends.get(&flow), own) {
            (Some(sends), Some(own)) if *sends == own => assert_eq!(outside, own),
            (Some(sends), None) if owned(&(remote, *sends, udp)).is_none() => assert_eq!(outside, *sends),
            _ => {}
        }
        self.owners.insert((remote, outside, udp), flow);
        self.sends.insert(flow, outside);
    }

    fn answer(&mut self, world: &World, outside: Outside) {
        let (remote, port, udp) = outside;
        let packet = World::packet(&Ip::new(world.remote, world.gateway), (remote, port), 18, udp);
        let unknown = world.drops(DropReason::UnknownReply);
        let (action, frame) = world.run(&packet);
        match self.owners.get(&outside) {
            Some(&flow) => {
                assert_eq!(action, Action::Back);
                assert_eq!(world.ports(&frame, true), (remote, flow.0));
                // The forward half is rebuilt, unless there is one already.
                self.sends.entry(flow).or_insert(port);
            }
            // A port that is not for translation is the gateway's own.
            None if port == EXCLUDED => assert_eq!(action, Action::Pass),
            None => {
                assert_eq!(action, Action::Drop);
                assert_eq!(world.drops(DropReason::UnknownReply), unknown + 1);
            }
        }
    }
}

fn run(v6: bool, steps: &[Step]) {
    let mut world = World::new(v6);
    let mut model = Model::default();
    for step in steps {
        // Halves are looked after once a second.
        world.tables.now += 1;
        match *step {
            Step::Send { port, remote, udp } => model.send(&world, world.tables.now, (port, remote, udp)),
            Step::Answer { remote, port, udp } => model.answer(&world, (remote, port, udp)),
            Step::CutForward { port, remote, udp } => {
                let was = world.cut(true, (port, remote), udp);
                assert_eq!(was, model.sends.remove(&(port, remote, udp)).is_some());
            }
            Step::CutReverse { remote, port, udp } => {
                let was = world.cut(false, (remote, port), udp);
                assert_eq!(was, model.owners.remove(&(remote, port, udp)).is_some());
            }
        }
        let owned: BTreeSet<_> = model.owners.keys().map(|outside| outside.1).collect();
        assert!(!owned.contains(&EXCLUDED));
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 128, ..ProptestConfig::default() })]

    /// No two flows share a port towards a remote port, replies reach whoever owns the port, either
    /// half brings the other back, and nobody is refused while a port is free.
    #[test]
    fn translation_is_as_the_model_says(v6 in any::<bool>(), steps in vec(steps(), 1..120)) {
        run(v6, &steps);
    }
}
