//! Server-side apply.

use serde_json::Value;

use crate::api::error::{ApiError, ApiResult};
use crate::api::registry::Resource;
use crate::api::write::WriteOptions;

/// The object after an apply.
pub fn apply(
    resource: &Resource,
    old: &Value,
    applied: &Value,
    options: &mut WriteOptions,
) -> ApiResult<Value> {
    let _ = (resource, old, applied, options);
    Err(ApiError::unsupported_media_type(&super::MEDIA_TYPES[..3]))
}
