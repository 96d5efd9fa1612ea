//! Removes what a schema does not know, and says what it was.

use serde_json::Value;

use super::{Additional, Schema};

/// Fields of every embedded object that no schema needs to name.
const OBJECT_FIELDS: [&str; 3] = ["apiVersion", "kind", "metadata"];

/// Removes fields that the schema does not name; returns their paths. Nulls that are no value are dropped silently.
pub fn apply(schema: &Schema, value: &mut Value, is_root: bool) -> Vec<String> {
    let mut unknown = Vec::new();
    walk(schema, value, is_root || schema.embedded, "", &mut unknown);
    unknown
}

fn walk(schema: &Schema, value: &mut Value, is_object: bool, path: &str, unknown: &mut Vec<String>) {
    match value {
        Value::Object(map) => {
            let open = schema.keeps_unknown();
            map.retain(|name, field| {
                let here = if path.is_empty() { name.clone() } else { format!("{path}.{name}") };
                if let Some(child) = schema.properties.get(name) {
                    if field.is_null() && !child.nullable && child.default.is_none() {
                        return false;
                    }
                    walk(child, field, child.embedded, &here, unknown);
                    return true;
                }
                if is_object && OBJECT_FIELDS.contains(&name.as_str()) {
                    return true;
                }
                if let Additional::Of(child) = &schema.additional {
                    walk(child, field, child.embedded, &here, unknown);
                    return true;
                }
                if !open {
                    unknown.push(here);
                }
                open
            });
        }
        Value::Array(list) => {
            if let Some(items) = &schema.items {
                for (index, one) in list.iter_mut().enumerate() {
                    walk(items, one, items.embedded, &format!("{path}[{index}]"), unknown);
                }
            }
        }
        _ => {}
    }
}
