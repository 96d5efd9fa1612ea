//! What the controller counts: reconciliations under the names of controller-runtime, and the state of
//! each Egress and each pool, read from the cache when somebody asks, so that series go with their object.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use coil_api::{Egress, conditions};
use kube::ResourceExt;
use kube::core::DeserializeGuard;
use kube::runtime::reflector::Store;
use prometheus::core::{Collector, Desc};
use prometheus::proto::MetricFamily;
use prometheus::{
    Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry,
};

use crate::reconcilers::ipam::Picture;

/// Reconciliations of one controller.
#[derive(Clone)]
pub(crate) struct ReconcileMetrics {
    total: IntCounterVec,
    errors: IntCounter,
    time: Histogram,
    active: IntGauge,
    failures: IntCounterVec,
    unreadable: IntCounter,
}

/// How a reconciliation ended.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Ended {
    Success,
    Invalid,
    Conflict,
    Error(&'static str),
}

impl ReconcileMetrics {
    /// Registers the series of a controller, which are apart from those of others by a label.
    pub(crate) fn register(registry: &Registry, controller: &str, kind: &str) -> prometheus::Result<Self> {
        let opts = |name, help| Opts::new(name, help).const_label("controller", controller);
        let metrics = Self {
            total: IntCounterVec::new(
                opts("controller_runtime_reconcile_total", "Reconciliations by result."),
                &["result"],
            )?,
            errors: IntCounter::with_opts(opts(
                "controller_runtime_reconcile_errors_total",
                "Reconciliations that failed.",
            ))?,
            time: Histogram::with_opts(
                HistogramOpts::new("controller_runtime_reconcile_time_seconds", "Length of reconciliations.")
                    .const_label("controller", controller)
                    .buckets(vec![0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0]),
            )?,
            active: IntGauge::with_opts(opts(
                "controller_runtime_active_workers",
                "Reconciliations going on.",
            ))?,
            failures: IntCounterVec::new(
                opts("coil_controller_reconcile_failures_total", "Reconciliations that failed, by reason."),
                &["reason"],
            )?,
            unreadable: IntCounter::with_opts(
                Opts::new("coil_controller_unreadable_objects_total", "Objects that could not be read.")
                    .const_label("kind", kind),
            )?,
        };
        registry.register(Box::new(metrics.total.clone()))?;
        registry.register(Box::new(metrics.errors.clone()))?;
        registry.register(Box::new(metrics.time.clone()))?;
        registry.register(Box::new(metrics.active.clone()))?;
        registry.register(Box::new(metrics.failures.clone()))?;
        registry.register(Box::new(metrics.unreadable.clone()))?;
        for result in ["success", "invalid", "conflict", "error"] {
            metrics.total.with_label_values(&[result]).inc_by(0);
        }
        Ok(metrics)
    }

    pub(crate) fn started(&self) {
        self.active.inc();
    }

    pub(crate) fn ended(&self, how: Ended, took: Duration) {
        self.active.dec();
        self.time.observe(took.as_secs_f64());
        let result = match how {
            Ended::Success => "success",
            Ended::Invalid => "invalid",
            Ended::Conflict => "conflict",
            Ended::Error(_) => "error",
        };
        self.total.with_label_values(&[result]).inc();
        if let Ended::Error(reason) = how {
            self.errors.inc();
            self.failures.with_label_values(&[reason]).inc();
        }
    }

    pub(crate) fn unreadable(&self) {
        self.unreadable.inc();
    }
}

/// Changes made for Egresses.
#[derive(Clone)]
pub(crate) struct Writes(IntCounterVec);

impl Writes {
    pub(crate) fn register(registry: &Registry) -> prometheus::Result<Self> {
        let writes = IntCounterVec::new(
            Opts::new("coil_controller_writes_total", "Changes made to objects that belong to an Egress."),
            &["kind", "operation"],
        )?;
        registry.register(Box::new(writes.clone()))?;
        Ok(Self(writes))
    }

    pub(crate) fn wrote(&self, kind: &str, operation: &str) {
        self.0.with_label_values(&[kind, operation]).inc();
    }
}

/// What the address pools' part counts.
pub(crate) struct IpamMetrics {
    requests: IntCounterVec,
    collected: IntCounter,
}

impl IpamMetrics {
    pub(crate) fn register(registry: &Registry) -> prometheus::Result<Self> {
        let metrics = Self {
            requests: IntCounterVec::new(
                Opts::new("coil_controller_block_requests_total", "Requests for blocks, by answer."),
                &["result"],
            )?,
            collected: IntCounter::new(
                "coil_controller_collected_blocks_total",
                "Blocks deleted because their node is gone.",
            )?,
        };
        registry.register(Box::new(metrics.requests.clone()))?;
        registry.register(Box::new(metrics.collected.clone()))?;
        for result in ["allocated", "out_of_blocks", "pool_being_deleted", "pool_not_found", "invalid_pool"] {
            metrics.requests.with_label_values(&[result]).inc_by(0);
        }
        Ok(metrics)
    }

    pub(crate) fn answered(&self, result: &str) {
        self.requests.with_label_values(&[result]).inc();
    }

    pub(crate) fn collected(&self) {
        self.collected.inc();
    }
}

/// State of all pools, read when somebody asks, so that series go with their pool.
pub(crate) struct PoolCollector {
    picture: Arc<Mutex<Picture>>,
    gauges: Mutex<PoolGauges>,
    descs: Vec<Desc>,
}

