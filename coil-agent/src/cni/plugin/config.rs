//! The network configuration that the runtime passes to a plugin.

use serde_json::{Value, json};

use super::PluginError;
use crate::cni::proto::{Attachment, ErrorCode};

/// Where `coild` listens unless the configuration says otherwise.
const DEFAULT_SOCKET: &str = "/run/coild.sock";

/// Versions of the CNI specification.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Version {
    /// 0.3.1
    V0_3_1,
    /// 0.4.0
    V0_4_0,
    /// 1.0.0
    V1_0_0,
    /// 1.1.0
    V1_1_0,
}

impl Version {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::V0_3_1, Self::V0_4_0, Self::V1_0_0, Self::V1_1_0];
    /// The newest.
    pub const NEWEST: Self = Self::V1_1_0;

    /// As it is written.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::V0_3_1 => "0.3.1",
            Self::V0_4_0 => "0.4.0",
            Self::V1_0_0 => "1.0.0",
            Self::V1_1_0 => "1.1.0",
        }
    }

    fn parse(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|version| version.as_str() == text)
    }
}

/// A network configuration.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct NetConf {
    pub(super) version: Version,
    pub(super) socket: String,
    pub(super) previous: Option<Value>,
    /// Namespace of pods of a runtime that names none.
    pub(super) pod_namespace: Option<String>,
}

impl NetConf {
    pub(super) fn parse(input: &[u8]) -> Result<Self, PluginError> {
        const MESSAGE: &str = "invalid network configuration";
        let config: Value = serde_json::from_slice(input)
            .map_err(|error| PluginError::new(ErrorCode::DecodingFailure, MESSAGE, error.to_string()))?;
        let invalid = |details: String| PluginError::new(ErrorCode::InvalidNetworkConfig, MESSAGE, details);
        let Some(config) = config.as_object() else {
            return Err(invalid("it is not an object".into()));
        };
        let text = |key: &str| match config.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::String(text)) => Ok(Some(text.as_str())),
            Some(_) => Err(invalid(format!("{key} is not a string"))),
        };
        // A configuration without a version is one of 0.1.0.
        let version = text("cniVersion")?.unwrap_or("0.1.0");
        let version = Version::parse(version).ok_or_else(|| {
            PluginError::new(
                ErrorCode::IncompatibleCniVersion,
                "incompatible CNI versions",
                format!(
                    "config is {version:?}, plugin supports {}",
                    Version::ALL.map(Version::as_str).join(", ")
                ),
            )
        })?;
        match text("name")? {
            None | Some("") => return Err(invalid("name is missing".into())),
            Some(name) if !is_identifier(name) => {
                return Err(invalid(format!("name {name:?} has characters that are not allowed")));
            }
            Some(_) => {}
        }
        let socket = text("socket")?.filter(|socket| !socket.is_empty());
        let previous = match config.get("prevResult") {
            None | Some(Value::Null) => None,
            Some(previous) if previous.is_object() => Some(previous.clone()),
            Some(_) => return Err(invalid("prevResult is not an object".into())),
        };
        let pod_namespace = text("podNamespace")?.filter(|name| !name.is_empty()).map(str::to_owned);
        Ok(Self { version, socket: socket.unwrap_or(DEFAULT_SOCKET).to_owned(), previous, pod_namespace })
    }
}

/// The attachments that GC must leave alone.
///
/// A list that is not there is a mistake: taken for an empty one it would cost all pods their network.
/// `null` is what libcni writes for an empty list.
pub(super) fn attachments(input: &[u8]) -> Result<Vec<Attachment>, PluginError> {
    const KEY: &str = "cni.dev/valid-attachments";
    let invalid = |details: String| {
        PluginError::new(ErrorCode::InvalidNetworkConfig, "invalid network configuration", details)
    };
    let config: Value = serde_json::from_slice(input).map_err(|error| {
        PluginError::new(ErrorCode::DecodingFailure, "invalid network configuration", error.to_string())
    })?;
    let entries = match config.get(KEY) {
        None => return Err(invalid(format!("GC needs {KEY}"))),
        Some(Value::Null) => &[][..],
        Some(Value::Array(entries)) => entries,
        Some(_) => return Err(invalid(format!("{KEY} is not a list"))),
    };
    let text = |entry: &Value, key: &str| {
        let text = entry.get(key).and_then(Value::as_str).unwrap_or_default();
        if text.is_empty() {
            return Err(invalid(format!("an entry of {KEY} has no {key}")));
        }
        Ok(text.to_owned())
    };
    entries
        .iter()
        .map(|entry| {
            Ok(Attachment { container_id: text(entry, "containerID")?, ifname: text(entry, "ifname")? })
        })
        .collect()
}

/// Answer to VERSION, in the version that was asked in.
pub(super) fn versions(input: &[u8]) -> Value {
    let asked = serde_json::from_slice::<Value>(input).ok();
    let asked = asked.as_ref().and_then(|config| config.get("cniVersion"));
    let version = asked.and_then(Value::as_str).unwrap_or(Version::NEWEST.as_str());
    json!({
        "cniVersion": version,
        "supportedVersions": Version::ALL.map(Version::as_str),
    })
}

/// Names of containers and networks.
pub(super) fn is_identifier(text: &str) -> bool {
    text.bytes().next().is_some_and(|b| b.is_ascii_alphanumeric())
        && text.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.' | b'-'))
}

/// Names of interfaces as the kernel takes them.
pub(super) fn is_interface_name(text: &str) -> bool {
    !text.is_empty()
        && text.len() < libc::IFNAMSIZ
        && text != "."
        && text != ".."
        && !text.contains(|c: char| c == '/' || c == ':' || c.is_whitespace())
}
