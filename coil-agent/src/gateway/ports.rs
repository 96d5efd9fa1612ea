//! Which ports of the pod's address belong to translation, and which to the pod's own connections.

use std::fs;
use std::io;
use std::ops::RangeInclusive;

/// Where the kernel takes ports of own connections from, both families.
const LOCAL_RANGE: &str = "/proc/sys/net/ipv4/ip_local_port_range";

/// Ports for the pod's own connections, to the API server for example.
const OWN: RangeInclusive<u16> = 64512..=65535;

/// Below are ports that only servers have.
const FIRST: u16 = 1024;

/// Ports that translation may use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NatPorts {
    /// All of them.
    pub range: RangeInclusive<u16>,
    /// Ports in the range that servers of this pod listen on; 0 for none.
    pub excluded: [u16; 5],
}

/// Divides the ports: moves own connections out of the way, or keeps out of theirs if that is not
/// permitted.
pub(crate) fn divide(listening: &[u16]) -> io::Result<NatPorts> {
    // The controller asks for it in the pod's securityContext; inside, /proc/sys may not be writable.
    if fs::read_to_string(LOCAL_RANGE).is_ok_and(|text| is_own(&text)) {
        let range = FIRST..=OWN.start() - 1;
        return Ok(NatPorts { excluded: excluded(&range, listening), range });
    }
    let range = match fs::write(LOCAL_RANGE, format!("{} {}", OWN.start(), OWN.end())) {
        Ok(()) => FIRST..=OWN.start() - 1,
        Err(error) => {
            let text = fs::read_to_string(LOCAL_RANGE)?;
            let range = beside(&text).ok_or(io::ErrorKind::InvalidData)?;
            tracing::warn!(
                %error, path = LOCAL_RANGE, first = range.start(), last = range.end(),
                "cannot move the ports of own connections; translation has fewer",
            );
            range
        }
    };
    Ok(NatPorts { excluded: excluded(&range, listening), range })
}

fn is_own(text: &str) -> bool {
    text.split_whitespace().map(str::parse).eq([Ok(*OWN.start()), Ok(*OWN.end())])
}

/// The larger part beside a range as the kernel writes it.
fn beside(text: &str) -> Option<RangeInclusive<u16>> {
    let mut numbers = text.split_whitespace().map(|number| number.parse::<u16>().ok());
    let (low, high) = (numbers.next()??, numbers.next()??);
    let below = (low > FIRST).then(|| FIRST..=low - 1);
    let above = (high < u16::MAX).then(|| high.max(FIRST - 1) + 1..=u16::MAX);
    [below, above].into_iter().flatten().max_by_key(ExactSizeIterator::len)
}

fn excluded(range: &RangeInclusive<u16>, listening: &[u16]) -> [u16; 5] {
    let mut excluded = [0; 5];
    let mut inside: Vec<u16> = listening.iter().copied().filter(|port| range.contains(port)).collect();
    inside.sort_unstable();
    inside.dedup();
    for (slot, port) in excluded.iter_mut().zip(inside) {
        *slot = port;
    }
    excluded
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_that_is_right_is_left_alone() {
        assert!(is_own("64512\t65535\n"));
        assert!(!is_own("32768\t60999\n"));
        assert!(!is_own("64512"));
    }

    #[test]
    fn translation_keeps_out_of_the_range_of_own_connections() {
        assert_eq!(beside("32768\t60999\n"), Some(1024..=32767));
        assert_eq!(beside("1024 30000"), Some(30001..=65535));
        assert_eq!(beside("1024 65535"), None);
        assert_eq!(beside("nonsense"), None);
    }

    #[test]
    fn listening_ports_are_excluded_once() {
        assert_eq!(excluded(&(1024..=64511), &[5555, 8080, 8081, 8080, 80]), [5555, 8080, 8081, 0, 0]);
    }
}
