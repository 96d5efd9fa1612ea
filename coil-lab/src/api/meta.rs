//! Object metadata: names, labels, stamps, generations.

use serde_json::Value;

use super::error::FieldError;
use super::obj;
use super::registry::Resource;

const SUBDOMAIN: &str = "a lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters, '-' or '.', and must start and end with an alphanumeric character (e.g. 'example.com', regex used for validation is '[a-z0-9]([-a-z0-9]*[a-z0-9])?(\\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*')";
const LABEL: &str = "a lowercase RFC 1123 label must consist of lower case alphanumeric characters or '-', and must start and end with an alphanumeric character (e.g. 'my-name',  or '123-abc', regex used for validation is '[a-z0-9]([-a-z0-9]*[a-z0-9])?')";
const SERVICE: &str = "a DNS-1035 label must consist of lower case alphanumeric characters or '-', start with an alphabetic character, and end with an alphanumeric character (e.g. 'my-name',  or 'abc-123', regex used for validation is '[a-z]([-a-z0-9]*[a-z0-9])?')";
const LABEL_VALUE: &str = "a valid label must be an empty string or consist of alphanumeric characters, '-', '_' or '.', and must start and end with an alphanumeric character (e.g. 'MyValue',  or 'my_value',  or '12345', regex used for validation is '(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?')";
const QUALIFIED: &str = "name part must consist of alphanumeric characters, '-', '_' or '.', and must start and end with an alphanumeric character (e.g. 'MyName',  or 'my.name',  or '123-abc', regex used for validation is '([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9]')";

/// All annotations of an object together may have this many bytes.
const ANNOTATIONS_LIMIT: usize = 256 * 1024;

/// Kinds without a spec-driven generation.
const NO_GENERATION: [&str; 22] = [
    "Namespace",
    "Node",
    "Pod",
    "Service",
    "Endpoints",
    "ConfigMap",
    "Secret",
    "ServiceAccount",
    "Event",
    "PersistentVolume",
    "PersistentVolumeClaim",
    "PodTemplate",
    "Lease",
    "Role",
    "RoleBinding",
    "ClusterRole",
    "ClusterRoleBinding",
    "ControllerRevision",
    "StorageClass",
    "LimitRange",
    "ResourceQuota",
    "Scale",
];

/// A random suffix as `generateName` appends it.
pub fn random_suffix() -> String {
    const ALPHABET: &[u8] = b"bcdfghjklmnpqrstvwxz2456789";
    uuid::Uuid::new_v4()
        .as_bytes()
        .iter()
        .take(5)
        .map(|&byte| char::from(ALPHABET[usize::from(byte) % ALPHABET.len()]))
        .collect()
}

/// Whether a text is a DNS label.
pub fn is_dns_label(text: &str) -> bool {
    let ok = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    !text.is_empty()
        && text.len() <= 63
        && text.chars().all(ok)
        && !text.starts_with('-')
        && !text.ends_with('-')
}

fn is_subdomain(text: &str) -> bool {
    text.len() <= 253
        && text.split('.').all(|part| {
            let ok = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
            !part.is_empty() && part.chars().all(ok) && !part.starts_with('-') && !part.ends_with('-')
        })
}

fn is_label_value(text: &str) -> bool {
    let edge = |c: Option<char>| c.is_none_or(|c| c.is_ascii_alphanumeric());
    text.len() <= 63
        && text.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'))
        && edge(text.chars().next())
        && edge(text.chars().last())
}

fn is_qualified_name(text: &str) -> bool {
    let (prefix, name) = match text.split_once('/') {
        Some((prefix, name)) => (Some(prefix), name),
        None => (None, text),
    };
    !name.is_empty()
        && is_label_value(name)
        && prefix.is_none_or(|prefix| is_subdomain(&prefix.to_lowercase()))
}

fn name_violation(resource: &Resource, name: &str) -> Option<&'static str> {
    let kind = resource.kind.as_str();
    if resource.group == "rbac.authorization.k8s.io" {
        let bad = name == "." || name == ".." || name.contains(['/', '%']);
        return bad.then_some("may not contain '/' or '%'");
    }
    match kind {
        "Namespace" => (!is_dns_label(name)).then_some(LABEL),
        "Service" => {
            let ok = is_dns_label(name) && name.starts_with(|c: char| c.is_ascii_lowercase());
            (!ok).then_some(SERVICE)
        }
        _ => (!is_subdomain(name)).then_some(SUBDOMAIN),
    }
}

