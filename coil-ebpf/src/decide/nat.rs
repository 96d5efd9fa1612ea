//! Translation of flows: one entry for each direction.
//!
//! The reverse entry owns the port, the forward entry is found by what the client sends; either half
//! can be rebuilt from the other. Here is what every packet needs. What a flow needs once, or once a
//! second, is in [`super::open`].

use coil_common::{
    config::Config,
    values::{STATE_REPLY_RST, STATE_RST},
};

use super::wire;
use crate::{
    family::Family,
    flow::Flow,
    parse::{
        L4,
        l4::{ACK, Kind, SYN},
    },
    tables::{NatTables, Ports},
};

/// Seconds within which the client must have sent something for a RST to be believed.
pub(super) const RST_WINDOW: u32 = 60;

/// A packet from a client has a translation that need not be looked after.
#[inline(always)]
pub(super) fn is_settled<F: Family, T: NatTables<F>>(
    known: Option<T::Entry>,
    l4: &L4,
    now: u32,
    tables: &T,
) -> bool {
    let Some(entry) = known else {
        return false;
    };
    let known = tables.translation(entry);
    // Once a second: is the other half still there?
    known.last_seen == now && known.state & STATE_RST == 0 && !wire::opens(l4)
}

/// Finds the translation of a reply.
#[inline(always)]
pub(super) fn inbound<F: Family, T: NatTables<F>>(flow: &Flow<F>, now: u32, tables: &T) -> Option<T::Entry> {
    let entry = tables.reverse(flow.key())?;
    if tables.translation(entry).last_seen != now {
        tables.mend(flow, now);
    }
    Some(entry)
}

/// What a reply shows, as far as it is believed.
///
/// Anybody can forge a RST, and no sequence numbers are kept. It shortens the life of a flow only if
/// the client has sent something lately, as what a true one answers; and it is forgotten as soon as
/// the same side goes on sending. A client that was reset stays silent, one that was not is answered.
#[inline(always)]
pub(super) fn believed<F: Family, T: NatTables<F>>(
    state: u32,
    flow: &Flow<F>,
    entry: T::Entry,
    now: u32,
    tables: &T,
) -> u32 {
    let known = tables.translation(entry);
    if state & STATE_REPLY_RST == 0 {
        if known.state & STATE_REPLY_RST != 0 {
            tables.retract(entry, STATE_REPLY_RST);
        }
        return state;
    }
    let mut out = flow.reversed();
    out.set_src(&known.addr, known.port);
    let lately = tables
        .forward(out.key())
        .is_some_and(|forward| now.wrapping_sub(tables.translation(forward).last_seen) < RST_WINDOW);
    if lately { state } else { state & !STATE_REPLY_RST }
}

/// A packet from the world that is no reply: whether it is for the gateway itself. On a port of
/// translation it is not: the stack would answer with a RST or an error, and end a connection whose
/// translation is about to be rebuilt.
#[inline(always)]
pub(super) fn is_own<F: Family, T: NatTables<F>, O: Ports<F>>(
    flow: &Flow<F>,
    l4: &L4,
    ports: &O,
    tables: &T,
) -> bool {
    let udp = match l4.kind {
        // Nobody's connection begins with a reply.
        Kind::Tcp if l4.flags & (SYN | ACK) == SYN => return true,
        Kind::Tcp => false,
        Kind::Udp => true,
        Kind::EchoRequest | Kind::EchoReply | Kind::Bare => return true,
    };
    let port = u16::from_be_bytes(flow.dst_port());
    let (first, last) = ports.range(false);
    port < first || port > last || tables.is_excluded(udp, port)
}

/// All ports of the gateway's own address.
pub struct OwnPorts<'a>(pub &'a Config);

impl<F: Family> Ports<F> for OwnPorts<'_> {
    #[inline(always)]
    fn address(&self) -> F::Addr {
        F::of_config(self.0)
    }

    #[inline(always)]
    fn range(&self, identifiers: bool) -> (u16, u16) {
        if identifiers {
            (self.0.nat_id_first, self.0.nat_id_last)
        } else {
            (self.0.nat_port_first, self.0.nat_port_last)
        }
    }
}
