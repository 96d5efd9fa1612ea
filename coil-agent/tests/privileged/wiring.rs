//! Wiring of pods in IPAM mode: the scenarios N1 to N5 of the specification, and what may be in the way.

#![expect(clippy::unwrap_used, reason = "tests")]

use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use coil_agent::cni::result::add_result;
use coil_agent::ipam::{Assigned, Found, NodeAddresses, Owner};
use coil_agent::netlink::{Netlink, RtNetlink};
use coil_agent::wiring::{
    Config, ErrorClass, Request, Told, Wire, Wired, Wiring, WiringError, calico_name, host_name,
};

use crate::support::net::NetNs;
use crate::support::wait_for;

const NODE4: &str = "192.168.7.1";
const NODE6: &str = "fd07::1";

fn config() -> Config {
    Config {
        pod_table: 116,
        rule_priority: 2000,
        protocol: 30,
        compat_calico: false,
        register_from_main: false,
    }
}

fn wiring_with(config: Config) -> Wiring {
    let wiring = Wiring::new(config);
    wiring.set_node(NodeAddresses { ipv4: Some(NODE4.parse().unwrap()), ipv6: Some(NODE6.parse().unwrap()) });
    wiring
}

/// A node with a way out.
struct Bed {
    node: NetNs,
    _outside: NetNs,
}

impl Bed {
    fn new() -> Self {
        let (node, outside) = (NetNs::new("node"), NetNs::new("outside"));
        node.ip_batch(
            "",
            &[
                format!("link add uplink mtu 1400 type veth peer name eth0 netns {}", outside.name()),
                format!("address add {NODE4}/24 dev uplink"),
                format!("address add {NODE6}/64 dev uplink nodad"),
                "link set uplink up".to_owned(),
                "route add default via 192.168.7.2".to_owned(),
            ],
        );
        outside.ip("link set eth0 up");
        Self { node, _outside: outside }
    }

    /// Runs in the name space of the node, with a runtime.
    #[track_caller]
    fn run<T: Send + 'static, F: Future<Output = T>>(&self, work: impl FnOnce() -> F + Send + 'static) -> T {
        self.node.run(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async { work().await })
        })
    }

    /// Wires pods one after the other.
    #[track_caller]
    fn wire(&self, wiring: &Wiring, pods: &[&Pod]) -> Vec<Wired> {
        let (wiring, requests) = (wiring.clone(), pods.iter().map(|pod| pod.request()).collect::<Vec<_>>());
        self.run(move || async move {
            wiring.prepare_host(&mut Told::default()).await;
            let mut wired = Vec::new();
            for request in requests {
                wired.push(wiring.setup(request).await.unwrap());
            }
            wired
        })
    }

    #[track_caller]
    fn setup(&self, wiring: &Wiring, request: Request) -> Result<Wired, WiringError> {
        let wiring = wiring.clone();
        self.run(move || async move {
            wiring.prepare_host(&mut Told::default()).await;
            wiring.setup(request).await
        })
    }

    #[track_caller]
    fn destroy(&self, wiring: &Wiring, owner: Owner) -> bool {
        let wiring = wiring.clone();
        self.run(move || async move { !wiring.destroy(&owner).await.unwrap().is_empty() })
    }

    #[track_caller]
    fn list(&self, wiring: &Wiring) -> Vec<Found> {
        let wiring = wiring.clone();
        let links = self.run(move || async move { wiring.list().await.unwrap() });
        let mut found: Vec<Found> = links.into_iter().map(|link| link.found).collect();
        found.sort_by(|a, b| a.owner.cmp(&b.owner));
        found
    }

    /// Interfaces of pods on the node.
    fn veths(&self) -> Vec<String> {
        let text = self.node.ip("-br link show type veth");
        let names = text.lines().filter_map(|line| line.split(['@', ' ']).next());
        names.filter(|name| name.starts_with("veth")).map(str::to_owned).collect()
    }

    fn routes(&self, v6: bool) -> String {
        // `ip` calls it an error that a table does not exist.
        let family = if v6 { "-6" } else { "-4" };
        self.node.ip(&format!("{family} route show table all proto 30"))
    }
}

