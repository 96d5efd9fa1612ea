//! Packets from a pod: source check, egress policy, choice of gateway, encapsulation.
//!
//! Fails closed where a packet belongs to an egress: it is tunnelled or dropped, never sent with
//! another source. What no policy claims passes, whatever it is.

use coil_common::{
    config::Config,
    stats::{Direction, DropReason},
    usage::pod_cells,
    values::{
        EGRESS_BLOCK, EGRESS_CLIENT_AFFINITY, EGRESS_DELETED, EGRESS_DIRECT, EGRESS_SOURCE_PORT_AUTO,
        EgressValue, FlowValue, GATEWAY_DRAINING, GATEWAY_GONE, MAGLEV_SLOTS, NO_POLICY, POD_ANY_SOURCE,
        POD_GATEWAY, PodValue, STATE_FIN, STATE_REPLY_FIN, STATE_REPLY_RST, STATE_RST,
    },
};

use super::{affinity, inbound, wire};
use crate::{
    encap::Encap,
    family::Family,
    flow::{Flow, Hash},
    head::{Build, Tunnel},
    packet::{ETHERNET, Packet},
    parse::{
        Ip, L4, Parse,
        l4::{self, RST},
        mss,
    },
    tables::{Full, NodeTables, Tally},
    usage,
    verdict::{Decision, Refusal, Rewrite, Verdict, Way, source_port},
};

/// How a tunnelled packet counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Account<H> {
    /// Its flow, unless the entry vanished meanwhile.
    pub flow: Option<H>,
    /// Its egress.
    pub egress: u32,
    /// Its direction.
    pub direction: Direction,
    /// Its size.
    pub tally: Tally,
}

impl<H: Copy> Account<H> {
    /// Counts it.
    #[inline(always)]
    pub fn commit<F: Family, T: NodeTables<F, Flow = H>>(&self, tables: &T) {
        if let Some(flow) = self.flow {
            tables.count_flow(flow, self.direction, &self.tally);
        }
        tables.count_egress(self.egress, self.direction, &self.tally);
    }
}

/// Decides about a packet from `pod`.
///
/// # Errors
///
/// Why the packet is dropped.
#[inline(always)]
pub fn from_pod<F: Parse + Build, P: Packet, T: NodeTables<F>>(
    packet: &mut P,
    pod: &PodValue,
    config: &Config,
    tables: &T,
    rewrite: &mut Rewrite<F>,
) -> Decision<Account<T::Flow>> {
    let ip = F::parse(packet, ETHERNET)?;
    if pod.flags & POD_ANY_SOURCE == 0 {
        // DHCP, duplicate address detection, multicast listener reports: never beyond the link.
        if F::is_interim_source(&ip.src) {
            return Ok(Verdict::Pass);
        }
        if !F::same(&ip.src, &F::of_pod(pod)) {
            return Err(DropReason::SpoofedSource);
        }
    }
    if pod.set == NO_POLICY || pod.flags & POD_GATEWAY != 0 || F::is_local_scope(&ip.dst) {
        return Ok(Verdict::Pass);
    }
    let l4 = match l4::parse_any(packet, &ip, config) {
        Ok(l4) => l4,
        Err(DropReason::Fragment) => return Ok(Verdict::Fragment),
        Err(DropReason::UnsupportedIcmp) => return Ok(Verdict::Icmp),
        Err(reason) => return unsupported(packet, pod, &ip, reason, tables),
    };

    let flow = l4.flow(&ip);
    let now = tables.now();
    let known = tables.flow(flow.key());
    let choice = match known.and_then(|entry| kept(entry, pod, &l4, tables)) {
        Some(choice) => choice,
        None => {
            let Some(egress) = policy(pod, &ip.dst, tables)? else {
                return Ok(Verdict::Pass);
            };
            if known.is_none() && inbound::answers(pod, egress, &flow, &l4, now, tables) {
                return Ok(Verdict::Pass);
            }
            choose(egress, pod, &flow, &l4, known, now, config, tables)?
        }
    };
    let egress = tables.egress(choice.value.egress).ok_or(DropReason::EgressUnresolved)?;
    let encap = Encap::of_config(config);
    let mtu = encap.like_fou(pod.mtu);
    if wire::exceeds(packet, &ip, &l4, mtu) {
        return Ok(Verdict::Refuse(wire::too_big(&ip, mtu)));
    }
    let entry = match choice.change {
        Change::None => known,
        Change::Decision => {
            if let Some(entry) = known {
                tables.decide_flow(entry, &choice.value);
            }
            known
        }
        Change::Entry => {
            let Ok(cells) = admit(packet.interface(), known.is_some(), config, tables) else {
                return Ok(Verdict::Refuse(Refusal::prohibited(&ip, DropReason::PodFlowQuota)));
            };
            let value = FlowValue {
                last_seen: now,
                created: now,
                pod: (packet.interface() & 0xffff) as u16,
                ..choice.value
            };
            // Another packet of the flow may have been faster, on another processor: then there is its entry.
            let Ok(added) = tables.put_flow(flow.key(), &value, known.is_some()) else {
                return Err(DropReason::FlowTableFull);
            };
            if added {
                tables.pod_uses_more(cells[0]);
                tables.pod_uses_more(cells[1]);
            }
            tables.flow(flow.key())
        }
    };
    let belied = choice.value.state & OVER & belies(&l4);
    if let Some(entry) = entry
        && belied != 0
    {
        // Of a connection that starts over nothing is left.
        tables.retract_flow(entry, if wire::opens(&l4) { u32::MAX } else { belied });
    }

    if ip.fragment != 0 && !rewrite.noted {
        return Ok(Verdict::Fragment);
    }

    let hash = flow.hash(config.seed);
    rewrite.begin_at(ETHERNET, Way::On);
    rewrite.clamp(&l4, mss::clamp(packet, &l4, wire::inner_mss::<F>(mtu))?);
    rewrite.cut = wire::must_be_cut(packet, &l4, config);
    rewrite.enter_tunnel(Tunnel {
        encap,
        src: F::of_pod(pod),
        dst: choice.gateway,
        src_port: source_port(egress.flags & EGRESS_SOURCE_PORT_AUTO != 0, hash, config),
        dst_port: config.fou_port,
        ecn: ip.tos & 3,
        inner: (ip.length & 0xffff) as u16,
        label: hash.bits16(),
    });
    let state = wire::shows(&l4, !matches!(choice.change, Change::Entry), &wire::INITIATOR);
    Ok(Verdict::Rewrite(Account {
        flow: entry,
        egress: choice.value.egress,
        direction: Direction::Tx,
        tally: wire::tally(packet, &ip, &l4, now, state),
    }))
}

