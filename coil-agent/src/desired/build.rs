//! From the picture of the cluster and the pods that are wired here to what the datapath should hold.
//! Pure.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use coil_api::clients::{EgressRef, client_reason, named_egresses};
use ipnet::IpNet;

use super::policy::{PolicyCache, Rule, block_everything, conflicts};
use super::prefer::{Place, prefer};
use super::{
    DesiredEgress, DesiredPod, DesiredState, EgressName, PodUid, Policy, PolicyAction, named_folder,
};
use crate::index::{EgressView, Found, Index, ObjectKey, PodView};
use crate::local::LocalPods;

/// What is wrong with a pod's wish.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Problem {
    /// An annotation cannot be read.
    Annotation(String),
    /// An annotation names an Egress that does not exist.
    MissingEgress(EgressName),
    /// An Egress that the pod uses is wrong, wholly or in part.
    InvalidEgress(EgressName, String),
    /// Two Egresses of the pod have the same destination; the first is used.
    Conflict(IpNet, Vec<EgressName>),
}

impl Problem {
    /// Labels of the metric.
    pub const REASONS: [&'static str; 4] =
        ["unreadable_annotation", "missing_egress", "invalid_egress", "conflicting_destinations"];

    /// Label of the metric.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        let [annotation, missing, invalid, conflict] = Self::REASONS;
        match self {
            Self::Annotation(_) => annotation,
            Self::MissingEgress(_) => missing,
            Self::InvalidEgress(..) => invalid,
            Self::Conflict(..) => conflict,
        }
    }

    /// Reason of the Event.
    #[must_use]
    pub fn event_reason(&self) -> &'static str {
        match self {
            Self::Annotation(_) => "UnreadableEgressAnnotation",
            Self::MissingEgress(_) => "EgressNotFound",
            Self::InvalidEgress(..) => "EgressInvalid",
            Self::Conflict(..) => "EgressConflict",
        }
    }

    /// A pod with this cannot start: somebody has to change something first.
    #[must_use]
    pub fn prevents_start(&self) -> bool {
        matches!(self, Self::Annotation(_) | Self::MissingEgress(_))
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Annotation(error) => {
                write!(f, "{error}; packets without a better rule are dropped")
            }
            Self::MissingEgress(egress) => {
                write!(f, "Egress {egress} does not exist; packets without a better rule are dropped")
            }
            Self::InvalidEgress(egress, error) => {
                write!(f, "Egress {egress}: {error}; packets without a better rule are dropped")
            }
            Self::Conflict(prefix, egresses) => {
                write!(f, "destination {prefix} belongs to more than one Egress:")?;
                for egress in egresses {
                    write!(f, " {egress}")?;
                }
                f.write_str("; the first is used")
            }
        }
    }
}

impl fmt::Display for EgressName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// Everything that follows from the picture.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Outcome {
    /// For the datapath.
    pub desired: DesiredState,
    /// Problems of pods, for Events and metrics.
    pub problems: BTreeMap<PodUid, PodProblems>,
    /// Pods whose interface is not known, with their addresses; `None` until pods and interfaces have
    /// been listed.
    pub unwired: Option<BTreeMap<PodUid, Vec<IpAddr>>>,
    /// Names that folders of gateways of this node may have.
    pub gateway_folders: BTreeSet<String>,
}

/// Problems of one pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodProblems {
    /// The pod.
    pub key: ObjectKey,
    /// What is wrong, each once.
    pub problems: BTreeSet<Problem>,
}

/// What an outcome follows from.
#[derive(Debug, Default)]
pub struct Picture {
    /// The cluster.
    pub index: Index,
    /// Pods that are wired here.
    pub local: LocalPods,
    /// Pods that are gone from the API while their interface still exists. They keep their policy, so
    /// that the last packets of their sockets do not leave with their own address.
    pub retired: BTreeMap<PodUid, PodView>,
    /// Largest packet of the node's way out, if known.
    pub uplink_mtu: Option<u32>,
    /// Pods without a known interface have been looked for once.
    pub adopted: bool,
    /// Where this node is.
    pub place: Place,
    /// All Egresses are for connections that pods open, whatever they say themselves.
    pub originating_only: bool,
    /// Nobody is a client of anything: what pods ask for is not looked at.
    pub no_egress: bool,
}

impl Picture {
    /// Nothing is missing: what is not here does not exist.
    #[must_use]
    pub fn complete(&self) -> bool {
        self.index.synced() && self.local.recovered() && self.adopted
    }

