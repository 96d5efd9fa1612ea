//! A node's maps in the kernel: typed handles, taken once.

use aya::Pod;
use aya::maps::lpm_trie::Key;
use aya::maps::{Array, HashMap, LpmTrie, MapData, MapError, PerCpuArray, PerCpuValues};
use bytemuck::Zeroable;
use coil_common::keys::{PeerKey4, PeerKey6, PolicyKey4, PolicyKey6};
use coil_common::names;
use coil_common::stats::{Direction, egress_stat};
use coil_common::values::{
    Counter, EgressNameValue, EgressValue, GatewayValue, MAGLEV_SLOTS, PodSlot, PodValue, PolicyValue,
};

use super::encode::{Limits, decode_egress_name};
use super::loader::{LoadError, Loaded};
use super::near::NearMaps;
use super::state::{MapOp, MapState, Prefix};
use super::writer::Store;

/// A map could not be read or written.
#[derive(Debug, thiserror::Error)]
#[error("cannot {operation} map {map}")]
pub struct MapAccessError {
    /// What was tried.
    pub operation: &'static str,
    /// Name of the map.
    pub map: &'static str,
    /// Why not.
    #[source]
    pub source: MapError,
}

/// All maps that the agent writes.
pub(crate) struct NodeMaps {
    pods: HashMap<MapData, u32, PodValue>,
    pod_slots: Array<MapData, PodSlot>,
    near: NearMaps,
    policy_v4: LpmTrie<MapData, PolicyKey4, PolicyValue>,
    policy_v6: LpmTrie<MapData, PolicyKey6, PolicyValue>,
    egresses: Array<MapData, EgressValue>,
    egress_names: Array<MapData, EgressNameValue>,
    egress_stats: PerCpuArray<MapData, Counter>,
    gateways: Array<MapData, GatewayValue>,
    peers_v4: HashMap<MapData, PeerKey4, u32>,
    peers_v6: HashMap<MapData, PeerKey6, u32>,
    limits: Limits,
}

const FREE_NAME: EgressNameValue = EgressNameValue { namespace: [0; 64], name: [0; 64] };
const FREE_EGRESS: EgressValue = EgressValue { flags: 0, gateways: 0, table: [0; MAGLEV_SLOTS] };

impl NodeMaps {
    /// Takes the handles.
    pub(crate) fn new(loaded: &mut Loaded) -> Result<Self, LoadError> {
        let egresses: Array<_, _> = loaded.map(names::MAP_EGRESSES)?;
        let egress_names: Array<_, _> = loaded.map(names::MAP_EGRESS_NAMES)?;
        let egress_stats: PerCpuArray<_, _> = loaded.map(names::MAP_EGRESS_STATS)?;
        let ids = egress_names.len().min(egresses.len() / 2).min(egress_stats.len() / 4);
        let entries = |name| loaded.capacity(name);
        let limits = Limits {
            pods: entries(names::MAP_PODS),
            policies: entries(names::MAP_POLICY_V4).min(entries(names::MAP_POLICY_V6)),
            egresses: usize::try_from(ids).unwrap_or(usize::MAX),
            gateways: entries(names::MAP_GATEWAYS),
            peers: entries(names::MAP_PEERS_V4).min(entries(names::MAP_PEERS_V6)),
        };
        Ok(Self {
            pods: loaded.map(names::MAP_PODS)?,
            pod_slots: loaded.map(names::MAP_POD_SLOTS)?,
            near: NearMaps::new(loaded)?,
            policy_v4: loaded.map(names::MAP_POLICY_V4)?,
            policy_v6: loaded.map(names::MAP_POLICY_V6)?,
            egresses,
            egress_names,
            egress_stats,
            gateways: loaded.map(names::MAP_GATEWAYS)?,
            peers_v4: loaded.map(names::MAP_PEERS_V4)?,
            peers_v6: loaded.map(names::MAP_PEERS_V6)?,
            limits,
        })
    }

    /// How much fits.
    pub(crate) fn limits(&self) -> Limits {
        self.limits
    }

