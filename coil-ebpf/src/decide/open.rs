//! New translations, and the care of old ones: what a gateway does once for a flow, or once a second.
//!
//! A port is taken by inserting the reverse entry if there is none, one atomic step. Ports are tried in
//! an order that follows from the flow alone, its own first, so that a flow whose forward half was lost
//! finds its reverse half again. Nobody but the same client ever gets a port that is still held: it may
//! take over one of its own connections to the same remote that both sides have closed, once no other
//! port is free or its share of them is used up.
//!
//! Fails closed: no entry, no packet. Refusals are cheap. A destination without a free port is noted,
//! and for a moment nobody tries again.

use coil_common::{
    config::{CONFIG_PICK_UP, Config},
    stats::{DropReason, GatewayStat},
    usage::{self as layout, PROBES, Share, full_remote, gateway_cells, gateway_total},
    values::{STATE_FIN, STATE_REPLY_FIN, STATE_REPLY_RST, STATE_RST, STATE_SYN},
};

use super::{nat::OwnPorts, wire};
use crate::{
    family::Family,
    flow::Flow,
    parse::{
        L4,
        l4::{Kind, RST, SYN},
    },
    tables::{Full, NatTables, Ports, ReserveError},
    usage,
};

/// No reason.
pub const NONE: u32 = u32::MAX;
/// Ports that are tried where only one of the client's own closed connections will do.
const REUSE_PROBES: u32 = PROBES / 2;
/// Seconds for which a destination without a free port is left alone; the current one counts.
const FULL: u32 = 2;
/// Searches in vain, one after the other, after which it is.
pub const VAIN: u64 = 8;
/// Seconds of silence after which a closed connection may be replaced by the same client.
const QUIET: u32 = 2;

/// What a packet from a client is to a translation, as a number: see [`Shape::of`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape(pub u32);

impl Shape {
    /// May make a translation.
    const MAY_OPEN: u32 = 1 << 8;
    /// A SYN that opens a connection.
    const SYN: u32 = 1 << 9;
    /// Has no ports.
    const BARE: u32 = 1 << 10;
    /// Has an identifier in place of ports.
    const IDENTIFIER: u32 = 1 << 11;
    /// A RST.
    const RST: u32 = 1 << 12;
    /// ICMP that nobody has asked for.
    const ANSWER: u32 = 1 << 13;

    /// Of a packet.
    #[inline(always)]
    #[must_use]
    pub const fn of(l4: &L4, protocol: u8, config: &Config) -> Self {
        let bits = match l4.kind {
            Kind::Tcp if l4.flags & RST != 0 => Self::RST,
            Kind::Tcp if wire::opens(l4) => Self::MAY_OPEN | Self::SYN,
            Kind::Tcp if l4.flags & SYN == 0 && config.flags & CONFIG_PICK_UP != 0 => Self::MAY_OPEN,
            Kind::Tcp => 0,
            Kind::Udp => Self::MAY_OPEN,
            Kind::EchoRequest => Self::MAY_OPEN | Self::IDENTIFIER,
            Kind::EchoReply => Self::IDENTIFIER | Self::ANSWER,
            Kind::Bare => Self::MAY_OPEN | Self::BARE,
        };
        Self(bits | protocol as u32)
    }

    #[inline(always)]
    const fn has(self, bit: u32) -> bool {
        self.0 & bit != 0
    }

    #[inline(always)]
    const fn protocol(self) -> u8 {
        (self.0 & 0xff) as u8
    }
}

/// Keys and values that are written over and over. They are handed in, since programs keep them where
/// they do not count as stack.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Work<F: Family> {
    /// The flow as it was seen.
    pub flow: Flow<F>,
    /// The flow of the other half.
    pub other: Flow<F>,
    /// A value.
    pub value: F::Nat,
    /// Ports to try.
    probes: Probes,
    /// The one to try next, or the one that was found.
    port: u32,
    /// One that may be taken over, or more than there is.
    spare: u32,
}

