//! `AddressBlock`: a piece of a pool that belongs to a node. It has no `spec`; its fields are at the top.

use std::borrow::Cow;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference};
use kube::core::ClusterResourceScope;
use kube::{Resource, ResourceExt};
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::addresspool::{AddressPool, BlockNets};
use crate::destination::parse_destination;
use crate::names;
use crate::violation::Problem;

const KIND: &str = "AddressBlock";
const PLURAL: &str = "addressblocks";
const API_VERSION: &str = "coil.cybozu.com/v2";

/// A block of addresses, given to a node.
#[derive(Serialize, Deserialize, Clone, Debug, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct AddressBlock {
    #[serde(default = "api_version")]
    api_version: Cow<'static, str>,
    #[serde(default = "kind")]
    kind: Cow<'static, str>,
    /// Name, labels (pool, node, request), finalizer and owner.
    pub metadata: ObjectMeta,
    /// Number of the block in its pool.
    pub index: i32,
    /// The IPv4 network, in CIDR notation.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ipv4: Option<String>,
    /// The IPv6 network, in CIDR notation.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ipv6: Option<String>,
}

impl AddressBlock {
    /// A block of a pool for a node, as an answer to a request.
    #[must_use]
    pub fn new(pool: &AddressPool, index: u32, nets: &BlockNets, node: &str, request_uid: &str) -> Self {
        let pool_name = pool.name_any();
        let labels = [
            (names::LABEL_POOL, pool_name.as_str()),
            (names::LABEL_NODE, node),
            (names::LABEL_REQUEST, request_uid),
        ];
        let owner = OwnerReference {
            api_version: API_VERSION.to_owned(),
            kind: AddressPool::kind(&()).into_owned(),
            name: pool_name.clone(),
            uid: pool.uid().unwrap_or_default(),
            controller: Some(true),
            block_owner_deletion: Some(true),
        };
        Self {
            api_version: api_version(),
            kind: kind(),
            metadata: ObjectMeta {
                name: Some(names::block_name(&pool_name, index)),
                labels: Some(labels.map(|(key, value)| (key.to_owned(), value.to_owned())).into()),
                finalizers: Some(vec![names::FINALIZER.to_owned()]),
                owner_references: Some(vec![owner]),
                ..ObjectMeta::default()
            },
            index: i32::try_from(index).unwrap_or(i32::MAX),
            ipv4: nets.ipv4.map(|net| net.to_string()),
            ipv6: nets.ipv6.map(|net| net.to_string()),
        }
    }

    /// Name of its pool.
    #[must_use]
    pub fn pool(&self) -> Option<&str> {
        self.label(names::LABEL_POOL)
    }

    /// Name of its node.
    #[must_use]
    pub fn node(&self) -> Option<&str> {
        self.label(names::LABEL_NODE).filter(|name| !name.is_empty())
    }

    /// UID of the request that it answers.
    #[must_use]
    pub fn request(&self) -> Option<&str> {
        self.label(names::LABEL_REQUEST)
    }

    /// Whether somebody keeps the whole block for himself: no address of it is given out, and it is not
    /// returned when it is empty.
    #[must_use]
    pub fn is_reserved(&self) -> bool {
        self.label(names::LABEL_RESERVED) == Some(names::RESERVED)
    }

    /// Its networks.
    ///
    /// # Errors
    /// A text is not a network of its family.
    pub fn nets(&self) -> Result<BlockNets, Problem> {
        let ipv4 = match self.ipv4.as_deref() {
            Some(text) => Some(v4(text)?),
            None => None,
        };
        let ipv6 = match self.ipv6.as_deref() {
            Some(text) => Some(v6(text)?),
            None => None,
        };
        Ok(BlockNets { ipv4, ipv6 })
    }

    fn label(&self, key: &str) -> Option<&str> {
        self.metadata.labels.as_ref()?.get(key).map(String::as_str)
    }
}

impl Resource for AddressBlock {
    type DynamicType = ();
    type Scope = ClusterResourceScope;

    fn kind(_: &()) -> Cow<'_, str> {
        KIND.into()
    }

    fn group(_: &()) -> Cow<'_, str> {
        names::GROUP.into()
    }

    fn version(_: &()) -> Cow<'_, str> {
        names::VERSION.into()
    }

    fn plural(_: &()) -> Cow<'_, str> {
        PLURAL.into()
    }

    fn meta(&self) -> &ObjectMeta {
        &self.metadata
    }

    fn meta_mut(&mut self) -> &mut ObjectMeta {
        &mut self.metadata
    }
}

