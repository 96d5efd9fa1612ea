//! `coil-egress` alone; see `programs::coil_egress`.

use std::process::ExitCode;

fn main() -> ExitCode {
    coil_agent::programs::coil_egress::main()
}
