//! Routes of the kernel's main table.

use std::future::Future;
use std::io;
use std::net::IpAddr;
use std::time::Duration;

use futures::StreamExt;
use ipnet::IpNet;
use netlink_packet_core::{NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteProtocol, RouteScope, RouteType,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use rtnetlink::Handle;

use super::plan::{Op, Route, default_metric};
use crate::netlink::NetlinkError;

/// A list that changed while it was read is read again so often, after waits that double.
const ATTEMPTS: u32 = 8;
const FIRST_WAIT: Duration = Duration::from_micros(200);

/// A table of routes.
pub trait RouteTable: Send + Sync + 'static {
    /// All routes of both families.
    fn list(&self) -> impl Future<Output = Result<Vec<Route>, NetlinkError>> + Send;

    /// Changes a route.
    fn apply(&self, op: &Op) -> impl Future<Output = Result<(), NetlinkError>> + Send;
}

/// The main table of the name space in which this was made.
#[derive(Clone, Debug)]
pub struct MainTable {
    handle: Handle,
    protocol: RouteProtocol,
}

impl MainTable {
    /// Opens a socket, served by a task of the current runtime. Routes with this protocol identifier are
    /// ours.
    pub fn new(protocol: u8) -> Result<Self, NetlinkError> {
        let (connection, handle, _) = rtnetlink::new_connection().map_err(|source| {
            NetlinkError::Request { operation: "open", subject: "a netlink socket".into(), source }
        })?;
        // Ends when the last handle is gone; every request then fails, so nobody needs to await it.
        tokio::spawn(connection);
        Ok(Self { handle, protocol: RouteProtocol::from(protocol) })
    }

    async fn family(&self, family: AddressFamily) -> Result<Vec<Route>, NetlinkError> {
        let mut wait = FIRST_WAIT;
        for _ in 1..ATTEMPTS {
            match self.dump(family).await? {
                Some(routes) => return Ok(routes),
                None => tokio::time::sleep(wait).await,
            }
            wait *= 2;
        }
        let interrupted = || refused("list", "routes".into(), io::ErrorKind::Interrupted.into());
        self.dump(family).await?.ok_or_else(interrupted)
    }

