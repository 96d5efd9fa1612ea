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
mod families;
mod flat;
mod frr;
mod killed;
mod nodes;
mod outage;

use std::process::ExitCode;

use coil_lab::options::Networking;
use coil_lab::{Family, Options};

use support::Group;

fn main() -> ExitCode {
    let with = |nodes, family| Options { nodes, family, networking: Networking::Coil, ..support::options() };
    let scenarios = [
        flat::scenarios(),
        frr::scenarios(),
        adoption::scenarios(),
        killed::scenarios(),
        outage::scenarios(),
        clock::scenarios(),
        addresses::scenarios(),
        nodes::scenarios(),
    ]
    .into_iter()
    .flatten()
    .collect();
    support::main(vec![
        Group { name: "", options: with(3, Family::Dual), scenarios },
        Group { name: "v4", options: with(2, Family::V4), scenarios: families::scenarios() },
        Group { name: "v6", options: with(2, Family::V6), scenarios: families::scenarios() },
    ])
}
