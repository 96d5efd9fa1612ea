//! `build-ebpf` and `build`: finds or installs the compiler of the eBPF object and runs it.
//!
//! Compiler and `bpf-linker` must share their LLVM major version. Two pairs are known: rustup's
//! nightly with `rust-src` and a `bpf-linker` in `PATH`, and Debian's `rustc-web` with a
//! `bpf-linker` built once against Debian's LLVM.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::{env, fs};

use anyhow::{Context, Result, bail};

use crate::process::{output, run, say};
use crate::{host, root, target_dir};

const BPF_LINKER: &str = "0.13.0";
const TARGET: &str = "bpfel-unknown-none";
const LLVM: &str = "/usr/lib/llvm-22";
const RUST_SRC: &str = "rust-web-src";
/// What the object is made from, relative to the root.
const INPUTS: &[&str] = &[
    "Cargo.toml",
    "Cargo.lock",
    "coil-common",
    "coil-ebpf/Cargo.toml",
    "coil-ebpf/src",
    "xtask/src/ebpf.rs",
];

/// Builds the eBPF object, installing its toolchain if need be.
#[derive(clap::Args, Debug, Default)]
pub struct BuildEbpf {
    /// Build even if nothing has changed
    #[arg(long)]
    force: bool,
}

/// Builds the eBPF object and the programs with it inside.
#[derive(clap::Args, Debug, Default)]
pub struct Build {
    /// Optimise the programs
    #[arg(long)]
    release: bool,
}

/// A compiler for the object.
enum Toolchain {
    /// rustup's nightly, `bpf-linker` from `PATH`.
    Nightly,
    /// Debian's packages, `bpf-linker` in this folder.
    Debian { linker: PathBuf },
}

/// Where the object is.
pub fn object() -> PathBuf {
    root().join("target/bpf/coil-ebpf.o")
}

impl BuildEbpf {
    /// Runs the verb.
    pub fn run(&self) -> Result<()> {
        let stamp = target_dir().join("bpf/coil-ebpf.stamp");
        let inputs = fingerprint()?;
        if !self.force && object().exists() && fs::read_to_string(&stamp).is_ok_and(|old| old == inputs) {
            say(format!("eBPF object is up to date: {}", object().display()));
            return Ok(());
        }
        let toolchain = Toolchain::find()?;
        say(format!("building the eBPF object with {}", toolchain.describe()));
        let built = toolchain.build()?;
        fs::create_dir_all(object().parent().context("object without a folder")?)?;
        let fresh = object().with_extension("o.new");
        fs::copy(&built, &fresh).with_context(|| format!("copying {}", built.display()))?;
        fs::rename(&fresh, object())?;
        fs::write(&stamp, inputs).with_context(|| format!("writing {}", stamp.display()))?;
        say(format!("eBPF object: {} ({} bytes)", object().display(), fs::metadata(object())?.len()));
        Ok(())
    }
}

impl Build {
    /// Runs the verb.
    pub fn run(&self) -> Result<()> {
        BuildEbpf::default().run()?;
        say("building the programs");
        let mut cargo = cargo();
        cargo.args(["build", "--package", "hypercoil"]);
        if self.release {
            cargo.arg("--release");
        }
        run(&mut cargo)?;
        say(format!("programs: {}", programs(self.release).display()));
        Ok(())
    }
}

/// Where `build` leaves the multi-call binary.
pub fn programs(release: bool) -> PathBuf {
    target_dir().join(if release { "release" } else { "debug" }).join("hypercoil")
}

/// The cargo that runs this program, in the root.
///
/// What `cargo run` tells this program about itself must not reach the inner cargo: build scripts that
/// watch those variables (ring's does) would run again each time the two take turns.
pub fn cargo() -> Command {
    let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(root());
    for (name, _) in env::vars_os() {
        let name = name.to_string_lossy();
        let told = ["CARGO_PKG_", "CARGO_MANIFEST_", "CARGO_CRATE_", "CARGO_BIN_", "CARGO_PRIMARY_"];
        if told.iter().any(|prefix| name.starts_with(prefix)) {
            command.env_remove(&*name);
        }
    }
    command
}

impl Toolchain {
    fn find() -> Result<Self> {
        if let Some(nightly) = Self::nightly() {
            return Ok(nightly);
        }
        host::ensure(host::EBPF)?;
        if !Path::new(&debian_rust_src()?).exists() {
            host::install(&[RUST_SRC])?;
        }
        let tools = target_dir().join("tools");
        let linker = tools.join("bin");
        if !has_linker(&linker) {
            say(format!("building bpf-linker {BPF_LINKER} against {LLVM} (once, about a minute)"));
            run(cargo()
                .args(["install", "bpf-linker", "--version", BPF_LINKER, "--locked", "--force"])
                .args(["--no-default-features", "--features", "llvm-22", "--root"])
                .arg(&tools)
                .arg("--target-dir")
                .arg(tools.join("build"))
                .env("LLVM_PREFIX", LLVM))
            .context("building bpf-linker")?;
            fs::remove_dir_all(tools.join("build")).context("removing what bpf-linker was built from")?;
        }
        Ok(Self::Debian { linker })
    }

