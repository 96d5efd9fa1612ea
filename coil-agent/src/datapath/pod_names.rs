//! Names of the pods of this node, pinned beside what the datapath knows of them, so that tools can name
//! pods without the API. The datapath itself never looks here, and does not wait for it.

use std::collections::BTreeMap;

use aya::maps::{HashMap, MapData};
use bytemuck::Zeroable;
use coil_common::names::MAP_POD_NAMES;
use coil_common::values::PodNameValue;

use super::loader::{LoadError, Loaded};
use super::maps::{MapAccessError, absent_is_fine};
use crate::desired::DesiredState;

/// The map, and what it holds.
pub(crate) struct PodNames {
    map: HashMap<MapData, u32, PodNameValue>,
    /// `None` if it must be read.
    current: Option<BTreeMap<u32, PodNameValue>>,
}

/// Text in a field, cut if it is too long.
fn field<const N: usize>(text: &str) -> [u8; N] {
    let mut field = [0; N];
    for (to, from) in field.iter_mut().zip(text.bytes()) {
        *to = from;
    }
    field
}

/// Text of a field.
pub(crate) fn text(field: &[u8]) -> String {
    let end = field.iter().position(|&byte| byte == 0).unwrap_or(field.len());
    String::from_utf8_lossy(&field[..end]).into_owned()
}

fn names(desired: &DesiredState) -> BTreeMap<u32, PodNameValue> {
    let name = |(uid, pod): (&String, &crate::desired::DesiredPod)| {
        let mut value = PodNameValue::zeroed();
        value.uid = field(uid);
        value.namespace = field(&pod.namespace);
        value.name = field(&pod.name);
        (pod.ifindex, value)
    };
    desired.pods.iter().map(name).collect()
}

impl PodNames {
    /// Takes the handle.
    pub(crate) fn new(loaded: &mut Loaded) -> Result<Self, LoadError> {
        Ok(Self { map: loaded.map(MAP_POD_NAMES)?, current: None })
    }

    /// Reads the map again the next time.
    pub(crate) fn forget(&mut self) {
        self.current = None;
    }

    /// Makes the map hold the names of `desired`; only adds until that is complete.
    pub(crate) fn sync(&mut self, desired: &DesiredState) -> Result<(), MapAccessError> {
        let error = |operation| move |source| MapAccessError { operation, map: MAP_POD_NAMES, source };
        let mut current = match self.current.take() {
            Some(current) => current,
            None => self.map.iter().collect::<Result<_, _>>().map_err(error("read"))?,
        };
        let wanted = names(desired);
        for (ifindex, name) in &wanted {
            if current.get(ifindex) != Some(name) {
                self.map.insert(ifindex, name, 0).map_err(error("write"))?;
                current.insert(*ifindex, *name);
            }
        }
        if desired.complete {
            let gone: Vec<u32> =
                current.keys().filter(|ifindex| !wanted.contains_key(ifindex)).copied().collect();
            for ifindex in gone {
                absent_is_fine(self.map.remove(&ifindex)).map_err(error("remove an entry of"))?;
                current.remove(&ifindex);
            }
        }
        self.current = Some(current);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_cut_and_read_back() {
        assert_eq!(text(&field::<8>("abc")), "abc");
        assert_eq!(text(&field::<4>("abcdef")), "abcd");
        assert_eq!(text(&field::<4>("")), "");
    }
}
