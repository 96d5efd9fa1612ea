//! Durations as Go programs write them, which the flags of the original take: `10m`, `1h30m`, `1.5s`.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

/// A duration as the value of a flag; not zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct GoDuration(pub Duration);

/// Not a duration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("want numbers with units, more than zero in all, as 10m, 1h30m or 500ms")]
pub struct DurationError;

/// Units and their nanoseconds; a unit that begins like another comes before it.
const UNITS: [(&str, f64); 7] =
    [("ns", 1.0), ("us", 1e3), ("µs", 1e3), ("ms", 1e6), ("s", 1e9), ("m", 60e9), ("h", 3600e9)];

impl FromStr for GoDuration {
    type Err = DurationError;

    fn from_str(text: &str) -> Result<Self, DurationError> {
        let mut rest = text;
        let mut seconds = 0.0;
        while !rest.is_empty() {
            let digits = rest.find(|c: char| !c.is_ascii_digit() && c != '.').ok_or(DurationError)?;
            let (number, tail) = rest.split_at(digits);
            let number: f64 = number.parse().map_err(|_| DurationError)?;
            let (unit, nanoseconds) =
                UNITS.into_iter().find(|(unit, _)| tail.starts_with(unit)).ok_or(DurationError)?;
            seconds += number * nanoseconds / 1e9;
            rest = &tail[unit.len()..];
        }
        match Duration::try_from_secs_f64(seconds) {
            Ok(duration) if !duration.is_zero() => Ok(Self(duration)),
            _ => Err(DurationError),
        }
    }
}

impl fmt::Display for GoDuration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (whole, nanoseconds) = (self.0.as_secs(), self.0.subsec_nanos());
        if nanoseconds != 0 {
            return write!(f, "{}s", self.0.as_secs_f64());
        }
        let (hours, minutes, seconds) = (whole / 3600, whole / 60 % 60, whole % 60);
        for (number, unit) in [(hours, "h"), (minutes, "m"), (seconds, "s")] {
            if number != 0 {
                write!(f, "{number}{unit}")?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_as_go_writes_them() {
        for (text, want, written) in [
            ("10m", Some(600_000), "10m"),
            ("1h", Some(3_600_000), "1h"),
            ("1h30m", Some(5_400_000), "1h30m"),
            ("90s", Some(90_000), "1m30s"),
            ("1.5s", Some(1_500), "1.5s"),
            ("250ms", Some(250), "0.25s"),
            ("1m0s", Some(60_000), "1m"),
            ("", None, ""),
            ("0s", None, ""),
            ("10", None, ""),
            ("m", None, ""),
            ("-1s", None, ""),
            ("1.2.3s", None, ""),
            ("1d", None, ""),
            ("1s ", None, ""),
            ("99999999999999999999999h", None, ""),
        ] {
            let parsed = text.parse::<GoDuration>();
            assert_eq!(parsed.ok().map(|d| d.0.as_millis()), want, "{text:?}");
            if let Ok(duration) = parsed {
                assert_eq!(duration.to_string(), written);
                assert_eq!(written.parse(), Ok(duration));
            }
        }
    }
}
