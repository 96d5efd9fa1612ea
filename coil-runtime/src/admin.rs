//! The plain HTTP servers of every daemon. Health: `/healthz`, `/livez`, `/readyz` and
//! `/readyz/<check>`, answering as controller-runtime does (`?verbose`, `?exclude=<check>`), and
//! `/log-level` for callers on the same host. Metrics: `/metrics`.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::str::FromStr;

use axum::Router;
use axum::extract::{ConnectInfo, Path, RawQuery, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use prometheus::Registry;
use tokio::net::TcpListener;

use crate::readiness::{CheckResult, Readiness};
use crate::tasks::Drain;
use crate::telemetry::LogHandle;

/// An address to listen on: `:9384` (all addresses, IPv4 and IPv6), `127.0.0.1:9384`, `[::1]:9384`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ListenAddr {
    /// Address; `None` for all.
    pub ip: Option<IpAddr>,
    /// Port; 0 for any.
    pub port: u16,
}

/// Not an address to listen on.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "want PORT after a colon with an address before it, or with none for all addresses, as :9384, 127.0.0.1:9384 or [::1]:9384"
)]
pub struct ListenAddrError;

impl FromStr for ListenAddr {
    type Err = ListenAddrError;

    fn from_str(text: &str) -> Result<Self, ListenAddrError> {
        let (host, port) = text.rsplit_once(':').ok_or(ListenAddrError)?;
        let port = port.parse().map_err(|_| ListenAddrError)?;
        let ip = match host {
            "" => None,
            "localhost" => Some(IpAddr::V4(Ipv4Addr::LOCALHOST)),
            _ => match host.strip_prefix('[').and_then(|h| h.strip_suffix(']')) {
                Some(v6) => Some(IpAddr::V6(v6.parse().map_err(|_| ListenAddrError)?)),
                None => Some(IpAddr::V4(host.parse().map_err(|_| ListenAddrError)?)),
            },
        };
        Ok(Self { ip, port })
    }
}

impl fmt::Display for ListenAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.ip {
            None => write!(f, ":{}", self.port),
            Some(ip) => write!(f, "{}", SocketAddr::new(ip, self.port)),
        }
    }
}

/// An address cannot be listened on.
#[derive(Debug, thiserror::Error)]
#[error("cannot listen on {address} (flag {flag})")]
pub struct BindError {
    /// The flag that named it.
    pub flag: &'static str,
    /// The address.
    pub address: ListenAddr,
    /// Why not.
    #[source]
    pub source: std::io::Error,
}

/// Listens. All addresses means both families where the kernel has IPv6.
///
/// # Errors
/// The address is taken or does not exist; the error names the flag.
pub async fn bind(flag: &'static str, address: &ListenAddr) -> Result<TcpListener, BindError> {
    let attempt = match address.ip {
        Some(ip) => TcpListener::bind((ip, address.port)).await,
        None => match TcpListener::bind((Ipv6Addr::UNSPECIFIED, address.port)).await {
            Err(error) if error.kind() != std::io::ErrorKind::AddrInUse => {
                TcpListener::bind((Ipv4Addr::UNSPECIFIED, address.port)).await
            }
            result => result,
        },
    };
    attempt.map_err(|source| BindError { flag, address: *address, source })
}

/// Serves health until drained.
///
/// # Errors
/// The listener fails.
pub async fn serve_health(
    listener: TcpListener,
    readiness: Readiness,
    log: LogHandle,
    drain: Drain,
) -> std::io::Result<()> {
    let router = health_router(readiness, log).into_make_service_with_connect_info::<SocketAddr>();
    axum::serve(listener, router).with_graceful_shutdown(drain.cancelled_owned()).await
}

/// Serves metrics until drained.
///
/// # Errors
/// The listener fails.
pub async fn serve_metrics(listener: TcpListener, registry: Registry, drain: Drain) -> std::io::Result<()> {
    axum::serve(listener, metrics_router(registry)).with_graceful_shutdown(drain.cancelled_owned()).await
}

