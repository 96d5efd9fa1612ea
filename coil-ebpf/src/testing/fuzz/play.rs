//! Plays a case: who sends what to whom, hop by hop, each checked when it happens.

use std::sync::OnceLock;

use super::{
    check::{self, Failure},
    input::{self, Bytes, Sort},
    model::Model,
    wire::{self, byte, number},
    world::{World, hosts},
};
use crate::testing::{
    build::{self, Ip, ethernet},
    memory::{Memory, Tables},
    scenario::{Action, Hook},
};

/// Steps of a case; what is left of its bytes is not read.
const MOST_STEPS: usize = 24;
/// Packets of each kind that are remembered.
const REMEMBERED: usize = 8;
/// Seconds since boot at the start.
pub const START: u32 = 1000;

/// A packet that has met a program.
#[derive(Clone, Debug)]
pub struct Hop {
    /// The program.
    pub hook: Hook,
    /// Seconds since boot.
    pub now: u32,
    /// The packet.
    pub packet: Memory,
    /// What happened to it.
    pub action: Action,
    /// What it was afterwards.
    pub after: Vec<u8>,
}

/// A case that is being played.
pub struct Play {
    /// What programs are told.
    pub world: &'static World,
    pub(super) model: Model,
    pub(super) node: Tables,
    pub(super) gateway: Tables,
    /// What has happened.
    pub hops: Vec<Hop>,
    /// Packets that left the gateway for the world.
    seen_outside: Vec<Vec<u8>>,
    /// Packets in the tunnel, to the gateway and from it.
    seen_between: Vec<Vec<u8>>,
    /// Packets that the pod has received.
    seen_inside: Vec<Vec<u8>>,
}

/// The world; `narrow`: translation has few ports, and the node speaks IP in IP.
#[must_use]
pub fn world(narrow: bool) -> &'static World {
    static WORLDS: [OnceLock<World>; 2] = [OnceLock::new(), OnceLock::new()];
    WORLDS[usize::from(narrow)].get_or_init(|| World::new(narrow))
}

/// Whether a case is about a gateway with few ports.
#[must_use]
pub fn is_narrow(case: &[u8]) -> bool {
    byte(case, 0) % 4 == 3
}

/// Plays a case to its end: all that happened.
///
/// # Errors
///
/// What was not as it should have been.
pub fn run(case: &[u8]) -> Result<Vec<Hop>, Box<Failure>> {
    std::panic::catch_unwind(|| run_steps(case)).unwrap_or_else(|_| {
        let what = "the model, or who plays it, panics".to_owned();
        Err(Box::new(Failure { what, hops: Vec::new() }))
    })
}

fn run_steps(case: &[u8]) -> Result<Vec<Hop>, Box<Failure>> {
    let mut play = Play::new(is_narrow(case));
    let mut bytes = Bytes::new(case.get(1..).unwrap_or_default());
    for _ in 0..MOST_STEPS {
        if bytes.is_empty() {
            break;
        }
        play.step(&mut bytes)?;
    }
    check::state(&play)?;
    Ok(play.hops)
}

fn remember(list: &mut Vec<Vec<u8>>, packet: &[u8]) {
    if list.len() == REMEMBERED {
        list.remove(0);
    }
    list.push(packet.to_vec());
}

impl Play {
    fn new(narrow: bool) -> Self {
        let world = world(narrow);
        let model = Model { now: START, narrow, ..Model::default() };
        Self {
            world,
            model,
            node: Tables::new(&world.node_entries, START),
            gateway: Tables::new(&world.gateway_entries, START),
            hops: Vec::new(),
            seen_outside: Vec::new(),
            seen_between: Vec::new(),
            seen_inside: Vec::new(),
        }
    }

    /// One thing that happens.
    fn step(&mut self, bytes: &mut Bytes) -> Result<(), Box<Failure>> {
        let kind = bytes.below(16);
        let v6 = bytes.rarely(2);
        match kind {
            0..=3 => self.pod_sends(bytes, v6),
            4 => self.client_sends(bytes, v6),
            5..=7 => self.remote_answers(bytes, v6),
            8 => self.remote_sends(bytes, v6),
            9 => self.router_complains(bytes, v6),
            10 => self.underlay_complains(bytes, v6),
            11 => self.pod_complains(bytes, v6),
            12 => self.gateway_sends(bytes, v6),
            13 => self.anybody_sends(bytes, v6),
            14 => self.again(bytes),
            _ => {
                let seconds = bytes.pick(&[0, 1, 1, 2, 4, 5, 6, 60]);
                self.model.now += seconds;
                self.node.now += seconds;
                self.gateway.now += seconds;
                Ok(())
            }
        }
    }

