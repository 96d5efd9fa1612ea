//! Entry points: decide, apply, count, say what TC shall do.

mod apply;
mod atomic;
mod events;
mod maps;
mod near;
mod notes;
mod odd;
mod refuse;
mod shortcut;
mod skb;

use aya_ebpf::{
    bindings::{__sk_buff, TC_ACT_SHOT, TC_ACT_UNSPEC},
    macros::classifier,
    programs::TcContext,
};
use coil_common::{
    config::{CONFIG_SHORTCUT, Config, TIMEOUTS},
    events::{HOOK_FROM_POD, HOOK_GATEWAY, HOOK_TO_POD},
    stats::DropReason,
    values::{NO_POLICY, POD_GATEWAY, PodValue},
};
use coil_ebpf::{
    decide::{
        dropped,
        fast::{self, Usual},
        fragment, from_pod,
        gateway::{self, Attention, Direction},
        inbound,
        near::Near,
        open::Shape,
        shortcut::is_reply,
        to_pod,
    },
    encap::{self, Encap},
    family::{Family, V4, V6},
    head::Build,
    parse::{
        Parse,
        eth::{EtherType, ethertype},
        tunnel::Outer,
    },
    tables::{NatTables, NodeTables},
    verdict::{Refusal, Rewrite, Verdict},
};

use self::{
    maps::Maps,
    odd::{Hook, or_odd},
    skb::Skb,
};

/// What has become of a packet, as a number: a function of its own can return nothing else.
#[derive(Clone, Copy)]
struct Outcome(u64);

impl Outcome {
    /// Other programs and the stack go on with it.
    const PASS: Self = Self(0);
    /// It leaves by the interface that it came in by.
    const BACK: Self = Self(1);
    const DROP: u64 = 2;
    const REFUSE: u64 = 3;
    /// A fragment: see [`odd`].
    const FRAGMENT: u64 = 5;
    /// An ICMP message other than echo: see [`odd`].
    const ICMP: u64 = 6;
    /// The short way does not know; nothing has changed.
    const MISS: u64 = 4;
    /// It is tunnelled, belongs to a flow that was answered, and may leave past the stack.
    const ONWARD: u64 = 7;
    /// The translation must be looked after first.
    const ATTEND: u64 = 9;

    /// It must be looked after first as this says.
    #[inline(always)]
    const fn attend(attention: Attention) -> u64 {
        Self::ATTEND | ((attention.at as u64) << 8) | ((attention.shape.0 as u64) << 32)
    }

    /// How it must be.
    #[inline(always)]
    const fn attention(outcome: u64) -> Attention {
        Attention { shape: Shape((outcome >> 32) as u32), at: (outcome >> 8 & 0xff) as u8 }
    }

    /// It goes to another pod of this node at once: see [`near`].
    const NEAR: u64 = 8;

    /// It is dropped.
    #[inline(always)]
    const fn drop(reason: DropReason) -> Self {
        Self(Self::DROP | ((reason.index() as u64) << 8))
    }

    /// It is dropped, and its sender shall get an ICMP error.
    #[inline(always)]
    const fn refuse(refusal: &Refusal) -> Self {
        Self(Self::REFUSE | ((refusal.reason.index() as u64) << 8) | (refusal.answer.pack() << 16))
    }
}

/// What is known of a packet that is decided again: its datagram has been noted.
const NOTED: u32 = 1 << 0;
/// Its translation has been looked after.
const ATTENDED: u32 = 1 << 1;

/// Set by the loader before it loads the programs.
#[unsafe(no_mangle)]
#[used]
static CONFIG: Config = Config {
    ipv4: [0; 4],
    ipv6: [0; 16],
    fou_port: [0; 2],
    nat_port_first: 0,
    nat_port_last: 0,
    nat_id_first: 0,
    nat_id_last: 0,
    pad: [0; 2],
    mtu: 0,
    flags: 0,
    seed: 0,
    icmp_rate: 0,
    icmp_burst: 0,
    nat_admit: 0,
    nat_client_flows: 0,
    nat_client_ports: 0,
    pod_flows: 0,
    timeouts: [0; TIMEOUTS],
};