impl<F: Family> Work<F> {
    /// For a flow.
    #[inline(always)]
    #[must_use]
    pub fn new(flow: &Flow<F>) -> Self {
        let value = F::translation(&flow.src(), flow.src_port(), 0, 0);
        let probes = Probes::new(0, (0, 0));
        Self { flow: *flow, other: *flow, value, probes, port: 0, spare: u32::MAX }
    }
}

/// A sequence of ports that jumps about in a range by an odd stride: free ports are rare right after
/// those that flows kept, and an odd stride comes by every port of a range.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct Probes {
    at: u32,
    stride: u32,
    mask: u32,
    size: u32,
    first: u32,
}

impl Probes {
    #[inline(always)]
    const fn new(hash: u64, (first, last): (u16, u16)) -> Self {
        let most = last.wrapping_sub(first) as u32;
        let mut mask = most | (most >> 1);
        mask |= mask >> 2;
        mask |= mask >> 4;
        mask |= mask >> 8;
        let at = (hash as u32) & mask;
        let stride = ((hash >> 32) as u32 | 1) & mask;
        Self { at, stride, mask, size: most + 1, first: first as u32 }
    }

    #[inline(always)]
    const fn contains(&self, port: u16) -> bool {
        ((port as u32).wrapping_sub(self.first) & 0xffff) < self.size
    }

    #[inline(always)]
    const fn next(&mut self) -> u16 {
        self.at = (self.at + self.stride) & self.mask;
        // Beyond the end of a range that is no power of two, half as far is inside.
        let step = if self.at < self.size { self.at } else { self.at & (self.mask >> 1) };
        ((self.first + step) & 0xffff) as u16
    }
}

/// What a client and its destination use, and where that is counted.
struct Uses {
    client: [u32; 2],
    pair: [u32; 2],
    total: u32,
    remote: u64,
}

impl Uses {
    #[inline(always)]
    fn of<F: Family>(flow: &Flow<F>, protocol: u8, seed: u32) -> Self {
        let [client, remote, pair] = usage::of_flow::<F>(seed, flow, protocol);
        Self {
            client: gateway_cells(F::INDEX, Share::Client, client),
            pair: gateway_cells(F::INDEX, Share::Remote, pair),
            total: gateway_total(F::INDEX),
            remote,
        }
    }

    /// Searches in vain that are noted of the remote, in the time that is not over yet.
    #[inline(always)]
    fn vain<F: Family, T: NatTables<F>>(&self, now: u32, tables: &T) -> u64 {
        let noted = tables.full_remote(full_remote(F::INDEX, self.remote));
        let fresh = noted >> 40 == self.remote >> 40 && (noted & 0xffff_ffff) > u64::from(now);
        if fresh { noted >> 32 & 0xff } else { 0 }
    }

    /// Notes a search in vain. A single one may be bad luck.
    #[inline(always)]
    fn note_vain<F: Family, T: NatTables<F>>(&self, now: u32, tables: &T) {
        let times = self.vain(now, tables) + 1;
        let until = u64::from(now.wrapping_add(FULL));
        let note = (self.remote >> 40 << 40) | ((times & 0xff) << 32) | until;
        tables.set_full_remote(full_remote(F::INDEX, self.remote), note);
    }

    /// Notes that a port was free after all.
    #[inline(always)]
    fn note_found<F: Family, T: NatTables<F>>(&self, now: u32, tables: &T) {
        if self.vain(now, tables) != 0 {
            tables.set_full_remote(full_remote(F::INDEX, self.remote), 0);
        }
    }

    /// Why there may be no new flow.
    #[inline(always)]
    fn refusal<F: Family, T: NatTables<F>>(
        &self,
        now: u32,
        config: &Config,
        tables: &T,
    ) -> Option<DropReason> {
        let over = |cell: u32, limit: u32| limit != 0 && tables.usage(cell) >= i64::from(limit);
        if over(self.total, config.nat_admit) {
            return Some(DropReason::NatAdmission);
        }
        let [a, b] = self.client;
        if over(a, config.nat_client_flows) && over(b, config.nat_client_flows) {
            return Some(DropReason::ClientFlowQuota);
        }
        let [a, b] = self.pair;
        if over(a, config.nat_client_ports) && over(b, config.nat_client_ports) {
            return Some(DropReason::ClientPortQuota);
        }
        if self.vain(now, tables) >= VAIN {
            return Some(DropReason::DestinationFull);
        }
        None
    }

