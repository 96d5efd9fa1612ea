//! The maps of what a node remembers beside flows.

use aya_ebpf::{
    bindings::{BPF_ANY, BPF_F_NO_PREALLOC},
    btf_maps::{HashMap, LruHashMap},
    macros::btf_map,
};
use coil_common::{
    keys::{AffinityKey, FlowKey4, FlowKey6},
    names,
    values::{AffinityValue, InboundValue},
};
use coil_ebpf::{
    family::{Family, V4, V6},
    notes::{Affinities, Inbounds},
    tables::Full,
};

use super::{
    atomic,
    maps::{Maps, shared},
};

const NO_PREALLOC: usize = BPF_F_NO_PREALLOC as usize;

#[btf_map(name = "affinity")]
static AFFINITY: LruHashMap<AffinityKey, AffinityValue, { names::MAX_AFFINITIES }> = LruHashMap::new();
#[btf_map(name = "inbound_v4")]
static INBOUND_V4: HashMap<FlowKey4, InboundValue, { names::MAX_INBOUND }, NO_PREALLOC> = HashMap::new();
#[btf_map(name = "inbound_v6")]
static INBOUND_V6: HashMap<FlowKey6, InboundValue, { names::MAX_INBOUND }, NO_PREALLOC> = HashMap::new();

macro_rules! notes {
    ($family:ty, $words:expr, $inbound:ident) => {
        impl Affinities<$family> for Maps {
            type Affinity = *mut AffinityValue;

            #[inline(always)]
            fn affinity(
                &self,
                client: &<$family as Family>::Addr,
                egress: u32,
            ) -> Option<*mut AffinityValue> {
                let key: AffinityKey = bytemuck::cast($words(client, egress));
                AFFINITY.get_ptr_mut(&key)
            }

            #[inline(always)]
            fn affinity_value(&self, affinity: *mut AffinityValue) -> AffinityValue {
                // SAFETY: points to a map value, whose memory stays until the program ends. One that is
                // used for another client meanwhile names a gateway all the same, which is checked.
                unsafe { *affinity }
            }

            #[inline(always)]
            fn use_affinity(&self, affinity: *mut AffinityValue, now: u32) {
                // SAFETY: as above.
                unsafe {
                    if (*affinity).last_used != now {
                        (*affinity).last_used = now;
                    }
                }
            }

            #[inline(always)]
            fn put_affinity(&self, client: &<$family as Family>::Addr, egress: u32, value: &AffinityValue) {
                let key: AffinityKey = bytemuck::cast($words(client, egress));
                // Without room nothing is remembered: the hash goes on to choose.
                if AFFINITY.insert(&key, value, u64::from(BPF_ANY)).is_err() {}
            }
        }

        impl Inbounds<$family> for Maps {
            type Inbound = *mut InboundValue;

            #[inline(always)]
            fn inbound(&self, key: &<$family as Family>::KeyWords) -> Option<*mut InboundValue> {
                $inbound.get_ptr_mut(shared::<$family>(key))
            }

            #[inline(always)]
            fn inbound_value(&self, inbound: *mut InboundValue) -> InboundValue {
                // SAFETY: points to a map value that stays until the program ends.
                unsafe { *inbound }
            }

            #[inline(always)]
            fn see_inbound(&self, inbound: *mut InboundValue, now: u32, state: u32) {
                // SAFETY: points to a map value that stays until the program ends.
                unsafe {
                    if (*inbound).last_seen != now {
                        (*inbound).last_seen = now;
                    }
                    if (*inbound).state & state != state {
                        atomic::or(&raw mut (*inbound).state, state);
                    }
                }
            }

            #[inline(always)]
            fn put_inbound(
                &self,
                key: &<$family as Family>::KeyWords,
                value: &InboundValue,
            ) -> Result<(), Full> {
                $inbound.insert(shared::<$family>(key), value, u64::from(BPF_ANY)).map_err(|_| Full)
            }
        }
    };
}

notes!(V4, |client: &u32, egress: u32| [egress, *client, 0, 0, 0], INBOUND_V4);
notes!(V6, |client: &[u32; 4], egress: u32| [egress, client[0], client[1], client[2], client[3]], INBOUND_V6);
