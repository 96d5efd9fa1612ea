//! What is sent, and how fast it goes.

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::support::topology::Topology;
use crate::support::{DEADLINE, wait_for};
use crate::ways::Way;

/// A kind of traffic.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Load {
    /// One stream as fast as it goes.
    Tcp,
    /// Datagrams of 64 bytes as fast as one sender can; those that arrive count.
    Udp,
    /// Connect, one request, its answer, close; one after the other.
    Connections,
}

impl Load {
    pub(crate) const ALL: [Self; 3] = [Self::Tcp, Self::Udp, Self::Connections];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Tcp => "TCP, one stream",
            Self::Udp => "UDP, 64 bytes",
            Self::Connections => "new connections",
        }
    }

    pub(crate) fn unit(self) -> &'static str {
        match self {
            Self::Tcp => "Gbit/s",
            Self::Udp => "packets/s",
            Self::Connections => "connections/s",
        }
    }

    pub(crate) fn measure(self, way: &Way, v6: bool, seconds: u32) -> Result<f64> {
        match self {
            Self::Tcp => {
                let report = iperf(&way.topology, v6, seconds, &[])?;
                let rate = report["end"]["sum_received"]["bits_per_second"].as_f64();
                Ok(rate.context("no rate in iperf3's report")? / 1e9)
            }
            Self::Udp => {
                let report =
                    iperf(&way.topology, v6, seconds, &["--udp", "--length", "64", "--bitrate", "0"])?;
                let sum = &report["end"]["sum"];
                let number = |name: &str| sum[name].as_f64().with_context(|| format!("no {name} in {sum}"));
                Ok((number("packets")? - number("lost_packets")?) / number("seconds")?)
            }
            Self::Connections => connections(&way.topology, v6, seconds),
        }
    }
}

/// A run of `iperf3` from the client pod to the world; the client's report.
fn iperf(topology: &Topology, v6: bool, seconds: u32, arguments: &[&str]) -> Result<Value> {
    let address = topology.external.address(v6).to_string();
    let (space, bind) = (topology.external.net.name().to_owned(), address.clone());
    let mut server = Command::new("ip")
        .args(["netns", "exec", &space, "iperf3", "--server", "--one-off", "--bind", &bind])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .spawn()
        .context("starting iperf3")?;
    let listening = || {
        let found = Command::new("ip")
            .args(["netns", "exec", &space, "ss", "-Hltn", "sport = :5201"])
            .output()
            .ok()?;
        (!found.stdout.is_empty()).then_some(())
    };
    wait_for("iperf3 to listen", listening);
    let report = Command::new("ip")
        .args(["netns", "exec", topology.client.net.name(), "iperf3", "--json", "--client", &address])
        .args(["--time", &seconds.to_string()])
        .args(arguments)
        .output();
    // It ends by itself after one run, unless there was none.
    let report = match report {
        Ok(report) if report.status.success() => report,
        other => {
            server.kill()?;
            server.wait()?;
            bail!("iperf3 failed: {other:?}");
        }
    };
    server.wait()?;
    serde_json::from_slice(&report.stdout).context("reading iperf3's report")
}

/// Ports of the server: so many that neither client nor gateway run out of their own.
const PORTS: u16 = 32;

fn connections(topology: &Topology, v6: bool, seconds: u32) -> Result<f64> {
    let address = topology.external.address(v6);
    let stop = Arc::new(AtomicBool::new(false));
    let (sender, receiver) = channel();
    let stopped = Arc::clone(&stop);
    let server = topology.external.net.spawn(move || serve(address, &sender, &stopped));
    let targets: Vec<SocketAddr> = receiver.iter().take(usize::from(PORTS)).collect();
    ensure!(targets.len() == usize::from(PORTS), "the server does not listen");
    let length = Duration::from_secs(seconds.into());
    let rate = topology.client.net.run(move || {
        let start = Instant::now();
        let mut count = 0u32;
        for target in targets.iter().cycle() {
            if start.elapsed() >= length {
                break;
            }
            let mut stream = TcpStream::connect_timeout(target, DEADLINE)?;
            stream.write_all(b"request")?;
            let mut answer = Vec::new();
            stream.read_to_end(&mut answer)?;
            ensure!(answer == b"answer", "a wrong answer");
            count += 1;
        }
        Ok(f64::from(count) / start.elapsed().as_secs_f64())
    });
    stop.store(true, Ordering::Relaxed);
    server.join().map_err(|_| anyhow::anyhow!("the server failed"))??;
    rate
}

/// Answers requests, and closes first, so that the time of waiting is the server's.
fn serve(address: IpAddr, ready: &std::sync::mpsc::Sender<SocketAddr>, stop: &AtomicBool) -> Result<()> {
    let mut listeners = Vec::new();
    for _ in 0..PORTS {
        let listener = TcpListener::bind((address, 0))?;
        listener.set_nonblocking(true)?;
        ready.send(listener.local_addr()?)?;
        listeners.push(listener);
    }
    let mut polled: Vec<libc::pollfd> = listeners
        .iter()
        .map(|listener| libc::pollfd {
            fd: std::os::fd::AsRawFd::as_raw_fd(listener),
            events: libc::POLLIN,
            revents: 0,
        })
        .collect();
    while !stop.load(Ordering::Relaxed) {
        // SAFETY: the descriptors are those of listeners that live until the end, and so does the list.
        let ready = unsafe { libc::poll(polled.as_mut_ptr(), libc::nfds_t::from(PORTS), 50) };
        if ready < 0 {
            return Err(std::io::Error::last_os_error().into());
        }
        for (listener, _) in listeners.iter().zip(&polled).filter(|(_, poll)| poll.revents != 0) {
            while let Ok((mut stream, _)) = listener.accept() {
                stream.set_nonblocking(false)?;
                let mut request = [0; 7];
                stream.read_exact(&mut request)?;
                stream.write_all(b"answer")?;
            }
        }
    }
    Ok(())
}

/// The address that the world sees.
pub(crate) fn peer(topology: &Topology, v6: bool) -> Result<IpAddr> {
    let address = topology.external.address(v6);
    let (sender, receiver) = channel();
    let server = topology.external.net.spawn(move || {
        let listener = TcpListener::bind((address, 0))?;
        sender.send(listener.local_addr()?)?;
        Ok::<_, anyhow::Error>(listener.accept()?.1.ip())
    });
    let target = receiver.recv().context("the server does not listen")?;
    topology.client.net.run(move || TcpStream::connect_timeout(&target, DEADLINE).map(drop))?;
    server.join().map_err(|_| anyhow::anyhow!("the server failed"))?
}
