//! Many connections at once: some that last, and a steady stream of new short ones. Both talk to the TCP echo server
//! and check each answer.

use super::report::{Connections, Load, Peer};
use anyhow::{Context, ensure};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::task::JoinSet;

/// How long one step of a connection may take: longer than a machine is ever busy, shorter than anybody waits.
const PATIENCE: Duration = Duration::from_secs(20);
/// Errors that are reported in words.
const TOLD: usize = 8;
/// How often the stop file is looked for.
const LOOK: Duration = Duration::from_millis(100);

/// Arguments of the load.
#[derive(Clone, Debug, clap::Args)]
pub struct LoadArgs {
    /// HOST:PORT of the echo server
    server: SocketAddr,
    /// Connections that last to the end
    #[arg(long, default_value_t = 200)]
    long: usize,
    /// Milliseconds between two exchanges on each of them
    #[arg(long, default_value_t = 500)]
    gap_ms: u64,
    /// Short connections per second
    #[arg(long, default_value_t = 200)]
    rate: u64,
    /// File to make once all lasting connections are up
    #[arg(long)]
    ready: Option<PathBuf>,
    /// End when this file exists; without one, when the time is over
    #[arg(long)]
    until: Option<PathBuf>,
    /// End after so many seconds in any case
    #[arg(long, default_value_t = 600)]
    seconds: u64,
}

impl LoadArgs {
    /// Longest time that it may take.
    pub(super) fn limit(&self) -> Duration {
        Duration::from_secs(self.seconds) + 3 * PATIENCE
    }
}

/// What connections of one kind have done.
#[derive(Clone, Default)]
struct Tally(Arc<Mutex<Connections>>);

impl Tally {
    fn add(&self, change: impl FnOnce(&mut Connections)) {
        change(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner));
    }

    fn failed(&self, error: &anyhow::Error) {
        self.add(|all| {
            all.failed += 1;
            if all.errors.len() < TOLD {
                all.errors.push(format!("{error:#}"));
            }
        });
    }

    fn take(&self) -> Connections {
        std::mem::take(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// A connection to the echo server.
struct Echo {
    stream: BufReader<TcpStream>,
    tally: Tally,
}

impl Echo {
    async fn open(server: SocketAddr, tally: Tally) -> anyhow::Result<Self> {
        let open = async {
            let stream = TcpStream::connect(server).await.context("connecting")?;
            stream.set_nodelay(true)?;
            let mut stream = BufReader::new(stream);
            let mut line = String::new();
            stream.read_line(&mut line).await.context("greeting")?;
            let peer: Peer = serde_json::from_str(&line).context("greeting")?;
            anyhow::Ok((stream, peer))
        };
        let (stream, peer) = tokio::time::timeout(PATIENCE, open).await.context("opening")??;
        tally.add(|all| {
            all.opened += 1;
            *all.peers.entry(peer.peer).or_default() += 1;
        });
        Ok(Self { stream, tally })
    }

    /// Sends a piece and waits for it to come back.
    async fn exchange(&mut self, number: u64) -> anyhow::Result<()> {
        let begun = Instant::now();
        let piece: Vec<u8> =
            number.to_be_bytes().iter().cycle().take(96).zip(0_u8..).map(|(a, b)| a ^ b).collect();
        let mut answer = vec![0; piece.len()];
        let exchange = async {
            self.stream.get_mut().write_all(&piece).await.context("sending")?;
            self.stream.read_exact(&mut answer).await.context("receiving")
        };
        tokio::time::timeout(PATIENCE, exchange).await.context("an exchange")??;
        ensure!(piece == answer, "exchange {number}: another answer than what was sent");
        let took = u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.tally.add(|all| {
            all.exchanges += 1;
            all.longest_ms = all.longest_ms.max(took);
        });
        Ok(())
    }

    /// Ends it in good order.
    async fn close(mut self) -> anyhow::Result<()> {
        let close = async {
            self.stream.get_mut().shutdown().await.context("closing")?;
            let mut rest = Vec::new();
            self.stream.read_to_end(&mut rest).await.context("the server's end")?;
            ensure!(rest.is_empty(), "{} bytes more than were sent", rest.len());
            Ok(())
        };
        tokio::time::timeout(PATIENCE, close).await.context("the end")?
    }
}

async fn long(
    server: SocketAddr,
    gap: Duration,
    tally: Tally,
    mut stop: watch::Receiver<bool>,
    up: watch::Sender<usize>,
) -> anyhow::Result<()> {
    let mut echo = Echo::open(server, tally).await?;
    echo.exchange(0).await?;
    up.send_modify(|up| *up += 1);
    for number in 1.. {
        tokio::select! {
            () = tokio::time::sleep(gap) => {}
            _ = stop.wait_for(|stop| *stop) => break,
        }
        echo.exchange(number).await?;
    }
    echo.close().await
}

async fn short(server: SocketAddr, number: u64, tally: Tally) -> anyhow::Result<()> {
    let mut echo = Echo::open(server, tally).await?;
    echo.exchange(number).await?;
    echo.close().await
}

/// Runs until it is told to end.
pub(super) async fn run(args: LoadArgs) -> anyhow::Result<Load> {
    let LoadArgs { server, long: lasting, gap_ms, rate, ready, until, seconds } = args;
    let begun = Instant::now();
    let (long_tally, short_tally) = (Tally::default(), Tally::default());
    let (stop, stopped) = watch::channel(false);
    let (up, mut all_up) = watch::channel(0);
    let mut tasks = JoinSet::new();
    for _ in 0..lasting {
        let (tally, stopped, up) = (long_tally.clone(), stopped.clone(), up.clone());
        tasks.spawn(async move {
            let gap = Duration::from_millis(gap_ms);
            if let Err(error) = long(server, gap, tally.clone(), stopped, up).await {
                tally.failed(&error);
            }
        });
    }
    let everyone = all_up.wait_for(|up| *up == lasting);
    tokio::time::timeout(PATIENCE * 2, everyone).await.context("the lasting connections are not up")??;
    if let Some(ready) = ready {
        std::fs::write(&ready, "").with_context(|| format!("making {}", ready.display()))?;
    }
    let mut starts = (rate > 0)
        .then(|| tokio::time::interval(Duration::from_secs(1) / u32::try_from(rate).unwrap_or(u32::MAX)));
    let mut looks = tokio::time::interval(LOOK);
    let mut number = 0;
    while begun.elapsed() < Duration::from_secs(seconds)
        && !until.as_ref().is_some_and(|until| until.exists())
    {
        let start = async {
            match &mut starts {
                Some(starts) => drop(starts.tick().await),
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = start => {
                number += 1;
                let tally = short_tally.clone();
                tasks.spawn(async move {
                    if let Err(error) = short(server, number, tally.clone()).await {
                        tally.failed(&error);
                    }
                });
            }
            _ = looks.tick() => {}
            Some(ended) = tasks.join_next() => ended.context("a connection's task")?,
        }
    }
    stop.send_replace(true);
    while let Some(ended) = tasks.join_next().await {
        ended.context("a connection's task")?;
    }
    let (long, short) = (long_tally.take(), short_tally.take());
    Ok(Load {
        ok: long.failed == 0 && short.failed == 0,
        started: number,
        seconds: begun.elapsed().as_secs_f64(),
        long,
        short,
    })
}
