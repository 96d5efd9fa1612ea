//! TCP connections of which a gateway has lost everything, and picks them up where it is told to.

#![expect(clippy::unwrap_used, reason = "tests")]

use std::io::{ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};

use coil_agent::datapath::NodeDatapath;
use coil_agent::gateway::datapath::GatewayDatapath;
use coil_common::names::{MAP_NAT_FORWARD_V4, MAP_NAT_FORWARD_V6, MAP_NAT_REVERSE_V4, MAP_NAT_REVERSE_V6};

use crate::support::DEADLINE;
use crate::support::raw::RawMap;
use crate::support::topology::Topology;

/// A connection between pod and world, through a gateway that picks up.
struct World {
    topology: Topology,
    _node: NodeDatapath,
    _gateway: GatewayDatapath,
    pod: TcpStream,
    remote: TcpStream,
    forward: RawMap,
    reverse: RawMap,
}

impl World {
    fn new(v6: bool) -> Self {
        let topology = Topology::new();
        let mut options = topology.gateway_options();
        options.pick_up = true;
        let gateway = topology.open_gateway_with(options);
        let address = topology.external.address(v6);
        let listener = topology.external.net.run(move || TcpListener::bind((address, 0)).unwrap());
        let server = listener.local_addr().unwrap();
        let node = topology.apply(topology.open_node(None), &topology.state());
        let pod = topology.client.net.run(move || TcpStream::connect_timeout(&server, DEADLINE).unwrap());
        let (remote, _) = listener.accept().unwrap();
        for stream in [&pod, &remote] {
            stream.set_read_timeout(Some(DEADLINE)).unwrap();
        }
        let [forward, reverse] = if v6 {
            [MAP_NAT_FORWARD_V6, MAP_NAT_REVERSE_V6]
        } else {
            [MAP_NAT_FORWARD_V4, MAP_NAT_REVERSE_V4]
        }
        .map(|map| RawMap::open(&topology.gateway_pins(), map));
        let mut world = Self { topology, _node: node, _gateway: gateway, pod, remote, forward, reverse };
        world.exchange();
        assert_eq!((world.forward.keys().len(), world.reverse.keys().len()), (1, 1));
        world
    }

    fn exchange(&mut self) {
        let mut buffer = [0; 4];
        self.pod.write_all(b"ping").unwrap();
        self.remote.read_exact(&mut buffer).unwrap();
        assert_eq!(&buffer, b"ping");
        self.remote.write_all(b"pong").unwrap();
        self.pod.read_exact(&mut buffer).unwrap();
        assert_eq!(&buffer, b"pong");
    }
}

/// Where the gateway has the same address, the connection goes on.
fn goes_on(v6: bool) {
    let mut world = World::new(v6);
    for _ in 0..3 {
        world.forward.keys().iter().for_each(|key| world.forward.clear(key));
        world.reverse.keys().iter().for_each(|key| world.reverse.clear(key));
        world.exchange();
        assert_eq!((world.forward.keys().len(), world.reverse.keys().len()), (1, 1));
    }
}

/// Where what the world sees is another one, the remote host says so, and the pod knows at once.
fn is_reset(v6: bool) {
    let mut world = World::new(v6);
    world.forward.keys().iter().for_each(|key| world.forward.clear(key));
    for (key, mut value) in world.reverse.entries() {
        // The port belongs to another client now: the first byte of its address differs.
        value[0] ^= 1;
        world.reverse.set(&key, &value);
    }
    world.pod.write_all(b"ping").unwrap();
    let error = world.pod.read(&mut [0; 4]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionReset, "{error}");
    assert_eq!(world.reverse.keys().len(), 2, "{:?}", world.topology.gateway_pins());
}

#[test]
#[ignore = "privileged: needs root and the eBPF object"]
fn a_connection_goes_on_at_the_same_address() {
    [false, true].into_iter().for_each(goes_on);
}

#[test]
#[ignore = "privileged: needs root and the eBPF object"]
fn a_connection_is_reset_where_the_world_sees_another_address() {
    [false, true].into_iter().for_each(is_reset);
}
