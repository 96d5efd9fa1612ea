//! `kubectl coil` alone; see `programs::coilctl`.

use std::process::ExitCode;

fn main() -> ExitCode {
    coil_agent::programs::coilctl::plugin()
}
