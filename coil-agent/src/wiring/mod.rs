//! Pods' interfaces in IPAM mode: the pair that joins a pod to the node, with its addresses and routes, and what
//! the node needs around it.
//!
//! Owns the interfaces with an alias `COIL:<pool>:<container>:<interface>`, their routes in the table of pods and
//! the rule that looks that table up. Addresses are handed out elsewhere. Nothing of others is ever removed.

mod error;
mod host;
mod messages;
mod plan;
mod socket;
mod veth;

use std::collections::HashMap;
use std::future::Future;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::{Semaphore, oneshot};

use self::messages::{FoundRoute, Interface};
use self::socket::Socket;
use crate::ipam::{Assigned, Found, NodeAddresses, Owner};

pub use error::{DumpFailure, ErrorClass, WiringError};
pub use host::Told;
pub use plan::{ALIAS_PREFIX, alias, alt_name, calico_name, host_name, parse_alias, parse_alt_name};

/// Pods that are wired at the same time: more would only wait for the kernel's lock, each with a thread.
const PARALLEL: usize = 8;
/// The main table.
const MAIN_TABLE: u32 = 254;
/// What the kernel notes of routes that an administrator sets.
const PROTOCOL_BOOT: u8 = 3;

/// How pods are wired on this node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Config {
    /// Table of routes to pods.
    pub pod_table: u32,
    /// Priority of the rule that looks it up.
    pub rule_priority: u32,
    /// What our routes are marked with.
    pub protocol: u8,
    /// Names of interfaces as Calico expects them.
    pub compat_calico: bool,
    /// Adopt also pods whose routes an early release of the original has left in the main table.
    pub register_from_main: bool,
}

/// A pod to be wired.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// Container and interface.
    pub owner: Owner,
    /// Its addresses.
    pub assigned: Assigned,
    /// Path of the pod's network name space.
    pub netns: PathBuf,
    /// Namespace of the pod.
    pub namespace: String,
    /// Name of the pod.
    pub pod: String,
    /// UID of the pod.
    pub uid: String,
}

/// A pod that is wired.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wired {
    /// Index of the host-side interface.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// Its largest packet.
    pub mtu: u32,
    /// Its hardware address.
    pub mac: [u8; 6],
    /// Hardware address of the pod's end.
    pub mac_inside: [u8; 6],
}

/// An interface of ours.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link {
    /// Whose it is, and the addresses that are routed to it: none if an ADD was killed before that.
    pub found: Found,
    /// Index.
    pub index: u32,
    /// Largest packet.
    pub mtu: u32,
    /// UID of the pod, if the interface tells; the original's do not.
    pub uid: Option<String>,
}

/// Both addresses of an assignment, IPv4 first.
#[must_use]
pub fn addresses(assigned: &Assigned) -> Vec<IpAddr> {
    let both = [assigned.ipv4.map(IpAddr::V4), assigned.ipv6.map(IpAddr::V6)];
    both.into_iter().flatten().collect()
}

/// Wires pods: the trait that the CNI server is written against.
pub trait Wire: Send + Sync + 'static {
    /// Makes the interface of a pod. One that the same owner has already is replaced. On failure nothing is left.
    fn setup(&self, request: Request) -> impl Future<Output = Result<Wired, WiringError>> + Send;

    /// Removes the interface of an owner, if there is one; gives its index.
    fn destroy(&self, owner: &Owner) -> impl Future<Output = Result<Vec<u32>, WiringError>> + Send;

    /// Checks that the interface of an owner is there, with routes to it.
    fn check(&self, owner: &Owner) -> impl Future<Output = Result<Link, WiringError>> + Send;

    /// All interfaces of ours.
    fn list(&self) -> impl Future<Output = Result<Vec<Link>, WiringError>> + Send;
}

/// Wires pods by the kernel's netlink.
#[derive(Clone, Debug)]
pub struct Wiring(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    config: Config,
    /// What pods see at the other end of their interface; `None` until the API has told.
    node: Mutex<Option<NodeAddresses>>,
    /// 0: the kernel's default.
    mtu: AtomicU32,
    /// Host-side interfaces, to find them without a listing. What is not in here is searched for.
    known: Mutex<HashMap<Owner, u32>>,
    threads: Semaphore,
}

impl Wiring {
    /// Works in the network name space of the threads that it is used from.
    #[must_use]
    pub fn new(config: Config) -> Self {
        let inner = Inner {
            config,
            node: Mutex::default(),
            mtu: AtomicU32::new(0),
            known: Mutex::default(),
            threads: Semaphore::new(PARALLEL),
        };
        Self(Arc::new(inner))
    }

