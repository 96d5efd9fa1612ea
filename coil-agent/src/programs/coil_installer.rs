//! `coil-installer`: puts the CNI plugin and its configuration on the host.

use std::ffi::OsString;
use std::process::ExitCode;

use coil_runtime::cli;

use crate::installer;

/// Runs with the arguments of this process.
#[must_use]
pub fn main() -> ExitCode {
    main_with(cli::process_args())
}

/// Runs with these arguments, the name first.
#[must_use]
pub fn main_with(args: Vec<OsString>) -> ExitCode {
    cli::run("coil-installer", args, installer::run)
}
