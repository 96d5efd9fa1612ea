//! Installs the CNI plugin and its configuration, each file at once or not at all.

use std::fs::{self, File, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, ensure};
use clap::{ArgAction, Parser};

/// The kubelet looks at the folder of configurations every five seconds.
const SETTLE: Duration = Duration::from_secs(6);

/// Puts the CNI plugin and its configuration on the host.
#[derive(Parser, Clone, Debug)]
pub struct InstallerArgs {
    /// Name of the configuration.
    #[arg(long, env = "CNI_CONF_NAME", default_value = "10-coil.conflist")]
    pub cni_conf_name: String,
    /// Folder of configurations.
    #[arg(long, env = "CNI_ETC_DIR", default_value = "/host/etc/cni/net.d")]
    pub cni_etc_dir: PathBuf,
    /// Folder of plugins.
    #[arg(long, env = "CNI_BIN_DIR", default_value = "/host/opt/cni/bin")]
    pub cni_bin_dir: PathBuf,
    /// The plugin.
    #[arg(long, env = "COIL_PATH", default_value = "/usr/local/coil/coil")]
    pub coil_path: PathBuf,
    /// The configuration.
    #[arg(long, env = "CNI_NETCONF", default_value = "", hide_default_value = true)]
    pub cni_netconf: String,
    /// File that holds the configuration, if it is not given itself.
    #[arg(long, env = "CNI_NETCONF_FILE")]
    pub cni_netconf_file: Option<PathBuf>,
    /// Remove the configurations of others too: every file with `conflist` in its name.
    #[arg(long, env = "CNI_REMOVE_OTHERS", default_value_t = false, action = ArgAction::Set,
          num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub remove_others: bool,
    /// Time to wait until the kubelet has seen the configuration, in seconds.
    #[arg(long, env = "CNI_SETTLE_SECONDS", default_value_t = SETTLE.as_secs())]
    pub settle_seconds: u64,
    /// Left over from Coil v1; has no effect.
    #[arg(long, env = "COIL_BOOT_TAINT", hide = true)]
    pub coil_boot_taint: Option<String>,
}

/// Runs the installer.
pub async fn run(args: InstallerArgs) -> anyhow::Result<()> {
    let settle = Duration::from_secs(args.settle_seconds);
    tokio::task::spawn_blocking(move || install(&args)).await??;
    tokio::time::sleep(settle).await;
    Ok(())
}

/// Installs the plugin first, so that no configuration ever names a plugin that is not there.
fn install(args: &InstallerArgs) -> anyhow::Result<()> {
    let InstallerArgs {
        cni_conf_name,
        cni_etc_dir,
        cni_bin_dir,
        coil_path,
        cni_netconf,
        cni_netconf_file,
        remove_others,
        settle_seconds: _,
        coil_boot_taint: _,
    } = args;
    ensure!(
        Path::new(cni_conf_name).file_name() == Some(cni_conf_name.as_ref()),
        "CNI_CONF_NAME {cni_conf_name:?} is not the name of a file"
    );
    let config = match (cni_netconf.as_str(), cni_netconf_file) {
        ("", Some(path)) => {
            fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?
        }
        (text, _) => text.to_owned(),
    };
    ensure!(!config.trim().is_empty(), "there is no configuration: set CNI_NETCONF or CNI_NETCONF_FILE");
    serde_json::from_str::<serde_json::Value>(&config)
        .context("the configuration in CNI_NETCONF is not JSON")?;
    for folder in [cni_bin_dir, cni_etc_dir] {
        fs::create_dir_all(folder).with_context(|| format!("cannot create {}", folder.display()))?;
    }
    let plugin = cni_bin_dir.join("coil");
    replace(&plugin, 0o755, |file| {
        let mut source = File::open(coil_path)?;
        io::copy(&mut source, file).map(drop)
    })
    .with_context(|| format!("cannot copy {} to {}", coil_path.display(), plugin.display()))?;
    println!("installed {}", plugin.display());
    let path = cni_etc_dir.join(cni_conf_name);
    replace(&path, 0o644, |file| file.write_all(config.as_bytes()))
        .with_context(|| format!("cannot write {}", path.display()))?;
    println!("installed {}", path.display());
    if *remove_others {
        remove_conflists(cni_etc_dir, cni_conf_name)?;
    }
    Ok(())
}

