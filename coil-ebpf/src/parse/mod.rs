//! Reads headers. What a length field claims is checked against the packet before it is believed.

pub mod eth;
pub mod ip;
pub mod l4;
pub mod mss;
pub mod quote;
pub mod tunnel;

pub use ip::{Ip, Parse};
pub use l4::{Kind, L4};
