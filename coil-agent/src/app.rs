//! The order in which `coild` starts and the tasks that it consists of. Nothing else spawns tasks.

mod network;

use std::collections::BTreeSet;
use std::future::Future;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use coil_common::ABI_VERSION;
use coil_runtime::readiness::Readiness;
use coil_runtime::tasks::{Drain, Tasks};
use coil_runtime::{admin, kube_client, metrics, telemetry};
use k8s_openapi::api::core::v1::Node;
use kube::{Api, Client};
use tokio::sync::mpsc;

use crate::args::{CoildArgs, DatapathArgs, OtherProtocols, UninstallArgs};
use crate::cni::error::causes;
use crate::cni::pod::Pods;
use crate::cni::pod::ipam::{AddFailure, IpamPods};
use crate::cni::proto::cni_server::SERVICE_NAME;
use crate::cni::server;
use crate::datapath::timeouts::Timeouts;
use crate::datapath::{Datapath, DatapathError, IcmpLimit, NodeDatapath, NodeOptions, PinError, TunnelKind};
use crate::desired::DesiredState;
use crate::desired::build::Picture;
use crate::desired::prefer::Place;
use crate::index::Change;
use crate::ipam::{self, IpamService, KubeApi, NodeAddresses};
use crate::local::{adopt_pods, watch_filters, watch_links};
use crate::metrics::{GrpcMetrics, StateMetrics, WatchMetrics};
use crate::netlink::RtNetlink;
use crate::state::{Input, State};
use crate::wiring::{Link, Wiring};
use crate::writer::Writer;
use crate::{events, memory, watch};

use self::network::Network;

/// Name of the program.
pub const NAME: &str = "coild";
/// Time for tasks to finish what they have begun.
const DRAIN: Duration = Duration::from_secs(20);
/// Failures of ADD that wait to be told; more are not.
const FAILURES: usize = 64;
/// Time to ask the API server about our own node.
const NODE_TIMEOUT: Duration = Duration::from_secs(3);

/// Runs `coild` until a signal or a failure. The datapath stays pinned and goes on forwarding.
pub async fn run(args: CoildArgs) -> anyhow::Result<()> {
    args.check()?;
    let CoildArgs {
        metrics_addr,
        health_addr,
        socket,
        node_name: node,
        features,
        network: network_args,
        datapath: datapath_args,
        log,
        legacy,
    } = args;
    let log = telemetry::init(NAME, &log)?;
    for flag in legacy.given() {
        tracing::info!(flag, "this flag of the original has no effect");
    }
    let registry = metrics::registry(NAME)?;
    let watch_metrics = WatchMetrics::register(&registry)?;
    let state_metrics = StateMetrics::register(&registry)?;
    let grpc_metrics = GrpcMetrics::register(&registry, SERVICE_NAME, &server::METHODS)?;
    let health = admin::bind("--health-addr", &health_addr).await?;
    let metrics = admin::bind("--metrics-addr", &metrics_addr).await?;
    let readiness = Readiness::new();
    let listed = readiness.blocker("first-lists");
    let programmed = readiness.blocker("datapath");
    let socket_bound = readiness.blocker("cni-socket");

    let client = kube_client::client(NAME).await?;
    let netlink = Arc::new(RtNetlink::new()?);
    let network =
        if features.enable_ipam { Some(Network::open(&node, network_args, &registry).await?) } else { None };
    let (state, handle, snapshots) = State::with(Picture {
        place: Place { node: node.clone(), zone: None },
        originating_only: features.enable_originating_only,
        no_egress: !features.enable_egress,
        ..Picture::default()
    });
    let mut datapath = open_datapath(&client, &node, datapath_args, features.enable_ipam).await?;
    handle.send(Input::Remembered(datapath.destinations().context("cannot read the datapath")?)).await?;
    registry.register(datapath.collector()?)?;
    if !features.enable_egress {
        // Nobody watches them: there are none.
        handle.send(Input::Egresses(Change::Reset { objects: Vec::new(), unreadable: Vec::new() })).await?;
        handle.send(Input::Slices(Change::Reset { objects: Vec::new(), unreadable: Vec::new() })).await?;
    }
    let (writer, applied) = Writer::new(datapath, snapshots.clone(), state_metrics);
    let alarm = writer.alarm();
    let listener = server::bind(&socket)?;
    tracing::info!(socket = %socket.display(), "listening for the CNI plugin");
    drop(socket_bound);

    let mut tasks = Tasks::new()?;
    tasks.spawn("health server", |drain| admin::serve_health(health, readiness.clone(), log, drain));
    tasks.spawn("metrics server", |drain| admin::serve_metrics(metrics, registry.clone(), drain));
    // Ends when all handles are gone, thus after whoever may still have something to tell.
    tasks.spawn("state", |_| async {
        state.run().await;
        anyhow::Ok(())
    });
    tasks.spawn("writer", |drain| writer.run(drain, move || drop(programmed)));
    let (serving, recovered) = match network {
        Some(network) => {
            let (serving, recovered) =
                spawn_network(&mut tasks, network, &client, &node, &readiness, &watch_metrics);
            (Some(serving), recovered)
        }
        None => (None, Vec::new()),
    };
    tasks.spawn("interface monitor", |drain| {
        let (netlink, handle, snapshots) = (Arc::clone(&netlink), handle.clone(), snapshots.clone());
        until(drain, async move {
            network::remember(recovered, &handle).await?;
            watch_links(netlink, handle, snapshots).await
        })
    });
    tasks.spawn("filter monitor", |drain| until(drain, watch_filters(snapshots.clone(), alarm)));
    tasks.spawn("pod adoption", |drain| {
        until(drain, adopt_pods(Arc::clone(&netlink), handle.clone(), snapshots.clone()))
    });
    tasks.spawn("pod watch", |drain| {
        let (client, node) = (client.clone(), node.clone());
        until(drain, watch::pods(client, node, handle.clone(), watch_metrics.clone()))
    });
    if features.enable_egress {
        tasks.spawn("Egress watch", |drain| {
            until(drain, watch::egresses(client.clone(), handle.clone(), watch_metrics.clone()))
        });
        tasks.spawn("EndpointSlice watch", |drain| {
            until(drain, watch::slices(client.clone(), handle.clone(), watch_metrics.clone()))
        });
    }
    tasks.spawn("namespace watch", |drain| {
        until(drain, watch::namespaces(client.clone(), handle.clone(), watch_metrics.clone()))
    });
    tasks.spawn("node watch", |drain| {
        until(drain, watch::own_node(client.clone(), node.clone(), handle.clone(), watch_metrics.clone()))
    });
    tasks.spawn("events", |drain| until(drain, events::publish(client.clone(), node, snapshots.clone())));
    tasks.spawn("readiness", |drain| {
        let mut snapshots = snapshots.clone();
        until(drain.clone(), async move {
            snapshots.wait_for(|snapshot| snapshot.desired.complete).await?;
            drop(listed);
            // The first lists are taken in.
            memory::give_back();
            drain.cancelled().await;
            anyhow::Ok(())
        })
    });
    tasks.spawn("CNI server", |drain| async move {
        let pods = Pods::new(client, netlink, handle, snapshots, applied);
        match serving {
            Some(Serving { wiring, ipam, compat_calico, failures }) => {
                let pods = IpamPods::new(pods, wiring, ipam, compat_calico, failures);
                server::serve(listener, pods, grpc_metrics, drain).await
            }
            None => server::serve(listener, pods, grpc_metrics, drain).await,
        }
    });
    tasks.run(DRAIN).await?;
    tracing::info!("ended; the datapath goes on forwarding");
    Ok(())
}

