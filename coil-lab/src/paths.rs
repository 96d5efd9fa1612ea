//! Where the lab keeps its things. All names are fixed, so that `down` can find them without any record.

use std::path::{Path, PathBuf};

/// Everything that the lab writes, except pins and network namespaces, is below this folder.
pub const ROOT: &str = "/run/coil-lab";
/// Where named network namespaces are (shared with iproute2).
pub const NETNS_ROOT: &str = "/run/netns";
/// Every network namespace of the lab has a name that begins so.
pub const NETNS_PREFIX: &str = "coil-lab-";
/// Mount point of the BPF file system.
pub const BPFFS: &str = "/sys/fs/bpf";
/// Source in the mount table where the lab has mounted it, so that `down` knows without any record.
pub const BPFFS_SOURCE: &str = "coil-lab";
/// Environment variable that marks every process of the lab; its value is the lab's id.
pub const MARKER: &str = "COIL_LAB";

/// The record that `up` keeps of what it makes.
pub fn state_file() -> PathBuf {
    Path::new(ROOT).join("state.json")
}

/// Socket at which the supervisor takes requests.
pub fn control() -> PathBuf {
    Path::new(ROOT).join("control.sock")
}

/// Kubeconfig for processes of the root namespace.
pub fn kubeconfig() -> PathBuf {
    Path::new(ROOT).join("kubeconfig")
}

/// Kubeconfig for processes in node and pod namespaces.
pub fn kubeconfig_cluster() -> PathBuf {
    Path::new(ROOT).join("kubeconfig.cluster")
}

/// Folder of all log files.
pub fn logs() -> PathBuf {
    Path::new(ROOT).join("logs")
}

/// Log of the supervisor.
pub fn supervisor_log() -> PathBuf {
    logs().join("supervisor.log")
}

/// Log of one container.
pub fn container_log(namespace: &str, pod: &str, container: &str) -> PathBuf {
    logs().join(format!("{namespace}_{pod}_{container}.log"))
}

/// Folder of the programs that run in pods: links to the multi-call binary.
pub fn bin() -> PathBuf {
    Path::new(ROOT).join("bin")
}

/// Folder of the CNI configuration, results and `host-local` state.
pub fn cni() -> PathBuf {
    Path::new(ROOT).join("cni")
}

/// Folder of one node: sockets and the like.
pub fn node(name: &str) -> PathBuf {
    Path::new(ROOT).join("nodes").join(name)
}

/// Folder of the records of running pods, one file per pod.
pub fn pods() -> PathBuf {
    Path::new(ROOT).join("pods")
}

/// Folder of the credentials of one pod.
pub fn account(uid: &str) -> PathBuf {
    Path::new(ROOT).join("accounts").join(uid)
}

/// Folder of the pins of all nodes.
pub fn pins() -> PathBuf {
    Path::new(BPFFS).join("coil-lab")
}

/// Folder of the pins of one node.
pub fn node_pins(name: &str) -> PathBuf {
    pins().join(name)
}
