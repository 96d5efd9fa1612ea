#![allow(clippy::unwrap_used, reason = "tests")]

use super::super::testing::{assigned, block, found, owner};
use super::*;

const DELAY: Duration = Duration::from_secs(5);

fn default0() -> BlockView {
    block("default", 0, Some("10.2.0.0/31"), Some("fd02::200/127"))
}

fn default1() -> BlockView {
    block("default", 1, Some("10.2.0.2/31"), Some("fd02::202/127"))
}

fn ledger(views: &[BlockView]) -> Ledger {
    let mut ledger = Ledger::default();
    ledger.compare(views.to_vec(), 0, None);
    ledger
}

fn names(views: &[BlockView]) -> Vec<&str> {
    views.iter().map(|view| view.name.as_str()).collect()
}

fn routes(ledger: &Ledger) -> Vec<String> {
    ledger.routes().iter().map(ToString::to_string).collect()
}

#[test]
fn an_owner_has_its_addresses_until_it_frees_them() {
    let now = Instant::now();
    let mut ledger = ledger(&[default0()]);
    let a = ledger.allocate("default", &owner("a"), now).unwrap();
    assert_eq!(a, assigned("default", Some("10.2.0.0"), Some("fd02::200")));
    assert_eq!(ledger.held(&owner("a")), Some(&a));
    let other = Owner { ifname: "net1".into(), ..owner("a") };
    let b = ledger.allocate("default", &other, now).unwrap();
    assert_eq!(b, assigned("default", Some("10.2.0.1"), Some("fd02::201")));
    assert_eq!(ledger.allocate("default", &owner("c"), now), None, "full");
    assert!(!ledger.has_free("default"));
    assert!(ledger.free(&owner("a"), now));
    assert!(!ledger.free(&owner("a"), now), "twice");
    assert!(ledger.has_free("default"));
    assert_eq!(ledger.allocate("v4", &owner("c"), now), None, "another pool");
    assert_eq!(ledger.allocate("default", &owner("c"), now), Some(a));
}

#[test]
fn a_failed_deletion_of_a_block_frees_nobody_later() {
    // Item 25 of the original's defects: its record survives such a failure, and frees a later pod's address.
    let now = Instant::now();
    let mut ledger = ledger(&[default0()]);
    ledger.allocate("default", &owner("a"), now).unwrap();
    assert!(ledger.free(&owner("a"), now));
    let idle = ledger.idle(Duration::ZERO, now);
    assert!(ledger.withdraw(idle[0].clone()));
    // The deletion fails. Nobody is given an address of the block, and nothing is there to be freed.
    assert_eq!(ledger.allocate("default", &owner("b"), now), None);
    assert!(!ledger.free(&owner("a"), now));
    assert_eq!(names(&ledger.withdrawn().cloned().collect::<Vec<_>>()), ["default-0"]);
    // It turns out that it stays: then its addresses can be had again.
    ledger.keep(default0());
    let b = ledger.allocate("default", &owner("b"), now).unwrap();
    assert!(!ledger.free(&owner("a"), now));
    assert_eq!(ledger.held(&owner("b")), Some(&b));
    let c = ledger.allocate("default", &owner("c"), now).unwrap();
    assert_ne!(b, c);
}

#[test]
fn a54_what_the_kernel_holds_is_not_handed_out_again() {
    let now = Instant::now();
    // Three were allocated in `default` and one in `v4`, of which the kernel has kept one.
    let views = [default0(), default1(), block("v4", 0, Some("10.4.0.0/30"), None)];
    let mut ledger = Ledger::new([found("a", "default", Some("10.2.0.0"), Some("fd02::200"))]);
    let compared = ledger.compare(views.to_vec(), 0, None);
    assert_eq!(compared.learnt, ["default-0", "default-1", "v4-0"]);
    // All but one are given back at once.
    let idle = ledger.idle(DELAY, now);
    assert_eq!(names(&idle), ["default-1", "v4-0"]);
    for view in idle {
        assert!(ledger.withdraw(view.clone()));
        assert_eq!(ledger.gone(&view.uid), None);
    }
    assert_eq!(routes(&ledger), ["10.2.0.0/31", "fd02::200/127"]);
    let next = ledger.allocate("default", &owner("b"), now).unwrap();
    assert_eq!(next, assigned("default", Some("10.2.0.1"), Some("fd02::201")));
    assert!(ledger.free(&owner("a"), now));
    assert!(ledger.idle(DELAY, now).is_empty());
}

#[test]
fn a55_a_reserved_block_is_neither_used_nor_given_back() {
    let now = Instant::now();
    let mut reserved = default0();
    reserved.reserved = true;
    let mut ledger = ledger(&[reserved.clone(), default1()]);
    assert_eq!(
        ledger.allocate("default", &owner("a"), now),
        Some(assigned("default", Some("10.2.0.2"), Some("fd02::202")))
    );
    assert!(ledger.free(&owner("a"), now));
    assert_eq!(names(&ledger.idle(Duration::ZERO, now)), ["default-1"]);
    assert_eq!(routes(&ledger).len(), 4, "but its routes are there");
    // The label is noticed at the last moment, too.
    let mut late = default1();
    late.reserved = true;
    assert!(!ledger.withdraw(late));
    assert_eq!(ledger.allocate("default", &owner("a"), now), None);
    // Without it, the block is like any other.
    reserved.reserved = false;
    ledger.compare(vec![reserved], ledger.mark(), None);
    assert!(ledger.allocate("default", &owner("a"), now).is_some());
}

