//! Labels of namespaces, for selectors of clients.

use std::collections::{BTreeMap, BTreeSet};

use super::{Change, ObjectKey};

/// What matters of a namespace.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NamespaceView {
    /// Name.
    pub name: String,
    /// Labels.
    pub labels: BTreeMap<String, String>,
}

/// Labels of all namespaces.
#[derive(Debug, Default)]
pub struct Namespaces {
    labels: BTreeMap<String, BTreeMap<String, String>>,
    synced: bool,
}

impl Namespaces {
    /// Takes a change.
    pub fn change(&mut self, change: Change<NamespaceView>) {
        match change {
            Change::Apply(namespace) => {
                self.labels.insert(namespace.name, namespace.labels);
            }
            Change::Delete(ObjectKey { name, .. }) => {
                self.labels.remove(&name);
            }
            Change::Reset { objects, unreadable } => {
                let unreadable: BTreeSet<String> = unreadable.into_iter().map(|k| k.name).collect();
                self.labels.retain(|name, _| unreadable.contains(name));
                self.labels.extend(objects.into_iter().map(|ns| (ns.name, ns.labels)));
                self.synced = true;
            }
        }
    }

    /// Labels of a namespace; none if it is unknown.
    #[must_use]
    pub fn labels(&self, name: &str) -> Option<&BTreeMap<String, String>> {
        self.labels.get(name)
    }

    /// The first list is complete.
    #[must_use]
    pub fn synced(&self) -> bool {
        self.synced
    }
}
