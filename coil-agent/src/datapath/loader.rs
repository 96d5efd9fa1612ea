//! Loads the object for one role, over maps that an earlier run has pinned.
//!
//! Pins the maps of the role; those of the other role exist in the object too, but are created with
//! a single entry and go with the program. Programs are loaded, not attached.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use aya::maps::{Array, Map, MapError};
use aya::programs::{ProgramError, ProgramFd, ProgramInfo, SchedClassifier};
use aya::{Ebpf, EbpfError, EbpfLoader};
use aya_obj::{Object, ParseError};
use coil_common::config::{CONFIG, Config};
use coil_common::names;
use coil_common::values::ConfigValue;

use super::layout::btf::Btf;
use super::migrate::{Migration, MigrationError};
use super::object::object;
use super::older::Lacks;
use super::pins::PinError;
use super::raw_map::{Layouts, RawMap};
use super::sys::MapInfo;

/// Whose programs and maps are loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// `coild`: `from_pod` and `to_pod`.
    Node,
    /// `coil-egress`: `gateway`.
    Gateway,
}

impl Role {
    fn maps(self) -> &'static [&'static str] {
        match self {
            Self::Node => names::NODE_MAPS,
            Self::Gateway => names::GATEWAY_MAPS,
        }
    }

    fn other(self) -> Self {
        match self {
            Self::Node => Self::Gateway,
            Self::Gateway => Self::Node,
        }
    }

    /// Maps of the role whose entries only the agent makes; the datapath makes or changes all others.
    pub(crate) fn written(self) -> &'static [&'static str] {
        match self {
            Self::Node => &[
                names::MAP_PODS,
                names::MAP_POLICY_V4,
                names::MAP_POLICY_V6,
                names::MAP_EGRESSES,
                names::MAP_EGRESS_NAMES,
                names::MAP_GATEWAYS,
                names::MAP_PEERS_V4,
                names::MAP_PEERS_V6,
            ],
            Self::Gateway => &[names::MAP_CLIENTS_V4, names::MAP_CLIENTS_V6],
        }
    }

    fn programs(self) -> &'static [&'static str] {
        match self {
            Self::Node => &[names::PROGRAM_FROM_POD, names::PROGRAM_TO_POD],
            Self::Gateway => &[names::PROGRAM_GATEWAY],
        }
    }
}

