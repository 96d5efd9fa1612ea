//! `drops`: dropped packets by reason, with what the reason means.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use coil_common::names::MAP_DROPS;
use coil_common::stats::DropReason;
use coil_common::values::Counter;
use serde::Serialize;

use super::args::{Drops, Format};
use super::node::{Node, open};
use super::remedy::remedy;
use super::{InspectError, Outcome, output};

#[derive(Clone, Serialize)]
#[serde(rename_all = "camelCase")]
struct Item {
    /// `node`, or the name of an egress pod.
    r#where: String,
    reason: String,
    packets: u64,
    bytes: u64,
    description: String,
    remedy: Option<&'static str>,
}

/// Name of a reason, also of one that a newer datapath has.
pub(crate) fn name(index: u32) -> String {
    DropReason::from_index(index).map_or_else(|| format!("reason_{index}"), |reason| reason.name().to_owned())
}

/// What a reason means.
pub(crate) fn description(index: u32) -> String {
    match DropReason::from_index(index) {
        Some(reason) => reason.description().trim().trim_end_matches('.').to_owned(),
        None => "A reason that this coilctl does not know".into(),
    }
}

fn counters(folder: &Path) -> Result<BTreeMap<u32, Counter>, InspectError> {
    let Some(map) = open::<u32, Counter>(folder, MAP_DROPS)? else { return Ok(BTreeMap::new()) };
    (0..map.info().max_entries)
        .map(|index| {
            let counter = map.counter(index).map_err(InspectError::pin("read", &folder.join(MAP_DROPS)))?;
            Ok((index, counter))
        })
        .collect()
}

/// Counters by place and reason.
type Picture = BTreeMap<(String, u32), Counter>;

fn picture(node: &Node) -> Result<Picture, InspectError> {
    let mut all = Picture::new();
    for (index, counter) in counters(&node.folder)? {
        all.insert(("node".into(), index), counter);
    }
    for gateway in node.list_gateways()? {
        match counters(&gateway.folder) {
            Ok(counters) => {
                for (index, counter) in counters {
                    all.insert((gateway.label.clone(), index), counter);
                }
            }
            // It has ended meanwhile.
            Err(_) if !gateway.folder.exists() => {}
            Err(error) => return Err(error),
        }
    }
    Ok(all)
}

fn items(new: &Picture, old: &Picture, options: &Drops) -> Vec<Item> {
    let Drops { all, reason, place: only, .. } = options;
    let mut items = Vec::new();
    for ((place, index), counter) in new {
        let elsewhere = only.as_ref().is_some_and(|only| only != place);
        if elsewhere || (!reason.is_empty() && !reason.contains(&name(*index))) {
            continue;
        }
        let before = old.get(&(place.clone(), *index)).copied().unwrap_or_default();
        let packets = counter.packets.wrapping_sub(before.packets);
        if packets == 0 && !*all {
            continue;
        }
        items.push(Item {
            r#where: place.clone(),
            reason: name(*index),
            packets,
            bytes: counter.bytes.wrapping_sub(before.bytes),
            description: description(*index),
            remedy: DropReason::from_index(*index).and_then(remedy),
        });
    }
    // The node first, then what is most.
    items.sort_by_key(|item| (item.r#where != "node", item.r#where.clone(), std::cmp::Reverse(item.packets)));
    items
}

fn print(items: &[Item], format: Format, if_empty: &str) -> Result<(), InspectError> {
    if format == Format::Json {
        return output::json_list("DropList", items);
    }
    let wide = format == Format::Wide;
    let rows: Vec<Vec<String>> = items
        .iter()
        .map(|item| {
            let mut row = vec![
                item.r#where.clone(),
                item.reason.clone(),
                item.packets.to_string(),
                item.bytes.to_string(),
                item.description.clone(),
            ];
            if wide {
                row.push(item.remedy.unwrap_or_default().to_owned());
            }
            row
        })
        .collect();
    let headers: &[&str] = if wide {
        &["WHERE", "REASON", "PACKETS", "BYTES", "MEANING", "WHAT TO DO"]
    } else {
        &["WHERE", "REASON", "PACKETS", "BYTES", "MEANING"]
    };
    output::table(headers, &rows, if_empty)
}

/// A reason that nothing here knows is a mistake. A place may be on another node.
fn check(options: &Drops, picture: &Picture) -> Result<(), InspectError> {
    let known = |reason: &String| picture.keys().any(|(_, index)| name(*index) == *reason);
    match options.reason.iter().find(|reason| !known(reason)) {
        Some(reason) => Err(InspectError::NoReason { reason: reason.clone() }),
        None => Ok(()),
    }
}

/// Runs the command.
pub(crate) async fn run(node: &Node, format: Format, options: &Drops) -> Result<Outcome, InspectError> {
    let Drops { watch, interval, count, .. } = options;
    let mut last = picture(node)?;
    check(options, &last)?;
    if !*watch {
        print(&items(&last, &Picture::new(), options), format, "Nothing has been dropped.")?;
        return Ok(Outcome::Done);
    }
    let mut rounds = 0u64;
    while count.is_none_or(|count| rounds < count) {
        tokio::select! {
            () = tokio::time::sleep(Duration::from_secs(*interval)) => {}
            _ = tokio::signal::ctrl_c() => break,
        }
        let now = picture(node)?;
        print(&items(&now, &last, options), format, "-")?;
        last = now;
        rounds += 1;
    }
    Ok(Outcome::Done)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(place: &str, reason: DropReason, packets: u64) -> ((String, u32), Counter) {
        ((place.into(), reason.index()), Counter { packets, bytes: packets * 100 })
    }

    #[test]
    fn only_what_has_changed_is_shown_the_node_first() {
        let old = Picture::from([at("a/gw", DropReason::NoState, 5), at("node", DropReason::NoGateway, 2)]);
        let new = Picture::from([
            at("a/gw", DropReason::NoState, 9),
            at("node", DropReason::NoGateway, 2),
            at("node", DropReason::Truncated, 1),
            at("node", DropReason::TooBig, 3),
        ]);
        let shown: Vec<_> = items(&new, &old, &Drops::default())
            .into_iter()
            .map(|item| (item.r#where, item.reason, item.packets, item.bytes))
            .collect();
        assert_eq!(
            shown,
            [
                ("node".into(), "too_big".into(), 3, 300),
                ("node".into(), "truncated".into(), 1, 100),
                ("a/gw".into(), "no_state".into(), 4, 400),
            ]
        );
        let count = |options| items(&new, &old, &options).len();
        assert_eq!(count(Drops { all: true, ..Drops::default() }), 4);
        assert_eq!(count(Drops { place: Some("a/gw".into()), ..Drops::default() }), 1);
        assert_eq!(
            count(Drops { reason: vec!["too_big".into(), "no_gateway".into()], ..Drops::default() }),
            1
        );
        assert_eq!(count(Drops { reason: vec!["no_gateway".into()], all: true, ..Drops::default() }), 1);
    }

    #[test]
    fn each_reason_is_described() {
        for reason in DropReason::ALL {
            assert!(description(reason.index()).len() > 5, "{reason:?}");
        }
        assert_eq!(name(10_000), "reason_10000");
    }
}
