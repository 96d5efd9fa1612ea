//! Driving a lab as a person would: kubectl, the lab's traffic client, waiting for conditions, counters.

use std::net::IpAddr;
use std::process::Output;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::{ExecOptions, Lab, Options, Target, paths};

/// How long one step may take, and how long a condition is waited for.
pub const STEP: Duration = Duration::from_secs(60);

/// Brings up a lab that the caller will take down. One that is up already is somebody else's: it is an error, and the
/// lab is left alone. A lab that does not come up is removed again.
pub async fn fresh(options: Options, progress: impl Fn(&str)) -> Result<Lab> {
    ensure!(Lab::open().is_err(), "a lab is up already; take it down first: cargo xtask lab down");
    match Lab::up(options, &progress).await {
        Ok(lab) => Ok(lab),
        Err(error) => {
            Lab::down(&progress)?;
            Err(error.into())
        }
    }
}

/// Runs kubectl against the lab and returns what it prints.
pub async fn kubectl(lab: &Lab, arguments: &[&str], input: &str) -> Result<String> {
    let mut command = tokio::process::Command::new(lab.kubectl());
    command
        .args(arguments)
        .env("KUBECONFIG", lab.kubeconfig())
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .kill_on_drop(true);
    let mut child = command.spawn().context("starting kubectl")?;
    if let Some(mut stdin) = child.stdin.take() {
        tokio::io::AsyncWriteExt::write_all(&mut stdin, input.as_bytes())
            .await
            .context("writing to kubectl")?;
    }
    let output = tokio::time::timeout(2 * STEP, child.wait_with_output())
        .await
        .with_context(|| format!("kubectl {} did not end", arguments.join(" ")))??;
    text(output).with_context(|| format!("kubectl {}", arguments.join(" ")))
}

/// Applies a manifest.
pub async fn apply(lab: &Lab, manifest: &str) -> Result<String> {
    kubectl(lab, &["apply", "-f", "-"], manifest).await
}

/// An object, or a list of objects, as JSON.
pub async fn get(lab: &Lab, arguments: &[&str]) -> Result<Value> {
    let arguments: Vec<_> = ["get", "-o", "json"].iter().chain(arguments).copied().collect();
    let json = kubectl(lab, &arguments, "").await?;
    serde_json::from_str(&json).context("reading what kubectl printed")
}

/// Waits until a condition of objects is true; they need not exist yet.
pub async fn wait_for(lab: &Lab, condition: &str, namespace: &str, what: &[&str]) -> Result<()> {
    let arguments: Vec<_> = ["wait", "--for", condition, "--timeout=20s", "--namespace", namespace]
        .iter()
        .chain(what)
        .copied()
        .collect();
    until(condition, || kubectl(lab, &arguments, "")).await.map(drop)
}

/// Runs a command in a place and returns what it prints.
pub async fn exec<S: AsRef<str>>(lab: &Lab, target: &Target, argv: &[S]) -> Result<String> {
    let argv: Vec<&str> = argv.iter().map(AsRef::as_ref).collect();
    let options = ExecOptions { limit: 2 * STEP, ..ExecOptions::default() };
    let output =
        lab.exec(target, &argv, options).await.with_context(|| format!("running a command in {target}"))?;
    text(output).with_context(|| format!("{} in {target}", argv.join(" ")))
}

/// Runs the lab's traffic client in a place and reads its answer.
pub async fn ask<T: DeserializeOwned>(lab: &Lab, target: &Target, arguments: &[&str]) -> Result<T> {
    ask_for(lab, target, arguments, 2 * STEP).await
}

/// The same for a client that is told when to end, after so long at most.
pub async fn ask_for<T: DeserializeOwned>(
    lab: &Lab,
    target: &Target,
    arguments: &[&str],
    limit: Duration,
) -> Result<T> {
    let options = ExecOptions { limit, ..ExecOptions::default() };
    let output = lab
        .exec(target, &lab.client(arguments), options)
        .await
        .with_context(|| format!("running the client in {target}"))?;
    let answer = text(output).with_context(|| format!("{} in {target}", arguments.join(" ")))?;
    serde_json::from_str(answer.trim()).with_context(|| format!("reading the client's answer: {answer}"))
}

