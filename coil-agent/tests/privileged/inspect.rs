//! `coilctl` over a datapath that works.

#![expect(clippy::unwrap_used, reason = "tests")]

use std::io::{BufRead, BufReader, Read};
use std::net::{IpAddr, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use coil_agent::datapath::timeouts::Timeouts;
use coil_agent::datapath::{NodeDatapath, NodeOptions, seconds_since_boot};
use coil_agent::gateway::datapath::{GatewayOptions, Quotas};
use coil_common::keys::FlowKey4;
use coil_common::names::{MAP_FLOWS_V4, MAP_INBOUND_V4, MAP_NAT_FORWARD_V4, MAP_NAT_REVERSE_V4};
use coil_common::values::{FlowValue, InboundValue, NatValue4, STATE_SYN};
use serde_json::Value;

use crate::support::net::NetNs;
use crate::support::raw::RawMap;
use crate::support::topology::{Topology, egress_name};
use crate::support::{maps, wait_for};
use crate::traffic::{echo_server, pattern, send_tcp, udp_peer};

/// Runs `coilctl` in a name space; its status, what it printed, and what it complained of.
fn run(net: &NetNs, root: &Path, arguments: &str) -> (i32, String, String) {
    let mut command = command(root, arguments);
    let output = net.run(move || command.output()).unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.code().unwrap(), text(&output.stdout), text(&output.stderr))
}

fn command(root: &Path, arguments: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_coilctl"));
    command.env_remove("COIL_BPFFS_ROOT").env_remove("COILCTL_OUTPUT").arg("--bpffs-root").arg(root);
    command.args(arguments.split(' '));
    command
}

/// Runs it on the node of a topology, and reads its JSON.
fn json(topology: &Topology, status: i32, arguments: &str) -> Value {
    let (code, out, err) = run(&topology.node, topology.bpffs.root(), &format!("{arguments} -o json"));
    assert_eq!(code, status, "coilctl {arguments}: {out}{err}");
    serde_json::from_str(&out).unwrap()
}

fn text(topology: &Topology, status: i32, arguments: &str) -> String {
    let (code, out, err) = run(&topology.node, topology.bpffs.root(), arguments);
    assert_eq!(code, status, "coilctl {arguments}: {out}{err}");
    out
}

/// An address with a port as it is printed.
fn socket(address: IpAddr, port: u16) -> String {
    std::net::SocketAddr::new(address, port).to_string()
}

fn entries(topology: &Topology) -> [usize; 3] {
    [
        maps::entries::<FlowKey4, FlowValue>(&topology.bpffs.node(), MAP_FLOWS_V4).len(),
        maps::entries::<FlowKey4, NatValue4>(&topology.gateway_pins(), MAP_NAT_FORWARD_V4).len(),
        maps::entries::<FlowKey4, NatValue4>(&topology.gateway_pins(), MAP_NAT_REVERSE_V4).len(),
    ]
}

