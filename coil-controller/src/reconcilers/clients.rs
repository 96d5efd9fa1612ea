//! `status.clients`: how many running pods use each Egress. Counted from watches of pods and namespaces,
//! written apart from the rest of the status, since it changes far more often.

use std::collections::BTreeMap;
use std::error::Error;
use std::sync::Arc;
use std::time::Duration;

use coil_api::clients::{PodFacts, client_reason};
use coil_api::egress::EgressClient;
use coil_api::{Egress, EgressRef};
use coil_runtime::patience::patient;
use coil_runtime::tasks::Drain;
use futures::stream::{BoxStream, select_all};
use futures::{StreamExt, TryStreamExt};
use k8s_openapi::api::core::v1::{Namespace, Pod, PodSpec, PodStatus};
use kube::api::{Patch, PatchParams};
use kube::core::{DeserializeGuard, PartialObjectMeta};
use kube::runtime::reflector::{self, Store};
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Api, Client, ResourceExt};
use tokio::time::Instant;

use super::apply::FIELD_MANAGER;
use super::bindings::sleep_until;

/// Changes within this time are counted at once.
const SETTLE: Duration = Duration::from_secs(2);
/// Time until a count that could not be written is tried again.
const RETRY: Duration = Duration::from_secs(15);

/// Counts clients and writes the counts.
pub(crate) struct Clients {
    client: Client,
    egresses: Store<DeserializeGuard<Egress>>,
    pods: Store<Pod>,
    namespaces: Store<PartialObjectMeta<Namespace>>,
}

