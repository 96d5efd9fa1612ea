//! The ClusterRoleBinding `coil-egress`: its subjects are exactly the ServiceAccounts `coil-egress` of the
//! namespaces that have an Egress. It is installed with Coil, without subjects; we may not create it.

use std::collections::BTreeSet;
use std::error::Error;
use std::time::Duration;

use coil_api::{Egress, names};
use coil_runtime::patience::patient;
use coil_runtime::tasks::Drain;
use futures::stream::{BoxStream, select};
use futures::{FutureExt, Stream, StreamExt, TryStreamExt};
use k8s_openapi::api::rbac::v1::{ClusterRoleBinding, Subject};
use kube::api::PostParams;
use kube::core::DeserializeGuard;
use kube::runtime::reflector::{self, Store};
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Api, Client, ResourceExt};
use tokio::sync::{Mutex, watch};

use super::apply::FIELD_MANAGER;
use crate::error::{ReconcileError, chain, delay};

const NAME: &str = names::EGRESS_SERVICE_ACCOUNT;
/// Changes within this time are dealt with at once.
const SETTLE: Duration = Duration::from_millis(200);

/// Keeps the subjects right.
pub(crate) struct Bindings {
    client: Client,
    egresses: Store<DeserializeGuard<Egress>>,
    /// One writer at a time, or they would undo each other's work.
    lock: Mutex<()>,
    /// Counts changes of the binding that others may wait for.
    changed: watch::Sender<u64>,
    /// The same for Egresses.
    egress_changed: watch::Sender<u64>,
}

