//! The clocks of all programs jump by days, forth and back: addresses are handed out and taken back as ever, and nobody
//! loses a Lease. `libfaketime` (Debian package `faketime`) makes the jumps, for these programs alone.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use coil_lab::drive::{get, kubectl, until, wait_for};
use coil_lab::footprint::nothing_left;
use coil_lab::{ApiSource, Lab, paths};
use k8s_openapi::jiff::{SignedDuration, Timestamp};

use crate::by_hand::{Sandbox, objects, quiet, remove_objects};
use crate::support::scenarios;

scenarios! {
    clocks_that_jump_change_nothing,
}

const NODE: &str = "worker2";
const NAMESPACE: &str = "clock";
/// Pods of one round; they need two blocks.
const PODS: usize = 6;
/// What is wired within this time has waited for no clock. Most of it is for a busy machine.
const LIMIT: Duration = Duration::from_secs(15);
/// The clock of the programs, in hours from the machine's: as it is, two days ahead, from there four days back, and back
/// to what it should be.
const JUMPS: [i64; 4] = [0, 48, -48, 0];
/// With a real control plane they go back to the machine's time at most: the certificate of its API server is not valid
/// before that.
const JUMPS_WITH_CERTIFICATES: [i64; 4] = [0, 48, 24, 0];
/// What runs with the other clock.
const PROGRAMS: [(&str, &str); 2] =
    [("daemonset/coild", "component=coild"), ("deployment/coil-controller", "component=coil-controller")];
const LEASES: [&str; 2] = ["coil-ipam-leader", "coil-egress-leader"];

async fn clocks_that_jump_change_nothing(lab: &Lab) -> Result<()> {
    let clock = Path::new(paths::ROOT).join("clock");
    set(&clock, 0)?;
    let names: Vec<String> = (0..JUMPS.len() * PODS).map(|number| format!("p{number}")).collect();
    objects(lab, NAMESPACE, NODE, &names).await?;
    let library = library()?.display().to_string();
    let variables = [
        format!("LD_PRELOAD={library}"),
        format!("FAKETIME_TIMESTAMP_FILE={}", clock.display()),
        "FAKETIME_CACHE_DURATION=1".to_owned(),
        // The clock that only counts stays what it is, as it does when somebody sets the time.
        "FAKETIME_DONT_FAKE_MONOTONIC=1".to_owned(),
        "DONT_FAKE_MONOTONIC=1".to_owned(),
    ];
    give(lab, &variables).await?;
    let done = jumps(lab, &clock, &names).await;
    let without: Vec<String> =
        variables.iter().filter_map(|variable| Some(format!("{}-", variable.split_once('=')?.0))).collect();
    give(lab, &without).await?;
    done?;
    remove_objects(lab, NAMESPACE).await
}

async fn jumps(lab: &Lab, clock: &Path, names: &[String]) -> Result<()> {
    let clean = quiet(lab, NODE).await?;
    let before = leaders(lab).await?;
    let mut running: Vec<Sandbox> = Vec::new();
    let plain = lab.options().api == ApiSource::Embedded;
    let jumps = if plain { JUMPS } else { JUMPS_WITH_CERTIFICATES };
    for (hours, names) in jumps.into_iter().zip(names.chunks(PODS)) {
        set(clock, hours)?;
        until("the Leases carry the other time", || async {
            for lease in LEASES {
                let off = renewed(lab, lease).await? - SignedDuration::from_hours(hours);
                ensure!(
                    off.abs() < SignedDuration::from_hours(1),
                    "{lease} is off by {off} beyond {hours} h"
                );
            }
            Ok(())
        })
        .await?;
        let begun = Instant::now();
        let mut new = Vec::new();
        for name in names {
            let mut sandbox = Sandbox::new(lab, NODE, NAMESPACE, name, &format!("clock{name}"))?;
            sandbox.add().await?;
            let taken = running
                .iter()
                .chain(&new)
                .any(|other| sandbox.addresses().iter().any(|address| other.addresses().contains(address)));
            ensure!(!taken, "{name} has an address of another pod: {:?}", sandbox.addresses());
            new.push(sandbox);
        }
        for sandbox in running.drain(..) {
            sandbox.delete().await?;
        }
        let took = begun.elapsed();
        ensure!(took < LIMIT, "{hours} h off, {PODS} pods and as many ends took {took:?}");
        running = new;
    }
    for sandbox in running {
        sandbox.delete().await?;
    }
    // Empty blocks are given back after their time, too.
    nothing_left(lab, NODE, &clean).await?;
    let after = leaders(lab).await?;
    ensure!(before == after, "leaders {before:?}, afterwards {after:?}");
    Ok(())
}

/// Sets the clock of the programs; they look at the file every second.
fn set(clock: &Path, hours: i64) -> Result<()> {
    std::fs::write(clock, format!("{hours:+}h\n")).with_context(|| format!("writing {}", clock.display()))
}

fn library() -> Result<PathBuf> {
    let folders = std::fs::read_dir("/usr/lib").context("looking for libfaketime")?;
    let files = folders.flatten().map(|entry| entry.path().join("faketime/libfaketimeMT.so.1"));
    files.into_iter().find(|file| file.is_file()).context("no libfaketime (Debian package faketime)")
}

/// Gives the programs variables, or takes them away, and waits until they run so.
async fn give(lab: &Lab, variables: &[String]) -> Result<()> {
    for (program, label) in PROGRAMS {
        let mut words = vec!["--namespace", "kube-system", "set", "env", program];
        words.extend(variables.iter().map(String::as_str));
        kubectl(lab, &words, "").await?;
        let status = ["--namespace", "kube-system", "rollout", "status", program, "--timeout=100s"];
        kubectl(lab, &status, "").await?;
        let label = format!("app.kubernetes.io/{label}");
        wait_for(lab, "condition=Ready", "kube-system", &["pod", "--selector", &label]).await?;
    }
    until("a controller leads", || async {
        for lease in LEASES {
            let off = renewed(lab, lease).await?;
            ensure!(off.abs() < SignedDuration::from_secs(10), "{lease} was renewed {off} from now");
            let object = get(lab, &["--namespace", "kube-system", "lease", lease]).await?;
            let holder = object["spec"]["holderIdentity"].as_str().unwrap_or_default();
            ensure!(!holder.is_empty(), "nobody holds {lease}");
        }
        Ok(())
    })
    .await
}

/// How far from now a Lease was renewed.
async fn renewed(lab: &Lab, lease: &str) -> Result<SignedDuration> {
    let lease = get(lab, &["--namespace", "kube-system", "lease", lease]).await?;
    let text = lease["spec"]["renewTime"].as_str().with_context(|| lease.to_string())?;
    let time: Timestamp = text.parse().with_context(|| text.to_owned())?;
    Ok(time.duration_since(Timestamp::now()))
}

/// Who holds each Lease, and how often that has changed.
async fn leaders(lab: &Lab) -> Result<Vec<String>> {
    let mut leaders = Vec::new();
    for lease in LEASES {
        let lease = get(lab, &["--namespace", "kube-system", "lease", lease]).await?;
        leaders.push(format!("{} {}", lease["spec"]["holderIdentity"], lease["spec"]["leaseTransitions"]));
    }
    Ok(leaders)
}
