//! The result of ADD in IPAM mode, as the newest CNI version that we know has it; the plugin converts it.

use std::net::IpAddr;
use std::path::Path;

use serde_json::{Value, json};

use crate::ipam::Assigned;
use crate::wiring::Wired;

/// Version of the result.
pub const VERSION: &str = "1.1.0";

/// Makes the result: the pod's interface, the host's, and the addresses of the first, IPv4 before IPv6. There is
/// no gateway and no route in it: they are nobody else's business.
#[must_use]
pub fn add_result(ifname: &str, netns: &Path, wired: &Wired, assigned: &Assigned) -> Value {
    let addresses = [assigned.ipv4.map(IpAddr::V4), assigned.ipv6.map(IpAddr::V6)];
    let ips: Vec<Value> = addresses
        .into_iter()
        .flatten()
        .map(|address| {
            let length = if address.is_ipv4() { 32 } else { 128 };
            json!({"address": format!("{address}/{length}"), "interface": 0})
        })
        .collect();
    json!({
        "cniVersion": VERSION,
        "interfaces": [
            {"name": ifname, "mac": mac(wired.mac_inside), "sandbox": netns.display().to_string()},
            {"name": wired.name, "mac": mac(wired.mac)},
        ],
        "ips": ips,
        "dns": {},
    })
}

fn mac(bytes: [u8; 6]) -> String {
    bytes.map(|byte| format!("{byte:02x}")).join(":")
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;

    #[test]
    fn two_interfaces_and_the_addresses_of_the_first() {
        let wired =
            Wired { index: 7, name: "veth1".into(), mtu: 1500, mac: [2, 0, 0, 0, 0, 1], mac_inside: [10; 6] };
        let assigned = Assigned {
            pool: "default".into(),
            ipv4: Some([10, 1, 0, 7].into()),
            ipv6: Some("fd01::7".parse().unwrap()),
        };
        let result = add_result("eth0", Path::new("/run/netns/a"), &wired, &assigned);
        assert_eq!(
            result,
            json!({
                "cniVersion": "1.1.0",
                "interfaces": [
                    {"name": "eth0", "mac": "0a:0a:0a:0a:0a:0a", "sandbox": "/run/netns/a"},
                    {"name": "veth1", "mac": "02:00:00:00:00:01"},
                ],
                "ips": [
                    {"address": "10.1.0.7/32", "interface": 0},
                    {"address": "fd01::7/128", "interface": 0},
                ],
                "dns": {},
            })
        );
        let single = Assigned { ipv4: None, ..assigned };
        let result = add_result("eth0", Path::new("/run/netns/a"), &wired, &single);
        assert_eq!(result["ips"].as_array().unwrap().len(), 1);
    }
}
