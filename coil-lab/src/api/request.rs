//! Reads a request's path, query, headers and body.

use axum::http::{HeaderMap, Method, Uri, header};
use serde_json::Value;

use super::error::{ApiError, ApiResult};
use super::protobuf::ProtobufError;

/// What the path of a resource request names.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Target {
    /// API group, empty for core.
    pub group: String,
    /// Version.
    pub version: String,
    /// Namespace, if the path has one.
    pub namespace: Option<String>,
    /// Plural resource name.
    pub resource: String,
    /// Object name, if the path has one.
    pub name: Option<String>,
    /// Subresource.
    pub subresource: Option<String>,
}

impl Target {
    /// Parses the path after `/api` or `/apis`; none if it is no resource path.
    pub fn parse(path: &str) -> Option<Self> {
        let parts: Vec<String> =
            path.split('/').filter(|part| !part.is_empty()).map(percent_decode).collect();
        let mut parts: Vec<&str> = parts.iter().map(String::as_str).collect();
        let mut target = Self::default();
        match parts.first().copied()? {
            "api" if parts.len() >= 3 => {
                target.version = parts[1].to_owned();
                parts.drain(..2);
            }
            "apis" if parts.len() >= 4 => {
                target.group = parts[1].to_owned();
                target.version = parts[2].to_owned();
                parts.drain(..3);
            }
            _ => return None,
        }
        // `namespaces/x/finalize` and `namespaces/x/status` are subresources of the namespace itself.
        let is_namespaced = parts[0] == "namespaces"
            && parts.len() >= 3
            && !(target.group.is_empty() && ["finalize", "status"].contains(&parts[2]) && parts.len() == 3);
        if is_namespaced {
            target.namespace = Some(parts[1].to_owned());
            parts.drain(..2);
        }
        target.resource = parts[0].to_owned();
        target.name = parts.get(1).map(|&part| part.to_owned());
        target.subresource = parts.get(2).map(|&part| part.to_owned());
        if parts.len() > 3 {
            return None;
        }
        Some(target)
    }
}

fn percent_decode(part: &str) -> String {
    let bytes = part.as_bytes();
    let mut decoded = Vec::with_capacity(bytes.len());
    let mut index = 0;
    while index < bytes.len() {
        let escaped = (bytes[index] == b'%')
            .then(|| part.get(index + 1..index + 3).and_then(|hex| u8::from_str_radix(hex, 16).ok()))
            .flatten();
        match escaped {
            Some(byte) => {
                decoded.push(byte);
                index += 3;
            }
            None => {
                decoded.push(bytes[index]);
                index += 1;
            }
        }
    }
    String::from_utf8_lossy(&decoded).into_owned()
}

/// Query parameters.
#[derive(Debug, Clone, Default)]
pub struct Query(Vec<(String, String)>);

impl Query {
    /// From a request's address; an unreadable query counts as none.
    pub fn of(uri: &Uri) -> Self {
        let pairs = axum::extract::Query::<Vec<(String, String)>>::try_from_uri(uri);
        Self(pairs.map(|pairs| pairs.0).unwrap_or_default())
    }

    /// A parameter's text, empty when absent.
    pub fn get(&self, name: &str) -> &str {
        self.0.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str()).unwrap_or_default()
    }

    /// Whether a parameter is there at all.
    pub fn has(&self, name: &str) -> bool {
        self.0.iter().any(|(key, _)| key == name)
    }

    /// A parameter as truth: present and not `false` or `0`.
    pub fn flag(&self, name: &str) -> bool {
        self.has(name) && !matches!(self.get(name), "false" | "0")
    }

    /// A numeric parameter.
    pub fn number(&self, name: &str) -> Option<u64> {
        self.get(name).parse().ok()
    }

    /// Whether the write is only tried.
    pub fn dry_run(&self) -> ApiResult<bool> {
        match self.get("dryRun") {
            "" => Ok(false),
            "All" => Ok(true),
            other => Err(ApiError::bad_request(format!(
                "dryRun: Unsupported value: \"{other}\": supported values: \"All\""
            ))),
        }
    }
}

/// What to do about fields that the schema does not know.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FieldValidation {
    /// Drop them.
    Ignore,
    /// Drop them and warn.
    Warn,
    /// Refuse.
    Strict,
}

/// A request, read.
#[derive(Debug, Clone)]
pub struct Request {
    /// Method.
    pub method: Method,
    /// Query.
    pub query: Query,
    /// Accept header.
    pub accept: String,
    /// Content type without parameters.
    pub content_type: String,
    /// First word of the user agent.
    pub agent: String,
}

impl Request {
    /// From the head of a request.
    pub fn read(method: &Method, uri: &Uri, headers: &HeaderMap) -> Self {
        let text = |name| headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default();
        let agent = text(header::USER_AGENT).split('/').next().unwrap_or_default();
        Self {
            method: method.clone(),
            query: Query::of(uri),
            accept: text(header::ACCEPT).to_owned(),
            content_type: text(header::CONTENT_TYPE)
                .split(';')
                .next()
                .unwrap_or_default()
                .trim()
                .to_ascii_lowercase(),
            agent: if agent.is_empty() { "unknown".to_owned() } else { agent.to_owned() },
        }
    }

    /// The field manager of a write.
    pub fn manager(&self) -> &str {
        match self.query.get("fieldManager") {
            "" => &self.agent,
            named => named,
        }
    }

    /// The wished treatment of unknown fields.
    pub fn field_validation(&self) -> ApiResult<FieldValidation> {
        match self.query.get("fieldValidation") {
            "" | "Warn" => Ok(FieldValidation::Warn),
            "Ignore" => Ok(FieldValidation::Ignore),
            "Strict" => Ok(FieldValidation::Strict),
            other => Err(ApiError::bad_request(format!(
                "fieldValidation: Unsupported value: \"{other}\": supported values: \"Ignore\", \"Strict\", \"Warn\""
            ))),
        }
    }

