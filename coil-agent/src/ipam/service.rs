//! The service: callers who want addresses on one side, the API server and the kernel on the other.
//!
//! A lock is held for the time of a look into the [`Core`] and never while something is waited for. Whoever
//! must wait for a block looks again after each change.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use coil_api::labels::{self, Expected};
use coil_runtime::tasks::Drain;
use futures::stream::FuturesUnordered;
use futures::{Stream, StreamExt};
use tokio::sync::{Notify, watch};
use tokio::time::{Instant, sleep_until, timeout_at};

use super::api::BlockApi;
use super::core::{Core, Done, Effect, Pace, Step};
use super::metrics::{IpamMetrics, Outcome};
use super::watch::News;
use super::{Addresses, Assigned, Cause, Found, IpamError, Owner};
use crate::cni::error::causes;
use crate::routes::Export;

/// Time to ask whether our node still exists.
const LAST_QUESTION: Duration = Duration::from_secs(10);
/// Time between looks when there is nothing to look for.
const IDLE: Duration = Duration::from_secs(3600);

/// Settings of the service.
#[derive(Clone, Debug)]
pub struct IpamOptions {
    /// Name of this node.
    pub node: String,
    /// Pauses.
    pub pace: Pace,
    /// When the agent ends and its node is deleted, remove the routes to its blocks.
    pub clear_routes_on_shutdown: bool,
}

/// The API server tells nothing more.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error("the watches of the Kubernetes API have ended")]
pub struct WatchesEnded;

/// Hands out addresses. Clones are the same service.
#[derive(Clone)]
pub struct IpamService(Arc<Shared>);

struct Shared {
    core: Mutex<Core>,
    options: IpamOptions,
    metrics: IpamMetrics,
    /// Counts changes, for those who wait for one.
    changed: watch::Sender<u64>,
    /// Callers have changed something that the loop must see.
    nudged: Notify,
}

impl fmt::Debug for IpamService {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("IpamService").field("options", &self.0.options).finish_non_exhaustive()
    }
}

impl IpamService {
    /// A service that knows what the kernel holds, and nothing of blocks until [`IpamService::run`] does.
    #[must_use]
    pub fn new(options: IpamOptions, found: Vec<Found>, metrics: IpamMetrics) -> Self {
        let core = Mutex::new(Core::new(found, options.pace));
        let changed = watch::Sender::new(0);
        Self(Arc::new(Shared { core, options, metrics, changed, nudged: Notify::new() }))
    }

    /// Waits until addresses can be handed out.
    pub async fn ready(&self) {
        let mut changes = self.0.changed.subscribe();
        while !self.look(|core, _| core.is_ready()) {
            // The sender is part of ourselves.
            if changes.changed().await.is_err() {
                return;
            }
        }
    }

    /// Keeps blocks, requests and exported routes as they should be, until the drain.
    ///
    /// # Errors
    /// There is no more news.
    pub async fn run<A: BlockApi, E: Export>(
        self,
        api: A,
        routes: E,
        mut news: impl Stream<Item = News> + Send + Unpin,
        drain: Drain,
    ) -> Result<(), WatchesEnded> {
        let mut work = FuturesUnordered::new();
        loop {
            let (effects, next) = self.look(|core, now| (core.due(now), core.next_due(now)));
            work.extend(effects.into_iter().map(|effect| self.perform(&api, &routes, effect)));
            tokio::select! {
                () = drain.cancelled() => break,
                Some(done) = work.next() => self.change(|core, now| core.done(done, now)),
                news = news.next() => match news {
                    Some(news) => self.change(|core, now| hear(core, news, now)),
                    None => return Err(WatchesEnded),
                },
                () = self.0.nudged.notified() => {}
                () = sleep_until(next.unwrap_or_else(|| Instant::now() + IDLE)) => {}
            }
        }
        // Whatever is under way may end anywhere: the next start finds what there is.
        drop(work);
        self.change(|core, _| core.stop());
        if self.0.options.clear_routes_on_shutdown {
            self.clear_routes(&api, &routes).await;
        }
        Ok(())
    }

    /// Removes the exported routes if our node is deleted, so that nobody is told of them any more.
    async fn clear_routes<A: BlockApi, E: Export>(&self, api: &A, routes: &E) {
        match tokio::time::timeout(LAST_QUESTION, api.node_exists()).await {
            Ok(Ok(true)) => tracing::info!("our node exists: the exported routes stay"),
            Ok(Ok(false)) => match routes.export(&std::collections::BTreeSet::new()).await {
                Ok(()) => tracing::info!("our node is deleted: the exported routes are removed"),
                Err(error) => {
                    tracing::warn!(error = causes(&error), "cannot remove the exported routes");
                }
            },
            Ok(Err(error)) => {
                tracing::warn!(error = causes(&error), "is our node deleted? the exported routes stay");
            }
            Err(_) => tracing::warn!("is our node deleted? No answer; the exported routes stay"),
        }
    }

