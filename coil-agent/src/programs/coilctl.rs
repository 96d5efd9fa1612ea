//! `coilctl`, which looks into the datapath of a node, and `kubectl-coil`, the same through `kubectl`.

use std::error::Error;
use std::ffi::OsString;
use std::process::ExitCode;

use coil_runtime::cli;

use crate::cni::error::causes;
use crate::inspect::{self, Args, InspectError, NAME};

/// Name under which `kubectl` finds it as `kubectl coil`.
pub const PLUGIN: &str = "kubectl-coil";

/// Runs with the arguments of this process.
#[must_use]
pub fn main() -> ExitCode {
    main_with(cli::process_args())
}

/// Runs with these arguments, the name first.
#[must_use]
pub fn main_with(args: Vec<OsString>) -> ExitCode {
    match cli::parse::<Args>(NAME, &args) {
        Ok(parsed) => local(parsed),
        Err(status) => status,
    }
}

/// Runs the plugin with the arguments of this process.
#[must_use]
pub fn plugin() -> ExitCode {
    plugin_with(cli::process_args())
}

/// Runs the plugin with these arguments, the name first.
#[must_use]
pub fn plugin_with(args: Vec<OsString>) -> ExitCode {
    let parsed = match cli::parse::<Args>(PLUGIN, &args) {
        Ok(parsed) => parsed,
        Err(status) => return status,
    };
    if parsed.node.is_none() && parsed.bpffs_root.exists() {
        return local(parsed);
    }
    match inspect::kubectl::run(&parsed, args.get(1..).unwrap_or_default()) {
        Ok(status) => ExitCode::from(status),
        Err(error) => {
            say(PLUGIN, &error);
            ExitCode::FAILURE
        }
    }
}

fn local(args: Args) -> ExitCode {
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(source) => {
            let error = InspectError::System { what: "the asynchronous runtime", source };
            say(NAME, &error);
            return error.status();
        }
    };
    match runtime.block_on(inspect::run(args)) {
        Ok(outcome) => outcome.status(),
        Err(error) => {
            if error.is_worth_saying() {
                say(NAME, &error);
            }
            error.status()
        }
    }
}

fn say(name: &str, error: &(dyn Error + 'static)) {
    eprintln!("{name}: {}", causes(error));
}
