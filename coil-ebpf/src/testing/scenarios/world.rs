//! The little world of the scenarios: a pod, its gateway, a remote, and short ways to say what is in
//! the maps.

use std::{collections::BTreeMap, net::IpAddr};

use coil_common::{
    config::{Config, FRAGMENT_TIMEOUT},
    keys::{ClientKey4, ClientKey6, FlowKey4, FlowKey6, PeerKey4, PeerKey6, PolicyKey4, PolicyKey6},
    names,
    stats::{Direction, DropReason, GatewayStat, IcmpStat, egress_stat},
    usage::excluded_port,
    values::{
        ClientValue, Counter, EGRESS_BLOCK, EGRESS_DIRECT, EgressValue, FRAGMENT_SECONDS, FlowValue,
        FragmentValue, GATEWAY_READY, GatewayValue, MAGLEV_SLOTS, NatValue4, NatValue6, PodValue,
        PolicyValue, STATE_CONFIRMED,
    },
};

use crate::testing::{
    build::{self, FOU, Ip, ethernet},
    entries::{Entry, Key, Value},
    memory::Memory,
    scenario::{Action, Expect, Hook, IFINDEX, Kernel, Scenario},
};

/// Policy set of the pod.
pub(super) const SET: u32 = 7;
/// Seconds since boot.
pub(super) const NOW: u32 = 1000;
/// Generation of the gateway.
pub(super) const GENERATION: u32 = 3;
/// Largest packet in this world.
pub(super) const MTU: u16 = 1500;
/// A source and a destination port.
pub(super) const PORTS: (u16, u16) = (40000, 443);
/// The same seen from the other side.
pub(super) const PORTS_BACK: (u16, u16) = (443, 40000);
/// TCP flags.
pub(super) const SYN: u8 = 2;
/// TCP flags.
pub(super) const ACK: u8 = 16;
/// TCP flags.
pub(super) const SYN_ACK: u8 = 18;
/// An MSS option with 1460.
pub(super) const MSS_1460: [u8; 4] = [2, 4, 0x05, 0xb4];

/// Addresses of one family.
pub(super) struct World {
    /// `v4` or `v6`.
    pub(super) name: &'static str,
    /// The pod.
    pub(super) pod: IpAddr,
    /// Its gateway.
    pub(super) gateway: IpAddr,
    /// Another gateway, draining.
    pub(super) old_gateway: IpAddr,
    /// A host outside.
    pub(super) remote: IpAddr,
    /// A destination that leaves directly.
    pub(super) inside: IpAddr,
    /// A destination that is blocked.
    pub(super) blocked: IpAddr,
    /// Nobody in particular.
    pub(super) stranger: IpAddr,
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap_or(IpAddr::from([0, 0, 0, 0]))
}

/// A key of a flow in the order in which packets have its parts.
pub(super) type Tuple = (IpAddr, IpAddr, (u16, u16), u8);

impl World {
    pub(super) fn v4() -> Self {
        Self {
            name: "v4",
            pod: ip("10.1.0.2"),
            gateway: ip("10.2.0.2"),
            old_gateway: ip("10.2.0.9"),
            remote: ip("192.0.2.2"),
            inside: ip("10.9.0.9"),
            blocked: ip("198.51.100.1"),
            stranger: ip("10.3.0.3"),
        }
    }

    pub(super) fn v6() -> Self {
        Self {
            name: "v6",
            pod: ip("fd01::2"),
            gateway: ip("fd02::2"),
            old_gateway: ip("fd02::9"),
            remote: ip("2001:db8::2"),
            inside: ip("fd09::9"),
            blocked: ip("2001:db8:b::1"),
            stranger: ip("fd03::3"),
        }
    }

    pub(super) const fn is_v4(&self) -> bool {
        self.pod.is_ipv4()
    }

    fn pick<T>(&self, v4: T, v6: T) -> T {
        if self.is_v4() { v4 } else { v6 }
    }

    /// Bytes that the tunnel adds.
    pub(super) fn overhead(&self) -> u16 {
        self.pick(28, 48)
    }

    /// Length of the IP header.
    pub(super) fn header(&self) -> usize {
        self.pick(20, 40)
    }

    /// Protocol number of ICMP.
    pub(super) fn icmp(&self) -> u8 {
        self.pick(1, 58)
    }

    /// The largest MSS that fits.
    pub(super) fn mss(&self) -> u16 {
        MTU - self.overhead() - self.pick(40, 60)
    }

