//! Whatever is written, the server answers, and what it stores keeps its promises.

use std::sync::Arc;

use coil_lab::api::patch::Patch;
use coil_lab::api::write::WriteOptions;
use coil_lab::api::{ApiConfig, ApiServer, obj, protobuf, request, strict_json};
use proptest::prelude::*;
use serde_json::{Map, Value, json};

/// Names that mean something somewhere, so that random objects reach deep.
const NAMES: &[&str] = &[
    "metadata",
    "name",
    "labels",
    "annotations",
    "finalizers",
    "ownerReferences",
    "uid",
    "managedFields",
    "spec",
    "status",
    "containers",
    "image",
    "env",
    "ports",
    "containerPort",
    "protocol",
    "template",
    "selector",
    "matchLabels",
    "replicas",
    "strategy",
    "type",
    "rollingUpdate",
    "maxSurge",
    "conditions",
    "clusterIP",
    "ipFamilies",
    "$patch",
    "$retainKeys",
    "$setElementOrder/containers",
    "tolerations",
    "x",
];

fn scalar() -> impl Strategy<Value = Value> {
    prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        (-1000.0..1000.0_f64).prop_map(|float| json!(float)),
        prop::sample::select(&["", "a", "b", "delete", "replace", "25%", "10.0.0.1", "TCP", "é\u{0}"][..])
            .prop_map(Value::from),
    ]
}

fn value() -> impl Strategy<Value = Value> {
    scalar().prop_recursive(6, 48, 6, |inner| {
        prop_oneof![prop::collection::vec(inner.clone(), 0..4).prop_map(Value::Array), object(inner)]
    })
}

fn object(inner: impl Strategy<Value = Value>) -> impl Strategy<Value = Value> {
    prop::collection::vec((prop::sample::select(NAMES), inner), 0..5)
        .prop_map(|fields| fields.into_iter().map(|(name, value)| (name.to_owned(), value)).collect())
}

fn server_with_deployment() -> Arc<ApiServer> {
    let server = ApiServer::new(ApiConfig::default());
    let resource = server.resource("apps", "deployments").unwrap();
    let object = json!({
        "metadata": {"name": "d", "labels": {"a": "1"}},
        "spec": {
            "selector": {"matchLabels": {"a": "b"}},
            "template": {
                "metadata": {"labels": {"a": "b"}},
                "spec": {"containers": [{"name": "c", "image": "i", "ports": [{"containerPort": 1}]}]},
            },
        },
    });
    server.create_now(&resource, Some("default"), object, &mut options()).unwrap();
    server
}

fn options() -> WriteOptions {
    WriteOptions { force: true, ..WriteOptions::internal("test") }
}

/// What every stored object has.
fn check_stored(server: &ApiServer) {
    for (_, object) in server.store.everything() {
        assert!(!obj::name(&object).is_empty() && !obj::uid(&object).is_empty(), "{object}");
        assert!(obj::version(&object).parse::<u64>().is_ok(), "{object}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn any_object_may_be_posted(body in value()) {
        let server = ApiServer::new(ApiConfig::default());
        for (group, plural) in [
            ("", "pods"), ("", "services"), ("apps", "deployments"), ("", "events"), ("events.k8s.io", "events"),
            ("apiextensions.k8s.io", "customresourcedefinitions"), ("", "nodes"),
        ] {
            let resource = server.resource(group, plural).unwrap();
            let namespace = resource.namespaced.then_some("default");
            let mut named = body.clone();
            if named.is_object() {
                obj::set(&mut named, &["metadata", "name"], "x");
            }
            for body in [body.clone(), named] {
                if let Err(error) = server.create_now(&resource, namespace, body, &mut options()) {
                    prop_assert!((400..500).contains(&error.code), "{error:?}");
                }
            }
        }
        check_stored(&server);
    }

    #[test]
    fn any_patch_may_be_sent(body in object(value())) {
        let server = server_with_deployment();
        let resource = server.resource("apps", "deployments").unwrap();
        for patch in [Patch::Merge(body.clone()), Patch::Strategic(body.clone()), Patch::Apply(body)] {
            match server.patch_now(&resource, Some("default"), "d", &patch, &mut options()) {
                // The same apply again changes nothing.
                Ok(first) if matches!(patch, Patch::Apply(_)) => {
                    let second =
                        server.patch_now(&resource, Some("default"), "d", &patch, &mut options()).unwrap();
                    prop_assert_eq!(obj::version(&first), obj::version(&second));
                }
                Ok(_) => {}
                Err(error) => prop_assert!((400..500).contains(&error.code), "{:?}", error),
            }
        }
        check_stored(&server);
    }

    #[test]
    fn json_reads_as_itself(value in value()) {
        let body = strict_json::parse(value.to_string().as_bytes()).unwrap();
        prop_assert_eq!(&body.value, &serde_json::from_str::<Value>(&value.to_string()).unwrap());
        prop_assert!(body.duplicates.is_empty());
    }

    #[test]
    fn bytes_never_break_the_readers(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let pod = [b"k8s\0\x0a\x09\x0a\x02v1\x12\x03Pod\x12", bytes.as_slice()].concat();
        drop(strict_json::parse(&bytes));
        drop(protobuf::decode(&bytes));
        drop(protobuf::decode(&pod));
        drop(request::parse_yaml(&bytes));
    }

    #[test]
    fn an_owner_takes_back_all_it_applied(labels in prop::collection::btree_map("[a-c]", "[a-z]{1,3}", 0..4)) {
        let server = server_with_deployment();
        let resource = server.resource("apps", "deployments").unwrap();
        let apply = |labels: Value| {
            let patch = Patch::Apply(json!({"metadata": {"labels": labels}}));
            let mut options = WriteOptions { force: true, ..WriteOptions::internal("owner") };
            server.patch_now(&resource, Some("default"), "d", &patch, &mut options).unwrap()
        };
        let labelled = apply(json!(labels));
        for (key, value) in &labels {
            prop_assert_eq!(obj::label(&labelled, key), Some(value.as_str()));
        }
        let bare = apply(Value::Object(Map::new()));
        for key in labels.keys() {
            prop_assert_eq!(obj::label(&bare, key).is_some(), key == "a" && labels[key] == "1");
        }
    }
}
