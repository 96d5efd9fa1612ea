//! What is measured: tables and packets of each path, both families.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use bytemuck::bytes_of;
use coil_common::config::Config;
use coil_common::keys::{
    ClientKey4, ClientKey6, FlowKey4, FlowKey6, POLICY_SET_BITS, PeerKey4, PeerKey6, PolicyKey4, PolicyKey6,
};
use coil_common::names;
use coil_common::values::{
    ClientValue, EgressValue, FlowValue, GATEWAY_READY, GatewayValue, MAGLEV_SLOTS, NatValue4, NatValue6,
    PodSlot, PodValue, PolicyValue,
};

/// Index of the interface that `BPF_PROG_TEST_RUN` gives its packets: the loopback device.
pub const IFINDEX: u32 = 1;
/// Port of the tunnel.
pub const FOU: u16 = 5555;
/// Policy set of the pod.
pub const SET: u32 = 1;
const UDP: u8 = 17;
const PORTS: (u16, u16) = (40_000, 443);
/// Payload of the packets: small ones show what a packet costs.
pub const PAYLOAD: usize = 64;

/// An entry of a map.
pub struct Entry {
    /// Name of the map.
    pub map: &'static str,
    /// Key.
    pub key: Vec<u8>,
    /// Value.
    pub value: Vec<u8>,
}

