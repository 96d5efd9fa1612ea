//! Netlink messages of the wiring: what a plan is in the kernel's terms, and back.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsRawFd, BorrowedFd};

use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE};
use netlink_packet_route::address::{
    AddressAttribute, AddressFlags, AddressHeaderFlags, AddressMessage, AddressScope,
};
use netlink_packet_route::link::{
    AfSpecInet6, AfSpecUnspec, In6AddrGenMode, InfoData, InfoKind, InfoVeth, LinkAttribute, LinkExtentMask,
    LinkFlags, LinkInfo, LinkLayerType, LinkMessage, Prop,
};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteMetric, RouteProtocol,
    RouteScope, RouteType,
};
use netlink_packet_route::rule::{RuleAction, RuleAttribute, RuleFlags, RuleMessage};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

use super::plan::{Address, HostRule, Route, Uplink};
use super::socket::Request;

/// An interface as the kernel describes it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Interface {
    pub(super) index: u32,
    pub(super) name: String,
    pub(super) alias: Option<String>,
    pub(super) veth: bool,
    pub(super) up: bool,
    pub(super) mtu: u32,
    pub(super) mac: Option<[u8; 6]>,
    /// Index of the other end, in its name space.
    pub(super) peer: Option<u32>,
    /// Further names.
    pub(super) alt_names: Vec<String>,
    /// Nothing that software has made, and no loopback.
    pub(super) physical: bool,
}

impl Interface {
    pub(super) fn of(message: &RouteNetlinkMessage) -> Option<Self> {
        let RouteNetlinkMessage::NewLink(message) = message else {
            return None;
        };
        let mut link = Self {
            index: message.header.index,
            up: message.header.flags.contains(LinkFlags::Up),
            physical: message.header.link_layer_type == LinkLayerType::Ether,
            ..Self::default()
        };
        for attribute in &message.attributes {
            match attribute {
                LinkAttribute::IfName(name) => link.name.clone_from(name),
                LinkAttribute::IfAlias(alias) => link.alias = Some(alias.clone()),
                LinkAttribute::Mtu(mtu) => link.mtu = *mtu,
                LinkAttribute::Address(mac) => link.mac = mac.as_slice().try_into().ok(),
                LinkAttribute::Link(peer) if *peer != 0 => link.peer = Some(*peer),
                LinkAttribute::PropList(properties) => {
                    for property in properties {
                        if let Prop::AltIfName(name) = property {
                            link.alt_names.push(name.clone());
                        }
                    }
                }
                LinkAttribute::LinkInfo(infos) => {
                    for info in infos {
                        if let LinkInfo::Kind(kind) = info {
                            link.physical = false;
                            link.veth = *kind == InfoKind::Veth;
                        }
                    }
                }
                _ => {}
            }
        }
        Some(link)
    }

    pub(super) fn uplink(&self) -> Uplink {
        Uplink { mtu: self.mtu, physical: self.physical, up: self.up }
    }
}

/// A pair whose other end appears in another name space.
pub(super) fn create_pair(name: &str, mtu: Option<u32>, ifname: &str, netns: BorrowedFd<'_>) -> Request {
    let mut inside = LinkMessage::default();
    inside.attributes.push(LinkAttribute::IfName(ifname.to_owned()));
    inside.attributes.push(LinkAttribute::NetNsFd(netns.as_raw_fd()));
    let mut message = LinkMessage::default();
    message.attributes.push(LinkAttribute::IfName(name.to_owned()));
    if let Some(mtu) = mtu {
        inside.attributes.push(LinkAttribute::Mtu(mtu));
        message.attributes.push(LinkAttribute::Mtu(mtu));
    }
    message.attributes.push(LinkAttribute::LinkInfo(vec![
        LinkInfo::Kind(InfoKind::Veth),
        LinkInfo::Data(InfoData::Veth(InfoVeth::Peer(inside))),
    ]));
    Request::new(RouteNetlinkMessage::NewLink(message), NLM_F_CREATE | NLM_F_EXCL)
}

pub(super) fn get_by_name(name: &str) -> Request {
    let mut message = LinkMessage::default();
    message.attributes.push(LinkAttribute::IfName(name.to_owned()));
    get_link(message)
}

pub(super) fn get_by_index(index: u32) -> Request {
    let mut message = LinkMessage::default();
    message.header.index = index;
    get_link(message)
}

fn get_link(mut message: LinkMessage) -> Request {
    message.attributes.push(LinkAttribute::ExtMask(vec![LinkExtentMask::SkipStats]));
    Request::new(RouteNetlinkMessage::GetLink(message), 0)
}

