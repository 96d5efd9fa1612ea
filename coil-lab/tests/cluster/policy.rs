//! Which traffic goes where: precedence, live changes, several Egresses.

use anyhow::{Context, Result};
use coil_lab::Lab;
use coil_lab::drive::{apply, kubectl, until, wait_for};

use crate::support::{
    INTERNET, OTHER_PRIVATE, PRIVATE, annotate, client, direct, egress, ip, ready, remove, scenarios, through,
};

scenarios! {
    narrow_before_private_before_wide,
    annotation_takes_effect_live,
    destinations_change_live,
    selectors_choose_clients,
}

/// A client of a wide and of a narrow Egress: specific private destinations leave through the narrow
/// one, other private ones stay inside, the rest of the world goes through the wide one.
async fn narrow_before_private_before_wide(lab: &Lab) -> Result<()> {
    let pod = ("prec-client", "client");
    let manifest = egress("prec", "wide", &["0.0.0.0/0", "::/0"], "")
        + &egress("prec", "narrow", &["192.168.200.0/24", "fd00:192:168:200::/64"], "")
        + &client(pod.0, pod.1, "worker1", &[("egress.coil.cybozu.com/prec", "wide,narrow")]);
    apply(lab, &manifest).await?;
    wait_for(lab, "condition=Ready", "prec", &["egress", "--all"]).await?;
    wait_for(lab, "condition=Ready", pod.0, &["pod", pod.1]).await?;
    for server in INTERNET {
        through(lab, pod, ip(server), ("prec", "wide")).await?;
    }
    for server in PRIVATE {
        through(lab, pod, ip(server), ("prec", "narrow")).await?;
    }
    for server in OTHER_PRIVATE {
        direct(lab, pod, ip(server)).await?;
    }
    remove(lab, &["prec-client", "prec"]).await
}

async fn annotation_takes_effect_live(lab: &Lab) -> Result<()> {
    let pod = ("live-client", "client");
    let manifest = egress("live", "a", &["203.0.113.0/24", "2001:db8:ffff::/48"], "")
        + &egress("live", "b", &["203.0.113.0/24", "2001:db8:ffff::/48"], "")
        + &client(pod.0, pod.1, "worker2", &[]);
    apply(lab, &manifest).await?;
    wait_for(lab, "condition=Ready", "live", &["egress", "--all"]).await?;
    wait_for(lab, "condition=Ready", pod.0, &["pod", pod.1]).await?;
    for server in INTERNET.map(ip) {
        direct(lab, pod, server).await?;
        annotate(lab, pod, "egress.coil.cybozu.com/live=a").await?;
        until("through a", || through(lab, pod, server, ("live", "a"))).await?;
        annotate(lab, pod, "egress.coil.cybozu.com/live=b").await?;
        until("through b", || through(lab, pod, server, ("live", "b"))).await?;
        annotate(lab, pod, "egress.coil.cybozu.com/live-").await?;
        until("direct again", || direct(lab, pod, server)).await?;
    }
    remove(lab, &["live-client", "live"]).await
}

async fn destinations_change_live(lab: &Lab) -> Result<()> {
    let pod = ("dest-client", "client");
    let manifest = egress("dest", "e", &["203.0.113.10/32", "2001:db8:ffff::10/128"], "")
        + &client(pod.0, pod.1, "worker1", &[("egress.coil.cybozu.com/dest", "e")]);
    ready(lab, &manifest, ("dest", "e"), pod).await?;
    for (inside, outside, moved) in [
        ("203.0.113.10", "203.0.113.11", "203.0.113.11/32"),
        ("2001:db8:ffff::10", "2001:db8:ffff::11", "2001:db8:ffff::11/128"),
    ] {
        through(lab, pod, ip(inside), ("dest", "e")).await?;
        direct(lab, pod, ip(outside)).await?;
        let patch = format!("{{\"spec\":{{\"destinations\":[\"{moved}\"]}}}}");
        let arguments = ["patch", "--namespace", "dest", "egress", "e", "--type=merge", "--patch", &patch];
        kubectl(lab, &arguments, "").await?;
        until("the new destination", || through(lab, pod, ip(outside), ("dest", "e"))).await?;
        until("the old destination is direct", || direct(lab, pod, ip(inside))).await?;
        let back = "{\"spec\":{\"destinations\":[\"203.0.113.10/32\",\"2001:db8:ffff::10/128\"]}}";
        kubectl(lab, &["patch", "--namespace", "dest", "egress", "e", "--type=merge", "--patch", back], "")
            .await?;
        until("back again", || through(lab, pod, ip(inside), ("dest", "e"))).await?;
    }
    remove(lab, &["dest-client", "dest"]).await
}

/// `spec.clients` chooses by labels of namespace and pod, without an annotation.
async fn selectors_choose_clients(lab: &Lab) -> Result<()> {
    let pod = ("sel-client", "client");
    let selector = "  clients:\n  - namespaceSelector: {matchLabels: {team: blue}}\n    podSelector: {matchLabels: {role: web}}\n";
    let manifest = egress("sel", "e", &["203.0.113.0/24", "2001:db8:ffff::/48"], selector)
        + &client(pod.0, pod.1, "worker1", &[]);
    ready(lab, &manifest, ("sel", "e"), pod).await?;
    let server = ip(INTERNET[0]);
    direct(lab, pod, server).await?;
    kubectl(lab, &["label", "namespace", pod.0, "team=blue"], "").await?;
    kubectl(lab, &["label", "--namespace", pod.0, "pod", pod.1, "role=web"], "").await?;
    until("both labels match", || through(lab, pod, server, ("sel", "e"))).await.context("labels added")?;
    kubectl(lab, &["label", "--namespace", pod.0, "pod", pod.1, "role-"], "").await?;
    until("the label is gone", || direct(lab, pod, server)).await.context("label removed")?;
    remove(lab, &["sel-client", "sel"]).await
}
