//! `coild` alone; see `programs::coild`.

use std::process::ExitCode;

fn main() -> ExitCode {
    coil_agent::programs::coild::main()
}
