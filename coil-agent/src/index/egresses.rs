//! Egresses of the cluster, and what is remembered of deleted ones and of those that were better once.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use coil_api::egress::{EgressClient, GatewayPreference, SessionAffinity};
use coil_api::{Egress, parse_destination};
use ipnet::IpNet;
use kube::ResourceExt;

use super::{Change, ObjectKey};
use crate::desired::EgressName;

/// What matters of an Egress.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct EgressView {
    /// Namespace and name.
    pub key: ObjectKey,
    /// Destinations that could be read.
    pub destinations: Vec<IpNet>,
    /// Exceptions that could be read.
    pub excluded: Arc<Vec<IpNet>>,
    /// Selectors of clients.
    pub clients: Vec<EgressClient>,
    /// All flows of a client go to one gateway.
    pub client_affinity: bool,
    /// Seconds for which such a client keeps its gateway for new flows.
    pub affinity_seconds: u32,
    /// Gateways that are preferred for new flows.
    pub preference: GatewayPreference,
    /// Only for connections that its clients open.
    pub originating_only: bool,
    /// The outer source port follows the flow.
    pub source_port_auto: bool,
    /// Nothing but its name could be read.
    pub unreadable: bool,
    /// What is wrong with it; anything here means that some destination is unknown.
    pub problems: Vec<String>,
}

impl EgressView {
    /// Reads an Egress, taking what is good of it.
    #[must_use]
    pub fn of(egress: &Egress) -> Self {
        let spec = &egress.spec;
        let mut problems = Vec::new();
        let mut parse = |texts: &[String]| -> Vec<IpNet> {
            let mut nets = Vec::new();
            for text in texts {
                match parse_destination(text) {
                    Ok(net) => nets.push(net),
                    Err(error) => problems.push(error.to_string()),
                }
            }
            nets
        };
        let destinations = parse(&spec.destinations);
        let excluded = parse(&spec.excluded_destinations);
        if spec.destinations.is_empty() {
            problems.push("it has no destinations".into());
        }
        Self {
            key: ObjectKey::new(egress.namespace().unwrap_or_default(), egress.name_any()),
            destinations,
            excluded: Arc::new(excluded),
            clients: spec.clients.clone(),
            client_affinity: spec.session_affinity == SessionAffinity::ClientIP,
            affinity_seconds: spec.affinity_seconds(),
            preference: spec.gateway_preference,
            originating_only: spec.originating_only,
            source_port_auto: spec.fou_source_port_auto,
            unreadable: false,
            problems,
        }
    }

