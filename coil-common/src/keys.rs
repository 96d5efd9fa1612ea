//! Map keys.

use bytemuck::{Pod, Zeroable};

use crate::pod::shared;

/// A flow over IPv4 as one direction sees it: the sender first.
///
/// ICMP echo has no ports: a request has its identifier as `src_port` and 0 as `dst_port`, a reply
/// the other way round, so that a reply's key is the reversed request's.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Pod, Zeroable)]
pub struct FlowKey4 {
    /// Source address.
    pub src: [u8; 4],
    /// Destination address.
    pub dst: [u8; 4],
    /// Source port, or the identifier of an ICMP echo request.
    pub src_port: [u8; 2],
    /// Destination port, or the identifier of an ICMP echo reply.
    pub dst_port: [u8; 2],
    /// IP protocol number.
    pub protocol: u8,
    /// Zero.
    pub pad: [u8; 3],
}

/// A flow over IPv6; see [`FlowKey4`].
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Pod, Zeroable)]
pub struct FlowKey6 {
    /// Source address.
    pub src: [u8; 16],
    /// Destination address.
    pub dst: [u8; 16],
    /// Source port, or the identifier of an ICMPv6 echo request.
    pub src_port: [u8; 2],
    /// Destination port, or the identifier of an ICMPv6 echo reply.
    pub dst_port: [u8; 2],
    /// IP protocol number.
    pub protocol: u8,
    /// Zero.
    pub pad: [u8; 3],
}

macro_rules! flow_key {
    ($name:ident) => {
        impl $name {
            /// The key of the opposite direction.
            #[inline(always)]
            #[must_use]
            pub const fn reversed(&self) -> Self {
                Self {
                    src: self.dst,
                    dst: self.src,
                    src_port: self.dst_port,
                    dst_port: self.src_port,
                    protocol: self.protocol,
                    pad: [0; 3],
                }
            }
        }
    };
}

flow_key!(FlowKey4);
flow_key!(FlowKey6);

/// Data part of an LPM key: a policy set, then an IPv4 destination. The prefix length counts the 32
/// bits of the set too.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Pod, Zeroable)]
pub struct PolicyKey4 {
    /// Policy set, big endian.
    pub set: [u8; 4],
    /// Destination.
    pub dst: [u8; 4],
}

/// Data part of an LPM key: a policy set, then an IPv6 destination; see [`PolicyKey4`].
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Pod, Zeroable)]
pub struct PolicyKey6 {
    /// Policy set, big endian.
    pub set: [u8; 4],
    /// Destination.
    pub dst: [u8; 16],
}

/// Number of prefix bits that the policy set takes in front of the destination.
pub const POLICY_SET_BITS: u32 = 32;

/// A gateway that may send tunnelled packets to the pods of a policy set.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Pod, Zeroable)]
pub struct PeerKey4 {
    /// Policy set, native endian.
    pub set: u32,
    /// Address of the gateway.
    pub addr: [u8; 4],
}

/// A gateway that may send tunnelled packets to the pods of a policy set.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Pod, Zeroable)]
pub struct PeerKey6 {
    /// Policy set, native endian.
    pub set: u32,
    /// Address of the gateway.
    pub addr: [u8; 16],
}

/// A client of a gateway over IPv4.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Pod, Zeroable)]
pub struct ClientKey4 {
    /// Address of the client pod.
    pub addr: [u8; 4],
}

/// A client of a gateway over IPv6.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Pod, Zeroable)]
pub struct ClientKey6 {
    /// Address of the client pod.
    pub addr: [u8; 16],
}

/// A client and an index into the `egresses` map, whose family is that of the client.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Pod, Zeroable)]
pub struct AffinityKey {
    /// Index of the egress.
    pub egress: u32,
    /// IPv6 address, or an IPv4 address in the first four bytes.
    pub client: [u8; 16],
}

shared! {
    FlowKey4 = 16,
    FlowKey6 = 40,
    PolicyKey4 = 8,
    PolicyKey6 = 20,
    PeerKey4 = 8,
    PeerKey6 = 20,
    ClientKey4 = 4,
    ClientKey6 = 16,
    AffinityKey = 20,
}
