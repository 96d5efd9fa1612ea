//! Tells a listener of drops and new flows, if there is one.
//!
//! Called only where a packet is dropped or a flow is made. With nobody listening that costs a look at
//! one word; a flood costs no more than [`EVENT_BUDGET`] events a second and processor.

use aya_ebpf::{
    bindings::__sk_buff,
    helpers::generated::{bpf_ktime_get_coarse_ns, bpf_skb_load_bytes},
};
use coil_common::{
    events::{
        EVENT_BUDGET, EVENT_DROP, EVENT_FLOW, EVENT_HEAD, Event, HOOK_FROM_POD, HOOK_GATEWAY, event_budget,
    },
    keys::{FlowKey4, FlowKey6},
};
use coil_ebpf::packet::ETHERNET;

use super::{
    maps::{EVENT_BUDGETS, EVENT_SCRATCH, EVENTS, LISTENERS},
    skb::Skb,
};

/// Somebody wants events of a kind; then the time in seconds since boot.
#[inline(always)]
fn listening(kind: u32) -> Option<u32> {
    let listener = LISTENERS.get(0)?;
    if listener.kinds & kind == 0 {
        return None;
    }
    // SAFETY: the helper has no conditions.
    let now = (unsafe { bpf_ktime_get_coarse_ns() } / 1_000_000_000) as u32;
    (now < listener.until).then_some(now)
}

/// Takes one of the events that this processor has in this second; counts it as lost if there is none.
#[inline(always)]
fn allowed(kind: u32, now: u32) -> bool {
    let Some(budget) = EVENT_BUDGETS.get_ptr_mut(event_budget(kind)) else {
        return false;
    };
    // SAFETY: a per-CPU value.
    unsafe {
        if (*budget).second != now {
            (*budget).second = now;
            (*budget).used = 0;
        }
        if (*budget).used >= EVENT_BUDGET {
            (*budget).lost += 1;
            return false;
        }
        (*budget).used += 1;
    }
    true
}

/// Puts an event into the ring; one that finds no room counts as lost.
///
/// Events are written elsewhere first: verifiers before 6.3 tell one reservation in the ring from another, and
/// so walk again through all that follows each of them.
#[inline(always)]
fn send(event: *const Event, kind: u32) {
    // SAFETY: the caller has it from the map, and it stays.
    if EVENTS.output_untyped::<Event>(unsafe { &*event }, 0).is_err()
        && let Some(budget) = EVENT_BUDGETS.get_ptr_mut(event_budget(kind))
    {
        // SAFETY: a per-CPU value.
        unsafe { (*budget).lost += 1 }
    }
}

/// Reports a dropped packet, before anything of it is changed.
#[inline(always)]
pub(super) fn drop(skb: &Skb, hook: u32, reason: u32) {
    if listening(EVENT_DROP).is_some() {
        report_drop(skb.raw, hook, reason);
    }
}

/// The rest of [`drop`], which the verifier looks at once.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn report_drop(raw: *mut __sk_buff, hook: u32, reason: u32) -> u32 {
    let Some(now) = listening(EVENT_DROP) else {
        return 0;
    };
    if !allowed(EVENT_DROP, now) {
        return 0;
    }
    // SAFETY: the context of a running program is valid.
    let (ifindex, length) = unsafe { ((*raw).ifindex, (*raw).len) };
    let Some(event) = EVENT_SCRATCH.get_ptr_mut(0) else {
        return 0;
    };
    let length = if length > ETHERNET as u32 { length - ETHERNET as u32 } else { 0 };
    let captured = if length > EVENT_HEAD as u32 { EVENT_HEAD as u32 } else { length };
    // SAFETY: `event` is a per-CPU value of this size, all of which is written but for bytes of `head`
    // that do not count. The helper checks its range, and the verifier the bounds of `captured`.
    unsafe {
        start(event, EVENT_DROP, hook, now);
        (*event).reason = reason;
        (*event).ifindex = ifindex;
        (*event).length = length;
        let head = (&raw mut (*event).head).cast::<core::ffi::c_void>();
        if captured != 0 {
            // A mask instead of a comparison, which the compiler would make on another register.
            const MASK: u32 = EVENT_HEAD as u32 - 1;
            const { assert!(EVENT_HEAD.is_power_of_two()) };
            let captured = (core::hint::black_box(captured - 1) & MASK) + 1;
            let loaded = bpf_skb_load_bytes(raw.cast(), ETHERNET as u32, head, captured);
            if loaded == 0 {
                (*event).captured = captured as u8;
                (*event).family = (*event).head[0] >> 4;
            }
        }
    }
    send(event, EVENT_DROP);
    0
}

