//! The CNI plugin `coil`: reads a network configuration from standard input, asks `coild`, writes a
//! result to standard output. No decision is taken here.

mod client;
mod config;
mod result;

use std::collections::{BTreeMap, HashMap};
use std::ffi::OsString;
use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::MetadataExt;
use std::process::ExitCode;

use serde_json::{Value, json};

use self::client::Method;
use self::config::{NetConf, Version};
use super::error::{causes, detail};
use super::proto::{CniArgs, ErrorCode, GcArgs, StatusArgs};

/// No configuration is longer; what `coild` takes in one message is.
const MAX_INPUT: u64 = 2 << 20;

/// The key of `CNI_ARGS` for a pod's namespace.
const NAMESPACE: &str = "K8S_POD_NAMESPACE";

/// A failure as the CNI specification wants it told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PluginError {
    code: u32,
    message: String,
    details: String,
}

impl PluginError {
    fn new(code: ErrorCode, message: impl Into<String>, details: impl Into<String>) -> Self {
        Self { code: number(code), message: message.into(), details: details.into() }
    }

    /// Code of the CNI specification.
    #[must_use]
    pub fn code(&self) -> u32 {
        self.code
    }

    fn to_json(&self, version: Version) -> Value {
        let mut object = json!({
            "cniVersion": version.as_str(),
            "code": self.code,
            "msg": self.message,
        });
        if !self.details.is_empty() {
            object["details"] = Value::from(self.details.clone());
        }
        object
    }
}

fn number(code: ErrorCode) -> u32 {
    u32::try_from(i32::from(code)).unwrap_or_default()
}

impl From<tonic::Status> for PluginError {
    fn from(status: tonic::Status) -> Self {
        if let Some(error) = detail(&status) {
            return Self {
                code: u32::try_from(error.code).unwrap_or_default(),
                message: error.msg,
                details: error.details,
            };
        }
        // Nobody listens, or the answer did not come in time: another attempt may find better luck. What coild
        // answers has no source; what has one is a connection that broke, as when coild is killed.
        let retry = matches!(
            status.code(),
            tonic::Code::Unavailable | tonic::Code::DeadlineExceeded | tonic::Code::Cancelled
        ) || std::error::Error::source(&status).is_some();
        let code = if retry { ErrorCode::TryAgainLater } else { ErrorCode::Internal };
        Self::new(code, "failed to call coild", causes(&status))
    }
}

/// What the runtime passes in the environment.
#[derive(Clone, Debug, Default)]
pub struct Environment {
    /// Variables that begin with `CNI_`.
    pub variables: BTreeMap<String, String>,
}

impl Environment {
    /// Of this process.
    #[must_use]
    pub fn of_process() -> Self {
        let variables = std::env::vars_os()
            .filter_map(|(key, value)| Some((key.into_string().ok()?, value.into_string().ok()?)))
            .filter(|(key, _)| key.starts_with("CNI_"))
            .collect();
        Self { variables }
    }

    fn get(&self, key: &str) -> &str {
        self.variables.get(key).map_or("", String::as_str)
    }

    /// A variable that says yes, as the reference plugins read it.
    fn is_set(&self, key: &str) -> bool {
        let value = self.get(key);
        value == "1" || value.eq_ignore_ascii_case("true")
    }

    fn required(&self, key: &'static str) -> Result<&str, PluginError> {
        let value = self.get(key);
        if value.is_empty() {
            return Err(invalid_environment(format!("{key} is missing")));
        }
        Ok(value)
    }
}

fn invalid_environment(details: String) -> PluginError {
    PluginError::new(ErrorCode::InvalidEnvironmentVariables, "invalid environment", details)
}