    /// Takes the addresses of this node, which pods see at the other end of their interface. Pods that are wired
    /// already keep what they have.
    pub fn set_node(&self, node: NodeAddresses) {
        let before = self.0.node.lock().unwrap_or_else(PoisonError::into_inner).replace(node);
        if before != Some(node) {
            tracing::info!(ipv4 = ?node.ipv4, ipv6 = ?node.ipv6, "addresses of this node");
        }
    }

    /// Largest packet of pods that are wired from now on, if it is not the kernel's default.
    #[must_use]
    pub fn mtu(&self) -> Option<u32> {
        Some(self.0.mtu.load(Ordering::Relaxed)).filter(|mtu| *mtu > 0)
    }

    /// Works where blocking is allowed, on a thread of its own, and is not given up when the caller is.
    async fn on_thread<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Inner) -> Result<T, WiringError> + Send + 'static,
    ) -> Result<T, WiringError> {
        let _permit = self.0.threads.acquire().await.map_err(|_| WiringError::Panicked)?;
        let (done, result) = oneshot::channel();
        let inner = Arc::clone(&self.0);
        let thread = std::thread::Builder::new().name("wiring".into());
        thread
            .spawn(move || {
                if done.send(work(&inner)).is_err() {
                    tracing::debug!("whoever asked has given up");
                }
            })
            .map_err(WiringError::kernel("start a thread"))?;
        result.await.map_err(|_| WiringError::Panicked)?
    }
}

impl Wire for Wiring {
    async fn setup(&self, request: Request) -> Result<Wired, WiringError> {
        let mtu = self.mtu();
        self.on_thread(move |inner| {
            let stale = inner.remembered(&request.owner);
            if let Some(index) = stale {
                inner.remove_stale(&request.owner, index)?;
            }
            let wired = veth::wire(&inner.config, inner.node(), mtu, &request)?;
            inner.remember(request.owner, wired.index);
            Ok(wired)
        })
        .await
    }

    async fn destroy(&self, owner: &Owner) -> Result<Vec<u32>, WiringError> {
        let owner = owner.clone();
        self.on_thread(move |inner| {
            let mut host = open()?;
            let mut deleted = Vec::new();
            while let Some((link, found)) = inner.find(&mut host, &owner)? {
                veth::delete(&mut host, link.index)
                    .map_err(WiringError::kernel(format!("delete interface {}", link.name)))?;
                deleted.push(link.index);
                inner.forget(&owner);
                // What we have made ourselves is all that there is: others need not be searched for among the
                // interfaces of all pods.
                if found == Place::Remembered {
                    break;
                }
            }
            inner.forget(&owner);
            Ok(deleted)
        })
        .await
    }

    async fn check(&self, owner: &Owner) -> Result<Link, WiringError> {
        let owner = owner.clone();
        self.on_thread(move |inner| inner.check(&owner)).await
    }

    async fn list(&self) -> Result<Vec<Link>, WiringError> {
        self.on_thread(|inner| {
            let mut host = open()?;
            let links = links(&mut host)?;
            let routes = inner.routes(&mut host)?;
            let mut found = Vec::new();
            for link in links.into_iter().filter(|link| link.veth) {
                if let Some((pool, owner)) = link.alias.as_deref().and_then(plan::parse_alias) {
                    inner.remember(owner.clone(), link.index);
                    found.push(describe(pool, owner, &link, &routes));
                }
            }
            Ok(found)
        })
        .await
    }
}

