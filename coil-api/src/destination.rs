//! Reading destinations of an Egress.

use ipnet::{IpNet, Ipv6Net};

/// Why a text is not a destination.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DestinationError {
    /// Not an address and a prefix length.
    #[error("{0:?} is not a CIDR (want an address and a prefix length, as 10.0.0.0/8 or fd00::/8)")]
    NotCidr(String),
    /// An IPv4 network written as an IPv6 one, which would never match a packet.
    #[error("{0:?} is an IPv4-mapped IPv6 network; write it as IPv4")]
    Mapped(String),
}

/// Parses a destination. Bits after the prefix are cleared, as the original does.
///
/// # Errors
/// The text is not a CIDR that can match packets; the error names it.
pub fn parse_destination(text: &str) -> Result<IpNet, DestinationError> {
    let net = parse_net(text).ok_or_else(|| DestinationError::NotCidr(text.to_owned()))?;
    if let IpNet::V6(v6) = net
        && is_mapped(&v6)
    {
        return Err(DestinationError::Mapped(text.to_owned()));
    }
    Ok(net.trunc())
}

/// The parser of `ipnet` takes `010.0.0.0/8` for 10.0.0.0/8, others take it for 8.0.0.0/8; the one of the
/// standard library refuses it.
fn parse_net(text: &str) -> Option<IpNet> {
    let (address, length) = text.split_once('/')?;
    if !length.bytes().all(|b| b.is_ascii_digit()) || (length.len() > 1 && length.starts_with('0')) {
        return None;
    }
    IpNet::new(address.parse().ok()?, length.parse().ok()?).ok()
}

fn is_mapped(net: &Ipv6Net) -> bool {
    net.prefix_len() >= 96 && net.addr().to_ipv4_mapped().is_some()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accepts_networks_of_both_families() {
        for (text, want) in [
            ("0.0.0.0/0", "0.0.0.0/0"),
            ("10.1.2.3/8", "10.0.0.0/8"),
            ("192.0.2.1/32", "192.0.2.1/32"),
            ("::/0", "::/0"),
            ("FD00::1/8", "fd00::/8"),
        ] {
            assert_eq!(parse_destination(text).map(|n| n.to_string()), Ok(want.to_owned()), "{text}");
        }
    }

    #[test]
    fn refuses_everything_else_and_names_it() {
        for text in [
            "",
            "10.0.0.0",
            "10.0.0/8",
            "10.0.0.0/33",
            "fd00::/129",
            " 10.0.0.0/8",
            "10.0.0.0/8 ",
            "a/8",
            "010.0.0.0/8",
            "10.0.0.0/08",
            "10.0.0.0/+8",
            "10.0.0.0/",
            "fe80::1%eth0/64",
            "::ffff:10.0.0.0/104",
        ] {
            let error = parse_destination(text).expect_err(text).to_string();
            assert!(error.contains(&format!("{text:?}")), "{error}");
        }
    }
}
