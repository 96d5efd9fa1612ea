//! Rates through the lab: a client pod through its egress against a plain pod that is only routed.
//!
//! Both pods are on the same node and talk to the same external host. The plain pod's packets cross
//! node and router; the client's cross node, router, the other node, the egress pod and back. Runs
//! alternate, so that a change of the machine's speed meets both alike; the ratio is the median of
//! the ratios of pairs.

use anyhow::{Context, Result, ensure};
use coil_lab::drive::{apply, exec, pod, until, wait_for};
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
    let figures = match Lab::up(options, |step| say(step)).await {
        Ok(lab) => rates(&lab).await,
        Err(error) => Err(error.into()),
    };
    Lab::down(|step| say(step))?;
    figures
}

async fn rates(lab: &Lab) -> Result<Vec<Figure>> {
    apply(lab, MANIFEST).await?;
    wait_for(lab, "condition=Ready", "bench-egress", &["egress/all"]).await?;
    wait_for(lab, "condition=Ready", "bench", &["pod", "--all"]).await?;
    let server = Server::start(lab)?;
    let mut figures = Vec::new();
    for (family, address) in external(lab)? {
        for (what, unit, run) in
            [("TCP, one stream", "Gbit/s", tcp as Run), ("UDP, 64 bytes", "packets/s", udp as Run)]
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
            figures.push(Figure::plain(format!("{family} {what}: egress / routed"), median(ratios), "ratio"));
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
    fn start(lab: &Lab) -> Result<Self> {
        let mut command = lab.command(&Target::External, &["iperf3", "--server"])?;
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
        let report = until("iperf3 answers", || exec(lab, &target, &argv)).await?;
        let report: Value = serde_json::from_str(&report).context("reading iperf3's report")?;
        let rate = read(&report).with_context(|| format!("iperf3 from {name}: no rate in its report"))?;
        ensure!(rate > 0.0, "iperf3 from {name} moved nothing");
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
