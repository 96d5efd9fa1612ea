//! Programs of this package, for the multi-call binary.

pub use coil_runtime::cli::{Program, dispatch, version};

/// `coil-controller`.
pub mod coil_controller {
    use std::ffi::OsString;
    use std::process::ExitCode;

    use coil_runtime::cli;

    /// Name of the program.
    pub const NAME: &str = "coil-controller";

    /// Runs the program with the arguments of the process.
    #[must_use]
    pub fn main() -> ExitCode {
        main_with(cli::process_args())
    }

    /// Runs the program; the first argument is its name.
    #[must_use]
    pub fn main_with(args: Vec<OsString>) -> ExitCode {
        cli::run(NAME, args, crate::app::run)
    }
}
