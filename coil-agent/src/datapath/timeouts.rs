//! How long an idle flow is kept, by protocol and state.
//!
//! Pure. The gateway's times are those of RFC 5382, 4787, 5508 and 7857, shortened where others have
//! shortened them too; a client node keeps a flow a little longer than its gateway, so that a flow that
//! the gateway still knows never changes its gateway.

use coil_common::values::{
    STATE_CONFIRMED, STATE_FIN, STATE_REPLY, STATE_REPLY_FIN, STATE_REPLY_RST, STATE_RST,
};

const TCP: u8 = libc::IPPROTO_TCP as u8;
const UDP: u8 = libc::IPPROTO_UDP as u8;
const DNS: u16 = 53;

/// TCP that has not got beyond its opening packets.
pub const TCP_OPENING: u32 = 30;
/// The same while the table is nearly full: a flood of opening packets must not keep others out.
pub const TCP_OPENING_PRESSED: u32 = 10;
/// Established TCP: two hours and four minutes.
pub const TCP_ESTABLISHED: u32 = 7440;
/// TCP of which one side has finished.
pub const TCP_CLOSING: u32 = 120;
/// TCP of which both sides have finished.
pub const TCP_CLOSED: u32 = 60;
/// TCP that was reset.
pub const TCP_RESET: u32 = 10;
/// UDP from one side only.
pub const UDP_ONE_WAY: u32 = 120;
/// UDP from both sides.
pub const UDP_BOTH_WAYS: u32 = 300;
/// UDP to the port of DNS.
pub const UDP_DNS: u32 = 30;
/// ICMP echo and whatever else.
pub const OTHER: u32 = 60;

/// What a client node adds to its gateway's times.
pub const NODE_EXTRA: u32 = 30;

/// Seconds that a flow without packets is kept. `state` are the `STATE_*` bits of both directions
/// together, `port` is the destination port as the initiator sends.
#[must_use]
pub fn timeout(protocol: u8, port: u16, state: u32) -> u32 {
    let has = |bits| state & bits != 0;
    match protocol {
        TCP if has(STATE_RST | STATE_REPLY_RST) => TCP_RESET,
        TCP if has(STATE_FIN) && has(STATE_REPLY_FIN) => TCP_CLOSED,
        TCP if has(STATE_FIN | STATE_REPLY_FIN) => TCP_CLOSING,
        TCP if has(STATE_REPLY) && has(STATE_CONFIRMED) => TCP_ESTABLISHED,
        TCP => TCP_OPENING,
        UDP if port == DNS => UDP_DNS,
        UDP if has(STATE_REPLY) => UDP_BOTH_WAYS,
        UDP => UDP_ONE_WAY,
        _ => OTHER,
    }
}

/// Whether a flow last seen at `last_seen` has expired at `now`, both in seconds since boot.
#[must_use]
pub fn expired(now: u32, last_seen: u32, timeout: u32) -> bool {
    // The kernel's clock may be a second ahead of a `now` taken before the table was read.
    now.saturating_sub(last_seen) >= timeout
}

#[cfg(test)]
mod tests {
    use coil_common::values::STATE_SYN;

    use super::*;

    #[test]
    fn states_have_their_times() {
        let open = STATE_SYN | STATE_REPLY | STATE_CONFIRMED;
        for (protocol, port, state, seconds) in [
            (TCP, 443, STATE_SYN, TCP_OPENING),
            (TCP, 443, STATE_SYN | STATE_REPLY, TCP_OPENING),
            (TCP, 443, open, TCP_ESTABLISHED),
            (TCP, 443, open | STATE_FIN, TCP_CLOSING),
            (TCP, 443, open | STATE_REPLY_FIN, TCP_CLOSING),
            (TCP, 443, open | STATE_FIN | STATE_REPLY_FIN, TCP_CLOSED),
            (TCP, 443, open | STATE_RST, TCP_RESET),
            (TCP, 443, STATE_SYN | STATE_REPLY | STATE_REPLY_RST, TCP_RESET),
            (UDP, 443, 0, UDP_ONE_WAY),
            (UDP, 443, STATE_REPLY, UDP_BOTH_WAYS),
            (UDP, 53, STATE_REPLY, UDP_DNS),
            (1, 0, STATE_REPLY, OTHER),
            (58, 53, 0, OTHER),
        ] {
            assert_eq!(timeout(protocol, port, state), seconds, "{protocol} {port} {state:#x}");
        }
    }

    #[test]
    fn expiry_is_at_the_second_and_never_for_the_future() {
        assert!(!expired(129, 100, 30));
        assert!(expired(130, 100, 30));
        assert!(!expired(99, 100, 30));
    }
}
