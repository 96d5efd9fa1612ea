//! Carving of a pool into blocks. The pool is the row of its subnets; the index of a block counts through
//! all of them. Numbers that an index cannot hold are cut off at [`MAX_BLOCKS`], never wrapped.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use super::{AddressPoolSpec, MAX_BLOCKS, validate};
use crate::violation::Violation;

/// The networks of a block: at least one is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BlockNets {
    /// The IPv4 network.
    pub ipv4: Option<Ipv4Net>,
    /// The IPv6 network.
    pub ipv6: Option<Ipv6Net>,
}

/// A valid pool, ready to be carved.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    bits: u8,
    subnets: Vec<Subnet>,
    blocks: u64,
}

/// One entry of `spec.subnets`, parsed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Subnet {
    pub(super) ipv4: Option<Ipv4Net>,
    pub(super) ipv6: Option<Ipv6Net>,
    /// Index of the first block.
    first: u64,
    /// Number of blocks that have an index.
    blocks: u64,
}

impl Subnet {
    pub(super) fn new(ipv4: Option<Ipv4Net>, ipv6: Option<Ipv6Net>) -> Self {
        Self { ipv4, ipv6, first: 0, blocks: 0 }
    }

    /// Addresses as a power of two.
    fn host_bits(&self) -> u8 {
        match (self.ipv4, self.ipv6) {
            (Some(net), _) => 32 - net.prefix_len(),
            (None, Some(net)) => 128 - net.prefix_len(),
            (None, None) => 0,
        }
    }
}

impl Layout {
    pub(super) fn of(spec: &AddressPoolSpec) -> Result<Self, Vec<Violation>> {
        let (bits, mut subnets) = validate::parse(spec)?;
        let mut first = 0;
        for subnet in &mut subnets {
            subnet.first = first;
            // Less than 64, or it is far more than an index can count.
            let power = u32::from(subnet.host_bits().saturating_sub(bits));
            let blocks = 1u64.checked_shl(power).unwrap_or(MAX_BLOCKS);
            subnet.blocks = blocks.min(MAX_BLOCKS - first);
            first += subnet.blocks;
        }
        Ok(Self { bits, subnets, blocks: first })
    }

    /// Number of blocks, at most [`MAX_BLOCKS`].
    #[must_use]
    pub fn blocks(&self) -> u64 {
        self.blocks
    }

    /// Number of addresses of each family in a block.
    #[must_use]
    pub fn block_size(&self) -> u32 {
        1 << self.bits
    }

    /// The networks of a block, if the pool has a block with this index.
    #[must_use]
    pub fn block(&self, index: u32) -> Option<BlockNets> {
        let index = u64::from(index);
        let subnet = self.subnets.iter().find(|s| (s.first..s.first + s.blocks).contains(&index))?;
        let offset = u128::from(index - subnet.first) << self.bits;
        let ipv4 = match subnet.ipv4 {
            Some(net) => {
                let address = net.network().to_bits().checked_add(u32::try_from(offset).ok()?)?;
                Some(Ipv4Net::new(Ipv4Addr::from_bits(address), 32 - self.bits).ok()?)
            }
            None => None,
        };
        let ipv6 = match subnet.ipv6 {
            Some(net) => {
                let address = net.network().to_bits().checked_add(offset)?;
                Some(Ipv6Net::new(Ipv6Addr::from_bits(address), 128 - self.bits).ok()?)
            }
            None => None,
        };
        Some(BlockNets { ipv4, ipv6 })
    }

    /// The next index after `index` whose block may be free of `net`, which overlaps with the block of `index`.
    /// It may be that of no block.
    #[must_use]
    pub fn index_behind(&self, index: u32, net: IpNet) -> u32 {
        let next = index.saturating_add(1);
        let at = u64::from(index);
        let Some(subnet) = self.subnets.iter().find(|s| (s.first..s.first + s.blocks).contains(&at)) else {
            return next;
        };
        let covers = |ours: Option<IpNet>| ours.is_some_and(|ours| net.contains(&ours));
        if covers(subnet.ipv4.map(IpNet::V4)) || covers(subnet.ipv6.map(IpNet::V6)) {
            return u32::try_from(subnet.first + subnet.blocks).unwrap_or(u32::MAX).max(next);
        }
        self.index_of(net.broadcast()).map_or(next, |last| last.saturating_add(1).max(next))
    }

    /// Index of the block that has this address, if any block has it.
    #[must_use]
    pub fn index_of(&self, address: IpAddr) -> Option<u32> {
        self.subnets.iter().find_map(|subnet| {
            let offset = match (address, subnet.ipv4, subnet.ipv6) {
                (IpAddr::V4(address), Some(net), _) if net.contains(&address) => {
                    u128::from(address.to_bits() - net.network().to_bits())
                }
                (IpAddr::V6(address), _, Some(net)) if net.contains(&address) => {
                    address.to_bits() - net.network().to_bits()
                }
                _ => return None,
            };
            let block = u64::try_from(offset >> self.bits).ok().filter(|block| *block < subnet.blocks)?;
            u32::try_from(subnet.first + block).ok()
        })
    }
}
