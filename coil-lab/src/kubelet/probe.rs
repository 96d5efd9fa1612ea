//! Liveness, readiness and startup probes, made from the node's network namespace as a kubelet does.

use crate::netns::Netns;
use k8s_openapi::api::core::v1::{ContainerPort, LifecycleHandler, Probe};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::process::{Command, Stdio};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};

/// Before its first success a probe is repeated at this pace instead of its own, so that a lab is up quickly.
const EAGER: Duration = Duration::from_millis(150);

/// Where a container is.
#[derive(Clone)]
pub(super) struct Place {
    pub(super) node: Netns,
    pub(super) pod: Netns,
    pub(super) address: Option<IpAddr>,
    pub(super) ports: Vec<ContainerPort>,
    pub(super) environment: Vec<(String, String)>,
}

/// Counts results the way the thresholds of a probe say.
#[derive(Debug)]
pub(super) struct Judge {
    success_threshold: u32,
    failure_threshold: u32,
    successes: u32,
    failures: u32,
    verdict: Option<bool>,
}

impl Judge {
    pub(super) fn new(probe: &Probe) -> Self {
        let at_least_one = |value: Option<i32>, default| {
            value.and_then(|value| u32::try_from(value).ok()).filter(|value| *value > 0).unwrap_or(default)
        };
        Self {
            success_threshold: at_least_one(probe.success_threshold, 1),
            failure_threshold: at_least_one(probe.failure_threshold, 3),
            successes: 0,
            failures: 0,
            verdict: None,
        }
    }

    /// Takes one result in. Returns the verdict if it is a new one.
    pub(super) fn take(&mut self, ok: bool) -> Option<bool> {
        if ok {
            self.successes += 1;
            self.failures = 0;
        } else {
            self.failures += 1;
            self.successes = 0;
        }
        let verdict = if self.successes >= self.success_threshold {
            Some(true)
        } else if self.failures >= self.failure_threshold {
            Some(false)
        } else {
            self.verdict
        };
        if verdict == self.verdict {
            return None;
        }
        self.verdict = verdict;
        verdict
    }
}

/// Probes for ever; calls `tell` with each change of verdict and the last message.
pub(super) async fn watch(probe: Probe, place: Place, mut tell: impl FnMut(bool, &str)) {
    let seconds = |value: Option<i32>, default: u64| {
        Duration::from_secs(value.and_then(|value| u64::try_from(value).ok()).unwrap_or(default))
    };
    let period = seconds(probe.period_seconds.filter(|value| *value > 0), 10);
    let limit = seconds(probe.timeout_seconds.filter(|value| *value > 0), 1);
    tokio::time::sleep(seconds(probe.initial_delay_seconds, 0)).await;
    let mut judge = Judge::new(&probe);
    let mut eager = true;
    // While eager, failures do not count: they come faster than the probe's author has reckoned with.
    let eager_end =
        tokio::time::Instant::now() + period * probe.failure_threshold.unwrap_or(3).max(1).unsigned_abs();
    loop {
        let (ok, message) = match tokio::time::timeout(limit, once(&probe, &place)).await {
            Ok(Ok(())) => (true, String::new()),
            Ok(Err(error)) => (false, error.to_string()),
            Err(_) => (false, format!("no answer within {} s", limit.as_secs())),
        };
        eager = eager && !ok && tokio::time::Instant::now() < eager_end;
        if !eager && let Some(verdict) = judge.take(ok) {
            tell(verdict, &message);
        }
        tokio::time::sleep(if eager { EAGER.min(period) } else { period }).await;
    }
}

/// Carries out a lifecycle hook.
pub(super) async fn hook(handler: &LifecycleHandler, place: &Place) -> io::Result<()> {
    if let Some(action) = &handler.sleep {
        tokio::time::sleep(Duration::from_secs(u64::try_from(action.seconds).unwrap_or(0))).await;
        return Ok(());
    }
    let action = Probe { exec: handler.exec.clone(), http_get: handler.http_get.clone(), ..Probe::default() };
    once(&action, place).await
}

