//! Metrics of handing out addresses.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use prometheus::{Histogram, HistogramOpts, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry};

use super::ledger::Usage;

/// How a wait for a block ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    Given,
    Refused,
    Late,
    Abandoned,
}

impl Outcome {
    const ALL: [Self; 4] = [Self::Given, Self::Refused, Self::Late, Self::Abandoned];

    fn name(self) -> &'static str {
        match self {
            Self::Given => "allocated",
            Self::Refused => "refused",
            Self::Late => "timeout",
            Self::Abandoned => "abandoned",
        }
    }
}

/// Metrics of handing out addresses.
#[derive(Debug)]
pub struct IpamMetrics {
    free: IntGaugeVec,
    used: IntGaugeVec,
    blocks: IntGaugeVec,
    pools: Mutex<BTreeSet<String>>,
    strays: IntGauge,
    waiting: IntGauge,
    waits: IntCounterVec,
    wait_seconds: Histogram,
    errors: IntCounterVec,
}

/// What can fail.
pub(super) const OPERATIONS: [&str; 7] = ["list", "pool", "request", "block", "forget", "release", "export"];

impl IpamMetrics {
    /// Creates and registers them.
    pub fn register(registry: &Registry) -> prometheus::Result<Self> {
        let by_pool = |name: &str, help: &str| {
            let gauge = IntGaugeVec::new(Opts::new(name, help), &["pool"])?;
            registry.register(Box::new(gauge.clone()))?;
            prometheus::Result::Ok(gauge)
        };
        let gauge = |name: &str, help: &str| {
            let gauge = IntGauge::new(name, help)?;
            registry.register(Box::new(gauge.clone()))?;
            prometheus::Result::Ok(gauge)
        };
        let counter = |name: &str, help: &str, label: &str| {
            let counter = IntCounterVec::new(Opts::new(name, help), &[label])?;
            registry.register(Box::new(counter.clone()))?;
            prometheus::Result::Ok(counter)
        };
        let wait_seconds = Histogram::with_opts(
            HistogramOpts::new(
                "coil_ipam_block_wait_seconds",
                "Time that requests for an address waited for a block.",
            )
            .buckets(vec![0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0]),
        )?;
        registry.register(Box::new(wait_seconds.clone()))?;
        let metrics = Self {
            free: by_pool(
                "coil_ipam_free_addresses",
                "Addresses in blocks of this node that can be handed out.",
            )?,
            used: by_pool("coil_ipam_used_addresses", "Addresses in blocks of this node that pods have.")?,
            blocks: by_pool("coil_ipam_blocks", "Address blocks of this node.")?,
            pools: Mutex::default(),
            strays: gauge(
                "coil_ipam_stray_owners",
                "Interfaces with addresses that are in no block of this node.",
            )?,
            waiting: gauge("coil_ipam_waiting", "Requests for an address that wait for a block now.")?,
            waits: counter(
                "coil_ipam_block_waits_total",
                "Requests for an address that had to wait for a block, by how that ended.",
                "outcome",
            )?,
            wait_seconds,
            errors: counter(
                "coil_ipam_errors_total",
                "Failures at the API server or the kernel, which are tried again.",
                "operation",
            )?,
        };
        for outcome in Outcome::ALL {
            metrics.waits.with_label_values(&[outcome.name()]);
        }
        for operation in OPERATIONS {
            metrics.errors.with_label_values(&[operation]);
        }
        Ok(metrics)
    }

    /// Takes the numbers of pools; those without blocks have no series.
    pub(super) fn observe(&self, usage: &BTreeMap<String, Usage>, strays: usize) {
        let mut known = self.pools.lock().unwrap_or_else(PoisonError::into_inner);
        for pool in known.iter().filter(|pool| !usage.contains_key(*pool)) {
            for gauge in [&self.free, &self.used, &self.blocks] {
                // It fails if there is no such series, which is what is wanted.
                drop(gauge.remove_label_values(&[pool]));
            }
        }
        for (pool, numbers) in usage {
            let set = |gauge: &IntGaugeVec, number| {
                gauge.with_label_values(&[pool]).set(i64::try_from(number).unwrap_or(i64::MAX));
            };
            set(&self.free, numbers.free);
            set(&self.used, numbers.used);
            set(&self.blocks, numbers.blocks);
        }
        *known = usage.keys().cloned().collect();
        self.strays.set(i64::try_from(strays).unwrap_or(i64::MAX));
    }

    pub(super) fn wait_begins(&self) {
        self.waiting.inc();
    }

    pub(super) fn wait_ended(&self, outcome: Outcome, time: Duration) {
        self.waiting.dec();
        self.waits.with_label_values(&[outcome.name()]).inc();
        self.wait_seconds.observe(time.as_secs_f64());
    }

    pub(super) fn failed(&self, operation: &'static str) {
        self.errors.with_label_values(&[operation]).inc();
    }
}
