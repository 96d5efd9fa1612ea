//! Metrics of a gateway: the names of the original, with values from BPF maps, and a few of our own.

use std::net::IpAddr;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use aya::maps::{Array, MapData, PerCpuArray};
use coil_common::names;
use coil_common::stats::GatewayStat;
use coil_common::usage::{PROBES, Share, gateway_cells};
use coil_common::values::Counter;
use coil_ebpf::family::{V4, V6, addr4, addr6};
use coil_ebpf::usage;
use prometheus::core::{Collector, Desc};
use prometheus::proto::MetricFamily;
use prometheus::{IntCounterVec, IntGaugeVec};

use super::INTERFACE;
use super::census::Count;
use super::clients::Clients;
use super::collect::Totals;
use super::datapath::Quotas;
use crate::datapath::internal::{
    DropCounters, DropFamilies, counter, counters, descriptions, gather, gauge, gauges, open_pinned,
};
use crate::datapath::{LoadError, MapAccessError};

/// What tasks tell the collector.
#[derive(Clone, Debug, Default)]
pub(crate) struct Shared(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    clients: Arc<Clients>,
    totals: [Totals; 2],
    walk: Duration,
    draining: Option<Count>,
}

impl Shared {
    fn with<T>(&self, work: impl FnOnce(&mut State) -> T) -> T {
        work(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    pub(crate) fn set_clients(&self, clients: Clients) {
        let clients = Arc::new(clients);
        self.with(|state| state.clients = clients);
    }

    pub(crate) fn set_totals(&self, totals: [Totals; 2]) {
        self.with(|state| state.totals = totals);
    }

    /// The gateway is draining, and so many flows are alive.
    pub(crate) fn set_draining(&self, count: Count) {
        self.with(|state| state.draining = Some(count));
    }

    pub(crate) fn set_walk(&self, duration: Duration) {
        self.with(|state| state.walk = duration);
    }
}

/// Names of what the metrics are about.
#[derive(Clone, Debug)]
pub(crate) struct Labels {
    pub(crate) namespace: String,
    pub(crate) egress: String,
    pub(crate) pod: String,
}

/// Exports the counters of a gateway.
pub(crate) struct GatewayCollector {
    labels: Labels,
    shared: Shared,
    stats: PerCpuArray<MapData, Counter>,
    drops: DropCounters,
    capacity: usize,
    shares: Shares,
    usage: Array<MapData, u64>,
    probes: PerCpuArray<MapData, u64>,
    descriptions: Vec<Desc>,
}

/// What new translations are refused for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shares {
    /// Shares of clients.
    pub(crate) quotas: Quotas,
    /// All translations of a family.
    pub(crate) admit: u32,
    /// Seed of the datapath's hashes.
    pub(crate) seed: u32,
}

struct Families {
    drops: DropFamilies,
    pod_count: IntGaugeVec,
    pod_info: IntGaugeVec,
    entries: IntGaugeVec,
    limit: IntGaugeVec,
    masqueraded_packets: IntGaugeVec,
    masqueraded_bytes: IntGaugeVec,
    invalid_packets: IntGaugeVec,
    invalid_bytes: IntGaugeVec,
    reply_packets: IntCounterVec,
    reply_bytes: IntCounterVec,
    new_flows: IntCounterVec,
    expired: IntCounterVec,
    orphans: IntCounterVec,
    expired_bytes: IntCounterVec,
    overdue: IntGaugeVec,
    walk: prometheus::GaugeVec,
    draining: IntGaugeVec,
    draining_flows: IntGaugeVec,
    corrected: IntCounterVec,
    limits: IntGaugeVec,
    tries: IntCounterVec,
    client_flows: IntGaugeVec,
}

/// Numbers of tries for a port that are counted together, by the last of them.
const TRIES: [(&str, u32); 6] =
    [("1", 1), ("2-4", 4), ("5-8", 8), ("9-16", 16), ("17-32", PROBES), ("in_vain", PROBES + 1)];

/// Translated from clients, translated for clients, new, invalid.
const STATS_V4: [GatewayStat; 4] =
    [GatewayStat::MasqueradedV4, GatewayStat::ReplyV4, GatewayStat::NewFlowV4, GatewayStat::InvalidV4];
const STATS_V6: [GatewayStat; 4] =
    [GatewayStat::MasqueradedV6, GatewayStat::ReplyV6, GatewayStat::NewFlowV6, GatewayStat::InvalidV6];

const COMMON: [&str; 3] = ["namespace", "pod", "egress"];
const WITH_PROTOCOL: [&str; 4] = ["namespace", "pod", "egress", "protocol"];

impl Families {
    fn new() -> Self {
        let by_protocol = |name, help| counters(name, help, &WITH_PROTOCOL);
        #[expect(clippy::expect_used, reason = "name and labels are constants")]
        let walk = prometheus::GaugeVec::new(
            prometheus::Opts::new(
                "coil_egress_nat_walk_duration_seconds",
                "Time that the last complete walk through the translation tables took.",
            ),
            &COMMON,
        )
        .expect("valid metric");
        Self {
            drops: DropFamilies::new(),
            pod_count: gauges(
                "coil_egress_client_pod_count",
                "Client pods of this Egress.",
                &["namespace", "egress"],
            ),
            pod_info: gauges(
                "coil_egress_client_pod_info",
                "A client pod and one of its addresses; always 1.",
                &["namespace", "pod", "pod_ip", "interface", "egress", "egress_namespace"],
            ),
            entries: gauges(
                "coil_egress_nf_conntrack_entries_count",
                "Translations in the table, as of the last walk through it.",
                &COMMON,
            ),
            limit: gauges(
                "coil_egress_nf_conntrack_entries_limit",
                "Translations that the table can hold.",
                &COMMON,
            ),
            masqueraded_packets: gauges(
                "coil_egress_nftables_masqueraded_packets_total",
                "Packets of clients that were translated and sent on.",
                &WITH_PROTOCOL,
            ),
            masqueraded_bytes: gauges(
                "coil_egress_nftables_masqueraded_bytes_total",
                "IP bytes of clients that were translated and sent on.",
                &WITH_PROTOCOL,
            ),
            invalid_packets: gauges(
                "coil_egress_nftables_invalid_packets_total",
                "Packets of clients that belong to no connection and were dropped.",
                &WITH_PROTOCOL,
            ),
            invalid_bytes: gauges(
                "coil_egress_nftables_invalid_bytes_total",
                "IP bytes of clients that belong to no connection and were dropped.",
                &WITH_PROTOCOL,
            ),
            reply_packets: by_protocol(
                "coil_egress_reply_packets_total",
                "Replies that were translated and sent back to clients.",
            ),
            reply_bytes: by_protocol(
                "coil_egress_reply_bytes_total",
                "IP bytes of replies that were translated and sent back to clients.",
            ),
            new_flows: by_protocol("coil_egress_new_flows_total", "New translations."),
            expired: by_protocol(
                "coil_egress_nat_expired_total",
                "Translations removed after their time-out, since this process started.",
            ),
            orphans: by_protocol(
                "coil_egress_nat_orphans_total",
                "Halves of translations removed without their other half, since this process started.",
            ),
            expired_bytes: counters(
                "coil_egress_nat_expired_bytes_total",
                "IP bytes of translations that were removed, since this process started.",
                &["namespace", "pod", "egress", "protocol", "direction"],
            ),
            overdue: gauges(
                "coil_egress_nat_overdue_seconds",
                "By how much the oldest expired translation was overdue in the last walk.",
                &COMMON,
            ),
            walk,
            draining: gauges(
                "coil_egress_draining",
                "1 while the gateway waits for its flows to end, which keeps it from ending itself.",
                &COMMON,
            ),
            draining_flows: gauges(
                "coil_egress_draining_flows",
                "Flows that a draining gateway waits for; more than some thousands are not counted.",
                &["namespace", "pod", "egress", "kind"],
            ),
            corrected: by_protocol(
                "coil_egress_nat_corrected_total",
                "By how much counts of clients' translations had to be put right.",
            ),
            limits: gauges(
                "coil_egress_nat_quota",
                "Translations beyond which new ones are refused; 0 for no limit.",
                &["namespace", "pod", "egress", "share"],
            ),
            tries: counters(
                "coil_egress_nat_port_tries_total",
                "New translations by the number of ports that were tried.",
                &["namespace", "pod", "egress", "tries"],
            ),
            client_flows: gauges(
                "coil_egress_client_pod_flows",
                "Translations of a client pod.",
                &["namespace", "pod", "pod_ip", "egress", "egress_namespace"],
            ),
        }
    }

