//! Tunnels without UDP, and changing from one kind to the other.

#![expect(clippy::unwrap_used, reason = "tests")]

use std::net::{IpAddr, SocketAddr, TcpStream, UdpSocket};

use coil_agent::datapath::{Datapath, NodeDatapath, TunnelKind};
use coil_agent::gateway::datapath::GatewayOptions;
use coil_common::keys::{FlowKey4, FlowKey6};
use coil_common::names::{MAP_NAT_FORWARD_V4, MAP_NAT_FORWARD_V6, MAP_NAT_REVERSE_V4, MAP_NAT_REVERSE_V6};
use coil_common::stats::DropReason;
use coil_common::values::{NatValue4, NatValue6, STATE_ENCAP, STATE_IPIP};
use nix::sys::socket::{setsockopt, sockopt::UdpGsoSegment};

use crate::restart::Transfer;
use crate::support::net::NetNs;
use crate::support::topology::{GATEWAY_UID, Topology};
use crate::support::{DEADLINE, maps, wait_for};
use crate::traffic::{dump, echo_server, everything_works, offloads, pattern, send_tcp, udp_peer};

/// By what clients have been heard last, of all halves of all translations.
pub(crate) fn noted(topology: &Topology) -> Vec<u32> {
    let pins = topology.gateway_pins();
    let v4 = [MAP_NAT_FORWARD_V4, MAP_NAT_REVERSE_V4]
        .into_iter()
        .flat_map(|map| maps::entries::<FlowKey4, NatValue4>(&pins, map))
        .map(|(_, value)| value.state);
    let v6 = [MAP_NAT_FORWARD_V6, MAP_NAT_REVERSE_V6]
        .into_iter()
        .flat_map(|map| maps::entries::<FlowKey6, NatValue6>(&pins, map))
        .map(|(_, value)| value.state);
    v4.chain(v6).map(|state| state & STATE_ENCAP).collect()
}

fn traffic(topology: &Topology) {
    everything_works(topology, None);
    let noted = noted(topology);
    assert!(noted.len() >= 12 && noted.iter().all(|encap| *encap == STATE_IPIP), "{noted:x?}");
}

#[test]
#[ignore = "privileged: needs root and the eBPF object"]
fn traffic_goes_by_ip_in_ip() {
    traffic(&Topology::new().by(TunnelKind::Ipip));
}

#[test]
#[ignore = "privileged: needs root and the eBPF object"]
fn traffic_goes_by_ip_in_ip_across_nodes() {
    traffic(&Topology::across().by(TunnelKind::Ipip));
}

#[test]
#[ignore = "privileged: needs root and the eBPF object"]
fn bytes_are_exact_by_ip_in_ip() {
    offloads(&Topology::new().by(TunnelKind::Ipip));
}

#[test]
#[ignore = "privileged: needs root and the eBPF object"]
fn bytes_are_exact_by_ip_in_ip_across_nodes() {
    offloads(&Topology::across().by(TunnelKind::Ipip));
}

/// Datagrams that leave in one piece of 20 and arrive one by one, there and back.
pub(crate) fn many_datagrams_at_once(topology: &Topology, redirect_peer: bool) {
    const SIZE: usize = 1000;
    const COUNT: usize = 20;
    let what = format!("{:?}, far: {}, redirect: {redirect_peer}", topology.tunnel, topology.far.is_some());
    let _node = topology.apply(topology.open_node(None), &topology.state());
    let options = GatewayOptions { redirect_peer, ..topology.gateway_options() };
    let _gateway = topology.open_gateway_with(options);
    if let Some(far) = &topology.far {
        // What the agent of that node would do.
        far.exec("ethtool -K vgateway tx-udp-segmentation off");
    }
    for v6 in [false, true] {
        let address = topology.external.address(v6);
        let (sender, receiver) = std::sync::mpsc::channel();
        let server = topology.external.net.spawn(move || {
            let socket = UdpSocket::bind((address, 0)).unwrap();
            socket.set_read_timeout(Some(DEADLINE)).unwrap();
            sender.send(socket.local_addr().unwrap()).unwrap();
            let mut all: Vec<u8> = Vec::new();
            let mut buffer = vec![0; 65536];
            let mut to = None;
            for _ in 0..COUNT {
                // What is missing is told with what the datapath has counted.
                let Ok((count, peer)) = socket.recv_from(&mut buffer) else { return all };
                assert_eq!(count, SIZE);
                all.extend(&buffer[..count]);
                to = Some(peer);
            }
            setsockopt(&socket, UdpGsoSegment, &i32::try_from(SIZE).unwrap()).unwrap();
            socket.send_to(&all, to.unwrap()).unwrap();
            all
        });
        let to = receiver.recv().unwrap();
        let sent = pattern(SIZE * COUNT);
        let bytes = sent.clone();
        let back = topology.client.net.run(move || {
            let any: IpAddr = if v6 { "::".parse().unwrap() } else { "0.0.0.0".parse().unwrap() };
            let socket = UdpSocket::bind((any, 0)).unwrap();
            socket.set_read_timeout(Some(DEADLINE)).unwrap();
            setsockopt(&socket, UdpGsoSegment, &i32::try_from(SIZE).unwrap()).unwrap();
            socket.send_to(&bytes, to).unwrap();
            let mut all: Vec<u8> = Vec::new();
            let mut buffer = vec![0; 65536];
            for _ in 0..COUNT {
                let Ok((count, _)) = socket.recv_from(&mut buffer) else { return all };
                assert_eq!(count, SIZE);
                all.extend(&buffer[..count]);
            }
            all
        });
        let there = server.join().unwrap();
        assert!(
            there == sent && back == sent,
            "{what}, v6: {v6}, there: {} bytes, back: {}; {}",
            there.len(),
            back.len(),
            dump(topology)
        );
    }
}

