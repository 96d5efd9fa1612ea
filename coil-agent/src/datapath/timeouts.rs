//! How long an idle flow is kept, by protocol and state.
//!
//! Pure. The times are those of RFC 5382, 4787, 5508 and 7857, shortened where others have shortened
//! them too; a client node keeps a flow a little longer than its gateway, so that a flow that the
//! gateway still knows never changes its gateway.

use bytemuck::{Pod, Zeroable};
use coil_common::config::{Config, TIMEOUTS};
use coil_common::values::{
    FRAGMENT_SECONDS, STATE_CONFIRMED, STATE_FIN, STATE_REPLY, STATE_REPLY_FIN, STATE_REPLY_RST, STATE_RST,
};

const ICMP: u8 = libc::IPPROTO_ICMP as u8;
const ICMPV6: u8 = libc::IPPROTO_ICMPV6 as u8;
const TCP: u8 = libc::IPPROTO_TCP as u8;
const UDP: u8 = libc::IPPROTO_UDP as u8;
const DNS: u16 = 53;

/// The longest time-out that can be asked for: a week.
const LONGEST: i64 = 7 * 86_400;

/// What a client node adds to its gateway's times.
pub const NODE_EXTRA: u32 = 30;

/// Seconds that flows without packets are kept. The order of fields is that of `Config::timeouts`.
#[derive(clap::Args, Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Timeouts {
    /// Seconds that an idle TCP connection is kept which has not got beyond its opening packets.
    #[arg(id = "timeout_tcp_opening", long = "timeout-tcp-opening", env = "COIL_TIMEOUT_TCP_OPENING",
          value_name = "SECONDS", default_value_t = 30, value_parser = seconds())]
    pub tcp_opening: u32,
    /// The same while more than four fifths of the table are in use.
    #[arg(id = "timeout_tcp_opening_pressed", long = "timeout-tcp-opening-pressed",
          env = "COIL_TIMEOUT_TCP_OPENING_PRESSED", value_name = "SECONDS", default_value_t = 10,
          value_parser = seconds())]
    pub tcp_opening_pressed: u32,
    /// Seconds that an idle established TCP connection is kept.
    #[arg(id = "timeout_tcp_established", long = "timeout-tcp-established",
          env = "COIL_TIMEOUT_TCP_ESTABLISHED", value_name = "SECONDS", default_value_t = 7440,
          value_parser = seconds())]
    pub tcp_established: u32,
    /// Seconds that an idle TCP connection is kept of which one side has finished.
    #[arg(id = "timeout_tcp_closing", long = "timeout-tcp-closing", env = "COIL_TIMEOUT_TCP_CLOSING",
          value_name = "SECONDS", default_value_t = 120, value_parser = seconds())]
    pub tcp_closing: u32,
    /// Seconds that the port of a TCP connection is held which both sides have finished.
    #[arg(id = "timeout_tcp_closed", long = "timeout-tcp-closed", env = "COIL_TIMEOUT_TCP_CLOSED",
          value_name = "SECONDS", default_value_t = 60, value_parser = seconds())]
    pub tcp_closed: u32,
    /// Seconds that the port of a TCP connection is held which was reset.
    #[arg(id = "timeout_tcp_reset", long = "timeout-tcp-reset", env = "COIL_TIMEOUT_TCP_RESET",
          value_name = "SECONDS", default_value_t = 10, value_parser = seconds())]
    pub tcp_reset: u32,
    /// Seconds that an idle UDP flow is kept which nobody has answered.
    #[arg(id = "timeout_udp", long = "timeout-udp", env = "COIL_TIMEOUT_UDP", value_name = "SECONDS",
          default_value_t = 120, value_parser = seconds())]
    pub udp: u32,
    /// Seconds that an idle UDP flow is kept which was answered.
    #[arg(id = "timeout_udp_stream", long = "timeout-udp-stream", env = "COIL_TIMEOUT_UDP_STREAM",
          value_name = "SECONDS", default_value_t = 300, value_parser = seconds())]
    pub udp_stream: u32,
    /// Seconds that an idle UDP flow to port 53 is kept.
    #[arg(id = "timeout_udp_dns", long = "timeout-udp-dns", env = "COIL_TIMEOUT_UDP_DNS",
          value_name = "SECONDS", default_value_t = 30, value_parser = seconds())]
    pub udp_dns: u32,
    /// Seconds that an idle ICMP echo is kept.
    #[arg(id = "timeout_icmp", long = "timeout-icmp", env = "COIL_TIMEOUT_ICMP", value_name = "SECONDS",
          default_value_t = 60, value_parser = seconds())]
    pub icmp: u32,
    /// Seconds that an idle flow of any other protocol is kept.
    #[arg(id = "timeout_other", long = "timeout-other", env = "COIL_TIMEOUT_OTHER", value_name = "SECONDS",
          default_value_t = 600, value_parser = seconds())]
    pub other: u32,
    /// Seconds within which later fragments of a datagram may follow its first one.
    #[arg(id = "timeout_fragment", long = "timeout-fragment", env = "COIL_TIMEOUT_FRAGMENT",
          value_name = "SECONDS", default_value_t = FRAGMENT_SECONDS, value_parser = seconds())]
    pub fragment: u32,
}