/// Writes a file beside its place and moves it there.
fn replace(path: &Path, mode: u32, write: impl FnOnce(&mut File) -> io::Result<()>) -> io::Result<()> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    // Neither the kubelet nor a container runtime takes this for a configuration.
    let temporary = path.with_file_name(format!(".tmp-{name}-{}", std::process::id()));
    let result = (|| {
        let mut file = File::create(&temporary)?;
        write(&mut file)?;
        file.set_permissions(Permissions::from_mode(mode))?;
        file.sync_all()?;
        fs::rename(&temporary, path)
    })();
    if result.is_err()
        && let Err(error) = fs::remove_file(&temporary)
        && error.kind() != io::ErrorKind::NotFound
    {
        eprintln!("cannot remove {}: {error}", temporary.display());
    }
    result
}

fn remove_conflists(folder: &Path, ours: &str) -> anyhow::Result<()> {
    let list = || format!("cannot list {}", folder.display());
    for entry in fs::read_dir(folder).with_context(list)? {
        let entry = entry.with_context(list)?;
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if name == ours || !name.contains("conflist") || entry.file_type()?.is_dir() {
            continue;
        }
        fs::remove_file(entry.path()).with_context(|| format!("cannot remove {}", entry.path().display()))?;
        println!("removed {}", entry.path().display());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;

    struct Folder(PathBuf);

    impl Folder {
        fn new(name: &str) -> Self {
            let path = std::env::temp_dir().join(format!("coil-installer-{name}-{}", std::process::id()));
            fs::create_dir_all(path.join("etc")).unwrap();
            fs::write(path.join("plugin"), "binary").unwrap();
            fs::write(path.join("etc/05-other.conflist"), "{}").unwrap();
            fs::write(path.join("etc/06-other.conf"), "{}").unwrap();
            Self(path)
        }

        fn args(&self, extra: &[&str]) -> InstallerArgs {
            let path = |name: &str| self.0.join(name).display().to_string();
            let args = [
                "coil-installer".to_owned(),
                format!("--cni-etc-dir={}", path("etc")),
                format!("--cni-bin-dir={}", path("bin")),
                format!("--coil-path={}", path("plugin")),
            ];
            let extra = extra.iter().map(|arg| (*arg).to_owned());
            InstallerArgs::try_parse_from(args.into_iter().chain(extra)).unwrap()
        }

        fn names(&self, folder: &str) -> Vec<String> {
            let mut names: Vec<_> = fs::read_dir(self.0.join(folder))
                .unwrap()
                .map(|entry| entry.unwrap().file_name().into_string().unwrap())
                .collect();
            names.sort();
            names
        }
    }

    impl Drop for Folder {
        fn drop(&mut self) {
            if let Err(error) = fs::remove_dir_all(&self.0) {
                eprintln!("cannot remove {}: {error}", self.0.display());
            }
        }
    }

    #[test]
    fn installs_and_leaves_others_alone() {
        let folder = Folder::new("leave");
        install(&folder.args(&[r#"--cni-netconf={"name":"x"}"#])).unwrap();
        assert_eq!(folder.names("etc"), ["05-other.conflist", "06-other.conf", "10-coil.conflist"]);
        assert_eq!(folder.names("bin"), ["coil"]);
        let mode = fs::metadata(folder.0.join("bin/coil")).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o755);
    }

    #[test]
    fn removes_others_on_request() {
        let folder = Folder::new("remove");
        install(&folder.args(&[r#"--cni-netconf={"name":"x"}"#, "--remove-others"])).unwrap();
        assert_eq!(folder.names("etc"), ["06-other.conf", "10-coil.conflist"]);
    }

    #[test]
    fn a_bad_configuration_changes_nothing() {
        let folder = Folder::new("bad");
        for netconf in ["--cni-netconf=", "--cni-netconf={", "--cni-netconf-file=/nonexistent"] {
            assert!(install(&folder.args(&[netconf])).is_err(), "{netconf}");
        }
        assert_eq!(folder.names("etc"), ["05-other.conflist", "06-other.conf"]);
    }
}
