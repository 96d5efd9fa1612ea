//! Admission webhooks.

use std::sync::{Arc, Mutex};

use axum::extract::State;
use axum::{Json, Router, routing};
use kube::api::{DeleteParams, Patch, PatchParams, PostParams};
use serde_json::{Value, json};

use crate::custom::definition;
use crate::support::{Server, status_of};

type Seen = Arc<Mutex<Vec<String>>>;

/// Gives objects without a destination one.
async fn mutate(Json(review): Json<Value>) -> Json<Value> {
    let request = &review["request"];
    let patch = if request["object"]["spec"]["destinations"].is_null() {
        r#"[{"op": "add", "path": "/spec/destinations", "value": ["::/0"]}]"#
    } else {
        "[]"
    };
    let patch = k8s_openapi::ByteString(patch.as_bytes().to_vec());
    Json(json!({"response": {
        "uid": request["uid"], "allowed": true, "patchType": "JSONPatch", "patch": patch, "warnings": ["mind"],
    }}))
}

/// Refuses green ones, and deletions of those that say so.
async fn validate(State(seen): State<Seen>, Json(review): Json<Value>) -> Json<Value> {
    let request = &review["request"];
    seen.lock().unwrap().push(format!(
        "{} {}",
        request["operation"].as_str().unwrap(),
        request["name"].as_str().unwrap()
    ));
    let is_green = request["object"]["spec"]["color"] == "green";
    let is_kept =
        request["oldObject"]["metadata"]["labels"]["keep"] == "yes" && request["operation"] == "DELETE";
    let mut response = json!({"uid": request["uid"], "allowed": !(is_green || is_kept)});
    if is_green {
        response["status"] = json!({"message": "green is out", "code": 422});
    }
    Json(json!({"response": response}))
}

async fn hooks(seen: Seen) -> String {
    let router = Router::new()
        .route("/mutate", routing::post(mutate))
        .route("/validate", routing::post(validate))
        .with_state(seen);
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
    format!("http://{address}")
}

fn registration(kind: &str, url: &str, operations: Value) -> Value {
    json!({
        "apiVersion": "admissionregistration.k8s.io/v1", "kind": kind, "metadata": {"name": "test"},
        "webhooks": [{
            "name": "gizmos.test", "admissionReviewVersions": ["v1"], "sideEffects": "None",
            "clientConfig": {"url": url},
            "rules": [{
                "apiGroups": ["lab.example.com"], "apiVersions": ["*"], "resources": ["gizmos"],
                "operations": operations,
            }],
        }],
    })
}

#[tokio::test]
async fn webhooks_change_and_refuse() {
    let server = Server::start().await;
    let seen = Seen::default();
    let url = hooks(seen.clone()).await;
    for (path, body) in [
        ("/apis/apiextensions.k8s.io/v1/customresourcedefinitions", definition()),
        (
            "/apis/admissionregistration.k8s.io/v1/mutatingwebhookconfigurations",
            registration("MutatingWebhookConfiguration", &format!("{url}/mutate"), json!(["CREATE"])),
        ),
        (
            "/apis/admissionregistration.k8s.io/v1/validatingwebhookconfigurations",
            registration("ValidatingWebhookConfiguration", &format!("{url}/validate"), json!(["*"])),
        ),
    ] {
        let (code, answer) = server.raw("POST", path, "application/json", body.to_string()).await;
        assert_eq!(code, 201, "{answer}");
    }
    let api = server.dynamic("lab.example.com", "v1", "Gizmo", "gizmos");
    let gizmo = |name: &str, spec: Value| {
        serde_json::from_value(json!({
            "apiVersion": "lab.example.com/v1", "kind": "Gizmo",
            "metadata": {"name": name, "labels": {"keep": "yes"}}, "spec": spec,
        }))
        .unwrap()
    };
    // What the schema would refuse, the webhook completes first.
    let made = api.create(&PostParams::default(), &gizmo("a", json!({}))).await.unwrap();
    assert_eq!(made.data["spec"], json!({"destinations": ["::/0"], "replicas": 1, "color": "red"}));
    let refused = status_of(api.create(&PostParams::default(), &gizmo("b", json!({"color": "green"}))).await);
    let text = "admission webhook \"gizmos.test\" denied the request: green is out";
    assert_eq!(refused, (422, "Invalid".to_owned(), text.to_owned()));
    assert!(api.get_opt("b").await.unwrap().is_none());
    let grow = Patch::Merge(json!({"spec": {"replicas": 2}}));
    api.patch("a", &PatchParams::default(), &grow).await.unwrap();
    assert_eq!(status_of(api.delete("a", &DeleteParams::default()).await).0, 403);
    let apply = |color: &str| {
        Patch::Apply(json!({"apiVersion": "lab.example.com/v1", "kind": "Gizmo", "spec": {"color": color}}))
    };
    let params = PatchParams::apply("m");
    assert_eq!(status_of(api.patch("c", &params, &apply("green")).await).0, 422);
    api.patch("c", &params, &apply("red")).await.unwrap();
    assert_eq!(
        *seen.lock().unwrap(),
        ["CREATE a", "CREATE b", "UPDATE a", "DELETE a", "CREATE c", "CREATE c"]
    );
}

#[tokio::test]
async fn a_webhook_that_is_away_fails_closed_unless_it_may_be_ignored() {
    let server = Server::start().await;
    let definitions = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions";
    assert_eq!(server.raw("POST", definitions, "application/json", definition().to_string()).await.0, 201);
    let hooks = "/apis/admissionregistration.k8s.io/v1/validatingwebhookconfigurations";
    let away = registration("ValidatingWebhookConfiguration", "http://127.0.0.1:1/x", json!(["CREATE"]));
    assert_eq!(server.raw("POST", hooks, "application/json", away.to_string()).await.0, 201);
    let path = "/apis/lab.example.com/v1/namespaces/default/gizmos";
    let gizmo = json!({"metadata": {"name": "a"}, "spec": {"destinations": ["::/0"]}}).to_string();
    let (code, status) = server.raw("POST", path, "application/json", gizmo.clone()).await;
    assert_eq!(code, 500);
    let message = status["message"].as_str().unwrap();
    assert!(message.contains("failed calling webhook \"gizmos.test\""), "{message}");
    let ignore = r#"[{"op": "replace", "path": "/webhooks/0/failurePolicy", "value": "Ignore"}]"#;
    let (code, _) =
        server.raw("PATCH", &format!("{hooks}/test"), "application/json-patch+json", ignore).await;
    assert_eq!(code, 200);
    assert_eq!(server.raw("POST", path, "application/json", gizmo).await.0, 201);
}
