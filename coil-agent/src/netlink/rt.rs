//! The kernel's netlink through `rtnetlink`.

use std::fs::File;
use std::io;
use std::net::IpAddr;
use std::os::fd::AsRawFd;
use std::path::Path;

use futures::{StreamExt, TryStreamExt};
use netlink_packet_core::{NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload};
use netlink_packet_route::AddressFamily;
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{InfoKind, LinkAttribute, LinkExtentMask, LinkInfo, LinkMessage, Prop};
use netlink_packet_route::nsid::{NsidAttribute, NsidMessage};
use netlink_packet_route::route::{RouteAddress, RouteAttribute, RouteMessage};
use rtnetlink::Handle;

use super::{Link, Netlink, NetlinkError};
use crate::wiring::parse_alt_name;

/// Attempts at a listing that changes keep interrupting.
const DUMP_ATTEMPTS: u32 = 6;

/// Netlink of the name space in which it was made.
#[derive(Clone, Debug)]
pub struct RtNetlink {
    handle: Handle,
}

impl RtNetlink {
    /// Opens a socket in the current name space, served by a task of the current runtime.
    pub fn new() -> Result<Self, NetlinkError> {
        let (connection, handle, _) = rtnetlink::new_connection().map_err(|source| {
            NetlinkError::Request { operation: "open", subject: "a netlink socket".into(), source }
        })?;
        // Ends when the last handle is gone; every request then fails, so nobody needs to await it.
        tokio::spawn(connection);
        Ok(Self { handle })
    }

    async fn get(&self, request: GetLink<'_>) -> Result<Option<Link>, NetlinkError> {
        let get = self.handle.link().get();
        let (get, subject) = match request {
            GetLink::Index(index) => (get.match_index(index), format!("interface {index}")),
            GetLink::Name(name) => (get.match_name(name), format!("interface {name}")),
            GetLink::Elsewhere(netns, name) => {
                let mut get = get.match_name(name);
                get.message_mut().attributes.push(LinkAttribute::IfNetnsId(netns));
                (get, format!("interface {name} of name space {netns}"))
            }
        };
        match get.execute().try_next().await {
            Ok(message) => Ok(message.as_ref().map(link)),
            Err(error) => match request_error("read", subject, error) {
                error if error.is_gone() => Ok(None),
                error => Err(error),
            },
        }
    }

    /// All interfaces. A listing during which some have changed may miss others: it is repeated.
    async fn all_links(&self) -> Result<Vec<LinkMessage>, NetlinkError> {
        let error = |error| request_error("list", "interfaces".into(), error);
        for _ in 0..DUMP_ATTEMPTS {
            let mut message = LinkMessage::default();
            // Which are half of what the kernel would tell.
            message.attributes.push(LinkAttribute::ExtMask(vec![LinkExtentMask::SkipStats]));
            let mut request = NetlinkMessage::from(RouteNetlinkMessage::GetLink(message));
            request.header.flags = NLM_F_REQUEST | NLM_F_DUMP;
            let mut answers = self.handle.clone().request(request).map_err(error)?;
            let (mut messages, mut interrupted) = (Vec::new(), false);
            while let Some(answer) = answers.next().await {
                interrupted |= answer.header.flags & NLM_F_DUMP_INTR != 0;
                match answer.payload {
                    NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewLink(message)) => {
                        messages.push(message)
                    }
                    NetlinkPayload::Error(message) => {
                        return Err(error(rtnetlink::Error::NetlinkError(message)));
                    }
                    _ => {}
                }
            }
            if !interrupted {
                return Ok(messages);
            }
        }
        let source = io::Error::from_raw_os_error(libc::EINTR);
        Err(NetlinkError::Request { operation: "list", subject: "interfaces".into(), source })
    }

    async fn route(&self, address: IpAddr) -> Result<Option<Hop>, NetlinkError> {
        let mut message = RouteMessage::default();
        let (family, destination, length) = match address {
            IpAddr::V4(address) => (AddressFamily::Inet, RouteAddress::Inet(address), 32),
            IpAddr::V6(address) => (AddressFamily::Inet6, RouteAddress::Inet6(address), 128),
        };
        message.header.address_family = family;
        message.header.destination_prefix_length = length;
        message.attributes.push(RouteAttribute::Destination(destination));
        let route = match self.handle.route().get(message).execute().try_next().await {
            Ok(route) => route,
            Err(error) => {
                let error = request_error("read", format!("route to {address}"), error);
                return match error.errno() {
                    // The last two: blackhole and prohibit.
                    Some(
                        libc::ENETUNREACH | libc::EHOSTUNREACH | libc::ESRCH | libc::EINVAL | libc::EACCES,
                    ) => Ok(None),
                    _ => Err(error),
                };
            }
        };
        let attributes = route.map_or_else(Vec::new, |route| route.attributes);
        let router = attributes
            .iter()
            .any(|attribute| matches!(attribute, RouteAttribute::Gateway(_) | RouteAttribute::Via(_)));
        Ok(attributes.into_iter().find_map(|attribute| match attribute {
            RouteAttribute::Oif(index) => Some(Hop { index, router }),
            _ => None,
        }))
    }

    /// The number by which our name space knows the one at `path`.
    async fn netns_id(&self, path: &Path) -> Result<Option<i32>, NetlinkError> {
        let subject = || format!("identifier of {}", path.display());
        let io_error = |source| NetlinkError::Namespace { path: path.to_path_buf(), source };
        let file = File::open(path).map_err(io_error)?;
        let mut message = NsidMessage::default();
        let fd = u32::try_from(file.as_raw_fd()).map_err(|_| io_error(io::ErrorKind::InvalidInput.into()))?;
        message.attributes.push(NsidAttribute::Fd(fd));
        let mut request = NetlinkMessage::from(RouteNetlinkMessage::GetNsId(message));
        request.header.flags = NLM_F_REQUEST;
        let mut handle = self.handle.clone();
        let mut answers = handle.request(request).map_err(|error| request_error("read", subject(), error))?;
        let mut found = None;
        while let Some(answer) = answers.next().await {
            match answer.payload {
                NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewNsId(message)) => {
                    for attribute in message.attributes {
                        if let NsidAttribute::Id(id) = attribute
                            && id >= 0
                        {
                            found = Some(id);
                        }
                    }
                }
                NetlinkPayload::Error(error) => {
                    let error = rtnetlink::Error::NetlinkError(error);
                    return Err(request_error("read", subject(), error));
                }
                _ => {}
            }
        }
        Ok(found)
    }
}

