//! `coil-egress`, the gateway in egress pods.

use std::ffi::OsString;
use std::process::ExitCode;

use coil_runtime::cli;

use crate::gateway::app::{self, NAME};
use crate::memory;

/// Runs with the arguments of this process.
#[must_use]
pub fn main() -> ExitCode {
    main_with(cli::process_args())
}

/// Runs with these arguments, the name first.
#[must_use]
pub fn main_with(args: Vec<OsString>) -> ExitCode {
    memory::be_frugal();
    cli::run(NAME, args, app::run)
}
