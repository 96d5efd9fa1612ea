//! Metrics of `coil-router`. The first two are those of the original.

use prometheus::{IntCounter, IntCounterVec, IntGauge, Opts, Registry};

/// Metrics of `coil-router`.
#[derive(Clone, Debug)]
pub struct RouterMetrics {
    /// Syncs that were completed.
    pub syncs: IntCounter,
    /// Routes wanted in the last sync.
    pub routes: IntGauge,
    /// Syncs that were not.
    pub failures: IntCounter,
    /// Routes that could not be made in the last sync.
    pub missing: IntGauge,
    /// Interruptions of watches.
    pub watch_errors: IntCounterVec,
}

impl RouterMetrics {
    /// Creates and registers them.
    pub fn register(registry: &Registry, node: &str) -> prometheus::Result<Self> {
        let opts = |name: &str, help: &str| Opts::new(name, help).const_label("node", node);
        let metrics = Self {
            syncs: IntCounter::with_opts(opts(
                "coil_router_syncs_total",
                "Times that the routes of this node were made as they should be.",
            ))?,
            routes: IntGauge::with_opts(opts(
                "coil_router_routes_synced",
                "Routes that should be there, as of the last sync.",
            ))?,
            failures: IntCounter::with_opts(opts(
                "coil_router_sync_errors_total",
                "Syncs after which something was not as it should be.",
            ))?,
            missing: IntGauge::with_opts(opts(
                "coil_router_routes_missing",
                "Routes that the last sync could not make.",
            ))?,
            watch_errors: IntCounterVec::new(
                opts("coil_router_watch_errors_total", "Interruptions of watches of the Kubernetes API."),
                &["kind"],
            )?,
        };
        for counter in [&metrics.syncs, &metrics.failures] {
            registry.register(Box::new(counter.clone()))?;
        }
        for gauge in [&metrics.routes, &metrics.missing] {
            registry.register(Box::new(gauge.clone()))?;
        }
        registry.register(Box::new(metrics.watch_errors.clone()))?;
        for kind in ["addressblocks", "nodes"] {
            metrics.watch_errors.with_label_values(&[kind]);
        }
        Ok(metrics)
    }
}
