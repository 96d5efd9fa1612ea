//! Get and list.

use std::sync::Arc;

use serde_json::{Value, json};

use super::error::{ApiError, ApiResult};
use super::obj;
use super::registry::Resource;
use super::request::Query;
use super::selector::{Fields, Labels};
use super::server::ApiServer;
use super::store::Key;

/// The store's key of an object.
pub fn key(namespace: Option<&str>, name: &str) -> Key {
    (namespace.unwrap_or_default().to_owned(), name.to_owned())
}

/// What a list or watch selects.
#[derive(Debug, Clone, Default)]
pub struct Selection {
    /// Namespace, all when none.
    pub namespace: Option<String>,
    /// Labels.
    pub labels: Labels,
    /// Fields.
    pub fields: Fields,
}

impl Selection {
    /// From a query.
    pub fn read(query: &Query, resource: &Resource, namespace: Option<&str>) -> ApiResult<Self> {
        Ok(Self {
            namespace: namespace.map(str::to_owned),
            labels: Labels::parse(query.get("labelSelector"))?,
            fields: Fields::parse(query.get("fieldSelector"), &resource.plural)?,
        })
    }

    /// Whether an object is selected.
    pub fn matches(&self, object: &Value) -> bool {
        self.namespace.as_deref().is_none_or(|namespace| obj::namespace(object) == namespace)
            && self.labels.matches(object)
            && self.fields.matches(object)
    }
}

/// One page of a list.
#[derive(Debug)]
pub struct Page {
    /// Objects.
    pub objects: Vec<Arc<Value>>,
    /// Version of the picture.
    pub version: u64,
    /// Where to go on, empty at the end.
    pub token: String,
    /// How many are left.
    pub remaining: usize,
}

impl ApiServer {
    /// One object as stored.
    pub fn get(&self, resource: &Resource, namespace: Option<&str>, name: &str) -> ApiResult<Arc<Value>> {
        self.store
            .get(&resource.storage, &key(namespace, name))
            .ok_or_else(|| ApiError::not_found(&resource.plural, &resource.group, name))
    }

    /// All objects of a resource, of a namespace if given.
    pub fn all(&self, resource: &Resource, namespace: Option<&str>) -> Vec<Arc<Value>> {
        self.store.list(&resource.storage, namespace).0
    }

    /// One page of a list as a query asks for it.
    pub fn page(&self, resource: &Resource, selection: &Selection, query: &Query) -> ApiResult<Page> {
        let (mut objects, version) = self.store.list(&resource.storage, selection.namespace.as_deref());
        self.check_list_version(query, version)?;
        objects.retain(|object| selection.matches(object));
        if let Some(after) = continue_after(query.get("continue"))? {
            objects.retain(|object| {
                (obj::namespace(object), obj::name(object)) > (after.0.as_str(), after.1.as_str())
            });
        }
        let limit = query.number("limit").and_then(|limit| usize::try_from(limit).ok()).unwrap_or(0);
        let (mut token, mut remaining) = (String::new(), 0);
        if limit > 0 && objects.len() > limit {
            remaining = objects.len() - limit;
            objects.truncate(limit);
            if let Some(last) = objects.last() {
                token = continue_token(obj::namespace(last), obj::name(last));
            }
        }
        Ok(Page { objects, version, token, remaining })
    }

    fn check_list_version(&self, query: &Query, now: u64) -> ApiResult<()> {
        let (asked, rule) = (query.get("resourceVersion"), query.get("resourceVersionMatch"));
        if !["", "Exact", "NotOlderThan"].contains(&rule) {
            return Err(ApiError::bad_request(format!(
                "resourceVersionMatch: Unsupported value: \"{rule}\": supported values: \"Exact\", \"NotOlderThan\""
            )));
        }
        if asked.is_empty() || asked == "0" {
            return Ok(());
        }
        let version: u64 = asked.parse().map_err(|_| {
            ApiError::bad_request(format!("resourceVersion: Invalid value: \"{asked}\": not a number"))
        })?;
        if version > now {
            return Err(too_large(version, now));
        }
        if rule == "Exact" && version != now {
            return Err(ApiError::expired(format!(
                "The provided resource version {version} is too old, the current one is {now}"
            )));
        }
        Ok(())
    }
}

/// The answer to a version from the future.
pub fn too_large(version: u64, now: u64) -> ApiError {
    ApiError {
        code: 504,
        reason: "Timeout",
        message: format!("Too large resource version: {version}, current: {now}"),
        details: Some(json!({
            "causes": [{"reason": "ResourceVersionTooLarge", "message": "Too large resource version"}],
            "retryAfterSeconds": 1,
        })),
    }
}

fn continue_token(namespace: &str, name: &str) -> String {
    format!("{namespace}/{name}").bytes().map(|byte| format!("{byte:02x}")).collect()
}

fn continue_after(token: &str) -> ApiResult<Option<Key>> {
    if token.is_empty() {
        return Ok(None);
    }
    let bytes: Option<Vec<u8>> = (0..token.len())
        .step_by(2)
        .map(|index| token.get(index..index + 2).and_then(|hex| u8::from_str_radix(hex, 16).ok()))
        .collect();
    let text = bytes.and_then(|bytes| String::from_utf8(bytes).ok());
    let key = text.as_deref().and_then(|text| text.split_once('/'));
    match key {
        Some((namespace, name)) => Ok(Some((namespace.to_owned(), name.to_owned()))),
        None => Err(ApiError::bad_request("continue key is not valid")),
    }
}

/// A list object.
pub fn list_object(resource: &Resource, page: &Page) -> Value {
    let items: Vec<Value> = page.objects.iter().map(|object| present(resource, object)).collect();
    json!({
        "kind": resource.list_kind,
        "apiVersion": resource.api_version(),
        "metadata": list_meta(page),
        "items": items,
    })
}

/// Metadata of a list.
pub fn list_meta(page: &Page) -> Value {
    let mut meta = json!({"resourceVersion": page.version.to_string()});
    if !page.token.is_empty() {
        obj::set(&mut meta, &["continue"], page.token.clone());
        obj::set(&mut meta, &["remainingItemCount"], page.remaining as u64);
    }
    meta
}

/// An object as a version of its resource shows it.
pub fn present(resource: &Resource, object: &Value) -> Value {
    if resource.group == "events.k8s.io" {
        return super::events::to_new(object);
    }
    let mut shown = object.clone();
    obj::set(&mut shown, &["apiVersion"], resource.api_version());
    obj::set(&mut shown, &["kind"], resource.kind.clone());
    shown
}
