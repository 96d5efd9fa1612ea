//! A node that the original Coil v2 has run: its pods, wired as the original wires them (`spec/coil.md` 5.3), its rules,
//! its routes and its blocks are taken over by our `coild` as they are.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use coil_lab::drive::{apply, ask, ask_for, exec, get, kubectl, pod, scrape, sum, until, wait_for};
use coil_lab::footprint::nothing_left;
use coil_lab::report::{Peer, Stream};
use coil_lab::topology::Node;
use coil_lab::{Lab, Target, paths};
use serde_json::{Value, json};

use crate::addresses::{blocks, exported};
use crate::by_hand::{Sandbox, coild, objects, quiet, remove_objects};
use crate::support::{ECHO, HTTP, client, remove, scenarios};

scenarios! {
    a_node_of_coil_v2_is_adopted_as_it_is,
}

const NODE: &str = "worker3";
const NAMESPACE: &str = "adopted";
const CLIENT: (&str, &str) = ("adopting", "client");
/// Pods that the original has wired, and pods that come later.
const OLD: [&str; 2] = ["old-a", "old-b"];
const NEW: [&str; 4] = ["new-a", "new-b", "new-c", "new-d"];
/// Number of the block with the old pods, and of one that was left empty.
const BLOCK: u32 = 1000;
const EMPTY: u32 = 1001;
/// Label by which `coild` is kept off the node for a while.
const LABEL: &str = "lab.coil.cybozu.com/coild";
const METRICS: u16 = 9384;
/// Longest time that traffic may go on until all is done.
const LIMIT: Duration = Duration::from_secs(120);

async fn a_node_of_coil_v2_is_adopted_as_it_is(lab: &Lab) -> Result<()> {
    let clean = quiet(lab, NODE).await?;
    let names: Vec<String> = OLD.iter().chain(&NEW).map(|name| (*name).to_owned()).collect();
    objects(lab, NAMESPACE, NODE, &names).await?;
    apply(lab, &client(CLIENT.0, CLIENT.1, "worker1", &[])).await?;
    wait_for(lab, "condition=Ready", CLIENT.0, &["pod", CLIENT.1]).await?;

    let built = async {
        keep_coild_off(lab).await?;
        original(lab).await
    }
    .await;
    if built.is_err() {
        select(lab, json!({})).await?;
    }
    let old = built?;
    adopted(lab, &old).await?;
    used_and_removed(lab, old).await?;
    remove_objects(lab, NAMESPACE).await?;
    remove(lab, &[CLIENT.0]).await?;
    // The rules are still the original's; in their place come ours, which say whose they are.
    for family in ["-4", "-6"] {
        exec(lab, &Target::Node(NODE.to_owned()), &["ip", family, "rule", "delete", "pref", "2000"]).await?;
    }
    nothing_left(lab, NODE, &clean).await
}

/// Takes `coild` off the node, with everything of it.
async fn keep_coild_off(lab: &Lab) -> Result<()> {
    for node in ["worker1", "worker2"] {
        kubectl(lab, &["label", "--overwrite", "node", node, &format!("{LABEL}=yes")], "").await?;
    }
    select(lab, json!({ LABEL: "yes" })).await?;
    until("coild is gone", || async {
        ensure!(coild(lab, NODE).is_err(), "it still runs");
        Ok(())
    })
    .await?;
    let place = Target::Node(NODE.to_owned());
    exec(lab, &place, &["coild", "uninstall"]).await?;
    for family in ["-4", "-6"] {
        exec(lab, &place, &["ip", family, "rule", "delete", "pref", "2000"]).await?;
    }
    Ok(())
}

/// Where `coild` runs.
async fn select(lab: &Lab, selector: Value) -> Result<()> {
    let patch = json!([{ "op": "add", "path": "/spec/template/spec/nodeSelector", "value": selector }]);
    let words =
        ["patch", "daemonset", "coild", "--namespace", "kube-system", "--type=json", "--patch"].as_slice();
    kubectl(lab, &[words, &[&patch.to_string()]].concat(), "").await.map(drop)
}

/// The state of a node that the original runs, and what serves in its pods.
struct Old {
    sandboxes: Vec<(Sandbox, [IpAddr; 2])>,
    /// Killed when they are dropped.
    servers: Vec<tokio::process::Child>,
}

