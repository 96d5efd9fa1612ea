//! Structural schemas: one in-memory form for custom resources (from their definition) and for built-in kinds (from
//! the schemas of `k8s-openapi`), and what is done with them: defaulting, pruning, validation, list merge rules.

pub mod builtin;
pub mod cel;
pub mod cel_ip;
pub mod default;
pub mod prune;
pub mod validate;

use std::collections::BTreeMap;
use std::collections::HashMap;
use std::sync::{Arc, OnceLock};

use ::cel as cel_crate;
use regex::Regex;
use serde_json::{Map, Value};

use super::obj;

/// How a list merges in server-side apply.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum ListKind {
    /// As one value.
    #[default]
    Atomic,
    /// As a set of scalars.
    Set,
    /// By the values of some keys of its elements.
    Map(Vec<String>),
}

/// What fields beside the named ones an object may have.
#[derive(Debug, Clone, Default)]
pub enum Additional {
    /// None.
    #[default]
    None,
    /// Any, of any form.
    Any,
    /// Any, of this form.
    Of(Arc<Schema>),
}

/// A CEL rule.
#[derive(Debug, Clone)]
pub struct Rule {
    compiled: Arc<OnceLock<Result<cel_crate::Program, String>>>,
    /// Source text.
    pub rule: String,
    /// Text of the violation.
    pub message: String,
    /// Expression whose value is the text of the violation.
    pub message_expression: Option<String>,
    /// Reason of the field error.
    pub reason: &'static str,
    /// Field path relative to the schema's place.
    pub field_path: Option<String>,
    /// Run transition rules without an old value too.
    pub optional_old_self: bool,
}

/// One node of a structural schema.
#[derive(Debug, Clone, Default)]
pub struct Schema {
    /// JSON type, empty when any.
    pub kind: String,
    /// `format`.
    pub format: String,
    /// Whether null is a value.
    pub nullable: bool,
    /// Named fields.
    pub properties: BTreeMap<String, Arc<Schema>>,
    /// Other fields.
    pub additional: Additional,
    /// Elements of a list.
    pub items: Option<Arc<Schema>>,
    /// Fields that must be there.
    pub required: Vec<String>,
    /// Default.
    pub default: Option<Value>,
    /// Closed set of values.
    pub allowed: Vec<Value>,
    /// Regular expression for texts, with its source.
    pub pattern: Option<(String, Option<Regex>)>,
    /// Bounds.
    pub bounds: Bounds,
    /// `x-kubernetes-int-or-string`.
    pub int_or_string: bool,
    /// A quantity of a built-in kind: numbers are read as texts.
    pub quantity: bool,
    /// `x-kubernetes-preserve-unknown-fields`.
    pub preserve_unknown: bool,
    /// `x-kubernetes-embedded-resource`.
    pub embedded: bool,
    /// How a list merges.
    pub list: ListKind,
    /// Whether a map is applied as one value.
    pub atomic_map: bool,
    /// CEL rules.
    pub rules: Vec<Rule>,
    /// Value validations that combine.
    pub all_of: Vec<Arc<Schema>>,
    /// At least one must hold.
    pub any_of: Vec<Arc<Schema>>,
    /// Exactly one must hold.
    pub one_of: Vec<Arc<Schema>>,
    /// Must not hold.
    pub not: Option<Arc<Schema>>,
    /// Key by which a strategic merge patch merges the list.
    pub merge_key: Option<String>,
    /// Whether a strategic merge patch merges the list of scalars.
    pub merge_scalars: bool,
}

/// Numeric bounds of a schema node.
#[derive(Debug, Clone, Default)]
pub struct Bounds {
    /// `minimum` and whether it is exclusive.
    pub minimum: Option<(f64, bool)>,
    /// `maximum` and whether it is exclusive.
    pub maximum: Option<(f64, bool)>,
    /// `multipleOf`.
    pub multiple_of: Option<f64>,
    /// `minLength`.
    pub min_length: Option<u64>,
    /// `maxLength`.
    pub max_length: Option<u64>,
    /// `minItems`.
    pub min_items: Option<u64>,
    /// `maxItems`.
    pub max_items: Option<u64>,
    /// `uniqueItems`.
    pub unique_items: bool,
    /// `minProperties`.
    pub min_properties: Option<u64>,
    /// `maxProperties`.
    pub max_properties: Option<u64>,
}

