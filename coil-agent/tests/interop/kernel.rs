//! The kernel's side: tunnel devices, rules, routes and masquerade as Coil v2 sets them up in its pods,
//! and a service address as kube-proxy sets it up on nodes.

use std::net::IpAddr;
use std::path::Path;
use std::process::Command;

use crate::support::net::NetNs;
use crate::support::run_with_input;
use crate::support::topology::Topology;

const PORT: u16 = 5555;

/// Loads what the kernel's side needs; the reason if it cannot be had.
pub(crate) fn missing_modules() -> Option<String> {
    let missing: Vec<_> =
        ["fou", "fou6", "ipip", "ip6_tunnel"].into_iter().filter(|module| !has_module(module)).collect();
    (!missing.is_empty()).then(|| {
        format!("this kernel has no {}; `cargo xtask vm-test` runs this in one that has", missing.join(", "))
    })
}

fn has_module(module: &str) -> bool {
    let loaded = Command::new("modprobe").args(["--quiet", module]).status();
    loaded.is_ok_and(|status| status.success()) || Path::new("/sys/module").join(module).exists()
}

/// How the kernel's end sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Tunnel {
    pub(crate) v6: bool,
    /// IP in IP, without UDP.
    pub(crate) plain: bool,
    /// The outer source port follows the flow (`fouSourcePortAuto`).
    pub(crate) auto_port: bool,
    /// IPv6 only: a destination options header with the encapsulation limit, and no checksum, as Coil v2
    /// sends; otherwise neither header nor limit, and a checksum, as `ip` does by itself.
    pub(crate) options_header: bool,
}

impl Tunnel {
    pub(crate) fn all() -> Vec<Self> {
        let mut all = Vec::new();
        for (v6, options_header) in [(false, false), (true, true), (true, false)] {
            for (plain, auto_port) in [(false, false), (false, true), (true, false)] {
                all.push(Self { v6, plain, auto_port, options_header });
            }
        }
        all
    }

    pub(crate) fn name(self) -> String {
        let family = match (self.v6, self.options_header) {
            (false, _) => "v4",
            (true, true) => "v6-options-header",
            (true, false) => "v6-no-options-header",
        };
        let kind = match (self.plain, self.auto_port) {
            (true, _) => "ip-in-ip",
            (false, true) => "auto-port",
            (false, false) => "fixed-port",
        };
        format!("{family}/{kind}")
    }

    /// Whether this is what Coil v2 sends.
    pub(crate) fn as_coil_v2(self) -> bool {
        !self.plain && self.v6 == self.options_header
    }

    /// What fits into it on a link of 1500 bytes.
    pub(crate) fn mtu(self) -> usize {
        let udp = if self.plain { 0 } else { 8 };
        match (self.v6, self.options_header) {
            (false, _) => 1500 - 20 - udp,
            (true, true) => 1500 - 40 - 8 - udp,
            (true, false) => 1500 - 40 - udp,
        }
    }

    fn family(self) -> &'static str {
        if self.v6 { "-6" } else { "-4" }
    }

    fn device(self) -> &'static str {
        if self.v6 { "fou6" } else { "fou4" }
    }

    /// Receive port, tunnel device to the other end, and the one that takes packets from elsewhere.
    fn make(self, space: &NetNs, local: IpAddr, remote: IpAddr) {
        let Self { v6, plain, auto_port, options_header } = self;
        let device = self.device();
        let source = if auto_port { "auto".to_owned() } else { PORT.to_string() };
        let encapsulation =
            if plain { String::new() } else { format!("encap fou encap-sport {source} encap-dport {PORT}") };
        for family in ["all", "default"] {
            space.sysctl(&format!("net.ipv4.conf.{family}.rp_filter"), "0");
        }
        let mut commands = Vec::new();
        if v6 {
            space.sysctl("net.ipv6.conf.all.forwarding", "1");
            // `ip` wants the limit before, the checksum after the encapsulation.
            let limit = if options_header { "encaplimit 0" } else { "encaplimit none" };
            let checksum = match (plain, options_header) {
                (true, _) => "",
                (false, true) => "noencap-udp6-csum",
                (false, false) => "encap-udp6-csum",
            };
            if !plain {
                space.ip(&format!("-6 fou add port {PORT} ipproto 41"));
            }
            commands.push(format!(
                "link add name {device} type ip6tnl mode ip6ip6 local {local} remote {remote} ttl 225 {limit} \
                 {encapsulation} {checksum}"
            ));
            commands.push("link add name coil_ipip6 type ip6tnl external".to_owned());
            commands.push("link set coil_ipip6 up".to_owned());
        } else {
            space.sysctl("net.ipv4.ip_forward", "1");
            if !plain {
                space.ip(&format!("fou add port {PORT} ipproto 4"));
            }
            commands.push(format!(
                "link add name {device} type ipip local {local} remote {remote} ttl 225 {encapsulation}"
            ));
            commands.push("link add name coil_ipip4 type ipip external".to_owned());
            commands.push("link set coil_ipip4 up".to_owned());
        }
        commands.push(format!("link set {device} up"));
        space.ip_batch("", &commands);
    }
}

