//! All pools and blocks that the leader knows of, and the choice of the next block.
//!
//! The book is filled from watches, which lag, and from our own writes, which it hears of at once. It may
//! therefore take an index for free that is not; then the API server refuses the name of the block, the
//! block in the way is told to the book, and the choice is made again. What is being created is kept as
//! pending, so that many requests are served at the same time.

use std::collections::{BTreeSet, HashMap, HashSet};

use coil_api::addresspool::validate;
use coil_api::violation::describe;
use coil_api::{AddressBlock, AddressPool, BlockNets, Layout, names};
use ipnet::IpNet;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::ResourceExt;

use super::indexes::Indexes;
use super::nets::Nets;

/// Pools and blocks.
#[derive(Clone, Debug, Default)]
pub struct Book {
    pools: HashMap<String, Pool>,
    blocks: HashMap<String, Block>,
    /// Name of the block that answers a request, by the UID of the request.
    requests: HashMap<String, String>,
    /// Names of the blocks of each node; the empty name stands for no node.
    nodes: HashMap<String, BTreeSet<String>>,
    nets: Nets,
}

/// What is known of a pool, be it only that there are blocks of it.
#[derive(Clone, Debug, Default)]
struct Pool {
    known: Option<Known>,
    /// Taken: by blocks of the pool, by other blocks of such names, and by what is pending.
    indexes: Indexes,
    /// Indexes of blocks that are being created.
    pending: HashSet<u32>,
    /// Number of blocks with the label of the pool.
    blocks: u64,
}

#[derive(Clone, Debug)]
struct Known {
    metadata: ObjectMeta,
    /// Nothing if it cannot be read.
    object: Option<AddressPool>,
    /// Its networks, as far as they can be read.
    nets: Vec<IpNet>,
    /// How to carve it, or why not.
    layout: Result<Layout, String>,
    deleted: bool,
}

/// What is known of a block.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Block {
    uid: String,
    pool: Option<String>,
    node: String,
    request: Option<String>,
    nets: Option<BlockNets>,
    /// Pools and indexes that nobody else may have.
    claims: Vec<(String, u32)>,
    reserved: bool,
}

/// What to do about a request.
#[derive(Clone, Debug, PartialEq)]
pub enum Choice {
    /// This block answers it already.
    Existing(String),
    /// Create this block; the index is pending until [`Book::settle`].
    Create {
        /// The pool, as the book knows it.
        pool: Box<AddressPool>,
        /// Index of the block.
        index: u32,
        /// Networks of the block.
        nets: BlockNets,
    },
    /// Say no.
    Refuse(Refusal),
}

/// Why there is no block.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// There is no such pool.
    #[error("there is no AddressPool {0}")]
    NoPool(String),
    /// The pool is not valid.
    #[error("AddressPool {pool} is not valid: {why}")]
    Invalid {
        /// Its name.
        pool: String,
        /// What is wrong with it.
        why: String,
    },
    /// Somebody has deleted the pool.
    #[error("AddressPool {0} is being deleted")]
    BeingDeleted(String),
    /// All blocks are taken.
    #[error("no block of AddressPool {0} is free")]
    OutOfBlocks(String),
}

/// Figures of a pool, for metrics.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PoolFigures {
    /// Name of the pool.
    pub name: String,
    /// Blocks that fit, if the pool can be read.
    pub max_blocks: Option<u64>,
    /// Blocks that exist.
    pub blocks: u64,
    /// Whether blocks are carved from it.
    pub valid: bool,
}

impl Book {
    /// Notes a pool; returns the names of the others whose validity may have changed by that.
    pub fn apply_pool(&mut self, object: AddressPool) -> Vec<String> {
        let name = object.name_any();
        let known = Known {
            metadata: object.metadata.clone(),
            deleted: object.is_being_deleted(),
            nets: nets_of(&object),
            layout: Err(String::new()),
            object: Some(object),
        };
        self.put_pool(&name, known)
    }

    /// Notes a pool that cannot be read; as [`Book::apply_pool`].
    pub fn apply_unreadable_pool(&mut self, metadata: &ObjectMeta, why: &str) -> Vec<String> {
        let name = metadata.name.as_deref().unwrap_or_default();
        let (metadata, deleted) = (metadata.clone(), metadata.deletion_timestamp.is_some());
        let layout = Err(format!("cannot be read: {why}"));
        self.put_pool(name, Known { metadata, object: None, nets: Vec::new(), layout, deleted })
    }