    #[inline(always)]
    fn add<F: Family, T: NatTables<F>>(&self, tables: &T) {
        for cell in [self.total, self.client[0], self.client[1], self.pair[0], self.pair[1]] {
            tables.use_more(cell);
        }
    }
}

/// Looks after the translation of `work.flow`, which comes from a client, or makes it.
///
/// Its steps are methods of the tables, so that a kernel program can keep each in a function of its own:
/// in one piece the verifier would walk through each step once for each way through those before it. What
/// is decided on the way is hidden in numbers for the same reason.
///
/// # Errors
///
/// The index of the reason why there is none.
#[inline(always)]
pub fn attend<F: Family, T: NatTables<F>>(
    work: &mut Work<F>,
    shape: Shape,
    config: &Config,
    tables: &T,
) -> Result<(), u32> {
    let half = tables.look_after(work, shape, config);
    if half == HALF_GOOD {
        return Ok(());
    }
    if half >= HALF_ERROR {
        return Err(half - HALF_ERROR);
    }
    if shape.has(Shape::ANSWER) {
        return Err(DropReason::UnsupportedIcmp.index());
    }
    let shape = Shape(shape.0 | ((half & HALF_LOST) * Shape::MAY_OPEN));
    let refusal = if shape.has(Shape::MAY_OPEN) {
        tables.refusal(work, shape, config)
    } else {
        DropReason::NoState.index()
    };
    let found = tables.search(work, shape, refusal, config);
    match found >> 24 {
        SEARCH_FOUND | SEARCH_OURS => match tables.settle(work, shape, found, config) {
            0 => Ok(()),
            error => Err(error - 1),
        },
        SEARCH_SPARE => match tables.take_over(work, (found & 0xffff) as u16, config) {
            TAKEN_OVER => Ok(()),
            NOT_TAKEN_OVER => Err(tables.in_vain(work, shape, refusal, config)),
            error => Err(error - TAKEN_ERROR),
        },
        SEARCH_FAILED => Err(tables.in_vain(work, shape, refusal, config)),
        error => Err(error - SEARCH_ERROR),
    }
}

/// The index of the reason why nothing came of a search; `refusal` if there was one before.
#[inline(always)]
pub fn in_vain<F: Family, T: NatTables<F>>(
    work: &Work<F>,
    shape: Shape,
    refusal: u32,
    config: &Config,
    tables: &T,
) -> u32 {
    if refusal != NONE {
        return refusal;
    }
    if shape.has(Shape::BARE) {
        return DropReason::AddressBusy.index();
    }
    Uses::of(&work.flow, shape.protocol(), config.seed).note_vain(tables.now(), tables);
    tables.count_probes(layout::PROBES + 1);
    DropReason::PortsExhausted.index()
}

/// The index of the reason why there may be no new flow, or [`NONE`].
#[inline(always)]
pub fn refusal<F: Family, T: NatTables<F>>(work: &Work<F>, shape: Shape, config: &Config, tables: &T) -> u32 {
    let uses = Uses::of(&work.flow, shape.protocol(), config.seed);
    uses.refusal(tables.now(), config, tables).map_or(NONE, DropReason::index)
}

/// How many ports are tried, and whether one may be reserved.
#[inline(always)]
const fn bounds(shape: Shape, refusal: u32) -> (u32, bool) {
    let quota = refusal == DropReason::ClientPortQuota.index();
    let most = if shape.has(Shape::BARE) {
        1
    } else if refusal == NONE || refusal == DropReason::NoState.index() {
        PROBES
    } else if shape.has(Shape::SYN) && quota {
        REUSE_PROBES
    } else {
        1
    };
    (most, refusal == NONE)
}

