//! Wiring of `coil-controller`: which parts run, in which order, and what they share.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context as _, bail};
use coil_runtime::clock::SystemClock;
use coil_runtime::lease::{Elector, LeaseConfig, unique_identity};
use coil_runtime::readiness::Readiness;
use coil_runtime::tasks::{Drain, Tasks};
use coil_runtime::{admin, kube_client, metrics, telemetry};
use k8s_openapi::api::core::v1::Pod;
use kube::runtime::events::{Recorder, Reporter};
use kube::{Api, Client};
use prometheus::Registry;

use crate::args::{Args, EgressArgs, IpamArgs, LeaderArgs};
use crate::metrics::{IpamMetrics, PoolCollector, ReconcileMetrics, Writes};
use crate::plan::egress::Settings;
use crate::programs::coil_controller::NAME;
use crate::reconcilers::bindings::Bindings;
use crate::reconcilers::clients::Clients;
use crate::reconcilers::egress::{self, Context, Memory};
use crate::reconcilers::ipam::{self, IpamSettings};

/// Time for what is under way when the process is told to end.
const DRAIN: Duration = Duration::from_secs(20);
/// Pause while the API server is away.
const RETRY: Duration = Duration::from_secs(2);

pub(crate) async fn run(args: Args) -> anyhow::Result<()> {
    let Args { metrics_addr, health_addr, egress, ipam, leader, pod_namespace, pod_name, log } = args;
    let EgressArgs { egress_port, egress_image, egress_drain_timeout, backend } = egress;
    let IpamArgs { enable_ipam, node_grace_period, gc_interval } = ipam;
    let LeaderArgs { leader_elect, leader_elect_namespace, leader_elect_name, leader_elect_ipam_name } =
        leader;

    let log = telemetry::init(NAME, &log)?;
    if let Some(backend) = backend {
        tracing::warn!(?backend, "--backend has no effect: egress NAT is done by eBPF");
    }
    let registry = metrics::registry(NAME)?;
    let health = admin::bind("--health-addr", &health_addr).await?;
    let metrics = admin::bind("--metrics-addr", &metrics_addr).await?;
    let readiness = Readiness::new();
    let starting = readiness.blocker("start");

    let mut tasks = Tasks::new()?;
    tasks.spawn("health server", |drain| admin::serve_health(health, readiness.clone(), log, drain));
    tasks.spawn("metrics server", |drain| admin::serve_metrics(metrics, registry.clone(), drain));

    let client = kube_client::client(NAME).await?;
    let me = pod_name.clone().unwrap_or_else(hostname);
    let elector = |name: String| -> anyhow::Result<Option<Elector>> {
        if !leader_elect {
            return Ok(None);
        }
        let config = LeaseConfig::new(leader_elect_namespace.clone(), name, unique_identity(&me));
        Ok(Some(Elector::new(client.clone(), config, &registry)?))
    };
    if enable_ipam {
        let elector = elector(leader_elect_ipam_name)?;
        let settings = IpamSettings { node_grace_period: node_grace_period.0, gc_interval: gc_interval.0 };
        let (client, me, registry) = (client.clone(), me.clone(), registry.clone());
        tasks.spawn("address pools", move |drain| async move {
            let work = |drain| run_ipam(client, settings, me, registry, drain);
            match elector {
                Some(elector) => elector.run(drain, work).await.map_err(anyhow::Error::from),
                None => work(drain).await,
            }
        });
    }
    let elector = elector(leader_elect_name)?;
    tasks.spawn("controllers", move |drain| async move {
        let image = match egress_image {
            Some(image) => image,
            None => match drain.run_until_cancelled(own_image(&client, pod_namespace, pod_name)).await {
                Some(image) => image?,
                None => return Ok(()),
            },
        };
        drop(starting);
        let settings = Settings { image, fou_port: egress_port, drain_timeout: egress_drain_timeout };
        tracing::info!(image = settings.image, fou_port = settings.fou_port, "settings");
        let work = |drain| run_controllers(client, settings, me, registry, drain);
        match elector {
            Some(elector) => elector.run(drain, work).await.map_err(anyhow::Error::from),
            None => work(drain).await,
        }
    });
    tasks.run(DRAIN).await?;
    Ok(())
}

