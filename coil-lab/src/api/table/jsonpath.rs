//! The subset of JSONPath that printer columns and scale paths use: fields, quoted fields, indices, wildcards and
//! filters `[?(@.a=="b")]`.

use serde_json::Value;

/// A parsed path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JsonPath(Vec<Step>);

#[derive(Debug, Clone, PartialEq, Eq)]
enum Step {
    Field(String),
    Index(i64),
    All,
    Filter { path: Vec<Step>, equal: bool, value: Value },
    Has(Vec<Step>),
}

/// A path that cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("cannot read the path at: {0}")]
pub struct PathError(String);

impl JsonPath {
    /// Parses `.spec.x`, `.status.conditions[?(@.type=="Ready")].status`, `.metadata.labels.a\.b/c` and the like.
    pub fn parse(text: &str) -> Result<Self, PathError> {
        let inner =
            text.trim().strip_prefix('{').and_then(|text| text.strip_suffix('}')).unwrap_or(text.trim());
        let inner = inner.strip_prefix('$').unwrap_or(inner);
        Ok(Self(steps(inner)?))
    }

    /// All values at the path.
    pub fn find<'a>(&self, value: &'a Value) -> Vec<&'a Value> {
        let mut found = walk(&self.0, value);
        found.retain(|one| !one.is_null());
        found
    }

    /// Sets the value at a path of plain fields, making maps on the way. False if the path has other steps.
    pub fn set(&self, value: &mut Value, new: Value) -> bool {
        let fields: Option<Vec<&str>> = self
            .0
            .iter()
            .map(|step| match step {
                Step::Field(name) => Some(name.as_str()),
                _ => None,
            })
            .collect();
        match fields {
            Some(fields) if !fields.is_empty() => {
                crate::api::obj::set(value, &fields, new);
                true
            }
            _ => false,
        }
    }
}

fn steps(text: &str) -> Result<Vec<Step>, PathError> {
    let mut steps = Vec::new();
    let mut rest = text;
    while !rest.is_empty() {
        let error = || PathError(rest.to_owned());
        if let Some(tail) = rest.strip_prefix('[') {
            let end = closing(tail).ok_or_else(error)?;
            steps.push(bracket(&tail[..end]).ok_or_else(error)?);
            rest = &tail[end + 1..];
            continue;
        }
        let tail = rest.strip_prefix('.').unwrap_or(rest);
        if tail.starts_with('[') || tail.is_empty() {
            rest = tail;
            continue;
        }
        let (name, end) = field_name(tail);
        if name.is_empty() {
            return Err(error());
        }
        steps.push(if name == "*" { Step::All } else { Step::Field(name) });
        rest = &tail[end..];
    }
    Ok(steps)
}

/// Position of the bracket that closes, outside of quotes.
fn closing(text: &str) -> Option<usize> {
    let (mut quote, mut depth) = (None, 0);
    for (index, c) in text.char_indices() {
        match (quote, c) {
            (Some(open), c) if c == open => quote = None,
            (Some(_), _) => {}
            (None, '\'' | '"') => quote = Some(c),
            (None, '[') => depth += 1,
            (None, ']') if depth == 0 => return Some(index),
            (None, ']') => depth -= 1,
            _ => {}
        }
    }
    None
}

fn field_name(text: &str) -> (String, usize) {
    let mut name = String::new();
    let mut chars = text.char_indices();
    while let Some((index, c)) = chars.next() {
        match c {
            '\\' => {
                if let Some((_, escaped)) = chars.next() {
                    name.push(escaped);
                }
            }
            '.' | '[' => return (name, index),
            c => name.push(c),
        }
    }
    (name, text.len())
}

