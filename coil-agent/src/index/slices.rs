//! Gateways of Egresses, from EndpointSlices.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use coil_api::names;
use k8s_openapi::api::discovery::v1::{Endpoint, EndpointSlice};
use kube::ResourceExt;

use super::{Change, ObjectKey};
use crate::desired::{EgressName, GatewayState};

/// What matters of an EndpointSlice.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SliceView {
    /// Namespace and name.
    pub key: ObjectKey,
    /// The Egress that it is about.
    pub egress: EgressName,
    /// Addresses, whether they take new flows, and where they are.
    pub gateways: BTreeMap<IpAddr, GatewayView>,
}

/// What matters of an endpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GatewayView {
    /// Whether it takes new flows.
    pub state: GatewayState,
    /// Its node.
    pub node: Option<String>,
    /// Its zone.
    pub zone: Option<String>,
}

impl SliceView {
    /// Reads a slice; `None` if it is not about an Egress.
    #[must_use]
    pub fn of(slice: &EndpointSlice) -> Option<Self> {
        let namespace = slice.namespace()?;
        let name = slice.labels().get(names::LABEL_APP_INSTANCE)?;
        let mut gateways = BTreeMap::new();
        for endpoint in &slice.endpoints {
            let view = GatewayView {
                state: state(endpoint),
                node: endpoint.node_name.clone(),
                zone: endpoint.zone.clone(),
            };
            // An address type of host names has none that parses.
            for address in endpoint.addresses.iter().filter_map(|text| text.parse().ok()) {
                better(&mut gateways, address, &view);
            }
        }
        Some(Self {
            egress: EgressName { namespace: namespace.clone(), name: name.clone() },
            key: ObjectKey::new(namespace, slice.name_any()),
            gateways,
        })
    }
}

impl GatewayView {
    /// One of which nothing else is known.
    #[must_use]
    pub fn new(state: GatewayState) -> Self {
        Self { state, node: None, zone: None }
    }
}

/// What conditions say; those that are absent mean what the API defines for them.
///
/// An endpoint that is listed has a pod, and the datapath of a pod outlives its agent: whether or not
/// its `coil-egress` is ready, the flows that it has go on. Only new ones need a ready one.
fn state(endpoint: &Endpoint) -> GatewayState {
    let conditions = endpoint.conditions.as_ref();
    let ready = conditions.and_then(|c| c.ready).unwrap_or(true);
    let terminating = conditions.and_then(|c| c.terminating).unwrap_or(false);
    if ready && !terminating { GatewayState::Ready } else { GatewayState::Draining }
}

/// While an address moves between slices it is in two of them.
fn better(gateways: &mut BTreeMap<IpAddr, GatewayView>, address: IpAddr, view: &GatewayView) {
    let entry = gateways.entry(address).or_insert_with(|| view.clone());
    if view.state == GatewayState::Ready {
        *entry = view.clone();
    }
}

/// Gateways of all Egresses.
#[derive(Debug, Default)]
pub struct Slices {
    slices: BTreeMap<ObjectKey, SliceView>,
    by_egress: BTreeMap<EgressName, BTreeSet<ObjectKey>>,
    synced: bool,
}

impl Slices {
    /// Takes a change.
    pub fn change(&mut self, change: Change<SliceView>) {
        match change {
            Change::Apply(slice) => self.apply(slice),
            Change::Delete(key) => self.delete(&key),
            Change::Reset { objects, unreadable } => {
                let listed: BTreeSet<&ObjectKey> =
                    objects.iter().map(|s| &s.key).chain(&unreadable).collect();
                let gone: Vec<ObjectKey> =
                    self.slices.keys().filter(|key| !listed.contains(key)).cloned().collect();
                for key in gone {
                    self.delete(&key);
                }
                for slice in objects {
                    self.apply(slice);
                }
                self.synced = true;
            }
        }
    }

