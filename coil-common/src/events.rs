//! What the datapath tells a listener live: drops and new flows.
//!
//! Programs report only while somebody listens: a listener writes into the map `listeners` until when it
//! wants what, and renews that. One that dies is forgotten after moments. Each processor reports no more
//! than [`EVENT_BUDGET`] events of a kind in a second; what is beyond that, or finds the ring full, is
//! counted as lost.

use bytemuck::{Pod, Zeroable};

use crate::pod::shared;

/// [`Event::kind`] and bit of [`Listener::kinds`]: a packet was dropped.
pub const EVENT_DROP: u32 = 1 << 0;
/// [`Event::kind`] and bit of [`Listener::kinds`]: a flow or a translation was made.
pub const EVENT_FLOW: u32 = 1 << 1;

/// [`Event::hook`]: packets from a pod.
pub const HOOK_FROM_POD: u32 = 0;
/// [`Event::hook`]: packets to a pod.
pub const HOOK_TO_POD: u32 = 1;
/// [`Event::hook`]: packets that reach a gateway.
pub const HOOK_GATEWAY: u32 = 2;

/// Bytes of the ring.
pub const EVENT_RING: usize = 256 << 10;
/// Events of one kind that one processor reports in a second.
pub const EVENT_BUDGET: u32 = 500;
/// Bytes of a packet, from the IP header on, that an event holds: outer and inner headers of a tunnelled
/// packet with some options.
pub const EVENT_HEAD: usize = 128;

/// Something that happened.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct Event {
    /// Seconds since boot (`CLOCK_MONOTONIC`).
    pub time: u32,
    /// `EVENT_*`
    pub kind: u32,
    /// `HOOK_*`
    pub hook: u32,
    /// Index of a `DropReason`; drops only.
    pub reason: u32,
    /// Index of the interface that the program is attached to, in its own network namespace; drops only.
    pub ifindex: u32,
    /// IP bytes as the packet was handed over, a GSO packet as a whole; drops only.
    pub length: u32,
    /// Index into `egresses`; new flows of a node only.
    pub egress: u32,
    /// Index into `gateways`; new flows of a node only.
    pub gateway: u32,
    /// The address that the world sees; translations only. IPv4 in the first four bytes.
    pub addr: [u8; 16],
    /// The port that the world sees; translations only.
    pub port: [u8; 2],
    /// 4 or 6.
    pub family: u8,
    /// Bytes of `head` that are in use.
    pub captured: u8,
    /// Zero.
    pub pad: u32,
    /// Drops: the packet from its IP header on. Flows: the key as the client sends.
    pub head: [u8; EVENT_HEAD],
}

/// What a listener wants; the one entry of `listeners`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct Listener {
    /// `EVENT_*` bits.
    pub kinds: u32,
    /// Seconds since boot from which on nobody listens any more.
    pub until: u32,
}

/// What one processor has reported of a kind; index: 0 for drops, 1 for flows.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct EventBudget {
    /// The second, since boot, that `used` is about.
    pub second: u32,
    /// Events reported in that second.
    pub used: u32,
    /// Events that were lost since boot.
    pub lost: u64,
}

/// Index into `event_budgets` of a kind of event.
#[inline(always)]
#[must_use]
pub const fn event_budget(kind: u32) -> u32 {
    kind >> 1
}

shared! {
    Event = 184,
    Listener = 8,
    EventBudget = 16,
}