/// The watches that [`Clients::run`] follows.
pub(crate) struct Watches(BoxStream<'static, Result<(), watcher::Error>>);

impl Clients {
    /// Prepares the watches; nothing is sent until [`Clients::run`]. `changes` yields whenever an object
    /// of `egresses` has changed.
    pub(crate) fn new(
        client: Client,
        egresses: Store<DeserializeGuard<Egress>>,
        changes: impl futures::Stream<Item = ()> + Send + 'static,
    ) -> (Self, Watches) {
        let (pods, writer) = reflector::store();
        let pod_events = patient(watcher(Api::<Pod>::all(client.clone()), watcher::Config::default()))
            .modify(strip)
            .reflect(writer)
            .touched_objects()
            .map_ok(drop);
        let (namespaces, writer) = reflector::store();
        let namespace_api = Api::<PartialObjectMeta<Namespace>>::all(client.clone());
        let namespace_events = patient(watcher(namespace_api, watcher::Config::default()))
            .reflect(writer)
            .touched_objects()
            .map_ok(drop);
        let watches = select_all([pod_events.boxed(), namespace_events.boxed(), changes.map(Ok).boxed()]);
        (Self { client, egresses, pods, namespaces }, Watches(watches.boxed()))
    }

    /// Counts until drained.
    pub(crate) async fn run(&self, Watches(mut watches): Watches, drain: Drain) {
        let mut due = None;
        loop {
            tokio::select! {
                () = drain.cancelled() => return,
                event = watches.next() => match event {
                    Some(Ok(())) => {
                        due.get_or_insert_with(|| Instant::now() + SETTLE);
                    }
                    Some(Err(error)) => {
                        tracing::warn!(error = &error as &dyn Error, "a watch for clients failed; it starts again");
                    }
                    None => return,
                },
                () = sleep_until(due) => due = self.update().await.then(|| Instant::now() + RETRY),
            }
        }
    }

    /// Counts and writes; returns whether something is left to do later.
    async fn update(&self) -> bool {
        if !(ready(&self.egresses) && ready(&self.pods) && ready(&self.namespaces)) {
            return true;
        }
        let guarded = self.egresses.state();
        let egresses: Vec<&Egress> = guarded.iter().filter_map(|guarded| guarded.0.as_ref().ok()).collect();
        let rules: Vec<_> = egresses.iter().map(|e| (EgressRef::of(e), e.spec.clients.as_slice())).collect();
        let namespaces = self.namespaces.state();
        let labels =
            namespaces.iter().map(|n| (n.name_any(), n.labels().clone())).collect::<BTreeMap<_, _>>();
        let counts = count(&rules, &self.pods.state(), &labels);
        let mut failed = false;
        for (egress, count) in egresses.into_iter().zip(counts) {
            if egress.status.as_ref().and_then(|s| s.clients) != Some(count) {
                failed |= !self.write(egress, count).await;
            }
        }
        failed
    }

    async fn write(&self, egress: &Egress, count: i32) -> bool {
        let (namespace, name) = (egress.namespace().unwrap_or_default(), egress.name_any());
        let api = Api::<PartialObjectMeta<Egress>>::namespaced(self.client.clone(), &namespace);
        let parameters =
            PatchParams { field_manager: Some(FIELD_MANAGER.to_owned()), ..PatchParams::default() };
        let patch = Patch::Merge(serde_json::json!({ "status": { "clients": count } }));
        match api.patch_status(&name, &parameters, &patch).await {
            Ok(_) => true,
            Err(kube::Error::Api(status)) if status.code == 404 => true,
            Err(error) => {
                tracing::warn!(
                    namespace,
                    egress = name,
                    error = &error as &dyn Error,
                    "cannot write the count of clients"
                );
                false
            }
        }
    }
}

fn ready<K>(store: &Store<K>) -> bool
where
    K: kube::runtime::reflector::Lookup + Clone + 'static,
    K::DynamicType: std::hash::Hash + Eq + Clone,
{
    use futures::FutureExt;
    matches!(store.wait_until_ready().now_or_never(), Some(Ok(())))
}

/// Keeps what matching needs: a cluster may have very many pods.
fn strip(pod: &mut Pod) {
    pod.metadata.managed_fields = None;
    pod.metadata.owner_references = None;
    let host_network = pod.spec.take().and_then(|spec| spec.host_network);
    pod.spec = Some(PodSpec { host_network, ..PodSpec::default() });
    let phase = pod.status.take().and_then(|status| status.phase);
    pod.status = Some(PodStatus { phase, ..PodStatus::default() });
}

/// Running clients of each Egress, in the order given.
fn count(
    rules: &[(EgressRef, &[EgressClient])],
    pods: &[Arc<Pod>],
    namespaces: &BTreeMap<String, BTreeMap<String, String>>,
) -> Vec<i32> {
    let nothing = BTreeMap::new();
    let mut counts = vec![0; rules.len()];
    for pod in pods {
        if pod.status.as_ref().and_then(|s| s.phase.as_deref()) != Some("Running") {
            continue;
        }
        let facts = PodFacts::from(&**pod);
        let labels = namespaces.get(facts.namespace).unwrap_or(&nothing);
        for ((egress, clients), count) in rules.iter().zip(&mut counts) {
            if client_reason(egress, clients, &facts, labels).is_some() {
                *count += 1;
            }
        }
    }
    counts
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use serde_json::{Value, json};

    fn pod(metadata: Value, host_network: bool, phase: &str) -> Arc<Pod> {
        let mut pod: Pod = serde_json::from_value(json!({
            "metadata": metadata,
            "spec": { "hostNetwork": host_network, "containers": [{ "name": "c", "image": "i" }] },
            "status": { "phase": phase, "podIP": "10.0.0.1" },
        }))
        .unwrap();
        strip(&mut pod);
        assert!(pod.spec.as_ref().unwrap().containers.is_empty());
        Arc::new(pod)
    }

    #[test]
    fn only_running_clients_count() {
        let annotations = json!({ "egress.coil.cybozu.com/internet": "egress" });
        let annotated = json!({ "name": "a", "namespace": "demo", "annotations": annotations });
        let labelled = json!({ "name": "b", "namespace": "demo", "labels": { "app": "web" } });
        let pods = [
            pod(annotated.clone(), false, "Running"),
            pod(annotated.clone(), true, "Running"),
            pod(annotated.clone(), false, "Pending"),
            pod(annotated, false, "Succeeded"),
            pod(labelled, false, "Running"),
        ];
        let clients: Vec<EgressClient> = serde_json::from_value(json!([{
            "namespaceSelector": { "matchLabels": { "team": "x" } },
            "podSelector": { "matchLabels": { "app": "web" } },
        }]))
        .unwrap();
        let rules = [
            (EgressRef::new("internet", "egress"), &[][..]),
            (EgressRef::new("internet", "other"), &clients[..]),
        ];
        let labels: BTreeMap<_, _> =
            [("demo".to_owned(), [("team".to_owned(), "x".to_owned())].into())].into();
        assert_eq!(count(&rules, &pods, &labels), [1, 1]);
        assert_eq!(count(&rules, &pods, &BTreeMap::new()), [1, 0]);
    }
}
