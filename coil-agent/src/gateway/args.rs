//! Command line and environment of `coil-egress`.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::PathBuf;
use std::str::FromStr;

use clap::Parser;
use coil_common::names::{MAX_NAT, PIN_ROOT};
use coil_runtime::admin::ListenAddr;
use coil_runtime::telemetry::LogArgs;

use super::ports::PortRange;
use crate::args::OtherProtocols;
use crate::datapath::IcmpLimit;
use crate::datapath::timeouts::Timeouts;
use crate::desired::named_folder;

/// Translates the traffic of the clients of an Egress. Runs in the pods of its Deployment.
#[derive(Parser, Clone, Debug)]
pub struct Args {
    /// Address of the metrics server.
    #[arg(long, env = "COIL_METRICS_ADDR", default_value = ":8080")]
    pub metrics_addr: ListenAddr,
    /// Address of the health server.
    #[arg(long, env = "COIL_HEALTH_ADDR", default_value = ":8081")]
    pub health_addr: ListenAddr,
    /// UDP port of the tunnels from clients.
    #[arg(long, env = "COIL_FOU_PORT_NUMBER", default_value_t = 5555)]
    pub fou_port: u16,
    /// Derive the outer source port of replies from the flow.
    #[arg(long, env = "COIL_ENABLE_SPORT_AUTO", default_value_t = false, action = clap::ArgAction::Set,
          num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub enable_sport_auto: bool,
    /// Accepted for the sake of existing manifests; translation is always done in eBPF.
    #[arg(long, env = "COIL_BACKEND")]
    pub backend: Option<String>,
    /// Folder for pinned maps and links, on a BPF file system.
    #[arg(long, env = "COIL_BPFFS_ROOT", default_value = PIN_ROOT)]
    pub bpffs_root: PathBuf,
    /// Translations of one family that may exist at a time.
    #[arg(long, env = "COIL_MAX_NAT_ENTRIES", default_value_t = MAX_NAT as u32,
          value_parser = clap::value_parser!(u32).range(1..=1 << 26))]
    pub max_nat_entries: u32,
    /// Hand packets to the host's end of a veth `eth0` at once, past queueing disciplines, TC programs
    /// and counters of the egress of `eth0` itself.
    #[arg(long, env = "COIL_REDIRECT_PEER", default_value_t = false, action = clap::ArgAction::Set,
          num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub redirect_peer: bool,
    /// ICMP errors to clients and to remote hosts.
    #[command(flatten)]
    pub icmp: IcmpLimit,
    /// Seconds after SIGTERM in which the flows that exist may end by themselves; less than the pod's
    /// terminationGracePeriodSeconds. A second signal ends at once.
    #[arg(long, env = "COIL_DRAIN_TIMEOUT", default_value_t = 20)]
    pub drain_timeout: u64,
    /// Ports that translation may use, as FIRST-LAST: from 1024 up to the ports of this pod's own
    /// connections by default. Those, and what sockets of this pod have, are never used.
    #[arg(long, env = "COIL_NAT_PORT_RANGE", value_name = "PORTS")]
    pub nat_port_range: Option<PortRange>,
    /// Further ports that translation must not use, as a list of FIRST-LAST (NodePorts, where the
    /// address is a node's).
    #[arg(long, env = "COIL_NAT_PORT_EXCLUDE", value_name = "PORTS,...", value_delimiter = ',')]
    pub nat_port_exclude: Vec<PortRange>,
    /// Identifiers that translation may use for ICMP echo, as FIRST-LAST.
    #[arg(long, env = "COIL_NAT_ID_RANGE", value_name = "IDENTIFIERS",
          default_value_t = PortRange(0..=u16::MAX))]
    pub nat_id_range: PortRange,
    /// Translations of one family that a client may have at a time; 0 for no limit, a quarter of
    /// --max-nat-entries by default.
    #[arg(long, env = "COIL_NAT_CLIENT_FLOWS", value_name = "TRANSLATIONS")]
    pub nat_client_flows: Option<u32>,
    /// Translations that a client may have at a time to one address and port of the world; 0 for no
    /// limit, half of the ports by default.
    #[arg(long, env = "COIL_NAT_CLIENT_PORTS", value_name = "TRANSLATIONS")]
    pub nat_client_ports: Option<u32>,
    /// What happens to IP protocols other than TCP, UDP and ICMP.
    #[arg(long, env = "COIL_OTHER_PROTOCOLS", value_enum, default_value_t = OtherProtocols::Drop)]
    pub other_protocols: OtherProtocols,
    /// What happens to TCP from the middle of a connection that is not known here.
    #[arg(long, env = "COIL_TCP_MID_STREAM", value_enum, default_value_t = MidStream::Drop)]
    pub tcp_mid_stream: MidStream,
    /// How long idle translations are kept.
    #[command(flatten)]
    pub timeouts: Timeouts,
    /// Addresses of this pod, separated by commas (status.podIPs).
    #[arg(long, env = "COIL_POD_ADDRESSES")]
    pub pod_addresses: PodAddresses,
    /// Namespace of the Egress and of this pod.
    #[arg(long, env = "COIL_POD_NAMESPACE")]
    pub pod_namespace: String,
    /// Name of the Egress.
    #[arg(long, env = "COIL_EGRESS_NAME")]
    pub egress_name: String,
    /// Name of this pod.
    #[arg(long, env = "HOSTNAME", default_value = "")]
    pub pod_name: String,
    /// UID of this pod (metadata.uid); names the folder of its pins.
    #[arg(long, env = "COIL_POD_UID")]
    pub pod_uid: Option<String>,
    /// Logging.
    #[command(flatten)]
    pub log: LogArgs,
}