/// Makes the client pod one of Coil v2: all that is neither link-local nor private goes to `gateway`.
pub(crate) fn client(topology: &Topology, tunnel: Tunnel, gateway: IpAddr) {
    let space = &topology.client.net;
    tunnel.make(space, topology.client.address(tunnel.v6), gateway);
    let (link_local, private, all): (_, &[_], _) = if tunnel.v6 {
        ("fe80::/10", &["fc00::/7"], "::/0")
    } else {
        ("169.254.0.0/16", &["10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16"], "0.0.0.0/0")
    };
    let device = tunnel.device();
    let mut rules = vec![
        format!("rule add pref 1800 to {link_local} lookup main"),
        "rule add pref 1900 lookup 117".to_owned(),
    ];
    for (index, network) in private.iter().enumerate() {
        rules.push(format!("rule add pref {} to {network} lookup main", 2000 + index));
    }
    rules.push("rule add pref 2100 lookup 118".to_owned());
    rules.push(format!("route add {all} dev {device} proto 30 table 118"));
    space.ip_batch(tunnel.family(), &rules);
}

/// Makes the gateway pod one of Coil v2.
pub(crate) fn gateway(topology: &Topology, tunnel: Tunnel) {
    let space = &topology.gateway.net;
    let (own, client) = (topology.gateway.address(tunnel.v6), topology.client.address(tunnel.v6));
    tunnel.make(space, own, client);
    masquerade(space, own);
    let host = if tunnel.v6 { 128 } else { 32 };
    let route = format!("route add {client}/{host} dev {} proto 30 table 118", tunnel.device());
    space.ip_batch(tunnel.family(), &["rule add pref 2000 iif eth0 lookup 118".to_owned(), route]);
}

/// What leaves a gateway pod with an address other than its own gets that.
pub(crate) fn masquerade(space: &NetNs, own: IpAddr) {
    let table = if own.is_ipv6() { "ip6" } else { "ip" };
    let foreign = format!("{table} saddr != {own} oifname eth0");
    nft(
        space,
        &[
            format!("add table {table} nat"),
            format!("add chain {table} nat POSTROUTING {{ type nat hook postrouting priority 100; }}"),
            format!("add rule {table} nat POSTROUTING {foreign} counter masquerade"),
            format!("add table {table} filter"),
            format!("add chain {table} filter FORWARD {{ type filter hook forward priority 0; }}"),
            format!("add rule {table} filter FORWARD oifname eth0 ct state invalid counter drop"),
        ],
    );
}

/// Gives the gateway a service address, and returns it.
pub(crate) fn cluster_ip(topology: &Topology, v6: bool) -> IpAddr {
    let space = &topology.node;
    let pod = topology.gateway.address(v6);
    let (table, service, target) = if v6 {
        ("ip6", IpAddr::from([0xfd00, 0x96, 0, 0, 0, 0, 0, 10]), format!("[{pod}]:{PORT}"))
    } else {
        ("ip", IpAddr::from([10, 96, 0, 10]), format!("{pod}:{PORT}"))
    };
    let service_port = format!("{table} daddr {service} udp dport {PORT}");
    nft(
        space,
        &[
            format!("add table {table} proxy"),
            format!("add chain {table} proxy services {{ type nat hook prerouting priority -100; }}"),
            format!("add rule {table} proxy services {service_port} counter dnat to {target}"),
        ],
    );
    service
}

fn nft(space: &NetNs, commands: &[String]) {
    let name = space.name();
    run_with_input(&format!("ip netns exec {name} nft -f -"), &format!("{}\n", commands.join("\n")));
}
