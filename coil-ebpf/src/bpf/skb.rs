//! A packet in the kernel: direct access to its bytes.
//!
//! Every pointer into the packet is derived from `data` and compared with `data_end` right before
//! its use, as the verifier wants. Helpers that may move the packet invalidate both; the methods
//! here read them again. The comparison must not be one of a single byte: the compiler turns
//! `start + 1 > end` into `start >= end`, from which the verifier learns nothing.
//!
//! Words are read and written as such wherever they stand, as x86-64 and arm64 allow.

use aya_ebpf::{
    bindings::__sk_buff,
    helpers::generated::{bpf_redirect, bpf_redirect_peer, bpf_skb_pull_data},
    programs::TcContext,
};
use coil_common::{
    config::{CONFIG_REDIRECT_PEER, Config},
    stats::DropReason,
};
use coil_ebpf::{
    decide::gateway::is_uncut,
    head::Build,
    packet::{ETHERNET, Packet, View},
    parse::{
        ip::{self, Extensions},
        mss::{self, MssOption},
    },
};

/// Offsets are smaller than this; the verifier wants to see a bound.
const MAX_OFFSET: usize = 0x3fff;

/// Bytes that are read or written as words.
#[repr(C, align(4))]
struct Words<const N: usize>([u8; N]);

/// Bytes that are read or written as half words.
#[repr(C, align(2))]
struct Halves<const N: usize>([u8; N]);

/// A packet.
pub(super) struct Skb {
    pub(super) raw: *mut __sk_buff,
    data: usize,
    end: usize,
}

impl Skb {
    /// Takes a packet from the context of a program.
    #[inline(always)]
    pub(super) fn new(ctx: &TcContext) -> Self {
        Self::of(ctx.skb.skb)
    }

    /// Takes a packet from its raw context.
    #[inline(always)]
    pub(super) fn of(raw: *mut __sk_buff) -> Self {
        let mut skb = Self { raw, data: 0, end: 0 };
        skb.reload();
        skb
    }

    /// Reads the bounds of the packet again.
    #[inline(always)]
    pub(super) fn reload(&mut self) {
        // SAFETY: the context of a running program is valid.
        unsafe {
            self.data = (*self.raw).data as usize;
            self.end = (*self.raw).data_end as usize;
        }
    }

    /// Makes the compiler forget what it knows of the bounds of the packet, so that it compares an
    /// offset with them again where the verifier has to see it.
    #[inline(always)]
    pub(super) fn forget(&mut self) {
        self.data = core::hint::black_box(self.data);
        self.end = core::hint::black_box(self.end);
    }

    /// Interface that the program is attached to.
    #[inline(always)]
    pub(super) fn ifindex(&self) -> u32 {
        // SAFETY: the context of a running program is valid.
        unsafe { (*self.raw).ifindex }
    }

    /// Sends the packet out of the interface that it came in by: by its queue, or at once to where the
    /// other end of the interface receives it, which passes whoever would cut the packet.
    #[inline(always)]
    pub(super) fn redirect_back<F: Build>(&mut self, config: &Config) -> i32 {
        let ifindex = self.ifindex();
        let at_once = config.flags & CONFIG_REDIRECT_PEER != 0 && {
            self.reload();
            !is_uncut::<F, _>(self)
        };
        // SAFETY: the helpers only note where the packet goes.
        unsafe {
            if at_once { bpf_redirect_peer(ifindex, 0) as i32 } else { bpf_redirect(ifindex, 0) as i32 }
        }
    }

    /// A pointer to `N` bytes of the packet that are readable.
    #[inline(always)]
    pub(super) fn bytes<const N: usize>(&self, offset: usize) -> Option<*mut u8> {
        const { assert!(N > 1) };
        if offset > MAX_OFFSET {
            return None;
        }
        let start = self.data + offset;
        if start + N > self.end {
            return None;
        }
        Some(start as *mut u8)
    }

    /// Writes bytes.
    #[inline(always)]
    pub(super) fn store<const N: usize>(&mut self, offset: usize, value: [u8; N]) -> Result<(), DropReason> {
        let Some(at) = self.bytes::<N>(offset) else {
            return Err(DropReason::RewriteFailed);
        };
        // SAFETY: `bytes` has compared the range with the end of the packet.
        unsafe {
            if N % 4 == 0 {
                at.cast::<Words<N>>().write(Words(value));
            } else if N % 2 == 0 {
                at.cast::<Halves<N>>().write(Halves(value));
            } else {
                at.cast::<[u8; N]>().write(value);
            }
        }
        Ok(())
    }
}

/// The first bytes of a packet, compared with its end.
pub(super) struct Start {
    data: usize,
    len: usize,
}

