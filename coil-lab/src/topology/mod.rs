//! The network of the lab: one namespace per node, a router that joins them, and an external host that plays the
//! Internet. This file is the plan, pure; `apply` makes it.
//!
//! ```text
//!  worker1 ── 172.30.1.0/24 ──┐
//!  worker2 ── 172.30.2.0/24 ──┤ router (API at 172.30.0.1) ── 172.31.0.0/24 ── external (203.0.113.10, …)
//! ```
//!
//! The router has a route to each node's pods, fixed or by BGP, and the external host sends everything back to the router, so a pod that
//! nobody NATs reaches the outside with its own address and gets its answers.

mod apply;

pub use apply::{ApplyError, apply, plug, unplug};

use crate::netns::Netns;
use crate::options::{Family, Networking};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use serde::{Deserialize, Serialize};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// Most worker nodes that the address plan has room for.
pub const MAX_NODES: usize = 50;
/// Port of the API inside the lab.
pub const API_PORT: u16 = 6443;

/// The whole network.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Topology {
    /// Families that the cluster has.
    pub family: Family,
    /// Worker nodes.
    pub nodes: Vec<Node>,
    /// Namespace of the router.
    pub router: Netns,
    /// Addresses of the router at which nodes and pods reach the API.
    pub api_addresses: Vec<IpAddr>,
    /// The outside world.
    pub external: External,
    /// Addresses of pods that Coil hands out: the subnet of the pool `default`, with at most one of each family. Empty
    /// without Coil's own pod networking.
    #[serde(default)]
    pub pool: Vec<IpNet>,
    /// Ranges of service addresses. Nothing routes them: Coil's clients need no kube-proxy.
    pub service_cidrs: Vec<IpNet>,
}

/// A worker node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Node {
    /// Its name in the cluster.
    pub name: String,
    /// Its network namespace.
    pub netns: Netns,
    /// Its value of `topology.kubernetes.io/zone`.
    pub zone: String,
    /// Its own addresses, with the length of the underlay network.
    pub addresses: Vec<IpNet>,
    /// The router's addresses on the same link.
    pub gateways: Vec<IpNet>,
    /// The ranges of its pods, where they are fixed: not with Coil's own pod networking.
    pub pod_cidrs: Vec<IpNet>,
    /// Name of the router's end of the link.
    pub router_link: String,
}

/// The outside world.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct External {
    /// Its network namespace.
    pub netns: Netns,
    /// Its addresses on the link to the router.
    pub link_addresses: Vec<IpNet>,
    /// The router's addresses on that link.
    pub gateways: Vec<IpNet>,
    /// Addresses that emulate hosts of the Internet and of private networks elsewhere.
    pub addresses: Vec<IpAddr>,
}

/// Hosts on the Internet, then hosts in private ranges, which an Egress must name to cover them.
const EXTERNAL_HOSTS: [&str; 12] = [
    "203.0.113.10",
    "203.0.113.11",
    "198.51.100.10",
    "192.168.200.10",
    "192.168.201.10",
    "10.99.0.10",
    "2001:db8:ffff::10",
    "2001:db8:ffff::11",
    "2001:db8:eeee::10",
    "fd00:192:168:200::10",
    "fd00:192:168:201::10",
    "fd00:10:99::10",
];

