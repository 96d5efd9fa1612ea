//! Streams of the Kubernetes API into changes of the picture. No logic: one object in, one view out.
//!
//! Objects are decoded one by one, so that one that cannot be read stalls nothing: it is counted,
//! logged and left out, and what was known of it stays.

mod changes;

use std::fmt;
use std::pin::pin;

use coil_api::{Egress, names};
use coil_runtime::patience::patient;
use futures::StreamExt;
use k8s_openapi::api::core::v1::{Namespace, Node, Pod};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::api::{ApiResource, DynamicObject, PartialObjectMeta};
use kube::runtime::watcher::{self, Config, Event};
use kube::{Api, Client, Resource, ResourceExt};
use serde::de::DeserializeOwned;

pub(crate) use self::changes::{Read, changes};
use crate::index::{Change, EgressView, NamespaceView, ObjectKey, PodView, SliceView};
use crate::ipam::NodeAddresses;
use crate::metrics::WatchMetrics;
use crate::state::{Closed, Input, StateHandle};

/// A kind that is watched.
struct Kind<K, T> {
    name: &'static str,
    read: fn(K) -> Result<Read<T>, String>,
    /// The view of an object that cannot be read, if there is one.
    unreadable: fn(&ObjectKey, &str) -> Option<T>,
    input: fn(Change<T>) -> Input,
}

/// Watches the pods of a node.
pub async fn pods(
    client: Client,
    node: String,
    state: StateHandle,
    metrics: WatchMetrics,
) -> Result<(), Closed> {
    let kind = Kind {
        name: "pods",
        read: |object| {
            let pod: Pod = parse(object)?;
            PodView::of(&pod).map(Read::View).ok_or_else(|| "it has no name or no UID".into())
        },
        unreadable: |_, _| None,
        input: Input::Pods,
    };
    let config = Config::default().fields(&format!("spec.nodeName={node}"));
    let api = Api::all_with(client, &ApiResource::erase::<Pod>(&()));
    follow(api, config, kind, state, metrics).await
}

/// Watches all Egresses.
pub async fn egresses(client: Client, state: StateHandle, metrics: WatchMetrics) -> Result<(), Closed> {
    let kind = Kind {
        name: "egresses",
        read: |object| Ok(Read::View(EgressView::of(&parse::<Egress>(object)?))),
        // Its clients must not leave with their own addresses.
        unreadable: |key, error| {
            Some(EgressView::unreadable(key.clone(), format!("it cannot be read: {error}")))
        },
        input: Input::Egresses,
    };
    let api = Api::all_with(client, &ApiResource::erase::<Egress>(&()));
    follow(api, Config::default(), kind, state, metrics).await
}

/// Watches the EndpointSlices of all Egresses.
pub async fn slices(client: Client, state: StateHandle, metrics: WatchMetrics) -> Result<(), Closed> {
    let kind = Kind {
        name: "endpointslices",
        read: |object| {
            let slice: EndpointSlice = parse(object)?;
            Ok(SliceView::of(&slice).map_or(Read::Ignored, Read::View))
        },
        unreadable: |_, _| None,
        input: Input::Slices,
    };
    let config = Config::default().labels(&format!(
        "{}={},{}={}",
        names::LABEL_APP_NAME,
        names::APP_NAME,
        names::LABEL_APP_COMPONENT,
        names::COMPONENT_EGRESS,
    ));
    let api = Api::all_with(client, &ApiResource::erase::<EndpointSlice>(&()));
    follow(api, config, kind, state, metrics).await
}

/// Watches the zone of a node.
pub async fn own_node(
    client: Client,
    node: String,
    state: StateHandle,
    metrics: WatchMetrics,
) -> Result<(), Closed> {
    let kind = Kind {
        name: "nodes",
        read: |object: PartialObjectMeta<Node>| {
            Ok(Read::View(object.labels().get(names::LABEL_ZONE).filter(|zone| !zone.is_empty()).cloned()))
        },
        unreadable: |_, _| None,
        input: |change| {
            Input::Zone(match change {
                Change::Apply(zone) => zone,
                Change::Delete(_) => None,
                Change::Reset { objects, .. } => objects.into_iter().flatten().next(),
            })
        },
    };
    let config = Config::default().fields(&format!("metadata.name={node}"));
    follow(Api::all(client), config, kind, state, metrics).await
}

/// Watches the addresses of a node, for ever. A node whose cloud gives it addresses late has none at first.
pub async fn node_addresses(
    client: Client,
    node: String,
    metrics: WatchMetrics,
    tell: impl Fn(NodeAddresses) + Send,
) {
    let config = Config::default().fields(&format!("metadata.name={node}"));
    let mut stream = patient(watcher::watcher(Api::<Node>::all(client), config));
    while let Some(event) = stream.next().await {
        match event {
            Ok(Event::Apply(node) | Event::InitApply(node)) => tell(NodeAddresses::of(&node)),
            // Without its object the node still has the addresses that it had.
            Ok(Event::Init | Event::InitDone | Event::Delete(_)) => {}
            Err(error) => failed("nodes", &error, &metrics),
        }
    }
}

/// Watches the labels of all namespaces.
pub async fn namespaces(client: Client, state: StateHandle, metrics: WatchMetrics) -> Result<(), Closed> {
    let kind = Kind {
        name: "namespaces",
        read: |object: PartialObjectMeta<Namespace>| {
            Ok(Read::View(NamespaceView {
                name: object.metadata.name.unwrap_or_default(),
                labels: object.metadata.labels.unwrap_or_default(),
            }))
        },
        unreadable: |_, _| None,
        input: Input::Namespaces,
    };
    follow(Api::all(client), Config::default(), kind, state, metrics).await
}

async fn follow<K, T>(
    api: Api<K>,
    config: Config,
    kind: Kind<K, T>,
    state: StateHandle,
    metrics: WatchMetrics,
) -> Result<(), Closed>
where
    K: Resource + Clone + DeserializeOwned + fmt::Debug + Send + 'static,
{
    let read = |object| kind.read(object, &metrics);
    let interrupted = |_: &watcher::Error| metrics.failed(kind.name);
    let mut changes = pin!(changes(api, config, kind.name, key, read, interrupted));
    while let Some(change) = changes.next().await {
        state.send((kind.input)(change)).await?;
    }
    Err(Closed)
}

impl<K: Resource, T> Kind<K, T> {
    /// Reads an object; `Err` is the key of one that has no view.
    fn read(&self, object: K, metrics: &WatchMetrics) -> Result<Read<T>, ObjectKey> {
        let key = key(&object);
        (self.read)(object).or_else(|error| {
            metrics.unreadable(self.name);
            tracing::warn!(
                kind = self.name,
                namespace = key.namespace,
                name = key.name,
                error,
                "an object cannot be read"
            );
            (self.unreadable)(&key, &error).map(Read::View).ok_or(key)
        })
    }
}

fn parse<K>(object: DynamicObject) -> Result<K, String>
where
    K: Resource + DeserializeOwned,
{
    object.try_parse().map_err(|error| error.to_string())
}

fn key<K: Resource>(object: &K) -> ObjectKey {
    ObjectKey::new(object.namespace().unwrap_or_default(), object.name_any())
}

fn failed(kind: &'static str, error: &watcher::Error, metrics: &WatchMetrics) {
    metrics.failed(kind);
    tracing::warn!(kind, %error, "the watch is interrupted; what is known stays");
}

#[cfg(test)]
mod tests;