/// A pod's name space and what it shall have.
struct Pod {
    net: NetNs,
    container: String,
    ipv4: Option<&'static str>,
    ipv6: Option<&'static str>,
}

impl Pod {
    fn new(name: &str, ipv4: Option<&'static str>, ipv6: Option<&'static str>) -> Self {
        Self { net: NetNs::new(name), container: format!("container-{name}"), ipv4, ipv6 }
    }

    fn owner(&self) -> Owner {
        Owner { container_id: self.container.clone(), ifname: "eth0".into() }
    }

    fn assigned(&self) -> Assigned {
        Assigned {
            pool: "default".into(),
            ipv4: self.ipv4.map(|text| text.parse().unwrap()),
            ipv6: self.ipv6.map(|text| text.parse().unwrap()),
        }
    }

    fn request(&self) -> Request {
        Request {
            owner: self.owner(),
            assigned: self.assigned(),
            netns: self.net.path(),
            namespace: "default".into(),
            pod: self.container.clone(),
            uid: format!("uid-{}", self.container),
        }
    }

    fn addresses(&self) -> Vec<IpAddr> {
        [self.ipv4, self.ipv6].into_iter().flatten().map(|text| text.parse().unwrap()).collect()
    }

    /// Packets go there and back: nobody listens, which is what the other side says.
    #[track_caller]
    fn reaches(&self, address: IpAddr) {
        let result = self
            .net
            .run(move || TcpStream::connect_timeout(&SocketAddr::new(address, 9), Duration::from_secs(10)));
        let error = result.expect_err("nobody should listen");
        assert_eq!(error.kind(), ErrorKind::ConnectionRefused, "{} to {address}: {error}", self.container);
    }
}

/// The mixes of families of the specification.
fn six() -> [Pod; 6] {
    [
        Pod::new("p1", Some("10.1.0.1"), Some("fd01::1")),
        Pod::new("p2", Some("10.1.0.2"), None),
        Pod::new("p3", None, Some("fd01::3")),
        Pod::new("p4", Some("10.1.0.4"), Some("fd01::4")),
        Pod::new("p5", Some("10.1.0.5"), None),
        Pod::new("p6", None, Some("fd01::6")),
    ]
}

