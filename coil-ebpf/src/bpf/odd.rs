//! Later fragments and ICMP errors: rare, so each hook's part is a function of its own for each
//! family, which the verifier looks at once and which other packets never meet.

use aya_ebpf::bindings::__sk_buff;
use coil_common::{stats::IcmpStat, values::PodValue};
use coil_ebpf::{
    decide::{
        fragment,
        icmp::{self, ErrorRewrite},
    },
    family::{V4, V6},
    head::Build,
    parse::{quote::Quoted, tunnel::Outer},
    tables::{NatTables, NodeTables},
    verdict::{Rewrite, Verdict},
};

use super::{
    Outcome, act, apply, config,
    maps::{self, Maps},
    refuse,
    skb::Skb,
};

/// Where a packet was when it was found to be odd.
#[derive(Clone, Copy)]
pub(super) enum Hook {
    FromPod,
    ToPod,
    Out,
    Back,
}

/// The outcome of a packet, or if it is odd, what becomes of it here.
#[inline(always)]
pub(super) fn or_odd<F: Build>(raw: *mut __sk_buff, hook: Hook, outcome: u64) -> u64 {
    let v4 = F::INDEX == 0;
    if outcome == Outcome::FRAGMENT {
        return match hook {
            Hook::FromPod if v4 => fragment_from_pod_v4(raw),
            Hook::FromPod => fragment_from_pod_v6(raw),
            Hook::ToPod if v4 => fragment_to_pod_v4(raw),
            Hook::ToPod => fragment_to_pod_v6(raw),
            Hook::Out if v4 => fragment_out_v4(raw),
            Hook::Out => fragment_out_v6(raw),
            Hook::Back if v4 => fragment_back_v4(raw),
            Hook::Back => fragment_back_v6(raw),
        };
    }
    if outcome == Outcome::ICMP {
        return match hook {
            Hook::FromPod if v4 => icmp_from_pod_v4(raw),
            Hook::FromPod => icmp_from_pod_v6(raw),
            Hook::ToPod if v4 => icmp_to_pod_v4(raw),
            Hook::ToPod => icmp_to_pod_v6(raw),
            Hook::Out if v4 => icmp_out_v4(raw),
            Hook::Out => icmp_out_v6(raw),
            Hook::Back if v4 => icmp_back_v4(raw),
            Hook::Back => icmp_back_v6(raw),
        };
    }
    outcome
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
    fragment_from_pod_v4, fragment_from_pod_v6: fragment_from_pod;
    fragment_to_pod_v4, fragment_to_pod_v6: fragment_to_pod;
    fragment_out_v4, fragment_out_v6: fragment_out;
    fragment_back_v4, fragment_back_v6: fragment_back;
    icmp_from_pod_v4, icmp_from_pod_v6: icmp_from_pod;
    icmp_to_pod_v4, icmp_to_pod_v6: icmp_to_pod;
    icmp_out_v4, icmp_out_v6: icmp_out;
    icmp_back_v4, icmp_back_v6: icmp_back;
}

/// The pod behind the interface of a packet; it was there a moment ago.
#[inline(always)]
fn pod(skb: &Skb) -> Option<&'static PodValue> {
    maps::pod(skb.ifindex())
}

#[inline(always)]
fn fragment_from_pod<F: Outer + Build>(raw: *mut __sk_buff) -> u64
where
    Maps: NodeTables<F>,
{
    let mut skb = Skb::of(raw);
    let mut rewrite = Rewrite::new();
    let Some(pod) = pod(&skb) else {
        return Outcome::PASS.0;
    };
    act!(
        skb,
        rewrite,
        fragment::from_pod::<F, _, _>(&mut skb, pod, config(), &Maps, &mut rewrite),
        account => account.commit(&Maps)
    )
}

#[inline(always)]
fn fragment_to_pod<F: Outer + Build>(raw: *mut __sk_buff) -> u64
where
    Maps: NodeTables<F>,
{
    let mut skb = Skb::of(raw);
    let mut rewrite = Rewrite::new();
    act!(
        skb,
        rewrite,
        fragment::to_pod::<F, _, _>(&mut skb, config(), &Maps, &mut rewrite),
        account => if let Some(account) = account {
            account.commit(&Maps);
        }
    )
}

