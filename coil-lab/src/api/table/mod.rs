//! The Table form that `kubectl get` asks for.

pub mod builtin;
pub mod jsonpath;

use serde_json::{Value, json};

use super::obj;
use super::read;
use super::registry::Resource;

/// A column: heading, type, format, help, priority.
#[derive(Debug, Clone)]
pub struct Column {
    name: String,
    kind: String,
    format: String,
    description: String,
    priority: i64,
}

impl Column {
    fn new(name: &str, priority: i64) -> Self {
        Self {
            name: name.to_owned(),
            kind: "string".to_owned(),
            format: if name == "Name" { "name".to_owned() } else { String::new() },
            description: String::new(),
            priority,
        }
    }

    fn definition(&self) -> Value {
        json!({
            "name": self.name, "type": self.kind, "format": self.format,
            "description": self.description, "priority": self.priority,
        })
    }
}

/// What the rows carry of their object.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Include {
    /// Nothing.
    Nothing,
    /// Its metadata.
    Metadata,
    /// All of it.
    Object,
}

impl Include {
    /// From the query parameter.
    pub fn read(text: &str) -> Self {
        match text {
            "None" => Self::Nothing,
            "Object" => Self::Object,
            _ => Self::Metadata,
        }
    }
}

/// A table of objects.
pub fn table<'a>(
    resource: &Resource,
    version: &str,
    meta: Value,
    objects: impl Iterator<Item = &'a Value>,
    include: Include,
) -> Value {
    let columns: Vec<Value> = columns(resource).iter().map(Column::definition).collect();
    let rows: Vec<Value> = objects
        .map(|object| {
            let mut row = json!({"cells": cells(resource, object)});
            match include {
                Include::Nothing => {}
                Include::Metadata => obj::set(&mut row, &["object"], partial(object, version)),
                Include::Object => obj::set(&mut row, &["object"], read::present(resource, object)),
            }
            row
        })
        .collect();
    json!({
        "kind": "Table", "apiVersion": format!("meta.k8s.io/{version}"), "metadata": meta,
        "columnDefinitions": columns, "rows": rows,
    })
}

/// An object's metadata as `PartialObjectMetadata`.
pub fn partial(object: &Value, version: &str) -> Value {
    json!({
        "kind": "PartialObjectMetadata", "apiVersion": format!("meta.k8s.io/{version}"),
        "metadata": object.get("metadata"),
    })
}

fn columns(resource: &Resource) -> Vec<Column> {
    let mut columns = vec![Column::new("Name", 0)];
    if resource.custom {
        columns.extend(resource.columns.iter().map(|column| Column {
            name: column.name.clone(),
            kind: column.kind.clone(),
            format: column.format.clone(),
            description: column.description.clone(),
            priority: column.priority,
        }));
        if resource.columns.is_empty() {
            columns.push(Column::new("Age", 0));
        }
        return columns;
    }
    let shape = builtin::columns(&resource.kind);
    if resource.kind == "Event" {
        columns.clear();
    }
    columns.extend(shape.iter().map(|&(name, priority)| Column::new(name, priority)));
    columns
}

fn cells(resource: &Resource, object: &Value) -> Vec<Value> {
    let mut cells = vec![json!(obj::name(object))];
    if resource.custom {
        if resource.columns.is_empty() {
            cells.push(json!(age(obj::text(object, &["metadata", "creationTimestamp"]))));
        }
        for column in &resource.columns {
            cells.push(custom_cell(&column.kind, &column.path.find(object)));
        }
        return cells;
    }
    if resource.kind == "Event" {
        cells.clear();
    }
    cells.extend(builtin::cells(&resource.kind, object));
    cells
}

fn custom_cell(kind: &str, found: &[&Value]) -> Value {
    let Some(first) = found.first() else {
        return Value::Null;
    };
    match (kind, first) {
        ("date", Value::String(text)) => json!(age(text)),
        ("integer", Value::Number(number)) => json!(number.as_i64()),
        ("number" | "boolean", scalar @ (Value::Number(_) | Value::Bool(_))) => (*scalar).clone(),
        ("string", _) => {
            let texts: Vec<String> =
                found.iter().map(|one| one.as_str().map_or_else(|| one.to_string(), str::to_owned)).collect();
            json!(texts.join(","))
        }
        _ => Value::Null,
    }
}

/// Time since a stamp in the short form of `kubectl`.
pub fn age(stamp: &str) -> String {
    match stamp.parse::<jiff::Timestamp>() {
        Ok(time) => human(jiff::Timestamp::now().duration_since(time).as_secs()),
        Err(_) => "<unknown>".to_owned(),
    }
}

/// A duration as Kubernetes prints it: two units while that is telling.
pub fn human(seconds: i64) -> String {
    let (minutes, hours) = (seconds / 60, seconds / 3600);
    let pair = |big: i64, big_unit: &str, small: i64, small_unit: &str| {
        if small == 0 { format!("{big}{big_unit}") } else { format!("{big}{big_unit}{small}{small_unit}") }
    };
    match seconds {
        ..-1 => "<invalid>".to_owned(),
        -1 => "0s".to_owned(),
        0..120 => format!("{seconds}s"),
        120..600 => pair(minutes, "m", seconds % 60, "s"),
        600..10_800 => format!("{minutes}m"),
        10_800..28_800 => pair(hours, "h", minutes % 60, "m"),
        28_800..172_800 => format!("{hours}h"),
        172_800..691_200 => pair(hours / 24, "d", hours % 24, "h"),
        691_200..63_072_000 => format!("{}d", hours / 24),
        63_072_000..252_288_000 => pair(hours / 24 / 365, "y", hours / 24 % 365, "d"),
        _ => format!("{}y", hours / 24 / 365),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations() {
        for (seconds, text) in [
            (0, "0s"),
            (119, "119s"),
            (120, "2m"),
            (125, "2m5s"),
            (600, "10m"),
            (10_800, "3h"),
            (11_000, "3h3m"),
            (90_000, "25h"),
            (172_800, "2d"),
            (180_000, "2d2h"),
            (800_000, "9d"),
        ] {
            assert_eq!(human(seconds), text);
        }
    }
}