#[test]
#[ignore = "privileged: needs root"]
fn n1_a_pod_gets_its_interface_addresses_and_routes() {
    let (bed, pods) = (Bed::new(), six());
    let wiring = wiring_with(config());
    let wired = bed.wire(&wiring, &pods.each_ref());
    for (pod, wired) in pods.iter().zip(wired) {
        let result = add_result("eth0", &pod.net.path(), &wired, &pod.assigned());
        assert_eq!(result["cniVersion"], "1.1.0");
        let interfaces = result["interfaces"].as_array().unwrap();
        assert_eq!(interfaces.len(), 2);
        assert_eq!(interfaces[0]["name"], "eth0");
        assert_eq!(interfaces[0]["sandbox"], pod.net.path().display().to_string());
        assert_eq!(interfaces[1]["name"], wired.name);
        let ips: Vec<&str> =
            result["ips"].as_array().unwrap().iter().map(|ip| ip["address"].as_str().unwrap()).collect();
        let wanted: Vec<String> = pod
            .addresses()
            .iter()
            .map(|ip| format!("{ip}/{}", if ip.is_ipv4() { 32 } else { 128 }))
            .collect();
        assert_eq!(ips, wanted);

        let inside = pod.net.ip("address show dev eth0");
        assert!(inside.contains(result["interfaces"][0]["mac"].as_str().unwrap()), "{inside}");
        assert!(inside.contains("mtu 1400"), "{inside}");
        for address in &wanted {
            assert!(inside.contains(address), "{inside}");
        }
        // Usable at once.
        let global = pod.net.ip("-6 address show dev eth0 scope global");
        assert!(!global.contains("tentative"), "{global}");
        let labels = bed.node.ip(&format!("link show dev {}", wired.name));
        assert!(labels.contains(&format!("alias COIL:default:{}:eth0", pod.container)), "{labels}");
        assert!(labels.contains(&format!("altname coil-pod.uid-{}.", pod.container)), "{labels}");
        let host = bed.node.ip(&format!("address show dev {}", wired.name));
        assert!(host.contains("mtu 1400"), "{host}");
        assert!(pod.ipv6.is_none() || !host.contains("tentative"), "{host}");
        assert_eq!(host.contains(NODE4), pod.ipv4.is_some(), "{host}");
        assert_eq!(host.contains(NODE6), pod.ipv6.is_some(), "{host}");
        if pod.ipv6.is_some() {
            let path = format!("/proc/sys/net/ipv6/conf/{}/accept_ra", wired.name);
            let accept_ra = bed.node.run(move || std::fs::read_to_string(path).unwrap());
            assert_eq!(accept_ra.trim(), "0");
        }
    }
    for (v6, count) in [(false, 4), (true, 4)] {
        let routes = bed.routes(v6);
        assert_eq!(routes.matches("table 116").count(), count, "{routes}");
    }
    for family in ["-4", "-6"] {
        let rules = bed.node.ip(&format!("{family} rule show pref 2000"));
        assert!(rules.contains("from all lookup 116"), "{rules}");
    }
    for name in ["net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding"] {
        let value = bed.node.run(move || std::fs::read_to_string(format!("/proc/sys/{name}")).unwrap());
        assert_eq!(value.trim(), "1", "{name}");
    }
}

#[test]
#[ignore = "privileged: needs root"]
fn n2_pods_reach_the_node_and_each_other() {
    let (bed, pods) = (Bed::new(), six());
    let wiring = wiring_with(config());
    bed.wire(&wiring, &pods.each_ref());
    for pod in &pods {
        for (node, own) in [(NODE4, pod.ipv4), (NODE6, pod.ipv6)] {
            if own.is_some() {
                pod.reaches(node.parse().unwrap());
            }
        }
    }
    for (from, to) in [(0, 3), (3, 0), (0, 1), (1, 4), (2, 5), (5, 0)] {
        let (from, to) = (&pods[from], &pods[to]);
        for address in to.addresses() {
            let common = if address.is_ipv4() { from.ipv4.is_some() } else { from.ipv6.is_some() };
            if common {
                from.reaches(address);
            }
        }
    }
}

/// The original runs its hook inside the name space of a pod that it finds by an address; we attach to the
/// host-side interface, which must be the one that leads into the right name space.
#[test]
#[ignore = "privileged: needs root"]
fn n3_a_pod_is_found_by_either_address() {
    let (bed, pods) = (Bed::new(), six());
    let wiring = wiring_with(config());
    bed.wire(&wiring, &pods.each_ref());
    let questions: Vec<(PathBuf, Vec<IpAddr>)> =
        pods.iter().map(|pod| (pod.net.path(), pod.addresses())).collect();
    bed.run(move || async move {
        let netlink = RtNetlink::new().unwrap();
        for (netns, addresses) in questions {
            let wanted = netlink.host_peer(&netns, "eth0").await.unwrap();
            for address in addresses {
                let found = netlink.veth_towards(address).await.unwrap().unwrap();
                assert_eq!(found.index, wanted.index, "{address} in {}", netns.display());
            }
        }
    });
}

