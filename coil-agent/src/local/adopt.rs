//! Finds the interfaces of pods that were wired before Coil was there, by the routes to them.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;

use super::{ALIAS_PREFIX, LocalPod, POD_INTERFACE, alias};
use crate::cni::error::causes;
use crate::desired::PodUid;
use crate::netlink::{Link, Netlink};
use crate::state::{Closed, Input, Snapshot, StateHandle};

/// A pod whose interface was not found is looked for again after this time.
const PERIOD: Duration = Duration::from_secs(10);

/// Looks for the interfaces of pods without one, until the picture is gone.
pub async fn adopt_pods<N: Netlink>(
    netlink: Arc<N>,
    state: StateHandle,
    mut snapshots: watch::Receiver<Snapshot>,
) -> Result<(), Closed> {
    let mut first = true;
    loop {
        let snapshot = snapshots.borrow_and_update().clone();
        for (uid, addresses) in snapshot.unwired().into_iter().flatten() {
            let mut found: Option<Link> = None;
            for address in addresses {
                match netlink.veth_towards(*address).await {
                    Ok(Some(link)) => {
                        found = Some(link);
                        break;
                    }
                    Ok(None) => {}
                    Err(error) => {
                        tracing::warn!(pod.uid = uid, %address, error = causes(&error), "cannot look up the route to a pod");
                    }
                }
            }
            match found {
                Some(link) => adopt(&*netlink, &state, &snapshot, uid, link).await?,
                None => tracing::debug!(pod.uid = uid, "no interface leads to this pod"),
            }
        }
        if first && snapshot.unwired().is_some() {
            first = false;
            state.send(Input::Adopted).await?;
        }
        let waiting = snapshot.unwired().is_some_and(|pods| !pods.is_empty());
        let changed = async {
            loop {
                if snapshots.changed().await.is_err() {
                    return Err(Closed);
                }
                if snapshots.borrow().unwired() != snapshot.unwired() {
                    return Ok(());
                }
            }
        };
        if waiting {
            // Running out of time is what is wanted here.
            tokio::time::timeout(PERIOD, changed).await.unwrap_or(Ok(()))?;
        } else {
            changed.await?;
        }
    }
}

async fn adopt<N: Netlink>(
    netlink: &N,
    state: &StateHandle,
    snapshot: &Snapshot,
    uid: &PodUid,
    link: Link,
) -> Result<(), Closed> {
    let taken = snapshot.desired.pods.iter().any(|(other, pod)| other != uid && pod.ifindex == link.index);
    let alias_of_ours = link.alias.as_deref().is_some_and(|a| a.starts_with(ALIAS_PREFIX));
    let other_pod = link.pod.as_ref().is_some_and(|pod| pod != uid);
    if taken || alias_of_ours || other_pod {
        tracing::debug!(pod.uid = uid, link = link.name, "the interface belongs to another pod");
        return Ok(());
    }
    if link.alias.is_none()
        && let Err(error) = netlink.set_alias(link.index, &alias(uid, POD_INTERFACE)).await
    {
        tracing::warn!(pod.uid = uid, link = link.name, error = causes(&error), "cannot set the alias");
    }
    tracing::info!(pod.uid = uid, link = link.name, "found the interface of a pod by its route");
    let local =
        LocalPod { ifname: POD_INTERFACE.into(), ifindex: link.index, mtu: link.mtu, addresses: Vec::new() };
    state.send(Input::Wired(uid.clone(), local)).await
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

    use super::*;
    use crate::index::testing::pod;
    use crate::index::{Change, PodView};
    use crate::netlink::fake::FakeNetlink;
    use crate::state::State;

    fn reset<T>(objects: Vec<T>) -> Change<T> {
        Change::Reset { objects, unreadable: vec![] }
    }

    #[tokio::test]
    async fn a_pod_older_than_coil_is_found_by_its_route_and_marked() {
        let netlink = Arc::new(FakeNetlink::default());
        netlink.add_pod(7, "/run/netns/a", "eth0", "10.0.0.7".parse().unwrap());
        let (state, handle, mut snapshots) = State::new();
        let state = tokio::spawn(state.run());
        let adopter = tokio::spawn(adopt_pods(Arc::clone(&netlink), handle.clone(), snapshots.clone()));
        let listing = handle.begin_listing();
        handle.send(Input::Links(vec![], listing)).await.unwrap();
        handle
            .send(Input::Pods(reset(vec![PodView {
                addresses: vec!["10.0.0.7".parse().unwrap()],
                ..pod("a", "1")
            }])))
            .await
            .unwrap();
        handle.send(Input::Egresses(reset(vec![]))).await.unwrap();
        handle.send(Input::Slices(reset(vec![]))).await.unwrap();
        handle.send(Input::Namespaces(reset(vec![]))).await.unwrap();
        let wired = snapshots.wait_for(|s| s.desired.pods.contains_key("1"));
        let wired = tokio::time::timeout(Duration::from_secs(5), wired).await.unwrap().unwrap();
        assert_eq!(wired.desired.pods["1"].ifindex, 7);
        drop(wired);
        let link = netlink.link(7).await.unwrap().unwrap();
        assert_eq!(link.alias.as_deref(), Some("COIL::1:eth0"));
        adopter.abort();
        drop(handle);
        assert!(adopter.await.is_err_and(|error| error.is_cancelled()));
        state.await.unwrap();
    }
}
