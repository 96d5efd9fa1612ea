//! Runs a CNI configuration list for a pod the way a container runtime does: ADD in order, each plugin fed the result
//! of the one before, DEL in reverse, and a record on disk so that DEL works after a restart.

use crate::netns::{Netns, NetnsError};
use crate::options::Networking;
use crate::paths;
use crate::state::write_json;
use crate::topology::Node;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;
use tokio::io::AsyncWriteExt;
use tokio::process::Command;

/// Folders of Debian's `containernetworking-plugins` and of everybody else.
pub const PLUGIN_FOLDERS: [&str; 2] = ["/usr/lib/cni", "/opt/cni/bin"];
/// Name of the pod's interface.
const INTERFACE: &str = "eth0";
/// No plugin may take longer; `coil` itself gives its daemon one minute.
const PLUGIN_DEADLINE: Duration = Duration::from_secs(75);

/// What can go wrong with pod networking.
#[derive(Debug, thiserror::Error)]
pub enum CniError {
    /// The configuration list is not one.
    #[error("CNI configuration: {0}")]
    Config(&'static str),
    /// A plugin is in none of the folders.
    #[error("CNI plugin {name} is in none of {folders} (package containernetworking-plugins)")]
    Missing {
        /// Its name.
        name: String,
        /// Where we looked.
        folders: String,
    },
    /// A plugin could not be run.
    #[error("cannot run CNI plugin {plugin}")]
    Run {
        /// Its name.
        plugin: String,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// A plugin took too long.
    #[error("CNI plugin {plugin} did not end within {} s", PLUGIN_DEADLINE.as_secs())]
    Timeout {
        /// Its name.
        plugin: String,
    },
    /// A plugin refused.
    #[error("plugin type={plugin:?} failed ({command}): {message} (code {code})")]
    Refused {
        /// Its name.
        plugin: String,
        /// ADD or DEL.
        command: &'static str,
        /// The CNI error code; 0 where it printed none.
        code: u32,
        /// What it said.
        message: String,
    },
    /// A plugin printed something that is no result.
    #[error("CNI plugin {plugin} printed no result")]
    Result {
        /// Its name.
        plugin: String,
        /// The cause.
        #[source]
        source: serde_json::Error,
    },
    /// The record could not be written.
    #[error("cannot write {}", path.display())]
    Record {
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// A namespace.
    #[error(transparent)]
    Netns(#[from] NetnsError),
}

/// One pod's attachment, as it is recorded on disk before ADD.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Attachment {
    /// Identifier of the sandbox.
    pub container_id: String,
    /// The pod's namespace.
    pub namespace: String,
    /// The pod's name.
    pub name: String,
    /// The pod's UID.
    pub uid: String,
    /// The pod's network namespace.
    pub netns: Netns,
    /// The node's network namespace, in which the plugins run.
    pub node_netns: Netns,
    /// Value of the lab's marker.
    pub marker: String,
    /// The configuration list in force at ADD.
    pub config: Value,
    /// What ADD ended with.
    pub result: Option<Value>,
}

impl Attachment {
    /// The file that holds it.
    pub fn file(&self) -> PathBuf {
        paths::cni().join("results").join(format!("{}.json", self.container_id))
    }

    /// All that are recorded.
    pub fn all() -> Vec<Self> {
        let Ok(entries) = std::fs::read_dir(paths::cni().join("results")) else {
            return Vec::new();
        };
        entries
            .flatten()
            .filter_map(|entry| serde_json::from_slice(&std::fs::read(entry.path()).ok()?).ok())
            .collect()
    }

    /// The pod's addresses, once ADD has succeeded.
    pub fn addresses(&self) -> Vec<IpAddr> {
        let ips = self.result.as_ref().and_then(|result| result["ips"].as_array());
        ips.into_iter()
            .flatten()
            .filter_map(|ip| ip["address"].as_str()?.split('/').next()?.parse().ok())
            .collect()
    }

    /// Wires the pod up.
    pub async fn add(&mut self) -> Result<(), CniError> {
        self.save()?;
        let mut previous: Option<Value> = None;
        for plugin in self.plugins()? {
            let output = self.run("ADD", &plugin, previous.as_ref()).await?;
            let name = plugin_type(&plugin)?.to_owned();
            let result = serde_json::from_slice(&output)
                .map_err(|source| CniError::Result { plugin: name, source })?;
            previous = Some(result);
        }
        self.result = previous;
        self.save()
    }

    /// Undoes what ADD did, whole or in part. All plugins are run; the first failure is returned.
    pub async fn delete(&self) -> Result<(), CniError> {
        let mut first = Ok(());
        let mut plugins = self.plugins()?;
        plugins.reverse();
        for plugin in plugins {
            let done = self.run("DEL", &plugin, self.result.as_ref()).await.map(|_| ());
            if first.is_ok() {
                first = done;
            }
        }
        if first.is_ok() {
            let path = self.file();
            match std::fs::remove_file(&path) {
                Err(source) if source.kind() != io::ErrorKind::NotFound => {
                    return Err(CniError::Record { path, source });
                }
                _ => {}
            }
        }
        first
    }

    fn save(&self) -> Result<(), CniError> {
        let path = self.file();
        write_json(&path, self).map_err(|source| CniError::Record { path, source })
    }

    fn plugins(&self) -> Result<Vec<Map<String, Value>>, CniError> {
        self.config["plugins"]
            .as_array()
            .ok_or(CniError::Config("no list `plugins`"))?
            .iter()
            .map(|plugin| plugin.as_object().cloned().ok_or(CniError::Config("a plugin is no object")))
            .collect()
    }

    async fn run(
        &self,
        command: &'static str,
        plugin: &Map<String, Value>,
        previous: Option<&Value>,
    ) -> Result<Vec<u8>, CniError> {
        let name = plugin_type(plugin)?;
        let mut config = plugin.clone();
        for key in ["cniVersion", "name"] {
            config.insert(key.to_owned(), self.config[key].clone());
        }
        if let Some(previous) = previous {
            config.insert("prevResult".to_owned(), previous.clone());
        }
        let stdin = Value::Object(config).to_string();

        let mut process = std::process::Command::new(find(name)?);
        process
            .env_clear()
            .env("PATH", std::env::var_os("PATH").unwrap_or_default())
            .env(paths::MARKER, &self.marker)
            .env("CNI_COMMAND", command)
            .env("CNI_CONTAINERID", &self.container_id)
            .env("CNI_NETNS", self.netns.path())
            .env("CNI_IFNAME", INTERFACE)
            .env("CNI_ARGS", self.arguments())
            .env("CNI_PATH", folders().join(":"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        self.node_netns.enter(&mut process)?;
        let run = |source| CniError::Run { plugin: name.to_owned(), source };
        let mut child = Command::from(process).kill_on_drop(true).spawn().map_err(run)?;
        let pipe = child.stdin.take();
        let work = async {
            if let Some(mut pipe) = pipe {
                match pipe.write_all(stdin.as_bytes()).await {
                    // A plugin may end without reading its input; its exit status says what that means.
                    Err(error) if error.kind() != io::ErrorKind::BrokenPipe => return Err(error),
                    _ => {}
                }
            }
            child.wait_with_output().await
        };
        let output = tokio::time::timeout(PLUGIN_DEADLINE, work)
            .await
            .map_err(|_| CniError::Timeout { plugin: name.to_owned() })?
            .map_err(run)?;
        if output.status.success() {
            return Ok(output.stdout);
        }
        Err(refusal(name, command, &output))
    }

    fn arguments(&self) -> String {
        format!(
            "IgnoreUnknown=1;K8S_POD_NAMESPACE={};K8S_POD_NAME={};K8S_POD_INFRA_CONTAINER_ID={};K8S_POD_UID={}",
            self.namespace, self.name, self.container_id, self.uid
        )
    }
}

/// The lab's own configuration list for a node: Coil alone, or `ptp` with `host-local` and Coil behind them.
pub fn config(node: &Node, networking: Networking, coil: bool) -> Value {
    let own = json!({ "type": "coil", "socket": socket(&node.name) });
    if coil && networking == Networking::Coil {
        return json!({ "cniVersion": "1.0.0", "name": "coil-lab", "plugins": [own] });
    }
    let ranges: Vec<Value> = node.pod_cidrs.iter().map(|net| json!([{ "subnet": net }])).collect();
    let routes: Vec<Value> = node
        .pod_cidrs
        .iter()
        .map(|net| json!({ "dst": if net.addr().is_ipv4() { "0.0.0.0/0" } else { "::/0" } }))
        .collect();
    let mut plugins = vec![json!({
        "type": "ptp",
        "mtu": 1500,
        "ipMasq": false,
        "ipam": {
            "type": "host-local",
            "dataDir": paths::cni().join("host-local").join(&node.name),
            "ranges": ranges,
            "routes": routes,
        },
    })];
    if coil {
        plugins.push(own);
    }
    json!({ "cniVersion": "1.0.0", "name": "coil-lab", "plugins": plugins })
}

/// The socket of a node's `coild`.
pub fn socket(node: &str) -> PathBuf {
    paths::node(node).join("coild.sock")
}

/// Where plugins are looked for, in order.
fn folders() -> Vec<String> {
    let own = paths::bin().to_string_lossy().into_owned();
    PLUGIN_FOLDERS.iter().map(|folder| (*folder).to_owned()).chain([own]).collect()
}

/// Finds a plugin's program.
pub fn find(name: &str) -> Result<PathBuf, CniError> {
    if name.contains('/') {
        return Err(CniError::Config("a plugin's type is a path"));
    }
    let folders = folders();
    folders
        .iter()
        .map(|folder| Path::new(folder).join(name))
        .find(|path| path.is_file())
        .ok_or_else(|| CniError::Missing { name: name.to_owned(), folders: folders.join(", ") })
}

fn plugin_type(plugin: &Map<String, Value>) -> Result<&str, CniError> {
    plugin.get("type").and_then(Value::as_str).ok_or(CniError::Config("a plugin has no type"))
}

fn refusal(plugin: &str, command: &'static str, output: &std::process::Output) -> CniError {
    // An error is printed as JSON on standard output; a crash prints who knows what on standard error.
    let error: Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
    let mut message = error["msg"].as_str().unwrap_or_default().to_owned();
    if let Some(details) = error["details"].as_str().filter(|details| !details.is_empty()) {
        message = format!("{message}; {details}");
    }
    if message.is_empty() {
        let stderr = String::from_utf8_lossy(&output.stderr);
        message = format!("{}: {}", output.status, stderr.trim());
    }
    CniError::Refused {
        plugin: plugin.to_owned(),
        command,
        code: error["code"].as_u64().and_then(|code| code.try_into().ok()).unwrap_or(0),
        message,
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use crate::options::Family;
    use crate::topology::Topology;

    #[test]
    fn configuration_per_family() {
        let topology = Topology::plan(1, Family::Dual, Networking::Coil);
        let own = config(&topology.nodes[0], Networking::Coil, true);
        assert_eq!(
            (&own["plugins"][0]["type"], own["plugins"].as_array().unwrap().len()),
            (&json!("coil"), 1)
        );
        let plan = |family| Topology::plan(1, family, Networking::Ptp);
        let dual = config(&plan(Family::Dual).nodes[0], Networking::Ptp, true);
        assert_eq!(dual["plugins"][0]["ipam"]["ranges"].as_array().unwrap().len(), 2);
        assert_eq!(dual["plugins"][1]["type"], "coil");
        let v6 = config(&plan(Family::V6).nodes[0], Networking::Ptp, false);
        assert_eq!(v6["plugins"][0]["ipam"]["routes"], json!([{ "dst": "::/0" }]));
        assert_eq!(v6["plugins"].as_array().unwrap().len(), 1);
    }

    #[test]
    fn addresses_come_from_the_result() {
        let attachment = Attachment {
            container_id: "c".into(),
            namespace: "ns".into(),
            name: "pod".into(),
            uid: "u".into(),
            netns: Netns::of("pod-x"),
            node_netns: Netns::of("worker1"),
            marker: "m".into(),
            config: json!({}),
            result: Some(json!({ "ips": [{ "address": "10.244.1.5/24" }, { "address": "fd00::5/64" }, {}] })),
        };
        assert_eq!(
            attachment.addresses(),
            ["10.244.1.5".parse::<IpAddr>().unwrap(), "fd00::5".parse().unwrap()]
        );
        assert!(attachment.arguments().contains("K8S_POD_NAMESPACE=ns;K8S_POD_NAME=pod;"));
    }
}
