//! Routes to this node's blocks, in a routing table of their own, for a routing daemon to tell others of.
//!
//! Owns the routes of our protocol number in that table, and no others: a route of somebody else stays, and
//! one that is where ours should be is reported.

mod kernel;

use std::collections::BTreeSet;
use std::future::Future;

use ipnet::IpNet;
use prometheus::{IntGauge, Registry};

use crate::netlink::NetlinkError;

pub use kernel::KernelTable;

/// A route of the table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TableRoute {
    /// Its destination.
    pub net: IpNet,
    /// Number of the protocol that has made it.
    pub protocol: u8,
    /// Whether it is as ours should be: to the loopback interface, without a gateway.
    pub plain: bool,
}

/// A routing table.
pub trait Table: Send + Sync + 'static {
    /// All its routes.
    fn list(&self) -> impl Future<Output = Result<Vec<TableRoute>, NetlinkError>> + Send;

    /// Adds a route of ours; false if there is one of somebody else.
    fn add(&self, net: IpNet) -> impl Future<Output = Result<bool, NetlinkError>> + Send;

    /// Removes a route of ours; it may be gone already.
    fn remove(&self, net: IpNet) -> impl Future<Output = Result<(), NetlinkError>> + Send;
}

/// Makes routes equal to a set.
pub trait Export: Send + Sync + 'static {
    /// Adds what is missing and removes what is too many.
    fn export(&self, wanted: &BTreeSet<IpNet>) -> impl Future<Output = Result<(), NetlinkError>> + Send;
}

/// Exports nothing.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoExport;

impl Export for NoExport {
    async fn export(&self, _: &BTreeSet<IpNet>) -> Result<(), NetlinkError> {
        Ok(())
    }
}

/// Exports to a table.
#[derive(Debug)]
pub struct Exporter<T> {
    table: T,
    protocol: u8,
    routes: IntGauge,
    taken: IntGauge,
}

impl<T: Table> Exporter<T> {
    /// Exports to a table, as a protocol, with metrics.
    pub fn new(table: T, protocol: u8, registry: &Registry) -> prometheus::Result<Self> {
        let gauge = |name: &str, help: &str| {
            let gauge = IntGauge::new(name, help)?;
            registry.register(Box::new(gauge.clone()))?;
            prometheus::Result::Ok(gauge)
        };
        Ok(Self {
            table,
            protocol,
            routes: gauge("coil_exported_routes", "Routes to blocks of this node in the exported table.")?,
            taken: gauge(
                "coil_export_conflicts",
                "Routes to blocks of this node that could not be exported since another program has such a route.",
            )?,
        })
    }
}

impl<T: Table> Export for Exporter<T> {
    async fn export(&self, wanted: &BTreeSet<IpNet>) -> Result<(), NetlinkError> {
        let Plan { add, remove } = plan(wanted, &self.table.list().await?, self.protocol);
        for net in remove {
            tracing::info!(%net, "no longer exported");
            self.table.remove(net).await?;
        }
        let mut taken = 0;
        for net in add {
            if self.table.add(net).await? {
                tracing::info!(%net, "exported");
            } else {
                taken += 1;
                tracing::warn!(%net, "another program has a route to this block in the exported table");
            }
        }
        self.taken.set(taken);
        self.routes.set(i64::try_from(wanted.len()).unwrap_or(i64::MAX) - taken);
        Ok(())
    }
}

/// What makes a table equal to a set.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Plan {
    remove: Vec<IpNet>,
    add: Vec<IpNet>,
}

fn plan(wanted: &BTreeSet<IpNet>, present: &[TableRoute], protocol: u8) -> Plan {
    let ours = || present.iter().filter(|route| route.protocol == protocol);
    let good: BTreeSet<IpNet> = ours().filter(|route| route.plain).map(|route| route.net).collect();
    let bad: BTreeSet<IpNet> = ours().filter(|route| !route.plain).map(|route| route.net).collect();
    Plan {
        remove: good.difference(wanted).chain(&bad).copied().collect::<BTreeSet<_>>().into_iter().collect(),
        // Removing the bad ones may remove a good one of the same destination.
        add: wanted.iter().filter(|net| !good.contains(*net) || bad.contains(*net)).copied().collect(),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;

    fn nets(texts: &[&str]) -> BTreeSet<IpNet> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    fn route(net: &str, protocol: u8, plain: bool) -> TableRoute {
        TableRoute { net: net.parse().unwrap(), protocol, plain }
    }

    fn texts(nets: &[IpNet]) -> Vec<String> {
        nets.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn only_routes_of_our_protocol_are_touched() {
        let present = [
            route("10.2.0.0/27", 30, true),
            route("10.2.0.32/27", 30, true),
            route("10.2.0.64/27", 30, false),
            route("fd02::200/123", 30, false),
            route("10.9.0.0/24", 4, true),
            route("10.2.0.96/27", 4, true),
        ];
        let wanted = nets(&["10.2.0.32/27", "10.2.0.64/27", "10.2.0.96/27", "fd02::/123"]);
        let Plan { remove, add } = plan(&wanted, &present, 30);
        assert_eq!(texts(&remove), ["10.2.0.0/27", "10.2.0.64/27", "fd02::200/123"]);
        assert_eq!(texts(&add), ["10.2.0.64/27", "10.2.0.96/27", "fd02::/123"]);
        assert_eq!(plan(&nets(&[]), &present[4..], 30), Plan::default());
    }
}
