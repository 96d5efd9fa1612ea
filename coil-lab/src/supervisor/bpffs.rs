//! The BPF file system in which the nodes' daemons pin their maps and links.

use crate::paths;
use crate::state::State;
use crate::topology::Node;
use anyhow::Context;
use nix::mount::{MsFlags, mount};
use std::path::Path;

const BPF_FS_MAGIC: i64 = 0xcafe_4a11;

/// Mounts it unless it is there, and makes a folder per node.
pub(super) fn prepare(state: &State) -> anyhow::Result<()> {
    let root = Path::new(paths::BPFFS);
    if !is_bpffs(root)? {
        mount(Some(paths::BPFFS_SOURCE), root, Some("bpf"), MsFlags::empty(), Some("mode=700"))
            .with_context(|| format!("cannot mount the BPF file system on {}", root.display()))?;
    }
    state.topology.nodes.iter().try_for_each(folder)
}

/// Makes the folder of a node.
pub(super) fn folder(node: &Node) -> anyhow::Result<()> {
    let folder = paths::node_pins(&node.name);
    std::fs::create_dir_all(&folder).with_context(|| format!("cannot create {}", folder.display()))
}

fn is_bpffs(path: &Path) -> anyhow::Result<bool> {
    let found = nix::sys::statfs::statfs(path).with_context(|| format!("{} is not there", path.display()))?;
    Ok(found.filesystem_type().0 == BPF_FS_MAGIC)
}
