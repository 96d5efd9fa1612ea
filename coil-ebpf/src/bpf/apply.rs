//! Carries verdicts out: bytes first, then checksums, then room for headers.
//!
//! Transport checksums go through helpers, since only they know whether a checksum is complete, is
//! still to be filled in, or belongs to a packet of which a network card has summed everything.

use aya_ebpf::{
    bindings::{
        __sk_buff, BPF_F_ADJ_ROOM_ENCAP_L3_IPV4, BPF_F_ADJ_ROOM_ENCAP_L3_IPV6, BPF_F_ADJ_ROOM_ENCAP_L4_UDP,
        BPF_F_ADJ_ROOM_FIXED_GSO, BPF_F_MARK_MANGLED_0, BPF_F_PSEUDO_HDR, BPF_F_RECOMPUTE_CSUM,
        bpf_adj_room_mode::BPF_ADJ_ROOM_MAC,
    },
    helpers::generated::{
        bpf_csum_update, bpf_l4_csum_replace, bpf_skb_adjust_room, bpf_skb_load_bytes, bpf_skb_store_bytes,
    },
};
use coil_common::stats::DropReason;
use coil_ebpf::{
    decide::icmp::ErrorRewrite,
    family::{Family, V4, V6},
    head::{Build, Tunnel},
    packet::{ETHERNET, Packet},
    parse::quote::QuoteEdit,
    verdict::{IpEdit, Rewrite, Way},
};

use super::{Outcome, maps::HEADERS, skb::Skb};

/// `-EALREADY`
const ALREADY: i64 = -114;

/// Changes a packet.
#[inline(always)]
pub(super) fn rewrite<F: Build>(skb: &mut Skb, rewrite: &Rewrite<F>) -> Result<Outcome, DropReason> {
    let outcome = match rewrite.way {
        Way::On => Outcome::PASS,
        Way::Back => {
            skb.turn_around()?;
            Outcome::BACK
        }
    };
    edit_ip(skb, &rewrite.ip)?;
    if let Some(port) = &rewrite.port {
        skb.store(port.at, port.new)?;
    }
    if let Some(mss) = rewrite.mss {
        skb.store(mss.at, mss.value)?;
    }
    edit_check(skb, rewrite)?;
    if rewrite.pop > 0 {
        pop(skb, rewrite.pop)?;
    }
    if rewrite.cut && take_off_sum(skb.raw, F::OVERHEAD, SLICE as u32) == 0 {
        return Err(DropReason::RewriteFailed);
    }
    if let Some(tunnel) = rewrite.push() {
        push::<F>(skb, tunnel, rewrite.way)?;
    }
    Ok(outcome)
}

/// Changes an ICMP error.
#[inline(always)]
pub(super) fn error<F: Build>(skb: &mut Skb, rewrite: &ErrorRewrite<F>) -> Result<Outcome, DropReason> {
    quote(skb, &rewrite.quote)?;
    if let Some((at, check)) = rewrite.check {
        skb.forget();
        skb.store(at, check)?;
    }
    if let Some((at, word)) = rewrite.word {
        skb.forget();
        skb.store(at, word)?;
    }
    skb.forget();
    self::rewrite(skb, &rewrite.base)
}

/// Changes the packet that an ICMP error quotes.
#[inline(always)]
pub(super) fn quote<F: Family>(skb: &mut Skb, edit: &QuoteEdit<F>) -> Result<(), DropReason> {
    if let Some((at, addr)) = edit.addr {
        skb.forget();
        store_addr::<F>(skb, at, addr)?;
    }
    if let Some((at, check)) = edit.ip_check {
        skb.forget();
        skb.store(at, check)?;
    }
    if let Some((at, port)) = edit.port {
        skb.forget();
        skb.store(at, port)?;
    }
    if let Some((at, check)) = edit.check {
        skb.forget();
        skb.store(at, check)?;
    }
    Ok(())
}

#[inline(always)]
fn edit_ip<F: Family>(skb: &mut Skb, edit: &IpEdit<F>) -> Result<(), DropReason> {
    if let Some(first) = edit.first {
        skb.store(edit.at, first)?;
    }
    if let Some(ttl) = edit.ttl {
        skb.store(edit.at + F::TTL_AT, ttl)?;
    }
    if let (Some(at), Some(check)) = (F::CHECK_AT, edit.check) {
        skb.store(edit.at + at, check)?;
    }
    if let Some((at, addr)) = edit.addr {
        store_addr::<F>(skb, at, addr)?;
    }
    if let Some(delta) = edit.uncovered {
        // SAFETY: the context of a running program is valid. The helper refuses where no network
        // card has summed the packet, which is as good.
        unsafe { bpf_csum_update(skb.raw, delta) };
    }
    Ok(())
}

/// Writes an address of either family.
#[inline(always)]
fn store_addr<F: Family>(skb: &mut Skb, at: usize, addr: F::Addr) -> Result<(), DropReason> {
    let Some(target) = (if F::INDEX == 0 { skb.bytes::<4>(at) } else { skb.bytes::<16>(at) }) else {
        return Err(DropReason::RewriteFailed);
    };
    // SAFETY: `bytes` has compared the range, as long as the address, with the end of the packet;
    // IP headers are aligned to words.
    unsafe { target.cast::<Aligned<F::Addr>>().write(Aligned(addr)) };
    Ok(())
}