#[test]
#[ignore = "privileged: needs root and the eBPF object"]
fn explain_says_what_happens_and_changes_nothing() {
    let topology = Topology::new();
    let node = topology.apply(topology.open_node(None), &topology.state());
    let _gateway = topology.open_gateway();
    let before = entries(&topology);
    for v6 in [false, true] {
        let (world, gateway) = (topology.external.address(v6), topology.gateway.address(v6));
        for protocol in ["tcp", "udp", "icmp"] {
            let target = if protocol == "icmp" { world.to_string() } else { socket(world, 99) };
            let said = json(&topology, 0, &format!("explain test/vclient {target} --protocol {protocol}"));
            assert_eq!(said["verdict"], "egress", "{said:#}");
            assert_eq!(said["egress"], "internet/nat", "{said:#}");
            assert_eq!(said["gateway"]["address"], gateway.to_string(), "{said:#}");
            assert_eq!(said["gateway"]["pod"], "test/vgateway", "{said:#}");
            assert_eq!(said["flow"]["existing"], false, "{said:#}");
            assert_eq!(said["reply"]["arrives"], true, "{said:#}");
            assert_eq!(said["reply"]["throughGateway"], true, "{said:#}");
            let seen = said["translation"]["seenAs"].as_str().unwrap();
            assert!(seen.contains(&gateway.to_string()), "{said:#}");
        }
        // What the policy of the topology says: private destinations leave directly.
        let private = if v6 { "fd00:99::1" } else { "10.99.0.1" };
        let said = json(&topology, 0, &format!("explain {} {private}", topology.client.address(v6)));
        assert_eq!(said["verdict"], "direct", "{said:#}");
        assert!(said["reasons"][0].as_str().unwrap().contains("private"), "{said:#}");
        let large = json(&topology, 2, &format!("explain client-uid {world} --protocol udp --size 1490"));
        assert_eq!(large["verdict"], "tooBig", "{large:#}");
        assert_eq!(large["drop"]["reason"], "too_big");
        let local = if v6 { "ff02::1" } else { "169.254.1.1" };
        let said = json(&topology, 0, &format!("explain test/vclient {local}"));
        assert_eq!(said["verdict"], "direct", "{said:#}");
    }
    let own = json(&topology, 0, &format!("explain test/vgateway {}", topology.external.address(false)));
    assert_eq!(own["verdict"], "direct", "{own:#}");
    assert_eq!(entries(&topology), before, "explain must not make flows or translations");

    // A flow that exists is named, and keeps what it has.
    let peer = udp_peer(&topology, false, 100).unwrap();
    let all = json(&topology, 0, "conntrack --flows --protocol udp");
    let target = all["flows"][0]["destination"].as_str().unwrap().to_owned();
    let said = json(&topology, 0, &format!("explain test/vclient {target} --protocol udp"));
    assert_eq!(said["flow"]["existing"], true, "{said:#}");
    assert_eq!(said["gateway"]["chosenBy"], "existing flow", "{said:#}");
    assert_eq!(said["translation"]["existing"], true, "{said:#}");
    assert_eq!(said["translation"]["seenAs"], peer.to_string(), "{said:#}");

    // No gateway: what is said is what happens.
    let mut state = topology.state();
    let egress = state.egresses.get_mut(&egress_name()).unwrap();
    egress.v4.clear();
    let _node = topology.apply(node, &state);
    let said =
        json(&topology, 2, &format!("explain test/vclient {}", socket(topology.external.address(false), 99)));
    assert_eq!(
        (&said["verdict"], &said["drop"]["reason"]),
        (&"drop".into(), &"no_gateway".into()),
        "{said:#}"
    );
    let words = text(&topology, 2, &format!("explain test/vclient {}", topology.external.address(false)));
    for word in [
        "DROPPED",
        "no_gateway",
        "No gateway of the Egress is ready",
        "Remedy",
        "0.0.0.0/0 goes through Egress internet/nat",
    ] {
        assert!(words.contains(word), "{word}: {words}");
    }
}

#[test]
#[ignore = "privileged: needs root and the eBPF object"]
fn explain_knows_what_answers_inbound_connections() {
    let topology = Topology::new();
    let mut state = topology.state();
    state.egresses.get_mut(&egress_name()).unwrap().originating_only = true;
    let _node = topology.apply(topology.open_node(None), &state);
    let _gateway = topology.open_gateway();
    let (world, pod) = (topology.external.ipv4, topology.client.ipv4);
    let explain =
        |port| format!("explain test/vclient {} --source-port {port}", socket(world.into(), 50_000));
    let noted = RawMap::open(&topology.bpffs.node(), MAP_INBOUND_V4);
    // As if the world had connected to port 80 of the pod.
    let key = FlowKey4 {
        src: pod.octets(),
        dst: world.octets(),
        src_port: 80u16.to_be_bytes(),
        dst_port: 50_000u16.to_be_bytes(),
        protocol: 6,
        ..FlowKey4::default()
    };
    let value = InboundValue { state: STATE_SYN, last_seen: seconds_since_boot().unwrap() };
    assert_eq!(json(&topology, 0, "egress")["items"][0]["originatingOnly"], true);
    assert_eq!(json(&topology, 0, &explain(80))["verdict"], "egress", "before");
    noted.set(bytemuck::bytes_of(&key), bytemuck::bytes_of(&value));
    let said = json(&topology, 0, &explain(80));
    assert_eq!(said["verdict"], "direct", "{said:#}");
    let words = text(&topology, 0, &explain(80));
    assert!(words.contains("answers what has come to the pod directly"), "{words}");
    assert_eq!(json(&topology, 0, &explain(81))["verdict"], "egress", "another port");
    assert_eq!(noted.entries(), [(bytemuck::bytes_of(&key).to_vec(), bytemuck::bytes_of(&value).to_vec())]);
}

