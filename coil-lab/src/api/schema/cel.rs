//! CEL rules (`x-kubernetes-validations`).

use std::collections::HashMap;
use std::sync::{Arc, LazyLock};

use ::cel::objects::OptionalValue;
use ::cel::{Context, Env, Program};
use serde_json::Value;

use super::{Additional, Rule, Schema, cel_ip};
use crate::api::error::FieldError;

/// Words that cannot be field names in CEL.
const RESERVED: [&str; 18] = [
    "true",
    "false",
    "null",
    "in",
    "as",
    "break",
    "const",
    "continue",
    "else",
    "for",
    "function",
    "if",
    "import",
    "let",
    "loop",
    "package",
    "namespace",
    "return",
];

static ENVIRONMENT: LazyLock<Arc<Env>> = LazyLock::new(|| {
    let mut env = Env::stdlib();
    for extension in [::cel::extensions::strings, ::cel::extensions::lists, ::cel::extensions::math] {
        if let Err(error) = env.add_extension(extension) {
            tracing::error!(%error, "a CEL extension cannot be added");
        }
    }
    Arc::new(env)
});

/// Compiles a rule.
pub fn compile(source: &str) -> Result<Program, String> {
    ENVIRONMENT.compile(source).map_err(|error| format!("compilation failed: {error}"))
}

/// What does not compile among the rules of a schema.
pub fn compile_errors(schema: &Schema) -> Vec<String> {
    let own = schema.rules.iter().filter_map(|rule| match rule.program() {
        Ok(_) => None,
        Err(error) => Some(format!("rule {:?}: {error}", rule.rule)),
    });
    let mut errors: Vec<String> = own.collect();
    let additional = match &schema.additional {
        Additional::Of(child) => Some(child),
        _ => None,
    };
    for child in schema.properties.values().chain(&schema.items).chain(additional) {
        errors.extend(compile_errors(child));
    }
    errors
}

/// Runs the rules of one schema node.
pub fn check(schema: &Schema, value: &Value, old: Option<&Value>, path: &str, errors: &mut Vec<FieldError>) {
    if schema.rules.is_empty() {
        return;
    }
    let this = to_cel(schema, value);
    let before = old.filter(|old| !old.is_null()).map(|old| to_cel(schema, old));
    for rule in &schema.rules {
        if let Err(detail) = run(rule, &this, before.as_ref()) {
            let field = match &rule.field_path {
                Some(below) => format!("{path}{below}").trim_start_matches('.').to_owned(),
                None => path.to_owned(),
            };
            let kind = if schema.kind.is_empty() { "object" } else { &schema.kind };
            errors.push(match rule.reason {
                "FieldValueForbidden" => FieldError::forbidden(field, detail),
                "FieldValueRequired" => FieldError::required(field, &detail),
                reason => FieldError { reason, ..FieldError::invalid(field, &kind.into(), detail) },
            });
        }
    }
}

/// The violation's text if the rule does not hold.
fn run(rule: &Rule, this: &::cel::Value, before: Option<&::cel::Value>) -> Result<(), String> {
    let program = rule.program().as_ref().map_err(Clone::clone)?;
    let wants_old = program.references().has_variable("oldSelf");
    let mut context = Context::with_env(ENVIRONMENT.clone());
    cel_ip::declare(&mut context).map_err(|error| error.to_string())?;
    context.add_variable_from_value("self", this.clone());
    match (wants_old, before) {
        (true, None) if !rule.optional_old_self => return Ok(()),
        (true, before) if rule.optional_old_self => {
            let old = before.map_or_else(OptionalValue::none, |before| OptionalValue::of(before.clone()));
            context.add_variable_from_value("oldSelf", ::cel::Value::Opaque(Arc::new(old)));
        }
        (true, Some(before)) => context.add_variable_from_value("oldSelf", before.clone()),
        _ => {}
    }
    match program.execute(&context) {
        Ok(::cel::Value::Bool(true)) => Ok(()),
        Ok(::cel::Value::Bool(false)) => Err(message_of(rule, &context)),
        Ok(_) => Err(format!("rule is no boolean: {}", rule.rule)),
        Err(error) => Err(format!("{error} evaluating rule: {}", fixed_message(rule))),
    }
}

fn fixed_message(rule: &Rule) -> String {
    if rule.message.is_empty() { format!("failed rule: {}", rule.rule.trim()) } else { rule.message.clone() }
}

fn message_of(rule: &Rule, context: &Context<'_, '_>) -> String {
    let expressed =
        rule.message_expression.as_deref().and_then(|source| match compile(source).ok()?.execute(context) {
            Ok(::cel::Value::String(text)) if !text.trim().is_empty() => Some(text.trim().to_owned()),
            _ => None,
        });
    expressed.unwrap_or_else(|| fixed_message(rule))
}

/// A JSON value as CEL sees it: typed by the schema, nulls absent, fields with escaped names.
fn to_cel(schema: &Schema, value: &Value) -> ::cel::Value {
    static ANYTHING: LazyLock<Schema> = LazyLock::new(Schema::anything);
    match value {
        Value::Null => ::cel::Value::Null,
        Value::Bool(truth) => ::cel::Value::Bool(*truth),
        Value::Number(number) => {
            let float = || ::cel::Value::Float(number.as_f64().unwrap_or(f64::NAN));
            if schema.kind == "number" {
                float()
            } else {
                number.as_i64().map_or_else(float, ::cel::Value::Int)
            }
        }
        Value::String(text) => ::cel::Value::String(Arc::new(text.clone())),
        Value::Array(list) => {
            let items = schema.items.as_deref().unwrap_or(&ANYTHING);
            ::cel::Value::List(Arc::new(list.iter().map(|one| to_cel(items, one)).collect()))
        }
        Value::Object(map) => {
            let fields: HashMap<String, ::cel::Value> = map
                .iter()
                .filter(|(_, field)| !field.is_null())
                .map(|(name, field)| {
                    let child = schema.field(name).unwrap_or(&ANYTHING);
                    let name =
                        if schema.properties.contains_key(name) { escaped(name) } else { name.clone() };
                    (name, to_cel(child, field))
                })
                .collect();
            fields.into()
        }
    }
}

