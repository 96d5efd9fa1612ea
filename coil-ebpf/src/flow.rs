//! The identity of a flow and its hash.

use crate::family::{Family, mix};

/// A flow as one direction sees it: the sender first. For ICMP echo the identifier stands in the
/// port of the side that asked, as [`coil_common::keys::FlowKey4`] says.
///
/// It is nothing but the key of tables in words: kernel programs have no room for both.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flow<F: Family> {
    key: F::KeyWords,
}

impl<F: Family> Flow<F> {
    /// A flow from its parts.
    #[inline(always)]
    #[must_use]
    pub fn new(src: &F::Addr, dst: &F::Addr, src_port: [u8; 2], dst_port: [u8; 2], protocol: u8) -> Self {
        Self { key: F::key(src, dst, src_port, dst_port, protocol) }
    }

    /// A flow whose ports are in one word, as in a packet.
    #[inline(always)]
    #[must_use]
    pub fn of_words(src: &F::Addr, dst: &F::Addr, ports: u32, protocol: u8) -> Self {
        Self { key: F::key_of_words(src, dst, ports, protocol) }
    }

    /// The key of tables.
    #[inline(always)]
    #[must_use]
    pub const fn key(&self) -> &F::KeyWords {
        &self.key
    }

    /// Source address.
    #[inline(always)]
    #[must_use]
    pub fn src(&self) -> F::Addr {
        F::key_src(&self.key)
    }

    /// Destination address.
    #[inline(always)]
    #[must_use]
    pub fn dst(&self) -> F::Addr {
        F::key_dst(&self.key)
    }

    /// Source port.
    #[inline(always)]
    #[must_use]
    pub fn src_port(&self) -> [u8; 2] {
        F::key_ports(&self.key).0
    }

    /// Destination port.
    #[inline(always)]
    #[must_use]
    pub fn dst_port(&self) -> [u8; 2] {
        F::key_ports(&self.key).1
    }

    /// The flow of the opposite direction.
    #[inline(always)]
    #[must_use]
    pub fn reversed(&self) -> Self {
        let (src_port, dst_port) = F::key_ports(&self.key);
        let mut reversed = *self;
        F::set_dst(&mut reversed.key, &self.src(), dst_port, src_port);
        F::set_src(&mut reversed.key, &self.dst(), dst_port, src_port);
        reversed
    }

    /// Gives it another source.
    #[inline(always)]
    pub fn set_src(&mut self, src: &F::Addr, port: [u8; 2]) {
        let dst_port = self.dst_port();
        F::set_src(&mut self.key, src, port, dst_port);
    }

    /// Gives it another destination.
    #[inline(always)]
    pub fn set_dst(&mut self, dst: &F::Addr, port: [u8; 2]) {
        let src_port = self.src_port();
        F::set_dst(&mut self.key, dst, src_port, port);
    }

    /// Gives it another destination port.
    #[inline(always)]
    pub fn set_dst_port(&mut self, port: [u8; 2]) {
        let src_port = self.src_port();
        F::set_ports(&mut self.key, src_port, port);
    }

    /// A hash of the whole flow.
    #[inline(always)]
    #[must_use]
    pub fn hash(&self, seed: u32) -> Hash {
        Hash(F::hash(u64::from(seed), &self.key))
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

    /// All of it.
    #[inline(always)]
    #[must_use]
    pub const fn bits64(self) -> u64 {
        self.0
    }
}

/// Fewest source port of tunnelled packets that follow their flow.
pub const AUTO_PORT_FIRST: u16 = 32768;
/// Number of source ports of tunnelled packets that follow their flow.
pub const AUTO_PORTS: u16 = 28232;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::family::V4;

    fn flow(port: u16) -> Flow<V4> {
        Flow::new(&0x0200_010a, &0x0202_00c0, port.to_be_bytes(), [1, 187], 6)
    }

    #[test]
    fn words_are_what_bytes_are() {
        let ports = u32::from_ne_bytes([0x9c, 0x40, 1, 187]);
        assert_eq!(Flow::of_words(&0x0200_010a, &0x0202_00c0, ports, 6), flow(40000));
        let reversed = Flow::of_words(&0x0202_00c0, &0x0200_010a, ports.rotate_left(16), 6);
        assert_eq!(reversed, flow(40000).reversed());
    }

    #[test]
    fn reversed_twice_is_the_same() {
        assert_eq!(flow(40000).reversed().reversed(), flow(40000));
        assert_ne!(flow(40000).reversed(), flow(40000));
    }

    #[test]
    fn hashes_spread_over_a_range() {
        let mut slots = [0u32; 509];
        for port in 0..u16::MAX {
            slots[usize::from(flow(port).hash(1).below(509))] += 1;
        }
        // 65535 / 509 is 128; three quarters of that is five deviations away.
        assert!(slots.iter().all(|count| (70..190).contains(count)));
    }

    #[test]
    fn hashes_depend_on_everything() {
        let hash = flow(1).hash(1);
        assert_ne!(hash, flow(2).hash(1));
        assert_ne!(hash, flow(1).hash(2));
        assert_ne!(hash, flow(1).reversed().hash(1));
    }
}
