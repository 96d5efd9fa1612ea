//! Pods of this node.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use coil_api::{PodFacts, names};
use k8s_openapi::api::core::v1::Pod;

use super::{Change, ObjectKey};
use crate::desired::PodUid;

/// What matters of a pod.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PodView {
    /// Namespace and name.
    pub key: ObjectKey,
    /// UID.
    pub uid: PodUid,
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// Annotations that are about egress.
    pub annotations: BTreeMap<String, String>,
    /// Uses the network of the node.
    pub host_network: bool,
    /// `Succeeded` or `Failed`.
    pub finished: bool,
    /// It is being deleted.
    pub terminating: bool,
    /// Addresses of the status.
    pub addresses: Vec<IpAddr>,
    /// Version, to tell the newer of two reads.
    pub version: u64,
}

impl PodView {
    /// Reads a pod; `None` for one without name or UID, which no API server sends.
    #[must_use]
    pub fn of(pod: &Pod) -> Option<Self> {
        let facts = PodFacts::from(pod);
        let meta = &pod.metadata;
        let status = pod.status.as_ref();
        let mut addresses: Vec<IpAddr> = status
            .and_then(|status| status.pod_ips.as_ref())
            .into_iter()
            .flatten()
            .filter_map(|entry| entry.ip.parse().ok())
            .collect();
        if addresses.is_empty() {
            let single = status.and_then(|status| status.pod_ip.as_ref());
            addresses.extend(single.and_then(|ip| ip.parse::<IpAddr>().ok()));
        }
        Some(Self {
            key: ObjectKey::new(facts.namespace, meta.name.as_ref()?),
            uid: meta.uid.clone()?,
            labels: facts.labels.clone(),
            annotations: facts
                .annotations
                .iter()
                .filter(|(key, _)| key.starts_with(names::ANNOTATION_EGRESS_PREFIX))
                .map(|(key, value)| (key.clone(), value.clone()))
                .collect(),
            host_network: facts.host_network,
            finished: facts.finished,
            terminating: meta.deletion_timestamp.is_some(),
            addresses,
            version: meta
                .resource_version
                .as_ref()
                .and_then(|version| version.parse().ok())
                .unwrap_or_default(),
        })
    }

    /// Facts for the matching of clients, as if the pod were alive.
    ///
    /// A pod that is over keeps its policy for as long as its interface exists, so that its last
    /// packets do not leave with its own address.
    #[must_use]
    pub fn facts(&self) -> PodFacts<'_> {
        PodFacts {
            namespace: &self.key.namespace,
            labels: &self.labels,
            annotations: &self.annotations,
            host_network: self.host_network,
            finished: false,
        }
    }

    /// Name of the Egress whose gateway the pod is.
    #[must_use]
    pub fn gateway_of(&self) -> Option<&str> {
        let label = |key: &str| self.labels.get(key).map(String::as_str);
        if label(names::LABEL_APP_NAME) == Some(names::APP_NAME)
            && label(names::LABEL_APP_COMPONENT) == Some(names::COMPONENT_EGRESS)
        {
            label(names::LABEL_APP_INSTANCE)
        } else {
            None
        }
    }
}

/// Pods of this node.
#[derive(Debug, Default)]
pub struct Pods {
    by_uid: BTreeMap<PodUid, PodView>,
    by_key: BTreeMap<ObjectKey, PodUid>,
    /// Pods that the container runtime asked about before the watch has told of them. A list that is
    /// older than the question does not remove them.
    early: BTreeSet<PodUid>,
    synced: bool,
}

impl Pods {
    /// Takes a change; returns pods that are gone.
    pub fn change(&mut self, change: Change<PodView>) -> Vec<PodView> {
        match change {
            Change::Apply(pod) => self.apply(pod),
            Change::Delete(key) => self.remove(&key).into_iter().collect(),
            Change::Reset { objects, unreadable } => self.reset(objects, &unreadable),
        }
    }

    /// Takes a pod that was read outside the watch.
    pub fn learn(&mut self, pod: PodView) -> Vec<PodView> {
        match self.by_uid.get(&pod.uid) {
            Some(known) if known.version >= pod.version => Vec::new(),
            known => {
                if known.is_none() {
                    self.early.insert(pod.uid.clone());
                }
                self.insert(pod)
            }
        }
    }

    /// A pod by its UID.
    #[must_use]
    pub fn get(&self, uid: &str) -> Option<&PodView> {
        self.by_uid.get(uid)
    }

    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = &PodView> {
        self.by_uid.values()
    }

    /// The first list is complete.
    #[must_use]
    pub fn synced(&self) -> bool {
        self.synced
    }

    fn apply(&mut self, pod: PodView) -> Vec<PodView> {
        self.early.remove(&pod.uid);
        self.insert(pod)
    }

