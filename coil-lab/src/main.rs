//! The lab as a program of its own, for tests of this package. People use `cargo xtask lab`.

use clap::Parser;
use std::process::ExitCode;

#[derive(Parser)]
#[command(name = "coil-lab", about = "A Kubernetes cluster in network namespaces")]
struct Cli {
    #[command(flatten)]
    lab: coil_lab::LabArgs,
}

fn main() -> ExitCode {
    let launcher = std::env::current_exe().map(|exe| vec![exe]).map_err(anyhow::Error::from);
    match launcher.and_then(|launcher| Cli::parse().lab.run(launcher)) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