/// The configuration as the loader left it, which the compiler must not think it knows.
#[inline(always)]
fn config() -> &'static Config {
    core::hint::black_box(&CONFIG)
}

/// Packets from a pod: ingress of its host-side interface.
#[classifier]
fn from_pod(ctx: TcContext) -> i32 {
    let mut skb = Skb::new(&ctx);
    let Some(pod) = maps::pod(skb.ifindex()) else {
        return TC_ACT_UNSPEC;
    };
    let served = pod.set != NO_POLICY;
    match ethertype(&mut skb) {
        Ok(EtherType::V4) => {
            let short = if served { short_from_pod::<V4>(&ctx, pod) } else { unserved::<V4>(&ctx, pod) };
            if short == Outcome::ONWARD {
                return shortcut::onward::<V4>(&skb);
            }
            let outcome = or(short, || {
                let noted = served && note_first::<V4>(&mut skb);
                from_pod_v4(skb.raw, u32::from(noted) * NOTED)
            });
            let outcome = or_odd::<V4>(skb.raw, Hook::FromPod, outcome);
            let outcome = or_again(outcome, || Outcome::drop(DropReason::ExtensionHeaders).0);
            finish::<V4>(&mut skb, HOOK_FROM_POD, outcome)
        }
        Ok(EtherType::V6) => {
            let short = if served { short_from_pod::<V6>(&ctx, pod) } else { unserved::<V6>(&ctx, pod) };
            if short == Outcome::ONWARD {
                return shortcut::onward::<V6>(&skb);
            }
            let outcome = or(short, || {
                let noted = served && note_first::<V6>(&mut skb);
                from_pod_v6(skb.raw, u32::from(noted) * NOTED)
            });
            let outcome = or_odd::<V6>(skb.raw, Hook::FromPod, outcome);
            let outcome = or_again(outcome, || Outcome::drop(DropReason::ExtensionHeaders).0);
            finish::<V6>(&mut skb, HOOK_FROM_POD, outcome)
        }
        Ok(EtherType::Other) | Err(_) => TC_ACT_UNSPEC,
    }
}

/// Packets to a pod: egress of its host-side interface.
#[classifier]
fn to_pod(ctx: TcContext) -> i32 {
    let mut skb = Skb::new(&ctx);
    let Some(pod) = maps::pod(skb.ifindex()) else {
        return TC_ACT_UNSPEC;
    };
    // Tunnels to egress pods, and whatever reaches pods without policy, are their own business; but not what comes to an
    // egress pod where it could be taken for a packet that was handed to it.
    let guarded = near::is_on() && pod.flags & POD_GATEWAY != 0;
    if pod.set == NO_POLICY && !inbound::notes(pod) && !guarded {
        return TC_ACT_UNSPEC;
    }
    let served = pod.set != NO_POLICY;
    match ethertype(&mut skb) {
        Ok(EtherType::V4) => {
            let short = if served { short_to_pod::<V4>(&ctx, pod) } else { Outcome::MISS };
            let outcome = or(short, || {
                if inbound::notes(pod) {
                    note_inbound::<V4>(&ctx, pod);
                }
                to_pod_v4(skb.raw, 0)
            });
            let outcome = or_odd::<V4>(skb.raw, Hook::ToPod, outcome);
            let outcome = or_again(outcome, || to_pod_v4(skb.raw, NOTED));
            finish::<V4>(&mut skb, HOOK_TO_POD, outcome)
        }
        Ok(EtherType::V6) => {
            let short = if served { short_to_pod::<V6>(&ctx, pod) } else { Outcome::MISS };
            let outcome = or(short, || {
                if inbound::notes(pod) {
                    note_inbound::<V6>(&ctx, pod);
                }
                to_pod_v6(skb.raw, 0)
            });
            let outcome = or_odd::<V6>(skb.raw, Hook::ToPod, outcome);
            let outcome = or_again(outcome, || to_pod_v6(skb.raw, NOTED));
            finish::<V6>(&mut skb, HOOK_TO_POD, outcome)
        }
        Ok(EtherType::Other) | Err(_) => TC_ACT_UNSPEC,
    }
}

