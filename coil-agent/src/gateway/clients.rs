//! Who may use this gateway: the picture of pods, namespaces and the Egress, and the addresses that
//! follow from it.
//!
//! Pure: no client, no clock, no map. Only pods that matter are kept in full, since all pods of the
//! cluster pass through here.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use coil_api::clients::{EgressRef, PodFacts, client_reason};
use coil_api::egress::EgressClient;
use k8s_openapi::api::core::v1::Pod;

/// Namespace and name of a pod.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct PodKey {
    pub(crate) namespace: String,
    pub(crate) name: String,
}

/// What matching needs of a pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct PodView {
    pub(crate) key: PodKey,
    labels: BTreeMap<String, String>,
    annotations: BTreeMap<String, String>,
    host_network: bool,
    finished: bool,
    addresses: BTreeSet<IpAddr>,
}

impl PodView {
    /// Reads a pod; `None` if it has no name.
    pub(crate) fn of(pod: &Pod) -> Option<Self> {
        let facts = PodFacts::from(pod);
        let status = pod.status.as_ref();
        let listed = status.and_then(|status| status.pod_ips.as_ref()).into_iter().flatten();
        let listed = listed.map(|entry| entry.ip.as_str());
        let single = status.and_then(|status| status.pod_ip.as_deref());
        Some(Self {
            key: PodKey { namespace: facts.namespace.to_owned(), name: pod.metadata.name.clone()? },
            labels: facts.labels.clone(),
            annotations: facts
                .annotations
                .iter()
                .filter(|(key, _)| key.starts_with(coil_api::names::ANNOTATION_EGRESS_PREFIX))
                .map(|(key, value)| (key.clone(), value.clone()))
                .collect(),
            host_network: facts.host_network,
            finished: facts.finished,
            addresses: listed.chain(single).filter_map(|ip| ip.parse().ok()).collect(),
        })
    }

    fn facts(&self) -> PodFacts<'_> {
        PodFacts {
            namespace: &self.key.namespace,
            labels: &self.labels,
            annotations: &self.annotations,
            host_network: self.host_network,
            finished: self.finished,
        }
    }
}

/// A change of one kind of object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Change<K, V> {
    /// Everything there is.
    Reset(Vec<V>),
    Apply(V),
    Delete(K),
}

/// A change of the picture.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Input {
    Pods(Change<PodKey, PodView>),
    /// Labels of namespaces.
    Namespaces(Change<String, (String, BTreeMap<String, String>)>),
    /// Selectors of our Egress; none if it does not exist.
    Egress(Vec<EgressClient>),
}

/// A client pod and its addresses.
pub(crate) type Clients = BTreeMap<PodKey, BTreeSet<IpAddr>>;

/// The picture.
#[derive(Debug)]
pub(crate) struct ClientIndex {
    egress: EgressRef,
    selectors: Vec<EgressClient>,
    pods: BTreeMap<PodKey, PodView>,
    namespaces: BTreeMap<String, BTreeMap<String, String>>,
    clients: Clients,
    /// Which client pods have an address: of two pods in turn one may come before the other has gone.
    holders: BTreeMap<IpAddr, BTreeSet<PodKey>>,
    listed_pods: bool,
    listed_namespaces: bool,
    listed_egress: bool,
}

impl ClientIndex {
    /// Nothing is known yet.
    pub(crate) fn new(egress: EgressRef) -> Self {
        Self {
            egress,
            selectors: Vec::new(),
            pods: BTreeMap::new(),
            namespaces: BTreeMap::new(),
            clients: BTreeMap::new(),
            holders: BTreeMap::new(),
            listed_pods: false,
            listed_namespaces: false,
            listed_egress: false,
        }
    }