/// Writes everything of an event but its head.
///
/// # Safety
///
/// `event` points to memory of that size.
#[inline(always)]
unsafe fn start(event: *mut Event, kind: u32, hook: u32, now: u32) {
    // SAFETY: the caller's.
    unsafe {
        (*event).time = now;
        (*event).kind = kind;
        (*event).hook = hook;
        (*event).reason = 0;
        (*event).ifindex = 0;
        (*event).length = 0;
        (*event).egress = 0;
        (*event).gateway = 0;
        let addr = (&raw mut (*event).addr).cast::<u64>();
        addr.write_unaligned(0);
        addr.add(1).write_unaligned(0);
        (*event).port = [0; 2];
        (*event).family = 0;
        (*event).captured = 0;
        (*event).pad = 0;
    }
}

/// A key that an event can hold.
pub(super) trait FlowKey: Copy {
    /// 4 or 6.
    const FAMILY: u8;
}

impl FlowKey for FlowKey4 {
    const FAMILY: u8 = 4;
}

impl FlowKey for FlowKey6 {
    const FAMILY: u8 = 6;
}

/// Reports a new flow of a node.
#[inline(always)]
pub(super) fn flow<K: FlowKey>(key: &K, egress: u32, gateway: u32) {
    if let Some(now) = listening(EVENT_FLOW) {
        report_flow(key, egress, gateway, now);
    }
}

#[inline(never)]
fn report_flow<K: FlowKey>(key: &K, egress: u32, gateway: u32, now: u32) {
    if !allowed(EVENT_FLOW, now) {
        return;
    }
    let Some(event) = EVENT_SCRATCH.get_ptr_mut(0) else {
        return;
    };
    // SAFETY: a per-CPU value of this size; a key is smaller than the head.
    unsafe {
        start(event, EVENT_FLOW, HOOK_FROM_POD, now);
        (*event).egress = egress;
        (*event).gateway = gateway;
        put_key(event, key);
    }
    send(event, EVENT_FLOW);
}

/// Reports a new translation of a gateway.
#[inline(always)]
pub(super) fn translation<K: FlowKey, const N: usize>(key: &K, addr: &[u8; N], port: [u8; 2]) {
    if let Some(now) = listening(EVENT_FLOW) {
        report_translation(key, addr, u16::from_ne_bytes(port), now);
    }
}

#[inline(never)]
fn report_translation<K: FlowKey, const N: usize>(key: &K, addr: &[u8; N], port: u16, now: u32) {
    if !allowed(EVENT_FLOW, now) {
        return;
    }
    let Some(event) = EVENT_SCRATCH.get_ptr_mut(0) else {
        return;
    };
    // SAFETY: a per-CPU value of this size; an address has 4 or 16 bytes.
    unsafe {
        start(event, EVENT_FLOW, HOOK_GATEWAY, now);
        (&raw mut (*event).addr).cast::<[u8; N]>().write(*addr);
        (*event).port = port.to_ne_bytes();
        put_key(event, key);
    }
    send(event, EVENT_FLOW);
}

/// Writes the key of an event.
///
/// # Safety
///
/// `event` points to memory of that size.
#[inline(always)]
unsafe fn put_key<K: FlowKey>(event: *mut Event, key: &K) {
    const { assert!(size_of::<K>() <= EVENT_HEAD && size_of::<K>() % 4 == 0) };
    const { assert!(core::mem::offset_of!(Event, head) % 4 == 0) };
    // SAFETY: the caller's; keys are built of words, and so aligned like these.
    unsafe {
        let (from, to) = (core::ptr::from_ref(key).cast::<u32>(), (&raw mut (*event).head).cast::<u32>());
        // Straight from there to here: a copy in between would take stack that callers need.
        for word in 0..size_of::<K>() / 4 {
            to.add(word).write_volatile(from.add(word).read());
        }
        (*event).family = K::FAMILY;
        (*event).captured = size_of::<K>() as u8;
    }
}
