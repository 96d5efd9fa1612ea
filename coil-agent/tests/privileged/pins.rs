//! Pins that are not what they should be.

#![expect(clippy::unwrap_used, clippy::panic, reason = "tests")]

use std::collections::BTreeSet;

use aya::maps::{HashMap, MapData};
use coil_agent::datapath::{Datapath, DatapathError, LoadError, NodeDatapath, PinError};
use coil_agent::desired::named_folder;
use coil_agent::gateway::datapath::GatewayOptions;
use coil_common::names::{MAP_PEERS_V4, MAP_PODS, NODE_MAPS, PROGRAM_FROM_POD};

use crate::support::maps;
use crate::support::topology::Topology;

fn open_error(topology: &Topology) -> DatapathError {
    let options = topology.node_options();
    match topology.node.run(move || NodeDatapath::open(options).err()) {
        Some(error) => error,
        None => panic!("a bad pin was accepted"),
    }
}

#[test]
#[ignore = "privileged: needs root and the eBPF object"]
fn maps_of_another_layout_are_refused_by_name() {
    let topology = Topology::new();
    std::fs::create_dir_all(topology.bpffs.node()).unwrap();
    let map: HashMap<MapData, u32, u32> = HashMap::create(16, 0).unwrap();
    let path = topology.bpffs.node().join(MAP_PODS);
    map.pin(&path).unwrap();
    let error = open_error(&topology);
    assert!(matches!(&error, DatapathError::Load(LoadError::Migration(_))), "{error:?}");
    assert!(error.to_string().contains("v1/pods"), "{error}");
    // Something that is no map at all.
    std::fs::remove_file(&path).unwrap();
    drop(topology.open_node(None));
    let node = topology.apply(topology.open_node(None), &topology.state());
    let index = topology.state().pods["client-uid"].ifindex;
    let link = topology.bpffs.node().join("links").join(format!("{index}-{PROGRAM_FROM_POD}"));
    drop(node);
    std::fs::remove_file(&path).unwrap();
    std::fs::rename(&link, &path).unwrap();
    let error = open_error(&topology);
    assert!(matches!(&error, DatapathError::Load(LoadError::NotAMap { .. })), "{error:?}");
}

#[test]
#[ignore = "privileged: needs root and the eBPF object"]
fn a_half_set_of_pins_is_completed() {
    let topology = Topology::new();
    drop(topology.open_node(None));
    std::fs::remove_file(topology.bpffs.node().join(MAP_PEERS_V4)).unwrap();
    let node = topology.open_node(None);
    for map in NODE_MAPS {
        maps::open(&topology.bpffs.node(), map);
    }
    drop(node);
}

#[test]
#[ignore = "privileged: needs root and the eBPF object"]
fn a_pin_among_links_that_is_no_link_is_replaced() {
    let topology = Topology::new();
    let index = topology.state().pods["client-uid"].ifindex;
    let links = topology.bpffs.node().join("links");
    std::fs::create_dir_all(&links).unwrap();
    let map: HashMap<MapData, u32, u32> = HashMap::create(16, 0).unwrap();
    map.pin(links.join(format!("{index}-{PROGRAM_FROM_POD}"))).unwrap();
    let (_node, report) = topology.try_apply(topology.open_node(None), &topology.state());
    assert!(report.failed.is_empty(), "{report:?}");
    assert!(report.attached.contains(&"client-uid".to_owned()));
}

#[test]
#[ignore = "privileged: needs root and the eBPF object"]
fn the_other_roles_maps_are_neither_pinned_nor_large() {
    let topology = Topology::new();
    let node = topology.open_node(None);
    let names: Vec<_> = std::fs::read_dir(topology.bpffs.node())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name != "links")
        .collect();
    assert_eq!(names.len(), NODE_MAPS.len(), "{names:?}");
    drop(node);
}

#[test]
#[ignore = "privileged: needs root and the eBPF object"]
fn two_agents_do_not_write_at_a_time() {
    let topology = Topology::new();
    let first = topology.open_node(None);
    let error = open_error(&topology);
    assert!(matches!(&error, DatapathError::Pin(PinError::Busy { .. })), "{error:?}");
    drop(first);
    drop(topology.open_node(None));
}

#[test]
#[ignore = "privileged: needs root and the eBPF object"]
fn a_gateway_that_does_not_know_its_uid_is_named_after_its_pod() {
    let topology = Topology::new();
    let mut node = topology.apply(topology.open_node(None), &topology.state());
    let pin_name = named_folder("internet", "nat.example-0");
    let folder = topology.bpffs.node().join("egress").join(&pin_name);
    let live = BTreeSet::from([pin_name.clone()]);
    let gateway = topology.open_gateway_with(GatewayOptions { pin_name, ..topology.gateway_options() });
    drop(gateway);
    node.gc_gateways(&live).unwrap();
    assert!(folder.exists(), "its pod is there");
    topology.gateway.net.ip("link del eth0");
    node.gc_gateways(&BTreeSet::new()).unwrap();
    assert!(!folder.exists());
}