    /// Whether YAML is wanted rather than JSON.
    pub fn wants_yaml(&self) -> bool {
        self.accept.trim_start().starts_with("application/yaml")
    }

    /// The version of the Table form, if the client prefers it.
    pub fn wants_table(&self) -> Option<&'static str> {
        self.accepted_as("Table")
    }

    /// The version of the PartialObjectMetadata form, if the client prefers it.
    pub fn wants_metadata(&self) -> Option<&'static str> {
        self.accepted_as("PartialObjectMetadataList").or_else(|| self.accepted_as("PartialObjectMetadata"))
    }

    fn accepted_as(&self, form: &str) -> Option<&'static str> {
        for part in self.accept.split(',') {
            let mut parameters = part.split(';').map(str::trim);
            let media = parameters.next().unwrap_or_default();
            let parameters: Vec<&str> = parameters.collect();
            let is_json = matches!(media, "application/json" | "*/*" | "application/*" | "application/yaml");
            let form_of = parameters.iter().find_map(|one| one.strip_prefix("as="));
            if is_json && form_of == Some(form) {
                return match parameters.iter().find_map(|one| one.strip_prefix("v=")) {
                    Some("v1") => Some("v1"),
                    Some("v1beta1") => Some("v1beta1"),
                    _ => continue,
                };
            }
            if is_json && form_of.is_none() {
                return None;
            }
        }
        None
    }

    /// Whether any form that we can send is accepted.
    pub fn is_acceptable(&self) -> bool {
        self.accept.trim().is_empty()
            || self.accept.split(',').any(|part| {
                let mut parameters = part.split(';').map(str::trim);
                let media = parameters.next().unwrap_or_default();
                matches!(
                    media,
                    "application/json" | "*/*" | "application/*" | "application/yaml" | "text/plain"
                )
            })
    }
}

/// A parsed body with the paths of keys that it repeats.
#[derive(Debug, Default)]
pub struct Body {
    /// The value.
    pub value: Value,
    /// Paths of repeated keys.
    pub duplicates: Vec<String>,
}

/// Parses JSON or YAML by content type.
pub fn parse_body(content_type: &str, bytes: &[u8]) -> ApiResult<Body> {
    match content_type {
        "" | "application/json" | "text/json" | "*/*" => super::strict_json::parse(bytes)
            .map_err(|error| ApiError::bad_request(format!("the body of the request is not JSON: {error}"))),
        "application/yaml" | "text/yaml" | "application/x-yaml" => {
            parse_yaml(bytes).map(|value| Body { value, duplicates: Vec::new() })
        }
        "application/vnd.kubernetes.protobuf" => match super::protobuf::decode(bytes) {
            Ok(value) => Ok(Body { value, duplicates: Vec::new() }),
            Err(ProtobufError::Kind(_)) => {
                Err(ApiError::unsupported_media_type(&["application/json", "application/yaml"]))
            }
            Err(error) => Err(ApiError::bad_request(error.to_string())),
        },
        _ => Err(ApiError::unsupported_media_type(&["application/json", "application/yaml"])),
    }
}

/// Parses YAML.
pub fn parse_yaml(bytes: &[u8]) -> ApiResult<Value> {
    let text = std::str::from_utf8(bytes)
        .map_err(|error| ApiError::bad_request(format!("the body of the request is not UTF-8: {error}")))?;
    // Only true and false are booleans: a name may be `y` or `on`.
    serde_saphyr::from_str_with_options(text, serde_saphyr::options! { strict_booleans: true })
        .map_err(|error| ApiError::bad_request(format!("the body of the request is not YAML: {error}")))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    #[test]
    fn targets() {
        let target = |path: &str| Target::parse(path).unwrap();
        let pods = target("/api/v1/namespaces/a/pods/x/log");
        assert_eq!(pods.namespace.as_deref(), Some("a"));
        assert_eq!((pods.resource.as_str(), pods.name.as_deref()), ("pods", Some("x")));
        assert_eq!(pods.subresource.as_deref(), Some("log"));
        let namespace = target("/api/v1/namespaces/a");
        assert_eq!((namespace.resource.as_str(), namespace.name.as_deref()), ("namespaces", Some("a")));
        assert_eq!(target("/api/v1/namespaces/a/finalize").subresource.as_deref(), Some("finalize"));
        let named = target("/apis/apps/v1/namespaces/a/deployments");
        assert_eq!((named.group.as_str(), named.name), ("apps", None));
        assert_eq!(target("/apis/g/v2/things/a%3Ab").name.as_deref(), Some("a:b"));
        assert!(Target::parse("/apis/apps/v1").is_none());
        assert!(Target::parse("/api/v1/namespaces/a/pods/x/log/more").is_none());
    }

    #[test]
    fn table_negotiation() {
        let request = |accept: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(header::ACCEPT, accept.parse().unwrap());
            Request::read(&Method::GET, &"/".parse().unwrap(), &headers)
        };
        let kubectl = "application/json;as=Table;v=v1;g=meta.k8s.io,application/json;as=Table;v=v1beta1;g=meta.k8s.io,application/json";
        assert_eq!(request(kubectl).wants_table(), Some("v1"));
        assert_eq!(request("application/json").wants_table(), None);
        assert_eq!(request("application/json, */*").wants_table(), None);
        assert!(request("application/vnd.kubernetes.protobuf,application/json").is_acceptable());
        assert!(!request("application/vnd.kubernetes.protobuf").is_acceptable());
    }
}
