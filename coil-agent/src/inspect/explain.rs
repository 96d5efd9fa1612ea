//! `explain`: what would happen to a packet of a pod, and why.
//!
//! A packet is made up and goes through the decisions of the datapath itself, `from_pod`, `gateway` if that
//! is on this node, and both again for the answer, over the pinned maps. What the decisions would write
//! stays in memory. The reasons are read from the same maps.

mod text;

use std::net::IpAddr;

use coil_common::config::{CONFIG_NEAR, Config};
use coil_common::keys::{FlowKey4, FlowKey6};
use coil_common::names::{
    GATEWAY_MAPS, MAP_DROPS, MAP_FLOWS_V4, MAP_FLOWS_V6, MAP_INBOUND_V4, MAP_INBOUND_V6, MAP_NAT_FORWARD_V4,
    MAP_NAT_FORWARD_V6, NODE_MAPS,
};
use coil_common::stats::DropReason;
use coil_common::values::{
    EGRESS_CLIENT_AFFINITY, FlowValue, InboundValue, NO_POLICY, NatValue4, NatValue6, POD_ANY_SOURCE,
    POD_GATEWAY, POD_ORIGINATING_ONLY,
};
use coil_ebpf::encap::Encap;
use coil_ebpf::testing::build;
use coil_ebpf::testing::memory::{Memory, Tables};
use coil_ebpf::testing::{Action, Hook, interpret};
use ipnet::IpNet;
use serde::Serialize;

use super::args::{Explain, Format, Protocol};
use super::conntrack::{Tuple, flows};
use super::egress::shares;
use super::node::{Gateway, Node, Pod, gateway_state, open};
use super::policy::{self, Rule};
use super::remedy::remedy;
use super::source::Pinned;
use super::{InspectError, Outcome, drops, output, packet};
use crate::datapath::seconds_since_boot;

/// Source port where nothing suggests another.
const SOURCE_PORT: u16 = 40000;
const SYN: u8 = 2;
const SYN_ACK: u8 = 0x12;
/// MSS option of a SYN: Ethernet's for IPv4.
const MSS: [u8; 4] = [2, 4, 0x05, 0xb4];
/// Length of an Ethernet header.
const ETHERNET: usize = 14;

/// What would happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) enum Verdict {
    /// It goes its way as it is.
    Direct,
    /// It leaves through an Egress.
    Egress,
    /// It is dropped.
    Drop,
    /// It is dropped, and the pod is told the size that fits.
    TooBig,
}