/// A path through a program.
pub struct Path {
    /// What it is.
    pub name: String,
    /// The program.
    pub program: &'static str,
    /// The packet.
    pub frame: Vec<u8>,
    /// Entries to remove before each run: what the run itself makes.
    pub forget: Vec<(&'static str, Vec<u8>)>,
    /// What the program must return.
    pub action: i32,
}

/// `TC_ACT_UNSPEC`
pub const NEXT: i32 = -1;
/// `TC_ACT_REDIRECT`
pub const REDIRECT: i32 = 7;

/// A family's addresses.
struct Cast {
    name: &'static str,
    client: IpAddr,
    gateway: IpAddr,
    world: IpAddr,
    elsewhere: IpAddr,
}

fn casts() -> [Cast; 2] {
    [
        Cast {
            name: "v4",
            client: Ipv4Addr::new(10, 244, 1, 5).into(),
            gateway: Ipv4Addr::new(10, 244, 2, 7).into(),
            world: Ipv4Addr::new(203, 0, 113, 10).into(),
            elsewhere: Ipv4Addr::new(198, 51, 100, 10).into(),
        },
        Cast {
            name: "v6",
            client: Ipv6Addr::new(0xfd00, 0x10, 0x244, 1, 0, 0, 0, 5).into(),
            gateway: Ipv6Addr::new(0xfd00, 0x10, 0x244, 2, 0, 0, 0, 7).into(),
            world: Ipv6Addr::new(0x2001, 0xdb8, 0xffff, 0, 0, 0, 0, 0x10).into(),
            elsewhere: Ipv6Addr::new(0x2001, 0xdb8, 0xeeee, 0, 0, 0, 0, 0x10).into(),
        },
    ]
}

/// The client pod and the gateway, IPv4.
pub fn ends() -> (IpAddr, IpAddr) {
    let [v4, _] = casts();
    (v4.client, v4.gateway)
}

/// Configuration of the programs.
pub fn config() -> Config {
    let [v4, v6] = casts();
    Config {
        ipv4: four(v4.gateway),
        ipv6: sixteen(v6.gateway),
        fou_port: FOU.to_be_bytes(),
        nat_port_first: 1024,
        nat_port_last: 64_511,
        nat_id_last: u16::MAX,
        mtu: 1500,
        seed: 1,
        ..Config::default()
    }
}

/// Tables in which each path finds what it looks for.
pub fn entries() -> Vec<Entry> {
    let [v4, v6] = casts();
    let pod = PodValue { ipv4: four(v4.client), ipv6: sixteen(v6.client), set: SET, flags: 0, mtu: 1500 };
    let slot = PodSlot { ifindex: IFINDEX, pod };
    let mut entries = vec![
        Entry { map: names::MAP_PODS, key: IFINDEX.to_ne_bytes().into(), value: bytes_of(&pod).into() },
        Entry {
            map: names::MAP_POD_SLOTS,
            key: names::pod_slot(IFINDEX).to_ne_bytes().into(),
            value: bytes_of(&slot).into(),
        },
    ];
    for (family, cast) in [v4, v6].iter().enumerate() {
        let family = u32::try_from(family).expect("two families");
        let v4 = cast.client.is_ipv4();
        let pick = |four: &'static str, six: &'static str| if v4 { four } else { six };
        let mut prefix = (POLICY_SET_BITS + if v4 { 24 } else { 48 }).to_ne_bytes().to_vec();
        if v4 {
            prefix.extend(bytes_of(&PolicyKey4 { set: SET.to_be_bytes(), dst: four(cast.world) }));
        } else {
            prefix.extend(bytes_of(&PolicyKey6 { set: SET.to_be_bytes(), dst: sixteen(cast.world) }));
        }
        let mut put = |map, key: Vec<u8>, value: &[u8]| entries.push(Entry { map, key, value: value.into() });
        put(
            pick(names::MAP_POLICY_V4, names::MAP_POLICY_V6),
            prefix,
            bytes_of(&PolicyValue { egress: family }),
        );
        put(
            names::MAP_EGRESSES,
            family.to_ne_bytes().into(),
            bytes_of(&EgressValue {
                flags: 0,
                gateways: 1,
                table: [u16::try_from(family).expect("two families"); MAGLEV_SLOTS],
            }),
        );
        put(
            names::MAP_GATEWAYS,
            family.to_ne_bytes().into(),
            bytes_of(&GatewayValue { addr: sixteen(cast.gateway), generation: 1, state: GATEWAY_READY }),
        );
        let index = bytes_of(&family).to_vec();
        if v4 {
            put(
                names::MAP_PEERS_V4,
                bytes_of(&PeerKey4 { set: SET, addr: four(cast.gateway) }).into(),
                &index,
            );
            let client = bytes_of(&ClientKey4 { addr: four(cast.client) }).into();
            put(names::MAP_CLIENTS_V4, client, bytes_of(&ClientValue::default()));
        } else {
            put(
                names::MAP_PEERS_V6,
                bytes_of(&PeerKey6 { set: SET, addr: sixteen(cast.gateway) }).into(),
                &index,
            );
            let client = bytes_of(&ClientKey6 { addr: sixteen(cast.client) }).into();
            put(names::MAP_CLIENTS_V6, client, bytes_of(&ClientValue::default()));
        }
        let flow = FlowValue {
            set: SET,
            egress: family,
            gateway: family,
            gateway_generation: 1,
            ..FlowValue::default()
        };
        put(
            pick(names::MAP_FLOWS_V4, names::MAP_FLOWS_V6),
            key(cast.client, cast.world, PORTS),
            bytes_of(&flow),
        );
        let forward = key(cast.client, cast.world, PORTS);
        let reverse = key(cast.world, cast.gateway, (PORTS.1, PORTS.0));
        let port = PORTS.0.to_be_bytes();
        if v4 {
            let nat = |addr| NatValue4 { addr: four(addr), port, ..NatValue4::default() };
            put(names::MAP_NAT_FORWARD_V4, forward, bytes_of(&nat(cast.gateway)));
            put(names::MAP_NAT_REVERSE_V4, reverse, bytes_of(&nat(cast.client)));
        } else {
            let nat = |addr| NatValue6 { addr: sixteen(addr), port, ..NatValue6::default() };
            put(names::MAP_NAT_FORWARD_V6, forward, bytes_of(&nat(cast.gateway)));
            put(names::MAP_NAT_REVERSE_V6, reverse, bytes_of(&nat(cast.client)));
        }
    }
    entries
}

/// The paths.
pub fn paths() -> Vec<Path> {
    let fresh = (50_000, PORTS.1);
    let mut paths = Vec::new();
    for cast in casts() {
        let Cast { name, client, gateway, world, elsewhere } = cast;
        let v4 = client.is_ipv4();
        let pick = |four: &'static str, six: &'static str| if v4 { four } else { six };
        let mut path = |what: &str, program, packet: Vec<u8>, forget, action| {
            paths.push(Path {
                name: format!("{program} {name} {what}"),
                program,
                frame: frame(v4, &packet),
                forget,
                action,
            });
        };
        let out = udp(client, world, PORTS, &[0; PAYLOAD]);
        let back = udp(world, client, (PORTS.1, PORTS.0), &[0; PAYLOAD]);
        let outer = (FOU, FOU);
        path(
            "no egress for the destination",
            names::PROGRAM_FROM_POD,
            udp(client, elsewhere, PORTS, &[0; PAYLOAD]),
            vec![],
            NEXT,
        );
        path("established flow", names::PROGRAM_FROM_POD, out.clone(), vec![], NEXT);
        let flows = pick(names::MAP_FLOWS_V4, names::MAP_FLOWS_V6);
        path(
            "new flow",
            names::PROGRAM_FROM_POD,
            udp(client, world, fresh, &[0; PAYLOAD]),
            vec![(flows, key(client, world, fresh))],
            NEXT,
        );
        path("not tunnelled", names::PROGRAM_TO_POD, back.clone(), vec![], NEXT);
        path("established flow", names::PROGRAM_TO_POD, udp(gateway, client, outer, &back), vec![], NEXT);
        path(
            "own traffic",
            names::PROGRAM_GATEWAY,
            udp(elsewhere, gateway, PORTS, &[0; PAYLOAD]),
            vec![],
            NEXT,
        );
        path(
            "established flow, out",
            names::PROGRAM_GATEWAY,
            udp(client, gateway, outer, &out),
            vec![],
            REDIRECT,
        );
        path(
            "established flow, back",
            names::PROGRAM_GATEWAY,
            udp(world, gateway, (PORTS.1, PORTS.0), &[0; PAYLOAD]),
            vec![],
            REDIRECT,
        );
        let forget = vec![
            (pick(names::MAP_NAT_FORWARD_V4, names::MAP_NAT_FORWARD_V6), key(client, world, fresh)),
            (
                pick(names::MAP_NAT_REVERSE_V4, names::MAP_NAT_REVERSE_V6),
                key(world, gateway, (fresh.1, fresh.0)),
            ),
        ];
        let new = udp(client, world, fresh, &[0; PAYLOAD]);
        path("new flow", names::PROGRAM_GATEWAY, udp(client, gateway, outer, &new), forget, REDIRECT);
    }
    paths
}

/// Key of a flow of UDP.
pub fn key(src: IpAddr, dst: IpAddr, (src_port, dst_port): (u16, u16)) -> Vec<u8> {
    let (src_port, dst_port) = (src_port.to_be_bytes(), dst_port.to_be_bytes());
    if src.is_ipv4() {
        let key = FlowKey4 { src: four(src), dst: four(dst), src_port, dst_port, protocol: UDP, pad: [0; 3] };
        bytes_of(&key).into()
    } else {
        let key =
            FlowKey6 { src: sixteen(src), dst: sixteen(dst), src_port, dst_port, protocol: UDP, pad: [0; 3] };
        bytes_of(&key).into()
    }
}

/// An IPv4 address; zeros for another.
pub fn four(address: IpAddr) -> [u8; 4] {
    match address {
        IpAddr::V4(address) => address.octets(),
        IpAddr::V6(_) => [0; 4],
    }
}

/// An IPv6 address, or an IPv4 address in the first four bytes.
fn sixteen(address: IpAddr) -> [u8; 16] {
    let mut bytes = [0; 16];
    match address {
        IpAddr::V4(address) => bytes[..4].copy_from_slice(&address.octets()),
        IpAddr::V6(address) => bytes = address.octets(),
    }
    bytes
}

/// A packet with an Ethernet header.
pub fn frame(v4: bool, packet: &[u8]) -> Vec<u8> {
    let kind: [u8; 2] = if v4 { [0x08, 0x00] } else { [0x86, 0xdd] };
    [&[2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2], kind.as_slice(), packet].concat()
}

/// A UDP packet without a UDP checksum: none of the measured paths depends on it.
pub fn udp(src: IpAddr, dst: IpAddr, (src_port, dst_port): (u16, u16), payload: &[u8]) -> Vec<u8> {
    let length = u16::try_from(8 + payload.len()).expect("small packets");
    let mut packet = match (src, dst) {
        (IpAddr::V4(src), IpAddr::V4(dst)) => {
            let mut header = vec![0x45, 0];
            header.extend((20 + length).to_be_bytes());
            header.extend([0, 1, 0x40, 0, 64, UDP, 0, 0]);
            header.extend(src.octets());
            header.extend(dst.octets());
            let sum: u32 =
                header.chunks(2).map(|word| u32::from(u16::from_be_bytes([word[0], word[1]]))).sum();
            let sum = !(((sum & 0xffff) + (sum >> 16)) as u16);
            header[10..12].copy_from_slice(&sum.to_be_bytes());
            header
        }
        (IpAddr::V6(src), IpAddr::V6(dst)) => {
            let mut header = vec![0x60, 0, 0, 0];
            header.extend(length.to_be_bytes());
            header.extend([UDP, 64]);
            header.extend(src.octets());
            header.extend(dst.octets());
            header
        }
        _ => Vec::new(),
    };
    packet.extend(src_port.to_be_bytes());
    packet.extend(dst_port.to_be_bytes());
    packet.extend(length.to_be_bytes());
    // Not zero, so that NAT has a checksum to correct.
    packet.extend(if dst_port == FOU { [0, 0] } else { [0x12, 0x34] });
    packet.extend(payload);
    packet
}
