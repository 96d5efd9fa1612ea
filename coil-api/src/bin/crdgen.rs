//! Prints the CustomResourceDefinitions of Coil as YAML.
//!
//! `crdgen DIR` writes one file per kind into DIR, `crdgen --check DIR` fails if a file there differs
//! from what would be written, `crdgen` alone prints to standard output. `cargo xtask manifests` runs it.

use std::error::Error;
use std::path::Path;
use std::process::ExitCode;

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;

const HEADER: &str = "# Generated from coil-api by `cargo xtask manifests`; do not edit.\n";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let result = match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [] => print_all(),
        ["--check", folder] => check_all(Path::new(folder)),
        [folder] if !folder.starts_with('-') => write_all(Path::new(folder)),
        _ => Err("usage: crdgen [[--check] DIR]".into()),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("crdgen: {error}");
            ExitCode::FAILURE
        }
    }
}

/// File name and definition of each kind.
fn definitions() -> Vec<(&'static str, CustomResourceDefinition)> {
    vec![("coil.cybozu.com_egresses.yaml", coil_api::crd())]
}

fn render(definition: &CustomResourceDefinition) -> Result<String, Box<dyn Error>> {
    Ok(format!("{HEADER}{}", serde_saphyr::to_string(definition)?))
}

fn print_all() -> Result<(), Box<dyn Error>> {
    for (_, definition) in definitions() {
        print!("---\n{}", render(&definition)?);
    }
    Ok(())
}

fn write_all(folder: &Path) -> Result<(), Box<dyn Error>> {
    std::fs::create_dir_all(folder).map_err(|e| format!("cannot create {}: {e}", folder.display()))?;
    for (name, definition) in definitions() {
        let path = folder.join(name);
        std::fs::write(&path, render(&definition)?)
            .map_err(|e| format!("cannot write {}: {e}", path.display()))?;
    }
    Ok(())
}

fn check_all(folder: &Path) -> Result<(), Box<dyn Error>> {
    for (name, definition) in definitions() {
        let path = folder.join(name);
        let present =
            std::fs::read_to_string(&path).map_err(|e| format!("cannot read {}: {e}", path.display()))?;
        if present != render(&definition)? {
            return Err(format!("{} is out of date; run `cargo xtask manifests`", path.display()).into());
        }
    }
    Ok(())
}
