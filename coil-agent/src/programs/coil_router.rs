//! `coil-router`, which routes to the pods of other nodes on a flat network.

use std::ffi::OsString;
use std::process::ExitCode;

use coil_runtime::cli;

use crate::router::app::{self, NAME};

/// Runs with the arguments of this process.
#[must_use]
pub fn main() -> ExitCode {
    main_with(cli::process_args())
}

/// Runs with these arguments, the name first.
#[must_use]
pub fn main_with(args: Vec<OsString>) -> ExitCode {
    cli::run(NAME, args, app::run)
}
