//! Custom resource definitions: what they define is served, defaulted, pruned, validated, scaled.

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::api::{Api, DeleteParams, DynamicObject, Patch, PatchParams, PostParams};
use serde_json::{Value, json};

use crate::support::{Server, eventually, status_of};

pub(crate) fn definition() -> Value {
    json!({
        "apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition",
        "metadata": {"name": "gizmos.lab.example.com"},
        "spec": {
            "group": "lab.example.com", "scope": "Namespaced",
            "names": {"plural": "gizmos", "kind": "Gizmo", "shortNames": ["gz"]},
            "versions": [{
                "name": "v1", "served": true, "storage": true,
                "subresources": {"status": {}, "scale": {
                    "specReplicasPath": ".spec.replicas", "statusReplicasPath": ".status.replicas",
                    "labelSelectorPath": ".status.selector",
                }},
                "additionalPrinterColumns": [
                    {"name": "Size", "type": "integer", "jsonPath": ".spec.replicas"},
                    {"name": "Ready", "type": "string", "jsonPath": ".status.conditions[?(@.type==\"Ready\")].status"},
                ],
                "schema": {"openAPIV3Schema": {
                    "type": "object", "required": ["spec"],
                    "properties": {
                        "spec": {
                            "type": "object", "required": ["destinations"],
                            "x-kubernetes-validations": [
                                {"rule": "self.color == oldSelf.color", "message": "color is immutable"},
                            ],
                            "properties": {
                                "replicas": {"type": "integer", "minimum": 1, "default": 1},
                                "color": {"type": "string", "enum": ["red", "green"], "default": "red"},
                                "destinations": {"type": "array", "minItems": 1, "items": {
                                    "type": "string",
                                    "x-kubernetes-validations": [{"rule": "isCIDR(self)", "message": "no CIDR"}],
                                }},
                                "free": {"type": "object", "x-kubernetes-preserve-unknown-fields": true},
                            },
                        },
                        "status": {"type": "object", "x-kubernetes-preserve-unknown-fields": true},
                    },
                }},
            }],
        },
    })
}

async fn with_definition() -> (Server, Api<DynamicObject>) {
    let server = Server::start().await;
    let definitions: Api<CustomResourceDefinition> = Api::all(server.client.clone());
    let object = serde_json::from_value(definition()).unwrap();
    definitions.create(&PostParams::default(), &object).await.unwrap();
    let established = kube::runtime::wait::await_condition(
        definitions,
        "gizmos.lab.example.com",
        kube::runtime::conditions::is_crd_established(),
    );
    tokio::time::timeout(std::time::Duration::from_secs(5), established).await.unwrap().unwrap();
    let api = server.dynamic("lab.example.com", "v1", "Gizmo", "gizmos");
    (server, api)
}

fn gizmo(spec: Value) -> DynamicObject {
    serde_json::from_value(json!({
        "apiVersion": "lab.example.com/v1", "kind": "Gizmo", "metadata": {"name": "g"}, "spec": spec,
    }))
    .unwrap()
}

#[tokio::test]
async fn objects_are_defaulted_pruned_and_validated() {
    let (_server, api) = with_definition().await;
    let params = PostParams::default();
    let wish = json!({"destinations": ["10.0.0.0/8"], "bogus": 1, "free": {"any": [1]}});
    let made = api.create(&params, &gizmo(wish)).await.unwrap();
    assert_eq!(
        made.data["spec"],
        json!({"destinations": ["10.0.0.0/8"], "replicas": 1, "color": "red", "free": {"any": [1]}})
    );
    assert_eq!(made.metadata.generation, Some(1));
    for (spec, text) in [
        (json!({}), "spec.destinations: Required value"),
        (
            json!({"destinations": []}),
            "spec.destinations: Invalid value: 0: spec.destinations in body should have at least 1 items",
        ),
        (json!({"destinations": ["x"]}), "spec.destinations[0]: Invalid value: \"string\": no CIDR"),
        (
            json!({"destinations": "x"}),
            "spec.destinations: Invalid value: \"x\": spec.destinations in body must be of type array: \"string\"",
        ),
        (
            json!({"destinations": ["::/0"], "replicas": 0, "color": "blue"}),
            "[spec.color: Unsupported value: \"blue\": supported values: \"red\", \"green\", spec.replicas: Invalid value: 0: spec.replicas in body should be greater than or equal to 1]",
        ),
    ] {
        let mut object = gizmo(spec);
        object.metadata.name = Some("h".into());
        let (code, reason, message) = status_of(api.create(&params, &object).await);
        assert_eq!((code, reason.as_str()), (422, "Invalid"));
        assert_eq!(message, format!("Gizmo.lab.example.com \"h\" is invalid: {text}"));
    }
    let recolor = Patch::Merge(json!({"spec": {"color": "green"}}));
    let (code, _, message) = status_of(api.patch("g", &PatchParams::default(), &recolor).await);
    assert_eq!(code, 422);
    assert!(message.ends_with("spec: Invalid value: \"object\": color is immutable"), "{message}");
}

