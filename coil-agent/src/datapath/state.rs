//! The contents of the maps that the agent writes, as plain data.

use std::collections::BTreeMap;

use coil_common::keys::{PeerKey4, PeerKey6, PolicyKey4, PolicyKey6};
use coil_common::values::{EgressNameValue, EgressValue, GATEWAY_GONE, GatewayValue, PodValue, PolicyValue};

/// Prefix length, set included, and data of an LPM key.
pub(crate) type Prefix<K> = (u32, K);

/// What the maps hold, or should hold.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct MapState {
    /// By index of the host-side interface.
    pub(crate) pods: BTreeMap<u32, PodValue>,
    pub(crate) policy_v4: BTreeMap<Prefix<PolicyKey4>, PolicyValue>,
    pub(crate) policy_v6: BTreeMap<Prefix<PolicyKey6>, PolicyValue>,
    /// Without the slots of free ids.
    pub(crate) egresses: BTreeMap<u32, EgressValue>,
    /// Without free ids.
    pub(crate) egress_names: BTreeMap<u32, EgressNameValue>,
    /// With slots that are gone, since these hold the generation; without those never used.
    pub(crate) gateways: BTreeMap<u32, GatewayValue>,
    pub(crate) peers_v4: BTreeMap<PeerKey4, u32>,
    pub(crate) peers_v6: BTreeMap<PeerKey6, u32>,
}

impl MapState {
    /// Adds whatever `other` has under keys that are free here.
    pub(crate) fn fill_from(mut self, other: Self) -> Self {
        fn fill<K: Ord, V>(to: &mut BTreeMap<K, V>, from: BTreeMap<K, V>) {
            for (key, value) in from {
                to.entry(key).or_insert(value);
            }
        }
        fill(&mut self.pods, other.pods);
        fill(&mut self.policy_v4, other.policy_v4);
        fill(&mut self.policy_v6, other.policy_v6);
        fill(&mut self.egresses, other.egresses);
        fill(&mut self.egress_names, other.egress_names);
        for (index, value) in other.gateways {
            let slot = self.gateways.entry(index).or_insert(value);
            if slot.state == GATEWAY_GONE {
                *slot = value;
            }
        }
        fill(&mut self.peers_v4, other.peers_v4);
        fill(&mut self.peers_v6, other.peers_v6);
        self
    }
}

/// One change of a map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(clippy::large_enum_variant, reason = "lists of these are short, and live shortly")]
pub(crate) enum MapOp {
    SetGateway(u32, GatewayValue),
    SetPeer4(PeerKey4, u32),
    SetPeer6(PeerKey6, u32),
    /// Zeroes the counters of both families of an id.
    ResetEgressStats(u32),
    SetEgressName(u32, EgressNameValue),
    SetEgress(u32, EgressValue),
    SetPolicy4(Prefix<PolicyKey4>, PolicyValue),
    SetPolicy6(Prefix<PolicyKey6>, PolicyValue),
    SetPod(u32, PodValue),
    RemovePod(u32),
    RemovePolicy4(Prefix<PolicyKey4>),
    RemovePolicy6(Prefix<PolicyKey6>),
    RemovePeer4(PeerKey4),
    RemovePeer6(PeerKey6),
    ClearEgress(u32),
    ClearEgressName(u32),
    /// Marks a slot as gone; its generation stays.
    ClearGateway(u32, GatewayValue),
}

impl MapOp {
    /// Takes something away that the datapath may use, rather than adding or replacing.
    pub(crate) fn is_removal(&self) -> bool {
        match self {
            Self::SetGateway(..)
            | Self::SetPeer4(..)
            | Self::SetPeer6(..)
            | Self::ResetEgressStats(..)
            | Self::SetEgressName(..)
            | Self::SetEgress(..)
            | Self::SetPolicy4(..)
            | Self::SetPolicy6(..)
            | Self::SetPod(..) => false,
            Self::RemovePod(..)
            | Self::RemovePolicy4(..)
            | Self::RemovePolicy6(..)
            | Self::RemovePeer4(..)
            | Self::RemovePeer6(..)
            | Self::ClearEgress(..)
            | Self::ClearEgressName(..)
            | Self::ClearGateway(..) => true,
        }
    }
}
