//! What pods leave on a node and in the API, to be compared before and after: whatever is made for a pod must go with
//! it.

use std::collections::BTreeSet;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::drive::{exec, get, until};
use crate::{Lab, Target, paths};

/// Maps of the node's programs whose entries are about pods.
const MAPS: [&str; 6] = ["pods", "pod_names", "near_v4", "near_v6", "policy_v4", "policy_v6"];
/// Tables of routes to pods and of exported blocks.
const TABLES: [&str; 2] = ["116", "119"];

/// What there is of pods on one node, each thing as a line.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Footprint(BTreeSet<String>);

impl Footprint {
    /// Looks at a node.
    pub async fn of(lab: &Lab, node: &str) -> Result<Self> {
        let mut lines = BTreeSet::new();
        let place = Target::Node(node.to_owned());
        let links = exec(lab, &place, &["ip", "-j", "link", "show", "type", "veth"]).await?;
        for link in list(&links)? {
            lines.insert(format!("link {} of {}", link["ifname"], link["ifalias"]));
        }
        for family in ["-4", "-6"] {
            for table in TABLES {
                let shown = exec(lab, &place, &["ip", "-j", family, "route", "show", "table", table]).await;
                // A table that nobody has used yet is an error to iproute2.
                for route in shown.map_or_else(|_| Ok(Vec::new()), |text| list(&text))? {
                    lines.insert(format!("table {table}: {} over {}", route["dst"], route["dev"]));
                }
            }
            for rule in list(&exec(lab, &place, &["ip", "-j", family, "rule"]).await?)? {
                lines.insert(format!("rule {family} {rule}"));
            }
        }
        let pins = paths::node_pins(node).join("v1");
        for map in MAPS {
            let file = pins.join(map).display().to_string();
            let dump = exec(lab, &place, &["bpftool", "--json", "map", "dump", "pinned", &file]).await?;
            for entry in list(&dump)? {
                let entry = entry.get("formatted").unwrap_or(&entry);
                lines.insert(format!("entry of {map}: {}", entry["key"]));
            }
        }
        let pinned = std::fs::read_dir(pins.join("links")).context("reading the folder of pinned links")?;
        for link in pinned {
            lines.insert(format!("pinned link {}", link?.file_name().display()));
        }
        let selector = format!("coil.cybozu.com/node={node}");
        for kind in ["addressblocks", "blockrequests"] {
            let found = get(lab, &[kind, "--selector", &selector]).await?;
            for object in found["items"].as_array().context("no list")? {
                lines.insert(format!("{kind} {}", object["metadata"]["name"]));
            }
        }
        Ok(Self(lines))
    }

    /// What is there now and was not before.
    pub fn beyond<'a>(&'a self, before: &'a Self) -> Vec<&'a str> {
        self.0.difference(&before.0).map(String::as_str).collect()
    }
}

/// Waits until a node has nothing beyond, and nothing less than, what it had.
pub async fn nothing_left(lab: &Lab, node: &str, before: &Footprint) -> Result<()> {
    until(&format!("{node} is as it was"), || async {
        let now = Footprint::of(lab, node).await?;
        let (more, less) = (now.beyond(before), before.beyond(&now));
        ensure!(more.is_empty() && less.is_empty(), "left behind: {more:?}; missing: {less:?}");
        Ok(())
    })
    .await
}

/// What `ip` and `bpftool` print is a list, or nothing.
fn list(text: &str) -> Result<Vec<Value>> {
    if text.trim().is_empty() {
        return Ok(Vec::new());
    }
    serde_json::from_str(text).with_context(|| format!("no list: {text}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_more_and_what_is_less() {
        let of = |lines: &[&str]| Footprint(lines.iter().map(|line| (*line).to_owned()).collect());
        let (before, after) = (of(&["a", "b"]), of(&["b", "c"]));
        assert_eq!((after.beyond(&before), before.beyond(&after)), (vec!["c"], vec!["a"]));
        assert!(before.beyond(&before).is_empty());
    }
}
