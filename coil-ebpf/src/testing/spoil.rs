//! Packets of scenarios with something wrong: cut at each byte, or with one byte changed. What must come
//! of them is what the library says; that it is harmless is for the tests to check.

use std::collections::BTreeSet;

use super::scenario::{Kernel, Scenario};
use super::scenarios::scenarios;

/// Length of an Ethernet header.
const ETHERNET: usize = 14;
/// Bytes from the start of the IP header that are changed or cut at: all headers that the programs look at.
const REACH: usize = 120;

/// One scenario of each kind, for tests that cannot afford all: of those that differ in program, family,
/// protocols and fate, the first.
#[must_use]
pub fn representatives() -> Vec<Scenario> {
    let mut seen = BTreeSet::new();
    let mut all = scenarios();
    all.retain(|scenario| {
        let bytes = &scenario.packet.bytes;
        let byte = |at: usize| bytes.get(at).copied();
        // Outer protocol, and where that is UDP what would be the inner one of a tunnel.
        let protocols = match byte(12) {
            Some(8) => (byte(23), byte(23 + 28).filter(|_| byte(23) == Some(17))),
            _ => (byte(20), byte(20 + 48).filter(|_| byte(20) == Some(17))),
        };
        seen.insert((scenario.hook.program(), byte(12), protocols, scenario.expect.action.code()))
    });
    all
}

/// The packet cut short at each byte of its headers, and before its last.
#[must_use]
pub fn cut(scenario: &Scenario) -> Vec<Scenario> {
    let bytes = &scenario.packet.bytes;
    (0..bytes.len())
        .filter(|length| *length <= ETHERNET + REACH || length + 1 == bytes.len())
        .map(|length| variant(scenario, &format!("cut after {length} bytes"), bytes[..length].to_vec()))
        .collect()
}

/// The packet with each byte of its headers in turn changed to something else: zero, all ones, and the
/// lowest and the highest bit turned.
#[must_use]
pub fn bent(scenario: &Scenario) -> Vec<Scenario> {
    let bytes = &scenario.packet.bytes;
    let mut variants = Vec::new();
    // Kind of payload, then headers.
    for at in ETHERNET - 2..bytes.len().min(ETHERNET + REACH) {
        let old = bytes[at];
        for new in [0, 0xff, old ^ 1, old ^ 0x80] {
            if new != old {
                let mut changed = bytes.clone();
                changed[at] = new;
                variants.push(variant(scenario, &format!("byte {at} is {new:#04x}"), changed));
            }
        }
    }
    variants
}

fn variant(scenario: &Scenario, what: &str, bytes: Vec<u8>) -> Scenario {
    let mut variant = scenario.clone();
    variant.name = format!("{}, {what}", scenario.name);
    variant.kernel = match bytes.get(ETHERNET - 2..ETHERNET) {
        Some([8, 0]) if bytes.len() < ETHERNET + 20 => Kernel::Refuses("test runs want a whole IP header"),
        Some([0x86, 0xdd]) if bytes.len() < ETHERNET + 40 => {
            Kernel::Refuses("test runs want a whole IP header")
        }
        // One that it does not take as it is, for its size, it does not take spoiled.
        Some(_) if bytes.len() > ETHERNET => scenario.kernel,
        _ => Kernel::Refuses("test runs want an Ethernet header and more"),
    };
    variant.packet.bytes = bytes;
    variant
}
