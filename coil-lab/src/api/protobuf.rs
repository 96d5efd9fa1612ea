//! Reads bodies in the protobuf form of built-in kinds, which Go clients and newer `kubectl create` send without asking.
//! Answers are always JSON, which those clients accept.
//!
//! The field numbers are data (`protobuf_fields.txt`); types come from the schemas of the kinds.

use std::collections::HashMap;
use std::sync::LazyLock;

use serde_json::{Map, Value, json};

use super::schema::builtin::DEFINITIONS;
use super::{defaults, kinds, obj};

/// First bytes of a body.
const MAGIC: &[u8] = b"k8s\0";
/// Nesting deeper than this is refused.
const DEPTH: usize = 64;

/// Numbers whose zero means something: optional fields. Zeros of other fields are what Go writes for "not set".
const MEANINGFUL_ZEROS: [&str; 24] = [
    "replicas",
    "revisionHistoryLimit",
    "terminationGracePeriodSeconds",
    "activeDeadlineSeconds",
    "backoffLimit",
    "parallelism",
    "completions",
    "priority",
    "gracePeriodSeconds",
    "runAsUser",
    "runAsGroup",
    "fsGroup",
    "defaultMode",
    "mode",
    "partition",
    "leaseDurationSeconds",
    "leaseTransitions",
    "expirationSeconds",
    "tolerationSeconds",
    "successfulJobsHistoryLimit",
    "failedJobsHistoryLimit",
    "ttlSecondsAfterFinished",
    "value",
    "intVal",
];

/// A body that cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ProtobufError {
    /// It does not start as one.
    #[error("the body does not start with the magic number of Kubernetes protobuf")]
    Magic,
    /// It ends too early or is nested too deeply.
    #[error("the body is malformed")]
    Malformed,
    /// The kind has no known field numbers.
    #[error("the protobuf form of {0} is not known")]
    Kind(String),
}

enum Field {
    Named(String),
    Inline(HashMap<u64, String>),
}

static FIELDS: LazyLock<HashMap<String, HashMap<u64, Field>>> = LazyLock::new(|| {
    include_str!("protobuf_fields.txt")
        .lines()
        .filter(|line| !line.starts_with('#'))
        .filter_map(|line| {
            let (definition, fields) = line.split_once(' ')?;
            Some((definition.to_owned(), fields.split(' ').filter_map(read_field).collect()))
        })
        .collect()
});

fn read_field(text: &str) -> Option<(u64, Field)> {
    let (number, name) = text.split_once('=')?;
    let field = match name.strip_prefix('(').and_then(|inner| inner.strip_suffix(')')) {
        Some(inner) => {
            let pairs = inner.split(',').filter_map(|pair| pair.split_once('='));
            Field::Inline(
                pairs.filter_map(|(number, name)| Some((number.parse().ok()?, name.to_owned()))).collect(),
            )
        }
        None => Field::Named(name.to_owned()),
    };
    Some((number.parse().ok()?, field))
}

/// The short name of a definition, as the table has it.
fn short(definition: &str) -> &str {
    ["io.k8s.api.", "io.k8s.apimachinery.pkg.apis."]
        .iter()
        .find_map(|prefix| definition.strip_prefix(prefix))
        .unwrap_or(definition)
}

/// Reads a body: the object with its kind.
pub fn decode(bytes: &[u8]) -> Result<Value, ProtobufError> {
    let envelope = bytes.strip_prefix(MAGIC).ok_or(ProtobufError::Magic)?;
    let (mut api_version, mut kind, mut raw) = (String::new(), String::new(), &[][..]);
    for (number, wire) in Wires(envelope) {
        match (number, wire?) {
            (1, Wire::Bytes(meta)) => {
                for (number, wire) in Wires(meta) {
                    match (number, wire?) {
                        (1, Wire::Bytes(text)) => api_version = lossy(text),
                        (2, Wire::Bytes(text)) => kind = lossy(text),
                        _ => {}
                    }
                }
            }
            (2, Wire::Bytes(body)) => raw = body,
            _ => {}
        }
    }
    let definition = definition_of(&api_version, &kind)
        .filter(|definition| FIELDS.contains_key(short(definition)))
        .ok_or_else(|| ProtobufError::Kind(format!("{api_version} {kind}")))?;
    let mut object = message(&definition, raw, 0)?;
    obj::set(&mut object, &["apiVersion"], api_version);
    obj::set(&mut object, &["kind"], kind);
    Ok(object)
}

fn definition_of(api_version: &str, kind: &str) -> Option<String> {
    let group = api_version.rsplit_once('/').map_or("", |(group, _)| group);
    let known = match kind {
        "DeleteOptions" => "io.k8s.apimachinery.pkg.apis.meta.v1.DeleteOptions".to_owned(),
        "Eviction" => "io.k8s.api.policy.v1.Eviction".to_owned(),
        "Binding" => "io.k8s.api.core.v1.Binding".to_owned(),
        "Scale" => "io.k8s.api.autoscaling.v1.Scale".to_owned(),
        _ if group == "authorization.k8s.io" => format!("io.k8s.api.authorization.v1.{kind}"),
        _ if group == "authentication.k8s.io" => format!("io.k8s.api.authentication.v1.{kind}"),
        _ => kinds::definition(group, kind)?,
    };
    Some(known)
}

