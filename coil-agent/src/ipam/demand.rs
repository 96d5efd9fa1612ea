//! What is under way to get a block of one pool: at most one request at a time. Pure.

use std::time::Duration;

use tokio::time::Instant;

use super::{Cause, IpamError};

/// Pauses.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    /// Between comparisons with all blocks of this node.
    pub gc_interval: Duration,
    /// Between the end of the last pod of a block and the end of the block: often, another pod follows.
    pub release_delay: Duration,
    /// How long a caller waits for a block, or for what is known to be known.
    pub wait: Duration,
    /// How often an open request is looked at, in case its watch is late.
    pub poll: Duration,
    /// How long a refusal is passed on without asking again.
    pub cool: Duration,
    /// First and longest pause after a failure.
    pub retry: (Duration, Duration),
}

impl Default for Pace {
    fn default() -> Self {
        Self {
            gc_interval: Duration::from_secs(300),
            release_delay: Duration::from_secs(5),
            wait: Duration::from_secs(10),
            poll: Duration::from_secs(2),
            cool: Duration::from_secs(1),
            retry: (Duration::from_millis(100), Duration::from_secs(5)),
        }
    }
}

/// Something that is done by one at a time, again after a pause that grows with failures.
#[derive(Clone, Debug, Default)]
pub(super) struct Activity {
    running: bool,
    failures: u32,
    not_before: Option<Instant>,
}

impl Activity {
    /// Begins, if it is not under way and no pause is on.
    pub(super) fn begin(&mut self, now: Instant) -> bool {
        let may = !self.running && self.not_before.is_none_or(|at| at <= now);
        self.running |= may;
        may
    }

    /// Ended well.
    pub(super) fn succeeded(&mut self) {
        *self = Self::default();
    }

    /// Ended badly.
    pub(super) fn failed(&mut self, now: Instant, pace: &Pace) {
        let (first, longest) = pace.retry;
        let pause = first.saturating_mul(1 << self.failures.min(10)).min(longest);
        *self =
            Self { running: false, failures: self.failures.saturating_add(1), not_before: Some(now + pause) };
    }

    /// When it may begin, if it is not under way.
    pub(super) fn next(&self) -> Option<Option<Instant>> {
        (!self.running).then_some(self.not_before)
    }
}

/// A request, as the API has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RequestView {
    /// Name of the object.
    pub name: String,
    /// Its UID.
    pub uid: String,
    /// The pool.
    pub pool: String,
    /// What has become of it.
    pub answer: Answer,
}

/// What has become of a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// Nothing yet.
    Pending,
    /// A block, by name.
    Block(String),
    /// Nothing: all are taken.
    Exhausted,
    /// Nothing, for another reason.
    Refused(String),
}

/// How far a request is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) enum Stage {
    /// There is none.
    #[default]
    Idle,
    /// It is being made, or the pool looked at.
    Asking,
    /// It is made; nobody has answered yet.
    Open { name: String, uid: String, poll_at: Instant },
    /// It is answered by a block, which must be read.
    Answered { name: String, uid: String, block: String },
    /// It is of no more use.
    Done { name: String, uid: String },
}

/// What a pool's callers wait for.
#[derive(Clone, Debug, Default)]
pub(super) struct Demand {
    pub(super) waiters: usize,
    pub(super) stage: Stage,
    pub(super) activity: Activity,
    /// Refusals so far, the last of them, and how long it holds.
    refusals: u64,
    refusal: Option<(IpamError, Instant)>,
    /// What went wrong last on the way to an answer.
    pub(super) trouble: Option<Cause>,
    /// What the watch told of a request whose making is not confirmed yet.
    early: Option<RequestView>,
}

impl Demand {
    /// A mark by which a caller knows refusals that come later.
    pub(super) fn mark(&self) -> u64 {
        self.refusals
    }

    /// A refusal that came after the mark, or holds still.
    pub(super) fn refusal(&self, mark: u64, now: Instant) -> Option<&IpamError> {
        let (error, until) = self.refusal.as_ref()?;
        (self.refusals > mark || now < *until).then_some(error)
    }

    /// All who wait are refused.
    pub(super) fn refuse(&mut self, error: IpamError, now: Instant, pace: &Pace) {
        self.refusals += 1;
        self.refusal = Some((error, now + pace.cool));
        self.trouble = None;
    }

    /// A refusal does not hold any more.
    pub(super) fn forgive(&mut self, now: Instant) {
        if let Some((_, until)) = &mut self.refusal {
            *until = now;
        }
    }

    /// Whether a refusal holds.
    pub(super) fn is_cooling(&self, now: Instant) -> bool {
        self.cool_until().is_some_and(|until| now < until)
    }

    /// Until when a refusal holds.
    pub(super) fn cool_until(&self) -> Option<Instant> {
        self.refusal.as_ref().map(|(_, until)| *until)
    }

    /// The request was made, or found.
    pub(super) fn requested(
        &mut self,
        mut view: RequestView,
        created: bool,
        known: bool,
        now: Instant,
        pace: &Pace,
    ) {
        if let Some(early) = self.early.take()
            && early.uid == view.uid
            && view.answer == Answer::Pending
        {
            view = early;
        }
        let old_refusal = !created && matches!(view.answer, Answer::Exhausted | Answer::Refused(_));
        if old_refusal {
            // It answers a question of some time ago.
            self.stage = Stage::Done { name: view.name, uid: view.uid };
        } else {
            self.settle(view, known, now, pace);
        }
    }

    /// The watch tells of a request.
    pub(super) fn seen(&mut self, view: RequestView, known: bool, now: Instant, pace: &Pace) {
        match &self.stage {
            Stage::Asking => self.early = Some(view),
            Stage::Open { uid, .. } if *uid == view.uid => self.settle(view, known, now, pace),
            // One that was made before a restart.
            Stage::Idle => self.requested(view, false, known, now, pace),
            Stage::Open { .. } | Stage::Answered { .. } | Stage::Done { .. } => {}
        }
    }

    /// What the watch told meanwhile, when it is not known whether a request was made.
    pub(super) fn take_early(&mut self) -> Option<RequestView> {
        self.early.take()
    }

    /// The watch tells that a request is gone.
    pub(super) fn vanished(&mut self, gone: &str) {
        let (Stage::Open { uid, .. } | Stage::Done { uid, .. }) = &self.stage else {
            return;
        };
        if uid == gone {
            self.stage = Stage::Idle;
        }
    }

    /// Takes an answer; `known` if the block in it is at hand already.
    fn settle(&mut self, view: RequestView, known: bool, now: Instant, pace: &Pace) {
        let RequestView { name, uid, pool, answer } = view;
        self.stage = match answer {
            Answer::Pending => Stage::Open { name, uid, poll_at: now + pace.poll },
            Answer::Block(block) if !known => Stage::Answered { name, uid, block },
            Answer::Block(_) => Stage::Done { name, uid },
            Answer::Exhausted => {
                self.refuse(IpamError::Exhausted { pool }, now, pace);
                Stage::Done { name, uid }
            }
            Answer::Refused(reason) => {
                self.refuse(IpamError::Refused { pool, reason }, now, pace);
                Stage::Done { name, uid }
            }
        };
    }
}
