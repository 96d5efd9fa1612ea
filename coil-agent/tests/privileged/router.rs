//! The routes of `coil-router` in the kernel's main table.

#![expect(clippy::unwrap_used, reason = "tests")]

use coil_agent::router::cluster::Wanted;
use coil_agent::router::kernel::{MainTable, RouteTable};
use coil_agent::router::plan::plan;

use crate::support::net::NetNs;

const PROTOCOL: u8 = 31;

/// A node with a link on which other nodes could be.
fn node() -> NetNs {
    let space = NetNs::new("router");
    space.ip_batch(
        "",
        &[
            "link add uplink type veth peer name other",
            // No link-local addresses, whose routes come by themselves when nobody else has them.
            "link set other addrgenmode none",
            "link set uplink addrgenmode none",
            "address add 10.0.0.1/24 dev uplink",
            "address add fd00::1/64 dev uplink nodad",
            "link set other up",
            "link set uplink up",
        ],
    );
    space
}

/// Makes the routes so, and returns the destinations that others keep us from.
fn sync(space: &NetNs, routes: &[(&str, &str)]) -> Vec<String> {
    let wanted: Wanted =
        routes.iter().map(|(net, via)| (net.parse().unwrap(), via.parse().unwrap())).collect();
    space.run(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let table = MainTable::new(PROTOCOL).unwrap();
            let first = plan(&table.list().await.unwrap(), &wanted);
            for op in &first.ops {
                table.apply(op).await.unwrap();
            }
            let second = plan(&table.list().await.unwrap(), &wanted);
            assert_eq!((second.ops, &second.taken), (vec![], &first.taken), "all is done at once");
            first.taken.iter().map(ToString::to_string).collect()
        })
    })
}

/// Routes with our protocol identifier, as `ip` tells them.
fn ours(space: &NetNs) -> Vec<String> {
    let mut lines = Vec::new();
    for family in ["-4", "-6"] {
        let text = space.ip(&format!("{family} route show table main proto {PROTOCOL}"));
        lines.extend(text.lines().map(|line| {
            let words: Vec<_> = line.split_whitespace().take(3).collect();
            words.join(" ")
        }));
    }
    lines.sort();
    lines
}

fn foreign(space: &NetNs) -> Vec<String> {
    let mut lines = Vec::new();
    for family in ["-4", "-6"] {
        let text = space.ip(&format!("{family} route show table all"));
        let own = format!("proto {PROTOCOL}");
        lines.extend(text.lines().filter(|line| !line.contains(&own)).map(|line| line.trim().to_owned()));
    }
    lines
}

#[test]
#[ignore = "privileged: needs root"]
fn n7_routes_are_added_moved_and_removed_and_those_of_others_stay() {
    let space = node();
    space.ip_batch(
        "",
        &[
            "route add 10.9.0.0/16 via 10.0.0.9",
            "route add 10.2.0.64/27 via 10.0.0.9 proto 30",
            "route add 10.2.0.128/27 via 10.0.0.9 proto 30 table 119",
            "route add fd09::/64 via fd00::9 proto 30",
        ],
    );
    let before = foreign(&space);
    let taken = sync(
        &space,
        &[
            ("10.2.0.0/27", "10.0.0.2"),
            ("10.2.0.32/27", "10.0.0.2"),
            ("10.2.0.64/27", "10.0.0.2"),
            ("fd02::/123", "fd00::2"),
            ("fd02::20/123", "fd00::2"),
        ],
    );
    assert_eq!(taken, ["10.2.0.64/27"]);
    assert_eq!(
        ours(&space),
        [
            "10.2.0.0/27 via 10.0.0.2",
            "10.2.0.32/27 via 10.0.0.2",
            "fd02::/123 via fd00::2",
            "fd02::20/123 via fd00::2",
        ]
    );
    // One goes, one moves, one comes, in each family.
    let next = [
        ("10.2.0.32/27", "10.0.0.3"),
        ("10.2.0.96/27", "10.0.0.3"),
        ("fd02::20/123", "fd00::3"),
        ("fd02::40/123", "fd00::3"),
    ];
    assert_eq!(sync(&space, &next), Vec::<String>::new());
    assert_eq!(
        ours(&space),
        [
            "10.2.0.32/27 via 10.0.0.3",
            "10.2.0.96/27 via 10.0.0.3",
            "fd02::20/123 via fd00::3",
            "fd02::40/123 via fd00::3",
        ]
    );
    // What people do to our routes is put right, odd ones of our identifier go.
    space.ip_batch(
        "",
        &[
            "route del 10.2.0.96/27",
            "route replace blackhole 10.2.0.32/27 proto 31",
            "route add 10.7.0.0/16 via 10.0.0.3 proto 31 metric 50",
            "route add fd02::20/123 via fd00::4 proto 31 metric 7",
        ],
    );
    assert_eq!(sync(&space, &next), Vec::<String>::new());
    assert_eq!(ours(&space).len(), 4);
    assert_eq!(ours(&space)[0], "10.2.0.32/27 via 10.0.0.3");
    sync(&space, &[]);
    assert_eq!(ours(&space), Vec::<String>::new());
    assert_eq!(foreign(&space), before);
}

#[test]
#[ignore = "privileged: needs root"]
fn a_router_that_is_not_on_the_link_is_an_error_of_its_route_alone() {
    let space = node();
    space.run(|| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let table = MainTable::new(PROTOCOL).unwrap();
            let wanted: Wanted = [("10.2.0.0/27", "192.0.2.1"), ("10.2.0.32/27", "10.0.0.2")]
                .map(|(net, via)| (net.parse().unwrap(), via.parse().unwrap()))
                .into();
            let plan = plan(&table.list().await.unwrap(), &wanted);
            let mut outcomes = Vec::new();
            for op in &plan.ops {
                outcomes.push(table.apply(op).await.map_err(|error| error.errno()));
            }
            assert_eq!(outcomes, [Err(Some(libc::ENETUNREACH)), Ok(())]);
        });
    });
    assert_eq!(ours(&space), ["10.2.0.32/27 via 10.0.0.2"]);
}
