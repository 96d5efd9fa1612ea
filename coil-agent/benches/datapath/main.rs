//! What one packet costs in each program on each path: nanoseconds by `BPF_PROG_TEST_RUN`, warm and
//! with the cost of measuring taken off, and BPF instructions by executing them (see `instructions`).
//!
//! `cargo xtask bench datapath` runs this. Prints one JSON object a line: name, value, unit, goal, ok.

mod fill;
mod instructions;
mod kernel;
mod pieces;
mod scene;

use anyhow::{Context, Result, ensure};
use coil_common::names;

use instructions::Machine;
use kernel::Kernel;

/// Runs of each path whose median is told.
const RUNS: usize = 20_000;
/// Runs before, which are not counted.
const WARM: usize = 2_000;

fn main() -> Result<()> {
    let asked = |what: &str| std::env::args().any(|argument| argument == what);
    blocks()?;
    if asked("pieces") {
        return Ok(());
    }
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../target/bpf/coil-ebpf.o");
    let object =
        std::fs::read(path).with_context(|| format!("reading {path}: run `cargo xtask build-ebpf`"))?;
    let config = scene::config();
    let mut kernel = Kernel::new(&object, &config)?;
    let globals = [(coil_common::config::CONFIG, bytemuck::bytes_of(&config))];
    let mut machine = Machine::new(&object, &globals)?;
    for entry in scene::entries() {
        kernel.insert(&entry)?;
    }
    for path in scene::paths() {
        let forget =
            |kernel: &mut Kernel| path.forget.iter().try_for_each(|(map, key)| kernel.remove(map, key));
        let nanoseconds = time(&mut kernel, path.program, path.action, |_| path.frame.clone(), forget)
            .with_context(|| path.name.clone())?;
        bounded(&format!("{} time", path.name), nanoseconds, "ns", goal(&path.name));

        machine.clear();
        for entry in scene::entries() {
            machine.insert(entry.map, &entry.key, &entry.value)?;
        }
        // A flow is established once it has sent a few packets.
        let mut run = machine.run(path.program, &path.frame, scene::IFINDEX)?;
        if path.forget.is_empty() {
            for _ in 0..3 {
                run = machine
                    .run(path.program, &path.frame, scene::IFINDEX)
                    .with_context(|| path.name.clone())?;
            }
        }
        ensure!(
            run.action == path.action,
            "{}: returned {} when counted, not {}",
            path.name,
            run.action,
            path.action
        );
        figure(&format!("{} instructions", path.name), run.instructions as f64, "BPF instructions");
        figure(&format!("{} helpers", path.name), run.helpers as f64, "helper calls");
    }
    let mut empty = std::collections::BTreeMap::new();
    fill::measure(&mut kernel, |name, level, one, any| {
        figure(&format!("{name}, {level} tracked, one of them time"), one, "ns");
        figure(&format!("{name}, {level} tracked, any of them time"), any, "ns");
        let first = *empty.entry(name.to_owned()).or_insert(one);
        if level > 1 {
            bounded(&format!("{name}, {level} tracked / 1 tracked"), one / first, "ratio", Some(1.5));
        }
    })?;
    // Of the tables as the last level has left them.
    let tracked = fill::LEVELS.iter().max().map_or(1.0, |level| f64::from(*level));
    for (name, maps, most) in [
        ("memory of a flow at the node", &[names::MAP_FLOWS_V4][..], 256.0),
        (
            "memory of a translation at the gateway, both directions",
            &[names::MAP_NAT_FORWARD_V4, names::MAP_NAT_REVERSE_V4],
            384.0,
        ),
    ] {
        let bytes = maps.iter().map(|map| kernel.memory(map)).sum::<Result<u64>>()?;
        bounded(name, bytes as f64 / tracked, "bytes", Some(most));
    }
    Ok(())
}

/// What programs are made of.
fn blocks() -> Result<()> {
    let path = scene::paths().into_iter().next().context("no path")?;
    for (name, first, more) in pieces::measure(&path.frame)? {
        figure(&format!("{name}, once"), first, "ns");
        if let Some(more) = more {
            figure(&format!("{name}, again"), more, "ns");
        }
    }
    Ok(())
}

/// Median time of a program over that of one that does nothing. Each run has a packet of its own;
/// `before` is called before it.
fn time(
    kernel: &mut Kernel,
    program: &str,
    action: i32,
    frame: impl Fn(usize) -> Vec<u8>,
    mut before: impl FnMut(&mut Kernel) -> Result<()>,
) -> Result<f64> {
    let mut samples = Vec::with_capacity(RUNS);
    let mut nothing = Vec::with_capacity(RUNS);
    for run in 0..WARM + RUNS {
        before(kernel)?;
        let frame = frame(run);
        let empty = kernel.run_nothing(&frame)?;
        let (taken, found) = kernel.run(program, &frame)?;
        ensure!(found == action, "{program} returned {found}, not {action}");
        if run >= WARM {
            samples.push(taken);
            nothing.push(empty);
        }
    }
    Ok(f64::from(median(samples)) - f64::from(median(nothing)))
}

fn median(mut values: Vec<u32>) -> u32 {
    values.sort_unstable();
    values[values.len() / 2]
}

/// What a packet of an established flow may cost.
fn goal(path: &str) -> Option<f64> {
    if !path.contains("established flow") {
        None
    } else if path.starts_with("gateway") {
        Some(200.0)
    } else {
        Some(120.0)
    }
}

fn figure(name: &str, value: f64, unit: &str) {
    bounded(name, value, unit, None);
}

/// Prints a figure and the bound that it should keep.
fn bounded(name: &str, value: f64, unit: &str, most: Option<f64>) {
    println!(
        "{}",
        serde_json::json!({
            "name": name,
            "value": value,
            "unit": unit,
            "goal": most.map(|most| format!("<= {most}")),
            "ok": most.is_none_or(|most| value <= most),
        })
    );
}
