//! JSON parsing that notices repeated keys.

use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, Error as _, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};

use super::request::Body;

/// Parses JSON; the last of repeated keys wins and their paths are reported.
pub fn parse(bytes: &[u8]) -> Result<Body, serde_json::Error> {
    let mut body = Body::default();
    let mut source = serde_json::Deserializer::from_slice(bytes);
    body.value = Node { path: String::new(), duplicates: &mut body.duplicates }.deserialize(&mut source)?;
    source.end()?;
    Ok(body)
}

struct Node<'a> {
    path: String,
    duplicates: &'a mut Vec<String>,
}

impl<'de> DeserializeSeed<'de> for Node<'_> {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, source: D) -> Result<Value, D::Error> {
        source.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Node<'_> {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("any JSON value")
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Bool(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_f64<E: serde::de::Error>(self, value: f64) -> Result<Value, E> {
        Number::from_f64(value).map(Value::Number).ok_or_else(|| E::custom("not a JSON number"))
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_string<E>(self, value: String) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut source: A) -> Result<Value, A::Error> {
        let mut list = Vec::new();
        loop {
            let path = format!("{}[{}]", self.path, list.len());
            match source.next_element_seed(Node { path, duplicates: self.duplicates })? {
                Some(one) => list.push(one),
                None => return Ok(Value::Array(list)),
            }
        }
    }

    fn visit_map<A: MapAccess<'de>>(self, mut source: A) -> Result<Value, A::Error> {
        let mut map = Map::new();
        while let Some(key) = source.next_key::<String>()? {
            let path = if self.path.is_empty() { key.clone() } else { format!("{}.{key}", self.path) };
            if map.contains_key(&key) {
                self.duplicates.push(path.clone());
            }
            let value = source.next_value_seed(Node { path, duplicates: self.duplicates })?;
            map.insert(key, value);
        }
        if map.len() > 100_000 {
            return Err(A::Error::custom("too many keys"));
        }
        Ok(Value::Object(map))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    #[test]
    fn repeated_keys_are_named() {
        let body = parse(br#"{"spec":{"a":1,"l":[{"x":1,"x":2}],"a":2}}"#).unwrap();
        assert_eq!(body.duplicates, ["spec.l[0].x", "spec.a"]);
        assert_eq!(body.value["spec"]["a"], 2);
        assert!(parse(b"{} x").is_err());
        assert!(parse(b"{\"a\":").is_err());
        assert!(parse(&[b'['; 100_000]).is_err());
    }
}
