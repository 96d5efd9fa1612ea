//! Checks an object against its schema and words the violations as the real API server does.

use serde_json::Value;

use super::{Additional, Bounds, ListKind, Schema, cel};
use crate::api::error::FieldError;

/// Everything about `value` that the schema forbids. `old` is the stored object on updates, for transition rules.
pub fn check(schema: &Schema, value: &Value, old: Option<&Value>) -> Vec<FieldError> {
    let mut errors = Vec::new();
    check_values(schema, value, "", &mut errors);
    // Rules may assume that types hold.
    if errors.is_empty() {
        check_rules(schema, value, old, "", &mut errors);
    }
    errors
}

fn join(path: &str, name: &str) -> String {
    if path.is_empty() { name.to_owned() } else { format!("{path}.{name}") }
}

fn in_body(path: &str) -> String {
    if path.is_empty() { "<nil> in body".to_owned() } else { format!("{path} in body") }
}

fn type_of(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "boolean",
        Value::Number(number) if number.is_f64() => "number",
        Value::Number(_) => "integer",
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
    }
}

fn has_type(schema: &Schema, value: &Value) -> bool {
    if schema.int_or_string {
        return matches!(value, Value::Number(_) | Value::String(_));
    }
    match (schema.kind.as_str(), value) {
        ("", _)
        | ("string", Value::String(_))
        | ("boolean", Value::Bool(_))
        | ("object", Value::Object(_))
        | ("array", Value::Array(_))
        | ("number", Value::Number(_)) => true,
        ("integer", Value::Number(number)) => {
            number.is_i64() || number.is_u64() || number.as_f64().is_some_and(|float| float.fract() == 0.0)
        }
        _ => false,
    }
}

fn check_values(schema: &Schema, value: &Value, path: &str, errors: &mut Vec<FieldError>) {
    if value.is_null() && (schema.nullable || schema.kind.is_empty()) {
        return;
    }
    if !has_type(schema, value) {
        let kind = if schema.int_or_string { "integer or string" } else { &schema.kind };
        let shown = match value {
            Value::Object(_) | Value::Array(_) | Value::Null => Value::String(type_of(value).to_owned()),
            scalar => scalar.clone(),
        };
        let detail = format!("{} must be of type {kind}: \"{}\"", in_body(path), type_of(value));
        errors.push(FieldError {
            reason: "FieldValueTypeInvalid",
            ..FieldError::invalid(path, &shown, detail)
        });
        return;
    }
    check_constraints(schema, value, path, errors);
    check_children(schema, value, path, errors);
    check_combined(schema, value, path, errors);
}

fn check_constraints(schema: &Schema, value: &Value, path: &str, errors: &mut Vec<FieldError>) {
    if !schema.allowed.is_empty() && !schema.allowed.contains(value) {
        let allowed: Vec<String> = schema
            .allowed
            .iter()
            .map(|one| one.as_str().map_or_else(|| one.to_string(), str::to_owned))
            .collect();
        errors.push(FieldError::not_supported(path, value, &allowed));
    }
    let mut invalid = |value: &Value, detail: String| {
        errors.push(FieldError::invalid(path, value, format!("{} {detail}", in_body(path))));
    };
    let bounds = &schema.bounds;
    match value {
        Value::Number(number) => {
            for detail in number_violations(bounds, &schema.format, number) {
                invalid(value, detail);
            }
        }
        Value::String(text) => {
            let length = text.chars().count() as u64;
            if let Some(limit) = bounds.min_length.filter(|&limit| length < limit) {
                invalid(value, format!("should be at least {limit} chars long"));
            }
            if let Some((source, Some(pattern))) = &schema.pattern
                && !pattern.is_match(text)
            {
                invalid(value, format!("should match '{source}'"));
            }
            if !format_holds(&schema.format, text) {
                invalid(value, format!("must be of type {}: {value}", schema.format));
            }
            if let Some(limit) = bounds.max_length.filter(|&limit| length > limit) {
                errors.push(FieldError {
                    reason: "FieldValueTooLong",
                    field: path.to_owned(),
                    message: format!("Too long: may not be more than {limit} bytes"),
                });
            }
        }
        Value::Array(list) => {
            let count = list.len() as u64;
            if let Some(limit) = bounds.min_items.filter(|&limit| count < limit) {
                invalid(&count.into(), format!("should have at least {limit} items"));
            }
            if bounds.unique_items && has_duplicate(list) {
                invalid(&Value::from("array"), "shouldn't contain duplicates".to_owned());
            }
            if let Some(limit) = bounds.max_items.filter(|&limit| count > limit) {
                errors.push(FieldError {
                    reason: "FieldValueTooMany",
                    field: path.to_owned(),
                    message: format!("Too many: {count}: must have at most {limit} items"),
                });
            }
            check_list_keys(schema, list, path, errors);
        }
        Value::Object(map) => {
            let count = map.len() as u64;
            if let Some(limit) = bounds.min_properties.filter(|&limit| count < limit) {
                invalid(&count.into(), format!("should have at least {limit} properties"));
            }
            if let Some(limit) = bounds.max_properties.filter(|&limit| count > limit) {
                errors.push(FieldError {
                    reason: "FieldValueTooMany",
                    field: path.to_owned(),
                    message: format!("Too many: {count}: must have at most {limit} items"),
                });
            }
        }
        Value::Bool(_) | Value::Null => {}
    }
}

