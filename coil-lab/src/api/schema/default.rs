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
        Value::Number(number) if schema.quantity => *value = Value::String(number.to_string()),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::schema::builtin;
    use serde_json::json;

    #[test]
    fn defaults_at_every_depth() {
        let schema = Schema::parse(&json!({
            "type": "object",
            "properties": {
                "a": {"type": "integer", "default": 1},
                "n": {"type": "integer", "nullable": true, "default": 2},
                "m": {"type": "object", "additionalProperties": {"type": "object", "properties": {
                    "b": {"type": "string", "default": "x"},
                }}},
                "l": {"type": "array", "items": {"type": "object", "properties": {"c": {"default": true}}}},
                "o": {"type": "object", "default": {}, "properties": {"d": {"default": 3}}},
            },
        }));
        let mut value = json!({"a": null, "n": null, "m": {"k": {}}, "l": [{}]});
        apply(&schema, &mut value);
        assert_eq!(
            value,
            json!({"a": 1, "n": null, "m": {"k": {"b": "x"}}, "l": [{"c": true}], "o": {"d": 3}})
        );
    }

    #[test]
    fn quantities_are_texts() {
        let schema = builtin::schema("io.k8s.api.core.v1.Pod");
        let limits = |cpu: Value| json!({"spec": {"containers": [{"resources": {"limits": {"cpu": cpu}}}]}});
        let mut pod = limits(json!(2));
        apply(&schema, &mut pod);
        assert_eq!(pod, limits(json!("2")));
    }
}