/// Named definitions that `$ref` points to, with what is already parsed.
#[derive(Default)]
pub struct Definitions<'a> {
    raw: Option<&'a Map<String, Value>>,
    parsed: HashMap<String, Arc<Schema>>,
    open: Vec<String>,
}

impl<'a> Definitions<'a> {
    /// Over a map of raw schemas.
    pub fn new(raw: &'a Map<String, Value>) -> Self {
        Self { raw: Some(raw), parsed: HashMap::new(), open: Vec::new() }
    }

    /// The schema of a definition. Recursion ends in "anything".
    pub fn resolve(&mut self, name: &str) -> Arc<Schema> {
        if let Some(done) = self.parsed.get(name) {
            return done.clone();
        }
        let raw = self.raw.and_then(|raw| raw.get(name));
        let Some(raw) = raw.filter(|_| !self.open.iter().any(|open| open == name)) else {
            return Arc::new(Schema::anything());
        };
        self.open.push(name.to_owned());
        let schema = Arc::new(Schema::parse_in(raw, name, self));
        self.open.pop();
        self.parsed.insert(name.to_owned(), schema.clone());
        schema
    }
}

impl Schema {
    /// A schema that everything satisfies and nothing is pruned by.
    pub fn anything() -> Self {
        Self { preserve_unknown: true, nullable: true, ..Self::default() }
    }

    /// Parses the `openAPIV3Schema` of a custom resource definition.
    pub fn parse(raw: &Value) -> Self {
        Self::parse_in(raw, "", &mut Definitions::default())
    }

    /// The schema of a field, named or additional.
    pub fn field(&self, name: &str) -> Option<&Schema> {
        match (self.properties.get(name), &self.additional) {
            (Some(named), _) => Some(named),
            (None, Additional::Of(any)) => Some(any),
            _ => None,
        }
    }

    /// Whether objects of this schema keep fields that it does not name.
    pub fn keeps_unknown(&self) -> bool {
        self.preserve_unknown || matches!(self.additional, Additional::Any)
    }

    fn parse_in(raw: &Value, owner: &str, definitions: &mut Definitions<'_>) -> Self {
        if raw.as_bool() == Some(true) {
            return Self::anything();
        }
        if let Some(reference) = raw.get("$ref").and_then(Value::as_str) {
            let name = reference.rsplit('/').next().unwrap_or_default().to_owned();
            let mut schema = (*definitions.resolve(&name)).clone();
            schema.quantity = name.ends_with(".resource.Quantity");
            if let Some(default) = raw.get("default") {
                schema.default = Some(default.clone());
            }
            schema.read_nullable(raw);
            return schema;
        }
        let mut schema = Self::default();
        schema.read_type(raw);
        schema.read_nullable(raw);
        schema.read_values(raw);
        schema.read_extensions(raw);
        schema.read_children(raw, owner, definitions);
        schema
    }

    fn read_type(&mut self, raw: &Value) {
        match raw.get("type") {
            Some(Value::String(kind)) => self.kind = kind.clone(),
            Some(Value::Array(kinds)) => {
                for kind in kinds.iter().filter_map(Value::as_str) {
                    if kind == "null" {
                        self.nullable = true;
                    } else if self.kind.is_empty() {
                        self.kind = kind.to_owned();
                    }
                }
            }
            _ => {}
        }
        self.format = obj::text(raw, &["format"]).to_owned();
    }

    fn read_nullable(&mut self, raw: &Value) {
        self.nullable |= obj::flag(raw, &["nullable"]);
    }

    fn read_values(&mut self, raw: &Value) {
        self.default = raw.get("default").cloned();
        self.allowed = obj::items(raw, &["enum"]).to_vec();
        self.pattern = raw
            .get("pattern")
            .and_then(Value::as_str)
            .map(|pattern| (pattern.to_owned(), Regex::new(pattern).ok()));
        let number = |key: &str| raw.get(key).and_then(Value::as_f64);
        let count = |key: &str| raw.get(key).and_then(Value::as_u64);
        self.bounds = Bounds {
            minimum: number("minimum").map(|limit| (limit, obj::flag(raw, &["exclusiveMinimum"]))),
            maximum: number("maximum").map(|limit| (limit, obj::flag(raw, &["exclusiveMaximum"]))),
            multiple_of: number("multipleOf"),
            min_length: count("minLength"),
            max_length: count("maxLength"),
            min_items: count("minItems"),
            max_items: count("maxItems"),
            unique_items: obj::flag(raw, &["uniqueItems"]),
            min_properties: count("minProperties"),
            max_properties: count("maxProperties"),
        };
    }

