//! An API server with the controller running against it.

use std::fmt::Debug;
use std::future::Future;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use coil_api::{AddressBlock, AddressPool, BlockRequest, Egress};
use coil_controller::IpamSettings;
use coil_controller::plan::egress::Settings;
use coil_lab::api::{ApiConfig, ApiServer};
use coil_runtime::tasks::Drain;
use k8s_openapi::api::core::v1::{Namespace, Node};
use k8s_openapi::api::rbac::v1::{ClusterRole, ClusterRoleBinding};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::api::{DeleteParams, ListParams, ObjectMeta, Patch, PatchParams, PostParams};
use kube::core::ClusterResourceScope;
use kube::{Api, Client, Config, Resource, ResourceExt};
use prometheus::Registry;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Mutex, OwnedMutexGuard, watch};
use tokio::task::{JoinHandle, JoinSet};

const DEADLINE: Duration = Duration::from_secs(60);

/// A cluster with the controller.
pub struct Cluster {
    client: Client,
    /// The controllers' way to the API server.
    theirs: Client,
    ipam: Option<(Drain, JoinHandle<()>)>,
    registry: Registry,
    tasks: Vec<tokio::task::JoinHandle<()>>,
    server: Option<std::sync::Arc<ApiServer>>,
    /// Whether the controller reaches the API server.
    reachable: watch::Sender<bool>,
    alone: Option<OwnedMutexGuard<()>>,
}

impl Cluster {
    /// With the controllers of Egresses.
    pub async fn start() -> Self {
        let mut cluster = Self::without_controllers().await;
        let settings = Settings { image: "coil:test".to_owned(), fou_port: 5555, drain_timeout: 300 };
        let work = coil_controller::run_controllers(
            cluster.theirs.clone(),
            settings,
            "test".to_owned(),
            cluster.registry.clone(),
            Drain::new(),
        );
        cluster.tasks.push(tokio::spawn(async move { work.await.unwrap() }));
        cluster
    }

    pub async fn without_controllers() -> Self {
        let mut tasks = Vec::new();
        let reachable = watch::Sender::new(true);
        let (client, theirs, server) = match std::env::var_os("COIL_TEST_KUBECONFIG") {
            Some(path) => {
                let mut config = kubeconfig(Path::new(&path)).await;
                let client = Client::try_from(config.clone()).unwrap();
                // They may do what the roles of the manifests let them.
                let account = "system:serviceaccount:kube-system:coil-controller";
                config.auth_info.impersonate = Some(account.to_owned());
                (client, Client::try_from(config).unwrap(), None)
            }
            None => {
                let server = ApiServer::new(ApiConfig::default());
                let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
                let address = listener.local_addr().unwrap();
                let serving = server.clone();
                tasks.push(tokio::spawn(async move { serving.serve(listener).await.unwrap() }));
                let mut controllers = coil_lab::controllers::start(&server);
                tasks.push(tokio::spawn(async move { while controllers.join_next().await.is_some() {} }));
                let config = Config::new(format!("http://{address}").parse().unwrap());
                let (theirs, proxy) = proxy(address, reachable.subscribe()).await;
                tasks.push(proxy);
                (Client::try_from(config).unwrap(), Client::try_from(theirs).unwrap(), Some(server))
            }
        };
        install(&client).await;
        Self { client, theirs, registry: Registry::new(), tasks, server, reachable, ipam: None, alone: None }
    }

    /// Without controllers and without what is not in a namespace: pools, blocks, requests, nodes. On an API
    /// server that all tests share, the others that need this wait, and what they left is removed.
    pub async fn alone() -> Self {
        static ALONE: LazyLock<Arc<Mutex<()>>> = LazyLock::new(Arc::default);
        let shared = std::env::var_os("COIL_TEST_KUBECONFIG").is_some();
        let guard = if shared { Some(ALONE.clone().lock_owned().await) } else { None };
        let mut cluster = Self::without_controllers().await;
        if shared {
            wipe::<BlockRequest>(&cluster.client).await;
            wipe::<AddressBlock>(&cluster.client).await;
            wipe::<AddressPool>(&cluster.client).await;
            wipe::<Node>(&cluster.client).await;
        }
        cluster.alone = guard;
        cluster
    }

    /// Starts the controllers of address pools; those that ran before end first, and so do their metrics.
    pub async fn start_ipam(&mut self, settings: IpamSettings) {
        self.stop_ipam().await;
        self.registry = Registry::new();
        let drain = Drain::new();
        let work = coil_controller::run_ipam(
            self.theirs.clone(),
            settings,
            "test".to_owned(),
            self.registry.clone(),
            drain.clone(),
        );
        self.ipam = Some((drain, tokio::spawn(async move { work.await.unwrap() })));
    }

