//! Cluster scenarios: the real programs in one lab, driven as an operator would.
//!
//! One lab serves all scenarios, each in namespaces of its own; it is removed at the end, whatever
//! happened. All are marked as ignored, since they need root, the eBPF object and the built
//! programs: `cargo xtask test` runs them.

mod bad_input;
mod choice;
mod closed_doors;
mod errors;
mod flood;
mod gateways;
mod offloads;
mod path_mtu;
mod policy;
mod restart;
mod roles;
mod support;
mod tally;
mod tools;
mod tunnels;
mod udp_gso;

use std::process::ExitCode;
use std::sync::Arc;

use coil_lab::drive::fresh;
use coil_lab::{ApiSource, Family, Lab, Options};
use libtest_mimic::{Arguments, Conclusion, Failed, Trial};

use support::Scenario;

fn main() -> ExitCode {
    let arguments = Arguments::from_args();
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
        flood::scenarios(),
        tunnels::scenarios(),
        // Last: these kill what the others use.
        restart::scenarios(),
    ]
    .into_iter()
    .flatten()
    .collect();
    // The embedded API refuses nobody anything.
    if support::options().api != ApiSource::Embedded {
        scenarios.extend(roles::scenarios());
    }
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
    let options = Options { family: Family::Dual, ..support::options() };
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
