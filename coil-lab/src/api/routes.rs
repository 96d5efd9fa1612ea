//! HTTP: turns requests into calls and results into responses. One handler for all paths, since which resources exist
//! changes while the server runs.

use std::convert::Infallible;
use std::sync::Arc;

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::{Request as HttpRequest, State};
use axum::http::{HeaderValue, Method, StatusCode, header};
use axum::response::Response;
use serde_json::{Value, json};

use super::delete::{DeleteOptions, Deleted};
use super::error::{ApiError, ApiResult};
use super::patch::{MEDIA_TYPES, Patch};
use super::read::{self, Selection};
use super::registry::Resource;
use super::request::{self, Request, Target};
use super::server::ApiServer;
use super::subresource::{self, ScaleChange};
use super::table::{self, Include};
use super::watch::{Event, EventKind, Watch, WatchOptions};
use super::write::{self, Part, WriteOptions};
use super::{discovery, obj, openapi};

/// Bodies larger than this are refused.
const BODY_LIMIT: usize = 3 * 1024 * 1024;

/// The router over a server.
pub fn router(server: Arc<ApiServer>) -> Router {
    Router::new().fallback(entry).with_state(server)
}

async fn entry(State(server): State<Arc<ApiServer>>, http: HttpRequest) -> Response {
    let (head, body) = http.into_parts();
    let request = Request::read(&head.method, &head.uri, &head.headers);
    let path = head.uri.path().to_owned();
    let outcome = match axum::body::to_bytes(body, BODY_LIMIT).await {
        Ok(bytes) => handle(&server, &request, &path, &head.headers, bytes).await,
        Err(_) => Err(ApiError::too_large()),
    };
    match outcome {
        Ok(response) => response,
        Err(error) => {
            tracing::debug!(method = %head.method, %path, code = error.code, %error, "request failed");
            let code = StatusCode::from_u16(error.code).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
            answer(&request, code, &error.status(), &[])
        }
    }
}

/// A response with an object.
fn answer(request: &Request, code: StatusCode, object: &Value, warnings: &[String]) -> Response {
    let (text, media) = if request.wants_yaml() {
        (serde_saphyr::to_string(object).unwrap_or_default(), "application/yaml")
    } else {
        (object.to_string(), "application/json")
    };
    let mut response = Response::new(Body::from(text));
    *response.status_mut() = code;
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(media));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache, private"));
    for warning in warnings {
        let text = warning.replace(['\\', '"'], "'").replace(|c: char| c.is_control(), " ");
        if let Ok(value) = HeaderValue::from_str(&format!("299 - \"{text}\"")) {
            headers.append(header::WARNING, value);
        }
    }
    response
}

fn plain_text(text: impl Into<Body>) -> Response {
    let mut response = Response::new(text.into());
    response
        .headers_mut()
        .insert(header::CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    response
}

async fn handle(
    server: &Arc<ApiServer>,
    request: &Request,
    path: &str,
    headers: &axum::http::HeaderMap,
    bytes: Bytes,
) -> ApiResult<Response> {
    if let Some(target) = Target::parse(path) {
        return resource_request(server, request, &target, &bytes).await;
    }
    if request.method != Method::GET && request.method != Method::HEAD {
        return Err(ApiError::method_not_allowed());
    }
    if let Some(response) = openapi::respond(server, path, request, headers)? {
        return Ok(response);
    }
    let parts: Vec<&str> = path.split('/').filter(|part| !part.is_empty()).collect();
    let ok = |object: Value| Ok(answer(request, StatusCode::OK, &object, &[]));
    match parts.as_slice() {
        ["healthz" | "readyz" | "livez", ..] => Ok(plain_text("ok")),
        ["version"] => ok(discovery::version()),
        ["api"] => ok(discovery::core_versions()),
        ["apis"] => ok(discovery::groups(server)),
        ["api", version] => ok(discovery::resources(server, "", version)?),
        ["apis", group] => ok(discovery::one_group(server, group)?),
        ["apis", group, version] => ok(discovery::resources(server, group, version)?),
        [] => ok(
            json!({"paths": ["/api", "/api/v1", "/apis", "/healthz", "/livez", "/openapi/v2", "/openapi/v3", "/readyz", "/version"]}),
        ),
        _ => Err(ApiError::unknown_path()),
    }
}

async fn resource_request(
    server: &Arc<ApiServer>,
    request: &Request,
    target: &Target,
    bytes: &Bytes,
) -> ApiResult<Response> {
    if let Some(response) = review_request(request, target, bytes)? {
        return Ok(response);
    }
    let resource = server
        .registry
        .get(&target.group, &target.version, &target.resource)
        .ok_or_else(ApiError::unknown_path)?;
    if !request.is_acceptable() {
        return Err(ApiError::not_acceptable());
    }
    // Namespaces and other cluster-wide resources have no namespace of their own; a namespaced object needs one.
    let is_misplaced = !resource.namespaced && target.namespace.is_some()
        || resource.namespaced && target.namespace.is_none() && target.name.is_some();
    if is_misplaced {
        return Err(ApiError::unknown_path());
    }
    let call = Call { server, request, target, resource: &resource, bytes };
    match (&target.name, target.subresource.as_deref()) {
        (None, _) => call.collection().await,
        (Some(name), None) => call.object(name, Part::Main).await,
        (Some(name), Some("status")) if resource.status => call.object(name, Part::Status).await,
        (Some(name), Some("scale")) if resource.scale.is_some() => call.scale(name),
        (Some(name), Some(sub)) => call.special(name, sub).await,
    }
}

fn review_request(request: &Request, target: &Target, bytes: &Bytes) -> ApiResult<Option<Response>> {
    if !["authorization.k8s.io", "authentication.k8s.io"].contains(&target.group.as_str()) {
        return Ok(None);
    }
    if request.method != Method::POST {
        return Err(ApiError::method_not_allowed());
    }
    let body = request::parse_body(&request.content_type, bytes)?;
    let reviewed = subresource::review(&target.group, &target.resource, body.value);
    let reviewed = reviewed.ok_or_else(ApiError::unknown_path)?;
    Ok(Some(answer(request, StatusCode::CREATED, &reviewed, &[])))
}

/// A request for one resource.
struct Call<'a> {
    server: &'a Arc<ApiServer>,
    request: &'a Request,
    target: &'a Target,
    resource: &'a Arc<Resource>,
    bytes: &'a Bytes,
}

