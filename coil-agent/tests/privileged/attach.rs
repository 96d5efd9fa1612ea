//! The two ways of attaching programs to interfaces of pods, and that neither loses a packet.

#![expect(clippy::unwrap_used, clippy::panic, reason = "tests")]

use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use aya::programs::{SchedClassifier, TcAttachType};
use coil_agent::datapath::{AttachMode, Datapath};
use coil_common::names::{PROGRAM_FROM_POD, PROGRAM_TO_POD};

use crate::support::topology::Topology;
use crate::support::{DEADLINE, maps, wait_for};
use crate::traffic::udp_peer;

/// Datagrams that must have gone there and back while programs were being replaced.
const DATAGRAMS: u64 = 300;

/// What an interface of the node has.
#[derive(Debug, Default, PartialEq, Eq)]
struct Attached {
    links: Vec<String>,
    filters: Vec<String>,
}

const BOTH: [&str; 2] = [PROGRAM_FROM_POD, PROGRAM_TO_POD];

fn names(names: &[&str]) -> Vec<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}

/// Programs at an interface, those of ingress first.
fn attached(topology: &Topology, interface: &'static str) -> Attached {
    let filters = ["ingress", "egress"].into_iter().flat_map(|hook| {
        let text = topology.node.exec(&format!("tc filter show dev {interface} {hook}"));
        let words: Vec<_> = text.split_whitespace().collect();
        // `handle 0x1 from_pod direct-action`
        let named = words.windows(4).filter(|four| four[0] == "handle" && four[3] == "direct-action");
        named.map(|four| four[2].to_owned()).collect::<Vec<_>>()
    });
    let filters = filters.collect();
    let links = topology.node.run(move || {
        let query = |hook| match SchedClassifier::query_tcx(interface, hook) {
            Ok((_, programs)) => programs,
            // A kernel that has none.
            Err(_) => Vec::new(),
        };
        let programs = query(TcAttachType::Ingress).into_iter().chain(query(TcAttachType::Egress));
        programs.map(|program| program.name_as_str().unwrap().to_owned()).collect()
    });
    Attached { links, filters }
}

fn pin(topology: &Topology, program: &str) -> PathBuf {
    let index = topology.node.ifindex("vclient");
    topology.bpffs.node().join("links").join(format!("{index}-{program}"))
}

/// Sends one datagram after the other to the world, which must see the gateway each time, until it is told to end.
pub(crate) struct Conversation {
    /// Of the client, then of the server, which has to answer until nobody asks.
    stops: [Arc<AtomicBool>; 2],
    count: Arc<AtomicU64>,
    ends: [std::thread::JoinHandle<()>; 2],
}

impl Conversation {
    pub(crate) fn begin(topology: &Topology) -> Self {
        let stops = [(); 2].map(|()| Arc::new(AtomicBool::new(false)));
        let count = Arc::new(AtomicU64::new(0));
        let (address, gateway) = (topology.external.address(false), topology.gateway.address(false));
        let (sender, receiver) = std::sync::mpsc::channel::<SocketAddr>();
        let ended = Arc::clone(&stops[1]);
        let server = topology.external.net.spawn(move || {
            let socket = UdpSocket::bind((address, 0)).unwrap();
            socket.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
            sender.send(socket.local_addr().unwrap()).unwrap();
            let mut buffer = [0; 64];
            while !ended.load(Ordering::Relaxed) {
                if let Ok((length, peer)) = socket.recv_from(&mut buffer) {
                    assert_eq!(peer.ip(), gateway, "a packet went past the programs");
                    socket.send_to(&buffer[..length], peer).unwrap();
                }
            }
        });
        let server_address = receiver.recv().unwrap();
        let (ended, told) = (Arc::clone(&stops[0]), Arc::clone(&count));
        let client = topology.client.net.spawn(move || {
            let socket = UdpSocket::bind((IpAddr::from(Ipv4Addr::UNSPECIFIED), 0)).unwrap();
            socket.connect(server_address).unwrap();
            socket.set_read_timeout(Some(DEADLINE)).unwrap();
            let mut number = 0u64;
            while !ended.load(Ordering::Relaxed) {
                socket.send(&number.to_be_bytes()).unwrap();
                let mut buffer = [0; 64];
                // A lost packet is never sent again: this would wait in vain.
                let length = socket.recv(&mut buffer).unwrap_or_else(|error| panic!("{number}: {error}"));
                assert_eq!(buffer[..length], number.to_be_bytes());
                number += 1;
                told.store(number, Ordering::Relaxed);
            }
        });
        Self { stops, count, ends: [client, server] }
    }

    pub(crate) fn count(&self) -> u64 {
        assert!(self.ends.iter().all(|end| !end.is_finished()), "an end has failed");
        self.count.load(Ordering::Relaxed)
    }