    /// Forgets a pool; returns the names of the others whose validity may have changed by that.
    pub fn remove_pool(&mut self, name: &str) -> Vec<String> {
        let Some(known) = self.pools.get_mut(name).and_then(|pool| pool.known.take()) else {
            return Vec::new();
        };
        self.forget_empty(name);
        self.judge_all(self.neighbours(name, &known.nets))
    }

    /// Names of all pools that exist.
    pub fn pools(&self) -> impl Iterator<Item = &str> {
        self.pools.iter().filter(|(_, pool)| pool.known.is_some()).map(|(name, _)| name.as_str())
    }

    /// Notes a block.
    pub fn apply_block(&mut self, object: &AddressBlock) {
        let name = object.name_any();
        let block = Block {
            uid: object.uid().unwrap_or_default(),
            pool: object.pool().map(str::to_owned),
            node: object.node().unwrap_or_default().to_owned(),
            request: object.request().filter(|uid| !uid.is_empty()).map(str::to_owned),
            nets: object.nets().ok(),
            claims: claims(&name, object.pool(), u32::try_from(object.index).ok()),
            reserved: object.is_reserved(),
        };
        self.put_block(name, block);
    }

    /// Notes a block of which only the metadata can be read: its name is taken.
    pub fn apply_unreadable_block(&mut self, metadata: &ObjectMeta) {
        let name = metadata.name.as_deref().unwrap_or_default();
        let label = |key: &str| metadata.labels.as_ref().and_then(|labels| labels.get(key)).cloned();
        let pool = label(names::LABEL_POOL);
        let block = Block {
            uid: metadata.uid.clone().unwrap_or_default(),
            claims: claims(name, pool.as_deref(), None),
            pool,
            node: label(names::LABEL_NODE).unwrap_or_default(),
            request: None,
            nets: None,
            reserved: label(names::LABEL_RESERVED).as_deref() == Some(names::RESERVED),
        };
        self.put_block(name.to_owned(), block);
    }

    /// Forgets a block, unless there is another one of its name by now; returns its pool and its node.
    pub fn remove_block(&mut self, name: &str, uid: &str) -> Option<(Option<String>, String)> {
        if self.blocks.get(name)?.uid != uid {
            return None;
        }
        let block = self.take_block(name)?;
        Some((block.pool, block.node))
    }

    /// Forgets all blocks but these; returns the pools of those that went.
    pub fn retain_blocks(&mut self, names: &HashSet<String>) -> BTreeSet<String> {
        let gone: Vec<String> = self.blocks.keys().filter(|name| !names.contains(*name)).cloned().collect();
        gone.iter().filter_map(|name| self.take_block(name)?.pool).collect()
    }

    /// Forgets all pools but these.
    pub fn retain_pools(&mut self, names: &HashSet<String>) -> Vec<String> {
        let gone: Vec<String> =
            self.pools().filter(|name| !names.contains(*name)).map(str::to_owned).collect();
        gone.iter().flat_map(|name| self.remove_pool(name)).collect()
    }

    /// What to do about a request for a block.
    pub fn choose(&mut self, pool_name: &str, request_uid: &str) -> Choice {
        if let Some(block) = self.answer(request_uid) {
            return Choice::Existing(block.to_owned());
        }
        let refuse = |make: fn(String) -> Refusal| Choice::Refuse(make(pool_name.to_owned()));
        let Some(pool) = self.pools.get_mut(pool_name) else { return refuse(Refusal::NoPool) };
        let Some(known) = &pool.known else { return refuse(Refusal::NoPool) };
        if known.deleted {
            return refuse(Refusal::BeingDeleted);
        }
        let (layout, object) = match (&known.layout, &known.object) {
            (Ok(layout), Some(object)) => (layout, object),
            (Err(why), _) => {
                return Choice::Refuse(Refusal::Invalid { pool: pool_name.to_owned(), why: why.clone() });
            }
            (Ok(_), None) => return refuse(Refusal::NoPool),
        };
        let mut from = 0;
        while let Some(index) = pool.indexes.lowest(from).filter(|index| *index < layout.blocks()) {
            let Some((index, nets)) = u32::try_from(index).ok().and_then(|i| Some((i, layout.block(i)?)))
            else {
                break;
            };
            match self.nets.overlapping(&nets) {
                None => {
                    pool.indexes.take(index);
                    pool.pending.insert(index);
                    return Choice::Create { pool: Box::new(object.clone()), index, nets };
                }
                // Go on behind it.
                Some(other) => from = u64::from(layout.index_behind(index, other)),
            }
        }
        refuse(Refusal::OutOfBlocks)
    }

