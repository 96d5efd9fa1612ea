//! Cases of the original's pool manager (`spec/coil.md` 8.5), and of what it gets wrong.
#![expect(clippy::unwrap_used, reason = "tests")]

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::*;

fn pool_named(name: &str, created: u32, bits: i32, subnets: Value) -> AddressPool {
    serde_json::from_value(json!({
        "metadata": { "name": name, "uid": format!("uid-{name}"), "creationTimestamp": format!("2026-01-01T00:00:{created:02}Z") },
        "spec": { "blockSizeBits": bits, "subnets": subnets },
    }))
    .unwrap()
}

fn dual() -> AddressPool {
    pool_named(
        "default",
        0,
        1,
        json!([{ "ipv4": "10.2.0.0/29", "ipv6": "fd02::200/125" }, { "ipv4": "10.3.0.0/30", "ipv6": "fd02::300/126" }]),
    )
}

fn deleted(mut pool: AddressPool) -> AddressPool {
    pool.metadata.deletion_timestamp = pool.metadata.creation_timestamp.clone();
    pool
}

/// Creates the block that the book chooses.
#[track_caller]
fn carve(book: &mut Book, pool: &str, node: &str, request: &str) -> AddressBlock {
    let Choice::Create { pool: object, index, nets } = book.choose(pool, request) else {
        unreachable!("no block: {:?}", book.choose(pool, request));
    };
    let mut block = AddressBlock::new(&object, index, &nets, node, request);
    block.metadata.uid = Some(format!("uid-{request}"));
    book.apply_block(&block);
    book.settle(pool, index);
    block
}

fn figures(book: &Book) -> Vec<(String, Option<u64>, u64, bool)> {
    let mut all: Vec<_> = book.figures().map(|f| (f.name, f.max_blocks, f.blocks, f.valid)).collect();
    all.sort();
    all
}

fn refusal(choice: &Choice) -> String {
    match choice {
        Choice::Refuse(refusal) => refusal.to_string(),
        other => format!("{other:?}"),
    }
}

fn foreign(name: &str, labels: Value, index: i32, ipv4: &str) -> AddressBlock {
    let metadata = json!({ "name": name, "uid": format!("uid-{name}"), "labels": labels });
    serde_json::from_value(json!({ "metadata": metadata, "index": index, "ipv4": ipv4 })).unwrap()
}

fn metadata(name: &str) -> ObjectMeta {
    ObjectMeta { name: Some(name.to_owned()), ..ObjectMeta::default() }
}

#[test]
fn a44_a_dual_stack_pool() {
    let mut book = Book::default();
    assert!(book.apply_pool(dual()).is_empty());
    assert_eq!(figures(&book), [("default".to_owned(), Some(6), 0, true)]);
    let first = carve(&mut book, "default", "node1", "r0");
    assert_eq!((first.name_any().as_str(), first.index), ("default-0", 0));
    assert_eq!((first.ipv4.as_deref(), first.ipv6.as_deref()), (Some("10.2.0.0/31"), Some("fd02::200/127")));
    assert_eq!((first.node(), first.request()), (Some("node1"), Some("r0")));
    assert_eq!(first.finalizers(), [names::FINALIZER]);
    assert_eq!(figures(&book)[0].2, 1);
    let mut rest: Vec<_> = (1..6).map(|i| carve(&mut book, "default", "node1", &format!("r{i}"))).collect();
    assert_eq!(figures(&book)[0].2, 6);
    assert_eq!(refusal(&book.choose("default", "r6")), "no block of AddressPool default is free");

    let fourth = rest.remove(3);
    let removed = book.remove_block(&fourth.name_any(), &fourth.uid().unwrap());
    assert_eq!(removed, Some((Some("default".to_owned()), "node1".to_owned())));
    assert_eq!(figures(&book)[0].2, 5);
    let again = carve(&mut book, "default", "node2", "r7");
    assert_eq!((again.index, again.node()), (4, Some("node2")));
    assert_eq!((again.ipv4.as_deref(), again.ipv6.as_deref()), (Some("10.3.0.0/31"), Some("fd02::300/127")));

    book.apply_pool(deleted(dual()));
    for block in rest.iter().chain([&first, &again]) {
        assert_eq!(book.finished("default"), None, "it is used");
        assert!(book.remove_block(&block.name_any(), &block.uid().unwrap()).is_some());
    }
    assert_eq!(book.finished("default"), Some("uid-default"));
    assert!(book.nodes().next().is_none() && book.requests.is_empty());
}

