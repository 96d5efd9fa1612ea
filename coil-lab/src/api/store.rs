//! Objects in memory: one global resource version, a bounded history of changes per resource for watches.
//!
//! Knows nothing of kinds, validation or HTTP.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde_json::Value;
use tokio::sync::watch;

use super::obj;
use super::registry::GroupResource;

/// How many changes of one resource are kept for watches that resume.
const HISTORY: usize = 4096;

/// Namespace (empty for cluster scope) and name.
pub type Key = (String, String);

/// What happened to an object.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ChangeKind {
    /// It was created.
    Added,
    /// It was written.
    Modified,
    /// It is gone.
    Deleted,
}

/// One entry of the history.
#[derive(Debug)]
pub struct Change {
    /// Resource version of the change.
    pub version: u64,
    /// What happened.
    pub kind: ChangeKind,
    /// The object after the change; for a deletion its last state with the version of the deletion.
    pub object: Arc<Value>,
    /// The object before the change.
    pub before: Option<Arc<Value>>,
}

/// Why a write was not done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum StoreError {
    /// The key is taken.
    #[error("the object exists")]
    Exists,
    /// There is no such object.
    #[error("the object does not exist")]
    Missing,
    /// The object is not in the version that the writer has seen.
    #[error("the object changed")]
    Changed,
    /// The history does not reach back to the version.
    #[error("the version is too old, the oldest is {oldest}")]
    TooOld {
        /// Oldest version that can be resumed from.
        oldest: u64,
    },
}

struct Collection {
    objects: BTreeMap<Key, Arc<Value>>,
    history: VecDeque<Arc<Change>>,
    /// Versions up to here have left the history.
    forgotten: u64,
    tick: watch::Sender<u64>,
}

struct Inner {
    version: u64,
    collections: HashMap<GroupResource, Collection>,
}

/// The store.
pub struct Store {
    start: u64,
    inner: Mutex<Inner>,
    tick: watch::Sender<u64>,
}

impl Default for Store {
    fn default() -> Self {
        Self::new()
    }
}