    /// Computes the outcome. Until the picture is complete it is empty: half a picture would take
    /// policies away from pods that the kernel knows more about.
    pub fn outcome(&mut self, cache: &mut PolicyCache) -> Outcome {
        let mut outcome = Outcome { unwired: self.unwired(), ..Outcome::default() };
        if !self.complete() {
            return outcome;
        }
        outcome.desired.complete = true;
        let mut named = BTreeSet::new();
        for pod in self.index.pods.iter() {
            if pod.host_network {
                continue;
            }
            outcome.gateway_folders.insert(pod.uid.clone());
            outcome.gateway_folders.insert(named_folder(&pod.key.namespace, &pod.key.name));
            let wish = self.wish(pod, &mut named);
            // Nobody repairs what is about to go.
            if !pod.finished && !pod.terminating && !wish.problems.is_empty() {
                outcome.problems.insert(
                    pod.uid.clone(),
                    PodProblems { key: pod.key.clone(), problems: wish.problems.clone() },
                );
            }
            self.place(pod, wish, cache, &mut outcome.desired);
        }
        for pod in self.retired.values() {
            let wish = self.wish(pod, &mut named);
            self.place(pod, wish, cache, &mut outcome.desired);
        }
        self.close_doors(&mut outcome.desired);
        self.add_egresses(&mut outcome.desired);
        self.index.egresses.forget_deleted(&named);
        cache.sweep();
        outcome
    }

    fn unwired(&self) -> Option<BTreeMap<PodUid, Vec<IpAddr>>> {
        if !self.index.pods.synced() || !self.local.recovered() {
            return None;
        }
        let pods = self.index.pods.iter().filter(|pod| {
            !pod.host_network
                && !pod.finished
                && !pod.addresses.is_empty()
                && self.local.get(&pod.uid).is_none()
        });
        Some(pods.map(|pod| (pod.uid.clone(), pod.addresses.clone())).collect())
    }

    fn place(&self, pod: &PodView, wish: Wish, cache: &mut PolicyCache, desired: &mut DesiredState) {
        let Some(local) = self.local.get(&pod.uid) else {
            return;
        };
        // The runtime knows the address of a new sandbox before the API does. Without any address
        // every packet of the pod is taken for spoofed, which is right until one is known.
        let addresses = if local.addresses.is_empty() { &pod.addresses } else { &local.addresses };
        let mtu = self.uplink_mtu.map_or(local.mtu, |mtu| mtu.min(local.mtu));
        desired.pods.insert(
            pod.uid.clone(),
            DesiredPod {
                namespace: pod.key.namespace.clone(),
                name: pod.key.name.clone(),
                ifindex: local.ifindex,
                ipv4: first_v4(addresses),
                ipv6: first_v6(addresses),
                gateway: pod.gateway_of().is_some(),
                mtu,
                policy: wish.rules.map(|rules| cache.get(rules)),
            },
        );
    }

    /// Interfaces that say whose they are while no such pod exists, after a restart: the pod was deleted
    /// while we were away, and what still runs in it has no business to send anything.
    fn close_doors(&self, desired: &mut DesiredState) {
        for (uid, local) in self.local.iter() {
            if self.index.pods.get(uid).is_some() || desired.pods.contains_key(uid) {
                continue;
            }
            desired.pods.insert(
                uid.clone(),
                DesiredPod {
                    namespace: String::new(),
                    name: String::new(),
                    ifindex: local.ifindex,
                    ipv4: None,
                    ipv6: None,
                    gateway: false,
                    mtu: local.mtu,
                    policy: None,
                },
            );
        }
    }

