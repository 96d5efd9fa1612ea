//! The way past the node's IP stack: what it carries, and what of the stack it respects.

#![expect(clippy::unwrap_used, reason = "tests")]

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::time::Duration;

use coil_agent::datapath::{Datapath, NodeDatapath};
use coil_agent::gateway::datapath::GatewayDatapath;
use coil_common::names::MAP_EGRESS_STATS;
use coil_common::stats::{Direction, egress_stat};

use crate::support::topology::Topology;
use crate::support::{maps, wait_for};
use crate::traffic::{dump, echo_server, pattern, send_tcp, udp_peer};

/// Node and gateway with the shortcut.
fn open(topology: &Topology) -> (NodeDatapath, GatewayDatapath) {
    let mut options = topology.node_options();
    options.shortcut = true;
    let state = topology.state();
    let node = topology.node.run(move || {
        let mut node = NodeDatapath::open(options).unwrap();
        let report = node.apply(&state).unwrap();
        assert!(report.failed.is_empty(), "{:?}", report.failed);
        node
    });
    (node, topology.open_gateway())
}

/// Has the node's stack count tunnelled packets of the client: between nodes replies come from outside,
/// where no program of ours sees them before the stack.
fn count_tunnelled(topology: &Topology) {
    for (command, v6) in [("iptables", false), ("ip6tables", true)] {
        let client = topology.client.address(v6);
        topology.node.exec(&format!("{command} -A FORWARD -s {client} -p udp --dport 5555"));
    }
}

/// Tunnelled packets that the node's stack has counted.
fn counted(topology: &Topology, v6: bool) -> u64 {
    let command = if v6 { "ip6tables" } else { "iptables" };
    let text = topology.node.exec(&format!("{command} -nvxL FORWARD"));
    let line = text.lines().find(|line| line.contains("dpt:5555")).unwrap();
    line.split_whitespace().next().unwrap().parse().unwrap()
}

/// A flow of datagrams that the world echoes.
struct Flow {
    socket: UdpSocket,
}

impl Flow {
    fn new(topology: &Topology, v6: bool) -> Self {
        let address = topology.external.address(v6);
        let (sender, receiver) = std::sync::mpsc::channel();
        // Ends with the process.
        drop(topology.external.net.spawn(move || {
            let socket = UdpSocket::bind((address, 0)).unwrap();
            sender.send(socket.local_addr().unwrap()).unwrap();
            let mut buffer = vec![0; 2048];
            while let Ok((count, peer)) = socket.recv_from(&mut buffer) {
                // A peer that is gone answers by an error.
                if socket.send_to(&buffer[..count], peer).is_err() {}
            }
        }));
        let server: SocketAddr = receiver.recv().unwrap();
        let socket = topology.client.net.run(move || {
            let any: IpAddr = if v6 { "::".parse().unwrap() } else { "0.0.0.0".parse().unwrap() };
            let socket = UdpSocket::bind((any, 0)).unwrap();
            socket.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
            socket.connect(server).unwrap();
            socket
        });
        Self { socket }
    }

    /// One datagram there and back.
    fn echo(&self, size: usize) -> bool {
        let bytes = pattern(size);
        let mut buffer = vec![0; 2048];
        if self.socket.send(&bytes).is_err() {
            return false;
        }
        self.socket.recv(&mut buffer).is_ok_and(|count| buffer[..count] == bytes)
    }

    fn works(&self, topology: &Topology) {
        let works = || self.echo(100).then_some(());
        wait_for(&format!("an echo; {}", dump(topology)), works);
    }
}

fn carries(topology: &Topology) {
    let _datapath = open(topology);
    count_tunnelled(topology);
    for v6 in [false, true] {
        let gateway = topology.gateway.address(v6);
        assert_eq!(udp_peer(topology, v6, 1200).map(|peer| peer.ip()), Some(gateway), "{}", dump(topology));
        let (address, server) = echo_server(topology, v6);
        let sent = pattern(8 << 20);
        let back = send_tcp(topology, address, sent.clone());
        let (peer, arrived) = server.join().unwrap();
        assert_eq!(peer.ip(), gateway);
        assert!(arrived == sent && back == sent, "bytes were changed on their way");

        let flow = Flow::new(topology, v6);
        flow.works(topology);
        let sent = || {
            let index = egress_stat(u32::from(v6), Direction::Tx);
            maps::counter(&topology.bpffs.node(), MAP_EGRESS_STATS, index).packets
        };
        let (seen, before) = (counted(topology, v6), sent());
        for _ in 0..3000 {
            flow.socket.send(&[7; 100]).unwrap();
        }
        flow.works(topology);
        let (by_stack, all) = (counted(topology, v6) - seen, sent() - before);
        assert!(all >= 3000, "{all} packets were tunnelled");
        assert!(by_stack < all / 2, "{by_stack} of {all} tunnelled packets went through the stack");
        assert!(by_stack > 0, "the stack must see some of every flow");
    }
    assert_eq!(maps::all_drops(&topology.bpffs.node()), []);
    assert_eq!(maps::all_drops(&topology.gateway_pins()), []);
}