/// The answer.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Explanation {
    pub(crate) api_version: &'static str,
    pub(crate) kind: &'static str,
    pub(crate) verdict: Verdict,
    pub(crate) pod: String,
    pub(crate) packet: PacketInfo,
    pub(crate) policy: PolicyInfo,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) egress: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) flow: Option<FlowInfo>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) gateway: Option<GatewayInfo>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) tunnel: Option<TunnelInfo>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) translation: Option<TranslationInfo>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) reply: Option<ReplyInfo>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) drop: Option<DropInfo>,
    /// Why, in sentences.
    pub(crate) reasons: Vec<String>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct PacketInfo {
    pub(crate) protocol: String,
    pub(crate) source: String,
    pub(crate) destination: String,
    pub(crate) bytes: usize,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct PolicyInfo {
    /// Number of the pod's policy set.
    pub(crate) set: Option<u32>,
    /// The longest prefix that contains the destination.
    pub(crate) matched: Option<Rule>,
    /// Shorter ones that contain it too.
    pub(crate) others: Vec<Rule>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct FlowInfo {
    /// There is a flow with these ports.
    pub(crate) existing: bool,
    /// Seconds since its first packet.
    pub(crate) age: Option<u32>,
    /// It was decided under another policy, or its gateway has gone: it is decided again.
    pub(crate) decided_again: bool,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct GatewayInfo {
    pub(crate) address: IpAddr,
    /// Name of the egress pod if it is on this node.
    pub(crate) pod: Option<String>,
    pub(crate) state: &'static str,
    /// `existing flow`, `client address` or `flow hash`.
    pub(crate) chosen_by: &'static str,
    /// Gateways of the Egress that take new flows.
    pub(crate) ready: usize,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct TunnelInfo {
    /// `fou` or `ipip`.
    pub(crate) kind: &'static str,
    /// The egress pod is on the same node, and packets of the flow will not be encapsulated once it is answered.
    pub(crate) bypassed: bool,
    pub(crate) source: String,
    pub(crate) destination: String,
    /// Largest packet of the pod that fits.
    pub(crate) mtu: u32,
    /// What the MSS of a SYN becomes if it is larger.
    pub(crate) mss: u32,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct TranslationInfo {
    /// The egress pod.
    pub(crate) gateway: String,
    /// There is a translation of this flow.
    pub(crate) existing: bool,
    /// What the world sees.
    pub(crate) seen_as: Option<String>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct ReplyInfo {
    /// An answer would reach the pod, as far as it is known here.
    pub(crate) arrives: bool,
    /// The gateway's part was looked at too.
    pub(crate) through_gateway: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) drop: Option<DropInfo>,
}

#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct DropInfo {
    /// `node`, or the name of the egress pod.
    pub(crate) r#where: String,
    pub(crate) reason: String,
    pub(crate) description: String,
    pub(crate) remedy: Option<&'static str>,
}

impl DropInfo {
    fn new(place: &str, index: u32) -> Self {
        Self {
            r#where: place.to_owned(),
            reason: drops::name(index),
            description: drops::description(index),
            remedy: DropReason::from_index(index).and_then(remedy),
        }
    }
}

/// Runs the command.
pub(crate) fn run(node: &Node, format: Format, options: &Explain) -> Result<Outcome, InspectError> {
    let explanation = explain(node, options)?;
    let outcome = match explanation.verdict {
        Verdict::Direct | Verdict::Egress => Outcome::Done,
        Verdict::Drop | Verdict::TooBig => Outcome::Dropped,
    };
    if format == Format::Json {
        output::json(&explanation)?;
    } else {
        output::line(&text::render(&explanation))?;
    }
    Ok(outcome)
}

/// What has become of a packet.
struct Result1 {
    packet: Memory,
    /// Why it was dropped.
    dropped: Option<u32>,
    changed: bool,
}

fn through(
    hook: Hook,
    ifindex: u32,
    packet: &Memory,
    config: &coil_common::config::Config,
    tables: &Tables,
) -> Result1 {
    let before: Vec<u32> = dropped(tables);
    let (action, bytes) = interpret::run(hook, ifindex, packet, config, tables);
    let reason = dropped(tables).into_iter().find(|reason| !before.contains(reason));
    let dropped = match (action, reason) {
        (Action::Drop, None) => Some(u32::MAX),
        (_, reason) => reason,
    };
    Result1 { changed: bytes != packet.bytes, packet: Memory::new(bytes), dropped }
}

/// Reasons that tables have counted.
fn dropped(tables: &Tables) -> Vec<u32> {
    tables.counters().keys().filter(|(map, _)| *map == MAP_DROPS).map(|(_, index)| *index).collect()
}

/// A packet of the pod, or the answer to it.
fn make(tuple: &Tuple, answer: bool, size: Option<usize>) -> Memory {
    let ip = build::Ip::new(tuple.src, tuple.dst);
    let ports = (tuple.src_port, tuple.dst_port);
    let header = if tuple.src.is_ipv4() { 20 } else { 40 };
    let pad = |l4: usize| vec![0; size.unwrap_or(0).saturating_sub(header + l4)];
    let bytes = match tuple.protocol {
        6 => ip.tcp(ports, if answer { SYN_ACK } else { SYN }, &MSS, &pad(24)),
        17 => ip.udp(ports, &pad(8)),
        _ if answer => ip.echo(false, tuple.dst_port, &pad(8)),
        _ => ip.echo(true, tuple.src_port, &pad(8)),
    };
    Memory::new(build::ethernet(&bytes))
}

fn reversed(tuple: &Tuple) -> Tuple {
    Tuple {
        src: tuple.dst,
        dst: tuple.src,
        src_port: tuple.dst_port,
        dst_port: tuple.src_port,
        protocol: tuple.protocol,
    }
}

/// The flow that is asked about.
fn question(node: &Node, pod: &Pod, options: &Explain) -> Result<Tuple, InspectError> {
    let destination = options.destination.address;
    let v6 = destination.is_ipv6();
    let source = pod
        .addresses()
        .find(|address| address.is_ipv6() == v6)
        .ok_or_else(|| InspectError::Family { pod: pod.label(), family: if v6 { "IPv6" } else { "IPv4" } })?;
    let (protocol, dst_port) = match options.protocol {
        Protocol::Tcp => (6, options.destination.port.unwrap_or(80)),
        Protocol::Udp => (17, options.destination.port.unwrap_or(53)),
        Protocol::Icmp => (if v6 { 58 } else { 1 }, 0),
    };
    let mut tuple = Tuple { src: source, dst: destination, src_port: SOURCE_PORT, dst_port, protocol };
    tuple.src_port = match options.source_port {
        Some(port) => port,
        None => {
            let same =
                |(other, _): &&(Tuple, FlowValue)| Tuple { src_port: tuple.src_port, ..*other } == tuple;
            let all = flows(node)?;
            let youngest = all.iter().filter(same).max_by_key(|(_, value)| value.last_seen);
            youngest.map_or(SOURCE_PORT, |(other, _)| other.src_port)
        }
    };
    Ok(tuple)
}

fn key4(tuple: &Tuple) -> Option<FlowKey4> {
    let (IpAddr::V4(src), IpAddr::V4(dst)) = (tuple.src, tuple.dst) else { return None };
    Some(FlowKey4 {
        src: src.octets(),
        dst: dst.octets(),
        src_port: tuple.src_port.to_be_bytes(),
        dst_port: tuple.dst_port.to_be_bytes(),
        protocol: tuple.protocol,
        pad: [0; 3],
    })
}

fn key6(tuple: &Tuple) -> Option<FlowKey6> {
    let (IpAddr::V6(src), IpAddr::V6(dst)) = (tuple.src, tuple.dst) else { return None };
    Some(FlowKey6 {
        src: src.octets(),
        dst: dst.octets(),
        src_port: tuple.src_port.to_be_bytes(),
        dst_port: tuple.dst_port.to_be_bytes(),
        protocol: tuple.protocol,
        pad: [0; 3],
    })
}

fn look<K: bytemuck::NoUninit, V: bytemuck::AnyBitPattern>(
    folder: &std::path::Path,
    map: &str,
    key: &K,
) -> Result<Option<V>, InspectError> {
    match open::<K, V>(folder, map)? {
        None => Ok(None),
        Some(opened) => opened.get(key).map_err(InspectError::pin("read", &folder.join(map))),
    }
}

fn existing_flow(node: &Node, tuple: &Tuple) -> Result<Option<FlowValue>, InspectError> {
    match (key4(tuple), key6(tuple)) {
        (Some(key), _) => look(&node.folder, MAP_FLOWS_V4, &key),
        (_, Some(key)) => look(&node.folder, MAP_FLOWS_V6, &key),
        _ => Ok(None),
    }
}

/// A flow that has come to the pod directly is what the packet would answer.
fn came_directly(node: &Node, pod: &Pod, tuple: &Tuple) -> Result<bool, InspectError> {
    if pod.value.flags & POD_ORIGINATING_ONLY == 0 {
        return Ok(false);
    }
    let noted: Option<InboundValue> = match (key4(tuple), key6(tuple)) {
        (Some(key), _) => look(&node.folder, MAP_INBOUND_V4, &key)?,
        (_, Some(key)) => look(&node.folder, MAP_INBOUND_V6, &key)?,
        _ => None,
    };
    Ok(noted.is_some())
}

fn is_translated(gateway: &Gateway, tuple: &Tuple) -> Result<bool, InspectError> {
    match (key4(tuple), key6(tuple)) {
        (Some(key), _) => Ok(look::<_, NatValue4>(&gateway.folder, MAP_NAT_FORWARD_V4, &key)?.is_some()),
        (_, Some(key)) => Ok(look::<_, NatValue6>(&gateway.folder, MAP_NAT_FORWARD_V6, &key)?.is_some()),
        _ => Ok(false),
    }
}

/// The flow that the decisions would have left in the table.
fn decided_flow(tables: &Tables, tuple: &Tuple) -> Option<FlowValue> {
    let key = match (key4(tuple), key6(tuple)) {
        (Some(key), _) => bytemuck::bytes_of(&key).to_vec(),
        (_, Some(key)) => bytemuck::bytes_of(&key).to_vec(),
        _ => return None,
    };
    let flows = [MAP_FLOWS_V4, MAP_FLOWS_V6];
    tables
        .entries()
        .into_iter()
        .find(|entry| flows.contains(&entry.map) && entry.key.0 == key)
        .filter(|entry| entry.value.0.len() == size_of::<FlowValue>())
        .map(|entry| entry.value.read())
}

/// Finds the answer.
pub(crate) fn explain(node: &Node, options: &Explain) -> Result<Explanation, InspectError> {
    let clock = |_| InspectError::System { what: "the clock", source: std::io::ErrorKind::Other.into() };
    let now = seconds_since_boot().map_err(clock)?;
    let pod = node.pod(&options.pod)?;
    let tuple = question(node, pod, options)?;
    let v6 = tuple.dst.is_ipv6();
    let answers = came_directly(node, pod, &tuple)?;
    let asked = make(&tuple, answers, options.size.map(usize::from));
    let before = existing_flow(node, &tuple)?;

    let (source, trouble) = Pinned::open(&node.folder, NODE_MAPS)?;
    let tables = Tables::over(Box::new(source), now);
    let sent = through(Hook::FromPod, pod.ifindex, &asked, &node.config, &tables);
    trouble.check(&node.folder)?;

    let mut explanation = Explanation {
        api_version: output::API_VERSION,
        kind: "Explanation",
        verdict: Verdict::Direct,
        pod: pod.label(),
        packet: PacketInfo {
            protocol: super::state::protocol(tuple.protocol),
            source: tuple.source(),
            destination: tuple.destination(),
            bytes: asked.bytes.len() - ETHERNET,
        },
        policy: matching(node, pod, tuple.dst)?,
        egress: None,
        flow: None,
        gateway: None,
        tunnel: None,
        translation: None,
        reply: None,
        drop: None,
        reasons: Vec::new(),
    };
    if let Some(reason) = sent.dropped {
        let too_big = reason == DropReason::TooBig.index();
        explanation.verdict = if too_big { Verdict::TooBig } else { Verdict::Drop };
        explanation.drop = Some(DropInfo::new("node", reason));
        explanation.egress = explanation.policy.matched.as_ref().and_then(|rule| rule.egress.clone());
        if let Some(Rule { action: "block", egress: Some(egress), .. }) = &explanation.policy.matched {
            explanation.reasons.push(format!("Egress {egress} is deleted, and the pod still names it."));
        }
        if too_big {
            explanation.reasons.push(format!(
                "The tunnel takes packets of up to {} bytes; this one has {}. The pod gets an ICMP error that says so.",
                inner_mtu(&node.config, pod.value.mtu, v6),
                explanation.packet.bytes
            ));
        }
        return Ok(explanation);
    }
    if !sent.changed {
        explanation.reasons = why_direct(pod, &tuple, &explanation.policy, answers);
        return Ok(explanation);
    }
    explanation.verdict = Verdict::Egress;
    let fou_port = u16::from_be_bytes(node.config.fou_port);
    let outer = sent.packet.bytes.get(ETHERNET..).and_then(|bytes| packet::read(bytes, fou_port));
    let decided = decided_flow(&tables, &tuple);
    explanation.egress = decided
        .map(|flow| node.egress_label(flow.egress))
        .or_else(|| explanation.policy.matched.as_ref().and_then(|rule| rule.egress.clone()));
    explanation.flow = Some(FlowInfo {
        existing: before.is_some(),
        age: before.map(|flow| now.saturating_sub(flow.created)),
        decided_again: before.is_some_and(|flow| {
            decided.is_some_and(|new| {
                (new.set, new.egress, new.gateway, new.gateway_generation)
                    != (flow.set, flow.egress, flow.gateway, flow.gateway_generation)
            })
        }),
    });
    let Some(outer) = outer else { return Ok(explanation) };
    let kind = if outer.outer.protocol == 17 { "fou" } else { "ipip" };
    let near = node.config.flags & CONFIG_NEAR != 0 && node.gateway_with(outer.outer.dst).is_some();
    explanation.tunnel = Some(TunnelInfo {
        kind,
        bypassed: near && matches!(tuple.protocol, 6 | 17),
        source: outer.outer.source(),
        destination: outer.outer.destination(),
        mtu: inner_mtu(&node.config, pod.value.mtu, v6),
        mss: inner_mtu(&node.config, pod.value.mtu, v6).saturating_sub(if v6 { 60 } else { 40 }),
    });
    let address = outer.outer.dst;
    explanation.gateway = Some(gateway_info(node, address, before, decided));

    // The rest of the way, as far as it is on this node.
    let back = match node.gateway_with(address) {
        Some(gateway) => at_gateway(node, gateway, &tuple, &sent.packet, now, &mut explanation)?,
        None => {
            let answer = make(&reversed(&tuple), true, None);
            let inner = answer.bytes.get(ETHERNET..).unwrap_or_default();
            let ip = build::Ip::new(address, tuple.src);
            Some(Memory::new(build::ethernet(&ip.udp_unchecked((fou_port, fou_port), inner))))
        }
    };
    if let Some(back) = back {
        let came = through(Hook::ToPod, pod.ifindex, &back, &node.config, &tables);
        trouble.check(&node.folder)?;
        explanation.reply = Some(ReplyInfo {
            arrives: came.dropped.is_none() && came.changed,
            through_gateway: node.gateway_with(address).is_some(),
            drop: came.dropped.map(|reason| DropInfo::new("node", reason)),
        });
    }
    Ok(explanation)
}

/// Looks at the part of a gateway on this node; the answer as it would come back.
fn at_gateway(
    node: &Node,
    gateway: &Gateway,
    tuple: &Tuple,
    tunnelled: &Memory,
    now: u32,
    explanation: &mut Explanation,
) -> Result<Option<Memory>, InspectError> {
    let Some(config) = &gateway.config else {
        explanation.reasons.push(format!(
            "Egress pod {} runs another build: what it would do is not looked at.",
            gateway.label
        ));
        return Ok(None);
    };
    let existing = is_translated(gateway, tuple)?;
    let (source, trouble) = Pinned::open(&gateway.folder, GATEWAY_MAPS)?;
    let tables = Tables::over(Box::new(source), now);
    let out = through(Hook::Gateway, 0, tunnelled, config, &tables);
    trouble.check(&gateway.folder)?;
    let fou_port = u16::from_be_bytes(node.config.fou_port);
    let seen = out.packet.bytes.get(ETHERNET..).and_then(|bytes| packet::read(bytes, fou_port));
    let dropped = out.dropped.is_some() || !out.changed;
    explanation.translation = Some(TranslationInfo {
        gateway: gateway.label.clone(),
        existing,
        seen_as: seen.as_ref().filter(|_| !dropped).map(|seen| seen.outer.source()),
    });
    if let Some(reason) = out.dropped {
        explanation.verdict = Verdict::Drop;
        explanation.drop = Some(DropInfo::new(&gateway.label, reason));
        return Ok(None);
    }
    let Some(seen) = seen.filter(|_| out.changed) else { return Ok(None) };
    let answer = make(&reversed(&seen.outer), true, None);
    let back = through(Hook::Gateway, 0, &answer, config, &tables);
    trouble.check(&gateway.folder)?;
    if back.dropped.is_none() && back.changed {
        return Ok(Some(back.packet));
    }
    explanation.reply = Some(ReplyInfo {
        arrives: false,
        through_gateway: true,
        drop: back.dropped.map(|reason| DropInfo::new(&gateway.label, reason)),
    });
    Ok(None)
}

fn gateway_info(
    node: &Node,
    address: IpAddr,
    before: Option<FlowValue>,
    decided: Option<FlowValue>,
) -> GatewayInfo {
    let egress = decided.and_then(|flow| node.egresses.get(&flow.egress));
    let slot = decided.and_then(|flow| node.gateways.get(&flow.gateway));
    let kept = before.zip(decided).is_some_and(|(old, new)| {
        (old.gateway, old.gateway_generation) == (new.gateway, new.gateway_generation)
    });
    GatewayInfo {
        address,
        pod: node.gateway_with(address).map(|gateway| gateway.label.clone()),
        state: slot.map_or("unknown", gateway_state),
        chosen_by: match egress {
            _ if kept => "existing flow",
            Some(egress) if egress.flags & EGRESS_CLIENT_AFFINITY != 0 => "client address",
            _ => "flow hash",
        },
        ready: egress.map_or(0, |egress| shares(egress).len()),
    }
}

fn inner_mtu(config: &Config, mtu: u32, v6: bool) -> u32 {
    Encap::of_config(config).like_fou(mtu).saturating_sub(if v6 { 48 } else { 28 })
}

/// Rules of the pod's set that contain the destination, the longest first.
fn matching(node: &Node, pod: &Pod, destination: IpAddr) -> Result<PolicyInfo, InspectError> {
    if pod.value.set == NO_POLICY {
        return Ok(PolicyInfo { set: None, matched: None, others: Vec::new() });
    }
    let mut rules: Vec<Rule> = policy::sets(node)?
        .into_iter()
        .filter(|(set, rule, _)| *set == pod.value.set && rule.prefix.contains(&destination))
        .map(|(_, rule, _)| rule)
        .collect();
    rules.sort_by_key(|rule| std::cmp::Reverse(rule.prefix.prefix_len()));
    let mut rules = rules.into_iter();
    Ok(PolicyInfo { set: Some(pod.value.set), matched: rules.next(), others: rules.collect() })
}

/// Private ranges, which wide destinations do not take in.
const PRIVATE: [&str; 4] = ["10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "fc00::/7"];
const LINK_LOCAL: [&str; 2] = ["169.254.0.0/16", "fe80::/10"];

fn within(address: IpAddr, nets: &[&str]) -> bool {
    nets.iter().filter_map(|net| net.parse::<IpNet>().ok()).any(|net| net.contains(&address))
}

fn why_direct(pod: &Pod, tuple: &Tuple, policy: &PolicyInfo, answers: bool) -> Vec<String> {
    let destination = tuple.dst;
    let own = pod.addresses().any(|address| address == tuple.src);
    let mut reasons = Vec::new();
    if pod.value.flags & POD_GATEWAY != 0 {
        reasons.push("The pod is an egress pod itself: nothing is done to what it sends.".to_owned());
    } else if policy.set.is_none() {
        reasons.push(
            "No Egress applies to this pod: it has no annotation egress.coil.cybozu.com/NAMESPACE, and no spec.clients selects it."
                .to_owned(),
        );
    } else if within(destination, &LINK_LOCAL) || destination.is_loopback() || destination.is_multicast() {
        reasons.push(
            "Link-local, loopback and multicast destinations never leave through an Egress.".to_owned(),
        );
    } else if let Some(rule) = &policy.matched {
        let wide = policy.others.iter().find(|other| other.egress.is_some());
        match (rule.action, wide, within(destination, &PRIVATE)) {
            ("direct", Some(wide), true) => reasons.push(format!(
                "{destination} is private. Private destinations stay in the cluster unless an Egress names them narrowly; {} of Egress {} is too wide to take it.",
                wide.prefix,
                wide.describe()
            )),
            ("direct", _, _) => reasons.push(format!("{} is excluded from the pod's Egresses.", rule.prefix)),
            ("egress", ..) if answers => reasons.push(format!(
                "It answers what has come to the pod directly, and Egress {} is for connections that the pod opens (originatingOnly).",
                rule.describe()
            )),
            _ => reasons.push("The policy names an Egress, yet the packet leaves as it is.".to_owned()),
        }
    } else {
        reasons.push("No destination of the pod's Egresses contains it.".to_owned());
    }
    if !own && pod.value.flags & POD_ANY_SOURCE == 0 {
        reasons.push("The source is not the pod's.".to_owned());
    }
    reasons
}
