//! Counts of flows by user, which the datapath and this program add to in the same memory.
//!
//! The datapath adds one when it makes a flow, whoever removes the flow here takes one away. What goes
//! wrong in between (a process that is killed, an entry that somebody else removes) is put right by
//! each complete walk through the flows: see [`Recount`].

use std::sync::atomic::{AtomicI64, Ordering};

use super::loader::{LoadError, Loaded};
use super::sys::SharedMemory;

/// Counts.
pub(crate) trait Usage {
    /// How many there are.
    fn cells(&self) -> usize;
    /// One of them.
    fn get(&self, cell: u32) -> i64;
    /// Adds to one.
    fn add(&self, cell: u32, change: i64);
}

/// Counts in an array that the kernel shares with us.
#[derive(Debug)]
pub(crate) struct SharedUsage(SharedMemory);

impl SharedUsage {
    /// Maps the array into memory.
    pub(crate) fn new(loaded: &Loaded, map: &'static str) -> Result<Self, LoadError> {
        let fd = loaded.map_fd(map)?;
        SharedMemory::new(fd, loaded.capacity(map))
            .map(Self)
            .map_err(|error| LoadError::MapType { map, source: aya::maps::MapError::IoError(error) })
    }

    fn cell(&self, cell: u32) -> Option<&AtomicI64> {
        self.0.words().get(usize::try_from(cell).ok()?)
    }
}

impl Usage for SharedUsage {
    fn cells(&self) -> usize {
        self.0.words().len()
    }

    fn get(&self, cell: u32) -> i64 {
        self.cell(cell).map_or(0, |count| count.load(Ordering::Relaxed))
    }

    fn add(&self, cell: u32, change: i64) {
        if let Some(count) = self.cell(cell) {
            count.fetch_add(change, Ordering::Relaxed);
        }
    }
}

/// What a complete walk finds of what is counted.
///
/// Compares counts of the moment at which the walk begins with the flows that were there then. Flows
/// made in the second of that moment may or may not have been: a count is wrong only if it is below the
/// flows that surely were, or above those that may have been. So a walk never spoils a count that is
/// right, whatever happens meanwhile.
#[derive(Debug, Default)]
pub(crate) struct Recount {
    start: u32,
    before: Vec<i64>,
    least: Vec<i64>,
    most: Vec<i64>,
}

impl Recount {
    /// A walk begins at `now`.
    pub(crate) fn begin(&mut self, now: u32, usage: &impl Usage) {
        let cells = usage.cells();
        self.start = now;
        self.before.clear();
        self.before.extend((0..cells).map(|cell| usage.get(u32::try_from(cell).unwrap_or(u32::MAX))));
        for counts in [&mut self.least, &mut self.most] {
            counts.clear();
            counts.resize(cells, 0);
        }
    }

    /// The walk has found a flow, which it may be about to remove.
    pub(crate) fn see(&mut self, created: u32, cells: &[u32]) {
        if created > self.start {
            return;
        }
        for cell in cells.iter().filter_map(|cell| usize::try_from(*cell).ok()) {
            if let Some(most) = self.most.get_mut(cell) {
                *most += 1;
            }
            if created < self.start
                && let Some(least) = self.least.get_mut(cell)
            {
                *least += 1;
            }
        }
    }

    /// The walk has ended: puts counts right, of those of `cells`; returns by how much altogether.
    pub(crate) fn finish(&self, cells: impl Fn(u32) -> bool, usage: &impl Usage) -> u64 {
        let mut corrected = 0;
        for (cell, ((before, least), most)) in self.before.iter().zip(&self.least).zip(&self.most).enumerate()
        {
            let right = *before.max(least).min(most.max(least));
            let Ok(cell) = u32::try_from(cell) else { break };
            if right != *before && cells(cell) {
                usage.add(cell, right - before);
                corrected += right.abs_diff(*before);
            }
        }
        corrected
    }
}

#[cfg(test)]
pub(crate) mod fake {
    //! Counts in memory.

    use std::cell::RefCell;

    use super::Usage;

    #[derive(Debug)]
    pub(crate) struct FakeUsage(pub(crate) RefCell<Vec<i64>>);

    impl FakeUsage {
        pub(crate) fn new(cells: usize) -> Self {
            Self(RefCell::new(vec![0; cells]))
        }
    }

    impl Usage for FakeUsage {
        fn cells(&self) -> usize {
            self.0.borrow().len()
        }

        fn get(&self, cell: u32) -> i64 {
            self.0.borrow()[cell as usize]
        }

        fn add(&self, cell: u32, change: i64) {
            self.0.borrow_mut()[cell as usize] += change;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::fake::FakeUsage;
    use super::*;

    fn recount(before: i64, created: &[u32], meanwhile: i64) -> i64 {
        let usage = FakeUsage::new(2);
        usage.add(1, before);
        let mut recount = Recount::default();
        recount.begin(100, &usage);
        usage.add(1, meanwhile);
        for created in created {
            recount.see(*created, &[1]);
        }
        recount.finish(|_| true, &usage);
        assert_eq!(usage.get(0), 0);
        usage.get(1)
    }

    #[test]
    fn a_right_count_is_left_alone() {
        assert_eq!(recount(2, &[1, 99], 0), 2);
        // Made in the second in which the walk began: before or after it.
        assert_eq!(recount(2, &[1, 99, 100], 1), 3);
        assert_eq!(recount(3, &[1, 99, 100], 0), 3);
        // Made later.
        assert_eq!(recount(2, &[1, 99, 101, 102], 2), 4);
        // Removed by the walk itself, which has seen it first.
        assert_eq!(recount(2, &[1, 99], -1), 1);
    }

    #[test]
    fn a_wrong_count_is_put_right() {
        assert_eq!(recount(7, &[1, 99], 0), 2);
        assert_eq!(recount(-3, &[1, 99], 0), 2);
        assert_eq!(recount(7, &[1, 99, 100], 1), 4);
        assert_eq!(recount(0, &[1, 99, 100], 0), 2);
        assert_eq!(recount(5, &[], 0), 0);
    }
}