fn number_violations(bounds: &Bounds, format: &str, number: &serde_json::Number) -> Vec<String> {
    let mut found = Vec::new();
    let Some(float) = number.as_f64() else {
        return found;
    };
    match bounds.minimum {
        Some((limit, true)) if float <= limit => found.push(format!("should be greater than {limit}")),
        Some((limit, false)) if float < limit => {
            found.push(format!("should be greater than or equal to {limit}"));
        }
        _ => {}
    }
    match bounds.maximum {
        Some((limit, true)) if float >= limit => found.push(format!("should be less than {limit}")),
        Some((limit, false)) if float > limit => {
            found.push(format!("should be less than or equal to {limit}"))
        }
        _ => {}
    }
    if let Some(step) = bounds.multiple_of
        && step != 0.0
        && (float / step).fract() != 0.0
    {
        found.push(format!("should be a multiple of {step}"));
    }
    if format == "int32" && number.as_i64().is_none_or(|whole| i32::try_from(whole).is_err()) {
        found.push(format!("must be of type int32: \"{number}\""));
    }
    found
}

/// Formats that the real server checks; others are only documentation.
fn format_holds(format: &str, text: &str) -> bool {
    match format {
        "date-time" => text.parse::<jiff::Timestamp>().is_ok(),
        "date" => text.parse::<jiff::civil::Date>().is_ok(),
        "ipv4" => text.parse::<std::net::Ipv4Addr>().is_ok(),
        "ipv6" => text.parse::<std::net::Ipv6Addr>().is_ok(),
        "cidr" => text.parse::<ipnet::IpNet>().is_ok(),
        "uuid" => text.parse::<uuid::Uuid>().is_ok(),
        _ => true,
    }
}

fn has_duplicate(list: &[Value]) -> bool {
    list.iter().enumerate().any(|(index, one)| list[..index].contains(one))
}

fn check_list_keys(schema: &Schema, list: &[Value], path: &str, errors: &mut Vec<FieldError>) {
    let mut seen: Vec<Value> = Vec::new();
    for (index, one) in list.iter().enumerate() {
        let key = match &schema.list {
            ListKind::Atomic => return,
            ListKind::Set => one.clone(),
            ListKind::Map(keys) => {
                let part = |key: &String| {
                    let default = schema.items.as_ref().and_then(|items| items.field(key)?.default.clone());
                    (key.clone(), one.get(key).cloned().or(default).unwrap_or_default())
                };
                Value::Object(keys.iter().map(part).collect())
            }
        };
        if seen.contains(&key) {
            errors.push(FieldError {
                reason: "FieldValueDuplicate",
                field: format!("{path}[{index}]"),
                message: format!("Duplicate value: {key}"),
            });
        } else {
            seen.push(key);
        }
    }
}

fn check_children(schema: &Schema, value: &Value, path: &str, errors: &mut Vec<FieldError>) {
    match value {
        Value::Object(map) => {
            for name in &schema.required {
                if map.get(name).is_none() {
                    errors.push(FieldError::required(join(path, name), ""));
                }
            }
            for (name, field) in map {
                if let Some(child) = schema.properties.get(name) {
                    check_values(child, field, &join(path, name), errors);
                } else if let Additional::Of(child) = &schema.additional {
                    check_values(child, field, &join(path, name), errors);
                }
            }
        }
        Value::Array(list) => {
            if let Some(items) = &schema.items {
                for (index, one) in list.iter().enumerate() {
                    check_values(items, one, &format!("{path}[{index}]"), errors);
                }
            }
        }
        _ => {}
    }
}

fn check_combined(schema: &Schema, value: &Value, path: &str, errors: &mut Vec<FieldError>) {
    let holds = |one: &Schema| {
        let mut found = Vec::new();
        check_values(one, value, path, &mut found);
        found.is_empty()
    };
    for one in &schema.all_of {
        check_values(one, value, path, errors);
    }
    // `x-kubernetes-int-or-string` schemas carry an anyOf of the two types, which has_type has checked.
    if !schema.any_of.is_empty() && !schema.int_or_string && !schema.any_of.iter().any(|one| holds(one)) {
        errors.push(FieldError::invalid(
            path,
            &Value::from(type_of(value)),
            format!("{} must validate at least one schema (anyOf)", in_body(path)),
        ));
    }
    if !schema.one_of.is_empty() {
        let count = schema.one_of.iter().filter(|one| holds(one)).count();
        if count != 1 {
            let found = if count == 0 { "Found none valid" } else { "Found more than one valid" };
            errors.push(FieldError::invalid(
                path,
                &Value::from(type_of(value)),
                format!("{} must validate one and only one schema (oneOf). {found}", in_body(path)),
            ));
        }
    }
    if schema.not.as_ref().is_some_and(|not| holds(not)) {
        errors.push(FieldError::invalid(
            path,
            &Value::from(type_of(value)),
            format!("{} must not validate the schema (not)", in_body(path)),
        ));
    }
}

fn check_rules(
    schema: &Schema,
    value: &Value,
    old: Option<&Value>,
    path: &str,
    errors: &mut Vec<FieldError>,
) {
    if value.is_null() {
        return;
    }
    cel::check(schema, value, old, path, errors);
    match value {
        Value::Object(map) => {
            for (name, field) in map {
                if let Some(child) = schema.field(name) {
                    check_rules(child, field, old.and_then(|old| old.get(name)), &join(path, name), errors);
                }
            }
        }
        Value::Array(list) => {
            if let Some(items) = &schema.items {
                for (index, one) in list.iter().enumerate() {
                    let old = old.and_then(|old| matching_element(schema, old, one));
                    check_rules(items, one, old, &format!("{path}[{index}]"), errors);
                }
            }
        }
        _ => {}
    }
}

/// Elements are comparable over an update only in lists that merge by keys.
fn matching_element<'a>(schema: &Schema, old: &'a Value, element: &Value) -> Option<&'a Value> {
    let ListKind::Map(keys) = &schema.list else {
        return None;
    };
    old.as_array()?.iter().find(|one| keys.iter().all(|key| one.get(key) == element.get(key)))
}
