//! The maps, and what is common to the answers that they give.

use aya_ebpf::{
    bindings::{BPF_ANY, BPF_F_MMAPABLE, BPF_F_NO_PREALLOC},
    btf_maps::{Array, HashMap, LpmTrie, LruHashMap, PerCpuArray, RingBuf},
    helpers::generated::{bpf_jiffies64, bpf_ktime_get_coarse_ns},
    macros::btf_map,
};
use coil_common::{
    events::{EVENT_RING, Event, EventBudget, Listener},
    keys::{ClientKey4, ClientKey6, FlowKey4, FlowKey6, PeerKey4, PeerKey6, PolicyKey4, PolicyKey6},
    names,
    stats::{Direction, DropReason, GatewayStat},
    usage,
    values::{
        ClientValue, ConfigValue, Counter, EgressNameValue, EgressValue, FlowValue, FragmentValue,
        GatewayValue, NatValue4, NatValue6, PodNameValue, PodSlot, PodValue, PolicyValue,
    },
};
use coil_ebpf::{
    decide::open::Work,
    encap::Encap,
    family::{Family, V4, V6},
    tables::{Clock, Fragments, ReserveError, Tally},
};

use super::{apply, atomic};

mod nat;
mod node;

const NO_PREALLOC: usize = BPF_F_NO_PREALLOC as usize;
const MMAPABLE: usize = BPF_F_MMAPABLE as usize;

#[btf_map(name = "pods")]
static PODS: HashMap<u32, PodValue, { names::MAX_PODS }, NO_PREALLOC> = HashMap::new();
#[btf_map(name = "pod_slots")]
static POD_SLOTS: Array<PodSlot, { names::POD_SLOTS }> = Array::new();
#[btf_map(name = "policy_v4")]
static POLICY_V4: LpmTrie<PolicyKey4, PolicyValue, { names::MAX_POLICIES }, NO_PREALLOC> = LpmTrie::new();
#[btf_map(name = "policy_v6")]
static POLICY_V6: LpmTrie<PolicyKey6, PolicyValue, { names::MAX_POLICIES }, NO_PREALLOC> = LpmTrie::new();
#[btf_map(name = "egresses")]
static EGRESSES: Array<EgressValue, { names::MAX_EGRESSES * 2 }> = Array::new();
#[btf_map(name = "egress_names")]
static EGRESS_NAMES: Array<EgressNameValue, { names::MAX_EGRESSES }> = Array::new();
#[btf_map(name = "egress_stats")]
static EGRESS_STATS: PerCpuArray<Counter, { names::MAX_EGRESSES * 4 }> = PerCpuArray::new();
#[btf_map(name = "gateways")]
static GATEWAYS: Array<GatewayValue, { names::MAX_GATEWAYS }> = Array::new();
#[btf_map(name = "peers_v4")]
static PEERS_V4: HashMap<PeerKey4, u32, { names::MAX_PEERS }, NO_PREALLOC> = HashMap::new();
#[btf_map(name = "peers_v6")]
static PEERS_V6: HashMap<PeerKey6, u32, { names::MAX_PEERS }, NO_PREALLOC> = HashMap::new();
#[btf_map(name = "flows_v4")]
static FLOWS_V4: HashMap<FlowKey4, FlowValue, { names::MAX_FLOWS }, NO_PREALLOC> = HashMap::new();
#[btf_map(name = "flows_v6")]
static FLOWS_V6: HashMap<FlowKey6, FlowValue, { names::MAX_FLOWS }, NO_PREALLOC> = HashMap::new();
#[btf_map(name = "clients_v4")]
static CLIENTS_V4: HashMap<ClientKey4, ClientValue, { names::MAX_CLIENTS }, NO_PREALLOC> = HashMap::new();
#[btf_map(name = "clients_v6")]
static CLIENTS_V6: HashMap<ClientKey6, ClientValue, { names::MAX_CLIENTS }, NO_PREALLOC> = HashMap::new();
#[btf_map(name = "nat_forward_v4")]
static NAT_FORWARD_V4: HashMap<FlowKey4, NatValue4, { names::MAX_NAT }, NO_PREALLOC> = HashMap::new();
#[btf_map(name = "nat_forward_v6")]
static NAT_FORWARD_V6: HashMap<FlowKey6, NatValue6, { names::MAX_NAT }, NO_PREALLOC> = HashMap::new();
#[btf_map(name = "nat_reverse_v4")]
static NAT_REVERSE_V4: HashMap<FlowKey4, NatValue4, { names::MAX_NAT }, NO_PREALLOC> = HashMap::new();
#[btf_map(name = "nat_reverse_v6")]
static NAT_REVERSE_V6: HashMap<FlowKey6, NatValue6, { names::MAX_NAT }, NO_PREALLOC> = HashMap::new();
#[btf_map(name = "fragments_v4")]
static FRAGMENTS_V4: LruHashMap<FlowKey4, FragmentValue, { names::MAX_FRAGMENTS }> = LruHashMap::new();
#[btf_map(name = "fragments_v6")]
static FRAGMENTS_V6: LruHashMap<FlowKey6, FragmentValue, { names::MAX_FRAGMENTS }> = LruHashMap::new();
#[btf_map(name = "excluded_ports")]
static EXCLUDED_PORTS: Array<u64, { usage::EXCLUDED_PORTS }> = Array::new();
#[btf_map(name = "gateway_usage")]
static GATEWAY_USAGE: Array<u64, { usage::GATEWAY_USAGE }, MMAPABLE> = Array::new();
#[btf_map(name = "full_remotes")]
static FULL_REMOTES: Array<u64, { usage::FULL_REMOTES }> = Array::new();
#[btf_map(name = "port_probes")]
static PORT_PROBES: PerCpuArray<u64, { usage::PORT_PROBES }> = PerCpuArray::new();
#[btf_map(name = "pod_usage")]
static POD_USAGE: Array<u64, { usage::POD_USAGE }, MMAPABLE> = Array::new();
/// Room for [`Work`] of either family; of no use once a program has ended.
#[btf_map(name = "work")]
static WORK: PerCpuArray<[u64; WORK_WORDS], 1> = PerCpuArray::new();
#[btf_map(name = "gateway_stats")]
static GATEWAY_STATS: PerCpuArray<Counter, { GatewayStat::COUNT }> = PerCpuArray::new();
#[btf_map(name = "drops")]
static DROPS: PerCpuArray<Counter, { DropReason::COUNT }> = PerCpuArray::new();
#[btf_map(name = "config")]
static CONFIG_COPY: Array<ConfigValue, 1> = Array::new();
#[btf_map(name = "pod_names")]
static POD_NAMES: HashMap<u32, PodNameValue, { names::MAX_PODS }, NO_PREALLOC> = HashMap::new();
/// Of `Event`s; a value type here would contradict the size of values, which rings have none of.
#[btf_map(name = "events")]
pub(super) static EVENTS: RingBuf<(), EVENT_RING> = RingBuf::new();
#[btf_map(name = "listeners")]
pub(super) static LISTENERS: Array<Listener, 1> = Array::new();
#[btf_map(name = "event_budgets")]
pub(super) static EVENT_BUDGETS: PerCpuArray<EventBudget, 2> = PerCpuArray::new();
#[btf_map(name = "headers")]
pub(super) static HEADERS: PerCpuArray<[u8; apply::KEPT], 1> = PerCpuArray::new();
#[btf_map(name = "near_v4")]
static NEAR_V4: HashMap<ClientKey4, u32, { names::MAX_PODS }, NO_PREALLOC> = HashMap::new();
#[btf_map(name = "near_v6")]
static NEAR_V6: HashMap<ClientKey6, u32, { names::MAX_PODS }, NO_PREALLOC> = HashMap::new();
#[btf_map(name = "encaps")]
static ENCAPS: Array<u32, 1> = Array::new();
#[btf_map(name = "event_scratch")]
pub(super) static EVENT_SCRATCH: PerCpuArray<Event, 1> = PerCpuArray::new();

