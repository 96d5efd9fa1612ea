//! Software with other map layouts takes over from this one, and this one from others, under traffic.

#![expect(clippy::unwrap_used, reason = "tests")]

use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;

use coil_agent::datapath::NodeOptions;
use coil_common::keys::FlowKey4;
use coil_common::names::{
    MAP_FLOWS_V4, MAP_NAT_FORWARD_V4, MAP_NAT_REVERSE_V4, MAP_PODS, NODE_MAPS, PROGRAM_FROM_POD,
};
use coil_common::values::{FlowValue, NatValue4};

use crate::support::foreign::{ForeignMap, Members};
use crate::support::topology::Topology;
use crate::support::{DEADLINE, maps};
use crate::traffic::{dump, echo_server, pattern};

const KEY: Members<'_> = &[
    ("protocol", 1, 0),
    ("version", 1, 0),
    ("src_port", 1, 2),
    ("dst", 1, 4),
    ("src", 1, 4),
    ("dst_port", 1, 2),
];

fn foreign_key(key: &FlowKey4) -> Vec<u8> {
    [&[key.protocol, 9][..], &key.src_port, &key.dst, &key.src, &key.dst_port].concat()
}

/// Counters first, a field more, `state` wider.
const FLOW: Members<'_> = &[
    ("tx_packets", 8, 0),
    ("tx_bytes", 8, 0),
    ("rx_packets", 8, 0),
    ("rx_bytes", 8, 0),
    ("state", 8, 0),
    ("gateway", 4, 0),
    ("gateway_generation", 4, 0),
    ("egress", 4, 0),
    ("set", 4, 0),
    ("created", 4, 0),
    ("last_seen", 4, 0),
    ("mood", 8, 0),
];

fn foreign_flow(flow: &FlowValue) -> Vec<u8> {
    let longs = [flow.tx_packets, flow.tx_bytes, flow.rx_packets, flow.rx_bytes, u64::from(flow.state)];
    let words =
        [flow.gateway, flow.gateway_generation, flow.egress, flow.set, flow.created, flow.last_seen, 7, 7];
    let longs = longs.into_iter().flat_map(u64::to_ne_bytes);
    longs.chain(words.into_iter().flat_map(u32::to_ne_bytes)).collect()
}

/// Packets are counted in a word only.
const NAT: Members<'_> = &[
    ("bytes", 8, 0),
    ("packets", 4, 0),
    ("state", 4, 0),
    ("last_seen", 4, 0),
    ("created", 4, 0),
    ("port", 1, 2),
    ("addr", 1, 4),
    ("rest", 1, 2),
];

fn foreign_nat(nat: &NatValue4) -> Vec<u8> {
    let packets = u32::try_from(nat.packets).unwrap();
    let words = [packets, nat.state, nat.last_seen, nat.created].into_iter().flat_map(u32::to_ne_bytes);
    let tail = [&nat.port[..], &nat.addr, &[0; 2]].concat();
    nat.bytes.to_ne_bytes().into_iter().chain(words).chain(tail).collect()
}

/// Puts a map of another layout with the same entries where one is pinned.
fn replace<V: aya::Pod>(
    folder: &Path,
    map: &str,
    value: Members<'_>,
    foreign: impl Fn(&V) -> Vec<u8>,
) -> usize {
    let entries = maps::entries::<FlowKey4, V>(folder, map);
    let other = ForeignMap::create(KEY, value, 4096);
    for (key, value) in &entries {
        other.insert(&foreign_key(key), &foreign(value));
    }
    std::fs::remove_file(folder.join(map)).unwrap();
    other.pin(&folder.join(map));
    entries.len()
}

fn exchange(stream: &mut TcpStream, sent: &mut Vec<u8>, bytes: usize) {
    let chunk = pattern(bytes);
    let mut writer = stream.try_clone().unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| writer.write_all(&chunk).unwrap());
        let mut back = vec![0; bytes];
        stream.read_exact(&mut back).unwrap();
        assert!(back == chunk);
    });
    sent.extend(chunk);
}

fn only<T>(mut entries: Vec<T>) -> T {
    assert_eq!(entries.len(), 1);
    entries.remove(0)
}

