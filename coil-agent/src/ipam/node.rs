//! Addresses of this node, which the host's ends of pods' interfaces have, too. Pure.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use k8s_openapi::api::core::v1::Node;

/// The internal address of a node in each family, the first if there are several.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NodeAddresses {
    /// IPv4 address.
    pub ipv4: Option<Ipv4Addr>,
    /// IPv6 address.
    pub ipv6: Option<Ipv6Addr>,
}

impl NodeAddresses {
    /// As the object says.
    #[must_use]
    pub fn of(node: &Node) -> Self {
        let mut found = Self::default();
        let all = node.status.iter().flat_map(|status| status.addresses.iter().flatten());
        for address in all.filter(|address| address.type_ == "InternalIP") {
            match address.address.parse() {
                Ok(IpAddr::V4(address)) => found.ipv4 = found.ipv4.or(Some(address)),
                Ok(IpAddr::V6(address)) => found.ipv6 = found.ipv6.or(Some(address)),
                Err(_) => {}
            }
        }
        found
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use serde_json::json;

    use super::*;

    fn of(addresses: &[(&str, &str)]) -> NodeAddresses {
        let list: Vec<_> =
            addresses.iter().map(|(kind, text)| json!({ "type": kind, "address": text })).collect();
        let node = json!({ "metadata": { "name": "n" }, "status": { "addresses": list } });
        NodeAddresses::of(&serde_json::from_value(node).unwrap())
    }

    #[test]
    fn a56_internal_addresses_of_nodes() {
        let ipv4 = Some(Ipv4Addr::new(10, 20, 30, 41));
        let ipv6 = Some(Ipv6Addr::new(0xfd10, 0, 0, 0, 0, 0, 0, 41));
        let v4 = ("InternalIP", "10.20.30.41");
        let v6 = ("InternalIP", "fd10::29");
        assert_eq!(of(&[v4, v6]), NodeAddresses { ipv4, ipv6 });
        assert_eq!(of(&[v4]), NodeAddresses { ipv4, ipv6: None });
        assert_eq!(of(&[v6]), NodeAddresses { ipv4: None, ipv6 });
        let others = [("Hostname", "n"), ("ExternalIP", "192.0.2.1"), ("InternalIP", "x")];
        assert_eq!(of(&others), NodeAddresses::default());
        assert_eq!(of(&[others[1], v4, ("InternalIP", "10.20.30.42")]).ipv4, ipv4);
        assert_eq!(NodeAddresses::of(&Node::default()), NodeAddresses::default());
    }
}