/// Builds what the original has left: rules, blocks, exported routes, pods.
async fn original(lab: &Lab) -> Result<Old> {
    let node = lab.topology().node(NODE).context("no such node")?;
    let place = Target::Node(NODE.to_owned());
    for family in ["-4", "-6"] {
        exec(lab, &place, &["ip", family, "rule", "add", "pref", "2000", "lookup", "116"]).await?;
    }
    for number in [BLOCK, EMPTY] {
        block(lab, number).await?;
        for net in nets(number) {
            exec(
                lab,
                &place,
                &["ip", "route", "add", &net, "dev", "lo", "proto", "30", "scope", "global", "table", "119"],
            )
            .await?;
        }
    }
    completed_request(lab).await?;
    let mut old = Old { sandboxes: Vec::new(), servers: Vec::new() };
    for (name, offset) in OLD.into_iter().zip([0, 2]) {
        let sandbox = Sandbox::new(lab, NODE, NAMESPACE, name, &format!("c0ffee{name}"))?;
        let own = addresses(BLOCK, offset);
        wire(lab, node, &sandbox, own).await.with_context(|| format!("wiring {name}"))?;
        status(lab, name, own).await?;
        old.servers.push(serve(lab, &sandbox, own)?);
        old.sandboxes.push((sandbox, own));
    }
    Ok(old)
}

/// Networks of a block of the pool `default`, whose blocks have four addresses.
fn nets(number: u32) -> [String; 2] {
    let [v4, v6] = addresses(number, 0);
    [format!("{v4}/30"), format!("{v6}/126")]
}

fn addresses(number: u32, offset: u32) -> [IpAddr; 2] {
    let at = 4 * number + offset;
    let [_, _, high, low] = at.to_be_bytes();
    [IpAddr::from([10, 244, high, low]), format!("fd00:10:244::{at:x}").parse().expect("an address")]
}

/// A block as the original's controller makes it.
async fn block(lab: &Lab, number: u32) -> Result<()> {
    let pool = get(lab, &["addresspool", "default"]).await?;
    let [v4, v6] = nets(number);
    let block = json!({
        "apiVersion": "coil.cybozu.com/v2",
        "kind": "AddressBlock",
        "metadata": {
            "name": format!("default-{number}"),
            "labels": {
                "coil.cybozu.com/pool": "default",
                "coil.cybozu.com/node": NODE,
                "coil.cybozu.com/request": format!("00000000-0000-4000-8000-{number:012}"),
            },
            "finalizers": ["coil.cybozu.com"],
            "ownerReferences": [{
                "apiVersion": "coil.cybozu.com/v2", "kind": "AddressPool", "name": "default",
                "uid": pool["metadata"]["uid"], "controller": true, "blockOwnerDeletion": true,
            }],
        },
        "index": number, "ipv4": v4, "ipv6": v6,
    });
    apply(lab, &block.to_string()).await.map(drop)
}

/// The original leaves a request that was answered until it needs another block.
async fn completed_request(lab: &Lab) -> Result<()> {
    let node = get(lab, &["node", NODE]).await?;
    let name = format!("req-default-{NODE}");
    let request = json!({
        "apiVersion": "coil.cybozu.com/v2",
        "kind": "BlockRequest",
        "metadata": {
            "name": name,
            "ownerReferences": [{
                "apiVersion": "v1", "kind": "Node", "name": NODE, "uid": node["metadata"]["uid"],
            }],
        },
        "spec": { "nodeName": NODE, "poolName": "default" },
    });
    apply(lab, &request.to_string()).await?;
    // The controller, which is ours already, answers it with a block of its own; the original's is put in its place.
    let answered = until("the request is answered", || async {
        let request = get(lab, &["blockrequest", &name]).await?;
        ensure!(request["status"]["addressBlockName"].is_string(), "{request}");
        Ok(request)
    })
    .await?;
    let given = answered["status"]["addressBlockName"].as_str().unwrap_or_default().to_owned();
    let mut request = answered;
    request["status"]["addressBlockName"] = json!(format!("default-{BLOCK}"));
    put_status(lab, &format!("/apis/coil.cybozu.com/v2/blockrequests/{name}/status"), &request).await?;
    let free = r#"{"metadata":{"finalizers":null}}"#;
    kubectl(lab, &["patch", "addressblock", &given, "--type=merge", "--patch", free], "").await?;
    kubectl(lab, &["delete", "addressblock", &given, "--ignore-not-found"], "").await.map(drop)
}

