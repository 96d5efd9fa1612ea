//! Labs whose real control plane is broken: the caller is told why, and nothing is left behind. Shell scripts take the
//! places of the real programs. That a lab works on a real control plane is tested by `cluster`, which follows
//! `KUBEBUILDER_ASSETS` as every program does that makes a lab (docs/lab.md says when that was done).

#![expect(clippy::unwrap_used, reason = "tests")]

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use coil_lab::options::ApiSource;
use coil_lab::{Lab, Options};

struct Folder(PathBuf);

impl Folder {
    fn new(programs: &[(&str, &str)]) -> Self {
        let path = std::env::temp_dir().join(format!("coil-lab-assets-{}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        for (name, script) in programs {
            let path = path.join(name);
            std::fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        }
        Self(path)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_dir_all(&self.0) {
            eprintln!("{}: {error}", self.0.display());
        }
    }
}

fn options(folder: &Folder) -> Options {
    let launcher = vec![PathBuf::from(env!("CARGO_BIN_EXE_coil-lab"))];
    Options {
        api: ApiSource::Assets(folder.0.clone()),
        programs: None,
        nodes: 1,
        ..Options::with_launcher(launcher)
    }
}

/// Processes with this path in their command lines.
fn processes_of(folder: &Folder) -> Vec<String> {
    let wanted = folder.0.to_string_lossy().into_owned();
    std::fs::read_dir("/proc")
        .unwrap()
        .flatten()
        .filter_map(|entry| std::fs::read(entry.path().join("cmdline")).ok())
        .map(|line| String::from_utf8_lossy(&line).replace('\0', " "))
        .filter(|line| line.contains(&wanted))
        .collect()
}

fn namespaces_of_the_lab() -> Vec<String> {
    let Ok(entries) = std::fs::read_dir("/run/netns") else { return Vec::new() };
    let names = entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned());
    names.filter(|name| name.starts_with("coil-lab-")).collect()
}

fn expect_nothing_left(folder: &Folder) {
    assert_eq!(processes_of(folder), Vec::<String>::new());
    assert_eq!(namespaces_of_the_lab(), Vec::<String>::new());
    assert!(!Path::new("/run/coil-lab").exists());
}

#[tokio::test]
#[ignore = "privileged: makes a lab"]
async fn a_missing_program_is_told_before_anything_is_made() {
    assert!(Lab::open().is_err(), "a lab is up already");
    let folder = Folder::new(&[("etcd", "exec sleep 600")]);
    let error = Lab::up(options(&folder), |_| {}).await.err().unwrap().to_string();
    let expected = format!(
        "program {} does not exist: KUBEBUILDER_ASSETS must name a folder with etcd and kube-apiserver",
        folder.0.join("kube-apiserver").display()
    );
    assert_eq!(error, expected);
    expect_nothing_left(&folder);
}

#[tokio::test]
#[ignore = "privileged: makes a lab"]
async fn a_control_plane_that_ends_takes_the_lab_with_it() {
    assert!(Lab::open().is_err(), "a lab is up already");
    // Its own name stays in the command line, for `processes_of`.
    let waits = "while :; do sleep 1; done";
    let folder = Folder::new(&[("etcd", waits), ("kube-apiserver", "echo bad flag; exit 3")]);
    let error = Lab::up(options(&folder), |step| eprintln!("{step}")).await.err().unwrap().to_string();
    assert!(error.contains("kube-apiserver ended: exit status: 3; log: /run/coil-lab/logs/"), "{error}");
    let kept = std::fs::read_to_string("/tmp/coil-lab-failed/kube-apiserver.log").unwrap();
    assert_eq!(kept, "bad flag\n");
    expect_nothing_left(&folder);
}