    /// Returns the pod that had the same name before, if it was another one.
    fn insert(&mut self, pod: PodView) -> Vec<PodView> {
        let replaced = match self.by_key.get(&pod.key) {
            Some(uid) if *uid != pod.uid => self.remove(&pod.key.clone()),
            _ => None,
        };
        self.by_key.insert(pod.key.clone(), pod.uid.clone());
        self.by_uid.insert(pod.uid.clone(), pod);
        replaced.into_iter().collect()
    }

    fn remove(&mut self, key: &ObjectKey) -> Option<PodView> {
        let uid = self.by_key.remove(key)?;
        self.early.remove(&uid);
        self.by_uid.remove(&uid)
    }

    fn reset(&mut self, objects: Vec<PodView>, unreadable: &[ObjectKey]) -> Vec<PodView> {
        let listed: BTreeSet<&ObjectKey> = objects.iter().map(|pod| &pod.key).chain(unreadable).collect();
        let gone: Vec<ObjectKey> = self
            .by_uid
            .values()
            .filter(|pod| !listed.contains(&pod.key) && !self.early.contains(&pod.uid))
            .map(|pod| pod.key.clone())
            .collect();
        let mut removed: Vec<PodView> = gone.iter().filter_map(|key| self.remove(key)).collect();
        for pod in objects {
            removed.extend(self.apply(pod));
        }
        self.synced = true;
        removed
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

    use super::*;
    use crate::index::testing::pod;

    fn uids(pods: &Pods) -> Vec<&str> {
        pods.iter().map(|pod| pod.uid.as_str()).collect()
    }

    fn reset(objects: Vec<PodView>) -> Change<PodView> {
        Change::Reset { objects, unreadable: vec![] }
    }

    #[test]
    fn a_list_removes_what_it_does_not_name() {
        let mut pods = Pods::default();
        assert!(!pods.synced());
        pods.change(reset(vec![pod("a", "1"), pod("b", "2")]));
        assert!(pods.synced());
        let gone = pods.change(reset(vec![pod("b", "2"), pod("c", "3")]));
        assert_eq!(gone, [pod("a", "1")]);
        assert_eq!(uids(&pods), ["2", "3"]);
    }

    #[test]
    fn what_cannot_be_read_stays_as_it_was() {
        let mut pods = Pods::default();
        pods.change(reset(vec![pod("a", "1")]));
        let gone = pods.change(Change::Reset { objects: vec![], unreadable: vec![pod("a", "1").key] });
        assert!(gone.is_empty());
        assert_eq!(uids(&pods), ["1"]);
    }

    #[test]
    fn a_pod_re_created_under_its_name_replaces_the_old_one() {
        let mut pods = Pods::default();
        pods.change(Change::Apply(pod("a", "1")));
        let gone = pods.change(Change::Apply(pod("a", "2")));
        assert_eq!(gone, [pod("a", "1")]);
        assert_eq!(uids(&pods), ["2"]);
    }

    #[test]
    fn a_pod_seen_by_the_runtime_first_survives_an_older_list() {
        let mut pods = Pods::default();
        pods.learn(pod("new", "9"));
        pods.change(reset(vec![pod("a", "1")]));
        assert_eq!(uids(&pods), ["1", "9"]);
        // The watch has caught up: from now on it decides.
        pods.change(Change::Apply(pod("new", "9")));
        pods.change(reset(vec![pod("a", "1")]));
        assert_eq!(uids(&pods), ["1"]);
    }

    #[test]
    fn an_older_read_does_not_undo_a_newer_one() {
        let mut pods = Pods::default();
        let new = PodView { version: 7, finished: true, ..pod("a", "1") };
        pods.change(Change::Apply(new.clone()));
        pods.learn(PodView { version: 6, ..pod("a", "1") });
        assert_eq!(pods.get("1"), Some(&new));
    }

    #[test]
    fn a_pod_is_read_with_either_form_of_addresses() {
        let mut object: Pod = serde_json::from_value(serde_json::json!({
            "metadata": {"name": "p", "namespace": "ns", "uid": "u", "resourceVersion": "12",
                "annotations": {"egress.coil.cybozu.com/x": "y", "other": "z"}},
            "spec": {"containers": []},
            "status": {"phase": "Running", "podIP": "10.0.0.1",
                "podIPs": [{"ip": "10.0.0.1"}, {"ip": "fd00::1"}]},
        }))
        .unwrap();
        let view = PodView::of(&object).unwrap();
        assert_eq!(view.addresses.len(), 2);
        assert_eq!(view.annotations.len(), 1);
        assert_eq!(view.version, 12);
        object.status.as_mut().unwrap().pod_ips = None;
        assert_eq!(PodView::of(&object).unwrap().addresses.len(), 1);
    }
}
