//! Hears of filters that are removed from interfaces of pods. A filter belongs to nobody: other software may remove
//! it, or all that an interface has, and the pod's packets would go past its policy until the next look.

use std::sync::Arc;
use std::time::Duration;

use futures::{FutureExt, StreamExt};
use netlink_packet_core::{NetlinkMessage, NetlinkPayload};
use netlink_packet_route::RouteNetlinkMessage;
use rtnetlink::MulticastGroup;
use tokio::sync::{Notify, watch};

use super::MonitorError;
use crate::state::{Closed, Snapshot};

/// Time between two alarms, should somebody remove them over and over.
const PAUSE: Duration = Duration::from_secs(1);

/// Raises the alarm when somebody removes a filter from the interface of a pod, until the picture is gone.
pub async fn watch_filters(
    snapshots: watch::Receiver<Snapshot>,
    alarm: Arc<Notify>,
) -> Result<(), MonitorError> {
    let (connection, _handle, mut changes) =
        rtnetlink::new_multicast_connection(&[MulticastGroup::Tc]).map_err(MonitorError::Subscribe)?;
    // Dropped, and thereby stopped, with this function. It may end in either of two places and is not asked again.
    let mut connection = std::pin::pin!(connection.fuse());
    loop {
        let change = tokio::select! {
            () = &mut connection => None,
            change = changes.next() => change,
        };
        let Some((message, _)) = change else {
            tracing::warn!("the kernel no longer tells of filters that are removed");
            // The maps and filters are looked at from time to time all the same.
            return gone(snapshots).await;
        };
        let Some(ifindex) = robbed(&message, &snapshots) else {
            continue;
        };
        tracing::warn!(ifindex, "somebody has removed filters from the interface of a pod");
        alarm.notify_one();
        tokio::select! {
            () = tokio::time::sleep(PAUSE) => {}
            () = &mut connection => continue,
        }
        let mut again = false;
        while let Some(Some((message, _))) = changes.next().now_or_never() {
            again |= robbed(&message, &snapshots).is_some();
        }
        if again {
            alarm.notify_one();
        }
    }
}

async fn gone(mut snapshots: watch::Receiver<Snapshot>) -> Result<(), MonitorError> {
    while snapshots.changed().await.is_ok() {}
    Err(Closed.into())
}

/// The interface of a pod from which filters were removed.
fn robbed(
    message: &NetlinkMessage<RouteNetlinkMessage>,
    snapshots: &watch::Receiver<Snapshot>,
) -> Option<u32> {
    let ifindex = match &message.payload {
        NetlinkPayload::InnerMessage(
            RouteNetlinkMessage::DelQueueDiscipline(removed) | RouteNetlinkMessage::DelTrafficFilter(removed),
        ) => u32::try_from(removed.header.index).ok()?,
        _ => return None,
    };
    snapshots.borrow().desired.pods.values().any(|pod| pod.ifindex == ifindex).then_some(ifindex)
}
