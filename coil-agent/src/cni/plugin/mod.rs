//! The CNI plugin `coil`: reads a network configuration from standard input, asks `coild`, writes a
//! result to standard output. No decision is taken here.

mod config;
mod result;

use std::collections::{BTreeMap, HashMap};
use std::ffi::OsString;
use std::io::{Read, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::net::UnixStream;
use tonic::transport::{Endpoint, Uri};

use self::config::{NetConf, Version};
use super::error::{causes, detail};
use super::proto::cni_client::CniClient;
use super::proto::{CniArgs, ErrorCode};

/// Time for a call, as in the original.
const TIMEOUT: Duration = Duration::from_secs(60);
/// Code of STATUS when the plugin cannot serve ADD; new in CNI 1.1.0.
const NOT_AVAILABLE: u32 = 50;

/// A failure as the CNI specification wants it told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PluginError {
    code: u32,
    message: String,
    details: String,
}

impl PluginError {
    fn new(code: ErrorCode, message: impl Into<String>, details: impl Into<String>) -> Self {
        Self {
            code: u32::try_from(i32::from(code)).unwrap_or_default(),
            message: message.into(),
            details: details.into(),
        }
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

impl From<tonic::Status> for PluginError {
    fn from(status: tonic::Status) -> Self {
        if let Some(error) = detail(&status) {
            return Self {
                code: u32::try_from(error.code).unwrap_or_default(),
                message: error.msg,
                details: error.details,
            };
        }
        // Nobody listens, or the answer did not come in time: another attempt may find better luck.
        let retry = matches!(
            status.code(),
            tonic::Code::Unavailable | tonic::Code::DeadlineExceeded | tonic::Code::Cancelled
        );
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
    let mut input = Vec::new();
    let (output, version) = match std::io::stdin().lock().read_to_end(&mut input) {
        Ok(_) => run(&environment, &input),
        Err(error) => (
            Err(PluginError::new(
                ErrorCode::IoFailure,
                "failed to read the network configuration",
                error.to_string(),
            )),
            Version::NEWEST,
        ),
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
            let call = arguments(environment, config, input, true)?;
            let answer = call_coild(&config.socket, Method::Add(call))?;
            match &config.previous {
                Some(previous) => result::convert(previous, config.version).map(Some),
                None => {
                    let answer = serde_json::from_slice(&answer).map_err(|error| {
                        PluginError::new(
                            ErrorCode::DecodingFailure,
                            "failed to read the result of coild",
                            error.to_string(),
                        )
                    })?;
                    result::convert(&answer, config.version).map(Some)
                }
            }
        }
        "DEL" => {
            let call = arguments(environment, config, input, false)?;
            call_coild(&config.socket, Method::Del(call))?;
            Ok(None)
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
            let call = arguments(environment, config, input, true)?;
            call_coild(&config.socket, Method::Check(call))?;
            Ok(None)
        }
        // What a sandbox leaves behind is bound to its interface and goes with it.
        "GC" => needs(Version::V1_1_0).map(|()| None),
        "STATUS" => {
            needs(Version::V1_1_0)?;
            call_coild(&config.socket, Method::Connect)
                .map_err(|error| PluginError { code: NOT_AVAILABLE, ..error })?;
            Ok(None)
        }
        other => Err(invalid_environment(format!("unknown CNI_COMMAND {other:?}"))),
    }
}

/// Checks and gathers what `coild` wants to know.
fn arguments(
    environment: &Environment,
    config: &NetConf,
    input: &[u8],
    needs_netns: bool,
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
    let netns = if needs_netns { environment.required("CNI_NETNS")? } else { environment.get("CNI_NETNS") };
    let mut args = pod_arguments(environment.get("CNI_ARGS"))?;
    let chained = config.previous.is_some();
    args.insert("IS_CHAINED".into(), chained.to_string());
    let (ips, interfaces) = match &config.previous {
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

/// The keys of `CNI_ARGS` that matter.
fn pod_arguments(text: &str) -> Result<HashMap<String, String>, PluginError> {
    const KEYS: [&str; 3] = ["K8S_POD_NAMESPACE", "K8S_POD_NAME", "K8S_POD_INFRA_CONTAINER_ID"];
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

enum Method {
    Add(CniArgs),
    Del(CniArgs),
    Check(CniArgs),
    Connect,
}

fn call_coild(socket: &str, method: Method) -> Result<Vec<u8>, PluginError> {
    let unavailable =
        |details: String| PluginError::new(ErrorCode::TryAgainLater, "failed to connect to coild", details);
    let internal = |error: &(dyn std::error::Error + 'static)| {
        PluginError::new(ErrorCode::Internal, "failed to call coild", causes(error))
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| internal(&error))?;
    runtime.block_on(async {
        let path = PathBuf::from(socket);
        let connector = tower::service_fn(move |_: Uri| {
            let path = path.clone();
            async move { UnixStream::connect(path).await.map(TokioIo::new) }
        });
        // The address is not used: the connector knows the socket.
        let endpoint = Endpoint::from_static("http://coild").timeout(TIMEOUT);
        let channel = endpoint
            .connect_with_connector(connector)
            .await
            .map_err(|error| unavailable(format!("{socket}: {}", causes(&error))))?;
        let mut client = CniClient::new(channel);
        let request = |args| {
            let mut request = tonic::Request::new(args);
            request.set_timeout(TIMEOUT);
            request
        };
        match method {
            Method::Add(args) => Ok(client.add(request(args)).await?.into_inner().result),
            Method::Del(args) => {
                client.del(request(args)).await?;
                Ok(Vec::new())
            }
            Method::Check(args) => {
                client.check(request(args)).await?;
                Ok(Vec::new())
            }
            Method::Connect => Ok(Vec::new()),
        }
    })
}

#[cfg(test)]
mod tests;
