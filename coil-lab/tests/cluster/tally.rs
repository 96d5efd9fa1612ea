//! Counting packets at both ends of a way, by the packet filter: what one end has sent and the other has
//! not received was lost in between. Duplicates that TCP sends for want of an acknowledgement count at both
//! ends and are no loss.

use std::net::IpAddr;

use anyhow::{Context, Result, ensure};
use coil_lab::drive::{exec, until};
use coil_lab::{Lab, Target};
use serde_json::Value;

/// The table of the packet filter that counts.
const TABLE: &str = "coil_tally";
const PROTOCOLS: [&str; 2] = ["tcp", "udp"];

/// Counters at the client and at the server.
pub struct Tally {
    client: Target,
    server: Target,
}

/// A way through a gateway: what the client talks to, and whom the server sees.
#[derive(Clone, Copy, Debug)]
pub struct Way {
    /// The server's address.
    pub server: IpAddr,
    /// The address of the gateway.
    pub gateway: IpAddr,
}

impl Tally {
    /// Starts to count the packets to and from a port of the server. So that every packet counts as one,
    /// TCP is told at both ends to give its interface no more than one segment at a time.
    pub async fn start(lab: &Lab, client: Target, server: Target, ways: &[Way], port: u16) -> Result<Self> {
        let (mut here, mut there) = (Vec::new(), Vec::new());
        for way in ways {
            let family = family(way.server);
            for protocol in PROTOCOLS {
                let name = |direction| format!("{direction}_{protocol}_{family}");
                let (remote, local) = (way.server, way.gateway);
                here.push((
                    name("there"),
                    "output",
                    format!("{family} daddr {remote} {protocol} dport {port}"),
                ));
                here.push((
                    name("back"),
                    "input",
                    format!("{family} saddr {remote} {protocol} sport {port}"),
                ));
                there.push((
                    name("there"),
                    "input",
                    format!("{family} saddr {local} {protocol} dport {port}"),
                ));
                there.push((
                    name("back"),
                    "output",
                    format!("{family} daddr {local} {protocol} sport {port}"),
                ));
            }
        }
        let tally = Self { client, server };
        for (place, counters) in [(&tally.client, here), (&tally.server, there)] {
            let mut rules = format!("add table inet {TABLE}; ");
            for hook in ["input", "output"] {
                rules +=
                    &format!("add chain inet {TABLE} {hook} {{ type filter hook {hook} priority 0; }}; ");
            }
            for (name, hook, what) in counters {
                rules += &format!(
                    "add counter inet {TABLE} {name}; add rule inet {TABLE} {hook} {what} counter name {name}; "
                );
            }
            exec(lab, place, &["nft", &rules]).await.context("counting packets")?;
            segments(lab, place, "1").await?;
        }
        Ok(tally)
    }

    /// Waits until each packet sent has been received, and fails if that never happens. Returns how many
    /// there were, by direction, protocol and family.
    pub async fn nothing_lost(&self, lab: &Lab) -> Result<Vec<(String, u64)>> {
        until("every packet that was sent has arrived", || async {
            let (client, server) = (read(lab, &self.client).await?, read(lab, &self.server).await?);
            ensure!(client == server, "at the client {client:?}, at the server {server:?}");
            ensure!(client.iter().all(|(_, packets)| *packets > 0), "nothing was sent: {client:?}");
            Ok(client)
        })
        .await
    }

    /// Stops counting.
    pub async fn stop(self, lab: &Lab) -> Result<()> {
        for place in [&self.client, &self.server] {
            exec(lab, place, &["nft", &format!("delete table inet {TABLE}")]).await?;
            segments(lab, place, "65535").await?;
        }
        Ok(())
    }
}

async fn segments(lab: &Lab, place: &Target, most: &str) -> Result<()> {
    exec(lab, place, &["ip", "link", "set", "dev", "eth0", "gso_max_segs", most]).await.map(drop)
}

fn family(address: IpAddr) -> &'static str {
    if address.is_ipv4() { "ip" } else { "ip6" }
}

/// The counters of a place, in the order of their names.
async fn read(lab: &Lab, place: &Target) -> Result<Vec<(String, u64)>> {
    let text = exec(lab, place, &["nft", "--json", "list", "counters", "table", "inet", TABLE]).await?;
    let listed: Value = serde_json::from_str(&text).context("reading what nft printed")?;
    let mut counters = Vec::new();
    for entry in listed["nftables"].as_array().into_iter().flatten() {
        if let Some(name) = entry["counter"]["name"].as_str() {
            let packets =
                entry["counter"]["packets"].as_u64().with_context(|| format!("no number: {entry}"))?;
            counters.push((name.to_owned(), packets));
        }
    }
    ensure!(!counters.is_empty(), "no counters: {text}");
    counters.sort();
    Ok(counters)
}
