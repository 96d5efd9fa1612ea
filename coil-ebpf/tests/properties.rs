//! What must hold for every packet.

#![expect(clippy::panic, clippy::unwrap_used, reason = "tests")]

use std::{
    net::{Ipv4Addr, Ipv6Addr},
    sync::OnceLock,
};

use coil_common::{stats::DropReason, values::Counter};
use coil_ebpf::{
    csum,
    testing::{
        Action, Hook, Scenario,
        build::{self, FOU, Ip, ethernet},
        interpret,
        memory::{Memory, Tables},
        scenario::{IFINDEX, Outcome},
        scenarios,
    },
};
use proptest::{collection::vec, prelude::*, sample::Index};

/// The pod of the scenarios.
const POD_V4: Ipv4Addr = Ipv4Addr::new(10, 1, 0, 2);
/// The same.
const POD_V6: Ipv6Addr = Ipv6Addr::new(0xfd01, 0, 0, 0, 0, 0, 0, 2);

/// All scenarios, made once.
fn all() -> &'static [Scenario] {
    static ALL: OnceLock<Vec<Scenario>> = OnceLock::new();
    ALL.get_or_init(scenarios)
}

/// Those with a packet of an established flow.
fn established() -> &'static [Scenario] {
    static ESTABLISHED: OnceLock<Vec<Scenario>> = OnceLock::new();
    ESTABLISHED.get_or_init(|| {
        let short = |scenario: &&Scenario| scenario.check_short_way().is_ok_and(|hits| hits > 0);
        all().iter().filter(short).cloned().collect()
    })
}

/// The scenario of this name.
fn scenario(name: &str) -> Scenario {
    let found = all().iter().find(|scenario| scenario.name == name);
    found.unwrap_or_else(|| panic!("no scenario {name}")).clone()
}

/// Runs an Ethernet frame through the hook of a scenario, with tables that last.
fn run(scenario: &Scenario, tables: &Tables, frame: Vec<u8>) -> (Action, Vec<u8>) {
    let packet = Memory { bytes: frame, ..scenario.packet };
    interpret::run(scenario.hook, IFINDEX, &packet, &scenario.config, tables)
}

fn tables(scenario: &Scenario) -> Tables {
    Tables::new(&scenario.entries, 1000)
}

/// One way through the world: pod, gateway and back.
struct Path {
    from_pod: Scenario,
    gateway: Scenario,
    to_pod: Scenario,
}

impl Path {
    fn new(family: &str) -> Self {
        Self {
            from_pod: scenario(&format!("from_pod {family}: UDP")),
            gateway: scenario(&format!("gateway {family}: UDP")),
            to_pod: scenario(&format!("to_pod {family}: unknown flow")),
        }
    }
}

/// Pod, gateway and remote of the scenarios.
fn hosts(family: &str) -> (Ip, Ip, Ip, Ip) {
    let addr = |text: &str| text.parse::<std::net::IpAddr>().unwrap();
    let (pod, gateway, remote) = if family == "v4" {
        (addr("10.1.0.2"), addr("10.2.0.2"), addr("192.0.2.2"))
    } else {
        (addr("fd01::2"), addr("fd02::2"), addr("2001:db8::2"))
    };
    (
        Ip::new(pod, remote),
        Ip::new(gateway, remote).ttl(63),
        Ip::new(remote, gateway),
        Ip::new(remote, pod).ttl(63),
    )
}

