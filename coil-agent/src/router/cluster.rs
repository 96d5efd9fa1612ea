//! What the cluster looks like to the router: whose blocks are where. No client, no clock.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use coil_api::AddressBlock;
use ipnet::IpNet;
use k8s_openapi::api::core::v1::Node;
use kube::ResourceExt;

/// Destinations and the routers to them.
pub type Wanted = BTreeMap<IpNet, IpAddr>;

/// An AddressBlock.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockView {
    /// Its name.
    pub name: String,
    /// The node that it belongs to.
    pub node: String,
    /// Its networks, at most one of each family.
    pub nets: Vec<IpNet>,
}

impl BlockView {
    /// Reads a block.
    ///
    /// # Errors
    /// A network is none.
    pub fn of(block: &AddressBlock) -> Result<Self, String> {
        let nets = block.nets().map_err(|problem| problem.to_string())?;
        let ipv4 = nets.ipv4.map(IpNet::V4);
        Ok(Self {
            name: block.name_any(),
            node: block.node().unwrap_or_default().to_owned(),
            nets: ipv4.into_iter().chain(nets.ipv6.map(IpNet::V6)).collect(),
        })
    }
}

/// A Node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeView {
    /// Its name.
    pub name: String,
    /// Its internal IPv4 address.
    pub ipv4: Option<Ipv4Addr>,
    /// Its internal IPv6 address.
    pub ipv6: Option<Ipv6Addr>,
}

impl NodeView {
    /// Reads a node. Of several internal addresses of a family the last one counts, as in the original.
    #[must_use]
    pub fn of(node: &Node) -> Self {
        let mut view = Self { name: node.name_any(), ipv4: None, ipv6: None };
        let addresses = node.status.iter().flat_map(|status| status.addresses.iter().flatten());
        for address in addresses.filter(|address| address.type_ == "InternalIP") {
            match address.address.parse() {
                Ok(IpAddr::V4(address)) => view.ipv4 = Some(address),
                Ok(IpAddr::V6(address)) => view.ipv6 = Some(address),
                Err(_) => {}
            }
        }
        view
    }

    /// Its address of the family of a network.
    fn towards(&self, net: &IpNet) -> Option<IpAddr> {
        match net {
            IpNet::V4(_) => self.ipv4.map(IpAddr::V4),
            IpNet::V6(_) => self.ipv6.map(IpAddr::V6),
        }
    }
}

/// A change of one kind, whose objects have no namespace.
pub type Change<T> = crate::index::Change<T, String>;

/// A change of the picture.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Input {
    /// Of blocks.
    Blocks(Change<BlockView>),
    /// Of nodes.
    Nodes(Change<NodeView>),
}

/// Objects of one kind, and whether they have been listed.
#[derive(Clone, Debug)]
struct Listed<T> {
    objects: BTreeMap<String, T>,
    complete: bool,
}

impl<T> Listed<T> {
    fn new() -> Self {
        Self { objects: BTreeMap::new(), complete: false }
    }

    fn take(&mut self, change: Change<T>, name: fn(&T) -> &str) {
        match change {
            Change::Apply(object) => {
                self.objects.insert(name(&object).to_owned(), object);
            }
            Change::Delete(name) => {
                self.objects.remove(&name);
            }
            Change::Reset { objects, unreadable } => {
                let mut old = std::mem::take(&mut self.objects);
                let kept = unreadable.iter().filter_map(|name| old.remove_entry(name));
                self.objects = kept.collect();
                self.objects.extend(objects.into_iter().map(|object| (name(&object).to_owned(), object)));
                self.complete = true;
            }
        }
    }
}

/// All blocks and nodes.
#[derive(Clone, Debug)]
pub struct Cluster {
    own: String,
    blocks: Listed<BlockView>,
    nodes: Listed<NodeView>,
}

impl Cluster {
    /// Nothing is known yet; `own` is the node that we run on.
    #[must_use]
    pub fn new(own: impl Into<String>) -> Self {
        Self { own: own.into(), blocks: Listed::new(), nodes: Listed::new() }
    }

    /// Takes a change.
    pub fn take(&mut self, input: Input) {
        match input {
            Input::Blocks(change) => self.blocks.take(change, |block| &block.name),
            Input::Nodes(change) => self.nodes.take(change, |node| &node.name),
        }
    }

