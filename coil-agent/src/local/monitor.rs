//! Lists interfaces whenever the kernel says that some have changed, and from time to time.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use rtnetlink::MulticastGroup;
use tokio::sync::watch;
use tokio::time::Instant;

use crate::cni::error::causes;
use crate::netlink::{Changes, Link, Netlink, NetlinkError};
use crate::state::{Closed, Input, Snapshot, StateHandle};
use crate::wiring::ALIAS_PREFIX;

/// Interfaces are listed at least this often, in case that a message of the kernel was lost.
const PERIOD: Duration = Duration::from_secs(30);
/// Changes come in bursts: a pod that starts changes its interface several times.
const SETTLE: Duration = Duration::from_millis(20);
/// Time between two listings while changes go on: with many pods one takes long, and holds up those who make the
/// changes.
const REST: Duration = Duration::from_millis(200);
/// Addresses outside of the cluster; the way there is the way out.
const OUTSIDE: [&str; 2] = ["192.0.0.10", "2001:1::2"];

/// Why interfaces are no longer watched.
#[derive(Debug, thiserror::Error)]
pub enum MonitorError {
    /// The kernel does not tell of changes.
    #[error("cannot subscribe to changes of interfaces")]
    Subscribe(#[source] std::io::Error),
    /// The process is ending.
    #[error(transparent)]
    Closed(#[from] Closed),
}

/// Keeps the picture's interfaces up to date, until the picture is gone.
pub async fn watch_links<N: Netlink>(
    netlink: Arc<N>,
    state: StateHandle,
    snapshots: watch::Receiver<Snapshot>,
) -> Result<(), MonitorError> {
    let mut changes =
        Changes::subscribe("interfaces", &[MulticastGroup::Link]).map_err(MonitorError::Subscribe)?;
    loop {
        match list(&*netlink, &state, &snapshots).await {
            Ok(()) => {}
            Err(ListError::Closed(closed)) => return Err(closed.into()),
            Err(ListError::Netlink(error)) => {
                tracing::warn!(error = causes(&error), "cannot list interfaces");
            }
        }
        let listed = Instant::now();
        changes.next(SETTLE, PERIOD).await;
        let rest = REST.saturating_sub(listed.elapsed());
        if !rest.is_zero() {
            changes.next(rest, rest).await;
        }
    }
}

#[derive(Debug, thiserror::Error)]
enum ListError {
    #[error(transparent)]
    Netlink(#[from] NetlinkError),
    #[error(transparent)]
    Closed(#[from] Closed),
}

async fn list<N: Netlink>(
    netlink: &N,
    state: &StateHandle,
    snapshots: &watch::Receiver<Snapshot>,
) -> Result<(), ListError> {
    let listing = state.begin_listing();
    let known: Vec<(String, u32)> =
        snapshots.borrow().desired.pods.iter().map(|(uid, pod)| (uid.clone(), pod.ifindex)).collect();
    // Of both modes. Those that do not tell whose they are may have been found by a route.
    let mut links: Vec<Link> = netlink.links_with_alias(ALIAS_PREFIX).await?;
    // Interfaces whose alias belongs to somebody else.
    for (_, index) in known {
        if !links.iter().any(|link| link.index == index) {
            links.extend(netlink.link(index).await?);
        }
    }
    let mtu = uplink_mtu(netlink).await?;
    state.send(Input::UplinkMtu(mtu)).await?;
    state.send(Input::Links(links, listing)).await?;
    Ok(())
}

/// The smallest MTU of the ways out, of either family.
async fn uplink_mtu<N: Netlink>(netlink: &N) -> Result<Option<u32>, NetlinkError> {
    let mut smallest = None;
    for address in OUTSIDE {
        let Ok(address) = address.parse::<IpAddr>() else {
            continue;
        };
        if let Some(link) = netlink.route_link(address).await? {
            smallest = Some(smallest.map_or(link.mtu, |mtu: u32| mtu.min(link.mtu)));
        }
    }
    Ok(smallest)
}
