//! The datapath of a node in user space: loads, pins and attaches the programs and keeps their maps
//! as the desired state says.
//!
//! Owns everything under `<bpffs root>/v1` but the folders of gateways, which their own
//! `coil-egress` fills. Knows nothing of Kubernetes.

mod abi;
mod attach;
mod encode;
mod icmp;
mod inbound;
mod layout;
mod loader;
mod maglev;
mod maps;
mod migrate;
mod near;
mod object;
mod older;
mod pieces;
mod pins;
mod plan;
mod pod_names;
mod raw_map;
mod read;
mod state;
mod stats;
mod sweep;
mod sys;
pub mod timeouts;
mod tunnel;
mod usage;
mod writer;

/// What the gateway's side shares.
pub(crate) mod internal {
    pub(crate) use super::abi::{TYPE_ARRAY, TYPE_HASH, TYPE_LPM_TRIE, TYPE_LRU_HASH, TYPE_PERCPU_ARRAY};
    pub(crate) use super::attach::{Attachable, Hook};
    pub(crate) use super::boot_seed;
    pub(crate) use super::encode::decode_egress_name;
    pub(crate) use super::loader::{Loaded, load};
    pub(crate) use super::maps::absent_is_fine;
    pub(crate) use super::migrate::current;
    pub(crate) use super::older::cut;
    pub(crate) use super::pieces::cut_datagrams;
    pub(crate) use super::pins::{IfUnmounted, PinFolder};
    pub(crate) use super::pod_names::text;
    pub(crate) use super::read::ReadMap;
    pub(crate) use super::stats::{
        DropCounters, DropFamilies, counter, counters, descriptions, gather, gauge, gauges, open_pinned,
    };
    pub(crate) use super::sys::{Cursor, ObjectKind, link_info, lookup_batch, object_get, program_id};
    #[cfg(test)]
    pub(crate) use super::usage::fake::FakeUsage;
    pub(crate) use super::usage::{Recount, SharedUsage, Usage};
}

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::path::PathBuf;

use aya::programs::{ProgramFd, ProgramInfo};
use coil_common::config::{CONFIG_ADDRESS_ONLY, CONFIG_NEAR, CONFIG_SHORTCUT, Config};
use coil_common::names;
use ipnet::IpNet;
use nix::time::{ClockId, clock_gettime};

use self::attach::{Attachable, Hook, PodPrograms, link_alive};
use self::inbound::InboundSweeper;
use self::maps::NodeMaps;
use self::pieces::Cutters;
use self::pins::{IfUnmounted, PinFolder};
use self::pod_names::PodNames;
use self::stats::{FlowCounts, MapFill, NodeCollector};
use self::sweep::FlowSweeper;
use self::timeouts::Timeouts;
use self::writer::Writer;
use crate::desired::{DesiredState, EgressName, PodUid};

pub use self::attach::{AttachChoice, AttachError, AttachMode};
pub use self::encode::EncodeError;
pub use self::icmp::IcmpLimit;
pub use self::loader::{LoadError, Loaded, Role, load};
pub use self::maps::MapAccessError;
pub use self::migrate::MigrationError;
pub use self::pins::PinError;
pub use self::sys::{SkBuff, TestRun, test_run};
pub use self::tunnel::TunnelKind;

/// How a node's datapath is opened.
#[derive(Clone, Debug)]
pub struct NodeOptions {
    /// Folder for pins, on a BPF file system.
    pub bpffs_root: PathBuf,
    /// UDP port of FOU.
    pub fou_port: u16,
    /// What pods send to gateways by.
    pub tunnel: TunnelKind,
    /// Packets of established flows go to gateways of this node, and back, without a tunnel.
    pub same_node_bypass: bool,
    /// IPv4 address of the node: source of ICMP errors to pods.
    pub node_ipv4: Option<Ipv4Addr>,
    /// IPv6 address of the node.
    pub node_ipv6: Option<Ipv6Addr>,
    /// Capacity of the table of egress flows, for each family.
    pub max_flows: u32,
    /// Bounds of ICMP errors.
    pub icmp: IcmpLimit,
    /// Tunnelled packets of flows that were answered go past the node's IP stack.
    pub shortcut: bool,
    /// Flows of one family that a pod may have; 0 for no limit.
    pub max_pod_flows: u32,
    /// Protocols without ports go through an Egress too.
    pub address_only: bool,
    /// How long idle flows are kept.
    pub timeouts: Timeouts,
}