    /// An Egress of which nothing but its name could be read.
    #[must_use]
    pub fn unreadable(key: ObjectKey, error: String) -> Self {
        Self { key, unreadable: true, problems: vec![error], ..Self::default() }
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> EgressName {
        name_of(&self.key)
    }
}

/// Result of a search by name.
#[derive(Clone, Copy, Debug)]
pub enum Found<'a> {
    /// It exists.
    Live(&'a EgressView),
    /// It is deleted; this was its last state.
    Deleted(&'a EgressView),
    /// It was never seen.
    Never,
}

/// Egresses of the cluster.
#[derive(Debug, Default)]
pub struct Egresses {
    live: BTreeMap<EgressName, EgressView>,
    /// Last state of deleted ones that a pod of this node may still name.
    deleted: BTreeMap<EgressName, EgressView>,
    synced: bool,
}

impl Egresses {
    /// Takes a change.
    pub fn change(&mut self, change: Change<EgressView>) {
        match change {
            Change::Apply(egress) => self.apply(egress),
            Change::Delete(key) => self.delete(&name_of(&key)),
            Change::Reset { objects, unreadable } => {
                let listed: BTreeSet<EgressName> =
                    objects.iter().map(EgressView::name).chain(unreadable.iter().map(name_of)).collect();
                let gone: Vec<EgressName> =
                    self.live.keys().filter(|name| !listed.contains(name)).cloned().collect();
                for name in gone {
                    self.delete(&name);
                }
                for egress in objects {
                    self.apply(egress);
                }
                self.synced = true;
            }
        }
    }

    /// Looks one up.
    #[must_use]
    pub fn get(&self, name: &EgressName) -> Found<'_> {
        match (self.live.get(name), self.deleted.get(name)) {
            (Some(live), _) => Found::Live(live),
            (None, Some(deleted)) => Found::Deleted(deleted),
            (None, None) => Found::Never,
        }
    }

    /// Those that exist.
    pub fn iter(&self) -> impl Iterator<Item = &EgressView> {
        self.live.values()
    }

    /// Takes what the datapath has kept of an Egress, before the first list.
    pub fn remember(&mut self, name: EgressName, destinations: impl IntoIterator<Item = IpNet>) {
        let view = EgressView {
            key: ObjectKey::new(&*name.namespace, &*name.name),
            destinations: destinations.into_iter().collect(),
            ..EgressView::default()
        };
        self.deleted.insert(name, view);
    }

    /// Forgets deleted ones that nobody names.
    pub fn forget_deleted(&mut self, named: &BTreeSet<EgressName>) {
        self.deleted.retain(|name, _| named.contains(name));
    }

    /// The first list is complete.
    #[must_use]
    pub fn synced(&self) -> bool {
        self.synced
    }

    fn apply(&mut self, mut egress: EgressView) {
        let name = egress.name();
        let deleted = self.deleted.remove(&name);
        let known = self.live.remove(&name).or(deleted);
        // What was known goes on to work; the rest of its clients' packets is stopped.
        match known {
            Some(known) if egress.unreadable => {
                egress = EgressView { unreadable: true, problems: egress.problems, ..known };
            }
            Some(known) if !egress.problems.is_empty() => {
                let lost = known.destinations.into_iter().filter(|net| !egress.destinations.contains(net));
                let lost: Vec<IpNet> = lost.collect();
                egress.destinations.extend(lost);
            }
            Some(_) | None => {}
        }
        self.live.insert(name, egress);
    }

    fn delete(&mut self, name: &EgressName) {
        if let Some(egress) = self.live.remove(name) {
            self.deleted.insert(name.clone(), egress);
        }
    }
}

fn name_of(key: &ObjectKey) -> EgressName {
    EgressName { namespace: key.namespace.clone(), name: key.name.clone() }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

    use super::*;
    use crate::index::testing::{egress, name};

    #[test]
    fn a_deleted_one_is_remembered_until_nobody_names_it() {
        let mut egresses = Egresses::default();
        egresses.change(Change::Reset {
            objects: vec![egress("a", &["1.0.0.0/8"]), egress("b", &["2.0.0.0/8"])],
            unreadable: vec![],
        });
        egresses.change(Change::Delete(egress("a", &[]).key));
        egresses.change(Change::Reset { objects: vec![], unreadable: vec![] });
        assert!(matches!(egresses.get(&name("a")), Found::Deleted(e) if e.destinations.len() == 1));
        assert!(matches!(egresses.get(&name("b")), Found::Deleted(_)));
        egresses.forget_deleted(&[name("b")].into());
        assert!(matches!(egresses.get(&name("a")), Found::Never));
        assert!(matches!(egresses.get(&name("b")), Found::Deleted(_)));
        egresses.change(Change::Apply(egress("b", &["3.0.0.0/8"])));
        assert!(matches!(egresses.get(&name("b")), Found::Live(_)));
    }

    #[test]
    fn a_bad_change_takes_no_destination_away() {
        let bad =
            |destinations: &[&str]| EgressView { problems: vec!["no".into()], ..egress("a", destinations) };
        let destinations = |egresses: &Egresses| match egresses.get(&name("a")) {
            Found::Live(view) => view.destinations.iter().map(ToString::to_string).collect::<Vec<_>>(),
            Found::Deleted(_) | Found::Never => panic!("it is gone"),
        };
        let mut egresses = Egresses::default();
        egresses.change(Change::Apply(egress("a", &["10.9.0.0/16", "1.0.0.0/8"])));
        for _ in 0..2 {
            egresses.change(Change::Apply(bad(&["1.0.0.0/8"])));
            assert_eq!(destinations(&egresses), ["1.0.0.0/8", "10.9.0.0/16"]);
        }
        egresses.change(Change::Apply(egress("a", &["2.0.0.0/8"])));
        assert_eq!(destinations(&egresses), ["2.0.0.0/8"]);
        // The same after a restart.
        let mut egresses = Egresses::default();
        egresses.remember(name("a"), egress("a", &["10.9.0.0/16"]).destinations);
        egresses.change(Change::Reset { objects: vec![bad(&[])], unreadable: vec![] });
        assert_eq!(destinations(&egresses), ["10.9.0.0/16"]);
    }

    #[test]
    fn one_that_can_no_longer_be_read_keeps_what_was_known() {
        let mut egresses = Egresses::default();
        egresses.change(Change::Apply(egress("a", &["10.9.0.0/16"])));
        let key = egress("a", &[]).key;
        for _ in 0..2 {
            egresses.change(Change::Apply(EgressView::unreadable(key.clone(), "no".into())));
            let Found::Live(view) = egresses.get(&name("a")) else { panic!("it is gone") };
            assert_eq!(
                (view.destinations.len(), view.problems.as_slice()),
                (1, ["no".to_owned()].as_slice())
            );
        }
        egresses.change(Change::Apply(egress("a", &["10.9.0.0/16"])));
        assert!(matches!(egresses.get(&name("a")), Found::Live(view) if view.problems.is_empty()));
    }

    #[test]
    fn good_destinations_are_kept_beside_bad_ones() {
        let object: Egress = serde_json::from_value(serde_json::json!({
            "apiVersion": "coil.cybozu.com/v2", "kind": "Egress",
            "metadata": {"namespace": "internet", "name": "a"},
            "spec": {"destinations": ["10.0.0.0/8", "10.0.0.0/33", "what"]},
        }))
        .unwrap();
        let view = EgressView::of(&object);
        assert_eq!(view.destinations, ["10.0.0.0/8".parse::<IpNet>().unwrap()]);
        assert_eq!(view.problems.len(), 2);
        assert!(view.client_affinity);
    }
}
