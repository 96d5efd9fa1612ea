//! Pods of this node by address, for packets that go from pod to pod without a tunnel. Follows the map of pods: what it
//! says of an address whose pod is another by now has no effect, since the datapath looks at the pod as well.

use std::collections::BTreeMap;

use aya::Pod;
use aya::maps::{HashMap, MapData};
use coil_common::keys::{ClientKey4, ClientKey6};
use coil_common::names;
use coil_common::values::PodValue;

use super::loader::{LoadError, Loaded};
use super::maps::{MapAccessError, absent_is_fine};

/// Both families.
pub(crate) struct NearMaps {
    v4: HashMap<MapData, ClientKey4, u32>,
    v6: HashMap<MapData, ClientKey6, u32>,
}

fn key4(pod: &PodValue) -> Option<ClientKey4> {
    (pod.ipv4 != [0; 4]).then_some(ClientKey4 { addr: pod.ipv4 })
}

fn key6(pod: &PodValue) -> Option<ClientKey6> {
    (pod.ipv6 != [0; 16]).then_some(ClientKey6 { addr: pod.ipv6 })
}

impl NearMaps {
    /// Takes the handles.
    pub(crate) fn new(loaded: &mut Loaded) -> Result<Self, LoadError> {
        Ok(Self { v4: loaded.map(names::MAP_NEAR_V4)?, v6: loaded.map(names::MAP_NEAR_V6)? })
    }

    /// Makes the maps hold these pods and no others.
    pub(crate) fn fill(&mut self, pods: &[(u32, PodValue)]) -> Result<(), MapAccessError> {
        let v4 = pods.iter().filter_map(|(ifindex, pod)| Some((key4(pod)?, *ifindex))).collect();
        let v6 = pods.iter().filter_map(|(ifindex, pod)| Some((key6(pod)?, *ifindex))).collect();
        fill(&mut self.v4, names::MAP_NEAR_V4, &v4)?;
        fill(&mut self.v6, names::MAP_NEAR_V6, &v6)
    }

    /// Adds a pod.
    pub(crate) fn insert(&mut self, ifindex: u32, pod: &PodValue) -> Result<(), MapAccessError> {
        if let Some(key) = key4(pod) {
            self.v4.insert(key, ifindex, 0).map_err(error("write", names::MAP_NEAR_V4))?;
        }
        if let Some(key) = key6(pod) {
            self.v6.insert(key, ifindex, 0).map_err(error("write", names::MAP_NEAR_V6))?;
        }
        Ok(())
    }

    /// Removes a pod; an address that another one has by now stays.
    pub(crate) fn remove(&mut self, ifindex: u32, pod: &PodValue) -> Result<(), MapAccessError> {
        if let Some(key) = key4(pod)
            && self.v4.get(&key, 0).is_ok_and(|holder| holder == ifindex)
        {
            absent_is_fine(self.v4.remove(&key)).map_err(error("remove an entry of", names::MAP_NEAR_V4))?;
        }
        if let Some(key) = key6(pod)
            && self.v6.get(&key, 0).is_ok_and(|holder| holder == ifindex)
        {
            absent_is_fine(self.v6.remove(&key)).map_err(error("remove an entry of", names::MAP_NEAR_V6))?;
        }
        Ok(())
    }
}

fn error(operation: &'static str, map: &'static str) -> impl Fn(aya::maps::MapError) -> MapAccessError {
    move |source| MapAccessError { operation, map, source }
}

fn fill<K: Pod + Ord>(
    map: &mut HashMap<MapData, K, u32>,
    name: &'static str,
    wanted: &BTreeMap<K, u32>,
) -> Result<(), MapAccessError> {
    let held: Result<BTreeMap<K, u32>, _> = map.iter().collect();
    let held = held.map_err(error("read", name))?;
    for key in held.keys().filter(|key| !wanted.contains_key(*key)) {
        absent_is_fine(map.remove(key)).map_err(error("remove an entry of", name))?;
    }
    for (key, ifindex) in wanted {
        if held.get(key) != Some(ifindex) {
            map.insert(key, ifindex, 0).map_err(error("write", name))?;
        }
    }
    Ok(())
}
