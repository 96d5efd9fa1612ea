//! Results of plugins in the versions of the CNI specification. Whatever is not understood is passed on
//! as it is.

use std::collections::HashMap;

use ipnet::IpNet;
use serde_json::{Map, Value};

use super::PluginError;
use super::config::Version;
use crate::cni::proto::ErrorCode;

/// Fields that only some versions know: where, name, first version.
const NEWER_FIELDS: [(&str, &str, Version); 8] = [
    ("interfaces", "mtu", Version::V1_1_0),
    ("interfaces", "socketPath", Version::V1_1_0),
    ("interfaces", "pciID", Version::V1_1_0),
    ("routes", "mtu", Version::V1_1_0),
    ("routes", "advmss", Version::V1_1_0),
    ("routes", "priority", Version::V1_1_0),
    ("routes", "table", Version::V1_1_0),
    ("routes", "scope", Version::V1_1_0),
];

/// What `coild` answered to ADD, in the version of the configuration.
pub(super) fn of_coild(answer: &[u8], version: Version) -> Result<Value, PluginError> {
    let unreadable = |details: String| {
        PluginError::new(ErrorCode::DecodingFailure, "failed to read the result of coild", details)
    };
    let answer: Value = serde_json::from_slice(answer).map_err(|error| unreadable(error.to_string()))?;
    convert(&answer, version).map_err(|error| unreadable(error.details))
}

/// The result in another version.
pub(super) fn convert(result: &Value, version: Version) -> Result<Value, PluginError> {
    let mut result = object(result)?.clone();
    for (list, field, since) in NEWER_FIELDS {
        if version < since {
            for entry in entries(&mut result, list) {
                entry.remove(field);
            }
        }
    }
    for entry in entries(&mut result, "ips") {
        if version >= Version::V1_0_0 {
            entry.remove("version");
        } else if !entry.contains_key("version") {
            let address = entry.get("address").and_then(Value::as_str);
            let family = match address.and_then(|text| text.parse::<IpNet>().ok()) {
                Some(IpNet::V4(_)) => "4",
                Some(IpNet::V6(_)) => "6",
                None => continue,
            };
            entry.insert("version".into(), Value::from(family));
        }
    }
    result.insert("cniVersion".into(), Value::from(version.as_str()));
    Ok(Value::Object(result))
}

/// Addresses of a result, without prefix length.
pub(super) fn addresses(result: &Value) -> Result<Vec<String>, PluginError> {
    let ips = object(result)?.get("ips").and_then(Value::as_array);
    ips.into_iter()
        .flatten()
        .map(|entry| {
            let text = entry.get("address").and_then(Value::as_str).unwrap_or_default();
            text.parse::<IpNet>()
                .map(|net| net.addr().to_string())
                .map_err(|_| invalid(format!("address {text:?} is not an address with a prefix length")))
        })
        .collect()
}

/// Interfaces of a result: name to "is inside a sandbox".
pub(super) fn interfaces(result: &Value) -> HashMap<String, bool> {
    let interfaces = result.get("interfaces").and_then(Value::as_array);
    interfaces
        .into_iter()
        .flatten()
        .filter_map(|entry| {
            let name = entry.get("name")?.as_str()?.to_owned();
            let sandbox = entry.get("sandbox").and_then(Value::as_str).unwrap_or_default();
            Some((name, !sandbox.is_empty()))
        })
        .collect()
}

fn object(result: &Value) -> Result<&Map<String, Value>, PluginError> {
    result.as_object().ok_or_else(|| invalid("it is not an object".into()))
}

fn entries<'a>(
    result: &'a mut Map<String, Value>,
    list: &str,
) -> impl Iterator<Item = &'a mut Map<String, Value>> {
    result.get_mut(list).and_then(Value::as_array_mut).into_iter().flatten().filter_map(Value::as_object_mut)
}

fn invalid(details: String) -> PluginError {
    PluginError::new(ErrorCode::InvalidNetworkConfig, "invalid previous result", details)
}
