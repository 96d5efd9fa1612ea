//! Metrics of `coild`'s control side; those of the datapath are read from its maps elsewhere.

use std::collections::BTreeMap;

use prometheus::{
    HistogramOpts, HistogramTimer, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts,
    Registry,
};

use crate::desired::build::Problem;
use crate::state::Snapshot;

/// Watches of the Kubernetes API.
#[derive(Clone, Debug)]
pub struct WatchMetrics {
    errors: IntCounterVec,
    unreadable: IntCounterVec,
}

impl WatchMetrics {
    /// Creates and registers them.
    pub fn register(registry: &Registry) -> prometheus::Result<Self> {
        let errors = IntCounterVec::new(
            Opts::new("coil_watch_errors_total", "Interruptions of watches of the Kubernetes API."),
            &["kind"],
        )?;
        let unreadable = IntCounterVec::new(
            Opts::new(
                "coil_watch_unreadable_objects_total",
                "Objects that were skipped since they could not be read.",
            ),
            &["kind"],
        )?;
        registry.register(Box::new(errors.clone()))?;
        registry.register(Box::new(unreadable.clone()))?;
        for kind in
            ["pods", "egresses", "endpointslices", "namespaces", "nodes", "addresspools", "blockrequests"]
        {
            errors.with_label_values(&[kind]);
            unreadable.with_label_values(&[kind]);
        }
        Ok(Self { errors, unreadable })
    }

    /// A watch was interrupted.
    pub fn failed(&self, kind: &'static str) {
        self.errors.with_label_values(&[kind]).inc();
    }

    /// An object was skipped.
    pub fn unreadable(&self, kind: &'static str) {
        self.unreadable.with_label_values(&[kind]).inc();
    }
}

/// The picture and its way into the datapath.
#[derive(Clone, Debug)]
pub struct StateMetrics {
    problems: IntGaugeVec,
    pods: IntGauge,
    clients: IntGauge,
    unwired: IntGauge,
    egresses: IntGauge,
    /// Attempts to apply the desired state.
    pub applies: IntCounter,
    /// Attempts that failed, wholly or for some pod.
    pub apply_errors: IntCounter,
    /// Revision that the datapath has.
    pub applied_revision: IntGauge,
    desired_revision: IntGauge,
}

impl StateMetrics {
    /// Creates and registers them.
    pub fn register(registry: &Registry) -> prometheus::Result<Self> {
        let problems = IntGaugeVec::new(
            Opts::new("coil_pod_policy_errors", "Pods of this node whose egress policy has a problem."),
            &["reason"],
        )?;
        let gauge = |name: &str, help: &str| IntGauge::new(name, help);
        let metrics = Self {
            pods: gauge("coil_pods", "Pods of this node that the datapath serves.")?,
            clients: gauge("coil_egress_clients", "Pods of this node that have an egress policy.")?,
            unwired: gauge(
                "coil_pods_without_interface",
                "Pods of this node whose host-side interface is not known.",
            )?,
            egresses: gauge("coil_egresses_in_use", "Egresses that pods of this node use.")?,
            applies: IntCounter::new(
                "coil_datapath_applies_total",
                "Attempts to make the datapath equal to the desired state.",
            )?,
            apply_errors: IntCounter::new(
                "coil_datapath_apply_errors_total",
                "Attempts that failed, wholly or for some pod.",
            )?,
            applied_revision: gauge(
                "coil_datapath_applied_revision",
                "Revision of the desired state that the datapath has.",
            )?,
            desired_revision: gauge("coil_datapath_desired_revision", "Revision of the desired state.")?,
            problems,
        };
        registry.register(Box::new(metrics.problems.clone()))?;
        for counter in [&metrics.applies, &metrics.apply_errors] {
            registry.register(Box::new(counter.clone()))?;
        }
        for gauge in [
            &metrics.pods,
            &metrics.clients,
            &metrics.unwired,
            &metrics.egresses,
            &metrics.applied_revision,
            &metrics.desired_revision,
        ] {
            registry.register(Box::new(gauge.clone()))?;
        }
        metrics.observe(&Snapshot::default());
        Ok(metrics)
    }