fn families() -> impl Strategy<Value = &'static str> {
    prop_oneof![Just("v4"), Just("v6")]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, ..ProptestConfig::default() })]

    /// No bytes make a hook panic, and what it does not rewrite it leaves alone.
    #[test]
    fn arbitrary_bytes(bytes in vec(any::<u8>(), 0..200), kind in 0..3usize, family in families()) {
        let mut frame = bytes;
        if frame.len() > 14 {
            let kinds = [[8, 0], [0x86, 0xdd], [8, 6]];
            frame[12..14].copy_from_slice(&kinds[kind]);
        }
        let path = Path::new(family);
        for hook in [&path.from_pod, &path.gateway, &path.to_pod] {
            let (action, out) = run(hook, &tables(hook), frame.clone());
            if action == Action::Drop {
                prop_assert_eq!(&out, &frame);
            }
        }
    }

    /// Nor do packets that were good before some bytes of them were spoiled; and whatever leaves a
    /// gateway has its address.
    #[test]
    fn spoiled_packets(
        which in any::<Index>(),
        spoils in vec((any::<Index>(), any::<u8>()), 1..4),
        cut in any::<Option<Index>>(),
    ) {
        let scenario = which.get(all());
        let mut frame = scenario.packet.bytes.clone();
        if frame.len() > 14 {
            for (at, value) in spoils {
                let at = 14 + at.index(frame.len() - 14);
                frame[at] = value;
            }
            if let Some(cut) = cut {
                frame.truncate(14 + cut.index(frame.len() - 14));
            }
        }
        let (action, out) = run(scenario, &tables(scenario), frame);
        if scenario.hook == Hook::Gateway && action == Action::Back {
            let (source, to_pod) = if out[12] == 8 {
                (out[26..30] == scenario.config.ipv4, out[30..34] == POD_V4.octets())
            } else {
                (out[22..38] == scenario.config.ipv6, out[38..54] == POD_V6.octets())
            };
            // An answer to a pod of the same node has no tunnel around it.
            prop_assert!(source || scenario.near && to_pod, "{}", scenario.name);
        }
    }

    /// A spoiled packet of a flow that is established meets the same fate on the short way as on the
    /// long one, and so does a segment of any size.
    #[test]
    fn spoiled_packets_of_established_flows(
        which in any::<Index>(),
        // The checksum 0xffff, which no stack makes, is written as zero on the long way.
        spoils in vec((0..80usize, 0..255u8), 0..3),
        cut in any::<Option<Index>>(),
        gso_size in prop_oneof![Just(0), 1..2000u32],
    ) {
        let scenario = which.get(established());
        let mut frame = scenario.packet.bytes.clone();
        for (at, value) in spoils {
            if let Some(byte) = frame.get_mut(14 + at) {
                *byte = value;
            }
        }
        if let Some(cut) = cut {
            frame.truncate(14 + cut.index(frame.len() - 14));
        }
        let spoiled = Memory { gso_size, ..Memory::new(frame) };
        let outcomes = [false, true].map(|long_way_only| {
            let mut tables = tables(scenario);
            tables.long_way_only = long_way_only;
            for _ in 0..3 {
                let (action, _) = run(scenario, &tables, scenario.packet.bytes.clone());
                assert_eq!(action, scenario.expect.action);
            }
            let (action, packet) =
                interpret::run(scenario.hook, IFINDEX, &spoiled, &scenario.config, &tables);
            Outcome::new(action, &packet, tables.counters(), &tables.entries())
        });
        prop_assert_eq!(&outcomes[0], &outcomes[1]);
    }

    /// A checksum that follows a change is the one that is computed anew.
    #[test]
    fn checksum_follows(
        mut bytes in vec(any::<u8>(), 8..80),
        at in any::<Index>(),
        new in any::<[u8; 4]>(),
    ) {
        // All zero is the one sum that has two forms.
        prop_assume!(bytes.iter().any(|byte| *byte != 0) && new != [0; 4]);
        let at = at.index(bytes.len() - 4) & !1;
        let check = (!build::sum(&bytes)).to_be_bytes();
        let old = [bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]];
        bytes[at..at + 4].copy_from_slice(&new);
        let wanted = (!build::sum(&bytes)).to_be_bytes();
        prop_assert_eq!(csum::update(check, csum::delta4(old, new)), wanted);
        let halves = csum::add(
            csum::delta2([old[0], old[1]], [new[0], new[1]]),
            csum::delta2([old[2], old[3]], [new[2], new[3]]),
        );
        prop_assert_eq!(csum::update(check, halves), wanted);
    }

    /// A change one byte further on moves the checksum by the rotated delta.
    #[test]
    fn odd_checksum_follows(mut bytes in vec(1u8.., 8..80), at in any::<Index>(), new in 1u16..) {
        let at = (at.index(bytes.len() - 3) & !1) + 1;
        let check = (!build::sum(&bytes)).to_be_bytes();
        let old = [bytes[at], bytes[at + 1]];
        let new = new.to_be_bytes();
        bytes[at..at + 2].copy_from_slice(&new);
        let wanted = (!build::sum(&bytes)).to_be_bytes();
        prop_assert_eq!(csum::update(check, csum::odd(csum::delta2(old, new))), wanted);
    }

    /// What a pod sends arrives at the remote as it was, but for the source and one hop; the answer
    /// arrives at the pod as it was, but for the destination and one hop.
    #[test]
    fn there_and_back(
        family in families(),
        ports in (1u16.., 1u16..),
        narrow in any::<bool>(),
        payload in vec(any::<u8>(), 0..64),
        tos in any::<u8>(),
        tcp in any::<bool>(),
    ) {
        let path = Path::new(family);
        let (out, sent, answer, received) = hosts(family);
        let mut gateway = path.gateway.clone();
        if narrow {
            gateway.config.nat_port_first = 2000;
            gateway.config.nat_port_last = 2999;
        }
        let (node, nat) = (tables(&path.from_pod), tables(&gateway));
        let packet = |ip: &Ip, ports, flags| {
            let ip = ip.clone().tos(tos);
            if tcp { ip.tcp(ports, flags, &[], &payload) } else { ip.udp(ports, &payload) }
        };
        let (action, frame) = run(&path.from_pod, &node, ethernet(&packet(&out, ports, 2)));
        prop_assert_eq!(action, Action::Pass);
        let (action, frame) = run(&gateway, &nat, frame);
        prop_assert_eq!(action, Action::Back);
        let at = if family == "v4" { 34 } else { 54 };
        let port = u16::from_be_bytes([frame[at], frame[at + 1]]);
        let (first, last) = (gateway.config.nat_port_first, gateway.config.nat_port_last);
        prop_assert!((first..=last).contains(&port));
        if (first..=last).contains(&ports.0) && ![FOU, 8080, 8081].contains(&ports.0) {
            prop_assert_eq!(port, ports.0);
        }
        prop_assert_eq!(&frame[14..], &packet(&sent, (port, ports.1), 2)[..]);

        let (action, frame) =
            run(&gateway, &nat, ethernet(&packet(&answer, (ports.1, port), 18)));
        prop_assert_eq!(action, Action::Back);
        // The node's tables, which know the flow by now.
        let (action, frame) = run(&path.to_pod, &node, frame);
        prop_assert_eq!(action, Action::Pass);
        prop_assert_eq!(&frame[14..], &packet(&received, (ports.1, ports.0), 18)[..]);

        let length = packet(&received, (ports.1, ports.0), 18).len() as u64;
        let egress = if family == "v4" { 2 } else { 3 };
        let counter = node.counters().get(&("egress_stats", egress * 2 + 1)).copied();
        prop_assert_eq!(counter, Some(Counter { packets: 1, bytes: length }));
        prop_assert!(!node.counters().contains_key(&("drops", DropReason::Malformed.index())));
    }

    /// Two clients never share a port towards the same remote port.
    #[test]
    fn ports_are_not_shared(
        family in families(),
        clients in vec(1u16.., 2..40),
    ) {
        let mut gateway = Path::new(family).gateway;
        // So few that they collide.
        gateway.config.nat_port_first = 40000;
        gateway.config.nat_port_last = 40100;
        let nat = tables(&gateway);
        let (out, ..) = hosts(family);
        let at = if family == "v4" { 34 } else { 54 };
        let mut seen = std::collections::BTreeMap::new();
        for client in clients {
            let inner = out.udp((client, 53), b"x");
            let (action, frame) =
                run(&gateway, &nat, ethernet(&build::tunnel(out.src, gateway_of(family), &inner)));
            if action == Action::Back {
                let port = [frame[at], frame[at + 1]];
                let owner = *seen.entry(port).or_insert(client);
                prop_assert_eq!(owner, client);
            }
        }
    }
}

fn gateway_of(family: &str) -> std::net::IpAddr {
    hosts(family).1.src
}