    /// Makes the slots hold what `pods` holds: they may have been left behind half-written, or by a
    /// release that did not know them.
    pub(crate) fn fill_slots(&mut self) -> Result<(), MapAccessError> {
        for index in 0..self.pod_slots.len() {
            let slot = self.pod_slots.get(&index, 0).map_err(read(names::MAP_POD_SLOTS))?;
            if slot != PodSlot::default() {
                let current = self.pods.get(&slot.ifindex, 0);
                if !current.is_ok_and(|pod| pod == slot.pod) {
                    self.pod_slots.set(index, PodSlot::default(), 0).map_err(remove(names::MAP_POD_SLOTS))?;
                }
            }
        }
        let pods: Result<Vec<_>, _> = self.pods.iter().collect();
        let pods = pods.map_err(read(names::MAP_PODS))?;
        for (ifindex, pod) in &pods {
            self.set_slot(*ifindex, *pod).map_err(write(names::MAP_POD_SLOTS))?;
        }
        self.near.fill(&pods)?;
        Ok(())
    }

    /// Puts a pod into its slot unless another one lives there. The interface is written last, since
    /// it says that the rest is true.
    fn set_slot(&mut self, ifindex: u32, pod: PodValue) -> Result<(), MapError> {
        let index = names::pod_slot(ifindex);
        let holder = self.pod_slots.get(&index, 0)?.ifindex;
        if holder == 0 {
            self.pod_slots.set(index, PodSlot { ifindex: 0, pod }, 0)?;
        } else if holder != ifindex {
            return Ok(());
        }
        self.pod_slots.set(index, PodSlot { ifindex, pod }, 0)
    }

    /// Frees the slot of a pod.
    fn clear_slot(&mut self, ifindex: u32) -> Result<(), MapError> {
        let index = names::pod_slot(ifindex);
        if self.pod_slots.get(&index, 0)?.ifindex == ifindex {
            self.pod_slots.set(index, PodSlot::default(), 0)?;
        }
        Ok(())
    }

    fn reset_stats(&mut self, id: u32) -> Result<(), MapError> {
        let cpus = aya::util::nr_cpus().map_err(|(_, error)| MapError::IoError(error))?;
        for family in 0..2 {
            for direction in [Direction::Tx, Direction::Rx] {
                let zero =
                    PerCpuValues::try_from(vec![Counter::zeroed(); cpus]).map_err(MapError::IoError)?;
                self.egress_stats.set(egress_stat(id * 2 + family, direction), zero, 0)?;
            }
        }
        Ok(())
    }
}

fn read(map: &'static str) -> impl Fn(MapError) -> MapAccessError {
    move |source| MapAccessError { operation: "read", map, source }
}

fn write(map: &'static str) -> impl Fn(MapError) -> MapAccessError {
    move |source| MapAccessError { operation: "write", map, source }
}

fn remove(map: &'static str) -> impl Fn(MapError) -> MapAccessError {
    move |source| MapAccessError { operation: "remove an entry of", map, source }
}

/// Removing what is not there is done already.
pub(crate) fn absent_is_fine(result: Result<(), MapError>) -> Result<(), MapError> {
    match result {
        Err(MapError::KeyNotFound | MapError::ElementNotFound) => Ok(()),
        Err(MapError::SyscallError(error)) if error.io_error.raw_os_error() == Some(libc::ENOENT) => Ok(()),
        result => result,
    }
}

fn dump_array<V: Pod>(map: &Array<MapData, V>) -> impl Iterator<Item = Result<(u32, V), MapError>> {
    (0..map.len()).map(|index| Ok((index, map.get(&index, 0)?)))
}

fn dump_trie<K: Pod, V: Pod>(
    map: &LpmTrie<MapData, K, V>,
) -> impl Iterator<Item = Result<(Prefix<K>, V), MapError>> {
    map.iter().map(|entry| entry.map(|(key, value)| ((key.prefix_len(), key.data()), value)))
}

fn key<K: Pod>((length, data): Prefix<K>) -> Key<K> {
    Key::new(length, data)
}

impl Store for NodeMaps {
    type Error = MapAccessError;