/// On one node and on two, by either tunnel, by either way from the gateway.
pub(crate) fn ways() -> impl Iterator<Item = (Topology, bool)> {
    (0..8_u8).map(|way| {
        let topology = if way & 1 == 0 { Topology::new() } else { Topology::across() };
        let kind = if way & 2 == 0 { TunnelKind::Ipip } else { TunnelKind::Fou };
        (topology.by(kind), way & 4 != 0)
    })
}

#[test]
#[ignore = "privileged: needs root and the eBPF object"]
fn many_datagrams_at_once_go_by_ip_in_ip() {
    for (topology, redirect) in ways().filter(|(topology, _)| topology.tunnel == TunnelKind::Ipip) {
        many_datagrams_at_once(&topology, redirect);
    }
}

#[test]
#[ignore = "privileged: needs root and the eBPF object"]
fn many_datagrams_at_once_go_by_fou() {
    for (topology, redirect) in ways().filter(|(topology, _)| topology.tunnel == TunnelKind::Fou) {
        many_datagrams_at_once(&topology, redirect);
    }
}

/// Between nodes whose network card takes nothing but whole packets, with every kernel.
#[test]
#[ignore = "privileged: needs root and the eBPF object"]
fn many_datagrams_at_once_are_cut_where_the_node_ends() {
    for (topology, redirect) in ways() {
        let Some(far) = &topology.far else { continue };
        for (net, card) in [(&topology.node, "vfar"), (far, "vnear")] {
            net.exec(&format!("ethtool -K {card} tx-udp-segmentation off tx-udp_tnl-segmentation off"));
        }
        many_datagrams_at_once(&topology, redirect);
    }
}

/// What is cut by its sender, as docs/compatibility.md says to do where the other way loses something, arrives on
/// every way and with every kernel.
#[test]
#[ignore = "privileged: needs root and the eBPF object"]
fn datagrams_cut_by_their_sender_go_every_way() {
    for (topology, redirect) in ways() {
        for pod in [&topology.client, &topology.external] {
            pod.net.exec("ethtool -K eth0 tx-udp-segmentation off");
        }
        many_datagrams_at_once(&topology, redirect);
    }
}

/// What an interface does with datagrams in one piece.
fn takes_pieces(net: &NetNs, interface: &str) -> bool {
    let features = net.exec(&format!("ethtool -k {interface}"));
    let mut lines = features.lines().map(str::trim);
    lines.find_map(|line| line.strip_prefix("tx-udp-segmentation: ")).unwrap().starts_with("on")
}

