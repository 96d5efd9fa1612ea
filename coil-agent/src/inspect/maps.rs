//! `maps`: what is pinned, how full it is, and where programs are attached.

use std::io;
use std::path::{Path, PathBuf};

use coil_common::names::{PIN_EGRESS, PIN_LINKS};
use serde::Serialize;

use super::args::{Format, Maps};
use super::node::{abi_folders, folder, subfolders};
use super::{InspectError, Outcome, output};
use crate::datapath::internal::{
    ObjectKind, ReadMap, TYPE_ARRAY, TYPE_HASH, TYPE_LPM_TRIE, TYPE_LRU_HASH, TYPE_PERCPU_ARRAY, link_info,
    object_get, program_id,
};

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct MapItem {
    path: PathBuf,
    id: u32,
    r#type: String,
    key_size: u32,
    value_size: u32,
    /// `None` for kinds without entries.
    entries: Option<u64>,
    capacity: u32,
    /// Bytes that the kernel counts for it.
    memory: Option<u64>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct ProgramItem {
    path: PathBuf,
    program: String,
    /// Id of the program; `None` if it went while it was looked at.
    program_id: Option<u32>,
    /// Index of the interface in its own name space; 0 once it is gone.
    interface: Option<u32>,
    interface_name: Option<String>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct List {
    api_version: &'static str,
    kind: &'static str,
    abi: u32,
    /// Folders of all versions that are pinned.
    versions: Vec<String>,
    maps: Vec<MapItem>,
    programs: Vec<ProgramItem>,
}

fn type_name(map_type: u32) -> String {
    match map_type {
        TYPE_HASH => "hash".into(),
        TYPE_ARRAY => "array".into(),
        TYPE_PERCPU_ARRAY => "percpu_array".into(),
        TYPE_LRU_HASH => "lru_hash".into(),
        TYPE_LPM_TRIE => "lpm_trie".into(),
        27 => "ringbuf".into(),
        other => format!("type {other}"),
    }
}

fn count(map: &ReadMap) -> Option<u64> {
    let mut count = 0;
    match map.info().map_type {
        TYPE_HASH | TYPE_LRU_HASH | TYPE_LPM_TRIE => map.each(|_, _| count += 1).ok()?,
        // Slots that hold something.
        TYPE_ARRAY => map.each(|_, value| count += u64::from(value.iter().any(|byte| *byte != 0))).ok()?,
        _ => return None,
    }
    Some(count)
}

fn list(folder: &Path, links: bool, items: &mut List) -> Result<(), InspectError> {
    let entries = match std::fs::read_dir(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        entries => entries.map_err(InspectError::pin("list", folder))?,
    };
    let mut paths = Vec::new();
    for entry in entries {
        let entry = entry.map_err(InspectError::pin("list", folder))?;
        if entry.file_type().is_ok_and(|kind| kind.is_file()) {
            paths.push(entry.path());
        }
    }
    paths.sort();
    for path in paths {
        let kind = match object_get(&path) {
            Ok((fd, ObjectKind::Link)) => {
                let info = link_info(&fd).ok();
                let id = info.map(|info| info.program_id);
                items.programs.push(program(&path, id, info.map(|info| info.ifindex)));
                continue;
            }
            // Before tcx (6.6) it is pinned itself.
            Ok((fd, ObjectKind::Program)) => {
                items.programs.push(program(&path, program_id(&fd).ok(), None));
                continue;
            }
            Ok((_, kind)) => kind,
            // It went while we looked.
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(InspectError::pin("open", &path)(error)),
        };
        match kind {
            ObjectKind::Map if !links => {
                let map = ReadMap::open(&path).map_err(InspectError::pin("open", &path))?;
                let info = *map.info();
                items.maps.push(MapItem {
                    path,
                    id: info.id,
                    r#type: type_name(info.map_type),
                    key_size: info.key_size,
                    value_size: info.value_size,
                    entries: count(&map),
                    capacity: info.max_entries,
                    memory: map.memory(),
                });
            }
            _ => {}
        }
    }
    Ok(())
}

fn program(path: &Path, program_id: Option<u32>, linked_to: Option<u32>) -> ProgramItem {
    let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    // `<ifindex>-<program>` for a pod's interface, the program's name for a gateway.
    let (from_name, program) = match name.split_once('-') {
        Some((index, program)) => (index.parse().ok(), program.to_owned()),
        None => (None, name),
    };
    let interface = linked_to.or(from_name);
    // The interface of a gateway is in another name space.
    let here = from_name.is_some().then_some(interface).flatten();
    let interface_name = here
        .and_then(|index| nix::net::if_::if_indextoname(index).ok())
        .and_then(|name| name.into_string().ok());
    ProgramItem { path: path.to_path_buf(), program, program_id, interface, interface_name }
}

/// Runs the command.
pub(crate) fn run(root: &Path, format: Format, options: Maps) -> Result<Outcome, InspectError> {
    let Maps { part } = options;
    let own = folder(root)?;
    let mut items = List {
        api_version: output::API_VERSION,
        kind: "MapList",
        abi: coil_common::ABI_VERSION,
        versions: abi_folders(root)?,
        maps: Vec::new(),
        programs: Vec::new(),
    };
    list(&own, false, &mut items)?;
    list(&own.join(PIN_LINKS), true, &mut items)?;
    let egress = own.join(PIN_EGRESS);
    for uid in subfolders(&egress)? {
        list(&egress.join(uid), false, &mut items)?;
    }
    if let Some(part) = part {
        let wanted = |path: &Path| path.strip_prefix(root).unwrap_or(path).to_string_lossy().contains(&part);
        items.maps.retain(|map| wanted(&map.path));
        items.programs.retain(|program| wanted(&program.path));
    }
    if format == Format::Json {
        output::json(&items)?;
        return Ok(Outcome::Done);
    }
    let wide = format == Format::Wide;
    let name = |path: &Path| path.strip_prefix(root).unwrap_or(path).display().to_string();
    let rows: Vec<Vec<String>> = items
        .maps
        .iter()
        .map(|map| {
            let mut row = vec![
                name(&map.path),
                map.r#type.clone(),
                map.entries.map_or_else(String::new, |entries| entries.to_string()),
                map.capacity.to_string(),
                map.memory.map_or_else(String::new, output::bytes),
            ];
            if wide {
                row.extend([map.id, map.key_size, map.value_size].map(|number| number.to_string()));
            }
            row
        })
        .collect();
    let headers: &[&str] = if wide {
        &["MAP", "TYPE", "ENTRIES", "CAPACITY", "MEMORY", "ID", "KEY", "VALUE"]
    } else {
        &["MAP", "TYPE", "ENTRIES", "CAPACITY", "MEMORY"]
    };
    output::line(&format!("Pinned under {}, layouts of version {}.", root.display(), items.abi))?;
    for other in items.versions.iter().filter(|version| **version != format!("v{}", items.abi)) {
        output::line(&format!("There is also {other}, of another version of Coil."))?;
    }
    output::line("")?;
    output::table(headers, &rows, "No such map is pinned.")?;
    output::line("")?;
    let rows: Vec<Vec<String>> = items
        .programs
        .iter()
        .map(|program| {
            let interface = match (program.interface, &program.interface_name) {
                (Some(0), _) => "gone".to_owned(),
                (Some(index), Some(name)) => format!("{name} ({index})"),
                (Some(index), None) => format!("({index}, in another name space)"),
                (None, _) => String::new(),
            };
            let id = program.program_id.map_or_else(String::new, |id| id.to_string());
            vec![program.program.clone(), id, interface, name(&program.path)]
        })
        .collect();
    output::table(&["PROGRAM", "ID", "INTERFACE", "PIN"], &rows, "No such program is attached.")?;
    Ok(Outcome::Done)
}
