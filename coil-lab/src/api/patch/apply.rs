//! Server-side apply: merges what a manager wants into the object, takes away what it wanted before and does not any
//! more, and refuses to change what others manage unless forced.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use super::fieldset::{FieldSet, Path, field_schema, item_schema, list_element, shown};
use super::managed;
use crate::api::error::{ApiError, ApiResult};
use crate::api::obj;
use crate::api::registry::Resource;
use crate::api::schema::{ListKind, Schema};
use crate::api::write::{Part, WriteOptions};

/// The object after an apply.
pub fn apply(
    resource: &Resource,
    old: &Value,
    applied: &Value,
    options: &mut WriteOptions,
) -> ApiResult<Value> {
    let applied = wanted(resource, applied, options)?;
    let schema = resource.schema_for_storage();
    let mut mine = managed::entry_of(resource, options, "Apply");
    mine.fields = FieldSet(managed::managed_leaves(resource, &applied).into_keys().collect());
    let mut entries = managed::read(old);
    let previous =
        entries.iter().position(|entry| entry.is_same_writer(&mine)).map(|index| entries.remove(index));

    let mut new = old.clone();
    merge(&schema, &mut new, &applied);
    let before = managed::managed_leaves(resource, old);
    let after = managed::managed_leaves(resource, &new);
    let changed: BTreeSet<&Path> =
        after.iter().filter(|(path, value)| before.get(*path) != Some(value)).map(|(path, _)| path).collect();
    let conflicts: Vec<(usize, Path)> = entries
        .iter()
        .enumerate()
        .flat_map(|(index, entry)| {
            changed
                .iter()
                .filter(|path| before.contains_key(**path) && entry.fields.0.contains(**path))
                .map(move |path| (index, (*path).clone()))
        })
        .collect();
    if !conflicts.is_empty() && !options.force {
        return Err(conflict_error(&entries, &conflicts));
    }
    for (index, path) in conflicts {
        entries[index].fields.0.remove(&path);
    }
    if let Some(previous) = previous {
        let dropped = previous
            .fields
            .0
            .iter()
            .filter(|path| !mine.fields.touches(path))
            .filter(|path| !entries.iter().any(|entry| entry.fields.touches(path)));
        // In order: an entry of a list goes as a whole, before its fields, by which it would be found.
        for path in dropped {
            remove(&schema, &mut new, path, true);
        }
        if previous.fields == mine.fields {
            mine.time = previous.time;
        }
    }
    entries.push(mine);
    entries.sort_by(|one, other| (&one.operation, &one.manager).cmp(&(&other.operation, &other.manager)));
    managed::write(&mut new, &entries);
    options.applied = true;
    Ok(new)
}

/// The part of what is applied that this write is about.
fn wanted(resource: &Resource, applied: &Value, options: &WriteOptions) -> ApiResult<Value> {
    if !obj::items(applied, &["metadata", "managedFields"]).is_empty() {
        return Err(ApiError::bad_request("metadata.managedFields must be nil"));
    }
    let mut applied = applied.clone();
    match options.part {
        Part::Status => {
            if let Value::Object(map) = &mut applied {
                map.retain(|key, _| ["apiVersion", "kind", "metadata", "status"].contains(&key.as_str()));
            }
            if resource.custom {
                let name = obj::name(&applied).to_owned();
                obj::set(&mut applied, &["metadata"], json!({"name": name}));
            }
        }
        Part::Main if resource.status => {
            obj::remove(&mut applied, &["status"]);
        }
        Part::Main | Part::Whole => {}
    }
    Ok(applied)
}

fn conflict_error(entries: &[managed::Entry], conflicts: &[(usize, Path)]) -> ApiError {
    let texts: Vec<String> = conflicts
        .iter()
        .map(|(index, path)| {
            let entry = &entries[*index];
            let using = if entry.operation == "Update" {
                let sub = if entry.subresource.is_empty() {
                    String::new()
                } else {
                    format!(" with subresource \"{}\"", entry.subresource)
                };
                format!("{sub} using {}", entry.api_version)
            } else {
                String::new()
            };
            format!("conflict with \"{}\"{using}: {}", entry.manager, shown(path))
        })
        .collect();
    let message = match texts.as_slice() {
        [one] => format!("Apply failed with 1 conflict: {one}"),
        many => format!("Apply failed with {} conflicts: {}", many.len(), many.join(", ")),
    };
    let causes: Vec<Value> = conflicts
        .iter()
        .map(|(index, path)| {
            json!({
                "reason": "FieldManagerConflict", "field": shown(path),
                "message": format!("conflict with \"{}\"", entries[*index].manager),
            })
        })
        .collect();
    ApiError { code: 409, reason: "Conflict", message, details: Some(json!({"causes": causes})) }
}

fn merge(schema: &Schema, target: &mut Value, applied: &Value) {
    match (&mut *target, applied) {
        (Value::Object(target), Value::Object(applied)) if !schema.atomic_map => {
            for (name, value) in applied {
                match target.get_mut(name) {
                    Some(old) => merge(field_schema(schema, name), old, value),
                    None => {
                        target.insert(name.clone(), value.clone());
                    }
                }
            }
        }
        (Value::Array(target), Value::Array(applied)) if schema.list != ListKind::Atomic => {
            merge_list(schema, target, applied);
        }
        (target, applied) => *target = applied.clone(),
    }
}

