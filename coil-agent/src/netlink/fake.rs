//! Netlink in memory, for tests of what is above.

use std::collections::BTreeMap;
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use super::{Link, Netlink, NetlinkError};

/// Links and routes in memory.
#[derive(Debug, Default)]
pub struct FakeNetlink {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    links: BTreeMap<u32, Link>,
    peers: BTreeMap<(PathBuf, String), u32>,
    routes: BTreeMap<IpAddr, u32>,
}

impl FakeNetlink {
    /// Adds a veth whose other end is `name` in the name space `netns`.
    pub fn add_pod(&self, index: u32, netns: impl Into<PathBuf>, name: &str, address: IpAddr) {
        self.with(|state| {
            state.links.insert(
                index,
                Link {
                    index,
                    name: format!("veth{index}"),
                    alias: None,
                    kind: Some("veth".into()),
                    mtu: 1500,
                    peer: Some(2),
                    peer_netns: Some(0),
                    pod: None,
                },
            );
            state.peers.insert((netns.into(), name.to_owned()), index);
            state.routes.insert(address, index);
        });
    }

    /// Adds an interface of any kind.
    pub fn add_link(&self, link: Link) {
        self.with(|state| state.links.insert(link.index, link));
    }

    /// Adds a host route.
    pub fn add_route(&self, address: IpAddr, index: u32) {
        self.with(|state| state.routes.insert(address, index));
    }

    /// Removes an interface with its routes and name space.
    pub fn remove_link(&self, index: u32) {
        self.with(|state| {
            state.links.remove(&index);
            state.peers.retain(|_, peer| *peer != index);
            state.routes.retain(|_, out| *out != index);
        });
    }

    fn with<T>(&self, work: impl FnOnce(&mut State) -> T) -> T {
        work(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Netlink for FakeNetlink {
    async fn link(&self, index: u32) -> Result<Option<Link>, NetlinkError> {
        Ok(self.with(|state| state.links.get(&index).cloned()))
    }

    async fn link_by_name(&self, name: &str) -> Result<Option<Link>, NetlinkError> {
        Ok(self.with(|state| state.links.values().find(|link| link.name == name).cloned()))
    }

    async fn links_with_alias(&self, prefix: &str) -> Result<Vec<Link>, NetlinkError> {
        let matches = |link: &&Link| link.alias.as_ref().is_some_and(|a| a.starts_with(prefix));
        Ok(self.with(|state| state.links.values().filter(matches).cloned().collect()))
    }

    async fn set_alias(&self, index: u32, alias: &str) -> Result<(), NetlinkError> {
        self.with(|state| match state.links.get_mut(&index) {
            Some(link) => {
                link.alias = Some(alias.to_owned());
                Ok(())
            }
            None => Err(NetlinkError::Request {
                operation: "set alias of",
                subject: format!("interface {index}"),
                source: io::Error::from_raw_os_error(libc::ENODEV),
            }),
        })
    }

    async fn host_peer(&self, netns: &Path, name: &str) -> Result<Link, NetlinkError> {
        self.with(|state| {
            let key = (netns.to_path_buf(), name.to_owned());
            if !state.peers.keys().any(|(path, _)| path == netns) {
                return Err(NetlinkError::Namespace {
                    path: key.0,
                    source: io::Error::from_raw_os_error(libc::ENOENT),
                });
            }
            state.peers.get(&key).and_then(|index| state.links.get(index)).cloned().ok_or(
                NetlinkError::NoHostPeer { netns: key.0, name: key.1, detail: "there is no such interface" },
            )
        })
    }

    async fn route_link(&self, address: IpAddr) -> Result<Option<Link>, NetlinkError> {
        Ok(self.with(|state| state.routes.get(&address).and_then(|index| state.links.get(index)).cloned()))
    }
}
