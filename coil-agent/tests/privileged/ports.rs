//! Who gets a port at a gateway: quotas, exhaustion, sockets of the pod, halves that vanish, the sweep.

#![expect(clippy::unwrap_used, reason = "tests")]

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{IpAddr, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use aya::programs::ProgramFd;
use coil_agent::datapath::{SkBuff, seconds_since_boot, test_run};
use coil_agent::gateway::datapath::{GatewayDatapath, Quotas};
use coil_common::keys::FlowKey4;
use coil_common::names::{
    MAP_GATEWAY_USAGE, MAP_NAT_FORWARD_V4, MAP_NAT_FORWARD_V6, MAP_NAT_REVERSE_V4, MAP_NAT_REVERSE_V6,
};
use coil_common::stats::DropReason;
use coil_common::usage::gateway_total;
use coil_common::values::{NatValue4, STATE_CONFIRMED, STATE_REPLY, STATE_SYN};
use coil_ebpf::decide::open::VAIN;
use coil_ebpf::testing::Action;
use coil_ebpf::testing::build::{Ip, ethernet, tunnel};
use coil_ebpf::testing::scenario::IFINDEX;

use crate::support::raw::RawMap;
use crate::support::topology::Topology;
use crate::support::{DEADLINE, maps};
use crate::traffic::{dump, echo_server, pattern};

/// A TCP connection goes on while halves of its translation are removed again and again.
fn halves_vanish(v6: bool) {
    let topology = Topology::new();
    let _node = topology.apply(topology.open_node(None), &topology.state());
    let _gateway = topology.open_gateway();
    let (address, server) = echo_server(&topology, v6);
    let mut stream = topology.client.net.run(move || TcpStream::connect_timeout(&address, DEADLINE).unwrap());
    // The other end has to send again what was lost, which it does ever more slowly.
    stream.set_read_timeout(Some(DEADLINE * 3)).unwrap();
    let (forward, reverse) =
        if v6 { (MAP_NAT_FORWARD_V6, MAP_NAT_REVERSE_V6) } else { (MAP_NAT_FORWARD_V4, MAP_NAT_REVERSE_V4) };
    let chunk = pattern(10_000);
    let mut sent = Vec::new();
    let step = |stream: &mut TcpStream, sent: &mut Vec<u8>| {
        stream.write_all(&chunk).unwrap();
        let mut back = vec![0; chunk.len()];
        stream.read_exact(&mut back).unwrap();
        assert!(back == chunk);
        sent.extend(&chunk);
    };
    step(&mut stream, &mut sent);
    for round in 0..4 {
        let name = if round % 2 == 0 { forward } else { reverse };
        let map = RawMap::open(&topology.gateway_pins(), name);
        let keys = map.keys();
        assert_eq!(keys.len(), 1, "round {round}: one flow");
        // In the middle of what is on its way.
        stream.write_all(&chunk).unwrap();
        keys.iter().for_each(|key| map.clear(key));
        // A reply alone cannot say whose it is: what mends that is that the client goes on.
        stream.write_all(&chunk).unwrap();
        for _ in 0..2 {
            let mut back = vec![0; chunk.len()];
            stream.read_exact(&mut back).unwrap();
            assert!(back == chunk);
            sent.extend(&chunk);
        }
        step(&mut stream, &mut sent);
        for name in [forward, reverse] {
            let healed = RawMap::open(&topology.gateway_pins(), name).keys();
            assert_eq!(healed.len(), 1, "round {round}: {name}");
        }
    }
    drop(stream);
    let (_, received) = server.join().unwrap();
    assert!(received == sent, "{} of {} bytes\n{}", received.len(), sent.len(), dump(&topology));
}

#[test]
#[ignore = "privileged: needs root and the eBPF object"]
fn connections_survive_the_loss_of_either_half_v4() {
    halves_vanish(false);
}

#[test]
#[ignore = "privileged: needs root and the eBPF object"]
fn connections_survive_the_loss_of_either_half_v6() {
    halves_vanish(true);
}

/// A gateway whose program is shown packets.
struct Gateway {
    topology: Topology,
    datapath: GatewayDatapath,
    program: ProgramFd,
}

impl Gateway {
    fn new(quotas: Quotas, max_nat: u32, range: std::ops::RangeInclusive<u16>) -> Self {
        let topology = Topology::new();
        let mut options = topology.gateway_options();
        options.quotas = quotas;
        options.max_nat = max_nat;
        options.ports.range = range;
        let mut datapath = topology.open_gateway_with(options);
        let clients: std::collections::BTreeSet<IpAddr> = (1..=9).map(client).collect();
        datapath.clients.sync(&clients, true).unwrap();
        let program = datapath.program().unwrap();
        Self { topology, datapath, program }
    }

    fn is(&self, action: Action, packet: &[u8]) -> bool {
        let context = SkBuff { ifindex: IFINDEX, ..SkBuff::default() };
        test_run(&self.program, &ethernet(packet), context, 1).unwrap().action
            == action.code().cast_unsigned()
    }

    /// How many of these UDP packets of a client to port 443 of the world leave; refusals are answered, and
    /// so leave too, but as drops.
    fn send(&self, number: u8, ports: impl IntoIterator<Item = u16>) -> u64 {
        let (client, gateway) = (client(number), IpAddr::from(self.topology.gateway.ipv4));
        let mut sent = 0;
        let before: u64 = self.drops().values().sum();
        for port in ports {
            let inner = Ip::new(client, IpAddr::from(self.topology.external.ipv4)).udp((port, 443), b"x");
            self.is(Action::Back, &tunnel(client, gateway, &inner));
            sent += 1;
        }
        sent - (self.drops().values().sum::<u64>() - before)
    }

    fn drops(&self) -> BTreeMap<&'static str, u64> {
        maps::all_drops(&self.topology.gateway_pins()).into_iter().collect()
    }
}

