//! All manifests are objects that Kubernetes can read, and the generated ones are fresh.

#![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

use std::path::{Path, PathBuf};

use k8s_openapi::api::apps::v1::{DaemonSet, Deployment};
use k8s_openapi::api::core::v1::{ConfigMap, ServiceAccount};
use k8s_openapi::api::rbac::v1::{ClusterRole, ClusterRoleBinding, PolicyRule, Role, RoleBinding};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../manifests")
}

fn files(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files(&path, found);
        } else if path.extension().is_some_and(|e| e == "yaml") {
            found.push(path);
        }
    }
}

/// Every object of every manifest, with its file.
fn objects() -> Vec<(PathBuf, Value)> {
    let mut paths = Vec::new();
    files(&root(), &mut paths);
    assert!(paths.len() > 5, "{paths:?}");
    let mut objects = Vec::new();
    for path in paths {
        let text = std::fs::read_to_string(&path).unwrap();
        let documents: Vec<Value> =
            serde_saphyr::from_multiple(&text).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        objects.extend(documents.into_iter().map(|document| (path.clone(), document)));
    }
    objects
}

/// Read as its kind and written again, nothing may be missing: a misspelt field would be.
fn check<K: DeserializeOwned + Serialize>(path: &Path, object: &Value) -> K {
    let typed: K =
        serde_json::from_value(object.clone()).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let again = serde_json::to_value(&typed).unwrap();
    contains(&again, object, &path.display().to_string());
    typed
}

fn contains(whole: &Value, part: &Value, place: &str) {
    match (whole, part) {
        (Value::Object(whole), Value::Object(part)) => {
            for (key, value) in part {
                let place = format!("{place}: {key}");
                // In a patch, null takes the field away.
                if value.is_null() && whole.get(key).is_none() {
                    continue;
                }
                contains(whole.get(key).unwrap_or_else(|| panic!("{place} is no field")), value, &place);
            }
        }
        (Value::Array(whole), Value::Array(part)) => {
            assert_eq!(whole.len(), part.len(), "{place}");
            whole.iter().zip(part).for_each(|(w, p)| contains(w, p, place));
        }
        (Value::Number(whole), Value::Number(part)) => assert_eq!(whole.as_f64(), part.as_f64(), "{place}"),
        _ => assert_eq!(whole, part, "{place}"),
    }
}

/// Files that change objects of other files.
fn patches(objects: &[(PathBuf, Value)]) -> Vec<PathBuf> {
    let of = |(path, object): &(PathBuf, Value)| -> Vec<PathBuf> {
        let patches = object["patches"].as_array().into_iter().flatten();
        patches.map(|patch| path.parent().unwrap().join(patch["path"].as_str().unwrap())).collect()
    };
    objects.iter().filter(|(_, object)| object["kind"] == "Kustomization").flat_map(of).collect()
}

#[test]
fn every_manifest_is_an_object_of_its_kind() {
    let objects = objects();
    let patches = patches(&objects);
    for patch in &patches {
        assert!(patch.exists(), "a patch that is missing: {}", patch.display());
    }
    for (path, object) in objects {
        match object["kind"].as_str().unwrap_or_default() {
            "Kustomization" => {
                for resource in object["resources"].as_array().into_iter().flatten() {
                    let target = path.parent().unwrap().join(resource.as_str().unwrap());
                    assert!(target.exists(), "{} names {}", path.display(), target.display());
                }
            }
            "Deployment" => drop(check::<Deployment>(&path, &object)),
            "DaemonSet" => drop(check::<DaemonSet>(&path, &object)),
            "ConfigMap" => drop(check::<ConfigMap>(&path, &object)),
            "ServiceAccount" => drop(check::<ServiceAccount>(&path, &object)),
            "ClusterRole" => drop(check::<ClusterRole>(&path, &object)),
            "ClusterRoleBinding" => drop(check::<ClusterRoleBinding>(&path, &object)),
            "Role" => drop(check::<Role>(&path, &object)),
            "RoleBinding" => drop(check::<RoleBinding>(&path, &object)),
            "CustomResourceDefinition" => drop(check::<CustomResourceDefinition>(&path, &object)),
            other => panic!("{}: kind {other:?}", path.display()),
        }
        assert!(
            object["kind"] == "Kustomization"
                || patches.contains(&path)
                || object["metadata"]["labels"]["app.kubernetes.io/name"] == "coil",
            "{}: {} has no label app.kubernetes.io/name",
            path.display(),
            object["metadata"]["name"],
        );
    }
}

#[test]
fn definitions_are_fresh_and_small() {
    for definition in [
        coil_api::addressblock::crd(),
        coil_api::addresspool::crd(),
        coil_api::blockrequest::crd(),
        coil_api::crd(),
    ] {
        let path = root().join(format!("crd/coil.cybozu.com_{}.yaml", definition.spec.names.plural));
        let text = std::fs::read_to_string(&path).unwrap();
        let present: Value = serde_saphyr::from_str(&text).unwrap();
        let wanted = serde_json::to_value(definition).unwrap();
        contains(&present, &wanted, "stale, run `cargo xtask manifests`");
        contains(&wanted, &present, "stale, run `cargo xtask manifests`");
        // Client-side apply keeps the whole in an annotation.
        assert!(serde_json::to_string(&wanted).unwrap().len() < 262_144 / 4);
    }
}

#[test]
fn the_controller_may_grant_what_egress_pods_get() {
    let rules = |name: &str| -> Vec<PolicyRule> {
        let (path, object) = objects()
            .into_iter()
            .find(|(_, o)| o["kind"] == "ClusterRole" && o["metadata"]["name"] == name)
            .unwrap();
        check::<ClusterRole>(&path, &object).rules.unwrap()
    };
    let held = rules("coil-controller");
    let holds = |group: &str, resource: &str, verb: &str| {
        held.iter().any(|rule| {
            rule.resource_names.is_none()
                && rule.api_groups.iter().flatten().any(|g| g == group)
                && rule.resources.iter().flatten().any(|r| r == resource)
                && rule.verbs.iter().any(|v| v == verb)
        })
    };
    for rule in rules("coil-egress") {
        for group in rule.api_groups.iter().flatten() {
            for resource in rule.resources.iter().flatten() {
                for verb in &rule.verbs {
                    assert!(holds(group, resource, verb), "{group}/{resource}: {verb}");
                }
            }
        }
    }
}
