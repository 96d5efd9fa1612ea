//! One path, walked in several ways: what a tunnel and a translation cost on top of plain routing.
//!
//! ```text
//! client pod --- node --- egress pod        all hops are veth pairs, MTU 1500
//!                 |
//!              external
//! ```
//!
//! Each way has a network of its own, and all exist at the same time; runs take turns over them, so that a
//! change of the machine's speed meets all alike. Arguments: `seconds=N runs=N`, `only=TEXT` for loads whose family
//! and name contain it (`only="v4 UDP"`), and names of ways.
//! Prints one JSON object for each measurement. Needs root and the eBPF object; `cargo xtask bench` runs it
//! here and, with instructions counted, in a virtual machine.

#[expect(dead_code, reason = "shared with the privileged tests, which use all of it")]
#[path = "../../tests/privileged/support/mod.rs"]
mod support;

#[expect(dead_code, reason = "shared with the tests of interoperability, which use all of it")]
#[path = "../../tests/interop/kernel.rs"]
mod kernel;

mod load;
mod ways;

use anyhow::{Context, Result};
use serde_json::json;

use load::Load;
use ways::Way;

fn main() -> Result<()> {
    let (mut seconds, mut runs, mut only, mut names) = (2, 5, String::new(), Vec::new());
    for argument in std::env::args().skip(1) {
        match argument.split_once('=') {
            Some(("seconds", value)) => seconds = value.parse().context("seconds")?,
            Some(("runs", value)) => runs = value.parse().context("runs")?,
            Some(("only", value)) => value.clone_into(&mut only),
            _ if argument.starts_with("--") => {}
            _ => names.push(argument),
        }
    }
    let ways: Vec<Way> = names.iter().map(|name| Way::new(name)).collect::<Result<_>>()?;
    for way in &ways {
        for v6 in [false, true] {
            way.check(v6)?;
        }
    }
    for run in 0..runs {
        for v6 in [false, true] {
            let family = if v6 { "v6" } else { "v4" };
            for load in Load::ALL {
                if !format!("{family} {}", load.name()).contains(&only) {
                    continue;
                }
                for way in &ways {
                    let value = load
                        .measure(way, v6, seconds)
                        .with_context(|| format!("{} over {}, v6: {v6}", load.name(), way.name))?;
                    println!(
                        "{}",
                        json!({ "way": way.name, "family": family, "load": load.name(), "unit": load.unit(),
                                "run": run, "value": value })
                    );
                }
            }
        }
    }
    Ok(())
}
