//! The datapath of a node in user space: loads, pins and attaches the programs and keeps their maps
//! as the desired state says.
//!
//! Owns everything under `<bpffs root>/v1` but the folders of gateways, which their own
//! `coil-egress` fills. Knows nothing of Kubernetes.

use std::collections::BTreeSet;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::path::PathBuf;

use crate::desired::{DesiredState, PodUid};

/// How a node's datapath is opened.
#[derive(Clone, Debug)]
pub struct NodeOptions {
    /// Folder for pins, on a BPF file system.
    pub bpffs_root: PathBuf,
    /// UDP port of FOU.
    pub fou_port: u16,
    /// IPv4 address of the node: source of ICMP errors to pods.
    pub node_ipv4: Option<Ipv4Addr>,
    /// IPv6 address of the node.
    pub node_ipv6: Option<Ipv6Addr>,
    /// Capacity of the table of egress flows, for each family.
    pub max_flows: u32,
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
    pub failed: Vec<(PodUid, DatapathError)>,
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

/// What can go wrong in the datapath.
#[derive(Debug, thiserror::Error)]
pub enum DatapathError {
    /// This program was built without the eBPF object.
    #[error(
        "this program was built without the eBPF object; build it with `cargo xtask build`, \
         which builds the object first"
    )]
    NoObject,
}

/// The datapath as the agent's control side sees it.
pub trait Datapath: Send {
    /// Makes maps and attachments equal to `state`; add-only until it is complete.
    fn apply(&mut self, state: &DesiredState) -> Result<ApplyReport, DatapathError>;

    /// Forgets what is believed about the maps: the next [`Self::apply`] reads them again.
    fn resync(&mut self);

    /// Removes expired flows, looking at no more than `budget` entries; `now` is in seconds since boot.
    fn sweep(&mut self, now: u32, budget: usize) -> Result<SweepReport, DatapathError>;

    /// Removes the pins of gateways on this node that are none of `live`.
    fn gc_gateways(&mut self, live: &BTreeSet<PodUid>) -> Result<(), DatapathError>;
}

/// The datapath of this node in the kernel.
pub struct NodeDatapath {}

impl NodeDatapath {
    /// Loads the programs, adopting what an earlier run has pinned.
    pub fn open(_options: NodeOptions) -> Result<Self, DatapathError> {
        Err(DatapathError::NoObject)
    }

    /// Exports counters of the kernel; independent of the datapath's life.
    pub fn collector(&self) -> Result<Box<dyn prometheus::core::Collector>, DatapathError> {
        Err(DatapathError::NoObject)
    }
}

impl Datapath for NodeDatapath {
    fn apply(&mut self, _state: &DesiredState) -> Result<ApplyReport, DatapathError> {
        Err(DatapathError::NoObject)
    }

    fn resync(&mut self) {}

    fn sweep(&mut self, _now: u32, _budget: usize) -> Result<SweepReport, DatapathError> {
        Err(DatapathError::NoObject)
    }

    fn gc_gateways(&mut self, _live: &BTreeSet<PodUid>) -> Result<(), DatapathError> {
        Err(DatapathError::NoObject)
    }
}
