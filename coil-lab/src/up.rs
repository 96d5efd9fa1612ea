//! Starts the supervisor and waits until it says that all is ready.

use crate::down::{self, DownError};
use crate::options::{ApiSource, Networking, Options};
use crate::paths;
use crate::state::{Phase, State, StateError};
use crate::supervisor::Message;
use crate::topology::{MAX_NODES, Topology};
use crate::{bird, cni};
use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::{Duration, Instant};
use tokio::io::{AsyncBufReadExt, BufReader};

/// Why a lab did not come up.
#[derive(Debug, thiserror::Error)]
pub enum UpError {
    /// Not root.
    #[error("the lab needs root: it makes network namespaces and loads eBPF")]
    NotRoot,
    /// Too many nodes, or none.
    #[error("{0} nodes: between 1 and {MAX_NODES} are possible")]
    Nodes(usize),
    /// A program that the lab needs is not there.
    #[error("{program} is not installed (Debian package {package})")]
    Tool {
        /// Its name.
        program: &'static str,
        /// Its package.
        package: &'static str,
    },
    /// A file that the lab needs is not there.
    #[error("{what} {} does not exist{hint}", path.display())]
    File {
        /// What it is.
        what: &'static str,
        /// Where it should be.
        path: PathBuf,
        /// How to get it.
        hint: &'static str,
    },
    /// Another one is up.
    #[error("a lab is up already, with other options ({0}): take it down first with `lab down`")]
    Other(String),
    /// The record.
    #[error(transparent)]
    State(#[from] StateError),
    /// The remains of an earlier lab could not be removed.
    #[error("cannot remove what an earlier lab has left")]
    Clean(#[source] DownError),
    /// The supervisor could not be started.
    #[error("cannot start the lab's supervisor {}", program.display())]
    Start {
        /// Its program.
        program: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The supervisor gave up.
    #[error("{0}")]
    Failed(String),
    /// The supervisor died without a word.
    #[error("the lab's supervisor died; the end of its log:\n{0}")]
    Died(String),
}

pub(crate) async fn up(options: Options, progress: &impl Fn(&str)) -> Result<State, UpError> {
    check(&options)?;
    let _lock = lock(progress);
    match State::load() {
        Ok(Some(state)) if state.phase == Phase::Ready && state.supervised() => {
            if state.options == options {
                progress("the lab is up already");
                return Ok(state);
            }
            let had = &state.options;
            return Err(UpError::Other(format!(
                "{} nodes, family {:?}, networking {:?}, API {:?}, programs {:?}",
                had.nodes,
                had.family,
                had.wired_by(),
                had.api,
                had.programs
            )));
        }
        _ if down::leftovers() => {
            progress("cleaning up after a lab that ended badly");
            down::down(progress).map_err(UpError::Clean)?;
        }
        _ => {}
    }
    let state = State {
        id: uuid::Uuid::new_v4().simple().to_string(),
        phase: Phase::Starting,
        topology: Topology::plan(options.nodes, options.family, options.wired_by()),
        options,
        supervisor: None,
        api_url: None,
    };
    state.save()?;
    let done = start(&state, progress).await;
    if done.is_err() {
        keep_logs(progress);
        if std::env::var_os("COIL_LAB_KEEP_FAILED").is_none()
            && let Err(error) = down::down(progress)
        {
            progress(&format!("clean-up failed: {error}"));
        }
    }
    done
}

/// Logs are needed to understand a failure, but go with the rest of the lab: keeps a copy.
fn keep_logs(progress: &impl Fn(&str)) {
    let kept = std::env::temp_dir().join("coil-lab-failed");
    let copy = || -> io::Result<()> {
        if kept.exists() {
            std::fs::remove_dir_all(&kept)?;
        }
        std::fs::create_dir_all(&kept)?;
        for entry in std::fs::read_dir(paths::logs())? {
            let entry = entry?;
            std::fs::copy(entry.path(), kept.join(entry.file_name()))?;
        }
        Ok(())
    };
    match copy() {
        Ok(()) => progress(&format!("logs of the failed lab are kept in {}", kept.display())),
        Err(error) => progress(&format!("logs of the failed lab are lost: {error}")),
    }
}

fn check(options: &Options) -> Result<(), UpError> {
    if !nix::unistd::geteuid().is_root() {
        return Err(UpError::NotRoot);
    }
    if options.nodes == 0 || options.nodes > MAX_NODES {
        return Err(UpError::Nodes(options.nodes));
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    if !std::env::split_paths(&path).any(|folder| folder.join("ip").is_file()) {
        return Err(UpError::Tool { program: "ip", package: "iproute2" });
    }
    let networking = options.wired_by();
    if networking == Networking::Coil && bird::program().is_none() {
        return Err(UpError::Tool { program: "bird", package: "bird2" });
    }
    if options.conflist.is_none() && networking == Networking::Ptp {
        for program in ["ptp", "host-local"] {
            if cni::find(program).is_err() {
                return Err(UpError::Tool { program, package: "containernetworking-plugins" });
            }
        }
    }
    const ASSETS: &str = ": KUBEBUILDER_ASSETS must name a folder with etcd and kube-apiserver";
    let assets = match &options.api {
        ApiSource::Assets(folder) => [Some(folder.join("etcd")), Some(folder.join("kube-apiserver"))],
        _ => [None, None],
    };
    let files = [
        (assets[0].as_ref(), "program", ASSETS),
        (assets[1].as_ref(), "program", ASSETS),
        (options.programs.as_ref(), "program", ": build it with `cargo xtask build`"),
        (options.conflist.as_ref(), "CNI configuration list", ""),
    ];
    for (path, what, hint) in files {
        if let Some(path) = path.filter(|path| !path.exists()) {
            return Err(UpError::File { what, path: path.clone(), hint });
        }
    }
    Ok(())
}

async fn start(state: &State, progress: &impl Fn(&str)) -> Result<State, UpError> {
    let mut launcher = state.options.launcher.iter();
    let program = launcher.next().cloned().unwrap_or_default();
    let wrap = |source| UpError::Start { program: program.clone(), source };
    std::fs::create_dir_all(paths::logs()).map_err(wrap)?;
    let log = std::fs::File::create(paths::supervisor_log()).map_err(wrap)?;
    let mut command = std::process::Command::new(&program);
    command
        .args(launcher)
        .arg("serve")
        .env(paths::MARKER, &state.id)
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(log);
    // SAFETY: setsid between fork and exec is a plain system call on the child alone.
    unsafe {
        command.pre_exec(|| nix::unistd::setsid().map(|_| ()).map_err(io::Error::from));
    }
    let mut child = tokio::process::Command::from(command).spawn().map_err(wrap)?;
    let stdout = child.stdout.take().ok_or_else(|| wrap(io::ErrorKind::BrokenPipe.into()))?;
    let mut lines = BufReader::new(stdout).lines();
    let limit = Duration::from_secs(state.options.wait_seconds);
    let begun = Instant::now();
    let mut last = String::from("starting");
    loop {
        let left = limit.saturating_sub(begun.elapsed());
        let line = match tokio::time::timeout(left, lines.next_line()).await {
            Ok(line) => line.map_err(wrap)?,
            Err(_) => {
                return Err(UpError::Failed(format!(
                    "the lab was not ready after {} s; it was busy with: {last}",
                    limit.as_secs()
                )));
            }
        };
        match line.as_deref().map(serde_json::from_str) {
            Some(Ok(Message::Progress(text))) => {
                progress(&text);
                last = text;
            }
            Some(Ok(Message::Ready)) => {
                progress(&format!("ready after {:.1} s", begun.elapsed().as_secs_f32()));
                return State::load()?.ok_or_else(|| UpError::Died(log_tail()));
            }
            Some(Ok(Message::Failed(text))) => return Err(UpError::Failed(text)),
            Some(Err(_)) => {}
            None => return Err(UpError::Died(log_tail())),
        }
    }
}

fn log_tail() -> String {
    let text = std::fs::read(paths::supervisor_log()).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(20)..].join("\n")
}

/// Keeps a second `up` or `down` out. A socket in the abstract name space needs no file and goes with its process.
pub(crate) fn lock(progress: &impl Fn(&str)) -> Option<UnixListener> {
    let address = SocketAddr::from_abstract_name(b"coil-lab-lock").ok()?;
    let mut told = false;
    loop {
        match UnixListener::bind_addr(&address) {
            Ok(lock) => return Some(lock),
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
                if !told {
                    progress("waiting for another `lab up` or `lab down`");
                    told = true;
                }
                std::thread::sleep(Duration::from_millis(100));
            }
            // Without the lock two commands may disturb each other, which is no reason to refuse a single one.
            Err(_) => return None,
        }
    }
}
