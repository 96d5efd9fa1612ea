//! New flows as fast as they can be made: one datagram each, from a socket of its own.

use super::report::Flood;
use anyhow::Context;
use std::io::ErrorKind;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// Arguments of the flood.
#[derive(Clone, Debug, clap::Args)]
pub struct FloodArgs {
    /// HOST:PORT of the first destination; the others have the ports after it
    server: SocketAddr,
    /// How many destination ports
    #[arg(long, default_value_t = 1)]
    ports: u16,
    /// End once this file exists
    #[arg(long)]
    until: Option<PathBuf>,
    /// End after so many seconds in any case
    #[arg(long, default_value_t = 10)]
    seconds: u64,
}

impl FloodArgs {
    /// Longest time that it may take.
    pub(super) fn limit(&self) -> Duration {
        Duration::from_secs(self.seconds + 30)
    }
}

/// How many flows are made between two looks at the stop file and the clock.
const LOOK: u64 = 256;

/// Makes flows until it is told to end. Blocks the thread.
///
/// # Errors
///
/// A socket cannot be made.
pub(super) fn run(args: &FloodArgs) -> anyhow::Result<Flood> {
    let any: SocketAddr = if args.server.is_ipv4() {
        (Ipv4Addr::UNSPECIFIED, 0).into()
    } else {
        (Ipv6Addr::UNSPECIFIED, 0).into()
    };
    let begun = Instant::now();
    let limit = Duration::from_secs(args.seconds);
    let mut done = Flood::default();
    for number in 0.. {
        let stop = || args.until.as_ref().is_some_and(|file| file.exists());
        if number % LOOK == 0 && (begun.elapsed() >= limit || stop()) {
            break;
        }
        let offset = u16::try_from(number % u64::from(args.ports.max(1))).unwrap_or(0);
        let to = SocketAddr::new(args.server.ip(), args.server.port().wrapping_add(offset));
        let socket = UdpSocket::bind(any).context("a socket")?;
        socket.connect(to).context("an address")?;
        match socket.send(&number.to_be_bytes()) {
            Ok(_) => done.sent += 1,
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(_) => done.refused += 1,
        }
    }
    done.seconds = begun.elapsed().as_secs_f64();
    Ok(done)
}