    fn shaped(bytes: &mut Bytes, ip: Ip, sort: Sort, ports: (u16, u16)) -> Vec<u8> {
        let ip = input::header(bytes, ip);
        let length = input::length(bytes);
        input::packet(bytes, &ip, sort, ports, length)
    }

    fn pod_sends(&mut self, bytes: &mut Bytes, v6: bool) -> Result<(), Box<Failure>> {
        let hosts = hosts(v6);
        let src =
            bytes.pick(&[hosts.pod, hosts.pod, hosts.pod, hosts.pod, hosts.pod, hosts.pod, hosts.stranger]);
        let ip = Ip::new(src, input::destination(bytes, v6));
        let (sort, ports) = (input::sort(bytes, v6), input::ports(bytes));
        let packet = Self::shaped(bytes, ip, sort, ports);
        self.meet(bytes, Hook::FromPod, &packet)
    }

    /// A client that is not the pod, or says so, sends through the tunnel.
    fn client_sends(&mut self, bytes: &mut Bytes, v6: bool) -> Result<(), Box<Failure>> {
        let hosts = hosts(v6);
        let outer = bytes.pick(&[hosts.other, hosts.other, hosts.pod, hosts.stranger]);
        let src = if bytes.rarely(8) { hosts.stranger } else { outer };
        let ip = Ip::new(src, input::destination(bytes, v6));
        let (sort, ports) = (input::sort(bytes, v6), input::ports(bytes));
        let inner = Self::shaped(bytes, ip, sort, ports);
        let packet = Self::tunnel(bytes, Ip::new(outer, hosts.gateway), &inner);
        self.meet(bytes, Hook::Gateway, &packet)
    }

    /// A packet in a tunnel of one of the shapes that there are.
    fn tunnel(bytes: &mut Bytes, mut ip: Ip, inner: &[u8]) -> Vec<u8> {
        ip.tos = bytes.pick(&[0, 3, 1, 2]);
        if ip.src.is_ipv6() && bytes.rarely(4) {
            ip = ip.extension(60, 8);
        }
        if bytes.rarely(3) {
            return ip.packet(wire::ipip_of(ip.src.is_ipv6()), inner);
        }
        ip.udp_unchecked((build::FOU, build::FOU), inner)
    }

    /// An answer to what has left the gateway.
    fn remote_answers(&mut self, bytes: &mut Bytes, v6: bool) -> Result<(), Box<Failure>> {
        let Some(packet) = Self::one_of(&self.seen_outside, bytes) else {
            return self.remote_sends(bytes, v6);
        };
        let v6 = packet[0] >> 4 == 6;
        let Ok(ip) = wire::ip(&packet, v6, false) else { return Ok(()) };
        let Ok(transport) = wire::transport(&ip, &packet) else { return Ok(()) };
        let flow = transport.flow.turned();
        let sort = match transport.kind {
            wire::Kind::Tcp(_) => Sort::Tcp(bytes.pick(&[18, 16, 24, 17, 4, 20, 2])),
            wire::Kind::Udp if bytes.rarely(4) => Sort::Unchecked,
            wire::Kind::Udp => Sort::Udp,
            wire::Kind::Request => Sort::Echo(false),
            wire::Kind::Reply => Sort::Echo(true),
        };
        let ports = (
            flow.src_port.max(if ip.protocol == wire::icmp_of(v6) { flow.dst_port } else { 0 }),
            flow.dst_port,
        );
        let answer = Self::shaped(bytes, Ip::new(flow.src, flow.dst), sort, ports);
        self.meet(bytes, Hook::Gateway, &answer)
    }

