//! Label and field selectors.

use serde_json::Value;

use super::error::{ApiError, ApiResult};
use super::obj;

#[derive(Debug, Clone, PartialEq, Eq)]
enum Requirement {
    In(String, Vec<String>),
    NotIn(String, Vec<String>),
    Exists(String),
    Absent(String),
}

/// A parsed label selector.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Labels(Vec<Requirement>);

impl Labels {
    /// Parses the text form, for example `a=b,c in (d,e),!f`.
    pub fn parse(text: &str) -> ApiResult<Self> {
        let mut requirements = Vec::new();
        for part in split_outside_parens(text) {
            let part = part.trim();
            if !part.is_empty() {
                requirements.push(parse_requirement(part).ok_or_else(|| {
                    ApiError::bad_request(format!(
                        "unable to parse requirement: found '{part}', expected: a label selector requirement"
                    ))
                })?);
            }
        }
        Ok(Self(requirements))
    }

    /// From a `LabelSelector` object. An absent selector matches nothing, an empty one everything.
    pub fn from_object(selector: &Value) -> Option<Self> {
        if !selector.is_object() {
            return None;
        }
        let mut requirements: Vec<Requirement> = obj::map(selector, &["matchLabels"])
            .into_iter()
            .flatten()
            .map(|(key, value)| {
                Requirement::In(key.clone(), vec![value.as_str().unwrap_or_default().to_owned()])
            })
            .collect();
        for one in obj::items(selector, &["matchExpressions"]) {
            let key = obj::text(one, &["key"]).to_owned();
            let values =
                obj::items(one, &["values"]).iter().filter_map(|v| v.as_str().map(str::to_owned)).collect();
            requirements.push(match obj::text(one, &["operator"]) {
                "In" => Requirement::In(key, values),
                "NotIn" => Requirement::NotIn(key, values),
                "Exists" => Requirement::Exists(key),
                "DoesNotExist" => Requirement::Absent(key),
                _ => return None,
            });
        }
        Some(Self(requirements))
    }

    /// From a plain map of labels, as services and replication controllers have it.
    pub fn from_map(labels: Option<&serde_json::Map<String, Value>>) -> Self {
        Self(
            labels
                .into_iter()
                .flatten()
                .map(|(key, value)| {
                    Requirement::In(key.clone(), vec![value.as_str().unwrap_or_default().to_owned()])
                })
                .collect(),
        )
    }

    /// Whether an object's labels match.
    pub fn matches(&self, object: &Value) -> bool {
        self.matches_map(obj::map(object, &["metadata", "labels"]))
    }

    /// Whether a map of labels matches.
    pub fn matches_map(&self, labels: Option<&serde_json::Map<String, Value>>) -> bool {
        let get = |key: &str| labels.and_then(|labels| labels.get(key)).and_then(Value::as_str);
        self.0.iter().all(|one| match one {
            Requirement::In(key, values) => get(key).is_some_and(|value| values.iter().any(|v| v == value)),
            Requirement::NotIn(key, values) => get(key).is_none_or(|value| values.iter().all(|v| v != value)),
            Requirement::Exists(key) => get(key).is_some(),
            Requirement::Absent(key) => get(key).is_none(),
        })
    }

    /// Whether it selects everything.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl std::fmt::Display for Labels {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let parts: Vec<String> = self
            .0
            .iter()
            .map(|one| match one {
                Requirement::In(key, values) if values.len() == 1 => format!("{key}={}", values[0]),
                Requirement::In(key, values) => format!("{key} in ({})", values.join(",")),
                Requirement::NotIn(key, values) => format!("{key} notin ({})", values.join(",")),
                Requirement::Exists(key) => key.clone(),
                Requirement::Absent(key) => format!("!{key}"),
            })
            .collect();
        f.write_str(&parts.join(","))
    }
}

fn split_outside_parens(text: &str) -> Vec<&str> {
    let (mut parts, mut depth, mut start) = (Vec::new(), 0_usize, 0);
    for (index, byte) in text.bytes().enumerate() {
        match byte {
            b'(' => depth += 1,
            b')' => depth = depth.saturating_sub(1),
            b',' if depth == 0 => {
                parts.push(&text[start..index]);
                start = index + 1;
            }
            _ => {}
        }
    }
    parts.push(&text[start..]);
    parts
}

fn parse_requirement(part: &str) -> Option<Requirement> {
    let is_key = |key: &str| {
        !key.is_empty()
            && key.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_' | '/'))
    };
    let key = |text: &str| Some(text.trim()).filter(|text| is_key(text)).map(str::to_owned);
    if let Some(rest) = part.strip_suffix(')') {
        let (head, list) = rest.split_once('(')?;
        let values = list.split(',').map(|one| one.trim().to_owned()).collect();
        let head = head.trim();
        return if let Some(name) = head.strip_suffix(" notin") {
            Some(Requirement::NotIn(key(name)?, values))
        } else {
            Some(Requirement::In(key(head.strip_suffix(" in")?)?, values))
        };
    }
    if let Some((name, value)) = part.split_once("!=") {
        return Some(Requirement::NotIn(key(name)?, vec![value.trim().to_owned()]));
    }
    if let Some((name, value)) = part.split_once("==").or_else(|| part.split_once('=')) {
        return Some(Requirement::In(key(name)?, vec![value.trim().to_owned()]));
    }
    if let Some(name) = part.strip_prefix('!') {
        return Some(Requirement::Absent(key(name)?));
    }
    Some(Requirement::Exists(key(part)?))
}

