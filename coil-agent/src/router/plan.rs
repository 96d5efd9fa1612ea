//! The difference between the routes that are there and those that should be. Pure.

use std::collections::BTreeMap;
use std::net::IpAddr;

use ipnet::IpNet;

use super::cluster::Wanted;

/// A route of the main table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Route {
    /// Its destination.
    pub net: IpNet,
    /// The next router, if it has exactly one and nothing else about it is special.
    pub via: Option<IpAddr>,
    /// Its metric; with the destination it tells routes apart.
    pub metric: u32,
    /// It has our protocol identifier.
    pub ours: bool,
}

/// Something to do in the kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Op {
    /// Make a route where there is none.
    Add {
        /// Destination.
        net: IpNet,
        /// Next router.
        via: IpAddr,
    },
    /// Send what goes to this destination to another router, without a moment of no route.
    Move {
        /// Destination.
        net: IpNet,
        /// Next router.
        via: IpAddr,
    },
    /// Remove a route of ours.
    Delete(Route),
}

impl Op {
    /// The destination.
    #[must_use]
    pub fn net(&self) -> &IpNet {
        match self {
            Self::Add { net, .. } | Self::Move { net, .. } | Self::Delete(Route { net, .. }) => net,
        }
    }
}

/// What to do, in order, and what cannot be done.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// Deletions last.
    pub ops: Vec<Op>,
    /// Destinations to which somebody else has a route where ours should be. It stays.
    pub taken: Vec<IpNet>,
}

/// The metric of a route that asks for none.
pub fn default_metric(net: &IpNet) -> u32 {
    match net {
        IpNet::V4(_) => 0,
        IpNet::V6(_) => 1024,
    }
}