#[test]
#[ignore = "privileged: needs root and the eBPF object"]
fn explain_names_the_share_that_is_used_up() {
    let topology = Topology::new();
    let options = NodeOptions { max_pod_flows: 2, ..topology.node_options() };
    let node = topology.node.run(move || NodeDatapath::open(options)).unwrap();
    let _node = topology.apply(node, &topology.state());
    let quotas = Quotas { client_ports: 1, ..Quotas::default() };
    let _gateway = topology.open_gateway_with(GatewayOptions { quotas, ..topology.gateway_options() });
    let world = topology.external.address(false);
    let explain = |status, port| {
        json(
            &topology,
            status,
            &format!("explain test/vclient {} --protocol udp --source-port 40000", socket(world, port)),
        )
    };
    assert_eq!(explain(0, 7)["verdict"], "egress");

    // One translation to that address and port, of which the gateway allows no second.
    send_datagrams(&topology, 5001..5002);
    let said = explain(2, 9);
    assert_eq!(
        (&said["drop"]["reason"], &said["drop"]["where"]),
        (&"client_port_quota".into(), &"test/vgateway".into())
    );
    assert_eq!(explain(0, 10)["verdict"], "egress");

    // Another flow, and the pod has its two.
    send_datagrams(&topology, 5002..5003);
    let said = explain(2, 10);
    assert_eq!((&said["drop"]["reason"], &said["drop"]["where"]), (&"pod_flow_quota".into(), &"node".into()));
    let words = text(
        &topology,
        2,
        &format!("explain test/vclient {} --protocol udp --source-port 40000", socket(world, 10)),
    );
    for word in ["DROPPED", "pod_flow_quota", "--max-flows-per-pod"] {
        assert!(words.contains(word), "{word}: {words}");
    }
}

