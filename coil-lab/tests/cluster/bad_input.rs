//! Mistakes of users: no leak, no harm to others, and the operator is told.

use anyhow::{Context, Result, ensure};
use coil_lab::Lab;
use coil_lab::drive::{apply, get, kubectl, pod, until, wait_for};

use crate::restart::{kill_9, restarts};
use crate::support::{
    INTERNET, PRIVATE, annotate, blocked, client, direct, egress, ip, ready, remove, scenarios, through,
};

scenarios! {
    unknown_egress_fails_closed_and_tells,
    unknown_egress_at_start_keeps_the_pod_waiting,
    bad_egress_is_refused,
    deleted_egress_fails_closed,
}

/// Events about a pod with a reason that contains this text.
async fn told(lab: &Lab, namespace: &str, name: &str, reason: &str) -> Result<()> {
    let field = format!("involvedObject.name={name}");
    let events = get(lab, &["--namespace", namespace, "events", "--field-selector", &field]).await?;
    let items = events["items"].as_array().cloned().unwrap_or_default();
    let reasons: Vec<_> = items.iter().filter_map(|event| event["reason"].as_str()).collect();
    ensure!(reasons.iter().any(|known| known.contains(reason)), "no event {reason}, only {reasons:?}");
    Ok(())
}

/// An annotation that names no Egress, put on a running pod: nothing leaks, an Event says so, a
/// neighbour is unharmed, and creating the Egress heals it.
async fn unknown_egress_fails_closed_and_tells(lab: &Lab) -> Result<()> {
    let name = ("bad-client", "client");
    let neighbour = ("bad-client", "neighbour");
    let net = ["203.0.113.0/24", "2001:db8:ffff::/48"];
    let manifest = egress("bad", "good", &net, "")
        + &client(name.0, name.1, "worker1", &[])
        + &client(neighbour.0, neighbour.1, "worker1", &[("egress.coil.cybozu.com/bad", "good")]);
    ready(lab, &manifest, ("bad", "good"), name).await?;
    wait_for(lab, "condition=Ready", neighbour.0, &["pod", neighbour.1]).await?;
    for (annotation, what) in [("missing", "unknown"), ("Not A Name,,", "unparsable")] {
        annotate(lab, name, &format!("egress.coil.cybozu.com/bad={annotation}")).await?;
        for server in INTERNET.map(ip) {
            until(what, || blocked(lab, name, server)).await?;
            through(lab, neighbour, server, ("bad", "good")).await?;
        }
    }
    until("an event tells", || told(lab, name.0, name.1, "Egress")).await?;
    annotate(lab, name, "egress.coil.cybozu.com/bad=later").await?;
    apply(lab, &egress("bad", "later", &net, "")).await?;
    wait_for(lab, "condition=Ready", "bad", &["egress/later"]).await?;
    for server in INTERNET.map(ip) {
        until("the Egress exists now", || through(lab, name, server, ("bad", "later"))).await?;
    }
    remove(lab, &["bad-client", "bad"]).await
}

/// A pod that starts with an unknown Egress does not become ready; it does once the Egress exists.
async fn unknown_egress_at_start_keeps_the_pod_waiting(lab: &Lab) -> Result<()> {
    let name = ("early-client", "client");
    apply(lab, &client(name.0, name.1, "worker1", &[("egress.coil.cybozu.com/early", "e")])).await?;
    until("kubelet tells", || told(lab, name.0, name.1, "FailedCreatePodSandBox")).await?;
    let found = get(lab, &["--namespace", name.0, "pod", name.1]).await?;
    ensure!(found["status"]["phase"] == "Pending", "the pod runs: {}", found["status"]);
    let manifest = egress("early", "e", &["203.0.113.0/24", "2001:db8:ffff::/48"], "");
    ready(lab, &manifest, ("early", "e"), name).await?;
    through(lab, name, ip(INTERNET[0]), ("early", "e")).await?;
    remove(lab, &["early-client", "early"]).await
}

/// The schema refuses an Egress without destinations or with a bad one, and names the field.
async fn bad_egress_is_refused(lab: &Lab) -> Result<()> {
    for (destinations, extra) in [
        (&[][..], ""),
        (&["10.0.0.0"][..], ""),
        (&["10.0.0.0/33"][..], ""),
        (&["example.com/8"][..], ""),
        (&["10.0.0.0/8"][..], "  replicas: 0\n"),
        (&["10.0.0.0/8"][..], "  sessionAffinity: Sometimes\n"),
        (&["10.0.0.0/8"][..], "  podDisruptionBudget: {minAvailable: 1, maxUnavailable: 1}\n"),
    ] {
        let manifest = egress("refused", "e", destinations, extra);
        let refused = apply(lab, &manifest).await;
        ensure!(refused.is_err(), "accepted: {manifest}");
        let text = format!("{:#}", refused.err().context("an error")?);
        ensure!(text.contains("spec"), "the message does not name the field: {text}");
    }
    remove(lab, &["refused"]).await
}

/// Deleting an Egress that pods use: their traffic is dropped, not sent as it is; also by agents that
/// are killed afterwards, as often as one likes.
async fn deleted_egress_fails_closed(lab: &Lab) -> Result<()> {
    let name = ("gone-client", "client");
    let [private_v4, private_v6] =
        PRIVATE.map(|server| format!("{server}/{}", if server.contains(':') { 128 } else { 32 }));
    let manifest =
        egress("gone", "e", &["203.0.113.0/24", "2001:db8:ffff::/48", &private_v4, &private_v6], "");
    let servers: Vec<_> = INTERNET.into_iter().chain(PRIVATE).map(ip).collect();
    let with_client =
        manifest.clone() + &client(name.0, name.1, "worker2", &[("egress.coil.cybozu.com/gone", "e")]);
    ready(lab, &with_client, ("gone", "e"), name).await?;
    for &server in &servers {
        through(lab, name, server, ("gone", "e")).await?;
    }
    kubectl(lab, &["delete", "--namespace", "gone", "egress", "e"], "").await?;
    for &server in &servers {
        until("blocked", || blocked(lab, name, server)).await?;
    }
    let agents = ["--namespace", "kube-system", "pod", "--selector", "app.kubernetes.io/component=coild"];
    for _ in 0..2 {
        let before = restarts(lab, &agents).await?;
        let killed = kill_9(lab, &["coild"])?;
        ensure!(killed >= 2, "only {killed} processes were killed");
        until("the agents are back", || async {
            let now = restarts(lab, &agents).await?;
            ensure!(now >= before + 2, "{before} restarts before, now {now}");
            Ok(())
        })
        .await?;
        for &server in &servers {
            blocked(lab, name, server).await?;
        }
    }
    // Addresses that the Egress never named in private ranges stay reachable.
    direct(lab, name, ip("192.168.201.10")).await?;
    apply(lab, &manifest).await?;
    wait_for(lab, "condition=Ready", "gone", &["egress/e"]).await?;
    for &server in &servers {
        until("the Egress is back", || through(lab, name, server, ("gone", "e"))).await?;
    }
    let place = pod(name.0, name.1);
    ensure!(place.to_string().contains("gone-client"), "the pod is a place of the lab");
    remove(lab, &["gone-client", "gone"]).await
}