    /// Something from the world that nobody may have asked for.
    fn remote_sends(&mut self, bytes: &mut Bytes, v6: bool) -> Result<(), Box<Failure>> {
        let hosts = hosts(v6);
        let dst = bytes.pick(&[hosts.gateway, hosts.gateway, hosts.gateway, hosts.gateway, hosts.pod]);
        let ip = Ip::new(bytes.pick(&hosts.remotes[..4]), dst);
        let (sort, (port, remote)) = (input::sort(bytes, v6), input::ports(bytes));
        let packet = Self::shaped(bytes, ip, sort, (remote, port));
        self.meet(bytes, Hook::Gateway, &packet)
    }

    fn one_of(list: &[Vec<u8>], bytes: &mut Bytes) -> Option<Vec<u8>> {
        let index = bytes.below(REMEMBERED);
        list.get(list.len().checked_sub(1)?.saturating_sub(index)).cloned()
    }

    /// An ICMP error about a packet.
    fn complaint(bytes: &mut Bytes, ip: Ip, about: &[u8]) -> Vec<u8> {
        let ip = input::header(bytes, ip);
        let v6 = ip.src.is_ipv6();
        let (kind, code) = if v6 {
            bytes.pick(&[(2, 0), (1, 4), (3, 0), (1, 1), (4, 1), (2, 1), (130, 0), (0, 0)])
        } else {
            bytes.pick(&[(3, 4), (3, 3), (11, 0), (3, 13), (12, 0), (4, 0), (5, 1), (3, 255)])
        };
        let [a, b] = bytes.pick(&[0u16, 1280, 1400, 1500, 68, 576, 9000, 0xffff]).to_be_bytes();
        let high = if bytes.rarely(8) { bytes.byte() } else { 0 };
        let least = wire::least(v6);
        let most = bytes.pick(&[
            least + 8,
            usize::MAX,
            least + 20,
            least + 17,
            least + 18,
            least,
            least - 1,
            128,
            548,
        ]);
        ip.icmp(kind, code, [0, high, a, b], &about[..most.min(about.len())])
    }

    /// A router in the world, or the remote, complains about what left the gateway.
    fn router_complains(&mut self, bytes: &mut Bytes, v6: bool) -> Result<(), Box<Failure>> {
        let Some(about) = Self::one_of(&self.seen_outside, bytes) else {
            return self.remote_sends(bytes, v6);
        };
        let hosts = hosts(about[0] >> 4 == 6);
        let from = bytes.pick(&[hosts.remotes[1], hosts.remotes[0], hosts.stranger, hosts.other]);
        let packet = Self::complaint(bytes, Ip::new(from, hosts.gateway), &about);
        self.meet(bytes, Hook::Gateway, &packet)
    }

    /// A router between pod and gateway complains about what is in the tunnel.
    fn underlay_complains(&mut self, bytes: &mut Bytes, v6: bool) -> Result<(), Box<Failure>> {
        let Some(about) = Self::one_of(&self.seen_between, bytes) else { return self.pod_sends(bytes, v6) };
        let v6 = about[0] >> 4 == 6;
        let Ok(ip) = wire::ip(&about, v6, false) else { return Ok(()) };
        let hook = if ip.src == hosts(v6).gateway { Hook::Gateway } else { Hook::ToPod };
        let packet = Self::complaint(bytes, Ip::new(hosts(v6).stranger, ip.src), &about);
        self.meet(bytes, hook, &packet)
    }

    /// The pod complains about what it has received.
    fn pod_complains(&mut self, bytes: &mut Bytes, v6: bool) -> Result<(), Box<Failure>> {
        let Some(about) = Self::one_of(&self.seen_inside, bytes) else { return self.pod_sends(bytes, v6) };
        let v6 = about[0] >> 4 == 6;
        let Ok(ip) = wire::ip(&about, v6, false) else { return Ok(()) };
        let to = if bytes.rarely(8) { hosts(v6).remotes[1] } else { ip.src };
        let packet = Self::complaint(bytes, Ip::new(hosts(v6).pod, to), &about);
        self.meet(bytes, Hook::FromPod, &packet)
    }

