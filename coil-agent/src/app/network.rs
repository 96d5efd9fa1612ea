//! The parts of `coild` in IPAM mode: what hands out addresses, wires pods and exports routes.

use anyhow::Context;
use prometheus::Registry;

use crate::args::NetworkArgs;
use crate::ipam::{IpamMetrics, IpamOptions, IpamService, Pace};
use crate::local::LocalPod;
use crate::routes::{Exporter, KernelTable};
use crate::state::{Closed, Input, StateHandle};
use crate::wiring::{Config, Link, Told, Wire, Wiring, addresses};

/// What belongs together in IPAM mode.
pub(super) struct Network {
    pub(super) wiring: Wiring,
    pub(super) ipam: IpamService,
    pub(super) routes: Exporter<KernelTable>,
    /// Pods that an earlier process has wired.
    pub(super) recovered: Vec<Link>,
    /// What has been told of the node's rules.
    pub(super) told: Told,
    pub(super) compat_calico: bool,
}

impl Network {
    /// Prepares the node and looks at what it has. Addresses are handed out later, when blocks are known.
    pub(super) async fn open(node: &str, args: NetworkArgs, registry: &Registry) -> anyhow::Result<Self> {
        let NetworkArgs {
            pod_table_id,
            pod_rule_prio,
            export_table_id,
            protocol_id,
            compat_calico,
            register_from_main,
            addressblock_gc_interval,
            clear_routes_on_shutdown,
        } = args;
        let wiring = Wiring::new(Config {
            pod_table: pod_table_id,
            rule_priority: pod_rule_prio,
            protocol: protocol_id,
            compat_calico,
            register_from_main,
        });
        let mut told = Told::default();
        wiring.prepare_host(&mut told).await;
        let recovered = wiring.list().await.context("cannot find the pods that are wired")?;
        let mut found = Vec::new();
        for link in &recovered {
            if addresses(&link.found.assigned).is_empty() {
                tracing::warn!(owner = %link.found.owner, "no address is routed to the interface of a container");
            } else {
                found.push(link.found.clone());
            }
        }
        tracing::info!(interfaces = recovered.len(), addresses = found.len(), "pods that are wired already");
        let options = IpamOptions {
            node: node.to_owned(),
            pace: Pace { gc_interval: addressblock_gc_interval.0, ..Pace::default() },
            clear_routes_on_shutdown,
        };
        let ipam = IpamService::new(options, found, IpamMetrics::register(registry)?);
        let table = KernelTable::new(export_table_id, protocol_id)?;
        let routes = Exporter::new(table, protocol_id, registry)?;
        Ok(Self { wiring, ipam, routes, recovered, told, compat_calico })
    }
}

/// Tells the picture of pods that are wired already, before interfaces are listed for the first time. Those that
/// do not say which pod's they are, as the original's, are found by the routes to them.
pub(super) async fn remember(recovered: Vec<Link>, state: &StateHandle) -> Result<(), Closed> {
    for link in recovered {
        let Some(uid) = link.uid else {
            continue;
        };
        let local = LocalPod {
            ifname: link.found.owner.ifname,
            ifindex: link.index,
            mtu: link.mtu,
            addresses: addresses(&link.found.assigned),
        };
        state.send(Input::Wired(uid, local)).await?;
    }
    Ok(())
}
