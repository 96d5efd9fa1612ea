//! A bounded run of the fuzzer: the whole corpus, then random cases and changed ones of the corpus, always the
//! same ones. `cargo xtask fuzz` is the run without bounds.

#![expect(clippy::unwrap_used, reason = "tests")]

use std::collections::BTreeMap;

use coil_ebpf::testing::fuzz::{corpus, play};

/// Random cases.
const RANDOM: usize = 1500;
/// Changed cases of the corpus.
const CHANGED: usize = 1500;

/// Failures that are shown.
const SHOWN: usize = 8;

/// Plays cases; those that fail differently are made as small as they can be, and shown.
fn play(cases: impl Iterator<Item = (String, Vec<u8>)>) {
    let mut failed = BTreeMap::new();
    let mut packets = 0;
    for (name, case) in cases {
        match play::run(&case) {
            Ok(hops) => packets += hops.len(),
            Err(failure) => {
                let kind: String = failure.what.chars().take(30).collect();
                failed.entry(kind).or_insert((name, case));
            }
        }
        if failed.len() == SHOWN {
            break;
        }
    }
    let mut shown = String::new();
    for (kind, (name, case)) in failed {
        let same = |case: &[u8]| play::run(case).is_err_and(|failure| failure.what.starts_with(&kind));
        let least = corpus::least(&case, same);
        if let Err(failure) = play::run(&least) {
            shown += &format!("{name}: {failure}\n{}\n", corpus::text("the case at its least", &least));
        }
    }
    assert!(shown.is_empty(), "{shown}");
    println!("{packets} packets");
}

#[test]
fn random_cases_are_as_the_model_says() {
    let mut random = corpus::Random(1);
    play((0..RANDOM).map(|index| (format!("random case {index}"), random.case())));
}

#[test]
fn the_corpus_and_what_is_like_it_are_as_the_model_says() {
    let known = corpus::read(&corpus::folder()).unwrap();
    assert!(known.len() > 20, "only {} cases in {}", known.len(), corpus::folder().display());
    play(known.iter().cloned());
    let mut random = corpus::Random(2);
    let changed = |index| {
        let [(name, one), (_, other)] = [(), ()].map(|()| &known[random.below(known.len())]);
        (format!("{name} changed for the {index}th time"), random.changed(one, other))
    };
    play((0..CHANGED).map(changed));
}

#[test]
fn texts_of_cases_are_read_again() {
    let mut random = corpus::Random(3);
    for case in [Vec::new(), vec![0], random.case()] {
        let text = corpus::text("what it is\nabout", &case);
        assert_eq!(corpus::parse(&text), Some(case), "{text}");
    }
    assert_eq!(corpus::parse("0"), None);
    assert_eq!(corpus::parse("xy"), None);
}

#[test]
fn failing_cases_are_made_small() {
    let case: Vec<u8> = (0..200).collect();
    let least = corpus::least(&case, |case| case.contains(&77) && case.contains(&150));
    assert_eq!(least, [77, 150]);
}
