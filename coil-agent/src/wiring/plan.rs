//! What the wiring of a pod consists of, without a kernel: names, addresses, routes, and which rule of the host
//! is ours.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ring::digest::{SHA1_FOR_LEGACY_USE_ONLY, digest};

use super::WiringError;
use crate::ipam::{Assigned, NodeAddresses, Owner};

/// What every alias of Coil begins with.
pub const ALIAS_PREFIX: &str = "COIL:";
/// What the names of host-side interfaces begin with; Calico is told of it.
const NAME_PREFIX: &str = "veth";
/// Names that are tried for an interface before giving up.
pub(super) const NAMES: u32 = 10;
/// What the alternative name of a host-side interface begins with; the UID of the pod follows.
const ALT_NAME_PREFIX: &str = "coil-pod.";
/// Longest alternative name in bytes.
const ALT_NAME_MAX: usize = 127;

/// The alias by which an interface tells whose it is.
#[must_use]
pub fn alias(pool: &str, owner: &Owner) -> String {
    format!("{ALIAS_PREFIX}{pool}:{}:{}", owner.container_id, owner.ifname)
}

/// Pool and owner in an alias; `None` for those of egress-only mode, whose pool is empty, and of others.
#[must_use]
pub fn parse_alias(alias: &str) -> Option<(&str, Owner)> {
    let mut fields = alias.split(':');
    let (Some("COIL"), Some(pool), Some(container), Some(ifname), None) =
        (fields.next(), fields.next(), fields.next(), fields.next(), fields.next())
    else {
        return None;
    };
    if pool.is_empty() || container.is_empty() || ifname.is_empty() {
        return None;
    }
    Some((pool, Owner { container_id: container.into(), ifname: ifname.into() }))
}

/// The alternative name by which an interface tells which pod's it is: the alias, whose form is that of the
/// original, has no room for it. `None` if the kernel would not take it.
#[must_use]
pub fn alt_name(uid: &str, name: &str) -> Option<String> {
    // The interface's own name keeps two sandboxes of one pod apart.
    let alt = format!("{ALT_NAME_PREFIX}{uid}.{name}");
    let legal = |c: char| c.is_ascii_graphic() && c != '/' && c != ':';
    (!uid.is_empty() && alt.len() <= ALT_NAME_MAX && alt.chars().all(legal)).then_some(alt)
}

/// UID in an alternative name.
#[must_use]
pub fn parse_alt_name(alt: &str) -> Option<&str> {
    let (uid, _) = alt.strip_prefix(ALT_NAME_PREFIX)?.rsplit_once('.')?;
    (!uid.is_empty()).then_some(uid)
}

/// Name of a host-side interface. It follows from the owner, so that what was left behind is found; `attempt`
/// gives others if somebody else has the first.
#[must_use]
pub fn host_name(owner: &Owner, attempt: u32) -> String {
    let text = match attempt {
        0 => owner.to_string(),
        more => format!("{owner}:{more}"),
    };
    format!("{NAME_PREFIX}{}", sha1_digits(&text, 8))
}

/// Name of a host-side interface as Calico expects it.
#[must_use]
pub fn calico_name(namespace: &str, pod: &str) -> String {
    format!("{NAME_PREFIX}{}", sha1_digits(&format!("{namespace}.{pod}"), 11))
}

fn sha1_digits(text: &str, digits: usize) -> String {
    // Not a matter of secrecy: Calico computes names in this way.
    let hash = digest(&SHA1_FOR_LEGACY_USE_ONLY, text.as_bytes());
    hash.as_ref().iter().map(|byte| format!("{byte:02x}")).collect::<String>().chars().take(digits).collect()
}

/// The link-local address that follows from a hardware address, as the kernel makes it.
#[must_use]
pub fn link_local(mac: [u8; 6]) -> Ipv6Addr {
    let [a, b, c, d, e, f] = mac;
    let [a, b, c, d, e, f] = [a ^ 2, b, c, d, e, f].map(u16::from);
    Ipv6Addr::new(0xfe80, 0, 0, 0, a << 8 | b, c << 8 | 0xff, 0xfe00 | d, e << 8 | f)
}

/// An address of an interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Address {
    pub(super) ip: IpAddr,
    pub(super) prefix: u8,
    /// Without a route to the prefix.
    pub(super) no_prefix_route: bool,
}

/// A route over an interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Route {
    /// `0.0.0.0` or `::` with length 0 for the default route.
    pub(super) destination: IpAddr,
    pub(super) prefix: u8,
    pub(super) gateway: Option<IpAddr>,
}

/// Both ends of a pod's interface.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Plan {
    pub(super) host_addresses: Vec<Address>,
    /// In the table of pods.
    pub(super) host_routes: Vec<Route>,
    pub(super) pod_addresses: Vec<Address>,
    /// In the main table of the pod.
    pub(super) pod_routes: Vec<Route>,
}

