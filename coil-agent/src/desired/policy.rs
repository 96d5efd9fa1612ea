//! Precedence of egress destinations, compiled so that the longest prefix decides.
//!
//! Owns the rules of the original's three steps (link-local never, narrow before private, wide last).
//! Does not know pods or Egress objects.

use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use super::{Policy, PolicyAction};

/// Destinations that never leave through an Egress.
const LINK_LOCAL: [IpNet; 2] = [
    v4([169, 254, 0, 0], 16),
    IpNet::V6(Ipv6Net::new_assert(Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 0), 10)),
];

/// Destinations that leave through an Egress only if it names a prefix that begins inside them.
const PRIVATE: [IpNet; 4] = [
    v4([10, 0, 0, 0], 8),
    v4([172, 16, 0, 0], 12),
    v4([192, 168, 0, 0], 16),
    IpNet::V6(Ipv6Net::new_assert(Ipv6Addr::new(0xfc00, 0, 0, 0, 0, 0, 0, 0), 7)),
];

/// All destinations, of which the whole table is made.
const EVERYTHING: [IpNet; 2] =
    [v4([0, 0, 0, 0], 0), IpNet::V6(Ipv6Net::new_assert(Ipv6Addr::UNSPECIFIED, 0))];

const fn v4(address: [u8; 4], length: u8) -> IpNet {
    let [a, b, c, d] = address;
    IpNet::V4(Ipv4Net::new_assert(Ipv4Addr::new(a, b, c, d), length))
}

/// What a pod wants for one destination prefix.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Rule {
    /// Where packets go to, without host bits.
    pub destination: IpNet,
    /// What happens to them: an Egress, a deleted one, or `Block`.
    pub action: PolicyAction,
    /// Destinations that the rule does not hold for.
    pub excluded: Arc<Vec<IpNet>>,
}

impl Rule {
    /// A rule without exceptions.
    #[must_use]
    pub fn new(destination: IpNet, action: PolicyAction) -> Self {
        Self { destination: destination.trunc(), action, excluded: Arc::default() }
    }

    fn excludes(&self, prefix: &IpNet) -> bool {
        self.excluded.iter().any(|excluded| excluded.contains(prefix))
    }
}

/// The rules that drop whatever has no better rule, in both families.
pub fn block_everything() -> impl Iterator<Item = Rule> {
    EVERYTHING.into_iter().map(|destination| Rule::new(destination, PolicyAction::Block))
}

/// Compiles rules into a table in which the longest prefix decides as the three steps would.
///
/// The decision is the same for all addresses between two candidate prefixes, so it is taken once for
/// each candidate. Candidates that decide like the candidate around them are left out.
#[must_use]
pub fn compile(rules: &[Rule]) -> Policy {
    let mut by_destination: BTreeMap<IpNet, Vec<&Rule>> = BTreeMap::new();
    for rule in rules {
        by_destination.entry(rule.destination).or_default().push(rule);
    }
    for same in by_destination.values_mut() {
        // A valid Egress before a deleted one or a block; between two Egresses the name decides, so that
        // all nodes agree.
        same.sort_by(|a, b| a.action.cmp(&b.action));
    }
    let mut decisions: BTreeMap<IpNet, PolicyAction> = BTreeMap::new();
    let excluded = rules.iter().flat_map(|rule| rule.excluded.iter());
    let candidates =
        rules.iter().map(|rule| &rule.destination).chain(excluded).chain(&LINK_LOCAL).chain(&PRIVATE);
    for candidate in candidates {
        let candidate = candidate.trunc();
        decisions.entry(candidate).or_insert_with(|| decide(candidate, &by_destination));
    }
    let mut policy = Policy::default();
    for (prefix, action) in &decisions {
        let around =
            around(*prefix).skip(1).find_map(|outer| decisions.get(&outer)).unwrap_or(&PolicyAction::Direct);
        if around == action {
            continue;
        }
        match *prefix {
            IpNet::V4(prefix) => drop(policy.v4.insert(prefix, action.clone())),
            IpNet::V6(prefix) => drop(policy.v6.insert(prefix, action.clone())),
        }
    }
    policy
}

