//! Cases of the fuzzer through the loaded programs: packet by packet they must do what the library does, which
//! `coil-ebpf` compares with the reference model.
//!
//! The corpus and some random cases by default. `cargo xtask fuzz --bpf` says by the environment for how long
//! else: `COIL_FUZZ_SECONDS` or `COIL_FUZZ_RUNS`, and `COIL_FUZZ_SEED`.

#![expect(clippy::unwrap_used, reason = "tests")]

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use coil_ebpf::testing::fuzz::{corpus, play, world::World};
use coil_ebpf::testing::memory::{Memory, Tables};
use coil_ebpf::testing::scenario::{IFINDEX, Outcome};
use coil_ebpf::testing::{Action, Hook, interpret};

use crate::scenarios::Machine;
use crate::support::net::NetNs;

/// Cases besides the corpus unless something else is asked for.
const RUNS: u64 = 300;
/// The largest packet that a test run takes is somewhat less than a page.
const MOST: usize = 3500;

/// Node and gateway of one world.
struct Kernel {
    world: &'static World,
    node: Machine,
    gateway: Machine,
}

/// A test run takes such a packet.
fn is_taken(packet: &Memory) -> bool {
    let bytes = &packet.bytes;
    let least = match bytes.get(12..14) {
        Some([8, 0]) => 34,
        Some([0x86, 0xdd]) => 54,
        _ => 15,
    };
    // What has segments is made with care in the table of scenarios; a test run has no more than their number.
    bytes.len() >= least && bytes.len() <= MOST && packet.gso_size == 0
}

impl Kernel {
    fn new(narrow: bool) -> Self {
        let world = play::world(narrow);
        let node = Machine::new(Hook::FromPod, &world.node, None);
        node.fill(&world.node_entries);
        let gateway = Machine::new(Hook::Gateway, &world.gateway, None);
        gateway.fill(&world.gateway_entries);
        Self { world, node, gateway }
    }

    /// Plays a case: how many packets it has.
    fn play(&self, case: &[u8]) -> Result<usize, String> {
        // What is wrong with the library itself, other tests say.
        let hops = match play::run(case) {
            Ok(hops) => hops,
            Err(failure) => failure.hops,
        };
        let hops: Vec<_> = hops.into_iter().filter(|hop| is_taken(&hop.packet)).collect();
        let node = Tables::new(&self.world.node_entries, play::START);
        let gateway = Tables::new(&self.world.gateway_entries, play::START);
        let mut result = Ok(hops.len());
        for hop in &hops {
            let (machine, tables, config) = match hop.hook {
                Hook::Gateway => (&self.gateway, &gateway, &self.world.gateway),
                Hook::FromPod | Hook::ToPod => (&self.node, &node, &self.world.node),
            };
            let wanted = interpret::run(hop.hook, IFINDEX, &hop.packet, config, tables);
            let found = machine.show(hop.hook, &hop.packet);
            if let Err(what) = same(found, wanted) {
                result = Err(format!("{}: {}\n{what}", hop.hook.program(), hex(&hop.packet.bytes)));
                break;
            }
        }
        for (machine, tables, used) in [
            (&self.node, &node, &self.world.node_entries),
            (&self.gateway, &gateway, &self.world.gateway_entries),
        ] {
            let state = |counters, entries: &[_]| Outcome::new(Action::Pass, &[], counters, entries);
            let found = state(machine.counters(), &machine.entries());
            let wanted = state(tables.counters(), &tables.entries());
            if result.is_ok() && found != wanted {
                result = Err(format!("tables: found {found:#?}\nwanted {wanted:#?}"));
            }
            machine.clear(used);
            machine.fill(used);
        }
        result
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Compares what has come of a packet.
fn same(found: Result<(Action, Vec<u8>), String>, wanted: (Action, Vec<u8>)) -> Result<(), String> {
    let found = found?;
    // Nobody looks at what is dropped.
    let dropped = found.0 == Action::Drop && wanted.0 == Action::Drop;
    if dropped || (found.0 == wanted.0 && interpret::canonical(&found.1) == interpret::canonical(&wanted.1)) {
        return Ok(());
    }
    Err(format!("found  {:?} {}\nwanted {:?} {}", found.0, hex(&found.1), wanted.0, hex(&wanted.1)))
}

/// A number from the environment.
fn asked(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|value| value.parse().unwrap())
}

#[test]
#[ignore = "privileged: needs root and the eBPF object"]
fn loaded_programs_do_what_the_library_does() {
    let net = NetNs::new("fuzz");
    let seconds = asked("COIL_FUZZ_SECONDS").map(Duration::from_secs);
    let runs = asked("COIL_FUZZ_RUNS").or(seconds.is_none().then_some(RUNS));
    let seed = asked("COIL_FUZZ_SEED").unwrap_or(1);
    let (packets, reasons, failed) = net.run(move || {
        let kernels = [Kernel::new(false), Kernel::new(true)];
        let play = |case: &[u8]| kernels[usize::from(play::is_narrow(case))].play(case);
        let known = corpus::read(&corpus::folder()).unwrap();
        assert!(known.len() > 20, "only {} cases in {}", known.len(), corpus::folder().display());
        let mut random = corpus::Random(seed);
        let start = Instant::now();
        let (mut packets, mut count, mut said) = (0, 0, start);
        let mut reasons = BTreeMap::new();
        let mut from_corpus = known.iter().map(|(_, case)| case.clone());
        loop {
            let case = from_corpus.next().unwrap_or_else(|| {
                count += 1;
                let [one, other] = [(), ()].map(|()| random.below(known.len()));
                if count % 8 == 0 { random.case() } else { random.changed(&known[one].1, &known[other].1) }
            });
            match play(&case) {
                Ok(more) => packets += more,
                Err(what) => {
                    let least = corpus::least(&case, |case| play(case).is_err());
                    let what = play(&least).err().unwrap_or(what);
                    let path = corpus::folder().join(format!("{}.hex", corpus::name(&least)));
                    std::fs::write(&path, corpus::text("loaded programs and library differ", &least))
                        .unwrap();
                    return (packets, reasons, Some(format!("{what}\nwritten to {}", path.display())));
                }
            }
            for hop in play::run(&case).unwrap_or_default() {
                *reasons.entry((hop.hook.program(), format!("{:?}", hop.action))).or_insert(0) += 1;
            }
            if said.elapsed() > Duration::from_secs(5) {
                said = Instant::now();
                println!("{:>6} s {count:>9} runs {packets:>9} packets", start.elapsed().as_secs());
            }
            if runs.is_some_and(|most| count >= most) || seconds.is_some_and(|most| start.elapsed() >= most) {
                return (packets, reasons, None);
            }
        }
    });
    assert!(failed.is_none(), "{}", failed.unwrap());
    println!("{packets} packets, of all that there were: {reasons:?}");
    assert!(packets > 1000, "only {packets} packets could be shown to the kernel");
    assert_eq!(reasons.len(), 3 + 2 + 3, "{reasons:?}");
}
