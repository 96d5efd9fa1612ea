//! What it costs to give a pod its network: ADD and DEL of the node's CNI list in the lab, against the reference
//! plugins `ptp` with `host-local` in the same node, alone and many at a time.
//!
//! Programs are those that are shipped: optimised, and the CNI plugin a small static one.
//!
//! Both are run as the lab's kubelet runs them: a process for each plugin, fed the result of the one before. Runs
//! alone alternate, so that a change of the machine's speed meets both alike. Pods are objects that the kubelet leaves
//! alone, since their networks are made here.

use std::fmt::Write;
use std::future::Future;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use coil_lab::cni::Attachment;
use coil_lab::drive::{apply, fresh};
use coil_lab::netns::Netns;
use coil_lab::options::Networking;
use coil_lab::topology::Node;
use coil_lab::{Family, Lab, MIRROR_ANNOTATION, Options, paths};
use serde_json::{Value, json};
use tokio::task::JoinSet;

use super::Figure;
use crate::process::say;
use crate::programs;

/// Pods that a node holds, as the kubelet has them at most with common settings.
const PODS: usize = 250;
/// Runs alone.
const ALONE: usize = 100;
/// Runs at a time.
const TOGETHER: usize = 100;
/// Pods are made so many at a time where only their number counts.
const BATCH: usize = 25;
/// Bounds of issue 4.
const ALONE_P99_MS: f64 = 25.0;
const TOGETHER_S: f64 = 2.0;
const NAMESPACE: &str = "bench-cni";

/// Brings a lab up, measures, and removes it.
pub async fn measure() -> Result<Vec<Figure>> {
    let programs = programs::build()?;
    let options = Options {
        nodes: 1,
        family: Family::Dual,
        networking: Networking::Coil,
        programs: Some(programs.hypercoil),
        plugin: Some(programs.plugin),
        ..Options::for_xtask()?
    };
    let lab = fresh(options, |step| say(step)).await?;
    let figures = with_pods(&lab).await;
    Lab::down(|step| say(step))?;
    figures
}

async fn with_pods(lab: &Lab) -> Result<Vec<Figure>> {
    let node = lab.topology().nodes.first().context("the lab has no node")?.clone();
    apply(lab, &manifest(&node)).await?;
    let spaces = Spaces::make(PODS)?;
    let bench = Bench { lab, node: &node, spaces: &spaces, ours: list(&node)?, reference: reference(&node) };
    bench.run().await
}

/// Pods with their namespace.
fn manifest(node: &Node) -> String {
    let mut text = format!("apiVersion: v1\nkind: Namespace\nmetadata: {{name: {NAMESPACE}}}\n");
    for number in 0..PODS {
        let pod = json!({
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {
                "namespace": NAMESPACE,
                "name": format!("p{number}"),
                "annotations": { MIRROR_ANNOTATION: "bench" },
            },
            "spec": { "nodeName": node.name, "containers": [{ "name": "main", "image": "pause" }] },
        });
        // Writing to a string cannot fail.
        if write!(text, "---\n{pod}\n").is_err() {
            break;
        }
    }
    text
}

/// The node's own list. If other plugins wire the pods, these get addresses for all of them.
fn list(node: &Node) -> Result<Value> {
    let path = paths::node(&node.name).join("10-lab.conflist");
    let text = std::fs::read(&path).with_context(|| format!("reading {}", path.display()))?;
    let mut list: Value = serde_json::from_slice(&text)?;
    let wires = reference(node)["plugins"][0].clone();
    for plugin in list["plugins"].as_array_mut().context("a list without plugins")? {
        if plugin["type"] == wires["type"] {
            *plugin = wires.clone();
        }
    }
    Ok(list)
}

/// `ptp` with `host-local`, with room for all pods.
fn reference(node: &Node) -> Value {
    json!({
        "cniVersion": "1.0.0",
        "name": "coil-bench",
        "plugins": [{
            "type": "ptp",
            "mtu": 1500,
            "ipMasq": false,
            "ipam": {
                "type": "host-local",
                "dataDir": paths::cni().join("host-local").join(format!("bench-{}", node.name)),
                "ranges": [[{ "subnet": "10.250.0.0/22" }], [{ "subnet": "fd00:10:250::/112" }]],
                "routes": [{ "dst": "0.0.0.0/0" }, { "dst": "::/0" }],
            },
        }],
    })
}

