//! Who has which address, and what becomes of this node's blocks. Pure.
//!
//! What counts is who holds an address ([`Ledger::allocate`], [`Ledger::free`], what was found in the
//! kernel); the bitmaps of blocks follow from that. An address is taken back in one step together with its
//! record, whatever becomes of its block later, so that no failure leaves a record that could free the
//! address of a later pod.
//!
//! An empty block is given back in steps, and nothing is handed out from it from the first one on, since
//! nobody can tell whether a request to delete it that was not answered has been carried out:
//! [`Ledger::withdraw`], then its routes are removed, then the object is deleted, then [`Ledger::gone`].

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;

use ipnet::IpNet;
use tokio::time::Instant;

use super::block::{Offsets, Range};
use super::pool::choose;
use super::{Assigned, Found, Owner};

/// A block, as the API has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockView {
    /// Name of the object.
    pub name: String,
    /// Its UID: a block of the same name later is another.
    pub uid: String,
    /// Its version.
    pub version: String,
    /// Its number in the pool.
    pub index: i32,
    /// Its pool.
    pub pool: String,
    /// Its addresses.
    pub range: Range,
    /// Somebody keeps the whole block for himself.
    pub reserved: bool,
    /// Somebody has deleted it; the finalizer keeps it.
    pub deleted: bool,
}

/// A block, as this node uses it.
#[derive(Clone, Debug)]
struct Block {
    view: BlockView,
    offsets: Offsets,
    /// Since when nobody has an address of it; nothing if that was so when we came.
    empty_since: Option<Instant>,
    /// It is being given back.
    withdrawn: bool,
    /// When it was learnt of.
    learnt: u64,
}

impl Block {
    fn is_usable(&self) -> bool {
        !self.withdrawn && !self.view.reserved && !self.view.deleted
    }

    fn order(&self) -> (i32, &str) {
        (self.view.index, &self.view.uid)
    }
}

/// What a comparison with the API found, for people.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Compared {
    /// Blocks that are new here.
    pub learnt: Vec<String>,
    /// Blocks that are gone although pods have addresses of them.
    pub lost: Vec<String>,
}

/// Numbers of a pool, for metrics.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Blocks.
    pub blocks: u64,
    /// Addresses that pods have.
    pub used: u64,
    /// Addresses that can be handed out.
    pub free: u64,
}

/// Blocks and owners of a node.
#[derive(Clone, Debug, Default)]
pub struct Ledger {
    blocks: BTreeMap<String, Block>,
    /// More than one if the kernel is in disorder.
    owners: BTreeMap<Owner, Vec<Assigned>>,
    /// Counts what happens, for want of a better clock.
    time: u64,
    /// Blocks that are gone, by UID, and when: a list that was asked for before may still have them.
    gone: BTreeMap<String, u64>,
}

impl Ledger {
    /// What the kernel holds, and no blocks yet.
    #[must_use]
    pub fn new(found: impl IntoIterator<Item = Found>) -> Self {
        let mut owners: BTreeMap<Owner, Vec<Assigned>> = BTreeMap::new();
        for Found { owner, assigned } in found {
            owners.entry(owner).or_default().push(assigned);
        }
        Self { owners, ..Self::default() }
    }

    /// Addresses of an owner, if it has some, all of them in blocks of this node. With a block that is lost
    /// they may be another node's by now.
    #[must_use]
    pub fn held(&self, owner: &Owner) -> Option<&Assigned> {
        self.owners.get(owner)?.iter().find(|assigned| {
            let mut all = addresses(assigned).peekable();
            all.peek().is_some() && all.all(|address| self.has(address))
        })
    }

    /// New addresses for an owner; nothing if no block of the pool at hand has one.
    pub fn allocate(&mut self, pool: &str, owner: &Owner, now: Instant) -> Option<Assigned> {
        // What it had, in blocks that are lost.
        self.free(owner, now);
        let mut blocks: Vec<&Block> =
            self.blocks.values().filter(|block| block.view.pool == pool && block.is_usable()).collect();
        blocks.sort_by_key(|block| block.order());
        let (uid, offset) = choose(blocks.into_iter().map(|block| (&block.view.uid, &block.offsets)))?;
        let uid = uid.clone();
        let block = self.blocks.get_mut(&uid)?;
        block.offsets.take(offset);
        block.empty_since = None;
        let (ipv4, ipv6) = block.view.range.at(offset);
        let assigned = Assigned { pool: pool.to_owned(), ipv4, ipv6 };
        self.owners.insert(owner.clone(), vec![assigned.clone()]);
        Some(assigned)
    }