/// Something that is copied in words.
#[repr(C, align(4))]
struct Aligned<T>(T);

#[inline(always)]
fn edit_check<F: Family>(skb: &mut Skb, rewrite: &Rewrite<F>) -> Result<(), DropReason> {
    let edit = &rewrite.check;
    let optional = if edit.optional { u64::from(BPF_F_MARK_MANGLED_0) } else { 0 };
    if let Some(delta) = edit.pseudo {
        replace_check(skb, edit.at, delta, optional | u64::from(BPF_F_PSEUDO_HDR))?;
    }
    if let Some(delta) = rewrite.plain_delta() {
        replace_check(skb, edit.at, delta, optional)?;
    }
    Ok(())
}

#[inline(always)]
fn replace_check(skb: &mut Skb, at: usize, delta: u32, flags: u64) -> Result<(), DropReason> {
    // SAFETY: the context of a running program is valid.
    match unsafe { bpf_l4_csum_replace(skb.raw, at as u32, 0, u64::from(delta), flags) } {
        0 => Ok(()),
        _ => Err(DropReason::RewriteFailed),
    }
}

#[inline(always)]
fn pop(skb: &mut Skb, bytes: usize) -> Result<(), DropReason> {
    // SAFETY: the context of a running program is valid.
    let result = unsafe {
        bpf_skb_adjust_room(skb.raw, -(bytes as i32), BPF_ADJ_ROOM_MAC, u64::from(BPF_F_ADJ_ROOM_FIXED_GSO))
    };
    if result == 0 { Ok(()) } else { Err(DropReason::RewriteFailed) }
}

#[inline(always)]
fn push<F: Build>(skb: &mut Skb, tunnel: &Tunnel<F>, way: Way) -> Result<(), DropReason> {
    let ipip = tunnel.encap.is_ipip();
    if ipip {
        make_room::<F>(skb, F::HEADER as u32, 0)?;
    } else {
        make_room::<F>(skb, F::OVERHEAD, BPF_F_ADJ_ROOM_ENCAP_L4_UDP)?;
    }
    put_head::<F>(skb, &F::tunnel(tunnel), ipip, matches!(way, Way::Back))
}

/// Makes room for the headers of a tunnel.
#[inline(always)]
fn make_room<F: Family>(skb: &Skb, bytes: u32, flags: u32) -> Result<(), DropReason> {
    let l3 = if F::INDEX == 0 { BPF_F_ADJ_ROOM_ENCAP_L3_IPV4 } else { BPF_F_ADJ_ROOM_ENCAP_L3_IPV6 };
    let flags = u64::from(BPF_F_ADJ_ROOM_FIXED_GSO | l3 | flags);
    // SAFETY: the context of a running program is valid.
    match unsafe { bpf_skb_adjust_room(skb.raw, bytes as i32, BPF_ADJ_ROOM_MAC, flags) } {
        0 => Ok(()),
        ALREADY => Err(DropReason::AlreadyEncapsulated),
        _ => Err(DropReason::RewriteFailed),
    }
}

/// Writes the headers of the tunnel into the room that is there for them.
///
/// Where the packet leaves by itself the sum of a network card, should there be one, is kept in step.
/// Where it goes on through the stack that is not needed: forwarding forgets such a sum
/// (`skb_forward_csum`), and nobody asks for it before, since the outer UDP checksum is zero.
#[inline(always)]
fn put_head<F: Build>(skb: &mut Skb, head: &F::Head, ipip: bool, in_step: bool) -> Result<(), DropReason> {
    skb.reload();
    let target = match (F::INDEX == 0, ipip) {
        (true, true) => skb.bytes::<{ V4::HEADER }>(ETHERNET),
        (true, false) => skb.bytes::<{ V4::OVERHEAD as usize }>(ETHERNET),
        (false, true) => skb.bytes::<{ V6::HEADER }>(ETHERNET),
        (false, false) => skb.bytes::<{ V6::OVERHEAD as usize }>(ETHERNET),
    };
    let Some(target) = target else {
        return Err(DropReason::RewriteFailed);
    };
    // SAFETY: `bytes` has compared the range, as long as the headers, with the end of the packet.
    // The helper refuses where no network card has summed the packet, which is as good.
    unsafe {
        if ipip {
            target.cast::<Aligned<F::Ip>>().write(Aligned(F::without_udp(head)));
        } else {
            target.cast::<Aligned<F::Head>>().write(Aligned(*head));
        }
        if in_step {
            bpf_csum_update(skb.raw, F::weight(head));
        }
    }
    Ok(())
}

