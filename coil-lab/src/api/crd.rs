//! Custom resource definitions: checks them, serves what they define, stops serving it.

use std::sync::Arc;

use serde_json::{Value, json};

use super::error::FieldError;
use super::obj;
use super::registry::{GroupResource, PrinterColumn, Resource, ScalePaths};
use super::schema::{Schema, builtin};
use super::server::ApiServer;
use super::table::jsonpath::JsonPath;

/// Finalizer that holds a definition until its objects are gone.
pub const CLEANUP: &str = "customresourcecleanup.apiextensions.k8s.io";

/// What is wrong with a definition.
pub fn violations(object: &Value, errors: &mut Vec<FieldError>) {
    let (group, plural) =
        (obj::text(object, &["spec", "group"]), obj::text(object, &["spec", "names", "plural"]));
    for field in ["group", "scope"] {
        if obj::text(object, &["spec", field]).is_empty() {
            errors.push(FieldError::required(format!("spec.{field}"), ""));
        }
    }
    for field in ["plural", "kind"] {
        if obj::text(object, &["spec", "names", field]).is_empty() {
            errors.push(FieldError::required(format!("spec.names.{field}"), ""));
        }
    }
    let expected = format!("{plural}.{group}");
    if obj::name(object) != expected {
        errors.push(FieldError::invalid(
            "metadata.name",
            &obj::name(object).into(),
            "must be spec.names.plural+\".\"+spec.group",
        ));
    }
    let scope = obj::text(object, &["spec", "scope"]);
    if !["Namespaced", "Cluster", ""].contains(&scope) {
        let allowed = ["Cluster", "Namespaced"].map(str::to_owned);
        errors.push(FieldError::not_supported("spec.scope", &scope.into(), &allowed));
    }
    let versions = obj::items(object, &["spec", "versions"]);
    let stored = versions.iter().filter(|one| obj::flag(one, &["storage"])).count();
    if stored != 1 {
        errors.push(FieldError::invalid(
            "spec.versions",
            &versions.into(),
            "must have exactly one version marked as storage version",
        ));
    }
    for (index, version) in versions.iter().enumerate() {
        let at = format!("spec.versions[{index}]");
        let schema = obj::at(version, &["schema", "openAPIV3Schema"]);
        let Some(raw) = schema else {
            errors.push(FieldError::required(format!("{at}.schema.openAPIV3Schema"), "schemas are required"));
            continue;
        };
        let schema = Schema::parse(raw);
        if schema.kind != "object" {
            let value = raw.get("type").cloned().unwrap_or_default();
            errors.push(FieldError::invalid(
                format!("{at}.schema.openAPIV3Schema.type"),
                &value,
                "must be object at the root",
            ));
        }
        for text in super::schema::cel::compile_errors(&schema) {
            errors.push(FieldError::invalid(format!("{at}.schema.openAPIV3Schema"), &"rule".into(), text));
        }
    }
}

/// Fills in what the server decides: derived names, conditions, the finalizer.
pub fn prepare(server: &ApiServer, object: &mut Value) {
    let kind = obj::text(object, &["spec", "names", "kind"]).to_owned();
    obj::set_default(object, &["spec", "names", "singular"], kind.to_lowercase());
    obj::set_default(object, &["spec", "names", "listKind"], format!("{kind}List"));
    obj::set_default(object, &["spec", "conversion", "strategy"], "None");
    let mut finalizers = obj::items(object, &["metadata", "finalizers"]).to_vec();
    if !obj::is_deleting(object) && !finalizers.iter().any(|one| one == CLEANUP) {
        finalizers.push(json!(CLEANUP));
        obj::set(object, &["metadata", "finalizers"], finalizers);
    }
    let names = obj::at(object, &["spec", "names"]).cloned().unwrap_or_default();
    let group = obj::text(object, &["spec", "group"]).to_owned();
    let plural = obj::text(object, &["spec", "names", "plural"]).to_owned();
    let taken = server
        .registry
        .all()
        .into_iter()
        .find(|one| one.group == group && one.kind == kind && one.plural != plural)
        .map(|one| one.plural.clone());
    let stored: Vec<Value> = obj::items(object, &["spec", "versions"])
        .iter()
        .filter(|one| obj::flag(one, &["storage"]))
        .map(|one| json!(obj::text(one, &["name"])))
        .collect();
    obj::set(object, &["status", "storedVersions"], stored);
    set_condition(
        object,
        "NamesAccepted",
        taken.is_none(),
        if taken.is_none() { "NoConflicts" } else { "KindConflict" },
        &taken.as_ref().map_or_else(
            || "no conflicts found".to_owned(),
            |other| format!("\"{kind}\" is already in use by {other}"),
        ),
    );
    set_condition(
        object,
        "Established",
        taken.is_none(),
        if taken.is_none() { "InitialNamesAccepted" } else { "NotAccepted" },
        if taken.is_none() { "the initial names have been accepted" } else { "not all names are accepted" },
    );
    if taken.is_none() {
        obj::set(object, &["status", "acceptedNames"], names);
    } else {
        obj::set_default(object, &["status", "acceptedNames"], json!({"kind": "", "plural": ""}));
    }
}

