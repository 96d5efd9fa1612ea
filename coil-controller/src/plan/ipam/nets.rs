//! The networks of all blocks, of whatever pool: a block is never carved over another one, even if the
//! other was made by hand, or its pool was removed by force, or the pool was changed behind our back.

use std::collections::BTreeMap;

use coil_api::BlockNets;
use ipnet::IpNet;

/// Networks, each any number of times.
#[derive(Clone, Debug, Default)]
pub(super) struct Nets {
    nets: BTreeMap<IpNet, u32>,
    /// How many networks there are of each length, for IPv4 and IPv6.
    lengths: [BTreeMap<u8, u32>; 2],
}

impl Nets {
    pub(super) fn add(&mut self, nets: &BlockNets) {
        for net in both(nets) {
            *self.nets.entry(net).or_default() += 1;
            *self.lengths[family(net)].entry(net.prefix_len()).or_default() += 1;
        }
    }

    pub(super) fn remove(&mut self, nets: &BlockNets) {
        for net in both(nets) {
            if decrease(&mut self.nets, &net) {
                decrease(&mut self.lengths[family(net)], &net.prefix_len());
            }
        }
    }

    /// A network that shares addresses with one of these.
    pub(super) fn overlapping(&self, nets: &BlockNets) -> Option<IpNet> {
        both(nets).find_map(|net| {
            // Two networks that overlap are one in the other: a larger one, or the first one inside.
            let larger = self.lengths[family(net)].range(..=net.prefix_len()).find_map(|(length, _)| {
                let candidate = IpNet::new(net.addr(), *length).ok()?.trunc();
                self.nets.contains_key(&candidate).then_some(candidate)
            });
            larger.or_else(|| {
                let (next, _) = self.nets.range(IpNet::new(net.network(), 0).ok()?..).next()?;
                net.contains(next).then_some(*next)
            })
        })
    }
}

fn both(nets: &BlockNets) -> impl Iterator<Item = IpNet> + use<> {
    nets.ipv4.map(IpNet::V4).into_iter().chain(nets.ipv6.map(IpNet::V6))
}

fn family(net: IpNet) -> usize {
    usize::from(matches!(net, IpNet::V6(_)))
}

/// Returns whether there was one.
fn decrease<K: Ord>(counts: &mut BTreeMap<K, u32>, key: &K) -> bool {
    let Some(count) = counts.get_mut(key) else { return false };
    *count -= 1;
    if *count == 0 {
        counts.remove(key);
    }
    true
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]
    use super::*;

    fn nets(ipv4: &str, ipv6: &str) -> BlockNets {
        BlockNets { ipv4: ipv4.parse().ok(), ipv6: ipv6.parse().ok() }
    }

    #[test]
    fn overlaps_of_all_kinds() {
        let mut all = Nets::default();
        for (v4, v6) in
            [("10.0.0.0/27", "fd00::/123"), ("10.0.1.0/24", ""), ("", "fd00:1::/64"), ("10.0.3.4/32", "")]
        {
            all.add(&nets(v4, v6));
        }
        for (v4, v6, hit) in [
            ("10.0.0.0/27", "", "10.0.0.0/27"),
            ("10.0.0.32/27", "", ""),
            ("10.0.0.8/29", "", "10.0.0.0/27"),
            ("10.0.0.0/24", "", "10.0.0.0/27"),
            ("10.0.1.64/27", "", "10.0.1.0/24"),
            ("10.0.2.0/24", "", ""),
            ("10.0.3.0/27", "", "10.0.3.4/32"),
            ("10.0.3.0/30", "", ""),
            ("0.0.0.0/0", "", "10.0.0.0/27"),
            ("", "fd00::1/128", "fd00::/123"),
            ("", "fd00:1:0:0:8000::/66", "fd00:1::/64"),
            ("", "fd00:2::/64", ""),
            ("10.9.0.0/27", "fd00::/123", "fd00::/123"),
        ] {
            let found = all.overlapping(&nets(v4, v6)).map(|net| net.to_string()).unwrap_or_default();
            assert_eq!(found, hit, "{v4} {v6}");
        }
    }

    #[test]
    fn what_was_added_twice_must_be_removed_twice() {
        let mut all = Nets::default();
        let net = nets("10.0.0.0/27", "");
        all.add(&net);
        all.add(&net);
        all.remove(&net);
        assert!(all.overlapping(&nets("10.0.0.1/32", "")).is_some());
        all.remove(&net);
        assert!(all.overlapping(&nets("10.0.0.1/32", "")).is_none());
        all.remove(&net);
        assert!(all.nets.is_empty() && all.lengths.iter().all(BTreeMap::is_empty));
    }

    #[test]
    fn against_a_plain_search() {
        let mut random = 7u64;
        let mut next = |most: u64| {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (random >> 33) % most
        };
        let mut all = Nets::default();
        let mut model: Vec<BlockNets> = Vec::new();
        for _ in 0..5_000 {
            let net = format!("10.0.{}.{}/{}", next(4), next(256), 22 + next(11));
            let net = BlockNets { ipv4: Some(net.parse::<ipnet::Ipv4Net>().unwrap().trunc()), ipv6: None };
            let overlaps = |other: &BlockNets| {
                let (a, b) = (other.ipv4.unwrap(), net.ipv4.unwrap());
                a.contains(&b) || b.contains(&a)
            };
            assert_eq!(all.overlapping(&net).is_some(), model.iter().any(overlaps), "{net:?}");
            if next(3) > 0 && model.len() > 3 {
                let at = usize::try_from(next(model.len().try_into().unwrap())).unwrap();
                all.remove(&model.swap_remove(at));
            } else {
                all.add(&net);
                model.push(net);
            }
        }
    }
}
