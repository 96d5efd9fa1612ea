//! `lab`: the cluster in network namespaces, with its packages and programs made ready first.

use std::process::ExitCode;

use anyhow::{Context, Result};

use crate::ebpf::Build;
use crate::host;

/// Runs a cluster in network namespaces and commands in it.
#[derive(clap::Args, Debug)]
pub struct Lab {
    #[command(flatten)]
    arguments: coil_lab::LabArgs,
}

impl Lab {
    /// Runs the verb.
    pub fn run(self) -> Result<ExitCode> {
        if self.arguments.is_up() {
            host::need_root("cargo xtask lab up")?;
            host::ensure(host::LAB)?;
            Build::default().run()?;
        }
        let this = std::env::current_exe().context("finding this program")?;
        self.arguments.run(vec![this, "lab".into()])
    }
}
