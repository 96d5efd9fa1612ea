//! Whatever is sent, the answer is a `Status` and the server lives on.

use serde_json::json;

use crate::support::Server;

const MAPS: &str = "/api/v1/namespaces/default/configmaps";

#[tokio::test]
async fn every_mistake_has_its_status() {
    let server = Server::start().await;
    let media = "application/json";
    let huge = format!("{{\"data\": {{\"a\": \"{}\"}}}}", "x".repeat(4 << 20));
    let deep = "[".repeat(100_000);
    for (method, path, media, body, code) in [
        ("GET", "/nowhere", "", "", 404),
        ("GET", "/apis/none.example.com/v1", "", "", 404),
        ("GET", "/apis/none.example.com/v1/things", "", "", 404),
        ("GET", "/api/v1/namespaces/default/nodes", "", "", 404),
        ("GET", "/api/v1/namespaces/default/pods/a/b/c", "", "", 404),
        ("GET", "/api/v1/pods/x", "", "", 404),
        ("POST", "/api/v1/configmaps", media, "{}", 405),
        ("PUT", MAPS, media, "{}", 405),
        ("POST", "/version", media, "{}", 405),
        ("POST", MAPS, media, "{", 400),
        ("POST", MAPS, media, "[]", 400),
        ("POST", MAPS, media, "", 400),
        ("POST", MAPS, media, deep.as_str(), 400),
        ("POST", MAPS, "application/yaml", "a: [", 400),
        ("POST", MAPS, "text/html", "{}", 415),
        ("POST", MAPS, "application/vnd.kubernetes.protobuf", "k8s\0garbage", 400),
        ("POST", MAPS, media, huge.as_str(), 413),
        ("POST", MAPS, media, "{\"kind\": \"Pod\", \"apiVersion\": \"v1\"}", 400),
        ("POST", MAPS, media, "{\"kind\": \"ConfigMap\", \"apiVersion\": \"v2\"}", 400),
        ("POST", MAPS, media, "{\"metadata\": []}", 400),
        ("POST", MAPS, media, "{\"metadata\": {\"name\": 5}}", 400),
        ("POST", MAPS, media, "{\"metadata\": {\"name\": \"a\", \"namespace\": \"b\"}}", 400),
        ("POST", MAPS, media, "{\"metadata\": {\"name\": \"A_b\"}}", 422),
        ("POST", MAPS, media, "{\"metadata\": {}}", 422),
        ("POST", MAPS, media, "{\"metadata\": {\"name\": \"a\", \"labels\": {\"x y\": \"\"}}}", 422),
        ("POST", MAPS, media, "{\"metadata\": {\"name\": \"a\"}, \"data\": {\"a\": 1}}", 400),
        (
            "POST",
            "/api/v1/namespaces/default/pods",
            media,
            "{\"metadata\": {\"name\": \"a\"}, \"spec\": {}}",
            422,
        ),
        (
            "POST",
            "/api/v1/namespaces/default/pods",
            media,
            "{\"metadata\": {\"name\": \"a\"}, \"spec\": 7}",
            400,
        ),
        ("PATCH", "/api/v1/namespaces/default", "application/merge-patch+json", "[]", 400),
        ("PATCH", "/api/v1/namespaces/default", "application/json-patch+json", "{}", 400),
        (
            "PATCH",
            "/api/v1/namespaces/default",
            "application/json-patch+json",
            "[{\"op\":\"remove\",\"path\":\"/x\"}]",
            422,
        ),
        ("PATCH", "/api/v1/namespaces/default", "application/json", "{}", 415),
        ("GET", "/api/v1/pods?labelSelector=a%20b%20c", "", "", 400),
        ("GET", "/api/v1/pods?fieldSelector=spec.image%3Dx", "", "", 400),
        ("GET", "/api/v1/pods?watch=1&resourceVersion=abc", "", "", 400),
        ("GET", "/api/v1/pods?continue=zz", "", "", 400),
        ("POST", "/api/v1/namespaces/default/configmaps?dryRun=Some", media, "{}", 400),
        ("GET", "/api/v1/namespaces/default/pods/x/log", "", "", 404),
        ("DELETE", "/api/v1/namespaces/default", "", "", 403),
        ("POST", "/api/v1/namespaces/default/pods/x/binding", media, "{\"target\": {}}", 422),
    ] {
        let (found, status) = server.raw(method, path, media, body).await;
        let shown = &body[..body.len().min(60)];
        assert_eq!(found, code, "{method} {path} {shown}: {status}");
        assert_eq!(status["kind"], "Status", "{method} {path} {shown}");
        assert_eq!(status["code"], code, "{method} {path} {shown}");
    }
    assert_eq!(server.raw("GET", MAPS, "", "").await.1["items"], json!([]));
}

#[tokio::test]
async fn yaml_is_as_good_as_json() {
    let server = Server::start().await;
    let body = "metadata:\n  name: y\ndata:\n  a: \"1\"\n";
    let (code, made) = server.raw("POST", MAPS, "application/yaml", body).await;
    assert_eq!((code, &made["data"]["a"]), (201, &json!("1")), "{made}");
}
