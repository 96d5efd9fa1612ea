//! New flows on several processors at once: no port is given twice, no half of a pair is left over, and every count is
//! exact.
//!
//! Each processor has a thread that runs the gateway's program; before every packet they wait for each other, so that
//! the program looks for a port everywhere at the same moment.

#![expect(clippy::unwrap_used, reason = "tests")]

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::atomic::{AtomicUsize, Ordering};

use aya::programs::ProgramFd;
use coil_agent::datapath::{SkBuff, test_run};
use coil_agent::gateway::datapath::GatewayDatapath;
use coil_common::keys::{FlowKey4, FlowKey6};
use coil_common::names::{
    MAP_GATEWAY_STATS, MAP_GATEWAY_USAGE, MAP_NAT_FORWARD_V4, MAP_NAT_FORWARD_V6, MAP_NAT_REVERSE_V4,
    MAP_NAT_REVERSE_V6,
};
use coil_common::stats::GatewayStat;
use coil_common::usage::gateway_total;
use coil_common::values::{FlowValue, NatValue4, NatValue6};
use coil_ebpf::testing::build::{Ip, ethernet, tunnel};
use coil_ebpf::testing::scenario::IFINDEX;
use coil_ebpf::testing::scenarios;
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;

use crate::scenarios::Machine;
use crate::support::maps;
use crate::support::net::NetNs;
use crate::support::raw::RawMap;
use crate::support::topology::Topology;

/// First of the ports for translations, and how many there are.
const FIRST: u16 = 10_000;
const PORTS: u16 = 256;
/// Flows of each client towards one port of the remote: together more than there are ports.
const FLOWS: u16 = 160;
/// Ports of the remote, one after the other.
const ROUNDS: u16 = 40;

/// Lets threads go at the same moment.
struct Line {
    threads: usize,
    arrived: AtomicUsize,
}

impl Line {
    /// Returns when all have come here for the time `turn`, which counts from 1.
    fn wait(&self, turn: usize) {
        self.arrived.fetch_add(1, Ordering::AcqRel);
        let mut rounds = 0u32;
        while self.arrived.load(Ordering::Acquire) < self.threads * turn {
            // Somebody else may need this processor to get here at all.
            rounds += 1;
            if rounds.is_multiple_of(4096) { std::thread::yield_now() } else { std::hint::spin_loop() }
        }
    }
}

fn processors() -> usize {
    std::thread::available_parallelism().unwrap().get()
}

fn pin(processor: usize) {
    let mut set = CpuSet::new();
    set.set(processor).unwrap();
    sched_setaffinity(Pid::from_raw(0), &set).unwrap();
}

/// A flow towards the port of the remote: address and port of the client.
type Flow = (IpAddr, u16);

/// What the tables say about one port of the remote.
struct Tables {
    /// Port of the translation, and packets.
    forward: BTreeMap<Flow, (u16, u64)>,
    reverse: BTreeMap<u16, Flow>,
}

macro_rules! tables {
    ($folder:expr, $remote:expr, $key:ty, $value:ty, $forward:expr, $reverse:expr) => {{
        let (folder, remote): (&std::path::Path, [u8; 2]) = ($folder, $remote.to_be_bytes());
        let forward = maps::entries::<$key, $value>(folder, $forward).into_iter();
        let forward = forward.filter(|(key, _)| key.dst_port == remote).map(|(key, value)| {
            let flow = (IpAddr::from(key.src), u16::from_be_bytes(key.src_port));
            (flow, (u16::from_be_bytes(value.port), value.packets))
        });
        let reverse = maps::entries::<$key, $value>(folder, $reverse).into_iter();
        let reverse = reverse.filter(|(key, _)| key.src_port == remote).map(|(key, value)| {
            let owner = (IpAddr::from(value.addr), u16::from_be_bytes(value.port));
            (u16::from_be_bytes(key.dst_port), owner)
        });
        Tables { forward: forward.collect(), reverse: reverse.collect() }
    }};
}

/// A gateway with as many clients as there are processors, and two at least.
struct Race {
    topology: Topology,
    _datapath: GatewayDatapath,
    program: ProgramFd,
    v6: bool,
    threads: usize,
}

impl Race {
    fn new(v6: bool) -> Self {
        let topology = Topology::new();
        let threads = processors().max(2);
        let mut options = topology.gateway_options();
        options.ports.range = FIRST..=FIRST + PORTS - 1;
        options.max_nat = 1 << 15;
        let mut datapath = topology.open_gateway_with(options);
        let clients: BTreeSet<IpAddr> = (0..threads).map(|thread| client(v6, thread)).collect();
        datapath.clients.sync(&clients, true).unwrap();
        let program = datapath.program().unwrap();
        Self { topology, _datapath: datapath, program, v6, threads }
    }