    /// Gateways of an Egress.
    #[must_use]
    pub fn gateways(&self, egress: &EgressName) -> BTreeMap<IpAddr, GatewayView> {
        let mut gateways = BTreeMap::new();
        for key in self.by_egress.get(egress).into_iter().flatten() {
            for (address, view) in self.slices.get(key).iter().flat_map(|s| &s.gateways) {
                better(&mut gateways, *address, view);
            }
        }
        gateways
    }

    /// The first list is complete.
    #[must_use]
    pub fn synced(&self) -> bool {
        self.synced
    }

    fn apply(&mut self, slice: SliceView) {
        self.delete(&slice.key);
        self.by_egress.entry(slice.egress.clone()).or_default().insert(slice.key.clone());
        self.slices.insert(slice.key.clone(), slice);
    }

    fn delete(&mut self, key: &ObjectKey) {
        let Some(slice) = self.slices.remove(key) else {
            return;
        };
        if let Some(keys) = self.by_egress.get_mut(&slice.egress) {
            keys.remove(key);
            if keys.is_empty() {
                self.by_egress.remove(&slice.egress);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

    use super::*;
    use crate::index::testing::name;

    fn slice(key: &str, endpoints: serde_json::Value) -> SliceView {
        let object: EndpointSlice = serde_json::from_value(serde_json::json!({
            "metadata": {"namespace": "internet", "name": key, "labels": {
                "app.kubernetes.io/name": "coil", "app.kubernetes.io/component": "egress",
                "app.kubernetes.io/instance": "a"}},
            "addressType": "IPv4",
            "endpoints": endpoints,
        }))
        .unwrap();
        SliceView::of(&object).unwrap()
    }

    #[test]
    fn conditions_decide() {
        let view = slice(
            "a-1",
            serde_json::json!([
                {"addresses": ["10.0.0.1"], "nodeName": "n1", "zone": "z"},
                {"addresses": ["10.0.0.2"], "conditions": {"ready": false}},
                {"addresses": ["10.0.0.3"], "conditions":
                    {"ready": false, "serving": true, "terminating": true}},
                {"addresses": ["10.0.0.4"], "conditions":
                    {"ready": false, "serving": false, "terminating": true}},
                {"addresses": ["no.address"], "conditions": {"ready": true}},
            ]),
        );
        let states: Vec<_> = view.gateways.iter().map(|(a, g)| (a.to_string(), g.state)).collect();
        let places: Vec<_> =
            view.gateways.values().map(|g| (g.node.as_deref(), g.zone.as_deref())).take(2).collect();
        assert_eq!(places, [(Some("n1"), Some("z")), (None, None)]);
        assert_eq!(
            states,
            [
                ("10.0.0.1".to_owned(), GatewayState::Ready),
                ("10.0.0.2".to_owned(), GatewayState::Draining),
                ("10.0.0.3".to_owned(), GatewayState::Draining),
                ("10.0.0.4".to_owned(), GatewayState::Draining),
            ]
        );
    }

    #[test]
    fn slices_of_an_egress_are_joined() {
        let mut slices = Slices::default();
        let draining = serde_json::json!([{"addresses": ["10.0.0.1"], "conditions":
            {"ready": false, "serving": true, "terminating": true}}]);
        let ready = serde_json::json!([{"addresses": ["10.0.0.1"]}, {"addresses": ["10.0.0.2"]}]);
        slices.change(Change::Reset {
            objects: vec![slice("a-1", draining), slice("a-2", ready)],
            unreadable: vec![],
        });
        let gateways = slices.gateways(&name("a"));
        assert_eq!(gateways.len(), 2);
        assert!(gateways.values().all(|gateway| gateway.state == GatewayState::Ready));
        slices.change(Change::Delete(ObjectKey::new("internet", "a-2")));
        assert_eq!(
            slices.gateways(&name("a")).into_values().map(|gateway| gateway.state).collect::<Vec<_>>(),
            [GatewayState::Draining]
        );
        slices.change(Change::Reset { objects: vec![], unreadable: vec![] });
        assert!(slices.gateways(&name("a")).is_empty());
        assert!(slices.by_egress.is_empty());
    }
}
