//! `kubectl` against the server, as people use it.

use std::path::PathBuf;
use std::process::{Command, Output};

use crate::custom::definition;
use crate::support::Server;

/// The program: `KUBECTL`, else the one in the path.
fn program() -> PathBuf {
    std::env::var_os("KUBECTL").map_or_else(|| PathBuf::from("kubectl"), PathBuf::from)
}

struct Kubectl {
    server: String,
    home: PathBuf,
}

impl Drop for Kubectl {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_dir_all(&self.home) {
            eprintln!("clean-up: {error}");
        }
    }
}

impl Kubectl {
    fn new(server: &Server) -> Self {
        let home = std::env::temp_dir().join(format!("coil-lab-kubectl-{}", server.address.port()));
        std::fs::create_dir_all(&home).unwrap();
        Self { server: format!("http://{}", server.address), home }
    }

    async fn output(&self, line: &str, input: Option<String>) -> Output {
        let mut command = Command::new(program());
        command.env("HOME", &self.home).env_remove("KUBECONFIG").args(["--server", &self.server]);
        command.args(line.split_whitespace());
        if let Some(input) = input {
            let file = self.home.join("input.json");
            std::fs::write(&file, input).unwrap();
            command.arg("-f").arg(file);
        }
        tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap()
    }

    /// Runs a line and wants it to succeed with each of the texts in its output.
    async fn run(&self, line: &str, wanted: &[&str]) -> String {
        self.feed(line, None, wanted).await
    }

    async fn feed(&self, line: &str, input: Option<String>, wanted: &[&str]) -> String {
        let output = self.output(line, input).await;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "kubectl {line}: {text}{errors}");
        for wanted in wanted {
            assert!(text.contains(wanted), "kubectl {line}: no {wanted:?} in:\n{text}{errors}");
        }
        text
    }

    async fn fail(&self, line: &str, input: Option<String>, wanted: &str) {
        let output = self.output(line, input).await;
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success(), "kubectl {line} succeeded");
        assert!(errors.contains(wanted), "kubectl {line}: no {wanted:?} in:\n{errors}");
    }
}

fn gizmo(spec: &str) -> Option<String> {
    Some(format!(
        r#"{{"apiVersion": "lab.example.com/v1", "kind": "Gizmo", "metadata": {{"name": "g"}}, "spec": {spec}}}"#
    ))
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs kubectl"]
async fn workloads() {
    let server = Server::with_nodes(2).await;
    let kubectl = Kubectl::new(&server);
    kubectl.run("version", &["Server Version"]).await;
    kubectl.run("get nodes -o wide", &["n1", "Ready"]).await;
    kubectl.run("create namespace team", &["namespace/team created"]).await;
    kubectl.run("-n team create deployment web --image=i:1", &["created"]).await;
    kubectl.run("-n team scale deployment web --replicas=2", &["scaled"]).await;
    kubectl.run("-n team rollout status deployment web --timeout=20s", &["successfully rolled out"]).await;
    kubectl.run("-n team get deployments", &["NAME", "READY", "UP-TO-DATE", "2/2"]).await;
    kubectl.run("-n team get pods -o wide", &["NAME", "Running", "10.0.0.", "n2"]).await;
    kubectl.run("-n team set image deployment web i=i:2", &["image updated"]).await;
    kubectl.run("-n team rollout restart deployment web", &["restarted"]).await;
    kubectl.run("-n team rollout status deployment web --timeout=20s", &["successfully rolled out"]).await;
    kubectl
        .run("-n team wait --for=condition=Available deployment/web --timeout=10s", &["condition met"])
        .await;
    kubectl.run("-n team expose deployment web --port=80 --target-port=8080", &["exposed"]).await;
    kubectl.run("-n team get services,endpointslices", &["ClusterIP", "10.96.0.", "IPv4", "8080"]).await;
    kubectl
        .run("-n team describe deployment web", &["RollingUpdate", "NewReplicaSet:", "ScalingReplicaSet"])
        .await;
    kubectl.run("-n team describe pods", &["Node:", "Scheduled"]).await;
    kubectl.run("describe node n1", &["Name:", "n1", "Non-terminated Pods"]).await;
    kubectl.run("-n team get events", &["ScalingReplicaSet", "deployment/web"]).await;
    kubectl.run("-n team label deployment web tier=front", &["labeled"]).await;
    kubectl.run("-n team annotate deployment web note=x", &["annotated"]).await;
    kubectl.run("-n team get deployment web -o jsonpath={.metadata.labels.tier}", &["front"]).await;
    kubectl.run("-n team patch deployment web -p {\"spec\":{\"replicas\":1}}", &["patched"]).await;
    kubectl.run("-n team delete pods --all --wait=true", &["deleted"]).await;
    kubectl.run("auth can-i create pods", &["yes"]).await;
    kubectl.run("api-resources", &["deployments", "apps/v1"]).await;
    kubectl.run("explain deployment.spec.replicas", &["desired pods"]).await;
    kubectl.run("delete namespace team --timeout=20s", &["deleted"]).await;
    kubectl.fail("get namespace team", None, "not found").await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs kubectl"]
async fn custom_resources() {
    let server = Server::start().await;
    let kubectl = Kubectl::new(&server);
    let apply = async |input: Option<String>, wanted: &str| kubectl.feed("apply", input, &[wanted]).await;
    apply(Some(definition().to_string()), "created").await;
    kubectl.run("wait --for=condition=Established crd/gizmos.lab.example.com --timeout=5s", &["met"]).await;
    apply(Some(definition().to_string()), "unchanged").await;
    apply(gizmo(r#"{"destinations": ["10.0.0.0/8"]}"#), "created").await;
    kubectl.run("get gizmos", &["NAME", "SIZE", "READY"]).await;
    apply(gizmo(r#"{"destinations": ["10.0.0.0/8", "::/0"]}"#), "configured").await;
    kubectl.run("get gz g -o yaml", &["- ::/0", "color: red"]).await;
    kubectl.run("describe gizmo g", &["Destinations:", "Replicas:"]).await;
    kubectl.run("scale gizmo g --replicas=3", &["scaled"]).await;
    kubectl.run("get gz g -o jsonpath={.spec.replicas}/{.metadata.generation}", &["3/3"]).await;
    kubectl.run("explain gizmo.spec.destinations", &["[]string"]).await;
    kubectl.fail("apply", gizmo(r#"{"destinations": ["x"]}"#), "no CIDR").await;
    kubectl.fail("apply", gizmo(r#"{"destinations": ["::/0"], "bogus": 1}"#), "unknown field").await;
    kubectl.fail("apply", gizmo("{}"), "destinations").await;
    kubectl.run("delete gizmo g", &["deleted"]).await;
    kubectl.run("delete crd gizmos.lab.example.com --timeout=10s", &["deleted"]).await;
}