#[test]
#[ignore = "privileged: needs root and the eBPF object"]
fn tunnelled_packets_pass_the_stack_by() {
    carries(&Topology::new());
}

#[test]
#[ignore = "privileged: needs root and the eBPF object"]
fn tunnelled_packets_pass_the_stack_by_between_nodes() {
    carries(&Topology::across());
}

#[test]
#[ignore = "privileged: needs root and the eBPF object"]
fn transfers_without_offloads_are_exact() {
    let topology = Topology::across();
    for (space, device) in [(&topology.client.net, "eth0"), (&topology.external.net, "eth0")] {
        space.exec(&format!("ethtool -K {device} tso off gso off gro off tx off"));
    }
    topology.node.exec("ethtool -K vfar tso off gso off gro off tx off");
    let _datapath = open(&topology);
    for v6 in [false, true] {
        let (address, server) = echo_server(&topology, v6);
        let sent = pattern(1 << 20);
        let back = send_tcp(&topology, address, sent.clone());
        let (_, arrived) = server.join().unwrap();
        assert!(arrived == sent && back == sent, "bytes were changed on their way");
    }
}

/// What stops forwarding by the stack stops the shortcut too, within a tick, and so does what starts it.
#[test]
#[ignore = "privileged: needs root and the eBPF object"]
fn routes_neighbours_and_forwarding_are_respected() {
    let topology = Topology::across();
    let _datapath = open(&topology);
    for v6 in [false, true] {
        let flow = Flow::new(&topology, v6);
        flow.works(&topology);
        let stops = |what: &str| {
            let stopped = || (!flow.echo(100)).then_some(());
            wait_for(&format!("{what} to stop the flow"), stopped);
            assert!(!flow.echo(100), "{what}: only some packets stop");
        };
        let (family, next, net, device) = if v6 {
            (6, "fd00:f::2", "fd00:2::/64", "ipv6.conf.all")
        } else {
            (4, "172.16.0.2", "10.2.0.0/24", "ipv4.conf.vclient")
        };

        topology.node.ip(&format!("-{family} route replace blackhole {net}"));
        stops("a black hole");
        if v6 {
            topology.node.ip(&format!("-6 route del blackhole {net}"));
        }
        topology.node.ip(&format!("-{family} route replace {net} via {next}"));
        flow.works(&topology);

        topology.node.sysctl(&format!("net.{device}.forwarding"), "0");
        stops("a node that does not forward");
        topology.node.sysctl(&format!("net.{device}.forwarding"), "1");
        flow.works(&topology);

        // A route by which large packets do not fit is left to the stack, which refuses them.
        assert!(flow.echo(1300), "a large packet");
        topology.node.ip(&format!("-{family} route replace {net} via {next} mtu 1290"));
        let stopped = || (!flow.echo(1300)).then_some(());
        wait_for("the MTU of a route to matter", stopped);
        flow.works(&topology);
        topology.node.ip(&format!("-{family} route replace {net} via {next}"));

        // The stack finds the neighbour again, and no packet waits for longer than that.
        flow.works(&topology);
        for _ in 0..5 {
            topology.node.ip(&format!("-{family} neighbour flush to {next}"));
            flow.works(&topology);
        }
    }
}

/// A filter that refuses tunnelled packets is not got round by repeating them.
#[test]
#[ignore = "privileged: needs root and the eBPF object"]
fn flows_that_filters_refuse_never_pass() {
    let topology = Topology::across();
    for command in ["iptables", "ip6tables"] {
        topology.node.exec(&format!("{command} -A FORWARD -p udp --dport 5555 -j DROP"));
    }
    let _datapath = open(&topology);
    for v6 in [false, true] {
        let flow = Flow::new(&topology, v6);
        for _ in 0..5 {
            flow.socket.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
            assert!(!flow.echo(100), "a packet has passed the filter");
        }
    }
    for command in ["iptables", "ip6tables"] {
        topology.node.exec(&format!("{command} -F FORWARD"));
    }
    for v6 in [false, true] {
        Flow::new(&topology, v6).works(&topology);
    }
}
