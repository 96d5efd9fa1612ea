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
    pub async fn run(self, deadline: Duration) -> Result<(), TaskError> {
        self.run_lingering(deadline, async || ()).await
    }

    /// The same, but a signal is first answered by `linger`, which is called then: all tasks go on until it
    /// is done, a task ends, or a second signal comes.
    ///
    /// # Errors
    /// The first task that failed, or ended before the drain.
    pub async fn run_lingering(
        mut self,
        deadline: Duration,
        linger: impl AsyncFnOnce(),
    ) -> Result<(), TaskError> {
        let mut outcome = Ok(());
        let mut signals = self.signals.take();
        let mut end = self.end(&mut signals).await;
        if let End::Signal(signal) = end {
            tracing::info!(signal, "draining");
            end = tokio::select! {
                () = linger() => End::Drained,
                end = self.end(&mut signals) => end,
            };
            if let End::Signal(signal) = end {
                tracing::warn!(signal, "a second signal: ending at once");
            }
        }
        match end {
            End::Signal(_) => {}
            End::Drained => tracing::info!("ending"),
            End::Task(ended) => {
                outcome = self.judge(ended, self.drain.is_cancelled());
                if let Err(error) = &outcome {
                    tracing::error!(error = error as &dyn Error, "ending");
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

    /// The next reason to end.
    async fn end(&mut self, signals: &mut Option<(Signal, Signal)>) -> End {
        tokio::select! {
            name = received(signals) => End::Signal(name),
            () = self.drain.cancelled() => End::Drained,
            Some(ended) = self.set.join_next_with_id() => End::Task(ended),
        }
    }

    fn judge(&mut self, ended: Ended, draining: bool) -> Result<(), TaskError> {
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

/// How a task ended.
type Ended = Result<(Id, Result<(), BoxError>), JoinError>;

/// Why a process ends.
enum End {
    /// This signal.
    Signal(&'static str),
    /// Somebody has cancelled the drain, or all is done.
    Drained,
    /// A task has ended by itself.
    Task(Ended),
}

async fn received(signals: &mut Option<(Signal, Signal)>) -> &'static str {
    match signals {
        Some((terminate, interrupt)) => tokio::select! {
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

    fn terminate() {
        let pid = std::process::id().to_string();
        assert!(std::process::Command::new("kill").args(["-TERM", &pid]).status().is_ok_and(|s| s.success()));
    }

    /// One test for all, since a signal is for the whole process.
    #[tokio::test]
    async fn tasks_go_on_while_the_process_lingers() -> Result<(), TaskError> {
        // Until what it waits for is done.
        let mut tasks = Tasks::new()?;
        tasks.spawn("a", until_drained);
        let drain = tasks.drain();
        let (asked, heard) = tokio::sync::oneshot::channel();
        let (done, wait) = tokio::sync::oneshot::channel::<()>();
        let run = tokio::spawn(tasks.run_lingering(SOON, async move || {
            assert!(asked.send(()).is_ok());
            assert!(wait.await.is_ok());
        }));
        terminate();
        assert!(heard.await.is_ok());
        assert!(!drain.is_cancelled());
        assert!(done.send(()).is_ok());
        assert!(matches!(run.await, Ok(Ok(()))));
        assert!(drain.is_cancelled());

        // Until a second signal.
        let mut tasks = Tasks::new()?;
        tasks.spawn("a", until_drained);
        terminate();
        assert!(
            tasks
                .run_lingering(SOON, async || {
                    terminate();
                    std::future::pending::<()>().await;
                })
                .await
                .is_ok()
        );

        // Until a task fails.
        let mut tasks = Tasks::new()?;
        let fail = std::sync::Arc::new(tokio::sync::Notify::new());
        let failing = fail.clone();
        tasks.spawn("bad", |_| async move {
            failing.notified().await;
            Err(std::io::Error::other("no"))
        });
        terminate();
        let outcome = tasks
            .run_lingering(SOON, async || {
                fail.notify_one();
                std::future::pending::<()>().await;
            })
            .await;
        assert!(matches!(outcome, Err(TaskError::Failed { task: "bad", .. })));
        Ok(())
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