/// A new connection may take the port of one that the same client has closed.
#[inline(always)]
const fn may_reuse(shape: Shape, refusal: u32) -> bool {
    shape.has(Shape::SYN) && (refusal == NONE || refusal == DropReason::ClientPortQuota.index())
}

#[inline(always)]
fn count_new<F: Family, T: NatTables<F>>(tables: &T) {
    let stat = if F::INDEX == 0 { GatewayStat::NewFlowV4 } else { GatewayStat::NewFlowV6 };
    tables.count_gateway(stat, 1, 0);
}

/// A new flow was refused for the reason with this index: it is not that a packet belongs to none.
#[inline(always)]
#[must_use]
pub const fn is_refusal(reason: u32) -> bool {
    reason != DropReason::NoState.index() && reason != DropReason::UnsupportedIcmp.index()
}

/// A result as a number, for a function that can return nothing else.
#[inline(always)]
#[must_use]
pub const fn code(result: Result<(), u32>) -> u32 {
    match result {
        Ok(()) => 0,
        Err(reason) => reason + 1,
    }
}

/// There is all of a translation.
const HALF_GOOD: u32 = 0;
/// There is a forward half, whose port another flow has got.
const HALF_LOST: u32 = 1;
/// There is no forward half.
const HALF_NONE: u32 = 2;
/// There is no way to mend it: plus the index of the reason.
pub const HALF_ERROR: u32 = 4;

/// Looks at what there is: mends the reverse half, starts over with a new connection, takes back a RST
/// that the client has belied. One of the `HALF_*`.
#[inline(always)]
pub fn look_after<F: Family, T: NatTables<F>>(work: &mut Work<F>, shape: Shape, tables: &T) -> u32 {
    let now = tables.now();
    work.other = work.flow.reversed();
    let Some(entry) = tables.forward(work.flow.key()) else {
        return HALF_NONE;
    };
    let known = tables.translation(entry);
    work.other.set_dst(&known.addr, known.port);
    if known.state & STATE_RST != 0 && !shape.has(Shape::RST) {
        tables.retract(entry, STATE_RST);
    }
    let Some(reverse) = tables.reverse(work.other.key()) else {
        work.value = F::translation(&work.flow.src(), work.flow.src_port(), 0, now);
        return match tables.reserve(work.other.key(), &work.value) {
            Ok(()) => HALF_GOOD,
            Err(ReserveError::Taken) if is_ours(work, tables) => HALF_GOOD,
            Err(ReserveError::Taken) => HALF_LOST,
            Err(ReserveError::Full) => HALF_ERROR + DropReason::NatTableFull.index(),
        };
    };
    let owner = tables.translation(reverse);
    if !is_same(&owner.addr, owner.port, &work.flow) {
        return HALF_LOST;
    }
    if shape.has(Shape::SYN) && known.state & !STATE_SYN != 0 {
        tables.restart(entry);
        tables.restart(reverse);
    }
    HALF_GOOD
}

/// The flow is from this address and port.
#[inline(always)]
fn is_same<F: Family>(addr: &F::Addr, port: [u8; 2], flow: &Flow<F>) -> bool {
    F::same(addr, &flow.src()) && u16::from_ne_bytes(port) == u16::from_ne_bytes(flow.src_port())
}

/// The port that was just found taken is the flow's: another packet of it was faster, on another processor.
#[inline(always)]
fn is_ours<F: Family, T: NatTables<F>>(work: &Work<F>, tables: &T) -> bool {
    tables.reverse(work.other.key()).is_some_and(|entry| {
        let owner = tables.translation(entry);
        is_same(&owner.addr, owner.port, &work.flow)
    })
}

/// This port is reserved for the flow.
const SEARCH_FOUND: u32 = 0;
/// This port is the flow's already.
const SEARCH_OURS: u32 = 4;
/// No port was free, but the client may have closed the connection that has this one.
const SEARCH_SPARE: u32 = 1;
/// No port was free.
const SEARCH_FAILED: u32 = 2;
/// Something else was in the way: plus the index of the reason.
pub const SEARCH_ERROR: u32 = 8;

