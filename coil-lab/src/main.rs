//! The lab as a program of its own, for tests of this package. People use `cargo xtask lab`.

use clap::Parser;
use std::process::ExitCode;

#[derive(Parser)]
#[command(name = "coil-lab", about = "A Kubernetes cluster in network namespaces")]
struct Cli {
    #[command(flatten)]
    lab: coil_lab::LabArgs,
}

fn main() -> anyhow::Result<ExitCode> {
    Cli::parse().lab.run(vec![std::env::current_exe()?])
}
