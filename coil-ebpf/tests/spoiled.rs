//! Every packet of the scenario table, cut at each byte and with each byte of its headers changed, through
//! the library: no hook panics, and none lets out what it must not.

use std::collections::BTreeMap;

use coil_ebpf::testing::{Action, Hook, Scenario, scenarios, spoil};

/// Where an Ethernet frame ends by what its IP header says, if there is one.
fn end(frame: &[u8]) -> Option<usize> {
    let number = |at: usize| Some(usize::from(u16::from_be_bytes([*frame.get(at)?, *frame.get(at + 1)?])));
    match frame.get(12..14)? {
        [8, 0] => Some(14 + number(16)?),
        [0x86, 0xdd] => Some(54 + number(18)?),
        _ => None,
    }
}

/// Source and destination of a frame's outermost IP header.
fn addresses(frame: &[u8]) -> (&[u8], &[u8]) {
    if frame[12] == 8 { frame[26..34].split_at(4) } else { frame[22..54].split_at(16) }
}

/// What must hold whatever is wrong with a packet. What a gateway sends is from itself, or an answer without a tunnel:
/// from who sent it, to whom the answer to the `honest` packet goes.
fn check(variant: &Scenario, honest: &[u8]) -> Action {
    let (found, after) = variant.found();
    let before = &variant.packet.bytes;
    let action = found.action();
    assert!(action != Action::Drop || after == *before, "{}: dropped, but changed", variant.name);
    if variant.hook == Hook::Gateway && action == Action::Back {
        let (source, destination) = addresses(&after);
        let own = if after[12] == 8 { source == variant.config.ipv4 } else { source == variant.config.ipv6 };
        let answer = source == addresses(before).0 && destination == addresses(honest).1;
        assert!(own || answer, "{}: leaves with another address: {after:02x?}", variant.name);
    }
    action
}

#[test]
fn packets_cut_at_each_byte_go_nowhere() {
    let mut fates = BTreeMap::new();
    for scenario in scenarios() {
        let (_, honest) = scenario.found();
        for variant in spoil::cut(&scenario) {
            let action = check(&variant, &honest);
            let before = &variant.packet.bytes;
            // Ethernet pads, so a frame may be longer than its packet; one that is shorter is no packet,
            // and nothing is made of it: it is dropped, or left to a stack that will do so.
            if end(before).is_none_or(|end| before.len() < end) {
                let (_, after) = variant.found();
                assert!(action != Action::Back && after == *before, "{}: {action:?}", variant.name);
            }
            *fates.entry((variant.hook.program(), format!("{action:?}"))).or_insert(0) += 1;
        }
    }
    println!("{fates:?}");
    let programs: std::collections::BTreeSet<_> = fates.keys().map(|(program, _)| *program).collect();
    assert_eq!(programs.len(), 3, "{fates:?}");
}

#[test]
fn packets_with_a_wrong_byte_do_no_harm() {
    let mut fates = BTreeMap::new();
    for scenario in scenarios() {
        let (_, honest) = scenario.found();
        for variant in spoil::bent(&scenario) {
            let action = check(&variant, &honest);
            *fates.entry((variant.hook.program(), format!("{action:?}"))).or_insert(0) += 1;
        }
    }
    println!("{fates:?}");
    assert!(fates.values().sum::<u32>() > 50_000, "{fates:?}");
}