    /// Routes of a family; `None` if they changed meanwhile, so that some may be missing.
    async fn dump(&self, family: AddressFamily) -> Result<Option<Vec<Route>>, NetlinkError> {
        let mut message = RouteMessage::default();
        message.header.address_family = family;
        let mut request = NetlinkMessage::from(RouteNetlinkMessage::GetRoute(message));
        request.header.flags = NLM_F_REQUEST | NLM_F_DUMP;
        let failed = |error| request_error("list", "routes".into(), error);
        let mut answers = self.handle.clone().request(request).map_err(failed)?;
        let mut routes = Vec::new();
        let mut whole = true;
        while let Some(answer) = answers.next().await {
            whole &= answer.header.flags & NLM_F_DUMP_INTR == 0;
            match answer.payload {
                NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewRoute(message)) => {
                    routes.extend(self.read(&message));
                }
                NetlinkPayload::Error(error) if error.code.is_some() => {
                    return Err(failed(rtnetlink::Error::NetlinkError(error)));
                }
                _ => {}
            }
        }
        Ok(whole.then_some(routes))
    }

    /// A route of the main table.
    fn read(&self, message: &RouteMessage) -> Option<Route> {
        let mut table = u32::from(message.header.table);
        let mut destination = match message.header.address_family {
            AddressFamily::Inet => IpAddr::from([0; 4]),
            AddressFamily::Inet6 => IpAddr::from([0; 16]),
            _ => return None,
        };
        let mut via = None;
        let mut special = message.header.kind != RouteType::Unicast;
        let mut metric = 0;
        for attribute in &message.attributes {
            match attribute {
                RouteAttribute::Table(number) => table = *number,
                RouteAttribute::Destination(RouteAddress::Inet(address)) => destination = (*address).into(),
                RouteAttribute::Destination(RouteAddress::Inet6(address)) => destination = (*address).into(),
                RouteAttribute::Gateway(RouteAddress::Inet(address)) => via = Some(IpAddr::from(*address)),
                RouteAttribute::Gateway(RouteAddress::Inet6(address)) => via = Some(IpAddr::from(*address)),
                RouteAttribute::Via(_) | RouteAttribute::MultiPath(_) => special = true,
                RouteAttribute::Priority(number) => metric = *number,
                _ => {}
            }
        }
        if table != u32::from(RouteHeader::RT_TABLE_MAIN) {
            return None;
        }
        Some(Route {
            net: IpNet::new(destination, message.header.destination_prefix_length).ok()?,
            via: via.filter(|_| !special),
            metric,
            ours: message.header.protocol == self.protocol,
        })
    }

    /// A request about a route of ours.
    fn message(&self, net: &IpNet, via: Option<IpAddr>) -> RouteMessage {
        let address = |address| match address {
            IpAddr::V4(address) => RouteAddress::Inet(address),
            IpAddr::V6(address) => RouteAddress::Inet6(address),
        };
        let mut message = RouteMessage::default();
        message.header.address_family =
            if net.addr().is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
        message.header.destination_prefix_length = net.prefix_len();
        message.header.table = RouteHeader::RT_TABLE_MAIN;
        message.header.protocol = self.protocol;
        message.attributes.push(RouteAttribute::Destination(address(net.addr())));
        message.attributes.extend(via.map(|via| RouteAttribute::Gateway(address(via))));
        message
    }

    async fn make(&self, net: &IpNet, via: IpAddr, replace: bool) -> Result<(), NetlinkError> {
        let mut message = self.message(net, Some(via));
        message.header.scope = RouteScope::Universe;
        message.header.kind = RouteType::Unicast;
        let request = self.handle.route().add(message);
        let request = if replace { request.replace() } else { request };
        let failed = |error| request_error("make", format!("the route to {net} via {via}"), error);
        request.execute().await.map_err(failed)
    }

    async fn delete(&self, route: &Route) -> Result<(), NetlinkError> {
        let mut message = self.message(&route.net, route.via);
        // Of any scope and kind, but, by the protocol identifier in it, of ours alone.
        message.header.scope = RouteScope::NoWhere;
        message.header.kind = RouteType::Unspec;
        if route.metric != default_metric(&route.net) {
            message.attributes.push(RouteAttribute::Priority(route.metric));
        }
        match self.handle.route().del(message).execute().await {
            Ok(()) => Ok(()),
            Err(error) => match request_error("remove", format!("the route to {}", route.net), error) {
                // Gone already, perhaps with its interface.
                error if error.errno() == Some(libc::ESRCH) => Ok(()),
                error => Err(error),
            },
        }
    }
}

impl RouteTable for MainTable {
    async fn list(&self) -> Result<Vec<Route>, NetlinkError> {
        let mut routes = self.family(AddressFamily::Inet).await?;
        routes.extend(self.family(AddressFamily::Inet6).await?);
        Ok(routes)
    }

    async fn apply(&self, op: &Op) -> Result<(), NetlinkError> {
        match op {
            Op::Add { net, via } => self.make(net, *via, false).await,
            Op::Move { net, via } => self.make(net, *via, true).await,
            Op::Delete(route) => self.delete(route).await,
        }
    }
}

fn request_error(operation: &'static str, subject: String, error: rtnetlink::Error) -> NetlinkError {
    let source = match error {
        rtnetlink::Error::NetlinkError(message) => message.to_io(),
        other => io::Error::other(other),
    };
    refused(operation, subject, source)
}

fn refused(operation: &'static str, subject: String, source: io::Error) -> NetlinkError {
    NetlinkError::Request { operation, subject, source }
}