fn seconds() -> clap::builder::RangedI64ValueParser<u32> {
    clap::value_parser!(u32).range(1..=LONGEST)
}

impl Default for Timeouts {
    fn default() -> Self {
        Self {
            tcp_opening: 30,
            tcp_opening_pressed: 10,
            tcp_established: 7440,
            tcp_closing: 120,
            tcp_closed: 60,
            tcp_reset: 10,
            udp: 120,
            udp_stream: 300,
            udp_dns: 30,
            icmp: 60,
            other: 600,
            fragment: FRAGMENT_SECONDS,
        }
    }
}

impl Timeouts {
    /// In the order of the configuration of programs, which is that of the fields.
    #[must_use]
    pub fn seconds(&self) -> [u32; TIMEOUTS] {
        bytemuck::cast(*self)
    }

    /// Those that programs were configured with.
    #[must_use]
    pub fn configured(config: &Config) -> Self {
        bytemuck::cast(config.timeouts)
    }

    /// Seconds that a flow without packets is kept. `state` are the `STATE_*` bits of both directions
    /// together, `port` is the destination port as the initiator sends; `pressed` says that the table
    /// is nearly full.
    #[must_use]
    pub fn of(&self, protocol: u8, port: u16, state: u32, pressed: bool) -> u32 {
        let has = |bits| state & bits != 0;
        match protocol {
            TCP if has(STATE_RST | STATE_REPLY_RST) => self.tcp_reset,
            TCP if has(STATE_FIN) && has(STATE_REPLY_FIN) => self.tcp_closed,
            TCP if has(STATE_FIN | STATE_REPLY_FIN) => self.tcp_closing,
            TCP if has(STATE_REPLY) && has(STATE_CONFIRMED) => self.tcp_established,
            // A flood of opening packets must not keep others out.
            TCP if pressed => self.tcp_opening_pressed.min(self.tcp_opening),
            TCP => self.tcp_opening,
            UDP if port == DNS => self.udp_dns,
            UDP if has(STATE_REPLY) => self.udp_stream,
            UDP => self.udp,
            ICMP | ICMPV6 => self.icmp,
            _ => self.other,
        }
    }

    /// The same with what a client node adds.
    #[must_use]
    pub fn of_node(&self, protocol: u8, port: u16, state: u32, pressed: bool) -> u32 {
        self.of(protocol, port, state, pressed).saturating_add(NODE_EXTRA)
    }
}

/// So much of a table is in use that opening packets are forgotten sooner: more than four fifths.
#[must_use]
pub fn is_pressed(entries: u64, capacity: u64) -> bool {
    entries.saturating_mul(5) > capacity.saturating_mul(4)
}

