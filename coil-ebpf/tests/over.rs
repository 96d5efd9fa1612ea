//! Tables over other ones, as tools lay them over a running datapath, decide like tables that hold the
//! entries themselves, and leave what is below alone.

use std::collections::BTreeMap;

use coil_common::names::{MAP_POLICY_V4, MAP_POLICY_V6};
use coil_ebpf::testing::entries::{Entry, Key};
use coil_ebpf::testing::memory::{Source, Tables};
use coil_ebpf::testing::{interpret, scenario::IFINDEX, scenarios};

/// Entries as maps in the kernel answer.
#[derive(Debug)]
struct Kernel(BTreeMap<(&'static str, Vec<u8>), Vec<u8>>);

impl Kernel {
    fn new(entries: &[Entry]) -> Self {
        Self(entries.iter().map(|entry| ((entry.map, entry.key.0.clone()), entry.value.0.clone())).collect())
    }

    /// What a longest-prefix map does.
    fn longest(&self, map: &str, wanted: &[u8]) -> Option<Vec<u8>> {
        let matches = |key: &[u8]| {
            let length = u32::from_ne_bytes([key[0], key[1], key[2], key[3]]) as usize;
            (0..length).all(|bit| {
                let mask = 0x80 >> (bit % 8);
                key[4 + bit / 8] & mask == wanted[4 + bit / 8] & mask
            })
        };
        let found = self.0.iter().filter(|((name, key), _)| *name == map && matches(key));
        found
            .max_by_key(|((_, key), _)| u32::from_ne_bytes([key[0], key[1], key[2], key[3]]))
            .map(|(_, value)| value.clone())
    }
}

impl Source for Kernel {
    fn read(&self, map: &'static str, key: &[u8]) -> Option<Vec<u8>> {
        if [MAP_POLICY_V4, MAP_POLICY_V6].contains(&map) {
            return self.longest(map, key);
        }
        self.0.get(&(map, key.to_vec())).cloned()
    }
}

/// The datapath writes entries of this map.
fn is_live(map: &str) -> bool {
    ["flows_", "nat_", "fragments_", "affinity", "inbound_"].iter().any(|kind| map.starts_with(kind))
}

#[test]
fn tables_over_others_decide_alike() {
    let mut count = 0;
    let mut failed = Vec::new();
    // A source does not say how full it is, and packets over it take the long way.
    for scenario in scenarios().into_iter().filter(|scenario| scenario.limit.is_none() && !scenario.near) {
        let tables = Tables::over(Box::new(Kernel::new(&scenario.entries)), 1000);
        let (action, bytes) =
            interpret::run(scenario.hook, IFINDEX, &scenario.packet, &scenario.config, &tables);
        let mut all: BTreeMap<(&'static str, Key), Entry> = BTreeMap::new();
        for entry in scenario.entries.iter().filter(|entry| is_live(entry.map)).chain(&tables.entries()) {
            all.insert((entry.map, entry.key.clone()), entry.clone());
        }
        all.retain(|(map, key), _| !tables.is_removed(map, key));
        let entries: Vec<Entry> = all.into_values().collect();
        if let Err(difference) = scenario.compare(action, &bytes, &tables.counters(), &entries) {
            failed.push(format!("{}:\n{difference}", scenario.name));
        }
        count += 1;
    }
    assert!(count > 100, "{count} scenarios");
    assert!(failed.is_empty(), "{} of {count} failed\n{}", failed.len(), failed.join("\n\n"));
}
