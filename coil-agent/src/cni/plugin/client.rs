//! One call to `coild` over its socket.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tonic::Code;
use tonic::transport::{Channel, Endpoint, Uri};

use super::PluginError;
use crate::cni::error::causes;
use crate::cni::proto::cni_client::CniClient;
use crate::cni::proto::{CniArgs, ErrorCode, GcArgs, StatusArgs};

/// Time for a call, as in the original.
const TIMEOUT: Duration = Duration::from_secs(60);
/// A queue of connections that is full is tried again after this.
const QUEUE_RETRY: Duration = Duration::from_millis(5);

/// What is asked of `coild`.
pub(super) enum Method {
    /// Wire a container; the answer is its result.
    Add(CniArgs),
    /// Undo it.
    Del(CniArgs),
    /// See whether it is wired.
    Check(CniArgs),
    /// Remove what is not on a list.
    Gc(GcArgs),
    /// See whether ADD can be served.
    Status(StatusArgs),
}

/// Calls `coild` and returns the bytes of its answer, of which only ADD has any.
pub(super) fn call(socket: &str, method: Method) -> Result<Vec<u8>, PluginError> {
    let internal =
        |error: io::Error| PluginError::new(ErrorCode::Internal, "failed to call coild", causes(&error));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(internal)?;
    runtime.block_on(async {
        let channel = tokio::time::timeout(TIMEOUT, connect(socket))
            .await
            .unwrap_or_else(|_| Err(unavailable(socket, "nobody accepts the connection")))?;
        ask(CniClient::new(channel), method).await
    })
}

fn unavailable(socket: &str, why: &str) -> PluginError {
    PluginError::new(ErrorCode::TryAgainLater, "failed to connect to coild", format!("{socket}: {why}"))
}

async fn connect(socket: &str) -> Result<Channel, PluginError> {
    let path = PathBuf::from(socket);
    let connector = tower::service_fn(move |_: Uri| {
        let path = path.clone();
        async move {
            loop {
                match UnixStream::connect(&path).await {
                    // Many plugins at a time: coild has not accepted the others yet.
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                        tokio::time::sleep(QUEUE_RETRY).await;
                    }
                    other => return other.map(TokioIo::new),
                }
            }
        }
    });
    // The address is not used: the connector knows the socket.
    Endpoint::from_static("http://coild")
        .timeout(TIMEOUT)
        .connect_with_connector(connector)
        .await
        .map_err(|error| unavailable(socket, &causes(&error)))
}

async fn ask(mut client: CniClient<Channel>, method: Method) -> Result<Vec<u8>, PluginError> {
    match method {
        Method::Add(args) => return Ok(client.add(request(args)).await?.into_inner().result),
        Method::Del(args) => client.del(request(args)).await.map(drop)?,
        Method::Check(args) => client.check(request(args)).await.map(drop)?,
        Method::Gc(args) => known(client.gc(request(args)).await)?,
        Method::Status(args) => known(client.status(request(args)).await)?,
    }
    Ok(Vec::new())
}

/// A `coild` of before these calls has nothing to say to them; it is there, and its own collection of
/// garbage does what GC asks for.
fn known(answer: Result<tonic::Response<()>, tonic::Status>) -> Result<(), tonic::Status> {
    match answer {
        Err(status) if status.code() != Code::Unimplemented => Err(status),
        _ => Ok(()),
    }
}

fn request<T>(args: T) -> tonic::Request<T> {
    let mut request = tonic::Request::new(args);
    request.set_timeout(TIMEOUT);
    request
}