#[tokio::test]
async fn unknown_and_repeated_fields() {
    let (server, _) = with_definition().await;
    let path = "/apis/lab.example.com/v1/namespaces/default/gizmos";
    let body = r#"{"apiVersion": "lab.example.com/v1", "kind": "Gizmo", "metadata": {"name": "s"},
        "spec": {"destinations": ["::/0"], "bogus": 1, "replicas": 1, "replicas": 2}}"#;
    let (code, status) =
        server.raw("POST", &format!("{path}?fieldValidation=Strict"), "application/json", body).await;
    assert_eq!(code, 400);
    assert_eq!(status["message"], "strict decoding error: duplicate field \"spec.replicas\"");
    let body = body.replace("\"replicas\": 1, ", "");
    let (code, status) =
        server.raw("POST", &format!("{path}?fieldValidation=Strict"), "application/json", body.clone()).await;
    assert_eq!(
        (code, status["message"].as_str()),
        (400, Some("strict decoding error: unknown field \"spec.bogus\""))
    );
    let (code, made) = server.raw("POST", path, "application/json", body).await;
    assert_eq!((code, &made["spec"]["bogus"]), (201, &Value::Null));
}

#[tokio::test]
async fn status_and_scale_are_apart() {
    let (_server, api) = with_definition().await;
    api.create(&PostParams::default(), &gizmo(json!({"destinations": ["::/0"]}))).await.unwrap();
    let params = PatchParams::default();
    let status = json!({"spec": {"replicas": 9}, "status": {"replicas": 3, "selector": "a=b"}});
    let written = api.patch_status("g", &params, &Patch::Merge(status.clone())).await.unwrap();
    assert_eq!(written.metadata.generation, Some(1));
    assert_eq!(
        (&written.data["spec"]["replicas"], &written.data["status"]["replicas"]),
        (&json!(1), &json!(3))
    );
    let main = api.patch("g", &params, &Patch::Merge(json!({"status": {"replicas": 7}}))).await.unwrap();
    assert_eq!(main.data["status"]["replicas"], 3);
    let scale = api.get_scale("g").await.unwrap();
    assert_eq!(scale.spec.unwrap().replicas, Some(1));
    assert_eq!(scale.status.unwrap().selector.as_deref(), Some("a=b"));
    api.patch_scale("g", &params, &Patch::Merge(json!({"spec": {"replicas": 5}}))).await.unwrap();
    let scaled = api.get("g").await.unwrap();
    assert_eq!((&scaled.data["spec"]["replicas"], scaled.metadata.generation), (&json!(5), Some(2)));
    // Server-side apply of the status alone, as controllers do.
    let apply = json!({"apiVersion": "lab.example.com/v1", "kind": "Gizmo", "status": {"phase": "Up"}});
    let applied =
        api.patch_status("g", &PatchParams::apply("c").force(), &Patch::Apply(apply)).await.unwrap();
    assert_eq!(applied.data["status"]["phase"], "Up");
    assert_eq!(applied.data["spec"]["replicas"], 5);
}

#[tokio::test]
async fn a_definition_takes_its_objects_with_it() {
    let (server, api) = with_definition().await;
    api.create(&PostParams::default(), &gizmo(json!({"destinations": ["::/0"]}))).await.unwrap();
    let definitions: Api<CustomResourceDefinition> = Api::all(server.client.clone());
    definitions.delete("gizmos.lab.example.com", &DeleteParams::default()).await.unwrap();
    eventually("the definition is gone", || async {
        definitions.get_opt("gizmos.lab.example.com").await.unwrap().is_none().then_some(())
    })
    .await;
    assert_eq!(status_of(api.get("g").await).0, 404);
    let bad = json!({"spec": {"versions": [{"name": "v1", "served": true, "storage": true}]}});
    let mut broken = definition();
    json_patch::merge(&mut broken, &bad);
    let (code, status) = server
        .raw(
            "POST",
            "/apis/apiextensions.k8s.io/v1/customresourcedefinitions",
            "application/json",
            broken.to_string(),
        )
        .await;
    assert_eq!(code, 422);
    assert!(status["message"].as_str().unwrap().contains("schemas are required"), "{status}");
}
