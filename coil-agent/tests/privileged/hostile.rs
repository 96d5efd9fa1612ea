//! Packets that no honest stack sends, through the loaded programs: nothing crashes, and nothing of a
//! client leaves with an address of its own.

#![expect(clippy::unwrap_used, reason = "tests")]

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use aya::programs::ProgramFd;
use coil_agent::datapath::{SkBuff, TestRun, test_run};
use coil_common::names::{MAP_GATEWAY_STATS, PROGRAM_FROM_POD, PROGRAM_TO_POD};
use coil_common::stats::{DropReason, GatewayStat};

use crate::support::maps;
use crate::support::packets::{Random, frame, icmp, tcp, udp};
use crate::support::topology::Topology;

const PASS: u32 = u32::MAX;
const DROP: u32 = 2;
const REDIRECT: u32 = 7;
const FOU: u16 = 5555;

/// Runs a program on a packet of an interface; `None` if the kernel refuses such a packet.
fn run(topology: &Topology, program: &ProgramFd, ifindex: u32, packet: &[u8]) -> Option<TestRun> {
    let context = SkBuff { ifindex, ..SkBuff::default() };
    let (program, packet) = (program.try_clone().unwrap(), packet.to_vec());
    topology.node.run(move || test_run(&program, &packet, context, 1).ok())
}

/// The same for many packets.
fn run_all(
    topology: &Topology,
    program: &ProgramFd,
    ifindex: u32,
    packets: Vec<Vec<u8>>,
) -> Vec<(Vec<u8>, TestRun)> {
    let context = SkBuff { ifindex, ..SkBuff::default() };
    let program = program.try_clone().unwrap();
    topology.node.run(move || {
        let runs = packets.into_iter().filter_map(|packet| {
            let run = test_run(&program, &packet, context, 1).ok()?;
            Some((packet, run))
        });
        runs.collect()
    })
}

/// Honest packets of all kinds, from and to these addresses.
fn honest(from: IpAddr, to: IpAddr) -> Vec<Vec<u8>> {
    let echo = if from.is_ipv6() { (58, 128) } else { (1, 8) };
    vec![
        frame(from, to, 6, &tcp(1000, 80, 2, 0)),
        frame(from, to, 6, &tcp(1000, 80, 16, 1000)),
        frame(from, to, 17, &udp(1000, 53, 100)),
        frame(from, to, 17, &udp(FOU, FOU, 100)),
        frame(from, to, echo.0, &icmp(echo.1, 7, 56)),
        frame(from, to, 47, &[0; 64]),
        frame(from, to, 17, &udp(1000, 53, 1460)),
    ]
}

/// A packet with something wrong.
fn spoil(random: &mut Random, packet: &[u8]) -> Vec<u8> {
    let mut packet = packet.to_vec();
    for _ in 0..=random.below(3) {
        let length = packet.len();
        match random.below(6) {
            0 => packet.truncate(14.max(random.below(length + 1))),
            // Mostly in the headers.
            1 | 2 => {
                let at = 12 + random.below(60.min(length - 12));
                packet[at] = random.byte();
            }
            3 => {
                let at = 12 + random.below(60.min(length - 12));
                packet[at] ^= 1 << random.below(8);
            }
            4 => {
                let at = 14 + random.below(50.min(length - 13));
                let more = vec![random.byte(); random.pick(&[1, 4, 8, 40])];
                packet.splice(at.min(length)..at.min(length), more);
            }
            _ if length > 22 => {
                // Lengths and fragment fields.
                let at = random.pick(&[16, 17, 18, 19, 20, 21]);
                packet[at] = random.byte();
            }
            _ => {}
        }
    }
    packet
}

/// Whether a packet that passes is one that the node would send out unchanged although it must not.
fn leaks(packet: &[u8], gateway: [IpAddr; 2]) -> bool {
    match packet.get(12..14) {
        Some([8, 0]) => {
            let Some(header) = packet.get(14..34) else { return false };
            // What the stack itself refuses to forward is no leak.
            if header[0] >> 4 != 4 || header[0] & 15 < 5 {
                return false;
            }
            let address =
                |at: usize| Ipv4Addr::new(header[at], header[at + 1], header[at + 2], header[at + 3]);
            let (source, to) = (address(12), address(16));
            let local = to.octets()[0] == 10
                || to.is_link_local()
                || to.is_loopback()
                || to.octets()[0] == 0
                || to.is_multicast()
                || to.octets()[0] >= 240
                || source.is_unspecified();
            !local && IpAddr::from(to) != gateway[0]
        }
        Some([0x86, 0xdd]) => {
            let Some(header) = packet.get(14..54) else { return false };
            if header[0] >> 4 != 6 {
                return false;
            }
            let address = |at: usize| {
                let bytes: [u8; 16] = header[at..at + 16].try_into().unwrap();
                Ipv6Addr::from(bytes)
            };
            let (source, to) = (address(8), address(24));
            // Neighbour discovery may be about addresses of any kind; no other node accepts it.
            if header[6] == 58 && header[7] == 255 {
                return false;
            }
            let local = to.is_unique_local()
                || to.is_unicast_link_local()
                || to.is_multicast()
                || to.is_loopback()
                || to.is_unspecified()
                || source.is_unspecified()
                || source.is_unicast_link_local();
            !local && IpAddr::from(to) != gateway[1]
        }
        _ => false,
    }
}

