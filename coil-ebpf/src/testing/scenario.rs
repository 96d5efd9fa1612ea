//! What a scenario is, and how it runs through the library.

use std::collections::BTreeMap;

use coil_common::{
    config::Config,
    names,
    stats::{DropReason, IcmpStat},
    values::Counter,
};

use super::{
    entries::Entry,
    interpret,
    memory::{Memory, Tables},
};

/// Index of the interface that scenarios use: in `BPF_PROG_TEST_RUN` packets come in by the loopback
/// interface, which has this index in every network namespace.
pub const IFINDEX: u32 = 1;

/// A program.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Hook {
    /// `from_pod`
    FromPod,
    /// `to_pod`
    ToPod,
    /// `gateway`
    Gateway,
}

impl Hook {
    /// Name of the program.
    #[must_use]
    pub const fn program(self) -> &'static str {
        match self {
            Self::FromPod => names::PROGRAM_FROM_POD,
            Self::ToPod => names::PROGRAM_TO_POD,
            Self::Gateway => names::PROGRAM_GATEWAY,
        }
    }
}

/// What happens to a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Others go on with it: `TC_ACT_UNSPEC`.
    Pass,
    /// `TC_ACT_SHOT`
    Drop,
    /// Out of the interface that it came in by, or to another pod of the node: `TC_ACT_REDIRECT`.
    Back,
}

impl Action {
    /// What the program returns.
    #[must_use]
    pub const fn code(self) -> i32 {
        match self {
            Self::Pass => -1,
            Self::Drop => 2,
            Self::Back => 7,
        }
    }
}

/// Whether the loaded program can be shown the packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kernel {
    /// It can, through `BPF_PROG_TEST_RUN`.
    Takes,
    /// It cannot, for this reason: the scenario is for the library only.
    Refuses(&'static str),
}

/// What must be true after the packet.
#[derive(Clone, Debug)]
pub struct Expect {
    /// What happened to it.
    pub action: Action,
    /// What it is like now, in [`canonical`](interpret::canonical) form; `None` if nobody looks.
    pub packet: Option<Vec<u8>>,
    /// Why it was dropped.
    pub drop: Option<DropReason>,
    /// All counters of `egress_stats`, `gateway_stats` and `icmp_stats` that are not zero, by map and index.
    pub counters: BTreeMap<(&'static str, u32), Counter>,
    /// Entries of the flow and translation maps, all of them, points in time left out.
    pub entries: Vec<Entry>,
}

/// How often a packet is sent to see that it meets the same fate each time: it has taken the short way
/// by then, if it ever does.
pub const AGAIN: usize = 4;

/// What came of a packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    action: Action,
    packet: Vec<u8>,
    counters: BTreeMap<(&'static str, u32), Counter>,
    entries: Vec<Entry>,
}

impl Outcome {
    /// Without what may differ from run to run.
    #[must_use]
    pub fn new(
        action: Action,
        packet: &[u8],
        counters: BTreeMap<(&'static str, u32), Counter>,
        entries: &[Entry],
    ) -> Self {
        Self { action, packet: interpret::canonical(packet), counters, entries: timeless(entries) }
    }
}

impl Outcome {
    /// What happened to the packet.
    #[must_use]
    pub fn action(&self) -> Action {
        self.action
    }

    /// The packet and what happened to it are the same.
    #[must_use]
    pub fn same_packet(&self, other: &Self) -> bool {
        self.action == other.action && self.packet == other.packet
    }
}

/// A packet, the tables that it meets, and what must come of it.
#[derive(Clone, Debug)]
pub struct Scenario {
    /// Its name, unique.
    pub name: String,
    /// The program.
    pub hook: Hook,
    /// The configuration of the program.
    pub config: Config,
    /// Contents of the maps before; all others are empty.
    pub entries: Vec<Entry>,
    /// A map that has room for no more than so many entries.
    pub limit: Option<(&'static str, usize)>,
    /// The packet, Ethernet header first.
    pub packet: Memory,
    /// Whether the kernel can be shown it.
    pub kernel: Kernel,
    /// What must come of it.
    pub expect: Expect,
    /// The short way does what the long one does not: it goes without a tunnel.
    pub near: bool,
}

impl Scenario {
    /// Runs it through the library, and says what is not as expected.
    ///
    /// # Errors
    ///
    /// What differs, in words.
    pub fn check(&self) -> Result<(), String> {
        let mut tables = Tables::new(&self.entries, 1000);
        if let Some((map, entries)) = self.limit {
            tables.limit(map, entries);
        }
        let (action, bytes) = interpret::run(self.hook, IFINDEX, &self.packet, &self.config, &tables);
        self.compare(action, &bytes, &tables.counters(), &tables.entries())
    }

