//! The world in which packets are fuzzed: a pod with a policy set, its gateway, another client, and remote
//! hosts, in both families. What the programs are told of it are map entries; what the model is told are
//! the same facts in plain words.

use std::net::IpAddr;

use coil_common::{
    config::{CONFIG_IPIP, Config},
    keys::{ClientKey4, ClientKey6, PeerKey4, PeerKey6, PolicyKey4, PolicyKey6},
    names,
    values::{
        ClientValue, EGRESS_BLOCK, EGRESS_DIRECT, EGRESS_SOURCE_PORT_AUTO, EgressValue, GATEWAY_READY,
        GatewayValue, MAGLEV_SLOTS, PodValue, PolicyValue,
    },
};

use crate::testing::{
    build::FOU,
    entries::{Entry, Key, Value},
    scenario::{Hook, IFINDEX, Scenario},
    scenarios::scenarios,
};

/// Policy set of the pod.
const SET: u32 = 7;
/// Largest packet in this world.
pub const MTU: usize = 1500;
/// Ports that translation does not use.
pub const EXCLUDED: [u16; 3] = [FOU, 8080, 8081];

/// Addresses of one family.
#[derive(Clone, Copy, Debug)]
pub struct Hosts {
    /// The pod.
    pub pod: IpAddr,
    /// Another client of the gateway.
    pub other: IpAddr,
    /// The gateway whose program runs.
    pub gateway: IpAddr,
    /// Another gateway of the pod.
    pub second: IpAddr,
    /// Nobody in particular.
    pub stranger: IpAddr,
    /// Destinations, one for each that policy can say.
    pub remotes: [IpAddr; 12],
}

/// What policy says about a destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Says {
    /// It leaves as it is.
    Direct,
    /// Dropped.
    Block,
    /// Through the egress with this number.
    Egress(u32),
}

/// An Egress.
#[derive(Clone, Copy, Debug)]
pub struct Egress {
    /// Its number; the index in the tables is twice that, and one more for IPv6.
    pub id: u32,
    /// Its gateways: the first, the second, or both in turn.
    pub gateways: (bool, bool),
    /// The outer source port follows the flow.
    pub auto: bool,
}

/// An Egress that policies name and that does not exist: there is no room for so many.
const NOWHERE: u32 = 60_000;

/// All of them.
pub const EGRESSES: [Egress; 4] = [
    Egress { id: 1, gateways: (true, false), auto: false },
    Egress { id: 2, gateways: (true, true), auto: true },
    Egress { id: 3, gateways: (false, true), auto: false },
    Egress { id: 4, gateways: (false, false), auto: false },
];

const fn v4(a: u8, b: u8, c: u8, d: u8) -> IpAddr {
    IpAddr::V4(std::net::Ipv4Addr::new(a, b, c, d))
}

const fn v6(a: u16, b: u16, c: u16, d: u16) -> IpAddr {
    IpAddr::V6(std::net::Ipv6Addr::new(a, b, c, 0, 0, 0, 0, d))
}

/// Addresses of IPv4.
pub const V4: Hosts = Hosts {
    pod: v4(10, 1, 0, 2),
    other: v4(10, 1, 0, 3),
    gateway: v4(10, 2, 0, 2),
    second: v4(10, 2, 0, 9),
    stranger: v4(10, 3, 0, 3),
    remotes: [
        v4(192, 0, 2, 2),
        v4(192, 0, 2, 3),
        v4(203, 0, 113, 5),
        v4(203, 0, 113, 77),
        v4(10, 9, 0, 9),
        v4(10, 9, 9, 9),
        v4(10, 9, 9, 1),
        v4(198, 51, 100, 1),
        v4(198, 51, 100, 200),
        v4(192, 88, 99, 1),
        v4(224, 0, 0, 5),
        v4(169, 254, 1, 1),
    ],
};

