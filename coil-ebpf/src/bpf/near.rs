//! Carries [`decide::near`](coil_ebpf::decide::near) out.

use aya_ebpf::{
    bindings::__sk_buff,
    helpers::generated::{bpf_redirect_peer, bpf_skb_change_type},
};
use coil_common::{
    config::CONFIG_NEAR,
    values::{POD_GATEWAY, PodValue},
};
use coil_ebpf::{
    decide::{
        fast::{FlowHit, Usual},
        near::{self, Near},
    },
    encap::Encap,
    family::{Family, V4, V6},
    packet::ETHERNET,
    tables::{NatTables, NodeTables},
    verdict::{Rewrite, Verdict},
};

use super::{
    ATTENDED, Outcome, act, apply, config,
    maps::{self, Maps},
    note_encap, or_attended,
    skb::Skb,
};

/// `PACKET_OTHERHOST`
const OTHERHOST: u32 = 3;
/// `PACKET_HOST`
const HOST: u32 = 0;

/// Packets may go from pod to pod without a tunnel.
#[inline(always)]
pub(super) fn is_on() -> bool {
    config().flags & CONFIG_NEAR != 0
}

/// An outcome: the packet goes to the pod behind an interface, at once.
#[inline(always)]
const fn to(ifindex: u32) -> u64 {
    Outcome::NEAR | ((ifindex as u64) << 8)
}

/// Sends a packet to the pod that an outcome says.
#[inline(always)]
pub(super) fn send(outcome: u64) -> i32 {
    // SAFETY: the helper only notes where the packet goes.
    unsafe { bpf_redirect_peer((outcome >> 8 & 0xffff_ffff) as u32, 0) as i32 }
}

/// The outcome of a packet of a pod that the short way would tunnel to a gateway of this node.
#[inline(always)]
pub(super) fn gateway<F: Family>(
    skb: &Skb,
    rewrite: &Rewrite<F>,
    hit: &FlowHit<<Maps as NodeTables<F>>::Flow>,
) -> Option<u64>
where
    Maps: NodeTables<F> + Near<F>,
{
    let ifindex = near::gateway(rewrite, &Maps)?;
    let at = skb.bytes::<ETHERNET>(0)?.cast::<[u16; 6]>();
    // The gateway sends it back where it comes from: to the router, as the pod knows it.
    // SAFETY: `bytes` has compared the range with the end of the packet.
    unsafe {
        let [a, b, c, ..] = at.read();
        at.write([a, b, c, a, b, c]);
    }
    hit.commit(&Maps);
    Some(to(ifindex))
}

/// The outcome of a packet of a gateway that does not have its address.
#[inline(always)]
pub(super) fn client<F: Usual>(skb: &Skb, pod: &PodValue) -> u64
where
    Maps: NodeTables<F> + Near<F>,
{
    match near::client::<F, _, _>(skb, pod, &Maps) {
        None => Outcome::MISS,
        Some((ifindex, hit)) => {
            if let Some(hit) = hit {
                hit.commit(&Maps);
            }
            to(ifindex)
        }
    }
}

/// Makes a packet of a gateway one for this node: it has sent it where the packet of its client was going.
#[inline(always)]
pub(super) fn take(skb: &Skb, pod: &PodValue) {
    if is_on() && pod.flags == POD_GATEWAY {
        // SAFETY: the context of a running program is valid.
        unsafe {
            if (*skb.raw).pkt_type == OTHERHOST {
                bpf_skb_change_type(skb.raw, HOST);
            }
        }
    }
}

/// A packet at a gateway that is not for it.
#[inline(always)]
pub(super) fn out<F: Usual>(raw: *mut __sk_buff) -> u64
where
    Maps: NatTables<F>,
{
    let short = if F::INDEX == 0 { near_fast_v4(raw) } else { near_fast_v6(raw) };
    if short != Outcome::MISS {
        return short;
    }
    let outcome = or_attended::<F>(long_way::<F>(raw, 0), || long_way::<F>(raw, ATTENDED));
    if outcome == Outcome::BACK.0 && maps::speaks_otherwise(Encap::DIRECT) {
        note_encap::<F>(raw, Encap::DIRECT);
    }
    outcome
}

#[inline(always)]
fn long_way<F: Family>(raw: *mut __sk_buff, known: u32) -> u64 {
    if F::INDEX == 0 { near_out_v4(raw, known) } else { near_out_v6(raw, known) }
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn near_out_v4(raw: *mut __sk_buff, known: u32) -> u64 {
    long::<V4>(raw, known)
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn near_out_v6(raw: *mut __sk_buff, known: u32) -> u64 {
    long::<V6>(raw, known)
}

macro_rules! functions {
    ($($v4:ident, $v6:ident: $run:ident;)+) => {$(
        #[unsafe(no_mangle)]
        #[inline(never)]
        extern "C" fn $v4(raw: *mut __sk_buff) -> u64 {
            $run::<V4>(raw)
        }

        #[unsafe(no_mangle)]
        #[inline(never)]
        extern "C" fn $v6(raw: *mut __sk_buff) -> u64 {
            $run::<V6>(raw)
        }
    )+};
}

functions! {
    near_fast_v4, near_fast_v6: fast;
}

#[inline(always)]
fn fast<F: Usual>(raw: *mut __sk_buff) -> u64
where
    Maps: NatTables<F>,
{
    let mut skb = Skb::of(raw);
    let mut rewrite = Rewrite::new();
    let Some(hit) = near::out::<F, _, _>(&skb, config(), &Maps, &mut rewrite) else {
        return Outcome::MISS;
    };
    match apply::rewrite(&mut skb, &rewrite) {
        Ok(outcome) => {
            hit.commit(&Maps);
            outcome.0
        }
        Err(reason) => Outcome::drop(reason).0,
    }
}

#[inline(always)]
fn long<F: Usual>(raw: *mut __sk_buff, known: u32) -> u64
where
    Maps: NatTables<F>,
{
    let mut skb = Skb::of(raw);
    let mut rewrite = Rewrite::new();
    rewrite.attended = known & ATTENDED != 0;
    act!(
        skb,
        rewrite,
        near::out_long::<F, _, _>(&mut skb, config(), &Maps, &mut rewrite),
        account => account.commit(&Maps)
    )
}
