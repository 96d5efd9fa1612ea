//! What the cluster looks like, as far as this node cares: pure state, one file per kind.
//!
//! No client, no clock, no await: changes come in as values, whoever wants to know asks. What follows
//! from the picture for this node is computed in `desired::build`.

mod egresses;
mod namespaces;
mod pods;
mod slices;

pub use egresses::{EgressView, Egresses, Found};
pub use namespaces::{NamespaceView, Namespaces};
pub use pods::{PodView, Pods};
pub use slices::{GatewayView, SliceView, Slices};

/// Namespace and name of an object; the namespace is empty for kinds that have none.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ObjectKey {
    /// Namespace.
    pub namespace: String,
    /// Name.
    pub name: String,
}

impl ObjectKey {
    /// The key of an object.
    pub fn new(namespace: impl Into<String>, name: impl Into<String>) -> Self {
        Self { namespace: namespace.into(), name: name.into() }
    }
}

/// A change of one kind, as a watch delivers it; `I` names objects.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change<T, I = ObjectKey> {
    /// An object is there, new or changed.
    Apply(T),
    /// An object is gone.
    Delete(I),
    /// A whole list: what is not in it is gone, except for objects that could not be read.
    Reset {
        /// Objects of the list.
        objects: Vec<T>,
        /// Objects of the list that could not be read: what was known of them stays.
        unreadable: Vec<I>,
    },
}

/// The picture.
#[derive(Debug, Default)]
pub struct Index {
    /// Pods of this node.
    pub pods: Pods,
    /// All Egresses.
    pub egresses: Egresses,
    /// Gateways of all Egresses.
    pub slices: Slices,
    /// Labels of all namespaces.
    pub namespaces: Namespaces,
}

impl Index {
    /// Every kind has been listed once.
    #[must_use]
    pub fn synced(&self) -> bool {
        self.pods.synced() && self.egresses.synced() && self.slices.synced() && self.namespaces.synced()
    }
}

#[cfg(test)]
pub(crate) mod testing;
