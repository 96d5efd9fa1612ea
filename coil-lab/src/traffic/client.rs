//! The client of the external host's servers. Each verb prints one JSON object and fails if anything was not as it
//! should be.

use super::flood::{self, FloodArgs};
use super::gso::{self, GsoArgs};
use super::load::{self, LoadArgs};
use super::pattern::{CHUNK, Digest, Pattern};
use super::report::{Peer, Received, Stream, Transfer, Udp};
use super::server::{UDP_QUESTION, pause, spacious};
use anyhow::{Context, bail, ensure};
use axum::body::{Body, Bytes};
use axum::http::{Method, Request, Response, Uri};
use futures::StreamExt;
use hyper_util::client::legacy::Client;
use hyper_util::rt::TokioExecutor;
use serde::Serialize;
use std::net::SocketAddr;
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::time::{Duration, Instant};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpStream, UdpSocket};

/// Arguments of the client.
#[derive(Clone, Debug, clap::Args)]
pub struct ClientArgs {
    #[command(subcommand)]
    verb: Verb,
    /// Give up after this many seconds
    #[arg(long, global = true, default_value_t = 30)]
    timeout: u64,
}

#[derive(Clone, Debug, clap::Subcommand)]
enum Verb {
    /// Ask an HTTP server whom it sees
    Peer {
        /// HOST:PORT of the server
        server: SocketAddr,
    },
    /// GET a path and print the body as it is
    Get {
        /// The URL
        url: Uri,
    },
    /// Send bytes and compare the digest that the server computes
    Upload {
        /// HOST:PORT of the server
        server: SocketAddr,
        #[command(flatten)]
        stream: StreamArgs,
    },
    /// Fetch bytes and compare their digest with the expected one
    Download {
        /// HOST:PORT of the server
        server: SocketAddr,
        #[command(flatten)]
        stream: StreamArgs,
    },
    /// Send bytes to the TCP echo server and compare each that comes back, for a given time
    Stream {
        /// HOST:PORT of the echo server
        server: SocketAddr,
        /// For how long
        #[arg(long, default_value_t = 5)]
        seconds: u64,
        /// Bytes per second; 0 is as fast as possible
        #[arg(long, default_value_t = 0)]
        rate: u64,
        /// Fail if nothing comes back for so many milliseconds
        #[arg(long, default_value_t = 5000)]
        stall_ms: u64,
        /// Print a line of progress on standard error each second
        #[arg(long)]
        progress: bool,
        /// End sooner, as soon as this file exists
        #[arg(long)]
        until: Option<PathBuf>,
    },
    /// Keep many connections to the TCP echo server going and make short ones all the time
    Load(LoadArgs),
    /// Make new UDP flows as fast as can be, a datagram each
    Flood(FloodArgs),
    /// Send datagrams to the UDP echo server
    Udp {
        /// HOST:PORT of the echo server
        server: SocketAddr,
        /// How many
        #[arg(long, default_value_t = 10)]
        count: u64,
        /// Bytes in each
        #[arg(long, default_value_t = 64)]
        size: usize,
        /// Milliseconds between two
        #[arg(long, default_value_t = 5)]
        interval_ms: u64,
        /// Send no more once this file exists
        #[arg(long)]
        until: Option<PathBuf>,
    },
    /// Send datagrams to the UDP echo server of large pieces, many with one system call
    Gso {
        /// HOST:PORT of the echo server
        server: SocketAddr,
        #[command(flatten)]
        datagrams: GsoArgs,
    },
}

#[derive(Clone, Debug, clap::Args)]
struct StreamArgs {
    /// How many bytes
    #[arg(long, default_value_t = 1 << 20)]
    bytes: u64,
    /// Which deterministic stream
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Bytes per second; 0 is as fast as possible
    #[arg(long, default_value_t = 0)]
    rate: u64,
}