#[test]
#[ignore = "privileged: needs root"]
fn n4_check_follows_destroy_and_destroy_may_come_twice() {
    let bed = Bed::new();
    let pods = [Pod::new("a", Some("10.1.0.1"), Some("fd01::1")), Pod::new("b", Some("10.1.0.2"), None)];
    let wiring = wiring_with(config());
    let wired = bed.wire(&wiring, &pods.each_ref());
    let check = |wiring: &Wiring, pod: &Pod| {
        let (wiring, owner) = (wiring.clone(), pod.owner());
        bed.run(move || async move { wiring.check(&owner).await })
    };
    assert_eq!(check(&wiring, &pods[0]).unwrap().index, wired[0].index);
    // A process that has just started knows nothing, and finds them nevertheless.
    let restarted = wiring_with(config());
    let link = check(&restarted, &pods[1]).unwrap();
    assert_eq!((link.index, link.uid.as_deref()), (wired[1].index, Some("uid-container-b")));
    bed.node.ip(&format!("link set {} down", wired[1].name));
    assert!(matches!(check(&wiring, &pods[1]).unwrap_err(), WiringError::Damaged { .. }));
    assert!(bed.destroy(&restarted, pods[0].owner()));
    assert!(matches!(check(&wiring, &pods[0]).unwrap_err(), WiringError::Missing { .. }));
    assert!(!bed.destroy(&wiring, pods[0].owner()));
    assert!(!bed.destroy(&restarted, pods[0].owner()));
    assert_eq!(bed.veths(), [wired[1].name.as_str()]);
    assert!(!bed.routes(false).contains("10.1.0.1"));
    assert!(!bed.routes(true).contains("fd01::1"));
}

#[test]
#[ignore = "privileged: needs root"]
fn n5_what_is_wired_is_found_again() {
    let (bed, pods) = (Bed::new(), six());
    let wiring = wiring_with(config());
    bed.wire(&wiring, &pods.each_ref());
    // Not ours: an egress-only pod's, and somebody's with a strange alias.
    for (name, alias) in [("other0", "COIL::some-uid:eth0"), ("other1", "COIL:a:b")] {
        bed.node.ip(&format!("link add {name} type veth peer name {name}p"));
        bed.node.ip(&format!("link set {name} alias {alias}"));
    }
    let found = bed.list(&wiring_with(config()));
    let wanted: Vec<Found> =
        pods.iter().map(|pod| Found { owner: pod.owner(), assigned: pod.assigned() }).collect();
    assert_eq!(found, wanted);
    assert_eq!((found[1].assigned.ipv6, found[2].assigned.ipv4), (None, None));
}

/// A node of the original: other names, routes of the same table, or of the main one for early releases.
#[test]
#[ignore = "privileged: needs root"]
fn what_the_original_has_wired_is_adopted() {
    let bed = Bed::new();
    let pods = [Pod::new("a", Some("10.1.0.1"), None), Pod::new("b", Some("10.1.0.2"), None)];
    for (pod, name, table) in
        [(&pods[0], "veth0a1b2c3d", "116 proto 30"), (&pods[1], "veth12345678", "main proto 3")]
    {
        bed.node.ip_batch(
            "",
            &[
                format!("link add {name} type veth peer name eth0 netns {}", pod.net.name()),
                format!("link set {name} up alias COIL:default:{}:eth0", pod.container),
                format!("route add {} dev {name} table {table}", pod.ipv4.unwrap()),
            ],
        );
    }
    let found = |register_from_main| bed.list(&wiring_with(Config { register_from_main, ..config() }));
    let wanted = |pod: &Pod| Found { owner: pod.owner(), assigned: pod.assigned() };
    let unknown = Assigned { ipv4: None, ..pods[1].assigned() };
    assert_eq!(found(false), [wanted(&pods[0]), Found { owner: pods[1].owner(), assigned: unknown }]);
    assert_eq!(found(true), [wanted(&pods[0]), wanted(&pods[1])]);
    // ADD for the same sandbox replaces it, DEL removes it.
    let wiring = wiring_with(config());
    bed.list(&wiring);
    let wired = bed.setup(&wiring, pods[0].request()).unwrap();
    assert_eq!(wired.name, host_name(&pods[0].owner(), 0));
    assert!(bed.destroy(&wiring, pods[1].owner()));
    assert_eq!(bed.veths(), [wired.name]);
}

