//! What the controller counts: reconciliations under the names of controller-runtime, and the state of
//! each Egress, read from the cache when somebody asks, so that series go with their object.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use coil_api::{Egress, conditions};
use kube::ResourceExt;
use kube::core::DeserializeGuard;
use kube::runtime::reflector::Store;
use prometheus::core::{Collector, Desc};
use prometheus::proto::MetricFamily;
use prometheus::{HistogramOpts, HistogramVec, IntCounterVec, IntGaugeVec, Opts, Registry};

/// Reconciliations, by controller.
#[derive(Clone)]
pub(crate) struct ReconcileMetrics {
    total: IntCounterVec,
    errors: IntCounterVec,
    time: HistogramVec,
    active: IntGaugeVec,
    writes: IntCounterVec,
    failures: IntCounterVec,
    unreadable: IntCounterVec,
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
    pub(crate) fn register(registry: &Registry) -> prometheus::Result<Self> {
        let metrics = Self {
            total: IntCounterVec::new(
                Opts::new("controller_runtime_reconcile_total", "Reconciliations by result."),
                &["controller", "result"],
            )?,
            errors: IntCounterVec::new(
                Opts::new("controller_runtime_reconcile_errors_total", "Reconciliations that failed."),
                &["controller"],
            )?,
            time: HistogramVec::new(
                HistogramOpts::new("controller_runtime_reconcile_time_seconds", "Length of reconciliations.")
                    .buckets(vec![0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0]),
                &["controller"],
            )?,
            active: IntGaugeVec::new(
                Opts::new("controller_runtime_active_workers", "Reconciliations going on."),
                &["controller"],
            )?,
            writes: IntCounterVec::new(
                Opts::new(
                    "coil_controller_writes_total",
                    "Changes made to objects that belong to an Egress.",
                ),
                &["kind", "operation"],
            )?,
            failures: IntCounterVec::new(
                Opts::new(
                    "coil_controller_reconcile_failures_total",
                    "Reconciliations that failed, by reason.",
                ),
                &["controller", "reason"],
            )?,
            unreadable: IntCounterVec::new(
                Opts::new("coil_controller_unreadable_objects_total", "Objects that could not be read."),
                &["kind"],
            )?,
        };
        registry.register(Box::new(metrics.total.clone()))?;
        registry.register(Box::new(metrics.errors.clone()))?;
        registry.register(Box::new(metrics.time.clone()))?;
        registry.register(Box::new(metrics.active.clone()))?;
        registry.register(Box::new(metrics.writes.clone()))?;
        registry.register(Box::new(metrics.failures.clone()))?;
        registry.register(Box::new(metrics.unreadable.clone()))?;
        for result in ["success", "invalid", "conflict", "error"] {
            metrics.total.with_label_values(&[EGRESS, result]).inc_by(0);
        }
        metrics.errors.with_label_values(&[EGRESS]).inc_by(0);
        metrics.unreadable.with_label_values(&["Egress"]).inc_by(0);
        Ok(metrics)
    }

    pub(crate) fn started(&self) {
        self.active.with_label_values(&[EGRESS]).inc();
    }

    pub(crate) fn ended(&self, how: Ended, took: Duration) {
        self.active.with_label_values(&[EGRESS]).dec();
        self.time.with_label_values(&[EGRESS]).observe(took.as_secs_f64());
        let result = match how {
            Ended::Success => "success",
            Ended::Invalid => "invalid",
            Ended::Conflict => "conflict",
            Ended::Error(_) => "error",
        };
        self.total.with_label_values(&[EGRESS, result]).inc();
        if let Ended::Error(reason) = how {
            self.errors.with_label_values(&[EGRESS]).inc();
            self.failures.with_label_values(&[EGRESS, reason]).inc();
        }
    }

    pub(crate) fn wrote(&self, kind: &str, operation: &str) {
        self.writes.with_label_values(&[kind, operation]).inc();
    }

    pub(crate) fn unreadable(&self, kind: &str) {
        self.unreadable.with_label_values(&[kind]).inc();
    }
}

/// Name of the controller, in labels and as field manager.
const EGRESS: &str = "egress";

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