/// Writes `bytes` of headers right after the Ethernet header, all of them or without the last.
#[inline(always)]
pub(super) fn write_head<F: Family>(skb: &mut Skb, head: &F::Head, bytes: u32) -> Result<(), DropReason> {
    // SAFETY: the context of a running program is valid, and `head` is as long as can be said.
    let result = unsafe {
        bpf_skb_store_bytes(
            skb.raw.cast(),
            ETHERNET as u32,
            core::ptr::from_ref(head).cast(),
            bytes,
            u64::from(BPF_F_RECOMPUTE_CSUM),
        )
    };
    if result == 0 { Ok(()) } else { Err(DropReason::RewriteFailed) }
}

/// Makes the kernel forget that the outer UDP checksum of a tunnelled packet, should it have one, may still be to
/// be filled in.
///
/// # Errors
///
/// The packet is no longer what it was.
#[inline(always)]
pub(super) fn forget_outer_sum<F: Build>(skb: &mut Skb) -> Result<(), DropReason> {
    /// Next header of destination options, with which IPv6 tunnels may begin; eight bytes then.
    const OPTIONS: u8 = 60;
    if skb.gso_size() != 0 {
        // Summed when it is cut, from the start of the inner transport header.
        return Ok(());
    }
    let first = ETHERNET + F::HEADER;
    let options = F::INDEX == 1 && skb.load::<2>(ETHERNET + 6).is_ok_and(|[next, _]| next == OPTIONS);
    let (check, slice) = if options {
        (skb.load::<2>(first + 14), F::HEADER + 24)
    } else {
        (skb.load::<2>(first + 6), F::HEADER + 16)
    };
    if !check.is_ok_and(|check| check != [0; 2]) {
        return Ok(());
    }
    // Eight bytes more than the headers that go: beyond the start of the sum wherever it is in them.
    let taken = take_off_sum(skb.raw, 0, slice as u32);
    skb.reload();
    if taken == 0 { Err(DropReason::RewriteFailed) } else { Ok(()) }
}

/// Bytes after the Ethernet header of a GSO packet of UDP that [`take_off_sum`] is to take off: beyond the
/// start of any UDP header.
const SLICE: usize = 76;
/// Room for what [`take_off_sum`] puts back.
pub(super) const KEPT: usize = 128;

/// Makes the kernel forget that a checksum is still to be filled in, from a start within the first `slice`
/// bytes after the Ethernet header. `room` bytes are made before, and taken off again.
///
/// Two kinds of packets need it.
///
/// - GSO packets of UDP, which the kernel is to cut when it next sends them. `bpf_skb_adjust_room` marks a
///   packet as tunnelled, and nothing that a program can call takes the mark off again. TCP does not mind. A
///   packet of datagrams that was tunnelled once and is no more is cut at the wrong place, and lost. Between
///   virtual devices a packet meets nobody that would cut it before; but any device does, with the right
///   result, where the checksum of a GSO packet is not left to it.
/// - Packets from a tunnel with UDP checksums (`encap-csum`, `encap-udp6-csum` of the kernel's tunnels), as a
///   virtual device hands them over: the checksum to be filled in is that of the headers which go. Left
///   so, the kernel would fill it in elsewhere, and helpers would take the inner checksum for it.
///
/// The kernel forgets the start of a sum once that has been taken off. So: make room (while the kernel still
/// keeps the start in step), take off the room and the headers, put the headers back.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn take_off_sum(raw: *mut __sk_buff, room: u32, slice: u32) -> u32 {
    let mut skb = Skb::of(raw);
    let room = (room & 0x3f) as i32;
    // So that the verifier sees both bounds whatever the compiler makes of them.
    let slice = (core::hint::black_box(slice) - 1 & (KEPT as u32 - 1)) + 1;
    if skb.ensure(ETHERNET + slice as usize + 2).is_err() {
        // So short that few datagrams are lost.
        return 1;
    }
    // Not on the stack, of which callers need all.
    let Some(headers) = HEADERS.get_ptr_mut(0) else {
        return 1;
    };
    // SAFETY: the context of a running program is valid, and `headers` is at least as long as is said.
    let loaded = unsafe { bpf_skb_load_bytes(raw.cast(), ETHERNET as u32, headers.cast(), slice) };
    if loaded != 0 {
        return 1;
    }
    let flags = u64::from(BPF_F_ADJ_ROOM_FIXED_GSO);
    let adjust = |bytes: i32| {
        // SAFETY: the context of a running program is valid.
        unsafe { bpf_skb_adjust_room(raw, bytes, BPF_ADJ_ROOM_MAC, flags) == 0 }
    };
    if !adjust(room) {
        return 0;
    }
    if !adjust(-room - slice as i32) {
        // Too short for it; nothing has changed where no room was made.
        return u32::from(room == 0);
    }
    if !adjust(slice as i32) {
        return 0;
    }
    // SAFETY: the context of a running program is valid, and `headers` is at least as long as is said. The sum
    // of a network card, should there be one, is kept in step.
    let stored = unsafe {
        bpf_skb_store_bytes(
            raw.cast(),
            ETHERNET as u32,
            headers.cast(),
            slice,
            u64::from(BPF_F_RECOMPUTE_CSUM),
        )
    };
    u32::from(stored == 0)
}