/// Runs the plugin with the environment and standard streams of this process.
#[must_use]
pub fn main_with(args: &[OsString]) -> ExitCode {
    let environment = Environment::of_process();
    if environment.get("CNI_COMMAND").is_empty() {
        let version = coil_runtime::cli::version();
        if args.get(1).is_some_and(|arg| arg == "--version") {
            println!("coil {version}");
        } else {
            eprintln!(
                "coil {version}: CNI plugin of Coil; CNI protocol versions supported: {}",
                Version::ALL.map(Version::as_str).join(", ")
            );
        }
        return ExitCode::SUCCESS;
    }
    const UNREADABLE: &str = "failed to read the network configuration";
    let mut input = Vec::new();
    let (output, version) = match std::io::stdin().lock().take(MAX_INPUT + 1).read_to_end(&mut input) {
        Ok(length) if u64::try_from(length).is_ok_and(|length| length <= MAX_INPUT) => {
            run(&environment, &input)
        }
        Ok(_) => {
            let details = format!("it is longer than {MAX_INPUT} bytes");
            (Err(PluginError::new(ErrorCode::DecodingFailure, UNREADABLE, details)), Version::NEWEST)
        }
        Err(error) => {
            (Err(PluginError::new(ErrorCode::IoFailure, UNREADABLE, error.to_string())), Version::NEWEST)
        }
    };
    let (text, status) = match output {
        Ok(None) => (None, ExitCode::SUCCESS),
        Ok(Some(result)) => (Some(result), ExitCode::SUCCESS),
        Err(error) => (Some(error.to_json(version)), ExitCode::FAILURE),
    };
    if let Some(text) = text
        && writeln!(std::io::stdout().lock(), "{text}").is_err()
    {
        return ExitCode::FAILURE;
    }
    status
}

/// What a run prints on standard output, and the version that an error is told in.
pub fn run(environment: &Environment, input: &[u8]) -> (Result<Option<Value>, PluginError>, Version) {
    let command = environment.get("CNI_COMMAND");
    if command == "VERSION" {
        return (Ok(Some(config::versions(input))), Version::NEWEST);
    }
    let config = match NetConf::parse(input) {
        Ok(config) => config,
        Err(error) => return (Err(error), Version::NEWEST),
    };
    (execute(environment, command, &config, input), config.version)
}

fn execute(
    environment: &Environment,
    command: &str,
    config: &NetConf,
    input: &[u8],
) -> Result<Option<Value>, PluginError> {
    let needs = |version: Version| {
        if config.version < version {
            return Err(PluginError::new(
                ErrorCode::IncompatibleCniVersion,
                format!("{command} is not part of this version"),
                format!("it needs CNI {}", version.as_str()),
            ));
        }
        Ok(())
    };
    match command {
        "ADD" => {
            let call = arguments(environment, config, input, Call::Add)?;
            let answer = client::call(&config.socket, Method::Add(call))?;
            let result = match &config.previous {
                Some(previous) => result::convert(previous, config.version)?,
                None => result::of_coild(&answer, config.version)?,
            };
            Ok(Some(result))
        }
        "DEL" => {
            let call = arguments(environment, config, input, Call::Del)?;
            client::call(&config.socket, Method::Del(call)).map(|_| None)
        }
        "CHECK" => {
            needs(Version::V0_4_0)?;
            if config.previous.is_none() {
                return Err(PluginError::new(
                    ErrorCode::InvalidNetworkConfig,
                    "invalid network configuration",
                    "CHECK needs prevResult",
                ));
            }
            let call = arguments(environment, config, input, Call::Check)?;
            client::call(&config.socket, Method::Check(call)).map(|_| None)
        }
        "GC" => {
            needs(Version::V1_1_0)?;
            let call = GcArgs { valid_attachments: config::attachments(input)?, stdin_data: input.to_vec() };
            client::call(&config.socket, Method::Gc(call)).map(|_| None)
        }
        "STATUS" => {
            needs(Version::V1_1_0)?;
            let call = StatusArgs { stdin_data: input.to_vec() };
            client::call(&config.socket, Method::Status(call)).map(|_| None).map_err(unserved)
        }
        other => Err(invalid_environment(format!("unknown CNI_COMMAND {other:?}"))),
    }
}

