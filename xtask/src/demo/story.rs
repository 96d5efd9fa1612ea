//! What the demo shows, in order.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Context, Result, ensure};
use coil_lab::drive::{Addresses, apply, ask, flow, kubectl, pod, scrape, sum, until, wait_for};
use coil_lab::report::{Peer, Transfer, Udp};
use coil_lab::{Family, Lab, Target};

use super::{Report, network};
use crate::process::say;

const MANIFEST: &str = include_str!("story.yaml");
const HTTP: u16 = 80;
const ECHO: u16 = 7;
const UDP: u8 = 17;
/// Size of a transfer, as the option of the lab's client.
const BYTES: &str = "67108864";
/// Datagrams of the counted exchange, and the bytes in each.
const DATAGRAMS: u64 = 500;
const DATAGRAM_BYTES: u64 = 200;

/// A family and the external addresses that the story uses in it.
struct Chapter {
    name: &'static str,
    /// In the Egress.
    inside: IpAddr,
    /// Not in the Egress.
    outside: IpAddr,
    /// IP and UDP headers in front of a datagram.
    headers: u64,
}

fn chapters(family: Family) -> Vec<Chapter> {
    let v4 = Chapter {
        name: "v4",
        inside: IpAddr::from([203, 0, 113, 10]),
        outside: IpAddr::from([198, 51, 100, 10]),
        headers: 20 + 8,
    };
    let v6 = Chapter {
        name: "v6",
        inside: IpAddr::from([0x2001, 0xdb8, 0xffff, 0, 0, 0, 0, 0x10]),
        outside: IpAddr::from([0x2001, 0xdb8, 0xeeee, 0, 0, 0, 0, 0x10]),
        headers: 40 + 8,
    };
    [v4, v6].into_iter().filter(|chapter| family.has(chapter.inside)).collect()
}

/// Tells the story; an error ends it early.
pub async fn tell(lab: &Lab, family: Family, report: &mut Report) -> Result<()> {
    say("an Egress with two replicas, a client pod that names it, another pod that does not");
    apply(lab, MANIFEST).await?;
    wait_for(lab, "condition=Available", "egress", &["deployment/partner"]).await?;
    wait_for(lab, "condition=Ready", "egress", &["egress/partner"]).await?;
    wait_for(lab, "condition=Ready", "team-a", &["pod", "--all"]).await?;
    let gateways = Addresses::of_egress(lab, "egress", "partner").await?;
    report.add("the Egress has two ready egress pods", gateways.expect_pods(2));

    let servers: Vec<IpAddr> = chapters(family).iter().map(|chapter| chapter.inside).collect();
    network::tell(lab, &servers, report).await?;
    for chapter in chapters(family) {
        tell_chapter(lab, &chapter, &gateways, report).await?;
    }
    Ok(())
}

async fn tell_chapter(lab: &Lab, chapter: &Chapter, gateways: &Addresses, report: &mut Report) -> Result<()> {
    let Chapter { name, inside, outside, .. } = chapter;
    let client = Addresses::of(lab, &["--namespace", "team-a", "pod", "client"]).await?;
    let other = Addresses::of(lab, &["--namespace", "team-a", "pod", "other"]).await?;

    say(format!("{name}: who does the external server see?"));
    report.add(
        format!("{name}: the client pod arrives with the address of an egress pod"),
        peer(lab, "client", *inside).await.and_then(|seen| gateways.expect(seen)),
    );
    report.add(
        format!("{name}: a pod without the annotation arrives with its own address"),
        peer(lab, "other", *inside).await.and_then(|seen| other.expect(seen)),
    );
    report.add(
        format!("{name}: to a destination outside the Egress the client keeps its own address"),
        peer(lab, "client", *outside).await.and_then(|seen| client.expect(seen)),
    );

    say(format!("{name}: annotating the other pod while it runs, then taking the annotation away"));
    annotate(lab, "egress.coil.cybozu.com/egress=partner").await?;
    let switched = until("the annotation takes effect", || async {
        peer(lab, "other", *inside).await.and_then(|seen| gateways.expect(seen))
    });
    report.add(format!("{name}: annotating a running pod switches it live"), switched.await);
    annotate(lab, "egress.coil.cybozu.com/egress-").await?;
    let back = until("the removal takes effect", || async {
        peer(lab, "other", *inside).await.and_then(|seen| other.expect(seen))
    });
    report.add(format!("{name}: removing the annotation switches it back"), back.await);

    say(format!("{name}: 64 MiB up and down through the egress"));
    for verb in ["upload", "download"] {
        report.add(format!("{name}: {verb} of 64 MiB is byte-exact"), transfer(lab, verb, *inside).await);
    }

    say(format!("{name}: {DATAGRAMS} datagrams there and back, and what the counters say"));
    let before = Counters::read(lab, name).await?;
    let exchange: Result<Udp> = ask(
        lab,
        &pod("team-a", "client"),
        &[
            "udp",
            &SocketAddr::new(*inside, ECHO).to_string(),
            "--count",
            &DATAGRAMS.to_string(),
            "--size",
            &DATAGRAM_BYTES.to_string(),
            "--interval-ms",
            "1",
        ],
    )
    .await;
    let seen = exchange.and_then(|exchange| {
        ensure!(exchange.sent == exchange.received && exchange.ok, "{exchange:?}");
        Ok(exchange)
    });
    match seen {
        Err(error) => report.add(format!("{name}: datagrams come back"), Err(error)),
        Ok(exchange) => {
            let after = Counters::read(lab, name).await?;
            let entry = flow(lab, "worker1", UDP, client.like(*inside)?, (*inside, ECHO)).await;
            // The client asks the server once more who it is, so the flow's entry is the reference.
            report.add(
                format!("{name}: bpftool map dump pinned agrees with the traffic"),
                entry.as_ref().map_err(|error| anyhow::anyhow!("{error:#}")).and_then(|entry| {
                    let bytes = |packets: u64| packets * chapter.headers;
                    ensure!(
                        entry.tx_packets >= exchange.sent && entry.tx_packets <= exchange.sent + 1,
                        "{entry:?}"
                    );
                    ensure!(
                        entry.rx_packets >= exchange.received && entry.rx_packets <= exchange.received + 1,
                        "{entry:?}"
                    );
                    let payload =
                        entry.tx_bytes.checked_sub(bytes(entry.tx_packets)).context("too few bytes")?;
                    ensure!(payload >= exchange.sent * DATAGRAM_BYTES, "{entry:?}");
                    ensure!(payload <= (exchange.sent + 1) * DATAGRAM_BYTES, "{entry:?}");
                    Ok(format!("{entry:?}"))
                }),
            );
            report.add(
                format!("{name}: Prometheus agrees with the traffic"),
                entry.and_then(|entry| before.expect_growth(&after, entry.tx_packets, entry.tx_bytes)),
            );
        }
    }
    Ok(())
}