/// What the CNI server needs in IPAM mode.
struct Serving {
    wiring: Wiring,
    ipam: IpamService,
    compat_calico: bool,
    failures: mpsc::Sender<AddFailure>,
}

/// Starts the tasks of IPAM mode; gives what the others need of it.
fn spawn_network(
    tasks: &mut Tasks,
    network: Network,
    client: &Client,
    node: &str,
    readiness: &Readiness,
    metrics: &WatchMetrics,
) -> (Serving, Vec<Link>) {
    let Network { wiring, ipam, routes, recovered, told, compat_calico } = network;
    let (failures, failed) = mpsc::channel(FAILURES);
    let serving = Serving { wiring: wiring.clone(), ipam: ipam.clone(), compat_calico, failures };
    let known = readiness.blocker("address-blocks");
    tasks.spawn("address blocks", |drain| {
        let ipam = ipam.clone();
        until(drain.clone(), async move {
            ipam.ready().await;
            drop(known);
            drain.cancelled().await;
            anyhow::Ok(())
        })
    });
    tasks.spawn("IPAM", |drain| {
        let api = KubeApi::new(client.clone(), node.to_owned());
        let news = ipam::watch::news(client, node, metrics);
        ipam.run(api, routes, news, drain)
    });
    tasks.spawn("node routing", |drain| {
        let wiring = wiring.clone();
        until(drain, async move { wiring.keep_host(told).await.map(|never| match never {}) })
    });
    tasks.spawn("node addresses", |drain| {
        let tell = move |addresses| wiring.set_node(addresses);
        let follow = watch::node_addresses(client.clone(), node.to_owned(), metrics.clone(), tell);
        until(drain, async move {
            follow.await;
            anyhow::Ok(())
        })
    });
    tasks.spawn("pod events", |drain| {
        let publish = events::publish_failures(client.clone(), node.to_owned(), failed);
        until(drain.clone(), async move {
            publish.await;
            drain.cancelled().await;
            anyhow::Ok(())
        })
    });
    (serving, recovered)
}

/// Runs a task until it ends or the drain begins.
async fn until<E>(drain: Drain, task: impl Future<Output = Result<(), E>> + Send) -> Result<(), E> {
    drain.run_until_cancelled_owned(task).await.unwrap_or(Ok(()))
}

