//! `conntrack`: flows of this node's pods, and translations of egress pods on this node, both directions
//! of each together.

use std::collections::BTreeMap;
use std::net::IpAddr;

use coil_common::keys::{FlowKey4, FlowKey6};
use coil_common::names::{
    MAP_FLOWS_V4, MAP_FLOWS_V6, MAP_NAT_FORWARD_V4, MAP_NAT_FORWARD_V6, MAP_NAT_REVERSE_V4,
    MAP_NAT_REVERSE_V6,
};
use coil_common::values::{FlowValue, NatValue4, NatValue6};
use serde::Serialize;

use super::args::{Conntrack, Format, Sort};
use super::node::{Gateway, Node, read};
use super::state::{protocol, state};
use super::{InspectError, Outcome, output};
use crate::datapath::seconds_since_boot;
use crate::datapath::timeouts::Timeouts;

/// A flow as one direction sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Tuple {
    pub(crate) src: IpAddr,
    pub(crate) dst: IpAddr,
    pub(crate) src_port: u16,
    pub(crate) dst_port: u16,
    pub(crate) protocol: u8,
}

impl Tuple {
    pub(crate) fn v4(key: &FlowKey4) -> Self {
        Self {
            src: key.src.into(),
            dst: key.dst.into(),
            src_port: u16::from_be_bytes(key.src_port),
            dst_port: u16::from_be_bytes(key.dst_port),
            protocol: key.protocol,
        }
    }

    pub(crate) fn v6(key: &FlowKey6) -> Self {
        Self {
            src: key.src.into(),
            dst: key.dst.into(),
            src_port: u16::from_be_bytes(key.src_port),
            dst_port: u16::from_be_bytes(key.dst_port),
            protocol: key.protocol,
        }
    }

    /// An end with its port; ICMP has an identifier at the end that asked, and most protocols have neither.
    pub(crate) fn end(&self, address: IpAddr, port: u16) -> String {
        let icmp = matches!(self.protocol, 1 | 58);
        let ports = matches!(self.protocol, 6 | 17);
        match (address, icmp) {
            _ if port == 0 && !ports => address.to_string(),
            (_, true) => format!("{address} id {port}"),
            (IpAddr::V4(_), false) => format!("{address}:{port}"),
            (IpAddr::V6(_), false) => format!("[{address}]:{port}"),
        }
    }

    pub(crate) fn source(&self) -> String {
        self.end(self.src, self.src_port)
    }

    pub(crate) fn destination(&self) -> String {
        self.end(self.dst, self.dst_port)
    }
}

/// Figures that both kinds of entries have.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
struct Figures {
    tx_packets: u64,
    tx_bytes: u64,
    rx_packets: u64,
    rx_bytes: u64,
    /// Seconds since the first packet.
    age: u32,
    /// Seconds since the last packet.
    idle: u32,
    /// Seconds until it is removed if no packet comes; 0: due.
    expires_in: u32,
}

/// A flow of a pod of this node.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Flow {
    pod: Option<String>,
    protocol: String,
    source: String,
    destination: String,
    egress: String,
    gateway: Option<IpAddr>,
    /// `ready`, `draining`, or `gone`: the next packet chooses anew.
    gateway_state: &'static str,
    state: &'static str,
    #[serde(flatten)]
    figures: Figures,
}

/// A translation of an egress pod.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Translation {
    gateway: String,
    client: Option<String>,
    protocol: String,
    source: String,
    translated: String,
    destination: String,
    state: &'static str,
    /// The half that is missing, `forward` or `reverse`; it is rebuilt by the next packet.
    #[serde(skip_serializing_if = "Option::is_none")]
    missing: Option<&'static str>,
    #[serde(flatten)]
    figures: Figures,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct List<'a> {
    api_version: &'static str,
    kind: &'static str,
    flows: &'a [Flow],
    translations: &'a [Translation],
}

fn age(now: u32, then: u32) -> u32 {
    now.saturating_sub(then)
}