impl View for Start {
    #[inline(always)]
    fn half(&self, at: usize) -> u16 {
        if at + 2 > self.len {
            return 0;
        }
        // SAFETY: `view` has compared the range with the end of the packet.
        unsafe { ((self.data + at) as *const u16).read() }
    }

    #[inline(always)]
    fn word(&self, at: usize) -> u32 {
        if at + 4 > self.len {
            return 0;
        }
        // SAFETY: `view` has compared the range with the end of the packet.
        unsafe { ((self.data + at) as *const u32).read() }
    }
}

impl Packet for Skb {
    type View = Start;

    #[inline(always)]
    fn view(&self, len: usize) -> Option<Start> {
        (self.data + len <= self.end).then_some(Start { data: self.data, len })
    }

    #[inline(always)]
    fn ensure(&mut self, len: usize) -> Result<(), DropReason> {
        if len > MAX_OFFSET {
            return Err(DropReason::Truncated);
        }
        if self.data + len <= self.end {
            return Ok(());
        }
        if len as u32 > self.length() {
            return Err(DropReason::Truncated);
        }
        // SAFETY: the context of a running program is valid; the bounds are read again.
        let pulled = unsafe { bpf_skb_pull_data(self.raw, len as u32) };
        self.reload();
        if pulled == 0 { Ok(()) } else { Err(DropReason::RewriteFailed) }
    }

    #[inline(always)]
    fn load<const N: usize>(&self, offset: usize) -> Result<[u8; N], DropReason> {
        let Some(at) = self.bytes::<N>(offset) else {
            return Err(DropReason::Truncated);
        };
        // SAFETY: `bytes` has compared the range with the end of the packet.
        Ok(unsafe {
            if N % 4 == 0 {
                at.cast::<Words<N>>().read().0
            } else if N % 2 == 0 {
                at.cast::<Halves<N>>().read().0
            } else {
                at.cast::<[u8; N]>().read()
            }
        })
    }

    #[inline(always)]
    fn words<const N: usize>(&self, offset: usize) -> Result<[u32; N], DropReason> {
        let start = self.data + offset;
        if offset > MAX_OFFSET || start + N * 4 > self.end {
            return Err(DropReason::Truncated);
        }
        // SAFETY: the range has just been compared with the end of the packet.
        Ok(unsafe { (start as *const [u32; N]).read() })
    }

    #[inline(always)]
    fn walk_extensions(&mut self, at: usize, next: u8, room: usize) -> Extensions {
        let packed = walk_extensions(self.raw, at as u32, u32::from(next), room as u32);
        self.reload();
        Extensions::unpack(packed)
    }

    #[inline(always)]
    fn find_mss(&mut self, at: usize, header: usize) -> Option<MssOption> {
        let packed = find_mss(self.raw, at as u32, header as u32);
        self.reload();
        MssOption::unpack(packed)
    }

    #[inline(always)]
    fn length(&self) -> u32 {
        // SAFETY: the context of a running program is valid.
        unsafe { (*self.raw).len }
    }

    #[inline(always)]
    fn interface(&self) -> u32 {
        self.ifindex()
    }

    #[inline(always)]
    fn gso_size(&self) -> u32 {
        // SAFETY: the context of a running program is valid.
        unsafe { (*self.raw).gso_size }
    }

    #[inline(always)]
    fn gso_segments(&self) -> u32 {
        // SAFETY: the context of a running program is valid.
        unsafe { (*self.raw).gso_segs }
    }
}

/// [`ip::walk`] as a function of its own: the verifier looks at it once, not in every state that a
/// caller may be in, and knows nothing of what it returns.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn walk_extensions(raw: *mut __sk_buff, at: u32, next: u32, room: u32) -> u64 {
    let mut skb = Skb::of(raw);
    let at = (at as usize) & MAX_OFFSET;
    ip::walk(&mut skb, at, (next & 0xff) as u8, room as usize).pack()
}

/// [`mss::find`] as a function of its own.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn find_mss(raw: *mut __sk_buff, at: u32, header: u32) -> u64 {
    let skb = Skb::of(raw);
    let at = (at as usize) & MAX_OFFSET;
    MssOption::pack(mss::find(&skb, at, (header & 0x3c) as usize))
}

/// Length of the Ethernet addresses.
const ADDRESSES: usize = 12;

impl Skb {
    /// Makes the packet one from here to where it came from.
    #[inline(always)]
    pub(super) fn turn_around(&mut self) -> Result<(), DropReason> {
        let Some(at) = self.bytes::<ETHERNET>(0) else {
            return Err(DropReason::RewriteFailed);
        };
        let at = at.cast::<[u16; ADDRESSES / 2]>();
        // SAFETY: `bytes` has compared the range with the end of the packet.
        unsafe {
            let [a, b, c, d, e, f] = at.read();
            at.write([d, e, f, a, b, c]);
        }
        Ok(())
    }
}
