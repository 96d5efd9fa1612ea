//! The four patch types.

pub mod apply;
pub mod fieldset;
pub mod managed;
pub mod merge;
pub mod strategic;

use serde_json::Value;

use super::error::{ApiError, ApiResult};
use super::registry::Resource;
use super::request;
use super::write::{self, WriteOptions};

/// A parsed patch.
#[derive(Debug, Clone)]
pub enum Patch {
    /// RFC 6902.
    Json(json_patch::Patch),
    /// RFC 7386.
    Merge(Value),
    /// Kubernetes' own.
    Strategic(Value),
    /// Server-side apply.
    Apply(Value),
}

/// Media types of patches.
pub const MEDIA_TYPES: [&str; 4] = [
    "application/json-patch+json",
    "application/merge-patch+json",
    "application/strategic-merge-patch+json",
    "application/apply-patch+yaml",
];

impl Patch {
    /// Parses a body by its content type.
    pub fn parse(
        resource: &Resource,
        content_type: &str,
        bytes: &[u8],
        options: &mut WriteOptions,
    ) -> ApiResult<Self> {
        let mut json = |content_type: &str| -> ApiResult<Value> {
            let body = request::parse_body(content_type, bytes)?;
            let repeated = body.duplicates.iter().map(|path| format!("duplicate field \"{path}\""));
            write::report_unknown(repeated, options)?;
            Ok(body.value)
        };
        match content_type {
            "application/json-patch+json" => serde_json::from_value(json("application/json")?)
                .map(Self::Json)
                .map_err(|error| ApiError::bad_request(format!("error decoding patch: {error}"))),
            "application/merge-patch+json" => Ok(Self::Merge(object(json("application/json")?)?)),
            "application/strategic-merge-patch+json" if !resource.custom => {
                Ok(Self::Strategic(object(json("application/json")?)?))
            }
            "application/strategic-merge-patch+json" => {
                Err(ApiError::unsupported_media_type(&[MEDIA_TYPES[0], MEDIA_TYPES[1], MEDIA_TYPES[3]]))
            }
            "application/apply-patch+yaml" => {
                let value = match json("application/json") {
                    Ok(value) => value,
                    Err(error) if error.message.starts_with("strict") => return Err(error),
                    Err(_) => request::parse_yaml(bytes)?,
                };
                Ok(Self::Apply(object(value)?))
            }
            _ => Err(ApiError::unsupported_media_type(&MEDIA_TYPES)),
        }
    }
}

fn object(value: Value) -> ApiResult<Value> {
    if value.is_object() { Ok(value) } else { Err(ApiError::bad_request("the patch is not a JSON object")) }
}

/// The object after a patch.
pub fn apply_patch(
    resource: &Resource,
    old: &Value,
    patch: &Patch,
    options: &mut WriteOptions,
) -> ApiResult<Value> {
    match patch {
        Patch::Json(patch) => {
            let mut new = old.clone();
            json_patch::patch(&mut new, patch).map_err(|error| {
                let mut failure = ApiError::bad_request(format!(
                    "the server rejected our request due to an error in our request: {error}"
                ));
                failure.code = 422;
                failure.reason = "Invalid";
                failure
            })?;
            Ok(new)
        }
        Patch::Merge(patch) => {
            let mut new = old.clone();
            merge::apply(&mut new, patch);
            Ok(new)
        }
        Patch::Strategic(patch) => {
            let mut new = old.clone();
            strategic::apply(&resource.schema, &mut new, patch)
                .map_err(|error| ApiError::bad_request(error.to_string()))?;
            Ok(new)
        }
        Patch::Apply(applied) => apply::apply(resource, old, applied, options),
    }
}
