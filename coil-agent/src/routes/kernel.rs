//! A routing table of the kernel.

use std::io;
use std::net::IpAddr;

use futures::StreamExt;
use ipnet::IpNet;
use netlink_packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_EXCL, NLM_F_REQUEST, NetlinkMessage,
    NetlinkPayload,
};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteProtocol, RouteScope, RouteType,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use rtnetlink::Handle;
use rtnetlink::sys::AsyncSocket;

use super::{Table, TableRoute};
use crate::netlink::NetlinkError;

/// How often a list is asked for that changed while the kernel wrote it.
const ATTEMPTS: u32 = 8;
/// The loopback interface of every name space.
const LOOPBACK: u32 = 1;

/// A routing table of the name space in which it was made.
#[derive(Clone, Debug)]
pub struct KernelTable {
    handle: Handle,
    table: u32,
    protocol: u8,
}

impl KernelTable {
    /// A table by its number, and the protocol number of the routes that are made here.
    pub fn new(table: u32, protocol: u8) -> Result<Self, NetlinkError> {
        let open =
            |source| NetlinkError::Request { operation: "open", subject: "a netlink socket".into(), source };
        let (mut connection, handle, _) = rtnetlink::new_connection().map_err(open)?;
        // The kernel then lists one table, and not all of them.
        connection.socket_mut().socket_mut().set_netlink_get_strict_chk(true).map_err(open)?;
        // Ends when the last handle is gone; every request then fails, so nobody needs to await it.
        tokio::spawn(connection);
        Ok(Self { handle, table, protocol })
    }

    fn failed(&self, operation: &'static str, what: &str, source: io::Error) -> NetlinkError {
        NetlinkError::Request { operation, subject: format!("{what} of table {}", self.table), source }
    }

    /// The messages of a list; nothing if the table changed while it was written.
    async fn dump(&self, family: AddressFamily) -> Result<Option<Vec<RouteMessage>>, NetlinkError> {
        let failed = |source| self.failed("list", "routes", source);
        let mut message = RouteMessage::default();
        message.header.address_family = family;
        message.attributes.push(RouteAttribute::Table(self.table));
        let mut request = NetlinkMessage::from(RouteNetlinkMessage::GetRoute(message));
        request.header.flags = NLM_F_REQUEST | NLM_F_DUMP;
        let mut handle = self.handle.clone();
        let mut answers = handle.request(request).map_err(|error| failed(io::Error::other(error)))?;
        let mut routes = Vec::new();
        let mut interrupted = false;
        while let Some(answer) = answers.next().await {
            interrupted |= answer.header.flags & NLM_F_DUMP_INTR != 0;
            match answer.payload {
                NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewRoute(route)) => routes.push(route),
                // A table without a single route does not exist.
                NetlinkPayload::Error(error) if error.raw_code() == -libc::ENOENT => {}
                NetlinkPayload::Error(error) => return Err(failed(error.to_io())),
                _ => {}
            }
        }
        Ok((!interrupted).then_some(routes))
    }

    fn route(&self, net: IpNet) -> RouteMessage {
        let mut message = RouteMessage::default();
        let (family, address) = match net.network() {
            IpAddr::V4(address) => (AddressFamily::Inet, RouteAddress::Inet(address)),
            IpAddr::V6(address) => (AddressFamily::Inet6, RouteAddress::Inet6(address)),
        };
        message.header = RouteHeader {
            address_family: family,
            destination_prefix_length: net.prefix_len(),
            table: RouteHeader::RT_TABLE_UNSPEC,
            protocol: RouteProtocol::from(self.protocol),
            scope: RouteScope::Universe,
            kind: RouteType::Unicast,
            ..RouteHeader::default()
        };
        message.attributes = vec![
            RouteAttribute::Table(self.table),
            RouteAttribute::Destination(address),
            RouteAttribute::Oif(LOOPBACK),
        ];
        message
    }

    /// Sends a change and waits for its answer.
    async fn change(&self, change: RouteNetlinkMessage, flags: u16) -> io::Result<()> {
        let mut request = NetlinkMessage::from(change);
        request.header.flags = NLM_F_REQUEST | NLM_F_ACK | flags;
        let mut handle = self.handle.clone();
        let mut answers = handle.request(request).map_err(io::Error::other)?;
        while let Some(answer) = answers.next().await {
            if let NetlinkPayload::Error(error) = answer.payload
                && error.code.is_some()
            {
                return Err(error.to_io());
            }
        }
        Ok(())
    }
}

impl Table for KernelTable {
    async fn list(&self) -> Result<Vec<TableRoute>, NetlinkError> {
        let mut routes = Vec::new();
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            let mut attempts = 0;
            let messages = loop {
                if let Some(messages) = self.dump(family).await? {
                    break messages;
                }
                attempts += 1;
                if attempts == ATTEMPTS {
                    return Err(self.failed("list", "routes", io::Error::from_raw_os_error(libc::EINTR)));
                }
            };
            routes.extend(messages.iter().filter(|message| table(message) == self.table).filter_map(read));
        }
        Ok(routes)
    }

    async fn add(&self, net: IpNet) -> Result<bool, NetlinkError> {
        let add = RouteNetlinkMessage::NewRoute(self.route(net));
        match self.change(add, NLM_F_CREATE | NLM_F_EXCL).await {
            Ok(()) => Ok(true),
            Err(error) if error.raw_os_error() == Some(libc::EEXIST) => Ok(false),
            Err(error) => Err(self.failed("add", &format!("route to {net}"), error)),
        }
    }

    async fn remove(&self, net: IpNet) -> Result<(), NetlinkError> {
        let mut route = self.route(net);
        // Whatever our protocol has to this destination.
        route.attributes.retain(|attribute| !matches!(attribute, RouteAttribute::Oif(_)));
        route.header.scope = RouteScope::NoWhere;
        route.header.kind = RouteType::Unspec;
        match self.change(RouteNetlinkMessage::DelRoute(route), 0).await {
            Ok(()) => Ok(()),
            Err(error) if matches!(error.raw_os_error(), Some(libc::ESRCH | libc::ENOENT)) => Ok(()),
            Err(error) => Err(self.failed("remove", &format!("route to {net}"), error)),
        }
    }
}

fn table(message: &RouteMessage) -> u32 {
    let attribute = message.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Table(table) => Some(*table),
        _ => None,
    });
    attribute.unwrap_or_else(|| u32::from(message.header.table))
}

fn read(message: &RouteMessage) -> Option<TableRoute> {
    let mut address: IpAddr = match message.header.address_family {
        AddressFamily::Inet => IpAddr::V4([0; 4].into()),
        AddressFamily::Inet6 => IpAddr::V6([0; 16].into()),
        _ => return None,
    };
    let mut plain = message.header.kind == RouteType::Unicast;
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Destination(RouteAddress::Inet(destination)) => address = (*destination).into(),
            RouteAttribute::Destination(RouteAddress::Inet6(destination)) => address = (*destination).into(),
            RouteAttribute::Oif(index) => plain &= *index == LOOPBACK,
            RouteAttribute::Gateway(_) | RouteAttribute::Via(_) | RouteAttribute::MultiPath(_) => {
                plain = false
            }
            _ => {}
        }
    }
    Some(TableRoute {
        net: IpNet::new(address, message.header.destination_prefix_length).ok()?,
        protocol: message.header.protocol.into(),
        plain,
    })
}
