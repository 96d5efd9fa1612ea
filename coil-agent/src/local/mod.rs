//! Which host-side interface belongs to which pod of this node.
//!
//! Owns the alias by which an interface remembers its pod. The knowledge comes from CNI ADD, from
//! aliases found at start, and for pods that are older than Coil from routes (`adopt`).

mod adopt;
mod filters;
mod monitor;

pub use adopt::adopt_pods;
pub use filters::watch_filters;
pub use monitor::{MonitorError, watch_links};

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use crate::desired::PodUid;
use crate::netlink::Link;
use crate::wiring;

/// Every alias of ours in egress-only mode begins with this.
pub const ALIAS_PREFIX: &str = "COIL::";

/// Name of a pod's main interface, where nobody has said otherwise.
pub const POD_INTERFACE: &str = "eth0";

/// The alias of a pod's host-side interface. The pool, between the colons, is empty in egress-only mode.
#[must_use]
pub fn alias(uid: &str, ifname: &str) -> String {
    format!("{ALIAS_PREFIX}{uid}:{ifname}")
}

/// UID and interface name in an alias.
#[must_use]
pub fn parse_alias(alias: &str) -> Option<(&str, &str)> {
    let (uid, ifname) = alias.strip_prefix(ALIAS_PREFIX)?.split_once(':')?;
    (!uid.is_empty() && !ifname.is_empty()).then_some((uid, ifname))
}

/// UID and interface name that an interface tells: in IPAM mode the alias names the container, and an
/// alternative name the pod.
#[must_use]
pub fn pod_of(link: &Link) -> Option<(&str, &str)> {
    let alias = link.alias.as_deref()?;
    parse_alias(alias).or_else(|| {
        wiring::parse_alias(alias)?;
        let ifname = alias.rsplit(':').next()?;
        Some((link.pod.as_deref()?, ifname))
    })
}

/// A pod's connection to the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LocalPod {
    /// Name of the interface inside the pod.
    pub ifname: String,
    /// Index of the host-side interface.
    pub ifindex: u32,
    /// Largest packet of the host-side interface.
    pub mtu: u32,
    /// Addresses that the container runtime told of; empty if Coil was not there.
    pub addresses: Vec<IpAddr>,
}

/// Connections of the pods of this node.
#[derive(Debug, Default)]
pub struct LocalPods {
    by_uid: BTreeMap<PodUid, Entry>,
    recovered: bool,
}

#[derive(Debug)]
struct Entry {
    pod: LocalPod,
    /// Number of the last listing that had begun when the pod was wired: only later ones can tell that
    /// the interface is gone.
    listing: u64,
}

impl LocalPods {
    /// Takes a pod whose interface is known for certain; `listing` is the number of the last listing
    /// that has begun. Returns pods that had the interface before.
    pub fn wire(&mut self, uid: &str, pod: LocalPod, listing: u64) -> Vec<PodUid> {
        let before: Vec<PodUid> = self
            .by_uid
            .iter()
            .filter(|(other, entry)| *other != uid && entry.pod.ifindex == pod.ifindex)
            .map(|(other, _)| other.clone())
            .collect();
        for other in &before {
            self.by_uid.remove(other);
        }
        self.by_uid.insert(uid.into(), Entry { pod, listing });
        before
    }

    /// Forgets an interface that was removed. Returns the pods that had it.
    pub fn unwire(&mut self, ifindex: u32) -> Vec<PodUid> {
        let mut gone = Vec::new();
        self.by_uid.retain(|uid, entry| {
            let stays = entry.pod.ifindex != ifindex;
            if !stays {
                gone.push(uid.clone());
            }
            stays
        });
        gone
    }

    /// Takes all interfaces of ours, and those of pods without our alias, as of listing number
    /// `listing`. Returns pods whose interface is gone.
    pub fn list(&mut self, links: &[Link], listing: u64) -> Vec<PodUid> {
        let by_index: BTreeMap<u32, &Link> = links.iter().map(|link| (link.index, link)).collect();
        let mut gone = Vec::new();
        self.by_uid.retain(|uid, entry| {
            let link = by_index.get(&entry.pod.ifindex);
            match link {
                Some(link) => entry.pod.mtu = link.mtu,
                None if listing > entry.listing => {
                    gone.push(uid.clone());
                    return false;
                }
                None => {}
            }
            true
        });
        let taken: BTreeSet<u32> = self.by_uid.values().map(|e| e.pod.ifindex).collect();
        // An alias of the main interface wins over those of further interfaces of the pod.
        let mut found: Vec<(&str, &str, &Link)> = links
            .iter()
            .filter(|link| !taken.contains(&link.index))
            .filter_map(|link| {
                let (uid, ifname) = pod_of(link)?;
                Some((uid, ifname, link))
            })
            .collect();
        found.sort_by_key(|(uid, ifname, link)| (*uid, *ifname != POD_INTERFACE, *ifname, link.index));
        for (uid, ifname, link) in found {
            if self.by_uid.contains_key(uid) {
                continue;
            }
            let pod =
                LocalPod { ifname: ifname.into(), ifindex: link.index, mtu: link.mtu, addresses: Vec::new() };
            self.by_uid.insert(uid.into(), Entry { pod, listing });
            gone.retain(|gone| gone != uid);
        }
        self.recovered = true;
        gone
    }