#[test]
#[ignore = "privileged: needs root and the eBPF object"]
fn listings_show_what_there_is() {
    let topology = Topology::new();
    // Listings go by the time-outs that each datapath has.
    let options = NodeOptions {
        timeouts: Timeouts { udp: 5000, udp_stream: 5000, ..Timeouts::default() },
        ..topology.node_options()
    };
    let node = topology.node.run(move || NodeDatapath::open(options)).unwrap();
    let _node = topology.apply(node, &topology.state());
    let timeouts = Timeouts { udp: 4000, udp_stream: 4000, ..Timeouts::default() };
    let _gateway = topology.open_gateway_with(GatewayOptions { timeouts, ..topology.gateway_options() });
    let (server, thread) = echo_server(&topology, false);
    let sent = pattern(200_000);
    assert_eq!(send_tcp(&topology, server, sent.clone()), sent);
    let (peer, _) = thread.join().unwrap();
    udp_peer(&topology, true, 100).unwrap();

    let all = json(&topology, 0, "conntrack");
    assert_eq!(all["kind"], "ConntrackList");
    assert_eq!(all["flows"].as_array().unwrap().len(), 2, "{all:#}");
    assert_eq!(all["translations"].as_array().unwrap().len(), 2, "{all:#}");
    let tcp =
        json(&topology, 0, &format!("conntrack --protocol tcp --destination {server} --pod test/vclient"));
    let udp = json(&topology, 0, "conntrack --protocol udp");
    for (kind, timeout) in [("flows", 5030), ("translations", 4000)] {
        let left = udp[kind][0]["expiresIn"].as_u64().unwrap();
        assert!((timeout - 500..=timeout).contains(&left), "{kind}: {udp:#}");
    }
    let (flow, pair) = (&tcp["flows"][0], &tcp["translations"][0]);
    assert_eq!(flow["pod"], "test/vclient", "{tcp:#}");
    assert_eq!(
        (&flow["egress"], &flow["gateway"]),
        (&"internet/nat".into(), &topology.gateway.address(false).to_string().into())
    );
    assert_eq!(pair["translated"], peer.to_string(), "{tcp:#}");
    assert_eq!(pair["gateway"], "test/vgateway", "{tcp:#}");
    assert!(["CLOSED", "CLOSING"].contains(&flow["state"].as_str().unwrap()), "{tcp:#}");
    for (entry, other) in [(flow, pair), (pair, flow)] {
        assert!(entry["txBytes"].as_u64().unwrap() > 200_000, "{tcp:#}");
        assert_eq!(entry["txPackets"], other["txPackets"], "both ends count the same packets: {tcp:#}");
        assert_eq!(entry["rxBytes"], other["rxBytes"], "both ends count the same bytes: {tcp:#}");
    }
    for nothing in [
        "--protocol icmp",
        "--destination 8.8.8.8",
        "--address 1.2.3.4",
        "--pod test/vgateway",
        "--egress a/b",
    ] {
        let none = json(&topology, 0, &format!("conntrack {nothing}"));
        assert_eq!(
            none["flows"].as_array().unwrap().len() + none["translations"].as_array().unwrap().len(),
            0,
            "{nothing}: {none:#}"
        );
    }
    let most = json(&topology, 0, "conntrack --sort bytes --limit 1");
    assert_eq!(most["flows"][0]["protocol"], "tcp", "{most:#}");

    let policies = json(&topology, 0, "policy --pod test/vclient");
    let rules = policies["items"][0]["rules"].as_array().unwrap();
    assert_eq!(rules.len(), 4, "{policies:#}");
    assert!(rules.iter().any(|rule| rule["prefix"] == "0.0.0.0/0" && rule["egress"] == "internet/nat"));
    assert!(rules.iter().any(|rule| rule["prefix"] == "fc00::/7" && rule["action"] == "direct"));

    let egresses = json(&topology, 0, "egress");
    assert_eq!(egresses["items"].as_array().unwrap().len(), 2, "{egresses:#}");
    for item in egresses["items"].as_array().unwrap() {
        let gateway = &item["gateways"][0];
        assert_eq!((&gateway["state"], &gateway["share"]), (&"ready".into(), &100.0.into()), "{egresses:#}");
        assert_eq!(
            (&gateway["flows"], &gateway["pod"]),
            (&1.into(), &"test/vgateway".into()),
            "{egresses:#}"
        );
        assert!(item["txPackets"].as_u64().unwrap() > 0);
    }

    let pinned = json(&topology, 0, "maps");
    let find = |name: &str| {
        let maps = pinned["maps"].as_array().unwrap().iter();
        maps.filter(|map| map["path"].as_str().unwrap().ends_with(name)).cloned().collect::<Vec<_>>()
    };
    assert_eq!(find("/v1/flows_v4")[0]["entries"], 1, "{pinned:#}");
    assert_eq!(
        (&find("/v1/flows_v4")[0]["capacity"], &find("/v1/flows_v4")[0]["type"]),
        (&4096.into(), &"hash".into())
    );
    assert_eq!(find("/events").len(), 2, "one of the node, one of the gateway: {pinned:#}");
    let programs = pinned["programs"].as_array().unwrap();
    assert_eq!(programs.len(), 5, "two at each of two pods, one in the gateway: {pinned:#}");
    assert!(programs.iter().all(|program| program["programId"].as_u64().is_some()), "{pinned:#}");

    // Tables for people: as wide as they must be, with all columns.
    for (arguments, words) in [
        ("conntrack -o wide", ["EXPIRES", "test/vclient", "SEEN-AS"]),
        ("policy", ["DESTINATION", "through Egress internet/nat", "egress pod"]),
        ("egress", ["SHARE", "100.0%", "test/vgateway"]),
        ("egress -o wide", ["ORIGINATING-ONLY", "no", "TX-BYTES"]),
        ("drops", ["Nothing", "has", "dropped"]),
        ("drops --all --reason no_gateway --where node", ["no_gateway", "node", "No gateway"]),
        ("maps links/", ["from_pod", "to_pod", "No such map is pinned"]),
        ("maps", ["flows_v4", "from_pod", "layouts of version"]),
    ] {
        let printed = text(&topology, 0, arguments);
        for word in words {
            assert!(printed.contains(word), "{arguments} without {word}:\n{printed}");
        }
    }
}

