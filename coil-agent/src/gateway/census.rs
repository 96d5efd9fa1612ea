//! How many flows of a gateway would break if it ended now.
//!
//! Looks at the translation tables on its own and changes nothing. A connection counts from its opening
//! packet until both sides have finished or one has reset it; whatever else, while packets come.

use std::marker::PhantomData;
use std::path::Path;

use super::nat::{Half, NatFamily, NatMaps, NatStore, V4, V6};
use crate::datapath::internal::Cursor;
use crate::datapath::{LoadError, MapAccessError};
use coil_common::values::{
    STATE_CONFIRMED, STATE_FIN, STATE_REPLY, STATE_REPLY_FIN, STATE_REPLY_RST, STATE_RST,
};

const TCP: u8 = libc::IPPROTO_TCP as u8;
const UDP: u8 = libc::IPPROTO_UDP as u8;
const DNS: u16 = 53;

/// Seconds in which late packets of a flow that is over may still come.
const AFTERMATH: u32 = 3;
/// Seconds without an answer after which a connection is taken for one that will not be made.
const OPENING: u32 = 10;
/// Seconds without a packet after which a flow without connections is taken for finished.
const QUIET: u32 = 30;
/// The same for questions to DNS, and for echo.
const QUIET_SHORT: u32 = 5;

/// Entries read at a time.
const SLICE: usize = 4096;
/// More than so many live flows are not counted: there are enough to wait for.
const ENOUGH: u64 = 10_000;

/// Flows that are alive.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Count {
    /// TCP connections.
    pub(crate) connections: u64,
    /// Flows of other protocols.
    pub(crate) others: u64,
}

impl Count {
    /// All of them.
    pub(crate) fn total(self) -> u64 {
        self.connections + self.others
    }
}

/// Whether a flow is alive at `now`, which like `last_seen` is in seconds since boot. `state` are the
/// `STATE_*` bits of both directions together, `port` is the remote's.
pub(crate) fn is_alive(now: u32, protocol: u8, port: u16, state: u32, last_seen: u32) -> bool {
    let has = |bits| state & bits != 0;
    let seen_within = |seconds| now.saturating_sub(last_seen) < seconds;
    match protocol {
        TCP if has(STATE_RST | STATE_REPLY_RST) => seen_within(AFTERMATH),
        TCP if has(STATE_FIN) && has(STATE_REPLY_FIN) => seen_within(AFTERMATH),
        TCP if has(STATE_REPLY) && has(STATE_CONFIRMED) => true,
        TCP => seen_within(OPENING),
        UDP if port == DNS => seen_within(QUIET_SHORT),
        UDP => seen_within(QUIET),
        _ => seen_within(QUIET_SHORT),
    }
}

/// Counts in one family's tables.
struct Tables<F, S> {
    store: S,
    family: PhantomData<F>,
}

impl<F: NatFamily, S: NatStore<F>> Tables<F, S> {
    fn count(&self, now: u32, count: &mut Count) -> Result<(), S::Error> {
        let mut cursor = Cursor::default();
        while count.total() < ENOUGH {
            for (key, value) in self.store.slice(Half::Reverse, &mut cursor, SLICE)? {
                let forward_key = F::forward_key(&key, &value);
                let forward = self.store.get(Half::Forward, &forward_key)?;
                let forward = forward.filter(|forward| F::reverse_key(&forward_key, forward) == key);
                let forward = forward.as_ref().map(F::facts).unwrap_or_default();
                let reverse = F::facts(&value);
                let (protocol, port) = F::service(&key);
                let last_seen = reverse.last_seen.max(forward.last_seen);
                if is_alive(now, protocol, port, reverse.state | forward.state, last_seen) {
                    match protocol {
                        TCP => count.connections += 1,
                        _ => count.others += 1,
                    }
                }
            }
            if cursor.is_start() {
                break;
            }
        }
        Ok(())
    }
}

/// The tables of both families.
pub(crate) struct Census {
    v4: Tables<V4, NatMaps<V4>>,
    v6: Tables<V6, NatMaps<V6>>,
}

impl Census {
    /// Opens the pinned tables.
    pub(crate) fn open(folder: &Path) -> Result<Self, LoadError> {
        Ok(Self {
            v4: Tables { store: NatMaps::open(folder)?, family: PhantomData },
            v6: Tables { store: NatMaps::open(folder)?, family: PhantomData },
        })
    }