/// Prefixes that more than one Egress claims, each with the one that wins and those that lose.
#[must_use]
pub fn conflicts(rules: &[Rule]) -> BTreeMap<IpNet, Vec<&PolicyAction>> {
    let mut claims: BTreeMap<IpNet, Vec<&PolicyAction>> = BTreeMap::new();
    for rule in rules {
        if matches!(rule.action, PolicyAction::Egress(_)) {
            claims.entry(rule.destination).or_default().push(&rule.action);
        }
    }
    for actions in claims.values_mut() {
        actions.sort();
        actions.dedup();
    }
    claims.retain(|_, actions| actions.len() > 1);
    claims
}

/// The three steps for all addresses of `prefix` that no longer candidate covers.
fn decide(prefix: IpNet, rules: &BTreeMap<IpNet, Vec<&Rule>>) -> PolicyAction {
    let inside = |networks: &[IpNet]| networks.iter().any(|network| network.contains(&prefix));
    if inside(&LINK_LOCAL) {
        return PolicyAction::Direct;
    }
    let longest = |narrow: bool| {
        around(prefix)
            .filter(|outer| is_narrow(outer) == narrow)
            .filter_map(|outer| rules.get(&outer))
            .flatten()
            .find(|rule| !rule.excludes(&prefix))
            .map(|rule| rule.action.clone())
    };
    if let Some(action) = longest(true) {
        return action;
    }
    if inside(&PRIVATE) {
        return PolicyAction::Direct;
    }
    longest(false).unwrap_or(PolicyAction::Direct)
}

/// Whether a destination beats the rule that private destinations stay inside. Only its first address
/// counts, as in the original: 10.0.0.0/7 is narrow, 8.0.0.0/5 and everything are not.
fn is_narrow(destination: &IpNet) -> bool {
    let first: IpAddr = destination.network();
    PRIVATE.iter().any(|network| network.contains(&first))
}

/// A prefix and those that contain it, longest first.
fn around(prefix: IpNet) -> impl Iterator<Item = IpNet> {
    std::iter::successors(Some(prefix.trunc()), |inner| inner.supernet().map(|outer| outer.trunc()))
}

/// Compiled policies of the rules in use, so that pods with the same rules share one and a change
/// elsewhere compiles nothing anew.
#[derive(Debug, Default)]
pub struct PolicyCache {
    compiled: HashMap<Vec<Rule>, (Arc<Policy>, bool)>,
}

impl PolicyCache {
    /// The policy of some rules.
    pub fn get(&mut self, mut rules: Vec<Rule>) -> Arc<Policy> {
        rules.sort();
        rules.dedup();
        if let Some((policy, used)) = self.compiled.get_mut(&rules) {
            *used = true;
            return Arc::clone(policy);
        }
        let policy = Arc::new(compile(&rules));
        self.compiled.insert(rules, (Arc::clone(&policy), true));
        policy
    }

