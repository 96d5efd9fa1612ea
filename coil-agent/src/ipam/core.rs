//! What the service knows and what it should do next. Pure: effects are data, time is an argument.
//!
//! Callers are answered from the [`Ledger`]; whatever needs the API server or the kernel is an [`Effect`],
//! of which [`Core::due`] gives each once, and whose outcome comes back as a [`Done`]. A process may die
//! between any two of these: all that must survive is in the API and in the kernel.

use std::collections::{BTreeMap, BTreeSet};

use ipnet::IpNet;
use tokio::time::Instant;

pub use super::demand::Pace;
use super::demand::{Activity, Demand, RequestView, Stage};
use super::ledger::{BlockView, Compared, Ledger, Usage};
use super::{Assigned, Cause, Found, IpamError, Owner};

/// Something to do outside.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Effect {
    /// List the blocks of this node.
    List {
        /// To be handed back.
        mark: u64,
    },
    /// Read a pool.
    Pool(String),
    /// Make a request for a block of a pool, or find the one that exists.
    Request(String),
    /// Read a request.
    Poll {
        /// Its pool.
        pool: String,
        /// Its name.
        name: String,
    },
    /// Read a block that a request was answered by.
    Fetch {
        /// The pool of the request.
        pool: String,
        /// Name of the block.
        block: String,
    },
    /// Delete a request.
    Forget {
        /// Its pool.
        pool: String,
        /// Its name.
        name: String,
        /// Its UID: not another of that name.
        uid: String,
    },
    /// Read a block that could be given back.
    Inspect(BlockView),
    /// Delete a block, which nobody uses, and remove its finalizer.
    Release(BlockView),
    /// Make the exported routes equal to a set.
    Export(BTreeSet<IpNet>),
}

/// What has become of a block that should be deleted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Released {
    /// It does not exist any more.
    Gone,
    /// It is not deleted, and no request to do so is under way: somebody has reserved it.
    Kept(BlockView),
}

/// The outcome of an effect.
#[derive(Clone, Debug)]
pub enum Done {
    /// Of [`Effect::List`].
    Listed(u64, Result<Vec<BlockView>, Cause>),
    /// Of [`Effect::Pool`]: whether it is being deleted, if it exists.
    Pool(String, Result<Option<bool>, Cause>),
    /// Of [`Effect::Request`], and whether it was made now.
    Requested(String, Result<(RequestView, bool), Cause>),
    /// Of [`Effect::Poll`].
    Polled(String, Result<Option<RequestView>, Cause>),
    /// Of [`Effect::Fetch`]: nothing if there is no such block of this node.
    Fetched(String, Result<Option<BlockView>, Cause>),
    /// Of [`Effect::Forget`].
    Forgotten(String, Result<(), Cause>),
    /// Of [`Effect::Inspect`], by UID: nothing if it does not exist any more.
    Inspected(String, Result<Option<BlockView>, Cause>),
    /// Of [`Effect::Release`], by UID.
    Released(String, Result<Released, Cause>),
    /// Of [`Effect::Export`].
    Exported(BTreeSet<IpNet>, Result<(), Cause>),
}

/// What a caller who wants an address is told.
#[derive(Clone, Debug)]
pub enum Step {
    /// Here it is.
    Given(Assigned),
    /// There is none.
    Refused(IpamError),
    /// Ask again when something has changed.
    Wait,
}

/// A change of the pools.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PoolChange {
    /// All of them, with whether they are being deleted.
    Reset(BTreeMap<String, bool>),
    /// One is new or has changed.
    Apply(String, bool),
    /// One is gone.
    Delete(String),
}

/// State of the service.
#[derive(Clone, Debug)]
pub struct Core {
    ledger: Ledger,
    pace: Pace,
    /// Whether each pool is being deleted; nothing until they are known.
    pools: Option<BTreeMap<String, bool>>,
    demands: BTreeMap<String, Demand>,
    listed: bool,
    listing: Activity,
    list_at: Option<Instant>,
    list_trouble: Option<Cause>,
    releases: BTreeMap<String, Activity>,
    exporting: Activity,
    /// What the kernel has, as far as we know.
    exported: Option<BTreeSet<IpNet>>,
    /// Somebody may have changed that.
    export_again: bool,
    stopping: bool,
}