    /// Takes the numbers of a snapshot.
    pub fn observe(&self, snapshot: &Snapshot) {
        let desired = &snapshot.desired;
        self.pods.set(count(desired.pods.len()));
        let clients = desired.pods.values().filter(|pod| pod.policy.is_some());
        self.clients.set(count(clients.count()));
        self.egresses.set(count(desired.egresses.len()));
        self.unwired.set(count(snapshot.unwired().map_or(0, BTreeMap::len)));
        self.desired_revision.set(i64::try_from(snapshot.revision).unwrap_or(i64::MAX));
        for reason in Problem::REASONS {
            let pods = snapshot
                .rest
                .problems
                .values()
                .filter(|pod| pod.problems.iter().any(|p| p.reason() == reason));
            self.problems.with_label_values(&[reason]).set(count(pods.count()));
        }
    }
}

fn count(number: usize) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

/// The API for the CNI plugin, named as `go-grpc-prometheus` names them.
#[derive(Clone, Debug)]
pub struct GrpcMetrics {
    started: IntCounterVec,
    handled: IntCounterVec,
    received: IntCounterVec,
    sent: IntCounterVec,
    seconds: HistogramVec,
}

/// Bounds of the time that calls take: a call that waits for nothing, and one that waits as long as it may.
const SECONDS: [f64; 12] = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 15.0, 60.0];

/// Names of gRPC codes in metrics and logs, by number.
pub const GRPC_CODES: [&str; 17] = [
    "OK",
    "Canceled",
    "Unknown",
    "InvalidArgument",
    "DeadlineExceeded",
    "NotFound",
    "AlreadyExists",
    "PermissionDenied",
    "ResourceExhausted",
    "FailedPrecondition",
    "Aborted",
    "OutOfRange",
    "Unimplemented",
    "Internal",
    "Unavailable",
    "DataLoss",
    "Unauthenticated",
];

/// Name of a gRPC code.
#[must_use]
pub fn grpc_code(code: tonic::Code) -> &'static str {
    usize::try_from(i32::from(code))
        .ok()
        .and_then(|index| GRPC_CODES.get(index))
        .copied()
        .unwrap_or("Unknown")
}

impl GrpcMetrics {
    /// Creates and registers them, with a zero for everything that can happen.
    pub fn register(registry: &Registry, service: &str, methods: &[&str]) -> prometheus::Result<Self> {
        const LABELS: [&str; 3] = ["grpc_type", "grpc_service", "grpc_method"];
        const LABELS_CODE: [&str; 4] = ["grpc_type", "grpc_service", "grpc_method", "grpc_code"];
        let counter = |name: &str, help: &str, labels: &[&str]| {
            let counter = IntCounterVec::new(Opts::new(name, help), labels)?;
            registry.register(Box::new(counter.clone()))?;
            prometheus::Result::Ok(counter)
        };
        let metrics = Self {
            started: counter(
                "grpc_server_started_total",
                "Total number of RPCs started on the server.",
                &LABELS,
            )?,
            handled: counter(
                "grpc_server_handled_total",
                "Total number of RPCs completed on the server, regardless of success or failure.",
                &LABELS_CODE,
            )?,
            received: counter(
                "grpc_server_msg_received_total",
                "Total number of RPC stream messages received on the server.",
                &LABELS,
            )?,
            sent: counter(
                "grpc_server_msg_sent_total",
                "Total number of gRPC stream messages sent by the server.",
                &LABELS,
            )?,
            seconds: {
                let options = HistogramOpts::new(
                    "grpc_server_handling_seconds",
                    "Time until RPCs were answered, those that failed or were given up included.",
                );
                let histogram = HistogramVec::new(options.buckets(SECONDS.to_vec()), &LABELS)?;
                registry.register(Box::new(histogram.clone()))?;
                histogram
            },
        };
        for method in methods {
            for counter in [&metrics.started, &metrics.received, &metrics.sent] {
                counter.with_label_values(&["unary", service, method]);
            }
            metrics.seconds.with_label_values(&["unary", service, method]);
            for code in GRPC_CODES {
                metrics.handled.with_label_values(&["unary", service, method, code]);
            }
        }
        Ok(metrics)
    }

    /// Measures the time until what is returned is dropped.
    pub fn time(&self, service: &str, method: &str) -> HistogramTimer {
        self.seconds.with_label_values(&["unary", service, method]).start_timer()
    }

    /// A call has come.
    pub fn started(&self, service: &str, method: &str) {
        self.started.with_label_values(&["unary", service, method]).inc();
        self.received.with_label_values(&["unary", service, method]).inc();
    }

    /// A call is answered.
    pub fn handled(&self, service: &str, method: &str, code: tonic::Code) {
        if code == tonic::Code::Ok {
            self.sent.with_label_values(&["unary", service, method]).inc();
        }
        self.handled.with_label_values(&["unary", service, method, grpc_code(code)]).inc();
    }
}
