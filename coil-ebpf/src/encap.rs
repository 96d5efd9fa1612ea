//! How packets travel between pod and gateway.
//!
//! Whoever sends first chooses; whoever receives takes either kind, from those who may send it. A gateway
//! answers as it was spoken to, which it notes with each translation: so a cluster changes from one kind to
//! the other node by node, and gateways need not know.

use coil_common::{
    config::{CONFIG_IPIP, Config},
    values::{STATE_DIRECT, STATE_ENCAP, STATE_IPIP},
};

use crate::{
    family::Family,
    packet::{ETHERNET, Packet},
    parse::{Parse, l4},
    tables::NatTables,
};

/// Bytes that a UDP header takes, and IP in IP does without.
const UDP_HEADER: u32 = 8;

/// A kind of tunnel, as the `STATE_*` bits that note it: turning one into the other costs nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Encap(u32);

impl Encap {
    /// IP in UDP.
    pub const FOU: Self = Self(0);
    /// IP in IP.
    pub const IPIP: Self = Self(STATE_IPIP);

    /// None: both pods are on one node.
    pub const DIRECT: Self = Self(STATE_DIRECT);

    /// What the pods of a node use.
    #[inline(always)]
    #[must_use]
    pub const fn of_config(config: &Config) -> Self {
        // A branch on purpose: the kernel knows the configuration and takes it out.
        if config.flags & CONFIG_IPIP != 0 { Self::IPIP } else { Self::FOU }
    }

    /// What a translation has noted.
    #[inline(always)]
    #[must_use]
    pub const fn of_state(state: u32) -> Self {
        Self(state & STATE_ENCAP)
    }

    /// IP in IP, or FOU, by a number that is 1 or 0: without a branch, so that a verifier looks at what
    /// follows once.
    #[inline(always)]
    #[must_use]
    pub(crate) const fn ipip_if(flag: u32) -> Self {
        Self(flag.wrapping_mul(STATE_IPIP))
    }

    /// The bits that note it.
    #[inline(always)]
    #[must_use]
    pub const fn bits(self) -> u32 {
        self.0
    }

    /// It is IP in IP.
    #[inline(always)]
    #[must_use]
    pub const fn is_ipip(self) -> bool {
        self.0 & STATE_IPIP != 0
    }

    /// There is none.
    #[inline(always)]
    #[must_use]
    pub const fn is_direct(self) -> bool {
        self.0 & STATE_DIRECT != 0
    }

    /// The MTU under which FOU has as much room inside as this has under `mtu`: everything that is about
    /// sizes counts with the overhead of FOU. Without a tunnel sizes are those of the one that was used before, so that
    /// a flow can always go on in it.
    #[inline(always)]
    #[must_use]
    pub const fn like_fou(self, mtu: u32) -> u32 {
        mtu.wrapping_add(((self.0 / STATE_IPIP) & 1) * UDP_HEADER)
    }

    /// Bytes that it puts in front of a packet.
    #[inline(always)]
    #[must_use]
    pub const fn overhead<F: Family>(self) -> u32 {
        F::OVERHEAD - ((self.0 / STATE_IPIP) & 1) * UDP_HEADER
    }
}

/// Notes in both halves of a translation by what kind of tunnel its client speaks, where that is news. The packet
/// is one of the client's that is unpacked and translated already: before that there is no room on the stack.
#[inline(always)]
pub fn note<F: Parse, P: Packet, T: NatTables<F>>(packet: &mut P, encap: Encap, tables: &T) {
    let Ok(ip) = F::parse(packet, ETHERNET) else { return };
    let Ok(l4) = l4::parse(packet, &ip) else { return };
    let mut flow = l4.flow(&ip);
    let back = flow.reversed();
    let Some(reverse) = tables.reverse(back.key()) else { return };
    let client = tables.translation(reverse);
    // What must go by a tunnel all the same takes the one that the client has used.
    let encap = if encap.is_direct() { Encap(client.encap.bits() | encap.bits()) } else { encap };
    if client.encap.bits() != encap.bits() {
        tables.set_encap(reverse, encap);
    }
    flow.set_src(&client.addr, client.port);
    if let Some(forward) = tables.forward(flow.key())
        && tables.translation(forward).encap.bits() != encap.bits()
    {
        tables.set_encap(forward, encap);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::family::{V4, V6};

    #[test]
    fn sizes_follow_from_headers() {
        assert_eq!((Encap::FOU.overhead::<V4>(), Encap::FOU.overhead::<V6>()), (28, 48));
        assert_eq!((Encap::IPIP.overhead::<V4>(), Encap::IPIP.overhead::<V6>()), (20, 40));
        for encap in [Encap::FOU, Encap::IPIP] {
            assert_eq!(encap.like_fou(1500) - V4::OVERHEAD, 1500 - encap.overhead::<V4>());
            assert_eq!(Encap::of_state(encap.bits() | 0xffff), encap);
        }
        assert_eq!([0, 1].map(Encap::ipip_if), [Encap::FOU, Encap::IPIP]);
    }
}
