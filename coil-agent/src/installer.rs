//! Installs the CNI plugin and its configuration, each file at once or not at all.

use std::fs::{self, File, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use clap::{ArgAction, Parser};
use serde_json::{Value, json};

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
    /// If no configuration is given, take the first one of another CNI plugin and chain coil into it.
    #[arg(long, env = "CNI_CHAIN", default_value_t = false, action = ArgAction::Set,
          num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub chain: bool,
    /// Socket of coild in a chained configuration.
    #[arg(long, env = "COIL_SOCKET", default_value = "/run/coild.sock")]
    pub socket: String,
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
        chain,
        socket,
        remove_others,
        settle_seconds: _,
        coil_boot_taint: _,
    } = args;
    ensure!(
        Path::new(cni_conf_name).file_name() == Some(cni_conf_name.as_ref()),
        "CNI_CONF_NAME {cni_conf_name:?} is not the name of a file"
    );
    let config = match cni_netconf_file {
        _ if !cni_netconf.trim().is_empty() => cni_netconf.clone(),
        Some(path) => fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?,
        None if *chain => chained(cni_etc_dir, cni_conf_name, socket)?,
        None => bail!("there is no configuration: set CNI_NETCONF, CNI_NETCONF_FILE or CNI_CHAIN"),
    };
    check(&config).context("the configuration cannot be used")?;
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

/// Whether a runtime could use a configuration at all. One that it cannot would leave the node without a
/// network, which is found out only when the next pod starts.
fn check(config: &str) -> anyhow::Result<()> {
    let config: Value = serde_json::from_str(config).context("it is not JSON")?;
    let is_text = |value: &Value, key: &str| {
        value.get(key).and_then(Value::as_str).is_some_and(|text| !text.is_empty())
    };
    ensure!(is_text(&config, "name"), "it has no name");
    match config.get("plugins") {
        Some(plugins) => {
            let plugins = plugins.as_array().context("its plugins are not a list")?;
            ensure!(!plugins.is_empty(), "it has no plugins");
            ensure!(plugins.iter().all(|plugin| is_text(plugin, "type")), "a plugin has no type");
        }
        // A configuration of one plugin.
        None => ensure!(is_text(&config, "type"), "it has neither plugins nor a type"),
    }
    Ok(())
}

/// The first configuration of others with coil behind the plugin that makes the interface. Chaining is
/// done by copy: what others change later is seen when the installer runs again.
fn chained(folder: &Path, ours: &str, socket: &str) -> anyhow::Result<String> {
    let list = || format!("cannot list {}", folder.display());
    let mut names = Vec::new();
    for entry in fs::read_dir(folder).with_context(list)? {
        let name = entry.with_context(list)?.file_name().to_string_lossy().into_owned();
        if name != ours && (name.ends_with(".conflist") || name.ends_with(".conf")) {
            names.push(name);
        }
    }
    names.sort();
    let Some(name) = names.first() else {
        bail!("there is no configuration of another CNI plugin in {} yet", folder.display());
    };
    let path = folder.join(name);
    let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let config =
        chain_into(&text, socket).with_context(|| format!("cannot chain into {}", path.display()))?;
    println!("chaining into {}", path.display());
    Ok(config)
}