/// A `coilctl monitor` that has said that it listens.
struct Monitor {
    child: Child,
    complaints: BufReader<std::process::ChildStderr>,
}

impl Monitor {
    fn start(topology: &Topology, arguments: &str) -> Self {
        let mut command =
            command(topology.bpffs.root(), &format!("monitor -o json --duration 60 {arguments}"));
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = topology.node.run(move || command.spawn()).unwrap();
        let mut complaints = BufReader::new(child.stderr.take().unwrap());
        let mut line = String::new();
        complaints.read_line(&mut line).unwrap();
        assert_eq!(line, "listening: node, test/vgateway\n");
        Self { child, complaints }
    }

    fn events(mut self) -> Vec<Value> {
        let mut out = String::new();
        self.child.stdout.take().unwrap().read_to_string(&mut out).unwrap();
        let mut more = String::new();
        self.complaints.read_to_string(&mut more).unwrap();
        assert!(self.child.wait().unwrap().success(), "{out}{more}");
        out.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }
}

impl Drop for Monitor {
    fn drop(&mut self) {
        if let Err(error) = self.child.kill() {
            eprintln!("cannot end the monitor: {error}");
        }
        if let Err(error) = self.child.wait() {
            eprintln!("cannot wait for the monitor: {error}");
        }
    }
}

/// Sends datagrams from the client's pod to a port of the world where nobody listens.
fn send_datagrams(topology: &Topology, source_ports: std::ops::Range<u16>) {
    let (own, world) = (topology.client.address(false), topology.external.address(false));
    topology.client.net.run(move || {
        for port in source_ports {
            let socket = UdpSocket::bind((own, port)).unwrap();
            socket.send_to(b"x", (world, 9)).unwrap();
        }
    });
}

#[test]
#[ignore = "privileged: needs root and the eBPF object"]
fn monitor_shows_flows_and_drops_live() {
    let topology = Topology::new();
    let node = topology.apply(topology.open_node(None), &topology.state());
    let _gateway = topology.open_gateway();
    send_datagrams(&topology, 30_000..30_001);

    let monitor = Monitor::start(&topology, "--flows --count 2");
    let (code, _, err) = run(&topology.node, topology.bpffs.root(), "monitor --duration 1");
    assert_eq!(code, 1);
    assert!(err.contains("another coilctl monitor listens"), "{err}");
    send_datagrams(&topology, 31_000..31_001);
    let mut events = monitor.events();
    events.sort_by_key(|event| event["program"].to_string());
    let (own, world) = (topology.client.address(false), topology.external.address(false));
    for (event, program) in events.iter().zip(["from_pod", "gateway"]) {
        assert_eq!((&event["event"], &event["program"]), (&"flow".into(), &program.into()), "{event:#}");
        assert_eq!(event["source"], socket(own, 31_000), "not what was before it listened: {event:#}");
        assert_eq!(event["destination"], socket(world, 9), "{event:#}");
        assert_eq!(event["pod"], "test/vclient", "{event:#}");
    }
    assert_eq!((&events[0]["egress"], &events[0]["where"]), (&"internet/nat".into(), &"node".into()));
    assert_eq!(events[1]["seenAs"], socket(topology.gateway.address(false), 31_000), "{:#}", events[1]);

    let mut state = topology.state();
    state.egresses.get_mut(&egress_name()).unwrap().v4.clear();
    let _node = topology.apply(node, &state);
    let monitor = Monitor::start(&topology, "--drops --count 1 --pod test/vclient");
    send_datagrams(&topology, 32_000..32_001);
    let events = monitor.events();
    let drop = &events[0];
    assert_eq!((&drop["event"], &drop["reason"]), (&"drop".into(), &"no_gateway".into()), "{drop:#}");
    assert_eq!((&drop["source"], &drop["bytes"]), (&socket(own, 32_000).into(), &29.into()), "{drop:#}");
    let counted = json(&topology, 0, "drops");
    assert_eq!(counted["items"][0]["reason"], "no_gateway", "{counted:#}");
}