/// Checks that the node has what the pod needs.
pub(super) fn check(assigned: &Assigned, node: NodeAddresses) -> Result<(), WiringError> {
    let missing = |family| Err(WiringError::NodeAddress { family, pool: assigned.pool.clone() });
    if assigned.ipv4.is_some() && node.ipv4.is_none() {
        return missing("IPv4");
    }
    if assigned.ipv6.is_some() && node.ipv6.is_none() {
        return missing("IPv6");
    }
    if assigned.ipv4.is_none() && assigned.ipv6.is_none() {
        return Err(WiringError::NoAddress);
    }
    Ok(())
}

/// Plans both ends. `gateway` is the link-local address of the host's end.
pub(super) fn plan(assigned: &Assigned, node: NodeAddresses, gateway: Ipv6Addr) -> Plan {
    let mut plan = Plan::default();
    if let (Some(pod), Some(node)) = (assigned.ipv4, node.ipv4) {
        plan.host_addresses.push(Address { ip: node.into(), prefix: 32, no_prefix_route: true });
        plan.host_routes.push(Route { destination: pod.into(), prefix: 32, gateway: None });
        plan.pod_addresses.push(Address { ip: pod.into(), prefix: 32, no_prefix_route: false });
        let any = IpAddr::V4(Ipv4Addr::UNSPECIFIED);
        plan.pod_routes.extend([
            Route { destination: node.into(), prefix: 32, gateway: None },
            Route { destination: any, prefix: 0, gateway: Some(node.into()) },
        ]);
    }
    if let (Some(pod), Some(node)) = (assigned.ipv6, node.ipv6) {
        plan.host_addresses.extend([
            Address { ip: gateway.into(), prefix: 64, no_prefix_route: false },
            Address { ip: node.into(), prefix: 128, no_prefix_route: true },
        ]);
        plan.host_routes.push(Route { destination: pod.into(), prefix: 128, gateway: None });
        plan.pod_addresses.push(Address { ip: pod.into(), prefix: 128, no_prefix_route: false });
        let any = IpAddr::V6(Ipv6Addr::UNSPECIFIED);
        plan.pod_routes.push(Route { destination: any, prefix: 0, gateway: Some(gateway.into()) });
    }
    plan
}

/// A rule of the host, as far as it matters.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostRule {
    /// Priority.
    pub priority: u32,
    /// Table that is looked up, if it is that kind of rule.
    pub table: Option<u32>,
    /// It is for all packets.
    pub everything: bool,
}

/// What is to be done about the rule that looks the table of pods up.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RulePlan {
    /// It is missing.
    pub add: bool,
    /// Rules of others at our priority: one that comes before ours may take packets away from it.
    pub foreign: Vec<HostRule>,
}

/// Compares the rules of one family with the one that there should be. Rules of others are never touched.
#[must_use]
pub fn plan_rules(rules: &[HostRule], priority: u32, table: u32) -> RulePlan {
    let ours = HostRule { priority, table: Some(table), everything: true };
    RulePlan {
        add: !rules.contains(&ours),
        foreign: rules.iter().filter(|rule| rule.priority == priority && **rule != ours).cloned().collect(),
    }
}

/// An interface as far as it may be a way out of the node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Uplink {
    /// Largest packet.
    pub mtu: u32,
    /// Hardware, not something that software has made.
    pub physical: bool,
    /// It is up.
    pub up: bool,
}