#[test]
fn a45_an_ipv4_pool() {
    let mut book = Book::default();
    book.apply_pool(pool_named("v4", 0, 1, json!([{ "ipv4": "10.4.0.0/30" }])));
    let first = carve(&mut book, "v4", "node1", "r0");
    let second = carve(&mut book, "v4", "node1", "r1");
    assert_eq!((first.ipv4.as_deref(), second.ipv4.as_deref()), (Some("10.4.0.0/31"), Some("10.4.0.2/31")));
    assert_eq!(first.ipv6, None);
    assert_eq!(refusal(&book.choose("v4", "r2")), "no block of AddressPool v4 is free");
    book.remove_block("v4-0", "uid-r0");
    assert_eq!(carve(&mut book, "v4", "node2", "r3").index, 0);
    assert_eq!(figures(&book), [("v4".to_owned(), Some(2), 2, true)]);
}

#[test]
fn a35_a_pool_that_is_gone_is_forgotten() {
    let mut book = Book::default();
    book.apply_pool(dual());
    book.remove_pool("default");
    assert!(figures(&book).is_empty() && book.pools.is_empty());
    assert_eq!(refusal(&book.choose("default", "r")), "there is no AddressPool default");
    // Blocks may be known before their pool.
    let labels = json!({ names::LABEL_POOL: "default", names::LABEL_NODE: "n" });
    book.apply_block(&foreign("default-0", labels, 0, "10.2.0.0/31"));
    assert!(figures(&book).is_empty());
    book.apply_pool(dual());
    assert_eq!(figures(&book), [("default".to_owned(), Some(6), 1, true)]);
    assert_eq!(carve(&mut book, "default", "n", "r").index, 1);
}

#[test]
fn a38_one_request_has_one_block() {
    let mut book = Book::default();
    book.apply_pool(dual());
    carve(&mut book, "default", "node1", "r0");
    assert_eq!(book.choose("default", "r0"), Choice::Existing("default-0".to_owned()));
    // Even of a pool that was deleted since: the block is the node's already.
    book.apply_pool(deleted(dual()));
    assert_eq!(book.choose("default", "r0"), Choice::Existing("default-0".to_owned()));
}

#[test]
fn nothing_is_carved_from_a_pool_that_is_being_deleted() {
    let mut book = Book::default();
    book.apply_pool(deleted(dual()));
    assert_eq!(refusal(&book.choose("default", "r")), "AddressPool default is being deleted");
    // Old news, told late.
    book.apply_pool(dual());
    assert_eq!(refusal(&book.choose("default", "r")), "AddressPool default is being deleted");
    // Another pool of the same name.
    let mut other = dual();
    other.metadata.uid = Some("other".to_owned());
    book.apply_pool(other);
    assert_eq!(carve(&mut book, "default", "n", "r").index, 0);
}

#[test]
fn a_pool_is_not_finished_while_a_block_is_being_created() {
    let mut book = Book::default();
    book.apply_pool(dual());
    let Choice::Create { index, .. } = book.choose("default", "r") else { unreachable!() };
    book.apply_pool(deleted(dual()));
    assert_eq!(book.finished("default"), None);
    book.settle("default", index);
    assert_eq!(book.finished("default"), Some("uid-default"));
}

#[test]
fn requests_at_the_same_time_get_different_blocks() {
    let mut book = Book::default();
    book.apply_pool(dual());
    let indexes: Vec<_> = (0..3)
        .map(|i| match book.choose("default", &format!("r{i}")) {
            Choice::Create { index, .. } => index,
            other => unreachable!("{other:?}"),
        })
        .collect();
    assert_eq!(indexes, [0, 1, 2]);
    // One fails; its index is free again.
    book.settle("default", 1);
    assert_eq!(carve(&mut book, "default", "n", "r3").index, 1);
}