#[test]
fn a_block_is_given_back_when_it_was_empty_for_long_enough() {
    let now = Instant::now();
    let mut ledger = Ledger::default();
    ledger.learn(default0(), now);
    ledger.allocate("default", &owner("a"), now).unwrap();
    assert_eq!(ledger.next_idle(DELAY, now), None);
    let later = now + Duration::from_secs(60);
    assert!(ledger.free(&owner("a"), later));
    assert!(ledger.idle(DELAY, later + DELAY / 2).is_empty());
    assert_eq!(ledger.next_idle(DELAY, later), Some(later + DELAY));
    let idle = ledger.idle(DELAY, later + DELAY);
    assert_eq!(names(&idle), ["default-0"]);
    // Somebody came between the decision and the deed.
    let b = ledger.allocate("default", &owner("b"), later).unwrap();
    assert!(!ledger.withdraw(idle[0].clone()));
    assert_eq!(ledger.held(&owner("b")), Some(&b));
    // One that is being deleted need not wait, and nothing is handed out from it.
    let deleted = BlockView { deleted: true, ..default0() };
    ledger.compare(vec![deleted], ledger.mark(), None);
    assert_eq!(ledger.allocate("default", &owner("c"), later), None);
    assert!(ledger.free(&owner("b"), later));
    assert_eq!(names(&ledger.idle(DELAY, later)), ["default-0"]);
}

#[test]
fn lists_that_are_older_than_what_we_know() {
    let now = Instant::now();
    let mut ledger = ledger(&[default0()]);
    let mark = ledger.mark();
    // While the list is under way, a block comes and another goes.
    ledger.learn(default1(), now);
    assert!(ledger.withdraw(default0()));
    assert_eq!(ledger.gone("uid-default-0"), None);
    let compared = ledger.compare(vec![default0()], mark, None);
    assert_eq!(compared, Compared::default());
    assert_eq!(ledger.blocks.keys().collect::<Vec<_>>(), ["uid-default-1"]);
    // The next one is newer than both.
    let compared = ledger.compare(vec![], ledger.mark(), None);
    assert_eq!(compared, Compared::default(), "it was empty");
    assert!(ledger.blocks.is_empty() && ledger.gone.contains_key("uid-default-1"));
    ledger.compare(vec![], ledger.mark(), None);
    assert!(ledger.gone.is_empty());
}

#[test]
fn nothing_is_handed_out_from_a_block_that_is_lost() {
    let now = Instant::now();
    let mut ledger = ledger(&[default0()]);
    let a = ledger.allocate("default", &owner("a"), now).unwrap();
    let compared = ledger.compare(vec![], ledger.mark(), None);
    assert_eq!(compared.lost, ["default-0"]);
    assert_eq!(ledger.allocate("default", &owner("b"), now), None);
    assert_eq!(ledger.strays(), [&owner("a")]);
    assert_eq!(ledger.held(&owner("a")), None, "another node may have it by now");
    // The same block, given to us once more: what is in use is known.
    let again = BlockView { uid: "again".into(), ..default0() };
    ledger.learn(again, now);
    assert_eq!(ledger.held(&owner("a")), Some(&a));
    assert_ne!(ledger.allocate("default", &owner("b"), now).unwrap(), a);
    // A sandbox that comes back for a lost address gets another.
    let compared = ledger.compare(vec![default1()], ledger.mark(), None);
    assert_eq!((compared.lost, compared.learnt), (vec!["default-0".into()], vec!["default-1".into()]));
    let new = ledger.allocate("default", &owner("a"), now).unwrap();
    assert_eq!(new, assigned("default", Some("10.2.0.2"), Some("fd02::202")));
}

#[test]
fn a_block_of_the_same_name_is_another() {
    let now = Instant::now();
    let mut ledger = ledger(&[default0()]);
    assert!(ledger.withdraw(default0()));
    assert!(!ledger.has_block("default-0"), "an answer with this name is news");
    // The deletion was carried out though its answer was lost, and the index came to us again.
    ledger.learn(BlockView { uid: "again".into(), ..default0() }, now);
    assert_eq!(ledger.blocks.keys().collect::<Vec<_>>(), ["again"]);
    assert!(ledger.has_block("default-0") && ledger.withdrawn().next().is_none());
    ledger.learn(default0(), now);
    assert_eq!(ledger.blocks.keys().collect::<Vec<_>>(), ["again"], "the old one does not come back");
}

#[test]
fn a_kernel_in_disorder() {
    let now = Instant::now();
    let v4 = |container: &str, address: &str| found(container, "v4", Some(address), None);
    // Two interfaces with one address, two of one owner, one that is foreign, one without addresses.
    let mut ledger = Ledger::new([
        v4("a", "10.4.0.0"),
        v4("b", "10.4.0.0"),
        v4("c", "10.4.0.1"),
        v4("c", "10.4.0.2"),
        v4("d", "10.9.9.9"),
        found("e", "v4", None, None),
    ]);
    ledger.compare(vec![block("v4", 0, Some("10.4.0.0/30"), None)], 0, None);
    assert_eq!(ledger.usage()["v4"], Usage { blocks: 1, used: 3, free: 1 });
    assert_eq!(ledger.held(&owner("d")), None);
    assert_eq!(ledger.held(&owner("e")), None);
    assert!(ledger.free(&owner("a"), now));
    assert_eq!(ledger.usage()["v4"].used, 3, "b has it still");
    assert!(ledger.free(&owner("b"), now));
    assert_eq!(ledger.usage()["v4"].used, 2);
    assert!(ledger.free(&owner("c"), now));
    assert_eq!(ledger.usage()["v4"].used, 0);
}