#[test]
#[ignore = "privileged: needs root and the eBPF object"]
fn a_flood_of_events_is_bounded_and_counted() {
    let topology = Topology::new();
    let _node = topology.apply(topology.open_node(None), &topology.state());
    let _gateway = topology.open_gateway();
    let monitor = Monitor::start(&topology, "--flows");
    let before = Instant::now();
    send_datagrams(&topology, 20_000..26_000);
    let seconds = before.elapsed().as_secs() + 2;
    let count = || entries(&topology)[0];
    assert!(wait_for("flows", || (count() >= 4000).then(count)) >= 4000);
    // The next look at what was lost tells of it.
    let mut monitor = monitor;
    let mut events = 0;
    let lost = BufReader::new(monitor.child.stdout.take().unwrap()).lines().find_map(|line| {
        let event: Value = serde_json::from_str(&line.unwrap()).unwrap();
        events += 1;
        (event["event"] == "lost").then_some(event)
    });
    let lost = lost.expect("a flood loses events");
    assert!(lost["count"].as_u64().unwrap() > 0, "{lost:#}");
    let cpus = u64::try_from(aya::util::nr_cpus().unwrap()).unwrap();
    let most = 2 * cpus * (seconds + 1) * u64::from(coil_common::events::EVENT_BUDGET);
    assert!(events <= most, "{events} events");
}

#[test]
#[ignore = "privileged: needs root and the eBPF object"]
fn errors_are_clear_and_have_their_status() {
    let topology = Topology::new();
    let _node = topology.apply(topology.open_node(None), &topology.state());
    let root = topology.bpffs.root();
    let fails = |root: &Path, arguments: &str| {
        let (code, _, err) = run(&topology.node, root, arguments);
        (code, err)
    };
    let (code, err) = fails(Path::new("/nonexistent"), "drops");
    assert_eq!(code, 3);
    assert!(err.contains("nothing is pinned under /nonexistent"), "{err}");
    let other: PathBuf = root.join("other");
    std::fs::create_dir_all(other.join("v999")).unwrap();
    let (code, err) = fails(&other, "drops");
    assert_eq!(code, 3);
    assert!(err.contains("v999"), "{err}");
    let (code, err) = fails(root, "explain test/nobody 192.0.2.1");
    assert_eq!(code, 1);
    assert!(err.contains("knows no pod test/nobody; it knows") && err.contains("test/vclient"), "{err}");
    let (code, err) = fails(root, "conntrack --gateway nobody");
    assert_eq!(code, 1);
    assert!(err.contains("no egress pod nobody"), "{err}");
    // The pins are root's alone.
    let mut command = command(root, "drops");
    std::os::unix::process::CommandExt::uid(&mut command, 65_534);
    let output = topology.node.run(move || command.output()).unwrap();
    let err = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{err}");
    assert!(err.contains("may not read") && err.contains("run as root"), "{err}");
    // Read-only descriptors are all that listings take: a map that may only be read is enough.
    let map = topology.bpffs.node().join("drops");
    std::fs::set_permissions(&map, std::os::unix::fs::PermissionsExt::from_mode(0o400)).unwrap();
    assert_eq!(fails(root, "drops").0, 0);
}
