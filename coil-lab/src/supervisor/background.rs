//! Processes of the lab that are no pods: started with a log file each, and started again if they end.

use crate::netns::Netns;
use crate::state::State;
use crate::topology::Node;
use crate::{bird, paths, target};
use anyhow::Context;
use std::collections::HashMap;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;
use tokio::task::{AbortHandle, JoinSet};
use tracing::warn;

/// The processes.
pub(super) struct Background {
    state: State,
    tasks: JoinSet<anyhow::Result<()>>,
    /// What runs on nodes.
    nodes: HashMap<String, AbortHandle>,
}

impl Background {
    pub(super) fn new(state: &State) -> Self {
        Self { state: state.clone(), tasks: JoinSet::new(), nodes: HashMap::new() }
    }

    /// The HTTP and echo servers of the external host.
    pub(super) fn external_servers(&mut self) -> anyhow::Result<()> {
        let topology = &self.state.topology;
        let mut argv: Vec<PathBuf> = self.state.options.launcher.clone();
        argv.push("http".into());
        let link = topology.external.link_addresses.iter().map(ipnet::IpNet::addr);
        for address in link.chain(topology.external.addresses.iter().copied()) {
            argv.push("--address".into());
            argv.push(address.to_string().into());
        }
        let namespace = topology.external.netns.clone();
        self.keep_running("external", namespace, argv).map(drop)
    }

    /// BIRD on every node and on the router.
    pub(super) fn routing(&mut self) -> anyhow::Result<()> {
        let topology = self.state.topology.clone();
        self.bird(topology.router.clone(), bird::router_folder(), bird::router(&topology))?;
        topology.nodes.iter().try_for_each(|node| self.routing_of(node))
    }

    /// BIRD on a node.
    pub(super) fn routing_of(&mut self, node: &Node) -> anyhow::Result<()> {
        let nodes = &self.state.topology.nodes;
        let number = 1 + nodes.iter().take_while(|other| other.name != node.name).count();
        let task = self.bird(node.netns.clone(), paths::node(&node.name), bird::node(node, number))?;
        self.nodes.insert(node.name.clone(), task);
        Ok(())
    }

    /// Ends what runs on a node, without a chance to say good-bye.
    pub(super) fn stop(&mut self, node: &Node) {
        if let Some(task) = self.nodes.remove(&node.name) {
            task.abort();
        }
    }

    fn bird(
        &mut self,
        namespace: Netns,
        folder: PathBuf,
        configuration: String,
    ) -> anyhow::Result<AbortHandle> {
        let program = bird::program().context("bird is not installed (Debian package bird2)")?;
        std::fs::create_dir_all(&folder).with_context(|| format!("cannot create {}", folder.display()))?;
        let path = folder.join("bird.conf");
        std::fs::write(&path, configuration).with_context(|| format!("cannot write {}", path.display()))?;
        let name = format!("bird-{}", folder.file_name().unwrap_or_default().display());
        self.keep_running(&name, namespace, bird::command(program, folder))
    }

    /// Starts a program and restarts it whenever it ends.
    fn keep_running(
        &mut self,
        name: &str,
        namespace: Netns,
        argv: Vec<PathBuf>,
    ) -> anyhow::Result<AbortHandle> {
        let state = self.state.clone();
        let name = name.to_owned();
        let mut child = start(&state, &name, &namespace, &argv)?;
        let task = self.tasks.spawn(async move {
            loop {
                let status = child.wait().await.with_context(|| format!("waiting for {name}"))?;
                warn!(name, %status, "ended; starting it again");
                tokio::time::sleep(Duration::from_millis(500)).await;
                child = start(&state, &name, &namespace, &argv)?;
            }
        });
        Ok(task)
    }

    /// Ends only if a process cannot be kept running.
    pub(super) async fn failed(&mut self) -> anyhow::Result<()> {
        loop {
            match self.tasks.join_next().await {
                // Its node has no power.
                Some(Err(error)) if error.is_cancelled() => {}
                Some(ended) => return ended?,
                None => std::future::pending::<()>().await,
            }
        }
    }
}

fn start(
    state: &State,
    name: &str,
    namespace: &Netns,
    argv: &[PathBuf],
) -> anyhow::Result<tokio::process::Child> {
    let path = paths::logs().join(format!("{name}.log"));
    let log = std::fs::OpenOptions::new()
        .create(true)
        .append(true)
        .open(&path)
        .with_context(|| format!("cannot open {}", path.display()))?;
    let mut command = Command::new(argv.first().context("no program")?);
    command.args(&argv[1..]);
    target::environment(&mut command, state, None);
    command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
    namespace.enter(&mut command)?;
    tokio::process::Command::from(command)
        .kill_on_drop(true)
        .spawn()
        .with_context(|| format!("cannot start {name}"))
}
