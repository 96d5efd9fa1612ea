//! `coil` alone; see `programs::coil`.

use std::process::ExitCode;

fn main() -> ExitCode {
    coil_agent::programs::coil::main()
}
