//! A node with client and gateway pods, and the world outside:
//!
//! ```text
//! client --- node --- gateway
//!             |
//!          external
//! ```
//!
//! or, in the other form, gateway and world behind a second node that runs nothing of ours.
//!
//! The world knows routes to all pods, so that a packet that leaks is answered, and seen.

#![expect(clippy::unwrap_used, reason = "tests")]

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use coil_agent::datapath::timeouts::Timeouts;
use coil_agent::datapath::{
    ApplyReport, AttachMode, Datapath, IcmpLimit, NodeDatapath, NodeOptions, TunnelKind,
};
use coil_agent::desired::{
    DesiredEgress, DesiredPod, DesiredState, EgressName, GatewayState, Policy, PolicyAction,
};
use coil_agent::gateway::args::PodAddresses;
use coil_agent::gateway::datapath::{GatewayDatapath, GatewayOptions, Quotas};
use coil_agent::gateway::ports::{NatPorts, PortSet};

use super::net::NetNs;
use super::{BpfFs, wait_for};

/// A name space at the end of a veth pair.
pub(crate) struct Host {
    pub(crate) net: NetNs,
    pub(crate) ipv4: Ipv4Addr,
    pub(crate) ipv6: Ipv6Addr,
    /// Name of the interface at the node.
    pub(crate) at_node: &'static str,
}

impl Host {
    pub(crate) fn address(&self, v6: bool) -> IpAddr {
        if v6 { self.ipv6.into() } else { self.ipv4.into() }
    }
}

/// All of it.
pub(crate) struct Topology {
    pub(crate) node: NetNs,
    pub(crate) client: Host,
    pub(crate) gateway: Host,
    pub(crate) external: Host,
    pub(crate) bpffs: BpfFs,
    /// Where gateway and world are, if not at the client's node.
    pub(crate) far: Option<NetNs>,
    /// By what the client's node sends.
    pub(crate) tunnel: TunnelKind,
    /// Without a tunnel inside the node.
    pub(crate) bypass: bool,
}

/// UID of the gateway's pod.
pub(crate) const GATEWAY_UID: &str = "gateway-uid";

impl Topology {
    pub(crate) fn new() -> Self {
        Self::build(router("node"), None)
    }

    /// With a second node between.
    pub(crate) fn across() -> Self {
        let (node, far) = (router("node"), router("far"));
        node.ip(&format!("link add vfar type veth peer name vnear netns {}", far.name()));
        for (space, name, own, other, v4, v6) in [
            (&node, "vfar", 1, 2, ["10.2.0.0/24", "192.0.2.0/24"], ["fd00:2::/64", "2001:db8:3::/64"]),
            (&far, "vnear", 2, 1, ["10.1.0.0/24", "10.1.0.0/24"], ["fd00:1::/64", "fd00:1::/64"]),
        ] {
            space.ip(&format!("address add 172.16.0.{own}/24 dev {name}"));
            space.ip(&format!("address add fd00:f::{own}/64 dev {name} nodad"));
            space.ip(&format!("link set {name} up"));
            for net in v4 {
                space.ip(&format!("route replace {net} via 172.16.0.{other}"));
            }
            for net in v6 {
                space.ip(&format!("route replace {net} via fd00:f::{other}"));
            }
        }
        Self::build(node, Some(far))
    }

    fn build(node: NetNs, far: Option<NetNs>) -> Self {
        let there = far.as_ref().unwrap_or(&node);
        let client = host(&node, "client", "vclient", [10, 1, 0], 0x1);
        let gateway = host(there, "gateway", "vgateway", [10, 2, 0], 0x2);
        let external = host(there, "external", "vexternal", [192, 0, 2], 0x3);
        let topology = Self {
            client,
            gateway,
            external,
            bpffs: BpfFs::new(),
            node,
            far,
            tunnel: TunnelKind::Fou,
            bypass: false,
        };
        topology.wait();
        topology
    }

    /// The same with another tunnel.
    pub(crate) fn by(mut self, tunnel: TunnelKind) -> Self {
        self.tunnel = tunnel;
        self
    }

    /// The node of gateway and world.
    pub(crate) fn there(&self) -> &NetNs {
        self.far.as_ref().unwrap_or(&self.node)
    }

    /// Waits until all hosts reach each other, which IPv6 takes its time for.
    fn wait(&self) {
        for v6 in [false, true] {
            for to in [&self.gateway, &self.external] {
                let nobody = SocketAddr::new(to.address(v6), 9);
                self.client.net.run(move || {
                    wait_for("neighbours", || {
                        let result = TcpStream::connect_timeout(&nobody, Duration::from_millis(200));
                        let error = result.err()?;
                        (error.kind() == ErrorKind::ConnectionRefused).then_some(())
                    });
                });
            }
        }
    }

    /// Opens the node's datapath; it can be dropped and opened again.
    pub(crate) fn open_node(&self, mode: Option<AttachMode>) -> NodeDatapath {
        let options = self.node_options();
        self.node.run(move || NodeDatapath::open_with(options, mode)).unwrap()
    }

    pub(crate) fn node_options(&self) -> NodeOptions {
        NodeOptions {
            bpffs_root: self.bpffs.root().to_owned(),
            fou_port: 5555,
            tunnel: self.tunnel,
            node_ipv4: Some(Ipv4Addr::new(10, 1, 0, 1)),
            node_ipv6: Some(Ipv6Addr::new(0xfd00, 1, 0, 0, 0, 0, 0, 1)),
            max_flows: 4096,
            icmp: IcmpLimit::default(),
            shortcut: false,
            same_node_bypass: self.bypass,
            max_pod_flows: 0,
            address_only: false,
            timeouts: Timeouts::default(),
        }
    }

