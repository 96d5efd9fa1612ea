//! Command line and environment of `coilctl`.

use std::net::IpAddr;
use std::path::PathBuf;
use std::str::FromStr;

use clap::{Parser, Subcommand, ValueEnum};
use coil_common::names::PIN_ROOT;

use super::filter::Destination;

/// Looks into Coil's datapath on this node: what it does to packets, and why.
#[derive(Parser, Clone, Debug)]
#[command(
    after_long_help = "Exit status: 0 done; 1 failed; 2 explain: the packet would be dropped; 3 nothing of Coil, \
or nothing that this program understands, is pinned on this node."
)]
pub struct Args {
    /// Folder of pinned maps and links, on a BPF file system.
    #[arg(long, env = "COIL_BPFFS_ROOT", default_value = PIN_ROOT, global = true)]
    pub bpffs_root: PathBuf,
    /// How to print.
    #[arg(long, short = 'o', env = "COILCTL_OUTPUT", value_enum, default_value_t = Format::Table, global = true)]
    pub output: Format,
    /// Node to look at; `kubectl coil` only.
    #[arg(long, env = "COILCTL_NODE", global = true)]
    pub node: Option<String>,
    /// What to show.
    #[command(subcommand)]
    pub command: Command,
}

/// How to print.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// A table, or text.
    Table,
    /// A table with more columns.
    Wide,
    /// JSON, with the schema of docs/troubleshooting.md.
    Json,
}

/// What to show.
#[derive(Subcommand, Clone, Debug)]
pub enum Command {
    /// Flows of this node's pods through Egresses, and translations of egress pods on this node.
    #[command(visible_alias = "ct")]
    Conntrack(Conntrack),
    /// What each pod of this node is to do with which destinations, as compiled for the datapath.
    Policy(PolicyOptions),
    /// Egresses that pods of this node use: gateways, their state and share, counters.
    Egress(EgressOptions),
    /// Dropped packets by reason, of this node and of egress pods on it.
    Drops(Drops),
    /// Pinned maps and attached programs.
    Maps(Maps),
    /// What would happen to a packet of a pod, and why.
    Explain(Explain),
    /// Drops and new flows, live.
    Monitor(Monitor),
}

/// Options of `conntrack`.
#[derive(clap::Args, Clone, Debug, Default)]
pub struct Conntrack {
    /// Only of this pod.
    #[arg(long, value_name = "NAMESPACE/NAME")]
    pub pod: Option<PodRef>,
    /// Only with this address at either end, or as the address that the world sees.
    #[arg(long, value_name = "IP", conflicts_with = "pod")]
    pub address: Option<IpAddr>,
    /// Only to these destinations.
    #[arg(long, value_name = "CIDR[:PORT]")]
    pub destination: Option<Destination>,
    /// Only of this protocol.
    #[arg(long, value_enum)]
    pub protocol: Option<Protocol>,
    /// Only through this Egress.
    #[arg(long, value_name = "NAMESPACE/NAME")]
    pub egress: Option<PodRef>,
    /// Only translations of this egress pod, by UID, name or address.
    #[arg(long, value_name = "UID|NAMESPACE/NAME|IP", conflicts_with = "node_only")]
    pub gateway: Option<String>,
    /// Only flows of this node's pods, no translations.
    #[arg(long = "flows")]
    pub node_only: bool,
    /// What comes first; most, or youngest.
    #[arg(long, value_enum)]
    pub sort: Option<Sort>,
    /// Show no more than so many of each kind.
    #[arg(long, value_name = "N")]
    pub limit: Option<usize>,
}

/// An order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Sort {
    /// Most bytes first.
    Bytes,
    /// Most packets first.
    Packets,
    /// Youngest first.
    Age,
}

/// Options of `policy`.
#[derive(clap::Args, Clone, Debug, Default)]
pub struct PolicyOptions {
    /// Only of this pod.
    #[arg(long, value_name = "NAMESPACE/NAME|IP")]
    pub pod: Option<PodRef>,
}

/// Options of `egress`.
#[derive(clap::Args, Clone, Debug, Default)]
pub struct EgressOptions {
    /// Only this one.
    #[arg(value_name = "NAMESPACE/NAME")]
    pub egress: Option<PodRef>,
}

/// Options of `drops`.
#[derive(clap::Args, Clone, Debug, Default)]
pub struct Drops {
    /// Go on, and print what has been dropped in each interval.
    #[arg(long, short = 'w')]
    pub watch: bool,
    /// Seconds between two looks.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub interval: u64,
    /// End after so many intervals.
    #[arg(long, requires = "watch")]
    pub count: Option<u64>,
    /// Reasons without drops too.
    #[arg(long, short = 'a')]
    pub all: bool,
    /// Only for these reasons.
    #[arg(long, value_name = "REASON,...", value_delimiter = ',')]
    pub reason: Vec<String>,
    /// Only of this place: `node`, or an egress pod.
    #[arg(long = "where", value_name = "node|NAMESPACE/NAME")]
    pub place: Option<String>,
}

/// Options of `maps`.
#[derive(clap::Args, Clone, Debug, Default)]
pub struct Maps {
    /// Only maps and programs whose path contains this.
    #[arg(value_name = "PART OF THE PATH")]
    pub part: Option<String>,
}