    /// Port that a packet of this flow leaves with, if it does.
    fn send(&self, (from, port): Flow, remote: u16) -> Option<u16> {
        let (gateway, world) =
            (self.topology.gateway.address(self.v6), self.topology.external.address(self.v6));
        let inner = Ip::new(from, world).udp((port, remote), b"x");
        let frame = ethernet(&tunnel(from, gateway, &inner));
        let context = SkBuff { ifindex: IFINDEX, ..SkBuff::default() };
        let left = test_run(&self.program, &frame, context, 1).unwrap().packet;
        let (source, ports) = if self.v6 { (22..38, 54) } else { (26..30, 34) };
        let to_world = match world {
            IpAddr::V4(world) => left[30..34] == world.octets(),
            IpAddr::V6(world) => left[38..54] == world.octets(),
        };
        // A refusal goes back to the client, by its tunnel.
        to_world.then(|| {
            let own = match gateway {
                IpAddr::V4(gateway) => gateway.octets().to_vec(),
                IpAddr::V6(gateway) => gateway.octets().to_vec(),
            };
            assert_eq!(left[source], own, "{left:x?}");
            u16::from_be_bytes([left[ports], left[ports + 1]])
        })
    }

    /// One packet of each flow of each thread, all threads at the same moment, and what became of each.
    fn round(&self, remote: u16, flow: impl Fn(usize, u16) -> Flow + Sync) -> Vec<(Flow, Option<u16>)> {
        let line = Line { threads: self.threads, arrived: AtomicUsize::new(0) };
        let (line, flow) = (&line, &flow);
        std::thread::scope(|scope| {
            let running: Vec<_> = (0..self.threads)
                .map(|thread| {
                    scope.spawn(move || {
                        pin(thread % processors());
                        let flows = (0..FLOWS).map(|number| flow(thread, number));
                        let sent = flows.enumerate().map(|(number, flow)| {
                            line.wait(number + 1);
                            (flow, self.send(flow, remote))
                        });
                        sent.collect::<Vec<_>>()
                    })
                })
                .collect();
            running.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
        })
    }

    fn tables(&self, remote: u16) -> Tables {
        let folder = self.topology.gateway_pins();
        if self.v6 {
            tables!(&folder, remote, FlowKey6, NatValue6, MAP_NAT_FORWARD_V6, MAP_NAT_REVERSE_V6)
        } else {
            tables!(&folder, remote, FlowKey4, NatValue4, MAP_NAT_FORWARD_V4, MAP_NAT_REVERSE_V4)
        }
    }

    fn stat(&self, v4: GatewayStat, v6: GatewayStat) -> u64 {
        let stat = if self.v6 { v6 } else { v4 };
        maps::counter(&self.topology.gateway_pins(), MAP_GATEWAY_STATS, stat.index()).packets
    }

    /// Flows that are alive, as the quotas count them.
    fn used(&self) -> u64 {
        let usage = RawMap::open(&self.topology.gateway_pins(), MAP_GATEWAY_USAGE);
        let count = usage.get(&gateway_total(u32::from(self.v6)).to_ne_bytes()).unwrap();
        u64::from_ne_bytes(count.try_into().unwrap())
    }

    fn dropped(&self) -> u64 {
        maps::all_drops(&self.topology.gateway_pins()).into_iter().map(|(_, packets)| packets).sum()
    }

    /// Sends rounds of packets and looks at what they have left; how many flows each round has made.
    fn run(&self, flow: impl Fn(usize, u16) -> Flow + Sync) -> Vec<usize> {
        let (mut flows, mut packets, mut refused) = (0, 0, 0);
        let mut made = Vec::new();
        for remote in 1..=ROUNDS {
            let sent = self.round(remote, &flow);
            let Tables { forward, reverse } = self.tables(remote);
            // What left, by flow; all packets of one with the same port.
            let mut left: BTreeMap<Flow, (u16, u64)> = BTreeMap::new();
            for (flow, port) in &sent {
                let Some(port) = *port else {
                    refused += 1;
                    continue;
                };
                let entry = left.entry(*flow).or_insert((port, 0));
                entry.1 += 1;
                packets += 1;
                assert_eq!(entry.0, port, "round {remote}: {flow:?} left with two ports");
            }
            assert_eq!(forward, left, "round {remote}: flow, port and packets");
            let owners: BTreeMap<u16, Flow> =
                forward.iter().map(|(flow, (port, _))| (*port, *flow)).collect();
            assert_eq!(owners.len(), forward.len(), "round {remote}: a port was given twice: {forward:?}");
            assert_eq!(reverse, owners, "round {remote}: a half is left over, or is missing");
            assert!(owners.keys().all(|port| (FIRST..FIRST + PORTS).contains(port)), "{owners:?}");
            flows += forward.len() as u64;
            made.push(forward.len());
            assert_eq!(self.stat(GatewayStat::NewFlowV4, GatewayStat::NewFlowV6), flows, "round {remote}");
            assert_eq!(self.used(), flows, "round {remote}");
            let counted = self.stat(GatewayStat::MasqueradedV4, GatewayStat::MasqueradedV6);
            assert_eq!(counted, packets, "round {remote}");
            assert_eq!(self.dropped(), refused, "round {remote}");
        }
        made
    }
}