    /// An MSS option with it.
    pub(super) fn mss_option(&self) -> [u8; 4] {
        let [a, b] = self.mss().to_be_bytes();
        [2, 4, a, b]
    }

    pub(super) fn octets4(addr: IpAddr) -> [u8; 4] {
        match addr {
            IpAddr::V4(addr) => addr.octets(),
            IpAddr::V6(_) => [0; 4],
        }
    }

    pub(super) fn octets6(addr: IpAddr) -> [u8; 16] {
        match addr {
            IpAddr::V6(addr) => addr.octets(),
            IpAddr::V4(_) => [0; 16],
        }
    }

    /// Configuration of a node.
    pub(super) fn node(&self) -> Config {
        let mut config = Config { fou_port: FOU.to_be_bytes(), seed: 42, ..Config::default() };
        config.timeouts[FRAGMENT_TIMEOUT] = FRAGMENT_SECONDS;
        config
    }

    /// Configuration of the gateway.
    pub(super) fn egress_pod(&self) -> Config {
        Config {
            ipv4: Self::octets4(self.gateway),
            ipv6: Self::octets6(self.gateway),
            nat_port_first: 1024,
            nat_port_last: 65535,
            nat_id_last: 65535,
            mtu: u32::from(MTU),
            ..self.node()
        }
    }

    pub(super) fn pod_value(&self) -> PodValue {
        PodValue {
            ipv4: Self::octets4(self.pod),
            ipv6: Self::octets6(self.pod),
            set: SET,
            flags: 0,
            mtu: u32::from(MTU),
        }
    }

    pub(super) fn pod_entry(value: PodValue) -> Entry {
        Entry::new(names::MAP_PODS, &IFINDEX, &value)
    }

    /// Index of the egress.
    pub(super) fn egress(&self) -> u32 {
        self.pick(2, 3)
    }

    /// Index of the gateway.
    pub(super) fn gateway_index(&self) -> u32 {
        self.pick(4, 5)
    }

    /// Index of the draining gateway.
    pub(super) fn old_gateway_index(&self) -> u32 {
        self.pick(6, 7)
    }

    pub(super) fn gateway_entry(&self, index: u32, addr: IpAddr, generation: u32, state: u32) -> Entry {
        let mut bytes = Self::octets6(addr);
        if self.is_v4() {
            bytes[..4].copy_from_slice(&Self::octets4(addr));
        }
        let value = GatewayValue { addr: bytes, generation, state };
        Entry::new(names::MAP_GATEWAYS, &index, &value)
    }

    pub(super) fn egress_entry(&self, flags: u32, gateways: u16) -> Entry {
        let index = self.gateway_index();
        let table = [u16::try_from(index).unwrap_or(0); MAGLEV_SLOTS];
        let value = EgressValue { flags, gateways, table };
        Entry::new(names::MAP_EGRESSES, &self.egress(), &value)
    }

    pub(super) fn policy_entry(&self, prefix: u32, dst: IpAddr, egress: u32) -> Entry {
        let set = SET.to_be_bytes();
        let (map, key) = if self.is_v4() {
            let key = PolicyKey4 { set, dst: Self::octets4(dst) };
            (names::MAP_POLICY_V4, Key::prefix(32 + prefix, &key))
        } else {
            let key = PolicyKey6 { set, dst: Self::octets6(dst) };
            (names::MAP_POLICY_V6, Key::prefix(32 + prefix, &key))
        };
        Entry { map, key, value: Value::of(&PolicyValue { egress }) }
    }

    pub(super) fn peer_entry(&self, addr: IpAddr) -> Entry {
        if self.is_v4() {
            let key = PeerKey4 { set: SET, addr: Self::octets4(addr) };
            Entry::new(names::MAP_PEERS_V4, &key, &self.gateway_index())
        } else {
            let key = PeerKey6 { set: SET, addr: Self::octets6(addr) };
            Entry::new(names::MAP_PEERS_V6, &key, &self.gateway_index())
        }
    }

    pub(super) fn client_entry(&self, addr: IpAddr) -> Entry {
        let value = ClientValue::default();
        if self.is_v4() {
            let key = ClientKey4 { addr: Self::octets4(addr) };
            Entry::new(names::MAP_CLIENTS_V4, &key, &value)
        } else {
            let key = ClientKey6 { addr: Self::octets6(addr) };
            Entry::new(names::MAP_CLIENTS_V6, &key, &value)
        }
    }

