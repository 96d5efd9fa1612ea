//! What the Kubernetes API tells by itself: pools, and the requests of this node. No logic.

use coil_api::{AddressPool, BlockRequest, names};
use coil_runtime::patience::patient;
use futures::stream::{self, BoxStream};
use futures::{Stream, StreamExt};
use kube::api::{ApiResource, DynamicObject, PartialObjectMeta};
use kube::runtime::watcher::{self, Config, Event};
use kube::{Api, Client, ResourceExt};

use super::api::request_view;
use super::core::PoolChange;
use super::demand::RequestView;
use crate::metrics::WatchMetrics;

/// One piece of news.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum News {
    /// Of the pools.
    Pools(PoolChange),
    /// A request of this node is there, or has changed.
    Request(RequestView),
    /// A request of this node is gone.
    RequestGone(RequestView),
}

/// Follows pools and the requests of a node, for ever.
pub fn news(client: &Client, node: &str, metrics: &WatchMetrics) -> BoxStream<'static, News> {
    stream::select(pools(client, metrics.clone()), requests(client, node, metrics.clone())).boxed()
}

fn pools(client: &Client, metrics: WatchMetrics) -> impl Stream<Item = News> + Send + use<> {
    const KIND: &str = "addresspools";
    let api: Api<PartialObjectMeta<AddressPool>> = Api::all(client.clone());
    let events = patient(watcher::watcher(api, Config::default()));
    let state =
        |pool: &PartialObjectMeta<AddressPool>| (pool.name_any(), pool.metadata.deletion_timestamp.is_some());
    let mut listed = std::collections::BTreeMap::new();
    events.filter_map(move |event| {
        let change = match event {
            Ok(Event::Init) => {
                listed.clear();
                None
            }
            Ok(Event::InitApply(pool)) => {
                listed.extend([state(&pool)]);
                None
            }
            Ok(Event::InitDone) => Some(PoolChange::Reset(std::mem::take(&mut listed))),
            Ok(Event::Apply(pool)) => {
                let (name, deleted) = state(&pool);
                Some(PoolChange::Apply(name, deleted))
            }
            Ok(Event::Delete(pool)) => Some(PoolChange::Delete(pool.name_any())),
            Err(error) => {
                failed(KIND, &error, &metrics);
                None
            }
        };
        std::future::ready(change.map(News::Pools))
    })
}

fn requests(client: &Client, node: &str, metrics: WatchMetrics) -> impl Stream<Item = News> + Send + use<> {
    const KIND: &str = "blockrequests";
    let api = Api::<DynamicObject>::all_with(client.clone(), &ApiResource::erase::<BlockRequest>(&()));
    let config = Config::default().labels(&format!("{}={node}", names::LABEL_NODE));
    let node = node.to_owned();
    patient(watcher::watcher(api, config)).filter_map(move |event| {
        let read = |object: DynamicObject| {
            let name = object.name_any();
            match object.try_parse::<BlockRequest>() {
                // The label may be a mistake; the specification says who has asked.
                Ok(request) if request.spec.node_name == node => Some(request_view(&request)),
                Ok(_) => None,
                Err(error) => {
                    metrics.unreadable(KIND);
                    tracing::warn!(kind = KIND, name, %error, "an object cannot be read");
                    None
                }
            }
        };
        let news = match event {
            Ok(Event::Init | Event::InitDone) => None,
            Ok(Event::InitApply(object) | Event::Apply(object)) => read(object).map(News::Request),
            Ok(Event::Delete(object)) => read(object).map(News::RequestGone),
            Err(error) => {
                failed(KIND, &error, &metrics);
                None
            }
        };
        std::future::ready(news)
    })
}

fn failed(kind: &'static str, error: &watcher::Error, metrics: &WatchMetrics) {
    metrics.failed(kind);
    tracing::warn!(kind, %error, "the watch is interrupted; what is known stays");
}
