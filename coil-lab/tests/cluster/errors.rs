//! What the network says about a pod's packets reaches the pod through the egress, and packets in pieces do:
//! hops, closed ports, path MTUs behind the gateway and between pod and gateway, fragments.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Context, Result, ensure};
use coil_lab::drive::{Addresses, ask, exec, pod, until};
use coil_lab::report::Transfer;
use coil_lab::{ExecOptions, Lab, Target};

use crate::offloads::{Hop, leads_to};
use crate::support::{HTTP, INTERNET, client, egress, ip, on_node, ready, remove, scenarios, through};

scenarios! {
    every_hop_is_seen_by_traceroute,
    a_smaller_path_behind_the_gateway_is_learned,
    a_smaller_path_to_the_gateway_is_learned,
    fragments_pass_both_ways,
}

/// A client on `worker1` whose gateway is on `worker2`, both in namespaces named after the scenario.
struct World {
    client: String,
    egress: &'static str,
}

impl World {
    async fn new(lab: &Lab, egress_name: &'static str) -> Result<Self> {
        let world = Self { client: format!("{egress_name}-client"), egress: egress_name };
        let annotation = format!("egress.coil.cybozu.com/{egress_name}");
        let manifest =
            egress(egress_name, "e", &["203.0.113.0/24", "2001:db8:ffff::/48"], &on_node("worker2"))
                + &client(&world.client, "client", "worker1", &[(&annotation, "e")]);
        ready(lab, &manifest, (egress_name, "e"), world.name()).await?;
        for server in INTERNET.map(ip) {
            through(lab, world.name(), server, (egress_name, "e")).await?;
        }
        Ok(world)
    }

    fn name(&self) -> (&str, &str) {
        (&self.client, "client")
    }

    fn place(&self) -> Target {
        pod(&self.client, "client")
    }

    async fn end(&self, lab: &Lab) -> Result<()> {
        remove(lab, &[&self.client, self.egress]).await
    }
}

/// Time exceeded from the gateway and from routers behind it, and port unreachable from the server, for each
/// kind of probe.
async fn every_hop_is_seen_by_traceroute(lab: &Lab) -> Result<()> {
    let world = World::new(lab, "trace").await?;
    let gateways = Addresses::of_egress(lab, world.egress, "e").await?;
    for server in INTERNET {
        let gateway = gateways.like(ip(server))?;
        for probes in [&["-U"][..], &["-I"], &["-T", "-p", "80"]] {
            let argv = [&["traceroute", "-n", "-q", "1", "-w", "3", "-m", "8"], probes, &[server]].concat();
            // Errors are limited in number, so that a hop may keep silent once.
            until("every hop answers", async || {
                let text = exec(lab, &world.place(), &argv).await?;
                let hops = hops(&text);
                let answered: Option<Vec<IpAddr>> = hops.iter().copied().collect();
                let answered = answered.with_context(|| format!("{argv:?}: a hop is silent: {text}"))?;
                ensure!(answered.first() == Some(&gateway), "{argv:?}: not by {gateway} first: {text}");
                ensure!(answered.last() == Some(&ip(server)), "{argv:?}: does not arrive: {text}");
                ensure!(answered.len() == 4, "{argv:?}: gateway, node, router and server, not {text}");
                Ok(())
            })
            .await?;
        }
    }
    world.end(lab).await
}

/// What `traceroute -n -q 1` prints of each hop.
fn hops(text: &str) -> Vec<Option<IpAddr>> {
    text.lines().skip(1).map(|line| line.split_whitespace().nth(1)?.parse().ok()).collect()
}

/// Fragmentation needed and packet too big of a router behind the gateway.
async fn a_smaller_path_behind_the_gateway_is_learned(lab: &Lab) -> Result<()> {
    let world = World::new(lab, "pmtu-far").await?;
    let hop = leads_to(lab, "router towards the server", Target::Router, ip(INTERNET[0])).await?;
    let done = narrow(lab, &world, &hop, 1320, 1320, 1320).await;
    mtu(lab, &hop, 1500).await?;
    done?;
    world.end(lab).await
}

/// The same of a router between client and gateway: what it says of the tunnel's packets becomes an error about
/// the packet within.
async fn a_smaller_path_to_the_gateway_is_learned(lab: &Lab) -> Result<()> {
    let world = World::new(lab, "pmtu-near").await?;
    let gateways = Addresses::of_egress(lab, world.egress, "e").await?;
    let hop =
        leads_to(lab, "router towards the gateway", Target::Router, gateways.like(ip(INTERNET[0]))?).await?;
    let done = narrow(lab, &world, &hop, 1400, 1400 - 28, 1400 - 48).await;
    mtu(lab, &hop, 1500).await?;
    done?;
    world.end(lab).await
}

async fn mtu(lab: &Lab, hop: &Hop, bytes: u32) -> Result<()> {
    let argv = ["ip", "link", "set", &hop.interface, "mtu", &bytes.to_string()];
    exec(lab, &hop.place, &argv).await.context(hop.what).map(drop)
}

/// Narrows a hop; what the pod learns then, by family, and that streams pass.
async fn narrow(lab: &Lab, world: &World, hop: &Hop, bytes: u32, v4: u32, v6: u32) -> Result<()> {
    mtu(lab, hop, bytes).await?;
    for (server, headers, learned) in [(INTERNET[0], 28, v4), (INTERNET[1], 48, v6)] {
        let ping = |size: u32| {
            let size = (size - headers).to_string();
            ["ping", "-c", "1", "-W", "2", "-M", "do", "-s", &size, server].map(str::to_owned)
        };
        until("the pod learns the path's MTU", async || {
            let output = lab.exec(&world.place(), &ping(learned + 1), ExecOptions::default()).await?;
            let text = [output.stdout, output.stderr]
                .map(|text| String::from_utf8_lossy(&text).into_owned())
                .concat();
            ensure!(!output.status.success(), "one byte more than {learned} passed: {text}");
            let told = [format!("mtu={learned}"), format!("mtu: {learned}")];
            ensure!(told.iter().any(|told| text.contains(told)), "no MTU {learned} in: {text}");
            Ok(())
        })
        .await?;
        exec(lab, &world.place(), &ping(learned)).await.context("what fits just so")?;
        for verb in ["upload", "download"] {
            let server = SocketAddr::new(ip(server), HTTP).to_string();
            let done: Transfer = ask(lab, &world.place(), &[verb, &server, "--bytes", "4194304"]).await?;
            ensure!(done.ok, "{verb} {server}: {done:?}");
        }
    }
    Ok(())
}

/// Datagrams and echoes larger than any link, in pieces there and back.
async fn fragments_pass_both_ways(lab: &Lab) -> Result<()> {
    let world = World::new(lab, "pieces").await?;
    for server in INTERNET {
        for size in ["2000", "9000", "60000"] {
            let argv = ["ping", "-c", "3", "-i", "0.2", "-W", "2", "-s", size, server];
            exec(lab, &world.place(), &argv).await.with_context(|| format!("{size} bytes to {server}"))?;
        }
        let echo = SocketAddr::new(ip(server), crate::support::ECHO).to_string();
        let arguments = ["udp", &echo, "--count", "50", "--size", "5000"];
        let done: coil_lab::report::Udp = ask(lab, &world.place(), &arguments).await?;
        ensure!(done.ok && done.received == 50, "{echo}: {done:?}");
        let gateways = Addresses::of_egress(lab, world.egress, "e").await?;
        gateways.expect(done.peer.context("no answer")?.peer)?;
    }
    world.end(lab).await
}
