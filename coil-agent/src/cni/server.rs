//! The gRPC server on the UNIX socket: thin, one span, one log line and one count per call.

use std::collections::BTreeSet;
use std::fs;
use std::future::Future;
use std::io;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use coil_runtime::tasks::Drain;
use tokio::net::UnixListener;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::{Request, Response, Status};
use tracing::{Instrument, Span};

use super::error::Failure;
use super::pod::Call;
use super::proto::cni_server::{Cni, CniServer, SERVICE_NAME};
use super::proto::{AddResponse, Attachment, CniArgs, GcArgs, StatusArgs};
use crate::metrics::{GrpcMetrics, grpc_code};

/// Methods of the service, for metrics.
pub const METHODS: [&str; 5] = ["Add", "Check", "Del", "Gc", "Status"];

/// Why the socket cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// There is a file of another kind where the socket should be.
    #[error("{} exists and is not a socket", .0.display())]
    NotASocket(PathBuf),
    /// The operating system refused.
    #[error("cannot {operation} {}", path.display())]
    Io {
        /// What was tried.
        operation: &'static str,
        /// On which file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

/// Listens on a UNIX socket, for root only; the socket of an earlier run is removed.
pub fn bind(path: &Path) -> Result<UnixListener, SocketError> {
    let error = |operation| move |source| SocketError::Io { operation, path: path.to_path_buf(), source };
    match fs::symlink_metadata(path) {
        Ok(meta) if meta.file_type().is_socket() => {
            fs::remove_file(path).map_err(error("remove"))?;
        }
        Ok(_) => return Err(SocketError::NotASocket(path.to_path_buf())),
        Err(source) if source.kind() == io::ErrorKind::NotFound => {}
        Err(source) => return Err(error("look at")(source)),
    }
    let listener = UnixListener::bind(path).map_err(error("listen on"))?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600)).map_err(error("protect"))?;
    Ok(listener)
}

/// What answers the calls, in one mode or the other.
pub trait Handler: Send + Sync + 'static {
    /// ADD: the result as JSON, empty if the plugin shall give the previous one.
    fn add(&self, call: Call) -> impl Future<Output = Result<Vec<u8>, Failure>> + Send;

    /// DEL.
    fn del(&self, call: Call) -> impl Future<Output = Result<(), Failure>> + Send;

    /// CHECK.
    fn check(&self, call: Call) -> impl Future<Output = Result<(), Failure>> + Send;

    /// GC: (container, interface) of all attachments that are still valid.
    fn gc(&self, valid: BTreeSet<(String, String)>) -> impl Future<Output = Result<(), Failure>> + Send;

    /// STATUS.
    fn status(&self) -> Result<(), Failure>;
}

/// Serves until drained, then finishes the calls that are running.
pub async fn serve<H: Handler>(
    listener: UnixListener,
    pods: H,
    metrics: GrpcMetrics,
    drain: Drain,
) -> Result<(), tonic::transport::Error> {
    let service = Service { pods: Arc::new(pods), metrics };
    tonic::transport::Server::builder()
        .add_service(CniServer::new(service))
        .serve_with_incoming_shutdown(UnixListenerStream::new(listener), drain.cancelled_owned())
        .await
}

struct Service<H> {
    pods: Arc<H>,
    metrics: GrpcMetrics,
}

impl<H: Handler> Service<H> {
    async fn call<T, F>(
        &self,
        method: &'static str,
        args: CniArgs,
        check: impl FnOnce(CniArgs) -> Result<Call, Failure>,
        work: impl FnOnce(Arc<H>, Call) -> F,
    ) -> Result<Response<T>, Status>
    where
        F: Future<Output = Result<T, Failure>>,
    {
        let arg = |key: &str| args.args.get(key).cloned().unwrap_or_default();
        let span = tracing::info_span!(
            "cni",
            grpc.service = SERVICE_NAME,
            grpc.method = method,
            grpc.request.pod.namespace = arg("K8S_POD_NAMESPACE"),
            grpc.request.pod.name = arg("K8S_POD_NAME"),
            grpc.request.netns = args.netns,
            grpc.request.ifname = args.ifname,
            grpc.request.container_id = args.container_id,
        );
        let pods = Arc::clone(&self.pods);
        let work = async { work(pods, check(args)?).await };
        self.observe(method, span, work).await
    }

    /// Counts and logs a call.
    async fn observe<T>(
        &self,
        method: &'static str,
        span: Span,
        work: impl Future<Output = Result<T, Failure>>,
    ) -> Result<Response<T>, Status> {
        let begun = Instant::now();
        self.metrics.started(SERVICE_NAME, method);
        // Counts also a call that its caller has given up.
        let _timer = self.metrics.time(SERVICE_NAME, method);
        let mut guard = Unfinished { metrics: &self.metrics, method, armed: true };
        let result = async {
            let result = work.await.map_err(|failure| (failure.code, Status::from(failure)));
            let code = result.as_ref().map_or_else(|(_, status)| status.code(), |_| tonic::Code::Ok);
            let time_ms = begun.elapsed().as_secs_f64() * 1000.0;
            match &result {
                Ok(_) => {
                    tracing::info!(grpc.code = grpc_code(code), grpc.time_ms = time_ms, "finished call");
                }
                Err((cni, status)) => tracing::warn!(
                    grpc.code = grpc_code(code),
                    grpc.time_ms = time_ms,
                    cni.code = i32::from(*cni),
                    error = status.message(),
                    "finished call"
                ),
            }
            guard.armed = false;
            self.metrics.handled(SERVICE_NAME, method, code);
            result
        }
        .instrument(span)
        .await;
        result.map(Response::new).map_err(|(_, status)| status)
    }
}

struct Unfinished<'a> {
    metrics: &'a GrpcMetrics,
    method: &'static str,
    armed: bool,
}

impl Drop for Unfinished<'_> {
    fn drop(&mut self) {
        if self.armed {
            self.metrics.handled(SERVICE_NAME, self.method, tonic::Code::Cancelled);
        }
    }
}

#[tonic::async_trait]
impl<H: Handler> Cni for Service<H> {
    async fn add(&self, request: Request<CniArgs>) -> Result<Response<AddResponse>, Status> {
        let work = |pods: Arc<H>, call| async move { Ok(AddResponse { result: pods.add(call).await? }) };
        self.call("Add", request.into_inner(), Call::of, work).await
    }

    async fn del(&self, request: Request<CniArgs>) -> Result<Response<()>, Status> {
        let work = |pods: Arc<H>, call| async move { pods.del(call).await };
        self.call("Del", request.into_inner(), Call::of_any, work).await
    }

    async fn check(&self, request: Request<CniArgs>) -> Result<Response<()>, Status> {
        let work = |pods: Arc<H>, call| async move { pods.check(call).await };
        self.call("Check", request.into_inner(), Call::of, work).await
    }

    async fn gc(&self, request: Request<GcArgs>) -> Result<Response<()>, Status> {
        let valid = request.into_inner().valid_attachments;
        let span = tracing::info_span!(
            "cni",
            grpc.service = SERVICE_NAME,
            grpc.method = "Gc",
            attachments = valid.len(),
        );
        let valid: BTreeSet<(String, String)> =
            valid.into_iter().map(|Attachment { container_id, ifname }| (container_id, ifname)).collect();
        self.observe("Gc", span, self.pods.gc(valid)).await
    }

    async fn status(&self, _: Request<StatusArgs>) -> Result<Response<()>, Status> {
        let span = tracing::info_span!("cni", grpc.service = SERVICE_NAME, grpc.method = "Status");
        self.observe("Status", span, async { self.pods.status() }).await
    }
}