    /// Takes the addresses of an owner back; false if it had none.
    pub fn free(&mut self, owner: &Owner, now: Instant) -> bool {
        let Some(assigned) = self.owners.remove(owner) else {
            return false;
        };
        self.time += 1;
        // A kernel in disorder may have two interfaces with one address.
        let others: BTreeSet<IpAddr> = self.owners.values().flatten().flat_map(addresses).collect();
        for block in self.blocks.values_mut() {
            let range = block.view.range;
            let still: BTreeSet<u64> = others.iter().filter_map(|other| range.offset(*other)).collect();
            for offset in assigned.iter().flat_map(addresses).filter_map(|address| range.offset(address)) {
                if !still.contains(&offset)
                    && block.offsets.free(offset, self.time)
                    && block.offsets.used() == 0
                {
                    block.empty_since = Some(now);
                }
            }
        }
        true
    }

    /// Whether an address can be handed out at once.
    #[must_use]
    pub fn has_free(&self, pool: &str) -> bool {
        self.blocks
            .values()
            .any(|block| block.view.pool == pool && block.is_usable() && block.offsets.unused() > 0)
    }

    /// Learns of a block that the controller has just given us.
    pub fn learn(&mut self, view: BlockView, now: Instant) {
        if self.gone.contains_key(&view.uid) {
            return;
        }
        self.time += 1;
        match self.blocks.get_mut(&view.uid) {
            Some(block) => block.renew(view),
            None => self.add(view, Some(now)),
        }
    }

    /// A mark for [`Ledger::compare`], taken before the list is asked for.
    #[must_use]
    pub fn mark(&self) -> u64 {
        self.time
    }

    /// Compares with all blocks that the API has for this node. Of those that are new here, the empty ones
    /// count as empty since the time given, else for long enough.
    pub fn compare(&mut self, views: Vec<BlockView>, mark: u64, since: Option<Instant>) -> Compared {
        let mut compared = Compared::default();
        let listed: BTreeSet<String> = views.iter().map(|view| view.uid.clone()).collect();
        self.gone.retain(|uid, time| *time > mark || listed.contains(uid));
        let unlisted = self.blocks.values().filter(|block| {
            // What came after the question cannot be in the answer.
            block.learnt <= mark && !listed.contains(&block.view.uid)
        });
        for uid in unlisted.map(|block| block.view.uid.clone()).collect::<Vec<_>>() {
            compared.lost.extend(self.gone(&uid));
        }
        self.time += 1;
        for view in views {
            if self.gone.contains_key(&view.uid) {
                continue;
            }
            match self.blocks.get_mut(&view.uid) {
                Some(block) => block.renew(view),
                None => {
                    compared.learnt.push(view.name.clone());
                    self.add(view, since);
                }
            }
        }
        compared
    }

    /// Blocks that have been empty for some time and can be given back.
    #[must_use]
    pub fn idle(&self, delay: Duration, now: Instant) -> Vec<BlockView> {
        let idle = |block: &&Block| {
            !block.withdrawn
                && !block.view.reserved
                && block.offsets.used() == 0
                && (block.view.deleted
                    || block.empty_since.is_none_or(|since| now.saturating_duration_since(since) >= delay))
        };
        self.blocks.values().filter(idle).map(|block| block.view.clone()).collect()
    }

    /// When the next block will have been empty for some time.
    #[must_use]
    pub fn next_idle(&self, delay: Duration, now: Instant) -> Option<Instant> {
        let waiting = self
            .blocks
            .values()
            .filter(|block| !block.withdrawn && !block.view.reserved && block.offsets.used() == 0);
        let ends = waiting.filter_map(|block| block.empty_since).map(|since| since + delay);
        ends.filter(|end| *end > now).min()
    }

