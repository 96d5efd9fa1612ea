//! UDP as QUIC stacks send it, many datagrams in one piece, through the egress: every datagram arrives as
//! sent, and each counts as one packet, whatever hop cuts the pieces up.

use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicU16, Ordering};

use anyhow::{Context, Result, ensure};
use coil_lab::drive::{Addresses, ask, exec, flow_of_port, pod};
use coil_lab::report::Gso;
use coil_lab::{Lab, Target};
use serde_json::Value;

use crate::offloads::{Hop, hops, leads_to, set};
use crate::support::{INTERNET, client, egress, ip, on_node, ready, remove, scenarios, through};

scenarios! {
    udp_in_large_pieces_to_another_node,
    udp_in_large_pieces_on_the_same_node,
}

const UDP: u8 = 17;
/// Port of the server that echoes in pieces as large as it gets them.
const GSO: u16 = 443;
const SENDS: u64 = 40;
const DATAGRAMS: u64 = 20;
/// The next run's port, below those that the kernel hands out: one that it chose at random was, once in a hundred or
/// so, that of an earlier run, whose flow was still counted.
static PORT: AtomicU16 = AtomicU16::new(20_000);

async fn udp_in_large_pieces_to_another_node(lab: &Lab) -> Result<()> {
    pieces(lab, "gso-far", "worker2").await
}

async fn udp_in_large_pieces_on_the_same_node(lab: &Lab) -> Result<()> {
    pieces(lab, "gso-near", "worker1").await
}

async fn pieces(lab: &Lab, namespace: &str, gateway_node: &str) -> Result<()> {
    let clients = format!("{namespace}-client");
    let name = (clients.as_str(), "client");
    let annotation = format!("egress.coil.cybozu.com/{namespace}");
    let manifest = egress(namespace, "e", &["203.0.113.0/24", "2001:db8:ffff::/48"], &on_node(gateway_node))
        + &client(name.0, name.1, "worker1", &[(&annotation, "e")]);
    ready(lab, &manifest, (namespace, "e"), name).await?;
    let gateways = Addresses::of_egress(lab, namespace, "e").await?;
    let gateway = gateways.names().next().context("no egress pod")?.to_owned();
    let places = [pod(name.0, name.1), Target::External];
    for place in &places {
        exec(lab, place, &["nft", COUNT]).await.context("counting pieces")?;
    }
    let done = pieces_by_hop(lab, name, (namespace, &gateway), gateway_node).await;
    for place in &places {
        exec(lab, place, &["nft", "delete table inet pieces"]).await?;
    }
    done?;
    remove(lab, &[name.0, namespace]).await
}

/// Counts the packets that leave a place, as its kernel sees them before it cuts any.
const COUNT: &str = "add table inet pieces; add chain inet pieces out { type filter hook output priority 0; }; \
                     add counter inet pieces sent; add rule inet pieces out udp dport 443 counter name sent; \
                     add rule inet pieces out udp sport 443 counter name sent";

