//! The environment of a container: values, the downward API, config maps and secrets, and `$(NAME)` expansion.

use k8s_openapi::api::core::v1::{ConfigMap, Container, EnvVar, ObjectFieldSelector, Pod, Secret};
use kube::{Api, Client};
use std::collections::BTreeMap;
use std::net::IpAddr;

/// Why a container's environment cannot be made.
#[derive(Debug, thiserror::Error)]
pub(super) enum EnvironmentError {
    #[error("environment variable {name}: the lab knows no field {field}")]
    Field { name: String, field: String },
    #[error("environment variable {name}: {object} has no key {key}")]
    Key { name: String, object: String, key: String },
    #[error("cannot read {object}")]
    Read {
        object: String,
        #[source]
        source: Box<kube::Error>,
    },
}

/// What the downward API can tell beside the pod's object, whose status is written only later.
pub(super) struct Facts<'a> {
    pub(super) pod: &'a Pod,
    pub(super) pod_addresses: &'a [IpAddr],
    pub(super) host_addresses: &'a [IpAddr],
}

/// Variables in the order in which they are defined.
pub(super) async fn resolve(
    client: &Client,
    facts: &Facts<'_>,
    container: &Container,
) -> Result<Vec<(String, String)>, EnvironmentError> {
    let namespace = facts.pod.metadata.namespace.clone().unwrap_or_default();
    let mut variables = Vec::new();
    for source in container.env_from.iter().flatten() {
        let prefix = source.prefix.clone().unwrap_or_default();
        let mut values = BTreeMap::new();
        if let Some(from) = &source.config_map_ref {
            values.extend(config_map(client, &namespace, &from.name, from.optional).await?);
        }
        if let Some(from) = &source.secret_ref {
            values.extend(secret(client, &namespace, &from.name, from.optional).await?);
        }
        variables.extend(values.into_iter().map(|(key, value)| (format!("{prefix}{key}"), value)));
    }
    for variable in container.env.iter().flatten() {
        let value = match (&variable.value, &variable.value_from) {
            (Some(value), _) => Some(expand(value, &variables)),
            (None, Some(_)) => from_source(client, &namespace, facts, variable).await?,
            (None, None) => Some(String::new()),
        };
        if let Some(value) = value {
            variables.push((variable.name.clone(), value));
        }
    }
    Ok(variables)
}

async fn from_source(
    client: &Client,
    namespace: &str,
    facts: &Facts<'_>,
    variable: &EnvVar,
) -> Result<Option<String>, EnvironmentError> {
    let name = &variable.name;
    let Some(source) = &variable.value_from else { return Ok(None) };
    let missing =
        |object: String, key: &str| EnvironmentError::Key { name: name.clone(), object, key: key.to_owned() };
    if let Some(reference) = &source.field_ref {
        return field(facts, name, reference).map(Some);
    }
    if let Some(reference) = &source.config_map_key_ref {
        let value =
            config_map(client, namespace, &reference.name, reference.optional).await?.remove(&reference.key);
        if value.is_none() && reference.optional != Some(true) {
            return Err(missing(format!("config map {}", reference.name), &reference.key));
        }
        return Ok(value);
    }
    if let Some(reference) = &source.secret_key_ref {
        let value =
            secret(client, namespace, &reference.name, reference.optional).await?.remove(&reference.key);
        if value.is_none() && reference.optional != Some(true) {
            return Err(missing(format!("secret {}", reference.name), &reference.key));
        }
        return Ok(value);
    }
    let field = source.resource_field_ref.as_ref().map_or("unknown", |reference| reference.resource.as_str());
    Err(EnvironmentError::Field { name: name.clone(), field: field.to_owned() })
}

fn field(facts: &Facts<'_>, name: &str, reference: &ObjectFieldSelector) -> Result<String, EnvironmentError> {
    let metadata = &facts.pod.metadata;
    let spec = facts.pod.spec.as_ref();
    let path = reference.field_path.as_str();
    let join = |addresses: &[IpAddr]| addresses.iter().map(ToString::to_string).collect::<Vec<_>>().join(",");
    let first = |addresses: &[IpAddr]| addresses.first().map(ToString::to_string).unwrap_or_default();
    Ok(match path {
        "metadata.name" => metadata.name.clone().unwrap_or_default(),
        "metadata.namespace" => metadata.namespace.clone().unwrap_or_default(),
        "metadata.uid" => metadata.uid.clone().unwrap_or_default(),
        "spec.nodeName" => spec.and_then(|spec| spec.node_name.clone()).unwrap_or_default(),
        "spec.serviceAccountName" => {
            spec.and_then(|spec| spec.service_account_name.clone()).unwrap_or_default()
        }
        "status.podIP" => first(facts.pod_addresses),
        "status.podIPs" => join(facts.pod_addresses),
        "status.hostIP" => first(facts.host_addresses),
        "status.hostIPs" => join(facts.host_addresses),
        _ => {
            let of = |map: &Option<BTreeMap<String, String>>, key: &str| {
                map.as_ref().and_then(|map| map.get(key).cloned()).unwrap_or_default()
            };
            if let Some(key) = quoted(path, "metadata.labels") {
                of(&metadata.labels, key)
            } else if let Some(key) = quoted(path, "metadata.annotations") {
                of(&metadata.annotations, key)
            } else {
                return Err(EnvironmentError::Field { name: name.to_owned(), field: path.to_owned() });
            }
        }
    })
}

