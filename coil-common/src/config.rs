//! Constants of a loaded program: set once before load, read-only to the datapath.

use bytemuck::{Pod, Zeroable};

use crate::pod::shared;

/// Name of the read-only variable that holds the [`Config`].
pub const CONFIG: &str = "CONFIG";

/// What the programs of one object are configured with.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct Config {
    /// Source of ICMP errors to pods: the node's IPv4 address (node), or the pod's own (gateway).
    /// All zero: errors are sent with the destination of the packet that they are about.
    pub ipv4: [u8; 4],
    /// The same for IPv6. In a gateway `ipv4` and `ipv6` are also the addresses that it translates to.
    pub ipv6: [u8; 16],
    /// UDP port of FOU, big endian.
    pub fou_port: [u8; 2],
    /// First port that NAT may use, native endian. Exceptions are in the map `excluded_ports`.
    pub nat_port_first: u16,
    /// Last port that NAT may use, native endian.
    pub nat_port_last: u16,
    /// First identifier of ICMP echo that NAT may use, native endian.
    pub nat_id_first: u16,
    /// Last identifier of ICMP echo that NAT may use, native endian.
    pub nat_id_last: u16,
    /// Zero.
    pub pad: [u8; 2],
    /// Largest IP packet in bytes that may leave a gateway, outer headers included.
    pub mtu: u32,
    /// `CONFIG_*` bits.
    pub flags: u32,
    /// Makes hashes of this boot unpredictable.
    pub seed: u32,
    /// ICMP errors that may be sent each second and processor; 0 for no limit.
    pub icmp_rate: u32,
    /// ICMP errors that may be sent at once after a quiet time, each processor.
    pub icmp_burst: u32,
    /// Translations of one family beyond which a gateway makes no new ones; 0 for no limit.
    pub nat_admit: u32,
    /// Translations of one family that a client of a gateway may have; 0 for no limit.
    pub nat_client_flows: u32,
    /// Translations that a client of a gateway may have to one address and port; 0 for no limit.
    pub nat_client_ports: u32,
    /// Egress flows of one family that a pod of a node may have; 0 for no limit.
    pub pod_flows: u32,
    /// Seconds that idle flows are kept, by kind: what the agent goes by, for whoever lists them. Programs look at that of
    /// [`FRAGMENT_TIMEOUT`] alone.
    pub timeouts: [u32; TIMEOUTS],
}

/// Kinds of idle flows that have times of their own.
pub const TIMEOUTS: usize = 12;
/// Index in [`Config::timeouts`] of the seconds for which later fragments may follow the first.
pub const FRAGMENT_TIMEOUT: usize = 11;

/// [`Config::icmp_rate`] unless configured otherwise.
pub const DEFAULT_ICMP_RATE: u32 = 250;
/// [`Config::icmp_burst`] unless configured otherwise.
pub const DEFAULT_ICMP_BURST: u32 = 100;

/// [`Config::flags`]: a gateway derives the outer source port of replies from the flow.
pub const CONFIG_SOURCE_PORT_AUTO: u32 = 1 << 0;
/// [`Config::flags`]: pods of the node send to gateways by IP in IP, not by FOU. Both are received, and a
/// gateway answers as it was spoken to.
pub const CONFIG_IPIP: u32 = 1 << 1;
/// [`Config::flags`]: packets of established flows go to gateways of the same node, and back, without a tunnel.
pub const CONFIG_NEAR: u32 = 1 << 2;
/// [`Config::flags`]: a gateway hands packets to the other end of its interface, past its own egress.
pub const CONFIG_REDIRECT_PEER: u32 = 1 << 8;
/// [`Config::flags`]: a node sends tunnelled packets of flows that were answered past its IP stack.
pub const CONFIG_SHORTCUT: u32 = 1 << 9;
/// [`Config::flags`]: the kernel cuts datagrams that left in one piece, whose checksums are not left to it, and sums
/// them right; see `take_off_sum` of the datapath.
pub const CONFIG_CUT: u32 = 1 << 5;
/// [`Config::flags`]: TCP from the middle of a connection that a gateway does not know makes a translation too.
pub const CONFIG_PICK_UP: u32 = 1 << 6;
/// [`Config::flags`]: IP protocols without ports that are known here are translated by address alone.
pub const CONFIG_ADDRESS_ONLY: u32 = 1 << 4;

shared! { Config = 116 }