/// A parsed field selector: path, value, whether equal.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Fields(Vec<(String, String, bool)>);

/// Fields that can be selected by, beside name and namespace; paths of core resources.
const SELECTABLE: &[(&str, &[&str])] = &[
    (
        "pods",
        &[
            "spec.nodeName",
            "status.phase",
            "spec.restartPolicy",
            "spec.schedulerName",
            "spec.serviceAccountName",
            "status.podIP",
            "status.nominatedNodeName",
            "spec.hostNetwork",
        ],
    ),
    (
        "events",
        &[
            "involvedObject.kind",
            "involvedObject.namespace",
            "involvedObject.name",
            "involvedObject.uid",
            "involvedObject.apiVersion",
            "involvedObject.resourceVersion",
            "involvedObject.fieldPath",
            "reason",
            "reportingComponent",
            "source",
            "type",
            "regarding.kind",
            "regarding.name",
            "regarding.namespace",
            "regarding.uid",
        ],
    ),
    ("nodes", &["spec.unschedulable"]),
    ("namespaces", &["status.phase"]),
    ("secrets", &["type"]),
    ("services", &["spec.clusterIP", "spec.type"]),
    ("replicasets", &["status.replicas"]),
    ("jobs", &["status.successful"]),
];

impl Fields {
    /// Parses the text form for a resource; an unknown field is refused.
    pub fn parse(text: &str, resource: &str) -> ApiResult<Self> {
        let mut all = Vec::new();
        for part in text.split(',').map(str::trim).filter(|part| !part.is_empty()) {
            let (field, value, equal) = if let Some((field, value)) = part.split_once("!=") {
                (field, value, false)
            } else if let Some((field, value)) = part.split_once("==").or_else(|| part.split_once('=')) {
                (field, value, true)
            } else {
                return Err(ApiError::bad_request(format!(
                    "invalid selector: '{text}'; can't understand '{part}'"
                )));
            };
            let known = ["metadata.name", "metadata.namespace"].contains(&field)
                || SELECTABLE.iter().any(|(name, fields)| *name == resource && fields.contains(&field));
            if !known {
                return Err(ApiError::bad_request(format!("field label not supported: {field}")));
            }
            all.push((field.to_owned(), value.to_owned(), equal));
        }
        Ok(Self(all))
    }

    /// Whether an object matches.
    pub fn matches(&self, object: &Value) -> bool {
        self.0.iter().all(|(field, value, equal)| {
            let field = match field.strip_prefix("regarding.") {
                Some(rest) => format!("involvedObject.{rest}"),
                None if field == "source" => "source.component".to_owned(),
                None => field.clone(),
            };
            let found = field.split('.').try_fold(object, |value, key| value.get(key));
            let found = match found {
                Some(Value::String(text)) => text.clone(),
                Some(Value::Null) | None => match field.as_str() {
                    "spec.unschedulable" | "spec.hostNetwork" => "false".to_owned(),
                    _ => String::new(),
                },
                Some(other) => other.to_string(),
            };
            (found == *value) == *equal
        })
    }

    /// Whether it selects everything.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The name, if exactly one is asked for.
    pub fn only_name(&self) -> Option<&str> {
        self.0
            .iter()
            .find(|(field, _, equal)| field == "metadata.name" && *equal)
            .map(|(_, name, _)| name.as_str())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use serde_json::json;

    #[test]
    fn label_selectors() {
        let object = json!({"metadata": {"labels": {"a": "1", "app.kubernetes.io/name": "coil"}}});
        for (text, expected) in [
            ("", true),
            ("a=1", true),
            ("a==1,app.kubernetes.io/name=coil", true),
            ("a=2", false),
            ("a!=2", true),
            ("b!=2", true),
            ("a in (1,2)", true),
            ("a notin (1, 2)", false),
            ("a", true),
            ("!a", false),
            ("!b", true),
        ] {
            assert_eq!(Labels::parse(text).unwrap().matches(&object), expected, "{text}");
        }
        assert!(Labels::parse("a b=c").is_err());
        assert!(Labels::parse("a in 1").is_err());
    }

    #[test]
    fn field_selectors() {
        let object = json!({"metadata": {"name": "x"}, "spec": {"nodeName": "n1"}});
        assert!(Fields::parse("spec.nodeName=n1,metadata.name=x", "pods").unwrap().matches(&object));
        assert!(!Fields::parse("spec.nodeName!=n1", "pods").unwrap().matches(&object));
        assert!(Fields::parse("status.phase=", "pods").unwrap().matches(&object));
        assert!(Fields::parse("spec.image=x", "pods").is_err());
        assert!(Fields::parse("metadata.name", "pods").is_err());
    }
}