    /// A gateway, or somebody who says so, sends to the pod through the tunnel.
    fn gateway_sends(&mut self, bytes: &mut Bytes, v6: bool) -> Result<(), Box<Failure>> {
        let hosts = hosts(v6);
        let outer = bytes.pick(&[hosts.gateway, hosts.second, hosts.gateway, hosts.stranger]);
        let dst = if bytes.rarely(8) { hosts.other } else { hosts.pod };
        let ip = Ip::new(bytes.pick(&hosts.remotes[..4]), dst);
        let (sort, (port, remote)) = (input::sort(bytes, v6), input::ports(bytes));
        let inner = Self::shaped(bytes, ip, sort, (remote, port));
        let packet = Self::tunnel(bytes, Ip::new(outer, hosts.pod), &inner);
        self.meet(bytes, Hook::ToPod, &packet)
    }

    /// Somebody sends to the pod without a tunnel.
    fn anybody_sends(&mut self, bytes: &mut Bytes, v6: bool) -> Result<(), Box<Failure>> {
        let hosts = hosts(v6);
        let src = bytes.pick(&[hosts.gateway, hosts.stranger, hosts.remotes[0], hosts.second]);
        let (sort, (port, remote)) = (input::sort(bytes, v6), input::ports(bytes));
        let packet = Self::shaped(bytes, Ip::new(src, hosts.pod), sort, (remote, port));
        self.meet(bytes, Hook::ToPod, &packet)
    }

    /// A packet comes once more.
    fn again(&mut self, bytes: &mut Bytes) -> Result<(), Box<Failure>> {
        let index = bytes.below(16);
        let Some(hop) = self.hops.len().checked_sub(1 + index).and_then(|index| self.hops.get(index)) else {
            return Ok(());
        };
        let (hook, mut frame) = (hop.hook, hop.packet.bytes.clone());
        input::spoil(bytes, &mut frame);
        self.travel(bytes, hook, Memory { bytes: frame, ..hop.packet.clone() })
    }

    /// A packet meets a program, spoiled on the way or not.
    fn meet(&mut self, bytes: &mut Bytes, hook: Hook, packet: &[u8]) -> Result<(), Box<Failure>> {
        let mut frame = ethernet(packet);
        input::spoil(bytes, &mut frame);
        let mut memory = Memory::new(frame);
        if bytes.rarely(16) {
            memory.gso_size = bytes.pick(&[100, 536, 1220, 1400]);
            memory.gso_segments = u32::from(bytes.byte() & 3);
        }
        self.travel(bytes, hook, memory)
    }

    /// A frame goes from program to program, until it leaves what there is of a world.
    fn travel(&mut self, bytes: &mut Bytes, hook: Hook, memory: Memory) -> Result<(), Box<Failure>> {
        let (mut hook, mut memory) = (hook, memory);
        for _ in 0..3 {
            let (action, after) = check::hop(self, hook, &memory)?;
            let changed = after != memory.bytes;
            let packet = after.get(14..).unwrap_or_default().to_vec();
            if action == Action::Drop || !changed || packet.len() < 20 {
                return Ok(());
            }
            let v6 = packet[0] >> 4 == 6;
            let hosts = hosts(v6);
            let (_, dst_at) = wire::addresses(v6);
            let dst = wire::octets(hosts.gateway).len();
            let dst = packet.get(dst_at..dst_at + dst).unwrap_or_default();
            let is = |address| dst == &wire::octets(address)[..];
            let protocol = if v6 { byte(&packet, 6) } else { byte(&packet, 9) };
            let in_tunnel =
                protocol == wire::ipip_of(v6) || number(&packet, wire::least(v6) + 2) == build::FOU;
            let next = match hook {
                Hook::FromPod if action == Action::Pass => {
                    remember(&mut self.seen_between, &packet);
                    is(hosts.gateway).then_some(Hook::Gateway)
                }
                Hook::Gateway if in_tunnel && (is(hosts.pod) || is(hosts.other)) => {
                    remember(&mut self.seen_between, &packet);
                    is(hosts.pod).then_some(Hook::ToPod)
                }
                Hook::Gateway => {
                    remember(&mut self.seen_outside, &packet);
                    None
                }
                Hook::ToPod => {
                    remember(&mut self.seen_inside, &packet);
                    None
                }
                Hook::FromPod => None,
            };
            let Some(next) = next else { return Ok(()) };
            let mut frame = after;
            input::spoil(bytes, &mut frame);
            memory = Memory { bytes: frame, ..memory };
            hook = next;
        }
        Ok(())
    }
}