/// Routes of the metrics server, for programs that add their own.
pub fn metrics_router(registry: Registry) -> Router {
    Router::new().route("/metrics", get(metrics)).with_state(registry)
}

fn health_router(readiness: Readiness, log: LogHandle) -> Router {
    let checks = Router::new()
        .route("/healthz", get(healthz))
        .route("/healthz/{check}", get(healthz_one))
        .route("/livez", get(healthz))
        .route("/livez/{check}", get(healthz_one))
        .route("/readyz", get(readyz))
        .route("/readyz/{check}", get(readyz_one))
        .with_state(readiness);
    let level = Router::new().route("/log-level", get(log_level).put(set_log_level)).with_state(log);
    checks.merge(level)
}

async fn healthz(State(readiness): State<Readiness>, RawQuery(query): RawQuery) -> Response {
    all("healthz", readiness.healthz(), query.as_deref())
}

async fn readyz(State(readiness): State<Readiness>, RawQuery(query): RawQuery) -> Response {
    all("readyz", readiness.readyz(), query.as_deref())
}

async fn healthz_one(State(readiness): State<Readiness>, Path(check): Path<String>) -> Response {
    one(readiness.healthz(), &check)
}

async fn readyz_one(State(readiness): State<Readiness>, Path(check): Path<String>) -> Response {
    one(readiness.readyz(), &check)
}

/// Unlike controller-runtime we say why a check failed: a probe has no secrets.
fn all(endpoint: &str, checks: Vec<CheckResult>, query: Option<&str>) -> Response {
    let parameters: Vec<(&str, &str)> =
        query.unwrap_or_default().split('&').map(|p| p.split_once('=').unwrap_or((p, ""))).collect();
    let verbose = parameters.iter().any(|(key, _)| *key == "verbose");
    let excluded = |name: &str| parameters.contains(&("exclude", name));
    let mut text = String::new();
    let mut failed = false;
    for check in checks {
        match check.outcome {
            _ if excluded(check.name) => text.push_str(&format!("[+]{} excluded: ok\n", check.name)),
            Ok(()) => text.push_str(&format!("[+]{} ok\n", check.name)),
            Err(reason) => {
                failed = true;
                text.push_str(&format!("[-]{} failed: {reason}\n", check.name));
            }
        }
    }
    if failed {
        (StatusCode::INTERNAL_SERVER_ERROR, format!("{text}{endpoint} check failed\n")).into_response()
    } else if verbose {
        format!("{text}{endpoint} check passed\n").into_response()
    } else {
        "ok".into_response()
    }
}

fn one(checks: Vec<CheckResult>, name: &str) -> Response {
    match checks.into_iter().find(|c| c.name == name).map(|c| c.outcome) {
        None => (StatusCode::NOT_FOUND, "404 page not found\n").into_response(),
        Some(Ok(())) => "ok".into_response(),
        Some(Err(reason)) => {
            (StatusCode::INTERNAL_SERVER_ERROR, format!("internal server error: {reason}\n")).into_response()
        }
    }
}

async fn log_level(State(log): State<LogHandle>) -> String {
    format!("{}\n", log.filter())
}

/// Debug output costs time, so only whoever is on the host already may ask for it.
async fn set_log_level(
    State(log): State<LogHandle>,
    ConnectInfo(peer): ConnectInfo<SocketAddr>,
    filter: String,
) -> Response {
    if !peer.ip().to_canonical().is_loopback() {
        return (StatusCode::FORBIDDEN, "only from this host\n").into_response();
    }
    match log.set_filter(filter.trim()) {
        Ok(()) => {
            tracing::info!(filter = filter.trim(), "log filter changed");
            "ok\n".into_response()
        }
        Err(error) => (StatusCode::BAD_REQUEST, format!("{error}\n")).into_response(),
    }
}