    /// Another leader, which there should never be.
    pub fn start_second_ipam(&mut self, settings: IpamSettings) {
        let (client, me) = (self.client(), "second".to_owned());
        let work = coil_controller::run_ipam(client, settings, me, Registry::new(), Drain::new());
        self.tasks.push(tokio::spawn(async move { work.await.unwrap() }));
    }

    pub async fn stop_ipam(&mut self) {
        if let Some((drain, task)) = self.ipam.take() {
            drain.cancel();
            tokio::time::timeout(DEADLINE, task).await.unwrap().unwrap();
        }
    }

    /// Whether the controllers of address pools still run.
    pub fn ipam_runs(&self) -> bool {
        self.ipam.as_ref().is_some_and(|(_, task)| !task.is_finished())
    }

    pub fn client(&self) -> Client {
        self.client.clone()
    }

    /// Takes the API server away from the controller, or gives it back. Only the embedded one can go.
    pub fn set_reachable(&self, reachable: bool) {
        assert!(self.server.is_some(), "not with COIL_TEST_KUBECONFIG");
        self.reachable.send_replace(reachable);
    }

    /// Makes a namespace with a name of its own.
    pub async fn namespace(&self, prefix: &str) -> String {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let name = format!("{prefix}-{}-{number}", std::process::id());
        let metadata = ObjectMeta { name: Some(name.clone()), ..ObjectMeta::default() };
        let namespace = Namespace { metadata, ..Namespace::default() };
        Api::all(self.client()).create(&PostParams::default(), &namespace).await.unwrap();
        name
    }

    pub async fn egress(&self, namespace: &str, name: &str, extra: Value) {
        let egress: Egress = serde_json::from_value(egress_object(name, extra)).unwrap();
        Api::namespaced(self.client(), namespace).create(&PostParams::default(), &egress).await.unwrap();
    }

    /// Merges into the specification.
    pub async fn patch(&self, namespace: &str, name: &str, spec: Value) {
        let api: Api<Egress> = Api::namespaced(self.client(), namespace);
        let patch = Patch::Merge(json!({ "spec": spec }));
        api.patch(name, &PatchParams::default(), &patch).await.unwrap();
    }

    /// Waits until the children are up to date.
    pub async fn reconciled(&self, namespace: &str, name: &str) {
        let api: Api<Egress> = Api::namespaced(self.client(), namespace);
        eventually("reconciled", || async {
            let egress = api.get(name).await.unwrap();
            (condition(&egress, "Reconciled") == "True").then_some(())
        })
        .await;
    }

    /// Sum of all series of a metric; of those with a label of this value, as `metric/value`.
    pub fn metric(&self, name: &str) -> f64 {
        let families = self.registry.gather();
        let (name, label) = name.split_once('/').unwrap_or((name, ""));
        let metrics = families.iter().filter(|f| f.name() == name).flat_map(|f| f.get_metric());
        let wanted = |m: &&prometheus::proto::Metric| {
            label.is_empty() || m.get_label().iter().any(|pair| pair.value() == label)
        };
        metrics.filter(wanted).map(|m| m.get_counter().get_value() + m.get_gauge().get_value()).sum()
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if let Some(server) = &self.server {
            server.stop();
        }
        for task in self.tasks.iter().chain(self.ipam.as_ref().map(|(_, task)| task)) {
            task.abort();
        }
    }
}

pub fn egress_object(name: &str, extra: Value) -> Value {
    let mut spec = json!({ "destinations": ["0.0.0.0/0", "::/0"] });
    for (key, value) in extra.as_object().unwrap() {
        spec[key] = value.clone();
    }
    json!({
        "apiVersion": "coil.cybozu.com/v2", "kind": "Egress", "metadata": { "name": name }, "spec": spec,
    })
}

/// Value of a condition, empty if absent.
pub fn condition(egress: &Egress, kind: &str) -> String {
    let conditions = egress.status.iter().flat_map(|s| &s.conditions);
    conditions.filter(|c| c.type_ == kind).map(|c| c.status.clone()).next().unwrap_or_default()
}