/// Double words of [`Work`], of the larger family.
const WORK_WORDS: usize = 20;

const _: () = assert!(size_of::<Work<V6>>() <= WORK_WORDS * 8 && size_of::<Work<V4>>() <= WORK_WORDS * 8);

/// `-EEXIST`
const EXISTS: i32 = -17;

/// Why an entry was not added where none may be replaced.
#[inline(always)]
const fn not_added(error: i32) -> ReserveError {
    match error {
        EXISTS => ReserveError::Taken,
        _ => ReserveError::Full,
    }
}

/// All maps.
pub(super) struct Maps;

/// The pod behind an interface.
#[inline(always)]
pub(super) fn pod(ifindex: u32) -> Option<&'static PodValue> {
    match POD_SLOTS.get(names::pod_slot(ifindex)) {
        Some(slot) if slot.ifindex == ifindex => Some(&slot.pod),
        // SAFETY: without preallocation an entry stays until the program ends, even if it is removed.
        _ => unsafe { PODS.get(ifindex) },
    }
}

/// Remembers that some client speaks by this kind of tunnel, and says whether any client ever spoke by another
/// one than FOU.
#[inline(always)]
pub(super) fn speaks_otherwise(encap: Encap) -> bool {
    let Some(encaps) = ENCAPS.get_ptr_mut(0) else {
        return false;
    };
    // SAFETY: points to a map value; bits are only ever added.
    unsafe {
        let (old, new) = (*encaps, *encaps | encap.bits());
        if old != new {
            *encaps = new;
        }
        new != 0
    }
}

/// Counts a drop.
#[inline(always)]
pub(super) fn count_drop(reason: u32, counter: &Counter) {
    if let Some(total) = DROPS.get_ptr_mut(reason) {
        // SAFETY: a per-CPU value, and programs of one CPU do not interrupt each other here.
        unsafe { add(total, counter.packets, counter.bytes) }
    }
}

