//! Leader election by Lease, compatible with client-go: of all replicas the one that holds the Lease
//! works, renews it, and hands it back when it ends in good order. A holder that cannot renew in time
//! ends at once, before another one may take over.
//!
//! Expiry is judged by how long a record was seen unchanged on our own monotonic clock, never by the
//! times in it, so clocks of different machines need not agree.

use std::error::Error;
use std::future::Future;
use std::hash::{BuildHasher, RandomState};
use std::time::{Duration, Instant};

use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use kube::api::{ObjectMeta, PostParams};
use kube::{Api, Client};
use prometheus::{IntGauge, Opts, Registry};

use crate::clock::{Clock, SystemClock};
use crate::tasks::Drain;

/// Which Lease, for whom, and how fast.
#[derive(Clone, Debug)]
pub struct LeaseConfig {
    /// Namespace of the Lease.
    pub namespace: String,
    /// Name of the Lease.
    pub name: String,
    /// Who we are; see [`unique_identity`].
    pub identity: String,
    /// Time without renewal after which others may take over.
    pub duration: Duration,
    /// Time without renewal after which we give up; less than `duration`.
    pub renew_deadline: Duration,
    /// Time between attempts.
    pub retry: Duration,
}

impl LeaseConfig {
    /// The usual times: 15, 10 and 2 seconds.
    pub fn new(namespace: impl Into<String>, name: impl Into<String>, identity: impl Into<String>) -> Self {
        Self {
            namespace: namespace.into(),
            name: name.into(),
            identity: identity.into(),
            duration: Duration::from_secs(15),
            renew_deadline: Duration::from_secs(10),
            retry: Duration::from_secs(2),
        }
    }
}

/// How leadership ended that should not have.
#[derive(Debug, thiserror::Error)]
pub enum LeaseError {
    /// Somebody else holds the Lease.
    #[error("lost Lease {lease} to {holder}")]
    Taken {
        /// The Lease.
        lease: String,
        /// Who holds it.
        holder: String,
    },
    /// The Lease could not be renewed in time.
    #[error("could not renew Lease {lease} within {deadline:?}")]
    NotRenewed {
        /// The Lease.
        lease: String,
        /// The time allowed.
        deadline: Duration,
    },
    /// What the leader does failed.
    #[error("the leader's work failed")]
    Work(#[source] Box<dyn Error + Send + Sync>),
}

/// A candidate.
pub struct Elector {
    api: Api<Lease>,
    config: LeaseConfig,
    master: IntGauge,
    observed: Option<Observed>,
}

/// The record as last seen, and since when it has been so.
struct Observed {
    holder: String,
    spec: LeaseSpec,
    since: Instant,
}

enum Attempt {
    Held,
    Other(String),
    /// Somebody wrote at the same time; the next attempt sees who.
    Conflict,
}

impl Elector {
    /// A candidate; registers `leader_election_master_status`.
    ///
    /// # Errors
    /// The metric is registered already.
    pub fn new(client: Client, config: LeaseConfig, registry: &Registry) -> prometheus::Result<Self> {
        let master = IntGauge::with_opts(
            Opts::new("leader_election_master_status", "Whether this process is the leader: 1 or 0.")
                .const_label("name", &config.name),
        )?;
        registry.register(Box::new(master.clone()))?;
        Ok(Self { api: Api::namespaced(client, &config.namespace), config, master, observed: None })
    }

    /// Waits to become leader, does the work, and hands the Lease back when the work has ended. Ends
    /// without working if drained before. The work must end when the drain is cancelled; it is dropped
    /// if the Lease is lost.
    ///
    /// # Errors
    /// The Lease was lost or the work failed; the process should end.
    pub async fn run<F, Fut, E>(mut self, drain: Drain, work: F) -> Result<(), LeaseError>
    where
        F: FnOnce(Drain) -> Fut,
        Fut: Future<Output = Result<(), E>>,
        E: Into<Box<dyn Error + Send + Sync>>,
    {
        tracing::info!(lease = self.lease(), identity = self.config.identity, "waiting for leadership");
        tokio::select! {
            () = self.acquire() => {}
            () = drain.cancelled() => return Ok(()),
        }
        tracing::info!(lease = self.lease(), "leading");
        self.master.set(1);
        let work = work(drain);
        let outcome = tokio::select! {
            biased;
            lost = self.keep() => Err(lost),
            result = work => result.map_err(|error| LeaseError::Work(error.into())),
        };
        self.master.set(0);
        if matches!(outcome, Ok(()) | Err(LeaseError::Work(_))) {
            self.release().await;
        }
        outcome
    }