enum Wire<'a> {
    Number(u64),
    Bytes(&'a [u8]),
}

struct Wires<'a>(&'a [u8]);

impl<'a> Wires<'a> {
    fn varint(&mut self) -> Option<u64> {
        let mut value = 0_u64;
        for shift in (0..70).step_by(7) {
            let (byte, rest) = self.0.split_first()?;
            self.0 = rest;
            value |= u64::from(byte & 0x7f).checked_shl(shift).unwrap_or(0);
            if byte & 0x80 == 0 {
                return Some(value);
            }
        }
        None
    }

    fn take(&mut self, count: usize) -> Option<&'a [u8]> {
        let (head, rest) = self.0.split_at_checked(count)?;
        self.0 = rest;
        Some(head)
    }

    fn read(&mut self) -> Option<(u64, Wire<'a>)> {
        let tag = self.varint()?;
        let wire = match tag & 7 {
            0 => Wire::Number(self.varint()?),
            1 => Wire::Number(u64::from_le_bytes(self.take(8)?.try_into().ok()?)),
            2 => {
                let length = usize::try_from(self.varint()?).ok()?;
                Wire::Bytes(self.take(length)?)
            }
            5 => Wire::Number(u64::from(u32::from_le_bytes(self.take(4)?.try_into().ok()?))),
            _ => return None,
        };
        Some((tag >> 3, wire))
    }
}

