//! Removes expired egress flows of this node's pods, a slice at a time.

use aya::maps::{HashMap, MapData};
use bytemuck::Pod;
use coil_common::keys::{FlowKey4, FlowKey6};
use coil_common::names::{MAP_FLOWS_V4, MAP_FLOWS_V6, MAP_POD_USAGE};
use coil_common::usage::{POD_CELLS, ROWS, pod_cells};
use coil_common::values::FlowValue;

use super::SweepReport;
use super::loader::{LoadError, Loaded};
use super::maps::MapAccessError;
use super::stats::FlowCounts;
use super::sys::{Cursor, lookup_batch};
use super::timeouts::{Timeouts, expired, is_pressed};
use super::usage::{Recount, SharedUsage, Usage};

/// What the sweeper must know of a key.
trait Flow: Pod + aya::Pod {
    /// Index of the family.
    const FAMILY: u32;
    /// Protocol and destination port.
    fn service(&self) -> (u8, u16);
}

impl Flow for FlowKey4 {
    const FAMILY: u32 = 0;

    fn service(&self) -> (u8, u16) {
        (self.protocol, u16::from_be_bytes(self.dst_port))
    }
}

impl Flow for FlowKey6 {
    const FAMILY: u32 = 1;

    fn service(&self) -> (u8, u16) {
        (self.protocol, u16::from_be_bytes(self.dst_port))
    }
}

/// What both tables are swept by.
struct Rules {
    timeouts: Timeouts,
    seed: u32,
    usage: SharedUsage,
}

/// One family's table and where the walk through it stands.
struct Table<K: aya::Pod> {
    name: &'static str,
    map: HashMap<MapData, K, FlowValue>,
    fd: std::os::fd::OwnedFd,
    cursor: Cursor,
    capacity: u64,
    seen: u64,
    /// More than four fifths were in use at the last walk.
    pressed: bool,
    recount: Recount,
}

impl<K: Flow> Table<K> {
    fn new(loaded: &mut Loaded, name: &'static str) -> Result<Self, LoadError> {
        Ok(Self {
            name,
            fd: loaded.map_fd(name)?,
            capacity: loaded.capacity(name) as u64,
            map: loaded.map(name)?,
            cursor: Cursor::default(),
            seen: 0,
            pressed: false,
            recount: Recount::default(),
        })
    }

    /// Looks at about `budget` entries; the number of entries is known at the end of a walk.
    fn sweep(
        &mut self,
        now: u32,
        budget: usize,
        rules: &Rules,
        report: &mut SweepReport,
    ) -> Result<Option<u64>, MapAccessError> {
        if self.cursor.is_start() {
            self.seen = 0;
            self.recount.begin(now, &rules.usage);
        }
        let pressed = self.pressed;
        let due = |key: &K, value: &FlowValue| {
            let (protocol, port) = key.service();
            expired(now, value.last_seen, rules.timeouts.of_node(protocol, port, value.state, pressed))
        };
        let entries: Vec<(K, FlowValue)> = lookup_batch(&self.fd, &mut self.cursor, budget)
            .map_err(|error| MapAccessError { operation: "read", map: self.name, source: error.into() })?;
        report.scanned += entries.len();
        for (key, value) in entries {
            let cells = pod_cells(K::FAMILY, coil_ebpf::usage::pod(rules.seed, value.pod));
            self.recount.see(value.created, &cells);
            if !due(&key, &value) {
                self.seen += 1;
                continue;
            }
            // A packet may have come since the slice was read.
            match self.map.get(&key, 0) {
                Ok(fresh) if !due(&key, &fresh) => {
                    self.seen += 1;
                }
                Ok(_) => match self.map.remove(&key) {
                    Ok(()) => {
                        report.expired += 1;
                        cells.into_iter().for_each(|cell| rules.usage.add(cell, -1));
                    }
                    Err(error) => {
                        tracing::debug!(map = self.name, %error, "an expired flow was gone already");
                    }
                },
                Err(error) => {
                    tracing::debug!(map = self.name, %error, "an expired flow was gone already");
                }
            }
        }
        if !self.cursor.is_start() {
            return Ok(None);
        }
        self.pressed = is_pressed(self.seen, self.capacity);
        let own = |cell: u32| cell / (ROWS * POD_CELLS) == K::FAMILY;
        let corrected = self.recount.finish(own, &rules.usage);
        if corrected > 0 {
            tracing::debug!(map = self.name, corrected, "put counts of flows right");
        }
        Ok(Some(self.seen))
    }
}

/// Walks through the tables of both families, again and again.
pub(crate) struct FlowSweeper {
    v4: Table<FlowKey4>,
    v6: Table<FlowKey6>,
    rules: Rules,
    /// Which table is being walked through.
    second: bool,
    counts: FlowCounts,
}

impl FlowSweeper {
    /// Takes the tables.
    pub(crate) fn new(
        loaded: &mut Loaded,
        timeouts: Timeouts,
        seed: u32,
        counts: FlowCounts,
    ) -> Result<Self, LoadError> {
        Ok(Self {
            rules: Rules { timeouts, seed, usage: SharedUsage::new(loaded, MAP_POD_USAGE)? },
            v4: Table::new(loaded, MAP_FLOWS_V4)?,
            v6: Table::new(loaded, MAP_FLOWS_V6)?,
            second: false,
            counts,
        })
    }

    /// Looks at about `budget` entries at `now` seconds since boot.
    pub(crate) fn sweep(&mut self, now: u32, budget: usize) -> Result<SweepReport, MapAccessError> {
        let mut report = SweepReport::default();
        while report.scanned < budget.max(1) && !report.finished {
            let left = (budget - report.scanned).clamp(1, 4096);
            if self.second {
                if let Some(entries) = self.v6.sweep(now, left, &self.rules, &mut report)? {
                    self.counts.set_v6(entries);
                    self.second = false;
                    report.finished = true;
                }
            } else if let Some(entries) = self.v4.sweep(now, left, &self.rules, &mut report)? {
                self.counts.set_v4(entries);
                self.second = true;
            }
        }
        self.counts.add_expired(report.expired);
        Ok(report)
    }
}
