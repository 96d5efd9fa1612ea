//! `egress`: Egresses that pods of this node use, with gateways and counters.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use coil_common::names::MAP_EGRESS_STATS;
use coil_common::stats::{Direction, egress_stat};
use coil_common::values::{
    Counter, EGRESS_CLIENT_AFFINITY, EGRESS_ORIGINATING_ONLY, EGRESS_SOURCE_PORT_AUTO, EgressValue,
    MAGLEV_SLOTS,
};
use serde::Serialize;

use super::args::{EgressOptions, Format};
use super::conntrack::flows;
use super::node::{Node, gateway_address, gateway_state, open};
use super::{InspectError, Outcome, output};

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct EgressItem {
    egress: String,
    family: &'static str,
    session_affinity: &'static str,
    /// Seconds for which a client keeps its gateway for new flows; 0: as long as its hash says.
    affinity_seconds: u32,
    /// Answers of connections that came to clients directly leave directly.
    originating_only: bool,
    source_port_auto: bool,
    /// Some pod still names it: it is cut off.
    deleted: bool,
    ready_gateways: u16,
    gateways: Vec<GatewayItem>,
    tx_packets: u64,
    tx_bytes: u64,
    rx_packets: u64,
    rx_bytes: u64,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct GatewayItem {
    address: IpAddr,
    /// Name of the egress pod if it is on this node.
    pod: Option<String>,
    state: &'static str,
    /// Part of new flows in per cent.
    share: f64,
    /// Flows of pods of this node.
    flows: u64,
}

/// Shares of gateways, by slot: entries of the Maglev table.
pub(crate) fn shares(egress: &EgressValue) -> BTreeMap<u32, usize> {
    let mut shares = BTreeMap::new();
    if egress.gateways > 0 {
        for slot in egress.table {
            *shares.entry(u32::from(slot)).or_default() += 1;
        }
    }
    shares
}

/// Addresses of the gateways of an Egress that take new flows.
pub(crate) fn addresses(node: &Node, egress: &str) -> Vec<IpAddr> {
    let mut addresses = Vec::new();
    for (index, value) in node.egresses.iter().filter(|(index, _)| node.egress_label(**index) == egress) {
        addresses.extend(shares(value).keys().filter_map(|slot| node.gateway_address(*slot, index % 2 == 1)));
    }
    addresses
}

fn per_cent(part: usize) -> f64 {
    let hundredths = part * 10_000 / MAGLEV_SLOTS;
    f64::from(u32::try_from(hundredths).unwrap_or(u32::MAX)) / 100.0
}

/// Runs the command.
pub(crate) fn run(node: &Node, format: Format, options: &EgressOptions) -> Result<Outcome, InspectError> {
    let EgressOptions { egress: only } = options;
    let only = only.as_ref().map(ToString::to_string);
    let mut used: BTreeMap<(u32, u32), u64> = BTreeMap::new();
    for (_, flow) in flows(node)? {
        let current =
            node.gateways.get(&flow.gateway).is_some_and(|g| g.generation == flow.gateway_generation);
        if current {
            *used.entry((flow.egress, flow.gateway)).or_default() += 1;
        }
    }
    let stats = open::<u32, Counter>(&node.folder, MAP_EGRESS_STATS)?;
    let count = |index, direction| match &stats {
        None => Ok(Counter::default()),
        Some(map) => map
            .counter(egress_stat(index, direction))
            .map_err(InspectError::pin("read", &node.folder.join(MAP_EGRESS_STATS))),
    };
    let mut items = Vec::new();
    for (&index, value) in &node.egresses {
        let label = node.egress_label(index);
        if only.as_ref().is_some_and(|only| *only != label) {
            continue;
        }
        let v6 = index % 2 == 1;
        let shares = shares(value);
        let with_flows = used.keys().filter(|(egress, _)| *egress == index).map(|(_, slot)| *slot);
        let slots: BTreeSet<u32> = shares.keys().copied().chain(with_flows).collect();
        let gateways: Vec<GatewayItem> = slots
            .into_iter()
            .filter_map(|slot| {
                let gateway = node.gateways.get(&slot)?;
                let address = gateway_address(gateway, v6);
                Some(GatewayItem {
                    address,
                    pod: node.gateway_with(address).map(|gateway| gateway.label.clone()),
                    state: gateway_state(gateway),
                    share: per_cent(shares.get(&slot).copied().unwrap_or(0)),
                    flows: used.get(&(index, slot)).copied().unwrap_or(0),
                })
            })
            .collect();
        let (tx, rx) = (count(index, Direction::Tx)?, count(index, Direction::Rx)?);
        let unused = gateways.is_empty() && tx.packets == 0;
        let other_has_some = node.egresses.get(&(index ^ 1)).is_some_and(|other| other.gateways > 0);
        if unused && other_has_some {
            // The family is not that of the cluster.
            continue;
        }
        items.push(EgressItem {
            egress: label,
            family: if v6 { "ipv6" } else { "ipv4" },
            session_affinity: if value.flags & EGRESS_CLIENT_AFFINITY != 0 { "ClientIP" } else { "None" },
            affinity_seconds: if value.flags & EGRESS_CLIENT_AFFINITY != 0 {
                value.affinity_seconds()
            } else {
                0
            },
            originating_only: value.flags & EGRESS_ORIGINATING_ONLY != 0,
            source_port_auto: value.flags & EGRESS_SOURCE_PORT_AUTO != 0,
            deleted: node.is_deleted(index),
            ready_gateways: value.gateways,
            gateways,
            tx_packets: tx.packets,
            tx_bytes: tx.bytes,
            rx_packets: rx.packets,
            rx_bytes: rx.bytes,
        });
    }
    items.sort_by(|a, b| (&a.egress, a.family).cmp(&(&b.egress, b.family)));
    if format == Format::Json {
        output::json_list("EgressList", &items)?;
        return Ok(Outcome::Done);
    }
    let wide = format == Format::Wide;
    let mut rows = Vec::new();
    for item in &items {
        let mut head = vec![item.egress.clone(), item.family.into(), item.session_affinity.into()];
        if wide {
            let counts = [item.tx_packets, item.tx_bytes, item.rx_packets, item.rx_bytes];
            head.push(if item.originating_only { "yes" } else { "no" }.into());
            head.extend(counts.iter().map(ToString::to_string));
        }
        if item.gateways.is_empty() {
            rows.push(
                [head.clone(), vec!["none".into(), "not ready".into(), String::new(), String::new()]]
                    .concat(),
            );
        }
        for gateway in &item.gateways {
            let name = match &gateway.pod {
                Some(pod) => format!("{} ({pod})", gateway.address),
                None => gateway.address.to_string(),
            };
            let cells =
                vec![name, gateway.state.into(), format!("{:.1}%", gateway.share), gateway.flows.to_string()];
            rows.push([head.clone(), cells].concat());
        }
    }
    let headers: &[&str] = if wide {
        &[
            "EGRESS",
            "FAMILY",
            "AFFINITY",
            "ORIGINATING-ONLY",
            "TX-PKTS",
            "TX-BYTES",
            "RX-PKTS",
            "RX-BYTES",
            "GATEWAY",
            "STATE",
            "SHARE",
            "FLOWS",
        ]
    } else {
        &["EGRESS", "FAMILY", "AFFINITY", "GATEWAY", "STATE", "SHARE", "FLOWS"]
    };
    output::table(headers, &rows, "No pod of this node uses an Egress.")?;
    Ok(Outcome::Done)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_add_up() {
        let mut table = [7u16; MAGLEV_SLOTS];
        table[..100].fill(3);
        let egress = EgressValue { flags: 0, gateways: 2, table };
        let shares = shares(&egress);
        assert_eq!(shares.values().sum::<usize>(), MAGLEV_SLOTS);
        assert_eq!(shares.get(&3), Some(&100));
        assert!((per_cent(MAGLEV_SLOTS) - 100.0).abs() < f64::EPSILON);
    }

    #[test]
    fn no_gateway_has_a_share_where_none_is_ready() {
        assert!(shares(&EgressValue { flags: 0, gateways: 0, table: [0; MAGLEV_SLOTS] }).is_empty());
    }
}
