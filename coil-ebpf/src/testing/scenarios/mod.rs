//! The scenario table: one file per program, each for both families.

mod errors;
mod fragments;
mod from_pod;
mod gateway;
mod icmp;
mod ipip;
mod near;
mod notes;
mod ports;
mod reset;
mod to_pod;
mod world;

use super::scenario::Scenario;
use world::World;

/// All scenarios.
#[must_use]
pub fn scenarios() -> Vec<Scenario> {
    let mut out = Vec::new();
    for world in [World::v4(), World::v6()] {
        out.extend(from_pod::rows(&world));
        out.extend(to_pod::rows(&world));
        out.extend(gateway::rows(&world));
        out.extend(errors::rows(&world));
        out.extend(icmp::rows(&world));
        out.extend(ipip::rows(&world));
        out.extend(near::rows(&world));
        out.extend(fragments::rows(&world));
        out.extend(notes::rows(&world));
        out.extend(ports::rows(&world));
        out.extend(reset::rows(&world));
    }
    out
}