async fn annotate(lab: &Lab, annotation: &str) -> Result<String> {
    kubectl(lab, &["annotate", "--overwrite", "--namespace", "team-a", "pod", "other", annotation], "").await
}

/// Whom the external server sees when a pod connects.
async fn peer(lab: &Lab, name: &str, server: IpAddr) -> Result<IpAddr> {
    let answer: Peer = ask(
        lab,
        &pod("team-a", name),
        &["--timeout", "5", "peer", &SocketAddr::new(server, HTTP).to_string()],
    )
    .await?;
    Ok(answer.peer)
}

async fn transfer(lab: &Lab, verb: &str, server: IpAddr) -> Result<String> {
    let server = SocketAddr::new(server, HTTP).to_string();
    let done: Transfer =
        ask(lab, &pod("team-a", "client"), &["--timeout", "50", verb, &server, "--bytes", BYTES]).await?;
    ensure!(done.ok && done.sha256 == done.expected && done.bytes.to_string() == BYTES, "{done:?}");
    Ok(format!(
        "{} bytes, sha256 {}…, {:.1} s",
        done.bytes,
        &done.sha256[..16.min(done.sha256.len())],
        done.seconds
    ))
}

/// Counters of the client's node and of all egress pods.
#[derive(Debug)]
struct Counters {
    tx_packets: f64,
    tx_bytes: f64,
    masqueraded_packets: f64,
    masqueraded_bytes: f64,
}

impl Counters {
    async fn read(lab: &Lab, family: &str) -> Result<Self> {
        let node = scrape(lab, &Target::Node("worker1".to_owned()), 9384).await?;
        let family = if family == "v4" { "ipv4" } else { "ipv6" };
        let egress = [("namespace", "egress"), ("egress", "partner"), ("family", family)];
        let mut counters = Self {
            tx_packets: sum(&node, "coil_egress_tx_packets_total", &egress),
            tx_bytes: sum(&node, "coil_egress_tx_bytes_total", &egress),
            masqueraded_packets: 0.0,
            masqueraded_bytes: 0.0,
        };
        for name in Addresses::of_egress(lab, "egress", "partner").await?.names() {
            let gateway = scrape(lab, &pod("egress", name), 8080).await?;
            let labels = [("egress", "partner"), ("protocol", family)];
            counters.masqueraded_packets +=
                sum(&gateway, "coil_egress_nftables_masqueraded_packets_total", &labels);
            counters.masqueraded_bytes +=
                sum(&gateway, "coil_egress_nftables_masqueraded_bytes_total", &labels);
        }
        Ok(counters)
    }

    fn expect_growth(&self, after: &Self, packets: u64, bytes: u64) -> Result<String> {
        let grown = [
            (after.tx_packets - self.tx_packets, packets),
            (after.masqueraded_packets - self.masqueraded_packets, packets),
            (after.tx_bytes - self.tx_bytes, bytes),
            (after.masqueraded_bytes - self.masqueraded_bytes, bytes),
        ];
        // Counts of this size are exact in a float.
        ensure!(
            grown.iter().all(|(seen, expected)| *seen == *expected as f64),
            "{grown:?}; before {self:?}, after {after:?}"
        );
        Ok(format!("{packets} packets and {bytes} bytes at the client's node and at the egress pods"))
    }
}