/// All flows of the node, by what the pod sends.
pub(crate) fn flows(node: &Node) -> Result<Vec<(Tuple, FlowValue)>, InspectError> {
    let v4 = read::<FlowKey4, FlowValue>(&node.folder, MAP_FLOWS_V4)?;
    let v6 = read::<FlowKey6, FlowValue>(&node.folder, MAP_FLOWS_V6)?;
    let v4 = v4.into_iter().map(|(key, value)| (Tuple::v4(&key), value));
    Ok(v4.chain(v6.into_iter().map(|(key, value)| (Tuple::v6(&key), value))).collect())
}

/// One direction of a translation.
#[derive(Clone, Copy, Debug)]
struct Half {
    addr: IpAddr,
    port: u16,
    state: u32,
    last_seen: u32,
    created: u32,
    packets: u64,
    bytes: u64,
}

macro_rules! half {
    ($value:expr) => {
        Half {
            addr: $value.addr.into(),
            port: u16::from_be_bytes($value.port),
            state: $value.state,
            last_seen: $value.last_seen,
            created: $value.created,
            packets: $value.packets,
            bytes: $value.bytes,
        }
    };
}

fn halves(gateway: &Gateway, v4: &str, v6: &str) -> Result<BTreeMap<Tuple, Half>, InspectError> {
    let folder = &gateway.folder;
    let v4 = read::<FlowKey4, NatValue4>(folder, v4)?;
    let v6 = read::<FlowKey6, NatValue6>(folder, v6)?;
    let v4 = v4.into_iter().map(|(key, value)| (Tuple::v4(&key), half!(value)));
    Ok(v4.chain(v6.into_iter().map(|(key, value)| (Tuple::v6(&key), half!(value)))).collect())
}

/// A translation: by what the client sends, the address that the world sees, and both halves.
#[derive(Clone, Copy, Debug)]
struct Pair {
    tuple: Tuple,
    translated: (IpAddr, u16),
    forward: Option<Half>,
    reverse: Option<Half>,
}

/// Joins halves; each is in exactly one pair.
fn pairs(forward: BTreeMap<Tuple, Half>, mut reverse: BTreeMap<Tuple, Half>) -> Vec<Pair> {
    let mut all = Vec::with_capacity(forward.len());
    for (tuple, half) in forward {
        let key = Tuple {
            src: tuple.dst,
            dst: half.addr,
            src_port: tuple.dst_port,
            dst_port: half.port,
            protocol: tuple.protocol,
        };
        let own = |other: &Half| other.addr == tuple.src && other.port == tuple.src_port;
        let back = if reverse.get(&key).is_some_and(own) { reverse.remove(&key) } else { None };
        all.push(Pair { tuple, translated: (half.addr, half.port), forward: Some(half), reverse: back });
    }
    all.extend(reverse.into_iter().map(|(key, half)| Pair {
        tuple: Tuple {
            src: half.addr,
            dst: key.src,
            src_port: half.port,
            dst_port: key.src_port,
            protocol: key.protocol,
        },
        translated: (key.dst, key.dst_port),
        forward: None,
        reverse: Some(half),
    }));
    all
}

impl Pair {
    fn render(&self, node: &Node, gateway: &Gateway, now: u32) -> Translation {
        let Self { tuple, translated, forward, reverse } = *self;
        let both = [forward, reverse];
        let known = || both.iter().flatten();
        let bits = known().fold(0, |bits, half| bits | half.state);
        let last = known().map(|half| half.last_seen).max().unwrap_or(0);
        let created = known().map(|half| half.created).min().unwrap_or(0);
        let count = |half: Option<Half>| half.map_or((0, 0), |half| (half.packets, half.bytes));
        let ((tx_packets, tx_bytes), (rx_packets, rx_bytes)) = (count(forward), count(reverse));
        let idle = age(now, last);
        Translation {
            gateway: gateway.label.clone(),
            client: node.pod_with(tuple.src).map(super::node::Pod::label),
            protocol: protocol(tuple.protocol),
            source: tuple.source(),
            translated: tuple.end(translated.0, translated.1),
            destination: tuple.destination(),
            state: state(tuple.protocol, bits),
            missing: match (forward, reverse) {
                (None, _) => Some("forward"),
                (_, None) => Some("reverse"),
                _ => None,
            },
            figures: Figures {
                tx_packets,
                tx_bytes,
                rx_packets,
                rx_bytes,
                age: age(now, created),
                idle,
                expires_in: gateway
                    .config
                    .map_or(Timeouts::default(), |config| Timeouts::configured(&config))
                    .of(tuple.protocol, tuple.dst_port, bits, false)
                    .saturating_sub(idle),
            },
        }
    }
}

