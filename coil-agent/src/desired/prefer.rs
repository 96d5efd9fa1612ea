//! Which gateways of an Egress the pods of this node prefer for new flows. Pure.

use std::collections::BTreeMap;
use std::net::IpAddr;

use coil_api::egress::GatewayPreference;

use super::GatewayState;
use crate::index::GatewayView;

/// Where this node is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Place {
    /// Its name.
    pub node: String,
    /// Its zone, if it has one and it is known.
    pub zone: Option<String>,
}

/// States of the gateways for this node: ready ones that are not preferred become a reserve, unless no
/// preferred one of their address family is ready.
///
/// A preference for the node is one for the zone, too, where the node has no gateway.
#[must_use]
pub fn prefer(
    preference: GatewayPreference,
    place: &Place,
    gateways: BTreeMap<IpAddr, GatewayView>,
) -> BTreeMap<IpAddr, GatewayState> {
    let on_node = |gateway: &GatewayView| gateway.node.as_deref() == Some(&place.node);
    let in_zone = |gateway: &GatewayView| gateway.zone.is_some() && gateway.zone == place.zone;
    let preferred = |is_v4: bool| -> Option<fn(&Place, &GatewayView) -> bool> {
        let ready = |near: &dyn Fn(&GatewayView) -> bool| {
            gateways.iter().any(|(address, gateway)| {
                address.is_ipv4() == is_v4 && gateway.state == GatewayState::Ready && near(gateway)
            })
        };
        match preference {
            GatewayPreference::Node if ready(&on_node) => {
                Some(|place, gateway| gateway.node.as_deref() == Some(&place.node))
            }
            GatewayPreference::Node | GatewayPreference::Zone if ready(&in_zone) => {
                Some(|place, gateway| gateway.zone.is_some() && gateway.zone == place.zone)
            }
            GatewayPreference::None | GatewayPreference::Zone | GatewayPreference::Node => None,
        }
    };
    let (v4, v6) = (preferred(true), preferred(false));
    gateways
        .into_iter()
        .map(|(address, gateway)| {
            let near = if address.is_ipv4() { v4 } else { v6 };
            let far = near.is_some_and(|near| !near(place, &gateway));
            let state = match gateway.state {
                GatewayState::Ready if far => GatewayState::Reserve,
                state => state,
            };
            (address, state)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;
    use GatewayState::{Draining, Ready, Reserve};

    /// Gateways as (address, state, node, zone).
    fn of(list: &[(&str, GatewayState, &str, &str)]) -> BTreeMap<IpAddr, GatewayView> {
        let some = |text: &str| (!text.is_empty()).then(|| text.to_owned());
        list.iter()
            .map(|(address, state, node, zone)| {
                (address.parse().unwrap(), GatewayView { state: *state, node: some(node), zone: some(zone) })
            })
            .collect()
    }

    fn states(
        preference: GatewayPreference,
        (node, zone): (&str, Option<&str>),
        list: &[(&str, GatewayState, &str, &str)],
    ) -> Vec<GatewayState> {
        let place = Place { node: node.into(), zone: zone.map(str::to_owned) };
        let states = prefer(preference, &place, of(list));
        list.iter().map(|(address, ..)| states[&address.parse::<IpAddr>().unwrap()]).collect()
    }

    const THREE: [(&str, GatewayState, &str, &str); 3] =
        [("10.0.0.1", Ready, "n1", "a"), ("10.0.0.2", Ready, "n2", "a"), ("10.0.0.3", Ready, "n3", "b")];

    #[test]
    fn near_ones_are_preferred() {
        use GatewayPreference as P;
        let all = [Ready; 3];
        for (preference, place, wanted) in [
            (P::None, ("n1", Some("a")), all),
            (P::Zone, ("n1", Some("a")), [Ready, Ready, Reserve]),
            (P::Zone, ("n9", Some("b")), [Reserve, Reserve, Ready]),
            (P::Zone, ("n9", Some("c")), all),
            (P::Zone, ("n1", None), all),
            (P::Node, ("n1", Some("a")), [Ready, Reserve, Reserve]),
            (P::Node, ("n1", None), [Ready, Reserve, Reserve]),
            // No gateway on the node: those of its zone, then all.
            (P::Node, ("n9", Some("a")), [Ready, Ready, Reserve]),
            (P::Node, ("n9", Some("c")), all),
            (P::Node, ("n9", None), all),
        ] {
            assert_eq!(states(preference, place, &THREE), wanted, "{preference:?} {place:?}");
        }
    }

    #[test]
    fn only_ready_ones_count_and_the_others_stay_as_they_are() {
        let mut list = THREE;
        list[0].1 = Draining;
        let prefer = |preference, place| states(preference, place, &list);
        assert_eq!(prefer(GatewayPreference::Node, ("n1", None)), [Draining, Ready, Ready]);
        assert_eq!(prefer(GatewayPreference::Node, ("n1", Some("a"))), [Draining, Ready, Reserve]);
        assert_eq!(prefer(GatewayPreference::Zone, ("n1", Some("b"))), [Draining, Reserve, Ready]);
    }

    #[test]
    fn each_family_for_itself_and_the_unknown_is_near_nobody() {
        let list = [
            ("10.0.0.1", Ready, "n1", "a"),
            ("10.0.0.2", Ready, "n2", "b"),
            ("fd00::2", Ready, "n2", "b"),
            ("fd00::3", Ready, "", ""),
        ];
        let wanted = [Ready, Reserve, Ready, Ready];
        assert_eq!(states(GatewayPreference::Node, ("n1", None), &list), wanted);
        let wanted = [Reserve, Ready, Ready, Reserve];
        assert_eq!(states(GatewayPreference::Zone, ("n9", Some("b")), &list), wanted);
    }
}
