//! Which indexes of a pool are free, as ranges, so that the lowest one is found at once however large the
//! pool is and however many indexes are taken.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

use coil_api::addresspool::MAX_BLOCKS;

/// Indexes from 0 up to [`MAX_BLOCKS`], each taken any number of times.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Indexes {
    /// Free ranges: first index, and the one after the last. They neither overlap nor touch.
    free: BTreeMap<u64, u64>,
    /// How often each taken index is taken.
    taken: BTreeMap<u64, u32>,
}

impl Default for Indexes {
    fn default() -> Self {
        Self { free: [(0, MAX_BLOCKS)].into(), taken: BTreeMap::new() }
    }
}

impl Indexes {
    /// Takes an index, perhaps once more.
    pub(super) fn take(&mut self, index: u32) {
        let index = u64::from(index);
        match self.taken.entry(index) {
            Entry::Occupied(mut entry) => *entry.get_mut() += 1,
            Entry::Vacant(entry) => {
                entry.insert(1);
                self.occupy(index);
            }
        }
    }

    /// Undoes one [`Indexes::take`].
    pub(super) fn give_back(&mut self, index: u32) {
        let index = u64::from(index);
        if let Entry::Occupied(mut entry) = self.taken.entry(index) {
            *entry.get_mut() -= 1;
            if *entry.get() == 0 {
                entry.remove();
                self.vacate(index);
            }
        }
    }

    /// The lowest free index that is not less than `from`.
    pub(super) fn lowest(&self, from: u64) -> Option<u64> {
        if let Some((_, end)) = self.free.range(..=from).next_back()
            && *end > from
        {
            return Some(from);
        }
        self.free.range(from..).next().map(|(start, _)| *start)
    }

    pub(super) fn is_unused(&self) -> bool {
        self.taken.is_empty()
    }

    fn occupy(&mut self, index: u64) {
        let Some((start, end)) = self.free.range(..=index).next_back().map(|(s, e)| (*s, *e)) else {
            return;
        };
        if end <= index {
            return;
        }
        if start == index {
            self.free.remove(&start);
        } else {
            self.free.insert(start, index);
        }
        if index + 1 < end {
            self.free.insert(index + 1, end);
        }
    }

    fn vacate(&mut self, index: u64) {
        if index >= MAX_BLOCKS {
            return;
        }
        let end = self.free.remove(&(index + 1)).unwrap_or(index + 1);
        match self.free.range_mut(..index).next_back() {
            Some((_, before)) if *before == index => *before = end,
            _ => {
                self.free.insert(index, end);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn the_lowest_free_index_against_a_plain_set() {
        let mut indexes = Indexes::default();
        let mut model: BTreeSet<u32> = BTreeSet::new();
        let mut random = 1u64;
        for _ in 0..20_000 {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let index = u32::try_from(random >> 33).unwrap_or(0) % 300;
            if model.contains(&index) {
                model.remove(&index);
                indexes.give_back(index);
            } else {
                model.insert(index);
                indexes.take(index);
            }
            let from = u32::try_from(random >> 40).unwrap_or(0) % 300;
            let expected = (from..).find(|i| !model.contains(i)).map(u64::from);
            assert_eq!(indexes.lowest(u64::from(from)), expected);
        }
        for index in model {
            indexes.give_back(index);
        }
        assert_eq!(indexes, Indexes::default());
    }

    #[test]
    fn what_is_taken_twice_must_be_given_back_twice() {
        let mut indexes = Indexes::default();
        indexes.take(0);
        indexes.take(0);
        indexes.give_back(0);
        assert_eq!(indexes.lowest(0), Some(1));
        indexes.give_back(0);
        assert_eq!(indexes.lowest(0), Some(0));
        // Never taken.
        indexes.give_back(7);
        assert_eq!(indexes, Indexes::default());
    }

    #[test]
    fn indexes_beyond_all_blocks_do_no_harm() {
        let mut indexes = Indexes::default();
        indexes.take(u32::MAX);
        assert_eq!(indexes.lowest(MAX_BLOCKS - 1), Some(MAX_BLOCKS - 1));
        assert_eq!(indexes.lowest(MAX_BLOCKS), None);
        indexes.give_back(u32::MAX);
        assert_eq!(indexes, Indexes::default());
        let last = u32::try_from(MAX_BLOCKS - 1).unwrap_or(0);
        indexes.take(last);
        assert_eq!(indexes.lowest(MAX_BLOCKS - 1), None);
    }
}
