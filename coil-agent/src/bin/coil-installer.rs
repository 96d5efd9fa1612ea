//! `coil-installer` alone; see `programs::coil_installer`.

use std::process::ExitCode;

fn main() -> ExitCode {
    coil_agent::programs::coil_installer::main()
}