impl Call<'_> {
    fn namespace(&self) -> Option<&str> {
        self.target.namespace.as_deref()
    }

    fn options(&self) -> ApiResult<WriteOptions> {
        Ok(WriteOptions {
            manager: self.request.manager().to_owned(),
            dry_run: self.request.query.dry_run()?,
            validation: self.request.field_validation()?,
            force: self.request.query.flag("force"),
            part: Part::Main,
            applied: false,
            warnings: Vec::new(),
        })
    }

    /// The body of a create or update.
    fn body(&self, warnings: &mut Vec<String>) -> ApiResult<Value> {
        let body = request::parse_body(&self.request.content_type, self.bytes)?;
        let mut options = self.options()?;
        let repeated = body.duplicates.iter().map(|path| format!("duplicate field \"{path}\""));
        write::report_unknown(repeated, &mut options)?;
        warnings.append(&mut options.warnings);
        Ok(body.value)
    }

    async fn collection(&self) -> ApiResult<Response> {
        match self.request.method {
            Method::GET | Method::HEAD => {
                let selection = Selection::read(&self.request.query, self.resource, self.namespace())?;
                if self.request.query.flag("watch") {
                    return self.watch(selection);
                }
                let page = self.server.page(self.resource, &selection, &self.request.query)?;
                Ok(self.show_list(&page))
            }
            Method::POST => {
                if self.resource.namespaced && self.namespace().is_none() {
                    return Err(ApiError::method_not_allowed());
                }
                let mut repeated = Vec::new();
                let object = self.body(&mut repeated)?;
                let mut options = self.options()?;
                let created =
                    self.server.create(self.resource, self.namespace(), object, &mut options).await?;
                options.warnings.extend(repeated);
                Ok(self.show(StatusCode::CREATED, &created, &options.warnings))
            }
            Method::DELETE => {
                let selection = Selection::read(&self.request.query, self.resource, self.namespace())?;
                let options = self.delete_options()?;
                let deleted = self.server.delete_all(self.resource, &selection, &options)?;
                let page = read::Page {
                    objects: deleted,
                    version: self.server.store.version(),
                    token: String::new(),
                    remaining: 0,
                };
                Ok(self.show_list(&page))
            }
            _ => Err(ApiError::method_not_allowed()),
        }
    }

    async fn object(&self, name: &str, part: Part) -> ApiResult<Response> {
        match self.request.method {
            Method::GET | Method::HEAD => {
                if part == Part::Main && self.request.query.flag("watch") {
                    return self.watch_one(name);
                }
                let object = self.server.get(self.resource, self.namespace(), name)?;
                Ok(self.show(StatusCode::OK, &object, &[]))
            }
            Method::PUT => {
                let mut repeated = Vec::new();
                let object = self.body(&mut repeated)?;
                let mut options = self.options()?.with_part(part);
                let updated =
                    self.server.update(self.resource, self.namespace(), name, object, &mut options).await?;
                options.warnings.extend(repeated);
                Ok(self.show(StatusCode::OK, &updated, &options.warnings))
            }
            Method::PATCH => {
                let mut options = self.options()?.with_part(part);
                let patch =
                    Patch::parse(self.resource, &self.request.content_type, self.bytes, &mut options)?;
                if matches!(patch, Patch::Apply(_)) && !self.request.query.has("fieldManager") {
                    return Err(ApiError::bad_request(
                        "fieldManager: Required value: is required for apply patch",
                    ));
                }
                let existed = self.server.get(self.resource, self.namespace(), name).is_ok();
                let patched =
                    self.server.patch(self.resource, self.namespace(), name, &patch, &mut options).await?;
                let code = if existed { StatusCode::OK } else { StatusCode::CREATED };
                Ok(self.show(code, &patched, &options.warnings))
            }
            Method::DELETE if part == Part::Main => {
                let options = self.delete_options()?;
                let deleted =
                    self.server.delete_admitted(self.resource, self.namespace(), name, &options).await?;
                Ok(self.show_deleted(&deleted))
            }
            _ => Err(ApiError::method_not_allowed()),
        }
    }

    fn delete_options(&self) -> ApiResult<DeleteOptions> {
        let body = if self.bytes.is_empty() {
            Value::Null
        } else {
            request::parse_body(&self.request.content_type, self.bytes)?.value
        };
        DeleteOptions::read(&body, &self.request.query)
    }

    fn show_deleted(&self, deleted: &Deleted) -> Response {
        let object = deleted.object();
        let whole = matches!(deleted, Deleted::Marked(_)) || self.resource.kind == "Pod";
        if whole {
            return self.show(StatusCode::OK, object, &[]);
        }
        let mut status = json!({
            "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success",
            "details": {"name": obj::name(object), "kind": self.resource.plural, "uid": obj::uid(object)},
        });
        if !self.resource.group.is_empty() {
            obj::set(&mut status, &["details", "group"], self.resource.group.clone());
        }
        answer(self.request, StatusCode::OK, &status, &[])
    }

    fn show(&self, code: StatusCode, object: &Value, warnings: &[String]) -> Response {
        let shown = if let Some(version) = self.request.wants_table() {
            let include = Include::read(self.request.query.get("includeObject"));
            let meta = json!({"resourceVersion": obj::version(object)});
            table::table(self.resource, version, meta, std::iter::once(object), include)
        } else if let Some(version) = self.request.wants_metadata() {
            table::partial(object, version)
        } else {
            read::present(self.resource, object)
        };
        answer(self.request, code, &shown, warnings)
    }

    fn show_list(&self, page: &read::Page) -> Response {
        let shown = if let Some(version) = self.request.wants_table() {
            let include = Include::read(self.request.query.get("includeObject"));
            let objects = page.objects.iter().map(|object| &**object);
            table::table(self.resource, version, read::list_meta(page), objects, include)
        } else if let Some(version) = self.request.wants_metadata() {
            let items: Vec<Value> =
                page.objects.iter().map(|object| table::partial(object, version)).collect();
            json!({
                "kind": "PartialObjectMetadataList", "apiVersion": format!("meta.k8s.io/{version}"),
                "metadata": read::list_meta(page), "items": items,
            })
        } else {
            read::list_object(self.resource, page)
        };
        answer(self.request, StatusCode::OK, &shown, &[])
    }

    fn watch_one(&self, name: &str) -> ApiResult<Response> {
        let mut selection = Selection::read(&self.request.query, self.resource, self.namespace())?;
        selection.fields =
            super::selector::Fields::parse(&format!("metadata.name={name}"), &self.resource.plural)?;
        self.watch(selection)
    }

    fn watch(&self, selection: Selection) -> ApiResult<Response> {
        let options = WatchOptions::read(&self.request.query)?;
        let watch = self.server.watch(self.resource, selection, &options)?;
        let form = Form {
            resource: self.resource.clone(),
            table: self.request.wants_table(),
            metadata: self.request.wants_metadata(),
            include: Include::read(self.request.query.get("includeObject")),
        };
        let lines = futures::stream::unfold((watch, form, true), next_line);
        let mut response = Response::new(Body::from_stream(lines));
        response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        Ok(response)
    }

    fn scale(&self, name: &str) -> ApiResult<Response> {
        let resource = self.resource;
        let mut options = self.options()?;
        let scale = match self.request.method {
            Method::GET | Method::HEAD => {
                let object = self.server.get(resource, self.namespace(), name)?;
                let paths = resource.scale.as_ref().ok_or_else(ApiError::unknown_path)?;
                subresource::scale_of(paths, &object)
            }
            Method::PUT => {
                let change = ScaleChange::Replace(self.body(&mut Vec::new())?);
                self.server.write_scale(resource, self.namespace(), name, &change, &mut options)?
            }
            Method::PATCH => {
                // A Scale has no lists: a strategic patch is a merge patch even for custom resources.
                let media = match self.request.content_type.as_str() {
                    media if media == MEDIA_TYPES[2] => MEDIA_TYPES[1],
                    media => media,
                };
                let change = ScaleChange::Patch(Patch::parse(resource, media, self.bytes, &mut options)?);
                self.server.write_scale(resource, self.namespace(), name, &change, &mut options)?
            }
            _ => return Err(ApiError::method_not_allowed()),
        };
        Ok(answer(self.request, StatusCode::OK, &scale, &options.warnings))
    }

    async fn special(&self, name: &str, sub: &str) -> ApiResult<Response> {
        let namespace = self.namespace().unwrap_or_default();
        let kind = if self.resource.custom { "" } else { self.resource.kind.as_str() };
        let success = || {
            answer(
                self.request,
                StatusCode::CREATED,
                &json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "code": 201}),
                &[],
            )
        };
        match (kind, sub, &self.request.method) {
            ("Pod", "log", &Method::GET) => self.log(namespace, name).await,
            ("Pod", "binding", &Method::POST) => {
                self.server.bind(namespace, name, &self.body(&mut Vec::new())?)?;
                Ok(success())
            }
            ("Pod", "eviction", &Method::POST) => {
                let body = self.body(&mut Vec::new())?;
                let options = body.get("deleteOptions").cloned().unwrap_or_default();
                self.server.evict(namespace, name, &DeleteOptions::read(&options, &self.request.query)?)?;
                Ok(success())
            }
            ("ServiceAccount", "token", &Method::POST) => {
                self.server.get(self.resource, Some(namespace), name)?;
                let token = subresource::token(namespace, name, self.body(&mut Vec::new())?);
                Ok(answer(self.request, StatusCode::CREATED, &token, &[]))
            }
            ("Namespace", "finalize", &Method::PUT) => {
                let object = self.body(&mut Vec::new())?;
                let finalized = self.server.finalize_namespace(name, &object)?;
                Ok(self.show(StatusCode::OK, &finalized, &[]))
            }
            ("Pod", "exec" | "attach" | "portforward", _) => Err(ApiError::bad_request(format!(
                "the lab's API does not serve {sub}; run `cargo xtask lab exec pod/{namespace}/{name} -- COMMAND` instead"
            ))),
            ("Pod", "log" | "binding" | "eviction", _)
            | ("ServiceAccount", "token", _)
            | ("Namespace", "finalize", _) => Err(ApiError::method_not_allowed()),
            _ => Err(ApiError::unknown_path()),
        }
    }

    async fn log(&self, namespace: &str, name: &str) -> ApiResult<Response> {
        let query = &self.request.query;
        let container = Some(query.get("container")).filter(|name| !name.is_empty());
        let file = self.server.pod_log_file(namespace, name, container, query.flag("previous"))?;
        let tail = query.number("tailLines").and_then(|lines| usize::try_from(lines).ok());
        let limit = query.number("limitBytes").and_then(|bytes| usize::try_from(bytes).ok());
        super::podlog::stream(self.server.clone(), file, namespace, name, tail, limit, query.flag("follow"))
            .await
            .map(plain_text)
    }
}