struct Bench<'a> {
    lab: &'a Lab,
    node: &'a Node,
    spaces: &'a Spaces,
    ours: Value,
    reference: Value,
}

/// Times of ADD and of DEL.
#[derive(Default)]
struct Times {
    add: Vec<Duration>,
    del: Vec<Duration>,
}

impl Bench<'_> {
    async fn run(&self) -> Result<Vec<Figure>> {
        let mut figures = Vec::new();
        let lists = [("coil", &self.ours), ("ptp + host-local", &self.reference)];
        // The first of each is not counted: files are read, modules loaded.
        for (_, list) in lists {
            self.once(list, 0, &mut Times::default()).await?;
        }
        let mut alone = [Times::default(), Times::default()];
        for number in 0..ALONE {
            for ((_, list), times) in lists.iter().zip(&mut alone) {
                self.once(list, number, times).await?;
            }
        }
        for ((name, _), times) in lists.iter().zip(&alone) {
            let bound = (*name == "coil").then_some(ALONE_P99_MS);
            figures.extend(percentiles(&format!("ADD alone: {name}"), &times.add, bound));
            figures.extend(percentiles(&format!("DEL alone: {name}"), &times.del, None));
        }
        for (name, list) in lists {
            let (attached, times, took) = self.add(list, 0..TOGETHER, TOGETHER).await?;
            let bound = (name == "coil").then_some(TOGETHER_S);
            figures.push(at_most(
                format!("{TOGETHER} ADDs in parallel: {name}"),
                took.as_secs_f64(),
                "s",
                bound,
            ));
            figures.extend(percentiles(&format!("ADD, {TOGETHER} in parallel: {name}"), &times, None));
            let (times, took) = self.delete(attached).await?;
            figures.push(Figure::plain(
                format!("{TOGETHER} DELs in parallel: {name}"),
                took.as_secs_f64(),
                "s",
            ));
            figures.extend(percentiles(&format!("DEL, {TOGETHER} in parallel: {name}"), &times, None));
        }
        let memory = self.memory_of_coild()?;
        figures.push(Figure::plain("resident memory of coild without pods", memory, "MiB"));
        let (attached, _, took) = self.add(&self.ours, 0..PODS, BATCH).await?;
        let rate = PODS as f64 / took.as_secs_f64();
        figures.push(Figure::plain(format!("pods wired, {BATCH} at a time: coil"), rate, "1/s"));
        let memory = self.memory_of_coild()?;
        figures.push(Figure::plain(format!("resident memory of coild with {PODS} pods"), memory, "MiB"));
        self.delete(attached).await?;
        Ok(figures)
    }

    /// ADD and DEL of one pod.
    async fn once(&self, list: &Value, number: usize, times: &mut Times) -> Result<()> {
        let mut attachment = self.attachment(list, number);
        let (added, took) = timed(attachment.add()).await;
        times.add.push(took);
        let (deleted, took) = timed(attachment.delete()).await;
        times.del.push(took);
        added.context("ADD")?;
        ensure!(!attachment.addresses().is_empty(), "ADD gave no address");
        deleted.context("DEL")
    }

    /// ADDs pods, at most `at_a_time` at a time; all are undone if one fails.
    async fn add(
        &self,
        list: &Value,
        numbers: std::ops::Range<usize>,
        at_a_time: usize,
    ) -> Result<(Vec<Attachment>, Vec<Duration>, Duration)> {
        let mut waiting: Vec<Attachment> = numbers.map(|number| self.attachment(list, number)).collect();
        let mut running = JoinSet::new();
        let (mut attached, mut times, mut failure) = (Vec::new(), Vec::new(), None);
        let start = Instant::now();
        loop {
            while running.len() < at_a_time
                && let Some(mut attachment) = waiting.pop()
            {
                running.spawn(async move {
                    let (outcome, took) = timed(attachment.add()).await;
                    (attachment, outcome, took)
                });
            }
            let Some(ended) = running.join_next().await else { break };
            let (attachment, outcome, took) = ended?;
            attached.push(attachment);
            times.push(took);
            failure = failure.or(outcome.err());
        }
        let took = start.elapsed();
        if let Some(failure) = failure {
            self.delete(attached).await?;
            return Err(failure).context("ADD");
        }
        Ok((attached, times, took))
    }

    /// DELs pods, all at a time.
    async fn delete(&self, attached: Vec<Attachment>) -> Result<(Vec<Duration>, Duration)> {
        let start = Instant::now();
        let mut running = JoinSet::new();
        for attachment in attached {
            running.spawn(async move { timed(attachment.delete()).await });
        }
        let (mut times, mut first) = (Vec::new(), Ok(()));
        while let Some(ended) = running.join_next().await {
            let (outcome, took) = ended?;
            times.push(took);
            first = first.and(outcome);
        }
        first.context("DEL")?;
        Ok((times, start.elapsed()))
    }

    fn attachment(&self, list: &Value, number: usize) -> Attachment {
        Attachment {
            container_id: format!("bench{number:04}"),
            namespace: NAMESPACE.to_owned(),
            name: format!("p{number}"),
            uid: format!("bench{number}"),
            netns: self.spaces.0[number].clone(),
            node_netns: self.node.netns.clone(),
            marker: self.lab.id().to_owned(),
            config: list.clone(),
            result: None,
        }
    }

    /// Resident memory in MiB.
    fn memory_of_coild(&self) -> Result<f64> {
        let marker = format!("{}={}", paths::MARKER, self.lab.id());
        for entry in std::fs::read_dir("/proc")? {
            let folder = entry?.path();
            // A process may end while we look.
            let read = |name: &str| std::fs::read(folder.join(name)).unwrap_or_default();
            let is_coild = read("cmdline")
                .split(|byte| *byte == 0)
                .next()
                .is_some_and(|argument| argument == b"coild" || argument.ends_with(b"/coild"));
            if !is_coild || !read("environ").split(|byte| *byte == 0).any(|line| line == marker.as_bytes()) {
                continue;
            }
            let status = String::from_utf8_lossy(&read("status")).into_owned();
            let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS")?;
            let kib: f64 = line.trim().trim_end_matches("kB").trim().parse().context("reading VmRSS")?;
            return Ok(kib / 1024.0);
        }
        anyhow::bail!("coild does not run")
    }
}

