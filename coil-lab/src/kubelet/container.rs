//! One container: starts its process, if it has one, starts it again as the restart policy says, and ends it.

use super::account;
use super::environment::{self, Facts};
use super::events::News;
use super::probe::{self, Place};
use super::{COIL_IMAGE, Host, POD_MARKER, RUN_ANNOTATION};
use crate::netns::Netns;
use crate::process;
use crate::topology::Node;
use crate::{paths, target};
use k8s_openapi::api::core::v1::{Container as Spec, Pod};
use k8s_openapi::jiff::Timestamp;
use std::net::IpAddr;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::process::Child;
use tokio::sync::{Notify, mpsc, watch};
use tokio::task::{JoinHandle, JoinSet};
use tracing::{info, warn};

/// First pause before a container is started again; a kubelet waits 10 s, which no lab has.
const FIRST_BACKOFF: Duration = Duration::from_millis(200);
/// Longest pause.
const LONGEST_BACKOFF: Duration = Duration::from_secs(5);
/// A container that ran for so long starts over with the first pause.
const STEADY: Duration = Duration::from_secs(10);

/// When a container that has ended is started again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Restart {
    Always,
    OnFailure,
    Never,
}

/// What a container does now.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Phase {
    Waiting { reason: &'static str, message: String },
    Running { since: Timestamp },
    Ended(Ended),
}

/// How a container ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Ended {
    pub(super) code: i32,
    pub(super) signal: Option<i32>,
    pub(super) since: Timestamp,
    pub(super) until: Timestamp,
    pub(super) message: String,
}

/// What is to be seen of a container.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct View {
    pub(super) phase: Phase,
    pub(super) pid: Option<u32>,
    pub(super) started: bool,
    pub(super) ready: bool,
    pub(super) restarts: i32,
    pub(super) last: Option<Ended>,
    /// It will not be started again.
    pub(super) final_: bool,
}

/// What a container needs to know of its pod.
#[derive(Clone)]
pub(super) struct Setting {
    pub(super) host: Arc<Host>,
    pub(super) node: Node,
    pub(super) pod: Arc<Pod>,
    pub(super) netns: Netns,
    pub(super) addresses: Vec<IpAddr>,
    pub(super) changed: Arc<Notify>,
    pub(super) news: mpsc::UnboundedSender<News>,
}

/// A container that has been started.
pub(super) struct Container {
    pub(super) name: String,
    pub(super) image: String,
    pub(super) log: PathBuf,
    view: Arc<Mutex<View>>,
    stop: watch::Sender<Option<Duration>>,
    task: JoinHandle<()>,
}

impl Container {
    /// `restarts` counts those of before, on a node that has come back.
    pub(super) fn start(setting: Setting, spec: Spec, restart: Restart, restarts: i32) -> Self {
        let metadata = &setting.pod.metadata;
        let log = paths::container_log(
            metadata.namespace.as_deref().unwrap_or_default(),
            metadata.name.as_deref().unwrap_or_default(),
            &spec.name,
        );
        let view = Arc::new(Mutex::new(View {
            phase: Phase::Waiting { reason: "ContainerCreating", message: String::new() },
            pid: None,
            started: false,
            ready: false,
            restarts,
            last: None,
            final_: false,
        }));
        let (stop, stopped) = watch::channel(None);
        let run =
            Run { setting, spec: spec.clone(), restart, log: log.clone(), view: view.clone(), stop: stopped };
        Self {
            name: spec.name,
            image: spec.image.unwrap_or_default(),
            log,
            view,
            stop,
            task: tokio::spawn(run.run()),
        }
    }

