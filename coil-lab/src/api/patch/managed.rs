//! Who manages which field (`metadata.managedFields`).

use serde_json::Value;

use crate::api::obj;
use crate::api::registry::Resource;
use crate::api::write::WriteOptions;

/// Records a write that is no apply.
pub fn record_update(_resource: &Resource, _old: Option<&Value>, _new: &mut Value, _options: &WriteOptions) {}

/// Records an apply that created the object.
pub fn record_apply_on_create(
    _resource: &Resource,
    _applied: &Value,
    _new: &mut Value,
    _options: &WriteOptions,
) {
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