/// Runs one verb.
pub async fn run(args: ClientArgs) -> anyhow::Result<()> {
    let ClientArgs { verb, timeout } = args;
    let mut limit = Duration::from_secs(timeout);
    match &verb {
        Verb::Stream { seconds, .. } => limit = limit.max(Duration::from_secs(seconds + 30)),
        Verb::Udp { count, interval_ms, .. } => {
            limit = limit.max(Duration::from_millis(count * interval_ms) + Duration::from_secs(30));
        }
        _ => {}
    }
    match &verb {
        Verb::Load(args) => limit = limit.max(args.limit()),
        Verb::Flood(args) => limit = limit.max(args.limit()),
        _ => {}
    }
    let work = async {
        match verb {
            Verb::Peer { server } => print(&peer(server).await?, true),
            Verb::Get { url } => {
                body(request(Method::GET, url, Body::empty()).await?, |piece| {
                    use std::io::Write;
                    Ok(std::io::stdout().write_all(piece)?)
                })
                .await
            }
            Verb::Upload { server, stream } => {
                let transfer = upload(server, stream).await?;
                print(&transfer, transfer.ok)
            }
            Verb::Download { server, stream } => {
                let transfer = download(server, stream).await?;
                print(&transfer, transfer.ok)
            }
            Verb::Stream { server, seconds, rate, stall_ms, progress, until } => {
                let stall = Duration::from_millis(stall_ms);
                let end = End { duration: Duration::from_secs(seconds), file: until };
                let done = echo_stream(server, end, rate, stall, progress).await?;
                print(&done, done.ok)
            }
            Verb::Load(args) => {
                let done = load::run(args).await?;
                print(&done, done.ok)
            }
            Verb::Flood(args) => {
                let done = tokio::task::spawn_blocking(move || flood::run(&args)).await??;
                print(&done, true)
            }
            Verb::Udp { server, count, size, interval_ms, until } => {
                let done = udp(server, count, size, Duration::from_millis(interval_ms), until).await?;
                print(&done, done.ok)
            }
            Verb::Gso { server, datagrams } => {
                let done = gso::client(server, datagrams).await?;
                print(&done, done.ok)
            }
        }
    };
    tokio::time::timeout(limit, work).await.with_context(|| format!("no end after {} s", limit.as_secs()))?
}

fn print(report: &impl Serialize, ok: bool) -> anyhow::Result<()> {
    println!("{}", serde_json::to_string(report)?);
    ensure!(ok, "not as it should be");
    Ok(())
}

async fn peer(server: SocketAddr) -> anyhow::Result<Peer> {
    let url = format!("http://{server}/peer").parse()?;
    json(request(Method::GET, url, Body::empty()).await?).await
}

async fn upload(server: SocketAddr, args: StreamArgs) -> anyhow::Result<Transfer> {
    let StreamArgs { bytes, seed, rate } = args;
    let mut digest = Digest::new();
    Pattern::new(seed, bytes).for_each(|piece| digest.add(&piece));
    let (_, expected) = digest.finish();
    let pieces = futures::stream::iter(Pattern::new(seed, bytes)).then(move |piece| async move {
        if rate > 0 {
            tokio::time::sleep(pause(piece.len(), rate)).await;
        }
        Ok::<_, std::convert::Infallible>(piece)
    });
    let begun = Instant::now();
    let url = format!("http://{server}/upload").parse()?;
    let received: Received = json(request(Method::POST, url, Body::from_stream(pieces)).await?).await?;
    Ok(Transfer {
        ok: received.bytes == bytes && received.sha256 == expected,
        bytes: received.bytes,
        sha256: received.sha256,
        expected,
        seconds: begun.elapsed().as_secs_f64(),
        peer: Some(received.peer),
    })
}

async fn download(server: SocketAddr, args: StreamArgs) -> anyhow::Result<Transfer> {
    let StreamArgs { bytes, seed, rate } = args;
    let begun = Instant::now();
    let url = format!("http://{server}/download?bytes={bytes}&seed={seed}&rate={rate}").parse()?;
    let mut digest = Digest::new();
    body(request(Method::GET, url, Body::empty()).await?, |piece| {
        digest.add(piece);
        Ok(())
    })
    .await?;
    let seconds = begun.elapsed().as_secs_f64();
    let (received, sha256) = digest.finish();
    let mut wanted = Digest::new();
    Pattern::new(seed, bytes).for_each(|piece| wanted.add(&piece));
    let (_, expected) = wanted.finish();
    Ok(Transfer {
        ok: received == bytes && sha256 == expected,
        bytes: received,
        sha256,
        expected,
        seconds,
        peer: None,
    })
}

