//! Removes expired flows that have come to this node's pods directly (originating-only).

use std::os::fd::OwnedFd;

use aya::maps::{HashMap, MapData};
use bytemuck::Pod;
use coil_common::keys::{FlowKey4, FlowKey6};
use coil_common::names::{MAP_INBOUND_V4, MAP_INBOUND_V6};
use coil_common::values::InboundValue;

use super::loader::{LoadError, Loaded};
use super::maps::{MapAccessError, absent_is_fine};
use super::stats::MapFill;
use super::sys::{Cursor, lookup_batch};
use super::timeouts::{Timeouts, expired};

/// Entries read at a time.
const SLICE: usize = 4096;

/// What the sweeper must know of a key, which is as the pod answers.
trait Flow: Pod + aya::Pod {
    fn timeout(&self, timeouts: &Timeouts, state: u32) -> u32;
}

impl Flow for FlowKey4 {
    fn timeout(&self, timeouts: &Timeouts, state: u32) -> u32 {
        timeouts.of(self.protocol, u16::from_be_bytes(self.src_port), state, false)
    }
}

impl Flow for FlowKey6 {
    fn timeout(&self, timeouts: &Timeouts, state: u32) -> u32 {
        timeouts.of(self.protocol, u16::from_be_bytes(self.src_port), state, false)
    }
}

/// One family's table.
struct Table<K: aya::Pod> {
    name: &'static str,
    map: HashMap<MapData, K, InboundValue>,
    fd: OwnedFd,
}

impl<K: Flow> Table<K> {
    fn new(loaded: &mut Loaded, name: &'static str) -> Result<Self, LoadError> {
        let fd = loaded.map_fd(name)?;
        Ok(Self { name, map: loaded.map(name)?, fd })
    }

    /// Looks at all entries; how many are left.
    fn sweep(&mut self, now: u32, timeouts: &Timeouts) -> Result<usize, MapAccessError> {
        let name = self.name;
        let failed = |operation| move |source| MapAccessError { operation, map: name, source };
        let mut cursor = Cursor::default();
        let mut left = 0;
        loop {
            let slice: Vec<(K, InboundValue)> =
                lookup_batch(&self.fd, &mut cursor, SLICE).map_err(|error| failed("read")(error.into()))?;
            for (key, value) in slice {
                let is_over =
                    |value: &InboundValue| expired(now, value.last_seen, key.timeout(timeouts, value.state));
                // A packet may have come since the slice was read.
                if is_over(&value) && self.map.get(&key, 0).is_ok_and(|fresh| is_over(&fresh)) {
                    absent_is_fine(self.map.remove(&key)).map_err(failed("remove an entry of"))?;
                } else {
                    left += 1;
                }
            }
            if cursor.is_start() {
                return Ok(left);
            }
        }
    }
}

/// The tables of both families.
pub(crate) struct InboundSweeper {
    v4: Table<FlowKey4>,
    v6: Table<FlowKey6>,
    timeouts: Timeouts,
    fill: MapFill,
}

impl InboundSweeper {
    /// Takes the tables; `fill` is told how full they are.
    pub(crate) fn new(loaded: &mut Loaded, timeouts: Timeouts, fill: MapFill) -> Result<Self, LoadError> {
        let (v4, v6) = (Table::new(loaded, MAP_INBOUND_V4)?, Table::new(loaded, MAP_INBOUND_V6)?);
        Ok(Self { v4, v6, timeouts, fill })
    }

    /// Removes what has expired at `now` seconds since boot.
    pub(crate) fn sweep(&mut self, now: u32) -> Result<(), MapAccessError> {
        self.fill.set_one(MAP_INBOUND_V4, self.v4.sweep(now, &self.timeouts)?);
        self.fill.set_one(MAP_INBOUND_V6, self.v6.sweep(now, &self.timeouts)?);
        Ok(())
    }
}