    /// What a pod wants; `named` collects the Egresses that its annotations name.
    fn wish(&self, pod: &PodView, named: &mut BTreeSet<EgressName>) -> Wish {
        if self.no_egress {
            return Wish::default();
        }
        let facts = pod.facts();
        let annotations = named_egresses(&pod.annotations);
        let mut wish = Wish::default();
        if !annotations.errors.is_empty() {
            wish.block();
            let errors: Vec<String> = annotations.errors.iter().map(ToString::to_string).collect();
            wish.problems.insert(Problem::Annotation(errors.join("; ")));
        }
        for egress in annotations.egresses {
            let name = EgressName { namespace: egress.namespace, name: egress.name };
            if is_gateway_of(pod, &name) {
                continue;
            }
            match self.index.egresses.get(&name) {
                Found::Live(egress) => wish.uses(egress),
                Found::Deleted(egress) => wish.misses(&name, &egress.destinations),
                Found::Never => wish.misses(&name, &[]),
            }
            named.insert(name);
        }
        let no_labels = BTreeMap::new();
        let labels = self.index.namespaces.labels(&pod.key.namespace);
        for egress in self.index.egresses.iter() {
            let name = egress.name();
            if egress.clients.is_empty() || is_gateway_of(pod, &name) {
                continue;
            }
            let reference = EgressRef::new(&*name.namespace, &*name.name);
            let labels = labels.unwrap_or(&no_labels);
            if client_reason(&reference, &egress.clients, &facts, labels).is_some() {
                wish.uses(egress);
            }
        }
        if let Some(rules) = &wish.rules {
            for (prefix, actions) in conflicts(rules) {
                let egresses = actions.into_iter().filter_map(|action| match action {
                    PolicyAction::Egress(name) => Some(name.clone()),
                    PolicyAction::Direct | PolicyAction::Deleted(_) | PolicyAction::Block => None,
                });
                wish.problems.insert(Problem::Conflict(prefix, egresses.collect()));
            }
        }
        wish
    }

    fn add_egresses(&self, desired: &mut DesiredState) {
        let policies: BTreeSet<&Arc<Policy>> =
            desired.pods.values().filter_map(|pod| pod.policy.as_ref()).collect();
        let mut names: BTreeSet<EgressName> = BTreeSet::new();
        for policy in policies {
            for action in policy.v4.values().chain(policy.v6.values()) {
                if let PolicyAction::Egress(name) | PolicyAction::Deleted(name) = action
                    && !names.contains(name)
                {
                    names.insert(name.clone());
                }
            }
        }
        for name in names {
            let Found::Live(view) = self.index.egresses.get(&name) else {
                desired.egresses.insert(name, DesiredEgress { deleted: true, ..DesiredEgress::default() });
                continue;
            };
            let mut egress = DesiredEgress {
                client_affinity: view.client_affinity,
                affinity_seconds: view.affinity_seconds,
                originating_only: self.originating_only || view.originating_only,
                source_port_auto: view.source_port_auto,
                ..DesiredEgress::default()
            };
            let gateways = self.index.slices.gateways(&name);
            for (address, state) in prefer(view.preference, &self.place, gateways) {
                match address {
                    IpAddr::V4(address) => drop(egress.v4.insert(address, state)),
                    IpAddr::V6(address) => drop(egress.v6.insert(address, state)),
                }
            }
            desired.egresses.insert(name, egress);
        }
    }
}

/// What one pod wants.
#[derive(Debug, Default)]
struct Wish {
    /// `None`: it is nobody's client.
    rules: Option<Vec<Rule>>,
    problems: BTreeSet<Problem>,
}

impl Wish {
    fn uses(&mut self, egress: &EgressView) {
        let name = egress.name();
        let rules = self.rules.get_or_insert_default();
        rules.extend(egress.destinations.iter().map(|destination| Rule {
            destination: *destination,
            action: PolicyAction::Egress(name.clone()),
            excluded: Arc::clone(&egress.excluded),
        }));
        if !egress.problems.is_empty() {
            self.block();
        }
        for problem in &egress.problems {
            self.problems.insert(Problem::InvalidEgress(name.clone(), problem.clone()));
        }
    }

    fn misses(&mut self, name: &EgressName, last_destinations: &[IpNet]) {
        self.block();
        let rules = self.rules.get_or_insert_default();
        rules.extend(
            last_destinations
                .iter()
                .map(|destination| Rule::new(*destination, PolicyAction::Deleted(name.clone()))),
        );
        self.problems.insert(Problem::MissingEgress(name.clone()));
    }

    fn block(&mut self) {
        self.rules.get_or_insert_default().extend(block_everything());
    }
}

/// A gateway's own packets must not come back to it.
fn is_gateway_of(pod: &PodView, egress: &EgressName) -> bool {
    pod.key.namespace == egress.namespace && pod.gateway_of() == Some(&egress.name)
}

fn first_v4(addresses: &[IpAddr]) -> Option<Ipv4Addr> {
    addresses.iter().find_map(|address| match address {
        IpAddr::V4(address) => Some(*address),
        IpAddr::V6(_) => None,
    })
}

fn first_v6(addresses: &[IpAddr]) -> Option<Ipv6Addr> {
    addresses.iter().find_map(|address| match address {
        IpAddr::V4(_) => None,
        IpAddr::V6(address) => Some(*address),
    })
}

#[cfg(test)]
mod tests;