fn set_condition(object: &mut Value, kind: &str, holds: bool, reason: &str, message: &str) {
    let status = if holds { "True" } else { "False" };
    let mut conditions = obj::items(object, &["status", "conditions"]).to_vec();
    let since = conditions
        .iter()
        .find(|one| obj::text(one, &["type"]) == kind && obj::text(one, &["status"]) == status)
        .map(|one| obj::text(one, &["lastTransitionTime"]).to_owned())
        .unwrap_or_else(obj::now);
    conditions.retain(|one| obj::text(one, &["type"]) != kind);
    conditions.push(json!({
        "type": kind, "status": status, "reason": reason, "message": message, "lastTransitionTime": since,
    }));
    obj::set(object, &["status", "conditions"], conditions);
}

/// Serves what a stored definition defines.
pub fn serve(server: &ApiServer, object: &Value) {
    let (group, plural) =
        (obj::text(object, &["spec", "group"]), obj::text(object, &["spec", "names", "plural"]));
    let is_established = obj::condition_is_true(object, "Established");
    server.registry.remove(group, plural);
    server.openapi.forget();
    if !is_established {
        return;
    }
    for version in obj::items(object, &["spec", "versions"]).iter().filter(|one| obj::flag(one, &["served"]))
    {
        server.registry.add(resource(object, version));
    }
}

/// Stops serving what a removed definition defined.
pub fn forget(server: &ApiServer, object: &Value) {
    let (group, plural) =
        (obj::text(object, &["spec", "group"]), obj::text(object, &["spec", "names", "plural"]));
    server.registry.remove(group, plural);
    server.openapi.forget();
}

fn resource(object: &Value, version: &Value) -> Resource {
    let name = |field: &str| obj::text(object, &["spec", "names", field]).to_owned();
    let names = |field: &str| {
        obj::items(object, &["spec", "names", field])
            .iter()
            .filter_map(|one| one.as_str().map(str::to_owned))
            .collect::<Vec<_>>()
    };
    let group = obj::text(object, &["spec", "group"]).to_owned();
    let optional = |path: &[&str]| Some(obj::text(version, path).to_owned()).filter(|text| !text.is_empty());
    let scale =
        obj::at(version, &["subresources", "scale"]).filter(|scale| scale.is_object()).map(|_| ScalePaths {
            spec: optional(&["subresources", "scale", "specReplicasPath"]).unwrap_or_default(),
            status: optional(&["subresources", "scale", "statusReplicasPath"]).unwrap_or_default(),
            selector: optional(&["subresources", "scale", "labelSelectorPath"]),
        });
    Resource {
        storage: GroupResource::new(&group, &name("plural")),
        version: obj::text(version, &["name"]).to_owned(),
        plural: name("plural"),
        singular: name("singular"),
        kind: name("kind"),
        list_kind: name("listKind"),
        namespaced: obj::text(object, &["spec", "scope"]) == "Namespaced",
        short_names: names("shortNames"),
        categories: names("categories"),
        status: obj::at(version, &["subresources", "status"]).is_some_and(Value::is_object),
        scale,
        subresources: Vec::new(),
        schema: Arc::new(root_schema(version)),
        raw_schema: obj::at(version, &["schema", "openAPIV3Schema"]).cloned().unwrap_or_default(),
        custom: true,
        columns: columns(version),
        group,
    }
}

/// The schema of whole objects: what the definition says, with the metadata that all objects have.
fn root_schema(version: &Value) -> Schema {
    let raw = obj::at(version, &["schema", "openAPIV3Schema"]);
    let mut schema = raw.map_or_else(Schema::anything, Schema::parse);
    let text = Arc::new(Schema { kind: "string".to_owned(), ..Schema::default() });
    schema.properties.insert("apiVersion".to_owned(), text.clone());
    schema.properties.insert("kind".to_owned(), text);
    schema
        .properties
        .insert("metadata".to_owned(), builtin::schema("io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta"));
    schema
}

fn columns(version: &Value) -> Vec<PrinterColumn> {
    obj::items(version, &["additionalPrinterColumns"])
        .iter()
        .filter_map(|column| {
            Some(PrinterColumn {
                name: obj::text(column, &["name"]).to_owned(),
                kind: obj::text(column, &["type"]).to_owned(),
                format: obj::text(column, &["format"]).to_owned(),
                description: obj::text(column, &["description"]).to_owned(),
                priority: obj::int(column, &["priority"]).unwrap_or(0),
                path: JsonPath::parse(obj::text(column, &["jsonPath"])).ok()?,
            })
        })
        .collect()
}
