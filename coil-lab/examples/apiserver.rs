//! The embedded API server and its controllers alone, for trying `kubectl` against them:
//! `cargo run -p coil-lab --example apiserver -- 127.0.0.1:8001 [NODES]`. With a number of nodes, those nodes exist and
//! pods on them pretend to run.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use coil_lab::api::delete::DeleteOptions;
use coil_lab::api::write::{Part, WriteOptions};
use coil_lab::api::{ApiConfig, ApiResult, ApiServer, obj};
use serde_json::{Value, json};

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    tracing_subscriber::fmt()
        .with_env_filter(tracing_subscriber::EnvFilter::from_default_env())
        .with_writer(std::io::stderr)
        .init();
    let address = std::env::args().nth(1).unwrap_or_else(|| "127.0.0.1:8001".to_owned());
    let nodes: usize =
        std::env::args().nth(2).map_or(Ok(0), |text| text.parse()).context("number of nodes")?;
    let listener =
        tokio::net::TcpListener::bind(&address).await.with_context(|| format!("listen on {address}"))?;
    let server = ApiServer::new(ApiConfig::default());
    println!("kubectl --server http://{}", listener.local_addr()?);
    let _controllers = coil_lab::controllers::start(&server);
    if nodes > 0 {
        make_nodes(&server, nodes)?;
        tokio::spawn(pretend(server.clone()));
    }
    server.serve(listener).await.context("serve")
}

fn make_nodes(server: &Arc<ApiServer>, count: usize) -> ApiResult<()> {
    let resource = server.resource("", "nodes")?;
    for number in 1..=count {
        let node = json!({
            "metadata": {"name": format!("node{number}")},
            "status": {
                "conditions": [{"type": "Ready", "status": "True", "reason": "KubeletReady", "lastTransitionTime": obj::now()}],
                "addresses": [{"type": "InternalIP", "address": format!("192.0.2.{number}")}],
                "nodeInfo": {"kubeletVersion": "v1.33.0"},
            },
        });
        server.create_now(&resource, None, node, &mut WriteOptions::internal("kubelet"))?;
    }
    Ok(())
}

/// Makes bound pods ready and takes deleted ones away.
async fn pretend(server: Arc<ApiServer>) {
    let mut last = 0;
    loop {
        if let Err(error) = pretend_once(&server, &mut last) {
            tracing::warn!(%error, "pretending failed");
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

fn pretend_once(server: &Arc<ApiServer>, last: &mut u8) -> ApiResult<()> {
    let resource = server.resource("", "pods")?;
    for pod in server.all(&resource, None) {
        let (namespace, name) = (Some(obj::namespace(&pod)), obj::name(&pod));
        if obj::text(&pod, &["spec", "nodeName"]).is_empty() {
            continue;
        }
        if obj::is_deleting(&pod) {
            let now = DeleteOptions { grace: Some(0), ..DeleteOptions::default() };
            server.delete(&resource, namespace, name, &now)?;
        } else if obj::text(&pod, &["status", "phase"]) == "Pending" {
            *last = last.wrapping_add(1);
            let ip = format!("10.1.0.{last}");
            let mut options = WriteOptions::internal("kubelet").with_part(Part::Status);
            server.rewrite(&resource, namespace, name, &mut options, &mut |old, _| Ok(running(old, &ip)))?;
        }
    }
    Ok(())
}

fn running(pod: &Value, ip: &str) -> Value {
    let mut pod = pod.clone();
    let containers: Vec<Value> = obj::items(&pod, &["spec", "containers"])
        .iter()
        .map(|one| {
            json!({
                "name": one["name"], "image": one["image"], "imageID": "", "ready": true, "started": true,
                "restartCount": 0, "state": {"running": {"startedAt": obj::now()}},
            })
        })
        .collect();
    let mut conditions = obj::items(&pod, &["status", "conditions"]).to_vec();
    for kind in ["Initialized", "ContainersReady", "Ready"] {
        conditions.push(json!({"type": kind, "status": "True", "lastTransitionTime": obj::now()}));
    }
    obj::set(&mut pod, &["status", "phase"], "Running");
    obj::set(&mut pod, &["status", "podIP"], ip);
    obj::set(&mut pod, &["status", "podIPs"], json!([{"ip": ip}]));
    obj::set(&mut pod, &["status", "startTime"], obj::now());
    obj::set(&mut pod, &["status", "containerStatuses"], containers);
    obj::set(&mut pod, &["status", "conditions"], conditions);
    pod
}
