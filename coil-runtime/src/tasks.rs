//! Tasks of a daemon and their end. One signal, or the first task that ends by itself, starts one drain;
//! every task sees it through its [`Drain`]; whoever is not done by the deadline is cut off and named.

use std::collections::HashMap;
use std::error::Error;
use std::future::Future;
use std::time::Duration;

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::task::{Id, JoinError, JoinSet};
use tokio_util::sync::CancellationToken;

/// Tells a task that it should finish; clones share one state. Await `cancelled()`.
pub type Drain = CancellationToken;

type BoxError = Box<dyn Error + Send + Sync>;

/// How a daemon ended that should not have.
#[derive(Debug, thiserror::Error)]
pub enum TaskError {
    /// Signals cannot be received.
    #[error("cannot receive signals")]
    Signals(#[from] std::io::Error),
    /// A task ended with an error.
    #[error("{task} failed")]
    Failed {
        /// The task.
        task: &'static str,
        /// Its error.
        #[source]
        source: BoxError,
    },
    /// A task ended although nobody asked it to.
    #[error("{task} ended unexpectedly")]
    Ended {
        /// The task.
        task: &'static str,
    },
    /// A task panicked.
    #[error("{task} panicked")]
    Panicked {
        /// The task.
        task: &'static str,
        /// What it said.
        #[source]
        source: JoinError,
    },
}

/// The tasks of a process.
#[derive(Debug)]
pub struct Tasks {
    set: JoinSet<Result<(), BoxError>>,
    names: HashMap<Id, &'static str>,
    drain: Drain,
    signals: Option<(Signal, Signal)>,
}

impl Tasks {
    /// No tasks yet; from now on SIGTERM and SIGINT are kept for [`Tasks::run`].
    ///
    /// # Errors
    /// Signals cannot be received.
    pub fn new() -> Result<Self, TaskError> {
        let signals = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
        Ok(Self { signals: Some(signals), ..Self::without_signals() })
    }

    /// Tasks that only their drain can end, for tests.
    #[must_use]
    pub fn without_signals() -> Self {
        Self { set: JoinSet::new(), names: HashMap::new(), drain: Drain::new(), signals: None }
    }

    /// The drain of all tasks; cancelling it ends the process in good order.
    #[must_use]
    pub fn drain(&self) -> Drain {
        self.drain.clone()
    }

    /// Starts a task. It should run until its drain is cancelled, then finish what it has begun.
    pub fn spawn<F, Fut, E>(&mut self, name: &'static str, task: F)
    where
        F: FnOnce(Drain) -> Fut,
        Fut: Future<Output = Result<(), E>> + Send + 'static,
        E: Into<BoxError>,
    {
        let future = task(self.drain.clone());
        let handle = self.set.spawn(async move { future.await.map_err(Into::into) });
        self.names.insert(handle.id(), name);
    }

    /// Waits for a signal or the first task that ends, drains, and waits for the rest, at most `deadline`.
    ///
    /// # Errors
    /// The first task that failed, or ended before the drain.
    pub async fn run(mut self, deadline: Duration) -> Result<(), TaskError> {
        let mut outcome = Ok(());
        let signals = self.signals.take();
        tokio::select! {
            name = received(signals) => tracing::info!(signal = name, "draining"),
            () = self.drain.cancelled() => tracing::info!("draining"),
            Some(ended) = self.set.join_next_with_id() => {
                outcome = self.judge(ended, self.drain.is_cancelled());
                if let Err(error) = &outcome {
                    tracing::error!(error = error as &dyn Error, "draining");
                }
            }
        }
        self.drain.cancel();
        let rest = async {
            while let Some(ended) = self.set.join_next_with_id().await {
                if let Err(error) = self.judge(ended, true) {
                    tracing::warn!(error = &error as &dyn Error, "while draining");
                    if outcome.is_ok() {
                        outcome = Err(error);
                    }
                }
            }
        };
        if tokio::time::timeout(deadline, rest).await.is_err() {
            let mut late: Vec<_> = self.names.values().copied().collect();
            late.sort_unstable();
            tracing::warn!(tasks = late.join(", "), "cut off tasks that did not drain in time");
            self.set.shutdown().await;
        }
        outcome
    }

    fn judge(
        &mut self,
        ended: Result<(Id, Result<(), BoxError>), JoinError>,
        draining: bool,
    ) -> Result<(), TaskError> {
        let mut forget = |id| self.names.remove(&id).unwrap_or("a task");
        match ended {
            Ok((id, Ok(()))) => {
                let task = forget(id);
                if draining { Ok(()) } else { Err(TaskError::Ended { task }) }
            }
            Ok((id, Err(source))) => Err(TaskError::Failed { task: forget(id), source }),
            Err(source) => Err(TaskError::Panicked { task: forget(source.id()), source }),
        }
    }
}

async fn received(signals: Option<(Signal, Signal)>) -> &'static str {
    match signals {
        Some((mut terminate, mut interrupt)) => tokio::select! {
            _ = terminate.recv() => "SIGTERM",
            _ = interrupt.recv() => "SIGINT",
        },
        None => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOON: Duration = Duration::from_secs(5);

    async fn until_drained(drain: Drain) -> Result<(), std::io::Error> {
        drain.cancelled().await;
        Ok(())
    }

    #[tokio::test]
    async fn a_drain_ends_all_tasks() {
        let mut tasks = Tasks::without_signals();
        tasks.spawn("a", until_drained);
        tasks.spawn("b", until_drained);
        let drain = tasks.drain();
        drain.cancel();
        assert!(tasks.run(SOON).await.is_ok());
    }

    #[tokio::test]
    async fn an_unexpected_end_is_an_error_and_drains_the_rest() {
        let mut tasks = Tasks::without_signals();
        tasks.spawn("steady", until_drained);
        tasks.spawn("short", |_| async { Ok::<_, std::io::Error>(()) });
        assert!(matches!(tasks.run(SOON).await, Err(TaskError::Ended { task: "short" })));
    }

    #[tokio::test]
    async fn a_failure_and_a_panic_are_named() {
        let mut tasks = Tasks::without_signals();
        tasks.spawn("bad", |_| async { Err(std::io::Error::other("no")) });
        assert!(matches!(tasks.run(SOON).await, Err(TaskError::Failed { task: "bad", .. })));

        let mut tasks = Tasks::without_signals();
        #[expect(clippy::panic, reason = "the subject of the test")]
        tasks.spawn("worse", |_| async {
            if true {
                panic!("expected in this test");
            }
            Ok::<_, std::io::Error>(())
        });
        assert!(matches!(tasks.run(SOON).await, Err(TaskError::Panicked { task: "worse", .. })));
    }

    #[tokio::test]
    async fn a_task_that_does_not_drain_is_cut_off() {
        let mut tasks = Tasks::without_signals();
        tasks.spawn("stubborn", |_| std::future::pending::<Result<(), std::io::Error>>());
        tasks.drain().cancel();
        assert!(tasks.run(Duration::from_millis(10)).await.is_ok());
    }
}