/// STATUS has codes of its own for "ADD cannot be served"; that of `coild`, if it gave one, stands.
fn unserved(error: PluginError) -> PluginError {
    let limited = number(ErrorCode::LimitedConnectivity);
    let code = if error.code == limited { limited } else { number(ErrorCode::PluginNotAvailable) };
    PluginError { code, ..error }
}

/// Commands about one container.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Call {
    Add,
    Del,
    Check,
}

/// Checks and gathers what `coild` wants to know.
fn arguments(
    environment: &Environment,
    config: &NetConf,
    input: &[u8],
    command: Call,
) -> Result<CniArgs, PluginError> {
    let container = environment.required("CNI_CONTAINERID")?;
    if !config::is_identifier(container) {
        return Err(invalid_environment(format!(
            "CNI_CONTAINERID {container:?} has characters that are not allowed"
        )));
    }
    let ifname = environment.required("CNI_IFNAME")?;
    if !config::is_interface_name(ifname) {
        return Err(invalid_environment(format!("CNI_IFNAME {ifname:?} is not the name of an interface")));
    }
    // What is left of a container must go although its name space has.
    let netns = if command == Call::Del {
        environment.get("CNI_NETNS")
    } else {
        environment.required("CNI_NETNS")?
    };
    if command == Call::Add && is_own_netns(netns) && !environment.is_set("CNI_NETNS_OVERRIDE") {
        return Err(PluginError::new(
            ErrorCode::InvalidNetns,
            "invalid network namespace",
            format!("CNI_NETNS {netns:?} is the one that the plugin runs in"),
        ));
    }
    let mut args = pod_arguments(environment.get("CNI_ARGS"))?;
    let chained = config.previous.is_some();
    // Podman, for one, names containers but knows no namespaces.
    if let Some(namespace) = &config.pod_namespace
        && args.get(NAMESPACE).is_none_or(String::is_empty)
    {
        args.insert(NAMESPACE.into(), namespace.clone());
    }
    args.insert("IS_CHAINED".into(), chained.to_string());
    let (ips, interfaces) = match &config.previous {
        // Nor for want of a result that makes sense.
        Some(previous) if command == Call::Del => {
            (result::addresses(previous).unwrap_or_default(), result::interfaces(previous))
        }
        Some(previous) => (result::addresses(previous)?, result::interfaces(previous)),
        None => (Vec::new(), HashMap::new()),
    };
    Ok(CniArgs {
        container_id: container.into(),
        netns: netns.into(),
        ifname: ifname.into(),
        args,
        path: environment.get("CNI_PATH").into(),
        stdin_data: input.to_vec(),
        ips,
        interfaces,
    })
}

/// Whether a path leads to the network name space of this process.
fn is_own_netns(path: &str) -> bool {
    let identity = |path: &str| fs::metadata(path).ok().map(|meta| (meta.dev(), meta.ino()));
    let own = identity("/proc/self/ns/net");
    own.is_some() && own == identity(path)
}

/// The keys of `CNI_ARGS` that matter. Others are ignored, with and without `IgnoreUnknown`: they may be
/// meant for other plugins of the list.
fn pod_arguments(text: &str) -> Result<HashMap<String, String>, PluginError> {
    const KEYS: [&str; 3] = [NAMESPACE, "K8S_POD_NAME", "K8S_POD_INFRA_CONTAINER_ID"];
    let mut args = HashMap::new();
    for pair in text.split(';').filter(|pair| !pair.is_empty()) {
        let Some((key, value)) = pair.split_once('=') else {
            return Err(PluginError::new(
                ErrorCode::InvalidEnvironmentVariables,
                "failed to load CNI_ARGS",
                format!("{pair:?} is not a key and a value"),
            ));
        };
        if KEYS.contains(&key) {
            args.insert(key.into(), value.into());
        }
    }
    Ok(args)
}

#[cfg(test)]
mod properties;
#[cfg(test)]
mod tests;
