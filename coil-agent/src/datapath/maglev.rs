//! Maglev: which gateway serves which slot of an Egress.
//!
//! Pure. The table depends on the set of gateways alone, so every node chooses alike, all gateways
//! get the same share, and a gateway that comes or goes moves little but its own share.

use std::net::IpAddr;

use coil_common::values::MAGLEV_SLOTS;

/// Fills a table with indices into `gateways`, which must be sorted and without duplicates; with no
/// gateway the table is all zero.
#[must_use]
pub(crate) fn table(gateways: &[IpAddr]) -> [usize; MAGLEV_SLOTS] {
    let mut table = [0; MAGLEV_SLOTS];
    if gateways.is_empty() {
        return table;
    }
    let mut taken = [false; MAGLEV_SLOTS];
    let mut preferences: Vec<Preference> = gateways.iter().map(Preference::new).collect();
    let mut filled = 0;
    loop {
        for (index, preference) in preferences.iter_mut().enumerate() {
            // Each list holds every slot once, so this ends while a slot is free.
            let slot = loop {
                let slot = preference.next();
                if !taken[slot] {
                    break slot;
                }
            };
            taken[slot] = true;
            table[slot] = index;
            filled += 1;
            if filled == MAGLEV_SLOTS {
                return table;
            }
        }
    }
}

/// The order in which a gateway wants slots: a permutation, since the number of slots is prime.
struct Preference {
    slot: usize,
    step: usize,
}

impl Preference {
    fn new(gateway: &IpAddr) -> Self {
        let slots = MAGLEV_SLOTS as u64;
        let slot = hash(gateway, 0x6d61_676c_6576_0001) % slots;
        let step = hash(gateway, 0x6d61_676c_6576_0002) % (slots - 1) + 1;
        // Both are below the number of slots.
        #[expect(clippy::cast_possible_truncation, reason = "below MAGLEV_SLOTS")]
        Self { slot: slot as usize, step: step as usize }
    }

    fn next(&mut self) -> usize {
        let slot = self.slot;
        self.slot = (slot + self.step) % MAGLEV_SLOTS;
        slot
    }
}

/// A fixed hash: the result must be the same on every node and in every version.
fn hash(gateway: &IpAddr, seed: u64) -> u64 {
    let octets = match gateway {
        IpAddr::V4(address) => u128::from(address.to_bits()),
        IpAddr::V6(address) => address.to_bits(),
    };
    #[expect(clippy::cast_possible_truncation, reason = "takes the lower half")]
    let low = octets as u64;
    let high = (octets >> 64) as u64;
    mix(mix(seed ^ high) ^ low)
}

/// The finalizer of splitmix64.
fn mix(value: u64) -> u64 {
    let value = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::net::{Ipv4Addr, Ipv6Addr};

    use proptest::prelude::*;

    use super::*;

    fn shares(gateways: usize, table: &[usize; MAGLEV_SLOTS]) -> Vec<usize> {
        let mut shares = vec![0; gateways];
        for &index in table {
            shares[index] += 1;
        }
        shares
    }

    #[test]
    fn no_gateway_gives_an_empty_table() {
        assert_eq!(table(&[]), [0; MAGLEV_SLOTS]);
    }

    #[test]
    fn the_table_is_stable_across_versions() {
        let gateways: Vec<IpAddr> = [1, 2, 3].map(|n| IpAddr::from([10, 0, 0, n])).to_vec();
        let head = &table(&gateways)[..12];
        assert_eq!(head, EXPECTED_HEAD, "agents of different versions must choose alike");
    }

    const EXPECTED_HEAD: &[usize] = &[2, 1, 0, 1, 0, 2, 2, 1, 2, 0, 1, 2];

    fn gateways(max: usize) -> impl Strategy<Value = Vec<IpAddr>> {
        let v4 = proptest::collection::btree_set(any::<u32>(), 1..max)
            .prop_map(|set| set.into_iter().map(|n| Ipv4Addr::from(n).into()).collect());
        let v6 = proptest::collection::btree_set(any::<u128>(), 1..max)
            .prop_map(|set| set.into_iter().map(|n| Ipv6Addr::from(n).into()).collect());
        let near: BoxedStrategy<Vec<IpAddr>> = (any::<u32>(), 1..max)
            .prop_map(|(base, n)| {
                let addresses: BTreeSet<u32> = (0..n).map(|i| base.wrapping_add(i as u32)).collect();
                addresses.into_iter().map(|n| Ipv4Addr::from(n).into()).collect()
            })
            .boxed();
        prop_oneof![v4, v6, near]
    }

    proptest! {
        #[test]
        fn every_gateway_gets_an_equal_share(gateways in gateways(64)) {
            let shares = shares(gateways.len(), &table(&gateways));
            let (low, high) = (MAGLEV_SLOTS / gateways.len(), MAGLEV_SLOTS.div_ceil(gateways.len()));
            prop_assert!(shares.iter().all(|share| (low..=high).contains(share)), "{shares:?}");
        }
    }

    /// Slots that move from one remaining gateway to another when `victim` goes.
    fn moved(gateways: &[IpAddr], victim: usize) -> usize {
        let before = table(gateways);
        let mut fewer = gateways.to_vec();
        fewer.remove(victim);
        let after = table(&fewer);
        (0..MAGLEV_SLOTS)
            .filter(|&slot| before[slot] != victim && gateways[before[slot]] != fewer[after[slot]])
            .count()
    }

    /// Single sets of gateways can be unlucky, so this looks at the mean over many, always the same.
    #[test]
    fn removal_moves_little_more_than_the_share() {
        for size in 2..20_u64 {
            let mut total = 0;
            let mut cases = 0;
            for set in 0..20 {
                let mut gateways: Vec<IpAddr> = (0..size)
                    .map(|n| IpAddr::from(((mix(set << 32 | n) >> 32) as u32).to_be_bytes()))
                    .collect();
                gateways.sort_unstable();
                gateways.dedup();
                for victim in 0..gateways.len() {
                    total += moved(&gateways, victim);
                    cases += 1;
                }
            }
            let mean = total / cases;

            assert!(mean <= MAGLEV_SLOTS / 16, "{size} gateways: {mean} slots of others moved in the mean");
        }
    }
}
