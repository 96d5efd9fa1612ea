//! OpenAPI documents: version 3 per group and version, version 2 as one document in JSON or as the protobuf form that
//! older `kubectl` insists on.
//!
//! Clients use them for `explain`, for client-side validation, to find list merge keys, and to see whether the server
//! knows the parameters `fieldValidation` and `dryRun`.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};

use axum::body::{Body, Bytes};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::Response;
use serde_json::{Map, Value, json};

use super::error::{ApiError, ApiResult};
use super::registry::Resource;
use super::request::Request;
use super::schema::builtin;
use super::server::ApiServer;
use super::{gnostic, kinds, obj};

const GVK: &str = "x-kubernetes-group-version-kind";
const OBJECT_META: &str = "io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta";
const V3_REFERENCE: &str = "#/components/schemas/";
const V2_REFERENCE: &str = "#/definitions/";
/// The name with a dot: Go does not read the one with an at sign that it asks for.
const PROTOBUF_V2: &str = "application/com.github.proto-openapi.spec.v2.v1.0+protobuf";

/// Documents made so far, by path and media type.
#[derive(Debug, Default)]
pub struct Cache {
    made: Mutex<BTreeMap<String, Bytes>>,
}

impl Cache {
    /// Forgets all documents: the served resources changed.
    pub fn forget(&self) {
        self.made.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }

    fn get(&self, key: &str, make: impl FnOnce() -> ApiResult<Vec<u8>>) -> ApiResult<Bytes> {
        if let Some(found) = self.made.lock().unwrap_or_else(PoisonError::into_inner).get(key) {
            return Ok(found.clone());
        }
        let made = Bytes::from(make()?);
        self.made.lock().unwrap_or_else(PoisonError::into_inner).insert(key.to_owned(), made.clone());
        Ok(made)
    }
}

/// The answer for an OpenAPI path; none for other paths.
pub fn respond(
    server: &Arc<ApiServer>,
    path: &str,
    request: &Request,
    headers: &HeaderMap,
) -> ApiResult<Option<Response>> {
    if path == "/openapi/v2" {
        let is_binary = request.accept.contains("proto-openapi.spec.v2");
        let key = if is_binary { "v2 binary" } else { "v2" };
        let bytes = server.openapi.get(key, || {
            let document = version_2(server);
            Ok(if is_binary { gnostic::encode(&document) } else { document.to_string().into_bytes() })
        })?;
        let media = if is_binary { PROTOBUF_V2 } else { "application/json" };
        return Ok(Some(document(bytes, media, headers)));
    }
    if path == "/openapi/v3" {
        let bytes = Bytes::from(index(server).to_string());
        return Ok(Some(document(bytes, "application/json", headers)));
    }
    let Some(place) = path.strip_prefix("/openapi/v3/") else { return Ok(None) };
    let parts: Vec<&str> = place.split('/').collect();
    let (group, version) = match parts.as_slice() {
        ["api", version] => ("", *version),
        ["apis", group, version] => (*group, *version),
        _ => return Err(ApiError::unknown_path()),
    };
    let bytes = server.openapi.get(place, || {
        let resources = server.registry.of_version(group, version);
        if resources.is_empty() {
            return Err(ApiError::unknown_path());
        }
        Ok(version_3(&resources).to_string().into_bytes())
    })?;
    Ok(Some(document(bytes, "application/json", headers)))
}

fn document(bytes: Bytes, media: &'static str, headers: &HeaderMap) -> Response {
    let tag = format!("\"{:016X}\"", checksum(&bytes));
    let is_known = headers.get(header::IF_NONE_MATCH).is_some_and(|known| known.as_bytes() == tag.as_bytes());
    let mut response = Response::new(if is_known { Body::empty() } else { Body::from(bytes) });
    if is_known {
        *response.status_mut() = StatusCode::NOT_MODIFIED;
    }
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(media));
    if let Ok(tag) = HeaderValue::from_str(&tag) {
        response.headers_mut().insert(header::ETAG, tag);
    }
    response
}