/// Addresses of IPv6.
pub const V6: Hosts = Hosts {
    pod: v6(0xfd01, 0, 0, 2),
    other: v6(0xfd01, 0, 0, 3),
    gateway: v6(0xfd02, 0, 0, 2),
    second: v6(0xfd02, 0, 0, 9),
    stranger: v6(0xfd03, 0, 0, 3),
    remotes: [
        v6(0x2001, 0xdb8, 0, 2),
        v6(0x2001, 0xdb8, 0, 3),
        v6(0x2001, 0xdb8, 0xa, 5),
        v6(0x2001, 0xdb8, 0xa, 0x77),
        v6(0xfd09, 0, 0, 9),
        v6(0xfd09, 0x9, 0, 9),
        v6(0xfd09, 0x9, 0, 1),
        v6(0x2001, 0xdb8, 0xb, 1),
        v6(0x2001, 0xdb8, 0xb, 0x200),
        v6(0x2001, 0xdb8, 0xc, 1),
        v6(0xff02, 0, 0, 5),
        v6(0xfe80, 0, 0, 1),
    ],
};

/// Addresses of a family.
#[must_use]
pub const fn hosts(is_v6: bool) -> &'static Hosts {
    if is_v6 { &V6 } else { &V4 }
}

/// The policy of the pod, prefix by prefix, in no order: the longest that matches says what holds.
#[must_use]
pub fn policy(is_v6: bool) -> Vec<(IpAddr, u32, Says)> {
    use Says::{Block, Direct, Egress};
    if is_v6 {
        return vec![
            (v6(0, 0, 0, 0), 0, Egress(1)),
            (v6(0x2001, 0xdb8, 0xa, 0), 48, Egress(2)),
            (v6(0x2001, 0xdb8, 0xa, 0x77), 128, Egress(3)),
            (v6(0xfd00, 0, 0, 0), 8, Direct),
            (v6(0xfd09, 0x9, 0, 0), 32, Egress(1)),
            (v6(0xfd09, 0x9, 0, 1), 128, Direct),
            (v6(0x2001, 0xdb8, 0xb, 0), 48, Block),
            (v6(0x2001, 0xdb8, 0xb, 0x200), 119, Egress(4)),
            (v6(0x2001, 0xdb8, 0xc, 0), 48, Egress(NOWHERE)),
        ];
    }
    vec![
        (v4(0, 0, 0, 0), 0, Egress(1)),
        (v4(203, 0, 113, 0), 24, Egress(2)),
        (v4(203, 0, 113, 77), 32, Egress(3)),
        (v4(10, 0, 0, 0), 8, Direct),
        (v4(10, 9, 9, 0), 24, Egress(1)),
        (v4(10, 9, 9, 1), 32, Direct),
        (v4(198, 51, 100, 0), 24, Block),
        (v4(198, 51, 100, 128), 25, Egress(4)),
        (v4(192, 88, 99, 0), 24, Egress(NOWHERE)),
    ]
}

/// What the programs are configured with, and what is in their maps at the start.
#[derive(Clone, Debug)]
pub struct World {
    /// Of the node.
    pub node: Config,
    /// Of the gateway.
    pub gateway: Config,
    /// Of the node.
    pub node_entries: Vec<Entry>,
    /// Of the gateway.
    pub gateway_entries: Vec<Entry>,
}

fn octets4(address: IpAddr) -> [u8; 4] {
    match address {
        IpAddr::V4(address) => address.octets(),
        IpAddr::V6(_) => [0; 4],
    }
}

fn octets6(address: IpAddr) -> [u8; 16] {
    match address {
        IpAddr::V6(address) => address.octets(),
        IpAddr::V4(_) => [0; 16],
    }
}

fn policy_entry(address: IpAddr, length: u32, says: Says) -> Entry {
    let egress = match says {
        Says::Direct => EGRESS_DIRECT,
        Says::Block => EGRESS_BLOCK,
        Says::Egress(id) => id * 2 + u32::from(address.is_ipv6()),
    };
    let set = SET.to_be_bytes();
    let (map, key) = if address.is_ipv4() {
        (names::MAP_POLICY_V4, Key::prefix(32 + length, &PolicyKey4 { set, dst: octets4(address) }))
    } else {
        (names::MAP_POLICY_V6, Key::prefix(32 + length, &PolicyKey6 { set, dst: octets6(address) }))
    };
    Entry { map, key, value: Value::of(&PolicyValue { egress }) }
}

/// Index of a gateway in the tables.
fn gateway_index(second: bool, is_v6: bool) -> u16 {
    4 + u16::from(second) * 2 + u16::from(is_v6)
}

