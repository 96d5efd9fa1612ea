//! `test`: every test there is, cheapest first, closed by one summary line.
//!
//! Tests that need root, the eBPF object or a cluster are marked `#[ignore]` so that a plain
//! `cargo test` shows them as ignored. This verb runs every one of them, and fails if it cannot.

use std::process::ExitCode;

use anyhow::Result;

use crate::ebpf::{Build, cargo};
use crate::process::{say, tee};
use crate::vm::{self, OneKernel};
use crate::{check, host};

/// Runs every test: checks, unit, privileged and cluster tests.
#[derive(clap::Args, Debug, Default)]
pub struct Test {
    /// Run only the checks and the tests that need neither root nor the eBPF object
    #[arg(long)]
    unprivileged: bool,
    /// Skip format, lint and generated-file checks
    #[arg(long)]
    no_check: bool,
    /// Leave out the virtual machine with another kernel; its tests count as skipped
    #[arg(long)]
    no_vm: bool,
}

/// How tests ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Passed.
    pub passed: u64,
    /// Failed.
    pub failed: u64,
    /// Marked as ignored, so not run.
    pub ignored: u64,
}

impl Tally {
    /// Adds another's counts.
    pub fn add(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.ignored += other.ignored;
    }
}

/// The last line of a run.
pub fn closing_line(name: &str, tally: Tally) -> String {
    format!("{name}: {} passed, {} failed, {} skipped", tally.passed, tally.failed, tally.ignored)
}

/// Tests marked `#[ignore]`: arguments of `cargo test`, and of the test program.
const PRIVILEGED: &[(&str, &[&str], &[&str])] = &[
    (
        "privileged tests of the agent",
        &["--package", "coil-agent", "--test", "privileged"],
        &["--test-threads=2"],
    ),
    (
        "tests of the lab and its API server",
        &["--package", "coil-lab", "--lib", "--bins", "--tests"],
        &["--test-threads=1"],
    ),
];

impl Test {
    /// Runs the verb.
    pub fn run(&self) -> Result<ExitCode> {
        if !self.unprivileged {
            host::need_root("cargo xtask test")?;
            host::ensure(&[host::LAB, host::TEST].concat())?;
            Build::default().run()?;
        }
        let mut total = Tally::default();
        if !self.no_check {
            total.add(check::run_all());
        }
        say("unit, property and scenario tests");
        let unit = cargo_test(&["--workspace"], &[])?;
        total.add(unit);
        if !self.unprivileged {
            total.ignored -= unit.ignored;
            let mut ran = 0;
            for (name, select, options) in PRIVILEGED {
                say(*name);
                let mut arguments = vec!["--ignored"];
                arguments.extend_from_slice(options);
                let tally = cargo_test(select, &arguments)?;
                ran += tally.passed + tally.failed;
                total.add(tally);
            }
            ran += self.other_kernel(&mut total)?;
            if ran < unit.ignored {
                eprintln!("{} tests are marked as ignored, but only {ran} of them were run", unit.ignored);
                total.ignored += unit.ignored - ran;
                total.failed += 1;
            }
        }
        println!("{}", closing_line("test", total));
        Ok(if total.failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }
}

impl Test {
    /// Runs tests on another kernel in a virtual machine; returns how many that need one have been run, or
    /// said to be skipped.
    fn other_kernel(&self, total: &mut Tally) -> Result<u64> {
        say("another kernel, and the kernel's own tunnels, in a virtual machine");
        let interop = cargo_test(&["--package", "coil-agent", "--test", "interop"], &["--quiet"])?.ignored;
        let unavailable = if self.no_vm {
            "--no-vm was given".to_owned()
        } else {
            match vm::one_kernel()? {
                OneKernel::Ran(report) => {
                    total.add(report.tally());
                    return Ok(interop);
                }
                OneKernel::Unavailable(error) => format!("{error:#}"),
            }
        };
        eprintln!("NOT RUN: loading on another kernel, and {interop} tests with its tunnels: {unavailable}");
        total.ignored += interop;
        Ok(interop)
    }
}

/// Runs `cargo test` over a selection and adds up the summaries of its test programs; a program that
/// ends without one counts as a failure.
fn cargo_test(select: &[&str], options: &[&str]) -> Result<Tally> {
    let mut tally = Tally::default();
    let mut command = cargo();
    command.arg("test").arg("--no-fail-fast").args(select).arg("--").args(options);
    let succeeded = tee(&mut command, |line| tally.add(parse_summary(line)))?;
    if !succeeded && tally.failed == 0 {
        tally.failed += 1;
    }
    Ok(tally)
}

/// Reads `test result: ok. 3 passed; 0 failed; 1 ignored; …`.
pub fn parse_summary(line: &str) -> Tally {
    let mut tally = Tally::default();
    let Some((_, counts)) = line.strip_prefix("test result: ").and_then(|rest| rest.split_once(". ")) else {
        return tally;
    };
    for part in counts.split("; ") {
        let Some((count, what)) = part.split_once(' ') else { continue };
        let Ok(count) = count.parse() else { continue };
        match what {
            "passed" => tally.passed = count,
            "failed" => tally.failed = count,
            "ignored" => tally.ignored = count,
            _ => {}
        }
    }
    tally
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn summaries_are_read() {
        let line = "test result: FAILED. 3 passed; 1 failed; 2 ignored; 0 measured; 0 filtered out; finished in 0.00s";
        assert_eq!(parse_summary(line), Tally { passed: 3, failed: 1, ignored: 2 });
        assert_eq!(parse_summary("test result_of_x ... ok"), Tally::default());
    }

    #[test]
    fn closing_line_is_the_plain_one() {
        let tally = Tally { passed: 3, failed: 0, ignored: 0 };
        assert_eq!(closing_line("test", tally), "test: 3 passed, 0 failed, 0 skipped");
    }
}
