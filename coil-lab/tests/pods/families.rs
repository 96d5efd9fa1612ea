//! Clusters of one family, whose pods Coil wires.

use anyhow::{Result, ensure};
use coil_lab::Lab;
use coil_lab::drive::until;

use crate::addresses::{all_talk, blocks, exported, servers};
use crate::support::{INTERNET, client, direct, egress, ip, on_node, ready, remove, scenarios, through};

scenarios! { pods_of_one_family_talk_and_leave }

/// Pods talk across nodes, leave by themselves and through an Egress, and give everything back.
async fn pods_of_one_family_talk_and_leave(lab: &Lab) -> Result<()> {
    let family = lab.options().family;
    servers(lab, "one").await?;
    all_talk(lab, "one").await?;
    let (plain, name) = (("one-client", "plain"), ("one-client", "client"));
    let manifest = egress("one-egress", "e", &["203.0.113.0/24", "2001:db8:ffff::/48"], &on_node("worker2"))
        + &client(plain.0, plain.1, "worker1", &[])
        + &client(name.0, name.1, "worker1", &[("egress.coil.cybozu.com/one-egress", "e")]);
    ready(lab, &manifest, ("one-egress", "e"), name).await?;
    let servers = INTERNET.map(ip).into_iter().filter(|server| family.has(*server));
    let mut count = 0;
    for server in servers {
        until("the plain pod is ready", || direct(lab, plain, server)).await?;
        through(lab, name, server, ("one-egress", "e")).await?;
        count += 1;
    }
    ensure!(count == 1, "{count} families");
    remove(lab, &["one", "one-client", "one-egress"]).await?;
    for node in &lab.topology().nodes {
        until("blocks are given back", || async {
            let (blocks, exported) = (blocks(lab, &node.name).await?, exported(lab, &node.name).await?);
            ensure!(blocks.is_empty() && exported.is_empty(), "{}: {blocks:?}, {exported:?}", node.name);
            Ok(())
        })
        .await?;
    }
    Ok(())
}