/// Where a pod's flows are counted, unless it has so many that it may not have another one.
#[inline(always)]
fn admit<F: Family, T: NodeTables<F>>(
    ifindex: u32,
    known: bool,
    config: &Config,
    tables: &T,
) -> Result<[u32; 2], Full> {
    let cells = pod_cells(F::INDEX, usage::pod(config.seed, (ifindex & 0xffff) as u16));
    let most = i64::from(config.pod_flows);
    let over = |cell: u32| tables.pod_usage(cell) >= most;
    if most != 0 && !known && over(cells[0]) && over(cells[1]) {
        return Err(Full);
    }
    Ok(cells)
}

/// What must be written to the flow table.
#[derive(Clone, Copy)]
enum Change {
    None,
    Decision,
    Entry,
}

/// Egress and gateway of a flow.
pub(super) struct Choice<F: Family> {
    pub(super) value: FlowValue,
    pub(super) gateway: F::Addr,
    change: Change,
}

/// `STATE_*` bits of a connection that is over.
const OVER: u32 = STATE_FIN | STATE_RST | STATE_REPLY_FIN | STATE_REPLY_RST;

/// What a packet of the pod says of a connection is not so, or no longer: that it is over if it begins anew, that
/// the pod has reset it if it goes on.
#[inline(always)]
const fn belies(l4: &L4) -> u32 {
    if wire::opens(l4) {
        OVER
    } else if l4.flags & RST == 0 {
        STATE_RST
    } else {
        0
    }
}

/// The address of the gateway that a flow uses, if it still serves. A new connection with the ports of one
/// that is over is a new flow to a gateway that takes none.
#[inline(always)]
fn serving<F: Family, T: NodeTables<F>>(value: &FlowValue, l4: &L4, tables: &T) -> Option<F::Addr> {
    let gateway = tables.gateway(value.gateway)?;
    if gateway.generation != value.gateway_generation || gateway.state == GATEWAY_GONE {
        return None;
    }
    if gateway.state == GATEWAY_DRAINING && value.state & OVER != 0 && wire::opens(l4) {
        return None;
    }
    Some(F::of_gateway(gateway))
}

/// The decision that a flow carries, if it is still good.
#[inline(always)]
pub(super) fn kept<F: Family, T: NodeTables<F>>(
    entry: T::Flow,
    pod: &PodValue,
    l4: &L4,
    tables: &T,
) -> Option<Choice<F>> {
    let value = tables.flow_value(entry);
    if value.set != pod.set {
        return None;
    }
    let gateway = serving(&value, l4, tables)?;
    Some(Choice { value, gateway, change: Change::None })
}

