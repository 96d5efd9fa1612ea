//! Prints CustomResourceDefinitions of Coil as YAML: `crdgen [KIND]`, all of them without KIND.
//! `cargo xtask manifests` writes them to `manifests/crd`.

use std::error::Error;
use std::io::Write;
use std::process::ExitCode;

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;

const HEADER: &str = "# Generated from coil-api by `cargo xtask manifests`; do not edit.\n";

fn main() -> ExitCode {
    match print(std::env::args().nth(1).as_deref()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("crdgen: {error}");
            ExitCode::FAILURE
        }
    }
}

/// What to call each kind, and its definition.
fn definitions() -> Vec<(&'static str, CustomResourceDefinition)> {
    vec![
        ("addressblock", coil_api::addressblock::crd()),
        ("addresspool", coil_api::addresspool::crd()),
        ("blockrequest", coil_api::blockrequest::crd()),
        ("egress", coil_api::crd()),
    ]
}

fn print(kind: Option<&str>) -> Result<(), Box<dyn Error>> {
    let mut wanted = definitions();
    if let Some(kind) = kind {
        wanted.retain(|(name, _)| *name == kind);
    }
    if wanted.is_empty() {
        return Err("no such kind".into());
    }
    let mut output = std::io::stdout().lock();
    for (index, (_, definition)) in wanted.iter().enumerate() {
        if index > 0 {
            writeln!(output, "---")?;
        }
        write!(output, "{HEADER}{}", serde_saphyr::to_string(definition)?)?;
    }
    Ok(())
}