impl Store {
    /// An empty store. Versions start at the clock's milliseconds, so that clients of an earlier process see a
    /// version from before the history and list again.
    pub fn new() -> Self {
        let start = u64::try_from(jiff::Timestamp::now().as_millisecond()).unwrap_or(1).max(1);
        Self {
            start,
            inner: Mutex::new(Inner { version: start, collections: HashMap::new() }),
            tick: watch::Sender::new(0),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The newest version.
    pub fn version(&self) -> u64 {
        self.lock().version
    }

    /// One object.
    pub fn get(&self, kind: &GroupResource, key: &Key) -> Option<Arc<Value>> {
        self.lock().collections.get(kind)?.objects.get(key).cloned()
    }

    /// All objects of a resource, of one namespace if given, and the version of the picture.
    pub fn list(&self, kind: &GroupResource, namespace: Option<&str>) -> (Vec<Arc<Value>>, u64) {
        let inner = self.lock();
        let objects = inner.collections.get(kind).map(|one| one.select(namespace)).unwrap_or_default();
        (objects, inner.version)
    }

    /// All objects of all resources.
    pub fn everything(&self) -> Vec<(GroupResource, Arc<Value>)> {
        let inner = self.lock();
        inner
            .collections
            .iter()
            .flat_map(|(kind, one)| one.objects.values().map(|object| (kind.clone(), object.clone())))
            .collect()
    }

    /// Adds an object that is not there yet.
    pub fn insert(&self, kind: &GroupResource, key: Key, object: Value) -> Result<Arc<Value>, StoreError> {
        let mut inner = self.lock();
        if inner.collection(kind, self.start).objects.contains_key(&key) {
            return Err(StoreError::Exists);
        }
        let stored = inner.put(kind, self.start, key, object, None);
        self.tick.send_replace(inner.version);
        Ok(stored)
    }

    /// Writes an object that is there in version `seen`.
    pub fn replace(
        &self,
        kind: &GroupResource,
        key: &Key,
        seen: &str,
        object: Value,
    ) -> Result<Arc<Value>, StoreError> {
        let mut inner = self.lock();
        let before = inner.expect(kind, self.start, key, Some(seen))?;
        let stored = inner.put(kind, self.start, key.clone(), object, Some(before));
        self.tick.send_replace(inner.version);
        Ok(stored)
    }

    /// Removes an object, only in version `seen` if given. Returns its last state.
    pub fn remove(
        &self,
        kind: &GroupResource,
        key: &Key,
        seen: Option<&str>,
    ) -> Result<Arc<Value>, StoreError> {
        let mut inner = self.lock();
        let before = inner.expect(kind, self.start, key, seen)?;
        inner.version += 1;
        let version = inner.version;
        let mut last = (*before).clone();
        obj::set(&mut last, &["metadata", "resourceVersion"], version.to_string());
        let last = Arc::new(last);
        let collection = inner.collection(kind, self.start);
        collection.objects.remove(key);
        collection.record(Change {
            version,
            kind: ChangeKind::Deleted,
            object: last.clone(),
            before: Some(before),
        });
        self.tick.send_replace(version);
        Ok(last)
    }

    /// Changes of a resource after a version, oldest first.
    pub fn changes_since(&self, kind: &GroupResource, version: u64) -> Result<Vec<Arc<Change>>, StoreError> {
        let mut inner = self.lock();
        let collection = inner.collection(kind, self.start);
        if version < collection.forgotten {
            return Err(StoreError::TooOld { oldest: collection.forgotten });
        }
        let from = collection.history.partition_point(|one| one.version <= version);
        Ok(collection.history.iter().skip(from).cloned().collect())
    }

    /// A receiver that is told of each change of anything.
    pub fn subscribe_all(&self) -> watch::Receiver<u64> {
        self.tick.subscribe()
    }

    /// A receiver that is told of each change of a resource.
    pub fn subscribe(&self, kind: &GroupResource) -> watch::Receiver<u64> {
        self.lock().collection(kind, self.start).tick.subscribe()
    }
}

impl Inner {
    fn collection(&mut self, kind: &GroupResource, start: u64) -> &mut Collection {
        self.collections.entry(kind.clone()).or_insert_with(|| Collection {
            objects: BTreeMap::new(),
            history: VecDeque::new(),
            forgotten: start,
            tick: watch::Sender::new(0),
        })
    }

    fn expect(
        &mut self,
        kind: &GroupResource,
        start: u64,
        key: &Key,
        seen: Option<&str>,
    ) -> Result<Arc<Value>, StoreError> {
        let before = self.collection(kind, start).objects.get(key).cloned().ok_or(StoreError::Missing)?;
        if seen.is_some_and(|seen| seen != obj::version(&before)) {
            return Err(StoreError::Changed);
        }
        Ok(before)
    }

    fn put(
        &mut self,
        kind: &GroupResource,
        start: u64,
        key: Key,
        mut object: Value,
        before: Option<Arc<Value>>,
    ) -> Arc<Value> {
        self.version += 1;
        let version = self.version;
        obj::set(&mut object, &["metadata", "resourceVersion"], version.to_string());
        let object = Arc::new(object);
        let collection = self.collection(kind, start);
        collection.objects.insert(key, object.clone());
        let change = if before.is_some() { ChangeKind::Modified } else { ChangeKind::Added };
        collection.record(Change { version, kind: change, object: object.clone(), before });
        object
    }
}

impl Collection {
    fn select(&self, namespace: Option<&str>) -> Vec<Arc<Value>> {
        match namespace {
            None => self.objects.values().cloned().collect(),
            Some(namespace) => self
                .objects
                .range((namespace.to_owned(), String::new())..)
                .take_while(|((one, _), _)| one == namespace)
                .map(|(_, object)| object.clone())
                .collect(),
        }
    }

    fn record(&mut self, change: Change) {
        let version = change.version;
        self.history.push_back(Arc::new(change));
        while self.history.len() > HISTORY {
            if let Some(old) = self.history.pop_front() {
                self.forgotten = old.version;
            }
        }
        self.tick.send_replace(version);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use serde_json::json;

    fn key(name: &str) -> Key {
        ("ns".to_owned(), name.to_owned())
    }

    #[test]
    fn a_lost_update_is_refused() {
        let store = Store::new();
        let kind = GroupResource::new("", "things");
        let first = store.insert(&kind, key("a"), json!({"metadata": {"name": "a"}})).unwrap();
        let seen = obj::version(&first).to_owned();
        assert_eq!(store.insert(&kind, key("a"), json!({})), Err(StoreError::Exists));
        store.replace(&kind, &key("a"), &seen, json!({"metadata": {"name": "a"}, "n": 1})).unwrap();
        assert_eq!(store.replace(&kind, &key("a"), &seen, json!({})), Err(StoreError::Changed));
        assert_eq!(store.remove(&kind, &key("a"), Some(&seen)), Err(StoreError::Changed));
        store.remove(&kind, &key("a"), None).unwrap();
        assert_eq!(store.remove(&kind, &key("a"), None), Err(StoreError::Missing));
    }

    #[test]
    fn history_resumes_and_forgets() {
        let store = Store::new();
        let kind = GroupResource::new("", "things");
        let start = store.version();
        for number in 0..HISTORY + 5 {
            store.insert(&kind, key(&format!("n{number}")), json!({"metadata": {}})).unwrap();
        }
        assert!(matches!(store.changes_since(&kind, start), Err(StoreError::TooOld { .. })));
        let now = store.version();
        assert_eq!(store.changes_since(&kind, now - 3).unwrap().len(), 3);
        assert!(store.changes_since(&kind, now).unwrap().is_empty());
    }
}
