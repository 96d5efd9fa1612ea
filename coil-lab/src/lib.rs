//! A Kubernetes cluster in network namespaces on one machine, for demo, tests and benchmarks. Nodes are namespaces
//! joined by a router namespace; the real Coil programs run in them, started by a stand-in for the kubelet; the API is
//! embedded, or a real one. The product never depends on this crate.

pub mod api;
pub mod args;
mod bird;
pub mod cni;
pub mod controllers;
pub mod down;
pub mod drive;
pub mod footprint;
mod kubelet;
pub mod netns;
pub mod options;
pub mod paths;
pub mod process;
pub mod state;
pub mod status;
pub mod supervisor;
pub mod target;
pub mod topology;
pub mod traffic;
mod up;

pub use args::LabArgs;
pub use kubelet::{COIL_IMAGE, MIRROR_ANNOTATION, RUN_ANNOTATION};
pub use options::{ApiSource, Family, Options};
pub use status::Status;
pub use target::Target;
pub use topology::Topology;
pub use traffic::report;
pub use up::UpError;

use state::{Phase, State, StateError};
use std::ffi::OsStr;
use std::io;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};
use std::time::Duration;
use supervisor::control::{self, Request};
use tokio::io::AsyncWriteExt;

/// A lab that is up.
#[derive(Clone, Debug)]
pub struct Lab {
    state: State,
}

