//! Makes the kernel's routes as the cluster wants them: at once when that changes, after a while when it
//! did not work, and now and then in any case. Nothing that fails here ends the process.

use std::time::Duration;

use tokio::sync::watch;

use super::cluster::Wanted;
use super::kernel::RouteTable;
use super::metrics::RouterMetrics;
use super::plan::{Op, plan};
use crate::cni::error::causes;

/// Waits after failures double from the first to the last.
const RETRY: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));

/// Keeps the routes.
#[derive(Debug)]
pub struct Syncer<T> {
    table: T,
    metrics: RouterMetrics,
    interval: Duration,
    retry: (Duration, Duration),
}

impl<T: RouteTable> Syncer<T> {
    /// Compares at least once per interval.
    pub fn new(table: T, metrics: RouterMetrics, interval: Duration) -> Self {
        Self { table, metrics, interval, retry: RETRY }
    }

    /// Runs until nobody says any more what is wanted. `first` is called after the first sync that could
    /// look at the routes.
    pub async fn run(self, mut wanted: watch::Receiver<Option<Wanted>>, first: impl FnOnce() + Send) {
        let mut first = Some(first);
        let (first_retry, last_retry) = self.retry;
        let mut retry = first_retry;
        loop {
            let known = wanted.borrow_and_update().clone();
            let mut wait = self.interval;
            if let Some(known) = known {
                let outcome = self.sync(&known).await;
                if outcome == Outcome::Done {
                    retry = first_retry;
                } else {
                    wait = retry.min(self.interval);
                    retry = (retry * 2).min(last_retry);
                }
                if outcome != Outcome::Blind
                    && let Some(first) = first.take()
                {
                    first();
                }
            }
            match tokio::time::timeout(wait, wanted.changed()).await {
                Ok(Ok(())) | Err(_) => {}
                Ok(Err(_)) => return,
            }
        }
    }

    async fn sync(&self, wanted: &Wanted) -> Outcome {
        self.metrics.routes.set(count(wanted.len()));
        let current = match self.table.list().await {
            Ok(current) => current,
            Err(error) => {
                self.metrics.failures.inc();
                tracing::warn!(error = causes(&error), "cannot look at the routes; trying again");
                return Outcome::Blind;
            }
        };
        let plan = plan(&current, wanted);
        let mut missing = plan.taken.len();
        let mut failed = !plan.taken.is_empty();
        for net in &plan.taken {
            tracing::warn!(%net, "somebody else has a route to the block of another node; it is left alone");
        }
        let mut changed = 0_usize;
        for op in &plan.ops {
            match self.table.apply(op).await {
                Ok(()) => changed += 1,
                Err(error) => {
                    failed = true;
                    missing += usize::from(!matches!(op, Op::Delete(_)));
                    tracing::warn!(net = %op.net(), error = causes(&error), "a route is not as it should be");
                }
            }
        }
        self.metrics.missing.set(count(missing));
        if changed > 0 {
            tracing::info!(changed, wanted = wanted.len(), missing, "routes have changed");
        }
        if failed {
            self.metrics.failures.inc();
            return Outcome::Partly;
        }
        self.metrics.syncs.inc();
        Outcome::Done
    }
}

/// What came of a sync.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    /// All is as it should be.
    Done,
    /// Something is not.
    Partly,
    /// The routes could not even be looked at.
    Blind,
}

fn count(number: usize) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests;