/// Where nothing cuts datagrams before the tunnel is taken off, they are dropped there and counted: here such as are
/// too short for the datapath to have them cut, so that only the interfaces of the egress pod do, if they are left to.
#[test]
#[ignore = "privileged: needs root and the eBPF object"]
fn datagrams_that_nobody_cuts_are_counted() {
    const SIZE: usize = 8;
    let topology = Topology::new();
    let mut state = topology.state();
    let mut node = topology.apply(topology.open_node(None), &state);
    let mut gateway = Some(topology.open_gateway());
    let (at_node, in_pod) = (&topology.node, &topology.gateway.net);
    assert!(!takes_pieces(at_node, "vgateway") && !takes_pieces(in_pod, "eth0"));
    assert!(takes_pieces(at_node, "vclient") && takes_pieces(&topology.client.net, "eth0"));
    let uncut = |pins| maps::drops(pins, DropReason::UncutDatagrams);
    let (node_pins, gateway_pins) = (topology.bpffs.node(), topology.gateway_pins());
    for v6 in [false, true] {
        let (client, server) = [&topology.client, &topology.external]
            .map(|host| {
                let address = host.address(v6);
                let socket = host.net.run(move || UdpSocket::bind((address, 0)).unwrap());
                socket.set_read_timeout(Some(DEADLINE)).unwrap();
                setsockopt(&socket, UdpGsoSegment, &i32::try_from(SIZE).unwrap()).unwrap();
                socket
            })
            .into();
        let to = server.local_addr().unwrap();
        let mut buffer = [0; 100];
        let mut both_arrive = |socket: &UdpSocket| {
            let mut from = None;
            for byte in [1, 2] {
                let (count, sender) = socket.recv_from(&mut buffer).unwrap();
                assert_eq!(buffer[..count], [byte; SIZE]);
                from = Some(sender);
            }
            from.unwrap()
        };
        let two = [[1; SIZE], [2; SIZE]].concat();
        client.send_to(&two, to).unwrap();
        let from = both_arrive(&server);
        server.send_to(&two, from).unwrap();
        both_arrive(&client);

        at_node.exec("ethtool -K vgateway tx-udp-segmentation on");
        in_pod.exec("ethtool -K eth0 tx-udp-segmentation on");
        let before = (uncut(&node_pins), uncut(&gateway_pins));
        server.send_to(&two, from).unwrap();
        wait_for("the drop at the client", || (uncut(&node_pins) > before.0).then_some(()));
        client.send_to(&two, to).unwrap();
        wait_for("the drop at the gateway", || (uncut(&gateway_pins) > before.1).then_some(()));

        // Whoever looks again mends it.
        node.resync();
        node = topology.apply(node, &state);
        drop(gateway.take());
        gateway = Some(topology.open_gateway());
        assert!(!takes_pieces(at_node, "vgateway") && !takes_pieces(in_pod, "eth0"));
        client.send_to(&two, to).unwrap();
        server.send_to(&two, both_arrive(&server)).unwrap();
        both_arrive(&client);
    }
    // One that is told of later: the interface is another pod's by then.
    at_node.exec("ethtool -K vgateway tx-udp-segmentation on");
    let pod = state.pods.remove(GATEWAY_UID).unwrap();
    node = topology.apply(node, &state);
    assert!(takes_pieces(at_node, "vgateway"));
    state.pods.insert("another-uid".into(), pod);
    let _node = topology.apply(node, &state);
    assert!(!takes_pieces(at_node, "vgateway"));
}

/// Streams that were in a tunnel keep its mark when they leave for the world. A card that cuts no tunnels gets them cut
/// where they are now: as `ethtool` makes one that would believe the mark.
#[test]
#[ignore = "privileged: needs root and the eBPF object"]
fn a_card_that_cuts_no_tunnels_gets_what_was_in_one_cut() {
    const LENGTH: usize = 2 << 20;
    let topology = Topology::new();
    let _node = topology.apply(topology.open_node(None), &topology.state());
    let _gateway = topology.open_gateway();
    let sent = pattern(LENGTH);
    let card = |features: &str| topology.node.exec(&format!("ethtool -K vexternal {features}"));
    let packets = || -> usize {
        let path = "/sys/class/net/eth0/statistics/rx_packets";
        topology.external.net.exec(&format!("cat {path}")).trim().parse().unwrap()
    };
    let exchanged = |v6| {
        let before = packets();
        let (address, server) = echo_server(&topology, v6);
        let back = send_tcp(&topology, address, sent.clone());
        let (peer, arrived) = server.join().unwrap();
        assert_eq!(peer.ip(), topology.gateway.address(v6));
        assert!(arrived == sent && back == sent, "v6: {v6}; {}", dump(&topology));
        packets() - before
    };
    for v6 in [false, true] {
        card("tx-udp_tnl-segmentation off tx-udp_tnl-csum-segmentation off");
        assert!(exchanged(v6) > LENGTH / 1500, "v6: {v6}: not cut");
        card("tx-udp_tnl-segmentation on tx-udp_tnl-csum-segmentation on");
        assert!(exchanged(v6) < LENGTH / 1500, "v6: {v6}: cut by somebody else");
    }
}

#[test]
#[ignore = "privileged: needs root and the eBPF object"]
fn eight_bytes_more_fit_by_ip_in_ip() {
    let topology = Topology::new().by(TunnelKind::Ipip);
    let _node = topology.apply(topology.open_node(None), &topology.state());
    let _gateway = topology.open_gateway();
    for v6 in [false, true] {
        let (family, header, mtu) = if v6 { ("-6", 48, 1460) } else { ("-4", 28, 1480) };
        let external = topology.external.address(v6);
        assert!(udp_peer(&topology, v6, mtu - header).is_some(), "{}", dump(&topology));
        assert_eq!(udp_peer(&topology, v6, mtu - header + 1), None);
        wait_for("the client's path MTU", || {
            let route = topology.client.net.ip(&format!("{family} route get {external}"));
            route.contains(&format!("mtu {mtu}")).then_some(())
        });
    }
    assert_eq!(maps::drops(&topology.bpffs.node(), DropReason::TooBig), 2);
}