    /// The maps of a node whose pod uses the egress for everything but some destinations.
    pub(super) fn node_entries(&self) -> Vec<Entry> {
        self.node_entries_with(self.pod_value())
    }

    /// The same with another pod.
    pub(super) fn node_entries_with(&self, pod: PodValue) -> Vec<Entry> {
        let any = self.pick(ip("0.0.0.0"), ip("::"));
        let inside = self.pick((8, ip("10.0.0.0")), (8, ip("fd00::")));
        let blocked = self.pick((24, ip("198.51.100.0")), (48, ip("2001:db8:b::")));
        vec![
            Self::pod_entry(pod),
            self.policy_entry(0, any, self.egress()),
            self.policy_entry(inside.0, inside.1, EGRESS_DIRECT),
            self.policy_entry(blocked.0, blocked.1, EGRESS_BLOCK),
            self.egress_entry(0, 1),
            self.gateway_entry(self.gateway_index(), self.gateway, GENERATION, GATEWAY_READY),
            self.peer_entry(self.gateway),
        ]
    }

    /// The maps of a gateway with one client.
    pub(super) fn gateway_entries(&self) -> Vec<Entry> {
        let mut words = BTreeMap::<u32, u64>::new();
        for port in [FOU, 8080, 8081] {
            for udp in [false, true] {
                let (word, bit) = excluded_port(udp, port);
                *words.entry(word).or_default() |= bit;
            }
        }
        let ports = words.iter().map(|(word, bits)| Entry::new(names::MAP_EXCLUDED_PORTS, word, bits));
        ports.chain([self.client_entry(self.pod)]).collect()
    }

    fn flow_key(&self, (src, dst, ports, protocol): Tuple) -> Key {
        let (src_port, dst_port) = (ports.0.to_be_bytes(), ports.1.to_be_bytes());
        if self.is_v4() {
            let (src, dst) = (Self::octets4(src), Self::octets4(dst));
            Key::of(&FlowKey4 { src, dst, src_port, dst_port, protocol, pad: [0; 3] })
        } else {
            let (src, dst) = (Self::octets6(src), Self::octets6(dst));
            Key::of(&FlowKey6 { src, dst, src_port, dst_port, protocol, pad: [0; 3] })
        }
    }

    /// The decision of a flow through the gateway.
    pub(super) fn flow_value(&self) -> FlowValue {
        FlowValue {
            set: SET,
            egress: self.egress(),
            gateway: self.gateway_index(),
            gateway_generation: GENERATION,
            pod: IFINDEX as u16,
            ..FlowValue::default()
        }
    }

    pub(super) fn flow_entry(&self, tuple: Tuple, value: FlowValue) -> Entry {
        let map = self.pick(names::MAP_FLOWS_V4, names::MAP_FLOWS_V6);
        Entry { map, key: self.flow_key(tuple), value: Value::of(&value) }
    }

    fn nat_entry(&self, map: &'static str, tuple: Tuple, to: (IpAddr, u16), nat: Nat) -> Entry {
        let port = to.1.to_be_bytes();
        let Nat { state, packets, bytes } = nat;
        let value = if self.is_v4() {
            let addr = Self::octets4(to.0);
            Value::of(&NatValue4 { addr, port, state, packets, bytes, ..NatValue4::default() })
        } else {
            let addr = Self::octets6(to.0);
            Value::of(&NatValue6 { addr, port, state, packets, bytes, ..NatValue6::default() })
        };
        Entry { map, key: self.flow_key(tuple), value }
    }

    /// The forward half of the translation of a flow from the pod to the remote.
    pub(super) fn forward(&self, ports: (u16, u16), protocol: u8, port: u16, nat: Nat) -> Entry {
        let map = self.pick(names::MAP_NAT_FORWARD_V4, names::MAP_NAT_FORWARD_V6);
        self.nat_entry(map, (self.pod, self.remote, ports, protocol), (self.gateway, port), nat)
    }

    /// The reverse half.
    pub(super) fn reverse(&self, ports: (u16, u16), protocol: u8, port: u16, nat: Nat) -> Entry {
        self.reverse_of(self.pod, ports, protocol, port, nat)
    }

