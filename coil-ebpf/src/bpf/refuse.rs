//! Turns a dropped packet into an ICMP error to its sender.
//!
//! Rare, so all of it is in functions of their own, which the verifier looks at once. The quote is
//! copied out first: its sum is taken there, and where the end of a packet cannot be cut off (the
//! kernel refuses that for packets that were in a tunnel without a device) the bytes in between are
//! taken out at the front and the quote is written anew.

use aya_ebpf::{
    bindings::{
        __sk_buff, BPF_F_ADJ_ROOM_FIXED_GSO, BPF_F_RECOMPUTE_CSUM, bpf_adj_room_mode::BPF_ADJ_ROOM_MAC,
    },
    btf_maps::PerCpuArray,
    helpers::generated::{
        bpf_csum_diff, bpf_ktime_get_coarse_ns, bpf_skb_adjust_room, bpf_skb_change_tail, bpf_skb_load_bytes,
        bpf_skb_store_bytes,
    },
    macros::btf_map,
};
use coil_common::{
    config::Config,
    stats::{DropReason, IcmpStat},
    values::Counter,
};
use coil_ebpf::{
    family::{Family, V4, V6},
    head::Build,
    packet::{ETHERNET, Packet},
    parse::tunnel::{self, Outer},
    verdict::{Answer, Path},
};

use super::{apply, skb::Skb};

#[btf_map(name = "icmp_stats")]
static ICMP_STATS: PerCpuArray<Counter, { IcmpStat::COUNT }> = PerCpuArray::new();
#[btf_map(name = "icmp_bucket")]
static ICMP_BUCKET: PerCpuArray<Bucket, 1> = PerCpuArray::new();
#[btf_map(name = "icmp_quote")]
static ICMP_QUOTE: PerCpuArray<Quote, 1> = PerCpuArray::new();

/// What one processor may still send.
#[repr(C)]
struct Bucket {
    /// Time that has not been spent on errors yet, in nanoseconds.
    credit: u64,
    /// When it was counted last.
    at: u64,
}

/// Most bytes that any family quotes.
const MAX_QUOTE: usize = V6::QUOTE;

/// A copy of what is quoted, and room for the bytes that make it whole words.
#[repr(C, align(8))]
struct Quote([u8; MAX_QUOTE + 8]);

/// Least that is quoted: an IPv4 header and eight bytes.
const MIN_QUOTE: usize = 28;

/// Bytes at the front that are taken off so that the kernel forgets a checksum that was still to be
/// filled in: what it would be filled into is no longer there.
const FORGET: usize = 76;

/// Largest piece that the kernel takes off at once.
const PIECE: usize = 0xfff;

/// Pieces that a packet may have to lose.
const PIECES: usize = 16;

/// Counts something.
#[inline(always)]
pub(super) fn count(stat: IcmpStat) {
    if let Some(total) = ICMP_STATS.get_ptr_mut(stat.index()) {
        // SAFETY: a per-CPU value, and programs of one CPU do not interrupt each other here.
        unsafe { (*total).packets = (*total).packets.wrapping_add(1) };
    }
}

/// The rate allows one more error.
#[inline(always)]
fn is_allowed(config: &Config) -> bool {
    if config.icmp_rate == 0 {
        return true;
    }
    let Some(bucket) = ICMP_BUCKET.get_ptr_mut(0) else {
        return false;
    };
    let each = 1_000_000_000 / u64::from(config.icmp_rate);
    // SAFETY: the helper has no conditions.
    let now = unsafe { bpf_ktime_get_coarse_ns() };
    // SAFETY: a per-CPU value, and programs of one CPU do not interrupt each other here.
    unsafe {
        let most = each * u64::from(config.icmp_burst);
        let credit = (*bucket).credit.wrapping_add(now.wrapping_sub((*bucket).at));
        let credit = if credit > most { most } else { credit };
        (*bucket).at = now;
        let allowed = credit >= each;
        (*bucket).credit = if allowed { credit - each } else { credit };
        allowed
    }
}

/// The error goes on where the packet was going.
#[inline(always)]
pub(super) const fn goes_on(answer: u64) -> bool {
    matches!(Answer::unpack(answer).path, Path::On)
}

/// Turns a packet into an ICMP error to its sender and counts it; false if it cannot or must not be
/// done.
#[inline(always)]
pub(super) fn refuse<F: Build>(skb: &mut Skb, answer: u64) -> bool {
    let made = if F::INDEX == 0 { refuse_v4(skb.raw, answer) } else { refuse_v6(skb.raw, answer) };
    made != 0
}

/// [`respond`] as a function of its own: it is rare, and its callers have no stack to spare.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn refuse_v4(raw: *mut __sk_buff, answer: u64) -> u32 {
    u32::from(respond::<V4>(raw, answer))
}

/// See [`refuse_v4`].
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn refuse_v6(raw: *mut __sk_buff, answer: u64) -> u32 {
    u32::from(respond::<V6>(raw, answer))
}

#[inline(always)]
fn respond<F: Outer + Build>(raw: *mut __sk_buff, answer: u64) -> bool {
    if !is_allowed(super::config()) {
        count(IcmpStat::Suppressed);
        return false;
    }
    let made = make::<F>(raw, &Answer::unpack(answer)).is_ok();
    count(if made { IcmpStat::Answered } else { IcmpStat::Unanswerable });
    made
}