impl<'a> Iterator for Wires<'a> {
    type Item = (u64, Result<Wire<'a>, ProtobufError>);

    fn next(&mut self) -> Option<Self::Item> {
        if self.0.is_empty() {
            return None;
        }
        match self.read() {
            Some((number, wire)) => Some((number, Ok(wire))),
            None => {
                self.0 = &[];
                Some((0, Err(ProtobufError::Malformed)))
            }
        }
    }
}

fn lossy(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn message(definition: &str, bytes: &[u8], depth: usize) -> Result<Value, ProtobufError> {
    if depth > DEPTH {
        return Err(ProtobufError::Malformed);
    }
    let name = definition.rsplit('.').next().unwrap_or_default();
    match name {
        "Time" | "MicroTime" => return time(name, bytes),
        "IntOrString" => return int_or_string(bytes),
        "Quantity" => return Ok(Value::from(first_text(bytes)?)),
        "FieldsV1" | "RawExtension" => {
            return Ok(serde_json::from_str(&first_text(bytes)?).unwrap_or_default());
        }
        _ => {}
    }
    let mut object = Map::new();
    if let Some(fields) = FIELDS.get(short(definition)) {
        for (number, wire) in Wires(bytes) {
            match (fields.get(&number), wire?) {
                (Some(Field::Named(name)), wire) => add(definition, name, &wire, &mut object, depth)?,
                (Some(Field::Inline(inner)), Wire::Bytes(bytes)) => {
                    for (number, wire) in Wires(bytes) {
                        if let Some(name) = inner.get(&number) {
                            add(definition, name, &wire?, &mut object, depth)?;
                        }
                    }
                }
                _ => {}
            }
        }
    }
    Ok(Value::Object(object))
}

fn first_text(bytes: &[u8]) -> Result<String, ProtobufError> {
    for (number, wire) in Wires(bytes) {
        if let (1, Wire::Bytes(text)) = (number, wire?) {
            return Ok(lossy(text));
        }
    }
    Ok(String::new())
}

fn time(name: &str, bytes: &[u8]) -> Result<Value, ProtobufError> {
    let (mut seconds, mut nanos) = (None, 0);
    for (number, wire) in Wires(bytes) {
        match (number, wire?) {
            (1, Wire::Number(value)) => seconds = Some(value.cast_signed()),
            (2, Wire::Number(value)) => nanos = i32::try_from(value.cast_signed()).unwrap_or(0),
            _ => {}
        }
    }
    let stamp = seconds.and_then(|seconds| jiff::Timestamp::new(seconds, nanos).ok());
    Ok(match (stamp, name) {
        (None, _) => Value::Null,
        (Some(stamp), "Time") => json!(obj::stamp(stamp)),
        (Some(stamp), _) => json!(stamp.strftime("%Y-%m-%dT%H:%M:%S.%6fZ").to_string()),
    })
}

fn int_or_string(bytes: &[u8]) -> Result<Value, ProtobufError> {
    let (mut is_text, mut number, mut text) = (false, 0, String::new());
    for (field, wire) in Wires(bytes) {
        match (field, wire?) {
            (1, Wire::Number(kind)) => is_text = kind == 1,
            (2, Wire::Number(value)) => number = value.cast_signed(),
            (3, Wire::Bytes(value)) => text = lossy(value),
            _ => {}
        }
    }
    Ok(if is_text { json!(text) } else { json!(number) })
}

/// Adds a field to an object: repeated ones are gathered, unset ones left out.
fn add(
    definition: &str,
    name: &str,
    wire: &Wire<'_>,
    object: &mut Map<String, Value>,
    depth: usize,
) -> Result<(), ProtobufError> {
    let schema = DEFINITIONS.get(definition).and_then(|schema| obj::at(schema, &["properties", name]));
    let Some(schema) = schema else { return Ok(()) };
    if let (Some(values), Wire::Bytes(entry)) = (schema.get("additionalProperties"), wire) {
        let (mut key, mut value) = (String::new(), Value::from(""));
        for (number, wire) in Wires(entry) {
            match (number, wire?) {
                (1, Wire::Bytes(text)) => key = lossy(text),
                (2, wire) => value = single(values, &wire, depth)?,
                _ => {}
            }
        }
        let map = object.entry(name.to_owned()).or_insert_with(|| json!({}));
        obj::set(map, &[&key], value);
        return Ok(());
    }
    if let Some(items) = schema.get("items") {
        let value = single(items, wire, depth)?;
        if let Value::Array(list) = object.entry(name.to_owned()).or_insert_with(|| json!([])) {
            list.push(value);
        }
        return Ok(());
    }
    let value = single(schema, wire, depth)?;
    let is_unset = match &value {
        Value::Null => true,
        Value::String(text) => text.is_empty(),
        Value::Number(number) => number.as_i64() == Some(0) && !MEANINGFUL_ZEROS.contains(&name),
        _ => false,
    };
    if !is_unset {
        object.insert(name.to_owned(), value);
    }
    Ok(())
}

fn single(schema: &Value, wire: &Wire<'_>, depth: usize) -> Result<Value, ProtobufError> {
    let reference = schema.get("$ref").or_else(|| obj::items(schema, &["allOf"]).first()?.get("$ref"));
    if let Some(definition) = reference.and_then(Value::as_str).and_then(|text| text.rsplit('/').next()) {
        return match wire {
            Wire::Bytes(bytes) => message(definition, bytes, depth + 1),
            Wire::Number(_) => Err(ProtobufError::Malformed),
        };
    }
    Ok(match (wire, obj::text(schema, &["type"])) {
        (Wire::Number(number), "boolean") => json!(*number != 0),
        (Wire::Number(number), "number") => json!(f64::from_bits(*number)),
        (Wire::Number(number), _) => json!(number.cast_signed()),
        (Wire::Bytes(bytes), _) if obj::text(schema, &["format"]) == "byte" => json!(defaults::base64(bytes)),
        (Wire::Bytes(bytes), _) => json!(lossy(bytes)),
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    fn field(number: u8, bytes: &[u8]) -> Vec<u8> {
        let mut out = vec![number << 3 | 2, u8::try_from(bytes.len()).unwrap()];
        out.extend_from_slice(bytes);
        out
    }

    fn body(api_version: &str, kind: &str, raw: &[u8]) -> Vec<u8> {
        let meta = [field(1, api_version.as_bytes()), field(2, kind.as_bytes())].concat();
        [MAGIC.to_vec(), field(1, &meta), field(2, raw)].concat()
    }

    #[test]
    fn a_namespace_with_labels() {
        let label = [field(1, b"a"), field(2, b"b")].concat();
        // Name, an unset generateName, an unset creationTimestamp, a label.
        let meta = [field(1, b"foo"), field(2, b""), field(8, b""), field(11, &label)].concat();
        let raw = field(1, &meta);
        assert_eq!(
            decode(&body("v1", "Namespace", &raw)).unwrap(),
            json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "foo", "labels": {"a": "b"}}})
        );
    }

    #[test]
    fn secrets_hold_base64() {
        let entry = [field(1, b"k"), field(2, &[0xff, 0])].concat();
        let secret = decode(&body("v1", "Secret", &field(2, &entry))).unwrap();
        // Field 2 of a secret is its data.
        assert_eq!(secret["data"], json!({"k": "/wA="}));
    }

    #[test]
    fn garbage_is_refused() {
        assert_eq!(decode(b"{}"), Err(ProtobufError::Magic));
        assert!(matches!(decode(&body("x/v1", "Thing", &[])), Err(ProtobufError::Kind(_))));
        let whole = body("v1", "Namespace", &field(1, &field(1, b"foo")));
        // Only a cut between the two parts of the envelope leaves something whole.
        let readable = (0..whole.len()).filter(|&end| decode(&whole[..end]).is_ok()).count();
        assert_eq!(readable, 1);
        let mut deep = Vec::new();
        for _ in 0..20 {
            deep = field(1, &deep);
        }
        decode(&body("v1", "Pod", &deep)).unwrap();
    }
}
