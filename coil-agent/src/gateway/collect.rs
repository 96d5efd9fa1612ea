//! The collector of translations that have expired.
//!
//! Walks through the forward table and notes each half in little room, then through the reverse table,
//! which owns the ports, and joins each entry with the note of its other half: so a walk reads each
//! entry once, in batches. Only where a translation seems to have expired are both halves looked up
//! again and then removed, the forward half first: as long as the owner stands, nobody else gets the
//! port that the forward half would still send from. Forward halves whose owner was not met are looked
//! at in a third pass, if there are any.
//!
//! The walk also counts what each client has, and puts the counts right that the datapath keeps.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};
use std::marker::PhantomData;

use coil_common::names::MAP_GATEWAY_USAGE;

use super::nat::{Facts, Half, NatFamily, NatMaps, NatStore, V4, V6};
use crate::datapath::internal::{Cursor, Loaded, Recount, SharedUsage, Usage};
use crate::datapath::timeouts::{Timeouts, expired, is_pressed};
use crate::datapath::{LoadError, MapAccessError};

/// Entries that are read in one go.
const BATCH: usize = 4096;

/// What a collector has done since it was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Totals {
    /// Translations removed after their time-out.
    pub(crate) expired: u64,
    /// Halves without their other half that were removed.
    pub(crate) orphans: u64,
    /// What removed translations had counted from clients.
    pub(crate) sent_bytes: u64,
    /// What removed translations had counted from remotes.
    pub(crate) received_bytes: u64,
    /// Translations found by the last complete walk.
    pub(crate) entries: u64,
    /// By how much counts of clients had been wrong, altogether.
    pub(crate) corrected: u64,
    /// Seconds by which the oldest of them had been overdue, in the last complete walk.
    pub(crate) overdue: u32,
}

/// A hasher of what is a hash already.
#[derive(Clone, Copy, Debug, Default)]
struct Same(u64);

impl Hasher for Same {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|byte| self.0 = self.0.rotate_left(8) ^ u64::from(*byte));
    }

    fn write_u64(&mut self, value: u64) {
        self.0 = value;
    }
}

/// What is noted of a forward half.
#[derive(Clone, Copy, Debug)]
struct Note {
    last_seen: u32,
    state: u32,
    met: bool,
}

/// Hash of a translation, the same for both of its halves: of the keys under which they are found.
fn identity<K: bytemuck::Pod>(forward: &K, reverse: &K) -> u64 {
    let mut hash = 0u64;
    for key in [forward, reverse] {
        let mut words = bytemuck::bytes_of(key).chunks_exact(4);
        for word in words.by_ref() {
            let word = word.try_into().map_or(0, u32::from_ne_bytes);
            hash = coil_ebpf::family::mix(hash, word);
        }
    }
    hash
}

/// Where a walk stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Pass {
    /// Notes forward halves.
    Note,
    /// Joins reverse halves with them.
    Join,
    /// Looks at forward halves that nobody has met.
    Rest,
}

/// What a collector goes by.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rules {
    /// Translations that fit.
    pub(crate) capacity: usize,
    /// How long idle ones are kept.
    pub(crate) timeouts: Timeouts,
    /// Seed of the datapath's hashes.
    pub(crate) seed: u32,
}

/// The collector of one family.
pub(crate) struct Collector<F, S, U> {
    store: S,
    usage: U,
    rules: Rules,
    pass: Pass,
    cursor: Cursor,
    notes: HashMap<u64, Note, BuildHasherDefault<Same>>,
    recount: Recount,
    live: u64,
    overdue: u32,
    totals: Totals,
    family: PhantomData<F>,
}

impl<F: NatFamily, S: NatStore<F>, U: Usage> Collector<F, S, U> {
    /// At the beginning of a walk.
    pub(crate) fn new(store: S, usage: U, rules: Rules) -> Self {
        Self {
            store,
            usage,
            rules,
            pass: Pass::Note,
            cursor: Cursor::default(),
            notes: HashMap::default(),
            recount: Recount::default(),
            live: 0,
            overdue: 0,
            totals: Totals::default(),
            family: PhantomData,
        }
    }

    /// What it has done.
    pub(crate) fn totals(&self) -> Totals {
        self.totals
    }