/// Entries of the applied list in its order; others stay where they were relative to those before them.
fn merge_list(schema: &Schema, target: &mut Vec<Value>, applied: &[Value]) {
    for entry in applied {
        let element = list_element(schema, entry);
        match target.iter_mut().find(|old| list_element(schema, old) == element) {
            Some(old) if old.is_object() => merge(item_schema(schema), old, entry),
            Some(_) => {}
            None => target.push(entry.clone()),
        }
    }
}

/// Removes what is at a path. A map that the removal empties goes too, unless it is the root or a list entry.
fn remove(schema: &Schema, value: &mut Value, path: &[String], is_root: bool) -> bool {
    let Some((element, rest)) = path.split_first() else { return false };
    match value {
        Value::Object(map) => {
            let Some(name) = element.strip_prefix("f:") else { return false };
            let gone = if rest.is_empty() {
                true
            } else {
                map.get_mut(name).is_some_and(|child| remove(field_schema(schema, name), child, rest, false))
            };
            if gone {
                map.remove(name);
            }
            gone && map.is_empty() && !is_root
        }
        Value::Array(list) => {
            let here = |entry: &Value| list_element(schema, entry).as_ref() == Some(element);
            if rest.is_empty() {
                list.retain(|entry| !here(entry));
                return list.is_empty();
            }
            if let Some(entry) = list.iter_mut().find(|entry| here(entry)) {
                remove(item_schema(schema), entry, rest, true);
            }
            false
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]
    use super::*;
    use crate::api::{kinds, registry::Registry};
    use std::sync::Arc;

    fn deployments() -> Arc<Resource> {
        let registry = Registry::new();
        kinds::register(&registry);
        registry.get("apps", "v1", "deployments").unwrap()
    }

    fn options(manager: &str) -> WriteOptions {
        WriteOptions::internal(manager)
    }

    fn applied(old: &Value, manager: &str, wish: Value, force: bool) -> ApiResult<Value> {
        let mut options = WriteOptions { force, ..options(manager) };
        apply(&deployments(), old, &wish, &mut options)
    }

    #[test]
    fn a_manager_takes_back_only_what_is_its_own() {
        let old = json!({"metadata": {"name": "d"}});
        let first = applied(&old, "a", json!({"metadata": {"labels": {"x": "1", "y": "1"}}}), false).unwrap();
        let second =
            applied(&first, "b", json!({"metadata": {"labels": {"y": "1", "z": "1"}}}), false).unwrap();
        let third = applied(&second, "a", json!({"metadata": {}}), false).unwrap();
        assert_eq!(third["metadata"]["labels"], json!({"y": "1", "z": "1"}));
        let fourth = applied(&third, "b", json!({"metadata": {}}), false).unwrap();
        assert_eq!(fourth["metadata"].get("labels"), None);
        assert_eq!(fourth["metadata"].get("managedFields"), None);
    }

    #[test]
    fn others_fields_are_a_conflict_unless_forced() {
        let old = json!({"metadata": {"name": "d"}});
        let first = applied(&old, "a", json!({"spec": {"replicas": 1}}), false).unwrap();
        let error = applied(&first, "b", json!({"spec": {"replicas": 2}}), false).unwrap_err();
        assert_eq!(error.code, 409);
        assert_eq!(error.message, "Apply failed with 1 conflict: conflict with \"a\": .spec.replicas");
        // The same value is shared without a conflict.
        applied(&first, "b", json!({"spec": {"replicas": 1}}), false).unwrap();
        let forced = applied(&first, "b", json!({"spec": {"replicas": 2}}), true).unwrap();
        assert_eq!(forced["spec"]["replicas"], 2);
        assert_eq!(managed::read(&forced).len(), 1);
    }

    #[test]
    fn list_entries_merge_by_key() {
        let container = |name: &str, image: &str| json!({"name": name, "image": image});
        let wish = |list: Value| json!({"spec": {"template": {"spec": {"containers": list}}}});
        let old = json!({"metadata": {"name": "d"}});
        let first = applied(&old, "a", wish(json!([container("x", "1")])), false).unwrap();
        let second = applied(&first, "b", wish(json!([container("y", "1")])), false).unwrap();
        let third = applied(&second, "a", wish(json!([container("x", "2")])), false).unwrap();
        assert_eq!(
            third["spec"]["template"]["spec"]["containers"],
            json!([container("x", "2"), container("y", "1")])
        );
        let fourth = applied(&third, "a", json!({}), false).unwrap();
        assert_eq!(fourth["spec"]["template"]["spec"]["containers"], json!([container("y", "1")]));
    }

    #[test]
    fn updates_move_ownership() {
        let resource = deployments();
        let first =
            applied(&json!({"metadata": {"name": "d"}}), "a", json!({"spec": {"replicas": 1}}), false)
                .unwrap();
        let mut changed = first.clone();
        obj::set(&mut changed, &["spec", "replicas"], 5);
        managed::record_update(&resource, Some(&first), &mut changed, &options("scaler"));
        let error = applied(&changed, "a", json!({"spec": {"replicas": 1}}), false).unwrap_err();
        assert_eq!(
            error.message,
            "Apply failed with 1 conflict: conflict with \"scaler\" using apps/v1: .spec.replicas"
        );
    }
}
