//! Watches: initial state, changes since a version, bookmarks, selectors, expiry.

use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::time::Instant;

use super::error::{ApiError, ApiResult};
use super::obj;
use super::read::{self, Selection};
use super::registry::Resource;
use super::request::Query;
use super::server::ApiServer;
use super::store::{Change, ChangeKind, StoreError};

/// Watches that name no time end by themselves after this long, like the real server's.
const DEFAULT_TIMEOUT: Duration = Duration::from_secs(45 * 60);
/// No watch runs longer.
const LONGEST: Duration = Duration::from_secs(24 * 3600);
/// Time between bookmarks.
const BOOKMARK_EVERY: Duration = Duration::from_secs(20);
/// Annotation of the bookmark after the initial events of a streaming list.
const INITIAL_END: &str = "k8s.io/initial-events-end";

/// Type of a watch event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EventKind {
    /// Object is selected now.
    Added,
    /// Selected object changed.
    Modified,
    /// Object is gone or not selected any more.
    Deleted,
    /// Progress only.
    Bookmark,
    /// The watch failed; the object is a `Status`.
    Error,
}

impl EventKind {
    /// As on the wire.
    pub fn text(self) -> &'static str {
        match self {
            Self::Added => "ADDED",
            Self::Modified => "MODIFIED",
            Self::Deleted => "DELETED",
            Self::Bookmark => "BOOKMARK",
            Self::Error => "ERROR",
        }
    }
}

/// A watch event.
#[derive(Debug, Clone)]
pub struct Event {
    /// Type.
    pub kind: EventKind,
    /// Object, as stored.
    pub object: Arc<Value>,
}

/// A running watch.
pub struct Watch {
    server: Arc<ApiServer>,
    resource: Arc<Resource>,
    selection: Selection,
    pending: std::collections::VecDeque<Event>,
    seen: u64,
    tick: tokio::sync::watch::Receiver<u64>,
    bookmarks: bool,
    next_bookmark: Instant,
    end: Instant,
    ended: bool,
}

/// How a watch starts.
#[derive(Debug, Clone, Default)]
pub struct WatchOptions {
    /// Version to go on from; none sends the present state first.
    pub since: Option<u64>,
    /// End the initial events with an annotated bookmark.
    pub initial_end: bool,
    /// Skip the initial events even when no version is given.
    pub skip_initial: bool,
    /// Send bookmarks now and then.
    pub bookmarks: bool,
    /// When to end.
    pub timeout: Option<Duration>,
}

impl WatchOptions {
    /// From a query.
    pub fn read(query: &Query) -> ApiResult<Self> {
        let version = query.get("resourceVersion");
        let send_initial = query.has("sendInitialEvents").then(|| query.flag("sendInitialEvents"));
        let number = |text: &str| -> ApiResult<u64> {
            text.parse().map_err(|_| {
                ApiError::bad_request(format!("resourceVersion: Invalid value: \"{text}\": strconv.ParseUint: parsing \"{text}\": invalid syntax"))
            })
        };
        if send_initial.is_some() && query.get("resourceVersionMatch") != "NotOlderThan" {
            return Err(ApiError::bad_request(
                "sendInitialEvents: Forbidden: sendInitialEvents requires setting resourceVersionMatch to NotOlderThan",
            ));
        }
        let since = match (version, send_initial) {
            ("" | "0", _) | (_, Some(true)) => None,
            (text, _) => Some(number(text)?),
        };
        Ok(Self {
            since,
            initial_end: send_initial == Some(true) && query.flag("allowWatchBookmarks"),
            skip_initial: send_initial == Some(false),
            bookmarks: query.flag("allowWatchBookmarks"),
            timeout: query
                .number("timeoutSeconds")
                .filter(|&seconds| seconds > 0)
                .map(|seconds| Duration::from_secs(seconds).min(LONGEST)),
        })
    }
}

