//! What the schema says of an AddressPool, and what it cannot say, in code: the last word on a pool
//! whatever admitted it.

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use kube::ResourceExt;

use super::carve::Subnet;
use super::{AddressPool, AddressPoolSpec, MAX_BLOCK_SIZE_BITS, MAX_SUBNETS, SubnetSet};
use crate::destination::parse_destination;
use crate::labels::{self, Expected};
use crate::violation::{Problem, Violation};

/// Everything that is wrong with a pool: as it stands, as a change of `old`, and beside the pools that were
/// there before it. `others` may hold all pools: the pool itself and younger ones do not count, so that of
/// two pools that overlap the older one stays good.
#[must_use]
pub fn validate<'a>(
    new: &AddressPool,
    old: Option<&AddressPool>,
    others: impl IntoIterator<Item = &'a AddressPool>,
) -> Vec<Violation> {
    let mut found = Vec::new();
    if let Err(error) = labels::check(&new.name_any(), Expected::LabelValue) {
        found.push(Violation::new("metadata.name", error));
    }
    if let Some(old) = old {
        changes(&new.spec, &old.spec, &mut found);
    }
    match parse(&new.spec) {
        Ok((_, subnets)) => {
            for other in others {
                if is_before(other, new) {
                    overlap(&subnets, other, &mut found);
                }
            }
        }
        Err(violations) => found.extend(violations),
    }
    found
}

impl SubnetSet {
    /// What is wrong with a subnet for blocks of 2^`bits` addresses.
    #[must_use]
    pub fn validate(&self, bits: i32) -> Vec<Violation> {
        let mut found = Vec::new();
        subnet("spec.subnets[0]", self, bits, &mut found);
        found
    }
}

/// The numbers of a pool that is good by itself.
pub(super) fn parse(spec: &AddressPoolSpec) -> Result<(u8, Vec<Subnet>), Vec<Violation>> {
    let mut found = Vec::new();
    let bits = i64::from(spec.block_size_bits);
    let (least, most) = (0, i64::from(MAX_BLOCK_SIZE_BITS));
    if bits < least {
        found.push(Violation::new("spec.blockSizeBits", Problem::TooSmall { value: bits, minimum: least }));
    }
    if bits > most {
        found.push(Violation::new("spec.blockSizeBits", Problem::TooLarge { value: bits, maximum: most }));
    }
    if spec.subnets.is_empty() {
        found.push(Violation::new("spec.subnets", Problem::Empty));
    }
    if spec.subnets.len() > MAX_SUBNETS {
        let number = |n: usize| i64::try_from(n).unwrap_or(i64::MAX);
        let problem = Problem::TooLarge { value: number(spec.subnets.len()), maximum: number(MAX_SUBNETS) };
        found.push(Violation::new("spec.subnets", problem));
        return Err(found);
    }
    let mut parsed: Vec<Subnet> = Vec::new();
    for (index, set) in spec.subnets.iter().enumerate() {
        let field = format!("spec.subnets[{index}]");
        let Some(new) = subnet(&field, set, spec.block_size_bits, &mut found) else {
            continue;
        };
        if let Some(first) = parsed.first()
            && (first.ipv4.is_some(), first.ipv6.is_some()) != (new.ipv4.is_some(), new.ipv6.is_some())
        {
            found.push(Violation::new(&field, Problem::MixedFamilies));
        }
        for old in &parsed {
            for (a, b) in overlaps(&new, old) {
                found.push(Violation::new(&field, Problem::Overlap { subnet: a, other: b, pool: None }));
            }
        }
        parsed.push(new);
    }
    match u8::try_from(bits) {
        Ok(bits) if found.is_empty() => Ok((bits, parsed)),
        _ => Err(found),
    }
}