    fn dump(&self) -> Result<MapState, MapAccessError> {
        let mut state = MapState::default();
        for entry in self.pods.iter() {
            let (ifindex, pod) = entry.map_err(read(names::MAP_PODS))?;
            state.pods.insert(ifindex, pod);
        }
        for entry in dump_trie(&self.policy_v4) {
            let (prefix, value) = entry.map_err(read(names::MAP_POLICY_V4))?;
            state.policy_v4.insert(prefix, value);
        }
        for entry in dump_trie(&self.policy_v6) {
            let (prefix, value) = entry.map_err(read(names::MAP_POLICY_V6))?;
            state.policy_v6.insert(prefix, value);
        }
        for entry in dump_array(&self.egress_names) {
            let (id, name) = entry.map_err(read(names::MAP_EGRESS_NAMES))?;
            if decode_egress_name(&name).is_some() {
                state.egress_names.insert(id, name);
            }
        }
        for entry in dump_array(&self.egresses) {
            let (index, egress) = entry.map_err(read(names::MAP_EGRESSES))?;
            if egress != FREE_EGRESS || state.egress_names.contains_key(&(index / 2)) {
                state.egresses.insert(index, egress);
            }
        }
        for entry in dump_array(&self.gateways) {
            let (slot, gateway) = entry.map_err(read(names::MAP_GATEWAYS))?;
            if gateway != GatewayValue::default() {
                state.gateways.insert(slot, gateway);
            }
        }
        for entry in self.peers_v4.iter() {
            let (key, slot) = entry.map_err(read(names::MAP_PEERS_V4))?;
            state.peers_v4.insert(key, slot);
        }
        for entry in self.peers_v6.iter() {
            let (key, slot) = entry.map_err(read(names::MAP_PEERS_V6))?;
            state.peers_v6.insert(key, slot);
        }
        Ok(state)
    }

    fn execute(&mut self, op: &MapOp) -> Result<(), MapAccessError> {
        match *op {
            MapOp::SetGateway(slot, value) | MapOp::ClearGateway(slot, value) => {
                self.gateways.set(slot, value, 0).map_err(write(names::MAP_GATEWAYS))
            }
            MapOp::SetPeer4(key, slot) => {
                self.peers_v4.insert(key, slot, 0).map_err(write(names::MAP_PEERS_V4))
            }
            MapOp::SetPeer6(key, slot) => {
                self.peers_v6.insert(key, slot, 0).map_err(write(names::MAP_PEERS_V6))
            }
            MapOp::ResetEgressStats(id) => self.reset_stats(id).map_err(write(names::MAP_EGRESS_STATS)),
            MapOp::SetEgressName(id, name) => {
                self.egress_names.set(id, name, 0).map_err(write(names::MAP_EGRESS_NAMES))
            }
            MapOp::SetEgress(index, value) => {
                self.egresses.set(index, value, 0).map_err(write(names::MAP_EGRESSES))
            }
            MapOp::SetPolicy4(prefix, value) => {
                self.policy_v4.insert(&key(prefix), value, 0).map_err(write(names::MAP_POLICY_V4))
            }
            MapOp::SetPolicy6(prefix, value) => {
                self.policy_v6.insert(&key(prefix), value, 0).map_err(write(names::MAP_POLICY_V6))
            }
            MapOp::SetPod(ifindex, pod) => {
                if let Ok(old) = self.pods.get(&ifindex, 0) {
                    self.near.remove(ifindex, &old)?;
                }
                self.near.insert(ifindex, &pod)?;
                self.pods.insert(ifindex, pod, 0).map_err(write(names::MAP_PODS))?;
                self.set_slot(ifindex, pod).map_err(write(names::MAP_POD_SLOTS))
            }
            MapOp::RemovePod(ifindex) => {
                if let Ok(old) = self.pods.get(&ifindex, 0) {
                    self.near.remove(ifindex, &old)?;
                }
                self.clear_slot(ifindex).map_err(remove(names::MAP_POD_SLOTS))?;
                absent_is_fine(self.pods.remove(&ifindex)).map_err(remove(names::MAP_PODS))
            }
            MapOp::RemovePolicy4(prefix) => {
                absent_is_fine(self.policy_v4.remove(&key(prefix))).map_err(remove(names::MAP_POLICY_V4))
            }
            MapOp::RemovePolicy6(prefix) => {
                absent_is_fine(self.policy_v6.remove(&key(prefix))).map_err(remove(names::MAP_POLICY_V6))
            }
            MapOp::RemovePeer4(key) => {
                absent_is_fine(self.peers_v4.remove(&key)).map_err(remove(names::MAP_PEERS_V4))
            }
            MapOp::RemovePeer6(key) => {
                absent_is_fine(self.peers_v6.remove(&key)).map_err(remove(names::MAP_PEERS_V6))
            }
            MapOp::ClearEgress(index) => {
                self.egresses.set(index, FREE_EGRESS, 0).map_err(write(names::MAP_EGRESSES))
            }
            MapOp::ClearEgressName(id) => {
                self.egress_names.set(id, FREE_NAME, 0).map_err(write(names::MAP_EGRESS_NAMES))
            }
        }
    }
}