/// Tries ports: one of the `SEARCH_*`, and below that the number of tries, in 8 bits, and a port, in 16.
#[inline(always)]
pub fn search<F: Family, T: NatTables<F>>(
    work: &mut Work<F>,
    shape: Shape,
    refusal: u32,
    config: &Config,
    tables: &T,
) -> u32 {
    let now = tables.now();
    let ports = OwnPorts(config);
    let bare = shape.has(Shape::BARE);
    let (most, may_reserve) = bounds(shape, refusal);
    let range = if bare { (0, 0) } else { Ports::<F>::range(&ports, shape.has(Shape::IDENTIFIER)) };
    let addr = Ports::<F>::address(&ports);
    let port = work.flow.src_port();
    work.other = work.flow.reversed();
    work.other.set_dst(&addr, port);
    let range = (core::hint::black_box(range.0), core::hint::black_box(range.1));
    let mut probes = Probes::new(work.flow.hash(config.seed).bits64(), range);
    let mut port = u16::from_be_bytes(port);
    if !probes.contains(port) {
        port = probes.next();
    }
    work.value = F::translation(&work.flow.src(), work.flow.src_port(), 0, now);
    let how = (u32::from(may_reserve) * How::RESERVE)
        | (u32::from(shape.protocol() == crate::head::UDP) * How::UDP)
        | (u32::from(shape.has(Shape::IDENTIFIER | Shape::BARE)) * How::ANY);
    work.probes = probes;
    work.port = u32::from(port);
    work.spare = u32::MAX;
    // What the verifier thinks it knows it walks through all rounds for; so most of it is not here.
    let most = core::hint::black_box(most);
    let mut result = PROBE_TAKEN;
    let mut tries = 0;
    while tries < PROBES {
        if tries >= most {
            break;
        }
        tries += 1;
        result = tables.probe(work, How(how));
        if result != PROBE_TAKEN {
            break;
        }
    }
    let (port, spare) = (work.port, work.spare);
    let found = (tries << 16) | (port & 0xffff);
    match result {
        PROBE_RESERVED => found | (SEARCH_FOUND << 24),
        PROBE_OURS => found | (SEARCH_OURS << 24),
        PROBE_FULL => (SEARCH_ERROR + DropReason::NatTableFull.index()) << 24,
        _ if spare == u32::MAX || !may_reuse(shape, refusal) => SEARCH_FAILED << 24,
        _ => (SEARCH_SPARE << 24) | (spare & 0xffff),
    }
}

/// Makes the translation with the port that [`search`] has found: 0, or the index of the reason why there
/// is none, and one.
#[inline(always)]
pub fn settle<F: Family, T: NatTables<F>>(
    work: &mut Work<F>,
    shape: Shape,
    found: u32,
    config: &Config,
    tables: &T,
) -> u32 {
    const FULL: u32 = DropReason::NatTableFull.index() + 1;
    let now = tables.now();
    let port = ((found & 0xffff) as u16).to_be_bytes();
    work.value = F::translation(&F::of_config(config), port, 0, now);
    let ours = found >> 24 == SEARCH_OURS;
    let put = if ours {
        // The count knows the flow already, and whoever listens.
        tables.restore_forward(work.flow.key(), &work.value)
    } else {
        tables.add_forward(work.flow.key(), &work.value)
    };
    let put = match put {
        Ok(()) => Ok(()),
        Err(ReserveError::Full) => Err(Full),
        // Another packet of the flow was faster, on another processor, unless this is one whose port somebody else has.
        Err(ReserveError::Taken) => match tables.forward(work.flow.key()) {
            Some(entry) if u16::from_ne_bytes(tables.translation(entry).port) == u16::from_ne_bytes(port) => {
                Ok(())
            }
            _ => tables.put_forward(work.flow.key(), &work.value),
        },
    };
    if ours {
        // The forward half was lost, or is about to be there.
        if shape.has(Shape::SYN)
            && let Some(entry) = tables.reverse(work.other.key())
        {
            tables.restart(entry);
        }
        return if put.is_ok() { 0 } else { FULL };
    }
    if put.is_err() {
        tables.release(work.other.key());
        return FULL;
    }
    let uses = Uses::of(&work.flow, shape.protocol(), config.seed);
    uses.add(tables);
    uses.note_found(now, tables);
    tables.count_probes((found >> 16) & 0xff);
    count_new(tables);
    0
}