/// A pod as a place.
pub fn pod(namespace: &str, name: &str) -> Target {
    Target::Pod { namespace: namespace.to_owned(), name: name.to_owned() }
}

/// Repeats a question until it is answered without an error, or [`STEP`] is over; the last error then says why not.
pub async fn until<T, F: Future<Output = Result<T>>>(what: &str, mut ask: impl FnMut() -> F) -> Result<T> {
    let start = Instant::now();
    loop {
        match ask().await {
            Ok(answer) => return Ok(answer),
            Err(error) if start.elapsed() > STEP => return Err(error.context(format!("waiting: {what}"))),
            Err(_) => tokio::time::sleep(Duration::from_millis(100)).await,
        }
    }
}

fn text(output: Output) -> Result<String> {
    let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
    if !output.status.success() {
        bail!("{}: {} {}", output.status, stdout.trim(), String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(stdout)
}

/// Names and addresses of pods.
#[derive(Clone, Debug)]
pub struct Addresses {
    pods: Vec<(String, Vec<IpAddr>)>,
}

impl Addresses {
    /// Of the pods that `kubectl get` finds.
    pub async fn of(lab: &Lab, arguments: &[&str]) -> Result<Self> {
        let found = get(lab, arguments).await?;
        let items = found["items"].as_array().cloned().unwrap_or_else(|| vec![found]);
        let pods = items
            .iter()
            .map(|pod| {
                let name = pod["metadata"]["name"].as_str().unwrap_or_default().to_owned();
                let addresses = pod["status"]["podIPs"].as_array().into_iter().flatten();
                (name, addresses.filter_map(|ip| ip["ip"].as_str()?.parse().ok()).collect())
            })
            .collect();
        Ok(Self { pods })
    }

    /// Of the egress pods of an Egress.
    pub async fn of_egress(lab: &Lab, namespace: &str, name: &str) -> Result<Self> {
        let selector = format!("app.kubernetes.io/component=egress,app.kubernetes.io/instance={name}");
        Self::of(lab, &["--namespace", namespace, "pod", "--selector", &selector]).await
    }

    /// The names of the pods.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.pods.iter().map(|(name, _)| name.as_str())
    }

    /// Fails unless there are so many; describes them.
    pub fn expect_pods(&self, count: usize) -> Result<String> {
        ensure!(self.pods.len() == count, "{} pods: {self:?}", self.pods.len());
        let texts: Vec<_> =
            self.pods.iter().map(|(name, addresses)| format!("{name} {addresses:?}")).collect();
        Ok(texts.join(", "))
    }

    /// Fails unless one of the pods has this address; names it.
    pub fn expect(&self, seen: IpAddr) -> Result<String> {
        match self.pods.iter().find(|(_, addresses)| addresses.contains(&seen)) {
            Some((name, _)) => Ok(format!("seen as {seen}, {name}")),
            None => bail!("seen as {seen}, expected one of {:?}", self.pods),
        }
    }

    /// The first address of the same family as another.
    pub fn like(&self, family_of: IpAddr) -> Result<IpAddr> {
        let mut all = self.pods.iter().flat_map(|(_, addresses)| addresses);
        let found = all.find(|address| address.is_ipv4() == family_of.is_ipv4());
        found.copied().with_context(|| format!("no address of this family: {self:?}"))
    }
}

/// Metrics of a program that listens in a place of the lab.
pub async fn scrape(lab: &Lab, target: &Target, port: u16) -> Result<String> {
    let url = format!("http://localhost:{port}/metrics");
    exec(lab, target, &["curl", "--silent", "--show-error", "--fail", &url]).await
}

/// Sum of all series of a metric that carry these labels.
pub fn sum(metrics: &str, name: &str, labels: &[(&str, &str)]) -> f64 {
    metrics
        .lines()
        .filter_map(|line| {
            let rest = line.strip_prefix(name)?;
            let (series, value) = rest.rsplit_once(' ')?;
            let bare = series.is_empty() && labels.is_empty();
            let matches = series.starts_with('{')
                && labels.iter().all(|(label, value)| series.contains(&format!("{label}=\"{value}\"")));
            (bare || matches).then(|| value.parse::<f64>().ok())?
        })
        .sum()
}

/// What a flow's entry in a node's map says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flow {
    /// Packets from the pod.
    pub tx_packets: u64,
    /// Bytes from the pod.
    pub tx_bytes: u64,
    /// Packets to the pod.
    pub rx_packets: u64,
    /// Bytes to the pod.
    pub rx_bytes: u64,
}

