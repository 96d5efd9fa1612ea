//! The maps, and the answers that they give.

use aya_ebpf::{
    bindings::{BPF_ANY, BPF_F_MMAPABLE, BPF_F_NO_PREALLOC, BPF_NOEXIST},
    btf_maps::{Array, HashMap, LpmTrie, LruHashMap, PerCpuArray, RingBuf},
    helpers::generated::{bpf_jiffies64, bpf_ktime_get_coarse_ns},
    macros::btf_map,
    maps::lpm_trie::Key,
};
use coil_common::{
    config::Config,
    events::{EVENT_RING, Event, EventBudget, Listener},
    keys::{
        ClientKey4, ClientKey6, FlowKey4, FlowKey6, POLICY_SET_BITS, PeerKey4, PeerKey6, PolicyKey4,
        PolicyKey6,
    },
    names,
    stats::{Direction, DropReason, GatewayStat, egress_stat},
    usage,
    values::{
        ClientValue, ConfigValue, Counter, EgressNameValue, EgressValue, FlowValue, FragmentValue,
        GatewayValue, NatValue4, NatValue6, PodNameValue, PodSlot, PodValue, PolicyValue, STATE_ENCAP,
    },
};
use coil_ebpf::{
    decide::{
        near::Near,
        open::{self, How, Shape, Work},
    },
    encap::Encap,
    family::{Family, V4, V6, addr4, addr6, bytes6},
    flow::Flow,
    tables::{Clock, Fragments, Full, NatTables, NodeTables, ReserveError, Tally, Translation},
};

use super::{apply, atomic, config, events};

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

macro_rules! node_tables {
    ($family:ty, $bytes:expr, $policy:ident, $policy_key:ident, $peers:ident, $peer_key:ident, $flows:ident) => {
        impl NodeTables<$family> for Maps {
            type Flow = *mut FlowValue;

            #[inline(always)]
            fn policy(&self, set: u32, dst: &<$family as Family>::Addr) -> Option<u32> {
                let key = Key::new(
                    POLICY_SET_BITS + size_of::<<$family as Family>::Addr>() as u32 * 8,
                    $policy_key { set: set.to_be_bytes(), dst: $bytes(*dst) },
                );
                $policy.get(&key).map(|value| value.egress)
            }

            #[inline(always)]
            fn egress(&self, index: u32) -> Option<&EgressValue> {
                EGRESSES.get(index)
            }

            #[inline(always)]
            fn gateway(&self, index: u32) -> Option<&GatewayValue> {
                GATEWAYS.get(index)
            }

            #[inline(always)]
            fn is_peer(&self, set: u32, addr: &<$family as Family>::Addr) -> bool {
                $peers.get_ptr($peer_key { set, addr: $bytes(*addr) }).is_some()
            }

            #[inline(always)]
            fn flow(&self, key: &<$family as Family>::KeyWords) -> Option<*mut FlowValue> {
                $flows.get_ptr_mut(shared::<$family>(key))
            }

            #[inline(always)]
            fn pod_usage(&self, cell: u32) -> i64 {
                POD_USAGE.get(cell).map_or(0, |count| *count as i64)
            }

            #[inline(always)]
            fn pod_uses_more(&self, cell: u32) {
                if let Some(count) = POD_USAGE.get_ptr_mut(cell) {
                    // SAFETY: points to a map value.
                    unsafe { atomic::add(count, 1) }
                }
            }

            #[inline(always)]
            fn flow_value(&self, flow: *mut FlowValue) -> FlowValue {
                // SAFETY: points to a map value that stays until the program ends.
                unsafe { *flow }
            }

            #[inline(always)]
            fn put_flow(
                &self,
                key: &<$family as Family>::KeyWords,
                value: &FlowValue,
                replace: bool,
            ) -> Result<bool, Full> {
                let how = if replace { BPF_ANY } else { BPF_NOEXIST };
                match $flows.insert(shared::<$family>(key), value, u64::from(how)) {
                    Ok(()) => {
                        events::flow(shared::<$family>(key), value.egress, value.gateway);
                        Ok(!replace)
                    }
                    Err(EXISTS) => Ok(false),
                    Err(_) => Err(Full),
                }
            }

            #[inline(always)]
            fn decide_flow(&self, flow: *mut FlowValue, value: &FlowValue) {
                // SAFETY: points to a map value that stays until the program ends. A packet that
                // reads a mixture finds a generation that does not match, and decides by itself.
                unsafe {
                    (*flow).gateway_generation = value.gateway_generation;
                    (*flow).gateway = value.gateway;
                    (*flow).egress = value.egress;
                    (*flow).set = value.set;
                }
            }

            #[inline(always)]
            fn retract_flow(&self, flow: *mut FlowValue, bits: u32) {
                // SAFETY: points to a map value that stays until the program ends. What another packet
                // notes at the same moment may be lost with it: it is noted again, or times out later.
                unsafe { (*flow).state &= !bits }
            }

            #[inline(always)]
            fn count_flow(&self, flow: *mut FlowValue, direction: Direction, tally: &Tally) {
                count_flow(flow, direction, tally);
            }

            #[inline(always)]
            fn hit_flow(&self, flow: *mut FlowValue, direction: Direction, packets: u32, bytes: u32) {
                hit_flow(flow, direction, packets, bytes);
            }

            #[inline(always)]
            fn hit_egress(&self, egress: u32, direction: Direction, packets: u32, bytes: u32) {
                if let Some(total) = EGRESS_STATS.get_ptr_mut(egress_stat(egress, direction)) {
                    // SAFETY: a per-CPU value.
                    unsafe { add(total, u64::from(packets), u64::from(bytes)) }
                }
            }

            #[inline(always)]
            fn count_egress(&self, egress: u32, direction: Direction, tally: &Tally) {
                if let Some(total) = EGRESS_STATS.get_ptr_mut(egress_stat(egress, direction)) {
                    // SAFETY: a per-CPU value.
                    unsafe { add(total, u64::from(tally.packets), u64::from(tally.bytes)) }
                }
            }
        }
    };
}

