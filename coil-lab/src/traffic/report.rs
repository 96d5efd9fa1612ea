//! What the servers and the client print, as JSON.

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

/// Answer to `GET /peer`, and output of `client peer`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Peer {
    /// The client's address as the server sees it.
    pub peer: IpAddr,
    /// The client's port as the server sees it.
    pub port: u16,
    /// The server's address that the client has reached.
    pub local: IpAddr,
}

impl Peer {
    /// From the two ends of a connection.
    pub fn new(peer: SocketAddr, local: SocketAddr) -> Self {
        Self { peer: peer.ip().to_canonical(), port: peer.port(), local: local.ip().to_canonical() }
    }
}

/// Answer to `POST /upload`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Received {
    /// Bytes that arrived.
    pub bytes: u64,
    /// Their SHA-256, hexadecimal.
    pub sha256: String,
    /// Who sent them.
    #[serde(flatten)]
    pub peer: Peer,
}

/// Output of `client upload` and `client download`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Transfer {
    /// Whether every byte arrived as sent.
    pub ok: bool,
    /// Bytes that arrived.
    pub bytes: u64,
    /// SHA-256 of what arrived, hexadecimal.
    pub sha256: String,
    /// SHA-256 of what was sent.
    pub expected: String,
    /// How long it took.
    pub seconds: f64,
    /// The client as the server saw it, where the server tells.
    pub peer: Option<Peer>,
}

/// Output of `client stream`: a long TCP echo.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Stream {
    /// Whether all came back as sent and no pause was longer than allowed.
    pub ok: bool,
    /// Bytes that came back as sent.
    pub bytes: u64,
    /// How long it ran.
    pub seconds: f64,
    /// Longest time without progress, in milliseconds.
    pub longest_stall_ms: u64,
    /// Segments that the client's kernel had to send again.
    pub retransmits: u32,
    /// The client as the server saw it.
    pub peer: Peer,
    /// What went wrong.
    pub error: Option<String>,
}

/// Connections of one kind.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Connections {
    /// How many came up.
    pub opened: u64,
    /// How many did not come up, broke or did not end in good order.
    pub failed: u64,
    /// Pieces that came back as sent.
    pub exchanges: u64,
    /// Longest time that one took, in milliseconds.
    pub longest_ms: u64,
    /// How many the server saw from each address.
    pub peers: BTreeMap<IpAddr, u64>,
    /// What went wrong, the first few.
    pub errors: Vec<String>,
}

/// Output of `client load`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Load {
    /// Whether no connection failed.
    pub ok: bool,
    /// Those that last to the end.
    pub long: Connections,
    /// Short ones.
    pub short: Connections,
    /// Short ones that were begun.
    pub started: u64,
    /// How long it ran.
    pub seconds: f64,
}

/// Output of `client flood`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Flood {
    /// Flows whose datagram was sent.
    pub sent: u64,
    /// Flows of which the kernel would send none.
    pub refused: u64,
    /// How long it ran.
    pub seconds: f64,
}

/// Output of `client udp`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Udp {
    /// Whether every datagram came back as sent.
    pub ok: bool,
    /// Datagrams sent.
    pub sent: u64,
    /// Datagrams that came back as sent.
    pub received: u64,
    /// Datagrams that came back different, or more than once.
    pub wrong: u64,
    /// The client as the server saw it; `None` where the question or its answer was lost.
    pub peer: Option<Peer>,
}

/// Output of `client gso`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Gso {
    /// Whether every datagram came back as sent, once.
    pub ok: bool,
    /// Datagrams sent.
    pub sent: u64,
    /// Bytes in them.
    pub bytes: u64,
    /// Datagrams that came back as sent.
    pub received: u64,
    /// Datagrams that came back different, or more than once.
    pub wrong: u64,
    /// System calls that received them.
    pub receives: u64,
    /// The client's own port.
    pub port: u16,
}