/// What is wrong with an object's metadata.
pub fn violations(resource: &Resource, object: &Value) -> Vec<FieldError> {
    let mut errors = Vec::new();
    let name = obj::name(object);
    if name.is_empty() {
        errors.push(FieldError::required("metadata.name", "name or generateName is required"));
    } else if let Some(rule) = name_violation(resource, name) {
        errors.push(FieldError::invalid("metadata.name", &name.into(), rule));
    }
    label_violations(object, &["metadata", "labels"], "metadata.labels", &mut errors);
    let annotations = obj::map(object, &["metadata", "annotations"]);
    for key in annotations.into_iter().flatten().map(|(key, _)| key) {
        if !is_qualified_name(key) {
            errors.push(FieldError::invalid("metadata.annotations", &key.as_str().into(), QUALIFIED));
        }
    }
    let size: usize = annotations
        .into_iter()
        .flatten()
        .map(|(key, value)| key.len() + value.as_str().map_or(0, str::len))
        .sum();
    if size > ANNOTATIONS_LIMIT {
        errors.push(FieldError {
            reason: "FieldValueTooLong",
            field: "metadata.annotations".to_owned(),
            message: format!("Too long: may not be more than {ANNOTATIONS_LIMIT} bytes"),
        });
    }
    for finalizer in obj::items(object, &["metadata", "finalizers"]) {
        let text = finalizer.as_str().unwrap_or_default();
        if !is_qualified_name(text) {
            errors.push(FieldError::invalid("metadata.finalizers", finalizer, QUALIFIED));
        }
    }
    errors
}

/// What is wrong with a map of labels.
pub fn label_violations(object: &Value, path: &[&str], field: &str, errors: &mut Vec<FieldError>) {
    for (key, value) in obj::map(object, path).into_iter().flatten() {
        if !is_qualified_name(key) {
            errors.push(FieldError::invalid(field, &key.as_str().into(), QUALIFIED));
        }
        if !value.as_str().is_some_and(is_label_value) {
            errors.push(FieldError::invalid(field, value, LABEL_VALUE));
        }
    }
}

/// Stamps a new object.
pub fn stamp_new(resource: &Resource, object: &mut Value) {
    if obj::name(object).is_empty() {
        let prefix = obj::text(object, &["metadata", "generateName"]).to_owned();
        if !prefix.is_empty() {
            let keep: String = prefix.chars().take(58).collect();
            obj::set(object, &["metadata", "name"], format!("{keep}{}", random_suffix()));
        }
    }
    obj::set(object, &["metadata", "uid"], uuid::Uuid::new_v4().to_string());
    obj::set(object, &["metadata", "creationTimestamp"], obj::now());
    for field in
        ["deletionTimestamp", "deletionGracePeriodSeconds", "selfLink", "generation", "resourceVersion"]
    {
        obj::remove(object, &["metadata", field]);
    }
    if has_generation(resource) {
        obj::set(object, &["metadata", "generation"], 1);
    }
}

/// Carries over what a writer may not change.
pub fn keep_identity(object: &mut Value, old: &Value) {
    for field in [
        "name",
        "namespace",
        "uid",
        "creationTimestamp",
        "deletionTimestamp",
        "deletionGracePeriodSeconds",
        "generation",
        "generateName",
    ] {
        match obj::at(old, &["metadata", field]) {
            Some(value) => obj::set(object, &["metadata", field], value.clone()),
            None => {
                obj::remove(object, &["metadata", field]);
            }
        }
    }
    obj::remove(object, &["metadata", "selfLink"]);
}

/// Raises the generation when something beside metadata and status changed.
pub fn bump_generation(resource: &Resource, object: &mut Value, old: &Value) {
    if has_generation(resource) && wishes(resource, object) != wishes(resource, old) {
        raise_generation(object);
    }
}

/// Raises the generation.
pub fn raise_generation(object: &mut Value) {
    if let Some(generation) = obj::int(object, &["metadata", "generation"]) {
        obj::set(object, &["metadata", "generation"], generation + 1);
    }
}

fn has_generation(resource: &Resource) -> bool {
    resource.custom || !NO_GENERATION.contains(&resource.kind.as_str())
}

/// The object without metadata, and without status where that has its own subresource.
fn wishes<'a>(resource: &Resource, object: &'a Value) -> Vec<(&'a String, &'a Value)> {
    object
        .as_object()
        .into_iter()
        .flatten()
        .filter(|(name, _)| !(*name == "metadata" || resource.status && *name == "status"))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        for good in ["a", "a.b", "a-1", "1"] {
            assert!(is_subdomain(good), "{good}");
        }
        for bad in ["", "A", "a..b", "-a", "a_b", "a/"] {
            assert!(!is_subdomain(bad), "{bad}");
        }
        assert!(is_qualified_name("egress.coil.cybozu.com/ns-1"));
        assert!(!is_qualified_name("a/b/c"));
        assert!(!is_qualified_name("/c"));
        assert_eq!(random_suffix().len(), 5);
    }
}