    /// The connection of a pod.
    #[must_use]
    pub fn get(&self, uid: &str) -> Option<&LocalPod> {
        self.by_uid.get(uid).map(|entry| &entry.pod)
    }

    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = (&PodUid, &LocalPod)> {
        self.by_uid.iter().map(|(uid, entry)| (uid, &entry.pod))
    }

    /// Interfaces have been listed once.
    #[must_use]
    pub fn recovered(&self) -> bool {
        self.recovered
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

    use super::*;

    fn link(index: u32, alias: &str) -> Link {
        Link {
            index,
            name: format!("veth{index}"),
            alias: Some(alias.into()),
            kind: Some("veth".into()),
            mtu: 1500,
            peer: Some(2),
            peer_netns: Some(0),
            pod: None,
        }
    }

    fn local(ifindex: u32) -> LocalPod {
        LocalPod { ifname: "eth0".into(), ifindex, mtu: 1500, addresses: vec![[10, 0, 0, 1].into()] }
    }

    #[test]
    fn aliases() {
        assert_eq!(parse_alias(&alias("u-1", "eth0")), Some(("u-1", "eth0")));
        for bad in ["", "COIL:", "COIL::", "COIL::u", "COIL:pool:c:eth0", "COIL::u:", "x"] {
            assert_eq!(parse_alias(bad), None, "{bad}");
        }
    }

    #[test]
    fn aliases_recover_pods_the_main_interface_first() {
        let mut pods = LocalPods::default();
        assert!(!pods.recovered());
        pods.list(&[link(7, "COIL::a:net1"), link(8, "COIL::a:eth0"), link(9, "other")], 1);
        assert!(pods.recovered());
        assert_eq!(pods.get("a").unwrap().ifindex, 8);
        assert_eq!(pods.iter().count(), 1);
    }

    #[test]
    fn a_listing_that_began_before_the_pod_was_wired_does_not_remove_it() {
        let mut pods = LocalPods::default();
        pods.wire("a", local(5), 3);
        assert!(pods.list(&[], 3).is_empty());
        assert!(pods.get("a").is_some());
        assert_eq!(pods.list(&[], 4), ["a"]);
        assert!(pods.get("a").is_none());
    }

    #[test]
    fn a_new_sandbox_of_the_same_pod_replaces_the_old_one() {
        let mut pods = LocalPods::default();
        pods.wire("a", local(5), 1);
        pods.wire("a", local(6), 1);
        assert_eq!(pods.get("a").unwrap().ifindex, 6);
        // Both interfaces still exist: the one that was wired last counts.
        pods.list(&[link(5, "COIL::a:eth0"), link(6, "COIL::a:eth0")], 2);
        assert_eq!(pods.get("a").unwrap().ifindex, 6);
        // A listing finds the new one by itself, after a restart between the two.
        assert!(pods.list(&[link(9, "COIL::a:eth0")], 3).is_empty());
        assert_eq!(pods.get("a").unwrap().ifindex, 9);
    }

    #[test]
    fn an_interface_belongs_to_one_pod() {
        let mut pods = LocalPods::default();
        pods.wire("a", local(5), 1);
        assert_eq!(pods.wire("b", local(5), 1), ["a"]);
        assert!(pods.get("a").is_none());
    }

    #[test]
    fn in_ipam_mode_another_name_tells_the_pod() {
        let mut pods = LocalPods::default();
        let ours = Link { pod: Some("a".into()), ..link(7, "COIL:default:c1:eth0") };
        // The original's does not: it is found by the route to it.
        pods.list(&[ours.clone(), link(8, "COIL:default:c2:eth0")], 1);
        assert_eq!(pods.iter().map(|(uid, pod)| (uid.as_str(), pod.ifindex)).collect::<Vec<_>>(), [("a", 7)]);
        assert_eq!(pods.unwire(7), ["a"]);
        assert!(pods.unwire(7).is_empty());
        // Somebody else's interface with a name like ours.
        pods.list(&[Link { alias: Some("x".into()), ..ours }], 2);
        assert_eq!(pods.iter().count(), 0);
    }

    #[test]
    fn a_change_of_mtu_is_seen() {
        let mut pods = LocalPods::default();
        pods.wire("a", local(5), 1);
        let mut changed = link(5, "COIL::a:eth0");
        changed.mtu = 9000;
        pods.list(&[changed], 2);
        assert_eq!(pods.get("a").unwrap().mtu, 9000);
    }
}
