//! `check`: what can be wrong without running anything: format, lints, package edges, generated
//! files.

use std::collections::{BTreeMap, BTreeSet};
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::ebpf::cargo;
use crate::manifests::Manifests;
use crate::process::{output, run, say};
use crate::test::{Tally, closing_line};

/// Checks format, lints, package edges and generated files.
#[derive(clap::Args, Debug, Default)]
pub struct Check {}

/// Edges between our packages that `style.md` 2 allows; tests may also use `coil-lab`.
const EDGES: &[(&str, &[&str])] = &[
    ("coil-common", &[]),
    ("coil-ebpf", &["coil-common"]),
    ("coil-api", &[]),
    ("coil-runtime", &[]),
    ("coil-agent", &["coil-common", "coil-ebpf", "coil-api", "coil-runtime"]),
    ("coil-controller", &["coil-api", "coil-runtime"]),
    ("coil-lab", &[]),
    ("hypercoil", &["coil-agent", "coil-controller"]),
    ("xtask", &["coil-lab"]),
];

impl Check {
    /// Runs the verb.
    pub fn run(&self) -> Result<ExitCode> {
        let tally = run_all();
        println!("{}", closing_line("check", tally));
        Ok(if tally.failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }
}

/// Runs each check, prints the failures and counts.
pub fn run_all() -> Tally {
    let checks: &[(&str, fn() -> Result<()>)] = &[
        ("package edges", edges),
        ("generated files", || Manifests { check: true }.run()),
        ("format (fix: cargo fmt)", || run(cargo().args(["fmt", "--all", "--check"]))),
        ("lints", || {
            run(cargo().args([
                "clippy",
                "--workspace",
                "--all-targets",
                "--quiet",
                "--",
                "--deny",
                "warnings",
            ]))
        }),
    ];
    let mut tally = Tally::default();
    for (name, check) in checks {
        say(format!("check: {name}"));
        match check() {
            Ok(()) => tally.passed += 1,
            Err(error) => {
                tally.failed += 1;
                eprintln!("check failed: {name}: {error:#}");
            }
        }
    }
    tally
}

/// Every edge between our packages must be on the list.
fn edges() -> Result<()> {
    let metadata = output(cargo().args(["metadata", "--format-version", "1", "--no-deps", "--locked"]))
        .context("reading the packages (is Cargo.lock fresh?)")?;
    let metadata: Value = serde_json::from_str(&metadata)?;
    let allowed: BTreeMap<_, BTreeSet<_>> =
        EDGES.iter().map(|(from, to)| (*from, to.iter().copied().collect())).collect();
    let mut wrong = Vec::new();
    for package in metadata["packages"].as_array().context("metadata without packages")? {
        let from = package["name"].as_str().unwrap_or_default();
        let Some(allowed) = allowed.get(from) else {
            wrong.push(format!("package {from} is not on the list in xtask/src/check.rs"));
            continue;
        };
        for dependency in package["dependencies"].as_array().context("package without dependencies")? {
            let to = dependency["name"].as_str().unwrap_or_default();
            let ours = EDGES.iter().any(|(name, _)| *name == to);
            let test =
                dependency["kind"] == "dev" && (to == "coil-lab" || to == from || allowed.contains(to));
            if ours && !allowed.contains(to) && !test {
                wrong.push(format!("{from} -> {to}"));
            }
        }
    }
    if !wrong.is_empty() {
        bail!("package edges that the design does not allow: {}", wrong.join(", "));
    }
    Ok(())
}