/// Wires a pod as the original does.
async fn wire(lab: &Lab, node: &Node, sandbox: &Sandbox, own: [IpAddr; 2]) -> Result<()> {
    let [v4, v6] = own;
    let container = &sandbox.attachment.container_id;
    let inside = format!("nsenter --net={}", sandbox.attachment.netns.path().display());
    let host = format!("veth{:08x}", 0xbeef_0000_u32 + last(v4));
    let of = |v4: bool| node.addresses.iter().map(ipnet::IpNet::addr).find(|address| address.is_ipv4() == v4);
    let (node4, node6) = (of(true).context("no IPv4")?, of(false).context("no IPv6")?);
    let script = format!(
        "set -e
{inside} ip link set lo up
{inside} ip link add eth0 mtu 1500 type veth peer name {host} mtu 1500 netns {space}
{inside} ip link set eth0 up
ip link set {host} up
echo 0 > /proc/sys/net/ipv6/conf/{host}/accept_ra
{inside} ip address add {v4}/32 dev eth0
{inside} ip -6 address add {v6}/128 dev eth0 nodad
ip link set {host} alias COIL:default:{container}:eth0
ip address add {node4}/32 dev {host}
ip -6 address add {node6}/128 dev {host} nodad
ip route add {v4}/32 dev {host} table 116 proto 30 scope link
ip -6 route add {v6}/128 dev {host} table 116 proto 30
{inside} ip route add {node4}/32 dev eth0 scope link
{inside} ip route add default via {node4} dev eth0
link=$(ip -6 -o address show dev {host} scope link | sed 's/.*inet6 \\([^/]*\\).*/\\1/')
{inside} ip -6 route add default via $link dev eth0
",
        space = node.netns.name(),
    );
    exec(lab, &Target::Node(NODE.to_owned()), &["sh", "-c", &script]).await.map(drop)
}

fn last(address: IpAddr) -> u32 {
    match address {
        IpAddr::V4(address) => address.octets()[3].into(),
        IpAddr::V6(address) => address.segments()[7].into(),
    }
}

/// The API knows the addresses of pods that run.
async fn status(lab: &Lab, name: &str, own: [IpAddr; 2]) -> Result<()> {
    let mut pod = get(lab, &["--namespace", NAMESPACE, "pod", name]).await?;
    pod["status"]["phase"] = json!("Running");
    pod["status"]["podIP"] = json!(own[0]);
    pod["status"]["podIPs"] = json!(own.map(|ip| json!({ "ip": ip })));
    put_status(lab, &format!("/api/v1/namespaces/{NAMESPACE}/pods/{name}/status"), &pod).await
}

async fn put_status(lab: &Lab, path: &str, object: &Value) -> Result<()> {
    kubectl(lab, &["replace", "--raw", path, "-f", "-"], &object.to_string()).await.map(drop)
}

/// HTTP and echo in a pod.
fn serve(lab: &Lab, sandbox: &Sandbox, own: [IpAddr; 2]) -> Result<tokio::process::Child> {
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_coil-lab"));
    command.arg("http").env(paths::MARKER, lab.id()).stdin(Stdio::null()).stdout(Stdio::null());
    for address in own {
        command.args(["--address", &address.to_string()]);
    }
    sandbox.attachment.netns.enter(&mut command)?;
    tokio::process::Command::from(command).kill_on_drop(true).spawn().context("starting the servers")
}

/// Our `coild` comes while connections to the old pods are open.
async fn adopted(lab: &Lab, old: &Old) -> Result<()> {
    let place = pod(CLIENT.0, CLIENT.1);
    for (_, own) in &old.sandboxes {
        for address in own {
            let to = SocketAddr::new(*address, HTTP).to_string();
            let seen: Peer = until("the old pods serve", || async {
                ask(lab, &place, &["--timeout", "4", "peer", &to]).await
            })
            .await?;
            ensure!(seen.local == *address, "{seen:?}");
        }
    }
    let enough = Path::new(paths::ROOT).join("adopted");
    let end = enough.display().to_string();
    let talk = |address: IpAddr| {
        let (place, end) = (&place, &end);
        async move {
            let to = SocketAddr::new(address, ECHO).to_string();
            let stream =
                ["stream", &to, "--seconds", "110", "--rate", "500000", "--stall-ms", "4000", "--until", end];
            ask_for::<Stream>(lab, place, &stream, LIMIT).await
        }
    };
    let come = async {
        let done = coild_comes(lab, old).await;
        std::fs::write(&enough, "")?;
        done
    };
    let [v4, v6] = old.sandboxes[0].1;
    let (v4, v6, come) = tokio::join!(talk(v4), talk(v6), come);
    std::fs::remove_file(&enough)?;
    come?;
    for stream in [v4?, v6?] {
        ensure!(stream.ok, "{stream:?}");
        eprintln!("over the adoption: {stream:?}");
    }
    Ok(())
}

