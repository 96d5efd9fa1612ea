//! The servers of the external host and the client that talks to them, so that demo and tests need no curl. HTTP on
//! port 80 tells its peer and moves bytes with digests; port 7 echoes, TCP and UDP; port 443 echoes UDP in large pieces. Both are verbs of this program.

mod client;
mod flood;
mod gso;
mod load;
mod pattern;
pub mod report;
mod server;

pub use client::{ClientArgs, run as run_client};
pub use server::{ServerArgs, run as run_server};

/// Port of the HTTP server.
pub const HTTP_PORT: u16 = 80;
/// Port of the echo servers.
pub const ECHO_PORT: u16 = 7;
/// Port of the UDP echo that sends and receives many datagrams at once.
pub const GSO_PORT: u16 = 443;
