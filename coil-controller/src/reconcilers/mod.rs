//! Reconcilers: fetch, call a plan, write; nothing more.

mod apply;
pub(crate) mod bindings;
pub(crate) mod clients;
pub(crate) mod egress;
pub(crate) mod ipam;
