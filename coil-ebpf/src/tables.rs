//! What the logic may ask of tables, and tell them.
//!
//! Methods are named by meaning; which map answers is the business of the implementation. Entries
//! that are counted are handles, so that an entry is looked up once a packet.

use coil_common::{
    config::Config,
    stats::{Direction, GatewayStat},
    values::{EgressValue, FlowValue, FragmentValue, GatewayValue},
};

use crate::{
    decide::open::{How, Shape, Work},
    encap::Encap,
    family::Family,
    flow::Flow,
    notes::{Affinities, Inbounds},
};

/// Packets and bytes of one packet as on the wire, and when.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tally {
    /// Packets: the segments of a GSO packet.
    pub packets: u32,
    /// IP bytes, headers counted for each segment.
    pub bytes: u32,
    /// Seconds since boot.
    pub now: u32,
    /// `STATE_*` bits that the packet shows.
    pub state: u32,
}

/// A table had no room.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Full;

/// Why a reservation failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReserveError {
    /// Somebody else has it.
    Taken,
    /// The table has no room.
    Full,
}

/// The clock.
pub trait Clock {
    /// Seconds since boot.
    fn now(&self) -> u32;
    /// A clock that costs nothing to read, in units of some ten milliseconds.
    fn tick(&self) -> u32;
}

/// Datagrams of which fragments go by.
pub trait Fragments<F: Family> {
    /// What is known of a datagram.
    fn fragment(&self, key: &F::KeyWords) -> Option<FragmentValue>;
    /// Notes a datagram, in place of what was known. Should that fail its later fragments are lost.
    fn put_fragment(&self, key: &F::KeyWords, value: &FragmentValue);
    /// Its last fragment was seen.
    fn close_fragment(&self, key: &F::KeyWords);
}

/// What a node knows.
pub trait NodeTables<F: Family>: Clock + Fragments<F> + Affinities<F> + Inbounds<F> {
    /// An entry of the flow table.
    type Flow: Copy;

    /// The policy for a destination: an egress, or one of the `EGRESS_*` marks.
    fn policy(&self, set: u32, dst: &F::Addr) -> Option<u32>;
    /// An egress.
    fn egress(&self, index: u32) -> Option<&EgressValue>;
    /// A gateway.
    fn gateway(&self, index: u32) -> Option<&GatewayValue>;
    /// The address is a gateway of the set.
    fn is_peer(&self, set: u32, addr: &F::Addr) -> bool;
    /// A flow, keyed as the pod sends.
    fn flow(&self, key: &F::KeyWords) -> Option<Self::Flow>;
    /// Its contents; counters may be torn.
    fn flow_value(&self, flow: Self::Flow) -> FlowValue;
    /// A count of `pod_usage`. It may be below zero for a moment, while user space corrects it.
    fn pod_usage(&self, cell: u32) -> i64;
    /// Adds one to it.
    fn pod_uses_more(&self, cell: u32);
    /// Adds a flow unless there is one, or replaces the one that there is with fresh counters; whether there is one more.
    ///
    /// # Errors
    ///
    /// [`Full`] if the table has no room.
    fn put_flow(&self, key: &F::KeyWords, value: &FlowValue, replace: bool) -> Result<bool, Full>;
    /// Writes the decision of a flow (set, egress, gateway and its generation) and keeps the rest.
    fn decide_flow(&self, flow: Self::Flow, value: &FlowValue);
    /// Forgets some `STATE_*` bits of a flow.
    fn retract_flow(&self, flow: Self::Flow, bits: u32);
    /// Counts a packet of a flow.
    fn count_flow(&self, flow: Self::Flow, direction: Direction, tally: &Tally);
    /// Counts a packet of a flow whose state it does not change.
    fn hit_flow(&self, flow: Self::Flow, direction: Direction, packets: u32, bytes: u32);
    /// Counts a packet of an egress; what [`NodeTables::count_egress`] does, without a tally.
    fn hit_egress(&self, egress: u32, direction: Direction, packets: u32, bytes: u32);
    /// Counts a packet of an egress.
    fn count_egress(&self, egress: u32, direction: Direction, tally: &Tally);
}

/// A translation of one direction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Translation<F: Family> {
    /// Address to write.
    pub addr: F::Addr,
    /// Port to write.
    pub port: [u8; 2],
    /// `STATE_*` bits of the connection.
    pub state: u32,
    /// By what the client's packets come.
    pub encap: Encap,
    /// Seconds since boot of the last packet.
    pub last_seen: u32,
    /// Some packet was counted.
    pub used: bool,
    /// Low half of [`Clock::tick`] when [`NatTables::count_entry`] last counted one.
    pub tick: u16,
}

/// Who owns the external address and its ports: a gateway its own; later, a node a leased block.
pub trait Ports<F: Family> {
    /// The address that the world sees.
    fn address(&self) -> F::Addr;
    /// First and last port, or identifier of ICMP echo, that may be used.
    fn range(&self, identifiers: bool) -> (u16, u16);
}

/// What a gateway knows.
pub trait NatTables<F: Family>: Clock + Fragments<F> {
    /// An entry of a translation table.
    type Entry: Copy;