    fn all(&self) -> Vec<&dyn Collector> {
        let mut all: Vec<&dyn Collector> = self.drops.all().to_vec();
        all.extend([
            &self.pod_count as &dyn Collector,
            &self.pod_info,
            &self.entries,
            &self.limit,
            &self.masqueraded_packets,
            &self.masqueraded_bytes,
            &self.invalid_packets,
            &self.invalid_bytes,
            &self.reply_packets,
            &self.reply_bytes,
            &self.new_flows,
            &self.expired,
            &self.orphans,
            &self.expired_bytes,
            &self.overdue,
            &self.walk,
            &self.draining,
            &self.draining_flows,
            &self.corrected,
            &self.limits,
            &self.tries,
            &self.client_flows,
        ]);
        all
    }
}

impl GatewayCollector {
    pub(crate) fn open(
        folder: &Path,
        labels: Labels,
        shared: Shared,
        capacity: usize,
        shares: Shares,
    ) -> Result<Self, LoadError> {
        Ok(Self {
            shares,
            usage: open_pinned(folder, names::MAP_GATEWAY_USAGE)?,
            probes: open_pinned(folder, names::MAP_PORT_PROBES)?,
            labels,
            shared,
            stats: open_pinned(folder, names::MAP_GATEWAY_STATS)?,
            drops: DropCounters::open(folder)?,
            capacity,
            descriptions: descriptions(&Families::new().all()),
        })
    }