/// The CustomResourceDefinition of AddressBlock.
#[must_use]
pub fn crd() -> CustomResourceDefinition {
    let column = |name: &str, path: &str, description: &str| json!({ "name": name, "type": "string", "jsonPath": path, "description": description });
    let network = |description: &str| json!({ "type": "string", "description": description });
    let mut crd: CustomResourceDefinition = serde_json::from_value(json!({
        "metadata": { "name": format!("{PLURAL}.{}", names::GROUP) },
        "spec": {
            "group": names::GROUP,
            "names": { "kind": KIND, "plural": PLURAL, "singular": "addressblock" },
            "scope": "Cluster",
            "versions": [{
                "name": names::VERSION,
                "served": true,
                "storage": true,
                "additionalPrinterColumns": [
                    column("Node", r".metadata.labels['coil\.cybozu\.com/node']", "Node that has the block."),
                    column("Pool", r".metadata.labels['coil\.cybozu\.com/pool']", "Pool that the block is of."),
                    column("IPv4", ".ipv4", "IPv4 network."),
                    column("IPv6", ".ipv6", "IPv6 network."),
                ],
                "schema": { "openAPIV3Schema": {
                    "description": "AddressBlock is a piece of an AddressPool that belongs to a node.",
                    "type": "object",
                    "required": ["index"],
                    "properties": {
                        "index": {
                            "description": "Number of the block in its pool.",
                            "type": "integer",
                            "format": "int32",
                            "minimum": 0,
                        },
                        "ipv4": network("IPv4 network in CIDR notation."),
                        "ipv6": network("IPv6 network in CIDR notation."),
                    },
                } },
            }],
        },
    }))
    .expect("this is a CustomResourceDefinition");
    names::label(&mut crd.metadata);
    crd
}

fn v4(text: &str) -> Result<Ipv4Net, Problem> {
    match parse_destination(text)? {
        IpNet::V4(net) => Ok(net),
        IpNet::V6(_) => Err(Problem::Family { subnet: text.to_owned(), want: "IPv4" }),
    }
}

fn v6(text: &str) -> Result<Ipv6Net, Problem> {
    match parse_destination(text)? {
        IpNet::V6(net) => Ok(net),
        IpNet::V4(_) => Err(Problem::Family { subnet: text.to_owned(), want: "IPv6" }),
    }
}

fn api_version() -> Cow<'static, str> {
    API_VERSION.into()
}

fn kind() -> Cow<'static, str> {
    KIND.into()
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]
    use super::*;

    fn block(extra: &serde_json::Value) -> AddressBlock {
        let mut object = json!({ "metadata": { "name": "default-3" }, "index": 3 });
        for (key, value) in extra.as_object().unwrap() {
            object[key] = value.clone();
        }
        serde_json::from_value(object).unwrap()
    }

    #[test]
    fn fields_are_at_the_top() {
        let pool: AddressPool = serde_json::from_value(json!({
            "metadata": { "name": "default", "uid": "u" },
            "spec": { "blockSizeBits": 5, "subnets": [{ "ipv4": "10.2.0.0/16", "ipv6": "fd02::/112" }] },
        }))
        .unwrap();
        let nets = pool.block(10).unwrap();
        let block = AddressBlock::new(&pool, 10, &nets, "node1", "r");
        assert_eq!(
            serde_json::to_value(&block).unwrap(),
            json!({
                "apiVersion": "coil.cybozu.com/v2", "kind": "AddressBlock",
                "metadata": {
                    "name": "default-10",
                    "labels": {
                        "coil.cybozu.com/node": "node1", "coil.cybozu.com/pool": "default", "coil.cybozu.com/request": "r",
                    },
                    "finalizers": ["coil.cybozu.com"],
                    "ownerReferences": [{
                        "apiVersion": "coil.cybozu.com/v2", "kind": "AddressPool", "name": "default", "uid": "u",
                        "controller": true, "blockOwnerDeletion": true,
                    }],
                },
                "index": 10, "ipv4": "10.2.1.64/27", "ipv6": "fd02::140/123",
            })
        );
        assert_eq!(block.nets(), Ok(nets));
        assert_eq!(
            (block.pool(), block.node(), block.request()),
            (Some("default"), Some("node1"), Some("r"))
        );
    }

    #[test]
    fn what_people_write_by_hand() {
        let plain = block(&json!({}));
        assert_eq!((plain.pool(), plain.node(), plain.is_reserved()), (None, None, false));
        assert_eq!(plain.nets(), Ok(BlockNets { ipv4: None, ipv6: None }));
        let metadata =
            json!({ "labels": { "coil.cybozu.com/node": "", "coil.cybozu.com/reserved": "true" } });
        let reserved = block(&json!({ "metadata": metadata }));
        assert_eq!((reserved.node(), reserved.is_reserved()), (None, true));
        assert!(block(&json!({ "ipv4": "fd00::/64" })).nets().is_err());
        assert!(block(&json!({ "ipv6": "10.0.0.0/24" })).nets().is_err());
        assert!(block(&json!({ "ipv4": "x" })).nets().is_err());
    }
}