    pub(super) fn view(&self) -> View {
        self.view.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Asks it to end; SIGKILL follows after `grace`, and comes alone where that is zero.
    pub(super) fn stop(&self, grace: Duration) {
        self.stop.send_replace(Some(grace));
    }

    pub(super) fn stopped(&self) -> bool {
        self.task.is_finished()
    }

    /// Waits until it has ended.
    pub(super) async fn ended(self) {
        if let Err(error) = self.task.await {
            warn!(container = self.name, %error, "its task failed");
        }
    }
}

struct Run {
    setting: Setting,
    spec: Spec,
    restart: Restart,
    log: PathBuf,
    view: Arc<Mutex<View>>,
    stop: watch::Receiver<Option<Duration>>,
}

impl Run {
    async fn run(mut self) {
        let mut backoff = FIRST_BACKOFF;
        loop {
            let begun = Instant::now();
            let ended = match self.once().await {
                Ok(ended) => Some(ended),
                Err(error) => {
                    let message = format!("{error:#}");
                    warn!(container = self.spec.name, message, "cannot start");
                    self.tell(News::warning("Failed", format!("Error: {message}")));
                    self.set(|view| view.phase = Phase::Waiting { reason: "CreateContainerError", message });
                    None
                }
            };
            let again = match (&ended, self.restart) {
                _ if self.stop.borrow().is_some() => false,
                (None, _) | (_, Restart::Always) => true,
                (Some(ended), Restart::OnFailure) => ended.code != 0,
                (_, Restart::Never) => false,
            };
            if let Some(ended) = ended {
                info!(container = self.spec.name, code = ended.code, signal = ended.signal, again, "ended");
                self.set(|view| {
                    view.phase = Phase::Ended(ended.clone());
                    (view.pid, view.ready, view.started) = (None, false, false);
                });
                if again {
                    self.set(|view| {
                        view.last = Some(ended);
                        view.restarts += 1;
                        view.phase = Phase::Waiting {
                            reason: "CrashLoopBackOff",
                            message: format!("back-off {} ms", backoff.as_millis()),
                        };
                    });
                    self.tell(News::warning(
                        "BackOff",
                        format!("Back-off restarting failed container {}", self.spec.name),
                    ));
                }
            }
            if !again {
                break;
            }
            if begun.elapsed() > STEADY {
                backoff = FIRST_BACKOFF;
            }
            tokio::select! {
                () = tokio::time::sleep(backoff) => {}
                _ = self.stop.wait_for(Option::is_some) => break,
            }
            backoff = (backoff * 2).min(LONGEST_BACKOFF);
        }
        self.set(|view| view.final_ = true);
    }

    /// From start to end of one run.
    async fn once(&mut self) -> anyhow::Result<Ended> {
        let environment = self.environment().await?;
        let since = Timestamp::now();
        let Some(argv) = self.argv(&environment) else {
            // Nothing to run: it is there until it is told to go.
            let (started, ready) = (true, true);
            self.set(|view| {
                (view.phase, view.started, view.ready) = (Phase::Running { since }, started, ready)
            });
            if self.stop.wait_for(Option::is_some).await.is_err() {
                warn!(container = self.spec.name, "its pod is gone");
            }
            return Ok(Ended {
                code: 0,
                signal: None,
                since,
                until: Timestamp::now(),
                message: String::new(),
            });
        };
        let kubeconfig = account::kubeconfig(&self.setting.host, &self.setting.pod).await?;
        let mut child = self.spawn(&argv, &environment, kubeconfig.as_deref())?;
        let pid = child.id();
        info!(container = self.spec.name, pid, program = argv[0], "started");
        self.tell(News::normal("Started", format!("Started container {}", self.spec.name)));
        let has = |probe: &Option<_>| Option::<&k8s_openapi::api::core::v1::Probe>::is_some(&probe.as_ref());
        let started = !has(&self.spec.startup_probe);
        let ready = started && !has(&self.spec.readiness_probe);
        self.set(|view| {
            (view.phase, view.pid, view.started, view.ready) =
                (Phase::Running { since }, pid, started, ready);
        });
        let (failed, mut failures) = mpsc::unbounded_channel();
        let probes = self.probes(&environment, failed);
        let (status, message) = tokio::select! {
            status = child.wait() => (status?, String::new()),
            Some(message) = failures.recv() => {
                self.tell(News::warning("Unhealthy", message.clone()));
                let grace = self.grace();
                (self.end(&mut child, &environment, grace).await?, message)
            }
            grace = stop_of(&mut self.stop) => (self.end(&mut child, &environment, grace).await?, String::new()),
        };
        drop(probes);
        self.clear_up();
        Ok(Ended { code: code(status), signal: status.signal(), since, until: Timestamp::now(), message })
    }

    async fn environment(&self) -> anyhow::Result<Vec<(String, String)>> {
        let Setting { host, node, pod, addresses, .. } = &self.setting;
        let host_addresses: Vec<IpAddr> = node.addresses.iter().map(ipnet::IpNet::addr).collect();
        let facts = Facts { pod, pod_addresses: addresses, host_addresses: &host_addresses };
        Ok(environment::resolve(&host.client, &facts, &self.spec).await?)
    }