    /// The reverse half of a flow of some client.
    pub(super) fn reverse_of(
        &self,
        client: IpAddr,
        ports: (u16, u16),
        protocol: u8,
        port: u16,
        nat: Nat,
    ) -> Entry {
        let map = self.pick(names::MAP_NAT_REVERSE_V4, names::MAP_NAT_REVERSE_V6);
        let tuple = (self.remote, self.gateway, (ports.1, port), protocol);
        self.nat_entry(map, tuple, (client, ports.0), nat)
    }

    /// A datagram of which the first fragment was seen; `id` is that of [`Ip`].
    pub(super) fn datagram(
        &self,
        src: IpAddr,
        dst: IpAddr,
        ports: (u16, u16),
        protocol: u8,
        flags: u8,
    ) -> Entry {
        let value = FragmentValue {
            src_port: ports.0.to_be_bytes(),
            dst_port: ports.1.to_be_bytes(),
            protocol,
            flags,
            pad: [0; 2],
            seen: NOW,
        };
        let (map, id, number) =
            self.pick((names::MAP_FRAGMENTS_V4, 0x1234, protocol), (names::MAP_FRAGMENTS_V6, 9, 44));
        Entry { map, key: self.flow_key((src, dst, (0, id), number)), value: Value::of(&value) }
    }

    /// The map of reverse halves.
    pub(super) fn reverse_map(&self) -> &'static str {
        self.pick(names::MAP_NAT_REVERSE_V4, names::MAP_NAT_REVERSE_V6)
    }

    /// The map of forward halves.
    pub(super) fn forward_map(&self) -> &'static str {
        self.pick(names::MAP_NAT_FORWARD_V4, names::MAP_NAT_FORWARD_V6)
    }

    /// The map of flows.
    pub(super) fn flow_map(&self) -> &'static str {
        self.pick(names::MAP_FLOWS_V4, names::MAP_FLOWS_V6)
    }

    /// From the pod to the remote.
    pub(super) fn out(&self) -> Ip {
        Ip::new(self.pod, self.remote)
    }

    /// From the remote to the pod.
    pub(super) fn back(&self) -> Ip {
        Ip::new(self.remote, self.pod)
    }

    /// From the gateway to the remote, one hop later.
    pub(super) fn masqueraded(&self) -> Ip {
        Ip::new(self.gateway, self.remote).ttl(63)
    }

    /// From the remote to the gateway.
    pub(super) fn reply(&self) -> Ip {
        Ip::new(self.remote, self.gateway)
    }

    /// `inner` from the pod, in the tunnel to the gateway.
    pub(super) fn to_gateway(&self, inner: &[u8]) -> Vec<u8> {
        build::tunnel(self.pod, self.gateway, inner)
    }

    /// `inner` from the gateway, in the tunnel to the pod.
    pub(super) fn to_client(&self, inner: &[u8]) -> Vec<u8> {
        build::tunnel(self.gateway, self.pod, inner)
    }

    /// An ICMP error that the datapath makes.
    pub(super) fn error(&self, from: IpAddr, to: IpAddr, kind: [u8; 2], mtu: u16, about: &[u8]) -> Vec<u8> {
        let mut ip = Ip::new(from, to).tos(0xc0);
        ip.id = 0;
        ip.df = false;
        let [a, b] = mtu.to_be_bytes();
        let most = self.pick(128, 256).min(about.len());
        ip.icmp(kind[0], kind[1], [0, 0, a, b], &about[..most])
    }

    /// Type and code of "communication administratively prohibited".
    pub(super) fn prohibited(&self) -> [u8; 2] {
        self.pick([3, 13], [1, 1])
    }

    /// A scenario in which nothing is known, nothing happens and the packet passes.
    pub(super) fn scenario(&self, hook: Hook, name: &str, packet: &[u8]) -> Scenario {
        let hook_name = hook.program();
        let bytes = if packet.is_empty() { Vec::new() } else { ethernet(packet) };
        Scenario {
            name: format!("{hook_name} {}: {name}", self.name),
            hook,
            config: match hook {
                Hook::Gateway => self.egress_pod(),
                Hook::FromPod | Hook::ToPod => self.node(),
            },
            entries: match hook {
                Hook::Gateway => self.gateway_entries(),
                Hook::FromPod | Hook::ToPod => self.node_entries(),
            },
            limit: None,
            packet: Memory::new(bytes),
            kernel: Kernel::Takes,
            near: false,
            expect: Expect {
                action: Action::Pass,
                packet: None,
                drop: None,
                counters: BTreeMap::new(),
                entries: Vec::new(),
            },
        }
    }
}