impl Core {
    /// After a start: what the kernel holds.
    #[must_use]
    pub fn new(found: impl IntoIterator<Item = Found>, pace: Pace) -> Self {
        Self {
            ledger: Ledger::new(found),
            pace,
            pools: None,
            demands: BTreeMap::new(),
            listed: false,
            listing: Activity::default(),
            list_at: None,
            list_trouble: None,
            releases: BTreeMap::new(),
            exporting: Activity::default(),
            exported: None,
            export_again: false,
            stopping: false,
        }
    }

    /// Whether blocks and pools are known, so that addresses can be handed out.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        self.listed && self.pools.is_some()
    }

    /// From now on nobody waits.
    pub fn stop(&mut self) {
        self.stopping = true;
    }

    /// Who has what.
    #[must_use]
    pub fn ledger(&self) -> &Ledger {
        &self.ledger
    }

    /// Numbers of each pool.
    #[must_use]
    pub fn usage(&self) -> BTreeMap<String, Usage> {
        self.ledger.usage()
    }

    /// Gives an owner addresses, if there are some. `mark` is that of [`Core::wait`], if the caller waits.
    pub fn allocate(&mut self, pool: &str, owner: &Owner, mark: Option<u64>, now: Instant) -> Step {
        let Some(pools) = self.pools.as_ref().filter(|_| self.listed) else {
            return if self.stopping { Step::Refused(self.late(pool)) } else { Step::Wait };
        };
        if let Some(assigned) = self.ledger.held(owner) {
            return Step::Given(assigned.clone());
        }
        match pools.get(pool) {
            Some(true) => return Step::Refused(IpamError::PoolDeleted { pool: pool.to_owned() }),
            Some(false) => {
                if let Some(assigned) = self.ledger.allocate(pool, owner, now) {
                    return Step::Given(assigned);
                }
            }
            // It may be so new that the watch has not told of it yet.
            None => {}
        }
        if self.stopping {
            return Step::Refused(self.late(pool));
        }
        let demand = self.demands.get(pool);
        match demand.and_then(|demand| demand.refusal(mark.unwrap_or(u64::MAX), now)) {
            Some(error) => Step::Refused(error.clone()),
            None => Step::Wait,
        }
    }

    /// A caller begins to wait for an address of a pool.
    pub fn wait(&mut self, pool: &str) -> u64 {
        let demand = self.demands.entry(pool.to_owned()).or_default();
        demand.waiters += 1;
        demand.mark()
    }

    /// A caller has what it waited for, or does not want it any more.
    pub fn wait_no_more(&mut self, pool: &str) {
        if let Some(demand) = self.demands.get_mut(pool) {
            demand.waiters = demand.waiters.saturating_sub(1);
        }
    }

    /// What a caller is told whose time is over.
    #[must_use]
    pub fn late(&self, pool: &str) -> IpamError {
        if !self.is_ready() {
            return IpamError::NotReady { source: self.list_trouble.clone() };
        }
        let trouble = self.demands.get(pool).and_then(|demand| demand.trouble.clone());
        IpamError::Timeout { pool: pool.to_owned(), source: trouble }
    }

    /// Takes addresses back.
    pub fn free(&mut self, owner: &Owner, now: Instant) -> bool {
        self.ledger.free(owner, now)
    }

    /// The watch of pools tells something.
    pub fn pools(&mut self, change: PoolChange, now: Instant) {
        match (change, &mut self.pools) {
            (PoolChange::Reset(pools), known) => *known = Some(pools),
            (PoolChange::Apply(name, deleted), Some(pools)) => {
                pools.insert(name, deleted);
            }
            (PoolChange::Delete(name), Some(pools)) => {
                pools.remove(&name);
            }
            (PoolChange::Apply(..) | PoolChange::Delete(_), None) => {}
        }
        for (name, demand) in &mut self.demands {
            if self.pools.as_ref().is_some_and(|pools| pools.contains_key(name)) {
                demand.forgive(now);
            }
        }
    }

    /// The watch of requests tells of one of this node.
    pub fn request_seen(&mut self, view: RequestView, now: Instant) {
        let known = knows(&self.ledger, &view);
        self.demands.entry(view.pool.clone()).or_default().seen(view, known, now, &self.pace);
    }

    /// The watch of requests tells that one is gone.
    pub fn request_gone(&mut self, pool: &str, uid: &str) {
        if let Some(demand) = self.demands.get_mut(pool) {
            demand.vanished(uid);
        }
    }

    /// What there is to do now. Each is given once, until its outcome is told.
    pub fn due(&mut self, now: Instant) -> Vec<Effect> {
        let mut effects = Vec::new();
        if self.stopping {
            return effects;
        }
        if self.list_at.is_none_or(|at| at <= now) && self.listing.begin(now) {
            effects.push(Effect::List { mark: self.ledger.mark() });
        }
        if !self.is_ready() {
            return effects;
        }
        self.due_requests(now, &mut effects);
        self.due_releases(now, &mut effects);
        let routes = self.ledger.routes();
        if (self.export_again || self.exported.as_ref() != Some(&routes)) && self.exporting.begin(now) {
            self.export_again = false;
            effects.push(Effect::Export(routes));
        }
        effects
    }

    fn due_requests(&mut self, now: Instant, effects: &mut Vec<Effect>) {
        let Some(pools) = &self.pools else {
            return;
        };
        let ledger = &self.ledger;
        // Whose outcome is still to come stays, too: it must not be taken for that of a later demand.
        self.demands.retain(|_, demand| {
            let busy = demand.activity.next().is_none();
            busy || demand.waiters > 0 || demand.stage != Stage::Idle || demand.is_cooling(now)
        });
        for (pool, demand) in &mut self.demands {
            let effect = match &demand.stage {
                Stage::Idle => {
                    if demand.waiters == 0 || demand.is_cooling(now) {
                        continue;
                    }
                    match pools.get(pool) {
                        None => Effect::Pool(pool.clone()),
                        Some(false) if !ledger.has_free(pool) => Effect::Request(pool.clone()),
                        Some(_) => continue,
                    }
                }
                Stage::Open { poll_at, .. } if *poll_at > now => continue,
                Stage::Open { name, .. } => Effect::Poll { pool: pool.clone(), name: name.clone() },
                Stage::Answered { block, .. } => Effect::Fetch { pool: pool.clone(), block: block.clone() },
                Stage::Done { name, uid } => {
                    Effect::Forget { pool: pool.clone(), name: name.clone(), uid: uid.clone() }
                }
                Stage::Asking => continue,
            };
            if demand.activity.begin(now) {
                if demand.stage == Stage::Idle {
                    demand.stage = Stage::Asking;
                }
                effects.push(effect);
            }
        }
    }

    fn due_releases(&mut self, now: Instant, effects: &mut Vec<Effect>) {
        let idle = self.ledger.idle(self.pace.release_delay, now).into_iter().map(Effect::Inspect);
        // Others must not send here any more when the block is another's.
        let exported = self.exported.as_ref();
        let unexported = |view: &&BlockView| {
            exported.is_some_and(|exported| view.range.nets().all(|net| !exported.contains(&net)))
        };
        let unexported = self.ledger.withdrawn().filter(unexported).cloned().map(Effect::Release);
        let wanted: Vec<Effect> = idle.chain(unexported).collect();
        let uid = |effect: &Effect| match effect {
            Effect::Inspect(view) | Effect::Release(view) => Some(view.uid.clone()),
            _ => None,
        };
        let uids: BTreeSet<String> = wanted.iter().filter_map(uid).collect();
        self.releases.retain(|uid, activity| activity.next().is_none() || uids.contains(uid));
        for effect in wanted {
            if uid(&effect).is_some_and(|uid| self.releases.entry(uid).or_default().begin(now)) {
                effects.push(effect);
            }
        }
    }

    /// When there may be something to do without anything having happened.
    #[must_use]
    pub fn next_due(&self, now: Instant) -> Option<Instant> {
        let paused = |activity: &Activity| activity.next().flatten();
        let demands = self.demands.values().flat_map(|demand| {
            let poll = match &demand.stage {
                Stage::Open { poll_at, .. } => Some(*poll_at),
                _ => None,
            };
            [poll, paused(&demand.activity), demand.cool_until().filter(|_| demand.stage == Stage::Idle)]
        });
        // While one is under way, its outcome is what wakes.
        let list = self.listing.next().and_then(|pause| pause.max(self.list_at));
        let releases = self.releases.values().map(paused);
        let idle = self.ledger.next_idle(self.pace.release_delay, now);
        demands
            .chain(releases)
            .chain([list, idle, paused(&self.exporting)])
            .flatten()
            .filter(|at| *at > now)
            .min()
    }

    /// Takes the outcome of an effect.
    pub fn done(&mut self, done: Done, now: Instant) {
        match done {
            Done::Listed(mark, result) => self.listed(mark, result, now),
            Done::Exported(routes, result) => match result {
                Ok(()) => {
                    self.exporting.succeeded();
                    self.exported = Some(routes);
                }
                Err(_) => {
                    self.exporting.failed(now, &self.pace);
                    // Some of it may have been done.
                    self.exported = None;
                }
            },
            Done::Inspected(uid, result) => {
                let activity = self.releases.entry(uid.clone()).or_default();
                match result {
                    Ok(Some(view)) if view.uid == uid => {
                        activity.succeeded();
                        self.ledger.withdraw(view);
                    }
                    Ok(_) => {
                        activity.succeeded();
                        report_lost(self.ledger.gone(&uid));
                    }
                    Err(_) => activity.failed(now, &self.pace),
                }
            }
            Done::Released(uid, result) => {
                let activity = self.releases.entry(uid.clone()).or_default();
                match result {
                    Ok(Released::Gone) => {
                        activity.succeeded();
                        report_lost(self.ledger.gone(&uid));
                    }
                    Ok(Released::Kept(view)) => {
                        activity.succeeded();
                        self.ledger.keep(view);
                    }
                    Err(_) => activity.failed(now, &self.pace),
                }
            }
            Done::Pool(pool, result) => self.pool_read(pool, result, now),
            Done::Requested(pool, result) => {
                let demand = self.demands.entry(pool).or_default();
                match result {
                    Ok((view, created)) => {
                        demand.activity.succeeded();
                        let known = knows(&self.ledger, &view);
                        demand.requested(view, created, known, now, &self.pace);
                    }
                    Err(cause) => {
                        demand.failed(Stage::Idle, cause, now, &self.pace);
                        // It may have been made all the same.
                        if let Some(view) = demand.take_early() {
                            let known = knows(&self.ledger, &view);
                            demand.requested(view, false, known, now, &self.pace);
                        }
                    }
                }
            }
            Done::Polled(pool, result) => self.polled(pool, result, now),
            Done::Fetched(pool, result) => self.fetched(pool, result, now),
            Done::Forgotten(pool, result) => {
                let demand = self.demands.entry(pool).or_default();
                match result {
                    Ok(()) => {
                        demand.activity.succeeded();
                        demand.stage = Stage::Idle;
                    }
                    Err(cause) => {
                        let stage = demand.stage.clone();
                        demand.failed(stage, cause, now, &self.pace);
                    }
                }
            }
        }
    }

    fn listed(&mut self, mark: u64, result: Result<Vec<BlockView>, Cause>, now: Instant) {
        match result {
            Ok(views) => {
                self.listing.succeeded();
                self.list_trouble = None;
                self.list_at = Some(now + self.pace.gc_interval);
                self.export_again = true;
                // What is empty at the start is given back at once.
                let Compared { learnt, lost } =
                    self.ledger.compare(views, mark, Some(now).filter(|_| self.listed));
                if !self.listed || !learnt.is_empty() {
                    tracing::info!(blocks = ?learnt, "blocks of this node");
                }
                if !self.listed {
                    let strays: Vec<_> = self.ledger.strays().into_iter().map(Owner::to_string).collect();
                    if !strays.is_empty() {
                        tracing::warn!(?strays, "pods with addresses of no block of this node");
                    }
                }
                lost.into_iter().for_each(|block| report_lost(Some(block)));
                self.listed = true;
            }
            Err(cause) => {
                self.listing.failed(now, &self.pace);
                self.list_trouble = Some(cause);
            }
        }
    }

    fn pool_read(&mut self, pool: String, result: Result<Option<bool>, Cause>, now: Instant) {
        let demand = self.demands.entry(pool.clone()).or_default();
        match result {
            Ok(found) => {
                demand.activity.succeeded();
                demand.stage = Stage::Idle;
                match (found, &mut self.pools) {
                    (Some(deleted), Some(pools)) => {
                        pools.insert(pool, deleted);
                    }
                    (Some(_), None) => {}
                    (None, _) => demand.refuse(IpamError::UnknownPool { pool }, now, &self.pace),
                }
            }
            Err(cause) => demand.failed(Stage::Idle, cause, now, &self.pace),
        }
        if let Some(view) = demand.take_early() {
            let known = knows(&self.ledger, &view);
            demand.requested(view, false, known, now, &self.pace);
        }
    }

    fn polled(&mut self, pool: String, result: Result<Option<RequestView>, Cause>, now: Instant) {
        let demand = self.demands.entry(pool).or_default();
        let Stage::Open { uid, .. } = demand.stage.clone() else {
            // The watch was faster.
            demand.activity.succeeded();
            return;
        };
        match result {
            Ok(Some(view)) if view.uid == uid => {
                demand.activity.succeeded();
                let known = knows(&self.ledger, &view);
                demand.seen(view, known, now, &self.pace);
            }
            Ok(_) => {
                demand.activity.succeeded();
                demand.stage = Stage::Idle;
            }
            Err(cause) => {
                let stage = demand.stage.clone();
                demand.failed(stage, cause, now, &self.pace);
            }
        }
    }

    fn fetched(&mut self, pool: String, result: Result<Option<BlockView>, Cause>, now: Instant) {
        let demand = self.demands.entry(pool).or_default();
        match result {
            Ok(view) => {
                if let Stage::Answered { name, uid, .. } = demand.stage.clone() {
                    demand.stage = Stage::Done { name, uid };
                }
                match view {
                    Some(view) => {
                        demand.activity.succeeded();
                        demand.trouble = None;
                        tracing::info!(block = view.name, "a new block");
                        self.ledger.learn(view, now);
                    }
                    // Not at once again.
                    None => demand.activity.failed(now, &self.pace),
                }
            }
            Err(cause) => {
                let stage = demand.stage.clone();
                demand.failed(stage, cause, now, &self.pace);
            }
        }
    }
}

impl Demand {
    fn failed(&mut self, stage: Stage, cause: Cause, now: Instant, pace: &Pace) {
        self.activity.failed(now, pace);
        self.stage = stage;
        self.trouble = Some(cause);
    }
}

/// Whether the block that a request was answered by is at hand.
fn knows(ledger: &Ledger, view: &RequestView) -> bool {
    matches!(&view.answer, super::demand::Answer::Block(block) if ledger.has_block(block))
}

fn report_lost(block: Option<String>) {
    if let Some(block) = block {
        tracing::error!(block, "a block is gone although pods have addresses of it, which they keep");
    }
}
