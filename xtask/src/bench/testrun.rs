//! Benchmark programs of `coil-agent`: cost of each program on each path, by `BPF_PROG_TEST_RUN`, and of a
//! walk of the collector.

use anyhow::{Context, Result};

use super::Figure;
use crate::ebpf::cargo;
use crate::process::{say, tee};

/// Each program on each path. What is timed is in the kernel, so the profile does not matter.
pub fn datapath() -> Result<Vec<Figure>> {
    say("each program on each path (BPF_PROG_TEST_RUN)");
    measure("datapath", "dev")
}

/// Walks of a gateway's collector.
pub fn sweep() -> Result<Vec<Figure>> {
    say("walks through a million translations");
    measure("sweep", "release")
}

/// Runs a program and reads its figures: one JSON object a line.
fn measure(bench: &str, profile: &str) -> Result<Vec<Figure>> {
    let mut figures = Vec::new();
    let mut unreadable = Vec::new();
    let mut command = cargo();
    command.args(["bench", "--quiet", "--profile", profile, "--package", "coil-agent", "--bench", bench]);
    command.stderr(std::process::Stdio::inherit());
    let succeeded = tee(&mut command, |line| match serde_json::from_str(line) {
        Ok(figure) => figures.push(figure),
        Err(_) if line.starts_with('{') => unreadable.push(line.to_owned()),
        Err(_) => {}
    })?;
    anyhow::ensure!(succeeded && unreadable.is_empty(), "the benchmark of coil-agent failed");
    (!figures.is_empty()).then_some(figures).context("the benchmark of coil-agent printed no figures")
}
