//! One block: its addresses, and which of them are taken. Pure.
//!
//! An address is an offset into the block, the same for both families. All of them can be used, the first
//! and the last too. The next one is the one after the last that was handed out, so that an address that
//! was freed rests as long as possible: others may not have noticed yet that its pod is gone.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use coil_api::BlockNets;
use ipnet::{IpNet, Ipv4Net, Ipv6Net};

/// Addresses of a block: one range of each family that it has, at least one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    ipv4: Option<Ipv4Net>,
    ipv6: Option<Ipv6Net>,
}

impl Range {
    /// The addresses of a block; nothing if it has none.
    #[must_use]
    pub fn of(nets: BlockNets) -> Option<Self> {
        let BlockNets { ipv4, ipv6 } = nets;
        let range = Self { ipv4: ipv4.map(|net| net.trunc()), ipv6: ipv6.map(|net| net.trunc()) };
        (ipv4.is_some() || ipv6.is_some()).then_some(range)
    }

    /// Number of addresses that there are in each family.
    #[must_use]
    pub fn size(&self) -> u64 {
        let size = |bits: u8| 1_u64.checked_shl(u32::from(bits)).unwrap_or(u64::MAX);
        let ipv4 = self.ipv4.map(|net| size(32 - net.prefix_len()));
        let ipv6 = self.ipv6.map(|net| size(128 - net.prefix_len()));
        ipv4.into_iter().chain(ipv6).min().unwrap_or(0)
    }

    /// The ranges, as routes have them.
    pub fn nets(&self) -> impl Iterator<Item = IpNet> + use<> {
        self.ipv4.map(IpNet::V4).into_iter().chain(self.ipv6.map(IpNet::V6))
    }

    /// The addresses at an offset.
    #[must_use]
    pub fn at(&self, offset: u64) -> (Option<Ipv4Addr>, Option<Ipv6Addr>) {
        let ipv4 = self.ipv4.and_then(|net| {
            let offset = u32::try_from(offset).ok()?;
            net.network().to_bits().checked_add(offset).map(Ipv4Addr::from_bits)
        });
        let ipv6 = self
            .ipv6
            .and_then(|net| net.network().to_bits().checked_add(u128::from(offset)))
            .map(Ipv6Addr::from_bits);
        (ipv4, ipv6)
    }

    /// The offset of an address, if it is in the block.
    #[must_use]
    pub fn offset(&self, address: IpAddr) -> Option<u64> {
        match address {
            IpAddr::V4(address) => {
                let net = self.ipv4.filter(|net| net.contains(&address))?;
                Some(u64::from(address.to_bits() - net.network().to_bits()))
            }
            IpAddr::V6(address) => {
                let net = self.ipv6.filter(|net| net.contains(&address))?;
                u64::try_from(address.to_bits() - net.network().to_bits()).ok()
            }
        }
        .filter(|offset| *offset < self.size())
    }
}

/// Which offsets of a block are taken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Offsets {
    size: u64,
    /// A bitmap without the words that are zero, since a block may be huge.
    words: BTreeMap<u64, u64>,
    used: u64,
    last: Option<u64>,
    /// When offsets were freed that nobody has had since, by the count of the caller.
    freed: BTreeMap<u64, u64>,
}

const WORD: u64 = u64::BITS as u64;
/// How many freed offsets are remembered.
const REMEMBERED: usize = 4096;

impl Offsets {
    /// None is taken.
    #[must_use]
    pub fn new(size: u64) -> Self {
        Self { size, words: BTreeMap::new(), used: 0, last: None, freed: BTreeMap::new() }
    }

    /// How many are taken.
    #[must_use]
    pub fn used(&self) -> u64 {
        self.used
    }

    /// How many are not.
    #[must_use]
    pub fn unused(&self) -> u64 {
        self.size - self.used
    }

    /// The next to be handed out, and when it was freed; 0 for never. `None` if all are taken.
    #[must_use]
    pub fn next(&self) -> Option<(u64, u64)> {
        let start = self.last.map_or(0, |last| last.saturating_add(1));
        let offset = self.clear_from(start).or_else(|| self.clear_from(0))?;
        Some((offset, self.freed.get(&offset).copied().unwrap_or(0)))
    }