async fn pieces_by_hop(
    lab: &Lab,
    name: (&str, &str),
    gateway: (&str, &str),
    gateway_node: &str,
) -> Result<()> {
    let gateways = Addresses::of_egress(lab, gateway.0, "e").await?;
    let own = Addresses::of(lab, &["--namespace", name.0, "pod", name.1]).await?;
    for server in INTERNET.map(ip) {
        through(lab, name, server, (gateway.0, "e")).await?;
        let own = own.like(server)?;
        let mut hops: Vec<Hop> =
            hops(lab, name, gateway, gateway_node, own, gateways.like(server)?).await?.into();
        hops.push(leads_to(lab, "router's veth", Target::Router, server).await?);
        for hop in &hops {
            set(lab, hop, "on").await?;
        }
        let done = exact(lab, name, own, server, "all on").await?;
        // Or this test tests nothing: pieces leave the client whole.
        ensure!(done.there == SENDS, "{server}: {SENDS} pieces left the client as {} packets", done.there);
        for hop in &hops {
            set(lab, hop, "off").await?;
            let done = exact(lab, name, own, server, &format!("off at {}", hop.what)).await;
            set(lab, hop, "on").await?;
            done?;
        }
        // A virtual device merges only what a peer without offloads has sent: then UDP_GRO gives the server
        // many datagrams at once, it answers as it was asked, and so does the client get the answers.
        let before_ends = [&hops[1], &hops[6]];
        for hop in before_ends {
            set(lab, hop, "off").await?;
        }
        let done = exact(lab, name, own, server, "off before both ends").await;
        for hop in before_ends {
            set(lab, hop, "on").await?;
        }
        let done = done?;
        let many = done.back < done.gso.sent && done.gso.receives < done.gso.sent;
        ensure!(many, "{server}: UDP_GRO never did anything: {done:?}");
        for hop in &hops {
            set(lab, hop, "off").await?;
        }
        let done = exact(lab, name, own, server, "off at every hop").await;
        for hop in &hops {
            set(lab, hop, "on").await?;
        }
        done?;
    }
    Ok(())
}

/// What a run has shown.
#[derive(Debug)]
struct Done {
    gso: Gso,
    /// Packets that left the client.
    there: u64,
    /// Packets that left the server.
    back: u64,
}

/// What [`COUNT`] has counted so far.
async fn pieces_sent(lab: &Lab, place: &Target) -> Result<u64> {
    let list = ["nft", "--json", "list", "counter", "inet", "pieces", "sent"];
    let text = exec(lab, place, &list).await?;
    let listed: Value = serde_json::from_str(&text).context("reading what nft printed")?;
    let counters = listed["nftables"].as_array().into_iter().flatten();
    let mut packets = counters.filter_map(|entry| entry["counter"]["packets"].as_u64());
    packets.next().with_context(|| format!("no counter: {text}"))
}

/// Datagrams of two sizes there and back; the flow's counters say what was on the wire.
async fn exact(lab: &Lab, name: (&str, &str), own: IpAddr, server: IpAddr, offloads: &str) -> Result<Done> {
    let client = pod(name.0, name.1);
    let before = (pieces_sent(lab, &client).await?, pieces_sent(lab, &Target::External).await?);
    let to = SocketAddr::new(server, GSO).to_string();
    let port = PORT.fetch_add(1, Ordering::Relaxed).to_string();
    let (sends, datagrams) = (SENDS.to_string(), DATAGRAMS.to_string());
    let arguments = [
        ["gso", &to].as_slice(),
        &["--sends", &sends, "--datagrams", &datagrams],
        &["--size", "1200", "--source-port", &port],
    ]
    .concat();
    let done: Result<Gso> = ask(lab, &client, &arguments).await;
    let done = done.with_context(|| format!("{server}, offloads {offloads}"))?;
    ensure!(done.ok && done.sent == SENDS * DATAGRAMS, "{server}, offloads {offloads}: {done:?}");
    let flow = flow_of_port(lab, "worker1", UDP, (own, done.port), (server, GSO)).await?;
    let headers = if server.is_ipv4() { 20 + 8 } else { 40 + 8 };
    let bytes = done.bytes + done.sent * headers;
    ensure!(
        (flow.tx_packets, flow.rx_packets) == (done.sent, done.sent),
        "{server}, offloads {offloads}: {} datagrams each way, counted {flow:?}",
        done.sent
    );
    ensure!(
        (flow.tx_bytes, flow.rx_bytes) == (bytes, bytes),
        "{server}, offloads {offloads}: {bytes} bytes each way, counted {flow:?}"
    );
    let after = (pieces_sent(lab, &client).await?, pieces_sent(lab, &Target::External).await?);
    Ok(Done { gso: done, there: after.0 - before.0, back: after.1 - before.1 })
}