    pub(crate) fn end(self) {
        for (stop, end) in self.stops.into_iter().zip(self.ends) {
            stop.store(true, Ordering::Relaxed);
            if let Err(panic) = end.join() {
                std::panic::resume_unwind(panic);
            }
        }
    }
}

/// Programs are replaced over and over, by the same process and by later ones that would attach to new interfaces in
/// the way `after`, under packets of which none may be lost or leave by itself.
fn replaced_under_traffic(before: AttachMode, after: AttachMode) {
    let topology = Topology::new();
    let state = topology.state();
    let mut node = topology.apply(topology.open_node(Some(before)), &state);
    let had = attached(&topology, "vclient");
    let _gateway = topology.open_gateway();
    assert_eq!(udp_peer(&topology, false, 64).unwrap().ip(), topology.gateway.address(false));
    let conversation = Conversation::begin(&topology);
    let mut rounds = 0;
    while rounds < 3 || conversation.count() < DATAGRAMS {
        drop(node);
        let (mut next, report) = topology.try_apply(topology.open_node(Some(after)), &state);
        assert!(report.attached.is_empty() && report.failed.is_empty(), "{report:?}");
        for _ in 0..10 {
            next.resync();
            let (again, report) = topology.try_apply(next, &state);
            assert!(report.attached.is_empty() && report.failed.is_empty(), "{report:?}");
            next = again;
        }
        node = next;
        rounds += 1;
    }
    conversation.end();
    assert_eq!(attached(&topology, "vclient"), had, "an interface keeps what it has");
    assert_eq!(maps::all_drops(&topology.bpffs.node()), []);
    assert_eq!(maps::all_drops(&topology.gateway_pins()), []);
    drop(node);
}

#[test]
#[ignore = "privileged: needs root and the eBPF object"]
fn filters_are_replaced_without_losing_a_packet() {
    replaced_under_traffic(AttachMode::Clsact, AttachMode::Clsact);
}

#[test]
#[ignore = "privileged: needs root and the eBPF object"]
fn tcx_links_are_replaced_without_losing_a_packet() {
    replaced_under_traffic(AttachMode::Tcx, AttachMode::Tcx);
}

/// An agent that attaches links to new pods takes over from one that attached filters.
#[test]
#[ignore = "privileged: needs root and the eBPF object"]
fn filters_stay_filters_with_an_agent_that_would_make_tcx_links() {
    replaced_under_traffic(AttachMode::Clsact, AttachMode::Tcx);
}

/// An agent that attaches filters to new pods takes over from one that attached links, as those before did.
#[test]
#[ignore = "privileged: needs root and the eBPF object"]
fn tcx_links_stay_links_with_an_agent_that_would_make_filters() {
    replaced_under_traffic(AttachMode::Tcx, AttachMode::Clsact);
}

#[test]
#[ignore = "privileged: needs root and the eBPF object"]
fn new_interfaces_are_attached_to_as_asked_for_and_old_ones_are_left_as_they_are_tcx() {
    let topology = Topology::new();
    let state = topology.state();
    let mut first = state.clone();
    first.pods.retain(|uid, _| uid == "client-uid");
    drop(topology.apply(topology.open_node(Some(AttachMode::Tcx)), &first));
    let (node, report) = topology.try_apply(topology.open_node(Some(AttachMode::Clsact)), &state);
    assert_eq!(report.attached.len(), 1, "{report:?}");
    let links = Attached { links: names(&BOTH), ..Attached::default() };
    let filters = Attached { filters: names(&BOTH), ..Attached::default() };
    assert_eq!(attached(&topology, "vclient"), links);
    assert_eq!(attached(&topology, "vgateway"), filters);
    // Each goes by the way by which it came.
    let mut none = state;
    none.pods.clear();
    let (_node, report) = topology.try_apply(node, &none);
    assert_eq!(report.detached.len(), 2, "{report:?}");
    assert_eq!(attached(&topology, "vclient"), Attached::default());
    assert_eq!(attached(&topology, "vgateway"), Attached::default());
    assert_eq!(std::fs::read_dir(topology.bpffs.node().join("links")).unwrap().count(), 0);
}

