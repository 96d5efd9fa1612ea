//! Client and gateway on one node, without a tunnel between them.

#![expect(clippy::unwrap_used, reason = "tests")]

use std::net::{IpAddr, SocketAddr, TcpStream, UdpSocket};

use coil_agent::datapath::TunnelKind;
use coil_common::stats::DropReason;
use coil_common::values::{STATE_DIRECT, STATE_IPIP};

use crate::restart::Transfer;
use crate::support::topology::Topology;
use crate::support::{DEADLINE, maps, wait_for};
use crate::traffic::{dump, echo_server, everything_works, offloads, udp_peer};
use crate::tunnel::noted;

fn near(tunnel: TunnelKind) -> Topology {
    let mut topology = Topology::new().by(tunnel);
    topology.bypass = true;
    topology
}

/// All that works by the tunnel works, and packets and bytes are counted alike at both ends.
#[test]
#[ignore = "privileged: needs root and the eBPF object"]
fn traffic_needs_no_tunnel_inside_a_node() {
    for tunnel in [TunnelKind::Fou, TunnelKind::Ipip] {
        let topology = near(tunnel);
        everything_works(&topology, None);
        // Connections that have ended have done so by the tunnel: the bypass is for data.
        let seen = noted(&topology);
        assert!(seen.len() >= 12, "{seen:x?}");
    }
}

#[test]
#[ignore = "privileged: needs root and the eBPF object"]
fn bytes_are_exact_without_a_tunnel() {
    offloads(&near(TunnelKind::Fou));
}

/// What is on its way by the tunnel is counted by the packet filter of the node, which sees nothing else.
fn tunnelled(topology: &Topology) -> u64 {
    let text = topology.node.exec("nft list counter inet coil_test tunnelled");
    let mut words = text.split_whitespace().skip_while(|word| *word != "packets");
    words.nth(1).unwrap().parse().unwrap()
}

/// A connection that goes on while the agent is told to use the bypass, the tunnel, another tunnel, and the bypass.
#[test]
#[ignore = "privileged: needs root and the eBPF object"]
fn a_transfer_survives_a_change_of_the_bypass() {
    let mut topology = Topology::new();
    topology.node.exec(
        "nft add table inet coil_test ; add counter inet coil_test tunnelled ; \
         add chain inet coil_test c { type filter hook forward priority 0 ; } ; \
         add rule inet coil_test c udp dport 5555 counter name tunnelled ; \
         add rule inet coil_test c meta l4proto { 4, 41 } counter name tunnelled",
    );
    let mut node = topology.apply(topology.open_node(None), &topology.state());
    let gateway = topology.open_gateway();
    let spoofed = |topology: &Topology| maps::drops(&topology.bpffs.node(), DropReason::SpoofedSource);
    let mut under_way = 0;
    for v6 in [false, true] {
        let (address, server): (SocketAddr, _) = echo_server(&topology, v6);
        let stream = topology.client.net.run(move || TcpStream::connect_timeout(&address, DEADLINE).unwrap());
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        let mut transfer = Transfer { stream, sent: Vec::new() };
        for (bypass, tunnel, encap) in [
            (true, TunnelKind::Fou, STATE_DIRECT),
            (false, TunnelKind::Fou, 0),
            (true, TunnelKind::Ipip, STATE_DIRECT),
            (false, TunnelKind::Ipip, STATE_IPIP),
            (true, TunnelKind::Fou, STATE_DIRECT),
        ] {
            let (still, now) = std::thread::scope(|scope| {
                let busy = scope.spawn(move || {
                    transfer.step(8 << 20);
                    transfer
                });
                drop(node);
                (topology.bypass, topology.tunnel) = (bypass, tunnel);
                let node = topology.apply(topology.open_node(None), &topology.state());
                (busy.join().unwrap(), node)
            });
            (transfer, node) = (still, now);
            transfer.step(1 << 20);
            // Answers that were under way without a tunnel when the node ceased to take them; on a slow machine some
            // are. None in any other step, and none once the change is over.
            if !bypass {
                under_way = spoofed(&topology);
            }
            let before = tunnelled(&topology);
            transfer.step(1 << 20);
            let by_tunnel = tunnelled(&topology) - before;
            assert_eq!(
                by_tunnel == 0,
                bypass,
                "{by_tunnel} packets by a tunnel, {bypass} {tunnel:?}, v6: {v6}"
            );
            assert_eq!(spoofed(&topology), under_way, "{bypass} {tunnel:?}, v6: {v6}");
            let noted = noted(&topology);
            let flow = if v6 { &noted[noted.len() - 2..] } else { &noted[..2] };
            // Beside the bypass the tunnel stays noted that was used before.
            let known = flow.iter().map(|noted| if bypass { noted & STATE_DIRECT } else { *noted });
            assert_eq!(known.collect::<Vec<_>>(), [encap; 2], "{bypass} {tunnel:?}, v6: {v6}");
        }
        transfer.stream.shutdown(std::net::Shutdown::Write).unwrap();
        let (peer, arrived) = server.join().unwrap();
        assert_eq!(peer.ip(), topology.gateway.address(v6));
        assert!(arrived == transfer.sent);
    }
    let mut drops = maps::all_drops(&topology.bpffs.node());
    drops.retain(|(reason, _)| *reason != "spoofed_source");
    assert_eq!(drops, []);
    assert_eq!(maps::all_drops(&topology.gateway_pins()), [], "{}", dump(&topology));
    drop((node, gateway));
}

/// Whatever else comes to the gateway's interface, with a client's address or any other, never gets to the gateway.
#[test]
#[ignore = "privileged: needs root and the eBPF object"]
fn nobody_else_gets_in() {
    let topology = near(TunnelKind::Fou);
    let _node = topology.apply(topology.open_node(None), &topology.state());
    let _gateway = topology.open_gateway();
    assert!(udp_peer(&topology, false, 100).is_some());
    // As if somebody routed to the gateway what is for others.
    topology.node.ip("route add 198.51.100.0/24 via 10.2.0.2");
    topology.node.ip("-6 route add 2001:db8:51::/64 via fd00:2::2");
    for to in ["198.51.100.9:9", "[2001:db8:51::9]:9"] {
        let to: SocketAddr = to.parse().unwrap();
        let from = topology.external.address(to.is_ipv6());
        let dropped = || maps::drops(&topology.bpffs.node(), DropReason::NotForGateway);
        let before = dropped();
        topology.external.net.run(move || {
            UdpSocket::bind(SocketAddr::new(from, 0)).unwrap().send_to(b"x", to).unwrap();
        });
        wait_for("the stray packet's drop", || (dropped() > before).then_some(()));
    }
    // The gateway cannot speak to who is no client of its: nothing arrives, as without the bypass.
    let victim: IpAddr = topology.external.address(false);
    topology.gateway.net.ip("address add 203.0.113.77/32 dev lo");
    let before = maps::drops(&topology.bpffs.node(), DropReason::SpoofedSource);
    topology.gateway.net.run(move || {
        UdpSocket::bind("203.0.113.77:0").unwrap().send_to(b"x", (victim, 9)).unwrap();
    });
    wait_for("the forged packet's drop", || {
        (maps::drops(&topology.bpffs.node(), DropReason::SpoofedSource) > before).then_some(())
    });
}
