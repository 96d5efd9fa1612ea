//! Carries [`decide::shortcut`](coil_ebpf::decide::shortcut) out: remembers routes, and sends packets
//! where they lead.

use aya_ebpf::{
    bindings::{
        __sk_buff, TC_ACT_UNSPEC, bpf_fib_lookup, bpf_fib_lookup__bindgen_ty_1, bpf_fib_lookup__bindgen_ty_2,
        bpf_fib_lookup__bindgen_ty_3, bpf_fib_lookup__bindgen_ty_4, bpf_fib_lookup__bindgen_ty_5,
    },
    btf_maps::PerCpuArray,
    helpers::generated::{bpf_fib_lookup as fib_lookup, bpf_redirect},
    macros::btf_map,
};
use coil_ebpf::{
    decide::shortcut::{self, HOPS, Hop, HopKey, Onward},
    family::{V4, V6},
    head::UDP,
    packet::{ETHERNET, Packet, View},
    tables::Clock,
};

use super::{maps::Maps, skb::Skb};

#[btf_map(name = "hops")]
static REMEMBERED: PerCpuArray<Hop, HOPS> = PerCpuArray::new();

/// `AF_INET`
const INET: u8 = 2;
/// `AF_INET6`
const INET6: u8 = 10;

/// Sends a tunnelled packet where its like went before in this tick, or leaves it to the stack.
#[inline(always)]
pub(super) fn onward<F: Onward>(skb: &Skb) -> i32 {
    (if F::INDEX == 0 { onward_v4(skb.raw) } else { onward_v6(skb.raw) }) as i32
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn onward_v4(raw: *mut __sk_buff) -> u64 {
    send::<V4>(raw).unwrap_or(TC_ACT_UNSPEC) as u64
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn onward_v6(raw: *mut __sk_buff) -> u64 {
    send::<V6>(raw).unwrap_or(TC_ACT_UNSPEC) as u64
}

#[inline(always)]
fn send<F: Onward>(raw: *mut __sk_buff) -> Option<i32> {
    let skb = &Skb::of(raw);
    // SAFETY: the context of a running program is valid.
    let special = unsafe { (*skb.raw).pkt_type | (*skb.raw).mark | (*skb.raw).vlan_present };
    if special != 0 {
        return None;
    }
    let view = skb.view(shortcut::looked_at::<F>())?;
    let key = shortcut::key::<F, _>(&view, skb.ifindex());
    let hop = REMEMBERED.get_ptr_mut(key.slot())?;
    // SAFETY: a per-CPU value, and programs of one CPU do not interrupt each other here.
    let hop = unsafe { &mut *hop };
    if !hop.key.is(&key) || hop.tick != Maps.tick() {
        remember::<F>(skb.raw);
        return None;
    }
    if hop.ifindex == 0 || !shortcut::fits::<F, _>(skb, hop.mtu) {
        return None;
    }
    let edits = F::hop(&view)?;
    let start = skb.bytes::<{ ETHERNET + 20 }>(0)?;
    // SAFETY: `bytes` has compared the range with the end of the packet; all is inside an IP header.
    unsafe {
        let [a, b, c] = hop.macs;
        let words = start.cast::<u32>();
        words.write(a);
        words.add(1).write(b);
        words.add(2).write(c);
        for (at, half) in edits {
            start.add(ETHERNET + at).cast::<u16>().write(half);
        }
        Some(bpf_redirect(hop.ifindex, 0) as i32)
    }
}

#[inline(always)]
fn remember<F: Onward>(raw: *mut __sk_buff) {
    if F::INDEX == 0 {
        remember_v4(raw);
    } else {
        remember_v6(raw);
    }
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn remember_v4(raw: *mut __sk_buff) -> u64 {
    look_up::<V4>(raw).is_some().into()
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn remember_v6(raw: *mut __sk_buff) -> u64 {
    look_up::<V6>(raw).is_some().into()
}

/// Asks where packets like this one go.
#[inline(always)]
fn look_up<F: Onward>(raw: *mut __sk_buff) -> Option<()> {
    let skb = Skb::of(raw);
    let view = skb.view(shortcut::looked_at::<F>())?;
    let key = shortcut::key::<F, _>(&view, skb.ifindex());
    let hop = REMEMBERED.get_ptr_mut(key.slot())?;
    let [src, dst] = [ETHERNET + F::SRC_AT, ETHERNET + F::DST_AT].map(|at| match F::INDEX {
        0 => [view.word(at), 0, 0, 0],
        _ => [view.word(at), view.word(at + 4), view.word(at + 8), view.word(at + 12)],
    });
    let flowinfo = key.first & u32::from_be(0x0fff_ffff);
    let mut route = bpf_fib_lookup {
        family: if F::INDEX == 0 { INET } else { INET6 },
        l4_protocol: UDP,
        sport: view.half(ETHERNET + F::HEADER),
        dport: view.half(ETHERNET + F::HEADER + 2),
        // Any length but 0 makes the kernel say the MTU of the route. One that does not leaves 1.
        __bindgen_anon_1: bpf_fib_lookup__bindgen_ty_1 { tot_len: 1 },
        ifindex: key.ifindex,
        __bindgen_anon_2: bpf_fib_lookup__bindgen_ty_2 { flowinfo },
        __bindgen_anon_3: bpf_fib_lookup__bindgen_ty_3 { ipv6_src: src },
        __bindgen_anon_4: bpf_fib_lookup__bindgen_ty_4 { ipv6_dst: dst },
        __bindgen_anon_5: bpf_fib_lookup__bindgen_ty_5 { tbid: 0 },
        smac: [0; 6],
        dmac: [0; 6],
    };
    // SAFETY: the context of a running program is valid, and `route` is as long as is said.
    let result = unsafe { fib_lookup(raw.cast(), &raw mut route, size_of::<bpf_fib_lookup>() as i32, 0) };
    let found = result == 0 && route.ifindex != key.ifindex;
    // SAFETY: a per-CPU value, and programs of one CPU do not interrupt each other here; each variant of
    // the union is a number.
    unsafe {
        (*hop).key = HopKey { ..key };
        (*hop).tick = Maps.tick();
        (*hop).ifindex = if found { route.ifindex } else { 0 };
        (*hop).mtu = u32::from(route.__bindgen_anon_1.mtu_result);
        (*hop).macs = macs(route.dmac, route.smac);
    }
    Some(())
}

#[inline(always)]
fn macs(to: [u8; 6], from: [u8; 6]) -> [u32; 3] {
    let [a, b, c, d, e, f] = to;
    let [g, h, i, j, k, l] = from;
    [[a, b, c, d], [e, f, g, h], [i, j, k, l]].map(u32::from_ne_bytes)
}
