//! The API server is away while pods come and go, and `coild` is killed meanwhile: what cannot be served is told to be
//! tried again, in time for the runtime to hear it; pods that run keep their network, and those that end lose theirs;
//! when the API is back all is served, and nothing is lost or left.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use coil_lab::cni::CniError;
use coil_lab::drive::{exec, until};
use coil_lab::footprint::nothing_left;
use coil_lab::{Lab, Target};
use nix::sys::signal::Signal;

use crate::by_hand::{
    Sandbox, TRY_AGAIN, coild, objects, quiet, reachable, refusal, remove_objects, together,
};
use crate::support::scenarios;

scenarios! {
    pods_come_and_go_while_the_api_is_away,
}

const NODE: &str = "worker2";
const NAMESPACE: &str = "outage";
/// Pods that are there before; with a block of four addresses, three leave one to be had without the API.
const BEFORE: usize = 3;
/// Pods that come meanwhile.
const MEANWHILE: usize = 12;
/// How long the API is away, at least; `COIL_LAB_OUTAGE_SECONDS` makes it longer.
const AWAY: Duration = Duration::from_secs(60);
/// A runtime waits for two minutes at least; the plugin gives up after one.
const PATIENCE: Duration = Duration::from_secs(62);
/// From the return of the API until all that waits is served. `coild` is there within five seconds; the controller has
/// ended when it could not renew its Lease, and its next process, which knows nothing of the one before, takes the Lease
/// when it has seen it unchanged for 15 seconds.
const RECOVERY: Duration = Duration::from_secs(30);

async fn pods_come_and_go_while_the_api_is_away(lab: &Lab) -> Result<()> {
    let names: Vec<String> = (0..BEFORE + MEANWHILE).map(|number| format!("p{number}")).collect();
    objects(lab, NAMESPACE, NODE, &names).await?;
    let clean = quiet(lab, NODE).await?;
    let mut all = names
        .iter()
        .map(|name| Sandbox::new(lab, NODE, NAMESPACE, name, &format!("out{name}")))
        .collect::<Result<Vec<_>>>()?;
    let later = all.split_off(BEFORE);
    for sandbox in &mut all {
        sandbox.add().await?;
    }
    // Refusing the port at the router takes the API away from nodes and leaves it to this test; packets vanish, as when
    // a machine is gone.
    let refuse = "add table inet outage; add chain inet outage in { type filter hook input priority 0; }; \
                  add rule inet outage in tcp dport 6443 drop";
    exec(lab, &Target::Router, &["nft", refuse]).await.context("taking the API away")?;
    let during = meanwhile(lab, all, later).await;
    exec(lab, &Target::Router, &["nft", "delete table inet outage"]).await.context("giving the API back")?;
    let back = Instant::now();
    let (all, later) = during?;

    let later = together(later, |mut sandbox| async move {
        let done = sandbox.add().await;
        (sandbox, done)
    })
    .await?;
    let took = back.elapsed();
    eprintln!("{MEANWHILE} pods were wired {took:?} after the API was back");
    ensure!(took < RECOVERY, "it took {took:?} until all pods were wired");
    let all: Vec<Sandbox> = all.into_iter().chain(later).collect();
    let addresses: Vec<IpAddr> = all.iter().flat_map(Sandbox::addresses).collect();
    let different: BTreeSet<IpAddr> = addresses.iter().copied().collect();
    ensure!(different.len() == addresses.len() && addresses.len() == 2 * all.len(), "{addresses:?}");
    reachable(lab, NODE, addresses).await?;
    for sandbox in &all {
        sandbox.delete().await?;
    }
    nothing_left(lab, NODE, &clean).await?;
    remove_objects(lab, NAMESPACE).await
}

/// While the API is away: pods that run are reached, pods that come are refused for now, one that ends is gone; the same
/// with a `coild` that has never seen the API. Gives the pods that run and those that still wait.
async fn meanwhile(
    lab: &Lab,
    mut all: Vec<Sandbox>,
    mut later: Vec<Sandbox>,
) -> Result<(Vec<Sandbox>, Vec<Sandbox>)> {
    let begun = Instant::now();
    let away = std::env::var("COIL_LAB_OUTAGE_SECONDS").ok().and_then(|text| text.parse().ok());
    let away = away.map_or(AWAY, Duration::from_secs);
    let process = coild(lab, NODE)?;
    let ended = all.pop().context("no pod")?;
    ends(lab, &ended).await?;
    let running: Vec<IpAddr> = all.iter().flat_map(Sandbox::addresses).collect();
    reachable(lab, NODE, running.clone()).await?;
    later = refused(later).await?;
    ensure!(coild(lab, NODE)? == process, "coild has not been patient");

    process.signal(Signal::SIGKILL);
    until("a new coild listens", || async {
        ensure!(coild(lab, NODE)? != process, "it is still the old one");
        Ok(())
    })
    .await?;
    let ended = all.pop().context("no pod")?;
    ends(lab, &ended).await?;
    while begun.elapsed() < away {
        later = refused(later).await?;
        reachable(lab, NODE, all.iter().flat_map(Sandbox::addresses).collect()).await?;
    }
    // All have been refused by both, and hold nothing.
    for sandbox in &later {
        sandbox.delete().await?;
    }
    Ok((all, later))
}

/// ADDs that nobody can serve: each is refused in time, with the code of what another attempt cures.
async fn refused(sandboxes: Vec<Sandbox>) -> Result<Vec<Sandbox>> {
    together(sandboxes, |mut sandbox| async move {
        let begun = Instant::now();
        let answer = sandbox.attachment.add().await;
        let done = in_time(answer, begun.elapsed());
        (sandbox, done)
    })
    .await
}

fn in_time(answer: Result<(), CniError>, took: Duration) -> Result<()> {
    ensure!(took < PATIENCE, "an answer took {took:?}");
    match answer {
        Ok(()) => bail!("an ADD has been served without the API"),
        Err(error) => {
            ensure!(refusal(&error) == Some(TRY_AGAIN), "not to be tried again: {error:#}");
            Ok(())
        }
    }
}

/// A pod that ends is gone from the node, though the API cannot be told.
async fn ends(lab: &Lab, sandbox: &Sandbox) -> Result<()> {
    let addresses = sandbox.addresses();
    sandbox.delete().await?;
    for table in ["-4", "-6"] {
        let routes =
            exec(lab, &Target::Node(NODE.to_owned()), &["ip", table, "route", "show", "table", "116"]).await;
        // The table of a family without pods does not exist.
        let routes = routes.unwrap_or_default();
        let left = addresses.iter().find(|address| routes.contains(&format!("{address} ")));
        ensure!(left.is_none(), "{left:?} is still routed: {routes}");
    }
    Ok(())
}
