//! Netlink against the kernel.

#![expect(clippy::unwrap_used, clippy::panic, reason = "tests")]

use coil_agent::netlink::{Netlink, NetlinkError, RtNetlink};

use crate::support::net::NetNs;
use crate::support::topology::Topology;

fn in_runtime<T: Send + 'static, F>(space: &NetNs, work: impl FnOnce() -> F + Send + 'static) -> T
where
    F: Future<Output = T>,
{
    space.run(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async { work().await })
    })
}

#[test]
#[ignore = "privileged: needs root"]
fn the_host_side_interface_is_found_by_peer_index() {
    let topology = Topology::new();
    let wanted = topology.node.ifindex("vclient");
    let pod = topology.client.net.path();
    let (address, address6) = (topology.client.address(false), topology.client.address(true));
    in_runtime(&topology.node, move || async move {
        let netlink = RtNetlink::new().unwrap();
        let link = netlink.host_peer(&pod, "eth0").await.unwrap();
        assert_eq!((link.index, link.name.as_str()), (wanted, "vclient"));
        assert!(link.is_veth());
        netlink.set_alias(link.index, "COIL::uid:eth0").await.unwrap();
        let listed = netlink.links_with_alias("COIL:").await.unwrap();
        assert_eq!(listed.len(), 1);
        assert_eq!(listed[0].alias.as_deref(), Some("COIL::uid:eth0"));
        for address in [address, address6] {
            assert_eq!(netlink.veth_towards(address).await.unwrap().map(|l| l.index), Some(wanted));
        }
        let loopback = netlink.veth_towards("127.0.0.1".parse().unwrap()).await.unwrap();
        assert_eq!(loopback, None);
        assert_eq!(netlink.route_link("203.0.113.1".parse().unwrap()).await.unwrap(), None);
        assert_eq!(netlink.link(99_999).await.unwrap(), None);
        let error = netlink.set_alias(99_999, "x").await.unwrap_err();
        assert!(error.is_gone(), "{error:?}");
        let error = netlink.host_peer(&pod, "eth7").await.unwrap_err();
        assert!(matches!(error, NetlinkError::NoHostPeer { .. }), "{error:?}");
        let error = netlink.host_peer("/run/netns/nothing".as_ref(), "eth0").await.unwrap_err();
        assert!(error.is_gone(), "{error:?}");
    });
}

#[test]
#[ignore = "privileged: needs root"]
fn a_peer_elsewhere_is_not_mistaken_for_ours() {
    // The pod's peer lives in a third name space, under an index that ours has, too.
    let topology = Topology::new();
    let stranger = NetNs::new("stranger");
    let pod = topology.client.net.path();
    in_runtime(&stranger, move || async move {
        let netlink = RtNetlink::new().unwrap();
        match netlink.host_peer(&pod, "eth0").await {
            Err(NetlinkError::NoHostPeer { .. }) => {}
            other => panic!("{other:?}"),
        }
    });
}
