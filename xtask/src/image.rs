//! `image`: the container image as an OCI archive, which `podman load`, `ctr image import`, `skopeo` and
//! recent `docker load` take. It holds one static program and links to it, the static CNI plugin, which goes to the
//! hosts and is started for every pod, and nothing else.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use ring::digest::{SHA256, digest};
use serde_json::json;

use crate::ebpf::{BuildEbpf, cargo};
use crate::process::{run, say};
use crate::{root, target_dir};

/// Folder of the programs in the image; on its `PATH`.
const PROGRAMS_DIR: &str = "usr/local/coil";
/// Links to the multi-call binary.
const LINKS: &[&str] =
    &["coild", "coil-installer", "coil-egress", "coil-router", "coil-controller", "coilctl", "kubectl-coil"];
/// The plugin must be smaller than this many bytes.
const MAX_PLUGIN: u64 = 5_000_000;
const TARGET: &str = "x86_64-unknown-linux-gnu";

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
        BuildEbpf::default().run()?;
        say("building the static programs (release)");
        // With an explicit target the flag reaches the program and not the build scripts.
        run(cargo()
            .args(["build", "--release", "--target", TARGET])
            .args([
                "--package",
                "hypercoil",
                "--bin",
                "hypercoil",
                "--package",
                "coil-agent",
                "--bin",
                "coil",
            ])
            .env("CARGO_PROFILE_RELEASE_STRIP", "debuginfo")
            .env("CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUSTFLAGS", "-Ctarget-feature=+crt-static"))?;
        let built = target_dir().join(TARGET).join("release");
        let plugin = built.join("coil");
        let size = fs::metadata(&plugin).with_context(|| format!("looking at {}", plugin.display()))?.len();
        ensure!(
            size < MAX_PLUGIN,
            "the CNI plugin has grown to {size} bytes; it must stay under {MAX_PLUGIN}"
        );
        say(format!("CNI plugin: {size} bytes"));
        let output = self.output.clone().unwrap_or_else(|| root().join("target/coil-image.tar"));
        write(&built, &self.tag, &output).with_context(|| format!("writing {}", output.display()))?;
        say(format!("image {}: {} ({} bytes)", self.tag, output.display(), fs::metadata(&output)?.len()));
        Ok(())
    }
}

fn write(programs: &Path, tag: &str, output: &Path) -> Result<()> {
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
fn layer(programs: &Path) -> Result<Vec<u8>> {
    let mut archive = tar::Builder::new(Vec::new());
    for name in ["hypercoil", "coil"] {
        let path = programs.join(name);
        let data = fs::read(&path).with_context(|| format!("reading {}", path.display()))?;
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
