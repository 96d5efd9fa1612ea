//! Pinned maps, read by their names.

#![expect(clippy::unwrap_used, reason = "tests")]

use std::path::Path;

use aya::Pod;
use aya::maps::{HashMap, Map, MapData, PerCpuArray};
use coil_common::names::MAP_DROPS;
use coil_common::stats::DropReason;
use coil_common::values::Counter;

pub(crate) fn open(folder: &Path, map: &str) -> Map {
    Map::from_map_data(MapData::from_pin(folder.join(map)).unwrap()).unwrap()
}

/// All entries of a hash map.
pub(crate) fn entries<K: Pod, V: Pod>(folder: &Path, map: &str) -> Vec<(K, V)> {
    let map: HashMap<MapData, K, V> = open(folder, map).try_into().unwrap();
    map.iter().map(|entry| entry.unwrap()).collect()
}

/// Sum of one counter.
pub(crate) fn counter(folder: &Path, map: &str, index: u32) -> Counter {
    let map: PerCpuArray<MapData, Counter> = open(folder, map).try_into().unwrap();
    map.get(&index, 0).unwrap().iter().fold(Counter::default(), |sum, value| Counter {
        packets: sum.packets + value.packets,
        bytes: sum.bytes + value.bytes,
    })
}

/// Packets dropped for a reason.
pub(crate) fn drops(folder: &Path, reason: DropReason) -> u64 {
    counter(folder, MAP_DROPS, reason.index()).packets
}

/// All reasons for which packets were dropped.
pub(crate) fn all_drops(folder: &Path) -> Vec<(&'static str, u64)> {
    let counts = DropReason::ALL.iter().map(|reason| (reason.name(), drops(folder, *reason)));
    counts.filter(|(_, packets)| *packets > 0).collect()
}
