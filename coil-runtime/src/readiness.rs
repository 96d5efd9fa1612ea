//! Readiness and liveness as named checks. A blocker is a guard: while any of its name lives, the process
//! is not ready; the task that holds it drops it when its part is done.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// A check that is asked whenever somebody wants to know; `Err` says what is wrong.
pub type Probe = Arc<dyn Fn() -> Result<(), String> + Send + Sync>;

#[derive(Default)]
struct Inner {
    /// Number of living blockers by name; a name stays once it was used, so that it can be asked for.
    blockers: BTreeMap<&'static str, usize>,
    ready: BTreeMap<&'static str, Probe>,
    live: BTreeMap<&'static str, Probe>,
}

/// The checks of a process; clones share them.
#[derive(Clone, Default)]
pub struct Readiness(Arc<Mutex<Inner>>);

/// The answer of one check.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CheckResult {
    /// Name of the check.
    pub name: &'static str,
    /// What is wrong, if anything.
    pub outcome: Result<(), String>,
}

/// Keeps the process unready while it lives.
#[derive(Debug)]
#[must_use = "dropping it makes the process ready"]
pub struct Blocker {
    readiness: Readiness,
    name: &'static str,
}

impl Readiness {
    /// Nothing in the way.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds something that must be done before the process is ready.
    pub fn blocker(&self, name: &'static str) -> Blocker {
        *self.inner().blockers.entry(name).or_default() += 1;
        Blocker { readiness: self.clone(), name }
    }

    /// Adds a readiness check that is asked each time.
    pub fn ready_check(
        &self,
        name: &'static str,
        probe: impl Fn() -> Result<(), String> + Send + Sync + 'static,
    ) {
        self.inner().ready.insert(name, Arc::new(probe));
    }

    /// Adds a liveness check that is asked each time.
    pub fn live_check(
        &self,
        name: &'static str,
        probe: impl Fn() -> Result<(), String> + Send + Sync + 'static,
    ) {
        self.inner().live.insert(name, Arc::new(probe));
    }

    /// Whether everything that readiness asks for holds.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        self.readyz().iter().all(|check| check.outcome.is_ok())
    }

    /// All readiness checks.
    #[must_use]
    pub fn readyz(&self) -> Vec<CheckResult> {
        let (blockers, probes) = {
            let inner = self.inner();
            (inner.blockers.clone(), inner.ready.clone())
        };
        let mut results = vec![ping()];
        results.extend(blockers.into_iter().map(|(name, count)| CheckResult {
            name,
            outcome: if count == 0 { Ok(()) } else { Err("not done yet".to_owned()) },
        }));
        results.extend(ask(probes));
        results
    }

    /// All liveness checks.
    #[must_use]
    pub fn healthz(&self) -> Vec<CheckResult> {
        let probes = self.inner().live.clone();
        let mut results = vec![ping()];
        results.extend(ask(probes));
        results
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Readiness {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Readiness").field(&self.inner().blockers).finish()
    }
}

impl Drop for Blocker {
    fn drop(&mut self) {
        let mut inner = self.readiness.inner();
        if let Some(count) = inner.blockers.get_mut(self.name) {
            *count -= 1;
            if *count == 0 {
                tracing::info!(check = self.name, "done");
            }
        }
    }
}

fn ping() -> CheckResult {
    CheckResult { name: "ping", outcome: Ok(()) }
}

/// Asked outside the lock: a probe may take its time or look at the readiness itself.
fn ask(probes: BTreeMap<&'static str, Probe>) -> impl Iterator<Item = CheckResult> {
    probes.into_iter().map(|(name, probe)| CheckResult { name, outcome: probe() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ready_when_all_blockers_are_gone() {
        let readiness = Readiness::new();
        assert!(readiness.is_ready());
        let first = readiness.blocker("list");
        let second = readiness.blocker("list");
        let other = readiness.blocker("socket");
        drop(first);
        drop(other);
        assert!(!readiness.is_ready());
        let bad: Vec<_> =
            readiness.readyz().into_iter().filter(|c| c.outcome.is_err()).map(|c| c.name).collect();
        assert_eq!(bad, ["list"]);
        drop(second);
        assert!(readiness.is_ready());
        assert_eq!(readiness.readyz().len(), 3);
    }

    #[test]
    fn probes_are_asked_each_time() {
        let readiness = Readiness::new();
        let failing = Arc::new(std::sync::atomic::AtomicBool::new(true));
        let flag = failing.clone();
        readiness.ready_check("api", move || {
            if flag.load(std::sync::atomic::Ordering::Relaxed) { Err("away".to_owned()) } else { Ok(()) }
        });
        assert!(!readiness.is_ready());
        assert!(readiness.healthz().iter().all(|c| c.outcome.is_ok()));
        failing.store(false, std::sync::atomic::Ordering::Relaxed);
        assert!(readiness.is_ready());
    }
}