    async fn acquire(&mut self) {
        let mut last_holder = None;
        loop {
            match self.attempt().await {
                Ok(Attempt::Held) => return,
                Ok(Attempt::Conflict) => {}
                Ok(Attempt::Other(holder)) => {
                    if last_holder.as_ref() != Some(&holder) {
                        tracing::info!(lease = self.lease(), holder, "another process leads");
                        last_holder = Some(holder);
                    }
                }
                Err(error) => {
                    tracing::warn!(
                        lease = self.lease(),
                        error = &error as &dyn Error,
                        "cannot read or write the lease"
                    );
                }
            }
            tokio::time::sleep(self.pause()).await;
        }
    }

    /// Renews until that fails.
    async fn keep(&mut self) -> LeaseError {
        let mut renewed = Instant::now();
        loop {
            tokio::time::sleep(self.config.retry).await;
            let left = self.config.renew_deadline.saturating_sub(renewed.elapsed());
            if left.is_zero() {
                return LeaseError::NotRenewed { lease: self.lease(), deadline: self.config.renew_deadline };
            }
            match tokio::time::timeout(left, self.attempt()).await {
                Ok(Ok(Attempt::Held)) => renewed = Instant::now(),
                Ok(Ok(Attempt::Other(holder))) => return LeaseError::Taken { lease: self.lease(), holder },
                Ok(Ok(Attempt::Conflict)) => {}
                Ok(Err(error)) => {
                    tracing::warn!(
                        lease = self.lease(),
                        error = &error as &dyn Error,
                        "cannot renew the lease"
                    );
                }
                // The next turn finds nothing left.
                Err(_) => tracing::warn!(lease = self.lease(), "renewing the lease takes too long"),
            }
        }
    }

    /// Hands the Lease back, so that the next leader need not wait for it to expire.
    async fn release(&mut self) {
        let released = async {
            let Some(mut lease) = self.api.get_opt(&self.config.name).await? else { return Ok(()) };
            let spec = lease.spec.get_or_insert_default();
            if spec.holder_identity.as_deref() != Some(&self.config.identity) {
                return Ok(());
            }
            spec.holder_identity = Some(String::new());
            spec.lease_duration_seconds = Some(1);
            spec.renew_time = Some(SystemClock.now_micro());
            self.api.replace(&self.config.name, &PostParams::default(), &lease).await.map(drop)
        };
        match tokio::time::timeout(self.config.retry, released).await {
            Ok(Ok(())) => tracing::info!(lease = self.lease(), "released"),
            Ok(Err(error)) => {
                tracing::warn!(lease = self.lease(), error = &error as &dyn Error, "cannot release the lease")
            }
            Err(_) => tracing::warn!(lease = self.lease(), "cannot release the lease in time"),
        }
    }

    /// Takes the Lease if it is free, expired or ours already.
    async fn attempt(&mut self) -> kube::Result<Attempt> {
        let Some(mut lease) = self.api.get_opt(&self.config.name).await? else {
            let metadata = ObjectMeta { name: Some(self.config.name.clone()), ..ObjectMeta::default() };
            let lease = Lease { metadata, spec: Some(self.claim(None)) };
            return self.written(self.api.create(&PostParams::default(), &lease).await);
        };
        let spec = lease.spec.clone().unwrap_or_default();
        let now = Instant::now();
        let observed = observe(&mut self.observed, spec.clone(), now);
        if !may_take(observed, &self.config.identity, self.config.duration, now) {
            return Ok(Attempt::Other(observed.holder.clone()));
        }
        lease.spec = Some(self.claim(Some(&spec)));
        self.written(self.api.replace(&self.config.name, &PostParams::default(), &lease).await)
    }