async fn once(probe: &Probe, place: &Place) -> io::Result<()> {
    if let Some(action) = &probe.http_get {
        let address = target(action.host.as_deref(), &action.port, place)?;
        let path = action.path.as_deref().unwrap_or("/");
        let mut request =
            format!("GET {path} HTTP/1.1\r\nConnection: close\r\nUser-Agent: kube-probe/lab\r\n");
        if !action.http_headers.iter().flatten().any(|header| header.name.eq_ignore_ascii_case("host")) {
            request += &format!("Host: {address}\r\n");
        }
        for header in action.http_headers.iter().flatten() {
            request += &format!("{}: {}\r\n", header.name, header.value);
        }
        request += "\r\n";
        return http(connect(&place.node, address).await?, &request).await;
    }
    if let Some(action) = &probe.tcp_socket {
        let address = target(action.host.as_deref(), &action.port, place)?;
        return connect(&place.node, address).await.map(|_| ());
    }
    if let Some(action) = &probe.exec {
        return exec(action.command.as_deref().unwrap_or_default(), place).await;
    }
    // gRPC probes need the health protocol's messages, which nothing here serves.
    Err(io::Error::other("the lab knows no such probe"))
}

fn target(host: Option<&str>, port: &IntOrString, place: &Place) -> io::Result<SocketAddr> {
    let number = match port {
        IntOrString::Int(number) => *number,
        IntOrString::String(name) => place
            .ports
            .iter()
            .find(|port| port.name.as_deref() == Some(name))
            .map(|port| port.container_port)
            .ok_or_else(|| io::Error::other(format!("the container has no port {name}")))?,
    };
    let number = u16::try_from(number).map_err(io::Error::other)?;
    let address = match host {
        Some("localhost") => IpAddr::from([127, 0, 0, 1]),
        Some(host) => host.parse().map_err(io::Error::other)?,
        None => place.address.ok_or_else(|| io::Error::other("the pod has no address"))?,
    };
    Ok((address, number).into())
}

/// Connects from inside a namespace: a socket stays where it was made.
async fn connect(namespace: &Netns, address: SocketAddr) -> io::Result<TcpStream> {
    let socket = namespace
        .run(|| if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() })
        .map_err(io::Error::other)??;
    socket.connect(address).await
}

async fn http(mut stream: TcpStream, request: &str) -> io::Result<()> {
    stream.write_all(request.as_bytes()).await?;
    let mut answer = Vec::new();
    // A few kilobytes hold the status line; the rest of the answer is of no interest.
    (&mut stream).take(4096).read_to_end(&mut answer).await?;
    let answer = String::from_utf8_lossy(&answer);
    let status = answer.split_ascii_whitespace().nth(1).and_then(|code| code.parse::<u16>().ok());
    match status {
        Some(200..400) => Ok(()),
        Some(code) => Err(io::Error::other(format!("HTTP status {code}"))),
        None => Err(io::Error::other("no HTTP answer")),
    }
}

async fn exec(command: &[String], place: &Place) -> io::Result<()> {
    let (program, arguments) = command.split_first().ok_or_else(|| io::Error::other("no command"))?;
    let mut process = Command::new(program);
    process.args(arguments).env_clear().envs(place.environment.iter().cloned());
    process.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    place.pod.enter(&mut process).map_err(io::Error::other)?;
    let status = tokio::process::Command::from(process).kill_on_drop(true).status().await?;
    if status.success() { Ok(()) } else { Err(io::Error::other(format!("{program}: {status}"))) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thresholds() {
        let probe = Probe { failure_threshold: Some(2), success_threshold: Some(1), ..Probe::default() };
        let mut judge = Judge::new(&probe);
        assert_eq!(judge.take(false), None);
        assert_eq!(judge.take(true), Some(true));
        assert_eq!(judge.take(true), None);
        assert_eq!(judge.take(false), None);
        assert_eq!(judge.take(false), Some(false));
        assert_eq!(judge.take(true), Some(true));
    }
}
