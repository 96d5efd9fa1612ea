//! `fuzz`: cases of packets through the datapath library and its reference model, or through the loaded
//! programs and the library, for as long as one likes.
//!
//! Coverage guides the first of these: LLVM counts the edges that are taken, which stable flags of the compiler
//! ask it to do. They change code, so the fuzzer has a build folder of its own; a `--target` keeps them from build
//! scripts and macros, which could not be linked with them.

use std::path::PathBuf;
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, bail};

use crate::ebpf::{Build, cargo};
use crate::process::{output, run, say, tee};
use crate::{host, target_dir};

/// What makes the compiler count the edges that are taken.
const COUNT_EDGES: &str = "-Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=3 \
                           -Cllvm-args=-sanitizer-coverage-inline-8bit-counters";

/// Seconds unless something else is asked for.
const SECONDS: u64 = 1200;

/// Fuzzes the datapath against a reference model.
#[derive(clap::Args, Debug)]
pub struct Fuzz {
    /// Stop after so many seconds [default: 1200, unless --runs is given]
    #[arg(long, value_name = "N")]
    seconds: Option<u64>,
    /// Stop after so many cases
    #[arg(long, value_name = "N")]
    runs: Option<u64>,
    /// Where random numbers start: the same seed makes the same cases
    #[arg(long, value_name = "S", default_value_t = 1)]
    seed: u64,
    /// Compare the loaded programs with the library instead, by `BPF_PROG_TEST_RUN`; needs root
    #[arg(long)]
    bpf: bool,
    /// Play one case and print each of its packets, before and after
    #[arg(long, value_name = "FILE", conflicts_with_all = ["seconds", "runs", "bpf", "grow"])]
    replay: Option<PathBuf>,
    /// Add cases to coil-ebpf/corpus that take code which none of it takes
    #[arg(long, conflicts_with = "bpf")]
    grow: bool,
}

impl Fuzz {
    /// Runs the verb.
    pub fn run(&self) -> Result<ExitCode> {
        let passed = if self.bpf { self.programs()? } else { self.library()? };
        Ok(if passed { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }

    /// Where it stops: seconds and runs.
    fn bounds(&self) -> [(&'static str, Option<u64>); 2] {
        let seconds = self.seconds.or(self.runs.is_none().then_some(SECONDS));
        [("seconds", seconds), ("runs", self.runs)]
    }

    /// The library against the model.
    fn library(&self) -> Result<bool> {
        say("building the fuzzer");
        let version = output(Command::new("rustc").arg("-vV"))?;
        let host = version.lines().find_map(|line| line.strip_prefix("host: "));
        let host = host.context("rustc -vV names no host")?;
        let folder = target_dir().join("fuzz");
        run(cargo()
            .args(["build", "--quiet", "--package", "coil-ebpf", "--example", "fuzz", "--target", host])
            .arg("--target-dir")
            .arg(&folder)
            .env_remove("CARGO_ENCODED_RUSTFLAGS")
            .env("RUSTFLAGS", COUNT_EDGES)
            .env("CARGO_PROFILE_DEV_OPT_LEVEL", "2"))?;
        let mut fuzzer = Command::new(folder.join(host).join("debug/examples/fuzz"));
        if let Some(file) = &self.replay {
            fuzzer.arg(format!("replay={}", file.display()));
        } else {
            for (name, bound) in self.bounds() {
                fuzzer.args(bound.map(|bound| format!("{name}={bound}")));
            }
            fuzzer.arg(format!("seed={}", self.seed));
            if self.grow {
                fuzzer.arg(format!("grow={}", crate::root().join("coil-ebpf/corpus").display()));
            }
        }
        let status = fuzzer.status().context("starting the fuzzer")?;
        match status.code() {
            Some(0) => Ok(true),
            Some(1) => Ok(false),
            _ => bail!("the fuzzer ended with {status}"),
        }
    }

    /// The loaded programs against the library.
    fn programs(&self) -> Result<bool> {
        host::need_root("cargo xtask fuzz --bpf")?;
        host::ensure(host::LAB)?;
        Build::default().run()?;
        let mut test = cargo();
        test.args(["test", "--package", "coil-agent", "--test", "privileged", "--"]);
        test.args(["--ignored", "--exact", "fuzz::loaded_programs_do_what_the_library_does", "--nocapture"]);
        for (name, bound) in self.bounds() {
            if let Some(bound) = bound {
                test.env(format!("COIL_FUZZ_{}", name.to_uppercase()), bound.to_string());
            }
        }
        test.env("COIL_FUZZ_SEED", self.seed.to_string());
        let mut ran = false;
        let passed = tee(&mut test, |line| ran |= line.starts_with("test result: ok. 1 passed"))?;
        Ok(passed && ran)
    }
}