    fn read_extensions(&mut self, raw: &Value) {
        self.int_or_string = obj::flag(raw, &["x-kubernetes-int-or-string"]);
        self.preserve_unknown = obj::flag(raw, &["x-kubernetes-preserve-unknown-fields"]);
        self.embedded = obj::flag(raw, &["x-kubernetes-embedded-resource"]);
        self.atomic_map = obj::text(raw, &["x-kubernetes-map-type"]) == "atomic";
        self.list = match obj::text(raw, &["x-kubernetes-list-type"]) {
            "set" => ListKind::Set,
            "map" => ListKind::Map(
                obj::items(raw, &["x-kubernetes-list-map-keys"])
                    .iter()
                    .filter_map(|key| key.as_str().map(str::to_owned))
                    .collect(),
            ),
            _ => ListKind::Atomic,
        };
        self.rules = obj::items(raw, &["x-kubernetes-validations"]).iter().map(Rule::parse).collect();
    }

    fn read_children(&mut self, raw: &Value, owner: &str, definitions: &mut Definitions<'_>) {
        self.required = obj::items(raw, &["required"])
            .iter()
            .filter_map(|name| name.as_str().map(str::to_owned))
            .collect();
        for (name, child) in obj::map(raw, &["properties"]).into_iter().flatten() {
            let mut child = Self::parse_in(child, "", definitions);
            builtin::mark_list(owner, name, &mut child);
            self.properties.insert(name.clone(), Arc::new(child));
        }
        self.additional = match raw.get("additionalProperties") {
            Some(Value::Bool(true)) => Additional::Any,
            Some(child @ Value::Object(_)) => {
                Additional::Of(Arc::new(Self::parse_in(child, "", definitions)))
            }
            _ => Additional::None,
        };
        let mut parse = |child: &Value| Arc::new(Self::parse_in(child, "", definitions));
        self.items = raw.get("items").map(&mut parse);
        self.all_of = obj::items(raw, &["allOf"]).iter().map(&mut parse).collect();
        self.any_of = obj::items(raw, &["anyOf"]).iter().map(&mut parse).collect();
        self.one_of = obj::items(raw, &["oneOf"]).iter().map(&mut parse).collect();
        self.not = raw.get("not").map(&mut parse);
        self.unwrap_single_all_of();
    }

    /// Generated schemas write a described reference as `allOf: [ref]`.
    fn unwrap_single_all_of(&mut self) {
        if !self.kind.is_empty() || self.all_of.len() != 1 || !self.properties.is_empty() {
            return;
        }
        if let Some(inner) = self.all_of.pop() {
            let (default, nullable) = (self.default.take(), self.nullable);
            *self = (*inner).clone();
            self.default = default.or_else(|| self.default.take());
            self.nullable |= nullable;
        }
    }
}

impl Rule {
    /// The compiled rule, or why it does not compile.
    pub fn program(&self) -> &Result<cel_crate::Program, String> {
        self.compiled.get_or_init(|| cel::compile(&self.rule))
    }

    fn parse(raw: &Value) -> Self {
        let optional = |key: &str| raw.get(key).and_then(Value::as_str).map(str::to_owned);
        Self {
            compiled: Arc::default(),
            rule: obj::text(raw, &["rule"]).to_owned(),
            message: obj::text(raw, &["message"]).to_owned(),
            message_expression: optional("messageExpression"),
            reason: match obj::text(raw, &["reason"]) {
                "FieldValueForbidden" => "FieldValueForbidden",
                "FieldValueRequired" => "FieldValueRequired",
                "FieldValueDuplicate" => "FieldValueDuplicate",
                _ => "FieldValueInvalid",
            },
            field_path: optional("fieldPath"),
            optional_old_self: obj::flag(raw, &["optionalOldSelf"]),
        }
    }
}