#[test]
#[ignore = "privileged: needs root and the eBPF object"]
fn filters_that_somebody_has_removed_come_back() {
    let topology = Topology::new();
    let state = topology.state();
    let filters = Attached { filters: names(&BOTH), ..Attached::default() };
    let mut node = topology.apply(topology.open_node(Some(AttachMode::Clsact)), &state);
    for removal in ["tc filter del dev vclient ingress", "tc qdisc del dev vclient clsact"] {
        topology.node.exec(removal);
        assert_ne!(attached(&topology, "vclient"), filters);
        node.resync();
        let (again, report) = topology.try_apply(node, &state);
        assert_eq!((report.attached, report.failed.len()), (vec!["client-uid".to_owned()], 0), "{removal}");
        assert_eq!(attached(&topology, "vclient"), filters);
        node = again;
    }
    // The same by a later process, which finds pins and no filters.
    drop(node);
    topology.node.exec("tc qdisc del dev vclient clsact");
    let (_node, report) = topology.try_apply(topology.open_node(Some(AttachMode::Clsact)), &state);
    assert_eq!(report.attached, ["client-uid"]);
    assert_eq!(attached(&topology, "vclient"), filters);
}

/// Killed at any point of a replacement, or of the first attachment: the next start makes the best of it.
#[test]
#[ignore = "privileged: needs root and the eBPF object"]
fn filters_and_pins_of_an_agent_that_was_killed_are_put_in_order() {
    let topology = Topology::new();
    let state = topology.state();
    let open = || topology.open_node(Some(AttachMode::Clsact));
    let filters = Attached { filters: names(&BOTH), ..Attached::default() };
    drop(topology.apply(open(), &state));

    // Before the new program's pin took the place of the old one's.
    let (path, other) = (pin(&topology, PROGRAM_FROM_POD), pin(&topology, PROGRAM_TO_POD));
    let fresh = path.with_file_name(format!("{}_new", path.file_name().unwrap().to_str().unwrap()));
    SchedClassifier::from_pin(&path).unwrap().pin(&fresh).unwrap();
    let (node, report) = topology.try_apply(open(), &state);
    assert!(report.attached.is_empty() && report.failed.is_empty(), "{report:?}");
    assert!(!fresh.exists() && path.exists());
    assert_eq!(attached(&topology, "vclient"), filters);
    drop(node);

    // The filter is there and its pin is not.
    std::fs::remove_file(&path).unwrap();
    let (node, report) = topology.try_apply(open(), &state);
    assert!(report.attached.is_empty() && report.failed.is_empty(), "{report:?}");
    assert!(path.exists());
    assert_eq!(attached(&topology, "vclient"), filters);
    drop(node);

    // The pin of a program is there, and no filter: the interface is a new one with the same index.
    let index = state.pods["client-uid"].ifindex;
    topology.node.ip("link del vclient");
    topology.node.ip(&format!("link add vclient index {index} type veth peer name other"));
    assert!(path.exists() && other.exists());
    let (node, report) = topology.try_apply(open(), &state);
    assert_eq!(report.attached, ["client-uid"]);
    assert_eq!(attached(&topology, "vclient"), filters);

    // And nothing of it stays, not even what was left half-done, when the interface is gone.
    drop(node);
    SchedClassifier::from_pin(&path).unwrap().pin(&fresh).unwrap();
    topology.node.ip("link del vclient");
    let mut none = state;
    none.pods.clear();
    let (_node, report) = topology.try_apply(open(), &none);
    assert_eq!(report.detached.len(), 2, "{report:?}");
    assert_eq!(std::fs::read_dir(topology.bpffs.node().join("links")).unwrap().count(), 0);
}

/// Filters of others at the same interface are never touched, whether they come before or after ours.
#[test]
#[ignore = "privileged: needs root and the eBPF object"]
fn filters_of_others_stay() {
    let topology = Topology::new();
    let state = topology.state();
    topology.node.exec("tc qdisc add dev vclient clsact");
    // A classic program that never matches.
    let file = topology.bpffs.root().with_extension("classic");
    std::fs::write(&file, "1,6 0 0 0,\n").unwrap();
    for hook in ["ingress", "egress"] {
        for priority in [1, 60_000] {
            let add = format!("tc filter add dev vclient {hook} prio {priority} protocol all");
            topology.node.exec(&format!("{add} bpf bytecode-file {}", file.display()));
        }
    }
    std::fs::remove_file(&file).unwrap();
    let theirs = || {
        let show = |hook| topology.node.exec(&format!("tc filter show dev vclient {hook}"));
        [show("ingress"), show("egress")].concat().matches("bytecode").count()
    };
    assert_eq!(theirs(), 4);
    let node = topology.apply(topology.open_node(Some(AttachMode::Clsact)), &state);
    let _gateway = topology.open_gateway();
    let address = wait_for("an answer through the gateway", || udp_peer(&topology, false, 64));
    assert_eq!(address.ip(), topology.gateway.address(false));
    assert_eq!(theirs(), 4);
    assert_eq!(attached(&topology, "vclient").filters, BOTH);
    let mut none = state;
    none.pods.clear();
    drop(topology.apply(node, &none));
    assert_eq!(theirs(), 4);
    assert_eq!(attached(&topology, "vclient"), Attached::default());
}
