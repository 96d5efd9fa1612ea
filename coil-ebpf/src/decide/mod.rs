//! One file per hook: headers and tables in, a verdict out.

mod affinity;
mod edit;
pub mod fast;
pub mod fragment;
pub mod from_pod;
pub mod gateway;
pub mod icmp;
pub mod inbound;
pub mod nat;
pub mod near;
pub mod open;
pub mod shortcut;
pub mod to_pod;
mod wire;

pub use wire::dropped;