/// What [`Datapath::apply`] did.
#[derive(Debug, Default)]
pub struct ApplyReport {
    /// Changes made to maps.
    pub operations: usize,
    /// Pods whose interface got programs now.
    pub attached: Vec<PodUid>,
    /// Interfaces whose programs were taken away.
    pub detached: Vec<u32>,
    /// Pods that could not be served, the others were.
    pub failed: Vec<(PodUid, PodError)>,
}

/// What [`Datapath::sweep`] did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SweepReport {
    /// Entries looked at.
    pub scanned: usize,
    /// Entries removed.
    pub expired: usize,
    /// The end of the tables was reached: the next call begins anew.
    pub finished: bool,
}

/// Why one pod could not be served.
#[derive(Debug, thiserror::Error)]
pub enum PodError {
    /// Its policy does not fit into the maps.
    #[error(transparent)]
    Encode(#[from] EncodeError),
    /// Its interface is gone: the pod has ended.
    #[error("interface {ifindex} of the pod does not exist")]
    InterfaceGone {
        /// Index of the interface.
        ifindex: u32,
    },
    /// The programs cannot be attached to its interface.
    #[error(transparent)]
    Attach(AttachError),
}

impl From<AttachError> for PodError {
    fn from(error: AttachError) -> Self {
        match error {
            AttachError::InterfaceGone { ifindex } => Self::InterfaceGone { ifindex },
            error => Self::Attach(error),
        }
    }
}

/// What can go wrong in the datapath.
#[derive(Debug, thiserror::Error)]
pub enum DatapathError {
    /// Programs or maps cannot be loaded.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// The folder of pins cannot be used.
    #[error(transparent)]
    Pin(#[from] PinError),
    /// A map cannot be read or written.
    #[error(transparent)]
    Map(#[from] MapAccessError),
    /// A program cannot be attached or detached.
    #[error(transparent)]
    Attach(#[from] AttachError),
    /// The ports of a gateway cannot be told apart.
    #[error(transparent)]
    Ports(#[from] crate::gateway::ports::PortKeeperError),
    /// The system lacks something.
    #[error("cannot read {what}")]
    System {
        /// What.
        what: &'static str,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
}

impl DatapathError {
    /// Trying again will not help before somebody changes something.
    #[must_use]
    pub fn is_permanent(&self) -> bool {
        match self {
            Self::Load(_) | Self::Pin(_) | Self::System { .. } => true,
            Self::Map(_) | Self::Attach(_) | Self::Ports(_) => false,
        }
    }
}

/// The datapath as the agent's control side sees it.
pub trait Datapath: Send {
    /// Makes maps and attachments equal to `state`; add-only until it is complete. After an error the
    /// same call may be repeated: it reads the maps anew.
    fn apply(&mut self, state: &DesiredState) -> Result<ApplyReport, DatapathError>;

    /// Forgets what is believed about maps and attachments: the next [`Self::apply`] looks again.
    fn resync(&mut self);

    /// Removes expired flows, looking at about `budget` entries; `now` is in seconds since boot.
    fn sweep(&mut self, now: u32, budget: usize) -> Result<SweepReport, DatapathError>;

    /// Removes the pins of gateways on this node that are none of `live`.
    fn gc_gateways(&mut self, live: &BTreeSet<PodUid>) -> Result<(), DatapathError>;
}

/// Seconds since boot on the clock that the datapath writes into flows.
pub fn seconds_since_boot() -> Result<u32, DatapathError> {
    Ok(u32::try_from(monotonic()?.0).unwrap_or(u32::MAX))
}

/// Seconds and nanoseconds of `CLOCK_MONOTONIC_COARSE`, which is what the programs read: it lags behind
/// `CLOCK_MONOTONIC` by up to a tick, so for some milliseconds of each second that one is a second ahead.
fn monotonic() -> Result<(u64, u64), DatapathError> {
    let time = clock_gettime(ClockId::CLOCK_MONOTONIC_COARSE)
        .map_err(|errno| DatapathError::System { what: "the clock", source: errno.into() })?;
    // Neither is ever negative on this clock.
    Ok((time.tv_sec().unsigned_abs(), time.tv_nsec().unsigned_abs()))
}

/// A number for hashes that is the same for all processes of one boot, so that a restarted program
/// goes on choosing as before, and that nobody outside can guess.
pub(crate) fn boot_seed() -> Result<u32, DatapathError> {
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id")
        .map_err(|source| DatapathError::System { what: "the boot id", source })?;
    // FNV-1a over random digits.
    Ok(boot
        .trim()
        .bytes()
        .fold(0x811c_9dc5, |hash: u32, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193)))
}

/// The datapath of this node in the kernel.
pub struct NodeDatapath {
    folder: PinFolder,
    writer: Writer<NodeMaps, PodPrograms>,
    names: PodNames,
    cutters: Cutters,
    sweeper: FlowSweeper,
    inbound: InboundSweeper,
    flows: FlowCounts,
    fill: MapFill,
    flow_capacity: [usize; 2],
    /// Keeps the programs loaded.
    loaded: Loaded,
    /// Keeps others from writing.
    _lock: File,
}

impl NodeDatapath {
    /// Loads the programs, adopting the maps that an earlier run has pinned. Programs that are attached
    /// already are replaced by the first [`Datapath::apply`] that names their pods.
    pub fn open(options: NodeOptions) -> Result<Self, DatapathError> {
        Self::open_with(options, None)
    }

    /// The same with a way of attaching to new interfaces other than the kernel's best.
    pub fn open_with(options: NodeOptions, mode: Option<AttachMode>) -> Result<Self, DatapathError> {
        let NodeOptions {
            bpffs_root,
            fou_port,
            tunnel,
            same_node_bypass,
            node_ipv4,
            node_ipv6,
            max_flows,
            max_pod_flows,
            address_only,
            icmp,
            shortcut,
            timeouts,
        } = options;
        let folder = PinFolder::open(&bpffs_root, IfUnmounted::Refuse)?;
        let lock = folder.lock()?;
        let mut config = Config {
            ipv4: node_ipv4.map_or([0; 4], |address| address.octets()),
            ipv6: node_ipv6.map_or([0; 16], |address| address.octets()),
            fou_port: fou_port.to_be_bytes(),
            seed: boot_seed()?,
            flags: (u32::from(shortcut) * CONFIG_SHORTCUT)
                | (u32::from(address_only) * CONFIG_ADDRESS_ONLY)
                | older::cut(),
            pod_flows: max_pod_flows,
            timeouts: timeouts.seconds(),
            ..Config::default()
        };
        icmp.apply(&mut config);
        tunnel.apply(&mut config);
        if same_node_bypass {
            config.flags |= CONFIG_NEAR;
        }
        let sizes = [(names::MAP_FLOWS_V4, max_flows), (names::MAP_FLOWS_V6, max_flows)];
        let mut loaded = load(Role::Node, folder.maps(), &config, &sizes)?;
        let attachable = |name, hook| -> Result<_, LoadError> {
            Ok(Attachable { name, hook, program: loaded.program(name)? })
        };
        let programs = [
            attachable(names::PROGRAM_FROM_POD, Hook::Ingress)?,
            attachable(names::PROGRAM_TO_POD, Hook::Egress)?,
        ];
        let programs = PodPrograms::new(folder.links()?, programs, mode)?;
        let flows = FlowCounts::default();
        let sweeper = FlowSweeper::new(&mut loaded, timeouts, config.seed, flows.clone())?;
        let capacities: Vec<_> = names::NODE_MAPS
            .iter()
            .filter(|map| {
                let written = Role::Node.written().contains(map) && **map != names::MAP_EGRESSES;
                written || SWEPT.contains(map)
            })
            .map(|map| (*map, loaded.capacity(map)))
            .collect();
        let flow_capacity = [loaded.capacity(names::MAP_FLOWS_V4), loaded.capacity(names::MAP_FLOWS_V6)];
        let names = PodNames::new(&mut loaded)?;
        let fill = MapFill::new(&capacities);
        let inbound = InboundSweeper::new(&mut loaded, timeouts, fill.clone())?;
        let mut maps = NodeMaps::new(&mut loaded)?;
        maps.fill_slots()?;
        let limits = maps.limits();
        let (seconds, nanoseconds) = monotonic()?;
        // Hundredths of a second: grows faster than sets are made, and lasts for 497 days.
        let hundredths = seconds.wrapping_mul(100) + nanoseconds / 10_000_000;
        let first_set = u32::try_from(hundredths & u64::from(u32::MAX)).unwrap_or(1).max(1);
        Ok(Self {
            folder,
            writer: Writer::new(maps, programs, limits, first_set),
            names,
            cutters: Cutters::default(),
            sweeper,
            inbound,
            flows,
            fill,
            flow_capacity,
            loaded,
            _lock: lock,
        })
    }

    /// Destinations by Egress that policies of pods stand for in the kernel: what an earlier agent knew.
    pub fn destinations(&mut self) -> Result<BTreeMap<EgressName, BTreeSet<IpNet>>, DatapathError> {
        Ok(encode::destinations(self.writer.load()?))
    }

    /// What the kernel says about a program of the node.
    pub fn program_info(&self, program: &'static str) -> Result<ProgramInfo, DatapathError> {
        Ok(self.loaded.program_info(program)?)
    }

    /// A program of the node, for test runs.
    pub fn program(&self, program: &'static str) -> Result<ProgramFd, DatapathError> {
        Ok(self.loaded.program(program)?)
    }

    /// Exports counters of the kernel; does not depend on the datapath's life.
    pub fn collector(&self) -> Result<Box<dyn prometheus::core::Collector>, DatapathError> {
        let (flows, fill) = (self.flows.clone(), self.fill.clone());
        let collector = NodeCollector::open(self.folder.maps(), flows, self.flow_capacity, fill)?;
        Ok(Box::new(collector))
    }
}

/// Maps whose entries are counted when they are swept.
const SWEPT: &[&str] = &[names::MAP_INBOUND_V4, names::MAP_INBOUND_V6];

impl Datapath for NodeDatapath {
    fn apply(&mut self, state: &DesiredState) -> Result<ApplyReport, DatapathError> {
        let report = self.writer.apply::<DatapathError>(state)?;
        if let Some(maps) = self.writer.maps() {
            self.fill.set(maps);
        }
        self.cutters.sync(state);
        if let Err(error) = self.names.sync(state) {
            let error = &error as &dyn std::error::Error;
            tracing::warn!(error, "cannot write the names of pods; tools will not know them");
        }
        // An interface that still has an earlier program still uses the earlier maps.
        if state.complete && !report.failed.iter().any(|(_, error)| matches!(error, PodError::Attach(_))) {
            self.loaded.finish_migration()?;
        }
        Ok(report)
    }

    fn resync(&mut self) {
        self.writer.resync();
        self.names.forget();
        self.cutters.forget();
    }

    fn sweep(&mut self, now: u32, budget: usize) -> Result<SweepReport, DatapathError> {
        let report = self.sweeper.sweep(now, budget)?;
        if report.finished {
            self.inbound.sweep(now)?;
        }
        Ok(report)
    }

    fn gc_gateways(&mut self, live: &BTreeSet<PodUid>) -> Result<(), DatapathError> {
        let folder = self.folder.gateways();
        let entries = match std::fs::read_dir(&folder) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
            entries => entries.map_err(PinError::path("list", &folder))?,
        };
        for entry in entries {
            let entry = entry.map_err(PinError::path("list", &folder))?;
            let name = entry.file_name();
            let Some(uid) = name.to_str() else { continue };
            // One that is named after its pod may be that of a later pod of this name: it ends with its link,
            // where there are links.
            let link = match uid.contains('_') {
                true => link_alive(&entry.path().join(names::PROGRAM_GATEWAY))?,
                false => None,
            };
            let gone = link.map_or_else(|| !live.contains(uid), |alive| !alive);
            if gone {
                let path = entry.path();
                std::fs::remove_dir_all(&path).map_err(PinError::path("remove", &path))?;
                tracing::info!(pod.uid = uid, "removed the pins of a gateway that is gone");
            }
        }
        Ok(())
    }
}
