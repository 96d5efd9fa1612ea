//! What of a table is wanted.

use std::net::IpAddr;
use std::str::FromStr;

use ipnet::IpNet;

/// Destinations: a prefix and perhaps a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Destination {
    /// The prefix.
    pub net: IpNet,
    /// The port.
    pub port: Option<u16>,
}

/// Not a prefix.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("want ADDRESS, CIDR, either with :PORT behind; IPv6 with a port in brackets: [2001:db8::/32]:443")]
pub struct DestinationError;

impl Destination {
    /// It contains a destination.
    #[must_use]
    pub fn contains(&self, address: IpAddr, port: u16) -> bool {
        self.net.contains(&address) && self.port.is_none_or(|wanted| wanted == port)
    }
}

fn net(text: &str) -> Option<IpNet> {
    text.parse::<IpNet>().ok().or_else(|| text.parse::<IpAddr>().ok().map(IpNet::from))
}

impl FromStr for Destination {
    type Err = DestinationError;

    fn from_str(text: &str) -> Result<Self, DestinationError> {
        if let Some(net) = net(text) {
            return Ok(Self { net, port: None });
        }
        let (host, port) = match text.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
            Some((host, "")) => (host, None),
            Some((host, port)) => (host, port.strip_prefix(':')),
            None => text.rsplit_once(':').map(|(host, port)| (host, Some(port))).ok_or(DestinationError)?,
        };
        let net = net(host).ok_or(DestinationError)?;
        let port = match port {
            None if text.ends_with(']') => None,
            None => return Err(DestinationError),
            Some(port) => Some(port.parse().map_err(|_| DestinationError)?),
        };
        Ok(Self { net, port })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;

    #[test]
    fn destinations() {
        for (text, net, port) in [
            ("10.0.0.0/8", "10.0.0.0/8", None),
            ("10.0.0.1", "10.0.0.1/32", None),
            ("10.0.0.0/8:53", "10.0.0.0/8", Some(53)),
            ("10.0.0.1:53", "10.0.0.1/32", Some(53)),
            ("2001:db8::1", "2001:db8::1/128", None),
            ("2001:db8::/32", "2001:db8::/32", None),
            ("[2001:db8::/32]:443", "2001:db8::/32", Some(443)),
            ("[2001:db8::1]", "2001:db8::1/128", None),
        ] {
            let parsed: Destination = text.parse().unwrap();
            assert_eq!((parsed.net.to_string().as_str(), parsed.port), (net, port), "{text}");
        }
        for bad in
            ["", "x", "10.0.0.1:", "10.0.0.1:99999", "[2001:db8::1]443", "[2001:db8::1]:", "10.0.0.0/33"]
        {
            assert!(bad.parse::<Destination>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_destination_without_a_port_takes_any() {
        let any: Destination = "10.0.0.0/8".parse().unwrap();
        let dns: Destination = "10.0.0.0/8:53".parse().unwrap();
        assert!(any.contains([10, 1, 1, 1].into(), 1) && any.contains([10, 1, 1, 1].into(), 53));
        assert!(!dns.contains([10, 1, 1, 1].into(), 1) && dns.contains([10, 1, 1, 1].into(), 53));
        assert!(!any.contains([11, 1, 1, 1].into(), 1));
    }
}
