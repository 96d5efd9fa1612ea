//! Which ports of the pod's address belong to translation, and which to the pod's own connections.
//!
//! Translation never uses a port that a socket of this network name space has: what listens there now,
//! what a sidecar opens later, and the range that the kernel takes ports of own connections from. The
//! datapath finds them as bits in a map, which [`PortKeeper`] keeps as it should be. Ports of nodes
//! (NodePorts) do not matter in a pod, whose address is its own; where they do, they can be named.

use std::fmt;
use std::fs;
use std::io;
use std::ops::RangeInclusive;
use std::str::FromStr;

use aya::maps::{Array, MapData};
use coil_common::names::MAP_EXCLUDED_PORTS;
use coil_common::usage::{EXCLUDED_PORTS, excluded_port};

use crate::datapath::internal::Loaded;
use crate::datapath::{LoadError, MapAccessError};

/// Where the kernel takes ports of own connections from, both families.
const LOCAL_RANGE: &str = "/proc/sys/net/ipv4/ip_local_port_range";

/// Ports for the pod's own connections, to the API server for example.
const OWN: RangeInclusive<u16> = 64512..=65535;

/// Below are ports that only servers have.
const FIRST: u16 = 1024;

/// Lists of the sockets of this network name space, and whether they are of UDP.
const SOCKETS: [(&str, bool); 4] = [
    ("/proc/thread-self/net/tcp", false),
    ("/proc/thread-self/net/tcp6", false),
    ("/proc/thread-self/net/udp", true),
    ("/proc/thread-self/net/udp6", true),
];

/// A range of ports or identifiers, written as `FIRST-LAST` or as one number.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PortRange(pub RangeInclusive<u16>);

/// Not a range of ports.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("invalid range {0:?}: want FIRST-LAST, both from 0 to 65535, the first not above the last")]
pub struct PortRangeError(String);

impl FromStr for PortRange {
    type Err = PortRangeError;

    fn from_str(text: &str) -> Result<Self, PortRangeError> {
        let error = || PortRangeError(text.to_owned());
        let (first, last) = text.split_once('-').unwrap_or((text, text));
        let number = |text: &str| text.trim().parse::<u16>().map_err(|_| error());
        let range = number(first)?..=number(last)?;
        if range.is_empty() { Err(error()) } else { Ok(Self(range)) }
    }
}

impl fmt::Display for PortRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.0.start(), self.0.end())
    }
}

/// A set of ports of TCP and of UDP.
#[derive(Clone, PartialEq, Eq)]
pub struct PortSet(Vec<u64>);

impl Default for PortSet {
    fn default() -> Self {
        Self(vec![0; EXCLUDED_PORTS])
    }
}

impl fmt::Debug for PortSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ports = |udp| (0..=u16::MAX).filter(move |port| self.contains(udp, *port));
        f.debug_struct("PortSet")
            .field("tcp", &ports(false).collect::<Vec<_>>())
            .field("udp", &ports(true).collect::<Vec<_>>())
            .finish()
    }
}

impl PortSet {
    /// These ports, of both protocols.
    pub fn of(ports: impl IntoIterator<Item = u16>) -> Self {
        let mut set = Self::default();
        for port in ports {
            set.insert(false, port);
            set.insert(true, port);
        }
        set
    }

    fn insert(&mut self, udp: bool, port: u16) {
        let (word, bit) = excluded_port(udp, port);
        if let Some(bits) = self.0.get_mut(word as usize) {
            *bits |= bit;
        }
    }

    /// Whether it holds a port.
    #[must_use]
    pub fn contains(&self, udp: bool, port: u16) -> bool {
        let (word, bit) = excluded_port(udp, port);
        self.0.get(word as usize).is_some_and(|bits| bits & bit != 0)
    }

    fn add(&mut self, other: &Self) {
        self.0.iter_mut().zip(&other.0).for_each(|(bits, more)| *bits |= more);
    }
}

/// Ports that translation may use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NatPorts {
    /// All of them.
    pub range: RangeInclusive<u16>,
    /// Identifiers of ICMP echo.
    pub identifiers: RangeInclusive<u16>,
    /// Ports in the range that are never used, whatever sockets there are.
    pub excluded: PortSet,
}

impl NatPorts {
    /// Ports of the range that translation may use if no socket has one.
    #[must_use]
    pub fn free(&self, udp: bool) -> usize {
        self.range.clone().filter(|port| !self.excluded.contains(udp, *port)).count()
    }
}

