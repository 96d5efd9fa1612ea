//! Cases of the original (`spec/coil.md` 8.5), as far as no API server is needed, and of what the original
//! does not look at.
#![expect(clippy::unwrap_used, reason = "tests")]

use serde_json::{Value, json};

use super::*;
use crate::violation::describe;

fn pool_named(name: &str, created: Option<&str>, bits: i32, subnets: Value) -> AddressPool {
    serde_json::from_value(json!({
        "apiVersion": "coil.cybozu.com/v2", "kind": "AddressPool",
        "metadata": { "name": name, "creationTimestamp": created },
        "spec": { "blockSizeBits": bits, "subnets": subnets },
    }))
    .unwrap()
}

fn pool(bits: i32, subnets: Value) -> AddressPool {
    pool_named("default", None, bits, subnets)
}

#[track_caller]
fn reject(pool: &AddressPool, old: Option<&AddressPool>, wanted: &[&str]) {
    let found: Vec<String> = validate(pool, old, []).iter().map(ToString::to_string).collect();
    assert_eq!(found.len(), wanted.len(), "{found:?}");
    for (found, wanted) in found.iter().zip(wanted) {
        assert!(found.contains(wanted), "{found} does not say {wanted}");
    }
}

#[track_caller]
fn accept(pool: &AddressPool, old: Option<&AddressPool>) {
    let found = validate(pool, old, []);
    assert!(found.is_empty(), "{}", describe(&found));
}

#[test]
fn a1_a2_a3_defaults_and_valid_pools() {
    let minimal: AddressPool = serde_json::from_value(json!({
        "metadata": { "name": "default" }, "spec": { "subnets": [{ "ipv4": "10.2.0.0/16" }] },
    }))
    .unwrap();
    assert_eq!(minimal.spec.block_size_bits, 5);
    accept(&minimal, None);
    accept(&pool(0, json!([{ "ipv4": "10.2.0.0/24" }])), None);
    accept(&pool(2, json!([{ "ipv4": "10.3.0.0/24" }])), None);
}

#[test]
fn a4_a5_a6_a7_invalid_pools() {
    reject(&pool(2, json!([{ "ipv4": "10.3.0.0" }])), None, &["spec.subnets[0].ipv4"]);
    reject(&pool(-1, json!([{ "ipv4": "10.3.0.0/24" }])), None, &["spec.blockSizeBits: -1"]);
    reject(&pool(2, json!([])), None, &["spec.subnets: at least one"]);
    reject(&pool(8, json!([{ "ipv4": "10.3.0.0/30" }])), None, &["too narrow subnet: 10.3.0.0/30"]);
    reject(&pool(25, json!([{ "ipv4": "10.0.0.0/4" }])), None, &["25 is more than 24"]);
    reject(&pool(i32::MAX, json!([{ "ipv6": "fd00::/8" }])), None, &["is more than 24", "too narrow"]);
    let many: Vec<_> = (0..129).map(|i| json!({ "ipv4": format!("10.0.{i}.0/24") })).collect();
    reject(&pool(5, json!(many)), None, &["spec.subnets: 129 is more than 128"]);
    reject(
        &pool_named(&"a".repeat(64), None, 5, json!([{ "ipv4": "10.0.0.0/8" }])),
        None,
        &["metadata.name"],
    );
}

#[test]
fn a8_a9_a10_a11_a12_changes() {
    let old = pool(0, json!([{ "ipv6": "fd02::/120" }]));
    accept(&pool(0, json!([{ "ipv6": "fd02::/120" }, { "ipv6": "fd03::/112" }])), Some(&old));
    let old = pool(8, json!([{ "ipv6": "fd02::/112" }]));
    reject(
        &pool(8, json!([{ "ipv6": "fd02::/112" }, { "ipv6": "fd03::/124" }])),
        Some(&old),
        &["spec.subnets[1].ipv6: too narrow"],
    );
    reject(&pool(7, json!([{ "ipv6": "fd02::/112" }])), Some(&old), &["spec.blockSizeBits: unchangeable"]);
    reject(&pool(8, json!([])), Some(&old), &["spec.subnets: unshrinkable", "at least one"]);
    reject(&pool(8, json!([{ "ipv6": "fd03::/112" }])), Some(&old), &["spec.subnets[0]: unchangeable"]);
    // The same network, written in another way.
    reject(&pool(8, json!([{ "ipv6": "fd02::0/112" }])), Some(&old), &["spec.subnets[0]: unchangeable"]);
}

fn set(ipv4: &str, ipv6: &str) -> SubnetSet {
    let text = |text: &str| (!text.is_empty()).then(|| text.to_owned());
    SubnetSet { ipv4: text(ipv4), ipv6: text(ipv6) }
}

