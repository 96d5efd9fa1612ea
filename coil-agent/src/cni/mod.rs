//! The CNI side: the API that `coild` serves on a UNIX socket, and the plugin that calls it.

pub mod error;
mod locks;
pub mod plugin;
pub mod pod;
#[allow(missing_docs, clippy::all, unreachable_pub, reason = "generated from proto/cni.proto")]
pub mod proto;
pub mod result;
pub mod server;
