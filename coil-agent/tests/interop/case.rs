//! The matrix, and what each of its cases must hold.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Instant;

use coil_agent::datapath::{NodeDatapath, TunnelKind};
use coil_agent::desired::{DesiredState, GatewayState};
use coil_agent::gateway::datapath::GatewayDatapath;

use crate::kernel::{self, Tunnel};
use crate::probe;
use crate::support::maps;
use crate::support::topology::{GATEWAY_UID, Topology, egress_name};

/// Who is at which end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Roles {
    /// Our node with a gateway of Coil v2.
    OurClient,
    /// Our gateway with a client of Coil v2.
    OurGateway,
    /// Both of Coil v2: shows that the set-up itself is right.
    Neither,
}

/// How the client reaches the gateway.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Path {
    /// By the address of its pod.
    Direct,
    /// By a ClusterIP, which the node translates as kube-proxy does.
    ClusterIp,
}

/// One cell of the matrix.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Case {
    roles: Roles,
    path: Path,
    tunnel: Tunnel,
}

impl Case {
    /// The whole matrix.
    pub(crate) fn all() -> Vec<Self> {
        let mut cases = Vec::new();
        for roles in [Roles::OurClient, Roles::OurGateway] {
            for tunnel in Tunnel::all() {
                for path in [Path::Direct, Path::ClusterIp] {
                    // Proxies of services know no ports of IP in IP.
                    if tunnel.plain && path == Path::ClusterIp {
                        continue;
                    }
                    // A reply to an automatic port comes from the pod's address. Our clients choose pods
                    // themselves, and take packets from the addresses that they have chosen.
                    if (roles, path, tunnel.auto_port) != (Roles::OurClient, Path::ClusterIp, true) {
                        cases.push(Self { roles, path, tunnel });
                    }
                }
            }
        }
        for tunnel in Tunnel::all().into_iter().filter(|tunnel| tunnel.as_coil_v2() && !tunnel.auto_port) {
            cases.push(Self { roles: Roles::Neither, path: Path::ClusterIp, tunnel });
        }
        cases
    }

    /// Its coordinates, separated by slashes.
    pub(crate) fn name(&self) -> String {
        let roles = match self.roles {
            Roles::OurClient => "our-client-kernel-gateway",
            Roles::OurGateway => "kernel-client-our-gateway",
            Roles::Neither => "kernel-client-kernel-gateway",
        };
        let path = match self.path {
            Path::Direct => "direct",
            Path::ClusterIp => "cluster-ip",
        };
        format!("{roles}/{}/{path}", self.tunnel.name())
    }

    /// Sets up, checks, removes.
    pub(crate) fn run(&self) {
        let v6 = self.tunnel.v6;
        let start = Instant::now();
        // Our gateway answers by what it is spoken to by; our client is told.
        let kind = if self.tunnel.plain { TunnelKind::Ipip } else { TunnelKind::Fou };
        let topology = Topology::new().by(kind);
        let gateway = match self.path {
            Path::Direct => topology.gateway.address(v6),
            Path::ClusterIp => kernel::cluster_ip(&topology, v6),
        };
        let mut state = topology.state();
        if self.roles == Roles::OurClient {
            let egress = state.egresses.get_mut(&egress_name()).expect("the topology's Egress");
            egress.source_port_auto = self.tunnel.auto_port;
            // Nothing else of the state depends on which address the gateway is known by.
            match gateway {
                std::net::IpAddr::V4(address) => {
                    egress.v4 = BTreeMap::from([(address, GatewayState::Ready)]);
                }
                std::net::IpAddr::V6(address) => {
                    egress.v6 = BTreeMap::from([(address, GatewayState::Ready)]);
                }
            }
        } else {
            // The client is not ours: nothing of ours is at its interface, but at the gateway's there is.
            state.pods.retain(|uid, _| uid == GATEWAY_UID);
            kernel::client(&topology, self.tunnel, gateway);
        }
        let node = (self.roles != Roles::Neither).then(|| open_node(&topology, &state));
        let ours = match self.roles {
            Roles::OurGateway => Some(open_gateway(&topology, self.tunnel.auto_port)),
            Roles::OurClient | Roles::Neither => {
                kernel::gateway(&topology, self.tunnel);
                None
            }
        };
        let ready = start.elapsed();
        self.check(&topology);
        println!("set up in {ready:.1?}, checked in {:.1?}", start.elapsed() - ready);
        let [at_node, at_gateway] = drops(&topology, node.is_some(), ours.is_some());
        println!("counted drops: node {at_node:?}, gateway {at_gateway:?}");
        for (reason, packets) in at_node.iter().chain(&at_gateway) {
            // The packets that were made too large on purpose.
            assert!(*reason == "too_big", "{packets} packets dropped as {reason}");
        }
    }

    fn check(&self, topology: &Topology) {
        let v6 = self.tunnel.v6;
        let gateway = topology.gateway.address(v6);
        let state = || {
            let ours =
                |folder: &std::path::Path| folder.join("drops").exists().then(|| maps::all_drops(folder));
            format!(
                "drops: node {:?}, gateway {:?}",
                ours(&topology.bpffs.node()),
                ours(&topology.gateway_pins())
            )
        };
        assert!(probe::ping(topology, v6), "no echo reply; {}", state());
        let peer = probe::udp_echo(topology, v6, 1200);
        assert_eq!(peer.map(|peer: SocketAddr| peer.ip()), Some(gateway), "UDP; {}", state());
        let peer = probe::tcp_echo(topology, v6, 2 << 20);
        assert_eq!(peer.ip(), gateway, "TCP; {}", state());
        let client = match self.roles {
            Roles::OurClient => probe::our_mtu(v6, self.tunnel.plain),
            Roles::OurGateway | Roles::Neither => self.tunnel.mtu(),
        };
        let back = match self.roles {
            Roles::OurGateway => probe::our_mtu(v6, self.tunnel.plain),
            Roles::OurClient | Roles::Neither => self.tunnel.mtu(),
        };
        probe::path_mtu(topology, v6, client, back);
    }
}

fn open_node(topology: &Topology, state: &DesiredState) -> NodeDatapath {
    topology.apply(topology.open_node(None), state)
}

fn open_gateway(topology: &Topology, auto_port: bool) -> GatewayDatapath {
    let mut options = topology.gateway_options();
    options.source_port_auto = auto_port;
    topology.open_gateway_with(options)
}

fn drops(topology: &Topology, node: bool, gateway: bool) -> [Vec<(&'static str, u64)>; 2] {
    let read = |has: bool, folder| if has { maps::all_drops(folder) } else { Vec::new() };
    [read(node, &topology.bpffs.node()), read(gateway, &topology.gateway_pins())]
}