/// State and counters of a translation.
#[derive(Clone, Copy, Default)]
pub(super) struct Nat {
    pub(super) state: u32,
    pub(super) packets: u64,
    pub(super) bytes: u64,
}

impl Nat {
    /// After one packet.
    pub(super) fn one(state: u32, ip: &[u8]) -> Self {
        Self { state, packets: 1, bytes: ip.len() as u64 }
    }

    /// Before any packet.
    pub(super) const fn fresh(state: u32) -> Self {
        Self { state, packets: 0, bytes: 0 }
    }
}

impl Scenario {
    /// The packet passes unchanged.
    pub(super) fn passes(mut self) -> Self {
        self.expect.packet = Some(crate::testing::interpret::canonical(&self.packet.bytes));
        self
    }

    /// The packet is dropped for this reason.
    pub(super) fn drops(mut self, reason: DropReason) -> Self {
        self.expect.action = Action::Drop;
        self.expect.drop = Some(reason);
        self
    }

    /// The packet goes on as this IP packet.
    pub(super) fn becomes(mut self, ip: &[u8]) -> Self {
        self.expect.packet = Some(crate::testing::interpret::canonical(&ethernet(ip)));
        self
    }

    /// The packet goes back as this IP packet.
    pub(super) fn returns(mut self, ip: &[u8]) -> Self {
        self.expect.action = Action::Back;
        self.expect.packet = Some(crate::testing::interpret::canonical(&build::ethernet_back(ip)));
        self
    }

    /// The packet is dropped for this reason, and this IP packet goes back instead.
    pub(super) fn answers(mut self, reason: DropReason, ip: &[u8]) -> Self {
        self.expect.drop = Some(reason);
        self.returns(ip)
    }

    /// The gateway refuses the client's packet `inner`, and says so.
    pub(super) fn prohibits(self, w: &World, reason: DropReason, inner: &[u8]) -> Self {
        let error = w.error(w.gateway, w.pod, w.prohibited(), 0, inner);
        self.answers(reason, &w.to_client(&error))
    }

    /// What becomes of an ICMP error counts.
    pub(super) fn counts_icmp(mut self, stat: IcmpStat) -> Self {
        let counter = Counter { packets: 1, bytes: 0 };
        self.expect.counters.insert((names::MAP_ICMP_STATS, stat.index()), counter);
        self
    }

    /// With other entries.
    pub(super) fn with(mut self, entries: Vec<Entry>) -> Self {
        self.entries = entries;
        self
    }

    /// With further entries; a later one for the same key wins.
    pub(super) fn and(mut self, entries: Vec<Entry>) -> Self {
        for entry in entries {
            self.entries.retain(|old| (old.map, &old.key) != (entry.map, &entry.key));
            self.entries.push(entry);
        }
        self
    }

    /// With a full map.
    pub(super) fn full(mut self, map: &'static str, entries: usize) -> Self {
        self.limit = Some((map, entries));
        self
    }

    /// The kernel cannot be shown it.
    pub(super) fn library_only(mut self, reason: &'static str) -> Self {
        self.kernel = Kernel::Refuses(reason);
        self
    }

    /// These entries are left.
    pub(super) fn leaves(mut self, entries: Vec<Entry>) -> Self {
        self.expect.entries = entries;
        self
    }

    /// One packet of this length counts for the egress.
    pub(super) fn counts_egress(mut self, egress: u32, direction: Direction, ip: &[u8]) -> Self {
        let counter = Counter { packets: 1, bytes: ip.len() as u64 };
        self.expect.counters.insert((names::MAP_EGRESS_STATS, egress_stat(egress, direction)), counter);
        self
    }

    /// This counts in the gateway.
    pub(super) fn counts(mut self, stat: GatewayStat, packets: u64, bytes: usize) -> Self {
        let counter = Counter { packets, bytes: bytes as u64 };
        self.expect.counters.insert((names::MAP_GATEWAY_STATS, stat.index()), counter);
        self
    }
}

/// A flow value after one packet from the pod.
pub(super) fn sent(value: FlowValue, ip: &[u8], state: u32) -> FlowValue {
    FlowValue {
        tx_packets: value.tx_packets + 1,
        tx_bytes: value.tx_bytes + ip.len() as u64,
        state: value.state | state,
        ..value
    }
}

/// The state of a flow that goes on.
pub(super) const CONFIRMED: u32 = STATE_CONFIRMED;
