//! Export of routes to a table of the kernel.

#![expect(clippy::unwrap_used, reason = "tests")]

use std::collections::BTreeSet;

use coil_agent::routes::{Export, Exporter, KernelTable};
use ipnet::IpNet;
use prometheus::Registry;

use crate::support::net::NetNs;

const TABLE: u32 = 119;
const PROTOCOL: u8 = 30;

/// Exports one set after the other inside a name space, each with an exporter of its own as after a
/// restart; returns the last one's number of conflicts.
fn export(space: &NetNs, sets: &[&[&str]]) -> i64 {
    let sets: Vec<BTreeSet<IpNet>> =
        sets.iter().map(|set| set.iter().map(|net| net.parse().unwrap()).collect()).collect();
    space.run(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let mut conflicts = 0;
            for set in sets {
                let registry = Registry::new();
                let table = KernelTable::new(TABLE, PROTOCOL).unwrap();
                let exporter = Exporter::new(table, PROTOCOL, &registry).unwrap();
                // Twice: the second time there is nothing to do.
                exporter.export(&set).await.unwrap();
                exporter.export(&set).await.unwrap();
                let families = registry.gather();
                let family = families.iter().find(|f| f.name() == "coil_export_conflicts").unwrap();
                #[expect(clippy::cast_possible_truncation, reason = "a small number")]
                let value = family.get_metric()[0].get_gauge().get_value() as i64;
                conflicts = value;
            }
            conflicts
        })
    })
}

/// Routes of the table as `ip` prints them, without what it adds by itself.
fn routes(space: &NetNs) -> Vec<String> {
    let show = |family: &str| {
        // A table that nobody has used yet is an error to `ip`.
        let output = std::process::Command::new("ip")
            .args(["-n", space.name(), family, "route", "show", "table", &TABLE.to_string()])
            .output()
            .unwrap();
        assert!(output.status.success() || output.stdout.is_empty());
        String::from_utf8(output.stdout).unwrap()
    };
    let mut lines: Vec<String> = [show("-4"), show("-6")]
        .iter()
        .flat_map(|text| text.lines())
        .map(|line| line.replace(" pref medium", "").replace(" metric 1024", "").trim().to_owned())
        .collect();
    lines.sort();
    lines
}

fn ours(nets: &[&str]) -> Vec<String> {
    let line = |net: &&str| {
        // `ip` leaves the length out where it is one address.
        let net = net.trim_end_matches("/32").trim_end_matches("/128");
        format!("{net} dev lo proto {PROTOCOL}")
    };
    let mut lines: Vec<String> = nets.iter().map(line).collect();
    lines.sort();
    lines
}

#[test]
#[ignore = "privileged: needs root"]
fn n6_the_table_equals_the_set() {
    let space = NetNs::new("export");
    let four = ["10.1.0.0/27", "10.1.0.32/27", "fd02::/123", "fd02::20/123"];
    assert_eq!(routes(&space), ours(&[]));
    assert_eq!(export(&space, &[&four]), 0);
    assert_eq!(routes(&space), ours(&four));
    for set in [&four[1..3], &["10.1.0.64/27", "10.9.0.1/32", "fd02::20/123", "fd03::1/128"], &[]] {
        assert_eq!(export(&space, &[set]), 0);
        assert_eq!(routes(&space), ours(set));
    }
}

#[test]
#[ignore = "privileged: needs root"]
fn routes_of_others_stay() {
    let space = NetNs::new("export");
    space.ip("link add dummy0 type veth peer name dummy1");
    space.ip("link set dummy1 up");
    space.ip("link set dummy0 up");
    // In our table, of another protocol; in another table, of ours; and one of ours that leads elsewhere.
    let foreign = [
        "10.7.0.0/24 dev dummy0 proto static scope link",
        "10.1.0.32/27 dev dummy0 proto static scope link",
        "fd07::/64 dev dummy0 proto static",
    ];
    for route in &foreign {
        let family = if route.contains(':') { "-6 " } else { "" };
        space.exec(&format!("ip {family}route add {route} table {TABLE}"));
    }
    space.ip(&format!("route add 10.8.0.0/24 dev dummy0 proto {PROTOCOL} table 120"));
    space.ip(&format!("route add 10.1.0.0/27 dev dummy0 proto {PROTOCOL} table {TABLE}"));
    space.ip(&format!("route add 10.1.0.96/27 dev dummy0 proto {PROTOCOL} table {TABLE}"));
    let wanted = ["10.1.0.0/27", "10.1.0.32/27", "10.1.0.64/27", "fd02::/123"];
    assert_eq!(export(&space, &[&wanted]), 1, "one is another's");
    let mut expected = ours(&["10.1.0.0/27", "10.1.0.64/27", "fd02::/123"]);
    expected.extend(foreign.iter().map(|route| (*route).to_owned()));
    expected.sort();
    assert_eq!(routes(&space), expected);
    // It makes room.
    space.ip(&format!("route del 10.1.0.32/27 proto static table {TABLE}"));
    assert_eq!(export(&space, &[&wanted]), 0);
    assert_eq!(export(&space, &[&[]]), 0);
    assert_eq!(routes(&space), [foreign[0], foreign[2]]);
    assert!(space.ip("route show table 120").contains("10.8.0.0/24"));
}