/// Packets to a gateway: ingress of `eth0` in an egress pod.
#[classifier]
fn gateway(ctx: TcContext) -> i32 {
    let mut skb = Skb::new(&ctx);
    match ethertype(&mut skb) {
        Ok(EtherType::V4) => {
            let outcome = gateway_ip::<V4>(&ctx, &mut skb);
            finish::<V4>(&mut skb, HOOK_GATEWAY, outcome)
        }
        Ok(EtherType::V6) => {
            let outcome = gateway_ip::<V6>(&ctx, &mut skb);
            finish::<V6>(&mut skb, HOOK_GATEWAY, outcome)
        }
        Ok(EtherType::Other) | Err(_) => TC_ACT_UNSPEC,
    }
}

/// Carries a decision out and counts the packet if that succeeds.
macro_rules! act {
    ($skb:ident, $rewrite:ident, $decision:expr, $account:ident => $commit:expr) => {{
        match $decision {
            Ok(Verdict::Pass) => Outcome::PASS.0,
            Ok(Verdict::Rewrite($account)) => match apply::rewrite(&mut $skb, &$rewrite) {
                Ok(outcome) => {
                    $commit;
                    outcome.0
                }
                Err(reason) => Outcome::drop(reason).0,
            },
            Ok(Verdict::Refuse(refusal)) => Outcome::refuse(&refusal).0,
            Ok(Verdict::Fragment) => Outcome::FRAGMENT,
            Ok(Verdict::Attend(attention)) => Outcome::attend(attention),
            Ok(Verdict::Icmp) => Outcome::ICMP,
            Err(reason) => Outcome::drop(reason).0,
        }
    }};
}

use act;

/// Carries out and counts what the short way decides.
macro_rules! hit {
    ($ctx:ident, $decide:expr) => {{
        let mut skb = Skb::new($ctx);
        let mut rewrite = Rewrite::new();
        match $decide(&skb, &mut rewrite) {
            None => Outcome::MISS,
            Some(None) => Outcome::PASS.0,
            Some(Some(hit)) => match apply::rewrite(&mut skb, &rewrite) {
                Ok(outcome) => {
                    hit.commit(&Maps);
                    outcome.0
                }
                Err(reason) => Outcome::drop(reason).0,
            },
        }
    }};
}

/// The outcome of the short way, or if it has none, that of the long one.
#[inline(always)]
fn or(short: u64, long: impl FnOnce() -> u64) -> u64 {
    if short == Outcome::MISS { long() } else { short }
}

/// The outcome, or that of a second look at the first fragment of a datagram that has been noted.
#[inline(always)]
fn or_again(outcome: u64, look: impl FnOnce() -> u64) -> u64 {
    if outcome == Outcome::FRAGMENT { look() } else { outcome }
}

/// Notes the datagram of which a packet from a pod is the first fragment, if it is.
#[inline(always)]
fn note_first<F: Build>(skb: &mut Skb) -> bool {
    fragment::is_first::<F, _>(skb)
        && or_odd::<F>(skb.raw, Hook::FromPod, Outcome::FRAGMENT) == Outcome::FRAGMENT
}

/// The kernel knows the configuration, and takes the one out that is not used.
#[inline(always)]
fn short_from_pod<F: Usual>(ctx: &TcContext, pod: &PodValue) -> u64
where
    Maps: NodeTables<F> + Near<F>,
{
    match (Encap::of_config(config()).is_ipip(), near::is_on()) {
        (false, false) => fast_from_pod::<F, false, false>(ctx, pod),
        (false, true) => fast_from_pod::<F, false, true>(ctx, pod),
        (true, false) => fast_from_pod::<F, true, false>(ctx, pod),
        (true, true) => fast_from_pod::<F, true, true>(ctx, pod),
    }
}

