//! `coild` is killed while it wires a hundred pods: each call is answered, or may be made again; no address is given
//! twice, none is lost, and nothing is left behind.

use std::collections::BTreeSet;
use std::net::IpAddr;

use anyhow::{Context, Result, ensure};
use coil_lab::drive::{scrape, sum, until};
use coil_lab::footprint::nothing_left;
use coil_lab::{Lab, Target};
use ipnet::IpNet;
use nix::sys::signal::Signal;
use tokio::task::JoinSet;

use crate::addresses::blocks;
use crate::by_hand::{
    Sandbox, TRY_AGAIN, coild, objects, quiet, reachable, refusal, remove_objects, together,
};
use crate::support::scenarios;

scenarios! {
    a_hundred_adds_outlive_a_killed_coild,
}

const NODE: &str = "worker1";
const NAMESPACE: &str = "killed";
const PODS: usize = 100;
/// `coild` is killed when so many have been answered: at the start, and well within.
const ANSWERED: [usize; 2] = [3, 25];
/// Port of the metrics.
const METRICS: u16 = 9384;

async fn a_hundred_adds_outlive_a_killed_coild(lab: &Lab) -> Result<()> {
    let names: Vec<String> = (0..PODS).map(|number| format!("p{number}")).collect();
    objects(lab, NAMESPACE, NODE, &names).await?;
    let before = quiet(lab, NODE).await?;
    for (round, answered) in ANSWERED.into_iter().enumerate() {
        let sandboxes = names
            .iter()
            .map(|name| Sandbox::new(lab, NODE, NAMESPACE, name, &format!("r{round}{name}")))
            .collect::<Result<Vec<_>>>()?;
        once(lab, sandboxes, answered).await.with_context(|| format!("killed after {answered} answers"))?;
        nothing_left(lab, NODE, &before).await?;
    }
    remove_objects(lab, NAMESPACE).await
}

async fn once(lab: &Lab, sandboxes: Vec<Sandbox>, answered: usize) -> Result<()> {
    let (wired, failed) = killed_meanwhile(lab, sandboxes, answered).await?;
    eprintln!("{} ADDs were answered, {} have failed", wired.len(), failed.len());
    ensure!(!failed.is_empty(), "coild was not killed in the middle");
    let again = together(failed, |sandbox| again(lab.clone(), sandbox)).await?;
    let all: Vec<Sandbox> = wired.into_iter().chain(again).collect();
    let checked = each_has_its_own(lab, &all).await;
    let deleted = together(all, |sandbox| async move {
        let done = sandbox.delete().await;
        (sandbox, done)
    })
    .await;
    checked?;
    deleted.map(drop)
}

/// Begins all ADDs at once and kills `coild` when some are answered. Gives those that were answered and those that have
/// failed.
async fn killed_meanwhile(
    lab: &Lab,
    sandboxes: Vec<Sandbox>,
    answered: usize,
) -> Result<(Vec<Sandbox>, Vec<Sandbox>)> {
    let victim = coild(lab, NODE)?;
    let mut running = JoinSet::new();
    for mut sandbox in sandboxes {
        running.spawn(async move {
            let done = sandbox.attachment.add().await;
            (sandbox, done)
        });
    }
    let (mut wired, mut failed) = (Vec::new(), Vec::new());
    while let Some(ended) = running.join_next().await {
        let (sandbox, done) = ended?;
        match done {
            Ok(()) => wired.push(sandbox),
            Err(error) => {
                ensure!(refusal(&error) == Some(TRY_AGAIN), "not to be tried again: {error:#}");
                failed.push(sandbox);
            }
        }
        if wired.len() == answered {
            victim.signal(Signal::SIGKILL);
        }
    }
    until("the killed process is gone", || async {
        ensure!(!victim.alive(), "{victim:?}");
        Ok(())
    })
    .await?;
    Ok((wired, failed))
}

/// What a runtime does about a failed ADD: half of the pods get a new sandbox after a DEL of the old one, the other half
/// another ADD of the same.
async fn again(lab: Lab, mut sandbox: Sandbox) -> (Sandbox, Result<()>) {
    let old = &sandbox.attachment;
    let anew = old.name.bytes().last().is_some_and(|digit| digit % 2 == 1);
    if !anew {
        let done = sandbox.add().await;
        return (sandbox, done);
    }
    let container = format!("{}again", old.container_id);
    let new = Sandbox::new(&lab, NODE, NAMESPACE, &old.name, &container);
    match (sandbox.delete().await, new) {
        (Ok(()), Ok(mut new)) => {
            let done = new.add().await;
            (new, done)
        }
        (Err(error), _) | (_, Err(error)) => (sandbox, Err(error)),
    }
}

/// No two have one address; what was answered is what the pod has, in a block of the node, and it can be reached.
async fn each_has_its_own(lab: &Lab, all: &[Sandbox]) -> Result<()> {
    let blocks = blocks(lab, NODE).await?;
    let blocks: Vec<IpNet> = blocks.iter().map(|net| net.parse()).collect::<Result<_, _>>()?;
    let mut seen: BTreeSet<IpAddr> = BTreeSet::new();
    for sandbox in all {
        let (answered, inside) = (sandbox.addresses(), sandbox.inside(lab).await?);
        ensure!(answered.len() == 2, "{:?}", sandbox.attachment);
        ensure!(
            BTreeSet::from_iter(&answered) == BTreeSet::from_iter(&inside),
            "{} was told {answered:?} and has {inside:?}",
            sandbox.attachment.name
        );
        for address in answered {
            ensure!(blocks.iter().any(|net| net.contains(&address)), "{address} is in none of {blocks:?}");
            ensure!(seen.insert(address), "two pods have {address}");
        }
    }
    ensure!(seen.len() == 2 * PODS, "{} addresses", seen.len());
    reachable(lab, NODE, seen.into_iter().collect()).await?;
    // Nothing is counted that no pod has.
    let metrics = scrape(lab, &Target::Node(NODE.to_owned()), METRICS).await?;
    let used = sum(&metrics, "coil_ipam_used_addresses", &[]);
    ensure!(used == PODS as f64, "coild counts {used} addresses in use");
    Ok(())
}
