//! What a command needs from the machine: root, tools, Debian packages.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::process::{run, say};

/// A tool of the host and the Debian package that brings it.
#[derive(Clone, Copy, Debug)]
pub struct Tool {
    /// Name of a program in `PATH`, or an absolute path.
    pub program: &'static str,
    /// Debian package.
    pub package: &'static str,
}

const fn tool(program: &'static str, package: &'static str) -> Tool {
    Tool { program, package }
}

/// What the lab, the demo and the privileged tests run.
pub const LAB: &[Tool] = &[
    tool("ip", "iproute2"),
    tool("tc", "iproute2"),
    tool("ping", "iputils-ping"),
    tool("traceroute", "traceroute"),
    tool("ethtool", "ethtool"),
    tool("bpftool", "bpftool"),
    tool("kubectl", "kubernetes-client"),
    tool("curl", "curl"),
    tool("nft", "nftables"),
    tool("/usr/sbin/bird", "bird2"),
    tool("/usr/lib/cni/ptp", "containernetworking-plugins"),
    tool("/usr/lib/cni/host-local", "containernetworking-plugins"),
];

/// What the tests run besides: a container runtime, and clocks that jump. Podman of Debian 12 is the last with a CNI backend.
pub const TEST: &[Tool] = &[
    tool("podman", "podman"),
    tool("runc", "runc"),
    tool("faketime", "faketime"),
    tool("/usr/lib/frr/bgpd", "frr"),
];

/// What the benchmarks run besides.
pub const BENCH: &[Tool] = &[tool("iperf3", "iperf3")];

/// What the compiler of the eBPF object needs where rustup has no nightly with `rust-src`.
pub const EBPF: &[Tool] = &[
    tool("/usr/bin/rustc", "rustc-web"),
    tool("/usr/bin/cargo", "cargo-web"),
    tool("/usr/lib/llvm-22/bin/llvm-config", "llvm-22-dev"),
    tool("cc", "gcc"),
    tool("make", "make"),
];

/// True if the process may do everything.
pub fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}

/// Fails unless the process is root; `what` says what for.
pub fn need_root(what: &str) -> Result<()> {
    if !is_root() {
        bail!("{what} needs root (network namespaces and eBPF): run it as root");
    }
    Ok(())
}

/// True if the tool can be run or, for a path, exists.
pub fn has(program: &str) -> bool {
    if program.starts_with('/') {
        return Path::new(program).exists();
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin"].map(Into::into))
        .any(|folder| folder.join(program).is_file())
}

/// Installs the packages of tools that are missing; on anything but Debian as root it names them.
pub fn ensure(tools: &[Tool]) -> Result<()> {
    let mut packages: Vec<_> =
        tools.iter().filter(|tool| !has(tool.program)).map(|tool| tool.package).collect();
    packages.sort_unstable();
    packages.dedup();
    install(&packages)
}

/// Installs Debian packages.
pub fn install(packages: &[&str]) -> Result<()> {
    if packages.is_empty() {
        return Ok(());
    }
    let names = packages.join(" ");
    if !has("apt-get") {
        bail!("missing: {names} (Debian package names); install them with this system's package manager");
    }
    if !is_root() {
        bail!("missing: {names}; run as root, or: apt-get install --no-install-recommends {names}");
    }
    say(format!("installing Debian packages: {names}"));
    let apt = |arguments: &[&str]| {
        run(Command::new("apt-get")
            .args(["-qq", "-o", "Dpkg::Use-Pty=0"])
            .args(arguments)
            .env("DEBIAN_FRONTEND", "noninteractive")
            .stdout(std::process::Stdio::null()))
    };
    apt(&["update"]).context("refreshing the package lists")?;
    let mut arguments = vec!["install", "-y", "--no-install-recommends"];
    arguments.extend(packages);
    apt(&arguments).with_context(|| format!("installing {names}"))
}

/// `PATH` with the folders of system tools, which a plain user's may lack.
pub fn add_system_path() {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut folders: Vec<_> = std::env::split_paths(&path).collect();
    for folder in ["/usr/sbin", "/sbin"] {
        if !folders.iter().any(|known| known == Path::new(folder)) {
            folders.push(folder.into());
        }
    }
    if let Ok(path) = std::env::join_paths(folders) {
        // SAFETY: called first thing in main, before any other thread exists.
        unsafe { std::env::set_var("PATH", path) };
    }
}