/// All interfaces, without their statistics.
pub(super) fn all_links() -> RouteNetlinkMessage {
    get_link(LinkMessage::default()).message
}

/// Names the owner; `own_link_local`: the kernel shall not make link-local addresses.
pub(super) fn label(index: u32, alias: &str, own_link_local: bool) -> Request {
    let mut message = LinkMessage::default();
    message.header.index = index;
    message.attributes.push(LinkAttribute::IfAlias(alias.to_owned()));
    if own_link_local {
        message.attributes.push(LinkAttribute::AfSpecUnspec(vec![AfSpecUnspec::Inet6(vec![
            AfSpecInet6::AddrGenMode(In6AddrGenMode::None),
        ])]));
    }
    Request::new(RouteNetlinkMessage::SetLink(message), 0)
}

pub(super) fn add_alt_name(index: u32, name: String) -> Request {
    let mut message = LinkMessage::default();
    message.header.index = index;
    message.attributes.push(LinkAttribute::PropList(vec![Prop::AltIfName(name)]));
    Request::new(RouteNetlinkMessage::NewLinkProp(message), NLM_F_CREATE | NLM_F_EXCL)
}

pub(super) fn set_up(index: u32) -> Request {
    let mut message = LinkMessage::default();
    message.header.index = index;
    message.header.flags = LinkFlags::Up;
    message.header.change_mask = LinkFlags::Up;
    Request::new(RouteNetlinkMessage::SetLink(message), 0)
}

pub(super) fn delete_link(index: u32) -> Request {
    let mut message = LinkMessage::default();
    message.header.index = index;
    Request::new(RouteNetlinkMessage::DelLink(message), 0)
}

/// An address that is usable at once. Duplicates are not looked for: at a pair of virtual interfaces there is
/// nobody but the two ends, the pod's address comes from a block that only this node hands out, and the node's
/// is on all host-side interfaces on purpose. The kernel would take more than a second to find out nothing.
pub(super) fn add_address(index: u32, address: &Address) -> Request {
    let mut message = AddressMessage::default();
    message.header.index = index;
    message.header.prefix_len = address.prefix;
    message.header.family = family(address.ip);
    message.header.scope = match address.ip {
        IpAddr::V6(ip) if ip.is_unicast_link_local() => AddressScope::Link,
        _ => AddressScope::Universe,
    };
    message.attributes.push(AddressAttribute::Local(address.ip));
    message.attributes.push(AddressAttribute::Address(address.ip));
    let mut flags = AddressFlags::empty();
    if address.ip.is_ipv6() {
        flags |= AddressFlags::Nodad;
        message.header.flags = AddressHeaderFlags::Nodad;
    }
    if address.no_prefix_route {
        flags |= AddressFlags::Noprefixroute;
    }
    message.attributes.push(AddressAttribute::Flags(flags));
    Request::new(RouteNetlinkMessage::NewAddress(message), NLM_F_CREATE | NLM_F_REPLACE)
}

/// A route that must not be there yet.
pub(super) fn add_route(index: u32, route: &Route, table: u32, protocol: u8) -> Request {
    let mut message = route_message(route.destination, route.prefix, table);
    message.header.protocol = RouteProtocol::from(protocol);
    message.header.kind = RouteType::Unicast;
    message.header.scope = match route.gateway {
        None => RouteScope::Link,
        Some(_) => RouteScope::Universe,
    };
    message.attributes.push(RouteAttribute::Oif(index));
    if let Some(gateway) = route.gateway {
        message.attributes.push(RouteAttribute::Gateway(route_address(gateway)));
    }
    Request::new(RouteNetlinkMessage::NewRoute(message), NLM_F_CREATE | NLM_F_EXCL)
}

fn route_message(destination: IpAddr, prefix: u8, table: u32) -> RouteMessage {
    let mut message = RouteMessage::default();
    message.header.address_family = family(destination);
    message.header.destination_prefix_length = prefix;
    match u8::try_from(table) {
        Ok(table) => message.header.table = table,
        Err(_) => message.attributes.push(RouteAttribute::Table(table)),
    }
    if prefix > 0 {
        message.attributes.push(RouteAttribute::Destination(route_address(destination)));
    }
    message
}

/// What the kernel would do with a packet: the route as it was configured, all next hops included.
pub(super) fn get_route(destination: IpAddr) -> Request {
    let length = if destination.is_ipv4() { 32 } else { 128 };
    let mut message = route_message(destination, length, 0);
    message.header.flags = RouteFlags::FibMatch;
    Request::new(RouteNetlinkMessage::GetRoute(message), 0)
}