impl ApiServer {
    /// Starts a watch.
    pub fn watch(
        self: &Arc<Self>,
        resource: &Arc<Resource>,
        selection: Selection,
        options: &WatchOptions,
    ) -> ApiResult<Watch> {
        let tick = self.store.subscribe(&resource.storage);
        let mut watch = Watch {
            server: self.clone(),
            resource: resource.clone(),
            selection,
            pending: std::collections::VecDeque::new(),
            seen: 0,
            tick,
            bookmarks: options.bookmarks,
            next_bookmark: Instant::now() + BOOKMARK_EVERY,
            end: Instant::now() + options.timeout.unwrap_or(DEFAULT_TIMEOUT),
            ended: false,
        };
        match options.since {
            Some(version) => {
                let now = self.store.version();
                if version > now {
                    return Err(read::too_large(version, now));
                }
                watch.seen = version;
                watch.read_changes();
            }
            None => {
                let (objects, version) =
                    self.store.list(&resource.storage, watch.selection.namespace.as_deref());
                watch.seen = version;
                if !options.skip_initial {
                    let selected = objects.into_iter().filter(|object| watch.selection.matches(object));
                    watch.pending = selected.map(|object| Event { kind: EventKind::Added, object }).collect();
                }
                if options.initial_end {
                    let mark = watch.bookmark(true);
                    watch.pending.push_back(mark);
                }
            }
        }
        Ok(watch)
    }
}

impl Watch {
    /// The next event; none when the watch has ended.
    pub async fn next(&mut self) -> Option<Event> {
        loop {
            if let Some(event) = self.pending.pop_front() {
                self.ended |= event.kind == EventKind::Error;
                return Some(event);
            }
            if self.ended {
                return None;
            }
            let stopped = self.server.stopped();
            let wake = if self.bookmarks { self.next_bookmark.min(self.end) } else { self.end };
            tokio::select! {
                changed = self.tick.changed() => {
                    if changed.is_err() {
                        return None;
                    }
                    self.read_changes();
                }
                () = stopped.cancelled() => return None,
                () = tokio::time::sleep_until(wake) => {
                    self.ended = Instant::now() >= self.end;
                    if self.bookmarks {
                        self.read_changes();
                        let mark = self.bookmark(false);
                        self.pending.push_back(mark);
                        self.next_bookmark = Instant::now() + BOOKMARK_EVERY;
                    }
                }
            }
        }
    }

    fn read_changes(&mut self) {
        self.tick.mark_unchanged();
        match self.server.store.changes_since(&self.resource.storage, self.seen) {
            Ok(changes) => {
                for change in changes {
                    self.seen = change.version;
                    if let Some(event) = self.event_of(&change) {
                        self.pending.push_back(event);
                    }
                }
            }
            Err(StoreError::TooOld { oldest }) => {
                let error = ApiError::expired(format!("too old resource version: {} ({oldest})", self.seen));
                self.pending.push_back(Event { kind: EventKind::Error, object: Arc::new(error.status()) });
            }
            Err(other) => {
                let error = ApiError::internal(other);
                self.pending.push_back(Event { kind: EventKind::Error, object: Arc::new(error.status()) });
            }
        }
    }

    fn event_of(&self, change: &Change) -> Option<Event> {
        let is = change.kind != ChangeKind::Deleted && self.selection.matches(&change.object);
        let was = change.before.as_ref().is_some_and(|before| self.selection.matches(before));
        let kind = match (was, is) {
            (false, false) => return None,
            (false, true) => EventKind::Added,
            (true, true) => EventKind::Modified,
            (true, false) => EventKind::Deleted,
        };
        // An object that left the selection is shown as it was, in the new version.
        let object = match (&change.before, change.kind, kind) {
            (Some(before), ChangeKind::Modified, EventKind::Deleted) => {
                let mut last = (**before).clone();
                obj::set(&mut last, &["metadata", "resourceVersion"], change.version.to_string());
                Arc::new(last)
            }
            _ => change.object.clone(),
        };
        Some(Event { kind, object })
    }

    fn bookmark(&mut self, is_initial_end: bool) -> Event {
        // Nothing that this watch could have missed has a version between `seen` and now.
        let version = self.server.store.version();
        if !self.has_unread() {
            self.seen = self.seen.max(version);
        }
        let mut metadata = json!({"resourceVersion": self.seen.to_string(), "creationTimestamp": null});
        if is_initial_end {
            obj::set(&mut metadata, &["annotations", INITIAL_END], "true");
        }
        let mut object = json!({
            "kind": self.resource.kind, "apiVersion": self.resource.api_version(), "metadata": metadata,
        });
        obj::set(&mut object, &["metadata", "creationTimestamp"], Value::Null);
        Event { kind: EventKind::Bookmark, object: Arc::new(object) }
    }

    fn has_unread(&self) -> bool {
        self.server
            .store
            .changes_since(&self.resource.storage, self.seen)
            .map_or(true, |changes| !changes.is_empty())
    }
}