    /// What comes of it in the library, whatever is expected, and the packet as it is then.
    #[must_use]
    pub fn found(&self) -> (Outcome, Vec<u8>) {
        let mut tables = Tables::new(&self.entries, 1000);
        if let Some((map, entries)) = self.limit {
            tables.limit(map, entries);
        }
        let (action, bytes) = interpret::run(self.hook, IFINDEX, &self.packet, &self.config, &tables);
        (Outcome::new(action, &bytes, tables.counters(), &tables.entries()), bytes)
    }

    /// Sends the packet a few times, once with the short way open and once closed, and says what
    /// differs. Returns how many packets took the short way.
    ///
    /// # Errors
    ///
    /// What differs, in words.
    pub fn check_short_way(&self) -> Result<u32, String> {
        if self.near {
            return Ok(0);
        }
        let both = [false, true].map(|long_way_only| {
            let mut tables = Tables::new(&self.entries, 1000);
            if let Some((map, entries)) = self.limit {
                tables.limit(map, entries);
            }
            tables.long_way_only = long_way_only;
            tables
        });
        for time in 1..=AGAIN {
            let [short, long] = both.each_ref().map(|tables| self.outcome(tables));
            if short != long {
                return Err(format!("packet {time}, short way {short:#?}\nlong way {long:#?}"));
            }
        }
        Ok(both[0].hits.get())
    }

    fn outcome(&self, tables: &Tables) -> Outcome {
        let (action, bytes) = interpret::run(self.hook, IFINDEX, &self.packet, &self.config, tables);
        Outcome::new(action, &bytes, tables.counters(), &tables.entries())
    }

    /// What must come of the packet if it is sent [`AGAIN`] times: what the long way makes of it.
    #[must_use]
    pub fn again(&self) -> Vec<Outcome> {
        let mut tables = Tables::new(&self.entries, 1000);
        if let Some((map, entries)) = self.limit {
            tables.limit(map, entries);
        }
        tables.long_way_only = !self.near;
        (0..AGAIN).map(|_| self.outcome(&tables)).collect()
    }

    /// Compares what came of the packet with what was expected. `counters` holds those of `drops` too,
    /// and none that are zero.
    ///
    /// # Errors
    ///
    /// What differs, in words.
    pub fn compare(
        &self,
        action: Action,
        bytes: &[u8],
        counters: &BTreeMap<(&'static str, u32), Counter>,
        entries: &[Entry],
    ) -> Result<(), String> {
        let expect = &self.expect;
        let mut wanted = expect.counters.clone();
        if let Some(reason) = expect.drop {
            let length = self.packet.bytes.len() as u64;
            let packets = u64::from(self.packet.gso_segments.max(1));
            let counter = Counter { packets, bytes: length.saturating_sub(14) };
            wanted.insert((names::MAP_DROPS, reason.index()), counter);
            if expect.action == Action::Back {
                let counter = Counter { packets: 1, bytes: 0 };
                wanted.insert((names::MAP_ICMP_STATS, IcmpStat::Answered.index()), counter);
            }
            if let Some(stat) = interpret::invalid(reason, &self.packet) {
                wanted.insert((names::MAP_GATEWAY_STATS, stat.index()), counter);
            }
        }
        if action != expect.action || *counters != wanted {
            return Err(format!(
                "action {action:?}, expected {:?}\ncounters {counters:?}\nexpected {wanted:?}",
                expect.action
            ));
        }
        if let Some(packet) = &expect.packet {
            let bytes = interpret::canonical(bytes);
            if bytes != *packet {
                return Err(format!("packet   {}\nexpected {}", hex(&bytes), hex(packet)));
            }
        }
        let found = timeless(entries);
        let wanted = timeless(&expect.entries);
        if found != wanted {
            return Err(format!("entries  {found:#?}\nexpected {wanted:#?}"));
        }
        Ok(())
    }
}

/// Entries without points in time, in an order of their own.
fn timeless(entries: &[Entry]) -> Vec<Entry> {
    let mut entries: Vec<_> = entries.iter().map(Entry::timeless).collect();
    entries.sort_by(|a, b| (a.map, &a.key).cmp(&(b.map, &b.key)));
    entries
}

/// Bytes in hexadecimal.
fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