fn escaped(name: &str) -> String {
    if RESERVED.contains(&name) {
        return format!("__{name}__");
    }
    name.replace("__", "__underscores__")
        .replace('.', "__dot__")
        .replace('-', "__dash__")
        .replace('/', "__slash__")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::schema::validate;
    use serde_json::json;

    fn violations(rule: Value, value: &Value, old: Option<&Value>) -> Vec<String> {
        let schema = Schema::parse(&json!({
            "type": "object", "x-kubernetes-preserve-unknown-fields": true, "x-kubernetes-validations": [rule],
            "properties": {"n": {"type": "integer"}, "f": {"type": "number"}},
        }));
        assert_eq!(compile_errors(&schema), Vec::<String>::new());
        validate::check(&schema, value, old).iter().map(FieldError::text).collect()
    }

    fn holds(rule: &str, value: &Value) -> bool {
        let found = violations(json!({"rule": rule, "message": "no"}), value, None);
        assert!(found.is_empty() || found == ["Invalid value: \"object\": no"], "{rule}: {found:?}");
        found.is_empty()
    }

    #[test]
    fn what_rules_of_custom_resources_use() {
        let value = json!({
            "n": 3, "f": 1.5, "name": "egress-1", "list": ["10.0.0.0/8", "fd00::/8"], "nil": null,
            "map": {"a": 1},
        });
        for rule in [
            "self.n > 2 && self.f < 2.0",
            "!has(self.nil) && has(self.list)",
            "self.list.all(c, isCIDR(c))",
            "self.list.exists(c, cidr(c).ip().family() == 6)",
            "self.list.filter(c, cidr(c).ip().family() == 4).size() <= 1",
            "self.list.exists_one(c, isCIDR(c) && cidr(c).prefixLength() == 8 && ip(cidr(c).ip()).family() == 4)",
            "self.list.all(c, cidr(c) == cidr(c).masked())",
            "cidr('10.0.0.0/8').containsCIDR('10.1.0.0/16') && !cidr('10.1.0.0/16').containsCIDR('10.0.0.0/8')",
            "cidr('10.0.0.0/8').containsIP('10.1.2.3') && cidr('fd00::/8').containsIP(ip('fd00::1'))",
            "isIP('::1') && !isIP('::ffff:1.2.3.4') && !isIP('1.2.3') && !isCIDR('10.0.0.0') && !isCIDR('1.2.3.4/33')",
            "ip('127.0.0.1').isLoopback() && ip.isCanonical('::1') && !ip.isCanonical('0:0::1')",
            "ip('192.0.2.1').family() == 4",
            "self.name.matches('^[a-z0-9-]+$') && self.name.startsWith('egress') && size(self.name) == 8",
            "self.name.split('-')[1] == '1' && self.name.contains('-') && self.name.upperAscii() == 'EGRESS-1'",
            "'a' in self.map && self.map['a'] == 1",
            "self.name.find('[0-9]+') == '1'",
            "self.?missing.orValue(5) == 5",
            "type(self.n) == int",
            "int(self.f) == 1 || string(self.n) == '3'",
        ] {
            assert!(holds(rule, &value), "{rule}");
        }
        assert!(!holds("self.n > 3", &value));
        assert!(!holds("self.list.all(c, cidr(c).ip().family() == 4)", &value));
    }

    #[test]
    fn transitions_and_messages() {
        let (one, two) = (json!({"n": 1}), json!({"n": 2}));
        let rule = json!({"rule": "self.n == oldSelf.n", "message": "immutable", "fieldPath": ".n"});
        assert_eq!(violations(rule.clone(), &one, None), Vec::<String>::new());
        assert_eq!(violations(rule.clone(), &one, Some(&one)), Vec::<String>::new());
        assert_eq!(violations(rule, &two, Some(&one)), ["n: Invalid value: \"object\": immutable"]);
        let rule = json!({"rule": "self.n < 2", "messageExpression": "'n is ' + string(self.n)"});
        assert_eq!(violations(rule, &two, None), ["Invalid value: \"object\": n is 2"]);
        let rule = json!({"rule": "self.n < 2"});
        assert_eq!(violations(rule, &two, None), ["Invalid value: \"object\": failed rule: self.n < 2"]);
        let rule =
            json!({"rule": "!oldSelf.hasValue() || self.n == oldSelf.value().n", "optionalOldSelf": true});
        assert_eq!(violations(rule.clone(), &one, None), Vec::<String>::new());
        assert_eq!(violations(rule, &two, Some(&one)).len(), 1);
        // A rule that fails to run refuses the object.
        assert_eq!(violations(json!({"rule": "self.none == 1"}), &one, None).len(), 1);
        assert_eq!(
            violations(json!({"rule": "cidr(string(self.n)).prefixLength() == 1"}), &one, None).len(),
            1
        );
    }

    #[test]
    fn broken_rules_are_found_when_compiled() {
        let schema = Schema::parse(&json!({
            "type": "object",
            "properties": {"a": {"type": "string", "x-kubernetes-validations": [{"rule": "self =="}]}},
        }));
        assert_eq!(compile_errors(&schema).len(), 1);
    }
}
