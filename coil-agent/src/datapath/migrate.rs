//! Pinned maps of another layout or capacity: their contents move to new maps, whichever of the two is the
//! newer software, while the programs that are attached go on.
//!
//! New maps are pinned in a folder of their own, `next`, and filled. Then `next/live` says that programs may
//! use them, the programs are replaced, and what has changed in the old maps meanwhile is brought over.
//! Last the new pins take the place of the old ones. A process that finds `next` without `live` undoes it;
//! with `live` it completes it. Either is safe to be broken off and done again.

use std::io;
use std::path::{Path, PathBuf};

use coil_common::names::{GATEWAY_MAPS, NODE_MAPS};

use super::layout::{Conversion, newer};
use super::pins::PinError;
use super::raw_map::{Inserted, RawMap};

/// Folder of the new maps.
const NEXT: &str = "next";
/// Folder in there that says that programs may use them.
const LIVE: &str = "live";

/// Why contents cannot be moved.
#[derive(Debug, thiserror::Error)]
pub enum MigrationError {
    /// A pin cannot be used.
    #[error(transparent)]
    Pin(#[from] PinError),
    /// A map cannot be read or written.
    #[error("cannot move the contents of {}", path.display())]
    Copy {
        /// The old map.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// Nobody knows what the bytes of a map mean.
    #[error("{} has another layout and no type information: remove it once nothing uses an Egress", path.display())]
    Unknown {
        /// The old map.
        path: PathBuf,
    },
}

/// Where a map is pinned now: in `next` while it moves.
pub(crate) fn current(folder: &Path, map: &str) -> PathBuf {
    let next = folder.join(NEXT).join(map);
    if next.exists() { next } else { folder.join(map) }
}

/// One map on its way.
#[derive(Debug)]
struct Move {
    name: &'static str,
    old: RawMap,
    /// The datapath writes to it: it may have changed since it was copied.
    lively: bool,
}

/// Maps on their way.
#[derive(Debug)]
pub(crate) struct Migration {
    folder: PathBuf,
    moves: Vec<Move>,
}

impl Migration {
    /// Undoes or completes what an earlier process has begun.
    pub(crate) fn recover(folder: &Path, is_lively: impl Fn(&str) -> bool) -> Result<Self, MigrationError> {
        let mut migration = Self { folder: folder.to_path_buf(), moves: Vec::new() };
        let next = folder.join(NEXT);
        if !next.exists() {
            return Ok(migration);
        }
        if !next.join(LIVE).exists() {
            tracing::info!(path = %next.display(), "an unfinished change of map layouts is undone");
            std::fs::remove_dir_all(&next).map_err(PinError::path("remove", &next))?;
            return Ok(migration);
        }
        tracing::info!(path = %next.display(), "an unfinished change of map layouts is completed");
        for name in names(&next)? {
            if let Some(old) = open(&folder.join(name))? {
                migration.moves.push(Move { name, old, lively: is_lively(name) });
            }
        }
        migration.bring_over()?;
        migration.settle()?;
        Ok(migration)
    }

    /// Decides that a map is to be made anew; returns where.
    pub(crate) fn begin(&mut self, name: &'static str, lively: bool) -> Result<PathBuf, MigrationError> {
        let next = self.folder.join(NEXT);
        std::fs::create_dir_all(&next).map_err(PinError::path("create", &next))?;
        let path = self.folder.join(name);
        let old = open(&path)?
            .ok_or_else(|| MigrationError::Copy { path, source: io::ErrorKind::NotFound.into() })?;
        // One that was completed just now is on its way again.
        self.moves.retain(|earlier| earlier.name != name);
        self.moves.push(Move { name, old, lively });
        Ok(next.join(name))
    }

    /// Fills the new maps and declares them fit for use: programs may be replaced after this.
    pub(crate) fn fill(&self) -> Result<(), MigrationError> {
        let next = self.folder.join(NEXT);
        if !next.exists() {
            return Ok(());
        }
        for one in &self.moves {
            if let Some(new) = open(&next.join(one.name))? {
                let moved = copy(&one.old, &new, false).map_err(self.copy_error(one.name))?;
                self.report(one.name, moved);
                if moved.lost > 0 && !new.is_array() {
                    let text = format!("the new map has no room for {} of its entries", moved.lost);
                    return Err(MigrationError::Copy {
                        path: self.folder.join(one.name),
                        source: io::Error::other(text),
                    });
                }
            }
        }
        let live = next.join(LIVE);
        std::fs::create_dir_all(&live).map_err(|error| PinError::path("create", &live)(error).into())
    }

    /// After the programs have been replaced: brings over what has changed, and puts the new maps in the
    /// place of the old ones. Can be repeated after a failure.
    pub(crate) fn finish(&mut self) -> Result<(), MigrationError> {
        if self.moves.is_empty() {
            return Ok(());
        }
        self.bring_over()?;
        self.settle()?;
        let maps: Vec<_> = self.moves.drain(..).map(|one| one.name).collect();
        tracing::info!(?maps, folder = %self.folder.display(), "maps have got their new layouts");
        Ok(())
    }

    fn bring_over(&self) -> Result<(), MigrationError> {
        for one in self.moves.iter().filter(|one| one.lively) {
            if let Some(new) = open(&current(&self.folder, one.name))? {
                let moved = copy(&one.old, &new, true).map_err(self.copy_error(one.name))?;
                self.report(one.name, moved);
            }
        }
        Ok(())
    }

    /// New pins for old ones.
    fn settle(&self) -> Result<(), MigrationError> {
        let next = self.folder.join(NEXT);
        if !next.exists() {
            return Ok(());
        }
        for name in names(&next)? {
            let (from, to) = (next.join(name), self.folder.join(name));
            std::fs::rename(&from, &to).map_err(PinError::path("move", &from))?;
        }
        std::fs::remove_dir_all(&next).map_err(|error| PinError::path("remove", &next)(error).into())
    }

    fn copy_error(&self, name: &str) -> impl Fn(CopyError) -> MigrationError {
        let path = self.folder.join(name);
        move |error| match error {
            CopyError::Unknown => MigrationError::Unknown { path: path.clone() },
            CopyError::Io(source) => MigrationError::Copy { path: path.clone(), source },
        }
    }

    fn report(&self, map: &str, Copied { moved, lost }: Copied) {
        let folder = self.folder.display();
        tracing::info!(map, %folder, entries = moved, "contents moved to a map of the new layout");
        if lost > 0 {
            tracing::warn!(map, %folder, entries = lost, "the new map has no room for some of the contents");
        }
    }
}

/// Maps of ours that are pinned in a folder.
fn names(folder: &Path) -> Result<Vec<&'static str>, PinError> {
    let mut names = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(PinError::path("list", folder))? {
        let name = entry.map_err(PinError::path("list", folder))?.file_name();
        names.extend(NODE_MAPS.iter().chain(GATEWAY_MAPS).find(|known| name == **known));
    }
    Ok(names)
}

fn open(path: &Path) -> Result<Option<RawMap>, MigrationError> {
    RawMap::open(path).map_err(|error| PinError::path("open", path)(error).into())
}

/// What a copy did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Copied {
    moved: usize,
    /// Entries for which there was no room.
    lost: usize,
}

