//! One pod makes more flows than its share: it is refused, counted and told, and nobody else notices.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Context, Result, ensure};
use coil_lab::drive::{Addresses, pod, scrape, sum, wait_for};
use coil_lab::report::{Flood, Load};
use coil_lab::{ExecOptions, Lab};

use crate::gateways::{METRICS, Signals, load, unharmed};
use crate::support::{ECHO, INTERNET, client, egress, ip, ready, remove, scenarios};

scenarios! {
    a_flood_of_new_flows_harms_nobody_else,
    ports_used_up_by_one_pod_harm_nobody_else,
}

/// Lasting connections of the victim, of each family, and new ones each second.
const VICTIM: (u64, u64) = (50, 30);

/// An egress pod with little room: 1000 ports, and 8192 translations of each family.
const SMALL: &str = "  template:\n    spec:\n      containers:\n      - name: egress\n        env:\n        \
                     - {name: COIL_NAT_PORT_RANGE, value: \"20000-20999\"}\n        \
                     - {name: COIL_MAX_NAT_ENTRIES, value: \"8192\"}\n";

/// A victim and a pod that floods, on one node, behind one small egress pod.
struct World {
    name: &'static str,
    victim: String,
    attacker: String,
}

impl World {
    async fn new(lab: &Lab, name: &'static str) -> Result<Self> {
        let world = Self { name, victim: format!("{name}-victim"), attacker: format!("{name}-attacker") };
        let annotation = format!("egress.coil.cybozu.com/{name}");
        let annotations = [(annotation.as_str(), "e")];
        let manifest = egress(name, "e", &["203.0.113.0/24", "2001:db8:ffff::/48"], SMALL)
            + &client(&world.victim, "client", "worker1", &annotations)
            + &client(&world.attacker, "client", "worker1", &annotations);
        ready(lab, &manifest, (name, "e"), (&world.victim, "client")).await?;
        wait_for(lab, "condition=Ready", &world.attacker, &["pod", "client"]).await?;
        Ok(world)
    }

    /// Lets the victim work while the attacker does what it does; then the victim's connections, by family, must
    /// all have been served. Returns what the attacker says.
    async fn withstand<T>(&self, lab: &Lab, attack: impl AsyncFnOnce() -> Result<T>) -> Result<T> {
        let signals =
            [format!("{}-v4", self.name), format!("{}-v6", self.name)].map(|name| Signals::new(&name));
        let victim = (self.victim.as_str(), "client");
        let [v4, v6] = INTERNET.map(ip);
        let work = async {
            for signals in &signals {
                signals.up().await?;
            }
            attack().await
        };
        let attack = async {
            let outcome = work.await;
            // Whatever happened, the load is to end.
            for signals in &signals {
                signals.stop()?;
            }
            outcome
        };
        let (v4, v6, attacked) = tokio::join!(
            load(lab, victim, v4, VICTIM, &signals[0]),
            load(lab, victim, v6, VICTIM, &signals[1]),
            attack
        );
        let attacked = attacked?;
        unharmed("victim, IPv4", &v4?, VICTIM.0)?;
        unharmed("victim, IPv6", &v6?, VICTIM.0)?;
        Ok(attacked)
    }

    /// New flows that the gateway has refused for a reason.
    async fn refused(&self, lab: &Lab, reason: &str) -> Result<f64> {
        let gateways = Addresses::of_egress(lab, self.name, "e").await?;
        let gateway = gateways.names().next().context("no egress pod")?;
        let metrics = scrape(lab, &pod(self.name, gateway), METRICS).await?;
        Ok(sum(&metrics, "coil_drops_total", &[("reason", reason)]))
    }

    async fn end(&self, lab: &Lab) -> Result<()> {
        remove(lab, &[&self.victim, &self.attacker, self.name]).await
    }

    /// Runs the lab's client as the attacker; it may fail, but says how it went.
    async fn attacker<T: serde::de::DeserializeOwned>(&self, lab: &Lab, arguments: &[&str]) -> Result<T> {
        let place = pod(&self.attacker, "client");
        let output = lab.exec(&place, &lab.client(arguments), ExecOptions::default()).await?;
        let told = [output.stdout, output.stderr].map(|text| String::from_utf8_lossy(&text).into_owned());
        serde_json::from_str(told[0].trim()).with_context(|| told.concat())
    }
}

/// UDP to many ports from many ports, as fast as a pod can.
async fn a_flood_of_new_flows_harms_nobody_else(lab: &Lab) -> Result<()> {
    let world = World::new(lab, "flood").await?;
    let floods = world
        .withstand(lab, async || {
            let mut floods = Vec::new();
            for server in INTERNET.map(ip) {
                floods.push(world.flood(lab, server).await?);
            }
            Ok(floods)
        })
        .await?;
    eprintln!("floods: {floods:?}");
    // More than all of the gateway's room, or this test tests nothing.
    ensure!(floods.iter().all(|flood| flood.sent + flood.refused > 8192), "{floods:?}");
    let refused = world.refused(lab, "client_flow_quota").await?;
    ensure!(refused > 1000.0, "{refused} flows were refused as more than the client's share");
    world.end(lab).await
}

impl World {
    async fn flood(&self, lab: &Lab, server: IpAddr) -> Result<Flood> {
        let server = SocketAddr::new(server, 10_000).to_string();
        self.attacker(lab, &["flood", &server, "--ports", "50", "--seconds", "4"]).await
    }
}

/// TCP to the very port that the victim uses.
async fn ports_used_up_by_one_pod_harm_nobody_else(lab: &Lab) -> Result<()> {
    let world = World::new(lab, "ports").await?;
    let attacks = world
        .withstand(lab, async || {
            let mut attacks = Vec::new();
            for server in INTERNET.map(ip) {
                let server = SocketAddr::new(server, ECHO).to_string();
                let arguments = ["load", &server, "--long", "0", "--rate", "500", "--seconds", "4"];
                attacks.push(world.attacker::<Load>(lab, &arguments).await?);
            }
            Ok(attacks)
        })
        .await?;
    for Load { short, started, seconds, .. } in &attacks {
        eprintln!(
            "attacker: {started} begun, {} up, {} failed: {:?}",
            short.opened, short.failed, short.errors
        );
        // Half of the ports is a client's share. What goes beyond is refused at once, not after a time-out.
        ensure!(short.failed > 0 && *seconds < 15.0, "{short:?} in {seconds} s");
    }
    let refused = world.refused(lab, "client_port_quota").await?;
    ensure!(refused > 0.0, "{refused} flows were refused as more than the client's share of ports");
    world.end(lab).await
}