/// How watch events are shown.
struct Form {
    resource: Arc<Resource>,
    table: Option<&'static str>,
    metadata: Option<&'static str>,
    include: Include,
}

type Lines = (Watch, Form, bool);

async fn next_line((mut watch, form, is_first): Lines) -> Option<(Result<Bytes, Infallible>, Lines)> {
    let event = watch.next().await?;
    let object = form.show(&event, is_first);
    let mut line = json!({"type": event.kind.text(), "object": object}).to_string();
    line.push('\n');
    Some((Ok(Bytes::from(line)), (watch, form, false)))
}

impl Form {
    fn show(&self, event: &Event, is_first: bool) -> Value {
        let object = &*event.object;
        match (event.kind, self.table, self.metadata) {
            (EventKind::Error, _, _) => object.clone(),
            (kind, Some(version), _) => {
                let rows = (kind != EventKind::Bookmark).then_some(object);
                let meta = json!({"resourceVersion": obj::version(object)});
                let mut shown = table::table(&self.resource, version, meta, rows.into_iter(), self.include);
                if !is_first {
                    obj::set(&mut shown, &["columnDefinitions"], Value::Null);
                }
                shown
            }
            (_, None, Some(version)) => table::partial(object, version),
            (EventKind::Bookmark, None, None) => object.clone(),
            _ => read::present(&self.resource, object),
        }
    }
}
