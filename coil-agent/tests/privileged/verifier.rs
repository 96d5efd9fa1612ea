//! The kernel accepts the programs, and says what they cost.

use coil_common::names::{PROGRAM_FROM_POD, PROGRAM_GATEWAY, PROGRAM_TO_POD};

use crate::support::topology::Topology;

#[test]
#[ignore = "privileged: needs root and the eBPF object"]
fn all_programs_load_within_the_budget() {
    let topology = Topology::new();
    let node = topology.open_node(None);
    let gateway = topology.open_gateway();
    for (name, info) in [
        (PROGRAM_FROM_POD, node.program_info(PROGRAM_FROM_POD).ok()),
        (PROGRAM_TO_POD, node.program_info(PROGRAM_TO_POD).ok()),
        (PROGRAM_GATEWAY, gateway.program_info().ok()),
    ] {
        let verified = info.and_then(|info| info.verified_instruction_count());
        println!("{name}: {verified:?} instructions verified");
        assert!(verified.is_some_and(|count| count < 500_000), "{name}: {verified:?}");
    }
}