#[test]
#[ignore = "privileged: needs root"]
fn what_an_earlier_attempt_has_left_is_replaced() {
    let bed = Bed::new();
    let pod = Pod::new("a", Some("10.1.0.1"), Some("fd01::1"));
    let peer = format!("type veth peer name eth0 netns {}", pod.net.name());
    let name = host_name(&pod.owner(), 0);
    let alias = "COIL:default:container-a:eth0";
    let left: [&[String]; 4] = [
        // Killed before it was labelled, after it, and under names that we would not choose.
        &[format!("link add {name} {peer}")],
        &[format!("link add {name} {peer}"), format!("link set {name} up alias {alias}")],
        &[format!("link add veth99 {peer}"), format!("link set veth99 alias {alias}")],
        &[format!("link add {} {peer}", host_name(&pod.owner(), 3))],
    ];
    for left in left {
        bed.node.ip_batch("", left);
        // Of a process that was killed: the new one remembers nothing.
        let wired = bed.setup(&wiring_with(config()), pod.request()).unwrap();
        assert_eq!(bed.veths(), [wired.name.as_str()]);
        pod.reaches(NODE6.parse().unwrap());
        assert!(bed.destroy(&wiring_with(config()), pod.owner()));
    }
    // ADD twice: the second replaces what the first has made.
    let wiring = wiring_with(config());
    let first = bed.setup(&wiring, pod.request()).unwrap();
    let second = bed.setup(&wiring, pod.request()).unwrap();
    assert_ne!(first.index, second.index);
    assert_eq!(bed.veths(), [second.name.as_str()]);
    pod.reaches(NODE4.parse().unwrap());
}

#[test]
#[ignore = "privileged: needs root"]
fn what_belongs_to_others_stays_and_nothing_of_ours_is_left() {
    let bed = Bed::new();
    let pod = Pod::new("a", Some("10.1.0.1"), Some("fd01::1"));
    let wiring = wiring_with(config());
    let pristine = || {
        assert_eq!(bed.veths(), Vec::<String>::new());
        assert_eq!((bed.routes(false), bed.routes(true)), (String::new(), String::new()));
    };

    // An interface in the pod: of another plugin, or of another container.
    for alias in ["", "alias COIL:default:somebody:eth0"] {
        bed.node.ip(&format!("link add other type veth peer name eth0 netns {}", pod.net.name()));
        if !alias.is_empty() {
            bed.node.ip(&format!("link set other {alias}"));
        }
        let error = bed.setup(&wiring, pod.request()).unwrap_err();
        assert!(matches!(error, WiringError::Occupied { .. }), "{error:?}");
        pristine();
        bed.node.ip("link del other");
    }

    // A route to the pod's address.
    for (family, address) in [("-4", "10.1.0.1/32"), ("-6", "fd01::1/128")] {
        let route = format!("{address} dev uplink table 116 proto 99");
        bed.node.ip(&format!("{family} route add {route}"));
        let error = bed.setup(&wiring, pod.request()).unwrap_err();
        assert!(matches!(error, WiringError::ForeignRoute { protocol: 99, .. }), "{error:?}");
        assert!(error.to_string().contains("uplink"), "{error}");
        pristine();
        assert!(bed.node.ip(&format!("{family} route show table 116")).contains("uplink"));
        assert!(!pod.net.ip("link show").contains("eth0"));
        bed.node.ip(&format!("{family} route del {route}"));
    }

    // An interface of the node that has our name.
    let name = host_name(&pod.owner(), 0);
    bed.node.ip(&format!("link add {name} type bridge"));
    let wired = bed.setup(&wiring, pod.request()).unwrap();
    assert_eq!(wired.name, host_name(&pod.owner(), 1));
    assert!(bed.destroy(&wiring, pod.owner()));
    bed.node.ip(&format!("link del {name}"));
    pristine();
}