/// Programs, and the index of the client's interface.
fn set_up(topology: &Topology) -> (coil_agent::datapath::NodeDatapath, [ProgramFd; 2], u32) {
    let node = topology.apply(topology.open_node(None), &topology.state());
    let programs = [PROGRAM_FROM_POD, PROGRAM_TO_POD].map(|program| node.program(program).unwrap());
    (node, programs, topology.node.ifindex("vclient"))
}

#[test]
#[ignore = "privileged: needs root and the eBPF object"]
fn honest_packets_are_tunnelled_and_large_ones_refused() {
    let topology = Topology::new();
    let (_node, [from_pod, _], ifindex) = set_up(&topology);
    for v6 in [false, true] {
        let (from, to) = (topology.client.address(v6), topology.external.address(v6));
        let head = if v6 { 40 } else { 20 };
        for (packet, run) in run_all(&topology, &from_pod, ifindex, honest(from, to)) {
            let protocol = packet[14 + if v6 { 6 } else { 9 }];
            if protocol == 47 {
                assert_eq!(run.action, DROP);
            } else if packet.len() > 1480 {
                assert_eq!(run.action, REDIRECT, "an ICMP error goes back to the pod");
            } else if packet[14 + head..].starts_with(&udp(FOU, FOU, 0)[..4]) {
                assert!(run.action == PASS || run.action == DROP);
            } else {
                assert_eq!(run.action, PASS);
                assert!(run.packet.len() > packet.len());
                let outer = 14 + if v6 { run.packet.len() - packet.len() } else { 28 };
                assert_eq!(run.packet[outer..outer + 4], packet[14..18], "the inner header is kept");
            }
        }
    }
    assert_eq!(maps::drops(&topology.bpffs.node(), DropReason::TooBig), 2);
}

#[test]
#[ignore = "privileged: needs root and the eBPF object"]
fn nothing_hostile_leaks() {
    let topology = Topology::new();
    let (_node, [from_pod, to_pod], ifindex) = set_up(&topology);
    let gateway = [topology.gateway.address(false), topology.gateway.address(true)];
    let mut random = Random(0x5eed_0000_0000_0001);
    for v6 in [false, true] {
        let (from, to) = (topology.client.address(v6), topology.external.address(v6));
        let good = honest(from, to);
        let mut packets = Vec::new();
        for packet in &good {
            packets.extend((14..=packet.len().min(120)).map(|length| packet[..length].to_vec()));
        }
        packets.extend((0..30_000).map(|_| {
            let packet = random.pick(&good);
            spoil(&mut random, &packet)
        }));
        let runs = run_all(&topology, &from_pod, ifindex, packets.clone());
        assert!(runs.len() > 20_000, "the kernel takes most of the packets");
        for (packet, run) in runs {
            match run.action {
                PASS => assert!(!leaks(&run.packet, gateway), "{packet:02x?}\n{:02x?}", run.packet),
                DROP | REDIRECT => {}
                other => assert_eq!(other, DROP, "unexpected action"),
            }
        }
        for (_, run) in run_all(&topology, &to_pod, ifindex, packets) {
            assert!([PASS, DROP, REDIRECT].contains(&run.action), "{}", run.action);
        }
    }
    println!("{:?}", maps::all_drops(&topology.bpffs.node()));
    assert!(maps::drops(&topology.bpffs.node(), DropReason::Malformed) > 0);
    assert!(maps::drops(&topology.bpffs.node(), DropReason::SpoofedSource) > 0);
}

#[test]
#[ignore = "privileged: needs root and the eBPF object"]
fn a_pod_cannot_send_with_another_address() {
    let topology = Topology::new();
    let (_node, [from_pod, _], ifindex) = set_up(&topology);
    for v6 in [false, true] {
        let (gateway, to) = (topology.gateway.address(v6), topology.external.address(v6));
        let packet = frame(gateway, to, 17, &udp(1, 2, 10));
        let run = run(&topology, &from_pod, ifindex, &packet).unwrap();
        assert_eq!(run.action, DROP);
    }
    assert_eq!(maps::drops(&topology.bpffs.node(), DropReason::SpoofedSource), 2);
}