/// Finds a pod's flow towards a destination in the pinned map of its node, as `bpftool` prints it.
pub async fn flow(
    lab: &Lab,
    node: &str,
    protocol: u8,
    source: IpAddr,
    destination: (IpAddr, u16),
) -> Result<Flow> {
    find_flow(lab, node, protocol, source, None, destination).await
}

/// The same for the flow of one port of the pod.
pub async fn flow_of_port(
    lab: &Lab,
    node: &str,
    protocol: u8,
    source: (IpAddr, u16),
    destination: (IpAddr, u16),
) -> Result<Flow> {
    find_flow(lab, node, protocol, source.0, Some(source.1), destination).await
}

async fn find_flow(
    lab: &Lab,
    node: &str,
    protocol: u8,
    source: IpAddr,
    source_port: Option<u16>,
    destination: (IpAddr, u16),
) -> Result<Flow> {
    let family = if source.is_ipv4() { "v4" } else { "v6" };
    let map = format!("{}/v1/flows_{family}", paths::node_pins(node).display());
    let dump =
        exec(lab, &Target::Node(node.to_owned()), &["bpftool", "--json", "map", "dump", "pinned", &map])
            .await?;
    let dump: Value = serde_json::from_str(&dump).context("reading what bpftool printed")?;
    let entries = dump.as_array().context("bpftool printed no list")?;
    let (to, port) = destination;
    for entry in entries {
        let entry = entry.get("formatted").unwrap_or(entry);
        let (key, value) = (&entry["key"], &entry["value"]);
        if bytes(&key["src"]) == octets(source)
            && bytes(&key["dst"]) == octets(to)
            && bytes(&key["dst_port"]) == port.to_be_bytes()
            && number(&key["protocol"]) == Some(protocol.into())
            && source_port.is_none_or(|port| bytes(&key["src_port"]) == port.to_be_bytes())
        {
            let field = |name: &str| number(&value[name]).with_context(|| format!("{map}: no field {name}"));
            return Ok(Flow {
                tx_packets: field("tx_packets")?,
                tx_bytes: field("tx_bytes")?,
                rx_packets: field("rx_packets")?,
                rx_bytes: field("rx_bytes")?,
            });
        }
    }
    bail!("{map}: none of {} entries is the flow {source} -> [{to}]:{port}", entries.len())
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}

fn bytes(value: &Value) -> Vec<u8> {
    value.as_array().into_iter().flatten().filter_map(|byte| u8::try_from(number(byte)?).ok()).collect()
}

/// A number, which bpftool prints as such or as text, decimal or hexadecimal.
fn number(value: &Value) -> Option<u64> {
    value.as_u64().or_else(|| {
        let text = value.as_str()?;
        text.strip_prefix("0x").map_or_else(|| text.parse().ok(), |hex| u64::from_str_radix(hex, 16).ok())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn series_are_added_up_by_label() {
        let text = "# TYPE a counter\na{x=\"1\",y=\"2\"} 3\na{x=\"1\",y=\"3\"} 4\na{x=\"2\"} 5\na_b{x=\"1\"} 9\nc 7\n";
        assert_eq!(sum(text, "a", &[("x", "1")]), 7.0);
        assert_eq!(sum(text, "a", &[]), 12.0);
        assert_eq!(sum(text, "c", &[]), 7.0);
    }

    #[test]
    fn numbers_of_bpftool() {
        assert_eq!(number(&serde_json::json!(7)), Some(7));
        assert_eq!(number(&serde_json::json!("0x1f")), Some(31));
    }
}
