//! Every command that a person or CI runs: `cargo xtask --help`.

mod bench;
mod check;
mod demo;
mod ebpf;
mod fuzz;
mod host;
mod image;
mod lab;
mod manifests;
mod process;
mod programs;
mod test;
mod vm;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand};

/// Builds, tests, demonstrates and measures Coil.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", version)]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Builds the eBPF object, installing its toolchain if need be
    BuildEbpf(ebpf::BuildEbpf),
    /// Builds the eBPF object and the programs with it inside
    Build(ebpf::Build),
    /// Checks format, lints, package edges and generated files
    Check(check::Check),
    /// Runs every test: checks, unit, privileged and cluster tests
    Test(test::Test),
    /// Shows a pod leaving the cluster with the address of an egress pod, step by step
    Demo(demo::Demo),
    /// Runs a cluster in network namespaces and commands in it
    Lab(lab::Lab),
    /// Measures the datapath
    Bench(bench::Bench),
    /// Tests the datapath on other kernels, and against the kernel's own tunnels, in virtual machines
    VmTest(vm::VmTest),
    /// Fuzzes the datapath against a reference model
    ///
    /// Cases are sequences of packets between a pod, its gateway, another client and the world, honest and
    /// spoiled ones. What the library makes of each is compared with a model that computes it anew: action,
    /// reason of a drop, every byte, counters, tables. New cases are made of those that have taken code that
    /// none before them had. One that fails is made as small as it can be and written to coil-ebpf/corpus,
    /// which `cargo xtask test` replays.
    Fuzz(fuzz::Fuzz),
    /// Writes the generated manifests, or checks that they are fresh
    Manifests(manifests::Manifests),
    /// Builds the container image as an OCI archive
    Image(image::Image),
    /// Prints a completion script for a shell
    Completion {
        /// The shell
        shell: clap_complete::Shell,
    },
}

fn main() -> ExitCode {
    host::add_system_path();
    match run(Args::parse().command) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> anyhow::Result<ExitCode> {
    match command {
        Command::BuildEbpf(verb) => verb.run().map(|()| ExitCode::SUCCESS),
        Command::Build(verb) => verb.run().map(|()| ExitCode::SUCCESS),
        Command::Check(verb) => verb.run(),
        Command::Test(verb) => verb.run(),
        Command::Demo(verb) => verb.run(),
        Command::Lab(verb) => verb.run(),
        Command::Bench(verb) => verb.run(),
        Command::VmTest(verb) => verb.run(),
        Command::Fuzz(verb) => verb.run(),
        Command::Manifests(verb) => verb.run().map(|()| ExitCode::SUCCESS),
        Command::Image(verb) => verb.run().map(|()| ExitCode::SUCCESS),
        Command::Completion { shell } => {
            clap_complete::generate(shell, &mut Args::command(), "xtask", &mut std::io::stdout());
            Ok(ExitCode::SUCCESS)
        }
    }
}

/// Root of the workspace.
fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("xtask is a folder of the workspace")
}

/// Folder of what cargo builds.
fn target_dir() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), PathBuf::from)
}