    /// The routes that should be there; `None` until both kinds have been listed, since a route must not go
    /// only because its block or node is not known yet.
    #[must_use]
    pub fn wanted(&self) -> Option<Wanted> {
        if !self.blocks.complete || !self.nodes.complete {
            return None;
        }
        let mut wanted = Wanted::new();
        for block in self.blocks.objects.values().filter(|block| block.node != self.own) {
            let Some(node) = self.nodes.objects.get(&block.node) else { continue };
            for net in &block.nets {
                if let Some(router) = node.towards(net) {
                    // Of two blocks with one network, which should not be, the first by name stands.
                    wanted.entry(net.trunc()).or_insert(router);
                }
            }
        }
        Some(wanted)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;
    use serde_json::json;

    fn block(name: &str, node: &str, nets: &[&str]) -> BlockView {
        let nets = nets.iter().map(|net| net.parse().unwrap()).collect();
        BlockView { name: name.into(), node: node.into(), nets }
    }

    fn node(name: &str, ipv4: Option<&str>, ipv6: Option<&str>) -> NodeView {
        NodeView {
            name: name.into(),
            ipv4: ipv4.map(|text| text.parse().unwrap()),
            ipv6: ipv6.map(|text| text.parse().unwrap()),
        }
    }

    fn reset<T>(objects: Vec<T>) -> Change<T> {
        Change::Reset { objects, unreadable: Vec::new() }
    }

    #[test]
    fn nothing_is_wanted_until_all_is_known() {
        let mut cluster = Cluster::new("own");
        assert_eq!(cluster.wanted(), None);
        cluster.take(Input::Blocks(Change::Apply(block("a-0", "n1", &["10.2.0.0/27"]))));
        cluster.take(Input::Nodes(reset(vec![node("n1", Some("10.0.0.1"), None)])));
        assert_eq!(cluster.wanted(), None);
        cluster.take(Input::Blocks(reset(Vec::new())));
        assert_eq!(cluster.wanted(), Some(Wanted::new()));
    }

    #[test]
    fn what_cannot_be_read_any_more_stays_as_it_was() {
        let mut cluster = Cluster::new("own");
        cluster.take(Input::Nodes(reset(vec![node("n1", Some("10.0.0.1"), None)])));
        let blocks = vec![block("a-0", "n1", &["10.2.0.0/27"]), block("a-1", "n1", &["10.2.0.32/27"])];
        cluster.take(Input::Blocks(reset(blocks)));
        let broken = Change::Reset { objects: Vec::new(), unreadable: vec!["a-0".into()] };
        cluster.take(Input::Blocks(broken));
        let wanted: Vec<_> = cluster.wanted().unwrap().into_keys().collect();
        assert_eq!(wanted, ["10.2.0.0/27".parse().unwrap()]);
        cluster.take(Input::Blocks(Change::Delete("a-0".into())));
        assert_eq!(cluster.wanted(), Some(Wanted::new()));
    }

    #[test]
    fn objects_are_read_from_the_api() {
        let object = json!({
            "apiVersion": "coil.cybozu.com/v2", "kind": "AddressBlock",
            "metadata": {"name": "default-3", "labels": {"coil.cybozu.com/node": "n1"}},
            "index": 3, "ipv4": "10.2.0.96/27", "ipv6": "fd02::60/123",
        });
        let read = |object: serde_json::Value| BlockView::of(&serde_json::from_value(object).unwrap());
        let want = block("default-3", "n1", &["10.2.0.96/27", "fd02::60/123"]);
        assert_eq!(read(object.clone()), Ok(want));
        let mut wrong = object;
        wrong["ipv4"] = json!("10.2.0.96");
        assert!(read(wrong).is_err());
        let object = json!({"metadata": {"name": "n1"}, "status": {"addresses": [
            {"type": "Hostname", "address": "n1"},
            {"type": "InternalIP", "address": "10.0.0.1"},
            {"type": "ExternalIP", "address": "192.0.2.1"},
            {"type": "InternalIP", "address": "10.0.0.2"},
            {"type": "InternalIP", "address": "fd00::1"},
        ]}});
        let read = NodeView::of(&serde_json::from_value(object).unwrap());
        assert_eq!(read, node("n1", Some("10.0.0.2"), Some("fd00::1")));
    }
}
