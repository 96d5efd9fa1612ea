//! Translation tables of a gateway as the collector sees them: keys of the other half, and access.

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use aya::maps::{HashMap, MapData, MapError};
use coil_common::keys::{FlowKey4, FlowKey6};
use coil_common::names::{MAP_NAT_FORWARD_V4, MAP_NAT_FORWARD_V6, MAP_NAT_REVERSE_V4, MAP_NAT_REVERSE_V6};
use coil_common::usage::{Share, gateway_cells, gateway_total};
use coil_common::values::{NatValue4, NatValue6};
use coil_ebpf::family::{self, Family as _};
use coil_ebpf::usage;

use crate::datapath::internal::{Cursor, Loaded, lookup_batch, open_pinned};
use crate::datapath::{LoadError, MapAccessError};

/// Which table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Half {
    /// By what the client sends.
    Forward,
    /// By what the remote sends; owns the port.
    Reverse,
}

/// An address family's tables.
pub(crate) trait NatFamily {
    /// Key of both tables.
    type Key: bytemuck::Pod + aya::Pod + Ord + std::fmt::Debug;
    /// Value of both tables.
    type Value: bytemuck::Pod + aya::Pod + PartialEq + std::fmt::Debug;
    /// Names of the forward and the reverse table.
    const MAPS: [&'static str; 2];

    /// Key under which the other half of a translation is found.
    fn forward_key(reverse: &Self::Key, value: &Self::Value) -> Self::Key;

    /// The same the other way round.
    fn reverse_key(forward: &Self::Key, value: &Self::Value) -> Self::Key;

    /// Protocol and the remote's port, by a key of the reverse table.
    fn service(reverse: &Self::Key) -> (u8, u16);

    /// What the value says about the direction.
    fn facts(value: &Self::Value) -> Facts;

    /// Cells of `gateway_usage` in which the flow with this forward key is counted.
    fn cells(seed: u32, forward: &Self::Key) -> [u32; 5];

    /// Whether a cell of `gateway_usage` is of this family.
    fn owns(cell: u32) -> bool;
}

/// What is common to values of both families.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Facts {
    pub(crate) state: u32,
    pub(crate) last_seen: u32,
    pub(crate) created: u32,
    pub(crate) packets: u64,
    pub(crate) bytes: u64,
}

/// IPv4.
#[derive(Debug)]
pub(crate) struct V4;

/// IPv6.
#[derive(Debug)]
pub(crate) struct V6;