impl Conntrack {
    /// What is said of the ends of a flow is true of this one.
    fn wants(&self, tuple: &Tuple, translated: Option<IpAddr>, pods: Option<&[IpAddr]>) -> bool {
        let ends = [Some(tuple.src), Some(tuple.dst), translated];
        self.address.is_none_or(|address| ends.contains(&Some(address)))
            && pods.is_none_or(|pods| pods.contains(&tuple.src))
            && self.destination.is_none_or(|destination| destination.contains(tuple.dst, tuple.dst_port))
            && self.protocol.is_none_or(|protocol| protocol.is(tuple.protocol))
    }

    fn order<T>(&self, all: &mut Vec<T>, figures: impl Fn(&T) -> Figures) {
        match self.sort {
            None => {}
            Some(Sort::Bytes) => all.sort_by_key(|item| {
                let f = figures(item);
                std::cmp::Reverse(f.tx_bytes.saturating_add(f.rx_bytes))
            }),
            Some(Sort::Packets) => all.sort_by_key(|item| {
                let f = figures(item);
                std::cmp::Reverse(f.tx_packets.saturating_add(f.rx_packets))
            }),
            Some(Sort::Age) => all.sort_by_key(|item| figures(item).age),
        }
        if let Some(limit) = self.limit {
            all.truncate(limit);
        }
    }
}

/// Runs the command.
pub(crate) fn run(node: &Node, format: Format, options: &Conntrack) -> Result<Outcome, InspectError> {
    let now = seconds_since_boot()
        .map_err(|_| InspectError::System { what: "the clock", source: std::io::ErrorKind::Other.into() })?;
    let pods: Option<Vec<IpAddr>> = match &options.pod {
        None => None,
        // A client on another node has translations here, but is no pod of this node.
        Some(super::args::PodRef::Address(address)) => Some(vec![*address]),
        Some(wanted) => Some(node.pod(wanted)?.addresses().collect()),
    };
    let egress = options.egress.as_ref().map(ToString::to_string);
    let mut listed = Vec::new();
    if options.gateway.is_none() {
        for (tuple, value) in flows(node)? {
            let label = node.egress_label(value.egress);
            if !options.wants(&tuple, None, pods.as_deref()) || egress.as_ref().is_some_and(|e| *e != label) {
                continue;
            }
            listed.push((tuple, flow(node, &tuple, &value, label, now)));
        }
    }
    listed.sort_by_key(|(tuple, _)| *tuple);
    let mut flows: Vec<Flow> = listed.into_iter().map(|(_, flow)| flow).collect();
    options.order(&mut flows, |flow| flow.figures);

    let mut translations = Vec::new();
    // Which Egress a gateway serves is known only where its addresses are gateways of the Egress.
    let serving: Option<Vec<IpAddr>> = egress.as_ref().map(|egress| super::egress::addresses(node, egress));
    if !options.node_only {
        for gateway in node.gateways_like(options.gateway.as_deref())? {
            let own = gateway.addresses();
            if serving.as_ref().is_some_and(|serving| !own.iter().any(|address| serving.contains(address))) {
                continue;
            }
            let forward = halves(gateway, MAP_NAT_FORWARD_V4, MAP_NAT_FORWARD_V6)?;
            let reverse = halves(gateway, MAP_NAT_REVERSE_V4, MAP_NAT_REVERSE_V6)?;
            for pair in pairs(forward, reverse) {
                if options.wants(&pair.tuple, Some(pair.translated.0), pods.as_deref()) {
                    translations.push(pair.render(node, gateway, now));
                }
            }
        }
    }
    options.order(&mut translations, |translation| translation.figures);
    print(format, &flows, &translations, options)?;
    Ok(Outcome::Done)
}

