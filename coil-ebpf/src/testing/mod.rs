//! What tests of the datapath share: packet builders, a packet and tables in memory, an interpreter of
//! verdicts, and the scenario table.
//!
//! The scenarios know nothing of how programs are loaded: tests of this package run them through the
//! library, and privileged tests elsewhere run the same ones through the loaded programs.

pub mod build;
pub mod entries;
pub mod fuzz;
pub mod interpret;
pub mod memory;
mod notes;
pub mod scenario;
mod scenarios;
pub mod spoil;

pub use scenario::{Action, Expect, Hook, Kernel, Scenario};
pub use scenarios::scenarios;