/// The egress for a destination, `None` if it leaves directly.
#[inline(always)]
pub(super) fn policy<F: Family, T: NodeTables<F>>(
    pod: &PodValue,
    dst: &F::Addr,
    tables: &T,
) -> Result<Option<u32>, DropReason> {
    match tables.policy(pod.set, dst) {
        None | Some(EGRESS_DIRECT) => Ok(None),
        Some(EGRESS_BLOCK) => Err(DropReason::EgressUnresolved),
        Some(egress) => Ok(Some(egress)),
    }
}

/// Chooses a gateway for a flow: the one that it has as long as it serves the same egress.
#[inline(always)]
#[expect(clippy::too_many_arguments, reason = "a struct of them would have to live on the stack")]
fn choose<F: Family, T: NodeTables<F>>(
    index: u32,
    pod: &PodValue,
    flow: &Flow<F>,
    l4: &L4,
    known: Option<T::Flow>,
    now: u32,
    config: &Config,
    tables: &T,
) -> Result<Choice<F>, DropReason> {
    let egress = tables.egress(index).ok_or(DropReason::EgressUnresolved)?;
    let mut change = Change::Entry;
    let mut value = FlowValue { set: pod.set, egress: index, ..FlowValue::default() };
    if let Some(entry) = known {
        let old = tables.flow_value(entry);
        if old.egress == index {
            value = FlowValue { set: pod.set, ..old };
            change = Change::Decision;
            if let Some(gateway) = serving(&old, l4, tables) {
                return Ok(Choice { value, gateway, change });
            }
        }
    }
    if egress.gateways == 0 {
        let deleted = egress.flags & EGRESS_DELETED != 0;
        return Err(if deleted { DropReason::EgressUnresolved } else { DropReason::NoGateway });
    }
    let hashed = u32::from(slot(egress, flow, config));
    value.gateway = affinity::gateway(index, egress, &flow.src(), hashed, now, tables);
    let gateway = tables.gateway(value.gateway).ok_or(DropReason::NoGateway)?;
    if gateway.state == GATEWAY_GONE {
        return Err(DropReason::NoGateway);
    }
    value.gateway_generation = gateway.generation;
    Ok(Choice { value, gateway: F::of_gateway(gateway), change })
}

/// The gateway of a new flow.
#[inline(always)]
fn slot<F: Family>(egress: &EgressValue, flow: &Flow<F>, config: &Config) -> u16 {
    const SLOTS: u16 = MAGLEV_SLOTS as u16;
    let hash = if egress.flags & EGRESS_CLIENT_AFFINITY != 0 {
        Hash::of_client::<F>(&flow.src())
    } else {
        flow.hash(config.seed)
    };
    // The compiler knows the bound and would fold it away; the verifier has to see it.
    let slot = usize::from(core::hint::black_box(hash.below(SLOTS)));
    egress.table[if slot < MAGLEV_SLOTS { slot } else { 0 }]
}

/// A packet that cannot be translated: policy says whether that matters.
#[inline(always)]
pub(super) fn unsupported<F: Family, P: Packet, T: NodeTables<F>>(
    packet: &P,
    pod: &PodValue,
    ip: &Ip<F>,
    reason: DropReason,
    tables: &T,
) -> Decision<Account<T::Flow>> {
    // Neighbour discovery may be about an address of any kind, but never crosses a router; a hop
    // limit of 255 is what its receivers want to see.
    if reason as u32 == DropReason::UnsupportedIcmp as u32
        && ip.ttl == 255
        && packet.load::<2>(ip.l4).is_ok_and(|[kind, _]| F::is_link_icmp(kind))
    {
        return Ok(Verdict::Pass);
    }
    match policy(pod, &ip.dst, tables)? {
        None => Ok(Verdict::Pass),
        Some(_) => Err(reason),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::family::V4;

    fn egress(flags: u32) -> EgressValue {
        let mut table = [0; MAGLEV_SLOTS];
        for (index, slot) in table.iter_mut().enumerate() {
            *slot = (index % 7) as u16;
        }
        EgressValue { flags, gateways: 7, table }
    }

    fn choices(flags: u32) -> std::collections::BTreeSet<u16> {
        let seeds = 0..4;
        seeds
            .flat_map(|seed| (0..100u16).map(move |port| (seed, port)))
            .map(|(seed, port)| {
                let flow = Flow::<V4>::new(&1, &u32::from(port), port.to_be_bytes(), [1, 187], 6);
                slot(&egress(flags), &flow, &Config { seed, ..Config::default() })
            })
            .collect()
    }

    #[test]
    fn a_client_with_affinity_has_one_gateway() {
        assert_eq!(choices(EGRESS_CLIENT_AFFINITY).len(), 1);
    }

    #[test]
    fn flows_without_affinity_use_all_gateways() {
        assert_eq!(choices(0).len(), 7);
    }
}
