//! The scenario table, through the library.

use std::collections::BTreeSet;

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
fn names_are_unique() {
    let mut seen = BTreeSet::new();
    for scenario in scenarios() {
        assert!(seen.insert(scenario.name.clone()), "twice: {}", scenario.name);
    }
}