/// The key of a path such as `metadata.labels['app']`.
fn quoted<'a>(path: &'a str, prefix: &str) -> Option<&'a str> {
    path.strip_prefix(prefix)?.strip_prefix("['")?.strip_suffix("']")
}

async fn config_map(
    client: &Client,
    namespace: &str,
    name: &str,
    optional: Option<bool>,
) -> Result<BTreeMap<String, String>, EnvironmentError> {
    let api: Api<ConfigMap> = Api::namespaced(client.clone(), namespace);
    match api.get_opt(name).await {
        Ok(Some(map)) => Ok(map.data.unwrap_or_default()),
        Ok(None) if optional == Some(true) => Ok(BTreeMap::new()),
        Ok(None) => Err(EnvironmentError::Key {
            name: "(all)".to_owned(),
            object: format!("namespace {namespace}"),
            key: format!("config map {name}"),
        }),
        Err(source) => {
            Err(EnvironmentError::Read { object: format!("config map {name}"), source: Box::new(source) })
        }
    }
}

async fn secret(
    client: &Client,
    namespace: &str,
    name: &str,
    optional: Option<bool>,
) -> Result<BTreeMap<String, String>, EnvironmentError> {
    let api: Api<Secret> = Api::namespaced(client.clone(), namespace);
    match api.get_opt(name).await {
        Ok(Some(secret)) => Ok(secret
            .data
            .unwrap_or_default()
            .into_iter()
            .map(|(key, value)| (key, String::from_utf8_lossy(&value.0).into_owned()))
            .collect()),
        Ok(None) if optional == Some(true) => Ok(BTreeMap::new()),
        Ok(None) => Err(EnvironmentError::Key {
            name: "(all)".to_owned(),
            object: format!("namespace {namespace}"),
            key: format!("secret {name}"),
        }),
        Err(source) => {
            Err(EnvironmentError::Read { object: format!("secret {name}"), source: Box::new(source) })
        }
    }
}

/// Replaces `$(NAME)` by the variable's value; `$$` stands for one `$`, and an unknown name stays as it is.
pub(super) fn expand(text: &str, variables: &[(String, String)]) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('$') {
        out.push_str(&rest[..at]);
        rest = &rest[at + 1..];
        if let Some(after) = rest.strip_prefix('$') {
            out.push('$');
            rest = after;
        } else if let Some((name, after)) = rest.strip_prefix('(').and_then(|inner| inner.split_once(')')) {
            match variables.iter().rev().find(|(known, _)| known == name) {
                Some((_, value)) => out.push_str(value),
                None => {
                    out.push_str("$(");
                    out.push_str(name);
                    out.push(')');
                }
            }
            rest = after;
        } else {
            out.push('$');
        }
    }
    out + rest
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]
    use super::*;

    #[test]
    fn expansion_as_kubernetes_does_it() {
        let variables = [("A".to_owned(), "1".to_owned()), ("B".to_owned(), "2".to_owned())];
        for (text, expected) in [
            ("plain", "plain"),
            ("$(A)-$(B)", "1-2"),
            ("$$(A)", "$(A)"),
            ("$(C)", "$(C)"),
            ("$(A", "$(A"),
            ("a$", "a$"),
            ("$A", "$A"),
        ] {
            assert_eq!(expand(text, &variables), expected);
        }
    }

    #[test]
    fn downward_fields() {
        let pod: Pod = serde_json::from_value(serde_json::json!({
            "metadata": { "name": "web", "namespace": "shop", "uid": "u-1", "labels": { "app": "x" } },
            "spec": { "nodeName": "worker1", "containers": [] },
        }))
        .unwrap();
        let addresses: Vec<IpAddr> = vec!["10.0.0.1".parse().unwrap(), "fd00::1".parse().unwrap()];
        let facts = Facts { pod: &pod, pod_addresses: &addresses, host_addresses: &addresses[..1] };
        let value = |path: &str| {
            let reference = ObjectFieldSelector { field_path: path.to_owned(), ..Default::default() };
            field(&facts, "X", &reference)
        };
        assert_eq!(value("status.podIPs").unwrap(), "10.0.0.1,fd00::1");
        assert_eq!(value("status.hostIP").unwrap(), "10.0.0.1");
        assert_eq!(value("metadata.labels['app']").unwrap(), "x");
        assert_eq!(value("metadata.uid").unwrap(), "u-1");
        assert!(value("status.nonsense").is_err());
    }
}
