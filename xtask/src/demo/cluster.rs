//! The cluster of the demo: what it is, how to explore it, what it must not leave behind.

use std::path::Path;

use anyhow::{Context, Result, bail};
use coil_lab::Lab;

/// Nodes and addresses in one line.
pub fn describe(lab: &Lab) -> Result<String> {
    let topology = lab.topology();
    let nodes: Vec<_> = topology
        .nodes
        .iter()
        .map(|node| {
            let addresses: Vec<_> = node.addresses.iter().map(|address| address.addr().to_string()).collect();
            format!("{} ({})", node.name, addresses.join(", "))
        })
        .collect();
    Ok(format!("{}; kubeconfig {}", nodes.join(", "), lab.kubeconfig().display()))
}

/// How to go on by hand.
pub fn invite() {
    eprintln!(
        "\nThe cluster stays up. Explore it with\n\
         \x20 cargo xtask lab status\n\
         \x20 cargo xtask lab kubectl -- get egress,pods,deploy -A -o wide\n\
         \x20 cargo xtask lab exec pod/team-a/client -- ping -c 1 203.0.113.10\n\
         \x20 cargo xtask lab exec node/worker1 -- ip route show table 119\n\
         \x20 bpftool map dump pinned /sys/fs/bpf/coil-lab/worker1/v1/flows_v4\n\
         and remove it with\n\
         \x20 cargo xtask lab down\n"
    );
}

/// Fails if a namespace, a pin or a process of the lab is left.
pub fn leftovers() -> Result<String> {
    let mut left = Vec::new();
    for (folder, prefix) in [("/run/netns", "coil-lab-"), ("/sys/fs/bpf", "coil-lab"), ("/run", "coil-lab")] {
        if !Path::new(folder).exists() {
            continue;
        }
        for entry in std::fs::read_dir(folder).with_context(|| format!("listing {folder}"))? {
            let entry = entry?;
            if entry.file_name().to_string_lossy().starts_with(prefix) {
                left.push(entry.path().display().to_string());
            }
        }
    }
    for entry in std::fs::read_dir("/proc").context("listing processes")? {
        let path = entry?.path();
        // Processes come and go; one that is gone cannot be ours.
        let Ok(environment) = std::fs::read(path.join("environ")) else { continue };
        if environment.split(|byte| *byte == 0).any(|variable| variable.starts_with(b"COIL_LAB=")) {
            left.push(format!("process {}", path.display()));
        }
    }
    if !left.is_empty() {
        bail!("left behind: {}", left.join(", "));
    }
    Ok("no namespace, pin or process".to_owned())
}