/// The original stops here until it happens to read all blocks again.
#[test]
fn a_block_of_somebody_else_with_our_next_name_is_stepped_over() {
    let mut book = Book::default();
    book.apply_pool(dual());
    book.apply_block(&foreign("default-0", json!({}), 0, "192.0.2.0/31"));
    assert_eq!(carve(&mut book, "default", "n", "r0").index, 1);
    assert_eq!(figures(&book)[0].2, 1, "it is not of the pool");
    book.apply_unreadable_block(&metadata("default-2"));
    assert_eq!(carve(&mut book, "default", "n", "r1").index, 3);
    book.remove_block("default-0", "uid-default-0");
    assert_eq!(carve(&mut book, "default", "n", "r2").index, 0);
    // A name that only looks like one of ours.
    book.apply_block(&foreign("default-04", json!({}), 0, "192.0.2.0/31"));
    assert_eq!(carve(&mut book, "default", "n", "r3").index, 4);
}

/// A pool that was removed by force leaves blocks behind, whose addresses are in use.
#[test]
fn addresses_of_any_block_are_never_carved_again() {
    let mut book = Book::default();
    let old = json!({ names::LABEL_POOL: "old", names::LABEL_NODE: "n" });
    book.apply_block(&foreign("old-17", old, 17, "10.2.0.2/31"));
    book.apply_pool(dual());
    let indexes: Vec<_> = (0..5).map(|i| carve(&mut book, "default", "n", &format!("r{i}")).index).collect();
    assert_eq!(indexes, [0, 2, 3, 4, 5]);
    assert_eq!(refusal(&book.choose("default", "r5")), "no block of AddressPool default is free");
    book.remove_block("old-17", "uid-old-17");
    assert_eq!(carve(&mut book, "default", "n", "r5").index, 1);
    // One that covers a whole subnet.
    let mut book = Book::default();
    book.apply_block(&foreign("huge-0", json!({}), 0, "10.2.0.0/16"));
    book.apply_pool(dual());
    assert_eq!(carve(&mut book, "default", "n", "r0").index, 4);
}

#[test]
fn news_of_a_former_block_do_not_touch_its_successor() {
    let mut book = Book::default();
    book.apply_pool(dual());
    carve(&mut book, "default", "n", "r0");
    assert_eq!(book.remove_block("default-0", "uid-former"), None);
    assert_eq!(carve(&mut book, "default", "n", "r1").index, 1);
}

#[test]
fn nothing_is_carved_from_an_invalid_pool_and_the_older_of_two_is_valid() {
    let mut book = Book::default();
    book.apply_pool(pool_named("young", 2, 0, json!([{ "ipv4": "10.2.0.0/16" }])));
    assert_eq!(book.invalid("young"), None);
    // The watch may tell of the younger one first.
    assert_eq!(book.apply_pool(dual()), ["young"]);
    assert_eq!(book.invalid("default"), None);
    assert!(book.invalid("young").unwrap().contains("overlaps with 10.2.0.0/29 of AddressPool default"));
    assert!(
        refusal(&book.choose("young", "r")).starts_with("AddressPool young is not valid: spec.subnets[0]")
    );
    assert_eq!(figures(&book)[1], ("young".to_owned(), Some(65_536), 0, false));
    assert_eq!(book.remove_pool("default"), ["young"]);
    assert_eq!(book.invalid("young"), None);
    assert_eq!(carve(&mut book, "young", "n", "r").index, 0);

    book.apply_pool(pool_named("wild", 3, 25, json!([{ "ipv4": "10.0.0.0/4" }])));
    assert!(book.invalid("wild").unwrap().contains("25 is more than 24"));
    book.apply_unreadable_pool(&metadata("odd"), "no subnets");
    assert_eq!(refusal(&book.choose("odd", "q")), "AddressPool odd is not valid: cannot be read: no subnets");
    assert_eq!(figures(&book)[0], ("odd".to_owned(), None, 0, false));
}

#[test]
fn appended_subnets_are_used_at_once() {
    let mut book = Book::default();
    book.apply_pool(pool_named("p", 0, 0, json!([{ "ipv4": "10.0.0.0/32" }])));
    carve(&mut book, "p", "n", "r0");
    assert_eq!(refusal(&book.choose("p", "r1")), "no block of AddressPool p is free");
    book.apply_pool(pool_named("p", 0, 0, json!([{ "ipv4": "10.0.0.0/32" }, { "ipv4": "10.1.0.0/32" }])));
    assert_eq!(carve(&mut book, "p", "n", "r1").ipv4.as_deref(), Some("10.1.0.0/32"));
}

