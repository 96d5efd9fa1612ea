//! Small accessors over untyped objects: everything in the store is a JSON value.

use serde_json::{Map, Value};

/// The value at a path of keys.
pub fn at<'a>(value: &'a Value, path: &[&str]) -> Option<&'a Value> {
    path.iter().try_fold(value, |value, key| value.get(*key))
}

/// The text at a path, or the empty text.
pub fn text<'a>(value: &'a Value, path: &[&str]) -> &'a str {
    at(value, path).and_then(Value::as_str).unwrap_or_default()
}

/// The number at a path.
pub fn int(value: &Value, path: &[&str]) -> Option<i64> {
    at(value, path).and_then(Value::as_i64)
}

/// The truth at a path, false when absent.
pub fn flag(value: &Value, path: &[&str]) -> bool {
    at(value, path).and_then(Value::as_bool).unwrap_or(false)
}

/// The elements of the list at a path, none when absent.
pub fn items<'a>(value: &'a Value, path: &[&str]) -> &'a [Value] {
    at(value, path).and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default()
}

/// The entries of the map at a path.
pub fn map<'a>(value: &'a Value, path: &[&str]) -> Option<&'a Map<String, Value>> {
    at(value, path).and_then(Value::as_object)
}

/// The map at a path, made if it is not there or is something else.
pub fn map_mut<'a>(value: &'a mut Value, path: &[&str]) -> &'a mut Map<String, Value> {
    let mut here = value;
    for key in path {
        here = ensure_map(here).entry(*key).or_insert(Value::Null);
    }
    ensure_map(here)
}

fn ensure_map(value: &mut Value) -> &mut Map<String, Value> {
    if !value.is_object() {
        *value = Value::Object(Map::new());
    }
    match value {
        Value::Object(map) => map,
        _ => unreachable!("was made a map above"),
    }
}

/// Sets a value at a path, making maps on the way.
pub fn set(value: &mut Value, path: &[&str], new: impl Into<Value>) {
    if let Some((last, parents)) = path.split_last() {
        map_mut(value, parents).insert((*last).to_owned(), new.into());
    }
}

/// Sets a value at a path unless there is one (null counts as none).
pub fn set_default(value: &mut Value, path: &[&str], new: impl Into<Value>) {
    if at(value, path).is_none_or(Value::is_null) {
        set(value, path, new);
    }
}

/// Removes what is at a path.
pub fn remove(value: &mut Value, path: &[&str]) -> Option<Value> {
    let (last, parents) = path.split_last()?;
    let mut here = value;
    for key in parents {
        here = here.get_mut(*key)?;
    }
    here.as_object_mut()?.remove(*last)
}

/// `metadata.name`.
pub fn name(value: &Value) -> &str {
    text(value, &["metadata", "name"])
}

/// `metadata.namespace`.
pub fn namespace(value: &Value) -> &str {
    text(value, &["metadata", "namespace"])
}

/// `metadata.uid`.
pub fn uid(value: &Value) -> &str {
    text(value, &["metadata", "uid"])
}

/// `metadata.resourceVersion`.
pub fn version(value: &Value) -> &str {
    text(value, &["metadata", "resourceVersion"])
}

/// A label's value.
pub fn label<'a>(value: &'a Value, key: &str) -> Option<&'a str> {
    at(value, &["metadata", "labels", key]).and_then(Value::as_str)
}

/// An annotation's value.
pub fn annotation<'a>(value: &'a Value, key: &str) -> Option<&'a str> {
    at(value, &["metadata", "annotations", key]).and_then(Value::as_str)
}

/// True when deletion was asked for.
pub fn is_deleting(value: &Value) -> bool {
    at(value, &["metadata", "deletionTimestamp"]).is_some_and(|stamp| !stamp.is_null())
}

/// The controlling owner reference.
pub fn controller(value: &Value) -> Option<&Value> {
    items(value, &["metadata", "ownerReferences"]).iter().find(|one| flag(one, &["controller"]))
}

/// A condition's entry in `status.conditions`.
pub fn condition<'a>(value: &'a Value, kind: &str) -> Option<&'a Value> {
    items(value, &["status", "conditions"]).iter().find(|one| text(one, &["type"]) == kind)
}

/// True when a condition is there with status `True`.
pub fn condition_is_true(value: &Value, kind: &str) -> bool {
    condition(value, kind).is_some_and(|one| text(one, &["status"]) == "True")
}

/// The present time as the API writes it.
pub fn now() -> String {
    stamp(jiff::Timestamp::now())
}

/// A time as the API writes it, whole seconds in UTC.
pub fn stamp(time: jiff::Timestamp) -> String {
    time.strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}

/// The present time with microseconds, as `MicroTime` fields have it.
pub fn now_micro() -> String {
    jiff::Timestamp::now().strftime("%Y-%m-%dT%H:%M:%S.%6fZ").to_string()
}