fn flow(node: &Node, tuple: &Tuple, value: &FlowValue, egress: String, now: u32) -> Flow {
    let gateway = node.gateways.get(&value.gateway);
    let current = gateway.filter(|gateway| gateway.generation == value.gateway_generation);
    let idle = age(now, value.last_seen);
    let kept = Timeouts::configured(&node.config).of_node(tuple.protocol, tuple.dst_port, value.state, false);
    Flow {
        pod: node.pod_with(tuple.src).map(super::node::Pod::label),
        protocol: protocol(tuple.protocol),
        source: tuple.source(),
        destination: tuple.destination(),
        egress,
        gateway: current.map(|gateway| super::node::gateway_address(gateway, tuple.src.is_ipv6())),
        gateway_state: current.map_or("gone", super::node::gateway_state),
        state: state(tuple.protocol, value.state),
        figures: Figures {
            tx_packets: value.tx_packets,
            tx_bytes: value.tx_bytes,
            rx_packets: value.rx_packets,
            rx_bytes: value.rx_bytes,
            age: age(now, value.created),
            idle,
            expires_in: kept.saturating_sub(idle),
        },
    }
}

fn figures(figures: &Figures, wide: bool) -> Vec<String> {
    let size = |count: u64| if wide { count.to_string() } else { output::bytes(count) };
    let mut cells = vec![
        size(figures.tx_packets),
        size(figures.tx_bytes),
        size(figures.rx_packets),
        size(figures.rx_bytes),
        output::seconds(figures.age),
        output::seconds(figures.idle),
    ];
    if wide {
        cells.push(output::seconds(figures.expires_in));
    }
    cells
}