/// Wraps an IP packet of a frame in a tunnel.
fn tunnelled(from: IpAddr, to: IpAddr, inner: &[u8]) -> Vec<u8> {
    let mut datagram = udp(FOU, FOU, 0);
    let length = u16::try_from(8 + inner.len() - 14).unwrap();
    datagram[4..6].copy_from_slice(&length.to_be_bytes());
    datagram.extend(&inner[14..]);
    frame(from, to, 17, &datagram)
}

/// Source and destination of the outermost IP header.
fn addresses(packet: &[u8]) -> Option<(IpAddr, IpAddr)> {
    let v4 = |at: usize| Some(IpAddr::from(<[u8; 4]>::try_from(packet.get(at..at + 4)?).ok()?));
    let v6 = |at: usize| Some(IpAddr::from(<[u8; 16]>::try_from(packet.get(at..at + 16)?).ok()?));
    match packet.get(12..14)? {
        [8, 0] => Some((v4(26)?, v4(30)?)),
        [0x86, 0xdd] => Some((v6(22)?, v6(38)?)),
        _ => None,
    }
}

#[test]
#[ignore = "privileged: needs root and the eBPF object"]
fn a_gateway_sends_nothing_hostile_on() {
    let topology = Topology::new();
    let datapath = topology.open_gateway();
    let program = datapath.program().unwrap();
    let ifindex = topology.gateway.net.ifindex("eth0");
    let mut random = Random(0x5eed_0000_0000_0002);
    for v6 in [false, true] {
        let (client, gateway, external) =
            (topology.client.address(v6), topology.gateway.address(v6), topology.external.address(v6));
        let stranger: IpAddr = if v6 { "fd00:1::99".parse().unwrap() } else { "10.1.0.99".parse().unwrap() };
        let mut good = Vec::new();
        for source in [client, stranger] {
            for inner_source in [client, stranger] {
                for inner in honest(inner_source, external) {
                    good.push(tunnelled(source, gateway, &inner));
                }
            }
        }
        good.extend(honest(external, gateway));
        good.push(tunnelled(client, gateway, &frame(client, gateway, 17, &udp(1, 2, 3))));
        good.push(tunnelled(client, gateway, &frame(client, external, 6, &tcp(2000, 80, 16, 9))));
        let mut packets = Vec::new();
        for packet in &good {
            packets.extend((14..=packet.len().min(160)).map(|length| packet[..length].to_vec()));
        }
        packets.extend((0..30_000).map(|_| {
            let packet = random.pick(&good);
            spoil(&mut random, &packet)
        }));
        let context = SkBuff { ifindex, ..SkBuff::default() };
        let runner = program.try_clone().unwrap();
        let runs: Vec<(Vec<u8>, TestRun)> = topology.gateway.net.run(move || {
            let runs = packets.into_iter().filter_map(|packet| {
                let run = test_run(&runner, &packet, context, 1).ok()?;
                Some((packet, run))
            });
            runs.collect()
        });
        let mut forwarded = 0;
        for (packet, run) in runs {
            match run.action {
                REDIRECT => {
                    let (before, _) = addresses(&packet).unwrap();
                    let (source, to) = addresses(&run.packet).unwrap();
                    // An ICMP error about a tunnelled packet goes to the client, in the name of
                    // whom it was for.
                    let error = to == client && run.packet.len() < 1500;
                    assert!(source == gateway || error, "{packet:02x?}\n{:02x?}", run.packet);
                    assert!(before == client || to == client, "for a stranger: {packet:02x?}");
                    forwarded += 1;
                }
                PASS | DROP => {}
                other => assert_eq!(other, DROP, "unexpected action"),
            }
        }
        assert!(forwarded > 300, "honest packets are sent on: {forwarded}");
    }
    println!("{:?}", maps::all_drops(&topology.gateway_pins()));
    let invalid = [GatewayStat::InvalidV4, GatewayStat::InvalidV6]
        .map(|stat| maps::counter(&topology.gateway_pins(), MAP_GATEWAY_STATS, stat.index()).packets);
    assert!(invalid.iter().all(|packets| *packets > 0), "{invalid:?}");
    assert_eq!(invalid.iter().sum::<u64>(), maps::drops(&topology.gateway_pins(), DropReason::NoState));
    for reason in
        [DropReason::UnknownClient, DropReason::InnerSourceMismatch, DropReason::ForbiddenDestination]
    {
        assert!(maps::drops(&topology.gateway_pins(), reason) > 0, "{}", reason.name());
    }
}
