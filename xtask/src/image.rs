//! `image`: the container image as an OCI archive, which `podman load`, `ctr image import`, `skopeo` and
//! recent `docker load` take. It holds one static program and links to it, the static CNI plugin, which goes to the
//! hosts and is started for every pod, and nothing else.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use ring::digest::{SHA256, digest};
use serde_json::json;

use crate::process::say;
use crate::programs::{self, Shipped};
use crate::root;

/// Folder of the programs in the image; on its `PATH`.
const PROGRAMS_DIR: &str = "usr/local/coil";
/// Links to the multi-call binary.
const LINKS: &[&str] =
    &["coild", "coil-installer", "coil-egress", "coil-router", "coil-controller", "coilctl", "kubectl-coil"];

/// Builds the container image as an OCI archive.
#[derive(clap::Args, Debug)]
pub struct Image {
    /// Name and tag of the image
    #[arg(long, default_value = concat!("coil:", env!("CARGO_PKG_VERSION")))]
    tag: String,
    /// File to write; default: target/coil-image.tar
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,
}

impl Image {
    /// Runs the verb.
    pub fn run(&self) -> Result<()> {
        let shipped = programs::build()?;
        let output = self.output.clone().unwrap_or_else(|| root().join("target/coil-image.tar"));
        write(&shipped, &self.tag, &output).with_context(|| format!("writing {}", output.display()))?;
        say(format!("image {}: {} ({} bytes)", self.tag, output.display(), fs::metadata(&output)?.len()));
        Ok(())
    }
}

fn write(programs: &Shipped, tag: &str, output: &Path) -> Result<()> {
    let layer = layer(programs)?;
    let layer_digest = sha256(&layer);
    let config = serde_json::to_vec(&json!({
        "architecture": "amd64",
        "os": "linux",
        "config": { "Env": [format!("PATH=/{PROGRAMS_DIR}")], "WorkingDir": "/" },
        "rootfs": { "type": "layers", "diff_ids": [layer_digest] },
    }))?;
    let manifest = serde_json::to_vec(&json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": descriptor("application/vnd.oci.image.config.v1+json", &config),
        "layers": [descriptor("application/vnd.oci.image.layer.v1.tar", &layer)],
    }))?;
    let mut entry = descriptor("application/vnd.oci.image.manifest.v1+json", &manifest);
    entry["annotations"] =
        json!({ "org.opencontainers.image.ref.name": tag, "io.containerd.image.name": tag });
    let index = serde_json::to_vec(&json!({ "schemaVersion": 2, "manifests": [entry] }))?;
    // What `docker load` reads.
    let docker = serde_json::to_vec(&json!([{
        "Config": blob(&config),
        "RepoTags": [tag],
        "Layers": [blob(&layer)],
    }]))?;

    let fresh = output.with_extension("tar.new");
    let mut archive = tar::Builder::new(File::create(&fresh)?);
    for (path, data) in [
        ("oci-layout".to_owned(), br#"{"imageLayoutVersion":"1.0.0"}"#.as_slice()),
        ("index.json".to_owned(), index.as_slice()),
        ("manifest.json".to_owned(), docker.as_slice()),
        (blob(&config), config.as_slice()),
        (blob(&manifest), manifest.as_slice()),
        (blob(&layer), layer.as_slice()),
    ] {
        file(&mut archive, &path, data, 0o644)?;
    }
    archive.into_inner()?.sync_all()?;
    fs::rename(&fresh, output)?;
    Ok(())
}

/// The one layer: the programs and links to the first.
fn layer(programs: &Shipped) -> Result<Vec<u8>> {
    let mut archive = tar::Builder::new(Vec::new());
    for (name, path) in [("hypercoil", &programs.hypercoil), ("coil", &programs.plugin)] {
        let data = fs::read(path).with_context(|| format!("reading {}", path.display()))?;
        file(&mut archive, &format!("{PROGRAMS_DIR}/{name}"), &data, 0o755)?;
    }
    for link in LINKS {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(tar::EntryType::Symlink);
        header.set_size(0);
        header.set_mode(0o777);
        archive.append_link(&mut header, format!("{PROGRAMS_DIR}/{link}"), "hypercoil")?;
    }
    Ok(archive.into_inner()?)
}

/// Adds a file; times and owners are zero, so that equal input makes an equal image.
fn file(archive: &mut tar::Builder<impl Write>, path: &str, data: &[u8], mode: u32) -> Result<()> {
    let mut header = tar::Header::new_gnu();
    header.set_size(data.len() as u64);
    header.set_mode(mode);
    archive.append_data(&mut header, path, data).with_context(|| format!("adding {path}"))
}

fn sha256(data: &[u8]) -> String {
    format!("sha256:{}", hex(data))
}

fn blob(data: &[u8]) -> String {
    format!("blobs/sha256/{}", hex(data))
}

fn hex(data: &[u8]) -> String {
    digest(&SHA256, data).as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
}

fn descriptor(media_type: &str, data: &[u8]) -> serde_json::Value {
    json!({ "mediaType": media_type, "digest": sha256(data), "size": data.len() })
}