#[inline(always)]
fn fragment_out<F: Outer + Build>(raw: *mut __sk_buff) -> u64
where
    Maps: NatTables<F>,
{
    let mut skb = Skb::of(raw);
    let mut rewrite = Rewrite::new();
    act!(
        skb,
        rewrite,
        fragment::out::<F, _, _>(&mut skb, config(), &Maps, &mut rewrite),
        account => account.commit(&Maps)
    )
}

#[inline(always)]
fn fragment_back<F: Outer + Build>(raw: *mut __sk_buff) -> u64
where
    Maps: NatTables<F>,
{
    let mut skb = Skb::of(raw);
    let mut rewrite = Rewrite::new();
    act!(
        skb,
        rewrite,
        fragment::back::<F, _, _>(&mut skb, config(), &Maps, &mut rewrite),
        account => account.commit(&Maps)
    )
}

/// Carries a decision about an ICMP message out, and counts it.
macro_rules! act_error {
    ($skb:ident, $rewrite:ident, $decision:expr, $stat:expr, $account:ident => $commit:expr) => {{
        match $decision {
            Ok(icmp::Verdict::Pass) => Outcome::PASS.0,
            Ok(icmp::Verdict::Rewrite($account)) => match apply::error(&mut $skb, &$rewrite) {
                Ok(outcome) => {
                    $commit;
                    refuse::count($stat);
                    outcome.0
                }
                Err(reason) => Outcome::drop(reason).0,
            },
            Ok(icmp::Verdict::Refuse(refusal)) => match apply::quote(&mut $skb, &$rewrite.quote) {
                Ok(()) => Outcome::refuse(&refusal).0,
                Err(reason) => Outcome::drop(reason).0,
            },
            Err(reason) => Outcome::drop(reason).0,
        }
    }};
}

#[inline(always)]
fn icmp_from_pod<F: Quoted + Build>(raw: *mut __sk_buff) -> u64
where
    Maps: NodeTables<F>,
{
    let mut skb = Skb::of(raw);
    let mut rewrite = ErrorRewrite::new();
    let Some(pod) = pod(&skb) else {
        return Outcome::PASS.0;
    };
    act_error!(
        skb,
        rewrite,
        icmp::from_pod::<F, _, _>(&mut skb, pod, config(), &Maps, &mut rewrite),
        IcmpStat::FromPod,
        account => account.commit(&Maps)
    )
}

#[inline(always)]
fn icmp_to_pod<F: Quoted + Outer + Build>(raw: *mut __sk_buff) -> u64
where
    Maps: NodeTables<F>,
{
    let mut skb = Skb::of(raw);
    let mut rewrite = ErrorRewrite::new();
    let Some(pod) = pod(&skb) else {
        return Outcome::PASS.0;
    };
    act_error!(
        skb,
        rewrite,
        icmp::to_pod::<F, _, _>(&mut skb, pod, config(), &Maps, &mut rewrite),
        IcmpStat::ToPod,
        account => if let Some(account) = account {
            account.commit(&Maps);
        }
    )
}

#[inline(always)]
fn icmp_out<F: Quoted + Outer + Build>(raw: *mut __sk_buff) -> u64
where
    Maps: NatTables<F>,
{
    let mut skb = Skb::of(raw);
    let mut rewrite = ErrorRewrite::new();
    act_error!(
        skb,
        rewrite,
        icmp::out::<F, _, _>(&mut skb, config(), &Maps, &mut rewrite),
        IcmpStat::FromPod,
        account => account.commit::<F, _>(&Maps)
    )
}

#[inline(always)]
fn icmp_back<F: Quoted + Build>(raw: *mut __sk_buff) -> u64
where
    Maps: NatTables<F>,
{
    let mut skb = Skb::of(raw);
    let mut rewrite = ErrorRewrite::new();
    act_error!(
        skb,
        rewrite,
        icmp::back::<F, _, _>(&mut skb, config(), &Maps, &mut rewrite),
        IcmpStat::ToPod,
        account => account.commit::<F, _>(&Maps)
    )
}