impl Inner {
    fn node(&self) -> Option<NodeAddresses> {
        *self.node.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn remembered(&self, owner: &Owner) -> Option<u32> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner).get(owner).copied()
    }

    fn remember(&self, owner: Owner, index: u32) {
        self.known.lock().unwrap_or_else(PoisonError::into_inner).insert(owner, index);
    }

    fn forget(&self, owner: &Owner) {
        self.known.lock().unwrap_or_else(PoisonError::into_inner).remove(owner);
    }

    /// Removes an interface that the same owner had before, under whatever name.
    fn remove_stale(&self, owner: &Owner, index: u32) -> Result<(), WiringError> {
        let mut host = open()?;
        if let Some(link) = veth::by_index(&mut host, index)?.filter(|link| is_of(link, owner)) {
            tracing::info!(
                link = link.name,
                alias = link.alias,
                "replacing an interface of an earlier attempt"
            );
            veth::delete(&mut host, index)
                .map_err(WiringError::kernel(format!("delete interface {}", link.name)))?;
        }
        self.forget(owner);
        Ok(())
    }

    /// The interface of an owner: where it is known to be, under the name that it should have, or anywhere.
    fn find(&self, host: &mut Socket, owner: &Owner) -> Result<Option<(Interface, Place)>, WiringError> {
        if let Some(index) = self.remembered(owner)
            && let Some(link) = veth::by_index(host, index)?.filter(|link| is_of(link, owner))
        {
            return Ok(Some((link, Place::Remembered)));
        }
        let name = plan::host_name(owner, 0);
        // Killed between the two requests that make and label it.
        let unlabelled = |link: &Interface| link.veth && link.alias.is_none();
        if let Some(link) = veth::by_name(host, &name)?.filter(|link| is_of(link, owner) || unlabelled(link))
        {
            return Ok(Some((link, Place::Searched)));
        }
        let found = links(host)?.into_iter().find(|link| is_of(link, owner));
        Ok(found.map(|link| (link, Place::Searched)))
    }

    fn check(&self, owner: &Owner) -> Result<Link, WiringError> {
        let mut host = open()?;
        let Some((interface, _)) = self.find(&mut host, owner)? else {
            return Err(WiringError::Missing { owner: owner.to_string() });
        };
        let damaged = |problem: String| {
            let name = interface.name.clone();
            Err(WiringError::Damaged { owner: owner.to_string(), name, problem })
        };
        let Some((pool, owner)) = interface.alias.as_deref().and_then(plan::parse_alias) else {
            return damaged("it has no alias".into());
        };
        if !interface.up {
            return damaged("it is down".into());
        }
        let link = describe(pool, owner, &interface, &self.routes(&mut host)?);
        if addresses(&link.found.assigned).is_empty() {
            return damaged(format!("table {} has no route to it", self.config.pod_table));
        }
        Ok(link)
    }

    /// Routes to pods.
    fn routes(&self, host: &mut Socket) -> Result<Vec<FoundRoute>, WiringError> {
        let mut found = Vec::new();
        let mut tables = vec![self.config.pod_table];
        if self.config.register_from_main {
            tables.push(MAIN_TABLE);
        }
        for table in tables {
            for v6 in [false, true] {
                let messages = match host.dump(&messages::all_routes(v6, table)) {
                    Ok(messages) => messages,
                    // A table exists as long as it has a route.
                    Err(socket::DumpError::Io(error)) if error.raw_os_error() == Some(libc::ENOENT) => {
                        continue;
                    }
                    Err(error) => return Err(WiringError::dump("routes to pods")(error)),
                };
                let routes = messages.iter().filter_map(FoundRoute::of).filter(|route| {
                    let ours = table == self.config.pod_table
                        || [self.config.protocol, PROTOCOL_BOOT].contains(&route.protocol);
                    route.table == table && ours
                });
                found.extend(routes);
            }
        }
        Ok(found)
    }
}

/// Where an interface was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    /// Where it was made, or found at the start.
    Remembered,
    /// By its name, or among all.
    Searched,
}

fn open() -> Result<Socket, WiringError> {
    Socket::open().map_err(WiringError::kernel("open a netlink socket"))
}

fn links(host: &mut Socket) -> Result<Vec<Interface>, WiringError> {
    let messages = host.dump(&messages::all_links()).map_err(WiringError::dump("interfaces"))?;
    Ok(messages.iter().filter_map(Interface::of).collect())
}

fn is_of(link: &Interface, owner: &Owner) -> bool {
    link.veth && link.alias.as_deref().and_then(plan::parse_alias).is_some_and(|(_, of)| of == *owner)
}

fn describe(pool: &str, owner: Owner, link: &Interface, routes: &[FoundRoute]) -> Link {
    let found = Found { owner, assigned: assigned(pool, link.index, routes) };
    let uid = link.alt_names.iter().find_map(|name| plan::parse_alt_name(name));
    Link { found, index: link.index, mtu: link.mtu, uid: uid.map(str::to_owned) }
}

/// The addresses that are routed to an interface.
fn assigned(pool: &str, index: u32, routes: &[FoundRoute]) -> Assigned {
    let mut assigned = Assigned { pool: pool.to_owned(), ipv4: None, ipv6: None };
    for route in routes.iter().filter(|route| route.outputs == [index]) {
        match route.destination {
            Some(IpAddr::V4(address)) if route.prefix == 32 => {
                assigned.ipv4.get_or_insert(address);
            }
            Some(IpAddr::V6(address)) if route.prefix == 128 => {
                assigned.ipv6.get_or_insert(address);
            }
            _ => {}
        }
    }
    assigned
}
