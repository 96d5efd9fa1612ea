//! Packets whose headers are not in one piece: cut at every byte, they fare as they do whole.
//!
//! What comes from a network card, a tap device or a socket may have its headers in page fragments, where a program
//! cannot read them without asking for them. `BPF_PROG_TEST_RUN` makes no such packets, so that these travel.

#![expect(clippy::unwrap_used, reason = "tests")]

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use coil_agent::datapath::{AttachMode, NodeDatapath};
use coil_common::stats::DropReason;
use coil_ebpf::testing::build::{Ip, ethernet, tunnel};

use crate::support::maps;
use crate::support::net::NetNs;
use crate::support::other::{Other, Place};
use crate::support::pieces::{Arrivals, Pieces};
use crate::support::topology::Topology;
use crate::traffic::dump;

/// What packets carry, by which they are known again.
const MARKER: &[u8; 16] = b"\x01split headers\x02\x03";
/// Ports of the client, and of the world.
const UDP: (u16, u16) = (4000, 53);
const TCP: (u16, u16) = (4001, 80);
const ECHO: u16 = 4002;
const SYN: u8 = 2;
const ACK: u8 = 16;
/// Addresses of the node.
const ROUTER_V4: Ipv4Addr = Ipv4Addr::new(10, 1, 0, 1);
const ROUTER_V6: Ipv6Addr = Ipv6Addr::new(0xfd00, 1, 0, 0, 0, 0, 0, 1);
const MSS: [u8; 4] = [2, 4, 5, 0xb4];

const fn swapped(ports: (u16, u16)) -> (u16, u16) {
    (ports.1, ports.0)
}

/// A packet, and one that must have come before it.
struct Case {
    name: &'static str,
    packet: Vec<u8>,
    before: Option<Vec<u8>>,
}

/// Packets of flows in one direction, and an ICMP error about one in the other.
fn packets(from: IpAddr, to: IpAddr, out: bool, fragment: u16) -> Vec<Case> {
    let ip = Ip::new(from, to);
    let (udp, tcp) = if out { (UDP, TCP) } else { (swapped(UDP), swapped(TCP)) };
    let odd = if from.is_ipv4() { ip.clone().options(&[1; 8]) } else { ip.clone().extension(60, 16) };
    let about = Ip::new(to, from).udp(swapped(udp), MARKER);
    let unreachable = if from.is_ipv4() { (3, 3) } else { (1, 4) };
    let mut fragments = ip.clone();
    fragments.id = fragment;
    let first = fragments.clone().fragment(0, true).udp(udp, MARKER);
    let case = |name, packet| Case { name, packet, before: None };
    vec![
        case("UDP", ip.udp(udp, MARKER)),
        case("UDP without checksum", ip.udp_unchecked(udp, MARKER)),
        case("UDP behind options", odd.udp(udp, MARKER)),
        case("TCP with MSS", ip.tcp(tcp, if out { SYN } else { SYN | ACK }, &MSS, MARKER)),
        case("TCP", ip.tcp(tcp, ACK, &[], MARKER)),
        case("echo", ip.echo(out, ECHO, MARKER)),
        case("ICMP error", ip.icmp(unreachable.0, unreachable.1, [0; 4], &about)),
        case("first fragment", first.clone()),
        Case {
            name: "last fragment",
            packet: fragments.fragment(3, false).packet(17, MARKER),
            before: Some(first),
        },
    ]
}

fn mac(net: &NetNs, interface: &str) -> [u8; 6] {
    let text = net.ip(&format!("-o link show dev {interface}"));
    let mut words = text.split_whitespace().skip_while(|word| *word != "link/ether");
    let bytes = words.nth(1).unwrap().split(':').map(|byte| u8::from_str_radix(byte, 16).unwrap());
    bytes.collect::<Vec<_>>().try_into().unwrap()
}

/// Where packets are sent, and where they must arrive.
struct Way<'a> {
    name: &'static str,
    send: Pieces,
    /// Addresses of the Ethernet header: to, from.
    macs: ([u8; 6], [u8; 6]),
    arrive: &'a Arrivals,
    /// Sees packets before our program does.
    other: Option<&'a Other>,
}

impl<'a> Way<'a> {
    fn new(
        name: &'static str,
        (net, interface): (&NetNs, &str),
        to: (&NetNs, &str),
        arrive: &'a Arrivals,
        other: Option<&'a Other>,
    ) -> Self {
        let index = net.ifindex(interface);
        let send = net.run(move || Pieces::new(index));
        Self { name, send, macs: (mac(to.0, to.1), mac(net, interface)), arrive, other }
    }

    fn frame(&self, packet: &[u8]) -> Vec<u8> {
        let mut frame = ethernet(packet);
        frame[..6].copy_from_slice(&self.macs.0);
        frame[6..12].copy_from_slice(&self.macs.1);
        frame
    }

