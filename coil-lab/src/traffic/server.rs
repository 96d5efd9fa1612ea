//! The servers of the external host.

use super::pattern::{Digest, Pattern};
use super::report::{Peer, Received};
use super::{ECHO_PORT, GSO_PORT, HTTP_PORT, gso};
use anyhow::Context;
use axum::body::Body;
use axum::extract::connect_info::Connected;
use axum::extract::{ConnectInfo, Query};
use axum::http::StatusCode;
use axum::routing::{get, post};
use axum::serve::IncomingStream;
use axum::{Json, Router};
use futures::StreamExt;
use nix::sys::socket::{setsockopt, sockopt};
use serde::Deserialize;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::task::JoinSet;

/// What the UDP server takes for a question about the peer; everything else is echoed.
pub(crate) const UDP_QUESTION: &[u8] = b"peer?";

/// Arguments of the servers.
#[derive(Clone, Debug, clap::Args)]
pub struct ServerArgs {
    /// Address to serve on; may be given many times. Each has its own sockets, so that UDP answers leave from the
    /// address that was asked
    #[arg(long, required = true)]
    pub address: Vec<IpAddr>,
    /// Port of HTTP
    #[arg(long, default_value_t = HTTP_PORT)]
    pub http_port: u16,
    /// Port of the TCP and UDP echo
    #[arg(long, default_value_t = ECHO_PORT)]
    pub echo_port: u16,
    /// Port of the UDP echo that sends and receives many datagrams at once
    #[arg(long, default_value_t = GSO_PORT)]
    pub gso_port: u16,
}

/// Both ends of a connection.
#[derive(Clone)]
struct Ends(Peer);

impl Connected<IncomingStream<'_, TcpListener>> for Ends {
    fn connect_info(stream: IncomingStream<'_, TcpListener>) -> Self {
        let unknown = SocketAddr::from(([0, 0, 0, 0], 0));
        let local = stream.io().local_addr().unwrap_or(unknown);
        Self(Peer::new(*stream.remote_addr(), local))
    }
}

/// Serves until one of the servers fails.
pub async fn run(args: ServerArgs) -> anyhow::Result<()> {
    let ServerArgs { address, http_port, echo_port, gso_port } = args;
    let app = Router::new()
        .route("/peer", get(peer))
        .route("/upload", post(upload).put(upload))
        .route("/echo", post(upload).put(upload))
        .route("/download", get(download))
        .into_make_service_with_connect_info::<Ends>();
    let mut servers = JoinSet::new();
    for address in address {
        let http = TcpListener::bind((address, http_port))
            .await
            .with_context(|| format!("HTTP on {address} port {http_port}"))?;
        let app = app.clone();
        servers.spawn(async move { axum::serve(http, app).await });
        let tcp = TcpListener::bind((address, echo_port))
            .await
            .with_context(|| format!("TCP echo on {address} port {echo_port}"))?;
        servers.spawn(echo_tcp(tcp));
        let udp = UdpSocket::bind((address, echo_port))
            .await
            .with_context(|| format!("UDP echo on {address} port {echo_port}"))?;
        spacious(&udp).context("buffer of the UDP echo")?;
        servers.spawn(echo_udp(udp));
        let gso = UdpSocket::bind((address, gso_port))
            .await
            .with_context(|| format!("UDP echo of many datagrams on {address} port {gso_port}"))?;
        servers.spawn(gso::echo(gso));
    }
    println!("serving");
    match servers.join_next().await {
        Some(ended) => ended.context("a server panicked")?.context("a server failed"),
        None => Ok(()),
    }
}

async fn peer(ConnectInfo(Ends(peer)): ConnectInfo<Ends>) -> Json<Peer> {
    Json(peer)
}

async fn upload(
    ConnectInfo(Ends(peer)): ConnectInfo<Ends>,
    body: Body,
) -> Result<Json<Received>, (StatusCode, String)> {
    let mut digest = Digest::new();
    let mut pieces = body.into_data_stream();
    while let Some(piece) = pieces.next().await {
        digest.add(&piece.map_err(|error| (StatusCode::BAD_REQUEST, error.to_string()))?);
    }
    let (bytes, sha256) = digest.finish();
    Ok(Json(Received { bytes, sha256, peer }))
}

#[derive(Deserialize)]
struct Download {
    #[serde(default)]
    bytes: u64,
    #[serde(default)]
    seed: u64,
    /// Bytes per second; as fast as possible where absent.
    rate: Option<u64>,
}

async fn download(Query(Download { bytes, seed, rate }): Query<Download>) -> Body {
    let pieces = futures::stream::iter(Pattern::new(seed, bytes)).then(move |piece| async move {
        if let Some(rate) = rate.filter(|rate| *rate > 0) {
            tokio::time::sleep(pause(piece.len(), rate)).await;
        }
        Ok::<_, std::convert::Infallible>(piece)
    });
    Body::from_stream(pieces)
}

/// How long to wait after `bytes` to keep to `rate` bytes per second.
pub(crate) fn pause(bytes: usize, rate: u64) -> Duration {
    let micros = (bytes as u64).saturating_mul(1_000_000) / rate.max(1);
    Duration::from_micros(micros)
}

async fn echo_tcp(listener: TcpListener) -> std::io::Result<()> {
    loop {
        let (stream, peer) = listener.accept().await?;
        tokio::spawn(async move {
            if let Err(error) = echo(stream, peer).await {
                eprintln!("echo to {peer}: {error}");
            }
        });
    }
}

/// First one line about the peer, then what it sends.
async fn echo(mut stream: TcpStream, peer: SocketAddr) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    let mut line = serde_json::to_vec(&Peer::new(peer, stream.local_addr()?))?;
    line.push(b'\n');
    stream.write_all(&line).await?;
    let mut buffer = vec![0; 64 * 1024];
    loop {
        let size = stream.read(&mut buffer).await?;
        if size == 0 {
            return stream.shutdown().await;
        }
        stream.write_all(&buffer[..size]).await?;
    }
}

/// Room for what arrives while a busy machine runs other programs; without it the socket drops what the network has
/// delivered.
pub(crate) fn spacious(socket: &UdpSocket) -> std::io::Result<()> {
    Ok(setsockopt(socket, sockopt::RcvBufForce, &(8 << 20))?)
}

async fn echo_udp(socket: UdpSocket) -> std::io::Result<()> {
    let local = socket.local_addr()?;
    let mut buffer = vec![0; 64 * 1024];
    loop {
        // ICMP errors for earlier answers surface here and concern nobody.
        let Ok((size, peer)) = socket.recv_from(&mut buffer).await else {
            continue;
        };
        let sent = if &buffer[..size] == UDP_QUESTION {
            let answer = serde_json::to_vec(&Peer::new(peer, local))?;
            socket.send_to(&answer, peer).await
        } else {
            socket.send_to(&buffer[..size], peer).await
        };
        if let Err(error) = sent {
            eprintln!("UDP echo to {peer}: {error}");
        }
    }
}