fn bracket(text: &str) -> Option<Step> {
    let text = text.trim();
    if text == "*" {
        return Some(Step::All);
    }
    if let Some(quoted) = unquote(text) {
        // Dots may be escaped here as well, and have to be for some readers.
        return Some(Step::Field(quoted.replace('\\', "")));
    }
    if let Ok(index) = text.parse() {
        return Some(Step::Index(index));
    }
    let filter = text.strip_prefix("?(")?.strip_suffix(')')?.trim();
    let (left, equal, right) = match (filter.split_once("=="), filter.split_once("!=")) {
        (Some((left, right)), _) => (left, true, right),
        (None, Some((left, right))) => (left, false, right),
        (None, None) => return Some(Step::Has(steps(filter.strip_prefix('@')?).ok()?)),
    };
    let path = steps(left.trim().strip_prefix('@')?).ok()?;
    let right = right.trim();
    let value = match unquote(right) {
        Some(text) => Value::from(text),
        None => serde_json::from_str(right).ok()?,
    };
    Some(Step::Filter { path, equal, value })
}

fn unquote(text: &str) -> Option<&str> {
    ['\'', '"'].iter().find_map(|&quote| text.strip_prefix(quote)?.strip_suffix(quote))
}

fn walk<'a>(steps: &[Step], value: &'a Value) -> Vec<&'a Value> {
    let Some((step, rest)) = steps.split_first() else {
        return vec![value];
    };
    let next: Vec<&Value> = match (step, value) {
        (Step::Field(name), _) => value.get(name).into_iter().collect(),
        (Step::Index(index), Value::Array(list)) => {
            let index = if *index < 0 {
                list.len().checked_sub(usize::try_from(index.unsigned_abs()).unwrap_or(usize::MAX))
            } else {
                usize::try_from(*index).ok()
            };
            index.and_then(|index| list.get(index)).into_iter().collect()
        }
        (Step::All, Value::Array(list)) => list.iter().collect(),
        (Step::All, Value::Object(map)) => map.values().collect(),
        (Step::Filter { path, equal, value: wanted }, Value::Array(list)) => list
            .iter()
            .filter(|one| walk(path, one).first().is_some_and(|found| (*found == wanted) == *equal))
            .collect(),
        (Step::Has(path), Value::Array(list)) => {
            list.iter().filter(|one| !walk(path, one).is_empty()).collect()
        }
        _ => Vec::new(),
    };
    next.into_iter().flat_map(|one| walk(rest, one)).collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use serde_json::json;

    #[test]
    fn finds() {
        let object = json!({
            "spec": {"x": 3, "list": [1, 2]},
            "metadata": {"labels": {"a.b/c": "v"}},
            "status": {"conditions": [{"type": "A", "status": "False"}, {"type": "Ready", "status": "True"}]},
        });
        for (path, expected) in [
            (".spec.x", vec![json!(3)]),
            ("{.spec.x}", vec![json!(3)]),
            ("spec.x", vec![json!(3)]),
            (r".metadata.labels.a\.b/c", vec![json!("v")]),
            (".metadata.labels['a.b/c']", vec![json!("v")]),
            (r".metadata.labels['a\.b/c']", vec![json!("v")]),
            (r#".status.conditions[?(@.type=="Ready")].status"#, vec![json!("True")]),
            (r#".status.conditions[?(@.type!='Ready')].status"#, vec![json!("False")]),
            (".spec.list[*]", vec![json!(1), json!(2)]),
            (".spec.list[-1]", vec![json!(2)]),
            (".spec.none", vec![]),
        ] {
            let found: Vec<Value> =
                JsonPath::parse(path).unwrap().find(&object).into_iter().cloned().collect();
            assert_eq!(found, expected, "{path}");
        }
        assert!(JsonPath::parse(".a[").is_err());
        assert!(JsonPath::parse(".a[?(x)]").is_err());
    }

    #[test]
    fn sets() {
        let mut object = json!({});
        assert!(JsonPath::parse(".spec.replicas").unwrap().set(&mut object, json!(2)));
        assert_eq!(object, json!({"spec": {"replicas": 2}}));
    }
}
