//! The end of a gateway: it takes no new clients' choice any more, serves the flows that it has, and waits
//! until they are done.
//!
//! A signal makes it unready at once; the deletion of its pod has told every `coild` already, or does so
//! now, that new flows go elsewhere. What still comes is accepted: a `coild` may not have heard yet. The
//! pod's network exists as long as this process does, thus it stays until no flow is alive, at least
//! [`SETTLE`] and at most the time that it is given.

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::time::Instant;

use super::census::{Census, Count};
use super::metrics::Shared;
use crate::datapath::{DatapathError, seconds_since_boot};

/// The shortest drain: time in which all clients' nodes hear that it takes no new flows.
const SETTLE: Duration = Duration::from_secs(5);
/// How often flows are counted.
const INTERVAL: Duration = Duration::from_secs(1);
/// How often a drain that goes on is told of.
const TELL: Duration = Duration::from_secs(10);

/// Whether the gateway is draining; clones share it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Draining(Arc<AtomicBool>);

impl Draining {
    /// For readiness.
    pub(crate) fn check(&self) -> Result<(), String> {
        if self.0.load(Ordering::SeqCst) {
            Err("this gateway is draining: it takes no new flows".into())
        } else {
            Ok(())
        }
    }

    fn begin(&self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

/// How a drain ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    /// No flow is alive.
    Done,
    /// Its time is over while these are alive.
    Late(Count),
}

/// Drains: returns when the process may end.
pub(crate) async fn drain(draining: Draining, census: Census, shared: Shared, timeout: Duration) {
    draining.begin();
    let census = Arc::new(census);
    let count = || {
        let census = Arc::clone(&census);
        async move {
            let counted = tokio::task::spawn_blocking(move || -> Result<Count, DatapathError> {
                Ok(census.count(seconds_since_boot()?)?)
            });
            match counted.await {
                Ok(Ok(count)) => Some(count),
                Ok(Err(error)) => {
                    let error = &error as &dyn std::error::Error;
                    tracing::warn!(error, "cannot count the flows that are alive");
                    None
                }
                // Fails only while the runtime shuts down.
                Err(_) => None,
            }
        }
    };
    let begun = Instant::now();
    let outcome = wait(timeout, count, |count| shared.set_draining(count)).await;
    let seconds = begun.elapsed().as_secs();
    match outcome {
        Outcome::Done => tracing::info!(seconds, "all flows are done"),
        Outcome::Late(Count { connections, others }) => {
            tracing::warn!(
                seconds,
                connections,
                others,
                "the time to drain is over; these flows are cut off"
            );
        }
    }
}

/// Waits until nothing is counted, but at least [`SETTLE`], or until `timeout` is over.
async fn wait<Fut>(timeout: Duration, mut count: impl FnMut() -> Fut, tell: impl Fn(Count)) -> Outcome
where
    Fut: Future<Output = Option<Count>>,
{
    let begun = Instant::now();
    let deadline = begun + timeout;
    let mut told: Option<Instant> = None;
    let mut last = Count::default();
    loop {
        // Neither a failed count nor one that does not end says anything.
        let counted = tokio::time::timeout_at(deadline, count()).await.ok().flatten();
        if let Some(counted) = counted {
            last = counted;
            tell(counted);
        }
        let now = Instant::now();
        if let Some(outcome) = outcome(now - begun, timeout, counted, last) {
            return outcome;
        }
        if told.is_none_or(|told| now - told >= TELL) {
            told = Some(now);
            let left = (deadline - now).as_secs();
            tracing::info!(connections = last.connections, others = last.others, left, "flows are alive");
        }
        tokio::time::sleep_until(deadline.min(now + INTERVAL)).await;
    }
}

/// Whether the drain is over. `counted` is what the count just now has found, `last` what the last good
/// one has.
fn outcome(elapsed: Duration, timeout: Duration, counted: Option<Count>, last: Count) -> Option<Outcome> {
    let done = counted.is_some_and(|counted| counted.total() == 0) && elapsed >= SETTLE.min(timeout);
    match (done, elapsed >= timeout) {
        (true, _) => Some(Outcome::Done),
        (false, true) => Some(Outcome::Late(last)),
        (false, false) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FLOW: Count = Count { connections: 1, others: 0 };
    const NONE: Count = Count { connections: 0, others: 0 };

    #[test]
    fn it_waits_for_flows_a_while_for_others_to_hear_of_it_and_no_longer_than_it_may() {
        let late = Some(Outcome::Late(FLOW));
        for (elapsed, timeout, counted, wanted) in [
            (0, 60, Some(NONE), None),
            (4, 60, Some(NONE), None),
            (5, 60, Some(NONE), Some(Outcome::Done)),
            (5, 60, Some(FLOW), None),
            (59, 60, Some(FLOW), None),
            (60, 60, Some(FLOW), late),
            // What cannot be counted is not known to be done.
            (59, 60, None, None),
            (60, 60, None, late),
            (2, 2, Some(NONE), Some(Outcome::Done)),
            (0, 0, Some(FLOW), late),
        ] {
            let [elapsed, timeout] = [elapsed, timeout].map(Duration::from_secs);
            assert_eq!(
                outcome(elapsed, timeout, counted, FLOW),
                wanted,
                "{elapsed:?} of {timeout:?} {counted:?}"
            );
        }
    }

    #[tokio::test]
    async fn a_count_that_does_not_end_does_not_keep_it() {
        let outcome = wait(Duration::from_millis(10), std::future::pending, |_| {}).await;
        assert_eq!(outcome, Outcome::Late(NONE));
    }

    #[test]
    fn it_is_unready_from_the_beginning() {
        let draining = Draining::default();
        assert!(draining.check().is_ok());
        draining.clone().begin();
        assert!(draining.check().is_err());
    }
}
