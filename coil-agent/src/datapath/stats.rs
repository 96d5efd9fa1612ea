//! Counters of the kernel as Prometheus metrics.
//!
//! Read when scraped, never reset: the maps are pinned and outlive the agent.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use aya::maps::{Array, Map, MapData, MapError, PerCpuArray};
use coil_common::names;
use coil_common::stats::{Direction, DropReason, IcmpStat, egress_stat};
use coil_common::values::{Counter, EgressNameValue, GATEWAY_GONE};
use prometheus::core::{Collector, Desc};
use prometheus::proto::MetricFamily;
use prometheus::{IntCounter, IntCounterVec, IntGaugeVec, Opts};

use super::encode::decode_egress_name;
use super::loader::LoadError;
use super::maps::MapAccessError;
use super::migrate;
use super::state::MapState;

/// Opens a pinned map once more, for a reader of its own.
pub(crate) fn open_pinned<T>(folder: &Path, map: &'static str) -> Result<T, LoadError>
where
    T: TryFrom<Map, Error = MapError>,
{
    MapData::from_pin(migrate::current(folder, map))
        .and_then(Map::from_map_data)
        .and_then(T::try_from)
        .map_err(|source| LoadError::MapType { map, source })
}

/// Sum over all CPUs of one counter.
pub(crate) fn counter(
    map: &PerCpuArray<MapData, Counter>,
    name: &'static str,
    index: u32,
) -> Result<Counter, MapAccessError> {
    let values =
        map.get(&index, 0).map_err(|source| MapAccessError { operation: "read", map: name, source })?;
    Ok(values.iter().fold(Counter::default(), |sum, value| Counter {
        packets: sum.packets.wrapping_add(value.packets),
        bytes: sum.bytes.wrapping_add(value.bytes),
    }))
}

/// A family of counters with fixed, valid name and labels.
pub(crate) fn counters(name: &str, help: &str, labels: &[&str]) -> IntCounterVec {
    #[expect(clippy::expect_used, reason = "names and labels are constants")]
    IntCounterVec::new(Opts::new(name, help), labels).expect("valid metric")
}

/// A family of gauges with fixed, valid name and labels.
pub(crate) fn gauges(name: &str, help: &str, labels: &[&str]) -> IntGaugeVec {
    #[expect(clippy::expect_used, reason = "names and labels are constants")]
    IntGaugeVec::new(Opts::new(name, help), labels).expect("valid metric")
}

/// A gauge holds signed numbers; none of ours comes near the limit.
pub(crate) fn gauge(value: usize) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

/// Drops by reason, as both roles export them.
pub(crate) struct DropCounters {
    map: PerCpuArray<MapData, Counter>,
    icmp: PerCpuArray<MapData, Counter>,
}

/// Families of [`DropCounters`].
pub(crate) struct DropFamilies {
    packets: IntCounterVec,
    bytes: IntCounterVec,
    icmp: IntCounterVec,
}

impl DropFamilies {
    pub(crate) fn new() -> Self {
        Self {
            packets: counters("coil_drops_total", "Packets dropped by the datapath.", &["reason"]),
            bytes: counters("coil_drop_bytes_total", "IP bytes dropped by the datapath.", &["reason"]),
            icmp: counters("coil_icmp_errors_total", "ICMP errors of the datapath.", &["result"]),
        }
    }

    pub(crate) fn all(&self) -> [&dyn Collector; 3] {
        [&self.packets, &self.bytes, &self.icmp]
    }
}

impl DropCounters {
    pub(crate) fn open(folder: &Path) -> Result<Self, LoadError> {
        let (map, icmp) =
            (open_pinned(folder, names::MAP_DROPS)?, open_pinned(folder, names::MAP_ICMP_STATS)?);
        Ok(Self { map, icmp })
    }

    /// Drops for one reason.
    pub(crate) fn read(&self, reason: DropReason) -> Result<Counter, MapAccessError> {
        counter(&self.map, names::MAP_DROPS, reason.index())
    }

    pub(crate) fn collect(&self, families: &DropFamilies) -> Result<(), MapAccessError> {
        for reason in DropReason::ALL {
            let drops = self.read(*reason)?;
            families.packets.with_label_values(&[reason.name()]).inc_by(drops.packets);
            families.bytes.with_label_values(&[reason.name()]).inc_by(drops.bytes);
        }
        for stat in IcmpStat::ALL {
            let errors = counter(&self.icmp, names::MAP_ICMP_STATS, stat.index())?;
            families.icmp.with_label_values(&[stat.name()]).inc_by(errors.packets);
        }
        Ok(())
    }
}

/// How full the tables of flows are, as far as the last walk through them has shown.
#[derive(Clone, Debug, Default)]
pub(crate) struct FlowCounts(Arc<FlowCountsInner>);

#[derive(Debug, Default)]
struct FlowCountsInner {
    v4: AtomicU64,
    v6: AtomicU64,
    expired: AtomicU64,
}

impl FlowCounts {
    pub(crate) fn set_v4(&self, entries: u64) {
        self.0.v4.store(entries, Ordering::Relaxed);
    }

    pub(crate) fn set_v6(&self, entries: u64) {
        self.0.v6.store(entries, Ordering::Relaxed);
    }

    pub(crate) fn add_expired(&self, entries: usize) {
        self.0.expired.fetch_add(entries as u64, Ordering::Relaxed);
    }
}

/// Entries and capacity of the maps that the agent writes.
#[derive(Clone, Debug)]
pub(crate) struct MapFill(Arc<Vec<(&'static str, AtomicUsize, usize)>>);

impl MapFill {
    /// Nothing is known of the entries yet.
    pub(crate) fn new(capacities: &[(&'static str, usize)]) -> Self {
        let entry = |(name, capacity): &(&'static str, usize)| (*name, AtomicUsize::new(0), *capacity);
        Self(Arc::new(capacities.iter().map(entry).collect()))
    }

    /// Takes over how many entries one of them has.
    pub(crate) fn set_one(&self, map: &'static str, count: usize) {
        for (_, entries, _) in self.0.iter().filter(|(name, ..)| *name == map) {
            entries.store(count, Ordering::Relaxed);
        }
    }

    /// Takes over what the maps hold.
    pub(crate) fn set(&self, maps: &MapState) {
        for (name, entries, _) in self.0.iter() {
            let count = match *name {
                names::MAP_PODS => maps.pods.len(),
                names::MAP_POLICY_V4 => maps.policy_v4.len(),
                names::MAP_POLICY_V6 => maps.policy_v6.len(),
                names::MAP_EGRESS_NAMES => maps.egress_names.len(),
                names::MAP_GATEWAYS => {
                    maps.gateways.values().filter(|slot| slot.state != GATEWAY_GONE).count()
                }
                names::MAP_PEERS_V4 => maps.peers_v4.len(),
                names::MAP_PEERS_V6 => maps.peers_v6.len(),
                _ => continue,
            };
            entries.store(count, Ordering::Relaxed);
        }
    }
}

/// Exports the counters of a node.
pub(crate) struct NodeCollector {
    drops: DropCounters,
    egress_names: Array<MapData, EgressNameValue>,
    egress_stats: PerCpuArray<MapData, Counter>,
    flows: FlowCounts,
    flow_capacity: [usize; 2],
    fill: MapFill,
    descriptions: Vec<Desc>,
}

struct NodeFamilies {
    drops: DropFamilies,
    tx_packets: IntCounterVec,
    tx_bytes: IntCounterVec,
    rx_packets: IntCounterVec,
    rx_bytes: IntCounterVec,
    entries: IntGaugeVec,
    capacity: IntGaugeVec,
    expired: IntCounter,
}

impl NodeFamilies {
    fn new() -> Self {
        let egress = |name, help| counters(name, help, &["namespace", "egress", "family"]);
        #[expect(clippy::expect_used, reason = "the name is a constant")]
        let expired = IntCounter::new(
            "coil_flows_expired_total",
            "Egress flows of local pods that were removed after their time-out.",
        )
        .expect("valid metric");
        Self {
            drops: DropFamilies::new(),
            tx_packets: egress(
                "coil_egress_tx_packets_total",
                "Packets of local pods that went to an Egress.",
            ),
            tx_bytes: egress("coil_egress_tx_bytes_total", "IP bytes of local pods that went to an Egress."),
            rx_packets: egress(
                "coil_egress_rx_packets_total",
                "Packets to local pods that came from an Egress.",
            ),
            rx_bytes: egress(
                "coil_egress_rx_bytes_total",
                "IP bytes to local pods that came from an Egress.",
            ),
            entries: gauges("coil_datapath_map_entries", "Entries of a BPF map.", &["map"]),
            capacity: gauges("coil_datapath_map_capacity", "Capacity of a BPF map.", &["map"]),
            expired,
        }
    }

    fn all(&self) -> Vec<&dyn Collector> {
        let mut all: Vec<&dyn Collector> = self.drops.all().to_vec();
        all.extend([
            &self.tx_packets as &dyn Collector,
            &self.tx_bytes,
            &self.rx_packets,
            &self.rx_bytes,
            &self.entries,
            &self.capacity,
            &self.expired,
        ]);
        all
    }
}

impl NodeCollector {
    pub(crate) fn open(
        folder: &Path,
        flows: FlowCounts,
        flow_capacity: [usize; 2],
        fill: MapFill,
    ) -> Result<Self, LoadError> {
        Ok(Self {
            drops: DropCounters::open(folder)?,
            egress_names: open_pinned(folder, names::MAP_EGRESS_NAMES)?,
            egress_stats: open_pinned(folder, names::MAP_EGRESS_STATS)?,
            flows,
            flow_capacity,
            fill,
            descriptions: descriptions(&NodeFamilies::new().all()),
        })
    }

    fn read(&self, families: &NodeFamilies) -> Result<(), MapAccessError> {
        for id in 0..self.egress_names.len() {
            let name = self.egress_names.get(&id, 0).map_err(|source| MapAccessError {
                operation: "read",
                map: names::MAP_EGRESS_NAMES,
                source,
            })?;
            let Some(name) = decode_egress_name(&name) else { continue };
            for (family, label) in [(0, "ipv4"), (1, "ipv6")] {
                let labels = [name.namespace.as_str(), name.name.as_str(), label];
                let read = |direction| {
                    let index = egress_stat(id * 2 + family, direction);
                    counter(&self.egress_stats, names::MAP_EGRESS_STATS, index)
                };
                let (tx, rx) = (read(Direction::Tx)?, read(Direction::Rx)?);
                families.tx_packets.with_label_values(&labels).inc_by(tx.packets);
                families.tx_bytes.with_label_values(&labels).inc_by(tx.bytes);
                families.rx_packets.with_label_values(&labels).inc_by(rx.packets);
                families.rx_bytes.with_label_values(&labels).inc_by(rx.bytes);
            }
        }
        self.drops.collect(&families.drops)
    }
}

/// Descriptions of the families of a collector that makes them anew at each scrape.
pub(crate) fn descriptions(families: &[&dyn Collector]) -> Vec<Desc> {
    families.iter().flat_map(|family| family.desc()).cloned().collect()
}

/// Everything that the families hold.
pub(crate) fn gather(families: &[&dyn Collector]) -> Vec<MetricFamily> {
    families.iter().flat_map(|family| family.collect()).collect()
}

impl Collector for NodeCollector {
    fn desc(&self) -> Vec<&Desc> {
        self.descriptions.iter().collect()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        let families = NodeFamilies::new();
        if let Err(error) = self.read(&families) {
            tracing::warn!(%error, "cannot read the datapath's counters");
        }
        for (name, entries, capacity) in self.fill.0.iter() {
            families.entries.with_label_values(&[name]).set(gauge(entries.load(Ordering::Relaxed)));
            families.capacity.with_label_values(&[name]).set(gauge(*capacity));
        }
        let flows = &self.flows.0;
        for (name, entries, capacity) in [
            (names::MAP_FLOWS_V4, &flows.v4, self.flow_capacity[0]),
            (names::MAP_FLOWS_V6, &flows.v6, self.flow_capacity[1]),
        ] {
            let entries = i64::try_from(entries.load(Ordering::Relaxed)).unwrap_or(i64::MAX);
            families.entries.with_label_values(&[name]).set(entries);
            families.capacity.with_label_values(&[name]).set(gauge(capacity));
        }
        families.expired.inc_by(flows.expired.load(Ordering::Relaxed));
        gather(&families.all())
    }
}