struct PoolGauges {
    max: IntGaugeVec,
    allocated: IntGaugeVec,
    valid: IntGaugeVec,
    missing: IntGauge,
}

impl PoolGauges {
    fn all(&self) -> [&dyn Collector; 4] {
        [&self.max, &self.allocated, &self.valid, &self.missing]
    }
}

impl PoolCollector {
    pub(crate) fn new(picture: Arc<Mutex<Picture>>) -> prometheus::Result<Self> {
        let gauge = |name, help| IntGaugeVec::new(Opts::new(name, help), &["pool"]);
        let gauges = PoolGauges {
            max: gauge("coil_controller_max_blocks", "Blocks that the subnets of the pool can hold.")?,
            allocated: gauge("coil_controller_allocated_blocks", "Blocks of the pool that exist.")?,
            valid: gauge("coil_controller_pool_valid", "Whether blocks are carved from the pool: 1 or 0.")?,
            missing: IntGauge::new("coil_controller_missing_nodes", "Nodes with blocks that do not exist.")?,
        };
        let descs = gauges.all().into_iter().flat_map(Collector::desc).cloned().collect();
        Ok(Self { picture, gauges: Mutex::new(gauges), descs })
    }
}

impl Collector for PoolCollector {
    fn desc(&self) -> Vec<&Desc> {
        self.descs.iter().collect()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        let gauges = self.gauges.lock().unwrap_or_else(PoisonError::into_inner);
        for gauge in [&gauges.max, &gauges.allocated, &gauges.valid] {
            gauge.reset();
        }
        {
            let picture = self.picture.lock().unwrap_or_else(PoisonError::into_inner);
            for pool in picture.book.figures() {
                let number = |n: u64| i64::try_from(n).unwrap_or(i64::MAX);
                if let Some(most) = pool.max_blocks {
                    gauges.max.with_label_values(&[&pool.name]).set(number(most));
                }
                gauges.allocated.with_label_values(&[&pool.name]).set(number(pool.blocks));
                gauges.valid.with_label_values(&[&pool.name]).set(i64::from(pool.valid));
            }
            gauges.missing.set(i64::try_from(picture.nodes.missing()).unwrap_or(i64::MAX));
        }
        gauges.all().into_iter().flat_map(Collector::collect).collect()
    }
}

/// State of all Egresses.
pub(crate) struct EgressCollector {
    store: Store<DeserializeGuard<Egress>>,
    /// Filled anew for each scrape; the lock keeps scrapes apart.
    gauges: Mutex<EgressGauges>,
    descs: Vec<Desc>,
}

struct EgressGauges {
    wanted: IntGaugeVec,
    available: IntGaugeVec,
    clients: IntGaugeVec,
    condition: IntGaugeVec,
}

impl EgressGauges {
    fn all(&self) -> [&IntGaugeVec; 4] {
        [&self.wanted, &self.available, &self.clients, &self.condition]
    }
}

impl EgressCollector {
    pub(crate) fn new(store: Store<DeserializeGuard<Egress>>) -> prometheus::Result<Self> {
        let gauge = |name, help, labels: &[&str]| IntGaugeVec::new(Opts::new(name, help), labels);
        let egress = ["namespace", "egress"];
        let gauges = EgressGauges {
            wanted: gauge("coil_controller_egress_replicas_wanted", "Egress pods that are wanted.", &egress)?,
            available: gauge(
                "coil_controller_egress_replicas_available",
                "Egress pods that take traffic.",
                &egress,
            )?,
            clients: gauge("coil_controller_egress_clients", "Running client pods.", &egress)?,
            condition: gauge(
                "coil_controller_egress_condition",
                "Conditions of an Egress: 1 if true, else 0.",
                &["namespace", "egress", "condition"],
            )?,
        };
        let descs = gauges.all().into_iter().flat_map(Collector::desc).cloned().collect();
        Ok(Self { store, gauges: Mutex::new(gauges), descs })
    }
}

impl Collector for EgressCollector {
    fn desc(&self) -> Vec<&Desc> {
        self.descs.iter().collect()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        let gauges = self.gauges.lock().unwrap_or_else(PoisonError::into_inner);
        for gauge in gauges.all() {
            gauge.reset();
        }
        for guarded in self.store.state() {
            let Ok(egress) = &guarded.0 else { continue };
            let (namespace, name) = (egress.namespace().unwrap_or_default(), egress.name_any());
            let labels = [namespace.as_str(), name.as_str()];
            let status = egress.status.as_ref();
            gauges.wanted.with_label_values(&labels).set(i64::from(egress.spec.replicas));
            let available = status.and_then(|s| s.replicas).unwrap_or(0);
            gauges.available.with_label_values(&labels).set(i64::from(available));
            if let Some(clients) = status.and_then(|s| s.clients) {
                gauges.clients.with_label_values(&labels).set(i64::from(clients));
            }
            let conditions = status.map(|s| s.conditions.as_slice()).unwrap_or_default();
            for kind in [conditions::VALID, conditions::RECONCILED, conditions::READY] {
                let value = i64::from(conditions::is_true(conditions, kind));
                gauges.condition.with_label_values(&[namespace.as_str(), name.as_str(), kind]).set(value);
            }
        }
        gauges.all().into_iter().flat_map(Collector::collect).collect()
    }
}