fn chain_into(text: &str, socket: &str) -> anyhow::Result<String> {
    let mut config: Value = serde_json::from_str(text).context("it is not JSON")?;
    if config.get("plugins").is_none() {
        // A configuration of one plugin: a list is made of it.
        let plugin = config;
        config = json!({
            "cniVersion": plugin.get("cniVersion"),
            "name": plugin.get("name"),
            "plugins": [plugin],
        });
    }
    let plugins = config.get_mut("plugins").and_then(Value::as_array_mut).context("it has no plugins")?;
    ensure!(!plugins.is_empty(), "it has no plugins");
    let coil = json!({"type": "coil", "socket": socket});
    plugins.retain(|plugin| plugin.get("type").and_then(Value::as_str) != Some("coil"));
    // Before port mappings and the like: they are of no use to a pod whose policy does not hold.
    plugins.insert(1.min(plugins.len()), coil);
    Ok(serde_json::to_string_pretty(&config)?)
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
        fs::rename(&temporary, path)?;
        // The name, too, must survive a node that loses its power now.
        match path.parent() {
            Some(folder) => File::open(folder)?.sync_all(),
            None => Ok(()),
        }
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

    const LIST: &str = r#"--cni-netconf={"name": "x", "plugins": [{"type": "coil"}]}"#;

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
        install(&folder.args(&[LIST])).unwrap();
        assert_eq!(folder.names("etc"), ["05-other.conflist", "06-other.conf", "10-coil.conflist"]);
        assert_eq!(folder.names("bin"), ["coil"]);
        let mode = fs::metadata(folder.0.join("bin/coil")).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o755);
    }

    #[test]
    fn removes_others_on_request() {
        let folder = Folder::new("remove");
        install(&folder.args(&[LIST, "--remove-others"])).unwrap();
        assert_eq!(folder.names("etc"), ["06-other.conf", "10-coil.conflist"]);
    }

    #[test]
    fn chains_behind_the_first_plugin_of_others() {
        let folder = Folder::new("chain");
        let other =
            r#"{"cniVersion": "0.3.1", "name": "n", "plugins": [{"type": "ptp"}, {"type": "portmap"}]}"#;
        fs::write(folder.0.join("etc/05-other.conflist"), other).unwrap();
        // The second time our own list is there too, and is not what we chain into.
        for _ in 0..2 {
            install(&folder.args(&["--chain", "--cni-conf-name=01-coil.conflist"])).unwrap();
            let text = fs::read_to_string(folder.0.join("etc/01-coil.conflist")).unwrap();
            let config: Value = serde_json::from_str(&text).unwrap();
            let types: Vec<_> =
                config["plugins"].as_array().unwrap().iter().map(|plugin| plugin["type"].clone()).collect();
            assert_eq!(types, ["ptp", "coil", "portmap"]);
            assert_eq!((&config["cniVersion"], &config["name"]), (&json!("0.3.1"), &json!("n")));
        }
        let single = chain_into(r#"{"cniVersion": "1.0.0", "name": "n", "type": "bridge"}"#, "/s").unwrap();
        let single: Value = serde_json::from_str(&single).unwrap();
        assert_eq!(single["plugins"][1], json!({"type": "coil", "socket": "/s"}));
        assert!(chain_into(r#"{"plugins": []}"#, "/s").is_err());
    }

    #[test]
    fn a_bad_configuration_changes_nothing() {
        let folder = Folder::new("bad");
        for netconf in [
            "--cni-netconf=",
            "--cni-netconf={",
            "--cni-netconf=[]",
            r#"--cni-netconf={"plugins": [{"type": "coil"}]}"#,
            r#"--cni-netconf={"name": "x"}"#,
            r#"--cni-netconf={"name": "x", "plugins": []}"#,
            r#"--cni-netconf={"name": "x", "plugins": [{"socket": "/s"}]}"#,
            "--cni-netconf-file=/nonexistent",
        ] {
            assert!(install(&folder.args(&[netconf])).is_err(), "{netconf}");
        }
        assert_eq!(folder.names("etc"), ["05-other.conflist", "06-other.conf"]);
    }

    #[test]
    fn what_cannot_be_written_leaves_what_was_there() {
        let folder = Folder::new("keep");
        install(&folder.args(&[LIST])).unwrap();
        // The plugin cannot be read: neither it nor the configuration changes, and nothing is left over.
        fs::remove_file(folder.0.join("plugin")).unwrap();
        let other = r#"--cni-netconf={"name": "y", "type": "coil"}"#;
        assert!(install(&folder.args(&[other])).is_err());
        assert_eq!(fs::read_to_string(folder.0.join("bin/coil")).unwrap(), "binary");
        assert!(fs::read_to_string(folder.0.join("etc/10-coil.conflist")).unwrap().contains(r#""x""#));
        assert_eq!(folder.names("bin"), ["coil"]);
        // A plugin that is running is replaced, not written over.
        fs::write(folder.0.join("plugin"), "newer").unwrap();
        let running = File::open(folder.0.join("bin/coil")).unwrap();
        install(&folder.args(&[other])).unwrap();
        assert_eq!(io::read_to_string(running).unwrap(), "binary");
        assert_eq!(fs::read_to_string(folder.0.join("bin/coil")).unwrap(), "newer");
    }

    /// Flags stand for them in the other tests: the environment is the whole process's.
    #[test]
    fn variables_of_the_original_are_known() {
        let known: Vec<_> = <InstallerArgs as clap::CommandFactory>::command()
            .get_arguments()
            .filter_map(|arg| arg.get_env().map(|env| env.to_string_lossy().into_owned()))
            .collect();
        for name in [
            "CNI_CONF_NAME",
            "CNI_ETC_DIR",
            "CNI_BIN_DIR",
            "COIL_PATH",
            "CNI_NETCONF",
            "CNI_NETCONF_FILE",
            "COIL_BOOT_TAINT",
            "CNI_REMOVE_OTHERS",
        ] {
            assert!(known.iter().any(|env| env == name), "{name}");
        }
    }
}
