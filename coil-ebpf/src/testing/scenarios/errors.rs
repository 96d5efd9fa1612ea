//! ICMP errors that the datapath makes in place of packets.

use coil_common::stats::{DropReason, IcmpStat};

use super::world::{ACK, MTU, Nat, PORTS, World};
use crate::testing::{
    build::Ip,
    entries::Entry,
    scenario::{Action, Hook, Scenario},
};

pub(super) fn rows(w: &World) -> Vec<Scenario> {
    [time_exceeded(w), limited(w)].concat()
}

fn time(w: &World) -> [u8; 2] {
    if w.is_v4() { [11, 0] } else { [3, 0] }
}

fn too_big(w: &World) -> [u8; 2] {
    if w.is_v4() { [3, 4] } else { [2, 0] }
}

/// Both halves of a TCP and of a UDP flow.
fn halves(w: &World) -> Vec<Entry> {
    vec![
        w.forward(PORTS, 6, 50000, Nat::default()),
        w.reverse(PORTS, 6, 50000, Nat::default()),
        w.forward(PORTS, 17, 50000, Nat::default()),
        w.reverse(PORTS, 17, 50000, Nat::default()),
    ]
}

/// TTL exceeded in the gateway, either way.
fn time_exceeded(w: &World) -> Vec<Scenario> {
    let mut rows = Vec::new();
    let row = |name: &str, packet: &[u8]| w.scenario(Hook::Gateway, name, packet);
    let from_client = |name: &str, inner: &[u8]| {
        let error = w.error(w.gateway, w.pod, time(w), 0, inner);
        row(name, &w.to_gateway(inner)).answers(DropReason::TtlExceeded, &w.to_client(&error))
    };
    for ttl in [0, 1] {
        let out = w.out().ttl(ttl);
        let tcp = out.tcp(PORTS, ACK, &[], b"data");
        rows.extend([
            from_client(&format!("UDP with TTL {ttl}"), &out.udp(PORTS, b"x")),
            from_client(&format!("TCP with TTL {ttl}"), &tcp),
            from_client(&format!("echo request with TTL {ttl}"), &out.echo(true, 77, b"")),
            from_client(&format!("long packet with TTL {ttl}"), &out.udp(PORTS, &[7; 1400])),
            from_client(&format!("a bit more than a quote with TTL {ttl}"), &out.udp(PORTS, &[7; 240])),
            from_client(&format!("odd number of bytes with TTL {ttl}"), &out.udp(PORTS, &[7; 25])),
        ]);
        let packet = w.reply().ttl(ttl).tcp((PORTS.1, 50000), ACK, &[], b"data");
        rows.push(
            row(&format!("reply with TTL {ttl}"), &packet)
                .and(halves(w))
                .leaves(halves(w))
                .answers(DropReason::TtlExceeded, &w.error(w.gateway, w.remote, time(w), 0, &packet)),
        );
        // Nothing is said about what cannot be translated anyway.
        let other = out.packet(132, &[1; 40]);
        rows.push(
            row(&format!("other protocol with TTL {ttl}"), &w.to_gateway(&other))
                .drops(DropReason::UnsupportedProtocol),
        );
    }
    let mut options = w.out().ttl(1);
    if w.is_v4() {
        options = options.options(&[1; 40]);
    } else {
        options = options.extension(0, 8).extension(60, 64);
    }
    rows.push(from_client("options and TTL 1", &options.udp(PORTS, &[7; 100])));
    rows
}

/// Too many errors.
fn limited(w: &World) -> Vec<Scenario> {
    let large = usize::from(MTU) - w.header() - 8;
    let packet = w.out().udp(PORTS, &vec![7; large]);
    let limit = |mut row: Scenario, rate, burst| {
        row.config.icmp_rate = rate;
        row.config.icmp_burst = burst;
        row
    };
    let suppressed = |hook, name: &str, packet: &[u8], reason| {
        let row = w.scenario(hook, name, packet).drops(reason).counts_icmp(IcmpStat::Suppressed);
        limit(row, 1, 0)
    };
    let expired = w.out().ttl(1).udp(PORTS, b"x");
    let mut answered = w
        .scenario(Hook::FromPod, "too big, errors are limited but not used up", &packet)
        .answers(DropReason::TooBig, &w.error(w.remote, w.pod, too_big(w), MTU - w.overhead(), &packet));
    answered = limit(answered, 1000, 1000);
    let mut rows = vec![
        answered,
        suppressed(Hook::FromPod, "too big, errors are used up", &packet, DropReason::TooBig),
        suppressed(
            Hook::Gateway,
            "TTL 1, errors are used up",
            &w.to_gateway(&expired),
            DropReason::TtlExceeded,
        ),
    ];
    let back = w.reply().udp((PORTS.1, 50000), &vec![7; large]);
    rows.push(
        suppressed(Hook::Gateway, "reply that is too big, errors are used up", &back, DropReason::TooBig)
            .and(halves(w))
            .leaves(halves(w)),
    );
    // A packet with padding: what is quoted ends where the packet does.
    let mut padded = w
        .scenario(Hook::Gateway, "TTL 1 and padding", &w.to_gateway(&expired))
        .answers(DropReason::TtlExceeded, &w.to_client(&w.error(w.gateway, w.pod, time(w), 0, &expired)));
    padded.packet.bytes.extend([0xee; 9]);
    if let Some(packet) = &mut padded.expect.packet {
        packet.extend([0xee; 9]);
    }
    rows.push(padded);
    let unfit = Ip::new(w.stranger, w.gateway).udp(PORTS, b"x");
    let mut row = w.scenario(Hook::Gateway, "nobody's packet with TTL 1", &unfit);
    row.expect.action = Action::Pass;
    rows.push(row);
    rows
}