enum CopyError {
    Io(io::Error),
    Unknown,
}

impl From<io::Error> for CopyError {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

/// Copies entries that the new map lacks; the second time also counters and times that have grown.
fn copy(old: &RawMap, new: &RawMap, again: bool) -> Result<Copied, CopyError> {
    if !old.is_table() || !new.is_table() {
        // A queue of events is for whoever listens now.
        return Ok(Copied::default());
    }
    let layouts = (old.layouts()?, new.layouts()?);
    let sizes = (new.info.key_size as usize, new.info.value_size as usize);
    let (keys, values, layout) = match layouts {
        (Some(old), Some(new)) => (
            Conversion::between(&old.key, &new.key),
            Conversion::between(&old.value, &new.value),
            Some(new.value),
        ),
        _ if (old.info.key_size as usize, old.info.value_size as usize) == sizes => {
            (Conversion::same(sizes.0), Conversion::same(sizes.1), None)
        }
        _ => return Err(CopyError::Unknown),
    };
    let (old_stride, new_stride) = (old.stride()?, new.stride()?);
    let old_size = old.info.value_size as usize;
    let mut known = vec![0; new_stride * new.values()?];
    let mut copied = Copied::default();
    old.each(|key, value| {
        let key = keys.apply(key);
        let mut wanted = Vec::with_capacity(known.len());
        for value in value.chunks(old_stride) {
            wanted.extend(values.apply(&value[..old_size.min(value.len())]));
            wanted.resize(wanted.len().next_multiple_of(new_stride), 0);
        }
        // From many processors' values to one, or from one to many, only the first has a meaning.
        wanted.resize(known.len(), 0);
        if new.is_array() && key_index(&key) >= new.info.max_entries {
            copied.lost += usize::from(wanted.iter().any(|&byte| byte != 0));
            return Ok(());
        }
        let exists = again && new.get(&key, &mut known)?;
        if !exists {
            match new.insert(&key, &wanted)? {
                Inserted::Done => copied.moved += 1,
                Inserted::Exists => {}
                Inserted::Full => copied.lost += 1,
            }
            return Ok(());
        }
        let Some(layout) = &layout else { return Ok(()) };
        let mut grown = false;
        for (known, wanted) in known.chunks_mut(new_stride).zip(wanted.chunks(new_stride)) {
            if let Some(merged) = newer(layout, known, wanted) {
                known.copy_from_slice(&merged);
                grown = true;
            }
        }
        if grown {
            copied.moved += 1;
            new.put(&key, &known)?;
        }
        Ok(())
    })?;
    Ok(copied)
}

fn key_index(key: &[u8]) -> u32 {
    key.try_into().map_or(u32::MAX, u32::from_ne_bytes)
}
