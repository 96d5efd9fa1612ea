//! Events are stored in their core form; `events.k8s.io/v1` is another view of them.

use serde_json::{Map, Value, json};

/// New name, core name.
const RENAMED: [(&str, &str); 6] = [
    ("regarding", "involvedObject"),
    ("note", "message"),
    ("reportingController", "reportingComponent"),
    ("deprecatedSource", "source"),
    ("deprecatedFirstTimestamp", "firstTimestamp"),
    ("deprecatedLastTimestamp", "lastTimestamp"),
];

fn renamed(event: &Value, api_version: &str, name: impl Fn(&str) -> Option<&'static str>) -> Value {
    let mut result = Map::new();
    for (key, value) in event.as_object().into_iter().flatten() {
        let key = name(key).unwrap_or(key);
        result.insert(key.to_owned(), value.clone());
    }
    result.insert("apiVersion".to_owned(), json!(api_version));
    result.insert("kind".to_owned(), json!("Event"));
    Value::Object(result)
}

/// As `events.k8s.io/v1`.
pub fn to_new(event: &Value) -> Value {
    renamed(event, "events.k8s.io/v1", |key| match key {
        "count" => Some("deprecatedCount"),
        _ => RENAMED.iter().find(|(_, core)| *core == key).map(|(new, _)| *new),
    })
}

/// As core `v1`.
pub fn to_core(event: &Value) -> Value {
    renamed(event, "v1", |key| match key {
        "deprecatedCount" => Some("count"),
        _ => RENAMED.iter().find(|(new, _)| *new == key).map(|(_, core)| *core),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_ways() {
        let event = json!({
            "apiVersion": "events.k8s.io/v1", "kind": "Event", "regarding": {"name": "x"}, "note": "n",
            "reportingController": "c", "type": "Normal", "deprecatedCount": 2,
        });
        let core = to_core(&event);
        assert_eq!(core["involvedObject"]["name"], "x");
        assert_eq!(core["message"], "n");
        assert_eq!(core["count"], 2);
        assert_eq!(to_new(&core), event);
    }
}
