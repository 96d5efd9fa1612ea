//! Addresses of this node's pods: blocks of addresses that the controller carves out of pools, and who
//! has which address of them.
//!
//! Owns which address is whose, and when a block is asked for or given back. What the kernel holds is
//! somebody else's: after a restart it tells whose addresses are in use ([`Found`]).
//!
//! `app.rs` makes an [`IpamService`] from what was found, lets [`IpamService::run`] be a task of its own with
//! [`KubeApi`], [`watch::news`] and an exporter of [`crate::routes`], and gives clones of the service to
//! whoever wants addresses ([`Addresses`]).

use std::error::Error;
use std::fmt;
use std::future::Future;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

pub mod api;
pub mod block;
pub mod core;
pub mod demand;
pub mod ledger;
pub mod metrics;
pub mod node;
pub mod pool;
pub mod service;
#[cfg(test)]
mod testing;
pub mod watch;

pub use api::KubeApi;
pub use core::Pace;
pub use metrics::IpamMetrics;
pub use node::NodeAddresses;
pub use service::{IpamOptions, IpamService};

/// What an address is handed out to: one interface of one sandbox. Asking twice gives the same address.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Owner {
    /// Identifier of the sandbox.
    pub container_id: String,
    /// Name of the interface inside.
    pub ifname: String,
}

impl fmt::Display for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.container_id, self.ifname)
    }
}

/// Addresses of one interface: at least one is there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Assigned {
    /// The pool that they are from.
    pub pool: String,
    /// IPv4 address.
    pub ipv4: Option<Ipv4Addr>,
    /// IPv6 address.
    pub ipv6: Option<Ipv6Addr>,
}

/// What recovery found in the kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// Whose interface it is.
    pub owner: Owner,
    /// The addresses that are routed to it.
    pub assigned: Assigned,
}

/// Hands out addresses.
pub trait Addresses: Send + Sync + 'static {
    /// Addresses of an owner, from a pool: those that it has already, else new ones. Waits, for a limited
    /// time, when a block must be had first. Giving up on the future is safe: what the owner may have been
    /// given by then is freed with it.
    fn allocate(&self, pool: &str, owner: &Owner)
    -> impl Future<Output = Result<Assigned, IpamError>> + Send;

    /// Takes the addresses of an owner back. That it has none is a success. The interface must be gone:
    /// the addresses may be another's at once.
    fn free(&self, owner: &Owner) -> impl Future<Output = Result<(), IpamError>> + Send;
}

/// Why there is no address.
#[derive(Clone, Debug, thiserror::Error)]
pub enum IpamError {
    /// After a start, it is not known yet which blocks this node has.
    #[error("the address blocks of this node are not known yet")]
    NotReady {
        /// Why not.
        #[source]
        source: Option<Cause>,
    },
    /// All addresses of the pool are taken.
    #[error("out of blocks in pool {pool}")]
    Exhausted {
        /// The pool.
        pool: String,
    },
    /// The controller gives no block of the pool.
    #[error("no block of pool {pool}: {reason}")]
    Refused {
        /// The pool.
        pool: String,
        /// What the controller says.
        reason: String,
    },
    /// A block did not come in time.
    #[error("aborting new block request: no block of pool {pool} in time")]
    Timeout {
        /// The pool.
        pool: String,
        /// What went wrong last, if anything did.
        #[source]
        source: Option<Cause>,
    },
    /// There is no such pool.
    #[error("there is no AddressPool {pool}")]
    UnknownPool {
        /// The pool.
        pool: String,
    },
    /// Nothing is handed out from a pool that is being deleted.
    #[error("AddressPool {pool} is being deleted")]
    PoolDeleted {
        /// The pool.
        pool: String,
    },
    /// The names of the pool and the node must be legal values of labels.
    #[error("{name:?} cannot be the value of a label, so that there are no blocks for it")]
    Name {
        /// The pool or the node.
        name: String,
    },
}

/// An error that several callers are told.
#[derive(Clone, Debug)]
pub struct Cause(Arc<dyn Error + Send + Sync>);

impl Cause {
    /// Shares an error.
    pub fn new(error: impl Error + Send + Sync + 'static) -> Self {
        Self(Arc::new(error))
    }
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl Error for Cause {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        self.0.source()
    }
}

impl IpamError {
    /// The same request may succeed later, with nobody changing a configuration: CNI code 11.
    #[must_use]
    pub fn is_transient(&self) -> bool {
        match self {
            Self::NotReady { .. } | Self::Exhausted { .. } | Self::Timeout { .. } => true,
            Self::Refused { .. }
            | Self::UnknownPool { .. }
            | Self::PoolDeleted { .. }
            | Self::Name { .. } => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_a_retry_cures_is_transient() {
        let pool = || "p".to_owned();
        for error in [
            IpamError::NotReady { source: None },
            IpamError::Exhausted { pool: pool() },
            IpamError::Timeout { pool: pool(), source: Some(Cause::new(std::fmt::Error)) },
        ] {
            assert!(error.is_transient(), "{error}");
        }
        for error in [
            IpamError::Refused { pool: pool(), reason: "invalid pool".into() },
            IpamError::UnknownPool { pool: pool() },
            IpamError::PoolDeleted { pool: pool() },
            IpamError::Name { name: pool() },
        ] {
            assert!(!error.is_transient(), "{error}");
        }
    }
}