    /// rustup's nightly counts only with its library sources and a linker of the same LLVM.
    fn nightly() -> Option<Self> {
        let quiet = |command: &mut Command| {
            let output = command.stderr(Stdio::null()).output().ok()?;
            output.status.success().then(|| String::from_utf8_lossy(&output.stdout).into_owned())
        };
        let sysroot = quiet(Command::new("rustup").args(["run", "nightly", "rustc", "--print", "sysroot"]))?;
        let sources = Path::new(sysroot.trim()).join("lib/rustlib/src/rust/library/core");
        if !sources.exists() {
            return None;
        }
        let verbose =
            quiet(Command::new("rustup").args(["run", "nightly", "rustc", "--version", "--verbose"]))?;
        let major = |text: &str, after: &str| {
            let rest = text.split_once(after)?.1.trim_start();
            rest.split('.').next().map(str::to_owned)
        };
        let compiler = major(&verbose, "LLVM version:")?;
        let linker = major(&quiet(Command::new("bpf-linker").arg("--version"))?, "LLVM")?;
        (compiler == linker).then_some(Self::Nightly)
    }

    fn describe(&self) -> String {
        match self {
            Self::Nightly => "rustup's nightly and bpf-linker from PATH".to_owned(),
            Self::Debian { linker } => {
                format!("Debian's rustc-web and {}", linker.join("bpf-linker").display())
            }
        }
    }

    fn build(&self) -> Result<PathBuf> {
        let mut command = match self {
            Self::Nightly => {
                let mut command = Command::new("rustup");
                command.args(["run", "nightly", "cargo"]);
                command
            }
            Self::Debian { linker } => {
                let mut command = Command::new("/usr/bin/cargo");
                let path = env::var_os("PATH").unwrap_or_default();
                let path = env::join_paths(std::iter::once(linker.clone()).chain(env::split_paths(&path)))?;
                command.env("RUSTC", "/usr/bin/rustc").env("RUSTC_BOOTSTRAP", "1").env("PATH", path);
                command
            }
        };
        let folder = target_dir().join("bpf");
        command
            .args(["build", "-Z", "build-std=core", "--target", TARGET, "--profile", "bpf"])
            .args(["--package", "coil-ebpf", "--bins"])
            .current_dir(root())
            .env("CARGO_TARGET_DIR", &folder)
            .env("CARGO_ENCODED_RUSTFLAGS", "-Cdebuginfo=2\x1f-Clink-arg=--btf");
        // What the outer cargo set for this program's own toolchain must not reach the inner one.
        for name in ["RUSTUP_TOOLCHAIN", "CARGO", "RUSTC_WRAPPER", "RUSTFLAGS"] {
            command.env_remove(name);
        }
        run(&mut command).context("compiling the eBPF object")?;
        Ok(folder.join(TARGET).join("bpf/coil-ebpf"))
    }
}

/// Where Debian's compiler expects the sources of `core`.
fn debian_rust_src() -> Result<String> {
    let sysroot =
        output(Command::new("/usr/bin/rustc").args(["--print", "sysroot"]).env_remove("RUSTUP_TOOLCHAIN"))?;
    Ok(format!("{}/lib/rustlib/src/rust/library/core", sysroot.trim()))
}

fn has_linker(folder: &Path) -> bool {
    Command::new(folder.join("bpf-linker")).arg("--version").stderr(Stdio::null()).output().is_ok_and(
        |output| output.status.success() && String::from_utf8_lossy(&output.stdout).contains(BPF_LINKER),
    )
}

/// Hash of everything that the object is made from.
fn fingerprint() -> Result<String> {
    let mut files = Vec::new();
    for input in INPUTS {
        collect(&root().join(input), &mut files)?;
    }
    files.sort();
    let mut hasher = DefaultHasher::new();
    for file in files {
        file.hash(&mut hasher);
        fs::read(&file).with_context(|| format!("reading {}", file.display()))?.hash(&mut hasher);
    }
    Ok(format!("{:016x}\n", hasher.finish()))
}

fn collect(path: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    if path.is_dir() {
        for entry in fs::read_dir(path).with_context(|| format!("listing {}", path.display()))? {
            collect(&entry?.path(), files)?;
        }
    } else if path.is_file() {
        files.push(path.to_owned());
    } else {
        bail!("{} does not exist", path.display());
    }
    Ok(())
}
