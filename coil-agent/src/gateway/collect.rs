//! The collector of translations that have expired.
//!
//! Walks through the reverse table, which owns the ports, and joins each entry with its forward half;
//! then through the forward table for halves that are left over. Both halves are read again before
//! they are removed, and the forward half goes first: as long as the owner stands, nobody else gets
//! the port that the forward half would still send from.

use std::marker::PhantomData;

use super::nat::{Facts, Half, NatFamily, NatMaps, NatStore, V4, V6};
use crate::datapath::internal::{Cursor, Loaded};
use crate::datapath::timeouts::{TCP_OPENING, TCP_OPENING_PRESSED, TCP_RESET, expired, timeout};
use crate::datapath::{LoadError, MapAccessError};

const TCP: u32 = libc::IPPROTO_TCP.cast_unsigned();

/// No translation expires earlier than this after its last packet.
const SHORTEST: u32 = TCP_RESET;

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
    /// Seconds by which the oldest of them had been overdue, in the last complete walk.
    pub(crate) overdue: u32,
}

/// The collector of one family.
pub(crate) struct Collector<F, S> {
    store: S,
    /// Translations that fit.
    capacity: u64,
    half: Half,
    cursor: Cursor,
    live: u64,
    overdue: u32,
    totals: Totals,
    family: PhantomData<F>,
}

impl<F: NatFamily, S: NatStore<F>> Collector<F, S> {
    /// At the beginning of a walk through tables of this capacity.
    pub(crate) fn new(store: S, capacity: usize) -> Self {
        Self {
            store,
            capacity: capacity as u64,
            half: Half::Reverse,
            cursor: Cursor::default(),
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
            let slice = self.store.slice(self.half, &mut self.cursor, (budget - seen).min(4096))?;
            seen += slice.len().max(1);
            for (key, value) in slice {
                match self.half {
                    Half::Reverse => self.reverse(now, &key, &value)?,
                    Half::Forward => self.forward(now, &key, &value)?,
                }
            }
            if self.cursor.is_start() {
                match self.half {
                    Half::Reverse => self.half = Half::Forward,
                    Half::Forward => {
                        self.half = Half::Reverse;
                        self.totals.entries = std::mem::take(&mut self.live);
                        self.totals.overdue = std::mem::take(&mut self.overdue);
                        return Ok(true);
                    }
                }
            }
        }
        Ok(false)
    }

    fn reverse(&mut self, now: u32, key: &F::Key, value: &F::Value) -> Result<(), S::Error> {
        let recent = !expired(now, F::facts(value).last_seen, SHORTEST);
        if recent || self.due(now, key, Some(value), self.half_of(key, value)?.as_ref()).is_none() {
            self.live += 1;
            return Ok(());
        }
        // A packet may have come since the slice was read, or the port may have another user.
        let Some(value) = self.store.get(Half::Reverse, key)? else { return Ok(()) };
        let forward = self.half_of(key, &value)?;
        let Some(late) = self.due(now, key, Some(&value), forward.as_ref()) else {
            self.live += 1;
            return Ok(());
        };
        if forward.is_some() {
            self.store.remove(Half::Forward, &F::forward_key(key, &value))?;
        } else {
            self.totals.orphans += 1;
        }
        self.store.remove(Half::Reverse, key)?;
        self.harvest(late, Some(value), forward);
        Ok(())
    }

    /// The forward half that belongs to a reverse entry.
    fn half_of(&self, key: &F::Key, value: &F::Value) -> Result<Option<F::Value>, S::Error> {
        let forward_key = F::forward_key(key, value);
        let forward = self.store.get(Half::Forward, &forward_key)?;
        Ok(forward.filter(|forward| F::reverse_key(&forward_key, forward) == *key))
    }

    fn forward(&mut self, now: u32, key: &F::Key, value: &F::Value) -> Result<(), S::Error> {
        if self.owner(key, value)? == Owner::Us {
            return Ok(());
        }
        let Some(value) = self.store.get(Half::Forward, key)? else { return Ok(()) };
        let reverse_key = F::reverse_key(key, &value);
        let late = match self.owner(key, &value)? {
            Owner::Us => None,
            // The datapath mends it if the client sends on, until it would have expired.
            Owner::Nobody => self.due(now, &reverse_key, None, Some(&value)),
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
    fn due(
        &self,
        now: u32,
        key: &F::Key,
        reverse: Option<&F::Value>,
        forward: Option<&F::Value>,
    ) -> Option<u32> {
        let facts = |value: Option<&F::Value>| value.map_or(Facts::default(), F::facts);
        let (reverse, forward) = (facts(reverse), facts(forward));
        let (protocol, port) = F::service(key);
        let last_seen = reverse.last_seen.max(forward.last_seen);
        let timeout = match timeout(protocol, port, reverse.state | forward.state) {
            TCP_OPENING if u32::from(protocol) == TCP && self.is_pressed() => TCP_OPENING_PRESSED,
            timeout => timeout,
        };
        expired(now, last_seen, timeout).then(|| now - last_seen - timeout)
    }

    /// More than four fifths of the table were in use at the last walk.
    fn is_pressed(&self) -> bool {
        self.totals.entries.saturating_mul(5) > self.capacity.saturating_mul(4)
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
    v4: Collector<V4, NatMaps<V4>>,
    v6: Collector<V6, NatMaps<V6>>,
    second: bool,
    capacity: usize,
}

impl NatCollector {
    /// Takes the tables.
    pub(crate) fn new(loaded: &mut Loaded) -> Result<Self, LoadError> {
        let (v4, v6) = (NatMaps::new(loaded)?, NatMaps::new(loaded)?);
        let (capacity_v4, capacity_v6) = (v4.capacity(), v6.capacity());
        Ok(Self {
            v4: Collector::new(v4, capacity_v4),
            v6: Collector::new(v6, capacity_v6),
            second: false,
            capacity: capacity_v4 + capacity_v6,
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
