//! `policy`: what the datapath does with each destination of each pod.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use coil_common::keys::{POLICY_SET_BITS, PolicyKey4, PolicyKey6};
use coil_common::names::{MAP_POLICY_V4, MAP_POLICY_V6};
use coil_common::values::{EGRESS_BLOCK, EGRESS_DIRECT, NO_POLICY, POD_ANY_SOURCE, POD_GATEWAY, PolicyValue};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use serde::Serialize;

use super::args::{Format, PolicyOptions};
use super::node::{Node, read};
use super::{InspectError, Outcome, output};

/// What happens to packets towards a prefix.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Rule {
    /// The prefix.
    pub(crate) prefix: IpNet,
    /// `direct`, `block` or `egress`.
    pub(crate) action: &'static str,
    /// The Egress.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) egress: Option<String>,
}

impl Rule {
    pub(crate) fn describe(&self) -> String {
        self.egress.clone().unwrap_or_else(|| self.action.to_owned())
    }
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct PodPolicy {
    pod: String,
    uid: Option<String>,
    addresses: Vec<IpAddr>,
    interface: u32,
    mtu: u32,
    gateway: bool,
    any_source: bool,
    set: Option<u32>,
    rules: Vec<Rule>,
}

#[derive(Clone, Copy, bytemuck::AnyBitPattern)]
#[repr(C)]
struct Prefix4 {
    length: u32,
    key: PolicyKey4,
}

#[derive(Clone, Copy, bytemuck::AnyBitPattern)]
#[repr(C)]
struct Prefix6 {
    length: u32,
    key: PolicyKey6,
}

/// All sets: rules by set, the shortest prefix last.
pub(crate) fn sets(node: &Node) -> Result<Vec<(u32, Rule, u32)>, InspectError> {
    let mut all = Vec::new();
    let mut add = |set: [u8; 4], prefix: Option<IpNet>, value: PolicyValue| {
        if let Some(prefix) = prefix {
            all.push((u32::from_be_bytes(set), rule(node, prefix, value.egress), value.egress));
        }
    };
    let bits = |length: u32| u8::try_from(length.saturating_sub(POLICY_SET_BITS)).unwrap_or(u8::MAX);
    for (Prefix4 { length, key }, value) in read::<Prefix4, PolicyValue>(&node.folder, MAP_POLICY_V4)? {
        let net = Ipv4Net::new(Ipv4Addr::from(key.dst), bits(length)).ok();
        add(key.set, net.map(IpNet::from), value);
    }
    for (Prefix6 { length, key }, value) in read::<Prefix6, PolicyValue>(&node.folder, MAP_POLICY_V6)? {
        let net = Ipv6Net::new(Ipv6Addr::from(key.dst), bits(length)).ok();
        add(key.set, net.map(IpNet::from), value);
    }
    all.sort_by_key(|(set, rule, _)| {
        (*set, rule.prefix.addr().is_ipv6(), u8::MAX - rule.prefix.prefix_len(), rule.prefix.network())
    });
    Ok(all)
}

fn rule(node: &Node, prefix: IpNet, egress: u32) -> Rule {
    match egress {
        EGRESS_DIRECT => Rule { prefix, action: "direct", egress: None },
        EGRESS_BLOCK => Rule { prefix, action: "block", egress: None },
        // Known still, for the sake of the pods that name it, which are cut off.
        index if node.is_deleted(index) => {
            Rule { prefix, action: "block", egress: Some(node.egress_label(index)) }
        }
        index => Rule { prefix, action: "egress", egress: Some(node.egress_label(index)) },
    }
}

/// Runs the command.
pub(crate) fn run(node: &Node, format: Format, options: &PolicyOptions) -> Result<Outcome, InspectError> {
    let PolicyOptions { pod } = options;
    let only = pod.as_ref().map(|wanted| node.pod(wanted)).transpose()?;
    let sets = sets(node)?;
    let mut pods: Vec<PodPolicy> = node
        .pods
        .values()
        .filter(|pod| only.is_none_or(|only| only.ifindex == pod.ifindex))
        .map(|pod| PodPolicy {
            pod: pod.label(),
            uid: pod.uid.clone(),
            addresses: pod.addresses().collect(),
            interface: pod.ifindex,
            mtu: pod.value.mtu,
            gateway: pod.value.flags & POD_GATEWAY != 0,
            any_source: pod.value.flags & POD_ANY_SOURCE != 0,
            set: (pod.value.set != NO_POLICY).then_some(pod.value.set),
            rules: sets
                .iter()
                .filter(|(set, ..)| *set == pod.value.set)
                .map(|(_, rule, _)| rule.clone())
                .collect(),
        })
        .collect();
    pods.sort_by(|a, b| a.pod.cmp(&b.pod));
    if format == Format::Json {
        output::json_list("PolicyList", &pods)?;
        return Ok(Outcome::Done);
    }
    let wide = format == Format::Wide;
    let mut rows = Vec::new();
    for pod in &pods {
        let mut first = vec![pod.pod.clone()];
        if wide {
            let addresses: Vec<String> = pod.addresses.iter().map(ToString::to_string).collect();
            first.extend([
                addresses.join(","),
                pod.interface.to_string(),
                pod.mtu.to_string(),
                pod.set.map_or_else(String::new, |set| set.to_string()),
            ]);
        }
        if pod.rules.is_empty() {
            let what =
                if pod.gateway { "egress pod: nothing is done" } else { "no Egress: all leaves directly" };
            rows.push([first, vec!["any".into(), what.into()]].concat());
            continue;
        }
        for rule in &pod.rules {
            let what = match rule.action {
                "egress" => format!("through Egress {}", rule.describe()),
                "block" => match &rule.egress {
                    Some(egress) => format!("dropped: Egress {egress} is deleted"),
                    None => "dropped: its Egress cannot be resolved".to_owned(),
                },
                _ => "directly".to_owned(),
            };
            rows.push([first.clone(), vec![rule.prefix.to_string(), what]].concat());
        }
    }
    let headers: &[&str] = if wide {
        &["POD", "ADDRESSES", "INTERFACE", "MTU", "SET", "DESTINATION", "LEAVES"]
    } else {
        &["POD", "DESTINATION", "LEAVES"]
    };
    output::table(headers, &rows, "No pod of this node is in the datapath.")?;
    Ok(Outcome::Done)
}
