//! What scenarios share: how they are run, their list, their cluster objects, questions to the external host.

mod harness;

pub use harness::{Group, main};

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::pin::Pin;

use anyhow::{Context, Result, ensure};
use coil_lab::drive::{Addresses, apply, ask, kubectl, pod, wait_for};
use coil_lab::report::Peer;
use coil_lab::{Lab, Options};

/// Port of the external HTTP server.
pub const HTTP: u16 = 80;
/// Port of the external echo servers.
pub const ECHO: u16 = 7;

/// A scenario under its name.
pub struct Scenario {
    /// Name, as tests are named.
    pub name: &'static str,
    /// Runs it.
    pub run: for<'a> fn(&'a Lab) -> Pin<Box<dyn Future<Output = Result<()>> + 'a>>,
}

/// Makes a list of scenarios from async functions.
macro_rules! scenarios {
    ($($name:ident),+ $(,)?) => {
        /// The scenarios of this file.
        pub fn scenarios() -> Vec<$crate::support::Scenario> {
            vec![$($crate::support::Scenario {
                name: concat!(module_path!(), "::", stringify!($name)),
                run: |lab| Box::pin($name(lab)),
            }),+]
        }
    };
}
pub(crate) use scenarios;

/// Options of the lab: its verbs are those of the `coil-lab` program of this build.
pub fn options() -> Options {
    Options::with_launcher(vec![PathBuf::from(env!("CARGO_BIN_EXE_coil-lab"))])
}

/// The external addresses that emulate the Internet, one a family.
pub const INTERNET: [&str; 2] = ["203.0.113.10", "2001:db8:ffff::10"];
/// External addresses in private ranges that scenarios name as narrow destinations.
pub const PRIVATE: [&str; 2] = ["192.168.200.10", "fd00:192:168:200::10"];
/// External addresses in private ranges that no Egress names.
pub const OTHER_PRIVATE: [&str; 2] = ["192.168.201.10", "fd00:192:168:201::10"];

/// Parses an address of the constants.
pub fn ip(text: &str) -> IpAddr {
    text.parse().expect("an address")
}

/// An Egress with its namespace; `extra` lines go under `spec`.
pub fn egress(namespace: &str, name: &str, destinations: &[&str], extra: &str) -> String {
    let destinations: Vec<_> = destinations.iter().map(|net| format!("\"{net}\"")).collect();
    format!(
        "---\napiVersion: v1\nkind: Namespace\nmetadata: {{name: {namespace}}}\n\
         ---\napiVersion: coil.cybozu.com/v2\nkind: Egress\nmetadata: {{namespace: {namespace}, name: {name}}}\n\
         spec:\n  destinations: [{}]\n{extra}",
        destinations.join(", ")
    )
}

/// `extra` of [`egress`] that puts the egress pods on a node.
pub fn on_node(node: &str) -> String {
    format!(
        "  template:\n    spec:\n      nodeSelector: {{kubernetes.io/hostname: {node}}}\n      containers: [{{name: egress}}]\n"
    )
}

/// A pod with its namespace, on a node, with annotations as `key: value` lines.
pub fn client(namespace: &str, name: &str, node: &str, annotations: &[(&str, &str)]) -> String {
    let lines: Vec<_> = annotations.iter().map(|(key, value)| format!("{key}: \"{value}\"")).collect();
    format!(
        "---\napiVersion: v1\nkind: Namespace\nmetadata: {{name: {namespace}}}\n\
         ---\napiVersion: v1\nkind: Pod\nmetadata: {{namespace: {namespace}, name: {name}, annotations: {{{}}}}}\n\
         spec:\n  nodeSelector: {{kubernetes.io/hostname: {node}}}\n  containers: [{{name: main, image: pause}}]\n",
        lines.join(", ")
    )
}

/// Applies a manifest and waits until an Egress and a pod are ready.
pub async fn ready(lab: &Lab, manifest: &str, egress: (&str, &str), client: (&str, &str)) -> Result<()> {
    apply(lab, manifest).await?;
    wait_for(lab, "condition=Ready", egress.0, &[&format!("egress/{}", egress.1)]).await?;
    wait_for(lab, "condition=Ready", client.0, &["pod", client.1]).await
}

/// Whom the external server sees when a pod connects to one of its addresses.
pub async fn peer(lab: &Lab, client: (&str, &str), server: IpAddr) -> Result<IpAddr> {
    let server = SocketAddr::new(server, HTTP).to_string();
    let answer: Peer = ask(lab, &pod(client.0, client.1), &["--timeout", "4", "peer", &server]).await?;
    Ok(answer.peer)
}

/// Fails unless the server sees one of the egress pods.
pub async fn through(lab: &Lab, client: (&str, &str), server: IpAddr, egress: (&str, &str)) -> Result<()> {
    let gateways = Addresses::of_egress(lab, egress.0, egress.1).await?;
    gateways
        .expect(peer(lab, client, server).await?)
        .with_context(|| format!("{client:?} to {server}"))
        .map(drop)
}

/// Fails unless the server sees the pod itself.
pub async fn direct(lab: &Lab, client: (&str, &str), server: IpAddr) -> Result<()> {
    let own = Addresses::of(lab, &["--namespace", client.0, "pod", client.1]).await?;
    own.expect(peer(lab, client, server).await?).with_context(|| format!("{client:?} to {server}")).map(drop)
}

/// Fails if the server is reached at all.
pub async fn blocked(lab: &Lab, client: (&str, &str), server: IpAddr) -> Result<()> {
    let answer = peer(lab, client, server).await;
    ensure!(answer.is_err(), "{client:?} reached {server} as {answer:?}, though it must not");
    Ok(())
}

/// Sets or, with a trailing dash, removes an annotation of a pod.
pub async fn annotate(lab: &Lab, client: (&str, &str), annotation: &str) -> Result<()> {
    kubectl(lab, &["annotate", "--overwrite", "--namespace", client.0, "pod", client.1, annotation], "")
        .await
        .map(drop)
}

/// Deletes namespaces with all that is in them. Gateways get no time to drain.
pub async fn remove(lab: &Lab, namespaces: &[&str]) -> Result<()> {
    let with = |arguments: &[&'static str]| -> Vec<&str> {
        arguments.iter().copied().chain(namespaces.iter().copied()).collect()
    };
    kubectl(lab, &with(&["delete", "namespace", "--wait=false"]), "").await?;
    for namespace in namespaces {
        let pods = ["--namespace", namespace, "delete", "pod", "--all", "--grace-period=1", "--wait=false"];
        kubectl(lab, &pods, "").await?;
    }
    // Succeeds for those that are gone already.
    kubectl(lab, &with(&["delete", "namespace", "--ignore-not-found", "--wait=true"]), "").await.map(drop)
}

/// What is up, printed when a scenario fails.
pub fn state(lab: &Lab) -> String {
    serde_json::to_string_pretty(&lab.status()).unwrap_or_else(|error| error.to_string())
}
