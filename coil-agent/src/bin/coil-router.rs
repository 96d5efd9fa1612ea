//! `coil-router` alone; see `programs::coil_router`.

use std::process::ExitCode;

fn main() -> ExitCode {
    coil_agent::programs::coil_router::main()
}