fn client(v6: bool, thread: usize) -> IpAddr {
    let number = u8::try_from(thread % 100).unwrap() + 100;
    if v6 { format!("fd00:1::{number}").parse().unwrap() } else { IpAddr::from([10, 1, 0, number]) }
}

/// Clients that all want the same ports, and together more than there are.
fn clients(v6: bool) {
    let race = Race::new(v6);
    let made = race.run(|thread, number| (client(v6, thread), FIRST + number));
    println!("{} threads, flows of each round: {made:?}", race.threads);
    // A search may find none where one of the last is free.
    assert!(made.iter().all(|made| *made > usize::from(PORTS) * 3 / 4), "{made:?}");
}

/// The first packets of one flow on all processors, as they are where several threads of a pod send from one socket.
fn one_flow(v6: bool) {
    let race = Race::new(v6);
    // Ports outside the range, so that it takes a search to find one.
    let made = race.run(|_, number| (client(v6, 0), 30_000 + number));
    assert!(made.iter().all(|made| *made == usize::from(FLOWS)), "{made:?}");
}

/// The same at the pod: one entry, which counts every packet, and one flow of the pod's share.
fn one_flow_of_a_pod(v6: bool) {
    const FLOWS: u16 = 480;
    NetNs::new("race").run(move || {
        let name = format!("from_pod v{}: UDP", if v6 { 6 } else { 4 });
        let scenario = scenarios().into_iter().find(|scenario| scenario.name == name).unwrap();
        let machine = Machine::new(scenario.hook, &scenario.config, None);
        machine.fill(&scenario.entries);
        let program = machine.program(scenario.hook);
        let threads = processors().max(2);
        let line = Line { threads, arrived: AtomicUsize::new(0) };
        let source_port = 14 + if v6 { 40 } else { 20 };
        std::thread::scope(|scope| {
            for thread in 0..threads {
                let (line, program, packet) = (&line, &program, scenario.packet.bytes.clone());
                scope.spawn(move || {
                    pin(thread % processors());
                    let mut packet = packet;
                    for number in 0..FLOWS {
                        packet[source_port..source_port + 2].copy_from_slice(&number.to_be_bytes());
                        let context = SkBuff { ifindex: IFINDEX, ..SkBuff::default() };
                        line.wait(usize::from(number) + 1);
                        let left = test_run(program, &packet, context, 1).unwrap().packet;
                        assert!(left.len() > packet.len(), "it has no tunnel");
                    }
                });
            }
        });
        let flows: Vec<FlowValue> = machine.entries().iter().map(|entry| entry.value.read()).collect();
        assert_eq!(flows.len(), usize::from(FLOWS));
        let lacking = flows.iter().filter(|flow| flow.tx_packets != threads as u64).count();
        assert_eq!(lacking, 0, "flows of {FLOWS} that do not count all {threads} packets");
        assert_eq!(machine.pod_flows(), u64::from(FLOWS));
    });
}

#[test]
#[ignore = "privileged: needs root and the eBPF object"]
fn a_flow_of_a_pod_on_several_processors_is_one_flow_v4() {
    one_flow_of_a_pod(false);
}

#[test]
#[ignore = "privileged: needs root and the eBPF object"]
fn a_flow_of_a_pod_on_several_processors_is_one_flow_v6() {
    one_flow_of_a_pod(true);
}

#[test]
#[ignore = "privileged: needs root and the eBPF object"]
fn clients_on_several_processors_get_ports_of_their_own_v4() {
    clients(false);
}

#[test]
#[ignore = "privileged: needs root and the eBPF object"]
fn clients_on_several_processors_get_ports_of_their_own_v6() {
    clients(true);
}

#[test]
#[ignore = "privileged: needs root and the eBPF object"]
fn a_flow_on_several_processors_is_one_flow_v4() {
    one_flow(false);
}

#[test]
#[ignore = "privileged: needs root and the eBPF object"]
fn a_flow_on_several_processors_is_one_flow_v6() {
    one_flow(true);
}