#[test]
fn a13_subnet_sets() {
    for (ipv4, ipv6, bits, wanted) in [
        ("", "", 5, "invalid subnet"),
        ("10.1.0.0/24", "", 5, ""),
        ("", "fd00::/120", 5, ""),
        ("10.1.0.0/24", "fd00::/120", 5, ""),
        ("fd00::/120", "", 5, "invalid IPv4 subnet: fd00::/120"),
        ("", "10.1.0.0/24", 5, "invalid IPv6 subnet: 10.1.0.0/24"),
        ("10.1.0.0/24", "10.1.0.0/24", 5, "invalid IPv6 subnet"),
        ("fd00::/120", "fd00::/120", 5, "invalid IPv4 subnet"),
        ("10.1.0.0/24", "fd00::/112", 5, "dual stack subnet must be the same size"),
        ("10.0.0.1/32", "", 0, ""),
        ("10.1.0.0/28", "", 5, "too narrow subnet: 10.1.0.0/28"),
        ("", "fd00::/124", 5, "too narrow subnet: fd00::/124"),
        ("", "::ffff:10.1.0.0/112", 5, "IPv4-mapped"),
        ("010.1.0.0/24", "", 5, "is not a CIDR"),
    ] {
        let found = describe(&set(ipv4, ipv6).validate(bits));
        assert_eq!(found.is_empty(), wanted.is_empty(), "{ipv4} {ipv6}: {found}");
        assert!(found.contains(wanted), "{ipv4} {ipv6}: {found} does not say {wanted}");
    }
}

#[test]
fn a14_families_of_a_subnet_set() {
    let of = |set: SubnetSet| (set.is_ipv4(), set.is_ipv6(), set.is_dual_stack());
    assert_eq!(of(set("10.1.0.0/24", "")), (true, false, false));
    assert_eq!(of(set("", "fd00::/120")), (false, true, false));
    assert_eq!(of(set("10.1.0.0/24", "fd00::/120")), (false, false, true));
    assert_eq!(of(set("", "")), (false, false, false));
}

#[test]
fn a15_equality_of_subnet_sets() {
    let (v4, v6) = ("10.1.0.0/24", "fd00::/120");
    let sets = [
        set("", ""),
        set(v4, ""),
        set("", v6),
        set(v4, v6),
        set("10.2.0.0/24", ""),
        set("", "fd01::/120"),
        set("10.2.0.0/24", v6),
        set(v4, "fd01::/120"),
    ];
    for (i, a) in sets.iter().enumerate() {
        for (j, b) in sets.iter().enumerate() {
            assert_eq!(a == b, i == j, "{a:?} {b:?}");
        }
    }
}

#[test]
fn a16_networks_of_blocks() {
    for (subnet, bits, index, ipv4, ipv6) in [
        (set("10.2.0.0/16", ""), 0, 0, "10.2.0.0/32", ""),
        (set("10.2.0.0/16", ""), 0, 3, "10.2.0.3/32", ""),
        (set("10.2.0.0/16", ""), 2, 3, "10.2.0.12/30", ""),
        (set("", "fd02::/112"), 0, 0, "", "fd02::/128"),
        (set("", "fd02::/112"), 0, 257, "", "fd02::101/128"),
        (set("", "fd02::/112"), 5, 10, "", "fd02::140/123"),
        (set("10.2.0.0/16", "fd02::/112"), 5, 10, "10.2.1.64/27", "fd02::140/123"),
        // Bits of hosts count for nothing.
        (set("10.2.0.5/16", ""), 5, 0, "10.2.0.0/27", ""),
    ] {
        let spec = json!([subnet]);
        let nets = pool(bits, spec).block(index).unwrap();
        let text = |net: Option<String>| net.unwrap_or_default();
        assert_eq!(text(nets.ipv4.map(|net| net.to_string())), ipv4, "{subnet:?} {index}");
        assert_eq!(text(nets.ipv6.map(|net| net.to_string())), ipv6, "{subnet:?} {index}");
    }
}

#[test]
fn indexes_count_through_all_subnets() {
    let pool = pool(
        1,
        json!([{ "ipv4": "10.2.0.0/29", "ipv6": "fd02::200/125" }, { "ipv4": "10.3.0.0/30", "ipv6": "fd02::300/126" }]),
    );
    let layout = pool.layout().unwrap();
    assert_eq!(layout.blocks(), 6);
    let text = |index| {
        let nets = layout.block(index)?;
        Some(format!("{} {}", nets.ipv4?, nets.ipv6?))
    };
    assert_eq!(text(0).as_deref(), Some("10.2.0.0/31 fd02::200/127"));
    assert_eq!(text(3).as_deref(), Some("10.2.0.6/31 fd02::206/127"));
    assert_eq!(text(4).as_deref(), Some("10.3.0.0/31 fd02::300/127"));
    assert_eq!(text(5).as_deref(), Some("10.3.0.2/31 fd02::302/127"));
    assert_eq!(text(6), None);
    for index in 0..6 {
        let nets = layout.block(index).unwrap();
        assert_eq!(layout.index_of(nets.ipv4.unwrap().broadcast().into()), Some(index));
        assert_eq!(layout.index_of(nets.ipv6.unwrap().network().into()), Some(index));
    }
    assert_eq!(layout.index_of("10.2.0.8".parse().unwrap()), None);
}

