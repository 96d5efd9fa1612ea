//! Streams of the Kubernetes API into changes of the picture. No logic: one object in, one view out.

use std::pin::pin;

use coil_api::AddressBlock;
use futures::StreamExt;
use k8s_openapi::api::core::v1::Node;
use kube::api::{ApiResource, DynamicObject};
use kube::runtime::watcher::{self, Config};
use kube::{Api, Client, ResourceExt};
use tokio::sync::mpsc;

use super::cluster::{BlockView, Change, Input, NodeView};
use super::metrics::RouterMetrics;
use crate::watch::{Read, changes};

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
    let interrupted = |_: &watcher::Error| metrics.watch_errors.with_label_values(&[kind.name]).inc();
    let read = |object| kind.read(object).map(Read::View);
    let config = Config::default();
    let mut changes = pin!(changes(api, config, kind.name, ResourceExt::name_any, read, interrupted));
    while let Some(change) = changes.next().await {
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
