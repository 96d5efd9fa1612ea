//! Cluster scenarios: the real programs in one lab, driven as an operator would.
//!
//! One lab serves all scenarios, each in namespaces of its own. Some of them run once more in a lab whose pods the
//! reference plugins wire, with Coil chained behind them.

#[path = "../support/mod.rs"]
mod support;

mod bad_input;
mod choice;
mod closed_doors;
mod dark;
mod errors;
mod flood;
mod gateways;
mod offloads;
mod path_mtu;
mod policy;
mod restart;
mod roles;
mod tally;
mod tools;
mod tunnels;
mod udp_gso;

use std::process::ExitCode;

use coil_lab::options::Networking;
use coil_lab::{ApiSource, Family, Options};

use support::{Group, Scenario};

/// What wiring by others may change: the order of plugins at ADD, the devices of pods, their adoption.
const CHAINED: [&str; 6] = [
    "bad_input::unknown_egress_at_start_keeps_the_pod_waiting",
    "policy::narrow_before_private_before_wide",
    "policy::annotation_takes_effect_live",
    "closed_doors::no_ready_gateway_drops",
    "path_mtu::large_packets_are_told_the_tunnel_mtu",
    "restart::kill_9_loses_no_packet",
];

fn main() -> ExitCode {
    let with = |networking| Options { family: Family::Dual, networking, ..support::options() };
    let chained: Vec<Scenario> = scenarios()
        .into_iter()
        .filter(|scenario| CHAINED.iter().any(|name| scenario.name.ends_with(name)))
        .collect();
    assert_eq!(chained.len(), CHAINED.len(), "a scenario has another name now");
    support::main(vec![
        Group { name: "", options: with(Networking::Coil), scenarios: scenarios() },
        Group { name: "chained", options: with(Networking::Ptp), scenarios: chained },
    ])
}

fn scenarios() -> Vec<Scenario> {
    let mut scenarios: Vec<Scenario> = [
        policy::scenarios(),
        closed_doors::scenarios(),
        path_mtu::scenarios(),
        errors::scenarios(),
        bad_input::scenarios(),
        offloads::scenarios(),
        udp_gso::scenarios(),
        tools::scenarios(),
        choice::scenarios(),
        gateways::scenarios(),
        tunnels::scenarios(),
        // Last: these kill what the others use, and fill what they need.
        restart::scenarios(),
        flood::scenarios(),
        dark::scenarios(),
    ]
    .into_iter()
    .flatten()
    .collect();
    // The embedded API refuses nobody anything.
    if support::options().api != ApiSource::Embedded {
        scenarios.extend(roles::scenarios());
    }
    scenarios
}