/// How a port is tried, as a number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct How(pub u32);

impl How {
    /// It is reserved if it is free.
    const RESERVE: u32 = 1 << 16;
    /// For UDP.
    const UDP: u32 = 1 << 17;
    /// None is excluded.
    const ANY: u32 = 1 << 18;

    #[inline(always)]
    const fn has(self, bit: u32) -> bool {
        self.0 & bit != 0
    }
}

/// A port is not to be had.
pub const PROBE_TAKEN: u32 = 0;
/// The flow has it already.
pub const PROBE_OURS: u32 = 1;
/// It is reserved now.
pub const PROBE_RESERVED: u32 = 2;
/// It is not, since the table is full.
pub const PROBE_FULL: u32 = 3;
/// The same client has it, for a connection that the remote has closed.
pub const PROBE_SPARE: u32 = 4;

/// Tries the next port: one of the `PROBE_*`. If it is the flow's `work.other` has it.
#[inline(always)]
pub fn probe<F: Family, T: NatTables<F>>(work: &mut Work<F>, how: How, tables: &T) -> u32 {
    let port = (work.port & 0xffff) as u16;
    let result = try_port(work, port, how, tables);
    if result == PROBE_SPARE {
        work.spare = u32::from(port);
    }
    if result == PROBE_SPARE || result == PROBE_TAKEN {
        work.port = u32::from(work.probes.next());
        return PROBE_TAKEN;
    }
    result
}

#[inline(always)]
fn try_port<F: Family, T: NatTables<F>>(work: &mut Work<F>, port: u16, how: How, tables: &T) -> u32 {
    if !how.has(How::ANY) && tables.is_excluded(how.has(How::UDP), port) {
        return PROBE_TAKEN;
    }
    work.other.set_dst_port(port.to_be_bytes());
    if let Some(entry) = tables.reverse(work.other.key()) {
        let owner = tables.translation(entry);
        if !F::same(&owner.addr, &work.flow.src()) {
            return PROBE_TAKEN;
        }
        if u16::from_ne_bytes(owner.port) == u16::from_ne_bytes(work.flow.src_port()) {
            return PROBE_OURS;
        }
        return if owner.state & (STATE_REPLY_FIN | STATE_REPLY_RST) != 0 {
            PROBE_SPARE
        } else {
            PROBE_TAKEN
        };
    }
    if !how.has(How::RESERVE) {
        return PROBE_TAKEN;
    }
    match tables.reserve(work.other.key(), &work.value) {
        Ok(()) => PROBE_RESERVED,
        Err(ReserveError::Taken) if is_ours(work, tables) => PROBE_OURS,
        Err(ReserveError::Taken) => PROBE_TAKEN,
        Err(ReserveError::Full) => PROBE_FULL,
    }
}

/// The flow has the port now.
const TAKEN_OVER: u32 = 0;
/// It cannot have it.
const NOT_TAKEN_OVER: u32 = 1;
/// It should have it: plus the index of the reason why not.
pub const TAKEN_ERROR: u32 = 2;

