//! What runs in an egress pod: the allow-list of clients, the translation tables and their upkeep.
//!
//! Owns the folder `<bpffs root>/v1/egress/<pod>` and the `gateway` program at `eth0`. Forwards nothing
//! itself: packets are the program's business, also while this process is away.

pub mod app;
pub mod args;
mod census;
mod clients;
pub mod collect;
pub mod datapath;
mod drain;
mod metrics;
mod nat;
pub mod ports;
mod watch;

/// The interface of an egress pod, as all pods name it.
pub const INTERFACE: &str = "eth0";