/// Asks again and again until there is an answer.
pub async fn eventually<T, F, Fut>(what: &str, ask: F) -> T
where
    F: Fn() -> Fut,
    Fut: Future<Output = Option<T>>,
{
    let asking = async {
        loop {
            if let Some(answer) = ask().await {
                return answer;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(DEADLINE, asking).await.unwrap_or_else(|_| panic!("no {what} within {DEADLINE:?}"))
}

/// The definitions, roles and bindings, from the manifests.
async fn install(client: &Client) {
    let manifests = Path::new(env!("CARGO_MANIFEST_DIR")).join("../manifests");
    let read = |file: &str| -> Vec<Value> {
        serde_saphyr::from_multiple(&std::fs::read_to_string(manifests.join(file)).unwrap()).unwrap()
    };
    let parameters = PatchParams::apply("test").force();
    let definitions: Api<CustomResourceDefinition> = Api::all(client.clone());
    for plural in ["addressblocks", "addresspools", "blockrequests", "egresses"] {
        for definition in read(&format!("crd/coil.cybozu.com_{plural}.yaml")) {
            let name = definition["metadata"]["name"].as_str().unwrap().to_owned();
            definitions.patch(&name, &parameters, &Patch::Apply(&definition)).await.unwrap();
        }
    }
    let bindings: Api<ClusterRoleBinding> = Api::all(client.clone());
    let roles: Api<ClusterRole> = Api::all(client.clone());
    for object in read("rbac/egress.yaml").iter().chain(&read("rbac/controller.yaml")) {
        let name = object["metadata"]["name"].as_str().unwrap();
        match object["kind"].as_str().unwrap() {
            "ClusterRoleBinding" => {
                drop(bindings.patch(name, &parameters, &Patch::Apply(object)).await.unwrap())
            }
            "ClusterRole" => drop(roles.patch(name, &parameters, &Patch::Apply(object)).await.unwrap()),
            other => assert_eq!(other, "ServiceAccount"),
        }
    }
    let all = kube::api::ListParams::default;
    let egresses: Api<Egress> = Api::all(client.clone());
    eventually("Egress API", || async { egresses.list(&all()).await.ok() }).await;
    let pools: Api<AddressPool> = Api::all(client.clone());
    eventually("AddressPool API", || async { pools.list(&all()).await.ok() }).await;
    let blocks: Api<AddressBlock> = Api::all(client.clone());
    eventually("AddressBlock API", || async { blocks.list(&all()).await.ok() }).await;
    let requests: Api<BlockRequest> = Api::all(client.clone());
    eventually("BlockRequest API", || async { requests.list(&all()).await.ok() }).await;
}

/// Removes all objects of a kind, whatever keeps them.
async fn wipe<K>(client: &Client)
where
    K: Resource<DynamicType = (), Scope = ClusterResourceScope> + Clone + DeserializeOwned + Debug,
{
    let api: Api<K> = Api::all(client.clone());
    let release = Patch::Merge(json!({ "metadata": { "finalizers": null } }));
    eventually("empty cluster", || async {
        let left = api.list_metadata(&ListParams::default()).await.unwrap().items;
        for object in &left {
            // Some go by themselves.
            for error in [
                api.delete(&object.name_any(), &DeleteParams::default()).await.err(),
                api.patch_metadata(&object.name_any(), &PatchParams::default(), &release).await.err(),
            ] {
                assert!(!matches!(error, Some(error) if !is_gone(&error)));
            }
        }
        left.is_empty().then_some(())
    })
    .await;
}

fn is_gone(error: &kube::Error) -> bool {
    matches!(error, kube::Error::Api(status) if status.code == 404)
}

/// Passes connections on while `open` says so; otherwise cuts them.
async fn proxy(target: SocketAddr, mut open: watch::Receiver<bool>) -> (Config, JoinHandle<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let config = Config::new(format!("http://{}", listener.local_addr().unwrap()).parse().unwrap());
    let task = tokio::spawn(async move {
        let mut connections = JoinSet::new();
        loop {
            tokio::select! {
                changed = open.changed() => match changed {
                    Ok(()) if *open.borrow() => {}
                    Ok(()) => connections.abort_all(),
                    Err(_) => return,
                },
                accepted = listener.accept() => {
                    let (mut near, _) = accepted.unwrap();
                    if *open.borrow() {
                        connections.spawn(async move {
                            let mut far = TcpStream::connect(target).await?;
                            tokio::io::copy_bidirectional(&mut near, &mut far).await
                        });
                    }
                }
            }
        }
    });
    (config, task)
}

async fn kubeconfig(path: &Path) -> Config {
    let kubeconfig = kube::config::Kubeconfig::read_from(path).unwrap();
    Config::from_custom_kubeconfig(kubeconfig, &kube::config::KubeConfigOptions::default()).await.unwrap()
}