async fn request(method: Method, url: Uri, content: Body) -> anyhow::Result<Response<Body>> {
    let client: Client<_, Body> = Client::builder(TokioExecutor::new()).build_http();
    let request = Request::builder().method(method).uri(&url).body(content)?;
    let response = client.request(request).await.with_context(|| format!("request to {url}"))?;
    ensure!(response.status().is_success(), "{url} answered {}", response.status());
    Ok(response.map(Body::new))
}

async fn body(
    response: Response<Body>,
    mut take: impl FnMut(&Bytes) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let mut pieces = response.into_body().into_data_stream();
    while let Some(piece) = pieces.next().await {
        take(&piece.context("the answer broke off")?)?;
    }
    Ok(())
}

async fn json<T: serde::de::DeserializeOwned>(response: Response<Body>) -> anyhow::Result<T> {
    let mut text = Vec::new();
    body(response, |piece| {
        text.extend_from_slice(piece);
        Ok(())
    })
    .await?;
    serde_json::from_slice(&text).context("the server's answer")
}

/// When a stream ends: after a time, or when somebody has made a file.
struct End {
    duration: Duration,
    file: Option<PathBuf>,
}

impl End {
    fn is_due(&self, begun: Instant) -> bool {
        begun.elapsed() >= self.duration || self.file.as_ref().is_some_and(|file| file.exists())
    }
}

async fn echo_stream(
    server: SocketAddr,
    end: End,
    rate: u64,
    stall: Duration,
    progress: bool,
) -> anyhow::Result<Stream> {
    let stream = TcpStream::connect(server).await.with_context(|| format!("connection to {server}"))?;
    stream.set_nodelay(true)?;
    let socket = stream.as_raw_fd();
    let (reader, mut writer) = stream.into_split();
    let mut reader = BufReader::with_capacity(2 * CHUNK, reader);
    let mut line = String::new();
    reader.read_line(&mut line).await.context("greeting of the echo server")?;
    let peer: Peer = serde_json::from_str(&line).context("greeting of the echo server")?;

    let begun = Instant::now();
    let send = async {
        // Small pieces keep a slow stream moving steadily.
        let piece_size =
            if rate == 0 { CHUNK } else { CHUNK.min(usize::try_from(rate / 50).unwrap_or(CHUNK)).max(64) };
        let mut sent = 0;
        'all: for chunk in Pattern::new(1, u64::MAX) {
            for piece in chunk.chunks(piece_size) {
                if end.is_due(begun) {
                    break 'all;
                }
                writer.write_all(piece).await.context("sending")?;
                sent += piece.len() as u64;
                if rate > 0 {
                    let due = pause(usize::try_from(sent).unwrap_or(usize::MAX), rate);
                    tokio::time::sleep(due.saturating_sub(begun.elapsed())).await;
                }
            }
        }
        writer.shutdown().await.context("sending")?;
        Ok(sent)
    };

    let mut bytes = 0;
    let mut longest = Duration::ZERO;
    let receive = async {
        let mut pattern = Pattern::new(1, u64::MAX);
        let mut expected: Vec<u8> = Vec::new();
        let mut buffer = vec![0; CHUNK];
        let mut told = 0;
        loop {
            let asked = Instant::now();
            let size = match tokio::time::timeout(stall, reader.read(&mut buffer)).await {
                Ok(size) => size?,
                Err(_) => {
                    longest = longest.max(stall);
                    bail!("nothing came back for {} ms after byte {bytes}", stall.as_millis());
                }
            };
            longest = longest.max(asked.elapsed());
            if size == 0 {
                return Ok(());
            }
            while expected.len() < size {
                expected.extend(pattern.next().unwrap_or_default());
            }
            if buffer[..size] != expected[..size] {
                let same = buffer.iter().zip(&expected).take_while(|(a, b)| a == b).count();
                bail!("byte {} is not the one that was sent", bytes + same as u64);
            }
            expected.drain(..size);
            bytes += size as u64;
            if progress && begun.elapsed().as_secs() > told {
                told = begun.elapsed().as_secs();
                eprintln!("{told} s: {bytes} bytes back, longest stall {} ms", longest.as_millis());
            }
        }
    };
    // Who fails ends the other, which might wait for ever.
    let error = match tokio::try_join!(send, receive) {
        Ok((sent, ())) if sent != bytes => Some(format!("{sent} bytes sent, {bytes} came back")),
        Ok(_) => None,
        Err(error) => Some(format!("{error:#}")),
    };
    Ok(Stream {
        ok: error.is_none(),
        bytes,
        seconds: begun.elapsed().as_secs_f64(),
        longest_stall_ms: u64::try_from(longest.as_millis()).unwrap_or(u64::MAX),
        retransmits: retransmits(socket),
        peer,
        error,
    })
}