    /// Takes one; false if it is taken already, or none of this block.
    pub fn take(&mut self, offset: u64) -> bool {
        if offset >= self.size {
            return false;
        }
        let word = self.words.entry(offset / WORD).or_default();
        let bit = 1 << (offset % WORD);
        if *word & bit != 0 {
            return false;
        }
        *word |= bit;
        self.used += 1;
        self.last = Some(offset);
        self.freed.remove(&offset);
        true
    }

    /// Gives one back, at a time of the caller's count; false if it was not taken.
    pub fn free(&mut self, offset: u64, time: u64) -> bool {
        let Some(word) = self.words.get_mut(&(offset / WORD)) else {
            return false;
        };
        let bit = 1 << (offset % WORD);
        if *word & bit == 0 {
            return false;
        }
        *word &= !bit;
        if *word == 0 {
            self.words.remove(&(offset / WORD));
        }
        self.used -= 1;
        self.freed.insert(offset, time);
        if self.freed.len() > REMEMBERED {
            // Of a huge block there is always something that has rested for longer.
            let recent = u64::try_from(REMEMBERED / 2).unwrap_or(u64::MAX);
            self.freed.retain(|_, freed| freed.saturating_add(recent) > time);
        }
        true
    }

    /// The first that is not taken, from `start` on.
    fn clear_from(&self, start: u64) -> Option<u64> {
        let mut offset = start;
        while offset < self.size {
            let Some(word) = self.words.get(&(offset / WORD)) else {
                return Some(offset);
            };
            // Those before the start count as taken.
            let taken = word | ((1 << (offset % WORD)) - 1);
            if taken != u64::MAX {
                let found = offset / WORD * WORD + u64::from(taken.trailing_ones());
                return (found < self.size).then_some(found);
            }
            offset = (offset / WORD + 1).checked_mul(WORD)?;
        }
        None
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    fn nets(ipv4: Option<&str>, ipv6: Option<&str>) -> Range {
        let (ipv4, ipv6) = (ipv4.map(|net| net.parse().unwrap()), ipv6.map(|net| net.parse().unwrap()));
        Range::of(BlockNets { ipv4, ipv6 }).unwrap()
    }

    fn offsets(range: &Range, taken: &[&str]) -> Offsets {
        let mut offsets = Offsets::new(range.size());
        for address in taken {
            assert!(offsets.take(range.offset(address.parse().unwrap()).unwrap()));
        }
        offsets
    }

    fn take_next(offsets: &mut Offsets) -> Option<u64> {
        let (offset, _) = offsets.next()?;
        assert!(offsets.take(offset));
        Some(offset)
    }

    /// What A47 to A49 have in common: a block of four.
    fn allocator(range: Range, foreign: &[&str], first: &str, third: &str) -> Vec<u64> {
        for address in foreign {
            assert_eq!(range.offset(address.parse().unwrap()), None, "{address}");
        }
        let mut offsets = offsets(&range, &[first, third]);
        let got = vec![take_next(&mut offsets).unwrap(), take_next(&mut offsets).unwrap()];
        assert_eq!((offsets.next(), offsets.unused()), (None, 0), "full");
        assert!(offsets.free(1, 1));
        assert!(!offsets.free(1, 2), "freed twice");
        assert!(!offsets.free(4, 2), "not of this block");
        assert_eq!(take_next(&mut offsets), Some(1));
        got
    }

    #[test]
    fn a47_allocator_of_ipv4() {
        let range = nets(Some("10.2.3.0/30"), None);
        let got = allocator(range, &["10.2.4.0", "10.2.3.4", "fd02::1"], "10.2.3.0", "10.2.3.2");
        let got: Vec<_> = got.into_iter().map(|offset| range.at(offset)).collect();
        let v4 = |last| Some(Ipv4Addr::new(10, 2, 3, last));
        assert_eq!(got, [(v4(3), None), (v4(1), None)]);
    }

    #[test]
    fn a48_allocator_of_ipv6() {
        let range = nets(None, Some("fd02::1:200/126"));
        let got = allocator(range, &["fd02::1:204", "10.2.3.0"], "fd02::1:200", "fd02::1:202");
        let got: Vec<_> = got.into_iter().map(|offset| range.at(offset)).collect();
        let v6 = |last| Some(Ipv6Addr::new(0xfd02, 0, 0, 0, 0, 0, 1, last));
        assert_eq!(got, [(None, v6(0x203)), (None, v6(0x201))]);
    }

    #[test]
    fn a49_allocator_of_both_families() {
        let range = nets(Some("10.2.3.0/30"), Some("fd02::1:200/126"));
        // One family names the offset for both.
        let got = allocator(range, &["10.2.3.4", "fd02::1:204"], "10.2.3.0", "fd02::1:202");
        let got: Vec<_> = got.into_iter().map(|offset| range.at(offset)).collect();
        let v4 = |last| Some(Ipv4Addr::new(10, 2, 3, last));
        let v6 = |last| Some(Ipv6Addr::new(0xfd02, 0, 0, 0, 0, 0, 1, last));
        assert_eq!(got, [(v4(3), v6(0x203)), (v4(1), v6(0x201))]);
    }

    #[test]
    fn a50_a_block_is_filled_and_emptied() {
        let range = nets(Some("10.2.3.0/26"), None);
        let mut offsets = offsets(&range, &[]);
        let all: BTreeSet<_> = std::iter::from_fn(|| take_next(&mut offsets)).collect();
        assert_eq!(all, (0..64).collect());
        assert_eq!((offsets.used(), offsets.unused()), (64, 0));
        for offset in all {
            assert!(offsets.free(offset, offset));
        }
        assert_eq!((offsets.used(), offsets.unused()), (0, 64));
    }

    #[test]
    fn a51_no_address_is_used_again_at_once() {
        let range = nets(Some("10.2.3.0/30"), None);
        let mut offsets = offsets(&range, &[]);
        while take_next(&mut offsets).is_some() {}
        assert!(offsets.free(3, 1));
        assert!(offsets.free(0, 2));
        assert_eq!(offsets.next(), Some((0, 2)));
        assert_eq!(take_next(&mut offsets), Some(0));
        assert_eq!(take_next(&mut offsets), Some(3));
        // Also with nothing else taken: the one that was just freed is the last to be handed out.
        let mut offsets = Offsets::new(4);
        let mut got = Vec::new();
        for time in 1..=5 {
            let offset = take_next(&mut offsets).unwrap();
            got.push(offset);
            assert!(offsets.free(offset, time));
        }
        assert_eq!(got, [0, 1, 2, 3, 0]);
    }

    #[test]
    fn huge_and_tiny_blocks() {
        let range = nets(None, Some("fd02::/16"));
        assert_eq!(range.size(), u64::MAX);
        let mut offsets = Offsets::new(range.size());
        assert!(offsets.take(u64::MAX - 1));
        assert_eq!(take_next(&mut offsets), Some(0), "wraps");
        assert_eq!(take_next(&mut offsets), Some(1));
        assert_eq!(range.offset("fdff::".parse().unwrap()), None);
        let range = nets(Some("10.0.0.1/32"), None);
        assert_eq!((range.size(), range.offset("10.0.0.1".parse().unwrap())), (1, Some(0)));
        let whole = nets(Some("0.0.0.0/0"), None);
        assert_eq!(whole.offset("255.255.255.255".parse().unwrap()), Some(u64::from(u32::MAX)));
        assert_eq!(whole.at(1 << 32), (None, None));
    }

    #[test]
    fn networks_of_a_block() {
        assert_eq!(Range::of(BlockNets { ipv4: None, ipv6: None }), None);
        // Bits behind the prefix are the original's way to be tolerant.
        let range = nets(Some("10.2.3.5/30"), None);
        assert_eq!(range.nets().collect::<Vec<_>>(), ["10.2.3.4/30".parse().unwrap()]);
    }

    proptest! {
        #[test]
        fn offsets_are_a_set_and_the_next_comes_after_the_last(
            size in 1_u64..200,
            steps in prop::collection::vec((any::<bool>(), 0_u64..220), 0..200),
        ) {
            let mut offsets = Offsets::new(size);
            let mut model = BTreeSet::new();
            let mut last = None;
            for (time, (take, offset)) in steps.into_iter().enumerate() {
                if take {
                    let fits = offset < size && model.insert(offset);
                    prop_assert_eq!(offsets.take(offset), fits);
                    if fits {
                        last = Some(offset);
                    }
                } else {
                    prop_assert_eq!(offsets.free(offset, u64::try_from(time).unwrap()), model.remove(&offset));
                }
                prop_assert_eq!(offsets.used(), u64::try_from(model.len()).unwrap());
                let start = last.map_or(0, |last| last + 1);
                let mut order = (start..size).chain(0..start.min(size));
                let next = order.find(|offset| !model.contains(offset));
                prop_assert_eq!(offsets.next().map(|(offset, _)| offset), next);
            }
        }
    }
}