    fn send(&mut self, topology: &Topology, name: &str, packet: &[u8], linear: usize) -> Vec<u8> {
        self.send.send(packet, linear);
        let arrived = self.arrive.next(MARKER);
        arrived.unwrap_or_else(|| {
            unreachable!("{} {name}, {linear} bytes in one piece: lost; {}", self.name, dump(topology))
        })
    }

    /// Sends a packet whole, and cut at each byte, and says how many there were.
    fn run(&mut self, topology: &Topology, case: &Case) -> usize {
        let packet = self.frame(&case.packet);
        let before = case.before.as_ref().map(|packet| self.frame(packet));
        let mut whole = None;
        for linear in (14..=packet.len()).rev() {
            if let Some(before) = &before {
                self.send(topology, case.name, before, before.len());
            }
            let arrived = self.send(topology, case.name, &packet, linear);
            let whole = whole.get_or_insert_with(|| arrived.clone());
            assert_eq!(
                &arrived,
                whole,
                "{} {}, {linear} of {} bytes in one piece",
                self.name,
                case.name,
                packet.len()
            );
            if let Some(other) = self.other {
                assert_eq!(other.seen().linear as usize, linear, "the packet was not as it should be");
            }
        }
        packet.len() - 13
    }
}

fn cut_anywhere(v6: bool) {
    let topology = Topology::new();
    // The stacks at both ends know of none of this, and shall not say so.
    for host in [&topology.client, &topology.external] {
        host.net.exec(
            "nft add table inet coil_test ; \
             add chain inet coil_test c { type filter hook input priority 0 ; } ; \
             add rule inet coil_test c meta l4proto { tcp, udp } drop ; \
             add rule inet coil_test c icmp type echo-request drop ; \
             add rule inet coil_test c icmpv6 type echo-request drop",
        );
    }
    let mode = AttachMode::Clsact;
    let mut options = topology.node_options();
    // As many errors as there are packets.
    options.icmp.rate = 0;
    let node = topology.node.run(move || NodeDatapath::open_with(options, Some(mode)).unwrap());
    let _node = topology.apply(node, &topology.state());
    let _gateway = topology.open_gateway();
    let [ingress, egress] = [true, false].map(|ingress| {
        let other = Other::load(topology.bpffs.root().join(format!("other_{ingress}")));
        drop(other.attach(&topology.node, "vclient", ingress, Place::First, mode));
        other
    });
    let arrivals = |net: &NetNs| {
        let index = net.ifindex("eth0");
        net.run(move || Arrivals::new(index))
    };
    let (at_client, at_world) = (arrivals(&topology.client.net), arrivals(&topology.external.net));
    let [client, gateway, world] =
        [&topology.client, &topology.gateway, &topology.external].map(|host| host.address(v6));
    let (client_end, gateway_end) = ((&topology.client.net, "eth0"), (&topology.gateway.net, "eth0"));
    let (at_node, at_gateway) = ((&topology.node, "vclient"), (&topology.node, "vgateway"));
    let tunnelled = |mut cases: Vec<Case>, from, to| {
        for case in &mut cases {
            case.packet = tunnel(from, to, &case.packet);
            case.before = case.before.take().map(|packet| tunnel(from, to, &packet));
        }
        cases
    };
    // What a router says that has no room for a tunnel.
    let router = Ip::new(if v6 { IpAddr::from(ROUTER_V6) } else { ROUTER_V4.into() }, client);
    let about = tunnel(client, gateway, &Ip::new(client, world).udp(UDP, MARKER));
    let (kind, code) = if v6 { (2, 0) } else { (3, 4) };
    let mut to_pod = tunnelled(packets(world, client, false, 4), gateway, client);
    let too_big = router.icmp(kind, code, [0, 0, 5, 0x78], &about);
    to_pod.push(Case { name: "too big", packet: too_big, before: None });
    let ways = [
        (
            Way::new("from the pod:", client_end, at_node, &at_world, Some(&ingress)),
            packets(client, world, true, 1),
        ),
        (
            Way::new("to the gateway:", at_gateway, gateway_end, &at_world, None),
            tunnelled(packets(client, world, true, 2), client, gateway),
        ),
        (
            Way::new("back to the gateway:", at_gateway, gateway_end, &at_client, None),
            packets(world, gateway, false, 3),
        ),
        (Way::new("to the pod:", at_node, client_end, &at_client, Some(&egress)), to_pod),
    ];
    let (mut sent, mut last) = (0, 0);
    for (mut way, cases) in ways {
        for case in cases {
            last = way.run(&topology, &case);
            sent += last;
        }
    }
    println!("{sent} packets");
    // The last of all: another takes its place.
    let replaced = [(DropReason::UnderlayTooBig.name(), last as u64)];
    assert_eq!(maps::all_drops(&topology.bpffs.node()), replaced);
    assert_eq!(maps::all_drops(&topology.gateway_pins()), []);
}

#[test]
#[ignore = "privileged: needs root and the eBPF object"]
fn headers_cut_anywhere_v4() {
    cut_anywhere(false);
}

#[test]
#[ignore = "privileged: needs root and the eBPF object"]
fn headers_cut_anywhere_v6() {
    cut_anywhere(true);
}
