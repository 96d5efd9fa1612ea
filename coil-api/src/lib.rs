//! Custom resources of Coil, their pure validation, and the names that users see.
//!
//! This package owns what the Kubernetes API knows about Coil: kinds and schemas ([`egress`],
//! [`addresspool`], [`addressblock`], [`blockrequest`]), label and annotation names ([`names`]), condition
//! types and reasons ([`conditions`]), who is a client of what ([`clients`]), and how a pool is carved into
//! blocks ([`Layout`]). One `validate` for each kind serves controller, agent and (later) webhook. It does
//! no input or output and knows neither a cluster nor a kernel.

pub mod addressblock;
pub mod addresspool;
pub mod blockrequest;
pub mod clients;
pub mod conditions;
pub mod destination;
pub mod egress;
pub mod labels;
pub mod names;
pub mod violation;

pub use addressblock::AddressBlock;
pub use addresspool::{AddressPool, AddressPoolSpec, BlockNets, Layout, SubnetSet};
pub use blockrequest::{BlockRequest, BlockRequestSpec, BlockRequestStatus};
pub use clients::{ClientReason, EgressRef, PodFacts, client_of};
pub use destination::{DestinationError, parse_destination};
pub use egress::{Egress, EgressSpec, EgressStatus, crd};
pub use violation::{Problem, Violation};