    /// The creation of a block has ended, in whatever way; a block that is there now must be applied first.
    pub fn settle(&mut self, pool_name: &str, index: u32) {
        if let Some(pool) = self.pools.get_mut(pool_name)
            && pool.pending.remove(&index)
        {
            pool.indexes.give_back(index);
        }
        self.forget_empty(pool_name);
    }

    /// Whether a pool has been deleted and nothing of it is left, as far as we know: UID of the pool.
    #[must_use]
    pub fn finished(&self, pool_name: &str) -> Option<&str> {
        let pool = self.pools.get(pool_name)?;
        let known = pool.known.as_ref().filter(|known| known.deleted)?;
        let uid = known.metadata.uid.as_deref().unwrap_or_default();
        (pool.blocks == 0 && pool.pending.is_empty()).then_some(uid)
    }

    /// Metadata of a pool.
    #[must_use]
    pub fn pool(&self, name: &str) -> Option<&ObjectMeta> {
        Some(&self.pools.get(name)?.known.as_ref()?.metadata)
    }

    /// The block that answers a request, if there is one.
    #[must_use]
    pub fn answer(&self, request_uid: &str) -> Option<&str> {
        self.requests.get(request_uid).map(String::as_str)
    }

    /// Why nothing is carved from a pool, if that is so.
    #[must_use]
    pub fn invalid(&self, pool_name: &str) -> Option<&str> {
        self.pools.get(pool_name)?.known.as_ref()?.layout.as_ref().err().map(String::as_str)
    }

    /// Names of the blocks of a node; the empty name stands for no node, whose reserved blocks do not count.
    #[must_use]
    pub fn blocks_of_node(&self, node: &str) -> Vec<String> {
        let kept = |name: &&String| node.is_empty() && self.blocks.get(*name).is_some_and(|b| b.reserved);
        self.nodes.get(node).into_iter().flatten().filter(|name| !kept(name)).cloned().collect()
    }

    /// Names of all nodes that have blocks, existing or not.
    pub fn nodes(&self) -> impl Iterator<Item = &str> {
        self.nodes.keys().map(String::as_str)
    }

    /// Whether a node has blocks.
    #[must_use]
    pub fn has_blocks(&self, node: &str) -> bool {
        self.nodes.contains_key(node)
    }

    /// Figures of all pools that exist.
    pub fn figures(&self) -> impl Iterator<Item = PoolFigures> {
        self.pools.iter().filter_map(|(name, pool)| {
            let known = pool.known.as_ref()?;
            let max_blocks = match (&known.layout, &known.object) {
                (Ok(layout), _) => Some(layout.blocks()),
                (Err(_), Some(object)) => object.layout().ok().map(|layout| layout.blocks()),
                (Err(_), None) => None,
            };
            Some(PoolFigures {
                name: name.clone(),
                max_blocks,
                blocks: pool.blocks,
                valid: known.layout.is_ok(),
            })
        })
    }

    fn put_pool(&mut self, name: &str, mut known: Known) -> Vec<String> {
        let pool = self.pools.entry(name.to_owned()).or_default();
        let mut affected = known.nets.clone();
        if let Some(old) = pool.known.take() {
            if old.metadata.uid == known.metadata.uid {
                // Nobody can take a deletion back, but old news may come late.
                known.deleted |= old.deleted;
                let spec = |known: &Known| known.object.as_ref().map(|object| object.spec.clone());
                if old.object.is_some() && spec(&old) == spec(&known) {
                    known.layout = old.layout;
                    pool.known = Some(known);
                    return Vec::new();
                }
            }
            affected.extend(old.nets);
        }
        pool.known = Some(known);
        self.judge(name);
        self.judge_all(self.neighbours(name, &affected))
    }

