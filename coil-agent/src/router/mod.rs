//! `coil-router`, for clusters whose nodes share one link: routes in the main table to the address blocks
//! of all other nodes, by way of these nodes.
//!
//! Owns routes of its own protocol identifier and nothing else. Anything but a flat network needs a
//! routing daemon, which reads what `coild` exports, instead.
//!
//! ```text
//! watch -> cluster -(routes wanted, once both lists are whole)-> sync -> plan -> kernel
//! ```

pub mod app;
pub mod args;
pub mod cluster;
pub mod kernel;
pub mod metrics;
pub mod plan;
pub mod sync;
mod watch;
