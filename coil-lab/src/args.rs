//! The command line of the lab, to be flattened into a program such as xtask.

use crate::options::{ApiSource, Family, Networking, Options};
use crate::target::Target;
use crate::{Lab, LabError, Status, paths, state, supervisor, traffic};
use anyhow::{Context, bail};
use clap::{Args, Subcommand};
use std::io::Write;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::PathBuf;
use std::process::{Command, ExitCode};

/// Arguments of `lab`.
#[derive(Clone, Debug, Args)]
pub struct LabArgs {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Clone, Debug, Subcommand)]
enum Verb {
    /// Bring a cluster up in network namespaces; returns when all is ready
    Up(UpArgs),
    /// Remove everything that `up` has made, also after a crash
    Down,
    /// Run kubectl against the lab
    Kubectl {
        /// Arguments of kubectl
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
    /// Run a command in a place of the lab; its exit status becomes ours
    Exec {
        /// pod/NAMESPACE/NAME, node/NAME, external or router
        target: Target,
        /// The command; a shell where absent
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        command: Vec<String>,
    },
    /// Cut a node's power and start it again; returns when Coil is ready on it
    ///
    /// Its network namespace and those of its pods, its processes, its pins and its sockets go and are made anew; its
    /// object in the API stays, and so does what a real node has on disk.
    Reboot {
        /// Name of the node
        node: String,
    },
    /// Cut a node's power; it stays dark until `on`
    ///
    /// As in `reboot`, but for its start. The API is told nothing: as for a real node, its pods stay ready there until
    /// somebody patches them.
    Off {
        /// Name of the node
        node: String,
    },
    /// Start a node again that was switched off; returns when Coil is ready on it
    On {
        /// Name of the node
        node: String,
    },
    /// List nodes, pods, addresses, namespaces, processes and log files
    Status {
        /// Print one JSON object
        #[arg(long)]
        json: bool,
    },
    /// Print a log file of the lab
    Logs {
        /// supervisor, external, or NAMESPACE/POD
        #[arg(default_value = "supervisor")]
        of: String,
        /// Container of the pod, where it has several
        #[arg(short, long)]
        container: Option<String>,
        /// Wait for more
        #[arg(short, long)]
        follow: bool,
    },
    /// Host the lab (started by `up`)
    #[command(hide = true)]
    Serve,
    /// Serve HTTP and echo to the lab (started by the supervisor)
    #[command(hide = true)]
    Http(traffic::ServerArgs),
    /// Talk to the servers of the external host
    Client(traffic::ClientArgs),
}

/// Arguments of `lab up`.
#[derive(Clone, Debug, Args)]
pub struct UpArgs {
    /// Number of worker nodes
    #[arg(long, default_value_t = 2)]
    pub nodes: usize,
    /// Address families
    #[arg(long, value_enum, default_value_t)]
    pub family: Family,
    /// Who gives pods their network; default: coil, or ptp with --without-coil or --conflist
    #[arg(long, value_enum)]
    pub networking: Option<Networking>,
    /// The multi-call binary with the Coil programs; default: hypercoil next to this program
    #[arg(long, value_name = "FILE")]
    pub programs: Option<PathBuf>,
    /// A cluster without Coil: pods are wired by the other CNI plugins alone
    #[arg(long, conflicts_with = "programs")]
    pub without_coil: bool,
    /// A CNI configuration list to use in place of the lab's own
    #[arg(long, value_name = "FILE")]
    pub conflist: Option<PathBuf>,
    /// Use the API server of a cluster that runs already
    #[arg(long, value_name = "FILE")]
    pub kubeconfig: Option<PathBuf>,
    /// Run the lab's own scheduler and controllers of workloads on that API server, which has none
    #[arg(long, requires = "kubeconfig")]
    pub with_controllers: bool,
    /// Seconds to wait for all to be ready
    #[arg(long, value_name = "SECONDS", default_value_t = 120)]
    pub wait: u64,
}

impl UpArgs {
    /// The same choices as [`Options`].
    pub fn options(self, launcher: Vec<PathBuf>) -> std::io::Result<Options> {
        let Self {
            nodes,
            family,
            networking,
            programs,
            without_coil,
            conflist,
            kubeconfig,
            with_controllers,
            wait,
        } = self;
        let mut options = Options::with_launcher(launcher);
        options.nodes = nodes;
        options.family = family;
        if without_coil && networking == Some(Networking::Coil) {
            let message = "--networking coil needs Coil, which --without-coil leaves out";
            return Err(std::io::Error::new(std::io::ErrorKind::InvalidInput, message));
        }
        // A list of other plugins hands out the addresses to which the router has fixed routes.
        let default = if conflist.is_some() { Networking::Ptp } else { Networking::default() };
        options.networking = networking.unwrap_or(default);
        options.conflist = conflist.map(std::path::absolute).transpose()?;
        options.wait_seconds = wait;
        options.controllers = with_controllers;
        if let Some(programs) = programs {
            options.programs = Some(std::path::absolute(programs)?);
        }
        if without_coil {
            options.programs = None;
        }
        if let Some(file) = kubeconfig {
            options.api = ApiSource::Kubeconfig(std::path::absolute(file)?);
        }
        Ok(options)
    }
}

impl LabArgs {
    /// Whether a lab is to be brought up, which needs the programs and the packages that it runs.
    pub fn is_up(&self) -> bool {
        matches!(self.verb, Verb::Up(_))
    }