/// Counts a drop for want of state by its family as well.
#[inline(always)]
pub(super) fn count_invalid(family: u32, counter: &Counter) {
    let stat = if family == 0 { GatewayStat::InvalidV4 } else { GatewayStat::InvalidV6 };
    if let Some(total) = GATEWAY_STATS.get_ptr_mut(stat.index()) {
        // SAFETY: a per-CPU value, and programs of one CPU do not interrupt each other here.
        unsafe { add(total, counter.packets, counter.bytes) }
    }
}

/// Adds to a per-CPU counter.
///
/// # Safety
///
/// `total` points to a per-CPU map value.
#[inline(always)]
unsafe fn add(total: *mut Counter, packets: u64, bytes: u64) {
    // SAFETY: the caller's.
    unsafe {
        (*total).packets = (*total).packets.wrapping_add(packets);
        (*total).bytes = (*total).bytes.wrapping_add(bytes);
    }
}

impl Clock for Maps {
    #[inline(always)]
    fn now(&self) -> u32 {
        // SAFETY: the helper has no conditions.
        let nanoseconds = unsafe { bpf_ktime_get_coarse_ns() };
        (nanoseconds / 1_000_000_000) as u32
    }

    #[inline(always)]
    fn tick(&self) -> u32 {
        // SAFETY: the helper has no conditions; the kernel puts a load in its place.
        (unsafe { bpf_jiffies64() } >> TICK_SHIFT) as u32
    }
}

/// A tick is sixteen of the kernel's: 16 to 160 milliseconds.
const TICK_SHIFT: u32 = 4;

/// Counts a packet in a flow, and looks at the clock once a tick.
#[inline(always)]
fn hit_flow(flow: *mut FlowValue, direction: Direction, packets: u32, bytes: u32) {
    // SAFETY: `flow` points to a map value that stays until the program ends.
    unsafe {
        let (all, sum) = match direction {
            Direction::Tx => (&raw mut (*flow).tx_packets, &raw mut (*flow).tx_bytes),
            Direction::Rx => (&raw mut (*flow).rx_packets, &raw mut (*flow).rx_bytes),
        };
        atomic::add(all, u64::from(packets));
        atomic::add(sum, u64::from(bytes));
        let tick = Maps.tick() as u16;
        if (*flow).tick != tick {
            (*flow).tick = tick;
            (*flow).last_seen = Maps.now();
        }
    }
}

/// Counts a packet in a flow.
#[inline(always)]
fn count_flow(flow: *mut FlowValue, direction: Direction, tally: &Tally) {
    // SAFETY: `flow` points to a map value that stays until the program ends.
    unsafe {
        let (packets, bytes) = match direction {
            Direction::Tx => (&raw mut (*flow).tx_packets, &raw mut (*flow).tx_bytes),
            Direction::Rx => (&raw mut (*flow).rx_packets, &raw mut (*flow).rx_bytes),
        };
        atomic::add(packets, u64::from(tally.packets));
        atomic::add(bytes, u64::from(tally.bytes));
        touch(&raw mut (*flow).last_seen, &raw mut (*flow).state, tally);
    }
}

/// Notes time and state, and leaves the cache line alone where they are known.
///
/// # Safety
///
/// Both point into a map value.
#[inline(always)]
unsafe fn touch(last_seen: *mut u32, state: *mut u32, tally: &Tally) {
    // SAFETY: the caller's.
    unsafe {
        if *last_seen != tally.now {
            *last_seen = tally.now;
        }
        if *state & tally.state != tally.state {
            atomic::or(state, tally.state);
        }
    }
}

/// The shared form of a key.
#[inline(always)]
pub(super) fn shared<F: Family>(key: &F::KeyWords) -> &F::Key {
    bytemuck::cast_ref(key)
}

macro_rules! fragments {
    ($family:ty, $fragments:ident) => {
        impl Fragments<$family> for Maps {
            #[inline(always)]
            fn fragment(&self, key: &<$family as Family>::KeyWords) -> Option<FragmentValue> {
                // SAFETY: an LRU map may give the entry to another datagram meanwhile; what is read
                // then is that of a datagram that is as well known.
                unsafe { $fragments.get(shared::<$family>(key)).copied() }
            }

            #[inline(always)]
            fn put_fragment(&self, key: &<$family as Family>::KeyWords, value: &FragmentValue) {
                // Later fragments will be counted as unknown.
                if $fragments.insert(shared::<$family>(key), value, u64::from(BPF_ANY)).is_err() {}
            }

            #[inline(always)]
            fn close_fragment(&self, key: &<$family as Family>::KeyWords) {
                if let Some(value) = $fragments.get_ptr_mut(shared::<$family>(key)) {
                    // SAFETY: points to a map value.
                    unsafe { (*value).flags = 0 };
                }
            }
        }
    };
}

fragments!(V4, FRAGMENTS_V4);
fragments!(V6, FRAGMENTS_V6);
