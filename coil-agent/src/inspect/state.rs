//! What `STATE_*` bits say about a flow, in words.

use coil_common::values::{
    STATE_CONFIRMED, STATE_FIN, STATE_REPLY, STATE_REPLY_FIN, STATE_REPLY_RST, STATE_RST,
};

/// State of a flow; `state` are the bits of both directions together.
pub(crate) fn state(protocol: u8, state: u32) -> &'static str {
    let has = |bits| state & bits != 0;
    match protocol {
        6 if has(STATE_RST | STATE_REPLY_RST) => "RESET",
        6 if has(STATE_FIN) && has(STATE_REPLY_FIN) => "CLOSED",
        6 if has(STATE_FIN | STATE_REPLY_FIN) => "CLOSING",
        6 if has(STATE_REPLY) && has(STATE_CONFIRMED) => "ESTABLISHED",
        6 if has(STATE_REPLY) => "SYN_RECV",
        6 => "SYN_SENT",
        _ if has(STATE_REPLY) => "REPLIED",
        _ => "UNREPLIED",
    }
}

/// Name of an IP protocol.
pub(crate) fn protocol(number: u8) -> String {
    match number {
        1 => "icmp".into(),
        6 => "tcp".into(),
        17 => "udp".into(),
        58 => "icmpv6".into(),
        132 => "sctp".into(),
        other => format!("proto{other}"),
    }
}

#[cfg(test)]
mod tests {
    use coil_common::values::STATE_SYN;

    use super::*;

    #[test]
    fn states_have_names() {
        let open = STATE_SYN | STATE_REPLY | STATE_CONFIRMED;
        for (protocol, bits, name) in [
            (6, STATE_SYN, "SYN_SENT"),
            (6, STATE_SYN | STATE_REPLY, "SYN_RECV"),
            (6, open, "ESTABLISHED"),
            (6, open | STATE_FIN, "CLOSING"),
            (6, open | STATE_FIN | STATE_REPLY_FIN, "CLOSED"),
            (6, open | STATE_REPLY_RST, "RESET"),
            (17, 0, "UNREPLIED"),
            (17, STATE_REPLY, "REPLIED"),
            (1, STATE_REPLY, "REPLIED"),
        ] {
            assert_eq!(state(protocol, bits), name);
        }
    }
}