#[inline(never)]
fn fast_from_pod<F: Usual, const IPIP: bool, const NEAR: bool>(ctx: &TcContext, pod: &PodValue) -> u64
where
    Maps: NodeTables<F> + Near<F>,
{
    let mut skb = Skb::new(ctx);
    let mut rewrite = Rewrite::new();
    let Some(hit) = fast::from_pod::<F, _, _, IPIP>(&skb, pod, config(), &Maps, &mut rewrite) else {
        return Outcome::MISS;
    };
    let answered = hit.answered;
    if NEAR
        && answered
        && let Some(outcome) = near::gateway(&skb, &rewrite, &hit)
    {
        return outcome;
    }
    let outcome = match apply::rewrite(&mut skb, &rewrite) {
        Ok(outcome) => {
            hit.commit(&Maps);
            outcome.0
        }
        Err(reason) => Outcome::drop(reason).0,
    };
    // Where routes are remembered, ports are.
    if !IPIP && answered && outcome == Outcome::PASS.0 && config().flags & CONFIG_SHORTCUT != 0 {
        return Outcome::ONWARD;
    }
    outcome
}

/// The short way of packets from a pod without policy; those that a gateway has tunnelled may leave past
/// the stack.
#[inline(never)]
fn unserved<F: Usual>(ctx: &TcContext, pod: &PodValue) -> u64
where
    Maps: NodeTables<F> + Near<F>,
{
    let skb = Skb::new(ctx);
    let Some(ip) = fast::unserved::<F, _>(&skb, pod) else {
        return if near::is_on() && pod.flags == POD_GATEWAY {
            near::client::<F>(&skb, pod)
        } else {
            Outcome::MISS
        };
    };
    near::take(&skb, pod);
    let may = pod.flags == POD_GATEWAY && config().flags & CONFIG_SHORTCUT != 0;
    if may && is_reply(&skb, &ip, config()) { Outcome::ONWARD } else { Outcome::PASS.0 }
}

/// Gateways answer by the kind of tunnel that the node uses, but for a moment after that changes.
#[inline(always)]
fn short_to_pod<F: Usual>(ctx: &TcContext, pod: &PodValue) -> u64
where
    Maps: NodeTables<F>,
{
    if Encap::of_config(config()).is_ipip() {
        fast_to_pod::<F, true>(ctx, pod)
    } else {
        fast_to_pod::<F, false>(ctx, pod)
    }
}

#[inline(never)]
fn fast_to_pod<F: Usual, const IPIP: bool>(ctx: &TcContext, pod: &PodValue) -> u64
where
    Maps: NodeTables<F>,
{
    hit!(ctx, |skb: &Skb, rewrite: &mut Rewrite<F>| {
        fast::to_pod::<F, _, _, IPIP>(skb, pod, config(), &Maps, rewrite).map(Some)
    })
}

#[inline(never)]
fn fast_out<F: Usual, const IPIP: bool>(ctx: &TcContext) -> u64
where
    Maps: NatTables<F>,
{
    hit!(ctx, |skb: &Skb, rewrite: &mut Rewrite<F>| {
        fast::out::<F, _, _, IPIP>(skb, config(), &Maps, rewrite).map(Some)
    })
}

#[inline(never)]
fn fast_back<F: Usual>(ctx: &TcContext) -> u64
where
    Maps: NatTables<F>,
{
    hit!(ctx, |skb: &Skb, rewrite: &mut Rewrite<F>| fast::back(skb, config(), &Maps, rewrite))
}

// Each family's part of a program is a function of its own, so that its stack is its own. These have nothing but
// the packet and a number from their caller: the verifier looks at them once, whatever came before.

macro_rules! functions {
    ($($v4:ident, $v6:ident: $run:ident;)+) => {$(
        #[unsafe(no_mangle)]
        #[inline(never)]
        extern "C" fn $v4(raw: *mut __sk_buff, known: u32) -> u64 {
            $run::<V4>(raw, known)
        }

        #[unsafe(no_mangle)]
        #[inline(never)]
        extern "C" fn $v6(raw: *mut __sk_buff, known: u32) -> u64 {
            $run::<V6>(raw, known)
        }
    )+};
}