/// Options of `explain`.
#[derive(clap::Args, Clone, Debug)]
pub struct Explain {
    /// The pod that sends: by name, address or UID.
    #[arg(value_name = "NAMESPACE/NAME|IP|UID")]
    pub pod: PodRef,
    /// Where to: `203.0.113.10:443`, `[2001:db8::1]:443`, or without a port.
    #[arg(value_name = "DESTINATION[:PORT]")]
    pub destination: Target,
    /// Protocol.
    #[arg(long, value_enum, default_value_t = Protocol::Tcp)]
    pub protocol: Protocol,
    /// Source port, or identifier of an ICMP echo; by default that of a flow to the destination if there is
    /// one, else 40000.
    #[arg(long)]
    pub source_port: Option<u16>,
    /// Bytes of the IP packet; by default the smallest possible.
    #[arg(long, value_parser = clap::value_parser!(u16).range(28..))]
    pub size: Option<u16>,
}

/// Options of `monitor`.
#[derive(clap::Args, Clone, Debug, Default)]
pub struct Monitor {
    /// Only drops.
    #[arg(long, conflicts_with = "flows")]
    pub drops: bool,
    /// Only new flows.
    #[arg(long)]
    pub flows: bool,
    /// Only of this pod.
    #[arg(long, value_name = "NAMESPACE/NAME|IP")]
    pub pod: Option<PodRef>,
    /// End after so many events.
    #[arg(long)]
    pub count: Option<u64>,
    /// End after so many seconds.
    #[arg(long)]
    pub duration: Option<u64>,
}

/// A protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Protocol {
    /// TCP
    Tcp,
    /// UDP
    Udp,
    /// ICMP or ICMPv6
    Icmp,
}

impl Protocol {
    /// The number in IP headers is this protocol's.
    #[must_use]
    pub fn is(self, number: u8) -> bool {
        match self {
            Self::Tcp => number == 6,
            Self::Udp => number == 17,
            Self::Icmp => number == 1 || number == 58,
        }
    }
}

/// Something by namespace and name, by address, or by UID.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PodRef {
    /// Namespace and name.
    Name(String, String),
    /// Address.
    Address(IpAddr),
    /// UID, or a name that must be the only one.
    Word(String),
}

/// Empty, or with too many parts.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("want NAMESPACE/NAME, an address or a UID")]
pub struct PodRefError;

impl FromStr for PodRef {
    type Err = PodRefError;

    fn from_str(text: &str) -> Result<Self, PodRefError> {
        if let Ok(address) = text.parse() {
            return Ok(Self::Address(address));
        }
        match text.split_once('/') {
            Some((namespace, name)) if !namespace.is_empty() && !name.is_empty() && !name.contains('/') => {
                Ok(Self::Name(namespace.into(), name.into()))
            }
            None if !text.is_empty() => Ok(Self::Word(text.into())),
            _ => Err(PodRefError),
        }
    }
}

impl std::fmt::Display for PodRef {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Name(namespace, name) => write!(f, "{namespace}/{name}"),
            Self::Address(address) => write!(f, "{address}"),
            Self::Word(word) => f.write_str(word),
        }
    }
}

/// An address and perhaps a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Target {
    /// The address.
    pub address: IpAddr,
    /// The port.
    pub port: Option<u16>,
}

/// Not an address.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("want ADDRESS, ADDRESS:PORT or [IPV6]:PORT; names are not looked up")]
pub struct TargetError;

impl FromStr for Target {
    type Err = TargetError;

    fn from_str(text: &str) -> Result<Self, TargetError> {
        if let Ok(address) = text.trim_start_matches('[').trim_end_matches(']').parse() {
            return Ok(Self { address, port: None });
        }
        let socket: std::net::SocketAddr = text.parse().map_err(|_| TargetError)?;
        Ok(Self { address: socket.ip(), port: Some(socket.port()) })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;

    #[test]
    fn references_to_pods() {
        assert_eq!("a/b".parse(), Ok(PodRef::Name("a".into(), "b".into())));
        assert_eq!("10.0.0.1".parse(), Ok(PodRef::Address([10, 0, 0, 1].into())));
        assert_eq!("fd00::1".parse(), Ok(PodRef::Address("fd00::1".parse().unwrap())));
        assert_eq!("aa-bb".parse(), Ok(PodRef::Word("aa-bb".into())));
        for bad in ["", "/", "a/", "/b", "a/b/c"] {
            assert!(bad.parse::<PodRef>().is_err(), "{bad}");
        }
    }

    #[test]
    fn targets() {
        let target = |text: &str| text.parse::<Target>().map(|t| (t.address.to_string(), t.port));
        assert_eq!(target("10.0.0.1"), Ok(("10.0.0.1".into(), None)));
        assert_eq!(target("10.0.0.1:80"), Ok(("10.0.0.1".into(), Some(80))));
        assert_eq!(target("2001:db8::1"), Ok(("2001:db8::1".into(), None)));
        assert_eq!(target("[2001:db8::1]:80"), Ok(("2001:db8::1".into(), Some(80))));
        assert_eq!(target("example.com:80"), Err(TargetError));
    }

    #[test]
    fn the_command_line_is_sound() {
        use clap::CommandFactory;
        Args::command().debug_assert();
        let parse = |line: &str| Args::try_parse_from(line.split(' '));
        assert!(
            parse("coilctl conntrack --pod a/b --destination 10.0.0.0/8:53 --sort bytes --limit 3").is_ok()
        );
        assert!(parse("coilctl explain a/b 10.0.0.1:80 --protocol udp -o json").is_ok());
        assert!(parse("coilctl drops --reason no_state,too_big --where node").is_ok());
        assert!(parse("coilctl maps flows_v4").is_ok());
        assert!(parse("coilctl monitor --drops --flows").is_err());
        assert!(parse("coilctl explain a/b").is_err());
    }
}