#[test]
#[ignore = "privileged: needs root"]
fn the_rule_is_set_beside_those_of_others_and_again_when_it_was_removed() {
    let bed = Bed::new();
    bed.node.ip("rule add pref 2000 from 203.0.113.0/24 lookup 500");
    let wiring = wiring_with(config());
    let (node, rules) = (bed.node.name().to_owned(), |node: &str| {
        let show = ["-n", node, "rule", "show", "pref", "2000"];
        let output = std::process::Command::new("ip").args(show).output().unwrap();
        String::from_utf8(output.stdout).unwrap()
    });
    bed.run(move || async move {
        let mut told = Told::default();
        // Twice changes nothing.
        for _ in 0..2 {
            wiring.prepare_host(&mut told).await;
        }
        assert_eq!(rules(&node).lines().count(), 2, "{}", rules(&node));
        let keeper = wiring.clone();
        let keeper = tokio::spawn(async move { keeper.keep_host(told).await });
        for _ in 0..2 {
            let status = std::process::Command::new("ip")
                .args(["-n", &node, "rule", "del", "pref", "2000", "lookup", "116"])
                .status();
            assert!(status.unwrap().success());
            let back = async {
                while !rules(&node).contains("from all lookup 116") {
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
            };
            tokio::time::timeout(Duration::from_secs(20), back).await.unwrap();
        }
        assert!(rules(&node).contains("203.0.113.0/24"));
        keeper.abort();
    });
}

#[test]
#[ignore = "privileged: needs root"]
fn names_as_calico_expects_them() {
    let bed = Bed::new();
    let wiring = wiring_with(Config { compat_calico: true, ..config() });
    let old = Pod::new("old", Some("10.1.0.1"), None);
    let mut new = Pod::new("new", Some("10.1.0.2"), None);
    let name = calico_name("default", "web-0");
    let request = |pod: &Pod| Request { pod: "web-0".into(), ..pod.request() };
    assert_eq!(bed.setup(&wiring, request(&old)).unwrap().name, name);
    // A new sandbox of the same pod.
    assert_eq!(bed.setup(&wiring, request(&new)).unwrap().name, name);
    assert_eq!(bed.list(&wiring).iter().map(|found| &found.owner).collect::<Vec<_>>(), [&new.owner()]);
    assert!(!bed.destroy(&wiring, old.owner()));
    assert_eq!(bed.veths(), [name.as_str()]);
    assert!(bed.destroy(&wiring, new.owner()));
    bed.node.ip(&format!("link add {name} type bridge"));
    new.container = "again".into();
    let error = bed.setup(&wiring, request(&new)).unwrap_err();
    assert!(matches!(error, WiringError::NameTaken { .. }), "{error:?}");
}

#[test]
#[ignore = "privileged: needs root"]
fn a_name_space_that_vanishes_is_no_reason_to_leave_anything() {
    let bed = Bed::new();
    let wiring = wiring_with(config());
    let gone =
        Request { netns: "/run/netns/never-was".into(), ..Pod::new("x", Some("10.1.0.9"), None).request() };
    assert_eq!(bed.setup(&wiring, gone.clone()).unwrap_err().class(), ErrorClass::Gone);
    let not_one = Request { netns: "/proc/version".into(), ..gone.clone() };
    assert_eq!(bed.setup(&wiring, not_one).unwrap_err().class(), ErrorClass::Gone);
    let own = Request { netns: bed.node.path(), ..gone };
    assert!(matches!(bed.setup(&wiring, own).unwrap_err(), WiringError::NodeNamespace(_)));
    for round in 0..20 {
        let name = format!("v{round}");
        let pod = Pod::new(&name, Some("10.1.0.1"), Some("fd01::1"));
        let (wiring, request, space) = (wiring.clone(), pod.request(), pod.net.name().to_owned());
        let result = bed.run(move || async move {
            let adding = tokio::spawn({
                let wiring = wiring.clone();
                async move { wiring.setup(request).await }
            });
            let deleting = tokio::task::spawn_blocking(move || {
                assert!(
                    std::process::Command::new("ip")
                        .args(["netns", "del", &space])
                        .status()
                        .unwrap()
                        .success()
                );
            });
            deleting.await.unwrap();
            adding.await.unwrap()
        });
        if let Err(error) = result {
            assert_eq!(error.class(), ErrorClass::Gone, "{error:?}");
        }
        wait_for("the end of the interface", || bed.veths().is_empty().then_some(()));
        bed.node.ip("route show table all");
        // So that the guard has something to remove.
        crate::support::run(&format!("ip netns add {}", pod.net.name()));
    }
}

#[test]
#[ignore = "privileged: needs root"]
fn add_and_delete_of_one_container_at_the_same_time_leave_all_or_nothing() {
    let bed = Bed::new();
    let wiring = wiring_with(config());
    let pod = Pod::new("a", Some("10.1.0.1"), Some("fd01::1"));
    for _ in 0..20 {
        let (wiring, request) = (wiring.clone(), pod.request());
        bed.run(move || async move {
            let owner = request.owner.clone();
            let (added, deleted) = tokio::join!(wiring.setup(request), wiring.destroy(&owner));
            deleted.unwrap();
            drop(added);
            wiring.destroy(&owner).await.unwrap();
        });
        assert_eq!(bed.veths(), Vec::<String>::new());
        assert!(!pod.net.ip("link show").contains("eth0"));
    }
}

#[test]
#[ignore = "privileged: needs root"]
fn a_hundred_pods_at_once() {
    const PODS: u8 = 100;
    let bed = Bed::new();
    let wiring = wiring_with(config());
    let spaces: Vec<NetNs> = (0..PODS).map(|number| NetNs::new(&format!("h{number}"))).collect();
    let requests: Vec<Request> = spaces
        .iter()
        .zip(0u8..)
        .map(|(space, number)| Request {
            owner: Owner { container_id: format!("c{number}"), ifname: "eth0".into() },
            assigned: Assigned {
                pool: "default".into(),
                ipv4: Some([10, 1, 1, number].into()),
                ipv6: Some(format!("fd01::1:{number:x}").parse().unwrap()),
            },
            netns: space.path(),
            namespace: "default".into(),
            pod: format!("pod-{number}"),
            uid: format!("uid-{number}"),
        })
        .collect();
    let worker = wiring.clone();
    bed.run(move || async move {
        let begin = Instant::now();
        let tasks: Vec<_> = requests
            .iter()
            .map(|request| {
                let (wiring, request) = (worker.clone(), request.clone());
                tokio::spawn(async move { wiring.setup(request).await })
            })
            .collect();
        for task in tasks {
            task.await.unwrap().unwrap();
        }
        println!("{PODS} pods at once: {:?}", begin.elapsed());
        let mut single = Vec::new();
        for request in requests {
            worker.destroy(&request.owner).await.unwrap();
            let begin = Instant::now();
            worker.setup(request).await.unwrap();
            single.push(begin.elapsed());
        }
        single.sort();
        println!("alone: p50 {:?}, p99 {:?}", single[single.len() / 2], single[single.len() * 99 / 100]);
    });
    let found = bed.list(&wiring_with(config()));
    assert_eq!(found.len(), usize::from(PODS));
    assert!(found.iter().all(|found| found.assigned.ipv4.is_some() && found.assigned.ipv6.is_some()));
    assert_eq!(bed.veths().len(), usize::from(PODS));
}