functions! {
    from_pod_v4, from_pod_v6: from_pod_ip;
    to_pod_v4, to_pod_v6: to_pod_ip;
    gateway_out_v4, gateway_out_v6: gateway_out;
    gateway_back_v4, gateway_back_v6: gateway_back;
}

#[inline(always)]
fn out<F: Family>(raw: *mut __sk_buff, known: u32) -> u64 {
    if F::INDEX == 0 { gateway_out_v4(raw, known) } else { gateway_out_v6(raw, known) }
}

#[inline(always)]
fn back<F: Family>(raw: *mut __sk_buff, known: u32) -> u64 {
    if F::INDEX == 0 { gateway_back_v4(raw, known) } else { gateway_back_v6(raw, known) }
}

#[inline(always)]
fn from_pod_ip<F: Parse + Build>(raw: *mut __sk_buff, known: u32) -> u64
where
    Maps: NodeTables<F>,
{
    let mut skb = Skb::of(raw);
    let Some(pod) = maps::pod(skb.ifindex()) else {
        return Outcome::PASS.0;
    };
    let mut rewrite = Rewrite::new();
    rewrite.noted = known & NOTED != 0;
    act!(
        skb,
        rewrite,
        from_pod::from_pod::<F, _, _>(&mut skb, pod, config(), &Maps, &mut rewrite),
        account => account.commit(&Maps)
    )
}

#[inline(always)]
fn to_pod_ip<F: Outer + Build>(raw: *mut __sk_buff, known: u32) -> u64
where
    Maps: NodeTables<F>,
{
    let mut skb = Skb::of(raw);
    let Some(pod) = maps::pod(skb.ifindex()) else {
        return Outcome::PASS.0;
    };
    let mut rewrite = Rewrite::new();
    rewrite.noted = known & NOTED != 0;
    act!(
        skb,
        rewrite,
        to_pod::to_pod::<F, _, _>(&mut skb, pod, config(), &Maps, &mut rewrite),
        account => if let Some(account) = account {
            account.commit(&Maps);
        }
    )
}

/// A function's result must be a number.
#[inline(never)]
fn note_inbound<F: Outer + Build>(ctx: &TcContext, pod: &PodValue) -> u64
where
    Maps: NodeTables<F>,
{
    inbound::note::<F, _, _>(&mut Skb::new(ctx), pod, config(), &Maps);
    0
}

#[inline(always)]
fn gateway_ip<F: Outer + Usual>(ctx: &TcContext, skb: &mut Skb) -> u64
where
    Maps: NatTables<F>,
{
    // Each of these knows at a glance what is not for it.
    let short = or(fast_out::<F, false>(ctx), || fast_back::<F>(ctx));
    if short != Outcome::MISS {
        return short;
    }
    match gateway::direction::<F, _>(skb, config()) {
        Direction::Out(encap) => {
            if !encap.is_ipip()
                && let Err(reason) = apply::forget_outer_sum::<F>(skb)
            {
                return Outcome::drop(reason).0;
            }
            let short = if encap.is_ipip() { fast_out::<F, true>(ctx) } else { Outcome::MISS };
            let outcome = or(short, || out::<F>(skb.raw, 0));
            let outcome = or_attended::<F>(outcome, || out::<F>(skb.raw, ATTENDED));
            let outcome = or_odd::<F>(skb.raw, Hook::Out, outcome);
            let outcome = or_again(outcome, || out::<F>(skb.raw, NOTED | ATTENDED));
            // On the short way that is known; on this one only if nobody ever spoke but by FOU.
            if short == Outcome::MISS && outcome == Outcome::BACK.0 && maps::speaks_otherwise(encap) {
                note_encap::<F>(skb.raw, encap);
            }
            outcome
        }
        Direction::Back => {
            let outcome = or_odd::<F>(skb.raw, Hook::Back, back::<F>(skb.raw, 0));
            or_again(outcome, || back::<F>(skb.raw, NOTED))
        }
        Direction::Neither => near::out::<F>(skb.raw),
    }
}

