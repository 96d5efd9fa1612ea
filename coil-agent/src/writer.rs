//! The one task that changes the datapath: applies the newest desired state, again and again until it
//! holds, and sweeps expired flows.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use coil_runtime::tasks::Drain;
use tokio::sync::{Notify, watch};
use tokio::time::Instant;

use crate::cni::error::causes;
use crate::datapath::{Datapath, seconds_since_boot};
use crate::desired::PodUid;
use crate::metrics::StateMetrics;
use crate::state::Snapshot;

/// Entries that one step of the sweeper looks at.
const SWEEP_BUDGET: usize = 16_384;

/// Intervals of the writer.
#[derive(Clone, Copy, Debug)]
struct Pace {
    /// First wait after an attempt that failed; doubled each time.
    retry_min: Duration,
    /// Longest such wait.
    retry_max: Duration,
    /// The maps are read again and compared at this interval.
    resync: Duration,
    /// Time between two steps of the sweeper.
    sweep: Duration,
    /// Time between two whole sweeps.
    sweep_rest: Duration,
}

impl Default for Pace {
    fn default() -> Self {
        Self {
            retry_min: Duration::from_millis(100),
            retry_max: Duration::from_secs(10),
            resync: Duration::from_secs(300),
            sweep: Duration::from_secs(1),
            sweep_rest: Duration::from_secs(10),
        }
    }
}

/// What the datapath holds.
#[derive(Clone, Debug, Default)]
pub struct Applied {
    /// Revision of the desired state.
    pub revision: u64,
    /// Pods that it serves.
    pub pods: BTreeSet<PodUid>,
    /// Pods that it could not serve, and why.
    pub failed: BTreeMap<PodUid, String>,
    /// Why nothing newer is applied.
    pub error: Option<String>,
}

/// The writer.
#[derive(Debug)]
pub struct Writer<D> {
    /// Nobody else locks it; it goes to a thread where blocking is allowed, and back.
    datapath: Arc<Mutex<D>>,
    snapshots: watch::Receiver<Snapshot>,
    applied: watch::Sender<Applied>,
    metrics: StateMetrics,
    alarm: Arc<Notify>,
    pace: Pace,
}

/// The process is ending in disorder.
#[derive(Debug, thiserror::Error)]
pub enum WriterError {
    /// Nobody publishes desired states any more.
    #[error("nobody publishes desired states any more")]
    Closed,
    /// The datapath panicked.
    #[error("the datapath panicked")]
    Panicked(#[source] tokio::task::JoinError),
}

impl<D: Datapath + 'static> Writer<D> {
    /// A writer and what it reports.
    pub fn new(
        datapath: D,
        snapshots: watch::Receiver<Snapshot>,
        metrics: StateMetrics,
    ) -> (Self, watch::Receiver<Applied>) {
        let (applied, receiver) = watch::channel(Applied::default());
        let writer = Self {
            datapath: Arc::new(Mutex::new(datapath)),
            snapshots,
            applied,
            metrics,
            alarm: Arc::default(),
            pace: Pace::default(),
        };
        (writer, receiver)
    }

    /// By which others say that somebody may have changed what the datapath holds: it looks at once.
    pub fn alarm(&self) -> Arc<Notify> {
        Arc::clone(&self.alarm)
    }

