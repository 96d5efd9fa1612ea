//! From watches to the picture, and from changes of the picture to work.

use std::collections::HashSet;
use std::time::Duration;

use coil_api::{AddressBlock, AddressPool, BlockRequest};
use coil_runtime::patience::patient;
use futures::stream::{BoxStream, select_all};
use futures::{StreamExt, TryStreamExt};
use k8s_openapi::api::core::v1::Node;
use kube::core::{DeserializeGuard, PartialObjectMeta};
use kube::runtime::watcher;
use kube::{Api, Client, Resource, ResourceExt};
use tokio::time::Instant;

use super::queue::Queue;
use super::{Context, Picture, Work};

/// The watches that [`super::run`] follows.
pub(crate) struct Watches(pub(super) BoxStream<'static, watcher::Result<Seen>>);

/// A change of an object of some kind.
pub(super) enum Seen {
    Pool(watcher::Event<DeserializeGuard<AddressPool>>),
    Block(watcher::Event<DeserializeGuard<AddressBlock>>),
    Request(watcher::Event<DeserializeGuard<BlockRequest>>),
    Node(watcher::Event<PartialObjectMeta<Node>>),
}

impl Watches {
    /// Prepares the watches; nothing is sent until they are polled.
    pub(crate) fn new(client: &Client) -> Self {
        let config = watcher::Config::default;
        let pools = patient(watcher(Api::all(client.clone()), config())).map_ok(Seen::Pool);
        let blocks = patient(watcher(Api::all(client.clone()), config())).map_ok(Seen::Block);
        let requests = patient(watcher(Api::all(client.clone()), config())).map_ok(Seen::Request);
        let nodes = patient(watcher(Api::all(client.clone()), config())).map_ok(Seen::Node);
        Self(select_all([pools.boxed(), blocks.boxed(), requests.boxed(), nodes.boxed()]).boxed())
    }
}

/// Which lists are complete.
#[derive(Default)]
pub(super) struct Lists {
    pools: List,
    blocks: List,
    requests: List,
    nodes: List,
}

/// The list of a kind. While a new one comes in, the old one goes on to count.
#[derive(Default)]
struct List {
    whole: bool,
    coming: Option<HashSet<String>>,
}

impl Lists {
    pub(super) fn are_whole(&self) -> bool {
        [&self.pools, &self.blocks, &self.requests, &self.nodes].iter().all(|list| list.whole)
    }

    /// A block that we have made ourselves, perhaps after the list that is coming in was made.
    pub(super) fn made_block(&mut self, name: &str) {
        if let Some(coming) = &mut self.blocks.coming {
            coming.insert(name.to_owned());
        }
    }
}

impl List {
    fn begin(&mut self) {
        self.coming = Some(HashSet::new());
    }

    fn note(&mut self, name: String) {
        if let Some(coming) = &mut self.coming {
            coming.insert(name);
        }
    }

    fn complete(&mut self) -> HashSet<String> {
        self.whole = true;
        self.coming.take().unwrap_or_default()
    }
}

/// Notes a change and what it calls for.
pub(super) fn follow(context: &Context, seen: Seen, queue: &mut Queue<Work>) {
    let mut picture = context.picture();
    let picture = &mut *picture;
    let was_whole = picture.lists.are_whole();
    match seen {
        Seen::Pool(event) => pool(context, picture, event, queue),
        Seen::Block(event) => block(context, picture, event, queue),
        Seen::Request(event) => request(context, picture, event, queue),
        Seen::Node(event) => node(context, picture, event, queue),
    }
    if !was_whole && picture.lists.are_whole() {
        tracing::info!("all pools, blocks, requests and nodes are known");
        look_at_nodes(context, picture, queue);
    }
}

/// In case something was missed.
pub(super) fn look_at_everything(context: &Context, queue: &mut Queue<Work>) {
    let mut picture = context.picture();
    if !picture.lists.are_whole() {
        return;
    }
    look_at_pools(picture.book.pools().map(str::to_owned).collect::<Vec<_>>(), queue);
    look_at_nodes(context, &mut picture, queue);
}

fn pool(
    context: &Context,
    picture: &mut Picture,
    event: watcher::Event<DeserializeGuard<AddressPool>>,
    queue: &mut Queue<Work>,
) {
    let mut affected = match event {
        watcher::Event::Init => {
            picture.lists.pools.begin();
            return;
        }
        watcher::Event::InitDone => {
            let names = picture.lists.pools.complete();
            picture.book.retain_pools(&names)
        }
        watcher::Event::Delete(object) => {
            let name = object.name_any();
            picture.told.remove(&name);
            picture.book.remove_pool(&name)
        }
        watcher::Event::Apply(object) | watcher::Event::InitApply(object) => {
            let name = object.name_any();
            picture.lists.pools.note(name.clone());
            let mut affected = apply_pool(context, picture, object);
            affected.push(name);
            affected
        }
    };
    affected.dedup();
    look_at_pools(affected, queue);
}

/// Notes a pool; returns the names of others that may have become valid or invalid by that.
pub(super) fn apply_pool(
    context: &Context,
    picture: &mut Picture,
    object: DeserializeGuard<AddressPool>,
) -> Vec<String> {
    match object.0 {
        Ok(pool) => picture.book.apply_pool(pool),
        Err(invalid) => {
            context.reconciles.pools.unreadable();
            picture.book.apply_unreadable_pool(&invalid.metadata, &invalid.error)
        }
    }
}

fn block(
    context: &Context,
    picture: &mut Picture,
    event: watcher::Event<DeserializeGuard<AddressBlock>>,
    queue: &mut Queue<Work>,
) {
    match event {
        watcher::Event::Init => picture.lists.blocks.begin(),
        watcher::Event::InitDone => {
            let names = picture.lists.blocks.complete();
            look_at_pools(picture.book.retain_blocks(&names), queue);
            look_at_nodes(context, picture, queue);
        }
        watcher::Event::Delete(object) => {
            let uid = object.meta().uid.clone().unwrap_or_default();
            let Some((pool, node)) = picture.book.remove_block(&object.name_any(), &uid) else { return };
            look_at_pools(pool, queue);
            if !picture.book.has_blocks(&node) {
                picture.nodes.has_none(&node);
            }
        }
        watcher::Event::Apply(object) | watcher::Event::InitApply(object) => {
            picture.lists.blocks.note(object.name_any());
            let node = apply_block(picture, &object);
            if picture.lists.are_whole() {
                look_at_node(context, picture, &node, queue);
            }
        }
    }
}

/// Notes a block; returns its node.
pub(super) fn apply_block(picture: &mut Picture, object: &DeserializeGuard<AddressBlock>) -> String {
    match &object.0 {
        Ok(block) => {
            picture.book.apply_block(block);
            block.node().unwrap_or_default().to_owned()
        }
        Err(invalid) => {
            picture.book.apply_unreadable_block(&invalid.metadata);
            let labels = invalid.metadata.labels.as_ref();
            labels.and_then(|labels| labels.get(coil_api::names::LABEL_NODE)).cloned().unwrap_or_default()
        }
    }
}

fn request(
    context: &Context,
    picture: &mut Picture,
    event: watcher::Event<DeserializeGuard<BlockRequest>>,
    queue: &mut Queue<Work>,
) {
    match event {
        watcher::Event::Init => picture.lists.requests.begin(),
        watcher::Event::InitDone => {
            let names = picture.lists.requests.complete();
            picture.requests.retain(|name, _| names.contains(name));
        }
        watcher::Event::Delete(object) => drop(picture.requests.remove(&object.name_any())),
        watcher::Event::Apply(object) | watcher::Event::InitApply(object) => {
            let name = object.name_any();
            picture.lists.requests.note(name.clone());
            match object.0 {
                Ok(request) if request.is_pending() && request.metadata.deletion_timestamp.is_none() => {
                    picture.requests.insert(name.clone(), request.into());
                    queue.push(Work::Request(name), Instant::now());
                }
                Ok(_) => drop(picture.requests.remove(&name)),
                Err(invalid) => {
                    context.reconciles.requests.unreadable();
                    picture.requests.remove(&name);
                    tracing::warn!(request = name, error = invalid.error, "skipping a BlockRequest");
                }
            }
        }
    }
}

fn node(
    context: &Context,
    picture: &mut Picture,
    event: watcher::Event<PartialObjectMeta<Node>>,
    queue: &mut Queue<Work>,
) {
    match event {
        watcher::Event::Init => picture.lists.nodes.begin(),
        watcher::Event::InitDone => {
            let names = picture.lists.nodes.complete();
            picture.nodes.replace(names);
            if picture.lists.are_whole() {
                look_at_nodes(context, picture, queue);
            }
        }
        watcher::Event::Delete(object) => {
            let name = object.name_any();
            picture.nodes.disappeared(&name);
            if picture.lists.are_whole() {
                look_at_node(context, picture, &name, queue);
            }
        }
        watcher::Event::Apply(object) | watcher::Event::InitApply(object) => {
            let name = object.name_any();
            picture.lists.nodes.note(name.clone());
            picture.nodes.appeared(&name);
        }
    }
}

fn look_at_pools(names: impl IntoIterator<Item = String>, queue: &mut Queue<Work>) {
    let now = Instant::now();
    names.into_iter().for_each(|name| queue.push(Work::Pool(name), now));
}

fn look_at_nodes(context: &Context, picture: &mut Picture, queue: &mut Queue<Work>) {
    let Picture { book, nodes, .. } = picture;
    nodes.retain(|name| book.has_blocks(name));
    let names: Vec<String> = picture.book.nodes().map(str::to_owned).collect();
    for name in names {
        look_at_node(context, picture, &name, queue);
    }
}

/// If a node with blocks is missing, its blocks are due when its time is up.
fn look_at_node(context: &Context, picture: &mut Picture, name: &str, queue: &mut Queue<Work>) {
    let now = std::time::Instant::now();
    if !picture.book.has_blocks(name) || picture.nodes.has_blocks(name, now).is_none() {
        return;
    }
    let left = picture.nodes.left(name, now, context.settings.node_grace_period);
    queue.push(Work::Node(name.to_owned()), Instant::now() + left.unwrap_or(Duration::ZERO));
}
