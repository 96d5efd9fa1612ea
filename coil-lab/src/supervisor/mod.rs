//! The one long-running process of a lab: makes the network, hosts the API, plays the kubelet of every node, and keeps
//! the external host's servers running. `up` starts it; `down` ends it and clears up after it.

mod api;
mod background;
mod bpffs;
pub(crate) mod control;
mod control_plane;
mod objects;
mod reboot;

use crate::kubelet::Kubelets;
use crate::options::Networking;
use crate::paths;
use crate::process::ProcessId;
use crate::state::{Phase, State};
use crate::{cni, controllers, topology};
use anyhow::Context;
use serde::{Deserialize, Serialize};
use std::io::Write;
use std::os::unix::fs::{PermissionsExt, symlink};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tracing::{error, info};

/// What the supervisor tells `up`, one JSON object per line on standard output.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Message {
    /// What it is doing.
    Progress(String),
    /// All is up.
    Ready,
    /// It gives up.
    Failed(String),
}

/// Programs of the multi-call binary that the lab's pods and CNI may start.
const PROGRAMS: [&str; 10] = [
    "coild",
    "coil",
    "coil-installer",
    "coil-egress",
    "coil-router",
    "coil-controller",
    "coil-exporter",
    "coilctl",
    "kubectl-coil",
    "hypercoil",
];

fn tell(message: &Message) {
    if let Message::Progress(text) = message {
        info!("{text}");
    }
    let mut line = serde_json::to_vec(message).unwrap_or_default();
    line.push(b'\n');
    // `up` may have been interrupted; whether the lab goes on is for `down` to decide.
    if let Err(error) = std::io::stdout().write_all(&line) {
        info!(%error, "nobody listens to progress");
    }
}

fn progress(text: impl Into<String>) {
    tell(&Message::Progress(text.into()));
}

/// Runs a lab until it is told to end.
pub async fn serve() -> anyhow::Result<()> {
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .with_env_filter(
            tracing_subscriber::EnvFilter::try_from_default_env()
                .unwrap_or_else(|_| "info,coil_lab=debug,hyper=warn,kube=info".into()),
        )
        .init();
    let ended = run().await;
    if let Err(failure) = &ended {
        error!("{failure:#}");
        tell(&Message::Failed(format!("{failure:#}")));
    }
    ended
}

async fn run() -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut state = State::load()?.context("no record of a lab: the supervisor is started by `lab up`")?;
    state.supervisor = ProcessId::own();
    state.save()?;

    bpffs::prepare(&state)?;
    progress(format!("making the network: {} nodes, a router, an external host", state.topology.nodes.len()));
    topology::apply(&state.topology)?;
    folders(&state)?;
    let mut background = background::Background::new(&state);
    background.external_servers()?;
    if state.options.wired_by() == Networking::Coil {
        background.routing()?;
    }

    let mut api = api::Api::start(&mut state).await?;
    let shutdown = CancellationToken::new();
    let mut controllers = match &api.embedded {
        Some(server) => controllers::start(server),
        None => {
            if !api.elsewhere.manager {
                progress("running the lab's own controllers of workloads");
            }
            if !api.elsewhere.scheduler {
                progress("running the lab's own scheduler");
            }
            controllers::start_remote(api.client.clone(), api.elsewhere)
        }
    };
    progress("registering nodes and custom resources");
    let (kubelets, switch) = Kubelets::register(api.client.clone(), state.clone(), shutdown.clone()).await?;
    let mut kubelets = tokio::spawn(kubelets.run());

    let mut asked = control::listen()?;
    let client = api.client.clone();
    let lab = state.clone();
    let ready = async {
        objects::definitions(&client, &state.options.crds).await?;
        if state.options.programs.is_some() {
            progress("starting coild on every node, and coil-controller");
            objects::coil(&client, &state).await.context("the objects of Coil")?;
            objects::coil_ready(&client, &state).await?;
        }
        state.phase = Phase::Ready;
        state.save()?;
        tell(&Message::Ready);
        std::future::pending::<anyhow::Result<()>>().await
    };
    tokio::pin!(ready);
    let ended = loop {
        let (request, answer) = tokio::select! {
            ended = &mut ready => break ended,
            _ = terminate.recv() => {
                info!("told to end");
                break Ok(());
            }
            ended = background.failed() => break ended,
            ended = api.failed() => break ended,
            ended = &mut kubelets => break ended?,
            Some(ended) = controllers.join_next() => break ended.context("a controller"),
            Some(asked) = asked.recv() => asked,
        };
        let done = tokio::select! {
            done = reboot::serve(&request, &lab, &client, &mut background, &switch) => done,
            _ = terminate.recv() => break Ok(()),
        };
        if answer.send(done.map_err(|error| format!("{error:#}"))).is_err() {
            info!(?request, "who asked is gone");
        }
    };
    shutdown.cancel();
    if !kubelets.is_finished() {
        kubelets.await??;
    }
    ended
}

/// Folders, programs and CNI configuration.
fn folders(state: &State) -> anyhow::Result<()> {
    for folder in [paths::bin(), paths::cni(), paths::pods(), paths::logs()] {
        std::fs::create_dir_all(&folder).with_context(|| format!("cannot create {}", folder.display()))?;
    }
    if let Some(binary) = &state.options.programs {
        for program in PROGRAMS {
            let binary = match &state.options.plugin {
                Some(plugin) if program == "coil" => plugin,
                _ => binary,
            };
            symlink(binary, paths::bin().join(program)).with_context(|| format!("link to {program}"))?;
        }
    }
    traffic_scripts(state).context("cannot write lab-client and lab-server")?;
    for node in &state.topology.nodes {
        let folder = paths::node(&node.name);
        std::fs::create_dir_all(&folder).with_context(|| format!("cannot create {}", folder.display()))?;
        let config = match &state.options.conflist {
            Some(file) => std::fs::read_to_string(file)
                .with_context(|| format!("cannot read {}", file.display()))?
                .replace("@NODE@", &node.name),
            None => {
                let options = &state.options;
                let config = cni::config(node, options.wired_by(), options.programs.is_some());
                serde_json::to_string_pretty(&config)?
            }
        };
        let path = folder.join("10-lab.conflist");
        std::fs::write(&path, config).with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(())
}

/// `lab-client` and `lab-server`, the two ends of the lab's traffic, for commands in its namespaces.
fn traffic_scripts(state: &State) -> std::io::Result<()> {
    let quoted: Vec<String> = state
        .options
        .launcher
        .iter()
        .map(|part| format!("'{}'", part.to_string_lossy().replace('\'', "'\\''")))
        .collect();
    for (name, verb) in [("lab-client", "client"), ("lab-server", "http")] {
        let path = paths::bin().join(name);
        std::fs::write(&path, format!("#!/bin/sh\nexec {} {verb} \"$@\"\n", quoted.join(" ")))?;
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755))?;
    }
    Ok(())
}
