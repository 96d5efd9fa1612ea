//! A watch as changes of a picture: a list is one change, whatever came of the attempts before it.

use std::fmt;
use std::future::ready;

use coil_runtime::patience::patient;
use futures::{Stream, StreamExt};
use kube::runtime::watcher::{self, Config, Error, Event};
use kube::{Api, Resource};
use serde::de::DeserializeOwned;

use crate::index::Change;

/// What became of an object.
pub(crate) enum Read<T> {
    /// What there is to know of it.
    View(T),
    /// Not ours to care about.
    Ignored,
}

/// Changes of a kind for as long as the process lives. `read` says what an object is, or its name if it has no view:
/// what was known of that stays. `failed` is told when the watch is interrupted.
pub(crate) fn changes<K, T, I>(
    api: Api<K>,
    config: Config,
    kind: &'static str,
    name: fn(&K) -> I,
    read: impl Fn(K) -> Result<Read<T>, I>,
    failed: impl Fn(&Error),
) -> impl Stream<Item = Change<T, I>>
where
    K: Resource + Clone + DeserializeOwned + fmt::Debug + Send + 'static,
{
    let (mut objects, mut unreadable) = (Vec::new(), Vec::new());
    patient(watcher::watcher(api, config)).filter_map(move |event| {
        ready(match event {
            Ok(Event::Init) => {
                objects.clear();
                unreadable.clear();
                None
            }
            Ok(Event::InitApply(object)) => {
                match read(object) {
                    Ok(Read::View(view)) => objects.push(view),
                    Ok(Read::Ignored) => {}
                    Err(name) => unreadable.push(name),
                }
                None
            }
            Ok(Event::InitDone) => {
                tracing::info!(kind, objects = objects.len(), unreadable = unreadable.len(), "listed");
                let (objects, unreadable) = (std::mem::take(&mut objects), std::mem::take(&mut unreadable));
                Some(Change::Reset { objects, unreadable })
            }
            Ok(Event::Apply(object)) => {
                let name = name(&object);
                match read(object) {
                    Ok(Read::View(view)) => Some(Change::Apply(view)),
                    // It may have been ours before.
                    Ok(Read::Ignored) => Some(Change::Delete(name)),
                    Err(_) => None,
                }
            }
            Ok(Event::Delete(object)) => Some(Change::Delete(name(&object))),
            Err(error) => {
                failed(&error);
                tracing::warn!(kind, %error, "the watch is interrupted; what is known stays");
                None
            }
        })
    })
}