fn node_entries() -> Vec<Entry> {
    let pod = PodValue {
        ipv4: octets4(V4.pod),
        ipv6: octets6(V6.pod),
        set: SET,
        flags: 0,
        mtu: u32::try_from(MTU).unwrap_or(0),
    };
    let mut entries = vec![Entry::new(names::MAP_PODS, &IFINDEX, &pod)];
    for is_v6 in [false, true] {
        let hosts = hosts(is_v6);
        entries.extend(policy(is_v6).into_iter().map(|(to, length, says)| policy_entry(to, length, says)));
        for egress in EGRESSES {
            let both = egress.gateways == (true, true);
            let table = std::array::from_fn::<u16, MAGLEV_SLOTS, _>(|slot| {
                gateway_index(if both { slot % 2 == 1 } else { egress.gateways.1 }, is_v6)
            });
            let gateways = u16::from(egress.gateways.0) + u16::from(egress.gateways.1);
            let flags = if egress.auto { EGRESS_SOURCE_PORT_AUTO } else { 0 };
            let index = egress.id * 2 + u32::from(is_v6);
            entries.push(Entry::new(names::MAP_EGRESSES, &index, &EgressValue { flags, gateways, table }));
        }
        for (second, address) in [(false, hosts.gateway), (true, hosts.second)] {
            let mut addr = octets6(address);
            if !is_v6 {
                addr[..4].copy_from_slice(&octets4(address));
            }
            let index = u32::from(gateway_index(second, is_v6));
            let value = GatewayValue { addr, generation: 3, state: GATEWAY_READY };
            entries.push(Entry::new(names::MAP_GATEWAYS, &index, &value));
            entries.push(if is_v6 {
                Entry::new(names::MAP_PEERS_V6, &PeerKey6 { set: SET, addr: octets6(address) }, &index)
            } else {
                Entry::new(names::MAP_PEERS_V4, &PeerKey4 { set: SET, addr: octets4(address) }, &index)
            });
        }
    }
    entries
}

fn gateway_entries() -> Vec<Entry> {
    let value = ClientValue::default();
    let four = [V4.pod, V4.other]
        .map(|client| Entry::new(names::MAP_CLIENTS_V4, &ClientKey4 { addr: octets4(client) }, &value));
    let six = [V6.pod, V6.other]
        .map(|client| Entry::new(names::MAP_CLIENTS_V6, &ClientKey6 { addr: octets6(client) }, &value));
    four.into_iter().chain(six).collect()
}

impl World {
    /// The world; `narrow`: translation has nine ports, and the node speaks IP in IP.
    #[must_use]
    pub fn new(narrow: bool) -> Self {
        // Whatever a gateway needs is in the scenario table.
        let all = scenarios();
        let scenario = |family: &str| -> Option<&Scenario> {
            all.iter().find(|scenario| scenario.hook == Hook::Gateway && scenario.name.contains(family))
        };
        let (four, six) = (scenario(" v4: UDP"), scenario(" v6: UDP"));
        let mut gateway = four.map(|scenario| scenario.config).unwrap_or_default();
        gateway.ipv4 = octets4(V4.gateway);
        gateway.ipv6 = octets6(V6.gateway);
        gateway.mtu = u32::try_from(MTU).unwrap_or(0);
        if narrow {
            (gateway.nat_port_first, gateway.nat_port_last) = NARROW;
        }
        let of_scenarios = four.into_iter().chain(six).flat_map(|scenario| scenario.entries.clone());
        let mut entries: Vec<_> = of_scenarios.filter(|entry| !entry.map.starts_with("clients_")).collect();
        entries.extend(gateway_entries());
        Self {
            node: Config {
                fou_port: FOU.to_be_bytes(),
                seed: 42,
                flags: if narrow { CONFIG_IPIP } else { 0 },
                timeouts: gateway.timeouts,
                ..Config::default()
            },
            gateway,
            node_entries: node_entries(),
            gateway_entries: entries,
        }
    }
}

/// The ports of translation in a narrow world.
pub const NARROW: (u16, u16) = (8078, 8086);
/// The ports of translation otherwise.
pub const WIDE: (u16, u16) = (1024, 65535);