/// Flows and translations in other layouts move over: the connection goes on, and counts on.
#[test]
#[ignore = "privileged: needs root and the eBPF object"]
fn contents_of_other_layouts_move_and_a_connection_goes_on() {
    let topology = Topology::new();
    let state = topology.state();
    let (folder, gateway_folder) = (topology.bpffs.node(), topology.gateway_pins());
    let node = topology.apply(topology.open_node(None), &state);
    let gateway = topology.open_gateway();
    let (address, server) = echo_server(&topology, false);
    let mut stream = topology.client.net.run(move || TcpStream::connect_timeout(&address, DEADLINE).unwrap());
    stream.set_read_timeout(Some(DEADLINE)).unwrap();
    let mut sent = Vec::new();
    exchange(&mut stream, &mut sent, 1 << 20);
    drop((node, gateway));

    let (key, before) = only(maps::entries::<FlowKey4, FlowValue>(&folder, MAP_FLOWS_V4));
    let nat = only(maps::entries::<FlowKey4, NatValue4>(&gateway_folder, MAP_NAT_REVERSE_V4));
    assert_eq!(replace(&folder, MAP_FLOWS_V4, FLOW, foreign_flow), 1);
    assert_eq!(replace(&gateway_folder, MAP_NAT_FORWARD_V4, NAT, foreign_nat), 1);
    assert_eq!(replace(&gateway_folder, MAP_NAT_REVERSE_V4, NAT, foreign_nat), 1);

    let node = topology.open_node(None);
    assert!(folder.join("next/live").exists(), "on its way until the programs are replaced");
    let node = topology.apply(node, &state);
    let gateway = topology.open_gateway();
    for folder in [&folder, &gateway_folder] {
        assert!(!folder.join("next").exists());
    }
    let (new_key, after) = only(maps::entries::<FlowKey4, FlowValue>(&folder, MAP_FLOWS_V4));
    assert_eq!(new_key, key);
    // What is foreign in the old layout is nowhere, and what it lacks is zero.
    assert_eq!(foreign_flow(&after), foreign_flow(&before));
    let (_, moved) = only(maps::entries::<FlowKey4, NatValue4>(&gateway_folder, MAP_NAT_REVERSE_V4));
    assert_eq!(foreign_nat(&moved), foreign_nat(&nat.1));

    exchange(&mut stream, &mut sent, 1 << 20);
    let (_, later) = only(maps::entries::<FlowKey4, FlowValue>(&folder, MAP_FLOWS_V4));
    assert!(later.tx_packets > after.tx_packets && later.rx_bytes > after.rx_bytes + (1 << 20));
    let (_, later) = only(maps::entries::<FlowKey4, NatValue4>(&gateway_folder, MAP_NAT_REVERSE_V4));
    assert!(later.bytes > nat.1.bytes + (1 << 20));
    assert_eq!(maps::all_drops(&folder), []);
    assert_eq!(maps::all_drops(&gateway_folder), [], "{}", dump(&topology));
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    let (peer, arrived) = server.join().unwrap();
    assert_eq!(peer.ip(), topology.gateway.address(false));
    assert!(arrived == sent);
    drop((node, gateway));
}

fn flow(port: u16) -> (FlowKey4, FlowValue) {
    let key =
        FlowKey4 { src: [10, 1, 0, 9], src_port: port.to_be_bytes(), protocol: 17, ..FlowKey4::default() };
    (key, FlowValue { tx_packets: u64::from(port), last_seen: 5, ..FlowValue::default() })
}

/// Broken off before any program used the new maps: as if nothing had been.
#[test]
#[ignore = "privileged: needs root and the eBPF object"]
fn a_change_that_nobody_uses_yet_is_undone() {
    let topology = Topology::new();
    let folder = topology.bpffs.node();
    drop(topology.apply(topology.open_node(None), &topology.state()));
    let next = folder.join("next");
    std::fs::create_dir(&next).unwrap();
    ForeignMap::create(KEY, FLOW, 16).pin(&next.join(MAP_FLOWS_V4));
    let (node, report) = topology.try_apply(topology.open_node(None), &topology.state());
    assert_eq!(report.operations, 0, "{report:?}");
    assert!(!next.exists());
    drop(node);
}

/// Broken off while programs used the new maps: completed, with what only the old ones hold.
#[test]
#[ignore = "privileged: needs root and the eBPF object"]
fn a_change_that_is_in_use_is_completed() {
    let topology = Topology::new();
    let folder = topology.bpffs.node();
    drop(topology.apply(topology.open_node(None), &topology.state()));
    let next = folder.join("next");
    std::fs::create_dir_all(next.join("live")).unwrap();
    std::fs::rename(folder.join(MAP_FLOWS_V4), next.join(MAP_FLOWS_V4)).unwrap();
    std::fs::rename(folder.join(MAP_PODS), next.join(MAP_PODS)).unwrap();
    let old = ForeignMap::create(KEY, FLOW, 16);
    for (key, value) in [flow(1), flow(2)] {
        old.insert(&foreign_key(&key), &foreign_flow(&value));
    }
    old.pin(&folder.join(MAP_FLOWS_V4));
    let (node, report) = topology.try_apply(topology.open_node(None), &topology.state());
    // The agent's own maps are as they were.
    assert_eq!(report.operations, 0, "{report:?}");
    assert!(!next.exists());
    for map in NODE_MAPS {
        maps::open(&folder, map);
    }
    let mut entries = maps::entries::<FlowKey4, FlowValue>(&folder, MAP_FLOWS_V4);
    entries.sort_by_key(|(key, _)| *key);
    assert_eq!(entries, [flow(1), flow(2)]);
    drop(node);
}

/// More room is given to a table that is in use; less is not, since its entries might not fit.
#[test]
#[ignore = "privileged: needs root and the eBPF object"]
fn tables_grow_with_their_entries_and_do_not_shrink() {
    let topology = Topology::new();
    let folder = topology.bpffs.node();
    let open = |max_flows| {
        let options = NodeOptions { max_flows, ..topology.node_options() };
        let node = topology.node.run(move || coil_agent::datapath::NodeDatapath::open(options)).unwrap();
        drop(topology.apply(node, &topology.state()));
        let map = aya::maps::MapData::from_pin(folder.join(MAP_FLOWS_V4)).unwrap();
        (map.info().unwrap().max_entries(), maps::entries::<FlowKey4, FlowValue>(&folder, MAP_FLOWS_V4))
    };
    assert_eq!(open(64).0, 64);
    let entry = flow(3);
    let mut map: aya::maps::HashMap<_, FlowKey4, FlowValue> =
        maps::open(&folder, MAP_FLOWS_V4).try_into().unwrap();
    map.insert(entry.0, entry.1, 0).unwrap();
    assert_eq!(open(128), (128, vec![entry]));
    assert_eq!(open(64), (128, vec![entry]));
    let index = topology.state().pods["client-uid"].ifindex;
    assert!(folder.join("links").join(format!("{index}-{PROGRAM_FROM_POD}")).exists());
}
