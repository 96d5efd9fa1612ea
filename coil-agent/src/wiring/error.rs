//! Why a pod cannot be wired, and what that means for whoever asked.

use std::io;
use std::path::PathBuf;

use super::socket::DumpError;

/// Why something could not be wired, found or removed.
#[derive(Debug, thiserror::Error)]
pub enum WiringError {
    /// The name space of the pod cannot be entered.
    #[error("cannot use network name space {}", path.display())]
    Namespace {
        /// Its path.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// That is the network of the node itself.
    #[error("{} is the network name space of the node", .0.display())]
    NodeNamespace(PathBuf),
    /// The name space was removed while the pod was being wired.
    #[error("network name space {} was removed in the meantime", .0.display())]
    Vanished(PathBuf),
    /// The pod has an interface of that name which is not ours.
    #[error("the pod already has an interface {ifname}, which is not of this container: {detail}")]
    Occupied {
        /// Name of the interface.
        ifname: String,
        /// What it is.
        detail: String,
    },
    /// Somebody else has an interface with the name that ours must have.
    #[error("interface {name} of the node belongs to somebody else")]
    NameTaken {
        /// Name of the interface.
        name: String,
    },
    /// There is a route to the pod's address that is not ours.
    #[error(
        "table {table} has a route to {destination} (protocol {protocol}, interface {output}) that is not of this pod"
    )]
    ForeignRoute {
        /// Address of the pod.
        destination: std::net::IpAddr,
        /// Table of pods.
        table: u32,
        /// Who has set the route.
        protocol: u8,
        /// Where it leads, with the alias of that interface.
        output: String,
    },
    /// The node has no address of a family that the pool has.
    #[error("pool {pool} has {family} addresses, but this node has no {family} InternalIP")]
    NodeAddress {
        /// IPv4 or IPv6.
        family: &'static str,
        /// The pool.
        pool: String,
    },
    /// The API has not told the addresses of this node.
    #[error("the addresses of this node are not known yet")]
    NodeUnknown,
    /// An assignment without address.
    #[error("no address was assigned")]
    NoAddress,
    /// CHECK: there is no interface of this owner.
    #[error("there is no interface of {owner}")]
    Missing {
        /// Container and interface.
        owner: String,
    },
    /// CHECK: the interface is not as it was made.
    #[error("interface {name} of {owner}: {problem}")]
    Damaged {
        /// Container and interface.
        owner: String,
        /// Name of the interface.
        name: String,
        /// What is wrong.
        problem: String,
    },
    /// The kernel refused.
    #[error("cannot {operation}")]
    Kernel {
        /// What was tried.
        operation: String,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// Objects could not be listed.
    #[error("cannot list {what}")]
    Dump {
        /// What.
        what: &'static str,
        /// Why not.
        #[source]
        source: DumpFailure,
    },
    /// The thread that did the work has panicked.
    #[error("the thread that wires pods has panicked")]
    Panicked,
}

/// Why a listing failed.
#[derive(Debug, thiserror::Error)]
#[error(transparent)]
pub struct DumpFailure(#[from] DumpError);

/// What an error means for whoever asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorClass {
    /// Another attempt may succeed.
    Retry,
    /// The sandbox does not exist any more.
    Gone,
    /// The request names something that cannot be.
    Request,
    /// Somebody has to change a configuration first.
    Configuration,
    /// None of these.
    Internal,
}

impl WiringError {
    pub(super) fn kernel(operation: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let operation = operation.into();
        move |source| Self::Kernel { operation, source }
    }

    pub(super) fn dump(what: &'static str) -> impl FnOnce(DumpError) -> Self {
        move |source| Self::Dump { what, source: source.into() }
    }

    /// What it means for whoever asked.
    #[must_use]
    pub fn class(&self) -> ErrorClass {
        match self {
            Self::Namespace { source, .. } => match source.raw_os_error() {
                // The second: the file is no name space, any more as a rule.
                Some(libc::ENOENT | libc::EINVAL | libc::ESRCH) => ErrorClass::Gone,
                Some(libc::ENOTDIR | libc::EISDIR | libc::EACCES) => ErrorClass::Request,
                _ => ErrorClass::Retry,
            },
            Self::NodeNamespace(_) => ErrorClass::Request,
            Self::Vanished(_) => ErrorClass::Gone,
            Self::NodeAddress { .. } | Self::NoAddress => ErrorClass::Configuration,
            Self::Missing { .. } | Self::Damaged { .. } => ErrorClass::Internal,
            Self::NodeUnknown
            | Self::Occupied { .. }
            | Self::NameTaken { .. }
            | Self::ForeignRoute { .. }
            | Self::Kernel { .. }
            | Self::Dump { .. }
            | Self::Panicked => ErrorClass::Retry,
        }
    }
}
