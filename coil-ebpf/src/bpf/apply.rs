//! Carries verdicts out: bytes first, then checksums, then room for headers.
//!
//! Transport checksums go through helpers, since only they know whether a checksum is complete, is
//! still to be filled in, or belongs to a packet of which a network card has summed everything.

use aya_ebpf::{
    bindings::{
        BPF_F_ADJ_ROOM_ENCAP_L3_IPV4, BPF_F_ADJ_ROOM_ENCAP_L3_IPV6, BPF_F_ADJ_ROOM_ENCAP_L4_UDP,
        BPF_F_ADJ_ROOM_FIXED_GSO, BPF_F_MARK_MANGLED_0, BPF_F_PSEUDO_HDR, BPF_F_RECOMPUTE_CSUM,
        bpf_adj_room_mode::BPF_ADJ_ROOM_MAC,
    },
    helpers::generated::{
        bpf_csum_diff, bpf_csum_update, bpf_l4_csum_replace, bpf_skb_adjust_room,
        bpf_skb_change_tail, bpf_skb_store_bytes,
    },
};
use coil_common::stats::DropReason;
use coil_ebpf::{
    csum,
    family::Family,
    head::{Build, Tunnel},
    packet::{ETHERNET, Packet},
    verdict::{CheckEdit, IpEdit, Refusal, Rewrite, Way},
};

use super::{Outcome, skb::Skb};

/// `-EALREADY`
const ALREADY: i64 = -114;

