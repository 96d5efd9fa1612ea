//! Pod networking in a lab whose pods Coil wires: addresses from pools, routes between three nodes by BIRD from what
//! `coild` exports.
//!
//! As with the scenarios of `cluster`, one lab serves all, and `cargo xtask test` runs them. Names carry the numbers
//! of `docs/scenarios.md`.

#[path = "../cluster/support.rs"]
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
use std::sync::Arc;

use coil_lab::drive::fresh;
use coil_lab::options::Networking;
use coil_lab::{Family, Lab, Options};
use libtest_mimic::{Arguments, Conclusion, Failed, Trial};

use support::Scenario;

fn main() -> ExitCode {
    let arguments = Arguments::from_args();
    let scenarios: Vec<Scenario> = [
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
    let wanted = arguments.ignored || arguments.include_ignored;
    if !wanted || arguments.list {
        let trials = scenarios.iter().map(|scenario| {
            Trial::test(scenario.name, || Err(Failed::from("needs the lab"))).with_ignored_flag(true)
        });
        return libtest_mimic::run(&arguments, trials.collect()).exit_code();
    }
    match run(&arguments, scenarios) {
        Ok(conclusion) => conclusion.exit_code(),
        Err(error) => {
            eprintln!("the lab: {error:#}");
            println!("test result: FAILED. 0 passed; 1 failed; 0 ignored; 0 measured; 0 filtered out");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments, scenarios: Vec<Scenario>) -> anyhow::Result<Conclusion> {
    let runtime = Arc::new(tokio::runtime::Runtime::new()?);
    let options =
        Options { nodes: 3, family: Family::Dual, networking: Networking::Coil, ..support::options() };
    let lab = Arc::new(runtime.block_on(fresh(options, |step| eprintln!("{step}")))?);
    let trials = scenarios
        .into_iter()
        .map(|scenario| {
            let (lab, runtime) = (lab.clone(), runtime.clone());
            Trial::test(scenario.name, move || {
                runtime.block_on((scenario.run)(&lab)).map_err(|error| {
                    eprintln!("{}", support::state(&lab));
                    Failed::from(format!("{error:#}"))
                })
            })
            .with_ignored_flag(true)
        })
        .collect();
    let conclusion = libtest_mimic::run(&Arguments { test_threads: Some(1), ..arguments.clone() }, trials);
    Lab::down(|step| eprintln!("{step}"))?;
    Ok(conclusion)
}
