//! What a node remembers beside flows: choices of clients, and flows that have come in directly. Apart from
//! [`NodeTables`](crate::tables::NodeTables), which extends both.

use coil_common::values::{AffinityValue, InboundValue};

use crate::{family::Family, tables::Full};

/// Gateways that clients have used last.
pub trait Affinities<F: Family> {
    /// An entry.
    type Affinity: Copy;

    /// What is remembered of a client and an egress.
    fn affinity(&self, client: &F::Addr, egress: u32) -> Option<Self::Affinity>;
    /// Its contents.
    fn affinity_value(&self, affinity: Self::Affinity) -> AffinityValue;
    /// Notes a use.
    fn use_affinity(&self, affinity: Self::Affinity, now: u32);
    /// Remembers a choice, if there is room.
    fn put_affinity(&self, client: &F::Addr, egress: u32, value: &AffinityValue);
}

/// Flows that have come to pods directly, keyed as the pod answers.
pub trait Inbounds<F: Family> {
    /// An entry.
    type Inbound: Copy;

    /// A flow.
    fn inbound(&self, key: &F::KeyWords) -> Option<Self::Inbound>;
    /// Its contents.
    fn inbound_value(&self, inbound: Self::Inbound) -> InboundValue;
    /// Notes a packet and what it shows.
    fn see_inbound(&self, inbound: Self::Inbound, now: u32, state: u32);
    /// Adds a flow.
    ///
    /// # Errors
    ///
    /// [`Full`] if the table has no room.
    fn put_inbound(&self, key: &F::KeyWords, value: &InboundValue) -> Result<(), Full>;
}
