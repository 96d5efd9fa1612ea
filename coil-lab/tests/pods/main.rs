//! Pod networking in a lab whose pods Coil wires: addresses from pools, routes between three nodes by BIRD from what
//! `coild` exports.
//!
//! Names carry the numbers of `docs/scenarios.md`.

#[path = "../support/mod.rs"]
#[allow(dead_code, reason = "the other lab's scenarios need more")]
mod support;

mod addresses;
mod adoption;
mod by_hand;
mod clock;
mod flat;
mod killed;
mod outage;

use std::process::ExitCode;

use coil_lab::options::Networking;
use coil_lab::{Family, Options};

use support::Group;

fn main() -> ExitCode {
    let options =
        Options { nodes: 3, family: Family::Dual, networking: Networking::Coil, ..support::options() };
    let scenarios = [
        flat::scenarios(),
        adoption::scenarios(),
        killed::scenarios(),
        outage::scenarios(),
        clock::scenarios(),
        addresses::scenarios(),
    ]
    .into_iter()
    .flatten()
    .collect();
    support::main(vec![Group { name: "", options, scenarios }])
}