    /// The address is a client.
    fn is_client(&self, addr: &F::Addr) -> bool;
    /// A translation from a client, keyed as it sends.
    fn forward(&self, key: &F::KeyWords) -> Option<Self::Entry>;
    /// A translation of replies, keyed as the remote sends.
    fn reverse(&self, key: &F::KeyWords) -> Option<Self::Entry>;
    /// The contents of an entry.
    fn translation(&self, entry: Self::Entry) -> Translation<F>;
    /// Adds a reverse entry if there is none: this takes the port.
    ///
    /// # Errors
    ///
    /// [`ReserveError`] if another flow has it, or there is no room.
    fn reserve(&self, key: &F::KeyWords, value: &F::Nat) -> Result<(), ReserveError>;
    /// Gives a reservation up.
    fn release(&self, key: &F::KeyWords);
    /// Adds or replaces a forward entry.
    ///
    /// # Errors
    ///
    /// [`Full`] if the table has no room.
    fn put_forward(&self, key: &F::KeyWords, value: &F::Nat) -> Result<(), Full>;
    /// Forgets the `STATE_*` bits of an entry that are about the connection: the same ports start over.
    fn restart(&self, entry: Self::Entry);
    /// Notes by what the client's packets come.
    fn set_encap(&self, entry: Self::Entry, encap: Encap);
    /// Adds a forward entry if there is none.
    ///
    /// # Errors
    ///
    /// [`ReserveError`] if there is one, or no room.
    fn add_forward(&self, key: &F::KeyWords, value: &F::Nat) -> Result<(), ReserveError>;
    /// Adds a forward entry, if there is none, to a reverse one that has lost its own: it is no news to anybody.
    ///
    /// # Errors
    ///
    /// [`ReserveError`] if there is one, or no room.
    fn restore_forward(&self, key: &F::KeyWords, value: &F::Nat) -> Result<(), ReserveError>;
    /// Removes a forward entry.
    fn remove_forward(&self, key: &F::KeyWords);
    /// Forgets some `STATE_*` bits of an entry.
    fn retract(&self, entry: Self::Entry, bits: u32);
    /// Gives a reverse entry to another port of the same client, as if it were new.
    fn reown(&self, entry: Self::Entry, port: [u8; 2], now: u32);
    /// The port must not be used although it is inside the range.
    fn is_excluded(&self, udp: bool, port: u16) -> bool;
    /// A count of `gateway_usage`. It may be below zero for a moment, while user space corrects it.
    fn usage(&self, cell: u32) -> i64;
    /// Adds one to it.
    fn use_more(&self, cell: u32);
    /// A note of `full_remotes`.
    fn full_remote(&self, index: u32) -> u64;
    /// Writes one.
    fn set_full_remote(&self, index: u32, note: u64);
    /// Counts a new flow, or one in vain, by the number of ports that were tried.
    fn count_probes(&self, tries: u32);
    /// Keeps a flow for [`NatTables::attend`].
    fn ask(&self, flow: &Flow<F>);
    /// Looks after the translation of the flow that was asked about last: see
    /// [`open::attend`](crate::decide::open::attend).
    ///
    /// # Errors
    ///
    /// The index of the reason why there is none.
    fn attend(&self, shape: Shape, config: &Config) -> Result<(), u32>;
    /// A step of [`NatTables::attend`]: see [`open::look_after`](crate::decide::open::look_after). A method,
    /// as those that follow, so that a kernel program can keep it in a function of its own.
    fn look_after(&self, work: &mut Work<F>, shape: Shape, config: &Config) -> u32;
    /// The same for [`open::refusal`](crate::decide::open::refusal).
    fn refusal(&self, work: &mut Work<F>, shape: Shape, config: &Config) -> u32;
    /// The same for [`open::search`](crate::decide::open::search).
    fn search(&self, work: &mut Work<F>, shape: Shape, refusal: u32, config: &Config) -> u32;
    /// The same for [`open::settle`](crate::decide::open::settle).
    fn settle(&self, work: &mut Work<F>, shape: Shape, found: u32, config: &Config) -> u32;
    /// The same for [`open::take_over`](crate::decide::open::take_over).
    fn take_over(&self, work: &mut Work<F>, port: u16, config: &Config) -> u32;
    /// The same for [`open::in_vain`](crate::decide::open::in_vain).
    fn in_vain(&self, work: &mut Work<F>, shape: Shape, refusal: u32, config: &Config) -> u32;
    /// Tries a port for a new flow: see [`open::probe`](crate::decide::open::probe). A method so that a
    /// kernel program can keep it in a function that the verifier looks at once, not for each try.
    fn probe(&self, work: &mut Work<F>, how: How) -> u32;
    /// Rebuilds the forward half of a reply if it is gone: see
    /// [`open::mend`](crate::decide::open::mend), and [`NatTables::probe`].
    fn mend(&self, flow: &Flow<F>, now: u32);
    /// Counts a packet of an entry.
    fn count_entry(&self, entry: Self::Entry, tally: &Tally);
    /// Counts a packet of an entry that one before it in the same tick has brought up to date.
    fn hit_entry(&self, entry: Self::Entry, packets: u32, bytes: u32);
    /// Counts something.
    fn count_gateway(&self, stat: GatewayStat, packets: u32, bytes: u32);
}
