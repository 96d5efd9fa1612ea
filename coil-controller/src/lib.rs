//! The Coil controllers: what turns custom resources into other objects of the Kubernetes API.
//!
//! `plan` is pure: from an object and its observed children to what should be written, and to a status.
//! `reconcilers` fetch, call a plan, and write; `app` puts the parts together. Nothing here knows about
//! packets, and nothing in the agent is known here: the API is the only contract.

mod app;
mod args;
mod error;
mod metrics;
pub mod plan;
pub mod programs;
mod reconcilers;

pub use app::{run_controllers, run_ipam};
pub use reconcilers::ipam::IpamSettings;