fn reopen(topology: &mut Topology, node: NodeDatapath, tunnel: TunnelKind) -> NodeDatapath {
    drop(node);
    topology.tunnel = tunnel;
    topology.apply(topology.open_node(None), &topology.state())
}

/// A connection that lives while its node changes the tunnel, and back again, and loses nothing.
#[test]
#[ignore = "privileged: needs root and the eBPF object"]
fn a_transfer_survives_a_change_of_tunnels() {
    for mut topology in [Topology::new(), Topology::across()] {
        let mut node = topology.apply(topology.open_node(None), &topology.state());
        let gateway = topology.open_gateway();
        for v6 in [false, true] {
            let (address, server): (SocketAddr, _) = echo_server(&topology, v6);
            let stream =
                topology.client.net.run(move || TcpStream::connect_timeout(&address, DEADLINE).unwrap());
            stream.set_read_timeout(Some(DEADLINE)).unwrap();
            let mut transfer = Transfer { stream, sent: Vec::new() };
            for (tunnel, encap) in [(TunnelKind::Ipip, STATE_IPIP), (TunnelKind::Fou, 0)] {
                let (still, now) = std::thread::scope(|scope| {
                    let busy = scope.spawn(move || {
                        transfer.step(8 << 20);
                        transfer
                    });
                    let node = reopen(&mut topology, node, tunnel);
                    (busy.join().unwrap(), node)
                });
                (transfer, node) = (still, now);
                transfer.step(1 << 20);
                let noted = noted(&topology);
                let flow = if v6 { &noted[noted.len() - 2..] } else { &noted[..2] };
                assert_eq!(flow, [encap; 2], "{tunnel:?}, v6: {v6}");
            }
            transfer.stream.shutdown(std::net::Shutdown::Write).unwrap();
            let (peer, arrived) = server.join().unwrap();
            assert_eq!(peer.ip(), topology.gateway.address(v6));
            assert!(arrived == transfer.sent);
        }
        assert_eq!(maps::all_drops(&topology.bpffs.node()), []);
        assert_eq!(maps::all_drops(&topology.gateway_pins()), [], "{}", dump(&topology));
        drop((node, gateway));
    }
}

/// A pod has a tunnel of its own. What it leaves to be summed or cut inside that cannot be put into another one: it is
/// refused and counted. What the pod's own device finishes goes through, and others notice neither.
#[test]
#[ignore = "privileged: needs root and the eBPF object"]
fn a_tunnel_of_a_pod_goes_through_if_nothing_in_it_is_left_to_do() {
    const COUNT: usize = 20;
    for kind in [TunnelKind::Fou, TunnelKind::Ipip] {
        let topology = Topology::new().by(kind);
        let _node = topology.apply(topology.open_node(None), &topology.state());
        let _gateway = topology.open_gateway();
        let (pod, world) = (&topology.client, &topology.external);
        for (host, number, remote) in [(pod, 1, format!("remote {}", world.ipv4)), (world, 2, String::new())]
        {
            host.net.ip_batch(
                "",
                &[
                    format!(
                        "link add vx0 address 02:00:00:00:07:0{number} mtu 1300 type vxlan id 7 dstport 4789 {remote}"
                    ),
                    format!("address add 10.99.0.{number}/24 dev vx0"),
                    "link set vx0 up".into(),
                    // Answers would have to come to the gateway's own port 4789: the way there is enough here.
                    format!("neighbour add 10.99.0.{0} lladdr 02:00:00:00:07:0{0} dev vx0", 3 - number),
                ],
            );
        }
        let receiver = world.net.run(|| UdpSocket::bind("10.99.0.2:9000").unwrap());
        let sender = pod.net.run(|| UdpSocket::bind("10.99.0.1:0").unwrap());
        sender.connect("10.99.0.2:9000").unwrap();
        let refused = || maps::drops(&topology.bpffs.node(), DropReason::AlreadyEncapsulated);

        sender.send(b"left to be summed").unwrap();
        wait_for("the refusal", || (refused() > 0).then_some(()));
        let before = refused();
        pod.net.exec("ethtool -K vx0 tx off");
        receiver.set_read_timeout(Some(DEADLINE)).unwrap();
        let mut buffer = [0; 2000];
        for number in 0..COUNT {
            let sent = pattern(1000 + number);
            sender.send(&sent).unwrap();
            let got = receiver.recv(&mut buffer);
            assert_eq!(got.as_ref().ok(), Some(&sent.len()), "{kind:?}: {got:?}; {}", dump(&topology));
            assert!(buffer[..sent.len()] == sent[..]);
        }
        assert_eq!(refused(), before, "{kind:?}");
        assert!(udp_peer(&topology, false, 1200).is_some() && udp_peer(&topology, true, 1200).is_some());
    }
}