    /// Looks at about `budget` entries at `now` seconds since boot; true at the end of a walk.
    pub(crate) fn sweep(&mut self, now: u32, budget: usize) -> Result<bool, S::Error> {
        let mut seen = 0;
        while seen < budget {
            if self.pass == Pass::Note && self.cursor.is_start() {
                self.notes.clear();
                self.recount.begin(now, &self.usage);
            }
            let half = if self.pass == Pass::Join { Half::Reverse } else { Half::Forward };
            let slice = self.store.slice(half, &mut self.cursor, (budget - seen).min(BATCH))?;
            seen += slice.len().max(1);
            match self.pass {
                Pass::Note => self.note(&slice),
                Pass::Join => {
                    let others = self.meet(&slice);
                    for ((key, value), other) in slice.iter().zip(others) {
                        self.join(now, key, value, other)?;
                    }
                }
                Pass::Rest => slice.iter().try_for_each(|(key, value)| self.rest(now, key, value))?,
            }
            if self.cursor.is_start() {
                self.pass = match self.pass {
                    Pass::Note => Pass::Join,
                    Pass::Join if self.notes.values().any(|note| !note.met) => Pass::Rest,
                    Pass::Join | Pass::Rest => {
                        self.finish();
                        return Ok(true);
                    }
                };
            }
        }
        Ok(false)
    }

    fn finish(&mut self) {
        self.pass = Pass::Note;
        // Room for a table that was full once is not kept for ever.
        self.notes.clear();
        self.notes.shrink_to(usize::try_from(self.live).unwrap_or(0));
        let corrected = self.recount.finish(F::owns, &self.usage);
        if corrected > 0 {
            tracing::debug!(corrected, "put counts of translations right");
        }
        self.totals.corrected += corrected;
        self.totals.entries = std::mem::take(&mut self.live);
        self.totals.overdue = std::mem::take(&mut self.overdue);
    }

    /// Notes forward halves. Hashes first, for the same reason as in [`Self::meet`].
    fn note(&mut self, slice: &[(F::Key, F::Value)]) {
        let identities: Vec<u64> =
            slice.iter().map(|(key, value)| identity(key, &F::reverse_key(key, value))).collect();
        for (identity, (_, value)) in identities.into_iter().zip(slice) {
            let facts = F::facts(value);
            let note = Note { last_seen: facts.last_seen, state: facts.state, met: false };
            self.notes.insert(identity, note);
        }
    }

    /// What is noted of the other halves of reverse halves; of none: nothing seen.
    ///
    /// Notes of a million translations are in no cache. In a loop that does nothing else the processor waits for
    /// several at once, which makes a walk a third shorter.
    fn meet(&mut self, slice: &[(F::Key, F::Value)]) -> Vec<Facts> {
        let identities: Vec<u64> =
            slice.iter().map(|(key, value)| identity(&F::forward_key(key, value), key)).collect();
        let other = |identity| {
            self.notes.get_mut(&identity).map_or(Facts::default(), |note| {
                note.met = true;
                Facts { last_seen: note.last_seen, state: note.state, ..Facts::default() }
            })
        };
        identities.into_iter().map(other).collect()
    }

    fn join(&mut self, now: u32, key: &F::Key, value: &F::Value, other: Facts) -> Result<(), S::Error> {
        let cells = F::cells(self.rules.seed, &F::forward_key(key, value));
        let facts = F::facts(value);
        self.recount.see(facts.created, &cells);
        if self.late(now, key, facts, other).is_none() {
            self.live += 1;
            return Ok(());
        }
        // A packet may have come since the tables were read, or the port may have another user.
        let Some(value) = self.store.get(Half::Reverse, key)? else { return Ok(()) };
        let forward = self.half_of(key, &value)?;
        let other = forward.as_ref().map_or(Facts::default(), F::facts);
        let Some(late) = self.late(now, key, F::facts(&value), other) else {
            self.live += 1;
            return Ok(());
        };
        let forward_key = F::forward_key(key, &value);
        if forward.is_some() {
            self.store.remove(Half::Forward, &forward_key)?;
        } else {
            self.totals.orphans += 1;
        }
        self.store.remove(Half::Reverse, key)?;
        for cell in F::cells(self.rules.seed, &forward_key) {
            self.usage.add(cell, -1);
        }
        self.harvest(late, Some(value), forward);
        Ok(())
    }

    /// The forward half that belongs to a reverse entry.
    fn half_of(&self, key: &F::Key, value: &F::Value) -> Result<Option<F::Value>, S::Error> {
        let forward_key = F::forward_key(key, value);
        let forward = self.store.get(Half::Forward, &forward_key)?;
        Ok(forward.filter(|forward| F::reverse_key(&forward_key, forward) == *key))
    }