    fn argv(&self, environment: &[(String, String)]) -> Option<Vec<String>> {
        let marked = self
            .setting
            .pod
            .metadata
            .annotations
            .as_ref()
            .and_then(|annotations| annotations.get(RUN_ANNOTATION))
            .is_some_and(|value| value == "true");
        if !marked && self.spec.image.as_deref() != Some(COIL_IMAGE) {
            return None;
        }
        let words = self.spec.command.iter().flatten().chain(self.spec.args.iter().flatten());
        let argv: Vec<String> = words.map(|word| environment::expand(word, environment)).collect();
        // Without images there is no default command, so a container that names none is a pause container.
        (!argv.is_empty() && self.spec.command.is_some()).then_some(argv)
    }

    fn spawn(
        &self,
        argv: &[String],
        environment: &[(String, String)],
        kubeconfig: Option<&Path>,
    ) -> anyhow::Result<Child> {
        use anyhow::Context;
        let Setting { host, node, pod, netns, .. } = &self.setting;
        let metadata = &pod.metadata;
        let log = std::fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(&self.log)
            .with_context(|| format!("cannot open {}", self.log.display()))?;
        let mut command = Command::new(&argv[0]);
        command.args(&argv[1..]).env_clear();
        for name in ["RUST_LOG", "RUST_BACKTRACE"] {
            if let Some(value) = std::env::var_os(name) {
                command.env(name, value);
            }
        }
        target::environment(&mut command, &host.state, Some(&node.name));
        if let Some(kubeconfig) = kubeconfig {
            command.env("KUBECONFIG", kubeconfig);
        }
        let api = host.state.topology.api_addresses.first().map(ToString::to_string).unwrap_or_default();
        let host_network = pod.spec.as_ref().and_then(|spec| spec.host_network).unwrap_or(false);
        let hostname = if host_network { Some(&node.name) } else { metadata.name.as_ref() };
        command
            .env("HOME", "/root")
            .env("HOSTNAME", hostname.map_or("", String::as_str))
            .env("KUBERNETES_SERVICE_HOST", api)
            .env("KUBERNETES_SERVICE_PORT", crate::topology::API_PORT.to_string())
            .envs(environment.iter().map(|(name, value)| (name, value)))
            .env(POD_MARKER, metadata.uid.as_deref().unwrap_or_default())
            .env(paths::MARKER, &host.state.id)
            .current_dir(self.spec.working_dir.as_deref().unwrap_or("/"))
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .process_group(0);
        netns.enter(&mut command)?;
        tokio::process::Command::from(command).spawn().with_context(|| format!("cannot run {}", argv[0]))
    }

    /// Where probes and hooks reach the container.
    fn place(&self, environment: &[(String, String)]) -> Place {
        Place {
            node: self.setting.node.netns.clone(),
            pod: self.setting.netns.clone(),
            address: self.setting.addresses.first().copied(),
            ports: self.spec.ports.clone().unwrap_or_default(),
            environment: environment.to_vec(),
        }
    }

    fn probes(&self, environment: &[(String, String)], failed: mpsc::UnboundedSender<String>) -> JoinSet<()> {
        let place = self.place(environment);
        let mut tasks = JoinSet::new();
        let spec = self.spec.clone();
        let view = self.view.clone();
        let setting = self.setting.clone();
        tasks.spawn(async move {
            let update = |change: &dyn Fn(&mut View)| {
                change(&mut view.lock().unwrap_or_else(PoisonError::into_inner));
                setting.changed.notify_one();
            };
            let dead = |kind: &'static str| {
                let failed = failed.clone();
                move |ok: bool, message: &str| {
                    // The receiver goes with the container, which is then ended already.
                    if !ok && failed.send(format!("{kind} probe failed: {message}")).is_err() {
                        info!(kind, "probe of a container that has ended");
                    }
                }
            };
            if let Some(probe) = spec.startup_probe {
                let up = Arc::new(Notify::new());
                let (tell, fail) = (up.clone(), dead("Startup"));
                tokio::select! {
                    () = probe::watch(probe, place.clone(), move |ok, message| {
                        if ok { tell.notify_one() } else { fail(ok, message) }
                    }) => {}
                    () = up.notified() => {}
                }
                let ready = spec.readiness_probe.is_none();
                update(&|view| (view.started, view.ready) = (true, ready));
            }
            let readiness = async {
                if let Some(probe) = spec.readiness_probe {
                    probe::watch(probe, place.clone(), |ok, message| {
                        update(&|view| view.ready = ok);
                        if !ok {
                            let text = format!("Readiness probe failed: {message}");
                            if setting.news.send(News::warning("Unhealthy", text)).is_err() {
                                info!("readiness of a pod that has ended");
                            }
                        }
                    })
                    .await;
                }
            };
            let liveness = async {
                if let Some(probe) = spec.liveness_probe {
                    probe::watch(probe, place.clone(), dead("Liveness")).await;
                }
            };
            tokio::join!(readiness, liveness);
        });
        tasks
    }