/// Changes a packet.
#[inline(always)]
pub(super) fn rewrite<F: Build>(
    skb: &mut Skb,
    rewrite: &Rewrite<F>,
) -> Result<Outcome, DropReason> {
    let outcome = match rewrite.way {
        Way::On => Outcome::Pass,
        Way::Back => {
            skb.turn_around()?;
            Outcome::Back
        }
    };
    edit_ip(skb, &rewrite.ip)?;
    if let Some((at, port)) = rewrite.port {
        skb.store(at, port)?;
    }
    if let Some(mss) = rewrite.mss {
        skb.store(mss.at, mss.value)?;
    }
    edit_check(skb, &rewrite.check)?;
    if rewrite.pop > 0 {
        pop(skb, rewrite.pop)?;
    }
    if let Some(tunnel) = &rewrite.push {
        push::<F>(skb, tunnel)?;
    }
    Ok(outcome)
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
    let Some(target) = (if F::INDEX == 0 {
        skb.bytes::<4>(at)
    } else {
        skb.bytes::<16>(at)
    }) else {
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
fn edit_check(skb: &mut Skb, edit: &CheckEdit) -> Result<(), DropReason> {
    let optional = if edit.optional {
        u64::from(BPF_F_MARK_MANGLED_0)
    } else {
        0
    };
    if let Some(delta) = edit.pseudo {
        replace_check(skb, edit.at, delta, optional | u64::from(BPF_F_PSEUDO_HDR))?;
    }
    if let Some(delta) = edit.plain {
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
        bpf_skb_adjust_room(
            skb.raw,
            -(bytes as i32),
            BPF_ADJ_ROOM_MAC,
            u64::from(BPF_F_ADJ_ROOM_FIXED_GSO),
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(DropReason::RewriteFailed)
    }
}

#[inline(always)]
fn push<F: Build>(skb: &mut Skb, tunnel: &Tunnel<F>) -> Result<(), DropReason> {
    let l3 = if F::INDEX == 0 {
        BPF_F_ADJ_ROOM_ENCAP_L3_IPV4
    } else {
        BPF_F_ADJ_ROOM_ENCAP_L3_IPV6
    };
    let flags = u64::from(BPF_F_ADJ_ROOM_FIXED_GSO | l3 | BPF_F_ADJ_ROOM_ENCAP_L4_UDP);
    // SAFETY: the context of a running program is valid.
    match unsafe { bpf_skb_adjust_room(skb.raw, F::OVERHEAD as i32, BPF_ADJ_ROOM_MAC, flags) } {
        0 => write_head::<F>(skb, &F::tunnel(tunnel)),
        ALREADY => Err(DropReason::AlreadyEncapsulated),
        _ => Err(DropReason::RewriteFailed),
    }
}

#[inline(always)]
fn write_head<F: Family>(skb: &mut Skb, head: &F::Head) -> Result<(), DropReason> {
    // SAFETY: the context of a running program is valid, and `head` is as long as is said.
    let result = unsafe {
        bpf_skb_store_bytes(
            skb.raw.cast(),
            ETHERNET as u32,
            core::ptr::from_ref(head).cast(),
            size_of::<F::Head>() as u32,
            u64::from(BPF_F_RECOMPUTE_CSUM),
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(DropReason::RewriteFailed)
    }
}

/// Longest IP header that is quoted, extension headers included.
const MAX_QUOTED_HEADER: usize = 0x7c;

/// Turns a packet into an ICMP error to its sender. The packet counts as dropped in any case; where
/// the error cannot be made it is only dropped.
///
/// The checksum over the quoted transport part goes through the helper: where the checksum of the
/// packet was still to be filled in, whoever fills it in makes that part sum to zero, and the helper
/// then does nothing, which is right.
#[inline(always)]
pub(super) fn refuse<F: Build>(skb: &mut Skb, refusal: &Refusal<F>) -> Result<Outcome, DropReason> {
    const REASON: DropReason = DropReason::TooBig;
    let dropped = coil_ebpf::decide::dropped(skb);
    let at = refusal.at;
    if skb.ensure(at + F::QUOTE).is_err() || refusal.header > MAX_QUOTED_HEADER {
        return Err(REASON);
    }
    let quote = if F::INDEX == 0 {
        skb.bytes::<128>(at)
    } else {
        skb.bytes::<256>(at)
    };
    let Some(quote) = quote else {
        return Err(REASON);
    };
    // SAFETY: the lengths are inside the quote, which `bytes` has compared with the end of the packet.
    let (header, all) = unsafe {
        let length = (refusal.header & MAX_QUOTED_HEADER) as u32;
        (sum(quote, length), sum(quote, F::QUOTE as u32))
    };
    let transport = csum::add(all, !header);

    let mut head = F::too_big(&refusal.error);
    add_to_check::<F>(&mut head, header);
    skb.turn_around().map_err(|_| REASON)?;
    // SAFETY: the context of a running program is valid.
    let cut = unsafe { bpf_skb_change_tail(skb.raw, (at + F::QUOTE) as u32, 0) };
    if cut != 0 {
        return Err(REASON);
    }
    // SAFETY: as above.
    let room = unsafe { bpf_skb_adjust_room(skb.raw, F::OVERHEAD as i32, BPF_ADJ_ROOM_MAC, 0) };
    if room != 0 {
        return Err(REASON);
    }
    write_head::<F>(skb, &head).map_err(|_| REASON)?;
    replace_check(skb, ETHERNET + F::ICMP_CHECK_AT, transport, 0).map_err(|_| REASON)?;
    super::maps::count_drop(REASON, &dropped);
    Ok(Outcome::Back)
}

/// Sum of bytes of the packet.
///
/// # Safety
///
/// `length` bytes from `from` are readable.
#[inline(always)]
unsafe fn sum(from: *mut u8, length: u32) -> u32 {
    // SAFETY: the caller's.
    let sum = unsafe { bpf_csum_diff(core::ptr::null_mut(), 0, from.cast(), length, 0) };
    // An error is a wrong checksum of an error message, no more.
    (sum & 0xffff_ffff) as u32
}

/// Adds to what the checksum of an ICMP error covers.
#[inline(always)]
fn add_to_check<F: Build>(head: &mut F::Head, sum: u32) {
    let bytes = core::ptr::from_mut(head).cast::<u8>();
    // SAFETY: the offset is even and inside the header, which is aligned to no less than its check.
    unsafe {
        let check = bytes.add(F::ICMP_CHECK_AT).cast::<[u8; 2]>();
        check.write(csum::update(check.read(), sum));
    }
}
