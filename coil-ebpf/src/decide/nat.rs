//! Translation of flows: one entry for each direction.
//!
//! The reverse entry owns the port: it is inserted first, and only if there is none, which is the
//! one step that decides between two flows that want the same port. The forward entry is found by
//! what the client sends. Either half can be rebuilt from the other.

use coil_common::{stats::DropReason, values::STATE_SYN};

use super::wire;
use crate::{
    family::Family,
    flow::Flow,
    parse::{L4, l4::Kind},
    tables::{NatTables, Ports, ReserveError},
};

/// Ports that are tried for a new flow after its own.
const PROBES: u16 = 16;

/// An entry and what it says.
pub(super) struct Found<F: Family, E> {
    pub(super) entry: E,
    pub(super) addr: F::Addr,
    pub(super) port: [u8; 2],
    pub(super) new: bool,
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
) -> Result<Found<F, T::Entry>, DropReason> {
    let key = flow.key();
    let mut lost = false;
    if let Some(entry) = tables.forward(&key) {
        let known = tables.translation(entry);
        let opens = wire::opens(l4);
        if opens || known.last_seen != now {
            // Once a second at most: is the other half still there?
            let back = translated(flow, &known.addr, known.port).reversed().key();
            if let Some(reverse) = tables.reverse(&back) {
                if opens && known.state & !STATE_SYN != 0 {
                    tables.restart(entry);
                    tables.restart(reverse);
                }
            } else {
                let value = F::translation(&flow.src, flow.src_port, 0, now);
                match tables.reserve(&back, &value) {
                    Ok(()) => {}
                    // Another flow has the port by now: start over with another one.
                    Err(ReserveError::Taken) => lost = true,
                    Err(ReserveError::Full) => return Err(DropReason::NatTableFull),
                }
            }
        }
        if !lost {
            return Ok(Found { entry, addr: known.addr, port: known.port, new: false });
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
    create(flow, &key, l4, ports, seed, now, tables)
}

/// The flow as it leaves.
#[inline(always)]
fn translated<F: Family>(flow: &Flow<F>, addr: &F::Addr, port: [u8; 2]) -> Flow<F> {
    Flow { src: *addr, src_port: port, ..*flow }
}

/// Reserves a port and makes both entries.
#[inline(always)]
fn create<F: Family, T: NatTables<F>, O: Ports<F>>(
    flow: &Flow<F>,
    key: &F::Key,
    l4: &L4,
    ports: &O,
    seed: u32,
    now: u32,
    tables: &T,
) -> Result<Found<F, T::Entry>, DropReason> {
    let addr = ports.address();
    let (first, last) = ports.range();
    let size = last.saturating_sub(first).saturating_add(1);
    let hash = flow.hash(seed);
    let mut value = F::translation(&flow.src, flow.src_port, 0, now);

    let mut candidate = u16::from_be_bytes(flow.src_port);
    let mut usable = candidate >= first && candidate <= last;
    let mut step = hash.below(size);
    let stride = hash.below_again(size) | 1;
    let mut back = translated(flow, &addr, flow.src_port).reversed().key();
    let mut reserved = false;
    for _ in 0..=PROBES {
        if usable && !ports.is_excluded(candidate) {
            F::set_dst_port(&mut back, candidate.to_be_bytes());
            match tables.reserve(&back, &value) {
                Ok(()) => {
                    reserved = true;
                    break;
                }
                Err(ReserveError::Taken) => {}
                Err(ReserveError::Full) => return Err(DropReason::NatTableFull),
            }
        }
        candidate = first.wrapping_add(step);
        usable = true;
        // Not by one: free ports are rare right after those that flows kept.
        let (next, over) = step.overflowing_add(stride);
        step = if over || next >= size { next.wrapping_sub(size) } else { next };
    }
    if !reserved {
        return Err(DropReason::PortsExhausted);
    }
    let port = candidate.to_be_bytes();
    value = F::translation(&addr, port, wire::shows(l4, false, &wire::INITIATOR), now);
    if tables.put_forward(key, &value).is_err() {
        tables.release(&back);
        return Err(DropReason::NatTableFull);
    }
    match tables.forward(key) {
        Some(entry) => Ok(Found { entry, addr, port, new: true }),
        // Removed under our hands; the next packet finds or makes it.
        None => Err(DropReason::NoState),
    }
}

/// Finds the translation of a reply, and rebuilds the forward half if it is gone.
#[inline(always)]
pub(super) fn inbound<F: Family, T: NatTables<F>>(
    flow: &Flow<F>,
    now: u32,
    tables: &T,
) -> Option<Found<F, T::Entry>> {
    let entry = tables.reverse(&flow.key())?;
    let known = tables.translation(entry);
    if known.last_seen != now {
        let out = Flow { src: known.addr, src_port: known.port, ..flow.reversed() };
        let key = out.key();
        if tables.forward(&key).is_none() {
            let value = F::translation(&flow.dst, flow.dst_port, 0, now);
            // Without room the client's next packet will say so.
            if tables.put_forward(&key, &value).is_err() {
                return Some(Found { entry, addr: known.addr, port: known.port, new: false });
            }
        }
    }
    Some(Found { entry, addr: known.addr, port: known.port, new: false })
}
