//! UDP as QUIC stacks use it: many datagrams in one system call, out by `UDP_SEGMENT`, in by `UDP_GRO`. The echo server
//! sends back what one call has received with one call.

use super::pattern::Pattern;
use super::report::Gso;
use anyhow::{Context, ensure};
use nix::sys::socket::{
    ControlMessage, ControlMessageOwned, MsgFlags, SockaddrStorage, recvmsg, sendmsg, setsockopt, sockopt,
};
use std::io::{self, IoSlice, IoSliceMut};
use std::net::{SocketAddr, SocketAddrV4, SocketAddrV6};
use std::os::fd::AsRawFd;
use std::time::Duration;
use tokio::io::Interest;
use tokio::net::UdpSocket;

/// What a client sends.
#[derive(Clone, Copy, Debug, clap::Args)]
pub(super) struct GsoArgs {
    /// How many system calls
    #[arg(long, default_value_t = 50)]
    sends: u64,
    /// Datagrams in each; the last of them is shorter
    #[arg(long, default_value_t = 20)]
    datagrams: u64,
    /// Bytes in a datagram
    #[arg(long, default_value_t = 1200)]
    size: u16,
    /// Port to send from; 0: any that is free
    #[arg(long, default_value_t = 0)]
    source_port: u16,
}

/// What one system call has received: datagrams of the same size but for the last.
struct Got {
    bytes: usize,
    size: usize,
    from: Option<SocketAddr>,
}

/// Echoes until the socket fails.
pub(super) async fn echo(socket: UdpSocket) -> io::Result<()> {
    setsockopt(&socket, sockopt::UdpGroSegment, &true)?;
    let mut buffer = vec![0; 64 * 1024];
    loop {
        // ICMP errors for earlier answers surface here and concern nobody.
        let Ok(got) = receive(&socket, &mut buffer).await else { continue };
        if let Err(error) = send(&socket, &buffer[..got.bytes], got.size, got.from).await {
            eprintln!("UDP echo of {} bytes to {:?}: {error}", got.bytes, got.from);
        }
    }
}

/// Sends, waits until all is back, and sends again, so that no buffer is ever too small.
pub(super) async fn client(server: SocketAddr, args: GsoArgs) -> anyhow::Result<Gso> {
    let GsoArgs { sends, datagrams, size, source_port } = args;
    ensure!(size >= 16 && datagrams > 0, "at least one datagram of 16 bytes");
    let any: SocketAddr =
        if server.is_ipv4() { ([0; 4], source_port).into() } else { ([0_u16; 8], source_port).into() };
    let socket = UdpSocket::bind(any).await.with_context(|| format!("sending from port {source_port}"))?;
    socket.connect(server).await?;
    setsockopt(&socket, sockopt::UdpGroSegment, &true).context("UDP_GRO")?;
    let mut report = Gso { port: socket.local_addr()?.port(), ..Gso::default() };
    let mut buffer = vec![0; 64 * 1024];
    for batch in 0..sends {
        let mut missing: Vec<Vec<u8>> =
            (0..datagrams).map(|n| datagram(batch * datagrams + n, size, n + 1 == datagrams)).collect();
        let bytes = missing.concat();
        send(&socket, &bytes, size.into(), None)
            .await
            .with_context(|| format!("sending {} bytes", bytes.len()))?;
        report.sent += datagrams;
        report.bytes += bytes.len() as u64;
        while !missing.is_empty() {
            let waiting = tokio::time::timeout(Duration::from_secs(2), receive(&socket, &mut buffer));
            let Ok(Ok(got)) = waiting.await else { break };
            report.receives += 1;
            for datagram in buffer[..got.bytes].chunks(got.size.max(1)) {
                match missing.iter().position(|one| one == datagram) {
                    Some(place) => {
                        missing.swap_remove(place);
                        report.received += 1;
                    }
                    None => report.wrong += 1,
                }
            }
        }
    }
    report.ok = report.received == report.sent && report.wrong == 0;
    Ok(report)
}

/// The datagram of a number; the last of a batch has an odd, smaller size.
fn datagram(number: u64, size: u16, last: bool) -> Vec<u8> {
    let size = if last { (size / 2) | 1 } else { size };
    let mut content = number.to_be_bytes().to_vec();
    content.extend(Pattern::new(number, u64::from(size) - 8).flatten());
    content
}

async fn send(socket: &UdpSocket, bytes: &[u8], size: usize, to: Option<SocketAddr>) -> io::Result<()> {
    let to = to.map(SockaddrStorage::from);
    let segment = u16::try_from(size).map_err(io::Error::other)?;
    let control = [ControlMessage::UdpGsoSegments(&segment)];
    let control = if bytes.len() > size { control.as_slice() } else { &[] };
    let sent = socket
        .async_io(Interest::WRITABLE, || {
            let pieces = [IoSlice::new(bytes)];
            Ok(sendmsg(socket.as_raw_fd(), &pieces, control, MsgFlags::empty(), to.as_ref())?)
        })
        .await?;
    if sent == bytes.len() { Ok(()) } else { Err(io::Error::other(format!("only {sent} bytes were sent"))) }
}

async fn receive(socket: &UdpSocket, buffer: &mut [u8]) -> io::Result<Got> {
    socket
        .async_io(Interest::READABLE, || {
            let mut control = nix::cmsg_space!(i32);
            let mut pieces = [IoSliceMut::new(buffer)];
            let got = recvmsg::<SockaddrStorage>(
                socket.as_raw_fd(),
                &mut pieces,
                Some(&mut control),
                MsgFlags::empty(),
            )?;
            let mut size = got.bytes;
            for message in got.cmsgs()? {
                if let ControlMessageOwned::UdpGroSegments(segment) = message {
                    size = usize::try_from(segment).map_err(io::Error::other)?;
                }
            }
            let from = got.address.as_ref().and_then(address);
            Ok(Got { bytes: got.bytes, size, from })
        })
        .await
}

fn address(storage: &SockaddrStorage) -> Option<SocketAddr> {
    let v4 = storage.as_sockaddr_in().map(|address| SocketAddr::V4(SocketAddrV4::from(*address)));
    v4.or_else(|| storage.as_sockaddr_in6().map(|address| SocketAddr::V6(SocketAddrV6::from(*address))))
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]
    use super::*;

    #[tokio::test]
    async fn every_datagram_comes_back_from_few_calls() {
        for local in ["127.0.0.1:0", "[::1]:0"] {
            let server = UdpSocket::bind(local).await.unwrap();
            let address = server.local_addr().unwrap();
            let echo = tokio::spawn(echo(server));
            let report = client(address, GsoArgs { sends: 3, datagrams: 10, size: 1000, source_port: 0 })
                .await
                .unwrap();
            echo.abort();
            assert!(report.ok, "{report:?}");
            assert_eq!((report.sent, report.received, report.bytes), (30, 30, 3 * (9 * 1000 + 501)));
            // The loopback interface leaves them together.
            assert_eq!(report.receives, 3);
        }
    }
}
