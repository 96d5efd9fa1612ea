//! Links and routes of the kernel in domain types: the trait that the agent is written against.
//!
//! Owns how a pod's host-side interface is found. Does not decide which pod is whose.

mod changes;
pub mod fake;
mod rt;

use std::future::Future;
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

pub use changes::Changes;
pub use rt::RtNetlink;

/// A network interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link {
    /// Index.
    pub index: u32,
    /// Name.
    pub name: String,
    /// Alias, `ip link set … alias …`.
    pub alias: Option<String>,
    /// Kind of a virtual interface, for example `veth`.
    pub kind: Option<String>,
    /// Largest packet in bytes.
    pub mtu: u32,
    /// Index of the peer (veth) or of the interface below.
    pub peer: Option<u32>,
    /// UID of the pod that an alternative name of ours tells.
    pub pod: Option<String>,
    /// Name space of that one as the kernel numbers it for ours; `None`: the same name space.
    pub peer_netns: Option<i32>,
}

impl Link {
    /// One end of a pair of virtual Ethernet interfaces, the other end elsewhere.
    #[must_use]
    pub fn is_veth(&self) -> bool {
        self.kind.as_deref() == Some("veth")
    }
}

/// What can go wrong at the kernel's netlink.
#[derive(Debug, thiserror::Error)]
pub enum NetlinkError {
    /// The kernel refused a request.
    #[error("cannot {operation} {subject}")]
    Request {
        /// What was asked for.
        operation: &'static str,
        /// About what.
        subject: String,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// A network name space cannot be looked at.
    #[error("cannot use network name space {}", path.display())]
    Namespace {
        /// Path of the name space.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The interface of a pod does not have its other end on the host.
    #[error("interface {name} in {} is not a veth with its peer on this host: {detail}", netns.display())]
    NoHostPeer {
        /// Path of the pod's name space.
        netns: PathBuf,
        /// Name of the interface there.
        name: String,
        /// What is wrong.
        detail: &'static str,
    },
}

impl NetlinkError {
    /// Error number of the kernel's answer.
    #[must_use]
    pub fn errno(&self) -> Option<i32> {
        match self {
            Self::Request { source, .. } | Self::Namespace { source, .. } => source.raw_os_error(),
            Self::NoHostPeer { .. } => None,
        }
    }

    /// The interface or name space does not exist (any more).
    #[must_use]
    pub fn is_gone(&self) -> bool {
        matches!(self.errno(), Some(libc::ENODEV | libc::ENOENT | libc::ENXIO))
    }
}

/// Netlink as the agent needs it.
pub trait Netlink: Send + Sync {
    /// The interface with an index, if there is one.
    fn link(&self, index: u32) -> impl Future<Output = Result<Option<Link>, NetlinkError>> + Send;

    /// The interface with a name, if there is one.
    fn link_by_name(&self, name: &str) -> impl Future<Output = Result<Option<Link>, NetlinkError>> + Send;

    /// All interfaces whose alias begins with `prefix`.
    fn links_with_alias(&self, prefix: &str) -> impl Future<Output = Result<Vec<Link>, NetlinkError>> + Send;

    /// Sets the alias of an interface.
    fn set_alias(&self, index: u32, alias: &str) -> impl Future<Output = Result<(), NetlinkError>> + Send;

    /// The other end, on this host, of the interface `name` inside the name space at `netns`.
    fn host_peer(&self, netns: &Path, name: &str) -> impl Future<Output = Result<Link, NetlinkError>> + Send;

    /// The interface by which packets to an address leave, if there is a route.
    fn route_link(&self, address: IpAddr) -> impl Future<Output = Result<Option<Link>, NetlinkError>> + Send;

    /// The host-side interface of a local pod, by the route to its address: a veth without a router
    /// behind it, or nothing.
    fn veth_towards(
        &self,
        address: IpAddr,
    ) -> impl Future<Output = Result<Option<Link>, NetlinkError>> + Send {
        async move { Ok(self.route_link(address).await?.filter(Link::is_veth)) }
    }
}
