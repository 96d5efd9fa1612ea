//! What a caller may choose about a lab.

use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// Address families of the cluster.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Family {
    /// IPv4 alone.
    V4,
    /// IPv6 alone.
    V6,
    /// Both.
    #[default]
    Dual,
}

impl Family {
    /// Whether the cluster has IPv4.
    pub fn v4(self) -> bool {
        self != Self::V6
    }

    /// Whether the cluster has IPv6.
    pub fn v6(self) -> bool {
        self != Self::V4
    }

    /// Whether the cluster has the family of this address.
    pub fn has(self, address: std::net::IpAddr) -> bool {
        if address.is_ipv4() { self.v4() } else { self.v6() }
    }
}

/// Who gives pods their network.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Networking {
    /// Coil: addresses from an `AddressPool`, routes between nodes by BIRD.
    #[default]
    Coil,
    /// The reference plugins `ptp` and `host-local`, with Coil chained behind them for egress alone.
    Ptp,
}

/// Where the Kubernetes API comes from.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ApiSource {
    /// The API server inside the supervisor.
    #[default]
    Embedded,
    /// A folder with `etcd` and `kube-apiserver`, as `KUBEBUILDER_ASSETS` names it.
    Assets(PathBuf),
    /// A cluster that runs already.
    Kubeconfig(PathBuf),
}

/// Choices for [`crate::Lab::up`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Options {
    /// Number of worker nodes.
    pub nodes: usize,
    /// Address families.
    pub family: Family,
    /// Who gives pods their network, where Coil runs; see [`Options::wired_by`].
    #[serde(default)]
    pub networking: Networking,
    /// Where the API comes from.
    pub api: ApiSource,
    /// Run the lab's own controllers of workloads and scheduler, for an API server that has none. The embedded one
    /// always has them; a control plane from a folder gets what the folder lacks.
    pub controllers: bool,
    /// The multi-call binary with `coild`, `coil`, `coil-egress` and `coil-controller`. `None`: a cluster without
    /// Coil, whose pods are wired by the other CNI plugins alone.
    pub programs: Option<PathBuf>,
    /// The CNI plugin `coil`, if it is another program than that one.
    #[serde(default)]
    pub plugin: Option<PathBuf>,
    /// Folder with the custom resource definitions.
    pub crds: PathBuf,
    /// A CNI configuration list to use in place of the lab's own. `@NODE@` in it becomes the node's name.
    pub conflist: Option<PathBuf>,
    /// Command line that runs this program's lab verbs: `serve`, `http` and `client` are appended to it.
    pub launcher: Vec<PathBuf>,
    /// How long `up` waits for all to be ready, in seconds.
    pub wait_seconds: u64,
}

impl Options {
    /// The defaults for a program whose lab verbs follow the word `lab`, as in `xtask lab up`.
    pub fn for_xtask() -> std::io::Result<Self> {
        let exe = std::env::current_exe()?;
        Ok(Self::with_launcher(vec![exe, "lab".into()]))
    }

    /// Who gives pods their network: the reference plugins, where Coil does not run.
    pub fn wired_by(&self) -> Networking {
        if self.programs.is_some() { self.networking } else { Networking::Ptp }
    }

    /// The defaults for a program that is started by `launcher`.
    pub fn with_launcher(launcher: Vec<PathBuf>) -> Self {
        let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        let workspace = workspace.canonicalize().unwrap_or(workspace);
        let beside = launcher
            .first()
            .and_then(|exe| exe.parent())
            .map(|folder| folder.join("hypercoil"))
            .filter(|path| path.exists());
        Self {
            nodes: 2,
            family: Family::default(),
            networking: Networking::default(),
            api: match std::env::var_os("KUBEBUILDER_ASSETS") {
                // The supervisor works in another folder.
                Some(folder) if !folder.is_empty() => {
                    ApiSource::Assets(std::path::absolute(&folder).unwrap_or_else(|_| folder.into()))
                }
                _ => ApiSource::Embedded,
            },
            controllers: false,
            programs: Some(beside.unwrap_or_else(|| workspace.join("target/debug/hypercoil"))),
            plugin: None,
            crds: workspace.join("manifests/crd"),
            conflist: None,
            launcher,
            wait_seconds: 120,
        }
    }
}
