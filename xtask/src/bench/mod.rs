//! `bench`: what a packet costs and how fast traffic flows, as ratios where a ratio can be had.
//!
//! Goals are bounds that a figure must keep; a figure without one has `null` until it is set.

mod cni;
mod path;
mod testrun;
mod traffic;

use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use crate::ebpf::Build;
use crate::host;

/// Measures the datapath.
#[derive(clap::Args, Debug)]
pub struct Bench {
    /// Print one JSON object as the last line of standard output
    #[arg(long)]
    json: bool,
    /// Fail if a figure misses its bound
    #[arg(long)]
    check: bool,
    /// What to measure; default: everything
    #[arg(value_enum)]
    names: Vec<Name>,
}

/// A benchmark.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Name {
    /// Cost of each program on each path, and rates through the lab
    Datapath,
    /// What a walk of a gateway's collector through a million translations costs
    Sweep,
    /// Rates of one path: plain routing, translation, VXLAN with translation, and ours
    Path,
    /// The same against the kernel's FOU, in a virtual machine that counts instructions
    Counted,
    /// ADD and DEL of pods, against `ptp` with `host-local`
    Cni,
}

/// A figure.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Figure {
    /// What was measured.
    pub name: String,
    /// How much.
    pub value: f64,
    /// In which unit.
    pub unit: String,
    /// The bound that the value must keep, as text such as `<= 120`; none yet: `null`.
    pub goal: Option<String>,
    /// Whether it does; true where there is no bound.
    pub ok: bool,
}

impl Figure {
    /// A figure that must not fall below a bound.
    fn at_least(name: impl Into<String>, value: f64, unit: &str, least: f64) -> Self {
        Self { goal: Some(format!(">= {least}")), ok: value >= least, ..Self::plain(name, value, unit) }
    }

    /// A figure that must not rise above a bound.
    fn at_most(name: impl Into<String>, value: f64, unit: &str, most: f64) -> Self {
        Self { goal: Some(format!("<= {most}")), ok: value <= most, ..Self::plain(name, value, unit) }
    }

    fn plain(name: impl Into<String>, value: f64, unit: &str) -> Self {
        Self { name: name.into(), value, unit: unit.to_owned(), goal: None, ok: true }
    }
}

impl Bench {
    /// Runs the verb.
    pub fn run(&self) -> Result<ExitCode> {
        host::need_root("cargo xtask bench")?;
        host::ensure(host::LAB)?;
        host::ensure(host::BENCH)?;
        let names = if self.names.is_empty() {
            &[Name::Datapath, Name::Sweep, Name::Path, Name::Counted, Name::Cni][..]
        } else {
            &self.names
        };
        // That one builds its own.
        if names.iter().any(|name| *name != Name::Cni) {
            Build::default().run()?;
        }
        let mut figures = Vec::new();
        for name in names {
            match name {
                Name::Datapath => {
                    figures.extend(testrun::datapath()?);
                    figures.extend(runtime()?.block_on(traffic::measure())?);
                }
                Name::Sweep => figures.extend(testrun::sweep()?),
                Name::Path => figures.extend(path::native()?),
                Name::Counted => figures.extend(path::counted()?),
                Name::Cni => figures.extend(runtime()?.block_on(cni::measure())?),
            }
        }
        if figures.is_empty() {
            bail!("nothing was measured");
        }
        for figure in &figures {
            let goal = figure.goal.as_deref().map_or(String::new(), |goal| {
                format!("  bound {goal}{}", if figure.ok { "" } else { "  MISSED" })
            });
            eprintln!("{:<56} {:>12.2} {}{goal}", figure.name, figure.value, figure.unit);
        }
        if self.json {
            println!("{}", serde_json::json!({ "results": figures }));
        }
        let kept = figures.iter().all(|figure| figure.ok);
        Ok(if kept || !self.check { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }
}

fn runtime() -> Result<tokio::runtime::Runtime> {
    tokio::runtime::Runtime::new().context("starting the runtime")
}