    fn grace(&self) -> Duration {
        let seconds = self.setting.pod.spec.as_ref().and_then(|spec| spec.termination_grace_period_seconds);
        Duration::from_secs(seconds.and_then(|seconds| seconds.try_into().ok()).unwrap_or(30))
    }

    /// The hook, SIGTERM, then SIGKILL, all within `grace`. A later, shorter grace cuts an earlier one.
    async fn end(
        &mut self,
        child: &mut Child,
        environment: &[(String, String)],
        mut grace: Duration,
    ) -> std::io::Result<ExitStatus> {
        let begun = Instant::now();
        if grace.is_zero() {
            child.start_kill()?;
            return child.wait().await;
        }
        if let Some(hook) = self.spec.lifecycle.as_ref().and_then(|lifecycle| lifecycle.pre_stop.clone()) {
            let place = self.place(environment);
            tokio::select! {
                status = child.wait() => return status,
                outcome = tokio::time::timeout(grace, probe::hook(&hook, &place)) => {
                    let failed = match outcome {
                        Ok(outcome) => outcome.err().map(|error| error.to_string()),
                        Err(_) => Some("it takes longer than the grace".to_owned()),
                    };
                    if let Some(error) = failed {
                        self.tell(News::warning("FailedPreStopHook", error));
                    }
                }
            }
        }
        let Some(identity) = child.id().and_then(|pid| process::ProcessId::of(i32::try_from(pid).ok()?))
        else {
            return child.wait().await;
        };
        identity.signal(nix::sys::signal::Signal::SIGTERM);
        loop {
            tokio::select! {
                status = child.wait() => return status,
                () = tokio::time::sleep(grace.saturating_sub(begun.elapsed())) => {
                    child.start_kill()?;
                    return child.wait().await;
                }
                changed = self.stop.changed() => {
                    let asked = *self.stop.borrow();
                    match (changed, asked) {
                        (Ok(()), Some(shorter)) => grace = grace.min(begun.elapsed() + shorter),
                        (Ok(()), None) => {}
                        (Err(_), _) => grace = Duration::ZERO,
                    }
                }
            }
        }
    }

    /// Ends what the container's process has left behind in its group, as the end of a PID namespace would.
    fn clear_up(&self) {
        let several = self.setting.pod.spec.as_ref().is_some_and(|spec| spec.containers.len() > 1);
        if !several {
            kill_pod(self.setting.pod.metadata.uid.as_deref().unwrap_or_default());
        }
    }

    fn set(&self, change: impl FnOnce(&mut View)) {
        change(&mut self.view.lock().unwrap_or_else(PoisonError::into_inner));
        self.setting.changed.notify_one();
    }

    fn tell(&self, news: News) {
        if let Err(unheard) = self.setting.news.send(news) {
            info!(news = ?unheard.0, "about a pod that has ended");
        }
    }
}

/// Kills whatever still runs of a pod.
pub(super) fn kill_pod(uid: &str) {
    for process in process::with_variable(POD_MARKER, Some(uid)) {
        process.signal(nix::sys::signal::Signal::SIGKILL);
    }
}

async fn stop_of(stop: &mut watch::Receiver<Option<Duration>>) -> Duration {
    match stop.wait_for(Option::is_some).await {
        Ok(grace) => grace.unwrap_or_default(),
        Err(_) => Duration::ZERO,
    }
}

fn code(status: ExitStatus) -> i32 {
    status.code().or_else(|| status.signal().map(|signal| 128 + signal)).unwrap_or(255)
}
