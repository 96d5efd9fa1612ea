//! Reads of objects that must be as fresh as the question, shared by all who ask at the same time: in a cluster that
//! starts a thousand nodes ask for blocks of one pool, and each read costs the API server as much as a write.

use std::collections::HashMap;
use std::future::Future;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

/// The last read of an object.
#[derive(Clone, Copy, Debug)]
struct Last {
    begun: Instant,
    succeeded: bool,
}

type Slot = Arc<tokio::sync::Mutex<Option<Last>>>;

/// Who reads what.
#[derive(Debug, Default)]
pub(crate) struct Fresh(Mutex<HashMap<String, Slot>>);

impl Fresh {
    /// Reads an object, and does with it what is to be done, unless somebody else has begun to after this was called;
    /// then waits for that. `None`: somebody else has, with success.
    pub(super) async fn read<T, E, F>(&self, name: &str, read: impl FnOnce() -> F) -> Result<Option<T>, E>
    where
        F: Future<Output = Result<T, E>>,
    {
        let asked = Instant::now();
        let slot = self.slot(name);
        let mut last = slot.lock().await;
        if let Some(Last { begun, succeeded }) = *last
            && begun >= asked
        {
            if succeeded {
                return Ok(None);
            }
            // A failure is not worth a queue: each for himself.
            drop(last);
            return read().await.map(Some);
        }
        let begun = Instant::now();
        let result = read().await;
        *last = Some(Last { begun, succeeded: result.is_ok() });
        result.map(Some)
    }

    /// Forgets an object that does not exist.
    pub(super) fn forget(&self, name: &str) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(name);
    }

    fn slot(&self, name: &str) -> Slot {
        let mut slots = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(slots.entry(name.to_owned()).or_default())
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]

    use std::sync::atomic::{AtomicU32, Ordering};

    use futures::future::join_all;
    use tokio::sync::Notify;

    use super::*;

    /// Counts reads and lets each end when it is told to.
    #[derive(Default)]
    struct Source {
        begun: AtomicU32,
        begin: Notify,
        end: Notify,
    }

    impl Source {
        async fn read(&self, fails: bool) -> Result<u32, ()> {
            let number = self.begun.fetch_add(1, Ordering::SeqCst) + 1;
            self.begin.notify_one();
            self.end.notified().await;
            if fails { Err(()) } else { Ok(number) }
        }
    }

    #[tokio::test]
    async fn whoever_asks_while_one_is_read_shares_the_next() {
        let (fresh, source) = (Fresh::default(), Source::default());
        let first = fresh.read("pool", || source.read(false));
        let others = async {
            source.begin.notified().await;
            // The read that is under way may be older than these questions.
            let all = join_all((0..10).map(|_| fresh.read("pool", || source.read(false))));
            let ends = async {
                source.end.notify_one();
                source.begin.notified().await;
                source.end.notify_one();
            };
            tokio::join!(all, ends).0
        };
        let (first, others) = tokio::join!(first, others);
        assert_eq!(first, Ok(Some(1)));
        assert_eq!(others.iter().filter(|read| **read == Ok(Some(2))).count(), 1, "{others:?}");
        assert_eq!(others.iter().filter(|read| **read == Ok(None)).count(), 9, "{others:?}");
        // Later is later.
        source.end.notify_one();
        assert_eq!(fresh.read("pool", || source.read(false)).await, Ok(Some(3)));
        assert_eq!(fresh.0.lock().unwrap().len(), 1);
        fresh.forget("pool");
        assert!(fresh.0.lock().unwrap().is_empty());
    }

    #[tokio::test]
    async fn failures_are_not_waited_for_one_by_one() {
        let (fresh, source) = (Fresh::default(), Source::default());
        let all = join_all((0..5).map(|_| fresh.read("pool", || source.read(true))));
        let ends = async {
            // One fails; the next that has asked before it began is in its place, and then all others at once.
            for _ in 0..2 {
                source.begin.notified().await;
                source.end.notify_one();
            }
            while source.begun.load(Ordering::SeqCst) < 5 {
                tokio::task::yield_now().await;
            }
            source.end.notify_waiters();
        };
        let (all, ()) = tokio::join!(all, ends);
        assert_eq!(all, vec![Err(()); 5]);
        // One that is read does not hold up another.
        let (one, other) =
            (fresh.read("one", || source.read(false)), fresh.read("other", || source.read(false)));
        let ends = async {
            while source.begun.load(Ordering::SeqCst) < 7 {
                tokio::task::yield_now().await;
            }
            source.end.notify_waiters();
        };
        let (one, other, ()) = tokio::join!(one, other, ends);
        assert!(one.is_ok() && other.is_ok());
    }
}