/// The schema refuses such a change, unless somebody takes the rules out of it.
#[test]
fn a_pool_that_was_changed_does_not_hand_out_addresses_twice() {
    let mut book = Book::default();
    book.apply_pool(pool_named("p", 0, 4, json!([{ "ipv4": "10.0.0.0/24" }])));
    for i in 0..4 {
        carve(&mut book, "p", "n", &format!("r{i}"));
    }
    book.apply_pool(pool_named("p", 0, 5, json!([{ "ipv4": "10.0.0.0/24" }])));
    // Indexes 0 to 3 are taken by name; index 4 starts at 10.0.0.128, which is free.
    assert_eq!(carve(&mut book, "p", "n", "r4").ipv4.as_deref(), Some("10.0.0.128/27"));
    book.apply_pool(pool_named("p", 0, 2, json!([{ "ipv4": "10.0.0.0/24" }])));
    assert_eq!(carve(&mut book, "p", "n", "r5").ipv4.as_deref(), Some("10.0.0.64/30"));
}

#[test]
fn huge_pools_are_carved_from_the_start() {
    let mut book = Book::default();
    book.apply_pool(pool_named("p", 0, 0, json!([{ "ipv6": "fd00::/8" }])));
    assert_eq!(figures(&book), [("p".to_owned(), Some(1 << 31), 0, true)]);
    assert_eq!(carve(&mut book, "p", "n", "r0").ipv6.as_deref(), Some("fd00::/128"));
}

#[test]
fn a_new_list_of_everything() {
    let mut book = Book::default();
    book.apply_pool(dual());
    for i in 0..3 {
        carve(&mut book, "default", "n", &format!("r{i}"));
    }
    let pools = book.retain_blocks(&["default-1".to_owned()].into());
    assert_eq!(pools, ["default".to_owned()].into());
    assert_eq!(book.blocks_of_node("n"), ["default-1"]);
    assert_eq!(carve(&mut book, "default", "n", "r3").index, 0);
    book.retain_pools(&HashSet::new());
    assert!(figures(&book).is_empty());
}

#[test]
fn blocks_of_nodes() {
    let mut book = Book::default();
    let labels =
        |node: &str, reserved: &str| json!({ names::LABEL_NODE: node, names::LABEL_RESERVED: reserved });
    book.apply_block(&foreign("a-0", labels("n", "true"), 0, "10.0.0.0/32"));
    book.apply_block(&foreign("a-1", labels("", "true"), 1, "10.0.0.1/32"));
    book.apply_block(&foreign("a-2", labels("", ""), 2, "10.0.0.2/32"));
    book.apply_block(&foreign("a-3", json!({}), 3, "10.0.0.3/32"));
    assert_eq!(book.blocks_of_node("n"), ["a-0"]);
    // Somebody keeps a-1 for himself.
    assert_eq!(book.blocks_of_node(""), ["a-2", "a-3"]);
    // It moves.
    book.apply_block(&foreign("a-3", labels("n", ""), 3, "10.0.0.3/32"));
    assert_eq!(book.blocks_of_node("n"), ["a-0", "a-3"]);
    assert!(book.has_blocks("") && !book.has_blocks("m"));
}

/// 100,000 blocks of 5,000 nodes: no event may cost a look at all of them.
#[test]
fn a_large_cluster() {
    let mut book = Book::default();
    book.apply_pool(pool_named("p", 0, 5, json!([{ "ipv4": "10.0.0.0/9", "ipv6": "fd00::/105" }])));
    let start = Instant::now();
    for i in 0..100_000 {
        carve(&mut book, "p", &format!("node{}", i % 5_000), &format!("r{i}"));
    }
    assert_eq!(book.nodes().count(), 5_000);
    for i in (0..100_000).step_by(10) {
        assert!(book.remove_block(&format!("p-{i}"), &format!("uid-r{i}")).is_some());
        assert_eq!(carve(&mut book, "p", "node1", &format!("s{i}")).index, i);
        // As the API server tells it.
        book.apply_pool(pool_named("p", 0, 5, json!([{ "ipv4": "10.0.0.0/9", "ipv6": "fd00::/105" }])));
    }
    let took = start.elapsed();
    // A look at all blocks for each event would be 10^10 steps.
    assert!(took < Duration::from_secs(120), "{took:?}");
}
