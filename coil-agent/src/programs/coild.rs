//! `coild`, the node agent.

use std::ffi::OsString;
use std::process::ExitCode;

use coil_runtime::cli;

use crate::app::{self, NAME};
use crate::memory;

/// Runs with the arguments of this process.
#[must_use]
pub fn main() -> ExitCode {
    main_with(cli::process_args())
}

/// Runs with these arguments, the name first.
#[must_use]
pub fn main_with(mut args: Vec<OsString>) -> ExitCode {
    if args.get(1).is_some_and(|arg| arg == "uninstall") {
        args.remove(1);
        return cli::run("coild uninstall", args, app::uninstall);
    }
    memory::be_frugal();
    cli::run(NAME, args, app::run)
}