macro_rules! nat_family {
    ($family:ty, $words:ty, $addr:expr, $key:ident, $value:ident, $forward:ident, $reverse:ident) => {
        impl NatFamily for $family {
            type Key = $key;
            type Value = $value;
            const MAPS: [&'static str; 2] = [$forward, $reverse];

            fn forward_key(reverse: &$key, value: &$value) -> $key {
                // As the client sends: to whom the reply comes from.
                $key {
                    src: value.addr,
                    dst: reverse.src,
                    src_port: value.port,
                    dst_port: reverse.src_port,
                    protocol: reverse.protocol,
                    ..$key::default()
                }
            }

            fn reverse_key(forward: &$key, value: &$value) -> $key {
                $key {
                    src: forward.dst,
                    dst: value.addr,
                    src_port: forward.dst_port,
                    dst_port: value.port,
                    protocol: forward.protocol,
                    ..$key::default()
                }
            }

            fn service(reverse: &$key) -> (u8, u16) {
                (reverse.protocol, u16::from_be_bytes(reverse.src_port))
            }

            fn facts(value: &$value) -> Facts {
                let $value { state, last_seen, created, packets, bytes, .. } = *value;
                Facts { state, last_seen, created, packets, bytes }
            }

            fn cells(seed: u32, forward: &$key) -> [u32; 5] {
                let client = usage::client::<$words>(seed, &$addr(forward.src));
                let remote =
                    usage::remote::<$words>(seed, &$addr(forward.dst), forward.dst_port, forward.protocol);
                let family = <$words>::INDEX;
                let [a, b] = gateway_cells(family, Share::Client, client);
                let [c, d] = gateway_cells(family, Share::Remote, usage::pair(client, remote));
                [gateway_total(family), a, b, c, d]
            }

            fn owns(cell: u32) -> bool {
                let total = gateway_total(0);
                let family = <$words>::INDEX;
                if cell >= total { cell == gateway_total(family) } else { cell / (total / 2) == family }
            }
        }
    };
}

nat_family!(V4, family::V4, family::addr4, FlowKey4, NatValue4, MAP_NAT_FORWARD_V4, MAP_NAT_REVERSE_V4);
nat_family!(V6, family::V6, family::addr6, FlowKey6, NatValue6, MAP_NAT_FORWARD_V6, MAP_NAT_REVERSE_V6);

/// Both tables of a family.
pub(crate) trait NatStore<F: NatFamily> {
    /// Why a table cannot be read or written.
    type Error;

    /// Reads about `count` entries from `cursor` on, which is at the start again at the end.
    fn slice(
        &self,
        half: Half,
        cursor: &mut Cursor,
        count: usize,
    ) -> Result<Vec<(F::Key, F::Value)>, Self::Error>;

    /// Reads an entry.
    fn get(&self, half: Half, key: &F::Key) -> Result<Option<F::Value>, Self::Error>;

    /// Removes an entry if it is there.
    fn remove(&mut self, half: Half, key: &F::Key) -> Result<(), Self::Error>;
}

/// The tables in the kernel.
pub(crate) struct NatMaps<F: NatFamily> {
    maps: [HashMap<MapData, F::Key, F::Value>; 2],
    fds: [OwnedFd; 2],
    capacity: usize,
}

impl<F: NatFamily> NatMaps<F> {
    /// Takes the handles.
    pub(crate) fn new(loaded: &mut Loaded) -> Result<Self, LoadError> {
        let [forward, reverse] = F::MAPS;
        let fds = [loaded.map_fd(forward)?, loaded.map_fd(reverse)?];
        let capacity = loaded.capacity(forward).min(loaded.capacity(reverse));
        Ok(Self { maps: [loaded.map(forward)?, loaded.map(reverse)?], fds, capacity })
    }

    /// Opens the pinned tables, to read them.
    pub(crate) fn open(folder: &Path) -> Result<Self, LoadError> {
        let table = |map| -> Result<_, LoadError> {
            let data = MapData::from_pin(folder.join(map));
            let data = data.map_err(|source| LoadError::MapType { map, source })?;
            let fd = data.fd().as_fd().try_clone_to_owned();
            let fd = fd.map_err(|error| LoadError::MapType { map, source: error.into() })?;
            Ok((open_pinned(folder, map)?, fd))
        };
        let [forward, reverse] = F::MAPS;
        let ((forward, forward_fd), (reverse, reverse_fd)) = (table(forward)?, table(reverse)?);
        Ok(Self { maps: [forward, reverse], fds: [forward_fd, reverse_fd], capacity: 0 })
    }

    /// Translations that fit.
    pub(crate) fn capacity(&self) -> usize {
        self.capacity
    }
}

impl Half {
    fn index(self) -> usize {
        match self {
            Self::Forward => 0,
            Self::Reverse => 1,
        }
    }
}

impl<F: NatFamily> NatStore<F> for NatMaps<F> {
    type Error = MapAccessError;

    fn slice(
        &self,
        half: Half,
        cursor: &mut Cursor,
        count: usize,
    ) -> Result<Vec<(F::Key, F::Value)>, MapAccessError> {
        let map = F::MAPS[half.index()];
        lookup_batch(&self.fds[half.index()], cursor, count).map_err(|error| MapAccessError {
            operation: "read",
            map,
            source: error.into(),
        })
    }

    fn get(&self, half: Half, key: &F::Key) -> Result<Option<F::Value>, MapAccessError> {
        match self.maps[half.index()].get(key, 0) {
            Ok(value) => Ok(Some(value)),
            Err(MapError::KeyNotFound) => Ok(None),
            Err(source) => Err(MapAccessError { operation: "read", map: F::MAPS[half.index()], source }),
        }
    }

    fn remove(&mut self, half: Half, key: &F::Key) -> Result<(), MapAccessError> {
        crate::datapath::internal::absent_is_fine(self.maps[half.index()].remove(key)).map_err(|source| {
            MapAccessError { operation: "remove an entry of", map: F::MAPS[half.index()], source }
        })
    }
}

#[cfg(test)]
pub(crate) mod fake {
    //! Tables in memory.

    use std::collections::BTreeMap;
    use std::convert::Infallible;

    use super::*;

    /// Both tables; `on_get` runs once, before the given number of look-ups has been done.
    pub(crate) struct FakeNat<F: NatFamily> {
        pub(crate) forward: BTreeMap<F::Key, F::Value>,
        pub(crate) reverse: BTreeMap<F::Key, F::Value>,
        /// Entries that a packet changes after the slice was read and before it is looked up again.
        pub(crate) refreshed: BTreeMap<F::Key, F::Value>,
    }

    impl<F: NatFamily> Default for FakeNat<F> {
        fn default() -> Self {
            let empty = BTreeMap::new;
            Self { forward: empty(), reverse: empty(), refreshed: empty() }
        }
    }

    impl<F: NatFamily> FakeNat<F> {
        fn map(&self, half: Half) -> &BTreeMap<F::Key, F::Value> {
            match half {
                Half::Forward => &self.forward,
                Half::Reverse => &self.reverse,
            }
        }
    }

    impl<F: NatFamily> NatStore<F> for FakeNat<F> {
        type Error = Infallible;

        fn slice(
            &self,
            half: Half,
            cursor: &mut Cursor,
            _count: usize,
        ) -> Result<Vec<(F::Key, F::Value)>, Infallible> {
            *cursor = Cursor::default();
            Ok(self.map(half).iter().map(|(key, value)| (*key, *value)).collect())
        }

        fn get(&self, half: Half, key: &F::Key) -> Result<Option<F::Value>, Infallible> {
            let fresh = self.refreshed.get(key).filter(|_| self.map(half).contains_key(key));
            Ok(fresh.or_else(|| self.map(half).get(key)).copied())
        }

        fn remove(&mut self, half: Half, key: &F::Key) -> Result<(), Infallible> {
            match half {
                Half::Forward => self.forward.remove(key),
                Half::Reverse => self.reverse.remove(key),
            };
            Ok(())
        }
    }
}