impl Topology {
    /// The network of a cluster with `nodes` workers.
    pub fn plan(nodes: usize, family: Family, networking: Networking) -> Self {
        let keep = |v4: Ipv4Addr, v4_len: u8, v6: Ipv6Addr, v6_len: u8| -> Vec<IpNet> {
            let v4 = family.v4().then(|| IpNet::V4(Ipv4Net::new_assert(v4, v4_len)));
            let v6 = family.v6().then(|| IpNet::V6(Ipv6Net::new_assert(v6, v6_len)));
            v4.into_iter().chain(v6).collect()
        };
        let underlay = |node: u8, host: u8| {
            let subnet = decimal(node);
            keep(
                Ipv4Addr::new(172, 30, node, host),
                24,
                Ipv6Addr::new(0xfd00, 0x172, 0x30, subnet, 0, 0, 0, host.into()),
                64,
            )
        };
        let outside = |host: u8| {
            keep(
                Ipv4Addr::new(172, 31, 0, host),
                24,
                Ipv6Addr::new(0xfd00, 0x172, 0x31, 0, 0, 0, 0, host.into()),
                64,
            )
        };
        let nodes = (1..=u8::try_from(nodes.min(MAX_NODES)).unwrap_or(u8::MAX))
            .map(|number| {
                let name = format!("worker{number}");
                Node {
                    netns: Netns::of(&name),
                    zone: format!("zone-{}", (number - 1) % 3 + 1),
                    addresses: underlay(number, 2),
                    gateways: underlay(number, 1),
                    pod_cidrs: match networking {
                        Networking::Coil => Vec::new(),
                        Networking::Ptp => keep(
                            Ipv4Addr::new(10, 244, number, 0),
                            24,
                            Ipv6Addr::new(0xfd00, 0x10, 0x244, decimal(number), 0, 0, 0, 0),
                            64,
                        ),
                    },
                    router_link: format!("to-{name}"),
                    name,
                }
            })
            .collect();
        Self {
            family,
            nodes,
            router: Netns::of("router"),
            api_addresses: underlay(0, 1).iter().map(IpNet::addr).collect(),
            external: External {
                netns: Netns::of("external"),
                link_addresses: outside(2),
                gateways: outside(1),
                addresses: EXTERNAL_HOSTS
                    .iter()
                    .filter_map(|text| text.parse().ok())
                    .filter(|address| family.has(*address))
                    .collect(),
            },
            // As many addresses of either family, as a pool wants it.
            pool: match networking {
                Networking::Coil => keep(
                    Ipv4Addr::new(10, 244, 0, 0),
                    16,
                    Ipv6Addr::new(0xfd00, 0x10, 0x244, 0, 0, 0, 0, 0),
                    112,
                ),
                Networking::Ptp => Vec::new(),
            },
            service_cidrs: keep(
                Ipv4Addr::new(10, 96, 0, 0),
                16,
                Ipv6Addr::new(0xfd00, 0x10, 0x96, 0, 0, 0, 0, 0),
                112,
            ),
        }
    }

    /// The node of that name.
    pub fn node(&self, name: &str) -> Option<&Node> {
        self.nodes.iter().find(|node| node.name == name)
    }

    /// Every namespace of the plan, pods' not included.
    pub fn namespaces(&self) -> impl Iterator<Item = &Netns> {
        [&self.router, &self.external.netns].into_iter().chain(self.nodes.iter().map(|node| &node.netns))
    }

    /// The address at which nodes and pods reach the API.
    pub fn api_authority(&self) -> String {
        match self.api_addresses.first() {
            Some(IpAddr::V6(address)) => format!("[{address}]:{API_PORT}"),
            Some(IpAddr::V4(address)) => format!("{address}:{API_PORT}"),
            None => format!("127.0.0.1:{API_PORT}"),
        }
    }
}

/// The group of an IPv6 address that reads like the decimal number: 12 becomes `0x12`.
fn decimal(number: u8) -> u16 {
    u16::from(number / 10) * 16 + u16::from(number % 10)
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]
    use super::*;

    #[test]
    fn dual_stack_plan() {
        let topology = Topology::plan(2, Family::Dual, Networking::Ptp);
        let node = topology.node("worker2").unwrap();
        let text: Vec<_> = node.addresses.iter().chain(&node.pod_cidrs).map(ToString::to_string).collect();
        assert_eq!(text, ["172.30.2.2/24", "fd00:172:30:2::2/64", "10.244.2.0/24", "fd00:10:244:2::/64"]);
        assert_eq!(topology.api_authority(), "172.30.0.1:6443");
        assert_eq!(topology.external.addresses.len(), EXTERNAL_HOSTS.len());
    }

    #[test]
    fn one_family_has_no_trace_of_the_other() {
        let v6 = serde_json::to_string(&Topology::plan(3, Family::V6, Networking::Ptp)).unwrap();
        assert!(!v6.contains("10.244."), "{v6}");
        assert!(!v6.contains("203.0.113"), "{v6}");
        let v4 = serde_json::to_string(&Topology::plan(3, Family::V4, Networking::Ptp)).unwrap();
        assert!(!v4.contains("fd00"), "{v4}");
        assert_eq!(Topology::plan(1, Family::V6, Networking::Ptp).api_authority(), "[fd00:172:30::1]:6443");
    }

    #[test]
    fn nodes_do_not_overlap() {
        let topology = Topology::plan(MAX_NODES, Family::Dual, Networking::Ptp);
        let mut seen = std::collections::HashSet::new();
        for node in &topology.nodes {
            for net in node.addresses.iter().map(IpNet::trunc).chain(node.pod_cidrs.iter().copied()) {
                assert!(seen.insert(net), "{net} twice");
            }
        }
    }
}