enum GetLink<'a> {
    Index(u32),
    Name(&'a str),
    /// In the name space that ours knows by this number.
    Elsewhere(i32, &'a str),
}

impl Netlink for RtNetlink {
    async fn link(&self, index: u32) -> Result<Option<Link>, NetlinkError> {
        self.get(GetLink::Index(index)).await
    }

    async fn link_by_name(&self, name: &str) -> Result<Option<Link>, NetlinkError> {
        self.get(GetLink::Name(name)).await
    }

    async fn links_with_alias(&self, prefix: &str) -> Result<Vec<Link>, NetlinkError> {
        let messages = self.all_links().await?;
        Ok(messages
            .iter()
            .map(link)
            .filter(|link| link.alias.as_ref().is_some_and(|alias| alias.starts_with(prefix)))
            .collect())
    }

    async fn set_alias(&self, index: u32, alias: &str) -> Result<(), NetlinkError> {
        let mut message = LinkMessage::default();
        message.header.index = index;
        message.attributes.push(LinkAttribute::IfAlias(alias.to_owned()));
        self.handle
            .link()
            .set(message)
            .execute()
            .await
            .map_err(|error| request_error("set alias of", format!("interface {index}"), error))
    }

    async fn host_peer(&self, netns: &Path, name: &str) -> Result<Link, NetlinkError> {
        let problem =
            |detail| NetlinkError::NoHostPeer { netns: netns.to_path_buf(), name: name.to_owned(), detail };
        // Asking across is less than entering, for which no less than CAP_SYS_ADMIN would do. A name
        // space without a number has no interface whose other end is here.
        let id = self.netns_id(netns).await?.ok_or_else(|| problem("no interface here leads into it"))?;
        let inside = self
            .get(GetLink::Elsewhere(id, name))
            .await?
            .ok_or_else(|| problem("there is no such interface"))?;
        if !inside.is_veth() {
            return Err(problem("it is not a veth"));
        }
        let (Some(peer), Some(_)) = (inside.peer, inside.peer_netns) else {
            return Err(problem("its peer is in the same name space"));
        };
        let outside = self.link(peer).await?.ok_or_else(|| problem("its peer is in a third name space"))?;
        // The index alone may be that of another interface here if the peer lives elsewhere.
        if !outside.is_veth() || outside.peer != Some(inside.index) || outside.peer_netns != Some(id) {
            return Err(problem("its peer is in a third name space"));
        }
        Ok(outside)
    }

    async fn route_link(&self, address: IpAddr) -> Result<Option<Link>, NetlinkError> {
        match self.route(address).await? {
            Some(Hop { index, .. }) => self.link(index).await,
            None => Ok(None),
        }
    }

    async fn veth_towards(&self, address: IpAddr) -> Result<Option<Link>, NetlinkError> {
        match self.route(address).await? {
            // Beyond a router there is no pod of ours, though the way there may be a veth too.
            Some(Hop { index, router: false }) => Ok(self.link(index).await?.filter(Link::is_veth)),
            _ => Ok(None),
        }
    }
}

/// The next hop of a route.
struct Hop {
    index: u32,
    router: bool,
}

fn request_error(operation: &'static str, subject: String, error: rtnetlink::Error) -> NetlinkError {
    let source = match error {
        rtnetlink::Error::NetlinkError(message) => message.to_io(),
        other => io::Error::other(other),
    };
    NetlinkError::Request { operation, subject, source }
}

fn link(message: &LinkMessage) -> Link {
    let mut link = Link {
        index: message.header.index,
        name: String::new(),
        alias: None,
        kind: None,
        mtu: 0,
        peer: None,
        pod: None,
        peer_netns: None,
    };
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => link.name.clone_from(name),
            LinkAttribute::IfAlias(alias) => link.alias = Some(alias.clone()),
            LinkAttribute::Mtu(mtu) => link.mtu = *mtu,
            LinkAttribute::Link(peer) if *peer != 0 => link.peer = Some(*peer),
            LinkAttribute::LinkNetNsId(id) => link.peer_netns = Some(*id),
            LinkAttribute::PropList(properties) => {
                link.pod = properties.iter().find_map(|property| match property {
                    Prop::AltIfName(name) => parse_alt_name(name).map(str::to_owned),
                    _ => None,
                });
            }
            LinkAttribute::LinkInfo(infos) => {
                link.kind = infos.iter().find_map(|info| match info {
                    LinkInfo::Kind(InfoKind::Veth) => Some("veth".to_owned()),
                    LinkInfo::Kind(kind) => Some(kind.to_string()),
                    _ => None,
                });
            }
            _ => {}
        }
    }
    link
}