async fn open_datapath(
    client: &Client,
    node: &str,
    args: DatapathArgs,
    own_interfaces: bool,
) -> anyhow::Result<NodeDatapath> {
    let DatapathArgs {
        attach,
        egress_port,
        tunnel,
        same_node_bypass,
        bpffs_root,
        max_flows,
        max_flows_per_pod,
        other_protocols,
        icmp,
        shortcut,
        timeouts,
    } = args;
    let (node_ipv4, node_ipv6) = node_addresses(client, node).await;
    tracing::info!(?node_ipv4, ?node_ipv6, "source of ICMP errors to pods");
    let options = NodeOptions {
        bpffs_root,
        fou_port: egress_port,
        tunnel,
        node_ipv4,
        node_ipv6,
        max_flows,
        max_pod_flows: max_flows_per_pod.unwrap_or(max_flows / 4),
        address_only: other_protocols == OtherProtocols::AddressOnly,
        icmp,
        shortcut,
        same_node_bypass,
        timeouts,
    };
    let opened =
        tokio::task::spawn_blocking(move || NodeDatapath::open_with(options, attach.mode(own_interfaces)))
            .await?
            .context("cannot open the datapath");
    memory::give_back();
    opened
}

/// Addresses of this node: what the API says, else what packets to the outside would have. They only
/// serve as the source of ICMP errors, so that it is no failure to have none.
async fn node_addresses(client: &Client, node: &str) -> (Option<Ipv4Addr>, Option<Ipv6Addr>) {
    let api: Api<Node> = Api::all(client.clone());
    let NodeAddresses { ipv4, ipv6 } = match tokio::time::timeout(NODE_TIMEOUT, api.get(node)).await {
        Ok(Ok(object)) => NodeAddresses::of(&object),
        Ok(Err(error)) => {
            tracing::warn!(error = causes(&error), "cannot read our own Node");
            NodeAddresses::default()
        }
        Err(_) => {
            tracing::warn!("no answer about our own Node from the API server");
            NodeAddresses::default()
        }
    };
    if ipv4.is_some() || ipv6.is_some() {
        return (ipv4, ipv6);
    }
    let outside_v4 = SocketAddr::from((Ipv4Addr::new(192, 0, 0, 10), 9));
    let outside_v6 = SocketAddr::from((Ipv6Addr::new(0x2001, 1, 0, 0, 0, 0, 0, 2), 9));
    let v4 = match source_towards(outside_v4) {
        Some(IpAddr::V4(address)) => Some(address),
        _ => None,
    };
    let v6 = match source_towards(outside_v6) {
        Some(IpAddr::V6(address)) => Some(address),
        _ => None,
    };
    (v4, v6)
}

/// The address that packets to another would have as their source. Nothing is sent.
fn source_towards(outside: SocketAddr) -> Option<IpAddr> {
    let any: IpAddr = match outside {
        SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let socket = UdpSocket::bind((any, 0)).ok()?;
    socket.connect(outside).ok()?;
    Some(socket.local_addr().ok()?.ip())
}

/// Runs `coild uninstall`.
pub async fn uninstall(args: UninstallArgs) -> anyhow::Result<()> {
    let UninstallArgs { bpffs_root, log } = args;
    telemetry::init(NAME, &log)?;
    let pins = bpffs_root.join(format!("v{ABI_VERSION}"));
    if !pins.try_exists()? {
        println!("nothing is installed at {}", pins.display());
        return Ok(());
    }
    tokio::task::spawn_blocking(move || remove(bpffs_root, pins)).await?
}

fn remove(bpffs_root: PathBuf, pins: PathBuf) -> anyhow::Result<()> {
    let options = NodeOptions {
        bpffs_root,
        fou_port: 5555,
        tunnel: TunnelKind::default(),
        node_ipv4: None,
        node_ipv6: None,
        max_flows: u32::try_from(coil_common::names::MAX_FLOWS)?,
        icmp: IcmpLimit::default(),
        shortcut: false,
        same_node_bypass: false,
        max_pod_flows: 0,
        address_only: false,
        timeouts: Timeouts::default(),
    };
    let nothing = DesiredState { complete: true, ..DesiredState::default() };
    // Programs that hang on filters, not on links, must be taken away one by one.
    let detached = NodeDatapath::open(options).and_then(|mut datapath| {
        datapath.gc_gateways(&BTreeSet::new())?;
        datapath.apply(&nothing)
    });
    match detached {
        Ok(_) => {}
        Err(error @ DatapathError::Pin(PinError::Busy { .. })) => {
            return Err(error).context("stop coild first");
        }
        Err(error) => {
            tracing::warn!(error = causes(&error), "cannot detach in good order; removing all pins");
        }
    }
    std::fs::remove_dir_all(&pins).with_context(|| format!("cannot remove {}", pins.display()))?;
    println!("removed {}", pins.display());
    Ok(())
}
