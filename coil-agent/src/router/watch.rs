//! Streams of the Kubernetes API into changes of the picture. No logic: one object in, one view out.

use coil_api::AddressBlock;
use coil_runtime::patience::patient;
use futures::StreamExt;
use k8s_openapi::api::core::v1::Node;
use kube::api::{ApiResource, DynamicObject};
use kube::runtime::watcher::{self, Config, Event};
use kube::{Api, Client, ResourceExt};
use tokio::sync::mpsc;

use super::cluster::{BlockView, Change, Input, NodeView};
use super::metrics::RouterMetrics;

/// Nobody listens any more.
#[derive(Debug, thiserror::Error)]
#[error("the task that keeps the picture of the cluster has ended")]
pub(super) struct Closed;

struct Kind<T> {
    name: &'static str,
    read: fn(DynamicObject) -> Result<T, String>,
    input: fn(Change<T>) -> Input,
}

/// Watches all blocks.
pub(super) async fn blocks(
    client: Client,
    sender: mpsc::Sender<Input>,
    metrics: RouterMetrics,
) -> Result<(), Closed> {
    let kind = Kind {
        name: "addressblocks",
        read: |object| {
            // Its fields are at the top, which `try_parse` passes on as well.
            let block: AddressBlock = object.try_parse().map_err(|error| error.to_string())?;
            BlockView::of(&block)
        },
        input: Input::Blocks,
    };
    let api = Api::all_with(client, &ApiResource::erase::<AddressBlock>(&()));
    follow(api, kind, sender, metrics).await
}

/// Watches all nodes.
pub(super) async fn nodes(
    client: Client,
    sender: mpsc::Sender<Input>,
    metrics: RouterMetrics,
) -> Result<(), Closed> {
    let kind = Kind {
        name: "nodes",
        read: |object| {
            object.try_parse::<Node>().map(|node| NodeView::of(&node)).map_err(|error| error.to_string())
        },
        input: Input::Nodes,
    };
    let api = Api::all_with(client, &ApiResource::erase::<Node>(&()));
    follow(api, kind, sender, metrics).await
}

async fn follow<T>(
    api: Api<DynamicObject>,
    kind: Kind<T>,
    sender: mpsc::Sender<Input>,
    metrics: RouterMetrics,
) -> Result<(), Closed> {
    let mut stream = patient(watcher::watcher(api, Config::default()));
    let mut objects = Vec::new();
    let mut unreadable = Vec::new();
    while let Some(event) = stream.next().await {
        let change = match event {
            Ok(Event::Init) => {
                objects.clear();
                unreadable.clear();
                continue;
            }
            Ok(Event::InitApply(object)) => {
                match kind.read(object) {
                    Ok(view) => objects.push(view),
                    Err(name) => unreadable.push(name),
                }
                continue;
            }
            Ok(Event::InitDone) => {
                tracing::info!(
                    kind = kind.name,
                    objects = objects.len(),
                    unreadable = unreadable.len(),
                    "listed"
                );
                Change::Reset {
                    objects: std::mem::take(&mut objects),
                    unreadable: std::mem::take(&mut unreadable),
                }
            }
            Ok(Event::Apply(object)) => match kind.read(object) {
                Ok(view) => Change::Apply(view),
                Err(_) => continue,
            },
            Ok(Event::Delete(object)) => Change::Delete(object.name_any()),
            Err(error) => {
                metrics.watch_errors.with_label_values(&[kind.name]).inc();
                tracing::warn!(kind = kind.name, %error, "the watch is interrupted; what is known stays");
                continue;
            }
        };
        sender.send((kind.input)(change)).await.map_err(|_| Closed)?;
    }
    Err(Closed)
}

impl<T> Kind<T> {
    /// Reads an object; `Err` is the name of one that cannot be read.
    fn read(&self, object: DynamicObject) -> Result<T, String> {
        let name = object.name_any();
        (self.read)(object).map_err(|error| {
            tracing::warn!(kind = self.name, name, error, "an object cannot be read; what is known stays");
            name
        })
    }
}