/// The outcome, or that of a second look once the translation has been looked after.
#[inline(always)]
fn or_attended<F: Build>(outcome: u64, again: impl FnOnce() -> u64) -> u64
where
    Maps: NatTables<F>,
{
    if outcome & 0xff != Outcome::ATTEND {
        return outcome;
    }
    let attention = Outcome::attention(outcome);
    match NatTables::<F>::attend(&Maps, attention.shape, config()) {
        Ok(()) => again(),
        Err(reason) => {
            let counted = u64::from(reason) << 8;
            match attention.refused::<F>(reason) {
                Ok(answer) => Outcome::REFUSE | counted | (answer.pack() << 16),
                Err(_) => Outcome::DROP | counted,
            }
        }
    }
}

#[inline(always)]
fn gateway_out<F: Outer + Build>(raw: *mut __sk_buff, known: u32) -> u64
where
    Maps: NatTables<F>,
{
    let mut skb = Skb::of(raw);
    let mut rewrite = Rewrite::new();
    rewrite.noted = known & NOTED != 0;
    rewrite.attended = known & ATTENDED != 0;
    act!(
        skb,
        rewrite,
        gateway::out::<F, _, _>(&mut skb, config(), &Maps, &mut rewrite),
        account => account.commit(&Maps)
    )
}

#[inline(always)]
fn note_encap<F: Family>(raw: *mut __sk_buff, encap: Encap) {
    if F::INDEX == 0 {
        note_encap_v4(raw, encap.bits());
    } else {
        note_encap_v6(raw, encap.bits());
    }
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn note_encap_v4(raw: *mut __sk_buff, encap: u32) -> u64 {
    encap::note::<V4, _, _>(&mut Skb::of(raw), Encap::of_state(encap), &Maps);
    0
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn note_encap_v6(raw: *mut __sk_buff, encap: u32) -> u64 {
    encap::note::<V6, _, _>(&mut Skb::of(raw), Encap::of_state(encap), &Maps);
    0
}

#[inline(always)]
fn gateway_back<F: Outer + Build>(raw: *mut __sk_buff, known: u32) -> u64
where
    Maps: NatTables<F>,
{
    let mut skb = Skb::of(raw);
    let mut rewrite = Rewrite::new();
    rewrite.noted = known & NOTED != 0;
    act!(
        skb,
        rewrite,
        gateway::back::<F, _, _>(&mut skb, config(), &Maps, &mut rewrite),
        account => account.commit(&Maps)
    )
}

/// Counts drops, answers some with an error, and turns the outcome into an action.
#[inline(always)]
fn finish<F: Build>(skb: &mut Skb, hook: u32, outcome: u64) -> i32 {
    let kind = outcome & 0xff;
    if kind == Outcome::PASS.0 {
        return TC_ACT_UNSPEC;
    }
    if kind == Outcome::BACK.0 {
        return skb.redirect_back::<F>(config());
    }
    if kind == Outcome::NEAR {
        return near::send(outcome);
    }
    let dropped = dropped(skb);
    let reason = (outcome >> 8 & 0xff) as u32;
    maps::count_drop(reason, &dropped);
    events::drop(skb, hook, reason);
    if reason == DropReason::NoState.index() {
        maps::count_invalid(F::INDEX, &dropped);
    }
    if kind == Outcome::REFUSE && refuse::refuse::<F>(skb, outcome >> 16) {
        return if refuse::goes_on(outcome >> 16) { TC_ACT_UNSPEC } else { skb.redirect_back::<F>(config()) };
    }
    TC_ACT_SHOT
}

#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

/// The kernel lets only programs under the GPL ask for routes (`bpf_fib_lookup`); see `LICENSE-GPL-2.0`.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