/// What can go wrong with a lab that is up.
#[derive(Debug, thiserror::Error)]
pub enum LabError {
    /// There is none.
    #[error("no lab is up: start one with `lab up`")]
    None,
    /// There was one, but it is broken or half made.
    #[error("the lab is not usable (its supervisor is gone or it is not ready): `lab up` or `lab down` cleans up; log: {}", paths::supervisor_log().display())]
    Broken,
    /// The record.
    #[error(transparent)]
    State(#[from] StateError),
    /// The place of a command.
    #[error(transparent)]
    Target(#[from] target::TargetError),
    /// The supervisor does not answer.
    #[error("the lab's supervisor does not answer at {}", paths::control().display())]
    Ask {
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// A node that was not switched off or on.
    #[error("the power of node {node} was not switched: {reason}")]
    Power {
        /// Its name.
        node: String,
        /// What the supervisor says.
        reason: String,
    },
    /// A node did not start again.
    #[error("node {node} was not started again: {reason}")]
    Reboot {
        /// Its name.
        node: String,
        /// What the supervisor says.
        reason: String,
    },
    /// A command.
    #[error("cannot run {program} in {target}")]
    Run {
        /// The program.
        program: String,
        /// The place.
        target: Target,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// A command that took too long, and was killed.
    #[error("{program} in {target} did not end within {} s", limit.as_secs())]
    Timeout {
        /// The program.
        program: String,
        /// The place.
        target: Target,
        /// The limit.
        limit: Duration,
    },
}

/// How [`Lab::exec`] runs a command.
#[derive(Clone, Debug)]
pub struct ExecOptions {
    /// What the command reads.
    pub stdin: Vec<u8>,
    /// When it is killed.
    pub limit: Duration,
}

impl Default for ExecOptions {
    fn default() -> Self {
        Self { stdin: Vec::new(), limit: Duration::from_secs(60) }
    }
}

impl Lab {
    /// Brings a lab up, or takes over one that is up with the same options, and returns when all is ready. What a lab
    /// that ended badly has left is removed first.
    pub async fn up(options: Options, progress: impl Fn(&str)) -> Result<Self, UpError> {
        up::up(options, &progress).await.map(|state| Self { state })
    }

    /// The lab that is up.
    pub fn open() -> Result<Self, LabError> {
        let state = State::load()?.ok_or(LabError::None)?;
        if state.phase != Phase::Ready || !state.supervised() {
            return Err(LabError::Broken);
        }
        Ok(Self { state })
    }

    /// Removes everything that `up` has made, also after a crash.
    pub fn down(progress: impl Fn(&str)) -> Result<(), down::DownError> {
        let _lock = up::lock(&progress);
        down::down(&progress)
    }

    /// Cuts the power of a node and starts it again. Returns when Coil is ready on it; other pods may still start.
    pub async fn reboot(&self, node: &str) -> Result<(), LabError> {
        let request = Request::Reboot(node.to_owned());
        let answer = control::ask(&request).await.map_err(|source| LabError::Ask { source })?;
        answer.map_err(|reason| LabError::Reboot { node: node.to_owned(), reason })
    }

    /// Cuts the power of a node, which stays dark: nothing there can say good-bye, and nobody tells the API.
    pub async fn power_off(&self, node: &str) -> Result<(), LabError> {
        self.switch(node, Request::Off(node.to_owned())).await
    }

    /// Starts a node again whose power was cut. Returns when Coil is ready on it; other pods may still start.
    pub async fn power_on(&self, node: &str) -> Result<(), LabError> {
        self.switch(node, Request::On(node.to_owned())).await
    }

    async fn switch(&self, node: &str, request: Request) -> Result<(), LabError> {
        let answer = control::ask(&request).await.map_err(|source| LabError::Ask { source })?;
        answer.map_err(|reason| LabError::Power { node: node.to_owned(), reason })
    }

    /// Kubeconfig for programs of the root namespace.
    pub fn kubeconfig(&self) -> PathBuf {
        paths::kubeconfig()
    }

    /// The kubectl to use: that of the control plane, if it brings one.
    pub fn kubectl(&self) -> PathBuf {
        match &self.state.options.api {
            ApiSource::Assets(folder) => Some(folder.join("kubectl")).filter(|program| program.is_file()),
            _ => None,
        }
        .unwrap_or_else(|| "kubectl".into())
    }

    /// Value of the marker in the environment of every process of this lab.
    pub fn id(&self) -> &str {
        &self.state.id
    }

    /// What was asked for.
    pub fn options(&self) -> &Options {
        &self.state.options
    }

    /// The network: nodes, addresses, namespaces.
    pub fn topology(&self) -> &Topology {
        &self.state.topology
    }

    /// What runs where.
    pub fn status(&self) -> Status {
        Status::of(&self.state)
    }

    /// A command that runs in a place of the lab, for callers that want to handle its pipes themselves.
    pub fn command<S: AsRef<OsStr>>(&self, target: &Target, argv: &[S]) -> Result<Command, LabError> {
        let program = argv.first().map_or_else(|| OsStr::new("sh"), AsRef::as_ref);
        let mut command = target.command(&self.state, program)?;
        command.args(argv.iter().skip(1));
        Ok(command)
    }

    /// A command line that runs this lab's own HTTP and traffic client, to be given to [`Lab::exec`].
    pub fn client(&self, arguments: &[&str]) -> Vec<String> {
        self.state
            .options
            .launcher
            .iter()
            .map(|part| part.to_string_lossy().into_owned())
            .chain(["client".to_owned()])
            .chain(arguments.iter().map(|argument| (*argument).to_owned()))
            .collect()
    }

    /// Runs a command in a place of the lab and captures what it prints.
    pub async fn exec<S: AsRef<OsStr>>(
        &self,
        target: &Target,
        argv: &[S],
        options: ExecOptions,
    ) -> Result<Output, LabError> {
        let mut command = self.command(target, argv)?;
        let program = command.get_program().to_string_lossy().into_owned();
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let run = |source| LabError::Run { program: program.clone(), target: target.clone(), source };
        let mut child = tokio::process::Command::from(command).kill_on_drop(true).spawn().map_err(run)?;
        let pipe = child.stdin.take();
        let input = options.stdin;
        let work = async {
            let write = async {
                if let Some(mut pipe) = pipe {
                    match pipe.write_all(&input).await {
                        // The command need not read what it is given.
                        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
                            return Err(error);
                        }
                        _ => {}
                    }
                }
                Ok(())
            };
            let (written, output) = tokio::join!(write, child.wait_with_output());
            written.and(output)
        };
        match tokio::time::timeout(options.limit, work).await {
            Ok(done) => done.map_err(run),
            Err(_) => Err(LabError::Timeout {
                program: program.clone(),
                target: target.clone(),
                limit: options.limit,
            }),
        }
    }
}