async fn coild_comes(lab: &Lab, old: &Old) -> Result<()> {
    select(lab, json!({})).await?;
    let agents = ["pod", "--selector", "app.kubernetes.io/component=coild"];
    let status = ["--namespace", "kube-system", "rollout", "status", "daemonset/coild", "--timeout=60s"];
    kubectl(lab, &status, "").await?;
    wait_for(lab, "condition=Ready", "kube-system", &agents).await?;
    let place = Target::Node(NODE.to_owned());
    until("the datapath serves the old pods", || async {
        let metrics = scrape(lab, &place, METRICS).await?;
        let of = |name: &str| sum(&metrics, name, &[]);
        let (served, without) = (of("coil_pods"), of("coil_pods_without_interface"));
        ensure!(served == OLD.len() as f64, "{served} pods are served, {without} are without interface");
        let (used, stray) = (of("coil_ipam_used_addresses"), of("coil_ipam_stray_owners"));
        ensure!(used == OLD.len() as f64 && stray == 0.0, "{used} addresses in use, {stray} strays");
        Ok(())
    })
    .await?;
    // The empty block is given back, the other is kept.
    let kept = BTreeSet::from(nets(BLOCK));
    until("the node has the block of its pods alone", || async {
        let (blocks, exported) = (blocks(lab, NODE).await?, exported(lab, NODE).await?);
        ensure!(blocks == kept && exported == kept, "{blocks:?}, exported {exported:?}");
        Ok(())
    })
    .await?;
    for (sandbox, own) in &old.sandboxes {
        let inside = sandbox.inside(lab).await?;
        ensure!(BTreeSet::from_iter(&inside) == BTreeSet::from_iter(own), "{inside:?}, it had {own:?}");
    }
    for family in ["-4", "-6"] {
        let rules = exec(lab, &place, &["ip", "-j", family, "rule", "show", "pref", "2000"]).await?;
        let rules: Value = serde_json::from_str(&rules)?;
        ensure!(rules.as_array().map(Vec::len) == Some(1), "{rules}");
    }
    Ok(())
}

/// New pods get what is free; old ones can be deleted.
async fn used_and_removed(lab: &Lab, old: Old) -> Result<()> {
    let mut seen: BTreeSet<IpAddr> = old.sandboxes.iter().flat_map(|(_, own)| *own).collect();
    let mut new = Vec::new();
    for name in NEW {
        let mut sandbox = Sandbox::new(lab, NODE, NAMESPACE, name, &format!("ab{name}"))?;
        sandbox.add().await?;
        for address in sandbox.addresses() {
            ensure!(seen.insert(address), "{name} got {address}, which another pod has");
        }
        new.push(sandbox);
    }
    ensure!(seen.len() == 2 * (OLD.len() + NEW.len()), "{seen:?}");
    // The two that were left of the old block are not wasted.
    let nets: Vec<ipnet::IpNet> = nets(BLOCK).iter().map(|net| net.parse()).collect::<Result<_, _>>()?;
    let inside = seen.iter().filter(|address| nets.iter().any(|net| net.contains(*address))).count();
    ensure!(inside == 8, "{inside} addresses of the old block are in use: {seen:?}");
    let [(first, gone), (second, stays)] =
        <[_; 2]>::try_from(old.sandboxes).map_err(|all| anyhow::anyhow!("{} old pods", all.len()))?;
    first.delete().await?;
    let left = exec(lab, &Target::Node(NODE.to_owned()), &["ip", "-d", "link"]).await?;
    ensure!(!left.contains(&first.attachment.container_id), "its interface is left: {left}");
    let place = pod(CLIENT.0, CLIENT.1);
    for address in stays {
        let to = SocketAddr::new(address, HTTP).to_string();
        ask::<Peer>(lab, &place, &["--timeout", "4", "peer", &to]).await.context("the other old pod")?;
    }
    for address in gone {
        let to = SocketAddr::new(address, HTTP).to_string();
        let answer = ask::<Peer>(lab, &place, &["--timeout", "2", "peer", &to]).await;
        ensure!(answer.is_err(), "{address} still answers: {answer:?}");
    }
    for sandbox in new.iter().chain([&second]) {
        sandbox.delete().await?;
    }
    Ok(())
}
