//! The Coil node agent (`coild`), the CNI plugin (`coil`) and the egress gateway (`coil-egress`).

pub mod app;
pub mod args;
pub mod cni;
pub mod datapath;
pub mod desired;
pub mod events;
pub mod gateway;
pub mod index;
pub mod inspect;
pub mod installer;
pub mod ipam;
pub mod local;
pub mod memory;
pub mod metrics;
pub mod netlink;
pub mod programs;
pub mod router;
pub mod routes;
pub mod state;
pub mod watch;
pub mod wiring;
pub mod writer;