    /// Begins to give a block back, if it is still empty and, as the API says now, nobody's. From here on
    /// nothing is handed out from it.
    pub fn withdraw(&mut self, view: BlockView) -> bool {
        let Some(block) = self.blocks.get_mut(&view.uid) else {
            return false;
        };
        block.renew(view);
        if block.offsets.used() > 0 || block.view.reserved {
            return false;
        }
        block.withdrawn = true;
        true
    }

    /// Blocks that are being given back.
    pub fn withdrawn(&self) -> impl Iterator<Item = &BlockView> {
        self.blocks.values().filter(|block| block.withdrawn).map(|block| &block.view)
    }

    /// A block was not deleted, and will not be, since somebody has reserved it.
    pub fn keep(&mut self, view: BlockView) {
        if let Some(block) = self.blocks.get_mut(&view.uid) {
            block.renew(view);
            block.withdrawn = false;
        }
    }

    /// A block does not exist any more. Returns its name if pods have addresses of it, which they keep.
    pub fn gone(&mut self, uid: &str) -> Option<String> {
        self.time += 1;
        let block = self.blocks.remove(uid)?;
        self.gone.insert(uid.to_owned(), self.time);
        (block.offsets.used() > 0).then_some(block.view.name)
    }

    /// Whether a block of this name is at hand, not being given back.
    #[must_use]
    pub fn has_block(&self, name: &str) -> bool {
        self.blocks.values().any(|block| block.view.name == name && !block.withdrawn)
    }

    /// Networks that other nodes should send here: all blocks but those that are being given back.
    #[must_use]
    pub fn routes(&self) -> BTreeSet<IpNet> {
        let kept = self.blocks.values().filter(|block| !block.withdrawn);
        kept.flat_map(|block| block.view.range.nets()).collect()
    }

    /// Numbers of each pool.
    #[must_use]
    pub fn usage(&self) -> BTreeMap<String, Usage> {
        let mut usage: BTreeMap<String, Usage> = BTreeMap::new();
        for block in self.blocks.values() {
            let pool = usage.entry(block.view.pool.clone()).or_default();
            pool.blocks += 1;
            pool.used = pool.used.saturating_add(block.offsets.used());
            if block.is_usable() {
                pool.free = pool.free.saturating_add(block.offsets.unused());
            }
        }
        usage
    }

    /// Owners of addresses that are in no block of this node.
    #[must_use]
    pub fn strays(&self) -> Vec<&Owner> {
        let stray = |assigned: &Assigned| addresses(assigned).any(|address| !self.has(address));
        self.owners.iter().filter(|(_, all)| all.iter().any(stray)).map(|(owner, _)| owner).collect()
    }

    /// Who has what.
    pub fn owners(&self) -> impl Iterator<Item = (&Owner, &Assigned)> {
        self.owners.iter().flat_map(|(owner, all)| all.iter().map(move |assigned| (owner, assigned)))
    }

    fn has(&self, address: IpAddr) -> bool {
        self.blocks.values().any(|block| block.view.range.offset(address).is_some())
    }

    fn add(&mut self, view: BlockView, since: Option<Instant>) {
        // There is but one object of a name, so that an older one is gone.
        let same_name = self.blocks.values().find(|block| block.view.name == view.name);
        if let Some(old) = same_name.map(|block| block.view.uid.clone()) {
            self.gone(&old);
        }
        let mut offsets = Offsets::new(view.range.size());
        for assigned in self.owners.values().flatten() {
            for offset in addresses(assigned).filter_map(|address| view.range.offset(address)) {
                offsets.take(offset);
            }
        }
        let empty_since = since.filter(|_| offsets.used() == 0);
        let block = Block { offsets, empty_since, withdrawn: false, learnt: self.time, view };
        self.blocks.insert(block.view.uid.clone(), block);
    }
}

impl Block {
    /// Takes over what may change. Addresses do not: whatever has been handed out stays what it is.
    fn renew(&mut self, view: BlockView) {
        self.view = BlockView { range: self.view.range, pool: std::mem::take(&mut self.view.pool), ..view };
    }
}

fn addresses(assigned: &Assigned) -> impl Iterator<Item = IpAddr> + use<> {
    assigned.ipv4.map(IpAddr::V4).into_iter().chain(assigned.ipv6.map(IpAddr::V6))
}

#[cfg(test)]
mod tests;