/// Collectors may read kernel maps, which takes a while.
async fn metrics(State(registry): State<Registry>) -> Response {
    match tokio::task::spawn_blocking(move || crate::metrics::render(&registry)).await {
        Ok(Ok(text)) => ([(header::CONTENT_TYPE, prometheus::TEXT_FORMAT)], text).into_response(),
        Ok(Err(error)) => failure(&error),
        Err(error) => failure(&error),
    }
}

fn failure(error: &(dyn std::error::Error + 'static)) -> Response {
    tracing::warn!(error, "cannot collect metrics");
    (StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")).into_response()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use axum::body::{Body, to_bytes};
    use axum::http::Request;
    use tower::ServiceExt;

    async fn ask(router: &Router, path: &str) -> (u16, String) {
        let request = Request::get(path).body(Body::empty()).unwrap();
        let response = router.clone().oneshot(request).await.unwrap();
        let status = response.status().as_u16();
        (status, String::from_utf8(to_bytes(response.into_body(), 1 << 20).await.unwrap().to_vec()).unwrap())
    }

    #[tokio::test]
    async fn answers_as_controller_runtime_does() {
        let readiness = Readiness::new();
        let blocker = readiness.blocker("pod-sync");
        let router = health_router(readiness, LogHandle::detached());
        assert_eq!(ask(&router, "/healthz").await, (200, "ok".into()));
        assert_eq!(
            ask(&router, "/healthz?verbose").await,
            (200, "[+]ping ok\nhealthz check passed\n".into())
        );
        let (status, text) = ask(&router, "/readyz").await;
        assert_eq!(
            (status, text.as_str()),
            (500, "[+]ping ok\n[-]pod-sync failed: not done yet\nreadyz check failed\n")
        );
        assert_eq!(ask(&router, "/readyz?exclude=pod-sync").await, (200, "ok".into()));
        assert_eq!(ask(&router, "/readyz/pod-sync").await.0, 500);
        assert_eq!(ask(&router, "/readyz/nothing").await.0, 404);
        drop(blocker);
        assert_eq!(ask(&router, "/readyz").await, (200, "ok".into()));
        assert_eq!(ask(&router, "/readyz/pod-sync").await, (200, "ok".into()));
    }

    #[tokio::test]
    async fn metrics_are_text() {
        let router = metrics_router(crate::metrics::registry("test").unwrap());
        let (status, text) = ask(&router, "/metrics").await;
        assert_eq!(status, 200);
        assert!(text.contains("coil_build_info"));
    }

    #[test]
    fn addresses() {
        for (text, want) in [
            (":9384", Some(":9384")),
            ("127.0.0.1:1", Some("127.0.0.1:1")),
            ("[::1]:1", Some("[::1]:1")),
            ("localhost:1", Some("127.0.0.1:1")),
            ("9384", None),
            (":", None),
            (":99999", None),
            ("::1:80", None),
            ("example.org:80", None),
        ] {
            assert_eq!(text.parse::<ListenAddr>().ok().map(|a| a.to_string()).as_deref(), want, "{text}");
        }
    }

    #[tokio::test]
    async fn all_addresses_are_of_both_families_and_a_taken_port_names_the_flag() {
        let listener = bind("--health-addr", &":0".parse().unwrap()).await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let drain = Drain::new();
        let server =
            tokio::spawn(serve_health(listener, Readiness::new(), LogHandle::detached(), drain.clone()));
        for host in ["127.0.0.1", "::1"] {
            let ip: IpAddr = host.parse().unwrap();
            assert!(tokio::net::TcpStream::connect((ip, port)).await.is_ok(), "{host}");
        }
        let taken = ListenAddr { ip: None, port };
        let error = bind("--health-addr", &taken).await.unwrap_err().to_string();
        assert!(error.contains("--health-addr") && error.contains(&port.to_string()), "{error}");
        drain.cancel();
        server.await.unwrap().unwrap();
    }
}
