//! Nodes that are gone: their blocks are collected, and so are blocks of no node.

use std::time::{Duration, Instant};

use coil_api::{AddressBlock, names};
use k8s_openapi::api::core::v1::Node;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::Api;
use kube::api::{DeleteParams, Preconditions};
use kube::core::PartialObjectMeta;

use super::{Context, Next, set_finalizers};
use crate::error::ReconcileError;

const KIND: &str = "AddressBlock";
/// Time until blocks that did not go are looked at again; a watch tells when they are gone.
const LINGERING: Duration = Duration::from_secs(30);

/// Collects the blocks of a node if it has been missing for long enough.
pub(super) async fn reconcile(context: &Context, name: &str) -> Result<Next, ReconcileError> {
    let blocks = {
        let picture = context.picture();
        let left = picture.nodes.left(name, Instant::now(), context.settings.node_grace_period);
        match left {
            None => return Ok(Next::default()),
            Some(left) if !left.is_zero() => return Ok(Next { again: Some(left), ..Next::default() }),
            Some(_) => picture.book.blocks_of_node(name),
        }
    };
    if blocks.is_empty() {
        return Ok(Next::default());
    }
    // A watch may be late, and what is done cannot be undone.
    if !name.is_empty() {
        let api = Api::<Node>::all(context.client.clone());
        let found = api.get_metadata_opt(name).await.map_err(ReconcileError::api("get", "Node", name))?;
        if found.is_some() {
            context.picture().nodes.appeared(name);
            return Ok(Next::default());
        }
    }
    tracing::info!(node = name, blocks = blocks.len(), "collecting the blocks of a node that is gone");
    let mut failure = None;
    for block in blocks {
        match collect(context, name, &block).await {
            Ok(true) => context.metrics.collected(),
            Ok(false) => {}
            Err(error) => failure = Some(error),
        }
    }
    match failure {
        Some(error) => Err(error),
        None => Ok(Next { again: Some(LINGERING), ..Next::default() }),
    }
}

/// Deletes a block, provided that it is still of this node; returns whether it did.
async fn collect(context: &Context, node: &str, name: &str) -> Result<bool, ReconcileError> {
    let api = Api::<AddressBlock>::all(context.client.clone());
    let found = api.get_metadata_opt(name).await.map_err(ReconcileError::api("get", KIND, name))?;
    let Some(metadata) = found.map(|object| object.metadata) else { return Ok(false) };
    if !is_collectable(&metadata, node) {
        return Ok(false);
    }
    let mut finalizers = metadata.finalizers.clone().unwrap_or_default();
    let before = finalizers.len();
    finalizers.retain(|finalizer| finalizer != names::FINALIZER);
    let metadata = if finalizers.len() == before {
        metadata
    } else {
        match set_finalizers::<AddressBlock>(&context.client, KIND, &metadata, &finalizers).await {
            Ok(metadata) => metadata,
            Err(error) if error.is_not_found() => return Ok(true),
            Err(error) => return Err(error),
        }
    };
    let preconditions =
        Preconditions { uid: metadata.uid.clone(), resource_version: metadata.resource_version.clone() };
    let parameters = DeleteParams { preconditions: Some(preconditions), ..DeleteParams::default() };
    let api = Api::<PartialObjectMeta<AddressBlock>>::all(context.client.clone());
    match api.delete(name, &parameters).await {
        Ok(_) => Ok(true),
        // It was being deleted already, and the finalizer was all that kept it.
        Err(kube::Error::Api(status)) if status.code == 404 => Ok(true),
        Err(error) => Err(ReconcileError::api("delete", KIND, name)(error)),
    }
}

fn is_collectable(metadata: &ObjectMeta, node: &str) -> bool {
    let label = |key: &str| metadata.labels.as_ref().and_then(|l| l.get(key)).map_or("", String::as_str);
    let kept = node.is_empty() && label(names::LABEL_RESERVED) == names::RESERVED;
    label(names::LABEL_NODE) == node && !kept
}
