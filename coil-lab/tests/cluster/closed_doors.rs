//! What must not get through: strangers' tunnel packets, and traffic with no gateway.

use anyhow::{Result, ensure};
use coil_lab::Lab;
use coil_lab::drive::{Addresses, apply, exec, kubectl, pod, scrape, sum, until, wait_for};

use crate::support::{INTERNET, blocked, client, egress, ip, on_node, ready, remove, scenarios, through};

scenarios! {
    strangers_cannot_use_a_gateway,
    no_ready_gateway_drops,
}

/// A pod that is nobody's client sends a tunnel packet by hand: the gateway counts and drops it.
async fn strangers_cannot_use_a_gateway(lab: &Lab) -> Result<()> {
    let stranger = ("door-client", "stranger");
    let manifest = egress("door", "e", &["203.0.113.0/24", "2001:db8:ffff::/48"], "")
        + &client(stranger.0, stranger.1, "worker1", &[]);
    ready(lab, &manifest, ("door", "e"), stranger).await?;
    let gateways = Addresses::of_egress(lab, "door", "e").await?;
    let name = gateways.names().next().unwrap_or_default().to_owned();
    let gateway = pod("door", &name);
    let drops = || async {
        let metrics = scrape(lab, &gateway, 8080).await?;
        Ok::<_, anyhow::Error>(sum(&metrics, "coil_drops_total", &[("reason", "unknown_client")]))
    };
    for server in INTERNET.map(ip) {
        let before = drops().await?;
        let to = gateways.like(server)?;
        // Direct FOU has no header of its own: the payload of the datagram is the inner packet. This
        // one is an IP header without a payload.
        let inner = if server.is_ipv4() {
            "\\x45\\x00\\x00\\x14\\x00\\x00\\x40\\x00\\x40\\x11\\x00\\x00\\x0a\\xf4\\x01\\x02\\xcb\\x00\\x71\\x0a".to_owned()
        } else {
            format!(
                "\\x60\\x00\\x00\\x00\\x00\\x00\\x11\\x40{}",
                "\\x20\\x01\\x0d\\xb8\\xff\\xff".to_owned() + &"\\x00".repeat(26)
            )
        };
        let send = format!("printf '{inner}' > /dev/udp/{to}/5555");
        exec(lab, &pod(stranger.0, stranger.1), &["bash", "-c", &send]).await?;
        until("the drop is counted", || async {
            let after = drops().await?;
            ensure!(after >= before + 1.0, "before {before}, after {after}");
            Ok(())
        })
        .await?;
    }
    remove(lab, &["door-client", "door"]).await
}

/// With no gateway ready the client's packets are dropped and counted, never sent as they are; when
/// one is ready they flow.
async fn no_ready_gateway_drops(lab: &Lab) -> Result<()> {
    let pod = ("none-client", "client");
    let nowhere = "  template:\n    spec:\n      nodeSelector: {nowhere: \"true\"}\n      containers: [{name: egress}]\n";
    let annotation = [("egress.coil.cybozu.com/none", "e")];
    let manifest = egress("none", "e", &["203.0.113.0/24", "2001:db8:ffff::/48"], nowhere)
        + &client(pod.0, pod.1, "worker1", &annotation);
    apply(lab, &manifest).await?;
    wait_for(lab, "condition=Ready", pod.0, &["pod", pod.1]).await?;
    for server in INTERNET.map(ip) {
        blocked(lab, pod, server).await?;
    }
    let metrics = scrape(lab, &coil_lab::Target::Node("worker1".to_owned()), 9384).await?;
    ensure!(
        sum(&metrics, "coil_drops_total", &[("reason", "no_gateway")]) > 0.0,
        "the drops are not counted"
    );
    apply(lab, &egress("none", "e", &["203.0.113.0/24", "2001:db8:ffff::/48"], &on_node("worker2"))).await?;
    for server in INTERNET.map(ip) {
        until("a gateway is ready", || through(lab, pod, server, ("none", "e"))).await?;
    }
    kubectl(lab, &["delete", "--namespace", pod.0, "pod", pod.1], "").await?;
    remove(lab, &["none-client", "none"]).await
}