node_tables!(V4, u32::to_ne_bytes, POLICY_V4, PolicyKey4, PEERS_V4, PeerKey4, FLOWS_V4);
node_tables!(V6, bytes6, POLICY_V6, PolicyKey6, PEERS_V6, PeerKey6, FLOWS_V6);

macro_rules! near {
    ($family:ty, $bytes:expr, $near:ident, $key:ident) => {
        impl Near<$family> for Maps {
            #[inline(always)]
            fn near(&self, addr: &<$family as Family>::Addr) -> Option<u32> {
                // SAFETY: without preallocation an entry stays until the program ends, even if it is removed.
                unsafe { $near.get($key { addr: $bytes(*addr) }).copied() }
            }

            #[inline(always)]
            fn pod_at(&self, ifindex: u32) -> Option<PodValue> {
                pod(ifindex).copied()
            }
        }
    };
}

near!(V4, u32::to_ne_bytes, NEAR_V4, ClientKey4);
near!(V6, bytes6, NEAR_V6, ClientKey6);

/// The room for [`Work`] on this processor.
#[inline(always)]
fn work<F: Family>() -> Option<*mut Work<F>> {
    WORK.get_ptr_mut(0).map(<*mut _>::cast)
}

/// Says which flow the work is about.
#[inline(always)]
fn set_flow<F: Family>(flow: &Flow<F>) {
    if let Some(work) = work::<F>() {
        // SAFETY: as in `with_work`.
        unsafe { (*work).flow = *flow };
    }
}

/// Steps of [`open`] as functions of their own, which the verifier looks at once: all that they need is in
/// the room for [`Work`]. Where there is none, which cannot be, they say `$none`.
macro_rules! steps {
    ($($family:ty, $name:ident($($arg:ident),*) -> $result:ty, $none:expr, |$work:ident| $act:expr;)+) => {$(
        #[unsafe(no_mangle)]
        #[inline(never)]
        extern "C" fn $name($($arg: u32),*) -> $result {
            let Some(work) = work::<$family>() else {
                return $none;
            };
            // SAFETY: the room is large enough for either family, whose parts are plain words, and is used
            // by one program at a time: programs of one CPU do not interrupt each other here. A caller
            // that has a reference to it hands that to the compiler before.
            let $work = unsafe { &mut *work };
            $act
        }
    )+};
}

/// Why there is no translation if there is no room for [`Work`].
const NO_WORK: u32 = DropReason::RewriteFailed.index();