    /// Names of the other pools that overlap with any of these networks.
    fn neighbours(&self, except: &str, nets: &[IpNet]) -> Vec<String> {
        let touches = |net: &IpNet| nets.iter().any(|n| n.contains(net) || net.contains(n));
        let others = self.pools.iter().filter(|(name, _)| *name != except);
        others
            .filter(|(_, pool)| pool.known.as_ref().is_some_and(|known| known.nets.iter().any(touches)))
            .map(|(name, _)| name.clone())
            .collect()
    }

    fn judge_all(&mut self, names: Vec<String>) -> Vec<String> {
        for name in &names {
            self.judge(name);
        }
        names
    }

    /// Validates a pool beside those that it overlaps with.
    fn judge(&mut self, name: &str) {
        let Some(known) = self.pools.get(name).and_then(|pool| pool.known.as_ref()) else { return };
        let Some(object) = &known.object else { return };
        let rivals = self.neighbours(name, &known.nets);
        let rivals = rivals.iter().filter_map(|name| self.pools.get(name)?.known.as_ref()?.object.as_ref());
        let violations = validate(object, None, rivals);
        let layout = if violations.is_empty() {
            object.layout().map_err(|v| describe(&v))
        } else {
            Err(describe(&violations))
        };
        if let Some(known) = self.pools.get_mut(name).and_then(|pool| pool.known.as_mut()) {
            known.layout = layout;
        }
    }

    fn put_block(&mut self, name: String, block: Block) {
        if self.blocks.get(&name) == Some(&block) {
            return;
        }
        self.take_block(&name);
        for (pool, index) in &block.claims {
            self.pools.entry(pool.clone()).or_default().indexes.take(*index);
        }
        if let Some(pool) = &block.pool {
            self.pools.entry(pool.clone()).or_default().blocks += 1;
        }
        if let Some(request) = &block.request {
            self.requests.insert(request.clone(), name.clone());
        }
        if let Some(nets) = &block.nets {
            self.nets.add(nets);
        }
        self.nodes.entry(block.node.clone()).or_default().insert(name.clone());
        self.blocks.insert(name, block);
    }

    fn take_block(&mut self, name: &str) -> Option<Block> {
        let block = self.blocks.remove(name)?;
        for (pool, index) in &block.claims {
            if let Some(pool) = self.pools.get_mut(pool) {
                pool.indexes.give_back(*index);
            }
        }
        if let Some(pool) = block.pool.as_ref().and_then(|pool| self.pools.get_mut(pool)) {
            pool.blocks -= 1;
        }
        if let Some(request) = &block.request
            && self.requests.get(request).is_some_and(|answer| answer == name)
        {
            self.requests.remove(request);
        }
        if let Some(nets) = &block.nets {
            self.nets.remove(nets);
        }
        if let Some(blocks) = self.nodes.get_mut(&block.node) {
            blocks.remove(name);
            if blocks.is_empty() {
                self.nodes.remove(&block.node);
            }
        }
        for (pool, _) in &block.claims {
            self.forget_empty(pool);
        }
        if let Some(pool) = &block.pool {
            self.forget_empty(pool);
        }
        Some(block)
    }

    fn forget_empty(&mut self, name: &str) {
        let empty = |pool: &Pool| pool.known.is_none() && pool.indexes.is_unused() && pool.blocks == 0;
        if self.pools.get(name).is_some_and(empty) {
            self.pools.remove(name);
        }
    }
}

/// A block claims the index that it says, and the one that its name says, since no other can have the name.
fn claims(name: &str, pool: Option<&str>, index: Option<u32>) -> Vec<(String, u32)> {
    let said = pool.zip(index).map(|(pool, index)| (pool.to_owned(), index));
    let named = name.rsplit_once('-').and_then(|(pool, digits)| {
        let index = digits.parse().ok()?;
        (names::block_name(pool, index) == name).then(|| (pool.to_owned(), index))
    });
    let mut claims: Vec<_> = said.into_iter().chain(named).collect();
    claims.dedup();
    claims
}

/// The networks of a pool; of one that is not valid by itself, those that can be read.
fn nets_of(object: &AddressPool) -> Vec<IpNet> {
    let texts = object.spec.subnets.iter().flat_map(|set| [&set.ipv4, &set.ipv6]).flatten();
    texts.filter_map(|text| coil_api::parse_destination(text).ok()).collect()
}

#[cfg(test)]
#[path = "book_tests.rs"]
mod tests;
