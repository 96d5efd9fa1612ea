//! Makes the planned network with iproute2 batches.

use super::{Node, Topology};
use crate::netns::{Netns, NetnsError};
use std::io::{self, Write};
use std::process::{Command, Stdio};

/// MTU of every link.
const MTU: u16 = 1500;

/// Settings of every namespace that forwards. Duplicate address detection only costs time here, and router
/// advertisements have no place on a node.
const FORWARDING: [(&str, &str); 12] = [
    ("net/ipv6/conf/all/disable_ipv6", "0"),
    ("net/ipv6/conf/default/disable_ipv6", "0"),
    ("net/ipv6/conf/all/accept_dad", "0"),
    ("net/ipv6/conf/default/accept_dad", "0"),
    ("net/ipv6/conf/default/dad_transmits", "0"),
    ("net/ipv6/conf/all/accept_ra", "0"),
    ("net/ipv6/conf/default/accept_ra", "0"),
    ("net/ipv4/ip_forward", "1"),
    ("net/ipv6/conf/all/forwarding", "1"),
    ("net/ipv6/conf/default/forwarding", "1"),
    ("net/ipv4/conf/all/rp_filter", "0"),
    ("net/ipv4/conf/default/rp_filter", "0"),
];

/// What can go wrong.
#[derive(Debug, thiserror::Error)]
pub enum ApplyError {
    /// A namespace.
    #[error(transparent)]
    Netns(#[from] NetnsError),
    /// A sysctl of a namespace.
    #[error("cannot set up network namespace {}", namespace.name())]
    Sysctl {
        /// The namespace.
        namespace: Netns,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// `ip` could not be run.
    #[error("cannot run ip (package iproute2) in {}", namespace.name())]
    Run {
        /// The namespace.
        namespace: Netns,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// `ip` refused a command.
    #[error("ip in {}: {message}", namespace.name())]
    Refused {
        /// The namespace.
        namespace: Netns,
        /// What it printed.
        message: String,
    },
}

/// Makes namespaces, links, addresses and routes.
pub fn apply(topology: &Topology) -> Result<(), ApplyError> {
    for namespace in topology.namespaces() {
        create(namespace)?;
    }
    for (namespace, lines) in batches(topology) {
        batch(namespace, &lines)?;
    }
    Ok(())
}

/// Takes a node's link away, at both ends. One that is not there is no error.
pub fn unplug(topology: &Topology, node: &Node) -> Result<(), ApplyError> {
    let link = node.router_link.as_str();
    // The kernel knows no such name in the router's namespace: the link is gone.
    if topology.router.run(|| nix::net::if_::if_nametoindex(link))?.is_err() {
        return Ok(());
    }
    batch(&topology.router, &[format!("link del {link}")])
}

/// Makes a node's namespace, link, addresses and routes anew.
pub fn plug(topology: &Topology, node: &Node) -> Result<(), ApplyError> {
    create(&node.netns)?;
    batch(&topology.router, &at_router(node))?;
    batch(&node.netns, &at_node(node))
}

fn create(namespace: &Netns) -> Result<(), ApplyError> {
    namespace.create()?;
    namespace
        .sysctls(&FORWARDING)?
        .map_err(|source| ApplyError::Sysctl { namespace: namespace.clone(), source })
}

/// Commands for a node's link in the router's namespace; they make the node's end as well.
fn at_router(node: &Node) -> Vec<String> {
    let link = &node.router_link;
    let mut lines = vec![pair(link, "eth0", &node.netns)];
    up(&mut lines, link, &node.gateways);
    for net in &node.pod_cidrs {
        if let Some(via) = node.addresses.iter().find(|via| same_family(via, net)) {
            lines.push(format!("route add {net} via {} dev {link}", via.addr()));
        }
    }
    lines
}

/// Commands in a node's namespace.
fn at_node(node: &Node) -> Vec<String> {
    let mut lines = vec!["link set lo up".to_owned()];
    up(&mut lines, "eth0", &node.addresses);
    defaults(&mut lines, &node.gateways);
    lines
}

/// The commands per namespace. The router's come first: they make both ends of each link.
fn batches(topology: &Topology) -> Vec<(&Netns, Vec<String>)> {
    let external = &topology.external;
    let mut router = vec!["link set lo up".to_owned()];
    let mut others = Vec::new();
    for address in &topology.api_addresses {
        router.push(format!("addr add {address} dev lo nodad"));
    }
    for node in &topology.nodes {
        router.extend(at_router(node));
        others.push((&node.netns, at_node(node)));
    }

    let link = "to-external";
    router.push(pair(link, "eth0", &external.netns));
    up(&mut router, link, &external.gateways);
    let mut lines = vec!["link set lo up".to_owned()];
    up(&mut lines, "eth0", &external.link_addresses);
    defaults(&mut lines, &external.gateways);
    for address in &external.addresses {
        lines.push(format!("addr add {address} dev lo nodad"));
        let host = ipnet::IpNet::from(*address);
        if let Some(via) = external.link_addresses.iter().find(|via| same_family(via, &host)) {
            router.push(format!("route add {host} via {} dev {link}", via.addr()));
        }
    }
    others.push((&external.netns, lines));
    others.insert(0, (&topology.router, router));
    others
}

fn pair(link: &str, peer: &str, namespace: &Netns) -> String {
    let peer_namespace = namespace.name();
    format!("link add {link} mtu {MTU} type veth peer name {peer} mtu {MTU} netns {peer_namespace}")
}

fn up(lines: &mut Vec<String>, link: &str, addresses: &[ipnet::IpNet]) {
    lines.push(format!("link set {link} up"));
    for address in addresses {
        lines.push(format!("addr add {address} dev {link} nodad"));
    }
}

fn defaults(lines: &mut Vec<String>, gateways: &[ipnet::IpNet]) {
    for gateway in gateways {
        lines.push(format!("route add default via {} dev eth0", gateway.addr()));
    }
}

fn same_family(a: &ipnet::IpNet, b: &ipnet::IpNet) -> bool {
    a.addr().is_ipv4() == b.addr().is_ipv4()
}

fn batch(namespace: &Netns, lines: &[String]) -> Result<(), ApplyError> {
    let run = |source| ApplyError::Run { namespace: namespace.clone(), source };
    let mut command = Command::new("ip");
    command.args(["-batch", "-"]).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
    namespace.enter(&mut command)?;
    let mut child = command.spawn().map_err(run)?;
    let text = lines.join("\n") + "\n";
    let written = child.stdin.take().map_or(Ok(()), |mut stdin| stdin.write_all(text.as_bytes()));
    let output = child.wait_with_output().map_err(run)?;
    if !output.status.success() {
        return Err(ApplyError::Refused {
            namespace: namespace.clone(),
            message: String::from_utf8_lossy(&output.stderr).trim().to_owned(),
        });
    }
    written.map_err(run)
}
