//! The datapath outlives its processes, and new processes take it over.

#![expect(clippy::unwrap_used, reason = "tests")]

use std::io::{Read, Write};
use std::net::TcpStream;

use aya::programs::{SchedClassifier, TcAttachType};
use coil_agent::datapath::{AttachMode, Datapath};
use coil_common::names::{MAP_EGRESS_STATS, MAP_GATEWAY_STATS, PROGRAM_FROM_POD};
use coil_common::stats::{Direction, GatewayStat, egress_stat};

use crate::support::topology::{GATEWAY_UID, Topology};
use crate::support::{DEADLINE, maps};
use crate::traffic::{dump, echo_server, pattern};

/// A transfer that can be continued step by step.
pub(crate) struct Transfer {
    pub(crate) stream: TcpStream,
    pub(crate) sent: Vec<u8>,
}

impl Transfer {
    /// Some bytes there and back.
    pub(crate) fn step(&mut self, bytes: usize) {
        let chunk = pattern(bytes);
        let mut writer = self.stream.try_clone().unwrap();
        let sending = chunk.clone();
        let sender = std::thread::spawn(move || writer.write_all(&sending).unwrap());
        let mut back = vec![0; bytes];
        self.stream.read_exact(&mut back).unwrap();
        sender.join().unwrap();
        assert!(back == chunk);
        self.sent.extend(chunk);
    }
}

fn survives_restart(mode: Option<AttachMode>) {
    let topology = Topology::new();
    let state = topology.state();
    let node = topology.apply(topology.open_node(mode), &state);
    let gateway = topology.open_gateway();
    let (address, server) = echo_server(&topology, false);
    let stream = topology.client.net.run(move || TcpStream::connect_timeout(&address, DEADLINE).unwrap());
    stream.set_read_timeout(Some(DEADLINE)).unwrap();
    let mut transfer = Transfer { stream, sent: Vec::new() };
    transfer.step(1 << 20);
    let counters = || {
        let tx = egress_stat(0, Direction::Tx);
        (
            maps::counter(&topology.bpffs.node(), MAP_EGRESS_STATS, tx),
            maps::counter(&topology.gateway_pins(), MAP_GATEWAY_STATS, GatewayStat::ReplyV4.index()),
        )
    };
    let first = counters();

    // With nobody there.
    drop(node);
    drop(gateway);
    transfer.step(1 << 20);
    let second = counters();
    assert!(second.0.bytes > first.0.bytes + (1 << 20), "{first:?} {second:?}");

    // With somebody new, while bytes are on their way.
    let node = topology.open_node(mode);
    let gateway = topology.open_gateway();
    let busy = std::thread::scope(|scope| {
        let busy = scope.spawn(|| transfer.step(16 << 20));
        let (node, report) = topology.try_apply(node, &state);
        assert!(report.attached.is_empty() && report.failed.is_empty(), "{report:?}");
        assert_eq!(report.operations, 0, "the maps are as the last process left them");
        busy.join().map(|()| node)
    });
    let node = busy.unwrap();
    let third = counters();
    assert!(third.0.bytes > second.0.bytes && third.1.bytes > second.1.bytes);
    assert_eq!(maps::all_drops(&topology.bpffs.node()), []);
    assert_eq!(maps::all_drops(&topology.gateway_pins()), [], "{}", dump(&topology));

    transfer.stream.shutdown(std::net::Shutdown::Write).unwrap();
    let (peer, arrived) = server.join().unwrap();
    assert_eq!(peer.ip(), topology.gateway.address(false));
    assert!(arrived == transfer.sent);
    drop((node, gateway));
}

#[test]
#[ignore = "privileged: needs root and the eBPF object"]
fn a_transfer_survives_the_restart_of_everybody() {
    survives_restart(None);
}

#[test]
#[ignore = "privileged: needs root and the eBPF object"]
fn a_transfer_survives_the_restart_of_everybody_with_clsact() {
    survives_restart(Some(AttachMode::Clsact));
}

#[test]
#[ignore = "privileged: needs root and the eBPF object"]
fn pods_that_went_while_nobody_was_there_are_cleaned_up() {
    let topology = Topology::new();
    let state = topology.state();
    let node = topology.apply(topology.open_node(None), &state);
    drop(node);
    let links = || {
        let entries = std::fs::read_dir(topology.bpffs.node().join("links")).unwrap();
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect::<Vec<_>>()
    };
    assert_eq!(links().len(), 4);
    topology.node.ip("link del vclient");
    let mut left = state.clone();
    left.pods.remove("client-uid");
    let mut incomplete = left.clone();
    incomplete.complete = false;
    let node = topology.apply(topology.open_node(None), &incomplete);
    assert_eq!(links().len(), 4, "nothing is removed before the picture is complete");
    let (node, report) = topology.try_apply(node, &left);
    assert_eq!(report.detached.len(), 1);
    assert_eq!(links().len(), 2, "{:?}", links());
    // A pod whose interface is gone fails alone.
    let (mut node, report) = topology.try_apply(node, &state);
    assert_eq!(report.failed.len(), 1, "{report:?}");
    let _gateway = topology.open_gateway();
    node.gc_gateways(&[GATEWAY_UID.to_owned()].into()).unwrap();
    assert!(topology.gateway_pins().exists());
    node.gc_gateways(&["another".to_owned()].into()).unwrap();
    assert!(!topology.gateway_pins().exists());
}

#[test]
#[ignore = "privileged: needs root and the eBPF object"]
fn a_link_of_an_interface_that_is_gone_is_not_taken_for_a_new_one() {
    let topology = Topology::new();
    let state = topology.state();
    let node = topology.apply(topology.open_node(None), &state);
    drop(node);
    // The interface goes, and one with the same index comes.
    let index = state.pods["client-uid"].ifindex;
    topology.node.ip("link del vclient");
    topology.node.ip(&format!("link add vclient index {index} type veth peer name other"));
    let (_node, report) = topology.try_apply(topology.open_node(None), &state);
    assert_eq!(report.attached, ["client-uid"]);
    let (_, attached) =
        topology.node.run(|| SchedClassifier::query_tcx("vclient", TcAttachType::Ingress)).unwrap();
    let names: Vec<_> = attached.iter().map(|program| program.name_as_str()).collect();
    assert_eq!(names, [Some(PROGRAM_FROM_POD)]);
}
