//! RSTs at a node: when they are believed, and what takes them back.

use coil_common::{
    stats::Direction,
    values::{FlowValue, STATE_REPLY, STATE_REPLY_RST, STATE_RST},
};

use super::world::{ACK, CONFIRMED, NOW, PORTS, PORTS_BACK, World, sent};
use crate::testing::scenario::{Hook, Scenario};

const RST: u8 = 4;

pub(super) fn rows(w: &World) -> Vec<Scenario> {
    let tuple = (w.pod, w.remote, PORTS, 6);
    let known = |state, last_seen| FlowValue { state, last_seen, ..w.flow_value() };
    let open = CONFIRMED | STATE_REPLY;
    let to = |name: &str, flags: u8, before: FlowValue, after: u32| {
        let inner = w.back().tcp(PORTS_BACK, flags, &[], b"");
        let left = FlowValue { rx_packets: 1, rx_bytes: inner.len() as u64, state: after, ..before };
        w.scenario(Hook::ToPod, name, &w.to_client(&inner))
            .with(w.node_entries())
            .and(vec![w.flow_entry(tuple, before)])
            .becomes(&inner)
            .leaves(vec![w.flow_entry(tuple, left)])
            .counts_egress(w.egress(), Direction::Rx, &inner)
    };
    let from = |name: &str, flags: u8, before: u32, after: u32| {
        let packet = w.out().tcp(PORTS, flags, &[], b"");
        let left = FlowValue { state: after, ..sent(known(before, NOW), &packet, 0) };
        w.scenario(Hook::FromPod, name, &packet)
            .and(vec![w.flow_entry(tuple, known(before, NOW))])
            .becomes(&w.to_gateway(&packet))
            .leaves(vec![w.flow_entry(tuple, left)])
            .counts_egress(w.egress(), Direction::Tx, &packet)
    };
    vec![
        to("reset: a RST", RST, known(open, NOW - 59), open | STATE_REPLY_RST),
        to("reset: a RST out of a long silence", RST, known(open, NOW - 60), open),
        to("reset: a RST after a RST", RST, known(open | STATE_REPLY_RST, NOW), open | STATE_REPLY_RST),
        to("reset: more after a RST", ACK, known(open | STATE_REPLY_RST, NOW), open),
        to("reset: more after a RST of the pod", ACK, known(open | STATE_RST, NOW), open | STATE_RST),
        from("reset: a RST of the pod", RST, open, open | STATE_RST),
        from("reset: more from the pod after its RST", ACK, open | STATE_RST, open),
        from("reset: the pod goes on after a RST", ACK, open | STATE_REPLY_RST, open | STATE_REPLY_RST),
    ]
}
