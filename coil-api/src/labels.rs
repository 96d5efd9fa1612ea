//! Syntax of label keys, label values and object names, and evaluation of label selectors.

use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, LabelSelectorRequirement};

use crate::violation::{Problem, Violation};

/// A text that is not what its place demands.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not {expected}")]
pub struct SyntaxError {
    /// The text.
    pub text: String,
    /// What it should have been.
    pub expected: Expected,
}

/// Kinds of names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expected {
    /// Key of a label or annotation.
    LabelKey,
    /// Value of a label.
    LabelValue,
    /// Name of most objects.
    Subdomain,
    /// Name of a namespace.
    Dns1123Label,
    /// Name of a Service.
    Dns1035Label,
}

impl std::fmt::Display for Expected {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::LabelKey => "a label key (an optional DNS prefix and '/', then at most 63 letters, digits, '-', '_', '.', with a letter or digit at both ends)",
            Self::LabelValue => "a label value (empty, or at most 63 letters, digits, '-', '_', '.', with a letter or digit at both ends)",
            Self::Subdomain => "an object name (at most 253 lower-case letters, digits, '-', '.')",
            Self::Dns1123Label => "a namespace name (at most 63 lower-case letters, digits, '-')",
            Self::Dns1035Label => "a Service name (at most 63 lower-case letters, digits, '-', starting with a letter)",
        })
    }
}

/// Checks a text against a kind of name.
///
/// # Errors
/// The text is not of that kind.
pub fn check(text: &str, expected: Expected) -> Result<(), SyntaxError> {
    let good = match expected {
        Expected::LabelKey => match text.split_once('/') {
            Some((prefix, name)) => is_subdomain(prefix) && is_qualified(name),
            None => is_qualified(text),
        },
        Expected::LabelValue => text.is_empty() || is_qualified(text),
        Expected::Subdomain => is_subdomain(text),
        Expected::Dns1123Label => is_dns_label(text),
        Expected::Dns1035Label => is_dns_label(text) && text.starts_with(|c: char| c.is_ascii_lowercase()),
    };
    if good { Ok(()) } else { Err(SyntaxError { text: text.to_owned(), expected }) }
}

fn is_qualified(text: &str) -> bool {
    let bytes = text.as_bytes();
    let (Some(first), Some(last)) = (bytes.first(), bytes.last()) else {
        return false;
    };
    bytes.len() <= 63
        && first.is_ascii_alphanumeric()
        && last.is_ascii_alphanumeric()
        && bytes.iter().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'))
}

fn is_lower_label(text: &str) -> bool {
    let bytes = text.as_bytes();
    let plain = |b: &u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    bytes.first().is_some_and(plain)
        && bytes.last().is_some_and(plain)
        && bytes.iter().all(|b| plain(b) || *b == b'-')
}

fn is_dns_label(text: &str) -> bool {
    text.len() <= 63 && is_lower_label(text)
}

fn is_subdomain(text: &str) -> bool {
    text.len() <= 253 && text.split('.').all(is_lower_label)
}

/// Whether a selector selects a set of labels. An empty selector selects everything; one with an
/// unknown operator or missing values selects nothing.
#[must_use]
pub fn selects(selector: &LabelSelector, labels: &BTreeMap<String, String>) -> bool {
    let by_labels = selector.match_labels.iter().flatten().all(|(key, value)| labels.get(key) == Some(value));
    by_labels && selector.match_expressions.iter().flatten().all(|requirement| meets(requirement, labels))
}

fn meets(requirement: &LabelSelectorRequirement, labels: &BTreeMap<String, String>) -> bool {
    let value = labels.get(&requirement.key);
    let values = requirement.values.as_deref().unwrap_or_default();
    match requirement.operator.as_str() {
        "In" => value.is_some_and(|v| values.contains(v)),
        "NotIn" => !values.is_empty() && value.is_none_or(|v| !values.contains(v)),
        "Exists" => value.is_some(),
        "DoesNotExist" => value.is_none(),
        _ => false,
    }
}