    /// Applies a state in the node's name space.
    pub(crate) fn apply(&self, datapath: NodeDatapath, state: &DesiredState) -> NodeDatapath {
        let (datapath, report) = self.try_apply(datapath, state);
        assert!(report.failed.is_empty(), "{:?}", report.failed);
        datapath
    }

    pub(crate) fn try_apply(
        &self,
        mut datapath: NodeDatapath,
        state: &DesiredState,
    ) -> (NodeDatapath, ApplyReport) {
        let state = state.clone();
        self.node.run(move || {
            let report = datapath.apply(&state).unwrap();
            (datapath, report)
        })
    }

    pub(crate) fn gateway_options(&self) -> GatewayOptions {
        GatewayOptions {
            bpffs_root: self.bpffs.root().to_owned(),
            pin_name: GATEWAY_UID.into(),
            addresses: PodAddresses { v4: Some(self.gateway.ipv4), v6: Some(self.gateway.ipv6) },
            fou_port: 5555,
            icmp: IcmpLimit::default(),
            source_port_auto: false,
            ports: NatPorts {
                range: 1024..=64511,
                identifiers: 0..=u16::MAX,
                excluded: PortSet::of([5555, 8080, 8081]),
            },
            ifindex: self.gateway.net.ifindex("eth0"),
            mtu: 1500,
            max_nat: 4096,
            redirect_peer: true,
            quotas: Quotas::default(),
            address_only: false,
            pick_up: false,
            timeouts: Timeouts::default(),
        }
    }

    /// Opens the gateway's datapath, with the client in its list.
    pub(crate) fn open_gateway(&self) -> GatewayDatapath {
        self.open_gateway_with(self.gateway_options())
    }

    pub(crate) fn open_gateway_with(&self, options: GatewayOptions) -> GatewayDatapath {
        let clients = [self.client.address(false), self.client.address(true)];
        self.gateway
            .net
            .run(move || {
                let mut datapath = GatewayDatapath::open(&options)?;
                datapath.clients.sync(&clients.into(), true)?;
                Ok::<_, coil_agent::datapath::DatapathError>(datapath)
            })
            .unwrap()
    }

    /// Folder of the gateway's maps.
    pub(crate) fn gateway_pins(&self) -> PathBuf {
        self.bpffs.node().join("egress").join(GATEWAY_UID)
    }

    /// Client and gateway as pods, with all that goes outside going through the gateway.
    pub(crate) fn state(&self) -> DesiredState {
        let mut policy = Policy::default();
        let egress = PolicyAction::Egress(egress_name());
        policy.v4.insert("10.0.0.0/8".parse().unwrap(), PolicyAction::Direct);
        policy.v4.insert("0.0.0.0/0".parse().unwrap(), egress.clone());
        policy.v6.insert("fc00::/7".parse().unwrap(), PolicyAction::Direct);
        policy.v6.insert("::/0".parse().unwrap(), egress);
        let client = self.pod(&self.client, false, Some(Arc::new(policy)));
        let mut pods = BTreeMap::from([("client-uid".to_owned(), client)]);
        if self.far.is_none() {
            pods.insert(GATEWAY_UID.to_owned(), self.pod(&self.gateway, true, None));
        }
        let egress = DesiredEgress {
            client_affinity: false,
            source_port_auto: true,
            deleted: false,
            v4: BTreeMap::from([(self.gateway.ipv4, GatewayState::Ready)]),
            v6: BTreeMap::from([(self.gateway.ipv6, GatewayState::Ready)]),
            ..DesiredEgress::default()
        };
        DesiredState { pods, egresses: BTreeMap::from([(egress_name(), egress)]), complete: true }
    }

    fn pod(&self, host: &Host, gateway: bool, policy: Option<Arc<Policy>>) -> DesiredPod {
        DesiredPod {
            namespace: "test".into(),
            name: host.at_node.into(),
            ifindex: self.node.ifindex(host.at_node),
            ipv4: Some(host.ipv4),
            ipv6: Some(host.ipv6),
            gateway,
            mtu: 1500,
            policy,
        }
    }
}

pub(crate) fn egress_name() -> EgressName {
    EgressName { namespace: "internet".into(), name: "nat".into() }
}

/// A name space that forwards.
fn router(name: &str) -> NetNs {
    let node = NetNs::new(name);
    for family in ["ipv4.conf.all", "ipv6.conf.all", "ipv6.conf.default"] {
        node.sysctl(&format!("net.{family}.forwarding"), "1");
    }
    node
}

fn host(node: &NetNs, name: &str, at_node: &'static str, v4: [u8; 3], v6: u16) -> Host {
    let net = NetNs::new(name);
    let [a, b, c] = v4;
    let prefix = if a == 192 { format!("2001:db8:{v6:x}") } else { format!("fd00:{v6:x}") };
    node.ip_batch(
        "",
        &[
            format!("link add {at_node} type veth peer name eth0 netns {}", net.name()),
            format!("address add {a}.{b}.{c}.1/24 dev {at_node}"),
            format!("address add {prefix}::1/64 dev {at_node} nodad"),
            format!("link set {at_node} up"),
        ],
    );
    net.ip_batch(
        "",
        &[
            format!("address add {a}.{b}.{c}.2/24 dev eth0"),
            format!("address add {prefix}::2/64 dev eth0 nodad"),
            "link set eth0 up".to_owned(),
            format!("route add default via {a}.{b}.{c}.1"),
            format!("route add default via {prefix}::1"),
        ],
    );
    let ipv6 = format!("{prefix}::2").parse().unwrap();
    Host { net, ipv4: Ipv4Addr::new(a, b, c, 2), ipv6, at_node }
}
