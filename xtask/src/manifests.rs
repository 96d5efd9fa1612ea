//! `manifests`: writes what is generated from the types, or checks that it is fresh.

use std::fs;

use anyhow::{Context, Result, bail};

use crate::ebpf::cargo;
use crate::process::output;
use crate::root;

/// Generated custom resource definitions, relative to the root, by what `crdgen` calls them.
const CRDS: &[(&str, &str)] = &[
    ("addressblock", "manifests/crd/coil.cybozu.com_addressblocks.yaml"),
    ("addresspool", "manifests/crd/coil.cybozu.com_addresspools.yaml"),
    ("blockrequest", "manifests/crd/coil.cybozu.com_blockrequests.yaml"),
    ("egress", "manifests/crd/coil.cybozu.com_egresses.yaml"),
];

/// Writes the generated manifests, or checks that they are fresh.
#[derive(clap::Args, Debug, Default)]
pub struct Manifests {
    /// Only check that the files are what would be written
    #[arg(long)]
    pub check: bool,
}

impl Manifests {
    /// Runs the verb.
    pub fn run(&self) -> Result<()> {
        for (kind, file) in CRDS {
            let path = root().join(file);
            let fresh = output(cargo().args([
                "run",
                "--quiet",
                "--package",
                "coil-api",
                "--bin",
                "crdgen",
                "--",
                kind,
            ]))?;
            if !self.check {
                fs::write(&path, fresh).with_context(|| format!("writing {file}"))?;
            } else if fs::read_to_string(&path).with_context(|| format!("reading {file}"))? != fresh {
                bail!("{file} is not what the types say; fix: cargo xtask manifests");
            }
        }
        Ok(())
    }
}