    /// Forgets what was not asked for since the last call.
    pub fn sweep(&mut self) {
        self.compiled.retain(|_, (_, used)| std::mem::replace(used, false));
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

    use proptest::prelude::*;

    use super::*;
    use crate::desired::EgressName;

    fn egress(name: &str) -> PolicyAction {
        PolicyAction::Egress(EgressName { namespace: "internet".into(), name: name.into() })
    }

    fn net(text: &str) -> IpNet {
        text.parse().unwrap()
    }

    fn rule(destination: &str, name: &str) -> Rule {
        Rule::new(net(destination), egress(name))
    }

    /// What the table says about an address.
    fn look_up(policy: &Policy, address: IpAddr) -> PolicyAction {
        let found = match address {
            IpAddr::V4(address) => policy
                .v4
                .iter()
                .filter(|(prefix, _)| prefix.contains(&address))
                .max_by_key(|(prefix, _)| prefix.prefix_len())
                .map(|(_, action)| action),
            IpAddr::V6(address) => policy
                .v6
                .iter()
                .filter(|(prefix, _)| prefix.contains(&address))
                .max_by_key(|(prefix, _)| prefix.prefix_len())
                .map(|(_, action)| action),
        };
        found.cloned().unwrap_or(PolicyAction::Direct)
    }

    /// The rules of the original as the kernel would walk them: policy rules 1800, 1900, 2000 to
    /// 2002, 2100 with tables 117 and 118.
    fn walk(rules: &[Rule], address: IpAddr) -> PolicyAction {
        let within = |text: &str| net(text).contains(&address);
        let table = |narrow: bool| {
            let mut best: Option<&Rule> = None;
            for rule in rules {
                let base = rule.destination.network();
                let is_narrow = ["10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "fc00::/7"]
                    .iter()
                    .any(|private| net(private).contains(&base));
                if is_narrow != narrow
                    || !rule.destination.contains(&address)
                    || rule.excluded.iter().any(|e| e.contains(&address))
                {
                    continue;
                }
                let better = best.is_none_or(|best| {
                    let (new, old) = (rule.destination.prefix_len(), best.destination.prefix_len());
                    new > old || (new == old && rule.action < best.action)
                });
                if better {
                    best = Some(rule);
                }
            }
            best.map(|rule| rule.action.clone())
        };
        if within("169.254.0.0/16") || within("fe80::/10") {
            return PolicyAction::Direct;
        }
        if let Some(action) = table(true) {
            return action;
        }
        if within("10.0.0.0/8") || within("172.16.0.0/12") || within("192.168.0.0/16") || within("fc00::/7") {
            return PolicyAction::Direct;
        }
        table(false).unwrap_or(PolicyAction::Direct)
    }

    #[test]
    fn everything_leaves_private_and_link_local_alone() {
        let policy = compile(&[rule("0.0.0.0/0", "a"), rule("::/0", "a")]);
        for (address, wanted) in [
            ("8.8.8.8", egress("a")),
            ("10.1.2.3", PolicyAction::Direct),
            ("172.31.255.255", PolicyAction::Direct),
            ("172.32.0.0", egress("a")),
            ("192.168.0.1", PolicyAction::Direct),
            ("169.254.169.254", PolicyAction::Direct),
            ("2001:db8::1", egress("a")),
            ("fd00::1", PolicyAction::Direct),
            ("fe80::1", PolicyAction::Direct),
        ] {
            assert_eq!(look_up(&policy, address.parse().unwrap()), wanted, "{address}");
        }
    }

    #[test]
    fn a_private_destination_beats_the_rule_that_private_stays() {
        let policy = compile(&[rule("10.1.0.0/16", "narrow"), rule("0.0.0.0/0", "wide")]);
        for (address, wanted) in
            [("10.1.2.3", egress("narrow")), ("10.2.2.3", PolicyAction::Direct), ("1.1.1.1", egress("wide"))]
        {
            assert_eq!(look_up(&policy, address.parse().unwrap()), wanted, "{address}");
        }
    }

    #[test]
    fn narrow_is_judged_by_the_first_address() {
        // Narrow although it reaches beyond 10/8; it then beats longer wide prefixes.
        let policy = compile(&[rule("10.0.0.0/7", "narrow"), rule("11.0.0.0/8", "wide")]);
        assert_eq!(look_up(&policy, "11.0.0.1".parse().unwrap()), egress("narrow"));
        // Wide although it contains 10/8.
        let policy = compile(&[rule("8.0.0.0/5", "wide")]);
        assert_eq!(look_up(&policy, "10.0.0.1".parse().unwrap()), PolicyAction::Direct);
        assert_eq!(look_up(&policy, "11.0.0.1".parse().unwrap()), egress("wide"));
    }

    #[test]
    fn a_valid_egress_wins_over_a_block_of_the_same_prefix() {
        let mut rules = vec![rule("0.0.0.0/0", "a")];
        rules.extend(block_everything());
        let policy = compile(&rules);
        assert_eq!(look_up(&policy, "8.8.8.8".parse().unwrap()), egress("a"));
        assert_eq!(look_up(&policy, "2001:db8::1".parse().unwrap()), PolicyAction::Block);
        assert_eq!(look_up(&policy, "fd00::1".parse().unwrap()), PolicyAction::Direct);
    }

    #[test]
    fn no_rules_make_an_empty_table() {
        assert_eq!(compile(&[]), Policy::default());
    }

    #[test]
    fn two_egresses_with_one_prefix_are_a_conflict_that_the_name_decides() {
        let rules = [rule("1.0.0.0/8", "b"), rule("1.0.0.0/8", "a"), rule("2.0.0.0/8", "b")];
        let found = conflicts(&rules);
        assert_eq!(found.len(), 1);
        assert_eq!(found[&net("1.0.0.0/8")], [&egress("a"), &egress("b")]);
        let policy = compile(&rules);
        assert_eq!(look_up(&policy, "1.2.3.4".parse().unwrap()), egress("a"));
    }

    #[test]
    fn equal_rules_share_a_policy_until_nobody_asks() {
        let mut cache = PolicyCache::default();
        let first = cache.get(vec![rule("1.0.0.0/8", "a"), rule("2.0.0.0/8", "a")]);
        let second = cache.get(vec![rule("2.0.0.0/8", "a"), rule("1.0.0.0/8", "a")]);
        assert!(Arc::ptr_eq(&first, &second));
        cache.sweep();
        assert_eq!(cache.compiled.len(), 1);
        cache.sweep();
        assert_eq!(cache.compiled.len(), 0);
    }

    /// Addresses near the edges of what the steps know, and anywhere.
    fn v4_address() -> impl Strategy<Value = Ipv4Addr> {
        prop_oneof![
            any::<u32>(),
            (
                any::<u32>(),
                prop::sample::select(vec![
                    0x0a00_0000_u32,
                    0xac10_0000,
                    0xc0a8_0000,
                    0xa9fe_0000,
                    0x0800_0000,
                    0x0b00_0000,
                ]),
                0_u32..24
            )
                .prop_map(|(bits, base, keep)| base ^ (bits & ((1 << keep) - 1))),
        ]
        .prop_map(Ipv4Addr::from_bits)
    }

    fn v6_address() -> impl Strategy<Value = Ipv6Addr> {
        prop_oneof![
            any::<u128>(),
            (
                any::<u128>(),
                prop::sample::select(vec![
                    0xfc00_u128 << 112,
                    0xfd00_u128 << 112,
                    0xfe80_u128 << 112,
                    0x2001_0db8_u128 << 96,
                ]),
                0_u32..124
            )
                .prop_map(|(bits, base, keep)| base ^ (bits & ((1 << keep) - 1))),
        ]
        .prop_map(Ipv6Addr::from_bits)
    }

    fn prefix() -> impl Strategy<Value = IpNet> {
        prop_oneof![
            (v4_address(), 0_u8..=32).prop_map(|(a, l)| Ipv4Net::new(a, l).unwrap().trunc().into()),
            (v6_address(), 0_u8..=128).prop_map(|(a, l)| Ipv6Net::new(a, l).unwrap().trunc().into()),
        ]
    }

    fn any_rule() -> impl Strategy<Value = Rule> {
        let action =
            prop_oneof![Just(egress("a")), Just(egress("b")), Just(egress("c")), Just(PolicyAction::Block),];
        (prefix(), action, prop::collection::vec(prefix(), 0..3)).prop_map(
            |(destination, action, excluded)| Rule {
                excluded: Arc::new(excluded),
                ..Rule::new(destination, action)
            },
        )
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(512))]

        #[test]
        fn longest_prefix_decides_like_the_three_steps(
            rules in prop::collection::vec(any_rule(), 0..12),
            v4 in prop::collection::vec(v4_address(), 16),
            v6 in prop::collection::vec(v6_address(), 16),
        ) {
            let policy = compile(&rules);
            let edges = rules.iter().flat_map(|rule| {
                std::iter::once(&rule.destination)
                    .chain(rule.excluded.iter())
                    .flat_map(|net| [net.network(), net.broadcast()])
            });
            let addresses = v4.into_iter().map(IpAddr::V4).chain(v6.into_iter().map(IpAddr::V6));
            for address in addresses.chain(edges) {
                prop_assert_eq!(look_up(&policy, address), walk(&rules, address), "{}", address);
            }
        }
    }
}