fn print(
    format: Format,
    flows: &[Flow],
    translations: &[Translation],
    options: &Conntrack,
) -> Result<(), InspectError> {
    if format == Format::Json {
        return output::json(&List {
            api_version: output::API_VERSION,
            kind: "ConntrackList",
            flows,
            translations,
        });
    }
    let wide = format == Format::Wide;
    let tail: &[&str] = if wide {
        &["TX-PKTS", "TX-BYTES", "RX-PKTS", "RX-BYTES", "AGE", "IDLE", "EXPIRES"]
    } else {
        &["TX-PKTS", "TX-BYTES", "RX-PKTS", "RX-BYTES", "AGE", "IDLE"]
    };
    if options.gateway.is_none() {
        let rows: Vec<Vec<String>> = flows
            .iter()
            .map(|flow| {
                let gateway = flow.gateway.map_or_else(|| "gone".to_owned(), |address| address.to_string());
                let mut row = vec![
                    flow.pod.clone().unwrap_or_default(),
                    flow.protocol.clone(),
                    flow.source.clone(),
                    flow.destination.clone(),
                    flow.egress.clone(),
                    gateway,
                    flow.state.into(),
                ];
                row.extend(figures(&flow.figures, wide));
                row
            })
            .collect();
        let head = ["POD", "PROTO", "SOURCE", "DESTINATION", "EGRESS", "GATEWAY", "STATE"];
        output::table(&[&head, tail].concat(), &rows, "No flow of a pod of this node.")?;
    }
    if !options.node_only {
        if options.gateway.is_none() {
            output::line("")?;
        }
        let rows: Vec<Vec<String>> = translations
            .iter()
            .map(|entry| {
                let state = match entry.missing {
                    Some(half) => format!("{} (no {half})", entry.state),
                    None => entry.state.to_owned(),
                };
                let mut row = vec![
                    entry.gateway.clone(),
                    entry.protocol.clone(),
                    entry.source.clone(),
                    entry.translated.clone(),
                    entry.destination.clone(),
                    state,
                ];
                row.extend(figures(&entry.figures, wide));
                row
            })
            .collect();
        let head = ["EGRESS-POD", "PROTO", "CLIENT", "SEEN-AS", "DESTINATION", "STATE"];
        output::table(&[&head, tail].concat(), &rows, "No translation of an egress pod on this node.")?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;

    fn tuple(src: [u8; 4], src_port: u16, dst: [u8; 4], dst_port: u16) -> Tuple {
        Tuple { src: src.into(), dst: dst.into(), src_port, dst_port, protocol: 6 }
    }

    fn half(addr: [u8; 4], port: u16, packets: u64) -> Half {
        Half { addr: addr.into(), port, state: 0, last_seen: 0, created: 0, packets, bytes: 0 }
    }

    const CLIENT: [u8; 4] = [10, 1, 0, 2];
    const OWN: [u8; 4] = [10, 2, 0, 2];
    const WORLD: [u8; 4] = [192, 0, 2, 2];

    #[test]
    fn halves_become_pairs_each_once() {
        let forward = BTreeMap::from([
            (tuple(CLIENT, 1000, WORLD, 80), half(OWN, 2000, 1)),
            // Its port has gone to somebody else.
            (tuple(CLIENT, 1001, WORLD, 80), half(OWN, 2001, 2)),
        ]);
        let reverse = BTreeMap::from([
            (tuple(WORLD, 80, OWN, 2000), half(CLIENT, 1000, 3)),
            (tuple(WORLD, 80, OWN, 2001), half([10, 1, 0, 9], 7, 4)),
        ]);
        let pairs = pairs(forward, reverse);
        let seen: Vec<_> = pairs
            .iter()
            .map(|pair| {
                let packets = |half: Option<Half>| half.map(|half| half.packets);
                (pair.tuple.source(), pair.translated.1, packets(pair.forward), packets(pair.reverse))
            })
            .collect();
        assert_eq!(
            seen,
            [
                ("10.1.0.2:1000".to_owned(), 2000, Some(1), Some(3)),
                ("10.1.0.2:1001".to_owned(), 2001, Some(2), None),
                ("10.1.0.9:7".to_owned(), 2001, None, Some(4)),
            ]
        );
    }

    #[test]
    fn filters() {
        let flow = tuple(CLIENT, 1000, WORLD, 80);
        let wants = |options: Conntrack| options.wants(&flow, Some(OWN.into()), None);
        assert!(wants(Conntrack::default()));
        for address in [CLIENT, WORLD, OWN] {
            assert!(wants(Conntrack { address: Some(address.into()), ..Conntrack::default() }));
        }
        assert!(!wants(Conntrack { address: Some([1, 1, 1, 1].into()), ..Conntrack::default() }));
        let to = |text: &str| Conntrack { destination: Some(text.parse().unwrap()), ..Conntrack::default() };
        assert!(wants(to("192.0.2.0/24:80")) && !wants(to("192.0.2.0/24:81")) && !wants(to("10.0.0.0/8")));
        assert!(!Conntrack::default().wants(&flow, None, Some(&[WORLD.into()])));
        assert!(Conntrack::default().wants(&flow, None, Some(&[CLIENT.into()])));
    }

    #[test]
    fn order_and_limit() {
        let all = [5u64, 9, 1].map(|tx_bytes| Figures {
            tx_bytes,
            age: 10 - u32::try_from(tx_bytes).unwrap(),
            ..Figures::default()
        });
        let sorted = |sort, limit| {
            let mut list = all.to_vec();
            Conntrack { sort, limit, ..Conntrack::default() }.order(&mut list, |f| *f);
            list.iter().map(|f| f.tx_bytes).collect::<Vec<_>>()
        };
        assert_eq!(sorted(Some(Sort::Bytes), None), [9, 5, 1]);
        assert_eq!(sorted(Some(Sort::Age), None), [9, 5, 1]);
        assert_eq!(sorted(None, Some(2)), [5, 9]);
    }

    #[test]
    fn ends_have_ports_or_identifiers() {
        let mut flow = tuple(CLIENT, 7, WORLD, 0);
        flow.protocol = 1;
        assert_eq!((flow.source().as_str(), flow.destination().as_str()), ("10.1.0.2 id 7", "192.0.2.2"));
        let v6 = Tuple { src: "2001:db8::1".parse().unwrap(), ..tuple(CLIENT, 7, WORLD, 0) };
        assert_eq!(v6.source(), "[2001:db8::1]:7");
    }
}