/// Makes the error.
#[inline(always)]
fn make<F: Outer + Build>(raw: *mut __sk_buff, answer: &Answer) -> Result<(), DropReason> {
    const FAILED: DropReason = DropReason::RewriteFailed;
    let mut skb = Skb::of(raw);
    let encap = tunnel::outermost::<F, _>(&mut skb);
    let at = usize::from(answer.at & 0x7f);
    skb.ensure(at + F::HEADER)?;
    let [_, _, a, b] = skb.load::<4>(at)?;
    let [c, d] = skb.load::<2>(at + 4)?;
    let length = if F::INDEX == 0 {
        u16::from_be_bytes([a, b]) as usize
    } else {
        u16::from_be_bytes([c, d]) as usize + F::HEADER
    };
    // A packet that is too long to say so says 0.
    let mut quoted = if length < F::HEADER || length > F::QUOTE { F::QUOTE } else { length };
    let there = (skb.length() as usize).wrapping_sub(at);
    if quoted > there {
        quoted = there;
    }
    // The verifier has to see these bounds on the very number that the helpers get.
    let quoted = core::hint::black_box(quoted as u32);
    if quoted < MIN_QUOTE as u32 || quoted > MAX_QUOTE as u32 {
        return Err(FAILED);
    }
    let quote = copy(raw, at as u32, quoted).ok_or(FAILED)?;
    // SAFETY: `quote` has room for whole words.
    let sum = unsafe { sum(quote, (quoted + 3) & !3) };
    let error = answer.error::<F, _>(&skb, super::config(), quoted as u16)?;
    let head = F::error(&error, sum);

    let most = at + F::QUOTE;
    let mut rewrite = false;
    if skb.length() as usize > most
        // SAFETY: the context of a running program is valid.
        && unsafe { bpf_skb_change_tail(raw, most as u32, 0) } != 0
    {
        squeeze::<F>(&mut skb)?;
        rewrite = true;
    } else {
        adjust(&mut skb, F::OVERHEAD as i32 - (at - ETHERNET) as i32)?;
    }
    apply::write_head::<F>(&mut skb, &head, F::OVERHEAD)?;
    if rewrite {
        // SAFETY: the context of a running program is valid, and `quote` has so many bytes.
        let stored = unsafe {
            bpf_skb_store_bytes(
                raw.cast(),
                ETHERNET as u32 + F::OVERHEAD,
                quote.cast(),
                quoted,
                u64::from(BPF_F_RECOMPUTE_CSUM),
            )
        };
        if stored != 0 {
            return Err(FAILED);
        }
    }
    // Decided here: a decision carried through all of the above would be forgotten by verifiers before
    // 6.3, which then see memory read that was never written.
    if let Some(tunnel) = answer.tunnel::<F>(encap, super::config(), &error.dst, quoted as u16) {
        let overhead = encap.overhead::<F>();
        adjust(&mut skb, overhead as i32)?;
        apply::write_head::<F>(&mut skb, &F::tunnel(&tunnel), overhead)?;
    }
    // Read anew, or the compiler would know from before that the header is there.
    if matches!(answer.path, Path::On) {
        return Ok(());
    }
    skb.reload();
    skb.turn_around()
}

/// Makes a packet that is longer than it may be, and whose end cannot be cut off, as long as headers
/// and quote together. What is in it afterwards is of no use.
#[inline(always)]
fn squeeze<F: Family>(skb: &mut Skb) -> Result<(), DropReason> {
    if skb.gso_size() != 0 {
        return Err(DropReason::RewriteFailed);
    }
    let keep = ETHERNET + F::QUOTE - FORGET;
    for _ in 0..PIECES {
        let surplus = (skb.length() as usize).wrapping_sub(keep);
        if surplus == 0 || surplus > 0xffff {
            break;
        }
        let piece = if surplus > PIECE { PIECE } else { surplus };
        adjust(skb, -(core::hint::black_box(piece as i32)))?;
    }
    if skb.length() as usize != keep {
        return Err(DropReason::RewriteFailed);
    }
    adjust(skb, FORGET as i32 + F::OVERHEAD as i32)
}

/// Makes or takes room after the Ethernet header.
#[inline(always)]
fn adjust(skb: &mut Skb, bytes: i32) -> Result<(), DropReason> {
    if bytes == 0 {
        return Ok(());
    }
    // SAFETY: the context of a running program is valid.
    let result =
        unsafe { bpf_skb_adjust_room(skb.raw, bytes, BPF_ADJ_ROOM_MAC, u64::from(BPF_F_ADJ_ROOM_FIXED_GSO)) };
    skb.reload();
    if result == 0 { Ok(()) } else { Err(DropReason::RewriteFailed) }
}

/// Copies what is quoted out of the packet, zeros after it.
#[inline(always)]
fn copy(raw: *mut __sk_buff, at: u32, length: u32) -> Option<*mut u8> {
    let quote: *mut u8 = ICMP_QUOTE.get_ptr_mut(0)?.cast();
    // SAFETY: `length` is no more than `MAX_QUOTE`, after which the copy has eight more bytes; the
    // context of a running program is valid.
    unsafe {
        if bpf_skb_load_bytes(raw.cast(), at, quote.cast(), length) != 0 {
            return None;
        }
        let end = quote.add(length as usize);
        end.write_volatile(0);
        end.add(1).write_volatile(0);
        end.add(2).write_volatile(0);
    }
    Some(quote)
}

/// Sum of bytes.
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