/// Whether a flow last seen at `last_seen` has expired at `now`, both in seconds since boot.
#[must_use]
pub fn expired(now: u32, last_seen: u32, timeout: u32) -> bool {
    // The kernel's clock may be a second ahead of a `now` taken before the table was read.
    now.saturating_sub(last_seen) >= timeout
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use clap::{CommandFactory, Parser};
    use coil_common::config::FRAGMENT_TIMEOUT;
    use coil_common::values::STATE_SYN;

    use super::*;

    #[derive(Parser)]
    struct Command {
        #[command(flatten)]
        timeouts: Timeouts,
    }

    #[test]
    fn they_are_told_to_whoever_lists_flows() {
        let mut seconds = [0; TIMEOUTS];
        seconds.iter_mut().zip(1..).for_each(|(second, number)| *second = number);
        let config = Config { timeouts: seconds, ..Config::default() };
        assert_eq!(Timeouts::configured(&config).seconds(), seconds);
        let Timeouts { tcp_opening, tcp_established, other, fragment, .. } = bytemuck::cast(seconds);
        assert_eq!((tcp_opening, tcp_established, other), (1, 3, 11));
        // Programs look at this one.
        assert_eq!(fragment, seconds[FRAGMENT_TIMEOUT]);
    }

    #[test]
    fn states_have_their_times() {
        let open = STATE_SYN | STATE_REPLY | STATE_CONFIRMED;
        for (protocol, port, state, pressed, seconds) in [
            (TCP, 443, STATE_SYN, false, 30),
            (TCP, 443, STATE_SYN, true, 10),
            (TCP, 443, STATE_SYN | STATE_REPLY, false, 30),
            (TCP, 443, open, true, 7440),
            (TCP, 443, open | STATE_FIN, false, 120),
            (TCP, 443, open | STATE_REPLY_FIN, true, 120),
            (TCP, 443, open | STATE_FIN | STATE_REPLY_FIN, false, 60),
            (TCP, 443, open | STATE_RST, false, 10),
            (TCP, 443, STATE_SYN | STATE_REPLY | STATE_REPLY_RST, false, 10),
            (UDP, 443, 0, true, 120),
            (UDP, 443, STATE_REPLY, false, 300),
            (UDP, 53, STATE_REPLY, false, 30),
            (ICMP, 0, STATE_REPLY, false, 60),
            (ICMPV6, 53, 0, false, 60),
            (132, 0, STATE_REPLY, false, 600),
        ] {
            let timeouts = Timeouts::default();
            assert_eq!(timeouts.of(protocol, port, state, pressed), seconds, "{protocol} {port} {state:#x}");
            assert_eq!(timeouts.of_node(protocol, port, state, pressed), seconds + NODE_EXTRA);
        }
    }

    #[test]
    fn expiry_is_at_the_second_and_never_for_the_future() {
        assert!(!expired(129, 100, 30));
        assert!(expired(130, 100, 30));
        assert!(!expired(99, 100, 30));
    }

    #[test]
    fn each_time_has_a_flag_with_default_unit_and_bounds() {
        let parsed = Command::try_parse_from(["x"]).unwrap().timeouts;
        assert_eq!(parsed, Timeouts::default());
        let parsed = Command::try_parse_from(["x", "--timeout-udp=7", "--timeout-tcp-closed=1"]).unwrap();
        assert_eq!(parsed.timeouts, Timeouts { udp: 7, tcp_closed: 1, ..Timeouts::default() });
        for bad in ["--timeout-udp=0", "--timeout-udp=-1", "--timeout-icmp=604801", "--timeout-other=x"] {
            assert!(Command::try_parse_from(["x", bad]).is_err(), "{bad}");
        }
        let command = Command::command();
        let flags: Vec<_> =
            command.get_arguments().filter(|argument| argument.get_long() != Some("help")).collect();
        assert_eq!(flags.len(), TIMEOUTS);
        for flag in flags {
            assert!(
                flag.get_env().is_some()
                    && flag.get_help().is_some()
                    && !flag.get_default_values().is_empty()
            );
        }
    }

    #[test]
    fn pressure_begins_beyond_four_fifths() {
        assert!(!is_pressed(80, 100));
        assert!(is_pressed(81, 100));
    }
}
