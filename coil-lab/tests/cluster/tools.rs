//! `coilctl` in a cluster: what it predicts is what traffic does.

use std::net::IpAddr;

use anyhow::{Context, Result, ensure};
use coil_lab::drive::{apply, exec, until, wait_for};
use coil_lab::{Lab, Target};
use serde_json::Value;

use crate::support::{
    HTTP, INTERNET, OTHER_PRIVATE, PRIVATE, annotate, client, egress, ip, peer, remove, scenarios,
};

scenarios! {
    explain_predicts_what_traffic_does,
    tools_show_traffic_as_it_happens,
}

/// `extra` of an Egress whose egress pods find no node.
const NOWHERE: &str =
    "  template:\n    spec:\n      nodeSelector: {nowhere: \"true\"}\n      containers: [{name: egress}]\n";

/// Runs `coilctl` on a node and reads its JSON; status 2 means that a packet would be dropped.
async fn coilctl(lab: &Lab, node: &str, arguments: &str) -> Result<Value> {
    let command = format!("coilctl {arguments} -o json || test $? = 2");
    let out = exec(lab, &Target::Node(node.to_owned()), &["sh", "-c", &command]).await?;
    serde_json::from_str(&out).with_context(|| format!("reading what coilctl {arguments} printed: {out}"))
}

/// What becomes of a connection: the address that the server sees, if it is reached.
#[derive(Debug, PartialEq, Eq)]
enum Fate {
    Seen(IpAddr),
    Dropped,
}

async fn predicted(lab: &Lab, node: &str, pod: (&str, &str), server: IpAddr) -> Result<Fate> {
    let target = std::net::SocketAddr::new(server, HTTP);
    let said = coilctl(lab, node, &format!("explain {}/{} {target}", pod.0, pod.1)).await?;
    let text = |value: &Value| value.as_str().map(str::to_owned).unwrap_or_default();
    match said["verdict"].as_str() {
        Some("direct") => {
            let source: std::net::SocketAddr =
                text(&said["packet"]["source"]).parse().context("the source")?;
            Ok(Fate::Seen(source.ip()))
        }
        Some("egress") => {
            ensure!(said["reply"]["arrives"] == true, "no answer would arrive: {said:#}");
            let gateway: IpAddr = text(&said["gateway"]["address"]).parse().context("the gateway")?;
            if let Some(seen) = said["translation"]["seenAs"].as_str() {
                let seen: std::net::SocketAddr = seen.parse()?;
                ensure!(seen.ip() == gateway, "{said:#}");
            }
            Ok(Fate::Seen(gateway))
        }
        Some("drop" | "tooBig") => Ok(Fate::Dropped),
        other => anyhow::bail!("verdict {other:?}: {said:#}"),
    }
}

/// A table of pods and destinations: explain says before each connection what the server will see.
async fn explain_predicts_what_traffic_does(lab: &Lab) -> Result<()> {
    let annotation = ("egress.coil.cybozu.com/tools", "wide,narrow");
    let pods = [
        (("tools-client", "both"), "worker1"),
        (("tools-client", "plain"), "worker2"),
        (("tools-client", "shut"), "worker1"),
    ];
    let manifest = egress("tools", "wide", &["0.0.0.0/0", "::/0"], "  replicas: 2\n")
        + &egress("tools", "narrow", &["192.168.200.0/24", "fd00:192:168:200::/64"], "")
        + &egress("tools", "closed", &["203.0.113.0/24", "2001:db8:ffff::/48"], NOWHERE)
        + &client("tools-client", "both", "worker1", &[annotation])
        + &client("tools-client", "plain", "worker2", &[])
        + &client("tools-client", "shut", "worker1", &[("egress.coil.cybozu.com/tools", "closed")]);
    apply(lab, &manifest).await?;
    wait_for(lab, "condition=Ready", "tools", &["egress/wide", "egress/narrow"]).await?;
    wait_for(lab, "condition=Ready", "tools-client", &["pod", "--all"]).await?;
    let mut seen = Vec::new();
    for (pod, node) in pods {
        for server in INTERNET.iter().chain(&PRIVATE).chain(&OTHER_PRIVATE).map(|text| ip(text)) {
            let expected = predicted(lab, node, pod, server).await?;
            let observed = match peer(lab, pod, server).await {
                Ok(address) => Fate::Seen(address),
                Err(_) => Fate::Dropped,
            };
            ensure!(
                expected == observed,
                "{pod:?} to {server}: explain says {expected:?}, the server {observed:?}"
            );
            // A flow that exists now is predicted as well.
            let again = predicted(lab, node, pod, server).await?;
            ensure!(again == observed, "{pod:?} to {server} again: {again:?}, {observed:?}");
            seen.push(observed);
        }
    }
    let dropped = seen.iter().filter(|fate| **fate == Fate::Dropped).count();
    ensure!(dropped == 2, "the table must hold drops of both families and only those: {seen:?}");
    remove(lab, &["tools-client", "tools"]).await
}

/// Monitor, conntrack, egress and drops about connections that are made meanwhile; the plugin's name works.
async fn tools_show_traffic_as_it_happens(lab: &Lab) -> Result<()> {
    let pod = ("watch-client", "client");
    let manifest = egress("watch", "e", &["203.0.113.0/24", "2001:db8:ffff::/48"], "")
        + &egress("watch", "closed", &["203.0.113.0/24", "2001:db8:ffff::/48"], NOWHERE)
        + &client(pod.0, pod.1, "worker1", &[("egress.coil.cybozu.com/watch", "e")]);
    crate::support::ready(lab, &manifest, ("watch", "e"), pod).await?;
    let node = Target::Node("worker1".to_owned());
    let server = ip(INTERNET[0]);
    let name = format!("{}/{}", pod.0, pod.1);
    let arguments =
        ["coilctl", "monitor", "--flows", "--pod", &name, "--count", "1", "--duration", "50", "-o", "json"];
    let traffic = async {
        loop {
            peer(lab, pod, server).await?;
        }
        #[expect(unreachable_code, reason = "gives the block its type")]
        Ok::<(), anyhow::Error>(())
    };
    let line = tokio::select! {
        line = exec(lab, &node, &arguments) => line?,
        failed = traffic => anyhow::bail!("traffic ended: {failed:?}"),
    };
    let event: Value = serde_json::from_str(line.trim()).with_context(|| line.clone())?;
    ensure!(event["event"] == "flow" && event["pod"] == name.as_str(), "{event:#}");
    let list =
        coilctl(lab, "worker1", &format!("conntrack --pod {name} --destination {server}:{HTTP}")).await?;
    let flow = &list["flows"][0];
    ensure!(flow["egress"] == "watch/e" && flow["rxBytes"].as_u64().unwrap_or(0) > 0, "{list:#}");
    let plugin = exec(lab, &node, &["kubectl-coil", "egress", "watch/e"]).await?;
    ensure!(plugin.contains("watch/e") && plugin.contains("ready"), "{plugin}");
    annotate(lab, pod, "egress.coil.cybozu.com/watch=closed").await?;
    until("drops are counted", || async {
        ensure!(peer(lab, pod, server).await.is_err(), "there is a gateway still");
        let drops = coilctl(lab, "worker1", "drops").await?;
        let reasons: Vec<_> =
            drops["items"].as_array().into_iter().flatten().map(|item| &item["reason"]).collect();
        ensure!(reasons.iter().any(|reason| **reason == "no_gateway"), "{drops:#}");
        Ok(())
    })
    .await?;
    remove(lab, &["watch-client", "watch"]).await
}
