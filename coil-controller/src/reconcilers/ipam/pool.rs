//! Pools: the finalizer keeps a pool until its last block is gone; what is wrong with a pool is told on it.

use std::time::{Duration, Instant};

use coil_api::labels::{self, Expected};
use coil_api::{AddressBlock, AddressPool, names};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::Api;
use kube::api::ListParams;
use kube::runtime::events::EventType;

use super::{Context, Next, set_finalizers};
use crate::error::ReconcileError;

const KIND: &str = "AddressPool";
/// Time until blocks that should not be there are looked for again; a watch tells earlier.
const LINGERING: Duration = Duration::from_secs(30);
/// The same is not told again for this time.
const QUIET: Duration = Duration::from_secs(300);

pub(super) const INVALID: &str = "InvalidPool";
pub(super) const OUT_OF_BLOCKS: &str = "OutOfBlocks";

/// Brings a pool up to date.
pub(super) async fn reconcile(context: &Context, name: &str) -> Result<Next, ReconcileError> {
    let (metadata, finished, invalid) = {
        let picture = context.picture();
        let Some(metadata) = picture.book.pool(name).cloned() else { return Ok(Next::default()) };
        (metadata, picture.book.finished(name).is_some(), picture.book.invalid(name).map(str::to_owned))
    };
    if finished {
        return release(context, &metadata).await;
    }
    let deleted = metadata.deletion_timestamp.is_some();
    if !deleted && !has_finalizer(&metadata) {
        add_finalizer(context, name).await?;
    }
    let was_invalid = context.picture().told.get(name).is_some_and(|(told, _)| told.starts_with(INVALID));
    match &invalid {
        Some(why) if !deleted => {
            let note = format!("no block is carved from this pool: {why}");
            tell(context, &metadata, INVALID, note).await;
        }
        None if was_invalid => {
            context.picture().told.remove(name);
            context.publish(&metadata, EventType::Normal, "Valid", "the pool is valid now".to_owned()).await;
        }
        _ => {}
    }
    Ok(Next { invalid: invalid.is_some(), ..Next::default() })
}

/// Warns, unless the same was told a short while ago.
pub(super) async fn tell(context: &Context, metadata: &ObjectMeta, reason: &str, note: String) {
    let name = metadata.name.clone().unwrap_or_default();
    let now = Instant::now();
    let text = format!("{reason}: {note}");
    {
        let told = &mut context.picture().told;
        let again = |at: &Instant| now.saturating_duration_since(*at) >= QUIET;
        if told.get(&name).is_some_and(|(old, at)| *old == text && !again(at)) {
            return;
        }
        told.insert(name.clone(), (text, now));
    }
    tracing::warn!(pool = name, reason, note, "a pool has a problem");
    context.publish(metadata, EventType::Warning, reason, note).await;
}

fn has_finalizer(metadata: &ObjectMeta) -> bool {
    metadata.finalizers.iter().flatten().any(|finalizer| finalizer == names::FINALIZER)
}

/// As it is now, not as a watch has told.
async fn read(context: &Context, name: &str) -> Result<Option<ObjectMeta>, ReconcileError> {
    let api = Api::<AddressPool>::all(context.client.clone());
    let found = api.get_metadata_opt(name).await.map_err(ReconcileError::api("get", KIND, name))?;
    Ok(found.map(|object| object.metadata))
}

async fn add_finalizer(context: &Context, name: &str) -> Result<(), ReconcileError> {
    let Some(metadata) = read(context, name).await? else { return Ok(()) };
    if metadata.deletion_timestamp.is_some() || has_finalizer(&metadata) {
        return Ok(());
    }
    let mut finalizers = metadata.finalizers.clone().unwrap_or_default();
    finalizers.push(names::FINALIZER.to_owned());
    set_finalizers::<AddressPool>(&context.client, KIND, &metadata, &finalizers).await.map(drop)
}

/// Lets go of a pool that was deleted, if really no block of it is left.
async fn release(context: &Context, known: &ObjectMeta) -> Result<Next, ReconcileError> {
    let name = known.name.as_deref().unwrap_or_default();
    // What cannot be the value of a label is the pool of no block.
    if labels::check(name, Expected::LabelValue).is_ok() {
        let api = Api::<AddressBlock>::all(context.client.clone());
        let some = ListParams::default().labels(&format!("{}={name}", names::LABEL_POOL)).limit(1);
        let blocks = api.list_metadata(&some).await;
        let blocks = blocks.map_err(ReconcileError::api("list blocks of", KIND, name))?;
        if !blocks.items.is_empty() {
            return Ok(Next { again: Some(LINGERING), ..Next::default() });
        }
    }
    let Some(metadata) = read(context, name).await? else { return Ok(Next::default()) };
    let same = metadata.uid == known.uid && metadata.deletion_timestamp.is_some();
    if !same || !has_finalizer(&metadata) {
        return Ok(Next::default());
    }
    let mut finalizers = metadata.finalizers.clone().unwrap_or_default();
    finalizers.retain(|finalizer| finalizer != names::FINALIZER);
    match set_finalizers::<AddressPool>(&context.client, KIND, &metadata, &finalizers).await {
        Ok(_) => tracing::info!(pool = name, "released"),
        Err(error) if error.is_not_found() => {}
        Err(error) => return Err(error),
    }
    Ok(Next::default())
}
