//! Map entries as bytes, as a map holds them: the map's name says what type they have.

use bytemuck::NoUninit;
use coil_common::values::{FlowValue, FragmentValue, NatValue4, NatValue6};

/// Something that can stand in a map.
pub trait Bytes {
    /// Its bytes.
    fn bytes(&self) -> Vec<u8>;
}

impl<T: NoUninit> Bytes for T {
    fn bytes(&self) -> Vec<u8> {
        bytemuck::bytes_of(self).to_vec()
    }
}

/// A key.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Key(pub Vec<u8>);

impl Key {
    /// A key from its shared form.
    pub fn of(key: &impl Bytes) -> Self {
        Self(key.bytes())
    }

    /// A key of a longest-prefix map: the length in native order, then the data.
    pub fn prefix(length: u32, data: &impl Bytes) -> Self {
        let mut bytes = length.to_ne_bytes().to_vec();
        bytes.extend(data.bytes());
        Self(bytes)
    }

    /// The parts of a key of a longest-prefix map.
    pub(super) fn split_prefix(&self) -> (u32, &[u8]) {
        let (length, data) = self.0.split_at(4);
        (u32::from_ne_bytes([length[0], length[1], length[2], length[3]]), data)
    }
}

/// A value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Value(pub Vec<u8>);

impl Value {
    /// A value from its shared form.
    pub fn of(value: &impl Bytes) -> Self {
        Self(value.bytes())
    }

    /// The shared form.
    #[must_use]
    pub fn read<T: bytemuck::AnyBitPattern>(&self) -> T {
        bytemuck::pod_read_unaligned(&self.0)
    }
}

/// An entry of a map.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Name of the map.
    pub map: &'static str,
    /// Key.
    pub key: Key,
    /// Value.
    pub value: Value,
}

impl Entry {
    /// An entry of a map that is no longest-prefix map.
    pub fn new(map: &'static str, key: &impl Bytes, value: &impl Bytes) -> Self {
        Self { map, key: Key::of(key), value: Value::of(value) }
    }

    /// The same without points in time, which differ from run to run.
    #[must_use]
    pub fn timeless(&self) -> Self {
        if let Some(entry) = super::notes::timeless(self) {
            return entry;
        }
        let mut entry = self.clone();
        if self.map.starts_with("flows_") {
            let mut value: FlowValue = self.value.read();
            value.last_seen = 0;
            value.created = 0;
            value.tick = 0;
            entry.value = Value::of(&value);
        } else if self.map.starts_with("fragments_") {
            let mut value: FragmentValue = self.value.read();
            value.seen = 0;
            entry.value = Value::of(&value);
        } else if self.map.starts_with("nat_") && self.map.ends_with("_v4") {
            let mut value: NatValue4 = self.value.read();
            value.last_seen = 0;
            value.created = 0;
            value.tick = 0;
            entry.value = Value::of(&value);
        } else if self.map.starts_with("nat_") {
            let mut value: NatValue6 = self.value.read();
            value.last_seen = 0;
            value.created = 0;
            value.tick = 0;
            entry.value = Value::of(&value);
        }
        entry
    }
}
