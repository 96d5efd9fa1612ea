//! The scenario table, through the library.

use std::collections::{BTreeMap, BTreeSet};

use coil_ebpf::testing::scenarios;

#[test]
fn all_scenarios_hold() {
    let mut failed = Vec::new();
    for scenario in scenarios() {
        if let Err(difference) = scenario.check() {
            failed.push(format!("{}:\n{difference}", scenario.name));
        }
    }
    assert!(failed.is_empty(), "{} failed\n{}", failed.len(), failed.join("\n\n"));
}

#[test]
fn the_short_way_is_the_long_way() {
    let mut failed = Vec::new();
    let mut hits = BTreeMap::new();
    for scenario in scenarios() {
        match scenario.check_short_way() {
            Ok(count) => *hits.entry(scenario.hook.program()).or_insert(0) += count,
            Err(difference) => failed.push(format!("{}:\n{difference}", scenario.name)),
        }
    }
    assert!(failed.is_empty(), "{} failed\n{}", failed.len(), failed.join("\n\n"));
    // That they agree would be no surprise if nobody took it.
    assert!(hits.len() == 3 && hits.values().all(|hits| *hits > 10), "{hits:?}");
}

#[test]
fn names_are_unique() {
    let mut seen = BTreeSet::new();
    for scenario in scenarios() {
        assert!(seen.insert(scenario.name.clone()), "twice: {}", scenario.name);
    }
}