    fn written(&mut self, result: kube::Result<Lease>) -> kube::Result<Attempt> {
        match result {
            Ok(lease) => {
                observe(&mut self.observed, lease.spec.unwrap_or_default(), Instant::now());
                Ok(Attempt::Held)
            }
            // 409: created or changed by somebody else since we looked.
            Err(kube::Error::Api(status)) if status.code == 409 => Ok(Attempt::Conflict),
            Err(error) => Err(error),
        }
    }

    /// The record that makes us the holder.
    fn claim(&self, old: Option<&LeaseSpec>) -> LeaseSpec {
        let now = SystemClock.now_micro();
        let ours = old.and_then(|o| o.holder_identity.as_deref()) == Some(&self.config.identity);
        let transitions = old.and_then(|o| o.lease_transitions).unwrap_or(0);
        LeaseSpec {
            holder_identity: Some(self.config.identity.clone()),
            lease_duration_seconds: Some(i32::try_from(self.config.duration.as_secs()).unwrap_or(i32::MAX)),
            acquire_time: old.filter(|_| ours).and_then(|o| o.acquire_time.clone()).or(Some(now.clone())),
            lease_transitions: Some(if ours || old.is_none() {
                transitions
            } else {
                transitions.saturating_add(1)
            }),
            renew_time: Some(now),
            ..LeaseSpec::default()
        }
    }

    fn lease(&self) -> String {
        format!("{}/{}", self.config.namespace, self.config.name)
    }