/// Compares routes that are there with those that should be.
#[must_use]
pub fn plan(current: &[Route], wanted: &Wanted) -> Plan {
    let mut ours: BTreeMap<IpNet, Vec<&Route>> = BTreeMap::new();
    let mut plan = Plan::default();
    for route in current.iter().filter(|route| route.ours) {
        ours.entry(route.net).or_default().push(route);
    }
    let is_foreign = |net: &IpNet| {
        current.iter().any(|route| !route.ours && route.net == *net && route.metric == default_metric(net))
    };
    let mut deletions = Vec::new();
    for (net, via) in wanted {
        let there = ours.remove(net).unwrap_or_default();
        // The one that can stay, or that can be changed in its place.
        let mut in_place = there.iter().filter(|route| route.metric == default_metric(net));
        let kept = match in_place.next() {
            Some(route) if route.via == Some(*via) => Some(*route),
            Some(route) if in_place.next().is_none() && !is_foreign(net) => {
                plan.ops.push(Op::Move { net: *net, via: *via });
                Some(*route)
            }
            None if !is_foreign(net) => {
                plan.ops.push(Op::Add { net: *net, via: *via });
                None
            }
            // To replace a route among several could hit another's.
            Some(_) | None => {
                plan.taken.push(*net);
                None
            }
        };
        deletions.extend(there.into_iter().filter(|route| Some(*route) != kept));
    }
    deletions.extend(ours.into_values().flatten());
    plan.ops.extend(deletions.into_iter().cloned().map(Op::Delete));
    plan
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;
    use proptest::prelude::*;

    fn route(net: &str, via: &str, ours: bool) -> Route {
        let net: IpNet = net.parse().unwrap();
        Route { net, via: via.parse().ok(), metric: default_metric(&net), ours }
    }

    fn wanted(routes: &[(&str, &str)]) -> Wanted {
        routes.iter().map(|(net, via)| (net.parse().unwrap(), via.parse().unwrap())).collect()
    }

    #[test]
    fn deletions_come_last_and_what_is_right_stays() {
        let current = [
            route("10.2.0.0/27", "10.0.0.1", true),
            route("10.2.0.32/27", "10.0.0.1", true),
            route("10.2.0.64/27", "10.0.0.1", true),
            route("10.9.0.0/16", "10.0.0.9", false),
        ];
        let wanted =
            wanted(&[("10.2.0.32/27", "10.0.0.2"), ("10.2.0.64/27", "10.0.0.1"), ("fd02::/123", "fd00::1")]);
        let plan = plan(&current, &wanted);
        assert_eq!(
            plan.ops,
            [
                Op::Move { net: "10.2.0.32/27".parse().unwrap(), via: "10.0.0.2".parse().unwrap() },
                Op::Add { net: "fd02::/123".parse().unwrap(), via: "fd00::1".parse().unwrap() },
                Op::Delete(current[0].clone()),
            ]
        );
        assert_eq!(plan.taken, []);
    }

    #[test]
    fn the_route_of_another_is_left_where_ours_should_be() {
        let current = [route("10.2.0.0/27", "10.0.0.7", false)];
        let wanted = wanted(&[("10.2.0.0/27", "10.0.0.1")]);
        let plan = plan(&current, &wanted);
        assert_eq!((plan.ops, plan.taken), (vec![], vec!["10.2.0.0/27".parse().unwrap()]));
    }

    #[test]
    fn odd_routes_of_ours_are_put_in_order() {
        // A black hole in the place of a route, and a second one with another metric.
        let hole = route("10.2.0.0/27", "none", true);
        let mut second = route("10.2.0.0/27", "10.0.0.1", true);
        second.metric = 7;
        let wanted = wanted(&[("10.2.0.0/27", "10.0.0.1")]);
        let plan = plan(&[hole, second.clone()], &wanted);
        let net = second.net;
        assert_eq!(plan.ops, [Op::Move { net, via: "10.0.0.1".parse().unwrap() }, Op::Delete(second)]);
    }

    /// What the kernel would do.
    fn carry_out(routes: &mut Vec<Route>, op: &Op) {
        let same = |net: &IpNet| {
            let net = *net;
            move |route: &Route| route.net == net && route.metric == default_metric(&net)
        };
        match op {
            Op::Add { net, via } => {
                assert!(!routes.iter().any(same(net)), "there is one already: {op:?}");
                routes.push(Route { net: *net, via: Some(*via), metric: default_metric(net), ours: true });
            }
            Op::Move { net, via } => {
                let route = routes.iter_mut().find(|route| same(net)(route)).unwrap();
                assert!(route.ours, "another's: {op:?}");
                route.via = Some(*via);
            }
            Op::Delete(gone) => {
                assert!(gone.ours);
                let at = routes.iter().position(|route| route == gone).unwrap();
                routes.remove(at);
            }
        }
    }

    fn net() -> impl Strategy<Value = IpNet> {
        (0..6u8, any::<bool>()).prop_map(|(number, v6)| {
            let text = if v6 { format!("fd02::{number}0/124") } else { format!("10.2.0.{}/28", number * 16) };
            text.parse().unwrap()
        })
    }

    fn router(net: &IpNet, number: u8) -> IpAddr {
        let text = if net.addr().is_ipv6() { format!("fd00::{number}") } else { format!("10.0.0.{number}") };
        text.parse().unwrap()
    }

    fn table() -> impl Strategy<Value = Vec<Route>> {
        let route = (net(), prop::option::of(1..4u8), any::<bool>(), 0..3u32).prop_map(
            |(net, number, ours, more)| Route {
                net,
                via: number.map(|number| router(&net, number)),
                metric: default_metric(&net) + more,
                ours,
            },
        );
        prop::collection::vec(route, 0..16).prop_map(|routes| {
            // The kernel has one of each destination and metric.
            let routes: BTreeMap<_, _> =
                routes.into_iter().map(|route| ((route.net, route.metric), route)).collect();
            routes.into_values().collect()
        })
    }

    proptest! {
        #[test]
        fn the_plan_leads_to_what_is_wanted_and_touches_nothing_else(
            current in table(),
            wanted in prop::collection::vec((net(), 1..4u8), 0..8),
        ) {
            let wanted: Wanted =
                wanted.into_iter().map(|(net, number)| (net, router(&net, number))).collect();
            let foreign = |routes: &[Route]| {
                routes.iter().filter(|route| !route.ours).cloned().collect::<Vec<_>>()
            };
            let before = plan(&current, &wanted);
            let mut routes = current.clone();
            for op in &before.ops {
                carry_out(&mut routes, op);
            }
            prop_assert_eq!(foreign(&routes), foreign(&current));
            let ours: Wanted =
                routes.iter().filter(|r| r.ours).map(|r| (r.net, r.via.unwrap())).collect();
            let mut possible = wanted.clone();
            possible.retain(|net, _| !before.taken.contains(net));
            prop_assert_eq!(&ours, &possible);
            prop_assert_eq!(routes.iter().filter(|r| r.ours).count(), ours.len());
            prop_assert_eq!(plan(&routes, &wanted).ops, vec![]);
        }
    }
}
