//! Programs of others at the hooks that ours are at: before them, after them, come and gone, replaced under traffic, with
//! links and with filters.

#![expect(clippy::unwrap_used, reason = "tests")]

use std::net::{IpAddr, Ipv4Addr, UdpSocket};
use std::time::Duration;

use coil_agent::datapath::{AttachMode, Datapath};
use coil_common::names::MAP_EGRESS_STATS;
use coil_common::stats::{Direction, egress_stat};

use crate::attach::Conversation;
use crate::support::other::{Attached, DROP, NEXT, Other, PASS, Place};
use crate::support::topology::Topology;
use crate::support::{DEADLINE, maps};
use crate::traffic::dump;

/// Interface of the client at the node.
const INTERFACE: &str = "vclient";
/// Questions and answers that must have gone by while programs came and went.
const DATAGRAMS: u64 = 100;
/// A mark that somebody sets.
const MARK: u32 = 0x77;

/// A program of somebody else, and where it is.
struct There {
    other: Other,
    ingress: bool,
    place: Place,
    attached: Option<Attached>,
}

impl There {
    fn new(topology: &Topology, ingress: bool, place: Place) -> Self {
        let name = format!("other_{ingress}_{place:?}");
        Self { other: Other::load(topology.bpffs.root().join(name)), ingress, place, attached: None }
    }

    fn come(&mut self, topology: &Topology, mode: AttachMode) {
        self.attached = Some(self.other.attach(&topology.node, INTERFACE, self.ingress, self.place, mode));
    }

    fn go(&mut self, topology: &Topology) {
        self.attached.take().unwrap().detach(&topology.node);
    }
}

/// A datagram of the client: whom the world sees, and whether its answer arrives. What must not arrive is waited for in
/// vain for as long as `patience`.
fn ask(topology: &Topology, patience: Duration) -> (Option<IpAddr>, bool) {
    let address = topology.external.address(false);
    let (sender, receiver) = std::sync::mpsc::channel();
    let server = topology.external.net.spawn(move || {
        let socket = UdpSocket::bind((address, 0)).unwrap();
        socket.set_read_timeout(Some(patience)).unwrap();
        sender.send(socket.local_addr().unwrap()).unwrap();
        let mut buffer = [0; 64];
        let (length, peer) = socket.recv_from(&mut buffer).ok()?;
        socket.send_to(&buffer[..length], peer).unwrap();
        Some(peer.ip())
    });
    let server_address = receiver.recv().unwrap();
    let answered = topology.client.net.run(move || {
        let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).unwrap();
        socket.connect(server_address).unwrap();
        socket.set_read_timeout(Some(patience)).unwrap();
        socket.send(b"question").unwrap();
        let mut buffer = [0; 64];
        socket.recv(&mut buffer).is_ok_and(|length| &buffer[..length] == b"question")
    });
    (server.join().unwrap(), answered)
}

/// Packets by tunnel, with the mark, that the node forwards.
fn marked(topology: &Topology) -> u64 {
    let text = topology.node.exec("nft list counter inet coil_test marked");
    let mut words = text.split_whitespace().skip_while(|word| *word != "packets");
    words.nth(1).unwrap().parse().unwrap()
}

/// Packets that the node's program has sent to a gateway.
fn sent(topology: &Topology) -> u64 {
    let index = egress_stat(0, Direction::Tx);
    maps::counter(&topology.bpffs.node(), MAP_EGRESS_STATS, index).packets
}