/// Checks a selector and adds what is wrong with it.
pub(crate) fn check_selector(field: &str, selector: &LabelSelector, found: &mut Vec<Violation>) {
    for (key, value) in selector.match_labels.iter().flatten() {
        let field = format!("{field}.matchLabels");
        if let Err(error) = check(key, Expected::LabelKey) {
            found.push(Violation::new(&field, error));
        }
        if let Err(error) = check(value, Expected::LabelValue) {
            found.push(Violation::new(format!("{field}[{key}]"), error));
        }
    }
    for (index, requirement) in selector.match_expressions.iter().flatten().enumerate() {
        let field = format!("{field}.matchExpressions[{index}]");
        if let Err(error) = check(&requirement.key, Expected::LabelKey) {
            found.push(Violation::new(format!("{field}.key"), error));
        }
        let has_values = requirement.values.as_ref().is_some_and(|v| !v.is_empty());
        let needs = |operator, needs| Problem::SelectorValues { operator, needs };
        match (requirement.operator.as_str(), has_values) {
            ("In" | "NotIn", true) | ("Exists" | "DoesNotExist", false) => {}
            ("In", false) => {
                found.push(Violation::new(format!("{field}.values"), needs("In", "needs values")))
            }
            ("NotIn", false) => {
                found.push(Violation::new(format!("{field}.values"), needs("NotIn", "needs values")))
            }
            ("Exists", true) => {
                found.push(Violation::new(format!("{field}.values"), needs("Exists", "takes no values")))
            }
            ("DoesNotExist", true) => {
                found.push(Violation::new(
                    format!("{field}.values"),
                    needs("DoesNotExist", "takes no values"),
                ));
            }
            (other, _) => found.push(Violation::new(
                format!("{field}.operator"),
                Problem::NotOneOf { value: other.to_owned(), allowed: "In, NotIn, Exists, DoesNotExist" },
            )),
        }
        for value in requirement.values.iter().flatten() {
            if let Err(error) = check(value, Expected::LabelValue) {
                found.push(Violation::new(format!("{field}.values"), error));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
    }

    fn expression(key: &str, operator: &str, values: &[&str]) -> LabelSelector {
        LabelSelector {
            match_labels: None,
            match_expressions: Some(vec![LabelSelectorRequirement {
                key: key.to_owned(),
                operator: operator.to_owned(),
                values: (!values.is_empty()).then(|| values.iter().map(|v| (*v).to_owned()).collect()),
            }]),
        }
    }

    #[test]
    fn names() {
        for (text, expected, good) in [
            ("app.kubernetes.io/name", Expected::LabelKey, true),
            ("name_1", Expected::LabelKey, true),
            ("", Expected::LabelKey, false),
            ("/a", Expected::LabelKey, false),
            ("a/", Expected::LabelKey, false),
            ("a/b/c", Expected::LabelKey, false),
            ("UPPER.io/a", Expected::LabelKey, false),
            ("-a", Expected::LabelKey, false),
            ("", Expected::LabelValue, true),
            ("a b", Expected::LabelValue, false),
            ("a.b", Expected::Subdomain, true),
            ("a..b", Expected::Subdomain, false),
            ("1a", Expected::Dns1123Label, true),
            ("1a", Expected::Dns1035Label, false),
            ("a.b", Expected::Dns1035Label, false),
        ] {
            assert_eq!(check(text, expected).is_ok(), good, "{text:?} as {expected:?}");
        }
        assert!(check(&"a".repeat(63), Expected::Dns1035Label).is_ok());
        assert!(check(&"a".repeat(64), Expected::Dns1035Label).is_err());
    }

    #[test]
    fn selectors_evaluate_as_kubernetes_does() {
        let pod = labels(&[("app", "web"), ("tier", "front")]);
        assert!(selects(&LabelSelector::default(), &pod));
        for (selector, want) in [
            (expression("app", "In", &["web", "db"]), true),
            (expression("app", "In", &["db"]), false),
            (expression("none", "In", &["db"]), false),
            (expression("app", "NotIn", &["db"]), true),
            (expression("app", "NotIn", &["web"]), false),
            (expression("none", "NotIn", &["db"]), true),
            (expression("app", "Exists", &[]), true),
            (expression("none", "Exists", &[]), false),
            (expression("app", "DoesNotExist", &[]), false),
            (expression("none", "DoesNotExist", &[]), true),
            (expression("app", "Like", &["web"]), false),
            (expression("app", "In", &[]), false),
            (expression("app", "NotIn", &[]), false),
        ] {
            assert_eq!(selects(&selector, &pod), want, "{selector:?}");
        }
        let both = LabelSelector {
            match_labels: Some(labels(&[("tier", "front")])),
            ..expression("app", "In", &["db"])
        };
        assert!(!selects(&both, &pod));
    }

    #[test]
    fn bad_selectors_are_reported() {
        for (selector, count) in [
            (expression("app", "In", &["web"]), 0),
            (expression("app", "In", &[]), 1),
            (expression("app", "Exists", &["x"]), 1),
            (expression("app", "Like", &["x"]), 1),
            (expression("-", "In", &["a b"]), 2),
        ] {
            let mut found = Vec::new();
            check_selector("spec.clients[0].podSelector", &selector, &mut found);
            assert_eq!(found.len(), count, "{found:?}");
        }
    }
}