/// Gives the port of a connection that the same client has closed to a new one, unless it is not
/// closed, or somebody was faster: one of the `TAKEN_*`.
#[inline(always)]
pub fn take_over<F: Family, T: NatTables<F>>(
    work: &mut Work<F>,
    port: u16,
    config: &Config,
    tables: &T,
) -> u32 {
    let now = tables.now();
    work.other.set_dst_port(port.to_be_bytes());
    let Some(reverse) = tables.reverse(work.other.key()) else {
        return NOT_TAKEN_OVER;
    };
    let owner = tables.translation(reverse);
    let (src, src_port) = (work.flow.src(), work.flow.src_port());
    if !F::same(&owner.addr, &src) || now.wrapping_sub(owner.last_seen) < QUIET {
        return NOT_TAKEN_OVER;
    }
    work.flow.set_src(&src, owner.port);
    let mut state = owner.state;
    let mut quiet = true;
    if let Some(entry) = tables.forward(work.flow.key()) {
        let forward = tables.translation(entry);
        state |= forward.state;
        quiet = now.wrapping_sub(forward.last_seen) >= QUIET;
    } else {
        state |= STATE_FIN;
    }
    let fin = state & (STATE_FIN | STATE_REPLY_FIN) == STATE_FIN | STATE_REPLY_FIN;
    let closed = quiet && (fin || state & (STATE_RST | STATE_REPLY_RST) != 0);
    if closed {
        tables.remove_forward(work.flow.key());
        // The entry never leaves the table, so that nobody else can get the port.
        tables.reown(reverse, src_port, now);
    }
    work.flow.set_src(&src, src_port);
    if !closed {
        return NOT_TAKEN_OVER;
    }
    work.value = F::translation(&F::of_config(config), port.to_be_bytes(), 0, now);
    if tables.put_forward(work.flow.key(), &work.value).is_err() {
        return TAKEN_ERROR + DropReason::NatTableFull.index();
    }
    tables.count_probes(PROBES);
    count_new(tables);
    TAKEN_OVER
}

/// Rebuilds the forward half of the reply `work.flow` if it is gone.
#[inline(always)]
pub fn mend<F: Family, T: NatTables<F>>(work: &mut Work<F>, now: u32, tables: &T) {
    let Some(entry) = tables.reverse(work.flow.key()) else {
        return;
    };
    let known = tables.translation(entry);
    work.other = work.flow.reversed();
    work.other.set_src(&known.addr, known.port);
    if tables.forward(work.other.key()).is_none() {
        work.value = F::translation(&work.flow.dst(), work.flow.dst_port(), 0, now);
        // Without room the client's next packet will say so.
        if tables.restore_forward(work.other.key(), &work.value).is_err() {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn probes(hash: u64, range: (u16, u16)) -> Probes {
        Probes::new(hash.wrapping_mul(0x9e37_79b9_7f4a_7c15), range)
    }

    #[test]
    fn probes_stay_in_their_range() {
        for range in [(0, u16::MAX), (1024, 65535), (40000, 40001), (40000, 40002), (7, 7)] {
            for hash in 0..100 {
                let mut probes = probes(hash, range);
                for _ in 0..1000 {
                    let port = probes.next();
                    assert!((range.0..=range.1).contains(&port), "{port} in {range:?}");
                    assert!(probes.contains(port));
                }
            }
        }
    }

    #[test]
    fn ranges_have_ends() {
        let probes = probes(1, (1024, 2047));
        assert!(!probes.contains(1023) && probes.contains(1024));
        assert!(probes.contains(2047) && !probes.contains(2048));
        assert!(!probes.contains(0) && !probes.contains(u16::MAX));
    }

    #[test]
    fn an_odd_stride_comes_by_every_port() {
        for range in [(0, u16::MAX), (1024, 64511), (40000, 40002), (1, 31), (5, 5)] {
            let mut probes = probes(3, range);
            let seen: std::collections::BTreeSet<_> = (0..1 << 16).map(|_| probes.next()).collect();
            assert_eq!(seen.len(), usize::from(range.1 - range.0) + 1, "{range:?}");
        }
    }

    #[test]
    fn few_probes_hit_the_same_port() {
        for hash in 0..100 {
            let mut probes = probes(hash, (1024, 64511));
            let seen: std::collections::BTreeSet<_> = (0..PROBES).map(|_| probes.next()).collect();
            assert!(seen.len() >= 24, "{}", seen.len());
        }
    }
}