fn beside(ours: AttachMode, theirs: AttachMode) {
    const QUESTIONS: u64 = 5;
    let topology = Topology::new();
    topology.node.exec(&format!(
        "nft add table inet coil_test ; add counter inet coil_test marked ; \
         add chain inet coil_test c {{ type filter hook forward priority 0 ; }} ; \
         add rule inet coil_test c meta mark {MARK} udp dport 5555 counter name marked"
    ));
    if theirs == AttachMode::Clsact {
        topology.node.exec(&format!("tc qdisc add dev {INTERFACE} clsact"));
    }
    let (state, gateway) = (topology.state(), Some(topology.gateway.address(false)));
    let mut all: Vec<There> =
        [(true, Place::First), (true, Place::Last), (false, Place::First), (false, Place::Last)]
            .map(|(ingress, place)| There::new(&topology, ingress, place))
            .into();
    // All links come before all filters.
    let is_before = |place| match (ours, theirs) {
        (AttachMode::Tcx, AttachMode::Clsact) => false,
        (AttachMode::Clsact, AttachMode::Tcx) => true,
        _ => place == Place::First,
    };

    // Some are there when ours come, some come later.
    all.iter_mut()
        .filter(|there| there.place == Place::First)
        .for_each(|there| there.come(&topology, theirs));
    let mut node = topology.apply(topology.open_node(Some(ours)), &state);
    let _gateway = topology.open_gateway();
    all.iter_mut().filter(|there| there.place == Place::Last).for_each(|there| there.come(&topology, theirs));
    for _ in 0..QUESTIONS {
        assert_eq!(ask(&topology, DEADLINE), (gateway, true), "{}", dump(&topology));
    }
    // Each sees all packets, as they are at its place: questions in tunnels after ours, answers before.
    for There { other, ingress, place, .. } in &all {
        let seen = other.seen();
        let in_tunnels = *ingress != is_before(*place);
        assert!(seen.packets >= QUESTIONS, "ingress {ingress}, {place:?}: {seen:?}");
        assert_eq!(
            seen.tunnelled,
            if in_tunnels { QUESTIONS } else { 0 },
            "ingress {ingress}, {place:?}: {seen:?}"
        );
    }

    // A mark stays on a packet that ours put into a tunnel, for who comes later and for the node.
    assert_eq!(marked(&topology), 0);
    all[0].other.tell(NEXT, MARK);
    assert_eq!(ask(&topology, DEADLINE), (gateway, true));
    assert_eq!((marked(&topology), all[1].other.seen().mark), (1, MARK));
    all[0].other.tell(NEXT, 0);

    // Who drops, drops: what ours have counted is what came to them, and nothing goes past them.
    let short = Duration::from_millis(500);
    for There { other, ingress, place, .. } in &all {
        let before = sent(&topology);
        other.tell(DROP, 0);
        let seen = ask(&topology, short);
        let counted = sent(&topology) - before;
        other.tell(NEXT, 0);
        if *ingress {
            assert_eq!(seen, (None, false), "{place:?}");
            assert_eq!(counted, u64::from(!is_before(*place)), "{place:?}");
        } else {
            assert_eq!((seen, counted), ((gateway, false), 1), "{place:?}");
        }
        assert_eq!(ask(&topology, DEADLINE), (gateway, true), "{place:?}");
    }

    // Who accepts before ours ends the matter; after ours that changes nothing.
    for There { other, ingress, place, .. } in &all {
        other.tell(PASS, 0);
        let seen = ask(&topology, short);
        other.tell(NEXT, 0);
        let wanted = match (is_before(*place), *ingress) {
            (false, _) => (gateway, true),
            (true, true) => (Some(topology.client.address(false)), true),
            // An answer in its tunnel is none.
            (true, false) => (gateway, false),
        };
        assert_eq!(seen, wanted, "ingress {ingress}, {place:?}");
    }

    // All come and go, ours are replaced, by the same process and by later ones, and no packet is lost.
    let conversation = Conversation::begin(&topology);
    // Once at least: starting `tc` is what takes time in an emulated machine.
    let mut rounds = 0;
    while rounds < 1 || conversation.count() < DATAGRAMS {
        for there in &mut all {
            there.go(&topology);
            node.resync();
            let (again, report) = topology.try_apply(node, &state);
            assert!(report.attached.is_empty() && report.failed.is_empty(), "{report:?}");
            node = again;
            there.come(&topology, theirs);
        }
        drop(node);
        let (again, report) = topology.try_apply(topology.open_node(Some(ours)), &state);
        assert!(report.attached.is_empty() && report.failed.is_empty(), "{report:?}");
        node = again;
        rounds += 1;
    }
    conversation.end();
    assert_eq!(maps::all_drops(&topology.bpffs.node()), []);
    assert_eq!(maps::all_drops(&topology.gateway_pins()), []);

    // Ours go, theirs stay.
    let mut none = state;
    none.pods.clear();
    drop(topology.apply(node, &none));
    all.iter().for_each(|there| there.other.tell(NEXT, 0));
    assert_eq!(ask(&topology, DEADLINE), (Some(topology.client.address(false)), true));
    for There { other, ingress, place, .. } in &all {
        assert!(other.seen().packets > 0, "ingress {ingress}, {place:?} is gone");
    }
    all.iter_mut().for_each(|there| there.go(&topology));
}

#[test]
#[ignore = "privileged: needs root and the eBPF object"]
fn filters_beside_our_filters() {
    beside(AttachMode::Clsact, AttachMode::Clsact);
}

#[test]
#[ignore = "privileged: needs root and the eBPF object"]
fn tcx_links_beside_our_tcx_links() {
    beside(AttachMode::Tcx, AttachMode::Tcx);
}

#[test]
#[ignore = "privileged: needs root and the eBPF object"]
fn filters_beside_our_tcx_links() {
    beside(AttachMode::Tcx, AttachMode::Clsact);
}

#[test]
#[ignore = "privileged: needs root and the eBPF object"]
fn tcx_links_beside_our_filters() {
    beside(AttachMode::Clsact, AttachMode::Tcx);
}
