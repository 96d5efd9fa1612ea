//! The order in which `coil-egress` starts and the tasks that it consists of. Nothing else spawns tasks.
//!
//! SIGTERM makes it unready at once; it ends when its flows are done ([`drain`]). Maps and link stay
//! pinned: packets are forwarded until the pod's network is gone, and a new process in the same pod adopts
//! them. `coild` removes the pins of pods that are gone.

use std::collections::BTreeSet;
use std::future::Future;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use anyhow::Context;
use coil_api::clients::EgressRef;
use coil_runtime::readiness::{Blocker, Readiness};
use coil_runtime::tasks::{Drain, Tasks};
use coil_runtime::{admin, kube_client, metrics, telemetry};
use tokio::sync::mpsc;

use super::args::{Args, MidStream};
use super::census::Census;
use super::clients::{ClientIndex, Input};
use super::collect::NatCollector;
use super::datapath::{ClientMaps, GatewayDatapath, GatewayOptions, Quotas, admitted};
use super::drain::{self, Draining};
use super::metrics::{GatewayCollector, Labels, Shared, Shares};
use super::ports::PortKeeper;
use super::{INTERFACE, ports, watch};
use crate::args::OtherProtocols;
use crate::datapath::internal::boot_seed;
use crate::datapath::{DatapathError, MapAccessError, seconds_since_boot};
use crate::memory;
use crate::netlink::{Netlink, RtNetlink};

/// Name of the program.
pub const NAME: &str = "coil-egress";
/// Time for tasks to finish what they have begun.
const DRAIN: Duration = Duration::from_secs(5);
/// Wait before a failed change of maps is tried again.
const RETRY: Duration = Duration::from_secs(1);
/// The allow-list is compared with the maps anew so often.
const RESYNC: Duration = Duration::from_secs(300);
/// Interval of the collector, and how many entries it looks at each time: a full table of the default
/// size is walked through in four seconds.
const COLLECT: Duration = Duration::from_secs(1);
const SLICE: usize = 262_144;
/// Interval at which the sockets of the pod are looked at.
const PORTS: Duration = Duration::from_secs(2);
/// Changes of the picture that may wait.
const INPUTS: usize = 1024;

/// Runs `coil-egress` until a signal or a failure.
pub async fn run(args: Args) -> anyhow::Result<()> {
    let pin_name = args.pin_name();
    let Args {
        metrics_addr,
        health_addr,
        fou_port,
        enable_sport_auto,
        backend,
        bpffs_root,
        max_nat_entries,
        redirect_peer,
        icmp,
        drain_timeout,
        nat_port_range,
        nat_port_exclude,
        nat_id_range,
        nat_client_flows,
        nat_client_ports,
        other_protocols,
        tcp_mid_stream,
        timeouts,
        pod_addresses,
        pod_namespace,
        egress_name,
        pod_name,
        pod_uid: _,
        log,
    } = args;
    let log = telemetry::init(NAME, &log)?;
    if let Some(backend) = backend {
        tracing::info!(backend, "--backend has no effect: translation is done in eBPF");
    }
    let registry = metrics::registry(NAME)?;
    let health = admin::bind("--health-addr", &health_addr).await?;
    let metrics = admin::bind("--metrics-addr", &metrics_addr).await?;
    let readiness = Readiness::new();
    let synced = readiness.blocker("pod-sync");

    // Before any connection of our own takes a port that translation may use.
    let ports = ports::divide(&ports::Wanted {
        range: nat_port_range,
        identifiers: nat_id_range,
        excluded: nat_port_exclude,
        own: vec![fou_port, metrics_addr.port, health_addr.port],
    })
    .context("cannot find ports for translation")?;
    let half = u32::try_from(ports.free(false).min(ports.free(true)) / 2)?;
    let quotas = Quotas {
        client_flows: nat_client_flows.unwrap_or((max_nat_entries / 4).max(1)),
        client_ports: nat_client_ports.unwrap_or(half.max(1)),
    };
    let client = kube_client::client(NAME).await?;
    let interface = RtNetlink::new()?
        .link_by_name(INTERFACE)
        .await?
        .with_context(|| format!("there is no interface {INTERFACE}"))?;
    // Only a pair of interfaces has another end, and only one in another name space is not ours.
    let has_peer = interface.is_veth() && interface.peer_netns.is_some();
    if redirect_peer && !has_peer {
        tracing::warn!(interface = INTERFACE, "--redirect-peer has no effect: this is no veth");
    }
    let options = GatewayOptions {
        bpffs_root,
        pin_name,
        addresses: pod_addresses,
        fou_port,
        source_port_auto: enable_sport_auto,
        ports,
        ifindex: interface.index,
        mtu: interface.mtu,
        max_nat: max_nat_entries,
        redirect_peer: redirect_peer && has_peer,
        icmp,
        quotas,
        address_only: other_protocols == OtherProtocols::AddressOnly,
        pick_up: tcp_mid_stream == MidStream::PickUp,
        timeouts,
    };
    let datapath = tokio::task::spawn_blocking(move || GatewayDatapath::open(&options))
        .await?
        .context("cannot open the datapath")?;
    memory::give_back();
    let GatewayDatapath { clients, collector: nat, ports, folder, loaded: _loaded } = datapath;
    let shared = Shared::default();
    let shares = Shares { quotas, admit: admitted(max_nat_entries), seed: boot_seed()? };
    let labels = Labels { namespace: pod_namespace.clone(), egress: egress_name.clone(), pod: pod_name };
    let collector = GatewayCollector::open(&folder, labels, shared.clone(), nat.capacity(), shares)?;
    registry.register(Box::new(collector))?;

    let mut tasks = Tasks::new()?;
    let draining = Draining::default();
    let check = draining.clone();
    readiness.ready_check("draining", move || check.check());
    let census = Census::open(&folder)?;
    tasks.spawn("health server", |drain| admin::serve_health(health, readiness.clone(), log, drain));
    tasks.spawn("metrics server", |drain| admin::serve_metrics(metrics, registry.clone(), drain));
    let (sender, inputs) = mpsc::channel(INPUTS);
    let index = ClientIndex::new(EgressRef::new(&pod_namespace, &egress_name));
    let keeper = ClientKeeper { index, maps: clients, shared: shared.clone(), synced: Some(synced) };
    tasks.spawn("clients", |drain| until(drain, keeper.run(inputs)));
    tasks.spawn("pod watch", |drain| until(drain, watch::pods(client.clone(), sender.clone())));
    tasks.spawn("namespace watch", |drain| until(drain, watch::namespaces(client.clone(), sender.clone())));
    tasks.spawn("Egress watch", |drain| {
        until(drain, watch::egress(client.clone(), pod_namespace, egress_name, sender))
    });
    tasks.spawn("collector", |drain| until(drain, collect(nat, shared.clone())));
    tasks.spawn("ports", |drain| until(drain, keep_ports(ports)));
    let timeout = Duration::from_secs(drain_timeout);
    tasks.run_lingering(DRAIN, async || drain::drain(draining, census, shared, timeout).await).await?;
    tracing::info!("ended; packets are forwarded as long as this pod has its network");
    Ok(())
}

