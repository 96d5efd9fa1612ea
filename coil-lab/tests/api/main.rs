//! The embedded API server as its clients see it: kube-rs over loopback, raw HTTP, and `kubectl`.

#![expect(clippy::unwrap_used, clippy::panic, reason = "tests")]

mod apply;
mod bad_requests;
mod custom;
mod kubectl;
mod objects;
mod properties;
mod support;
mod watches;
mod webhooks;
mod workloads;
