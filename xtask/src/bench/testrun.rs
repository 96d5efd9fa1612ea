//! Cost of each program on each path: the benchmark program of `coil-agent`, which runs the loaded
//! programs by `BPF_PROG_TEST_RUN`.

use anyhow::{Context, Result};

use super::Figure;
use crate::ebpf::cargo;
use crate::process::{say, tee};

/// Runs it and reads its figures: one JSON object a line.
pub fn measure() -> Result<Vec<Figure>> {
    say("each program on each path (BPF_PROG_TEST_RUN)");
    let mut figures = Vec::new();
    let mut unreadable = Vec::new();
    let mut command = cargo();
    command.args(["bench", "--quiet", "--profile", "dev", "--package", "coil-agent", "--bench", "datapath"]);
    command.stderr(std::process::Stdio::inherit());
    let succeeded = tee(&mut command, |line| match serde_json::from_str(line) {
        Ok(figure) => figures.push(figure),
        Err(_) if line.starts_with('{') => unreadable.push(line.to_owned()),
        Err(_) => {}
    })?;
    anyhow::ensure!(succeeded && unreadable.is_empty(), "the benchmark of coil-agent failed");
    (!figures.is_empty()).then_some(figures).context("the benchmark of coil-agent printed no figures")
}