/// All routes of a table, of one family.
pub(super) fn all_routes(v6: bool, table: u32) -> RouteNetlinkMessage {
    let mut message = RouteMessage::default();
    message.header.address_family = if v6 { AddressFamily::Inet6 } else { AddressFamily::Inet };
    message.attributes.push(RouteAttribute::Table(table));
    RouteNetlinkMessage::GetRoute(message)
}

/// A route as it was configured.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct FoundRoute {
    pub(super) destination: Option<IpAddr>,
    pub(super) prefix: u8,
    pub(super) table: u32,
    pub(super) protocol: u8,
    /// Interfaces of all next hops.
    pub(super) outputs: Vec<u32>,
    /// Largest packet that the route itself allows.
    pub(super) mtu: Option<u32>,
}

impl FoundRoute {
    pub(super) fn of(message: &RouteNetlinkMessage) -> Option<Self> {
        let RouteNetlinkMessage::NewRoute(message) = message else {
            return None;
        };
        let RouteHeader { destination_prefix_length, table, protocol, .. } = message.header;
        let mut route = Self {
            destination: None,
            prefix: destination_prefix_length,
            table: table.into(),
            protocol: protocol.into(),
            outputs: Vec::new(),
            mtu: None,
        };
        for attribute in &message.attributes {
            match attribute {
                RouteAttribute::Destination(RouteAddress::Inet(ip)) => route.destination = Some((*ip).into()),
                RouteAttribute::Destination(RouteAddress::Inet6(ip)) => {
                    route.destination = Some((*ip).into())
                }
                RouteAttribute::Table(table) => route.table = *table,
                RouteAttribute::Oif(index) => route.outputs.push(*index),
                RouteAttribute::MultiPath(hops) => {
                    route.outputs.extend(hops.iter().map(|hop| hop.interface_index));
                }
                RouteAttribute::Metrics(metrics) => {
                    route.mtu = metrics.iter().find_map(|metric| match metric {
                        RouteMetric::Mtu(mtu) if *mtu > 0 => Some(*mtu),
                        _ => None,
                    });
                }
                _ => {}
            }
        }
        Some(route)
    }
}

/// All rules of one family.
pub(super) fn all_rules(v6: bool) -> RouteNetlinkMessage {
    let mut message = RuleMessage::default();
    message.header.family = if v6 { AddressFamily::Inet6 } else { AddressFamily::Inet };
    RouteNetlinkMessage::GetRule(message)
}

/// `pref PRIORITY from all lookup TABLE`
pub(super) fn add_rule(v6: bool, priority: u32, table: u32, protocol: u8) -> Request {
    let mut message = RuleMessage::default();
    message.header.family = if v6 { AddressFamily::Inet6 } else { AddressFamily::Inet };
    message.header.action = RuleAction::ToTable;
    message.attributes.push(RuleAttribute::Priority(priority));
    message.attributes.push(RuleAttribute::Table(table));
    message.attributes.push(RuleAttribute::Protocol(RouteProtocol::from(protocol)));
    Request::new(RouteNetlinkMessage::NewRule(message), NLM_F_CREATE | NLM_F_EXCL)
}

/// Reads a rule.
pub(super) fn rule(message: &RouteNetlinkMessage) -> Option<HostRule> {
    let RouteNetlinkMessage::NewRule(message) = message else {
        return None;
    };
    let mut table = u32::from(message.header.table);
    let mut rule = HostRule {
        priority: 0,
        table: None,
        everything: message.header.src_len == 0
            && message.header.dst_len == 0
            && message.header.tos == 0
            && !message.header.flags.contains(RuleFlags::Invert),
    };
    for attribute in &message.attributes {
        match attribute {
            RuleAttribute::Priority(priority) => rule.priority = *priority,
            RuleAttribute::Table(wide) => table = *wide,
            // They choose nothing: -1 is the kernel's "not set".
            RuleAttribute::Protocol(_) | RuleAttribute::SuppressPrefixLen(u32::MAX) => {}
            _ => rule.everything = false,
        }
    }
    rule.table = (message.header.action == RuleAction::ToTable).then_some(table);
    Some(rule)
}

fn family(address: IpAddr) -> AddressFamily {
    if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 }
}

fn route_address(address: IpAddr) -> RouteAddress {
    match address {
        IpAddr::V4(address) => RouteAddress::Inet(address),
        IpAddr::V6(address) => RouteAddress::Inet6(address),
    }
}

/// Addresses by which the way out of the node is found: nothing of anybody's.
pub(super) const OUTSIDE: [IpAddr; 2] =
    [IpAddr::V4(Ipv4Addr::new(192, 0, 0, 10)), IpAddr::V6(Ipv6Addr::new(0x2001, 1, 0, 0, 0, 0, 0, 2))];
