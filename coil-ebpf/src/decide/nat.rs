//! Translation of flows: one entry for each direction.
//!
//! The reverse entry owns the port: it is inserted first, and only if there is none, which is the
//! one step that decides between two flows that want the same port. The forward entry is found by
//! what the client sends. Either half can be rebuilt from the other.

use coil_common::{
    stats::{DropReason, GatewayStat},
    values::STATE_SYN,
};

use super::wire;
use crate::{
    family::Family,
    flow::{Flow, Hash},
    parse::{L4, l4::Kind},
    tables::{NatTables, Ports, ReserveError},
};

/// Ports that are tried for a new flow, its own included.
const PROBES: u32 = 16;

/// A sequence of ports that jumps about in a range: free ports are rare right after those that flows
/// kept. There are no branches in it, since each would double what the verifier has to walk through
/// in every round.
struct Probes {
    state: u64,
    first: u16,
    size: u32,
}

impl Probes {
    #[inline(always)]
    fn new(hash: Hash, (first, last): (u16, u16)) -> Self {
        let size = u32::from(last.wrapping_sub(first)) + 1;
        Self { state: hash.bits64(), first, size }
    }

    #[inline(always)]
    const fn contains(&self, port: u16) -> bool {
        (port.wrapping_sub(self.first) as u32) < self.size
    }

    #[inline(always)]
    fn next(&mut self) -> u16 {
        // The generator of Knuth's MMIX; its high bits are the good ones.
        self.state =
            self.state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let step = ((self.state >> 32) * u64::from(self.size)) >> 32;
        self.first.wrapping_add((step & 0xffff) as u16)
    }
}

/// Finds or makes the translation of a packet from a client.
#[inline(always)]
pub(super) fn outbound<F: Family, T: NatTables<F>, O: Ports<F>>(
    flow: &Flow<F>,
    l4: &L4,
    ports: &O,
    seed: u32,
    now: u32,
    tables: &T,
) -> Result<T::Entry, DropReason> {
    // Key and value of the other half are written over and over, to spare the stack.
    let mut back = flow.reversed();
    let mut value;
    let mut lost = false;
    if let Some(entry) = tables.forward(flow.key()) {
        let known = tables.translation(entry);
        let opens = wire::opens(l4);
        if opens || known.last_seen != now {
            // Once a second at most: is the other half still there?
            back.set_dst(&known.addr, known.port);
            if let Some(reverse) = tables.reverse(back.key()) {
                let owner = tables.translation(reverse);
                // Another flow may have the port by now: start over with another one.
                lost = !F::same(&owner.addr, &flow.src())
                    || u16::from_ne_bytes(owner.port) != u16::from_ne_bytes(flow.src_port());
                if !lost && opens && known.state & !STATE_SYN != 0 {
                    tables.restart(entry);
                    tables.restart(reverse);
                }
            } else {
                value = F::translation(&flow.src(), flow.src_port(), 0, now);
                match tables.reserve(back.key(), &value) {
                    Ok(()) => {}
                    Err(ReserveError::Taken) => lost = true,
                    Err(ReserveError::Full) => return Err(DropReason::NatTableFull),
                }
            }
        }
        if !lost {
            return Ok(entry);
        }
    }
    let may_open = match l4.kind {
        Kind::Tcp(_) => lost || wire::opens(l4),
        Kind::Udp | Kind::EchoRequest => true,
        Kind::EchoReply => return Err(DropReason::UnsupportedIcmp),
    };
    if !may_open {
        return Err(DropReason::NoState);
    }

    let addr = ports.address();
    let mut probes = Probes::new(flow.hash(seed), ports.range());
    let mut candidate = u16::from_be_bytes(flow.src_port());
    if !probes.contains(candidate) {
        candidate = probes.next();
    }
    let mut reserved = false;
    back.set_dst(&addr, flow.src_port());
    value = F::translation(&flow.src(), flow.src_port(), 0, now);
    for _ in 0..PROBES {
        if !ports.is_excluded(candidate) {
            back.set_dst_port(candidate.to_be_bytes());
            match tables.reserve(back.key(), &value) {
                Ok(()) => {
                    reserved = true;
                    break;
                }
                Err(ReserveError::Taken) => {}
                Err(ReserveError::Full) => return Err(DropReason::NatTableFull),
            }
        }
        candidate = probes.next();
    }
    if !reserved {
        return Err(DropReason::PortsExhausted);
    }
    value = F::translation(&addr, candidate.to_be_bytes(), wire::shows(l4, false, &wire::INITIATOR), now);
    if tables.put_forward(flow.key(), &value).is_err() {
        tables.release(back.key());
        return Err(DropReason::NatTableFull);
    }
    let stat = if F::INDEX == 0 { GatewayStat::NewFlowV4 } else { GatewayStat::NewFlowV6 };
    tables.count_gateway(stat, 1, 0);
    // Should it be removed under our hands, the next packet finds or makes it.
    tables.forward(flow.key()).ok_or(DropReason::NoState)
}

/// Finds the translation of a reply, and rebuilds the forward half if it is gone.
#[inline(always)]
pub(super) fn inbound<F: Family, T: NatTables<F>>(flow: &Flow<F>, now: u32, tables: &T) -> Option<T::Entry> {
    let entry = tables.reverse(flow.key())?;
    let known = tables.translation(entry);
    if known.last_seen != now {
        let mut out = flow.reversed();
        out.set_src(&known.addr, known.port);
        if tables.forward(out.key()).is_none() {
            let value = F::translation(&flow.dst(), flow.dst_port(), 0, now);
            // Without room the client's next packet will say so.
            if tables.put_forward(out.key(), &value).is_err() {
                return Some(entry);
            }
        }
    }
    Some(entry)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::family::V4;

    fn probes(range: (u16, u16)) -> Probes {
        Probes::new(Flow::<V4>::new(&1, &2, [3, 4], [5, 6], 6).hash(7), range)
    }

    #[test]
    fn probes_stay_in_their_range() {
        for range in [(0, u16::MAX), (1024, 65535), (40000, 40001), (7, 7)] {
            let mut probes = probes(range);
            for _ in 0..1000 {
                let port = probes.next();
                assert!((range.0..=range.1).contains(&port), "{port} in {range:?}");
                assert!(probes.contains(port));
            }
        }
    }

    #[test]
    fn ranges_have_ends() {
        let probes = probes((1024, 2047));
        assert!(!probes.contains(1023) && probes.contains(1024));
        assert!(probes.contains(2047) && !probes.contains(2048));
        assert!(!probes.contains(0) && !probes.contains(u16::MAX));
    }

    #[test]
    fn few_probes_hit_the_same_port() {
        let mut probes = probes((1024, 65535));
        let seen: std::collections::BTreeSet<_> = (0..PROBES).map(|_| probes.next()).collect();
        assert!(seen.len() >= 15);
    }
}