/// What is asked for.
#[derive(Clone, Debug)]
pub(crate) struct Wanted {
    /// The range, if one was named.
    pub(crate) range: Option<PortRange>,
    /// Identifiers of ICMP echo.
    pub(crate) identifiers: PortRange,
    /// Ports that must not be used.
    pub(crate) excluded: Vec<PortRange>,
    /// Ports of this program.
    pub(crate) own: Vec<u16>,
}

/// Why ports cannot be divided.
#[derive(Debug, thiserror::Error)]
pub enum PortsError {
    /// The range of own connections cannot be read.
    #[error("cannot read {LOCAL_RANGE}")]
    LocalRange(#[source] io::Error),
    /// Nothing is left.
    #[error("no port of {0} is left for translation")]
    Nothing(PortRange),
}

/// Divides the ports: moves own connections out of the way, or keeps out of theirs if that is not
/// permitted.
pub(crate) fn divide(wanted: &Wanted) -> Result<NatPorts, PortsError> {
    let read = || fs::read_to_string(LOCAL_RANGE).map_err(PortsError::LocalRange);
    let mut local = parse_range(&read()?);
    // The controller asks for it in the pod's securityContext; inside, /proc/sys may not be writable.
    if local.as_ref() != Some(&OWN) {
        match fs::write(LOCAL_RANGE, format!("{} {}", OWN.start(), OWN.end())) {
            Ok(()) => local = Some(OWN),
            Err(error) => tracing::warn!(
                %error, path = LOCAL_RANGE, ?local,
                "cannot move the ports of own connections; translation has fewer",
            ),
        }
    }
    let local = local.ok_or_else(|| PortsError::LocalRange(io::ErrorKind::InvalidData.into()))?;
    without(wanted, local)
}

/// The ports that are left beside those of own connections.
fn without(wanted: &Wanted, local: RangeInclusive<u16>) -> Result<NatPorts, PortsError> {
    let Wanted { range, identifiers, excluded, own } = wanted;
    let range = range.clone().unwrap_or(PortRange(if local == OWN {
        FIRST..=OWN.start() - 1
    } else {
        FIRST..=u16::MAX
    }));
    let named = excluded.iter().flat_map(|range| range.0.clone());
    let ports = NatPorts {
        range: range.0.clone(),
        identifiers: identifiers.0.clone(),
        excluded: PortSet::of(local.chain(named).chain(own.iter().copied())),
    };
    if ports.free(false) == 0 || ports.free(true) == 0 { Err(PortsError::Nothing(range)) } else { Ok(ports) }
}

/// A range as the kernel writes it.
fn parse_range(text: &str) -> Option<RangeInclusive<u16>> {
    let mut numbers = text.split_whitespace().map(|number| number.parse::<u16>().ok());
    let (low, high) = (numbers.next()??, numbers.next()??);
    (low <= high).then_some(low..=high)
}

/// Local ports of a list of sockets as the kernel writes it: listening, connected and waiting ones.
fn local_ports(text: &str) -> impl Iterator<Item = u16> {
    text.lines().skip(1).filter_map(|line| {
        let address = line.split_whitespace().nth(1)?;
        let port = address.rsplit_once(':')?.1;
        u16::from_str_radix(port, 16).ok().filter(|port| *port != 0)
    })
}

/// Ports that sockets of this network name space have.
fn sockets() -> io::Result<PortSet> {
    let mut set = PortSet::default();
    for (path, udp) in SOCKETS {
        match fs::read_to_string(path) {
            Ok(text) => local_ports(&text).for_each(|port| set.insert(udp, port)),
            // A kernel without IPv6.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    Ok(set)
}

/// Why the map of excluded ports is not as it should be.
#[derive(Debug, thiserror::Error)]
pub enum PortKeeperError {
    /// The sockets cannot be listed.
    #[error("cannot list the sockets of this network name space")]
    Sockets(#[source] io::Error),
    /// The map cannot be written.
    #[error(transparent)]
    Map(#[from] MapAccessError),
}

/// Keeps the map of excluded ports.
pub struct PortKeeper {
    map: Array<MapData, u64>,
    fixed: PortSet,
    /// What the map holds; `None` if all of it must be written.
    current: Option<PortSet>,
}

impl PortKeeper {
    /// Takes the map.
    pub(crate) fn new(loaded: &mut Loaded, fixed: PortSet) -> Result<Self, LoadError> {
        Ok(Self { map: loaded.map(MAP_EXCLUDED_PORTS)?, fixed, current: None })
    }

    /// Looks at the sockets of the network name space of this thread, and writes what has changed; returns
    /// how many words of the map did.
    pub fn refresh(&mut self) -> Result<usize, PortKeeperError> {
        let mut wanted = sockets().map_err(PortKeeperError::Sockets)?;
        wanted.add(&self.fixed);
        let current = self.current.take();
        let mut changes = 0;
        for (index, bits) in wanted.0.iter().enumerate() {
            if current.as_ref().is_some_and(|current| current.0.get(index) == Some(bits)) {
                continue;
            }
            let index = u32::try_from(index).unwrap_or(u32::MAX);
            self.map.set(index, *bits, 0).map_err(|source| MapAccessError {
                operation: "write",
                map: MAP_EXCLUDED_PORTS,
                source,
            })?;
            changes += 1;
        }
        self.current = Some(wanted);
        Ok(changes)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;

    fn wanted(range: Option<&str>, excluded: &[&str]) -> Wanted {
        Wanted {
            range: range.map(|text| text.parse().unwrap()),
            identifiers: PortRange(0..=u16::MAX),
            excluded: excluded.iter().map(|text| text.parse().unwrap()).collect(),
            own: vec![5555, 8080, 80],
        }
    }

    #[test]
    fn ranges_parse_and_print() {
        assert_eq!("1024-2047".parse(), Ok(PortRange(1024..=2047)));
        assert_eq!("7".parse(), Ok(PortRange(7..=7)));
        assert_eq!(PortRange(1..=2).to_string(), "1-2");
        for bad in ["", "2-1", "1-65536", "a-b", "1-2-3", "-1"] {
            assert!(bad.parse::<PortRange>().is_err(), "{bad}");
        }
    }

    #[test]
    fn translation_keeps_out_of_the_range_of_own_connections() {
        let moved = without(&wanted(None, &[]), OWN).unwrap();
        assert_eq!(moved.range, 1024..=64511);
        assert_eq!(moved.free(false), 64512 - 1024 - 2);
        assert!(moved.excluded.contains(false, 5555) && moved.excluded.contains(true, 8080));
        let stuck = without(&wanted(None, &[]), 32768..=60999).unwrap();
        assert_eq!(stuck.range, 1024..=65535);
        assert_eq!(stuck.free(true), 32768 - 1024 - 2 + 65536 - 61000);
        assert!(!stuck.excluded.contains(true, 61000) && stuck.excluded.contains(true, 60999));
    }

    #[test]
    fn a_named_range_counts_and_must_leave_something() {
        let ports = without(&wanted(Some("30000-40000"), &["30000-32767", "39999"]), OWN).unwrap();
        assert_eq!(ports.range, 30000..=40000);
        assert_eq!(ports.free(false), 40000 - 32767 - 1);
        let taken = without(&wanted(Some("64512-65535"), &[]), OWN);
        assert!(matches!(taken, Err(PortsError::Nothing(_))));
    }

    #[test]
    fn ranges_of_the_kernel_parse() {
        assert_eq!(parse_range("32768\t60999\n"), Some(32768..=60999));
        assert_eq!(parse_range("nonsense"), None);
        assert_eq!(parse_range("9 8"), None);
    }

    #[test]
    fn sockets_of_the_kernel_parse() {
        let text = "  sl  local_address rem_address   st tx_queue rx_queue\n\
                    \x20  0: 00000000:1F90 00000000:0000 0A 00000000:00000000 00:00000000\n\
                    \x20  1: 0100007F:0000 00000000:0000 07 00000000:00000000 00:00000000\n\
                    \x20  2: 00000000000000000000000001000000:0035 00000000:0000 0A 0:0\n";
        assert_eq!(local_ports(text).collect::<Vec<_>>(), [8080, 53]);
    }

    #[test]
    fn a_socket_that_listens_is_seen() {
        let tcp = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let udp = std::net::UdpSocket::bind("[::1]:0").or_else(|_| std::net::UdpSocket::bind("127.0.0.1:0"));
        let (tcp, udp) =
            (tcp.local_addr().unwrap().port(), udp.as_ref().unwrap().local_addr().unwrap().port());
        let seen = sockets().unwrap();
        assert!(seen.contains(false, tcp) && seen.contains(true, udp));
    }
}
