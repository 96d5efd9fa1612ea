//! The identity of a flow and its hash.

use crate::family::{Family, mix};

/// A flow as one direction sees it: the sender first. For ICMP echo the identifier stands in the
/// port of the side that asked, as [`coil_common::keys::FlowKey4`] says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flow<F: Family> {
    /// Source address.
    pub src: F::Addr,
    /// Destination address.
    pub dst: F::Addr,
    /// Source port.
    pub src_port: [u8; 2],
    /// Destination port.
    pub dst_port: [u8; 2],
    /// IP protocol number.
    pub protocol: u8,
}

impl<F: Family> Flow<F> {
    /// The key of tables.
    #[inline(always)]
    #[must_use]
    pub fn key(&self) -> F::Key {
        F::key(&self.src, &self.dst, self.src_port, self.dst_port, self.protocol)
    }

    /// The flow of the opposite direction.
    #[inline(always)]
    #[must_use]
    pub fn reversed(&self) -> Self {
        Self {
            src: self.dst,
            dst: self.src,
            src_port: self.dst_port,
            dst_port: self.src_port,
            protocol: self.protocol,
        }
    }

    /// A hash of the whole flow.
    #[inline(always)]
    #[must_use]
    pub fn hash(&self, seed: u32) -> Hash {
        let [a, b] = self.src_port;
        let [c, d] = self.dst_port;
        let hash = F::mix(F::mix(u64::from(seed), &self.src), &self.dst);
        let hash = mix(hash, u32::from_ne_bytes([a, b, c, d]));
        Hash(mix(hash, u32::from(self.protocol)))
    }
}

/// A hash of which all bits are good.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hash(u64);

impl Hash {
    /// A hash of a client alone. It uses no seed, so that a client keeps its gateway when the
    /// programs are loaded anew.
    #[inline(always)]
    #[must_use]
    pub fn of_client<F: Family>(addr: &F::Addr) -> Self {
        Self(mix(F::mix(0, addr), 0))
    }

    /// Some 16 bits of it.
    #[inline(always)]
    #[must_use]
    pub const fn bits16(self) -> u16 {
        (self.0 & 0xffff) as u16
    }

    /// A number below `bound`, evenly spread: a multiplication instead of a division, whose bounds
    /// the verifier also understands.
    #[inline(always)]
    #[must_use]
    pub const fn below(self, bound: u16) -> u16 {
        (((self.0 & 0xffff_ffff) * bound as u64) >> 32) as u16
    }

    /// Another number below `bound`, from other bits.
    #[inline(always)]
    #[must_use]
    pub const fn below_again(self, bound: u16) -> u16 {
        (((self.0 >> 32) * bound as u64) >> 32) as u16
    }
}

/// Fewest source port of tunnelled packets that follow their flow.
pub const AUTO_PORT_FIRST: u16 = 32768;
/// Number of source ports of tunnelled packets that follow their flow.
pub const AUTO_PORTS: u16 = 28232;
