//! What the tables of a gateway answer, and the steps by which it makes a translation.

use aya_ebpf::bindings::{BPF_ANY, BPF_NOEXIST};
use coil_common::{
    config::Config,
    keys::{ClientKey4, ClientKey6},
    stats::{DropReason, GatewayStat},
    usage,
    values::{NatValue4, NatValue6, STATE_ENCAP},
};
use coil_ebpf::{
    decide::open::{self, How, Shape, Work},
    encap::Encap,
    family::{Family, V4, V6, addr4, addr6, bytes6},
    flow::Flow,
    tables::{Clock, Full, NatTables, ReserveError, Tally, Translation},
};

use super::{
    super::{atomic, config, events},
    CLIENTS_V4, CLIENTS_V6, EXCLUDED_PORTS, FULL_REMOTES, GATEWAY_STATS, GATEWAY_USAGE, Maps, NAT_FORWARD_V4,
    NAT_FORWARD_V6, NAT_REVERSE_V4, NAT_REVERSE_V6, PORT_PROBES, WORK, add, not_added, shared, touch,
};

/// The room for [`Work`] on this processor.
#[inline(always)]
fn work<F: Family>() -> Option<*mut Work<F>> {
    WORK.get_ptr_mut(0).map(<*mut _>::cast)
}

/// Says which flow the work is about.
#[inline(always)]
fn set_flow<F: Family>(flow: &Flow<F>) {
    if let Some(work) = work::<F>() {
        // SAFETY: as in `with_work`.
        unsafe { (*work).flow = *flow };
    }
}

/// Steps of [`open`] as functions of their own, which the verifier looks at once: all that they need is in
/// the room for [`Work`]. Where there is none, which cannot be, they say `$none`.
macro_rules! steps {
    ($($family:ty, $name:ident($($arg:ident),*) -> $result:ty, $none:expr, |$work:ident| $act:expr;)+) => {$(
        #[unsafe(no_mangle)]
        #[inline(never)]
        extern "C" fn $name($($arg: u32),*) -> $result {
            let Some(work) = work::<$family>() else {
                return $none;
            };
            // SAFETY: the room is large enough for either family, whose parts are plain words, and is used
            // by one program at a time: programs of one CPU do not interrupt each other here. A caller
            // that has a reference to it hands that to the compiler before.
            let $work = unsafe { &mut *work };
            $act
        }
    )+};
}

/// Why there is no translation if there is no room for [`Work`].
const NO_WORK: u32 = DropReason::RewriteFailed.index();

steps! {
    V4, attend_v4(shape) -> u32, open::code(Err(NO_WORK)), |work| open::code(open::attend(work, Shape(shape), config(), &Maps));
    V6, attend_v6(shape) -> u32, open::code(Err(NO_WORK)), |work| open::code(open::attend(work, Shape(shape), config(), &Maps));
    V4, look_after_v4(shape) -> u32, open::HALF_ERROR + NO_WORK, |work| open::look_after(work, Shape(shape), &Maps);
    V6, look_after_v6(shape) -> u32, open::HALF_ERROR + NO_WORK, |work| open::look_after(work, Shape(shape), &Maps);
    V4, refusal_v4(shape) -> u32, NO_WORK, |work| open::refusal(work, Shape(shape), config(), &Maps);
    V6, refusal_v6(shape) -> u32, NO_WORK, |work| open::refusal(work, Shape(shape), config(), &Maps);
    V4, search_v4(shape, refusal) -> u32, (open::SEARCH_ERROR + NO_WORK) << 24, |work| {
        open::search(work, Shape(shape), refusal, config(), &Maps)
    };
    V6, search_v6(shape, refusal) -> u32, (open::SEARCH_ERROR + NO_WORK) << 24, |work| {
        open::search(work, Shape(shape), refusal, config(), &Maps)
    };
    V4, settle_v4(shape, found) -> u32, open::code(Err(NO_WORK)), |work| {
        open::settle(work, Shape(shape), found, config(), &Maps)
    };
    V6, settle_v6(shape, found) -> u32, open::code(Err(NO_WORK)), |work| {
        open::settle(work, Shape(shape), found, config(), &Maps)
    };
    V4, take_over_v4(port) -> u32, open::TAKEN_ERROR + NO_WORK, |work| {
        open::take_over(work, (port & 0xffff) as u16, config(), &Maps)
    };
    V6, take_over_v6(port) -> u32, open::TAKEN_ERROR + NO_WORK, |work| {
        open::take_over(work, (port & 0xffff) as u16, config(), &Maps)
    };
    V4, in_vain_v4(shape, refusal) -> u32, NO_WORK, |work| {
        open::in_vain(work, Shape(shape), refusal, config(), &Maps)
    };
    V6, in_vain_v6(shape, refusal) -> u32, NO_WORK, |work| {
        open::in_vain(work, Shape(shape), refusal, config(), &Maps)
    };
    V4, probe_v4(how) -> u32, 0, |work| open::probe(work, How(how), &Maps);
    V6, probe_v6(how) -> u32, 0, |work| open::probe(work, How(how), &Maps);
    V4, mend_v4(now) -> u32, 0, |work| {
        open::mend(work, now, &Maps);
        0
    };
    V6, mend_v6(now) -> u32, 0, |work| {
        open::mend(work, now, &Maps);
        0
    };
}