    fn rest(&mut self, now: u32, key: &F::Key, value: &F::Value) -> Result<(), S::Error> {
        let met = self.notes.get(&identity(key, &F::reverse_key(key, value))).is_none_or(|note| note.met);
        if met || self.owner(key, value)? == Owner::Us {
            return Ok(());
        }
        let Some(value) = self.store.get(Half::Forward, key)? else { return Ok(()) };
        let reverse_key = F::reverse_key(key, &value);
        let late = match self.owner(key, &value)? {
            Owner::Us => None,
            // The datapath mends it if the client sends on, until it would have expired.
            Owner::Nobody => self.late(now, &reverse_key, Facts::default(), F::facts(&value)),
            // Replies to this one would go to somebody else.
            Owner::Other => Some(0),
        };
        if let Some(late) = late {
            self.store.remove(Half::Forward, key)?;
            self.totals.orphans += 1;
            self.harvest(late, None, Some(value));
        }
        Ok(())
    }

    /// Whose the port is that a forward entry sends from.
    fn owner(&self, key: &F::Key, value: &F::Value) -> Result<Owner, S::Error> {
        let reverse_key = F::reverse_key(key, value);
        Ok(match self.store.get(Half::Reverse, &reverse_key)? {
            Some(reverse) if F::forward_key(&reverse_key, &reverse) == *key => Owner::Us,
            Some(_) => Owner::Other,
            None => Owner::Nobody,
        })
    }

    /// By how many seconds a translation has outlived its time; `None` if it has not.
    fn late(&self, now: u32, key: &F::Key, reverse: Facts, forward: Facts) -> Option<u32> {
        let (protocol, port) = F::service(key);
        let last_seen = reverse.last_seen.max(forward.last_seen);
        let pressed = is_pressed(self.totals.entries, self.rules.capacity as u64);
        let timeout = self.rules.timeouts.of(protocol, port, reverse.state | forward.state, pressed);
        expired(now, last_seen, timeout).then(|| now - last_seen - timeout)
    }

    fn harvest(&mut self, late: u32, reverse: Option<F::Value>, forward: Option<F::Value>) {
        let facts = |value: Option<F::Value>| value.map_or(Facts::default(), |v| F::facts(&v));
        self.totals.expired += 1;
        self.totals.sent_bytes += facts(forward).bytes;
        self.totals.received_bytes += facts(reverse).bytes;
        self.overdue = self.overdue.max(late);
    }
}

/// The collectors of both families, in turn.
pub struct NatCollector {
    v4: Collector<V4, NatMaps<V4>, SharedUsage>,
    v6: Collector<V6, NatMaps<V6>, SharedUsage>,
    second: bool,
    capacity: usize,
}

impl NatCollector {
    /// Takes the tables.
    pub(crate) fn new(loaded: &mut Loaded, timeouts: Timeouts, seed: u32) -> Result<Self, LoadError> {
        let (v4, v6) = (NatMaps::new(loaded)?, NatMaps::new(loaded)?);
        let usage = |loaded: &Loaded| SharedUsage::new(loaded, MAP_GATEWAY_USAGE);
        let rules = |capacity| Rules { capacity, timeouts, seed };
        let (rules_v4, rules_v6) = (rules(v4.capacity()), rules(v6.capacity()));
        Ok(Self {
            v4: Collector::new(v4, usage(loaded)?, rules_v4),
            v6: Collector::new(v6, usage(loaded)?, rules_v6),
            second: false,
            capacity: rules_v4.capacity + rules_v6.capacity,
        })
    }

    /// Translations of both families that fit.
    pub(crate) fn capacity(&self) -> usize {
        self.capacity
    }

    /// What has been done, by family.
    pub(crate) fn totals(&self) -> [Totals; 2] {
        [self.v4.totals(), self.v6.totals()]
    }

    /// Translations of both families that the last complete walks have left.
    pub fn entries(&self) -> u64 {
        self.totals().iter().map(|totals| totals.entries).sum()
    }

    /// Looks at about `budget` entries at `now` seconds since boot, and removes those that have expired;
    /// true at the end of a walk through both families.
    pub fn sweep(&mut self, now: u32, budget: usize) -> Result<bool, MapAccessError> {
        if !self.second {
            self.second = self.v4.sweep(now, budget)?;
            return Ok(false);
        }
        let finished = self.v6.sweep(now, budget)?;
        self.second = !finished;
        Ok(finished)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Owner {
    Us,
    Other,
    Nobody,
}

#[cfg(test)]
#[path = "collect_tests.rs"]
mod tests;