fn client(number: u8) -> IpAddr {
    IpAddr::from([10, 1, 0, 100 + number])
}

/// One client floods a destination with new flows, then several do until no port is left: what others
/// have goes on, the flood is refused at once, and one client alone leaves the others their part.
#[test]
#[ignore = "privileged: needs root and the eBPF object"]
fn a_flood_takes_nothing_from_others() {
    let quotas = Quotas { client_flows: 6000, client_ports: 4000 };
    let gateway = Gateway::new(quotas, 65_536, 10_000..=19_999);
    let victim = 1;
    assert_eq!(gateway.send(victim, 1000..1100), 100);

    // One client, from all ports that it has.
    let start = Instant::now();
    let admitted = gateway.send(2, 1024..=u16::MAX);
    println!("flood of {} new flows in {:?}: {admitted} admitted", 65_536 - 1024, start.elapsed());
    assert_eq!(admitted, 4000);
    assert_eq!(gateway.drops().into_keys().collect::<Vec<_>>(), ["client_port_quota"]);
    // The victim goes on, and gets more.
    assert_eq!(gateway.send(victim, 1000..1100), 100);
    assert_eq!(gateway.send(victim, 2000..3000), 1000);

    // Three more, until there are no ports towards the destination.
    let admitted: u64 = (3..6).map(|number| gateway.send(number, 1024..20_000)).sum();
    let drops = gateway.drops();
    println!("three more: {admitted} admitted, {drops:?}");
    let free = 10_000 - 4000 - 1100;
    assert!(admitted <= free && admitted > free * 3 / 4, "{admitted} of {free}");
    // Most are refused without a search. As long as there are ports, a search finds one now and then and is followed
    // by others: how many, is luck.
    let searches = drops["ports_exhausted"];
    assert!(searches > 0 && drops["destination_full"] > searches * 10, "{drops:?}");
    // Where none is found, the note of it holds for a second at least, after which a few searches are made again. What
    // was admitted once goes on in each round.
    let mut known = 0;
    for round in 0.. {
        let (start, before) = (Instant::now(), gateway.drops());
        let admitted = gateway.send(6, 1024..4_000);
        let searches = gateway.drops()["ports_exhausted"] - before["ports_exhausted"];
        assert!(admitted >= known, "{} flows have lost their ports", known - admitted);
        if admitted == known {
            assert!(
                searches <= VAIN * (start.elapsed().as_secs() + 2),
                "{searches} in {:?}",
                start.elapsed()
            );
            break;
        }
        known = admitted;
        assert!(round < 500, "there seem to be ports without end");
    }
    // Nobody's translation went.
    assert_eq!(gateway.send(victim, (1000..1100).chain(2000..3000)), 1100);
    // Another destination is not full.
    let (from, to) = (client(victim), IpAddr::from(gateway.topology.external.ipv4));
    let inner = Ip::new(from, to).udp((1000, 444), b"x");
    let before = gateway.drops();
    assert!(gateway.is(Action::Back, &tunnel(from, gateway.topology.gateway.ipv4.into(), &inner)));
    assert_eq!(before, gateway.drops());
}

/// The table admits nothing new when it is nearly full, and its entries go on.
#[test]
#[ignore = "privileged: needs root and the eBPF object"]
fn a_table_that_is_nearly_full_keeps_what_it_has() {
    let mut gateway = Gateway::new(Quotas::default(), 1000, 10_000..=19_999);
    assert_eq!(gateway.send(1, 1000..2000), 900);
    assert_eq!(gateway.drops(), BTreeMap::from([(DropReason::NatAdmission.name(), 100)]));
    assert_eq!(gateway.send(1, 1000..1900), 900);
    // A count that a dead process has left wrong is put right by the next walk.
    let usage = RawMap::open(&gateway.topology.gateway_pins(), MAP_GATEWAY_USAGE);
    usage.set(&gateway_total(0).to_ne_bytes(), &5000u64.to_ne_bytes());
    assert_eq!(gateway.send(1, 3000..3001), 0);
    // Flows that may have been made while the walk began are not counted out: look a second later.
    let made = seconds_since_boot().unwrap();
    crate::support::wait_for("the next second", || (seconds_since_boot().unwrap() > made + 1).then_some(()));
    sweep(&mut gateway.datapath);
    assert_eq!(usage.get(&gateway_total(0).to_ne_bytes()).unwrap(), 900u64.to_ne_bytes());
}

