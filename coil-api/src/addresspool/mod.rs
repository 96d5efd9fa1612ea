//! `AddressPool`: networks from which nodes get blocks of addresses for their pods.

#![expect(unreachable_pub, reason = "KubeSchema makes a private copy of the struct that it describes")]

mod carve;
mod schema;
mod validate;

use kube::{CustomResource, KubeSchema};
use serde::{Deserialize, Serialize};

pub use carve::{BlockNets, Layout};
pub use schema::crd;
pub use validate::validate;

use crate::violation::Violation;

/// `spec.blockSizeBits` unless somebody says otherwise: 32 addresses for each block.
pub const DEFAULT_BLOCK_SIZE_BITS: i32 = 5;
/// Most of `spec.blockSizeBits`. A node keeps a bit for each address of its blocks.
pub const MAX_BLOCK_SIZE_BITS: i32 = 24;
/// Most entries of `spec.subnets`; bounds the cost of the rules in the schema.
pub const MAX_SUBNETS: usize = 128;
/// Most blocks of a pool, since the index of a block is a positive `int32`.
pub const MAX_BLOCKS: u64 = 1 << 31;

/// What an AddressPool should be.
#[derive(CustomResource, KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
#[kube(
    group = "coil.cybozu.com",
    version = "v2",
    kind = "AddressPool",
    plural = "addresspools",
    singular = "addresspool",
    derive = "PartialEq",
    doc = "AddressPool is a set of networks from which nodes get blocks of addresses for their pods.",
    printcolumn(
        name = "BlockSize Bits",
        type_ = "integer",
        json_path = ".spec.blockSizeBits",
        description = "Power of two of the number of addresses in a block."
    ),
    validation = Rule::new("self.metadata.name.size() <= 63")
        .message("the name must be legal as the value of a label: at most 63 characters"),
)]
#[serde(rename_all = "camelCase")]
pub struct AddressPoolSpec {
    /// Power of two of the number of addresses in a block. Cannot be changed.
    #[serde(default = "default_block_size_bits")]
    #[schemars(schema_with = "schema::block_size_bits")]
    pub block_size_bits: i32,

    /// Networks, all with the same families. More can be appended; nothing else can be changed.
    #[schemars(schema_with = "schema::subnets")]
    pub subnets: Vec<SubnetSet>,
}

/// A network of one family, or one of each with room for the same number of addresses.
#[derive(Serialize, Deserialize, Clone, Debug, Default, PartialEq, Eq)]
pub struct SubnetSet {
    /// An IPv4 network in CIDR notation.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ipv4: Option<String>,
    /// An IPv6 network in CIDR notation.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ipv6: Option<String>,
}

impl SubnetSet {
    /// Whether this is a network of IPv4 only.
    #[must_use]
    pub fn is_ipv4(&self) -> bool {
        self.ipv4.is_some() && self.ipv6.is_none()
    }

    /// Whether this is a network of IPv6 only.
    #[must_use]
    pub fn is_ipv6(&self) -> bool {
        self.ipv4.is_none() && self.ipv6.is_some()
    }

    /// Whether this is a network of each family.
    #[must_use]
    pub fn is_dual_stack(&self) -> bool {
        self.ipv4.is_some() && self.ipv6.is_some()
    }
}

impl AddressPool {
    /// How the pool is carved into blocks. Looks at the pool alone, not at its age or at others.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn layout(&self) -> Result<Layout, Vec<Violation>> {
        Layout::of(&self.spec)
    }

    /// The networks of the block with this index; nothing if the pool is invalid or has no such block.
    #[must_use]
    pub fn block(&self, index: u32) -> Option<BlockNets> {
        self.layout().ok()?.block(index)
    }

    /// Whether somebody has deleted the pool; no address of it is given out any more.
    #[must_use]
    pub fn is_being_deleted(&self) -> bool {
        self.metadata.deletion_timestamp.is_some()
    }
}

fn default_block_size_bits() -> i32 {
    DEFAULT_BLOCK_SIZE_BITS
}

#[cfg(test)]
mod tests;