steps! {
    V4, attend_v4(shape) -> u32, open::code(Err(NO_WORK)), |work| open::code(open::attend(work, Shape(shape), config(), &Maps));
    V6, attend_v6(shape) -> u32, open::code(Err(NO_WORK)), |work| open::code(open::attend(work, Shape(shape), config(), &Maps));
    V4, look_after_v4(shape) -> u32, open::HALF_ERROR + NO_WORK, |work| open::look_after(work, Shape(shape), &Maps);
    V6, look_after_v6(shape) -> u32, open::HALF_ERROR + NO_WORK, |work| open::look_after(work, Shape(shape), &Maps);
    V4, refusal_v4(shape) -> u32, NO_WORK, |work| open::refusal(work, Shape(shape), config(), &Maps);
    V6, refusal_v6(shape) -> u32, NO_WORK, |work| open::refusal(work, Shape(shape), config(), &Maps);
    V4, search_v4(shape, refusal) -> u32, (open::SEARCH_ERROR + NO_WORK) << 24, |work| {
        open::search(work, Shape(shape), refusal, config(), &Maps)
    };
    V6, search_v6(shape, refusal) -> u32, (open::SEARCH_ERROR + NO_WORK) << 24, |work| {
        open::search(work, Shape(shape), refusal, config(), &Maps)
    };
    V4, settle_v4(shape, found) -> u32, open::code(Err(NO_WORK)), |work| {
        open::settle(work, Shape(shape), found, config(), &Maps)
    };
    V6, settle_v6(shape, found) -> u32, open::code(Err(NO_WORK)), |work| {
        open::settle(work, Shape(shape), found, config(), &Maps)
    };
    V4, take_over_v4(port) -> u32, open::TAKEN_ERROR + NO_WORK, |work| {
        open::take_over(work, (port & 0xffff) as u16, config(), &Maps)
    };
    V6, take_over_v6(port) -> u32, open::TAKEN_ERROR + NO_WORK, |work| {
        open::take_over(work, (port & 0xffff) as u16, config(), &Maps)
    };
    V4, in_vain_v4(shape, refusal) -> u32, NO_WORK, |work| {
        open::in_vain(work, Shape(shape), refusal, config(), &Maps)
    };
    V6, in_vain_v6(shape, refusal) -> u32, NO_WORK, |work| {
        open::in_vain(work, Shape(shape), refusal, config(), &Maps)
    };
    V4, probe_v4(how) -> u32, 0, |work| open::probe(work, How(how), &Maps);
    V6, probe_v6(how) -> u32, 0, |work| open::probe(work, How(how), &Maps);
    V4, mend_v4(now) -> u32, 0, |work| {
        open::mend(work, now, &Maps);
        0
    };
    V6, mend_v6(now) -> u32, 0, |work| {
        open::mend(work, now, &Maps);
        0
    };
}

