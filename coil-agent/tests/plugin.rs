//! `kubectl coil` with a kubectl that only says what it was asked for.

#![allow(clippy::unwrap_used, reason = "tests")]

use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::Command;

/// Answers `get` with pods and `exec` with its own arguments; fails with 2 for pod `coild-b`.
const KUBECTL: &str = r#"#!/bin/sh
case "$*" in
exec*coild-b*) echo "$*"; exit 2 ;;
exec*) echo "$*" ;;
*kube-system*-o\ json) cat <<'JSON'
{"items": [
  {"metadata": {"name": "coild-b"}, "spec": {"nodeName": "worker2"}, "status": {"phase": "Running"}},
  {"metadata": {"name": "coild-a"}, "spec": {"nodeName": "worker1"}, "status": {"phase": "Running"}}]}
JSON
;;
get*metadata.name=client*) echo '{"items": [{"spec": {"nodeName": "worker2"}}]}' ;;
get*) echo '{"items": []}' ;;
*) echo "what is $*" >&2; exit 1 ;;
esac
"#;

/// A folder with the fake, removed at the end.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("coil-plugin-{}-{name}", std::process::id()));
        std::fs::create_dir(&path).unwrap();
        let program = path.join("kubectl");
        std::fs::write(&program, KUBECTL).unwrap();
        std::fs::set_permissions(&program, PermissionsExt::from_mode(0o755)).unwrap();
        Self(path)
    }

    /// Runs the plugin; its status and what was printed.
    fn run(&self, arguments: &[&str]) -> (i32, String, String) {
        let output = Command::new(env!("CARGO_BIN_EXE_kubectl-coil"))
            .args(arguments)
            .env("PATH", format!("{}:/usr/bin:/bin", self.0.display()))
            .env("COIL_BPFFS_ROOT", "/nonexistent")
            .env_remove("COILCTL_NODE")
            .output()
            .unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        (output.status.code().unwrap(), text(&output.stdout), text(&output.stderr))
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_dir_all(&self.0) {
            eprintln!("cannot remove {}: {error}", self.0.display());
        }
    }
}

const EXEC: &str = "exec --namespace kube-system coild-";

#[test]
fn a_command_about_a_pod_goes_to_its_node() {
    let folder = Folder::new("pod");
    let (status, out, err) = folder.run(&["explain", "team-a/client", "203.0.113.10:80", "-o", "json"]);
    assert_eq!(
        out,
        format!("{EXEC}b --container coild -- coilctl explain team-a/client 203.0.113.10:80 -o json\n")
    );
    assert_eq!((status, err.as_str()), (2, ""), "the status of the node's coilctl is handed on");
}

#[test]
fn other_commands_go_to_all_nodes_or_the_one_that_is_named() {
    let folder = Folder::new("all");
    let (status, out, err) = folder.run(&["drops"]);
    assert_eq!(
        out,
        format!("{EXEC}a --container coild -- coilctl drops\n{EXEC}b --container coild -- coilctl drops\n")
    );
    assert_eq!((status, err.as_str()), (2, "node worker1:\nnode worker2:\n"));
    let (status, out, _) = folder.run(&["drops", "--node", "worker1"]);
    assert_eq!((status, out), (0, format!("{EXEC}a --container coild -- coilctl drops --node worker1\n")));
}

#[test]
fn nobody_to_ask_is_an_error() {
    let folder = Folder::new("none");
    let (status, _, err) = folder.run(&["drops", "--node", "worker9"]);
    assert_eq!((status, err.as_str()), (1, "kubectl-coil: no coild runs on node worker9\n"));
    let (status, _, err) = folder.run(&["explain", "team-a/nobody", "203.0.113.10"]);
    assert_eq!((status, err.as_str()), (1, "kubectl-coil: there is no pod team-a/nobody on any node\n"));
}