    /// Candidates that started together should not keep asking together.
    fn pause(&self) -> Duration {
        let jitter = RandomState::new().hash_one(0u8) % 1000;
        let jitter = u32::try_from(jitter).unwrap_or(0);
        self.config.retry + self.config.retry * jitter / 1000
    }
}

/// Notes the record; the time stays that of the first look if nothing changed since.
fn observe(observed: &mut Option<Observed>, spec: LeaseSpec, now: Instant) -> &Observed {
    let unchanged = observed.take().filter(|old| old.spec == spec);
    observed.insert(unchanged.unwrap_or_else(|| Observed {
        holder: spec.holder_identity.clone().unwrap_or_default(),
        spec,
        since: now,
    }))
}

fn may_take(observed: &Observed, identity: &str, our_duration: Duration, now: Instant) -> bool {
    if observed.holder.is_empty() || observed.holder == identity {
        return true;
    }
    let theirs = observed.spec.lease_duration_seconds.and_then(|s| u64::try_from(s).ok());
    let duration = theirs.map_or(our_duration, Duration::from_secs);
    now.saturating_duration_since(observed.since) >= duration
}

/// `name` and something that no other process has.
#[must_use]
pub fn unique_identity(name: &str) -> String {
    let unique = std::fs::read_to_string("/proc/sys/kernel/random/uuid")
        .unwrap_or_else(|_| format!("{:x}", RandomState::new().hash_one(std::process::id())));
    format!("{name}_{}", unique.trim())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use std::sync::{Arc, Mutex};

    use axum::body::to_bytes;
    use axum::http::{Method, Request, Response};
    use kube::client::Body;
    use serde_json::{Value, json};

    /// An API server that knows one Lease, and may be away.
    #[derive(Clone, Default)]
    struct FakeApi(Arc<Mutex<(Option<Value>, u64, bool)>>);

    impl FakeApi {
        fn client(&self) -> Client {
            let api = self.clone();
            let service = tower::service_fn(move |request: Request<Body>| {
                let api = api.clone();
                async move {
                    let method = request.method().clone();
                    let body = to_bytes(axum::body::Body::new(request.into_body()), 1 << 20).await?;
                    api.answer(&method, &body)
                }
            });
            Client::new(service, "kube-system")
        }

        fn answer(&self, method: &Method, body: &[u8]) -> Result<Response<Body>, axum::Error> {
            let mut state = self.0.lock().unwrap();
            if state.2 {
                return Err(axum::Error::new("away"));
            }
            let status = |code: u16, reason: &str| {
                (
                    code,
                    json!({ "kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code, "reason": reason, "message": reason }),
                )
            };
            let (code, value) = if method == Method::GET {
                state.0.clone().map_or_else(|| status(404, "NotFound"), |v| (200, v))
            } else {
                let mut new: Value = serde_json::from_slice(body).unwrap();
                let current = state.0.as_ref().map(|v| v["metadata"]["resourceVersion"].clone());
                let given = new["metadata"].get("resourceVersion").cloned();
                if current == given {
                    state.1 += 1;
                    new["metadata"]["resourceVersion"] = json!(state.1.to_string());
                    state.0 = Some(new.clone());
                    (if method == Method::POST { 201 } else { 200 }, new)
                } else {
                    status(409, "Conflict")
                }
            };
            Ok(Response::builder()
                .status(code)
                .body(Body::from(serde_json::to_vec(&value).unwrap()))
                .unwrap())
        }

        fn holder(&self) -> Option<String> {
            let state = self.0.lock().unwrap();
            Some(state.0.as_ref()?["spec"]["holderIdentity"].as_str()?.to_owned())
        }

        fn set_away(&self, away: bool) {
            self.0.lock().unwrap().2 = away;
        }
    }

    fn elector(api: &FakeApi, identity: &str) -> Elector {
        let config = LeaseConfig {
            duration: Duration::from_secs(1),
            renew_deadline: Duration::from_millis(200),
            retry: Duration::from_millis(10),
            ..LeaseConfig::new("kube-system", "test", identity)
        };
        Elector::new(api.client(), config, &Registry::new()).unwrap()
    }

    async fn until(condition: impl Fn() -> bool) {
        let wait = async {
            while !condition() {
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(10), wait).await.unwrap();
    }

    async fn until_drained(drain: Drain) -> Result<(), std::io::Error> {
        drain.cancelled().await;
        Ok(())
    }

    #[tokio::test]
    async fn the_second_waits_until_the_first_lets_go() {
        let api = FakeApi::default();
        let (first_drain, second_drain) = (Drain::new(), Drain::new());
        let first = tokio::spawn(elector(&api, "first").run(first_drain.clone(), until_drained));
        until(|| api.holder().as_deref() == Some("first")).await;
        let second = tokio::spawn(elector(&api, "second").run(second_drain.clone(), until_drained));
        first_drain.cancel();
        first.await.unwrap().unwrap();
        until(|| api.holder().as_deref() == Some("second")).await;
        second_drain.cancel();
        second.await.unwrap().unwrap();
        assert_eq!(api.holder().as_deref(), Some(""));
    }

    #[tokio::test]
    async fn a_leader_that_cannot_renew_gives_up_and_another_takes_over_after_expiry() {
        let api = FakeApi::default();
        let first = tokio::spawn(elector(&api, "first").run(Drain::new(), until_drained));
        until(|| api.holder().as_deref() == Some("first")).await;
        api.set_away(true);
        assert!(matches!(first.await.unwrap(), Err(LeaseError::NotRenewed { .. })));
        api.set_away(false);
        let drain = Drain::new();
        let second = tokio::spawn(elector(&api, "second").run(drain.clone(), until_drained));
        until(|| api.holder().as_deref() == Some("second")).await;
        drain.cancel();
        second.await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn failing_work_releases_the_lease() {
        let api = FakeApi::default();
        let result =
            elector(&api, "first").run(Drain::new(), |_| async { Err::<(), _>(std::io::Error::other("no")) });
        assert!(matches!(result.await, Err(LeaseError::Work(_))));
        assert_eq!(api.holder().as_deref(), Some(""));
    }

    #[test]
    fn expiry_counts_from_the_last_change_seen() {
        let now = Instant::now();
        let observed = |holder: &str, seconds: i32| Observed {
            holder: holder.to_owned(),
            spec: LeaseSpec { lease_duration_seconds: Some(seconds), ..LeaseSpec::default() },
            since: now,
        };
        let ours = Duration::from_secs(15);
        assert!(may_take(&observed("", 15), "me", ours, now));
        assert!(may_take(&observed("me", 15), "me", ours, now));
        assert!(!may_take(&observed("other", 15), "me", ours, now + Duration::from_secs(14)));
        assert!(may_take(&observed("other", 15), "me", ours, now + Duration::from_secs(15)));
        assert!(may_take(&observed("other", 1), "me", ours, now + Duration::from_secs(1)));
    }

    #[test]
    fn identities_differ() {
        assert_ne!(unique_identity("pod"), unique_identity("pod"));
    }
}
