//! Strategic merge patch, as `kubectl apply`, `edit`, `label`, `scale` and `rollout restart` send it for built-in kinds.
//!
//! Lists with a merge key are merged element by element, other lists are replaced. Directives: `$patch: delete|replace|
//! merge`, `$deleteFromPrimitiveList/<field>`, `$retainKeys`, `$setElementOrder/<field>`.

use serde_json::{Map, Value};

use crate::api::schema::Schema;

/// Why a patch cannot be applied.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StrategicError {
    /// An element of a merged list has no key.
    #[error("map: {element} does not contain declared merge key: {key}")]
    NoKey {
        /// The key.
        key: String,
        /// The element.
        element: String,
    },
    /// A directive that does not exist.
    #[error("Unknown patch type: {0}")]
    Directive(String),
}

/// For fields that the schema does not know: lists are replaced.
static ANYTHING: std::sync::LazyLock<Schema> = std::sync::LazyLock::new(Schema::anything);

/// Applies a patch to an object of a schema.
pub fn apply(schema: &Schema, target: &mut Value, patch: &Value) -> Result<(), StrategicError> {
    let Value::Object(patch) = patch else {
        *target = patch.clone();
        return Ok(());
    };
    match patch.get("$patch").and_then(Value::as_str) {
        Some("replace") => {
            let mut whole = patch.clone();
            whole.remove("$patch");
            *target = Value::Object(whole);
            return Ok(());
        }
        Some("delete") => {
            *target = Value::Object(Map::new());
            return Ok(());
        }
        Some("merge") | None => {}
        Some(other) => return Err(StrategicError::Directive(other.to_owned())),
    }
    if !target.is_object() {
        *target = Value::Object(Map::new());
    }
    let Value::Object(target) = target else {
        return Ok(());
    };
    if let Some(keep) = patch.get("$retainKeys").and_then(Value::as_array) {
        target.retain(|key, _| keep.iter().any(|one| one == key));
    }
    for (key, value) in patch {
        if let Some(field) = key.strip_prefix("$deleteFromPrimitiveList/") {
            let removed = value.as_array().map(Vec::as_slice).unwrap_or_default();
            if let Some(list) = target.get_mut(field).and_then(Value::as_array_mut) {
                list.retain(|one| !removed.contains(one));
            }
        } else if !key.starts_with('$') {
            apply_field(schema.field(key).unwrap_or(&ANYTHING), target, key, value)?;
        }
    }
    for (key, order) in patch {
        if let (Some(field), Some(order)) = (key.strip_prefix("$setElementOrder/"), order.as_array()) {
            let merge_key = schema.field(field).and_then(|field| field.merge_key.clone());
            if let Some(list) = target.get_mut(field).and_then(Value::as_array_mut) {
                reorder(list, order, merge_key.as_deref());
            }
        }
    }
    Ok(())
}

fn apply_field(
    schema: &Schema,
    target: &mut Map<String, Value>,
    key: &str,
    value: &Value,
) -> Result<(), StrategicError> {
    match value {
        Value::Null => {
            target.remove(key);
        }
        Value::Object(patch) if patch.get("$patch").is_some_and(|directive| directive == "delete") => {
            target.remove(key);
        }
        Value::Object(_) => apply(schema, target.entry(key.to_owned()).or_insert(Value::Null), value)?,
        Value::Array(patch) => {
            let list = target.entry(key.to_owned()).or_insert(Value::Null);
            if !list.is_array() {
                *list = Value::Array(Vec::new());
            }
            if let Value::Array(list) = list {
                apply_list(schema, list, patch)?;
            }
        }
        scalar => {
            target.insert(key.to_owned(), scalar.clone());
        }
    }
    Ok(())
}

fn apply_list(schema: &Schema, target: &mut Vec<Value>, patch: &[Value]) -> Result<(), StrategicError> {
    let is_replace = |one: &Value| one.get("$patch").is_some_and(|directive| directive == "replace");
    if patch.iter().any(is_replace) {
        *target = patch.iter().filter(|one| !is_replace(one)).cloned().collect();
        return Ok(());
    }
    if schema.merge_scalars {
        for one in patch {
            if !target.contains(one) {
                target.push(one.clone());
            }
        }
        return Ok(());
    }
    let Some(key) = &schema.merge_key else {
        *target = patch.to_vec();
        return Ok(());
    };
    let items = schema.items.as_deref().unwrap_or(&ANYTHING);
    for one in patch {
        let Some(id) = one.get(key) else {
            return Err(StrategicError::NoKey { key: key.clone(), element: one.to_string() });
        };
        if one.get("$patch").is_some_and(|directive| directive == "delete") {
            target.retain(|old| old.get(key) != Some(id));
        } else if let Some(old) = target.iter_mut().find(|old| old.get(key) == Some(id)) {
            apply(items, old, one)?;
        } else {
            let mut new = Value::Object(Map::new());
            apply(items, &mut new, one)?;
            target.push(new);
        }
    }
    Ok(())
}