impl Args {
    /// Name of the folder of pins: one that `coild` can tell from those of other pods.
    #[must_use]
    pub fn pin_name(&self) -> String {
        match self.pod_uid.as_deref() {
            Some(uid) if !uid.is_empty() && !uid.contains(['/', '.']) => uid.to_owned(),
            _ => named_folder(&self.pod_namespace, &self.pod_name),
        }
    }
}

/// What happens to TCP from the middle of a connection that is not known here, since another egress pod had it, or
/// it was silent for too long.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum MidStream {
    /// It is dropped and counted: the pod finds out when it has tried for long enough.
    Drop,
    /// It is translated like the beginning of one. The remote host knows nothing of a connection from this address and
    /// resets it, so that the pod finds out at once; where the address is the same, it goes on.
    PickUp,
}

/// Addresses of a pod: at most one of each family, and at least one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PodAddresses {
    /// IPv4 address.
    pub v4: Option<Ipv4Addr>,
    /// IPv6 address.
    pub v6: Option<Ipv6Addr>,
}

/// Not a list of addresses.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("invalid address {0:?}: want IP addresses separated by commas")]
pub struct PodAddressesError(String);

impl FromStr for PodAddresses {
    type Err = PodAddressesError;

    fn from_str(text: &str) -> Result<Self, PodAddressesError> {
        let mut addresses = Self { v4: None, v6: None };
        for item in text.split(',') {
            // Of several addresses of one family the last counts, as it always has.
            match item.parse().map_err(|_| PodAddressesError(item.to_owned()))? {
                IpAddr::V4(address) => addresses.v4 = Some(address),
                IpAddr::V6(address) => addresses.v6 = Some(address),
            }
        }
        Ok(addresses)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;

    #[test]
    fn addresses_must_parse_and_the_last_of_a_family_counts() {
        let both: PodAddresses = "10.0.0.1,fd00::1,10.0.0.2".parse().unwrap();
        assert_eq!(both.v4, Some(Ipv4Addr::new(10, 0, 0, 2)));
        assert_eq!(both.v6, "fd00::1".parse().ok());
        for bad in ["", "10.0.0.1,", "ten", "10.0.0.1 ,fd00::1"] {
            assert!(bad.parse::<PodAddresses>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn flags_of_existing_manifests_are_accepted() {
        let parse = |more: &[&str]| {
            let needed = [
                "coil-egress",
                "--pod-addresses=10.0.0.1",
                "--pod-namespace=internet",
                "--egress-name=nat",
                "--pod-name=nat-abc",
            ];
            Args::try_parse_from(needed.iter().chain(more)).unwrap()
        };
        let args = parse(&["--zap-stacktrace-level=panic", "--enable-sport-auto=true", "--backend=nftables"]);
        assert!(args.enable_sport_auto);
        assert_eq!(args.pin_name(), "internet_nat-abc");
        assert!(parse(&["--enable-sport-auto"]).enable_sport_auto);
        assert!(args.drain_timeout < 30, "the pod's grace unless somebody says otherwise");
        assert!(!parse(&[]).enable_sport_auto);
        let ranges = parse(&["--nat-port-range=2000-2999", "--nat-port-exclude=2100,2200-2300"]);
        assert_eq!(ranges.nat_port_range, Some(PortRange(2000..=2999)));
        assert_eq!(ranges.nat_port_exclude, [PortRange(2100..=2100), PortRange(2200..=2300)]);
        assert_eq!(parse(&["--other-protocols=address-only"]).other_protocols, OtherProtocols::AddressOnly);
        assert_eq!(parse(&[]).tcp_mid_stream, MidStream::Drop);
        assert_eq!(parse(&["--tcp-mid-stream=pick-up"]).tcp_mid_stream, MidStream::PickUp);
        assert_eq!(parse(&[]).timeouts, Timeouts::default());
        assert_eq!(parse(&["--pod-uid=aa-bb"]).pin_name(), "aa-bb");
        assert_eq!(parse(&["--pod-uid=../x"]).pin_name(), "internet_nat-abc");
    }
}
