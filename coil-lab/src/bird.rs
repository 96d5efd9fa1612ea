//! Configuration of BIRD 2 in a lab with Coil's own pod networking, where routes to pods are those that `coild` exports:
//! each node learns the blocks in its table 119 and tells them to the router by BGP, in both families.
//!
//! `docs/operations.md` has the same for a real node.

use std::fmt::Write;
use std::net::IpAddr;
use std::path::PathBuf;

use crate::paths;
use crate::topology::{Node, Topology};

/// Kernel table to which `coild` exports by default.
const EXPORTED: u32 = 119;
/// Private AS numbers (RFC 6996): the router's, then the nodes'.
const ROUTER_AS: usize = 64_600;
/// Who does not answer is asked again soon: nodes and router start together.
const TIMERS: &str = "connect delay time 1; connect retry time 1; error wait time 1, 2;";

/// The program, which Debian installs beside the daemons.
pub fn program() -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders = std::env::split_paths(&path).chain(["/usr/sbin".into()]);
    folders.map(|folder| folder.join("bird")).find(|file| file.is_file())
}

/// Command line for an instance whose files are in a folder.
pub fn command(program: PathBuf, folder: PathBuf) -> Vec<PathBuf> {
    let [configuration, socket, pid] = ["bird.conf", "bird.ctl", "bird.pid"].map(|file| folder.join(file));
    vec![program, "-f".into(), "-c".into(), configuration, "-s".into(), socket, "-P".into(), pid]
}

/// Folder of the router's instance; a node's is the node's.
pub fn router_folder() -> PathBuf {
    paths::node("router")
}

/// Both ends of a node's links, by family: name of the family, the node's address, the router's.
fn links(node: &Node) -> impl Iterator<Item = (&'static str, IpAddr, IpAddr)> {
    node.addresses
        .iter()
        .zip(&node.gateways)
        .map(|(own, router)| (if own.addr().is_ipv4() { "ipv4" } else { "ipv6" }, own.addr(), router.addr()))
}

fn head(id: usize) -> String {
    format!(
        "log stderr {{ warning, error, fatal, bug }};\nrouter id 10.255.{}.{};\nprotocol device {{ scan time 1; }}\n",
        id / 256,
        id % 256
    )
}

/// What a node runs; `number` counts from 1.
pub fn node(node: &Node, number: usize) -> String {
    let mut text = head(number);
    for (family, own, router) in links(node) {
        // Writing into a string does not fail.
        write!(
            text,
            "\
{family} table blocks_{family};
protocol kernel exported_{family} {{
  kernel table {EXPORTED}; learn; scan time 1;
  {family} {{ table blocks_{family}; import all; export none; }};
}}
protocol bgp router_{family} {{
  local {own} as {}; neighbor {router} as {ROUTER_AS};
  {TIMERS}
  {family} {{ table blocks_{family}; import none; export all; next hop self; }};
}}
",
            ROUTER_AS + number
        )
        .unwrap_or_default();
    }
    text
}

/// What the router runs.
pub fn router(topology: &Topology) -> String {
    let mut text = head(0xffff);
    for (family, wanted) in [("ipv4", topology.family.v4()), ("ipv6", topology.family.v6())] {
        if wanted {
            writeln!(text, "protocol kernel main_{family} {{ {family} {{ import none; export all; }}; }}")
                .unwrap_or_default();
        }
    }
    for (index, node) in topology.nodes.iter().enumerate() {
        for (family, own, router) in links(node) {
            writeln!(
                text,
                "protocol bgp {}_{family} {{ local {router} as {ROUTER_AS}; neighbor {own} as {}; passive; \
                 {family} {{ import all; export none; }}; }}",
                node.name,
                ROUTER_AS + index + 1
            )
            .unwrap_or_default();
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::options::{Family, Networking};

    #[test]
    fn every_family_has_its_sessions() {
        let dual = Topology::plan(3, Family::Dual, Networking::Coil);
        let text = node(&dual.nodes[1], 2);
        assert!(text.contains("local 172.30.2.2 as 64602; neighbor 172.30.2.1 as 64600;"), "{text}");
        assert!(
            text.contains("local fd00:172:30:2::2 as 64602;") && text.contains("kernel table 119;"),
            "{text}"
        );
        let text = router(&dual);
        assert_eq!(text.matches("protocol bgp").count(), 6, "{text}");
        assert!(text.contains("neighbor 172.30.3.2 as 64603; passive;"), "{text}");
        let v6 = Topology::plan(1, Family::V6, Networking::Coil);
        assert!(!router(&v6).contains("ipv4") && !node(&v6.nodes[0], 1).contains("ipv4"));
    }
}