    /// Runs until drained. `first` is called when the first desired state holds.
    pub async fn run(mut self, drain: Drain, first: impl FnOnce() + Send) -> Result<(), WriterError> {
        let mut first = Some(first);
        let mut retry = self.pace.retry_min;
        let mut resync = Instant::now() + self.pace.resync;
        let mut sweep = Instant::now() + self.pace.sweep;
        let mut apply: Option<Instant> = None;
        let mut folders = None;
        loop {
            let wake = sweep.min(resync).min(apply.unwrap_or(resync));
            tokio::select! {
                () = drain.cancelled() => return Ok(()),
                changed = self.snapshots.changed() => {
                    match changed {
                        Ok(()) => {}
                        // All tasks end at the same time then, in any order.
                        Err(_) if drain.is_cancelled() => return Ok(()),
                        Err(_) => return Err(WriterError::Closed),
                    }
                    let snapshot = self.snapshots.borrow_and_update();
                    self.metrics.observe(&snapshot);
                    if snapshot.desired.complete && snapshot.revision != self.applied.borrow().revision {
                        apply = Some(Instant::now());
                    }
                }
                () = self.alarm.notified() => resync = Instant::now(),
                () = tokio::time::sleep_until(wake) => {}
            }
            let now = Instant::now();
            if now >= resync {
                resync = now + self.pace.resync;
                self.blocking(Datapath::resync).await?;
                if self.snapshots.borrow().desired.complete {
                    apply = Some(now);
                }
            }
            if apply.is_some_and(|at| now >= at) {
                if self.apply().await? {
                    retry = self.pace.retry_min;
                    apply = None;
                } else {
                    apply = Some(Instant::now() + retry);
                    retry = (retry * 2).min(self.pace.retry_max);
                }
                if self.applied.borrow().revision > 0
                    && let Some(first) = first.take()
                {
                    first();
                }
            }
            let live = {
                let snapshot = self.snapshots.borrow();
                snapshot.desired.complete.then(|| snapshot.rest.gateway_folders.clone())
            };
            if live != folders {
                if let Some(live) = &live {
                    self.forget_gateways(live.clone()).await?;
                }
                folders = live;
            }
            if now >= sweep {
                let finished = self.sweep().await?;
                sweep = Instant::now() + if finished { self.pace.sweep_rest } else { self.pace.sweep };
            }
        }
    }

    /// Applies the newest desired state; false if something is left to do.
    async fn apply(&mut self) -> Result<bool, WriterError> {
        let (revision, desired) = {
            let snapshot = self.snapshots.borrow_and_update();
            (snapshot.revision, Arc::clone(&snapshot.desired))
        };
        let state = Arc::clone(&desired);
        self.metrics.applies.inc();
        let held = match self.blocking(move |datapath| datapath.apply(&state)).await? {
            Ok(report) => {
                let failed = report.failed.iter();
                let failed: BTreeMap<PodUid, String> =
                    failed.map(|(uid, error)| (uid.clone(), causes(error))).collect();
                for (uid, error) in &failed {
                    tracing::warn!(pod.uid = uid, error, "the datapath cannot serve a pod");
                }
                tracing::debug!(
                    revision,
                    operations = report.operations,
                    attached = report.attached.len(),
                    detached = report.detached.len(),
                    "applied"
                );
                let held = failed.is_empty();
                let served = desired.pods.keys().filter(|uid| !failed.contains_key(*uid));
                self.metrics.applied_revision.set(i64::try_from(revision).unwrap_or(i64::MAX));
                self.applied.send_replace(Applied {
                    revision,
                    pods: served.cloned().collect(),
                    failed,
                    error: None,
                });
                held
            }
            Err(error) => {
                let error = causes(&error);
                tracing::error!(revision, error, "cannot apply the desired state");
                self.blocking(Datapath::resync).await?;
                self.applied.send_modify(|applied| applied.error = Some(error));
                false
            }
        };
        if !held {
            self.metrics.apply_errors.inc();
        }
        Ok(held)
    }

    /// Looks at some flows; true if that were the last ones.
    async fn sweep(&self) -> Result<bool, WriterError> {
        let now = match seconds_since_boot() {
            Ok(now) => now,
            Err(error) => {
                tracing::warn!(error = causes(&error), "cannot read the clock");
                return Ok(true);
            }
        };
        let result = self.blocking(move |datapath| datapath.sweep(now, SWEEP_BUDGET));
        match result.await? {
            Ok(report) => Ok(report.finished),
            Err(error) => {
                tracing::warn!(error = causes(&error), "cannot remove expired flows");
                Ok(true)
            }
        }
    }

    async fn forget_gateways(&self, live: BTreeSet<String>) -> Result<(), WriterError> {
        let result = self.blocking(move |datapath| datapath.gc_gateways(&live));
        if let Err(error) = result.await? {
            tracing::warn!(error = causes(&error), "cannot remove what dead gateways have left");
        }
        Ok(())
    }

    /// Works on the datapath where blocking is allowed.
    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut D) -> T + Send + 'static,
    ) -> Result<T, WriterError> {
        let datapath = Arc::clone(&self.datapath);
        tokio::task::spawn_blocking(move || {
            work(&mut datapath.lock().unwrap_or_else(PoisonError::into_inner))
        })
        .await
        .map_err(WriterError::Panicked)
    }
}

#[cfg(test)]
mod tests;
