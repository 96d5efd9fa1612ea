//! Our datapath at one end of the tunnel, the kernel's own FOU at the other, as Coil v2 sets it up.
//!
//! Every case is made from data. They need a kernel with FOU, which the development machines do not have:
//! `cargo xtask vm-test` runs them in virtual machines.

#[expect(dead_code, reason = "shared with the privileged tests, which use all of it")]
#[path = "../privileged/support/mod.rs"]
mod support;

mod case;
mod kernel;
mod probe;

use std::process::ExitCode;

use case::Case;
use libtest_mimic::{Arguments, Failed, Trial};

fn main() -> ExitCode {
    let arguments = Arguments::from_args();
    let runs = (arguments.ignored || arguments.include_ignored) && !arguments.list;
    let missing = if runs { kernel::missing_modules() } else { None };
    let trials = Case::all().into_iter().map(|case| {
        let missing = missing.clone();
        let run = move || {
            if let Some(missing) = missing {
                return Err(Failed::from(missing));
            }
            // A failed assertion is the case's, with its own words.
            case.run();
            Ok(())
        };
        Trial::test(case.name(), run).with_ignored_flag(true)
    });
    let trials = trials.collect();
    libtest_mimic::run(&Arguments { test_threads: Some(1), ..arguments }, trials).exit_code()
}