/// Walks through both families once; how long it took.
fn sweep(datapath: &mut GatewayDatapath) -> Duration {
    let start = Instant::now();
    while !datapath.collector.sweep(seconds_since_boot().unwrap(), 262_144).unwrap() {}
    start.elapsed()
}

/// A port on which a sidecar begins to listen is not used from then on.
#[test]
#[ignore = "privileged: needs root and the eBPF object"]
fn sockets_of_the_pod_keep_their_ports() {
    let Gateway { topology, datapath, program } = Gateway::new(Quotas::default(), 4096, 10_000..=19_999);
    let address = topology.gateway.ipv4;
    let (socket, datapath) = topology.gateway.net.run(move || {
        let socket = UdpSocket::bind((address, 12_345)).unwrap();
        let mut datapath = datapath;
        assert!(datapath.ports.refresh().unwrap() > 0);
        assert_eq!(datapath.ports.refresh().unwrap(), 0);
        (socket, datapath)
    });
    let gateway = Gateway { topology, datapath, program };
    assert_eq!(gateway.send(1, 12_344..12_347), 3);
    let used = |gateway: &Gateway| -> Vec<u16> {
        let folder = gateway.topology.gateway_pins();
        let entries = maps::entries::<FlowKey4, NatValue4>(&folder, MAP_NAT_FORWARD_V4);
        entries.iter().map(|(_, value)| u16::from_be_bytes(value.port)).collect()
    };
    let ports = used(&gateway);
    assert!(ports.contains(&12_344) && ports.contains(&12_346) && !ports.contains(&12_345), "{ports:?}");
    drop(socket);
    let Gateway { topology, mut datapath, program } = gateway;
    let datapath = topology.gateway.net.run(move || {
        assert!(datapath.ports.refresh().unwrap() > 0);
        datapath
    });
    let gateway = Gateway { topology, datapath, program };
    assert_eq!(gateway.send(2, [12_345]), 1);
    assert!(used(&gateway).contains(&12_345));
}

/// A walk sees all of many translations, removes none, and has the counts right. What it costs, `cargo xtask bench
/// sweep` tells.
#[test]
#[ignore = "privileged: needs root and the eBPF object"]
fn many_translations_are_walked_through() {
    const FLOWS: u32 = 70_000;
    let mut gateway = Gateway::new(Quotas::default(), 1 << 17, 1024..=64_511);
    let now = seconds_since_boot().unwrap();
    let (address, world) = (gateway.topology.gateway.ipv4.octets(), gateway.topology.external.ipv4.octets());
    let folder = gateway.topology.gateway_pins();
    let [forward, reverse] = [MAP_NAT_FORWARD_V4, MAP_NAT_REVERSE_V4].map(|map| RawMap::open(&folder, map));
    for number in 0..FLOWS {
        // As of clients with 62,500 ports each towards as many ports of the world.
        let port = (1024 + number % 62_500) as u16;
        let client = [10, 1, 0, 100 + (number / 62_500) as u8];
        let remote = (1 + number / 62_500) as u16;
        let key = FlowKey4 {
            src: client,
            dst: world,
            src_port: port.to_be_bytes(),
            dst_port: remote.to_be_bytes(),
            protocol: 6,
            ..FlowKey4::default()
        };
        let value = |addr, state| NatValue4 {
            addr,
            port: port.to_be_bytes(),
            state,
            last_seen: now,
            created: now.saturating_sub(60),
            packets: 1,
            ..NatValue4::default()
        };
        let back =
            FlowKey4 { src: world, dst: address, src_port: key.dst_port, dst_port: key.src_port, ..key };
        forward
            .set(bytemuck::bytes_of(&key), bytemuck::bytes_of(&value(address, STATE_SYN | STATE_CONFIRMED)));
        reverse.set(bytemuck::bytes_of(&back), bytemuck::bytes_of(&value(client, STATE_REPLY)));
    }
    for _ in 0..2 {
        sweep(&mut gateway.datapath);
        assert_eq!(gateway.datapath.collector.entries(), u64::from(FLOWS));
    }
    let usage = RawMap::open(&folder, MAP_GATEWAY_USAGE);
    assert_eq!(usage.get(&gateway_total(0).to_ne_bytes()).unwrap(), u64::from(FLOWS).to_ne_bytes());
    let first = FlowKey4 {
        src: [10, 1, 0, 100],
        dst: world,
        src_port: 1024u16.to_be_bytes(),
        dst_port: 1u16.to_be_bytes(),
        protocol: 6,
        ..FlowKey4::default()
    };
    assert!(forward.get(bytemuck::bytes_of(&first)).is_some());
}
