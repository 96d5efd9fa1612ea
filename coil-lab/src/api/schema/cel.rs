//! CEL rules (`x-kubernetes-validations`).

use serde_json::Value;

use super::Schema;
use crate::api::error::FieldError;

/// Runs the rules of one schema node.
pub fn check(
    _schema: &Schema,
    _value: &Value,
    _old: Option<&Value>,
    _path: &str,
    _errors: &mut Vec<FieldError>,
) {
}

/// What does not compile among the rules of a schema.
pub fn compile_errors(_schema: &Schema) -> Vec<String> {
    Vec::new()
}
