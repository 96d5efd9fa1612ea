//! One path walked in several ways, natively and in a virtual machine that counts instructions.
//!
//! Natively the yardsticks are plain routing and the kernel's VXLAN with masquerade. The kernel's FOU exists
//! in the virtual machine only; what it adds to plain routing is what ours is compared with.

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};
use serde::Deserialize;

use super::Figure;
use crate::process::{say, tee};
use crate::vm;

const UDP: &str = "UDP, 64 bytes";
const TCP: &str = "TCP, one stream";
const CONNECTIONS: &str = "new connections";

/// Our ways: by the stack of the node, and past it (`coild --shortcut`).
const WAYS: [&str; 2] = ["coil", "coil-shortcut"];

/// Families, each with each of our ways.
fn both() -> impl Iterator<Item = (&'static str, &'static str)> {
    ["v4", "v6"].into_iter().flat_map(|family| WAYS.map(|way| (family, way)))
}

/// One measurement of the benchmark program.
#[derive(Deserialize)]
struct Sample {
    way: String,
    family: String,
    load: String,
    unit: String,
    value: f64,
}

/// All of them.
#[derive(Default)]
struct Samples {
    /// By family, load and way, in the order of runs.
    values: BTreeMap<(String, String, String), Vec<f64>>,
    units: BTreeMap<String, String>,
    unreadable: Vec<String>,
}

impl Samples {
    fn line(&mut self, line: &str) {
        if !line.starts_with('{') {
            return;
        }
        match serde_json::from_str::<Sample>(line) {
            Ok(Sample { way, family, load, unit, value }) => {
                self.units.insert(load.clone(), unit);
                self.values.entry((family, load, way)).or_default().push(value);
            }
            Err(_) => self.unreadable.push(line.to_owned()),
        }
    }

    fn of(&self, family: &str, load: &str, way: &str) -> Result<&[f64]> {
        let key = (family.to_owned(), load.to_owned(), way.to_owned());
        let values =
            self.values.get(&key).with_context(|| format!("{family} {load}: {way} was not measured"))?;
        Ok(values)
    }

    /// The median of what `work` makes of two ways' values in the same run.
    fn pairs(
        &self,
        family: &str,
        load: &str,
        ways: [&str; 2],
        work: impl Fn(f64, f64) -> f64,
    ) -> Result<f64> {
        let [first, second] = [self.of(family, load, ways[0])?, self.of(family, load, ways[1])?];
        Ok(median(first.iter().zip(second).map(|(first, second)| work(*first, *second))))
    }

    /// The medians of every way themselves.
    fn plain(&self, where_: &str) -> Vec<Figure> {
        let figure = |((family, load, way), values): (&(String, String, String), &Vec<f64>)| {
            let unit = self.units.get(load).map_or("", String::as_str);
            Figure::plain(format!("{where_} {family} {load}: {way}"), median(values.iter().copied()), unit)
        };
        self.values.iter().map(figure).collect()
    }
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<_> = values.collect();
    values.sort_by(f64::total_cmp);
    match values.len() {
        0 => f64::NAN,
        length if length % 2 == 1 => values[length / 2],
        length => (values[length / 2 - 1] + values[length / 2]) / 2.0,
    }
}

fn at_least(name: String, value: f64, goal: f64) -> Figure {
    Figure { name, value, unit: "ratio".into(), goal: Some(format!(">= {goal}")), ok: value >= goal }
}

fn at_most(name: String, value: f64, goal: f64) -> Figure {
    Figure { name, value, unit: "ratio".into(), goal: Some(format!("<= {goal}")), ok: value <= goal }
}

/// On this machine's own kernel.
pub fn native() -> Result<Vec<Figure>> {
    let program = vm::benchmark("path")?;
    say("one path in five ways, natively");
    let mut samples = Samples::default();
    let mut command = std::process::Command::new(program);
    command.args(["seconds=2", "runs=5", "direct", "nat", "vxlan", "coil", "coil-shortcut"]);
    let succeeded = tee(&mut command, |line| samples.line(line))?;
    ensure!(succeeded && samples.unreadable.is_empty(), "the benchmark of paths failed");
    let mut figures = samples.plain("native");
    for (family, ours) in both() {
        for (load, direct, vxlan) in [(UDP, 0.85, 2.0), (TCP, 0.90, 1.4)] {
            let against = |way, goal| {
                let ratio = samples.pairs(family, load, [ours, way], |ours, other| ours / other)?;
                Ok::<_, anyhow::Error>(at_least(
                    format!("native {family} {load}: {ours} / {way}"),
                    ratio,
                    goal,
                ))
            };
            figures.push(against("direct", direct)?);
            figures.push(against("vxlan", vxlan)?);
        }
        let ratio = samples.pairs(family, CONNECTIONS, [ours, "vxlan"], |ours, other| ours / other)?;
        figures.push(Figure::plain(format!("native {family} {CONNECTIONS}: {ours} / vxlan"), ratio, "ratio"));
    }
    Ok(figures)
}

/// In a virtual machine in which an instruction takes a nanosecond.
pub fn counted() -> Result<Vec<Figure>> {
    let program = vm::benchmark("path")?;
    let mut samples = Samples::default();
    let arguments = ["seconds=1", "runs=5", "direct", "fou", "coil", "coil-shortcut"];
    vm::counted(&program, &arguments, |line| samples.line(line))?;
    ensure!(samples.unreadable.is_empty(), "unreadable: {:?}", samples.unreadable);
    let mut figures = samples.plain("counted");
    for (family, ours) in both() {
        let added = |way| samples.pairs(family, UDP, [way, "direct"], |way, direct| 1e6 / way - 1e6 / direct);
        let (added_here, fou) = (added(ours)?, added("fou")?);
        figures.push(Figure::plain(format!("counted {family} {UDP}: added by {ours}"), added_here, "µs"));
        if ours == WAYS[0] {
            figures.push(Figure::plain(format!("counted {family} {UDP}: added by fou"), fou, "µs"));
        }
        let name = format!("counted {family} {UDP}: added by {ours} / added by fou");
        figures.push(at_most(name, added_here / fou, 0.25));
        for (load, goal) in [(UDP, 1.5), (TCP, 1.4), (CONNECTIONS, 1.5)] {
            let ratio = samples.pairs(family, load, [ours, "fou"], |ours, fou| ours / fou)?;
            figures.push(at_least(format!("counted {family} {load}: {ours} / fou"), ratio, goal));
        }
    }
    Ok(figures)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ratios_are_those_of_the_same_run() {
        let mut samples = Samples::default();
        for (way, value) in
            [("coil", 2.0), ("fou", 1.0), ("coil", 9.0), ("fou", 3.0), ("coil", 8.0), ("fou", 2.0)]
        {
            samples.line(&format!(
                r#"{{"way":"{way}","family":"v4","load":"{UDP}","unit":"u","run":0,"value":{value}}}"#
            ));
        }
        samples.line("not JSON");
        assert!(samples.unreadable.is_empty());
        let ratio = samples.pairs("v4", UDP, ["coil", "fou"], |coil, fou| coil / fou).ok();
        assert_eq!(ratio, Some(3.0));
        assert!(samples.of("v6", UDP, "coil").is_err());
        assert_eq!(samples.plain("x").len(), 2);
    }
}
