//! What is wrong with an object: a field and a problem, told apart by variant, printed for people.

use std::fmt;

use ipnet::IpNet;

use crate::destination::DestinationError;
use crate::labels::SyntaxError;

/// A field whose value is not allowed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    /// Path of the field, as `spec.destinations[1]`.
    pub field: String,
    /// What is wrong with it.
    pub problem: Problem,
}

/// Why a value is not allowed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Problem {
    /// Nothing given where something is needed.
    #[error("at least one is required")]
    Empty,
    /// Not a destination.
    #[error(transparent)]
    Destination(#[from] DestinationError),
    /// Number below its minimum.
    #[error("{value} is less than {minimum}")]
    TooSmall {
        /// The value.
        value: i64,
        /// The least value allowed.
        minimum: i64,
    },
    /// Number above its maximum.
    #[error("{value} is more than {maximum}")]
    TooLarge {
        /// The value.
        value: i64,
        /// The greatest value allowed.
        maximum: i64,
    },
    /// Not a percentage from 0% to 100%.
    #[error("{0:?} is not a percentage from \"0%\" to \"100%\"")]
    Percentage(String),
    /// Two fields that exclude each other.
    #[error("cannot be set together with {0}")]
    Exclusive(&'static str),
    /// A value outside a fixed list.
    #[error("{value:?} is not one of {allowed}")]
    NotOneOf {
        /// The value.
        value: String,
        /// The values allowed.
        allowed: &'static str,
    },
    /// Not a label key, label value or object name.
    #[error(transparent)]
    Syntax(#[from] SyntaxError),
    /// A selector operator that needs values has none, or the other way round.
    #[error("operator {operator} {needs}")]
    SelectorValues {
        /// The operator.
        operator: &'static str,
        /// What it needs.
        needs: &'static str,
    },
    /// A value that would keep egress pods from working.
    #[error("cannot be {value}: {why}")]
    Unusable {
        /// The value.
        value: &'static str,
        /// What would go wrong.
        why: &'static str,
    },
    /// Neither family is given.
    #[error("invalid subnet: ipv4 or ipv6 is required")]
    NoSubnet,
    /// A network of the wrong family.
    #[error("invalid {want} subnet: {subnet}")]
    Family {
        /// The network.
        subnet: String,
        /// The family that it should be of.
        want: &'static str,
    },
    /// A network without room for a block.
    #[error("too narrow subnet: {subnet} has no room for 2^{bits} addresses")]
    TooNarrow {
        /// The network.
        subnet: String,
        /// Power of two of the addresses of a block.
        bits: i32,
    },
    /// Networks of both families with room for different numbers of addresses.
    #[error("dual stack subnet must be the same size")]
    UnequalSizes,
    /// A network with other families than the first one.
    #[error("has other families than the first subnet; all subnets of a pool must have the same")]
    MixedFamilies,
    /// A network that shares addresses with another.
    #[error("{subnet} overlaps with {other}{}", pool.as_ref().map(|p| format!(" of AddressPool {p}")).unwrap_or_default())]
    Overlap {
        /// The network.
        subnet: IpNet,
        /// The other one.
        other: IpNet,
        /// The pool of the other one, if it is another pool.
        pool: Option<String>,
    },
    /// A value that was changed.
    #[error("unchangeable")]
    Unchangeable,
    /// A list that lost entries.
    #[error("unshrinkable")]
    Unshrinkable,
    /// A pod template that cannot be read as a PodSpec.
    #[error("is not a PodSpec: {0}")]
    PodSpec(String),
}

impl Violation {
    /// A problem of a field.
    pub fn new(field: impl Into<String>, problem: impl Into<Problem>) -> Self {
        Self { field: field.into(), problem: problem.into() }
    }
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.field, self.problem)
    }
}

/// All violations in one line.
#[must_use]
pub fn describe(violations: &[Violation]) -> String {
    violations.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
}
