//! Rates through the lab: a client pod through its egress against a plain pod that is only routed.
//!
//! Both pods are on the same node and talk to the same external host. The plain pod's packets cross
//! node and router; the client's cross node, router, the other node, the egress pod and back. Runs
//! alternate, so that a change of the machine's speed meets both alike; the ratio is the median of
//! the ratios of pairs.

use anyhow::{Context, Result};
use coil_lab::drive::{apply, exec, fresh, pod, until, wait_for};
use coil_lab::{Family, Lab, Options, Target};
use serde_json::Value;

use super::Figure;
use crate::process::say;

/// Pairs of runs.
const PAIRS: usize = 5;
/// Length of a run in seconds.
const SECONDS: &str = "2";

const MANIFEST: &str = include_str!("traffic.yaml");

/// Brings a lab up, measures, and removes it.
pub async fn measure() -> Result<Vec<Figure>> {
    let options = Options { family: Family::Dual, ..Options::for_xtask()? };
    let lab = fresh(options, |step| say(step)).await?;
    let figures = rates(&lab).await;
    Lab::down(|step| say(step))?;
    figures
}

async fn rates(lab: &Lab) -> Result<Vec<Figure>> {
    apply(lab, MANIFEST).await?;
    wait_for(lab, "condition=Ready", "bench-egress", &["egress/all"]).await?;
    wait_for(lab, "condition=Ready", "bench", &["pod", "--all"]).await?;
    let mut figures = Vec::new();
    for (family, address) in external(lab)? {
        let server = Server::start(lab, &address)?;
        for (what, unit, run, least) in
            [("TCP, one stream", "Gbit/s", tcp as Run, 0.9), ("UDP, 64 bytes", "packets/s", udp as Run, 0.85)]
        {
            let mut plain = Vec::new();
            let mut egress = Vec::new();
            for _ in 0..PAIRS {
                plain.push(server.client(lab, "plain", &address, run).await?);
                egress.push(server.client(lab, "client", &address, run).await?);
            }
            let ratios = egress.iter().zip(&plain).map(|(egress, plain)| egress / plain).collect();
            figures.push(Figure::plain(format!("{family} {what}: routed only"), median(plain), unit));
            figures.push(Figure::plain(format!("{family} {what}: through egress"), median(egress), unit));
            let name = format!("{family} {what}: egress / routed");
            figures.push(Figure::at_least(name, median(ratios), "ratio", least));
        }
    }
    Ok(figures)
}

/// One external address for each family.
fn external(lab: &Lab) -> Result<Vec<(&'static str, String)>> {
    let addresses = &lab.topology().external.addresses;
    [("v4", true), ("v6", false)]
        .into_iter()
        .map(|(name, v4)| {
            let found = addresses.iter().find(|address| address.is_ipv4() == v4);
            let found = found.with_context(|| format!("the external host has no {name} address"))?;
            Ok((name, found.to_string()))
        })
        .collect()
}

/// Arguments of the sender, and how to read the rate from its report.
type Run = fn() -> (&'static [&'static str], fn(&Value) -> Option<f64>);

fn tcp() -> (&'static [&'static str], fn(&Value) -> Option<f64>) {
    (&[], |report| Some(report["end"]["sum_received"]["bits_per_second"].as_f64()? / 1e9))
}

fn udp() -> (&'static [&'static str], fn(&Value) -> Option<f64>) {
    (&["--udp", "--length", "64", "--bitrate", "0"], |report| {
        // What arrived, not what was sent.
        let sum = &report["end"]["sum"];
        let received = sum["packets"].as_f64()? - sum["lost_packets"].as_f64()?;
        Some(received / sum["seconds"].as_f64()?)
    })
}

/// The receiver in the external namespace; ends with this value.
struct Server {
    child: std::process::Child,
}

impl Server {
    /// Bound to the address: the host has several, and answers over UDP must come from the right one.
    fn start(lab: &Lab, address: &str) -> Result<Self> {
        let mut command = lab.command(&Target::External, &["iperf3", "--server", "--bind", address])?;
        command.stdin(std::process::Stdio::null()).stdout(std::process::Stdio::null());
        Ok(Self { child: command.spawn().context("starting iperf3")? })
    }

    async fn client(&self, lab: &Lab, name: &str, address: &str, run: Run) -> Result<f64> {
        let (arguments, read) = run();
        let target = pod("bench", name);
        let argv: Vec<String> = ["iperf3", "--json", "--client", address, "--time", SECONDS]
            .iter()
            .chain(arguments)
            .map(|word| (*word).to_owned())
            .collect();
        // The server refuses a test while it winds up the one before.
        let rate = until("iperf3 moves data", || async {
            let report = exec(lab, &target, &argv).await?;
            let report: Value = serde_json::from_str(&report).context("reading iperf3's report")?;
            read(&report)
                .filter(|rate| *rate > 0.0)
                .with_context(|| format!("iperf3 from {name}: no rate in its report: {}", report["error"]))
        })
        .await?;
        eprintln!(
            "  {} from {name} to {address}: {rate:.2}",
            if arguments.is_empty() { "TCP" } else { "UDP" }
        );
        Ok(rate)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It is our child: both calls can only fail if it has ended already.
        let ended = self.child.kill().and_then(|()| self.child.wait());
        if let Err(error) = ended {
            eprintln!("iperf3: {error}");
        }
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