macro_rules! nat_tables {
    ($family:ty, $bytes:expr, $addr:expr, $nat:ty, $clients:ident, $client_key:ident, $forward:ident, $reverse:ident,
     $attend:ident, $look_after:ident, $refusal:ident, $search:ident, $settle:ident, $take_over:ident, $in_vain:ident, $probe:ident,
     $mend:ident) => {
        impl NatTables<$family> for Maps {
            type Entry = *mut $nat;

            #[inline(always)]
            fn is_client(&self, addr: &<$family as Family>::Addr) -> bool {
                $clients.get_ptr($client_key { addr: $bytes(*addr) }).is_some()
            }

            #[inline(always)]
            fn forward(&self, key: &<$family as Family>::KeyWords) -> Option<*mut $nat> {
                $forward.get_ptr_mut(shared::<$family>(key))
            }

            #[inline(always)]
            fn reverse(&self, key: &<$family as Family>::KeyWords) -> Option<*mut $nat> {
                $reverse.get_ptr_mut(shared::<$family>(key))
            }

            #[inline(always)]
            fn translation(&self, entry: *mut $nat) -> Translation<$family> {
                // SAFETY: points to a map value that stays until the program ends.
                unsafe {
                    Translation {
                        addr: $addr((*entry).addr),
                        port: (*entry).port,
                        state: (*entry).state & !STATE_ENCAP,
                        encap: Encap::of_state((*entry).state),
                        last_seen: (*entry).last_seen,
                        used: (*entry).packets != 0,
                        tick: (*entry).tick,
                    }
                }
            }

            #[inline(always)]
            fn reserve(
                &self,
                key: &<$family as Family>::KeyWords,
                value: &<$family as Family>::Nat,
            ) -> Result<(), ReserveError> {
                let added = $reverse.insert(shared::<$family>(key), value, u64::from(BPF_NOEXIST));
                added.map_err(not_added)
            }

            #[inline(always)]
            fn release(&self, key: &<$family as Family>::KeyWords) {
                // An entry that is gone already is as good as removed.
                if $reverse.remove(shared::<$family>(key)).is_err() {}
            }

            #[inline(always)]
            fn put_forward(
                &self,
                key: &<$family as Family>::KeyWords,
                value: &<$family as Family>::Nat,
            ) -> Result<(), Full> {
                $forward.insert(shared::<$family>(key), value, u64::from(BPF_ANY)).map_err(|_| Full)?;
                events::translation(shared::<$family>(key), &value.addr, value.port);
                Ok(())
            }

            #[inline(always)]
            fn add_forward(
                &self,
                key: &<$family as Family>::KeyWords,
                value: &<$family as Family>::Nat,
            ) -> Result<(), ReserveError> {
                let added = $forward.insert(shared::<$family>(key), value, u64::from(BPF_NOEXIST));
                added.map_err(not_added)?;
                events::translation(shared::<$family>(key), &value.addr, value.port);
                Ok(())
            }

            #[inline(always)]
            fn restore_forward(
                &self,
                key: &<$family as Family>::KeyWords,
                value: &<$family as Family>::Nat,
            ) -> Result<(), ReserveError> {
                let (key, value) = (shared::<$family>(key), bytemuck::cast_ref(value));
                $forward.insert(key, value, u64::from(BPF_NOEXIST)).map_err(not_added)
            }

            #[inline(always)]
            fn remove_forward(&self, key: &<$family as Family>::KeyWords) {
                // An entry that is gone already is as good as removed.
                if $forward.remove(shared::<$family>(key)).is_err() {}
            }

            #[inline(always)]
            fn retract(&self, entry: *mut $nat, bits: u32) {
                // SAFETY: points to a map value that stays until the program ends. What another packet
                // notes at the same moment may be lost with it: it is noted again, or times out later.
                unsafe { (*entry).state &= !bits }
            }

            #[inline(always)]
            fn reown(&self, entry: *mut $nat, port: [u8; 2], now: u32) {
                // SAFETY: points to a map value that stays until the program ends. Of two packets that
                // do this at once the later one wins, as the other finds when it looks after its flow.
                unsafe {
                    (*entry).port = port;
                    (*entry).state &= STATE_ENCAP;
                    (*entry).created = now;
                    (*entry).last_seen = now;
                }
            }

            #[inline(always)]
            fn is_excluded(&self, udp: bool, port: u16) -> bool {
                let (word, bit) = usage::excluded_port(udp, port);
                EXCLUDED_PORTS.get(word).is_some_and(|bits| bits & bit != 0)
            }

            #[inline(always)]
            fn usage(&self, cell: u32) -> i64 {
                GATEWAY_USAGE.get(cell).map_or(0, |count| *count as i64)
            }

            #[inline(always)]
            fn use_more(&self, cell: u32) {
                if let Some(count) = GATEWAY_USAGE.get_ptr_mut(cell) {
                    // SAFETY: points to a map value.
                    unsafe { atomic::add(count, 1) }
                }
            }

            #[inline(always)]
            fn full_remote(&self, index: u32) -> u64 {
                FULL_REMOTES.get(index).map_or(0, |note| *note)
            }

            #[inline(always)]
            fn set_full_remote(&self, index: u32, note: u64) {
                if let Some(old) = FULL_REMOTES.get_ptr_mut(index) {
                    // SAFETY: points to a map value, which is written as a whole.
                    unsafe { old.write(note) }
                }
            }

            #[inline(always)]
            fn count_probes(&self, tries: u32) {
                if let Some(count) = PORT_PROBES.get_ptr_mut(tries) {
                    // SAFETY: a per-CPU value.
                    unsafe { *count = (*count).wrapping_add(1) }
                }
            }

            #[inline(always)]
            fn ask(&self, flow: &Flow<$family>) {
                set_flow(flow);
            }

            #[inline(always)]
            fn attend(&self, shape: Shape, _: &Config) -> Result<(), u32> {
                match $attend(shape.0) {
                    0 => Ok(()),
                    reason => Err(reason - 1),
                }
            }

            #[inline(always)]
            fn look_after(&self, work: &mut Work<$family>, shape: Shape, _: &Config) -> u32 {
                // It is the same work that the function finds by itself, which the compiler must know;
                // so it is in those that follow.
                core::hint::black_box(work);
                $look_after(shape.0)
            }

            #[inline(always)]
            fn refusal(&self, work: &mut Work<$family>, shape: Shape, _: &Config) -> u32 {
                core::hint::black_box(work);
                $refusal(shape.0)
            }

            #[inline(always)]
            fn search(&self, work: &mut Work<$family>, shape: Shape, refusal: u32, _: &Config) -> u32 {
                core::hint::black_box(work);
                $search(shape.0, refusal)
            }

            #[inline(always)]
            fn settle(&self, work: &mut Work<$family>, shape: Shape, found: u32, _: &Config) -> u32 {
                core::hint::black_box(work);
                $settle(shape.0, found)
            }

            #[inline(always)]
            fn take_over(&self, work: &mut Work<$family>, port: u16, _: &Config) -> u32 {
                core::hint::black_box(work);
                $take_over(u32::from(port))
            }

            #[inline(always)]
            fn in_vain(&self, work: &mut Work<$family>, shape: Shape, refusal: u32, _: &Config) -> u32 {
                core::hint::black_box(work);
                $in_vain(shape.0, refusal)
            }

            #[inline(always)]
            fn probe(&self, work: &mut Work<$family>, how: How) -> u32 {
                core::hint::black_box(work);
                $probe(how.0)
            }

            #[inline(always)]
            fn mend(&self, flow: &Flow<$family>, now: u32) {
                set_flow(flow);
                $mend(now);
            }

            #[inline(always)]
            fn restart(&self, entry: *mut $nat) {
                // SAFETY: points to a map value that stays until the program ends.
                unsafe { (*entry).state &= STATE_ENCAP }
            }

            #[inline(always)]
            fn set_encap(&self, entry: *mut $nat, encap: Encap) {
                // SAFETY: points to a map value that stays until the program ends. What another processor
                // notes of the connection at the same time may be lost; the next packet shows it again.
                unsafe { (*entry).state = (*entry).state & !STATE_ENCAP | encap.bits() }
            }

            #[inline(always)]
            fn count_entry(&self, entry: *mut $nat, tally: &Tally) {
                // SAFETY: points to a map value that stays until the program ends.
                unsafe {
                    atomic::add(&raw mut (*entry).packets, u64::from(tally.packets));
                    atomic::add(&raw mut (*entry).bytes, u64::from(tally.bytes));
                    touch(&raw mut (*entry).last_seen, &raw mut (*entry).state, tally);
                    (*entry).tick = Maps.tick() as u16;
                }
            }

            #[inline(always)]
            fn hit_entry(&self, entry: *mut $nat, packets: u32, bytes: u32) {
                // SAFETY: points to a map value that stays until the program ends.
                unsafe {
                    atomic::add(&raw mut (*entry).packets, u64::from(packets));
                    atomic::add(&raw mut (*entry).bytes, u64::from(bytes));
                }
            }

            #[inline(always)]
            fn count_gateway(&self, stat: GatewayStat, packets: u32, bytes: u32) {
                if let Some(total) = GATEWAY_STATS.get_ptr_mut(stat.index()) {
                    // SAFETY: a per-CPU value.
                    unsafe { add(total, u64::from(packets), u64::from(bytes)) }
                }
            }
        }
    };
}

nat_tables!(
    V4,
    u32::to_ne_bytes,
    addr4,
    NatValue4,
    CLIENTS_V4,
    ClientKey4,
    NAT_FORWARD_V4,
    NAT_REVERSE_V4,
    attend_v4,
    look_after_v4,
    refusal_v4,
    search_v4,
    settle_v4,
    take_over_v4,
    in_vain_v4,
    probe_v4,
    mend_v4
);
nat_tables!(
    V6,
    bytes6,
    addr6,
    NatValue6,
    CLIENTS_V6,
    ClientKey6,
    NAT_FORWARD_V6,
    NAT_REVERSE_V6,
    attend_v6,
    look_after_v6,
    refusal_v6,
    search_v6,
    settle_v6,
    take_over_v6,
    in_vain_v6,
    probe_v6,
    mend_v6
);
