//! What is to be done and when. Each piece of work is in the queue at most once and is never done twice at
//! the same time; what fails is tried again ever more seldom.

use std::collections::{BTreeMap, HashMap};
use std::hash::Hash;
use std::time::Duration;

use tokio::time::Instant;

use crate::error::{Class, delay};

/// Work, each with its time.
pub(super) struct Queue<W> {
    due: BTreeMap<(Instant, u64), W>,
    entries: HashMap<W, Entry>,
    number: u64,
}

#[derive(Default)]
struct Entry {
    /// Its place in `due`, unless it is under way.
    place: Option<(Instant, u64)>,
    /// When it must be done again, if it is under way.
    again: Option<Instant>,
    running: bool,
    /// Failures in a row.
    failures: u32,
}

impl<W> Default for Queue<W> {
    fn default() -> Self {
        Self { due: BTreeMap::new(), entries: HashMap::new(), number: 0 }
    }
}

impl<W: Clone + Eq + Hash> Queue<W> {
    /// Work that is due at this time, or earlier if it was due earlier already.
    pub(super) fn push(&mut self, work: W, at: Instant) {
        let entry = self.entries.entry(work.clone()).or_default();
        if entry.running {
            entry.again = Some(entry.again.map_or(at, |again| again.min(at)));
            return;
        }
        match entry.place {
            Some((due, _)) if due <= at => return,
            Some(place) => drop(self.due.remove(&place)),
            None => {}
        }
        self.number += 1;
        entry.place = Some((at, self.number));
        self.due.insert((at, self.number), work);
    }

    /// When there is something to do.
    pub(super) fn next_due(&self) -> Option<Instant> {
        self.due.first_key_value().map(|((at, _), _)| *at)
    }

    /// The next work that is due by now; it is under way until [`Queue::done`] or [`Queue::failed`].
    pub(super) fn take(&mut self, now: Instant) -> Option<W> {
        let (place, _) = self.due.first_key_value().filter(|((at, _), _)| *at <= now)?;
        let place = *place;
        let work = self.due.remove(&place)?;
        let entry = self.entries.entry(work.clone()).or_default();
        entry.place = None;
        entry.running = true;
        Some(work)
    }

    /// Work has succeeded.
    pub(super) fn done(&mut self, work: &W) {
        let Some(entry) = self.entries.remove(work) else { return };
        if let Some(again) = entry.again {
            self.push(work.clone(), again);
        }
    }

    /// Work has failed and is tried again.
    pub(super) fn failed(&mut self, work: &W, class: Class, now: Instant) -> Duration {
        let entry = self.entries.entry(work.clone()).or_default();
        entry.running = false;
        entry.failures = entry.failures.saturating_add(1);
        let wait = delay(class, entry.failures);
        let again = entry.again.take();
        let at = now + wait;
        self.push(work.clone(), again.map_or(at, |again| again.max(now + wait / 4).min(at)));
        wait
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn order_of_time_and_once_only() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut queue = Queue::default();
        queue.push("late", at(10));
        queue.push("soon", at(1));
        queue.push("late", at(20));
        queue.push("soon", start);
        assert_eq!(queue.next_due(), Some(start));
        assert_eq!(queue.take(start), Some("soon"));
        assert_eq!(queue.take(start), None);
        assert_eq!(queue.next_due(), Some(at(10)));
        // Under way: not a second time at once, but again afterwards.
        queue.push("soon", start);
        assert_eq!(queue.take(start), None);
        queue.done(&"soon");
        assert_eq!(queue.take(start), Some("soon"));
        queue.done(&"soon");
        assert_eq!(queue.take(at(10)), Some("late"));
        queue.done(&"late");
        assert!(queue.entries.is_empty() && queue.next_due().is_none());
    }

    #[test]
    fn failures_are_tried_again_ever_more_seldom() {
        let start = Instant::now();
        let mut queue = Queue::default();
        queue.push("work", start);
        let mut now = start;
        let mut waits = Vec::new();
        for _ in 0..4 {
            assert_eq!(queue.take(now), Some("work"));
            waits.push(queue.failed(&"work", Class::Retry, now));
            assert_eq!(queue.take(now), None, "not at once");
            now += waits[waits.len() - 1];
        }
        assert!(waits.windows(2).all(|pair| pair[0] < pair[1]), "{waits:?}");
        assert_eq!(queue.take(now), Some("work"));
        queue.done(&"work");
        queue.push("work", now);
        assert_eq!(queue.take(now), Some("work"));
        assert_eq!(queue.failed(&"work", Class::Retry, now), waits[0], "it starts anew");
    }
}
