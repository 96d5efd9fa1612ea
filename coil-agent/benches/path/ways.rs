//! The ways: plain routing, translation, the kernel's tunnels with translation, and ours.

use std::net::IpAddr;

use anyhow::{Result, bail, ensure};
use coil_agent::datapath::{Datapath, NodeDatapath};
use coil_agent::gateway::datapath::GatewayDatapath;

use crate::kernel::{self, Tunnel};
use crate::load;
use crate::support::topology::Topology;

/// Flows and translations that fit.
const CAPACITY: u32 = 1 << 20;

/// A network, set up in one way.
pub(crate) struct Way {
    pub(crate) name: String,
    pub(crate) topology: Topology,
    /// Whether packets leave with the address of the egress pod.
    translates: bool,
    _ours: Option<(NodeDatapath, GatewayDatapath)>,
}

impl Way {
    pub(crate) fn new(name: &str) -> Result<Self> {
        let topology = Topology::new();
        let mut ours = None;
        match name {
            "direct" => {}
            "nat" => nat(&topology),
            "fou" => {
                if let Some(missing) = kernel::missing_modules() {
                    bail!(missing);
                }
                for v6 in [false, true] {
                    // The fixed port and the headers of Coil v2.
                    let tunnel = Tunnel { v6, plain: false, auto_port: false, options_header: v6 };
                    kernel::client(&topology, tunnel, topology.gateway.address(v6));
                    kernel::gateway(&topology, tunnel);
                }
            }
            "vxlan" => vxlan(&topology),
            "coil" => ours = Some(coil(&topology, false)?),
            "coil-shortcut" => ours = Some(coil(&topology, true)?),
            _ => bail!("no way {name}: direct, nat, fou, vxlan, coil, coil-shortcut"),
        }
        Ok(Self { name: name.to_owned(), topology, translates: name != "direct", _ours: ours })
    }

    /// The world must see the address that the way promises.
    pub(crate) fn check(&self, v6: bool) -> Result<()> {
        let host = if self.translates { &self.topology.gateway } else { &self.topology.client };
        let (seen, wanted) = (load::peer(&self.topology, v6)?, host.address(v6));
        ensure!(seen == wanted, "{}: the world sees {seen}, not {wanted}", self.name);
        Ok(())
    }
}

/// Packets for the world go by the egress pod, which masquerades.
fn nat(topology: &Topology) {
    for v6 in [false, true] {
        masquerade(topology, v6);
        let family = family(v6);
        let (gateway, world) = (topology.gateway.address(v6), topology.external.address(v6));
        topology.node.ip(&format!("-{family} route add default via {gateway} table 118"));
        topology.node.ip(&format!("-{family} rule add pref 100 iif vclient to {world} lookup 118"));
    }
}

fn vxlan(topology: &Topology) {
    for v6 in [false, true] {
        masquerade(topology, v6);
        let family = family(v6);
        let (client, gateway) = (topology.client.address(v6), topology.gateway.address(v6));
        let ends =
            [(&topology.client.net, client, gateway, 1, 2), (&topology.gateway.net, gateway, client, 2, 1)];
        for (space, own, other, own_mac, other_mac) in ends {
            let (checksum, mtu) =
                if v6 { ("udp6zerocsumtx udp6zerocsumrx", 1430) } else { ("noudpcsum", 1450) };
            let device = format!("vx{family}");
            space.ip(&format!(
                "link add name {device} mtu {mtu} address 02:00:00:00:00:0{own_mac} type vxlan id 6{family} \
                 local {own} remote {other} dstport 4789 nolearning {checksum}"
            ));
            space.ip(&format!("link set {device} up"));
            space.ip(&format!(
                "neigh add {other} lladdr 02:00:00:00:00:0{other_mac} dev {device} nud permanent"
            ));
        }
        let all = if v6 { "::/0" } else { "0.0.0.0/0" };
        let private = if v6 { "fc00::/7" } else { "10.0.0.0/8" };
        let device = format!("vx{family}");
        let space = &topology.client.net;
        space.ip(&format!("-{family} rule add pref 2000 to {private} lookup main"));
        space.ip(&format!("-{family} rule add pref 2100 to {all} lookup 119"));
        space.ip(&format!("-{family} route add default via {gateway} dev {device} onlink table 119"));
        let space = &topology.gateway.net;
        space.ip(&format!("-{family} rule add pref 2000 iif eth0 to {client} lookup 119"));
        space.ip(&format!("-{family} route add {client} via {client} dev {device} onlink table 119"));
    }
}

fn family(v6: bool) -> u8 {
    if v6 { 6 } else { 4 }
}

fn masquerade(topology: &Topology, v6: bool) {
    let own: IpAddr = topology.gateway.address(v6);
    let space = &topology.gateway.net;
    space.sysctl("net.ipv4.ip_forward", "1");
    space.sysctl("net.ipv6.conf.all.forwarding", "1");
    kernel::masquerade(space, own);
}

fn coil(topology: &Topology, shortcut: bool) -> Result<(NodeDatapath, GatewayDatapath)> {
    let mut options = topology.node_options();
    options.max_flows = CAPACITY;
    options.shortcut = shortcut;
    let state = topology.state();
    let node = topology.node.run(move || {
        let mut node = NodeDatapath::open(options)?;
        let report = node.apply(&state)?;
        ensure!(report.failed.is_empty(), "{:?}", report.failed);
        Ok(node)
    })?;
    let mut options = topology.gateway_options();
    options.max_nat = CAPACITY;
    Ok((node, topology.open_gateway_with(options)))
}
