//! `demo`: the main job of Coil, end to end, in a cluster of network namespaces, told step by step.

mod cluster;
mod network;
mod story;

use std::process::ExitCode;

use anyhow::{Context, Result};
use coil_lab::drive::fresh;
use coil_lab::options::Networking;
use coil_lab::{Family, Lab, Options};
use serde::Serialize;

use crate::ebpf::Build;
use crate::host;
use crate::process::say;

/// Shows a pod leaving the cluster with the address of an egress pod.
#[derive(clap::Args, Debug)]
pub struct Demo {
    /// Print one JSON object as the last line of standard output
    #[arg(long)]
    json: bool,
    /// Leave the cluster up for exploring
    #[arg(long)]
    keep: bool,
    /// Address families of the cluster
    #[arg(long, value_enum, default_value_t = Family::Dual)]
    family: Family,
    /// Who gives pods their network
    #[arg(long, value_enum, default_value_t)]
    networking: Networking,
}

/// Something shown, and whether it was so.
#[derive(Debug, Serialize)]
struct Check {
    name: String,
    ok: bool,
    detail: String,
}

/// What was shown so far.
#[derive(Debug, Default)]
struct Report {
    checks: Vec<Check>,
}

impl Report {
    /// Takes the outcome of a check: what was seen, or why it failed.
    fn add(&mut self, name: impl Into<String>, outcome: Result<String>) {
        let (ok, detail) = match outcome {
            Ok(detail) => (true, detail),
            Err(error) => (false, format!("{error:#}")),
        };
        let name = name.into();
        eprintln!("  {} {name}: {detail}", if ok { "ok  " } else { "FAIL" });
        self.checks.push(Check { name, ok, detail });
    }

    fn failed(&self) -> usize {
        self.checks.iter().filter(|check| !check.ok).count()
    }

    fn json(&self) -> serde_json::Value {
        let failed = self.failed();
        serde_json::json!({ "passed": self.checks.len() - failed, "failed": failed, "checks": self.checks })
    }
}

impl Demo {
    /// Runs the verb.
    pub fn run(&self) -> Result<ExitCode> {
        // With --json even a failure to begin is told as a check that failed.
        let report = self.prepare_and_show().unwrap_or_else(|error| {
            let mut report = Report::default();
            report.add("a cluster of two worker nodes is up", Err(error));
            report
        });
        let failed = report.failed();
        let verdict = format!("{} checks passed, {failed} failed", report.checks.len() - failed);
        if self.json {
            eprintln!("{verdict}");
            println!("{}", report.json());
        } else {
            println!("{verdict}");
        }
        Ok(if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }

    fn prepare_and_show(&self) -> Result<Report> {
        host::need_root("cargo xtask demo")?;
        host::ensure(host::LAB)?;
        Build::default().run()?;
        tokio::runtime::Runtime::new().context("starting the runtime")?.block_on(self.show())
    }

    async fn show(&self) -> Result<Report> {
        let mut report = Report::default();
        let options = Options { family: self.family, networking: self.networking, ..Options::for_xtask()? };
        let lab = tokio::select! {
            lab = fresh(options, |step| say(step)) => lab?,
            signal = tokio::signal::ctrl_c() => {
                signal.context("waiting for an interrupt")?;
                Lab::down(|step| say(step))?;
                anyhow::bail!("interrupted");
            }
        };
        report.add("a cluster of two worker nodes is up", cluster::describe(&lab));
        let told = tokio::select! {
            told = story::tell(&lab, self.family, &mut report) => told,
            signal = tokio::signal::ctrl_c() => signal
                .context("waiting for an interrupt")
                .and_then(|()| Err(anyhow::anyhow!("interrupted"))),
        };
        if let Err(error) = told {
            report.add("the demo runs to its end", Err(error));
        }
        if self.keep {
            cluster::invite();
        } else {
            say("removing the cluster");
            let removed = Lab::down(|step| say(step)).context("removing the cluster");
            report.add("nothing is left behind", removed.and_then(|()| cluster::leftovers()));
        }
        Ok(report)
    }
}