async fn timed<T>(work: impl Future<Output = T>) -> (T, Duration) {
    let start = Instant::now();
    let outcome = work.await;
    (outcome, start.elapsed())
}

fn percentiles(name: &str, times: &[Duration], p99: Option<f64>) -> [Figure; 2] {
    let mut times: Vec<f64> = times.iter().map(|time| time.as_secs_f64() * 1000.0).collect();
    times.sort_by(f64::total_cmp);
    // Of a hundred the last but one.
    let at =
        |percent: usize| times.get((times.len() * percent).div_ceil(100).max(1) - 1).copied().unwrap_or(0.0);
    [Figure::plain(format!("{name}, p50"), at(50), "ms"), at_most(format!("{name}, p99"), at(99), "ms", p99)]
}

fn at_most(name: String, value: f64, unit: &str, most: Option<f64>) -> Figure {
    match most {
        Some(most) => Figure::at_most(name, value, unit, most),
        None => Figure::plain(name, value, unit),
    }
}

/// Network name spaces of pods, removed at the end.
struct Spaces(Vec<Netns>);

impl Spaces {
    fn make(number: usize) -> Result<Self> {
        let mut spaces = Self(Vec::new());
        for number in 0..number {
            let space = Netns::of(&format!("bench-{number}"));
            space.remove()?;
            space.create()?;
            spaces.0.push(space.clone());
            // As the kubelet's sandboxes have it: detection of duplicates would be all that is measured.
            let values =
                [("net/ipv6/conf/default/accept_dad", "0"), ("net/ipv6/conf/default/dad_transmits", "0")];
            space.sysctls(&values)??;
        }
        Ok(spaces)
    }
}

impl Drop for Spaces {
    fn drop(&mut self) {
        for space in &self.0 {
            if let Err(error) = space.remove() {
                eprintln!("{error}");
            }
        }
    }
}
