//! Streams of the Kubernetes API into the gateway's picture of its clients.
//!
//! Objects are read one by one: one that cannot be read is logged and left out, and stalls nothing.

use coil_api::Egress;
use coil_runtime::patience::patient;
use futures::StreamExt;
use k8s_openapi::api::core::v1::{Namespace, Pod};
use kube::api::{ApiResource, DynamicObject};
use kube::runtime::watcher::{self, Config, Event};
use kube::{Api, Client, Resource};
use serde::de::DeserializeOwned;
use tokio::sync::mpsc;

use super::clients::{Change, Input, PodKey, PodView};

/// Nobody listens any more.
#[derive(Debug, thiserror::Error)]
#[error("the task that keeps the clients has ended")]
pub(crate) struct Closed;

/// Where the changes go.
pub(crate) type Sender = mpsc::Sender<Input>;

/// How one kind is read.
struct Kind<K, V> {
    name: &'static str,
    read: fn(DynamicObject) -> Result<V, String>,
    key: fn(&DynamicObject) -> K,
    input: fn(Change<K, V>) -> Input,
    /// What to assume while we may not list the kind; `None`: wait until we may.
    forbidden: Option<fn() -> Input>,
}

/// Watches all pods.
pub(crate) async fn pods(client: Client, sender: Sender) -> Result<(), Closed> {
    let kind = Kind {
        name: "pods",
        read: |object| {
            let pod: Pod = parse(object)?;
            PodView::of(&pod).ok_or_else(|| "it has no name".to_owned())
        },
        key: |object| PodKey {
            namespace: object.metadata.namespace.clone().unwrap_or_default(),
            name: object.metadata.name.clone().unwrap_or_default(),
        },
        input: Input::Pods,
        forbidden: None,
    };
    let api = Api::all_with(client, &ApiResource::erase::<Pod>(&()));
    follow(api, Config::default(), kind, sender).await
}

/// Watches the labels of all namespaces.
pub(crate) async fn namespaces(client: Client, sender: Sender) -> Result<(), Closed> {
    let kind = Kind {
        name: "namespaces",
        read: |object| {
            let name = object.metadata.name.ok_or_else(|| "it has no name".to_owned())?;
            Ok((name, object.metadata.labels.unwrap_or_default()))
        },
        key: |object| object.metadata.name.clone().unwrap_or_default(),
        input: Input::Namespaces,
        forbidden: Some(|| Input::Namespaces(Change::Reset(Vec::new()))),
    };
    let api = Api::all_with(client, &ApiResource::erase::<Namespace>(&()));
    follow(api, Config::default(), kind, sender).await
}

/// Watches our Egress.
pub(crate) async fn egress(
    client: Client,
    namespace: String,
    name: String,
    sender: Sender,
) -> Result<(), Closed> {
    let kind = Kind {
        name: "egresses",
        read: |object| Ok(parse::<Egress>(object)?.spec.clients),
        key: |_| (),
        input: |change| match change {
            Change::Reset(egresses) => Input::Egress(egresses.into_iter().flatten().collect()),
            Change::Apply(clients) => Input::Egress(clients),
            Change::Delete(()) => Input::Egress(Vec::new()),
        },
        forbidden: Some(|| Input::Egress(Vec::new())),
    };
    let api = Api::namespaced_with(client, &namespace, &ApiResource::erase::<Egress>(&()));
    let config = Config::default().fields(&format!("metadata.name={name}"));
    follow(api, config, kind, sender).await
}

fn parse<T: DeserializeOwned + Resource>(object: DynamicObject) -> Result<T, String> {
    object.try_parse().map_err(|error| error.to_string())
}

async fn follow<K, V>(
    api: Api<DynamicObject>,
    config: Config,
    kind: Kind<K, V>,
    sender: Sender,
) -> Result<(), Closed> {
    let mut stream = patient(watcher::watcher(api, config));
    let mut listed = Vec::new();
    let mut refused = false;
    while let Some(event) = stream.next().await {
        let change = match event {
            Ok(Event::Init) => {
                listed.clear();
                continue;
            }
            Ok(Event::InitApply(object)) => {
                listed.extend(kind.view(object));
                continue;
            }
            Ok(Event::InitDone) => {
                tracing::info!(kind = kind.name, objects = listed.len(), "listed");
                refused = false;
                (kind.input)(Change::Reset(std::mem::take(&mut listed)))
            }
            Ok(Event::Apply(object)) => match kind.view(object) {
                Some(view) => (kind.input)(Change::Apply(view)),
                None => continue,
            },
            Ok(Event::Delete(object)) => (kind.input)(Change::Delete((kind.key)(&object))),
            Err(error) => match kind.forbidden.filter(|_| is_forbidden(&error)) {
                Some(assume) if !refused => {
                    refused = true;
                    tracing::warn!(
                        kind = kind.name, %error,
                        "not permitted; only annotations choose clients until it is",
                    );
                    assume()
                }
                Some(_) => continue,
                None => {
                    tracing::warn!(kind = kind.name, %error, "watch failed; trying again");
                    continue;
                }
            },
        };
        sender.send(change).await.map_err(|_| Closed)?;
    }
    Ok(())
}

impl<K, V> Kind<K, V> {
    fn view(&self, object: DynamicObject) -> Option<V> {
        let name = object.metadata.name.clone().unwrap_or_default();
        let namespace = object.metadata.namespace.clone().unwrap_or_default();
        match (self.read)(object) {
            Ok(view) => Some(view),
            Err(error) => {
                tracing::warn!(kind = self.name, namespace, name, error, "ignoring an object");
                None
            }
        }
    }
}

fn is_forbidden(error: &watcher::Error) -> bool {
    match error {
        watcher::Error::InitialListFailed(kube::Error::Api(status))
        | watcher::Error::WatchStartFailed(kube::Error::Api(status)) => status.code == 403,
        _ => false,
    }
}
