//! Removes expired egress flows of this node's pods, a slice at a time.

use aya::maps::{HashMap, MapData};
use bytemuck::Pod;
use coil_common::keys::{FlowKey4, FlowKey6};
use coil_common::names::{MAP_FLOWS_V4, MAP_FLOWS_V6};
use coil_common::values::FlowValue;

use super::SweepReport;
use super::loader::{LoadError, Loaded};
use super::maps::MapAccessError;
use super::stats::FlowCounts;
use super::sys::{Cursor, lookup_batch};
use super::timeouts::{NODE_EXTRA, expired, timeout};

/// What the sweeper must know of a key.
trait Flow: Pod + aya::Pod {
    fn timeout(&self, state: u32) -> u32;
}

impl Flow for FlowKey4 {
    fn timeout(&self, state: u32) -> u32 {
        timeout(self.protocol, u16::from_be_bytes(self.dst_port), state) + NODE_EXTRA
    }
}

impl Flow for FlowKey6 {
    fn timeout(&self, state: u32) -> u32 {
        timeout(self.protocol, u16::from_be_bytes(self.dst_port), state) + NODE_EXTRA
    }
}

/// One family's table and where the walk through it stands.
struct Table<K: aya::Pod> {
    name: &'static str,
    map: HashMap<MapData, K, FlowValue>,
    fd: std::os::fd::OwnedFd,
    cursor: Cursor,
    seen: u64,
}

impl<K: Flow> Table<K> {
    fn new(loaded: &mut Loaded, name: &'static str) -> Result<Self, LoadError> {
        let fd = loaded.map_fd(name)?;
        Ok(Self { name, map: loaded.map(name)?, fd, cursor: Cursor::default(), seen: 0 })
    }

    /// Looks at about `budget` entries; the number of entries is known at the end of a walk.
    fn sweep(
        &mut self,
        now: u32,
        budget: usize,
        report: &mut SweepReport,
    ) -> Result<Option<u64>, MapAccessError> {
        if self.cursor.is_start() {
            self.seen = 0;
        }
        let entries: Vec<(K, FlowValue)> = lookup_batch(&self.fd, &mut self.cursor, budget)
            .map_err(|error| MapAccessError { operation: "read", map: self.name, source: error.into() })?;
        report.scanned += entries.len();
        for (key, value) in entries {
            if !expired(now, value.last_seen, key.timeout(value.state)) {
                self.seen += 1;
                continue;
            }
            // A packet may have come since the slice was read.
            match self.map.get(&key, 0) {
                Ok(fresh) if !expired(now, fresh.last_seen, key.timeout(fresh.state)) => {
                    self.seen += 1;
                }
                Ok(_) => match self.map.remove(&key) {
                    Ok(()) => report.expired += 1,
                    Err(error) => {
                        tracing::debug!(map = self.name, %error, "an expired flow was gone already");
                    }
                },
                Err(error) => {
                    tracing::debug!(map = self.name, %error, "an expired flow was gone already");
                }
            }
        }
        Ok(self.cursor.is_start().then_some(self.seen))
    }
}

/// Walks through the tables of both families, again and again.
pub(crate) struct FlowSweeper {
    v4: Table<FlowKey4>,
    v6: Table<FlowKey6>,
    /// Which table is being walked through.
    second: bool,
    counts: FlowCounts,
}

impl FlowSweeper {
    /// Takes the tables.
    pub(crate) fn new(loaded: &mut Loaded, counts: FlowCounts) -> Result<Self, LoadError> {
        Ok(Self {
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
                if let Some(entries) = self.v6.sweep(now, left, &mut report)? {
                    self.counts.set_v6(entries);
                    self.second = false;
                    report.finished = true;
                }
            } else if let Some(entries) = self.v4.sweep(now, left, &mut report)? {
                self.counts.set_v4(entries);
                self.second = true;
            }
        }
        self.counts.add_expired(report.expired);
        Ok(report)
    }
}