/// Why the object cannot be loaded.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// This program was built without the object.
    #[error(
        "this program was built without the eBPF object; run `cargo xtask build`, which builds \
         the object first"
    )]
    NoObject,
    /// The kernel does not say what it can do.
    #[error("cannot load programs")]
    Probe(#[source] io::Error),
    /// The object cannot be read.
    #[error("the embedded eBPF object is damaged")]
    Parse(#[from] ParseError),
    /// The object lacks something.
    #[error("the embedded eBPF object has no {what} {name}")]
    Missing {
        /// `map` or `program`.
        what: &'static str,
        /// Its name.
        name: &'static str,
    },
    /// A pinned map has another layout, and its contents cannot be moved.
    #[error(transparent)]
    Migration(#[from] MigrationError),
    /// Something else is pinned where a map should be.
    #[error("{} is not a map; remove it", path.display())]
    NotAMap {
        /// The pin.
        path: PathBuf,
    },
    /// A pin cannot be used.
    #[error(transparent)]
    Pin(#[from] PinError),
    /// Maps cannot be created.
    #[error("cannot create the maps of the eBPF object")]
    Load(#[source] Box<EbpfError>),
    /// The kernel's verifier rejected a program.
    #[error("the kernel rejected program {program}: {log}")]
    Rejected {
        /// Its name.
        program: &'static str,
        /// The error.
        #[source]
        source: io::Error,
        /// The last lines of the verifier's log; all of it may be hundreds of megabytes.
        log: String,
    },
    /// A program is not what is expected, or cannot be used.
    #[error("cannot use program {program}")]
    Program {
        /// Its name.
        program: &'static str,
        /// Why not.
        #[source]
        source: Box<ProgramError>,
    },
    /// A map is not of the type that is expected of it.
    #[error("map {map} of the eBPF object is not what is expected")]
    MapType {
        /// Its name.
        map: &'static str,
        /// What differs.
        #[source]
        source: MapError,
    },
}

/// A loaded object.
#[derive(Debug)]
pub struct Loaded {
    ebpf: Ebpf,
    sizes: Vec<(&'static str, u32)>,
    migration: Migration,
}

/// Loads the programs and maps of `role`, with its maps pinned in `folder` or taken from there. `sizes`
/// are capacities other than the object's; a map that is pinned keeps its own.
pub fn load(
    role: Role,
    folder: &Path,
    config: &Config,
    sizes: &[(&'static str, u32)],
) -> Result<Loaded, LoadError> {
    let bytes = Lacks::probe().map_err(LoadError::Probe)?.adapt(object()?);
    let definitions = Object::parse(&bytes)?;
    let btf = definitions.btf.as_ref().and_then(|btf| Btf::parse(&btf.to_bytes()));
    let is_lively = |name: &str| !role.written().contains(&name);
    let mut migration = Migration::recover(folder, is_lively)?;
    let mut capacities = Vec::new();
    let mut pins = Vec::new();
    for &name in role.maps() {
        let map = definitions.maps.get(name).ok_or(LoadError::Missing { what: "map", name })?;
        let size = sizes.iter().find(|(sized, _)| *sized == name).map(|(_, size)| *size);
        let mut wanted = MapInfo {
            map_type: map.map_type(),
            id: 0,
            key_size: map.key_size(),
            value_size: map.value_size(),
            max_entries: size.unwrap_or(map.max_entries()),
            flags: map.map_flags(),
        };
        let layouts = match (&btf, map) {
            (Some(btf), aya_obj::Map::Btf(map)) => {
                Layouts::of(btf, map.def.btf_key_type_id, map.def.btf_value_type_id)
            }
            _ => None,
        };
        let path = folder.join(name);
        let path = match pinned(&path)? {
            None => path,
            Some(pinned) => {
                if size.is_some() && pinned.info.max_entries > wanted.max_entries {
                    tracing::warn!(
                        map = %path.display(), capacity = pinned.info.max_entries,
                        wanted = wanted.max_entries,
                        "a pinned map keeps its capacity, since its entries are in use",
                    );
                    wanted.max_entries = pinned.info.max_entries;
                }
                let fits =
                    fits(&pinned, &wanted, layouts.as_ref()).map_err(PinError::path("describe", &path))?;
                if fits { path } else { migration.begin(name, is_lively(name))? }
            }
        };
        capacities.push((name, wanted.max_entries));
        pins.push(path);
    }
    let mut loader = EbpfLoader::new();
    loader.override_global(CONFIG, config, true);
    for (&(name, capacity), path) in capacities.iter().zip(pins) {
        loader.map_pin_path(name, path).map_max_entries(name, capacity);
    }
    for &name in role.other().maps() {
        if !role.maps().contains(&name) {
            loader.map_max_entries(name, 1);
        }
    }
    let mut ebpf = loader.load(&bytes).map_err(|error| LoadError::Load(Box::new(error)))?;
    for &program in role.programs() {
        let refused = refused(program);
        let classifier: &mut SchedClassifier = ebpf
            .program_mut(program)
            .ok_or(LoadError::Missing { what: "program", name: program })?
            .try_into()
            .map_err(refused)?;
        classifier.load().map_err(refused)?;
    }
    // Only now that the kernel has taken the programs: until then nothing has changed for anybody.
    migration.fill()?;
    copy_config(&mut ebpf, config)?;
    Ok(Loaded { ebpf, sizes: capacities, migration })
}

/// Leaves the configuration where tools find it: that of the programs cannot be read back.
fn copy_config(ebpf: &mut Ebpf, config: &Config) -> Result<(), LoadError> {
    let bytes = bytemuck::bytes_of(config);
    let mut value = ConfigValue { size: 0, bytes: [0; 252] };
    if let Some(room) = value.bytes.get_mut(..bytes.len()) {
        room.copy_from_slice(bytes);
        value.size = u32::try_from(bytes.len()).unwrap_or(0);
    }
    let map = names::MAP_CONFIG;
    let data = ebpf.map_mut(map).ok_or(LoadError::Missing { what: "map", name: map })?;
    Array::<_, ConfigValue>::try_from(data)
        .and_then(|mut array| array.set(0, value, 0))
        .map_err(|source| LoadError::MapType { map, source })
}

/// Lines of the verifier's log that an error carries.
const LOG_LINES: usize = 12;

fn refused(program: &'static str) -> impl Fn(ProgramError) -> LoadError + Copy {
    move |error| match error {
        ProgramError::LoadError { io_error, verifier_log } => {
            let log = verifier_log.to_string();
            let mut lines: Vec<&str> = log.lines().rev().take(LOG_LINES).collect();
            lines.reverse();
            LoadError::Rejected { program, source: io_error, log: lines.join("\n") }
        }
        source => LoadError::Program { program, source: Box::new(source) },
    }
}

/// The map that is pinned at a path.
fn pinned(path: &Path) -> Result<Option<RawMap>, LoadError> {
    match RawMap::open(path) {
        Ok(map) => Ok(map),
        Err(error) if error.kind() == io::ErrorKind::InvalidData => {
            Err(LoadError::NotAMap { path: path.to_path_buf() })
        }
        // A folder, a symbolic link or a file that the file system has put there.
        Err(error) => Err(PinError::path("open", path)(error).into()),
    }
}

/// Whether a pinned map is what the programs need.
fn fits(pinned: &RawMap, wanted: &MapInfo, layouts: Option<&Layouts>) -> io::Result<bool> {
    if (MapInfo { id: 0, ..pinned.info }) != *wanted {
        return Ok(false);
    }
    let known = pinned.layouts()?;
    Ok(known.is_none() || layouts.is_none() || known.as_ref() == layouts)
}

impl Loaded {
    /// Says that all programs have been replaced: maps that these need in another way than the pinned ones
    /// take the place of those. Can be repeated after a failure.
    pub(crate) fn finish_migration(&mut self) -> Result<(), LoadError> {
        Ok(self.migration.finish()?)
    }

    /// Takes the typed handle of a map; each can be taken once.
    pub(crate) fn map<T>(&mut self, map: &'static str) -> Result<T, LoadError>
    where
        T: TryFrom<Map, Error = MapError>,
    {
        self.ebpf
            .take_map(map)
            .ok_or(LoadError::Missing { what: "map", name: map })?
            .try_into()
            .map_err(|source| LoadError::MapType { map, source })
    }

    /// A descriptor of a map whose typed handle has not been taken yet.
    pub(crate) fn map_fd(&self, map: &'static str) -> Result<OwnedFd, LoadError> {
        let missing = LoadError::Missing { what: "map", name: map };
        let fd = match self.ebpf.map(map).ok_or(missing)? {
            Map::HashMap(data) | Map::PerCpuArray(data) | Map::Array(data) => data.fd().as_fd(),
            _ => return Err(LoadError::Missing { what: "map of the right type", name: map }),
        };
        fd.try_clone_to_owned().map_err(|error| LoadError::MapType { map, source: error.into() })
    }

    /// Capacity of a map of the role.
    pub(crate) fn capacity(&self, map: &str) -> usize {
        let size = self.sizes.iter().find(|(name, _)| *name == map).map_or(0, |(_, size)| *size);
        usize::try_from(size).unwrap_or(usize::MAX)
    }

    /// What the kernel says about a loaded program.
    pub(crate) fn program_info(&self, program: &'static str) -> Result<ProgramInfo, LoadError> {
        let refused = refused(program);
        self.classifier(program)?.info().map_err(refused)
    }

    /// A handle of a loaded program.
    pub fn program(&self, program: &'static str) -> Result<ProgramFd, LoadError> {
        let refused = refused(program);
        let fd = self.classifier(program)?.fd().map_err(refused)?;
        fd.try_clone().map_err(|error| refused(ProgramError::IOError(error)))
    }

    fn classifier(&self, program: &'static str) -> Result<&SchedClassifier, LoadError> {
        let refused = refused(program);
        self.ebpf
            .program(program)
            .ok_or(LoadError::Missing { what: "program", name: program })?
            .try_into()
            .map_err(refused)
    }
}
