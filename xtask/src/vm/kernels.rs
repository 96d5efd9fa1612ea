//! Debian's kernels: which there are, and where they come from.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use super::runner;
use crate::process::{output, say};

/// A kernel that has a name here.
struct Known {
    name: &'static str,
    suite: &'static str,
    /// Package, or pattern for the newest that matches.
    package: &'static str,
}

const META: &str = "linux-image-amd64";

const KNOWN: &[Known] = &[
    Known { name: "5.10", suite: "bullseye", package: META },
    Known { name: "6.1", suite: "bookworm", package: META },
    Known { name: "6.12", suite: "trixie", package: META },
    Known { name: "6.18", suite: "trixie-backports", package: "linux-image-6.18.*-amd64" },
    Known { name: "newest", suite: "sid", package: META },
];

/// What runs if nothing is asked for.
pub const DEFAULT: &[&str] = &["5.10", "6.1", "6.12", "6.18", "newest"];

/// What `cargo xtask test` runs: the oldest that most clusters have, without tcx.
pub const FOR_TEST: &str = "6.1";

/// Where instructions are counted.
pub const FOR_BENCH: &str = "6.12";

/// An unpacked kernel.
pub struct Kernel {
    /// Where.
    pub folder: PathBuf,
    /// As `uname -r` says.
    pub release: String,
    /// First two numbers of it.
    pub version: (u32, u32),
}

impl Kernel {
    /// Downloads and unpacks a kernel, unless that has been done.
    pub fn get(name: &str) -> Result<Self> {
        if Path::new(name).is_dir() {
            return Self::at(Path::new(name));
        }
        let known = KNOWN.iter().find(|known| known.name == name || known.suite == name);
        let (suite, package) = match (known, name.starts_with(|c: char| c.is_ascii_digit())) {
            (Some(known), _) => (known.suite, known.package),
            (None, false) => (name, META),
            (None, true) => {
                let names: Vec<_> = KNOWN.iter().map(|known| known.name).collect();
                bail!("no kernel {name}; there are {}, Debian suites, and folders", names.join(", "));
            }
        };
        say(format!("kernel {name}: {package} of Debian {suite} (about 100 MB, kept)"));
        let text = output(runner().args(["get", suite, package]))?;
        let folder = text.lines().last().context("no folder of a kernel")?;
        Self::at(Path::new(folder))
    }

    fn at(folder: &Path) -> Result<Self> {
        let roots = ["usr/lib/modules", "lib/modules"].map(|path| folder.join(path));
        let root =
            roots.iter().find(|path| path.is_dir()).context("no modules in the folder of the kernel")?;
        let entry = std::fs::read_dir(root)?.next().context("no kernel in the folder")??;
        let release = entry.file_name().to_string_lossy().into_owned();
        let version = version(&release).with_context(|| format!("{release} is no version of a kernel"))?;
        Ok(Self { folder: folder.to_owned(), release, version })
    }
}

fn version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(str::parse);
    Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn releases_have_versions() {
        assert_eq!(version("6.12.117+deb13-amd64"), Some((6, 12)));
        assert_eq!(version("5.10.0-46-amd64"), Some((5, 10)));
        assert_eq!(version("next"), None);
    }

    #[test]
    fn kernels_that_run_have_names() {
        for name in DEFAULT.iter().chain([&FOR_TEST]) {
            assert!(KNOWN.iter().any(|known| known.name == *name), "{name}");
        }
    }
}