/// Largest packet of pods: the smallest of the ways out, else of all physical interfaces that are up; `None`
/// leaves the kernel's default.
#[must_use]
pub fn choose_mtu(ways_out: &[u32], interfaces: &[Uplink]) -> Option<u32> {
    let least = |values: &mut dyn Iterator<Item = u32>| values.filter(|mtu| *mtu > 0).min();
    least(&mut ways_out.iter().copied()).or_else(|| {
        least(&mut interfaces.iter().filter(|link| link.physical && link.up).map(|link| link.mtu))
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;

    fn owner(container: &str) -> Owner {
        Owner { container_id: container.into(), ifname: "eth0".into() }
    }

    fn assigned(ipv4: Option<&str>, ipv6: Option<&str>) -> Assigned {
        Assigned {
            pool: "default".into(),
            ipv4: ipv4.map(|text| text.parse().unwrap()),
            ipv6: ipv6.map(|text| text.parse().unwrap()),
        }
    }

    fn node() -> NodeAddresses {
        NodeAddresses { ipv4: Some([10, 0, 0, 1].into()), ipv6: Some("fd00::1".parse().unwrap()) }
    }

    #[test]
    fn an_alias_has_four_fields_and_a_pool() {
        assert_eq!(parse_alias(&alias("default", &owner("c1"))), Some(("default", owner("c1"))));
        for bad in
            ["", "COIL", "COIL::uid:eth0", "COIL:p:c", "COIL:p:c:", "COIL:p::eth0", "COIL:p:c:e:x", "X:p:c:e"]
        {
            assert_eq!(parse_alias(bad), None, "{bad}");
        }
    }

    #[test]
    fn an_alternative_name_tells_the_pod() {
        let uid = "3f2a8e2c-1111-2222-3333-444455556666";
        let name = alt_name(uid, "veth01234567").unwrap();
        assert_eq!(parse_alt_name(&name), Some(uid));
        assert_eq!(parse_alt_name("eth0"), None);
        assert_eq!(parse_alt_name("coil-pod.."), None);
        for bad in ["", "a/b", "a b", &"x".repeat(200)] {
            assert_eq!(alt_name(bad, "veth0"), None, "{bad}");
        }
    }

    #[test]
    fn names_of_interfaces() {
        // `echo -n default.nginx | sha1sum`
        assert_eq!(calico_name("default", "nginx"), "vethc440f455693");
        assert_eq!(calico_name("default", "nginx").len(), 15);
        let names: std::collections::BTreeSet<String> =
            (0..NAMES).map(|attempt| host_name(&owner("c1"), attempt)).collect();
        assert_eq!(names.len(), NAMES as usize);
        assert!(names.iter().all(|name| name.len() == 12 && name.starts_with("veth")));
        assert_eq!(host_name(&owner("c1"), 0), host_name(&owner("c1"), 0));
    }

    #[test]
    fn a_link_local_address_is_made_like_the_kernel_does() {
        let mac = [0x02, 0x42, 0xac, 0x11, 0x00, 0x02];
        assert_eq!(link_local(mac).to_string(), "fe80::42:acff:fe11:2");
    }

    #[test]
    fn a_dual_stack_pod() {
        let gateway = "fe80::1".parse().unwrap();
        let both = assigned(Some("10.1.0.7"), Some("fd01::7"));
        assert!(check(&both, node()).is_ok());
        let plan = plan(&both, node(), gateway);
        assert_eq!(
            plan.pod_addresses.iter().map(|a| (a.ip.to_string(), a.prefix)).collect::<Vec<_>>(),
            [("10.1.0.7".to_owned(), 32), ("fd01::7".to_owned(), 128)]
        );
        // The gateway must be reachable before the default route names it.
        assert_eq!(plan.pod_routes.iter().map(|r| r.prefix).collect::<Vec<_>>(), [32, 0, 0]);
        assert_eq!(plan.pod_routes[2].gateway, Some(IpAddr::V6(gateway)));
        assert_eq!(plan.host_routes.len(), 2);
        assert_eq!(plan.host_addresses.len(), 3);
    }

    #[test]
    fn one_family_has_nothing_of_the_other() {
        let v4 = plan(&assigned(Some("10.1.0.7"), None), node(), Ipv6Addr::LOCALHOST);
        let all = |plan: &Plan| {
            let addresses = plan.host_addresses.iter().chain(&plan.pod_addresses).map(|a| a.ip);
            let routes = plan.host_routes.iter().chain(&plan.pod_routes).map(|r| r.destination);
            addresses.chain(routes).collect::<Vec<_>>()
        };
        assert!(all(&v4).iter().all(IpAddr::is_ipv4) && all(&v4).len() == 5);
        let v6 = plan(&assigned(None, Some("fd01::7")), node(), Ipv6Addr::LOCALHOST);
        assert!(all(&v6).iter().all(IpAddr::is_ipv6) && all(&v6).len() == 5);
    }

    #[test]
    fn a_node_without_the_family_of_the_pool_is_told() {
        let v4_only = NodeAddresses { ipv6: None, ..node() };
        let error = check(&assigned(Some("10.1.0.7"), Some("fd01::7")), v4_only).unwrap_err();
        assert!(error.to_string().contains("IPv6"), "{error}");
        assert!(check(&assigned(Some("10.1.0.7"), None), v4_only).is_ok());
        assert!(check(&assigned(None, None), node()).is_err());
    }

    #[test]
    fn the_rule_is_added_once_and_those_of_others_stay() {
        let ours = HostRule { priority: 2000, table: Some(116), everything: true };
        let foreign = HostRule { priority: 2000, table: Some(500), everything: true };
        let elsewhere = HostRule { priority: 1000, table: Some(116), everything: true };
        assert!(plan_rules(&[], 2000, 116).add);
        assert_eq!(plan_rules(&[elsewhere, ours.clone()], 2000, 116), RulePlan::default());
        // The original would silently have left its rule out.
        let plan = plan_rules(std::slice::from_ref(&foreign), 2000, 116);
        assert_eq!(plan, RulePlan { add: true, foreign: vec![foreign.clone()] });
        assert!(!plan_rules(&[foreign, ours.clone()], 2000, 116).add);
        // It is for some packets only.
        let narrow = HostRule { everything: false, ..ours };
        assert!(plan_rules(&[narrow], 2000, 116).add);
    }

    #[test]
    fn the_smallest_way_out_counts() {
        let link = |mtu, physical, up| Uplink { mtu, physical, up };
        assert_eq!(choose_mtu(&[9000, 1400], &[link(1300, true, true)]), Some(1400));
        let links = [link(1500, true, true), link(1450, true, false), link(1300, false, true)];
        assert_eq!(choose_mtu(&[], &links), Some(1500));
        assert_eq!(choose_mtu(&[], &links[1..]), None);
        assert_eq!(choose_mtu(&[0], &links), Some(1500));
    }
}