/// What only the leader does, until drained. `identity` names this process in Events.
///
/// # Errors
/// A metric is registered already.
pub async fn run_controllers(
    client: Client,
    settings: Settings,
    identity: String,
    registry: Registry,
    drain: Drain,
) -> anyhow::Result<()> {
    let (bindings, watches) = Bindings::new(client.clone());
    let bindings = Arc::new(bindings);
    let reporter = Reporter { controller: NAME.to_owned(), instance: Some(identity) };
    let context = Context {
        recorder: Recorder::new(client.clone(), reporter),
        client,
        settings,
        clock: Arc::new(SystemClock),
        bindings: bindings.clone(),
        metrics: ReconcileMetrics::register(&registry, "egress", "Egress")?,
        writes: Writes::register(&registry)?,
        memory: Mutex::new(Memory::default()),
    };
    let (clients, client_watches) =
        Clients::new(context.client.clone(), bindings.egresses(), bindings.egress_changes());
    let egresses = egress::run(Arc::new(context), &registry, drain.clone());
    let (egresses, (), ()) =
        tokio::join!(egresses, bindings.run(watches, drain.clone()), clients.run(client_watches, drain),);
    egresses?;
    Ok(())
}

/// What only the leader does for address pools, until drained. `identity` names this process in Events.
///
/// # Errors
/// A metric is registered already.
pub async fn run_ipam(
    client: Client,
    settings: IpamSettings,
    identity: String,
    registry: Registry,
    drain: Drain,
) -> anyhow::Result<()> {
    tracing::info!(?settings, "address pools");
    let reporter = Reporter { controller: NAME.to_owned(), instance: Some(identity) };
    let picture = Arc::new(Mutex::new(ipam::Picture::default()));
    registry.register(Box::new(PoolCollector::new(picture.clone())?))?;
    let watches = ipam::Watches::new(&client);
    let context = ipam::Context {
        recorder: Recorder::new(client.clone(), reporter),
        client,
        clock: Arc::new(SystemClock),
        settings,
        metrics: IpamMetrics::register(&registry)?,
        reconciles: ipam::Reconciles {
            pools: ReconcileMetrics::register(&registry, "addresspool", "AddressPool")?,
            requests: ReconcileMetrics::register(&registry, "blockrequest", "BlockRequest")?,
            nodes: ReconcileMetrics::register(&registry, "node", "Node")?,
        },
        picture,
        fresh: ipam::Fresh::default(),
    };
    ipam::run(Arc::new(context), watches, drain).await;
    Ok(())
}

/// Egress pods run the image that we run.
async fn own_image(
    client: &Client,
    namespace: Option<String>,
    name: Option<String>,
) -> anyhow::Result<String> {
    let (Some(namespace), Some(name)) = (namespace, name) else {
        bail!(
            "which image shall egress pods run? Set --egress-image, or COIL_POD_NAMESPACE and COIL_POD_NAME"
        );
    };
    let api = Api::<Pod>::namespaced(client.clone(), &namespace);
    let pod = loop {
        match api.get(&name).await {
            Ok(pod) => break pod,
            // Nothing is wrong with us while the API server is away.
            Err(error) if is_passing(&error) => {
                tracing::warn!(
                    error = &error as &dyn std::error::Error,
                    "cannot read our own pod; trying again"
                );
                tokio::time::sleep(RETRY).await;
            }
            Err(error) => {
                return Err(error).with_context(|| format!("cannot read our own pod {namespace}/{name}"));
            }
        }
    };
    let image = pod.spec.and_then(|spec| spec.containers.into_iter().next()).and_then(|c| c.image);
    image.with_context(|| format!("our own pod {namespace}/{name} names no image"))
}

fn is_passing(error: &kube::Error) -> bool {
    match error {
        kube::Error::Api(status) => status.code == 429 || status.code >= 500,
        kube::Error::HyperError(_) | kube::Error::Service(_) => true,
        _ => false,
    }
}

fn hostname() -> String {
    std::fs::read_to_string("/proc/sys/kernel/hostname")
        .map_or_else(|_| NAME.to_owned(), |n| n.trim().to_owned())
}
