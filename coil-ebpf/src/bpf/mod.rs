//! Entry points: decide, apply, count, say what TC shall do.

mod apply;
mod atomic;
mod maps;
mod skb;

use aya_ebpf::{
    bindings::{TC_ACT_SHOT, TC_ACT_UNSPEC},
    macros::classifier,
    programs::TcContext,
};
use coil_common::{config::Config, stats::DropReason, values::PodValue};
use coil_ebpf::{
    decide,
    family::{V4, V6},
    head::Build,
    parse::{
        Parse,
        eth::{EtherType, ethertype},
    },
    tables::{NatTables, NodeTables},
    verdict::{Rewrite, Verdict},
};

use self::{maps::Maps, skb::Skb};

/// What has become of a packet.
enum Outcome {
    /// Other programs and the stack go on with it.
    Pass,
    /// It leaves by the interface that it came in by.
    Back,
}

/// Set by the loader before it loads the programs.
#[unsafe(no_mangle)]
#[used]
static CONFIG: Config = Config {
    ipv4: [0; 4],
    ipv6: [0; 16],
    fou_port: [0; 2],
    nat_port_first: 0,
    nat_port_last: 0,
    nat_port_excluded: [0; 5],
    mtu: 0,
    flags: 0,
    seed: 0,
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
    match ethertype(&mut skb) {
        Ok(EtherType::V4) => from_pod_ip::<V4>(&ctx, pod),
        Ok(EtherType::V6) => from_pod_ip::<V6>(&ctx, pod),
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
    match ethertype(&mut skb) {
        Ok(EtherType::V4) => to_pod_ip::<V4>(&ctx, pod),
        Ok(EtherType::V6) => to_pod_ip::<V6>(&ctx, pod),
        Ok(EtherType::Other) | Err(_) => TC_ACT_UNSPEC,
    }
}

/// Packets to a gateway: ingress of `eth0` in an egress pod.
#[classifier]
fn gateway(ctx: TcContext) -> i32 {
    let mut skb = Skb::new(&ctx);
    match ethertype(&mut skb) {
        Ok(EtherType::V4) => gateway_ip::<V4>(&ctx),
        Ok(EtherType::V6) => gateway_ip::<V6>(&ctx),
        Ok(EtherType::Other) | Err(_) => TC_ACT_UNSPEC,
    }
}

/// The family's part, a program of its own so that its stack is its own.
#[inline(never)]
fn from_pod_ip<F: Parse + Build>(ctx: &TcContext, pod: &PodValue) -> i32
where
    Maps: NodeTables<F>,
{
    let mut skb = Skb::new(ctx);
    let mut rewrite = Rewrite::new();
    let outcome =
        match decide::from_pod::from_pod::<F, _, _>(&mut skb, pod, config(), &Maps, &mut rewrite) {
            Ok(Verdict::Pass) => Ok(Outcome::Pass),
            Ok(Verdict::Rewrite(account)) => {
                let outcome = apply::rewrite(&mut skb, &rewrite);
                if outcome.is_ok() {
                    account.commit(&Maps);
                }
                outcome
            }
            Ok(Verdict::TooBig(refusal)) => apply::refuse(&mut skb, &refusal),
            Err(reason) => Err(reason),
        };
    finish(&skb, outcome)
}

/// The family's part, a program of its own so that its stack is its own.
#[inline(never)]
fn to_pod_ip<F: Parse + Build>(ctx: &TcContext, pod: &PodValue) -> i32
where
    Maps: NodeTables<F>,
{
    let mut skb = Skb::new(ctx);
    let mut rewrite = Rewrite::new();
    let outcome =
        match decide::to_pod::to_pod::<F, _, _>(&mut skb, pod, config(), &Maps, &mut rewrite) {
            Ok(Verdict::Pass) => Ok(Outcome::Pass),
            Ok(Verdict::Rewrite(account)) => {
                let outcome = apply::rewrite(&mut skb, &rewrite);
                if outcome.is_ok() {
                    if let Some(account) = account {
                        account.commit(&Maps);
                    }
                }
                outcome
            }
            Ok(Verdict::TooBig(refusal)) => apply::refuse(&mut skb, &refusal),
            Err(reason) => Err(reason),
        };
    finish(&skb, outcome)
}

/// The family's part, a program of its own so that its stack is its own.
#[inline(never)]
fn gateway_ip<F: Parse + Build>(ctx: &TcContext) -> i32
where
    Maps: NatTables<F>,
{
    let mut skb = Skb::new(ctx);
    let mut rewrite = Rewrite::new();
    let outcome = match decide::gateway::gateway::<F, _, _>(&mut skb, config(), &Maps, &mut rewrite)
    {
        Ok(Verdict::Pass) => Ok(Outcome::Pass),
        Ok(Verdict::Rewrite(account)) => {
            let outcome = apply::rewrite(&mut skb, &rewrite);
            if outcome.is_ok() {
                account.commit(&Maps);
            }
            outcome
        }
        Ok(Verdict::TooBig(refusal)) => apply::refuse(&mut skb, &refusal),
        Err(reason) => Err(reason),
    };
    finish(&skb, outcome)
}

/// Counts drops and turns the outcome into an action.
#[inline(always)]
fn finish(skb: &Skb, outcome: Result<Outcome, DropReason>) -> i32 {
    match outcome {
        Ok(Outcome::Pass) => TC_ACT_UNSPEC,
        Ok(Outcome::Back) => skb.redirect_back(),
        Err(reason) => {
            maps::count_drop(reason, &decide::dropped(skb));
            TC_ACT_SHOT
        }
    }
}

#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

/// No helper in use needs more.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
