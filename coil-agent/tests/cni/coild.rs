//! A stand-in for `coild`: answers as it was told and remembers what it was asked.

use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use coil_agent::cni::error::Failure;
use coil_agent::cni::proto::cni_server::{Cni, CniServer};
use coil_agent::cni::proto::{AddResponse, CniArgs, GcArgs, StatusArgs};
use coil_agent::cni::server::bind;
use tokio::runtime::Runtime;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::{Request, Response, Status};

/// What was asked.
#[derive(Clone, Debug, PartialEq)]
pub enum Asked {
    /// ADD, DEL or CHECK.
    Container(&'static str, Box<CniArgs>),
    /// GC.
    Gc(GcArgs),
    /// STATUS.
    Status,
}

/// What it says.
#[derive(Clone, Default)]
pub struct Script {
    /// Result of ADD.
    pub result: Vec<u8>,
    /// Every call fails with this.
    pub failure: Option<Failure>,
    /// It is of before GC and STATUS.
    pub old: bool,
}

/// A server that lives as long as this.
pub struct Coild {
    /// Its socket.
    pub socket: PathBuf,
    asked: Arc<Mutex<Vec<Asked>>>,
    _runtime: Runtime,
}

impl Coild {
    /// Starts one.
    pub fn start(script: Script) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let socket = std::env::temp_dir().join(format!("coild-{}-{number}.sock", std::process::id()));
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let asked = Arc::<Mutex<Vec<Asked>>>::default();
        let service = Service { script, asked: Arc::clone(&asked) };
        let listener = runtime.block_on(async { bind(&socket) }).unwrap();
        runtime.spawn(async {
            tonic::transport::Server::builder()
                .add_service(CniServer::new(service))
                .serve_with_incoming(UnixListenerStream::new(listener))
                .await
                .unwrap();
        });
        Self { socket, asked, _runtime: runtime }
    }

    /// What it was asked since the last time.
    pub fn asked(&self) -> Vec<Asked> {
        std::mem::take(&mut self.asked.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Drop for Coild {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_file(&self.socket) {
            eprintln!("cannot remove {}: {error}", self.socket.display());
        }
    }
}

struct Service {
    script: Script,
    asked: Arc<Mutex<Vec<Asked>>>,
}

impl Service {
    fn answer<T>(&self, asked: Asked, answer: T) -> Result<Response<T>, Status> {
        self.asked.lock().unwrap_or_else(PoisonError::into_inner).push(asked);
        match &self.script.failure {
            Some(failure) => Err(failure.clone().into()),
            None => Ok(Response::new(answer)),
        }
    }

    fn new_call(&self, asked: Asked) -> Result<Response<()>, Status> {
        if self.script.old {
            return Err(Status::unimplemented("unknown method"));
        }
        self.answer(asked, ())
    }
}

#[tonic::async_trait]
impl Cni for Service {
    async fn add(&self, request: Request<CniArgs>) -> Result<Response<AddResponse>, Status> {
        let result = self.script.result.clone();
        self.answer(Asked::Container("ADD", Box::new(request.into_inner())), AddResponse { result })
    }

    async fn del(&self, request: Request<CniArgs>) -> Result<Response<()>, Status> {
        self.answer(Asked::Container("DEL", Box::new(request.into_inner())), ())
    }

    async fn check(&self, request: Request<CniArgs>) -> Result<Response<()>, Status> {
        self.answer(Asked::Container("CHECK", Box::new(request.into_inner())), ())
    }

    async fn gc(&self, request: Request<GcArgs>) -> Result<Response<()>, Status> {
        self.new_call(Asked::Gc(request.into_inner()))
    }

    async fn status(&self, _: Request<StatusArgs>) -> Result<Response<()>, Status> {
        self.new_call(Asked::Status)
    }
}