    /// Takes a change; true if the clients changed or the picture became complete.
    pub(crate) fn apply(&mut self, input: Input) -> bool {
        let was_complete = self.is_complete();
        let changed = match input {
            Input::Pods(Change::Reset(pods)) => {
                self.listed_pods = true;
                let pods: BTreeMap<_, _> = pods.into_iter().map(|pod| (pod.key.clone(), pod)).collect();
                let gone: Vec<PodKey> =
                    self.pods.keys().filter(|key| !pods.contains_key(key)).cloned().collect();
                let mut changed = false;
                for key in gone {
                    changed |= self.remove(&key);
                }
                for (_, pod) in pods {
                    changed |= self.insert(pod);
                }
                changed
            }
            Input::Pods(Change::Apply(pod)) => self.insert(pod),
            Input::Pods(Change::Delete(key)) => self.remove(&key),
            Input::Namespaces(change) => {
                match change {
                    Change::Reset(namespaces) => {
                        self.listed_namespaces = true;
                        self.namespaces = namespaces.into_iter().collect();
                    }
                    Change::Apply((name, labels)) => {
                        if self.namespaces.get(&name) == Some(&labels) {
                            return false;
                        }
                        self.namespaces.insert(name, labels);
                    }
                    Change::Delete(name) => drop(self.namespaces.remove(&name)),
                }
                // Labels of namespaces matter to selectors alone.
                !self.selectors.is_empty() && self.match_all()
            }
            Input::Egress(selectors) => {
                self.listed_egress = true;
                let changed = self.selectors != selectors;
                self.selectors = selectors;
                changed && self.match_all()
            }
        };
        changed || was_complete != self.is_complete()
    }

    /// Every kind was listed once: what is not here does not exist.
    pub(crate) fn is_complete(&self) -> bool {
        self.listed_pods && self.listed_namespaces && self.listed_egress
    }

    /// Client pods, those without an address included.
    pub(crate) fn clients(&self) -> &Clients {
        &self.clients
    }

    /// Addresses of clients.
    pub(crate) fn addresses(&self) -> impl Iterator<Item = IpAddr> {
        self.holders.keys().copied()
    }

    fn insert(&mut self, pod: PodView) -> bool {
        if self.pods.get(&pod.key) == Some(&pod) {
            return false;
        }
        let key = pod.key.clone();
        self.pods.insert(key.clone(), pod);
        self.match_one(&key)
    }

    fn remove(&mut self, key: &PodKey) -> bool {
        self.pods.remove(key);
        self.match_one(key)
    }

    fn match_all(&mut self) -> bool {
        let keys: Vec<PodKey> = self.pods.keys().cloned().collect();
        let mut changed = false;
        for key in keys {
            changed |= self.match_one(&key);
        }
        changed
    }

    /// Brings the clients up to date with one pod.
    fn match_one(&mut self, key: &PodKey) -> bool {
        let none = BTreeMap::new();
        let wanted = self.pods.get(key).filter(|pod| {
            let namespace = self.namespaces.get(&key.namespace).unwrap_or(&none);
            client_reason(&self.egress, &self.selectors, &pod.facts(), namespace).is_some()
        });
        let wanted = wanted.map(|pod| pod.addresses.clone());
        if self.clients.get(key) == wanted.as_ref() {
            return false;
        }
        for address in self.clients.remove(key).unwrap_or_default() {
            if let Some(holders) = self.holders.get_mut(&address) {
                holders.remove(key);
                if holders.is_empty() {
                    self.holders.remove(&address);
                }
            }
        }
        if let Some(addresses) = wanted {
            for address in &addresses {
                self.holders.entry(*address).or_default().insert(key.clone());
            }
            self.clients.insert(key.clone(), addresses);
        }
        true
    }
}

/// Addresses to add to and to remove from the allow-list; nothing is removed before the picture is
/// complete.
pub(crate) fn difference(
    old: &BTreeSet<IpAddr>,
    new: &BTreeSet<IpAddr>,
    complete: bool,
) -> (Vec<IpAddr>, Vec<IpAddr>) {
    let add = new.difference(old).copied().collect();
    let remove = if complete { old.difference(new).copied().collect() } else { Vec::new() };
    (add, remove)
}

#[cfg(test)]
#[path = "clients_tests.rs"]
mod tests;
