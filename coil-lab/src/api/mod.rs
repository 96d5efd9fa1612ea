//! The embedded API server: an in-process, in-memory Kubernetes API for `kubectl`, kube-rs and Go clients over plain
//! HTTP.
//!
//! Owns storage, validation, patches, watches, tables and discovery. Does not own workloads: what makes pods of a
//! deployment is in `controllers`, what runs pods is the lab's kubelet stand-in. There is no authentication: whoever
//! reaches the socket is cluster administrator.

pub mod admission;
pub mod admitted;
pub mod crd;
pub mod defaults;
pub mod delete;
pub mod discovery;
pub mod error;
pub mod events;
pub mod gnostic;
pub mod ipalloc;
pub mod kinds;
pub mod meta;
pub mod obj;
pub mod openapi;
pub mod patch;
pub mod podlog;
pub mod protobuf;
pub mod read;
pub mod registry;
pub mod request;
pub mod routes;
pub mod rules;
pub mod schema;
pub mod selector;
pub mod server;
pub mod store;
pub mod strict_json;
pub mod subresource;
pub mod table;
pub mod watch;
pub mod write;

pub use admission::WebhookRoute;
pub use error::{ApiError, ApiResult};
pub use server::{ApiConfig, ApiServer, PodLogs};