/// The watches that [`Bindings::run`] follows.
pub(crate) struct Watches(BoxStream<'static, Result<Changed, watcher::Error>>);

enum Changed {
    Egress,
    Binding,
}

impl Bindings {
    /// Prepares the watches; nothing is sent until [`Bindings::run`].
    pub(crate) fn new(client: Client) -> (Self, Watches) {
        let (egresses, writer) = reflector::store();
        let egress_api = Api::<DeserializeGuard<Egress>>::all(client.clone());
        let egress_events = patient(watcher(egress_api, watcher::Config::default()))
            .reflect(writer)
            .touched_objects()
            .map_ok(|_| Changed::Egress);
        let binding_api = Api::<ClusterRoleBinding>::all(client.clone());
        let only_ours = watcher::Config::default().fields(&format!("metadata.name={NAME}"));
        let binding_events =
            patient(watcher(binding_api, only_ours)).touched_objects().map_ok(|_| Changed::Binding);
        let watches = Watches(select(egress_events, binding_events).boxed());
        (
            Self {
                client,
                egresses,
                lock: Mutex::new(()),
                changed: watch::Sender::new(0),
                egress_changed: watch::Sender::new(0),
            },
            watches,
        )
    }

    /// Yields whenever the binding itself changed, for those who failed for want of it.
    pub(crate) fn changes(&self) -> impl Stream<Item = ()> + Send + use<> {
        stream_of(self.changed.subscribe())
    }

    /// All Egresses.
    pub(crate) fn egresses(&self) -> Store<DeserializeGuard<Egress>> {
        self.egresses.clone()
    }

    /// Yields whenever an Egress changed.
    pub(crate) fn egress_changes(&self) -> impl Stream<Item = ()> + Send + use<> {
        stream_of(self.egress_changed.subscribe())
    }

    /// Follows Egresses and the binding until drained.
    pub(crate) async fn run(&self, Watches(mut watches): Watches, drain: Drain) {
        let mut failures: u32 = 0;
        let mut due = None;
        loop {
            tokio::select! {
                () = drain.cancelled() => return,
                event = watches.next() => match event {
                    Some(Ok(changed)) => {
                        let counter = match changed {
                            Changed::Binding => &self.changed,
                            Changed::Egress => &self.egress_changed,
                        };
                        counter.send_modify(|count| *count += 1);
                        due.get_or_insert_with(|| tokio::time::Instant::now() + SETTLE);
                    }
                    Some(Err(error)) => {
                        tracing::warn!(error = &error as &dyn Error, "a watch for role bindings failed; it starts again");
                    }
                    None => return,
                },
                // The first list of Egresses comes through this very loop: `sync` would wait for it for ever.
                () = sleep_until(due), if !self.listed() => due = Some(tokio::time::Instant::now() + SETTLE),
                () = sleep_until(due), if self.listed() => {
                    due = None;
                    match self.sync(None).await {
                        Ok(()) => failures = 0,
                        Err(error) => {
                            failures = failures.saturating_add(1);
                            let wait = delay(error.class(), failures);
                            tracing::warn!(error = chain(&error), retry_seconds = wait.as_secs_f64(), "cannot bring role bindings up to date");
                            due = Some(tokio::time::Instant::now() + wait);
                        }
                    }
                }
            }
        }
    }

    /// Whether all Egresses are known.
    fn listed(&self) -> bool {
        self.egresses.wait_until_ready().now_or_never().is_some()
    }

    /// Brings the subjects up to date. `also` is a namespace that has an Egress for certain, even if the
    /// watch of this part has not seen it yet.
    pub(crate) async fn sync(&self, also: Option<&str>) -> Result<(), ReconcileError> {
        if self.egresses.wait_until_ready().await.is_err() {
            // The watch ended, which happens at the end of the process only.
            return Ok(());
        }
        let _guard = self.lock.lock().await;
        let api = Api::<ClusterRoleBinding>::all(self.client.clone());
        let observed =
            api.get_opt(NAME).await.map_err(ReconcileError::api("get", "ClusterRoleBinding", NAME))?;
        let mut binding = observed.ok_or(ReconcileError::NoBinding { name: NAME })?;
        let mut namespaces: BTreeSet<String> =
            self.egresses.state().iter().filter_map(|egress| egress.namespace()).collect();
        namespaces.extend(also.map(str::to_owned));
        let wanted = subjects(&namespaces);
        if binding.subjects.as_deref().unwrap_or_default() == wanted {
            return Ok(());
        }
        tracing::info!(
            name = NAME,
            namespaces = namespaces.len(),
            "updating the subjects of the role binding"
        );
        binding.subjects = Some(wanted);
        binding.metadata.managed_fields = None;
        let parameters =
            PostParams { field_manager: Some(FIELD_MANAGER.to_owned()), ..PostParams::default() };
        let written = api.replace(NAME, &parameters, &binding).await;
        written.map(drop).map_err(ReconcileError::api("update", "ClusterRoleBinding", NAME))
    }
}

fn stream_of(receiver: watch::Receiver<u64>) -> impl Stream<Item = ()> + Send {
    futures::stream::unfold(receiver, |mut receiver| async {
        receiver.changed().await.ok()?;
        Some(((), receiver))
    })
}

fn subjects(namespaces: &BTreeSet<String>) -> Vec<Subject> {
    namespaces
        .iter()
        .map(|namespace| Subject {
            api_group: None,
            kind: "ServiceAccount".to_owned(),
            name: names::EGRESS_SERVICE_ACCOUNT.to_owned(),
            namespace: Some(namespace.clone()),
        })
        .collect()
}

/// Never, if nothing is due.
pub(super) async fn sleep_until(due: Option<tokio::time::Instant>) {
    match due {
        Some(due) => tokio::time::sleep_until(due).await,
        None => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use coil_runtime::tasks::Tasks;
    use kube::Config;

    /// The binding may be there long before the Egresses are listed, on a slow API server.
    #[tokio::test]
    async fn a_late_list_of_egresses_is_waited_for_while_watching() {
        let config = Config::new("http://127.0.0.1:9".parse().expect("a URL"));
        let (bindings, _kept) = Bindings::new(Client::try_from(config).expect("a client"));
        let (polled, reached) = tokio::sync::oneshot::channel();
        let late = async {
            tokio::time::sleep(3 * SETTLE).await;
            polled.send(()).expect("somebody waits");
            Ok(Changed::Egress)
        };
        let first = futures::stream::iter([Ok(Changed::Binding)]);
        let watches =
            first.chain(futures::stream::once(late)).chain(futures::stream::pending::<Result<_, _>>());
        let tasks = Tasks::without_signals();
        let drain = tasks.drain();
        tokio::select! {
            () = bindings.run(Watches(watches.boxed()), drain) => panic!("it ended"),
            reached = tokio::time::timeout(Duration::from_secs(30), reached) => reached.expect("in time").expect("it lives"),
        }
    }

    #[test]
    fn subjects_are_sorted_and_exact() {
        let namespaces: BTreeSet<String> = ["b", "a"].map(str::to_owned).into();
        let list = subjects(&namespaces);
        let found: Vec<_> =
            list.iter().map(|s| (s.kind.as_str(), s.name.as_str(), s.namespace.as_deref())).collect();
        assert_eq!(
            found,
            [("ServiceAccount", "coil-egress", Some("a")), ("ServiceAccount", "coil-egress", Some("b"))]
        );
    }
}