fn checksum(bytes: &[u8]) -> u64 {
    bytes
        .iter()
        .fold(0xcbf2_9ce4_8422_2325, |state, &byte| (state ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

fn index(server: &ApiServer) -> Value {
    let mut places: BTreeSet<String> = BTreeSet::new();
    for resource in server.registry.all() {
        places.insert(place(&resource));
    }
    // The version of the store stands for "may have changed": clients cache by it.
    let paths: Map<String, Value> = places
        .into_iter()
        .map(|place| {
            let hash = checksum(format!("{place}{}", server.registry.generation()).as_bytes());
            let url = format!("/openapi/v3/{place}?hash={hash:016X}");
            (place, json!({"serverRelativeURL": url}))
        })
        .collect();
    json!({"paths": paths})
}

fn place(resource: &Resource) -> String {
    if resource.group.is_empty() {
        format!("api/{}", resource.version)
    } else {
        format!("apis/{}/{}", resource.group, resource.version)
    }
}

fn gvk(resource: &Resource) -> Value {
    json!({"group": resource.group, "version": resource.version, "kind": resource.kind})
}

fn info() -> Value {
    json!({"title": "Kubernetes", "version": "v1.32.4"})
}

fn version_3(resources: &[Arc<Resource>]) -> Value {
    let mut paths = Map::new();
    for resource in resources {
        add_paths(
            resource,
            &mut paths,
            |name| json!({"name": name, "in": "query", "schema": {"type": "string"}}),
        );
    }
    json!({
        "openapi": "3.0.0", "info": info(), "paths": paths,
        "components": {"schemas": schemas(resources, V3_REFERENCE)},
    })
}

fn version_2(server: &ApiServer) -> Value {
    let resources = server.registry.all();
    let mut paths = Map::new();
    for resource in &resources {
        add_paths(resource, &mut paths, |name| json!({"name": name, "in": "query", "type": "string"}));
    }
    json!({"swagger": "2.0", "info": info(), "paths": paths, "definitions": schemas(&resources, V2_REFERENCE)})
}

/// Verbs of collections and objects, as far as clients look at them.
fn add_paths(resource: &Resource, paths: &mut Map<String, Value>, parameter: impl Fn(&str) -> Value) {
    let prefix = format!("/{}", place(resource));
    let collection = if resource.namespaced {
        format!("{prefix}/namespaces/{{namespace}}/{}", resource.plural)
    } else {
        format!("{prefix}/{}", resource.plural)
    };
    let operation = |action: &str, parameters: &[&str]| {
        json!({
            "operationId": format!("{action}{}{}", resource.version, resource.kind),
            "parameters": parameters.iter().map(|name| parameter(name)).collect::<Vec<_>>(),
            "responses": {"200": {"description": "OK"}},
            "x-kubernetes-action": action,
            GVK: gvk(resource),
        })
    };
    let write = ["dryRun", "fieldManager", "fieldValidation"];
    let mut patch = operation("patch", &["dryRun", "fieldManager", "fieldValidation", "force"]);
    let mut media =
        vec!["application/json-patch+json", "application/merge-patch+json", "application/apply-patch+yaml"];
    if !resource.custom {
        media.push("application/strategic-merge-patch+json");
    }
    let content: Map<String, Value> = media.iter().map(|&media| (media.to_owned(), json!({}))).collect();
    obj::set(&mut patch, &["requestBody", "content"], content);
    obj::set(&mut patch, &["consumes"], media);
    paths.insert(
        collection.clone(),
        json!({
            "get": operation("list", &["fieldSelector", "labelSelector", "limit", "watch"]),
            "post": operation("post", &write),
            "delete": operation("deletecollection", &["dryRun"]),
        }),
    );
    paths.insert(
        format!("{collection}/{{name}}"),
        json!({
            "get": operation("get", &[]),
            "put": operation("put", &write),
            "patch": patch,
            "delete": operation("delete", &["dryRun", "gracePeriodSeconds", "propagationPolicy"]),
        }),
    );
    if resource.namespaced {
        paths.insert(
            format!("{prefix}/{}", resource.plural),
            json!({
                "get": operation("list", &["fieldSelector", "labelSelector", "limit", "watch"]),
            }),
        );
    }
}

/// The schemas of resources and of all that they refer to.
fn schemas(resources: &[Arc<Resource>], prefix: &str) -> Map<String, Value> {
    let mut schemas = Map::new();
    let mut wanted: Vec<String> = vec![OBJECT_META.to_owned()];
    for resource in resources {
        if resource.custom {
            let name = custom_name(resource);
            schemas.insert(name, custom_schema(resource, prefix));
        } else if let Some(name) = kinds::definition(&resource.group, &resource.kind) {
            let mut schema = builtin_schema(&name, prefix, &mut wanted);
            obj::set(&mut schema, &[GVK], json!([gvk(resource)]));
            schemas.insert(name, schema);
        }
    }
    while let Some(name) = wanted.pop() {
        if !schemas.contains_key(&name) {
            let schema = builtin_schema(&name, prefix, &mut wanted);
            schemas.insert(name, schema);
        }
    }
    schemas
}

/// `coil.cybozu.com/v2 Egress` is `com.cybozu.coil.v2.Egress`.
fn custom_name(resource: &Resource) -> String {
    let mut parts: Vec<&str> = resource.group.split('.').rev().collect();
    parts.extend([resource.version.as_str(), resource.kind.as_str()]);
    parts.join(".")
}

fn custom_schema(resource: &Resource, prefix: &str) -> Value {
    let mut schema = resource.raw_schema.clone();
    if prefix == V2_REFERENCE {
        simplify(&mut schema);
    }
    let about = |text: &str| json!({"type": "string", "description": text});
    obj::set(&mut schema, &["type"], "object");
    obj::set(
        &mut schema,
        &["properties", "apiVersion"],
        about("APIVersion defines the versioned schema of this representation of an object."),
    );
    obj::set(
        &mut schema,
        &["properties", "kind"],
        about("Kind is a string value representing the REST resource this object represents."),
    );
    obj::set(
        &mut schema,
        &["properties", "metadata"],
        json!({"description": "Standard object's metadata.", "allOf": [{"$ref": format!("{prefix}{OBJECT_META}")}]}),
    );
    if prefix == V2_REFERENCE {
        obj::set(&mut schema, &["properties", "metadata"], json!({"$ref": format!("{prefix}{OBJECT_META}")}));
    }
    obj::set(&mut schema, &[GVK], json!([gvk(resource)]));
    schema
}

/// Version 2 cannot say all that a structural schema says, and old clients refuse fields that it does not name: the real
/// server publishes the same reduced form.
fn simplify(schema: &mut Value) {
    let Value::Object(map) = schema else { return };
    let is = |name: &str| map.get(name).and_then(Value::as_bool) == Some(true);
    let (is_open, is_nullable, is_either) =
        (is("x-kubernetes-preserve-unknown-fields"), is("nullable"), is("x-kubernetes-int-or-string"));
    let mut dropped =
        vec!["nullable", "default", "oneOf", "anyOf", "allOf", "not", "x-kubernetes-validations"];
    if is_open || is_nullable {
        dropped.extend(["properties", "items", "required", "additionalProperties"]);
    }
    if is_nullable || is_either {
        dropped.push("type");
    }
    for name in dropped {
        map.remove(name);
    }
    for name in ["items", "additionalProperties"] {
        if let Some(child) = map.get_mut(name) {
            simplify(child);
        }
    }
    if let Some(Value::Object(properties)) = map.get_mut("properties") {
        properties.values_mut().for_each(simplify);
    }
}

fn builtin_schema(name: &str, prefix: &str, wanted: &mut Vec<String>) -> Value {
    let mut schema = builtin::DEFINITIONS.get(name).cloned().unwrap_or_else(|| json!({"type": "object"}));
    let fields: Vec<String> =
        obj::map(&schema, &["properties"]).into_iter().flatten().map(|(field, _)| field.clone()).collect();
    for field in fields {
        if let Some(keys) = builtin::list_keys(name, &field) {
            let path = ["properties", &field];
            let entry = obj::map_mut(&mut schema, &path);
            entry.insert("x-kubernetes-list-type".to_owned(), json!("map"));
            entry.insert("x-kubernetes-list-map-keys".to_owned(), json!(keys));
            entry.insert("x-kubernetes-patch-strategy".to_owned(), json!("merge"));
            entry.insert("x-kubernetes-patch-merge-key".to_owned(), json!(keys.first()));
        } else if builtin::is_set(name, &field) {
            let entry = obj::map_mut(&mut schema, &["properties", &field]);
            entry.insert("x-kubernetes-list-type".to_owned(), json!("set"));
            entry.insert("x-kubernetes-patch-strategy".to_owned(), json!("merge"));
        }
    }
    relink(&mut schema, prefix, wanted);
    schema
}

/// Rewrites references to `prefix` and notes what they refer to.
fn relink(value: &mut Value, prefix: &str, wanted: &mut Vec<String>) {
    match value {
        Value::Object(map) => {
            if let Some(Value::String(reference)) = map.get_mut("$ref") {
                let name = reference.rsplit('/').next().unwrap_or_default().to_owned();
                *reference = format!("{prefix}{name}");
                wanted.push(name);
            }
            // Version 3 ignores what stands beside a reference.
            if prefix == V3_REFERENCE
                && map.len() > 1
                && map.get("$ref").is_some_and(Value::is_string)
                && let Some(reference) = map.remove("$ref")
            {
                map.insert("allOf".to_owned(), json!([{"$ref": reference}]));
                return;
            }
            // Version 2 has no allOf around a described reference.
            if prefix == V2_REFERENCE
                && let Some([Value::Object(only)]) =
                    map.get("allOf").and_then(Value::as_array).map(Vec::as_slice)
            {
                let only = only.clone();
                map.remove("allOf");
                map.extend(only);
                return relink(value, prefix, wanted);
            }
            map.values_mut().for_each(|child| relink(child, prefix, wanted));
        }
        Value::Array(list) => list.iter_mut().for_each(|child| relink(child, prefix, wanted)),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn version_2_does_not_close_what_is_open() {
        let mut schema = json!({
            "type": "object",
            "properties": {
                "open": {
                    "type": "object", "x-kubernetes-preserve-unknown-fields": true,
                    "properties": {"a": {"type": "string"}}, "required": ["a"],
                },
                "either": {"x-kubernetes-int-or-string": true, "anyOf": [{"type": "integer"}, {"type": "string"}]},
                "list": {"type": "array", "items": {"type": "string", "nullable": true, "default": "x"}},
            },
        });
        simplify(&mut schema);
        assert_eq!(
            schema["properties"],
            json!({
                "open": {"type": "object", "x-kubernetes-preserve-unknown-fields": true},
                "either": {"x-kubernetes-int-or-string": true},
                "list": {"type": "array", "items": {}},
            })
        );
    }
}
