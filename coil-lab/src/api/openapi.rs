//! OpenAPI documents.

use std::sync::Arc;

use axum::response::Response;

use super::error::ApiResult;
use super::request::Request;
use super::server::ApiServer;

/// Documents made so far.
#[derive(Debug, Default)]
pub struct Cache {}

impl Cache {
    /// Forgets all documents.
    pub fn forget(&self) {}
}

/// The answer for an OpenAPI path; none for other paths.
pub fn respond(
    _server: &Arc<ApiServer>,
    _path: &str,
    _request: &Request,
    _headers: &axum::http::HeaderMap,
) -> ApiResult<Option<Response>> {
    Ok(None)
}
