//! The order in which `coil-router` starts and the tasks that it consists of. Nothing else spawns tasks.

use std::future::Future;
use std::time::Duration;

use anyhow::ensure;
use coil_runtime::readiness::Readiness;
use coil_runtime::tasks::{Drain, Tasks};
use coil_runtime::{admin, kube_client, metrics, telemetry};
use tokio::sync::{mpsc, watch};

use super::args::RouterArgs;
use super::cluster::{Cluster, Input, Wanted};
use super::kernel::MainTable;
use super::metrics::RouterMetrics;
use super::sync::Syncer;
use super::watch as streams;

/// Name of the program.
pub const NAME: &str = "coil-router";
/// Time for tasks to finish what they have begun.
const DRAIN: Duration = Duration::from_secs(5);
/// Changes of the picture that may wait, and that are taken together.
const INPUTS: usize = 1024;

/// Runs `coil-router` until a signal or a failure. Its routes stay.
pub async fn run(args: RouterArgs) -> anyhow::Result<()> {
    let RouterArgs { metrics_addr, health_addr, protocol_id, update_interval, node_name, log } = args;
    ensure!(!node_name.is_empty(), "COIL_NODE_NAME environment variable should be set");
    let log = telemetry::init(NAME, &log)?;
    let registry = metrics::registry(NAME)?;
    let router_metrics = RouterMetrics::register(&registry, &node_name)?;
    let health = admin::bind("--health-addr", &health_addr).await?;
    let metrics = admin::bind("--metrics-addr", &metrics_addr).await?;
    let readiness = Readiness::new();
    let synced = readiness.blocker("routes");
    let client = kube_client::client(NAME).await?;
    let table = MainTable::new(protocol_id)?;
    let (sender, inputs) = mpsc::channel(INPUTS);
    let (publish, wanted) = watch::channel(None);

    let mut tasks = Tasks::new()?;
    tasks.spawn("health server", |drain| admin::serve_health(health, readiness.clone(), log, drain));
    tasks.spawn("metrics server", |drain| admin::serve_metrics(metrics, registry.clone(), drain));
    tasks.spawn("block watch", |drain| {
        until(drain, streams::blocks(client.clone(), sender.clone(), router_metrics.clone()))
    });
    tasks.spawn("node watch", |drain| {
        until(drain, streams::nodes(client.clone(), sender, router_metrics.clone()))
    });
    tasks.spawn("picture", |drain| {
        until(drain, async {
            keep(Cluster::new(node_name), inputs, publish).await;
            anyhow::Ok(())
        })
    });
    tasks.spawn("routes", |drain| {
        let syncer = Syncer::new(table, router_metrics.clone(), update_interval.0);
        until(drain, async {
            syncer.run(wanted, move || drop(synced)).await;
            anyhow::Ok(())
        })
    });
    tasks.run(DRAIN).await?;
    tracing::info!("ended; the routes stay");
    Ok(())
}

/// Takes changes and tells what is wanted when that has changed.
async fn keep(
    mut cluster: Cluster,
    mut inputs: mpsc::Receiver<Input>,
    publish: watch::Sender<Option<Wanted>>,
) {
    let mut changes = Vec::new();
    while inputs.recv_many(&mut changes, INPUTS).await > 0 {
        for change in changes.drain(..) {
            cluster.take(change);
        }
        let wanted = cluster.wanted();
        publish.send_if_modified(|current| {
            let changed = *current != wanted;
            *current = wanted;
            changed
        });
    }
}

/// Runs a task until it ends or the drain begins.
async fn until<E>(drain: Drain, task: impl Future<Output = Result<(), E>>) -> Result<(), E> {
    drain.run_until_cancelled_owned(task).await.unwrap_or(Ok(()))
}