macro_rules! nat_tables {
    ($family:ty, $bytes:expr, $addr:expr, $nat:ty, $clients:ident, $client_key:ident, $forward:ident, $reverse:ident,
     $attend:ident, $look_after:ident, $refusal:ident, $search:ident, $settle:ident, $take_over:ident, $in_vain:ident, $probe:ident,
     $mend:ident) => {
        impl NatTables<$family> for Maps {
            type Entry = *mut $nat;

            #[inline(always)]
            fn is_client(&self, addr: &<$family as Family>::Addr) -> bool {
                $clients.get_ptr($client_key { addr: $bytes(*addr) }).is_some()
            }

            #[inline(always)]
            fn forward(&self, key: &<$family as Family>::KeyWords) -> Option<*mut $nat> {
                $forward.get_ptr_mut(shared::<$family>(key))
            }

            #[inline(always)]
            fn reverse(&self, key: &<$family as Family>::KeyWords) -> Option<*mut $nat> {
                $reverse.get_ptr_mut(shared::<$family>(key))
            }

            #[inline(always)]
            fn translation(&self, entry: *mut $nat) -> Translation<$family> {
                // SAFETY: points to a map value that stays until the program ends.
                unsafe {
                    Translation {
                        addr: $addr((*entry).addr),
                        port: (*entry).port,
                        state: (*entry).state & !STATE_ENCAP,
                        encap: Encap::of_state((*entry).state),
                        last_seen: (*entry).last_seen,
                        used: (*entry).packets != 0,
                        tick: (*entry).tick,
                    }
                }
            }

            #[inline(always)]
            fn reserve(
                &self,
                key: &<$family as Family>::KeyWords,
                value: &<$family as Family>::Nat,
            ) -> Result<(), ReserveError> {
                let added = $reverse.insert(shared::<$family>(key), value, u64::from(BPF_NOEXIST));
                added.map_err(not_added)
            }

            #[inline(always)]
            fn release(&self, key: &<$family as Family>::KeyWords) {
                // An entry that is gone already is as good as removed.
                if $reverse.remove(shared::<$family>(key)).is_err() {}
            }

            #[inline(always)]
            fn put_forward(
                &self,
                key: &<$family as Family>::KeyWords,
                value: &<$family as Family>::Nat,
            ) -> Result<(), Full> {
                $forward.insert(shared::<$family>(key), value, u64::from(BPF_ANY)).map_err(|_| Full)?;
                events::translation(shared::<$family>(key), &value.addr, value.port);
                Ok(())
            }

            #[inline(always)]
            fn add_forward(
                &self,
                key: &<$family as Family>::KeyWords,
                value: &<$family as Family>::Nat,
            ) -> Result<(), ReserveError> {
                let added = $forward.insert(shared::<$family>(key), value, u64::from(BPF_NOEXIST));
                added.map_err(not_added)?;
                events::translation(shared::<$family>(key), &value.addr, value.port);
                Ok(())
            }

            #[inline(always)]
            fn restore_forward(
                &self,
                key: &<$family as Family>::KeyWords,
                value: &<$family as Family>::Nat,
            ) -> Result<(), ReserveError> {
                let (key, value) = (shared::<$family>(key), bytemuck::cast_ref(value));
                $forward.insert(key, value, u64::from(BPF_NOEXIST)).map_err(not_added)
            }

            #[inline(always)]
            fn remove_forward(&self, key: &<$family as Family>::KeyWords) {
                // An entry that is gone already is as good as removed.
                if $forward.remove(shared::<$family>(key)).is_err() {}
            }

            #[inline(always)]
            fn retract(&self, entry: *mut $nat, bits: u32) {
                // SAFETY: points to a map value that stays until the program ends. What another packet
                // notes at the same moment may be lost with it: it is noted again, or times out later.
                unsafe { (*entry).state &= !bits }
            }

            #[inline(always)]
            fn reown(&self, entry: *mut $nat, port: [u8; 2], now: u32) {
                // SAFETY: points to a map value that stays until the program ends. Of two packets that
                // do this at once the later one wins, as the other finds when it looks after its flow.
                unsafe {
                    (*entry).port = port;
                    (*entry).state &= STATE_ENCAP;
                    (*entry).created = now;
                    (*entry).last_seen = now;
                }
            }

            #[inline(always)]
            fn is_excluded(&self, udp: bool, port: u16) -> bool {
                let (word, bit) = usage::excluded_port(udp, port);
                EXCLUDED_PORTS.get(word).is_some_and(|bits| bits & bit != 0)
            }

            #[inline(always)]
            fn usage(&self, cell: u32) -> i64 {
                GATEWAY_USAGE.get(cell).map_or(0, |count| *count as i64)
            }

            #[inline(always)]
            fn use_more(&self, cell: u32) {
                if let Some(count) = GATEWAY_USAGE.get_ptr_mut(cell) {
                    // SAFETY: points to a map value.
                    unsafe { atomic::add(count, 1) }
                }
            }

            #[inline(always)]
            fn full_remote(&self, index: u32) -> u64 {
                FULL_REMOTES.get(index).map_or(0, |note| *note)
            }

            #[inline(always)]
            fn set_full_remote(&self, index: u32, note: u64) {
                if let Some(old) = FULL_REMOTES.get_ptr_mut(index) {
                    // SAFETY: points to a map value, which is written as a whole.
                    unsafe { old.write(note) }
                }
            }

            #[inline(always)]
            fn count_probes(&self, tries: u32) {
                if let Some(count) = PORT_PROBES.get_ptr_mut(tries) {
                    // SAFETY: a per-CPU value.
                    unsafe { *count = (*count).wrapping_add(1) }
                }
            }

            #[inline(always)]
            fn ask(&self, flow: &Flow<$family>) {
                set_flow(flow);
            }

            #[inline(always)]
            fn attend(&self, shape: Shape, _: &Config) -> Result<(), u32> {
                match $attend(shape.0) {
                    0 => Ok(()),
                    reason => Err(reason - 1),
                }
            }

            #[inline(always)]
            fn look_after(&self, work: &mut Work<$family>, shape: Shape, _: &Config) -> u32 {
                // It is the same work that the function finds by itself, which the compiler must know;
                // so it is in those that follow.
                core::hint::black_box(work);
                $look_after(shape.0)
            }

            #[inline(always)]
            fn refusal(&self, work: &mut Work<$family>, shape: Shape, _: &Config) -> u32 {
                core::hint::black_box(work);
                $refusal(shape.0)
            }

            #[inline(always)]
            fn search(&self, work: &mut Work<$family>, shape: Shape, refusal: u32, _: &Config) -> u32 {
                core::hint::black_box(work);
                $search(shape.0, refusal)
            }

            #[inline(always)]
            fn settle(&self, work: &mut Work<$family>, shape: Shape, found: u32, _: &Config) -> u32 {
                core::hint::black_box(work);
                $settle(shape.0, found)
            }

            #[inline(always)]
            fn take_over(&self, work: &mut Work<$family>, port: u16, _: &Config) -> u32 {
                core::hint::black_box(work);
                $take_over(u32::from(port))
            }

            #[inline(always)]
            fn in_vain(&self, work: &mut Work<$family>, shape: Shape, refusal: u32, _: &Config) -> u32 {
                core::hint::black_box(work);
                $in_vain(shape.0, refusal)
            }

            #[inline(always)]
            fn probe(&self, work: &mut Work<$family>, how: How) -> u32 {
                core::hint::black_box(work);
                $probe(how.0)
            }

            #[inline(always)]
            fn mend(&self, flow: &Flow<$family>, now: u32) {
                set_flow(flow);
                $mend(now);
            }

            #[inline(always)]
            fn restart(&self, entry: *mut $nat) {
                // SAFETY: points to a map value that stays until the program ends.
                unsafe { (*entry).state &= STATE_ENCAP }
            }

            #[inline(always)]
            fn set_encap(&self, entry: *mut $nat, encap: Encap) {
                // SAFETY: points to a map value that stays until the program ends. What another processor
                // notes of the connection at the same time may be lost; the next packet shows it again.
                unsafe { (*entry).state = (*entry).state & !STATE_ENCAP | encap.bits() }
            }

            #[inline(always)]
            fn count_entry(&self, entry: *mut $nat, tally: &Tally) {
                // SAFETY: points to a map value that stays until the program ends.
                unsafe {
                    atomic::add(&raw mut (*entry).packets, u64::from(tally.packets));
                    atomic::add(&raw mut (*entry).bytes, u64::from(tally.bytes));
                    touch(&raw mut (*entry).last_seen, &raw mut (*entry).state, tally);
                    (*entry).tick = Maps.tick() as u16;
                }
            }

            #[inline(always)]
            fn hit_entry(&self, entry: *mut $nat, packets: u32, bytes: u32) {
                // SAFETY: points to a map value that stays until the program ends.
                unsafe {
                    atomic::add(&raw mut (*entry).packets, u64::from(packets));
                    atomic::add(&raw mut (*entry).bytes, u64::from(bytes));
                }
            }

            #[inline(always)]
            fn count_gateway(&self, stat: GatewayStat, packets: u32, bytes: u32) {
                if let Some(total) = GATEWAY_STATS.get_ptr_mut(stat.index()) {
                    // SAFETY: a per-CPU value.
                    unsafe { add(total, u64::from(packets), u64::from(bytes)) }
                }
            }
        }
    };
}

nat_tables!(
    V4,
    u32::to_ne_bytes,
    addr4,
    NatValue4,
    CLIENTS_V4,
    ClientKey4,
    NAT_FORWARD_V4,
    NAT_REVERSE_V4,
    attend_v4,
    look_after_v4,
    refusal_v4,
    search_v4,
    settle_v4,
    take_over_v4,
    in_vain_v4,
    probe_v4,
    mend_v4
);
nat_tables!(
    V6,
    bytes6,
    addr6,
    NatValue6,
    CLIENTS_V6,
    ClientKey6,
    NAT_FORWARD_V6,
    NAT_REVERSE_V6,
    attend_v6,
    look_after_v6,
    refusal_v6,
    search_v6,
    settle_v6,
    take_over_v6,
    in_vain_v6,
    probe_v6,
    mend_v6
);
