//! Discovery: versions, groups, resources.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::error::{ApiError, ApiResult};
use super::registry::Resource;
use super::server::ApiServer;

/// `/version`.
pub fn version() -> Value {
    json!({
        "major": "1",
        "minor": "32",
        "gitVersion": "v1.32.4",
        "gitCommit": "0000000000000000000000000000000000000000",
        "gitTreeState": "clean",
        "buildDate": "1970-01-01T00:00:00Z",
        "goVersion": "none",
        "compiler": "rustc",
        "platform": format!("linux/{}", match std::env::consts::ARCH {
            "x86_64" => "amd64",
            "aarch64" => "arm64",
            other => other,
        }),
    })
}

/// `/api`.
pub fn core_versions() -> Value {
    json!({"kind": "APIVersions", "versions": ["v1"], "serverAddressByClientCIDRs": []})
}

fn group(name: &str, versions: &[String]) -> Value {
    let version = |version: &String| json!({"groupVersion": format!("{name}/{version}"), "version": version});
    json!({
        "name": name,
        "versions": versions.iter().map(version).collect::<Vec<_>>(),
        "preferredVersion": versions.first().map(version),
    })
}

/// `/apis`.
pub fn groups(server: &ApiServer) -> Value {
    let groups: Vec<Value> =
        all_groups(server).iter().map(|(name, versions)| group(name, versions)).collect();
    json!({"kind": "APIGroupList", "apiVersion": "v1", "groups": groups})
}

/// Groups of stored resources and those of reviews.
fn all_groups(server: &ApiServer) -> BTreeMap<String, Vec<String>> {
    let mut groups = server.registry.groups();
    for (name, _, _, _) in super::subresource::REVIEWS {
        groups.entry(name.to_owned()).or_insert_with(|| vec!["v1".to_owned()]);
    }
    groups
}

/// `/apis/<group>`.
pub fn one_group(server: &ApiServer, name: &str) -> ApiResult<Value> {
    let groups = all_groups(server);
    let versions = groups.get(name).ok_or_else(ApiError::unknown_path)?;
    let mut found = group(name, versions);
    super::obj::set(&mut found, &["kind"], "APIGroup");
    super::obj::set(&mut found, &["apiVersion"], "v1");
    Ok(found)
}

const VERBS: [&str; 8] = ["create", "delete", "deletecollection", "get", "list", "patch", "update", "watch"];
const STATUS_VERBS: [&str; 3] = ["get", "patch", "update"];

/// `/api/v1` and `/apis/<group>/<version>`.
pub fn resources(server: &ApiServer, group: &str, version: &str) -> ApiResult<Value> {
    let served = server.registry.of_version(group, version);
    let mut list: Vec<Value> = Vec::new();
    let reviews: Vec<_> = super::subresource::REVIEWS.iter().filter(|one| one.0 == group).collect();
    if version == "v1" && !reviews.is_empty() {
        for (_, plural, kind, namespaced) in reviews {
            list.push(json!({
                "name": plural, "singularName": kind.to_lowercase(), "namespaced": namespaced, "kind": kind,
                "verbs": ["create"],
            }));
        }
    } else if served.is_empty() {
        return Err(ApiError::unknown_path());
    }
    for one in served {
        describe(&one, &mut list);
    }
    let api_version = if group.is_empty() { version.to_owned() } else { format!("{group}/{version}") };
    Ok(json!({
        "kind": "APIResourceList", "apiVersion": "v1", "groupVersion": api_version, "resources": list,
    }))
}

fn describe(one: &Resource, list: &mut Vec<Value>) {
    let mut entry = json!({
        "name": one.plural, "singularName": one.singular, "namespaced": one.namespaced, "kind": one.kind,
        "verbs": VERBS,
    });
    if !one.short_names.is_empty() {
        super::obj::set(&mut entry, &["shortNames"], one.short_names.clone());
    }
    if !one.categories.is_empty() {
        super::obj::set(&mut entry, &["categories"], one.categories.clone());
    }
    list.push(entry);
    let sub = |name: &str, kind: &str, verbs: &[&str]| {
        json!({
            "name": format!("{}/{name}", one.plural), "singularName": "", "namespaced": one.namespaced,
            "kind": kind, "verbs": verbs,
        })
    };
    if one.status {
        list.push(sub("status", &one.kind, &STATUS_VERBS));
    }
    if one.scale.is_some() {
        let mut scale = sub("scale", "Scale", &STATUS_VERBS);
        super::obj::set(&mut scale, &["group"], "autoscaling");
        super::obj::set(&mut scale, &["version"], "v1");
        list.push(scale);
    }
    for (name, kind, verbs) in &one.subresources {
        let mut entry = sub(name, kind, verbs);
        match *kind {
            "Eviction" => {
                super::obj::set(&mut entry, &["group"], "policy");
                super::obj::set(&mut entry, &["version"], "v1");
            }
            "TokenRequest" => {
                super::obj::set(&mut entry, &["group"], "authentication.k8s.io");
                super::obj::set(&mut entry, &["version"], "v1");
            }
            _ => {}
        }
        list.push(entry);
    }
}