    async fn perform<A: BlockApi, E: Export>(&self, api: &A, routes: &E, effect: Effect) -> Done {
        tracing::debug!(?effect, "begun");
        match effect {
            Effect::List { mark } => Done::Listed(mark, self.told("list", api.blocks().await)),
            Effect::Pool(pool) => {
                let result = self.told("pool", api.pool(&pool).await);
                Done::Pool(pool, result)
            }
            Effect::Request(pool) => {
                let result = self.told("request", api.request(&pool).await);
                Done::Requested(pool, result)
            }
            Effect::Poll { pool, name } => Done::Polled(pool, self.told("request", api.poll(&name).await)),
            Effect::Fetch { pool, block } => Done::Fetched(pool, self.told("block", api.block(&block).await)),
            Effect::Forget { pool, name, uid } => {
                Done::Forgotten(pool, self.told("forget", api.forget(&name, &uid).await))
            }
            Effect::Inspect(view) => {
                let result = self.told("block", api.block(&view.name).await);
                Done::Inspected(view.uid, result)
            }
            Effect::Release(view) => {
                let result = self.told("release", api.release(&view).await);
                Done::Released(view.uid, result)
            }
            Effect::Export(wanted) => {
                let result = self.told("export", routes.export(&wanted).await);
                Done::Exported(wanted, result)
            }
        }
    }

    fn told<T, E>(&self, operation: &'static str, result: Result<T, E>) -> Result<T, Cause>
    where
        E: std::error::Error + Send + Sync + 'static,
    {
        result.map_err(|error| {
            self.0.metrics.failed(operation);
            tracing::warn!(operation, error = causes(&error), "this will be tried again");
            Cause::new(error)
        })
    }

    fn look<T>(&self, work: impl FnOnce(&mut Core, Instant) -> T) -> T {
        work(&mut self.0.core.lock().unwrap_or_else(PoisonError::into_inner), Instant::now())
    }

    /// Changes something, which those who wait should see.
    fn change<T>(&self, work: impl FnOnce(&mut Core, Instant) -> T) -> T {
        let result = self.look(work);
        self.observe();
        self.0.changed.send_modify(|count| *count = count.wrapping_add(1));
        result
    }

    fn observe(&self) {
        let (usage, strays) = self.look(|core, _| (core.usage(), core.ledger().strays().len()));
        self.0.metrics.observe(&usage, strays);
    }
}

/// A caller who waits for a block.
struct Wait<'a> {
    service: &'a IpamService,
    pool: &'a str,
    mark: u64,
    since: Instant,
    outcome: Outcome,
}

impl<'a> Wait<'a> {
    fn begin(service: &'a IpamService, pool: &'a str, since: Instant) -> Self {
        service.0.metrics.wait_begins();
        let mark = service.look(|core, _| core.wait(pool));
        service.0.nudged.notify_one();
        Self { service, pool, mark, since, outcome: Outcome::Abandoned }
    }
}

impl Drop for Wait<'_> {
    fn drop(&mut self) {
        self.service.look(|core, _| core.wait_no_more(self.pool));
        self.service.0.metrics.wait_ended(self.outcome, self.since.elapsed());
    }
}

impl Addresses for IpamService {
    async fn allocate(&self, pool: &str, owner: &Owner) -> Result<Assigned, IpamError> {
        for name in [pool, &self.0.options.node] {
            if name.is_empty() || labels::check(name, Expected::LabelValue).is_err() {
                return Err(IpamError::Name { name: name.to_owned() });
            }
        }
        let start = Instant::now();
        let mut changes = self.0.changed.subscribe();
        let mut waiting: Option<Wait<'_>> = None;
        loop {
            changes.mark_unchanged();
            let mark = waiting.as_ref().map(|waiting| waiting.mark);
            let step = self.look(|core, now| core.allocate(pool, owner, mark, now));
            let (outcome, result) = match step {
                Step::Given(assigned) => (Outcome::Given, Ok(assigned)),
                Step::Refused(error) => (Outcome::Refused, Err(error)),
                Step::Wait => {
                    waiting.get_or_insert_with(|| Wait::begin(self, pool, start));
                    match timeout_at(start + self.0.options.pace.wait, changes.changed()).await {
                        Ok(_) => continue,
                        Err(_) => (Outcome::Late, Err(self.look(|core, _| core.late(pool)))),
                    }
                }
            };
            if let Some(waiting) = &mut waiting {
                waiting.outcome = outcome;
            }
            if result.is_ok() {
                // It may have been the last of a block for which others wait. They need not look.
                self.observe();
                self.0.nudged.notify_one();
            }
            return result;
        }
    }

    async fn free(&self, owner: &Owner) -> Result<(), IpamError> {
        if self.change(|core, now| core.free(owner, now)) {
            tracing::debug!(%owner, "freed");
        }
        self.0.nudged.notify_one();
        Ok(())
    }
}

fn hear(core: &mut Core, news: News, now: Instant) {
    match news {
        News::Pools(change) => core.pools(change, now),
        News::Request(view) => core.request_seen(view, now),
        News::RequestGone(view) => core.request_gone(&view.pool, &view.uid),
    }
}

#[cfg(test)]
mod fake;
#[cfg(test)]
mod tests;
