//! Defaults of a schema written into an object.

use serde_json::Value;

use super::{Additional, Schema};

/// Fills in the defaults for fields that are absent (or null where null is no value), at every depth.
pub fn apply(schema: &Schema, value: &mut Value) {
    match value {
        Value::Object(map) => {
            for (name, child) in &schema.properties {
                let absent = match map.get(name) {
                    None => true,
                    Some(present) => present.is_null() && !child.nullable,
                };
                if let (true, Some(default)) = (absent, &child.default) {
                    map.insert(name.clone(), default.clone());
                }
            }
            for (name, field) in map.iter_mut() {
                if let Some(child) = schema.properties.get(name) {
                    apply(child, field);
                } else if let Additional::Of(child) = &schema.additional {
                    apply(child, field);
                }
            }
        }
        Value::Array(list) => {
            if let Some(items) = &schema.items {
                for one in list {
                    apply(items, one);
                }
            }
        }
        _ => {}
    }
}