/// Puts the elements that `order` names into that order; others keep their place behind the one before them.
fn reorder(list: &mut [Value], order: &[Value], merge_key: Option<&str>) {
    let rank = |one: &Value| {
        order.iter().position(|wanted| match merge_key {
            Some(key) => wanted.get(key) == one.get(key),
            None => wanted == one,
        })
    };
    let mut places: Vec<usize> = Vec::with_capacity(list.len());
    let mut last = 0;
    for one in list.iter() {
        last = rank(one).unwrap_or(last);
        places.push(last);
    }
    let mut keyed: Vec<(usize, Value)> = places.into_iter().zip(list.iter().cloned()).collect();
    keyed.sort_by_key(|(place, _)| *place);
    for (slot, (_, one)) in list.iter_mut().zip(keyed) {
        *slot = one;
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use crate::api::schema::builtin;
    use serde_json::json;

    fn patched(mut target: Value, patch: Value) -> Value {
        apply(&builtin::schema("io.k8s.api.apps.v1.Deployment"), &mut target, &patch).unwrap();
        target
    }

    fn deployment(containers: Value) -> Value {
        json!({"spec": {"template": {"spec": {"containers": containers}}}})
    }

    #[test]
    fn containers_merge_by_name() {
        let old = deployment(
            json!([{"name": "a", "image": "1", "env": [{"name": "X", "value": "1"}]}, {"name": "b"}]),
        );
        let patch = deployment(json!([{"name": "a", "image": "2", "env": [{"name": "Y", "value": "2"}]}]));
        let new = patched(old, patch);
        assert_eq!(
            new,
            deployment(json!([
                {"name": "a", "image": "2", "env": [{"name": "X", "value": "1"}, {"name": "Y", "value": "2"}]},
                {"name": "b"},
            ]))
        );
    }

    #[test]
    fn directives() {
        let old = deployment(json!([{"name": "a"}, {"name": "b"}]));
        let deleted = patched(old.clone(), deployment(json!([{"name": "a", "$patch": "delete"}])));
        assert_eq!(deleted, deployment(json!([{"name": "b"}])));
        let replaced = patched(old.clone(), deployment(json!([{"$patch": "replace"}, {"name": "c"}])));
        assert_eq!(replaced, deployment(json!([{"name": "c"}])));
        let ordered = patched(
            old,
            json!({"spec": {"template": {"spec": {
                "$setElementOrder/containers": [{"name": "c"}, {"name": "b"}, {"name": "a"}],
                "containers": [{"name": "c"}],
            }}}}),
        );
        assert_eq!(ordered, deployment(json!([{"name": "c"}, {"name": "b"}, {"name": "a"}])));
        let kept = patched(
            json!({"spec": {"strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1}}}}),
            json!({"spec": {"strategy": {"$retainKeys": ["type"], "type": "Recreate", "rollingUpdate": null}}}),
        );
        assert_eq!(kept, json!({"spec": {"strategy": {"type": "Recreate"}}}));
    }

    #[test]
    fn finalizers_are_a_set_and_tolerations_are_atomic() {
        let new = patched(
            json!({"metadata": {"finalizers": ["a/a"]}, "spec": {"template": {"spec": {"tolerations": [{"key": "x"}]}}}}),
            json!({"metadata": {"finalizers": ["b/b"]}, "spec": {"template": {"spec": {"tolerations": [{"key": "y"}]}}}}),
        );
        assert_eq!(new["metadata"]["finalizers"], json!(["a/a", "b/b"]));
        assert_eq!(new["spec"]["template"]["spec"]["tolerations"], json!([{"key": "y"}]));
        let new = patched(
            json!({"metadata": {"finalizers": ["a/a", "b/b"]}}),
            json!({"metadata": {"$deleteFromPrimitiveList/finalizers": ["a/a"], "labels": {"x": "1"}}}),
        );
        assert_eq!(new, json!({"metadata": {"finalizers": ["b/b"], "labels": {"x": "1"}}}));
    }

    #[test]
    fn a_merged_element_needs_its_key() {
        let schema = builtin::schema("io.k8s.api.apps.v1.Deployment");
        let patch = deployment(json!([{"image": "x"}]));
        assert!(matches!(apply(&schema, &mut json!({}), &patch), Err(StrategicError::NoKey { .. })));
    }
}
