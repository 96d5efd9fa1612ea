//! Sets of field paths, and their JSON form `fieldsV1`.
//!
//! A path is a list of elements as `fieldsV1` writes them: `f:name` for a field, `k:{"name":"a"}` for an element of a
//! list with keys, `v:"x"` for an element of a set. Lists that merge as one value, scalars and empty maps are leaves.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Map, Value};

use crate::api::schema::{ListKind, Schema};

/// A path of elements.
pub type Path = Vec<String>;

/// A set of paths.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct FieldSet(pub BTreeSet<Path>);

/// For fields that the schema does not know.
static ANYTHING: std::sync::LazyLock<Schema> = std::sync::LazyLock::new(Schema::anything);

/// The schema of a field, or one that allows anything.
pub fn field_schema<'a>(schema: &'a Schema, name: &str) -> &'a Schema {
    schema.field(name).unwrap_or(&ANYTHING)
}

/// The schema of a list's elements, or one that allows anything.
pub fn item_schema(schema: &Schema) -> &Schema {
    schema.items.as_deref().unwrap_or(&ANYTHING)
}

/// The element that identifies an entry of a list; none if the list merges as one value.
pub fn list_element(schema: &Schema, entry: &Value) -> Option<String> {
    match &schema.list {
        ListKind::Atomic => None,
        ListKind::Set => Some(format!("v:{entry}")),
        ListKind::Map(keys) => {
            let items = item_schema(schema);
            let key: Map<String, Value> = keys
                .iter()
                .filter_map(|key| {
                    let default = || items.field(key).and_then(|field| field.default.clone());
                    Some((key.clone(), entry.get(key).cloned().or_else(default)?))
                })
                .collect();
            Some(format!("k:{}", Value::Object(key)))
        }
    }
}

/// All leaves of a value with what they hold. Elements of merging lists are leaves too, holding null.
pub fn leaves(schema: &Schema, value: &Value) -> BTreeMap<Path, Value> {
    let mut found = BTreeMap::new();
    collect(schema, value, &mut Vec::new(), &mut found);
    found
}

fn collect(schema: &Schema, value: &Value, path: &mut Path, found: &mut BTreeMap<Path, Value>) {
    match value {
        Value::Object(map) if !map.is_empty() && !schema.atomic_map => {
            for (name, field) in map {
                path.push(format!("f:{name}"));
                collect(field_schema(schema, name), field, path, found);
                path.pop();
            }
        }
        Value::Array(list) if !list.is_empty() && schema.list != ListKind::Atomic => {
            for entry in list {
                let Some(element) = list_element(schema, entry) else { continue };
                path.push(element);
                found.insert(path.clone(), Value::Null);
                if entry.is_object() {
                    collect(item_schema(schema), entry, path, found);
                }
                path.pop();
            }
        }
        leaf => {
            found.insert(path.clone(), leaf.clone());
        }
    }
}

impl FieldSet {
    /// Reads `fieldsV1`.
    pub fn from_json(fields: &Value) -> Self {
        let mut set = Self::default();
        set.read(fields, &mut Vec::new());
        set
    }

    fn read(&mut self, node: &Value, path: &mut Path) {
        for (element, child) in node.as_object().into_iter().flatten() {
            if element == "." {
                self.0.insert(path.clone());
                continue;
            }
            // Keys may be written in any order; ours are sorted.
            path.push(normal(element));
            if child.as_object().is_none_or(Map::is_empty) {
                self.0.insert(path.clone());
            } else {
                self.read(child, path);
            }
            path.pop();
        }
    }

    /// Writes `fieldsV1`.
    pub fn to_json(&self) -> Value {
        let mut root = Value::Object(Map::new());
        for path in &self.0 {
            let mut node = &mut root;
            for element in path {
                let map = match node {
                    Value::Object(map) => map,
                    _ => return root,
                };
                node = map.entry(element.clone()).or_insert_with(|| Value::Object(Map::new()));
            }
        }
        // A member that has members below it says so with a dot.
        for path in &self.0 {
            let node = path.iter().try_fold(&mut root, |node, element| node.get_mut(element));
            if let Some(Value::Object(map)) = node
                && !map.is_empty()
            {
                map.insert(".".to_owned(), Value::Object(Map::new()));
            }
        }
        root
    }

    /// Whether a path, or one below it, is in the set.
    pub fn touches(&self, path: &Path) -> bool {
        self.0.range(path.clone()..).next().is_some_and(|other| other.starts_with(path))
    }

    /// Whether it is empty.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

fn normal(element: &str) -> String {
    for prefix in ["k:", "v:"] {
        if let Some(json) = element.strip_prefix(prefix)
            && let Ok(value) = serde_json::from_str::<Value>(json)
        {
            return format!("{prefix}{value}");
        }
    }
    element.to_owned()
}

/// A path as messages print it: `.spec.containers[name="a"].image`.
pub fn shown(path: &Path) -> String {
    let mut text = String::new();
    for element in path {
        if let Some(name) = element.strip_prefix("f:") {
            text.push('.');
            text.push_str(name);
        } else if let Some(json) = element.strip_prefix("k:") {
            let keys: Map<String, Value> = serde_json::from_str(json).unwrap_or_default();
            let keys: Vec<String> = keys.iter().map(|(key, value)| format!("{key}={value}")).collect();
            text.push_str(&format!("[{}]", keys.join(",")));
        } else if let Some(json) = element.strip_prefix("v:") {
            text.push_str(&format!("[={json}]"));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::schema::builtin;
    use serde_json::json;

    #[test]
    fn json_both_ways() {
        let fields = json!({
            "f:metadata": {"f:labels": {"f:a": {}}},
            "f:spec": {"f:containers": {"k:{\"name\":\"a\"}": {".": {}, "f:name": {}, "f:image": {}}}},
        });
        let set = FieldSet::from_json(&fields);
        assert_eq!(set.0.len(), 4);
        assert_eq!(set.to_json(), fields);
    }

    #[test]
    fn leaves_of_a_pod() {
        let schema = builtin::schema("io.k8s.api.core.v1.Pod");
        let pod = json!({"spec": {"containers": [{"name": "a", "ports": [{"containerPort": 80}]}], "nodeSelector": {}}});
        let paths: Vec<String> = leaves(&schema, &pod).keys().map(shown).collect();
        assert_eq!(
            paths,
            [
                r#".spec.containers[name="a"]"#,
                r#".spec.containers[name="a"].name"#,
                r#".spec.containers[name="a"].ports[containerPort=80,protocol="TCP"]"#,
                r#".spec.containers[name="a"].ports[containerPort=80,protocol="TCP"].containerPort"#,
                ".spec.nodeSelector",
            ]
        );
    }

    #[test]
    fn touching() {
        let path = |elements: &[&str]| elements.iter().map(|&one| one.to_owned()).collect::<Path>();
        let set = FieldSet([path(&["f:a", "f:b"]), path(&["f:l", "k:{}"])].into());
        assert!(set.touches(&path(&["f:a"])));
        assert!(!set.touches(&path(&["f:a", "f:bb"])));
        assert!(!set.touches(&path(&["f:l", "k:{}", "f:x"])));
    }
}
