//! Packets of each kind in the scenario table, cut at each byte and with each byte of its headers changed, through
//! the loaded programs: they must do what the library does, whose harmlessness `coil-ebpf` tests.

use std::collections::BTreeMap;

use coil_ebpf::testing::spoil::{bent, cut, representatives};
use coil_ebpf::testing::{Kernel, Scenario};

use crate::scenarios::{Machine, Setting, setting};
use crate::support::net::NetNs;

/// Differences that are printed.
const SHOWN: usize = 10;

/// Compares variants of scenarios; how many there were.
fn agree(what: &str, variants: impl Fn(&Scenario) -> Vec<Scenario> + Send + 'static) -> usize {
    let net = NetNs::new(what);
    let (total, failed) = net.run(move || {
        let mut groups: BTreeMap<Setting, Vec<Scenario>> = BTreeMap::new();
        for scenario in representatives() {
            groups.entry(setting(&scenario)).or_default().push(scenario);
        }
        let mut total = 0;
        let mut failed = Vec::new();
        for ((_, _, limit), scenarios) in groups {
            eprintln!("{} scenarios like {}", scenarios.len(), scenarios[0].name);
            let machine = Machine::new(scenarios[0].hook, &scenarios[0].config, limit);
            let takes = |variant: &Scenario| matches!(variant.kernel, Kernel::Takes);
            for variant in scenarios.iter().flat_map(&variants).filter(takes) {
                total += 1;
                let (wanted, _) = variant.found();
                match machine.found(&variant) {
                    Ok(found) if found == wanted => {}
                    Ok(found) => {
                        failed.push(format!("{}:\nfound {found:#?}\nwanted {wanted:#?}", variant.name))
                    }
                    Err(error) => failed.push(format!("{}: {error}", variant.name)),
                }
            }
        }
        (total, failed)
    });
    let shown = &failed[..failed.len().min(SHOWN)];
    assert!(failed.is_empty(), "{} of {total} failed, the first:\n{}", failed.len(), shown.join("\n\n"));
    println!("{total} packets");
    total
}

#[test]
#[ignore = "privileged: needs root and the eBPF object"]
fn programs_and_library_agree_on_packets_cut_at_each_byte() {
    assert!(agree("cut", cut) > 1000);
}

#[test]
#[ignore = "privileged: needs root and the eBPF object"]
fn programs_and_library_agree_on_packets_with_a_wrong_byte() {
    // Every seventh: they are many, and seven is a divisor of none of the numbers that make them.
    let some = |scenario: &Scenario| bent(scenario).into_iter().step_by(7).collect();
    assert!(agree("bent", some) > 1000);
}
