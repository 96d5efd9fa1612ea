//! Byte-exact transfers with segmentation offloads on and off at every hop, client and gateway on the
//! same node and on different nodes.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Context, Result, ensure};
use coil_lab::drive::{Addresses, ask, exec, pod};
use coil_lab::report::Transfer;
use coil_lab::{Lab, Target};

use crate::support::{HTTP, INTERNET, client, egress, ip, on_node, ready, remove, scenarios};

scenarios! {
    different_nodes_are_byte_exact,
    same_node_is_byte_exact,
}

async fn different_nodes_are_byte_exact(lab: &Lab) -> Result<()> {
    transfers(lab, "off-far", "worker2").await
}

async fn same_node_is_byte_exact(lab: &Lab) -> Result<()> {
    transfers(lab, "off-near", "worker1").await
}

const FEATURES: [&str; 5] = ["tso", "gso", "gro", "tx", "tx-udp-segmentation"];

/// A hop: a place, and one of its interfaces.
pub struct Hop {
    /// For messages.
    pub what: &'static str,
    /// Where it is.
    pub place: Target,
    /// Its name there.
    pub interface: String,
}

async fn transfers(lab: &Lab, namespace: &str, gateway_node: &str) -> Result<()> {
    let clients = format!("{namespace}-client");
    let name = (clients.as_str(), "client");
    let annotation = format!("egress.coil.cybozu.com/{namespace}");
    let manifest = egress(namespace, "e", &["203.0.113.0/24", "2001:db8:ffff::/48"], &on_node(gateway_node))
        + &client(name.0, name.1, "worker1", &[(&annotation, "e")]);
    ready(lab, &manifest, (namespace, "e"), name).await?;

    let gateways = Addresses::of_egress(lab, namespace, "e").await?;
    let gateway = gateways.names().next().context("no egress pod")?.to_owned();
    let own = Addresses::of(lab, &["--namespace", name.0, "pod", name.1]).await?;
    let address = ip(INTERNET[0]);
    let hops =
        hops(lab, name, (namespace, &gateway), gateway_node, own.like(address)?, gateways.like(address)?)
            .await?;
    exact(lab, name, "all on").await?;
    for hop in &hops {
        set(lab, hop, "off").await?;
        let done = exact(lab, name, &format!("off at {}", hop.what)).await;
        set(lab, hop, "on").await?;
        done?;
    }
    for hop in &hops {
        set(lab, hop, "off").await?;
    }
    let done = exact(lab, name, "off at every hop").await;
    for hop in &hops {
        set(lab, hop, "on").await?;
    }
    done?;
    remove(lab, &[name.0, namespace]).await
}

/// All interfaces between a client on `worker1` and the external host.
pub async fn hops(
    lab: &Lab,
    client: (&str, &str),
    gateway: (&str, &str),
    gateway_node: &str,
    client_address: IpAddr,
    gateway_address: IpAddr,
) -> Result<[Hop; 6]> {
    Ok([
        Hop { what: "client pod", place: pod(client.0, client.1), interface: "eth0".to_owned() },
        leads_to(lab, "client's veth", Target::Node("worker1".to_owned()), client_address).await?,
        Hop {
            what: "client's node",
            place: Target::Node("worker1".to_owned()),
            interface: "eth0".to_owned(),
        },
        leads_to(lab, "gateway's veth", Target::Node(gateway_node.to_owned()), gateway_address).await?,
        Hop { what: "egress pod", place: pod(gateway.0, gateway.1), interface: "eth0".to_owned() },
        Hop { what: "external host", place: Target::External, interface: "eth0".to_owned() },
    ])
}

async fn exact(lab: &Lab, name: (&str, &str), offloads: &str) -> Result<()> {
    for server in INTERNET.map(ip) {
        for verb in ["upload", "download"] {
            let server = SocketAddr::new(server, HTTP).to_string();
            let arguments = ["--timeout", "60", verb, &server, "--bytes", "8388608"];
            let done: Result<Transfer> = ask(lab, &pod(name.0, name.1), &arguments).await;
            let done = done.with_context(|| format!("{verb}, {server}, offloads {offloads}"))?;
            ensure!(done.ok && done.bytes == 8_388_608, "{verb}, {server}, offloads {offloads}: {done:?}");
        }
    }
    Ok(())
}

/// The interface of a place by which it reaches an address.
pub async fn leads_to(lab: &Lab, what: &'static str, place: Target, address: IpAddr) -> Result<Hop> {
    let route = exec(lab, &place, &["ip", "route", "get", &address.to_string()]).await?;
    let mut words = route.split_whitespace().skip_while(|word| *word != "dev");
    let interface = words.nth(1).with_context(|| format!("no interface in: {route}"))?.to_owned();
    Ok(Hop { what, place, interface })
}

/// Turns all offloads of a hop on or off.
pub async fn set(lab: &Lab, hop: &Hop, value: &str) -> Result<()> {
    let mut argv = vec!["ethtool", "-K", &hop.interface];
    for feature in FEATURES {
        argv.extend([feature, value]);
    }
    exec(lab, &hop.place, &argv).await.with_context(|| format!("offloads of {}", hop.what)).map(drop)
}
