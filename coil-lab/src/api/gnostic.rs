//! The protobuf form of an OpenAPI version 2 document (`openapi.v2.Document` of gnostic), as far as `kubectl` reads it.

use serde_json::Value;

use super::obj;

/// Encodes a document.
pub fn encode(document: &Value) -> Vec<u8> {
    let mut out = Writer::default();
    out.text(1, obj::text(document, &["swagger"]));
    out.message(2, |info| {
        info.text(1, obj::text(document, &["info", "title"]));
        info.text(2, obj::text(document, &["info", "version"]));
    });
    out.message(8, |paths| {
        for (name, item) in obj::map(document, &["paths"]).into_iter().flatten() {
            paths.message(2, |named| {
                named.text(1, name);
                named.message(2, |out| path_item(out, item));
            });
        }
    });
    out.message(9, |definitions| {
        for (name, item) in obj::map(document, &["definitions"]).into_iter().flatten() {
            named_schema(definitions, name, item);
        }
    });
    out.bytes
}

#[derive(Default)]
struct Writer {
    bytes: Vec<u8>,
}

impl Writer {
    fn varint(&mut self, mut number: u64) {
        while number >= 0x80 {
            self.bytes.push(u8::try_from(number & 0x7f).unwrap_or(0) | 0x80);
            number >>= 7;
        }
        self.bytes.push(u8::try_from(number).unwrap_or(0));
    }

    fn raw(&mut self, field: u64, bytes: &[u8]) {
        self.varint(field << 3 | 2);
        self.varint(bytes.len() as u64);
        self.bytes.extend_from_slice(bytes);
    }

    fn text(&mut self, field: u64, text: &str) {
        if !text.is_empty() {
            self.raw(field, text.as_bytes());
        }
    }

    fn flag(&mut self, field: u64, value: bool) {
        if value {
            self.varint(field << 3);
            self.varint(1);
        }
    }

    fn message(&mut self, field: u64, fill: impl FnOnce(&mut Self)) {
        let mut inner = Self::default();
        fill(&mut inner);
        self.raw(field, &inner.bytes);
    }

    /// A `NamedAny` per `x-` key: the value as YAML text (JSON is YAML).
    fn extensions(&mut self, field: u64, value: &Value) {
        for (key, extension) in
            value.as_object().into_iter().flatten().filter(|(key, _)| key.starts_with("x-"))
        {
            self.message(field, |named| {
                named.text(1, key);
                named.message(2, |any| any.text(2, &extension.to_string()));
            });
        }
    }
}

fn path_item(out: &mut Writer, item: &Value) {
    for (field, verb) in [(2, "get"), (3, "put"), (4, "post"), (5, "delete"), (8, "patch")] {
        if let Some(found) = item.get(verb) {
            out.message(field, |out| operation(out, found));
        }
    }
}

fn operation(out: &mut Writer, operation: &Value) {
    out.text(5, obj::text(operation, &["operationId"]));
    for media in obj::items(operation, &["consumes"]).iter().filter_map(Value::as_str) {
        out.text(7, media);
    }
    for parameter in obj::items(operation, &["parameters"]) {
        // ParametersItem.parameter, Parameter.non_body_parameter, NonBodyParameter.query_parameter_sub_schema.
        out.message(8, |out| {
            out.message(1, |out| {
                out.message(2, |out| {
                    out.message(3, |query| {
                        query.text(2, "query");
                        query.text(4, obj::text(parameter, &["name"]));
                        query.text(6, "string");
                    });
                });
            });
        });
    }
    // Responses, ResponseCode, ResponseValue, Response.
    out.message(9, |out| {
        out.message(1, |named| {
            named.text(1, "200");
            named.message(2, |out| out.message(1, |response| response.text(1, "OK")));
        });
    });
    out.extensions(13, operation);
}

fn named_schema(out: &mut Writer, name: &str, item: &Value) {
    out.message(1, |named| {
        named.text(1, name);
        named.message(2, |out| schema(out, item));
    });
}

fn schema(out: &mut Writer, item: &Value) {
    out.text(1, obj::text(item, &["$ref"]));
    out.text(2, obj::text(item, &["format"]));
    out.text(4, obj::text(item, &["description"]));
    for name in obj::items(item, &["required"]).iter().filter_map(Value::as_str) {
        out.text(19, name);
    }
    match item.get("additionalProperties") {
        Some(Value::Bool(any)) => out.message(21, |out| out.flag(2, *any)),
        Some(inner @ Value::Object(_)) => out.message(21, |out| out.message(1, |out| schema(out, inner))),
        _ => {}
    }
    let is_any = obj::flag(item, &["x-kubernetes-int-or-string"]);
    match item.get("type") {
        Some(Value::String(kind)) => out.message(22, |out| out.text(1, kind)),
        // The readers know no union type; the server writes such fields as texts, too.
        None if is_any => out.message(22, |out| out.text(1, "string")),
        _ => {}
    }
    if let Some(inner) = item.get("items") {
        out.message(23, |out| out.message(1, |out| schema(out, inner)));
    }
    let properties = obj::map(item, &["properties"]);
    if properties.is_some_and(|properties| !properties.is_empty()) {
        out.message(25, |out| {
            for (name, inner) in properties.into_iter().flatten() {
                named_schema(out, name, inner);
            }
        });
    }
    out.extensions(31, item);
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn small_document() {
        let document = json!({"swagger": "2.0", "info": {"title": "t", "version": "v"}});
        assert_eq!(
            encode(&document),
            [10, 3, b'2', b'.', b'0', 18, 6, 10, 1, b't', 18, 1, b'v', 66, 0, 74, 0]
        );
    }
}