    /// Runs the verb to its end. `launcher` is the command line that reaches these verbs again, such as
    /// `[xtask, "lab"]`. Makes its own tokio runtime, so it must not be called from inside one.
    pub fn run(self, launcher: Vec<PathBuf>) -> anyhow::Result<ExitCode> {
        match self.verb {
            Verb::Up(args) => {
                let options = args.options(launcher)?;
                runtime()?.block_on(up(options))
            }
            Verb::Down => {
                Lab::down(|text| eprintln!("{text}"))?;
                eprintln!("the lab is down");
                Ok(ExitCode::SUCCESS)
            }
            Verb::Kubectl { arguments } => {
                let mut kubectl = Command::new(Lab::open()?.kubectl());
                let error = kubectl.args(arguments).env("KUBECONFIG", paths::kubeconfig()).exec();
                Err(error).context("cannot run kubectl (Debian package kubernetes-client)")
            }
            Verb::Exec { target, command } => {
                let mut argv = command;
                if argv.is_empty() {
                    argv.push(std::env::var("SHELL").unwrap_or_else(|_| "sh".to_owned()));
                }
                let mut command = Lab::open()?.command(&target, &argv)?;
                // Terminal, pipes and exit status are the command's own, since it takes this process over.
                let error = command.exec();
                let code = if error.kind() == std::io::ErrorKind::NotFound { 127 } else { 126 };
                eprintln!("cannot run {} in {target}: {error}", argv[0]);
                Ok(ExitCode::from(code))
            }
            Verb::Reboot { node } => {
                let lab = Lab::open()?;
                let begun = std::time::Instant::now();
                runtime()?.block_on(lab.reboot(&node))?;
                eprintln!("{node} is back after {:.1} s", begun.elapsed().as_secs_f32());
                Ok(ExitCode::SUCCESS)
            }
            Verb::Off { node } => {
                runtime()?.block_on(Lab::open()?.power_off(&node))?;
                Ok(ExitCode::SUCCESS)
            }
            Verb::On { node } => {
                runtime()?.block_on(Lab::open()?.power_on(&node))?;
                Ok(ExitCode::SUCCESS)
            }
            Verb::Status { json } => {
                let state = state::State::load()?.ok_or(LabError::None)?;
                let status = Status::of(&state);
                let text = if json { serde_json::to_string(&status)? + "\n" } else { status.to_string() };
                match std::io::stdout().write_all(text.as_bytes()) {
                    // A reader such as `head` may have seen enough.
                    Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => Err(error.into()),
                    _ => Ok(ExitCode::SUCCESS),
                }
            }
            Verb::Logs { of, container, follow } => logs(&of, container.as_deref(), follow),
            Verb::Serve => {
                runtime()?.block_on(supervisor::serve())?;
                Ok(ExitCode::SUCCESS)
            }
            Verb::Http(args) => {
                runtime()?.block_on(traffic::run_server(args))?;
                Ok(ExitCode::SUCCESS)
            }
            Verb::Client(args) => {
                runtime()?.block_on(traffic::run_client(args))?;
                Ok(ExitCode::SUCCESS)
            }
        }
    }
}

fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread().enable_all().build().context("tokio runtime")
}

async fn up(options: Options) -> anyhow::Result<ExitCode> {
    let interrupted = tokio::select! {
        lab = Lab::up(options, |text| eprintln!("{text}")) => {
            println!("{}", lab?.kubeconfig().display());
            false
        }
        interrupted = tokio::signal::ctrl_c() => {
            interrupted?;
            true
        }
    };
    if interrupted {
        eprintln!("interrupted; cleaning up");
        Lab::down(|text| eprintln!("{text}"))?;
        return Ok(ExitCode::from(130));
    }
    Ok(ExitCode::SUCCESS)
}

fn logs(of: &str, container: Option<&str>, follow: bool) -> anyhow::Result<ExitCode> {
    state::State::load()?.ok_or(LabError::None)?;
    let path = match of.split_once('/') {
        None => paths::logs().join(format!("{of}.log")),
        Some((namespace, pod)) => match container {
            Some(container) => paths::container_log(namespace, pod, container),
            None => {
                let prefix = format!("{namespace}_{pod}_");
                let mut found: Vec<PathBuf> = std::fs::read_dir(paths::logs())?
                    .flatten()
                    .map(|entry| entry.path())
                    .filter(|path| {
                        path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(&prefix))
                    })
                    .collect();
                match (found.pop(), found.is_empty()) {
                    (Some(path), true) => path,
                    (Some(_), false) => {
                        bail!("pod {of} has several containers: choose one with --container")
                    }
                    (None, _) => bail!("no log of pod {of}; log files are in {}", paths::logs().display()),
                }
            }
        },
    };
    let mut command = Command::new("tail");
    command.args(["-n", "+1"]);
    if follow {
        command.arg("-F");
    }
    let status = command.arg(&path).status().context("tail")?;
    let code = status.code().or_else(|| status.signal().map(|signal| 128 + signal)).unwrap_or(1);
    Ok(ExitCode::from(u8::try_from(code).unwrap_or(1)))
}