#[test]
fn what_is_in_the_way_is_skipped_at_once() {
    let layout = pool(0, json!([{ "ipv4": "10.2.0.0/24" }, { "ipv4": "10.3.0.0/24" }])).layout().unwrap();
    let behind = |index, net: &str| layout.index_behind(index, net.parse().unwrap());
    assert_eq!(behind(0, "10.2.0.0/32"), 1);
    assert_eq!(behind(3, "10.2.0.0/25"), 128);
    assert_eq!(behind(3, "10.2.0.0/24"), 256);
    assert_eq!(behind(3, "10.0.0.0/8"), 256);
    assert_eq!(behind(300, "10.0.0.0/8"), 512);
    assert_eq!(behind(600, "10.0.0.0/8"), 601);
}

/// The original counts such a pool as empty or negative.
#[test]
fn huge_pools_are_cut_off_rather_than_wrapped() {
    for subnet in ["fd00::/8", "::/0", "fd00::/64", "fd00::/65", "fd00::/97"] {
        let layout = pool(0, json!([{ "ipv6": subnet }, { "ipv6": "2001:db8::/64" }])).layout();
        let Ok(layout) = layout else {
            assert_eq!(subnet, "::/0", "only this overlaps");
            continue;
        };
        assert_eq!(layout.blocks(), MAX_BLOCKS, "{subnet}");
        let last = layout.block(u32::try_from(MAX_BLOCKS - 1).unwrap()).unwrap();
        assert_eq!(last.ipv6.unwrap().to_string().split_once("::").unwrap().1, "7fff:ffff/128");
        assert_eq!(layout.block(u32::try_from(MAX_BLOCKS).unwrap()), None);
        assert_eq!(layout.block(u32::MAX), None);
        assert_eq!(layout.index_of("2001:db8::1".parse().unwrap()), None);
    }
    assert_eq!(pool(0, json!([{ "ipv6": "::/0" }])).layout().unwrap().blocks(), MAX_BLOCKS);
    assert_eq!(pool(24, json!([{ "ipv4": "0.0.0.0/0" }])).layout().unwrap().blocks(), 256);
}

#[test]
fn families_must_not_be_mixed() {
    reject(&pool(5, json!([{ "ipv4": "10.0.0.0/24" }, { "ipv6": "fd00::/120" }])), None, &["other families"]);
    reject(
        &pool(5, json!([{ "ipv4": "10.0.0.0/24" }, { "ipv4": "10.0.1.0/24", "ipv6": "fd00::/120" }])),
        None,
        &["spec.subnets[1]: has other families"],
    );
}

#[test]
fn subnets_of_a_pool_must_not_overlap() {
    for other in ["10.0.0.0/16", "10.0.3.0/24", "10.0.0.0/8", "10.0.255.255/32"] {
        reject(
            &pool(0, json!([{ "ipv4": "10.0.0.0/16" }, { "ipv4": other }])),
            None,
            &["overlaps with 10.0.0.0/16"],
        );
    }
    accept(&pool(0, json!([{ "ipv4": "10.0.0.0/16" }, { "ipv4": "10.1.0.0/16" }])), None);
}

#[test]
fn of_pools_that_overlap_the_oldest_is_good() {
    let subnets = |net: &str| json!([{ "ipv4": net }]);
    let old = pool_named("old", Some("2026-01-01T00:00:00Z"), 5, subnets("10.0.0.0/16"));
    let young = pool_named("young", Some("2026-01-02T00:00:00Z"), 5, subnets("10.0.3.0/24"));
    let unborn = pool_named("a", None, 5, subnets("10.0.0.0/8"));
    let apart = pool_named("apart", Some("2026-01-03T00:00:00Z"), 5, subnets("10.1.0.0/16"));
    let all = [&old, &young, &unborn, &apart];
    assert!(validate(&old, None, all).is_empty());
    assert!(validate(&apart, None, [&old, &young]).is_empty());
    let found = describe(&validate(&young, None, all));
    assert!(found.contains("10.0.3.0/24 overlaps with 10.0.0.0/16 of AddressPool old"), "{found}");
    assert_eq!(validate(&unborn, None, all).len(), 3, "older ones are named, all of them");
    // Pools of one second: names decide, so that never both are good and never none.
    let twin = pool_named("p", Some("2026-01-01T00:00:00Z"), 5, subnets("10.0.0.0/16"));
    assert!(validate(&old, None, [&twin]).is_empty());
    assert!(!validate(&twin, None, [&old]).is_empty());
    // An invalid pool is in nobody's way: nothing is carved from it.
    let broken = pool_named("broken", Some("2025-01-01T00:00:00Z"), 25, subnets("10.0.0.0/4"));
    assert!(validate(&old, None, [&broken]).is_empty());
}