    fn read(&self, families: &Families) -> Result<(), MapAccessError> {
        let Labels { namespace, egress, pod } = &self.labels;
        let stat = |stat: GatewayStat| counter(&self.stats, names::MAP_GATEWAY_STATS, stat.index());
        for (protocol, [masqueraded, reply, new, invalid]) in [("ipv4", STATS_V4), ("ipv6", STATS_V6)] {
            let labels = [namespace.as_str(), pod, egress, protocol];
            let masqueraded = stat(masqueraded)?;
            families.masqueraded_packets.with_label_values(&labels).set(signed(masqueraded.packets));
            families.masqueraded_bytes.with_label_values(&labels).set(signed(masqueraded.bytes));
            let reply = stat(reply)?;
            families.reply_packets.with_label_values(&labels).inc_by(reply.packets);
            families.reply_bytes.with_label_values(&labels).inc_by(reply.bytes);
            families.new_flows.with_label_values(&labels).inc_by(stat(new)?.packets);
            let invalid = stat(invalid)?;
            families.invalid_packets.with_label_values(&labels).set(signed(invalid.packets));
            families.invalid_bytes.with_label_values(&labels).set(signed(invalid.bytes));
        }
        self.read_tries(families)?;
        self.drops.collect(&families.drops)
    }

    fn read_tries(&self, families: &Families) -> Result<(), MapAccessError> {
        let Labels { namespace, egress, pod } = &self.labels;
        let mut first = 0;
        for (label, last) in TRIES {
            let mut sum = 0;
            for tries in first..=last {
                let values = self.probes.get(&tries, 0).map_err(|source| MapAccessError {
                    operation: "read",
                    map: names::MAP_PORT_PROBES,
                    source,
                })?;
                sum += values.iter().sum::<u64>();
            }
            first = last + 1;
            families.tries.with_label_values(&[namespace, pod, egress, label]).inc_by(sum);
        }
        Ok(())
    }

