//! What a node remembers beside flows, in memory.

use coil_common::{
    keys::AffinityKey,
    names,
    values::{AffinityValue, InboundValue},
};

use super::{
    entries::{Entry, Key},
    memory::Tables,
};
use crate::{
    family::{Family, V4, V6, bytes6},
    notes::{Affinities, Inbounds},
    tables::Full,
};

type Handle = &'static (&'static str, Key);

/// The same entry without points in time; `None` if it is of another map.
pub(super) fn timeless(entry: &Entry) -> Option<Entry> {
    let mut entry = entry.clone();
    if entry.map == names::MAP_AFFINITY {
        let value = AffinityValue { last_used: 0, ..entry.value.read() };
        entry.value = super::entries::Value::of(&value);
    } else if entry.map.starts_with("inbound_") {
        let value = InboundValue { last_seen: 0, ..entry.value.read() };
        entry.value = super::entries::Value::of(&value);
    } else {
        return None;
    }
    Some(entry)
}

fn field4(addr: u32) -> [u8; 16] {
    let mut field = [0; 16];
    field[..4].copy_from_slice(&addr.to_ne_bytes());
    field
}

macro_rules! notes {
    ($family:ty, $field:expr, $inbound:expr) => {
        impl Affinities<$family> for Tables {
            type Affinity = Handle;

            fn affinity(&self, client: &<$family as Family>::Addr, egress: u32) -> Option<Handle> {
                let key = AffinityKey { egress, client: $field(*client) };
                self.handle::<AffinityValue>(names::MAP_AFFINITY, Key::of(&key))
            }

            fn affinity_value(&self, affinity: Handle) -> AffinityValue {
                self.live(affinity.0, &affinity.1).unwrap_or_default()
            }

            fn use_affinity(&self, affinity: Handle, now: u32) {
                self.change::<AffinityValue>(affinity, |value| value.last_used = now);
            }

            fn put_affinity(&self, client: &<$family as Family>::Addr, egress: u32, value: &AffinityValue) {
                let key = AffinityKey { egress, client: $field(*client) };
                // An LRU map makes room; the limit of a scenario is that of a plain one.
                if self.put(names::MAP_AFFINITY, &Key::of(&key), value, true).is_err() {}
            }
        }

        impl Inbounds<$family> for Tables {
            type Inbound = Handle;

            fn inbound(&self, key: &<$family as Family>::KeyWords) -> Option<Handle> {
                self.handle::<InboundValue>($inbound, Key::of(key))
            }

            fn inbound_value(&self, inbound: Handle) -> InboundValue {
                self.live(inbound.0, &inbound.1).unwrap_or_default()
            }

            fn see_inbound(&self, inbound: Handle, now: u32, state: u32) {
                self.change::<InboundValue>(inbound, |value| {
                    value.last_seen = now;
                    value.state |= state;
                });
            }

            fn put_inbound(
                &self,
                key: &<$family as Family>::KeyWords,
                value: &InboundValue,
            ) -> Result<(), Full> {
                self.put($inbound, &Key::of(key), value, true).map_err(|_| Full)
            }
        }
    };
}

notes!(V4, field4, names::MAP_INBOUND_V4);
notes!(V6, bytes6, names::MAP_INBOUND_V6);
