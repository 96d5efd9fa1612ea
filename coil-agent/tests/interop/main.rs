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

use std::path::Path;
use std::process::{Command, ExitCode};

use case::Case;
use libtest_mimic::{Arguments, Failed, Trial};

fn main() -> ExitCode {
    let arguments = Arguments::from_args();
    let runs = (arguments.ignored || arguments.include_ignored) && !arguments.list;
    let missing = if runs { missing_modules() } else { None };
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

/// Loads what the kernel's side needs; the reason if it cannot be had.
fn missing_modules() -> Option<String> {
    let missing: Vec<_> =
        ["fou", "fou6", "ipip", "ip6_tunnel"].into_iter().filter(|module| !has_module(module)).collect();
    (!missing.is_empty()).then(|| {
        format!("this kernel has no {}; `cargo xtask vm-test` runs this in one that has", missing.join(", "))
    })
}

fn has_module(module: &str) -> bool {
    let loaded = Command::new("modprobe").args(["--quiet", module]).status();
    loaded.is_ok_and(|status| status.success()) || Path::new("/sys/module").join(module).exists()
}