    /// Translations that are counted for a client.
    fn client_flows(&self, address: IpAddr) -> Result<i64, MapAccessError> {
        let seed = self.shares.seed;
        let (family, hash) = match address {
            IpAddr::V4(address) => (0, usage::client::<V4>(seed, &addr4(address.octets()))),
            IpAddr::V6(address) => (1, usage::client::<V6>(seed, &addr6(address.octets()))),
        };
        let mut least = i64::MAX;
        for cell in gateway_cells(family, Share::Client, hash) {
            let count = self.usage.get(&cell, 0).map_err(|source| MapAccessError {
                operation: "read",
                map: names::MAP_GATEWAY_USAGE,
                source,
            })?;
            least = least.min(count.cast_signed());
        }
        Ok(least.max(0))
    }
}

/// Counters of 64 bits in gauges, which the original has for them.
fn signed(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

impl Collector for GatewayCollector {
    fn desc(&self) -> Vec<&Desc> {
        self.descriptions.iter().collect()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        let families = Families::new();
        if let Err(error) = self.read(&families) {
            tracing::warn!(%error, "cannot read the gateway's counters");
        }
        let Labels { namespace, egress, pod } = &self.labels;
        let (clients, totals, walk, draining) =
            self.shared.with(|state| (state.clients.clone(), state.totals, state.walk, state.draining));
        families.pod_count.with_label_values(&[namespace, egress]).set(gauge(clients.len()));
        for (client, addresses) in clients.iter() {
            for address in addresses {
                let labels =
                    [&client.namespace, &client.name, &address.to_string(), INTERFACE, egress, namespace];
                families.pod_info.with_label_values(&labels).set(1);
                match self.client_flows(*address) {
                    Ok(flows) => {
                        let labels =
                            [&client.namespace, &client.name, &address.to_string(), egress, namespace];
                        families.client_flows.with_label_values(&labels).set(flows);
                    }
                    Err(error) => tracing::warn!(%error, "cannot read the flows of a client"),
                }
            }
        }
        let common = [namespace.as_str(), pod, egress];
        let entries = totals.iter().map(|totals| totals.entries).sum();
        families.entries.with_label_values(&common).set(signed(entries));
        families.limit.with_label_values(&common).set(gauge(self.capacity));
        let overdue = totals.iter().map(|totals| totals.overdue).max().unwrap_or(0);
        families.overdue.with_label_values(&common).set(i64::from(overdue));
        families.walk.with_label_values(&common).set(walk.as_secs_f64());
        families.draining.with_label_values(&common).set(i64::from(draining.is_some()));
        if let Some(Count { connections, others }) = draining {
            for (kind, count) in [("tcp", connections), ("other", others)] {
                families.draining_flows.with_label_values(&[namespace, pod, egress, kind]).set(signed(count));
            }
        }
        let Shares { quotas, admit, seed: _ } = self.shares;
        for (share, limit) in
            [("all", admit), ("client", quotas.client_flows), ("client_destination", quotas.client_ports)]
        {
            let labels = [namespace.as_str(), pod, egress, share];
            families.limits.with_label_values(&labels).set(i64::from(limit));
        }
        for (protocol, totals) in ["ipv4", "ipv6"].into_iter().zip(totals) {
            let labels = [namespace.as_str(), pod, egress, protocol];
            families.expired.with_label_values(&labels).inc_by(totals.expired);
            families.orphans.with_label_values(&labels).inc_by(totals.orphans);
            families.corrected.with_label_values(&labels).inc_by(totals.corrected);
            for (direction, bytes) in [("tx", totals.sent_bytes), ("rx", totals.received_bytes)] {
                let labels = [namespace.as_str(), pod, egress, protocol, direction];
                families.expired_bytes.with_label_values(&labels).inc_by(bytes);
            }
        }
        gather(&families.all())
    }
}