    /// Counts flows that are alive at `now` seconds since boot, up to some thousands.
    pub(crate) fn count(&self, now: u32) -> Result<Count, MapAccessError> {
        let mut count = Count::default();
        self.v4.count(now, &mut count)?;
        self.v6.count(now, &mut count)?;
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use coil_common::keys::FlowKey4;
    use coil_common::values::{NatValue4, STATE_SYN};

    use super::*;
    use crate::gateway::nat::fake::FakeNat;

    const OPEN: u32 = STATE_SYN | STATE_REPLY | STATE_CONFIRMED;

    #[test]
    fn what_is_alive() {
        for (protocol, port, state, idle, alive) in [
            (TCP, 443, OPEN, 7000, true),
            (TCP, 443, OPEN | STATE_FIN, 60, true),
            (TCP, 443, OPEN | STATE_REPLY_FIN, 60, true),
            (TCP, 443, OPEN | STATE_FIN | STATE_REPLY_FIN, AFTERMATH, false),
            (TCP, 443, OPEN | STATE_FIN | STATE_REPLY_FIN, AFTERMATH - 1, true),
            (TCP, 443, OPEN | STATE_RST, AFTERMATH, false),
            (TCP, 443, STATE_SYN, OPENING - 1, true),
            (TCP, 443, STATE_SYN, OPENING, false),
            (TCP, 443, STATE_SYN | STATE_REPLY, OPENING, false),
            (UDP, 443, STATE_REPLY, QUIET - 1, true),
            (UDP, 443, STATE_REPLY, QUIET, false),
            (UDP, 53, STATE_REPLY, QUIET_SHORT, false),
            (1, 0, STATE_REPLY, QUIET_SHORT - 1, true),
            (1, 0, STATE_REPLY, QUIET_SHORT, false),
        ] {
            assert_eq!(
                is_alive(10_000, protocol, port, state, 10_000 - idle),
                alive,
                "{protocol} {port} {state:#x} {idle}"
            );
        }
        // The kernel's clock may be ahead of one that was read before.
        assert!(is_alive(10, UDP, 443, 0, 11));
    }

    /// A translation of a client's port, with what each half has seen.
    fn add(nat: &mut FakeNat<V4>, protocol: u8, port: u16, seen: [(u32, u32); 2]) {
        let (client, own, remote) = ([10, 1, 0, 2], [10, 1, 9, 9], [192, 0, 2, 1]);
        let port = port.to_be_bytes();
        let forward = FlowKey4 {
            src: client,
            dst: remote,
            src_port: port,
            dst_port: [1, 187],
            protocol,
            ..FlowKey4::default()
        };
        let reverse = FlowKey4 { src: remote, dst: own, ..forward.reversed() };
        let value =
            |addr, (state, last_seen)| NatValue4 { addr, port, state, last_seen, ..NatValue4::default() };
        nat.forward.insert(forward, value(own, seen[0]));
        nat.reverse.insert(reverse, value(client, seen[1]));
    }

    #[test]
    fn both_halves_count_together_and_a_lone_one_too() {
        let mut nat = FakeNat::default();
        let established = [(STATE_SYN | STATE_CONFIRMED, 100), (STATE_REPLY, 100)];
        add(&mut nat, TCP, 1, established);
        add(&mut nat, TCP, 2, [(STATE_CONFIRMED | STATE_FIN, 100), (STATE_REPLY | STATE_REPLY_FIN, 100)]);
        add(&mut nat, UDP, 3, [(0, 990), (STATE_REPLY, 100)]);
        add(&mut nat, UDP, 4, [(0, 100), (STATE_REPLY, 100)]);
        // Its forward half is lost: what is left shows no connection that both sides use.
        add(&mut nat, TCP, 5, established);
        nat.forward.retain(|key, _| key.src_port != 5_u16.to_be_bytes());
        let mut count = Count::default();
        let tables = Tables::<V4, _> { store: nat, family: PhantomData };
        assert_eq!(tables.count(1000, &mut count), Ok(()));
        assert_eq!(count, Count { connections: 1, others: 1 });
    }
}
