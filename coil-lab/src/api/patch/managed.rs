//! Who manages which field (`metadata.managedFields`).

use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::fieldset::{FieldSet, Path, leaves};
use crate::api::obj;
use crate::api::registry::Resource;
use crate::api::write::{Part, WriteOptions};

/// Metadata that nobody manages.
const UNMANAGED: [&str; 10] = [
    "name",
    "namespace",
    "uid",
    "resourceVersion",
    "generation",
    "creationTimestamp",
    "deletionTimestamp",
    "deletionGracePeriodSeconds",
    "generateName",
    "managedFields",
];

/// One entry of `managedFields`.
#[derive(Debug, Clone)]
pub struct Entry {
    /// Who.
    pub manager: String,
    /// `Apply` or `Update`.
    pub operation: String,
    /// Empty or `status`.
    pub subresource: String,
    /// Version of the resource that was written.
    pub api_version: String,
    /// When.
    pub time: String,
    /// What.
    pub fields: FieldSet,
}

impl Entry {
    /// Whether it is the entry of the same writer.
    pub fn is_same_writer(&self, other: &Self) -> bool {
        self.manager == other.manager
            && self.operation == other.operation
            && self.subresource == other.subresource
    }
}

/// The entries of an object.
pub fn read(object: &Value) -> Vec<Entry> {
    obj::items(object, &["metadata", "managedFields"])
        .iter()
        .map(|entry| Entry {
            manager: obj::text(entry, &["manager"]).to_owned(),
            operation: obj::text(entry, &["operation"]).to_owned(),
            subresource: obj::text(entry, &["subresource"]).to_owned(),
            api_version: obj::text(entry, &["apiVersion"]).to_owned(),
            time: obj::text(entry, &["time"]).to_owned(),
            fields: FieldSet::from_json(entry.get("fieldsV1").unwrap_or(&Value::Null)),
        })
        .collect()
}

/// Writes entries into an object; empty ones are dropped.
pub fn write(object: &mut Value, entries: &[Entry]) {
    let list: Vec<Value> = entries
        .iter()
        .filter(|entry| !entry.fields.is_empty())
        .map(|entry| {
            let mut written = json!({
                "manager": entry.manager, "operation": entry.operation, "apiVersion": entry.api_version,
                "time": entry.time, "fieldsType": "FieldsV1", "fieldsV1": entry.fields.to_json(),
            });
            if !entry.subresource.is_empty() {
                obj::set(&mut written, &["subresource"], entry.subresource.clone());
            }
            written
        })
        .collect();
    if list.is_empty() {
        obj::remove(object, &["metadata", "managedFields"]);
    } else {
        obj::set(object, &["metadata", "managedFields"], list);
    }
}

/// The leaves of an object that can be managed.
pub fn managed_leaves(resource: &Resource, object: &Value) -> BTreeMap<Path, Value> {
    let mut object = object.clone();
    for field in ["apiVersion", "kind"] {
        obj::remove(&mut object, &[field]);
    }
    for field in UNMANAGED {
        obj::remove(&mut object, &["metadata", field]);
    }
    if obj::map(&object, &["metadata"]).is_some_and(serde_json::Map::is_empty) {
        obj::remove(&mut object, &["metadata"]);
    }
    let mut found = leaves(&resource.schema_for_storage(), &object);
    found.remove(&Vec::new());
    found
}

/// The entry of a writer with nothing in it yet.
pub fn entry_of(resource: &Resource, options: &WriteOptions, operation: &str) -> Entry {
    Entry {
        manager: options.manager.clone(),
        operation: operation.to_owned(),
        subresource: if options.part == Part::Status { "status".to_owned() } else { String::new() },
        api_version: resource.api_version(),
        time: obj::now(),
        fields: FieldSet::default(),
    }
}

/// Records a write that is no apply: the writer gets what it changed, everybody loses what is gone.
pub fn record_update(resource: &Resource, old: Option<&Value>, new: &mut Value, options: &WriteOptions) {
    if options.applied {
        return;
    }
    let mut entries = old.map(read).unwrap_or_default();
    // An explicit empty list takes the ownership away from everybody.
    let is_reset = old.is_some()
        && obj::at(new, &["metadata", "managedFields"]).and_then(Value::as_array).is_some_and(|list| {
            list.iter().all(|entry| entry.as_object().is_none_or(serde_json::Map::is_empty))
        });
    if is_reset {
        entries.clear();
    }
    let before = old.map(|old| managed_leaves(resource, old)).unwrap_or_default();
    let after = managed_leaves(resource, new);
    let changed: Vec<&Path> =
        after.iter().filter(|(path, value)| before.get(*path) != Some(value)).map(|(path, _)| path).collect();
    let is_gone = |path: &Path| before.contains_key(path) && !after.contains_key(path);
    let mut mine = entry_of(resource, options, "Update");
    for entry in &mut entries {
        let keeps_changed = entry.is_same_writer(&mine);
        entry.fields.0.retain(|path| !is_gone(path) && (keeps_changed || !changed.contains(&path)));
    }
    if !changed.is_empty() {
        if let Some(index) = entries.iter().position(|entry| entry.is_same_writer(&mine)) {
            mine.fields = entries.remove(index).fields;
        }
        mine.fields.0.extend(changed.into_iter().cloned());
        entries.push(mine);
    }
    write(new, &entries);
}

/// Records an apply that created the object.
pub fn record_apply_on_create(resource: &Resource, applied: &Value, new: &mut Value, options: &WriteOptions) {
    let mut mine = entry_of(resource, options, "Apply");
    mine.fields = FieldSet(managed_leaves(resource, applied).into_keys().collect());
    write(new, &[mine]);
}

/// Whether two objects differ in nothing but times of managed fields and the version.
pub fn same_but_for_times(new: &Value, old: &Value) -> bool {
    let strip = |object: &Value| {
        let mut object = object.clone();
        obj::remove(&mut object, &["metadata", "resourceVersion"]);
        if let Some(entries) = obj::map_mut(&mut object, &["metadata"]).get_mut("managedFields") {
            for entry in entries.as_array_mut().into_iter().flatten() {
                obj::remove(entry, &["time"]);
            }
        }
        object
    };
    strip(new) == strip(old)
}
