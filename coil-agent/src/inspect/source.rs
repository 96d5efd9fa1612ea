//! Pinned maps as the tables of the datapath's decisions.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::Path;
use std::rc::Rc;

use coil_ebpf::testing::memory::Source;

use super::InspectError;
use crate::datapath::internal::{ReadMap, current};

/// The maps of a folder; those that are not there are empty.
#[derive(Debug)]
pub(crate) struct Pinned {
    maps: BTreeMap<&'static str, ReadMap>,
    trouble: Trouble,
}

/// What went wrong while decisions were made, which cannot say so themselves.
#[derive(Clone, Debug, Default)]
pub(crate) struct Trouble(Rc<RefCell<Option<(&'static str, std::io::Error)>>>);

impl Trouble {
    /// Fails if a map could not be read.
    pub(crate) fn check(&self, folder: &Path) -> Result<(), InspectError> {
        match self.0.borrow_mut().take() {
            None => Ok(()),
            Some((map, error)) => Err(InspectError::pin("read", &folder.join(map))(error)),
        }
    }
}

impl Pinned {
    /// Opens these maps.
    pub(crate) fn open(folder: &Path, names: &[&'static str]) -> Result<(Self, Trouble), InspectError> {
        let mut maps = BTreeMap::new();
        for &name in names {
            let path = current(folder, name);
            match ReadMap::open(&path) {
                Ok(map) => drop(maps.insert(name, map)),
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                Err(error) => return Err(InspectError::pin("open", &path)(error)),
            }
        }
        let trouble = Trouble::default();
        Ok((Self { maps, trouble: trouble.clone() }, trouble))
    }
}

impl Source for Pinned {
    fn read(&self, map: &'static str, key: &[u8]) -> Option<Vec<u8>> {
        match self.maps.get(map)?.lookup(key) {
            Ok(value) => value,
            Err(error) => {
                *self.trouble.0.borrow_mut() = Some((map, error));
                None
            }
        }
    }
}