/// Runs a task until it ends or the drain begins.
async fn until<E>(drain: Drain, task: impl Future<Output = Result<(), E>>) -> Result<(), E> {
    drain.run_until_cancelled_owned(task).await.unwrap_or(Ok(()))
}

/// Keeps the allow-list as the picture says.
struct ClientKeeper {
    index: ClientIndex,
    maps: ClientMaps,
    shared: Shared,
    /// Gone once the first complete picture is in the maps.
    synced: Option<Blocker>,
}

impl ClientKeeper {
    async fn run(mut self, mut inputs: mpsc::Receiver<Input>) -> Result<(), watch::Closed> {
        let mut resync = tokio::time::interval(RESYNC);
        let mut retry = false;
        loop {
            let mut changed = false;
            tokio::select! {
                input = inputs.recv() => match input {
                    Some(input) => changed |= self.index.apply(input),
                    None => return Err(watch::Closed),
                },
                () = tokio::time::sleep(RETRY), if retry => changed = true,
                _ = resync.tick() => {
                    self.maps.forget();
                    changed = true;
                }
            }
            // A burst becomes one change of the maps.
            while let Ok(input) = inputs.try_recv() {
                changed |= self.index.apply(input);
            }
            if changed {
                retry = match self.publish() {
                    Ok(()) => false,
                    Err(error) => {
                        let error = &error as &dyn std::error::Error;
                        tracing::error!(error, "cannot update the list of clients; trying again");
                        true
                    }
                };
            }
        }
    }

    fn publish(&mut self) -> Result<(), MapAccessError> {
        let wanted: BTreeSet<IpAddr> = self.index.addresses().collect();
        let complete = self.index.is_complete();
        let (added, removed) = self.maps.sync(&wanted, complete)?;
        if added + removed > 0 {
            tracing::info!(added, removed, clients = wanted.len(), "changed the list of clients");
        }
        self.shared.set_clients(self.index.clients().clone());
        if complete {
            drop(self.synced.take());
        }
        Ok(())
    }
}

/// Keeps the list of ports that translation does not use.
async fn keep_ports(ports: PortKeeper) -> Result<(), DatapathError> {
    let mut ports = Some(ports);
    let mut interval = tokio::time::interval(PORTS);
    interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        interval.tick().await;
        let Some(mut taken) = ports.take() else { return Ok(()) };
        // Fails only while the runtime shuts down.
        let work = tokio::task::spawn_blocking(move || (taken.refresh(), taken));
        let Ok((result, taken)) = work.await else { return Ok(()) };
        match result {
            Ok(0) => {}
            Ok(changes) => tracing::debug!(changes, "changed the list of ports that are not used"),
            Err(error) => {
                let error = &error as &dyn std::error::Error;
                tracing::warn!(error, "cannot update the list of ports that are not used");
            }
        }
        ports = Some(taken);
    }
}

/// Collects expired translations, a slice at a time.
async fn collect(collector: NatCollector, shared: Shared) -> Result<(), DatapathError> {
    let mut collector = Some(collector);
    let mut interval = tokio::time::interval(COLLECT);
    interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut walk = Duration::ZERO;
    loop {
        interval.tick().await;
        let Some(mut taken) = collector.take() else { return Ok(()) };
        let slice = tokio::task::spawn_blocking(move || {
            let start = Instant::now();
            let finished = seconds_since_boot().and_then(|now| Ok(taken.sweep(now, SLICE)?));
            (taken, finished, start.elapsed())
        });
        // Fails only while the runtime shuts down.
        let Ok((taken, finished, elapsed)) = slice.await else { return Ok(()) };
        walk += elapsed;
        match finished {
            Ok(true) => shared.set_walk(std::mem::take(&mut walk)),
            Ok(false) => {}
            Err(error) => {
                let error = &error as &dyn std::error::Error;
                tracing::warn!(error, "cannot look for expired translations");
            }
        }
        shared.set_totals(taken.totals());
        collector = Some(taken);
    }
}