/// Segments that the kernel has sent again on this connection.
fn retransmits(socket: i32) -> u32 {
    // SAFETY: tcp_info is plain old data for which zero is a valid value.
    let mut info: libc::tcp_info = unsafe { std::mem::zeroed() };
    let mut size = size_of::<libc::tcp_info>() as libc::socklen_t;
    // SAFETY: the pointer and size describe `info`, which outlives the call; a bad descriptor is an error, no fault.
    let result = unsafe {
        libc::getsockopt(
            socket,
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            std::ptr::from_mut(&mut info).cast(),
            &raw mut size,
        )
    };
    if result == 0 { info.tcpi_total_retrans } else { 0 }
}

async fn udp(
    server: SocketAddr,
    mut count: u64,
    size: usize,
    interval: Duration,
    until: Option<PathBuf>,
) -> anyhow::Result<Udp> {
    let any: SocketAddr = if server.is_ipv4() { ([0, 0, 0, 0], 0).into() } else { ([0u16; 8], 0).into() };
    let socket = UdpSocket::bind(any).await?;
    socket.connect(server).await?;
    spacious(&socket).context("buffer of the socket")?;
    let mut buffer = vec![0; 64 * 1024];
    socket.send(UDP_QUESTION).await?;
    let peer = match tokio::time::timeout(Duration::from_secs(2), socket.recv(&mut buffer)).await {
        Ok(Ok(size)) => serde_json::from_slice(&buffer[..size]).ok(),
        _ => None,
    };

    let datagram = |number: u64| {
        let mut content = number.to_be_bytes().to_vec();
        content.extend(Pattern::new(number, size.saturating_sub(8) as u64).flatten());
        content
    };
    let mut missing: std::collections::HashSet<u64> = (0..count).collect();
    let (mut sent, mut wrong) = (0, 0);
    let mut next = tokio::time::interval(interval.max(Duration::from_micros(1)));
    let mut last_sent = Instant::now();
    while !missing.is_empty() && (sent < count || last_sent.elapsed() < Duration::from_secs(2)) {
        tokio::select! {
            _ = next.tick(), if sent < count => {
                if until.as_ref().is_some_and(|file| file.exists()) {
                    missing.retain(|number| *number < sent);
                    count = sent;
                    continue;
                }
                socket.send(&datagram(sent)).await?;
                sent += 1;
                last_sent = Instant::now();
            }
            got = socket.recv(&mut buffer) => {
                // An ICMP error is told here once; the datagram it is about stays missing.
                let Ok(got) = got else { continue };
                let number = buffer[..got].first_chunk().map(|head| u64::from_be_bytes(*head));
                match number.filter(|number| buffer[..got] == datagram(*number)) {
                    Some(number) if missing.remove(&number) => {}
                    _ => wrong += 1,
                }
            }
            () = tokio::time::sleep(Duration::from_millis(100)), if sent == count => {}
        }
    }
    let received = count - missing.len() as u64;
    Ok(Udp { ok: received == count && wrong == 0 && peer.is_some(), sent, received, wrong, peer })
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncWriteExt;
    use tokio::net::TcpListener;

    use super::*;

    /// A server that takes nothing and sends nothing back: what was to be sent does not keep the error from being told.
    #[tokio::test]
    async fn a_stream_that_stalls_ends() -> anyhow::Result<()> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let server = listener.local_addr()?;
        let silent = async {
            let (mut connection, from) = listener.accept().await?;
            let peer = Peer { peer: from.ip(), port: from.port(), local: server.ip() };
            connection.write_all(format!("{}\n", serde_json::to_string(&peer)?).as_bytes()).await?;
            Ok::<_, anyhow::Error>(connection)
        };
        let end = End { duration: Duration::from_secs(3600), file: None };
        let stream = echo_stream(server, end, 0, Duration::from_millis(100), false);
        let (connection, stream) = tokio::try_join!(silent, stream)?;
        drop(connection);
        let error = stream.error.unwrap_or_default();
        assert!(!stream.ok && error.starts_with("nothing came back for 100 ms"), "{error}");
        Ok(())
    }
}
