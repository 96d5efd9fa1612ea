//! Requests for blocks: each gets one block or a reason why not, once.

use std::sync::Arc;

use coil_api::blockrequest::{REASON_INVALID_POOL, REASON_OUT_OF_BLOCKS, REASON_POOL_NOT_FOUND};
use coil_api::{AddressBlock, AddressPool, BlockRequest, BlockRequestStatus};
use kube::api::{Patch, PatchParams, PostParams};
use kube::core::DeserializeGuard;
use kube::{Api, ResourceExt};
use serde_json::json;

use super::pool::{OUT_OF_BLOCKS, tell};
use super::{Context, Next, watches};
use crate::error::ReconcileError;
use crate::plan::ipam::{Choice, Refusal};
use crate::reconcilers::apply::FIELD_MANAGER;

/// Blocks in the way that are learned of at one go.
const TRIES: usize = 64;

/// Answers a request.
pub(super) async fn reconcile(context: &Context, name: &str) -> Result<Next, ReconcileError> {
    let Some(request) = context.picture().requests.get(name).cloned() else { return Ok(Next::default()) };
    let mut next = Next::default();
    let answer = answer(context, &request, &mut next).await?;
    let now = context.clock.now_time();
    let (status, result) = match &answer {
        Ok(block) => (BlockRequestStatus::allocated(block, &now), "allocated"),
        Err(refusal) => {
            let (reason, result) = reason(refusal);
            (BlockRequestStatus::failed(reason, &refusal.to_string(), &now), result)
        }
    };
    write_status(context, &request, &status).await?;
    context.metrics.answered(result);
    let (node, pool) = (&request.spec.node_name, &request.spec.pool_name);
    match &answer {
        Ok(block) => tracing::info!(node, pool, block, "allocated a block"),
        Err(refusal) => {
            tracing::warn!(node, pool, reason = %refusal, "refused a block");
            let metadata = context.picture().book.pool(pool).cloned();
            if let (Refusal::OutOfBlocks(_), Some(metadata)) = (refusal, metadata) {
                let note = "all blocks of this pool are taken; append a subnet to it".to_owned();
                tell(context, &metadata, OUT_OF_BLOCKS, note).await;
            }
        }
    }
    let mut picture = context.picture();
    if picture.requests.get(name).is_some_and(|pending| Arc::ptr_eq(pending, &request)) {
        picture.requests.remove(name);
    }
    if picture.book.finished(pool).is_some() {
        next.pools.push(pool.clone());
    }
    Ok(next)
}

fn reason(refusal: &Refusal) -> (&'static str, &'static str) {
    match refusal {
        Refusal::NoPool(_) => (REASON_POOL_NOT_FOUND, "pool_not_found"),
        Refusal::Invalid { .. } => (REASON_INVALID_POOL, "invalid_pool"),
        // As in the original.
        Refusal::BeingDeleted(_) => (REASON_OUT_OF_BLOCKS, "pool_being_deleted"),
        Refusal::OutOfBlocks(_) => (REASON_OUT_OF_BLOCKS, "out_of_blocks"),
    }
}

/// Name of the block, or why there is none.
async fn answer(
    context: &Context,
    request: &BlockRequest,
    next: &mut Next,
) -> Result<Result<String, Refusal>, ReconcileError> {
    let uid = request.uid().unwrap_or_default();
    let pool = &request.spec.pool_name;
    if let Some(block) = context.picture().book.answer(&uid) {
        return Ok(Ok(block.to_owned()));
    }
    let mut in_the_way = None;
    for _ in 0..TRIES {
        // Nothing may be carved from a pool that was deleted a moment ago.
        next.pools.extend(refresh(context, pool).await?);
        let choice = context.picture().book.choose(pool, &uid);
        let (object, index, nets) = match choice {
            Choice::Existing(block) => return Ok(Ok(block)),
            Choice::Refuse(refusal) => return Ok(Err(refusal)),
            Choice::Create { pool, index, nets } => (pool, index, nets),
        };
        let _pending = Pending { context, pool, index };
        let block = AddressBlock::new(&object, index, &nets, &request.spec.node_name, &uid);
        let name = block.name_any();
        let parameters =
            PostParams { field_manager: Some(FIELD_MANAGER.to_owned()), ..PostParams::default() };
        match Api::<AddressBlock>::all(context.client.clone()).create(&parameters, &block).await {
            Ok(made) => {
                let mut picture = context.picture();
                picture.book.apply_block(&made);
                picture.lists.made_block(&name);
                return Ok(Ok(name));
            }
            Err(error) => {
                let error = ReconcileError::api("create", "AddressBlock", &name)(error);
                if !error.is_conflict() {
                    return Err(error);
                }
                // Perhaps an answer of ours that got lost; the next choice knows.
                let api = Api::<DeserializeGuard<AddressBlock>>::all(context.client.clone());
                let found = api.get_opt(&name).await;
                let found = found.map_err(ReconcileError::api("get", "AddressBlock", &name))?;
                if let Some(found) = found {
                    let mut picture = context.picture();
                    watches::apply_block(&mut picture, &found);
                    picture.lists.made_block(&name);
                }
                in_the_way = Some(error);
            }
        }
    }
    Err(in_the_way.unwrap_or_else(|| ReconcileError::Unreadable("no block could be made".to_owned())))
}

/// An index that is pending until this is dropped.
struct Pending<'a> {
    context: &'a Context,
    pool: &'a str,
    index: u32,
}

impl Drop for Pending<'_> {
    fn drop(&mut self) {
        self.context.picture().book.settle(self.pool, self.index);
    }
}

/// Reads the pool as it is now, since a watch may be late.
async fn refresh(context: &Context, pool: &str) -> Result<Vec<String>, ReconcileError> {
    let read = async || {
        let api = Api::<DeserializeGuard<AddressPool>>::all(context.client.clone());
        let found = api.get_opt(pool).await.map_err(ReconcileError::api("get", "AddressPool", pool))?;
        let mut picture = context.picture();
        Ok::<_, ReconcileError>(match found {
            Some(found) => watches::apply_pool(context, &mut picture, found),
            None => {
                context.fresh.forget(pool);
                picture.book.remove_pool(pool)
            }
        })
    };
    Ok(context.fresh.read(pool, read).await?.unwrap_or_default())
}

async fn write_status(
    context: &Context,
    request: &BlockRequest,
    status: &BlockRequestStatus,
) -> Result<(), ReconcileError> {
    let name = request.name_any();
    let api = Api::<BlockRequest>::all(context.client.clone());
    let parameters = PatchParams { field_manager: Some(FIELD_MANAGER.to_owned()), ..PatchParams::default() };
    // Names of requests come again; the answer is for this one.
    let patch = json!({
        "metadata": { "uid": request.metadata.uid, "resourceVersion": request.metadata.resource_version },
        "status": status,
    });
    match api.patch_status(&name, &parameters, &Patch::Merge(&patch)).await {
        Ok(_) => Ok(()),
        // Deleted in the meantime.
        Err(kube::Error::Api(status)) if status.code == 404 => Ok(()),
        Err(error) => Err(ReconcileError::api("update status of", "BlockRequest", &name)(error)),
    }
}