fn subnet(field: &str, set: &SubnetSet, bits: i32, found: &mut Vec<Violation>) -> Option<Subnet> {
    let before = found.len();
    if set.ipv4.is_none() && set.ipv6.is_none() {
        found.push(Violation::new(field, Problem::NoSubnet));
    }
    let mut net = |key: &str, text: &Option<String>, want: &'static str| {
        let text = text.as_ref()?;
        let problem = match parse_destination(text) {
            Ok(net) if (want == "IPv4") == matches!(net, IpNet::V4(_)) => {
                let host_bits = net.max_prefix_len() - net.prefix_len();
                if i64::from(host_bits) >= i64::from(bits) {
                    return Some(net);
                }
                Problem::TooNarrow { subnet: text.clone(), bits }
            }
            Ok(_) => Problem::Family { subnet: text.clone(), want },
            Err(error) => Problem::Destination(error),
        };
        found.push(Violation::new(format!("{field}.{key}"), problem));
        None
    };
    let (ipv4, ipv6) = (net("ipv4", &set.ipv4, "IPv4"), net("ipv6", &set.ipv6, "IPv6"));
    let ipv4 = ipv4.and_then(|net| if let IpNet::V4(net) = net { Some(net) } else { None });
    let ipv6 = ipv6.and_then(|net| if let IpNet::V6(net) = net { Some(net) } else { None });
    if let (Some(v4), Some(v6)) = (ipv4, ipv6)
        && 32 - v4.prefix_len() != 128 - v6.prefix_len()
    {
        found.push(Violation::new(field, Problem::UnequalSizes));
    }
    (found.len() == before).then(|| Subnet::new(ipv4, ipv6))
}

/// As in the original, texts are compared: a network may not even be written in another way.
fn changes(new: &AddressPoolSpec, old: &AddressPoolSpec, found: &mut Vec<Violation>) {
    if new.block_size_bits != old.block_size_bits {
        found.push(Violation::new("spec.blockSizeBits", Problem::Unchangeable));
    }
    if new.subnets.len() < old.subnets.len() {
        found.push(Violation::new("spec.subnets", Problem::Unshrinkable));
    }
    for (index, (new, old)) in new.subnets.iter().zip(&old.subnets).enumerate() {
        if new != old {
            found.push(Violation::new(format!("spec.subnets[{index}]"), Problem::Unchangeable));
        }
    }
}

/// Whether `other` is another pool that was there before `pool`. A pool that is yet to be made is the last.
fn is_before(other: &AddressPool, pool: &AddressPool) -> bool {
    if other.name_any() == pool.name_any() {
        return false;
    }
    let age = |pool: &AddressPool| {
        let created = pool.metadata.creation_timestamp.as_ref().map(|time| time.0);
        (created.is_none(), created, pool.name_any())
    };
    age(other) < age(pool)
}

/// An invalid pool takes nothing from others: nothing is carved from it.
fn overlap(subnets: &[Subnet], other: &AddressPool, found: &mut Vec<Violation>) {
    let Ok((_, theirs)) = parse(&other.spec) else { return };
    for (index, ours) in subnets.iter().enumerate() {
        for (a, b) in theirs.iter().flat_map(|theirs| overlaps(ours, theirs)) {
            let problem = Problem::Overlap { subnet: a, other: b, pool: Some(other.name_any()) };
            found.push(Violation::new(format!("spec.subnets[{index}]"), problem));
        }
    }
}

fn overlaps(a: &Subnet, b: &Subnet) -> impl Iterator<Item = (IpNet, IpNet)> + use<> {
    let v4 = |a: Ipv4Net, b: Ipv4Net| a.contains(&b) || b.contains(&a);
    let v6 = |a: Ipv6Net, b: Ipv6Net| a.contains(&b) || b.contains(&a);
    let v4 = a.ipv4.zip(b.ipv4).filter(|(a, b)| v4(*a, *b)).map(|(a, b)| (IpNet::V4(a), IpNet::V4(b)));
    let v6 = a.ipv6.zip(b.ipv6).filter(|(a, b)| v6(*a, *b)).map(|(a, b)| (IpNet::V6(a), IpNet::V6(b)));
    v4.into_iter().chain(v6)
}
